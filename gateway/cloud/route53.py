"""Keep the records of a fleet in Amazon Route 53: one multivalue answer record of type A or AAAA for each node.

    -> ChangeResourceRecordSets   UPSERT  name A 192.0.2.7, SetIdentifier: node_id          announce
    -> ListResourceRecordSets     from the name on, until another name follows              withdraw, announced
    -> ChangeResourceRecordSets   DELETE each record as it was listed, in one batch         withdraw

A batch is atomic, and a DELETE must equal the whole record. A batch that is refused because a record was changed or
removed meanwhile is built again from a new list.
"""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar

import boto3
import botocore.config
from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError
from twisted.internet.defer import Deferred
from zope.interface import implementer

from gateway.cloud.errors import NameServiceError
from gateway.cloud.registrar import INameService
from gateway.util.log import one_line
from gateway.util.threads import DaemonThreadPool

T = TypeVar("T")

#: seconds
CONNECT_TIMEOUT = 3.0
#: seconds
READ_TIMEOUT = 5.0
#: batches sent for one withdrawal
MAX_WITHDRAW_ATTEMPTS = 3

_THROTTLING_CODES = frozenset(
    {"Throttling", "ThrottlingException", "ThrottledException", "PriorRequestNotComplete", "TooManyRequests"}
    | {"TooManyRequestsException", "RequestLimitExceeded", "RequestThrottled", "RequestThrottledException", "SlowDown"}
)
#: error codes that need a change of the configuration -> text for the operator
_PERMANENT_ERRORS = {
    "NoSuchHostedZone": "there is no hosted zone {zone} in this AWS account",
    "AccessDenied": "these AWS credentials lack permission (hosted zone {zone} needs "
    "route53:ChangeResourceRecordSets and route53:ListResourceRecordSets): {message}",
    "InvalidClientTokenId": "AWS does not know these credentials",
    "UnrecognizedClientException": "AWS does not know these credentials",
    "SignatureDoesNotMatch": "the secret of these AWS credentials is wrong: {message}",
    "ExpiredToken": "these AWS credentials have expired",
    "NoSuchHealthCheck": "the health check of health-check= does not exist: {message}",
    "InvalidChangeBatch": "hosted zone {zone} refuses the record {name}: {message}",
    "InvalidInput": "hosted zone {zone} refuses the record {name}: {message}",
    "LimitsExceeded": "hosted zone {zone} has reached its limit of records: {message}",
}
_PERMANENT_ERRORS["AccessDeniedException"] = _PERMANENT_ERRORS["AccessDenied"]
_PERMANENT_ERRORS["ExpiredTokenException"] = _PERMANENT_ERRORS["ExpiredToken"]

_NO_CREDENTIALS = (
    "there are no AWS credentials: give the instance a role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)

_ESCAPED = re.compile(r"\\([0-7]{3})")


def make_client() -> Any:
    """Make a boto3 client without retries, with the credentials of the environment, ~/.aws or the instance."""
    config = botocore.config.Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        retries={"total_max_attempts": 1},
        user_agent_extra="wsgateway",
    )
    session = boto3.session.Session()
    # Route 53 is global, but boto3 needs a region for a custom endpoint, and to tell AWS from AWS in China.
    return session.client("route53", region_name=session.region_name or "us-east-1", config=config)


@implementer(INameService)
class Route53NameService:
    """Keep the records of ``name`` in the hosted zone with the id ``zone``.

    ``ttl`` is in seconds. ``health_check`` is the id of a health check for this node's record, or empty.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        zone: str,
        name: str,
        ttl: int,
        health_check: str = "",
        make_client: Callable[[], Any] = make_client,
    ) -> None:
        self._zone = zone
        self._name = name
        self._ttl = ttl
        self._health_check = health_check
        self._make_client = make_client
        self._client: Any = None
        self._client_lock = Lock()
        self._thread_pool = DaemonThreadPool(reactor, "route53", 2)

    def announce(self, node_id: str, address: str) -> Deferred[None]:
        record: dict[str, Any] = {
            "Name": self._name,
            "Type": "A" if ipaddress.ip_address(address).version == 4 else "AAAA",
            "SetIdentifier": node_id,
            "MultiValueAnswer": True,
            "TTL": self._ttl,
            "ResourceRecords": [{"Value": address}],
        }
        if self._health_check:
            record["HealthCheckId"] = self._health_check
        return self._run(lambda client: self._change(client, "UPSERT", [record]))

    def withdraw(self, node_ids: frozenset[str]) -> Deferred[frozenset[str]]:
        return self._run(lambda client: self._withdraw(client, node_ids))

    def announced(self) -> Deferred[dict[str, str]]:
        return self._run(
            lambda client: {record["SetIdentifier"]: _record_address(record) for record in self._list_records(client)}
        )

    def close(self) -> Deferred[None]:
        return self._thread_pool.close().addCallback(lambda _: self._close_client())

    def _close_client(self) -> None:
        if self._client is not None:
            self._client.close()

    # Run in a thread.

    def _run(self, work: Callable[[Any], T]) -> Deferred[T]:
        return self._thread_pool.run(lambda: self._with_translated_errors(work))

    def _with_translated_errors(self, work: Callable[[Any], T]) -> T:
        try:
            return work(self._get_client())
        except ClientError as e:
            raise self._translate_error(e) from None
        except NameServiceError:
            raise
        except (NoCredentialsError, PartialCredentialsError) as e:
            # A client looks for credentials only once, and there may be some at the next request.
            self._client = None
            raise NameServiceError(f"{_NO_CREDENTIALS} ({one_line(e)})", permanent=True) from None
        except Exception as e:  # noqa: BLE001 - botocore's exceptions have no common base class
            raise NameServiceError(f"the request to Route 53 failed: {one_line(e) or type(e).__name__}") from None

    def _get_client(self) -> Any:
        with self._client_lock:
            if self._client is None:
                self._client = self._make_client()
            return self._client

    def _list_records(self, client: Any) -> list[dict[str, Any]]:
        """Return the records that were made by nodes."""
        pages = client.get_paginator("list_resource_record_sets").paginate(
            HostedZoneId=self._zone, StartRecordName=self._name, StartRecordType="A"
        )
        records: list[dict[str, Any]] = []
        for page in pages:
            for record in page["ResourceRecordSets"]:
                if _unescape_name(record["Name"]) != self._name:
                    return records
                if _is_node_record(record):
                    records.append(record)
        return records

    def _withdraw(self, client: Any, node_ids: frozenset[str]) -> frozenset[str]:
        for attempts_left in reversed(range(MAX_WITHDRAW_ATTEMPTS)):
            records = [record for record in self._list_records(client) if record["SetIdentifier"] in node_ids]
            if not records:
                break
            try:
                self._change(client, "DELETE", records)
                return frozenset(record["SetIdentifier"] for record in records)
            except ClientError as e:
                if _error_code(e) != "InvalidChangeBatch":
                    raise
                if not attempts_left:
                    problem = f"the records of {self._name} keep changing during the withdrawal: {_error_message(e)}"
                    raise NameServiceError(problem) from None
        return frozenset()

    def _change(self, client: Any, action: str, records: list[dict[str, Any]]) -> None:
        changes = [{"Action": action, "ResourceRecordSet": record} for record in records]
        client.change_resource_record_sets(HostedZoneId=self._zone, ChangeBatch={"Changes": changes})

    def _translate_error(self, error: ClientError) -> NameServiceError:
        code, message = _error_code(error), _error_message(error)
        if code in _THROTTLING_CODES:
            return NameServiceError(f"Route 53 throttles requests ({code})", throttled=True)
        if code in _PERMANENT_ERRORS:
            problem = _PERMANENT_ERRORS[code].format(zone=self._zone, name=self._name, message=message)
            return NameServiceError(problem, permanent=True)
        return NameServiceError(f"Route 53 answered {code}: {message}")


def _error_code(error: ClientError) -> str:
    # InvalidChangeBatch has a second form, in which botocore finds no code.
    code = error.response.get("Error", {}).get("Code")
    return one_line(code or ("InvalidChangeBatch" if "Messages" in error.response else "unknown"))


def _error_message(error: ClientError) -> str:
    return one_line(error.response.get("Error", {}).get("Message") or error.response.get("Messages", ""))


def _unescape_name(name: str) -> str:
    r"""Return a listed name in lower case, without escapes (``\052`` is an asterisk) and trailing dot."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), name).rstrip(".").lower()


def _is_node_record(record: dict[str, Any]) -> bool:
    """Whether a record was made by a node: its identifier is a UUID."""
    identifier = record.get("SetIdentifier", "")
    try:
        canonical = str(uuid.UUID(identifier)) == identifier
    except ValueError:
        return False
    return canonical and record["Type"] in ("A", "AAAA") and bool(record.get("MultiValueAnswer"))


def _record_address(record: dict[str, Any]) -> str:
    values = [value["Value"] for value in record.get("ResourceRecords", ())]
    try:
        return str(ipaddress.ip_address(values[0])) if len(values) == 1 else ""
    except ValueError:
        return ""
