"""Tests of gateway.cloud.route53, with moto, with stubbed responses and with generated records."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import uuid
from collections.abc import Iterator
from typing import Any

from botocore.exceptions import ClientError
from botocore.stub import Stubber
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.cloud.errors import NameServiceError
from gateway.cloud.route53 import (
    MAX_WITHDRAW_ATTEMPTS,
    Route53NameService,
    _is_node_record,
    _record_address,
    _unescape_name,
    make_client,
)
from tests.builders.ports import free_port
from tests.fakes import moto

NAME = "gw.example.com"


def node_id() -> str:
    return str(uuid.uuid4())


class Route53TestCase(TestCase):
    def setUp(self) -> None:
        self.environment({name: None for name in os.environ if name.startswith("AWS_")})

    def environment(self, values: dict[str, str | None]) -> None:
        before = {name: os.environ.get(name) for name in values}

        def set_all(values: dict[str, str | None]) -> None:
            for name, value in values.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

        set_all(values)
        self.addCleanup(set_all, before)

    def service(self, **more: Any) -> Route53NameService:
        from twisted.internet import reactor

        service = Route53NameService(reactor, **{"zone": "Z1", "name": NAME, "ttl": 30, **more})
        self.addCleanup(service.close)
        return service

    @inlineCallbacks
    def failure(self, request: Deferred[Any]) -> Any:
        """Return the text of the failure, which must be one line, and whether it is throttled and permanent."""
        with self.assertRaises(NameServiceError) as raised:
            yield request
        error = raised.exception
        self.assertNotIn("\n", str(error))
        return str(error), error.throttled, error.permanent


class MotoTests(Route53TestCase):
    """Tests of the real client with moto's server."""

    def setUp(self) -> None:
        super().setUp()
        self.server = moto.server()
        self.environment(dict(self.server.environment))
        # Route 53 is global.
        self.environment({"AWS_DEFAULT_REGION": None})
        self.client = _client()
        zone = self.client.create_hosted_zone(Name="example.com", CallerReference=node_id())["HostedZone"]
        self.zone = zone["Id"].removeprefix("/hostedzone/")
        self.route53 = self.service(zone=self.zone, make_client=_default_client)

    def records(self, name: str = NAME) -> list[dict[str, Any]]:
        address = self.client.list_resource_record_sets(HostedZoneId=self.zone)["ResourceRecordSets"]
        return [record for record in address if record["Name"] == f"{name}."]

    def put(self, **record: Any) -> None:
        change = {"Action": "UPSERT", "ResourceRecordSet": {"Type": "A", "TTL": 5, **record}}
        self.client.change_resource_record_sets(HostedZoneId=self.zone, ChangeBatch={"Changes": [change]})

    @inlineCallbacks
    def test_announce_and_withdraw(self) -> Any:
        a, b = node_id(), node_id()
        yield self.route53.announce(a, "192.0.2.1")
        yield self.route53.announce(b, "2001:db8::2")
        yield self.route53.announce(a, "192.0.2.1")
        self.assertEqual((yield self.route53.announced()), {a: "192.0.2.1", b: "2001:db8::2"})
        first, second = sorted(self.records(), key=lambda record: record["Type"])
        self.assertEqual(
            first,
            {
                "Name": f"{NAME}.",
                "Type": "A",
                "SetIdentifier": a,
                "MultiValueAnswer": True,
                "TTL": 30,
                "ResourceRecords": [{"Value": "192.0.2.1"}],
            },
        )
        self.assertEqual((second["Type"], second["ResourceRecords"]), ("AAAA", [{"Value": "2001:db8::2"}]))
        yield self.route53.withdraw(frozenset([a, node_id()]))
        self.assertEqual((yield self.route53.announced()), {b: "2001:db8::2"})
        yield self.route53.withdraw(frozenset([a]))
        yield self.route53.withdraw(frozenset([a, b]))
        self.assertEqual(self.records(), [])

    @inlineCallbacks
    def test_health_check(self) -> Any:
        config = {"Type": "TCP", "IPAddress": "192.0.2.1", "Port": 80}
        check = self.client.create_health_check(CallerReference=node_id(), HealthCheckConfig=config)["HealthCheck"]
        route53 = self.service(zone=self.zone, health_check=check["Id"], ttl=7, make_client=_default_client)
        yield route53.announce(node_id(), "192.0.2.1")
        (record,) = self.records()
        self.assertEqual((record["HealthCheckId"], record["TTL"]), (check["Id"], 7))
        yield route53.withdraw(frozenset([record["SetIdentifier"]]))
        self.assertEqual(self.records(), [])

    @inlineCallbacks
    def test_two_concurrent_announcements(self) -> Any:
        nodes = {node_id(): f"192.0.2.{number}" for number in range(1, 7)}
        for node, address in nodes.items():
            self.route53.announce(node, address).addErrback(self.fail)
        yield self.route53.close()
        self.assertEqual({record["SetIdentifier"] for record in self.records()}, set(nodes))

    @inlineCallbacks
    def test_records_not_made_by_nodes_stay(self) -> Any:
        mine = node_id()
        yield self.route53.announce(mine, "192.0.2.1")
        value = {"ResourceRecords": [{"Value": "192.0.2.9"}]}
        self.put(Name=NAME, SetIdentifier="by hand", MultiValueAnswer=True, **value)
        self.put(Name=NAME, SetIdentifier=node_id(), Weight=1, **value)
        self.put(Name="gx.example.com", SetIdentifier=node_id(), MultiValueAnswer=True, **value)
        self.put(Name=f"a.{NAME}", SetIdentifier=node_id(), MultiValueAnswer=True, **value)
        self.assertEqual((yield self.route53.announced()), {mine: "192.0.2.1"})
        yield self.route53.withdraw(frozenset(record["SetIdentifier"] for record in self.records()))
        self.assertEqual(len(self.records()), 2)

    @inlineCallbacks
    def test_unknown_zone(self) -> Any:
        problem = yield self.failure(
            self.service(zone="Z404", make_client=_default_client).announce(node_id(), "192.0.2.1")
        )
        self.assertEqual(problem, ("there is no hosted zone Z404 in this AWS account", False, True))

    @inlineCallbacks
    def test_name_outside_the_zone(self) -> Any:
        service = self.service(zone=self.zone, name="gw.example.org", make_client=_default_client)
        problem, _, hopeless = yield self.failure(service.announce(node_id(), "192.0.2.1"))
        self.assertTrue(hopeless)
        self.assertIn("refuses the record gw.example.org", problem)
        self.assertIn("is not permitted in zone example.com", problem)

    @inlineCallbacks
    def test_credentials_are_looked_for_again(self) -> Any:
        self.environment({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None})
        route53 = self.service(zone=self.zone)
        problem, _, hopeless = yield self.failure(route53.announce(node_id(), "192.0.2.1"))
        self.assertTrue(hopeless)
        self.assertIn("there are no AWS credentials: give the instance a role", problem)
        self.environment({"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"})
        yield route53.announce(node_id(), "192.0.2.1")
        self.assertEqual(len(self.records()), 1)

    @inlineCallbacks
    def test_connection_refused(self) -> Any:
        self.environment({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"})
        problem, throttled, hopeless = yield self.failure(self.service().announced())
        self.assertIn("the request to Route 53 failed: Could not connect to the endpoint", problem)
        self.assertEqual((throttled, hopeless), (False, False))


class StubbedTests(Route53TestCase):
    """Responses that moto never sends."""

    def setUp(self) -> None:
        super().setUp()
        self.client = _client()

    @contextlib.contextmanager
    def stubbed(self, **more: Any) -> Iterator[tuple[Stubber, Route53NameService]]:
        with Stubber(self.client) as stubber:
            yield stubber, self.service(make_client=lambda: self.client, **more)
            stubber.assert_no_pending_responses()

    @inlineCallbacks
    def test_throttled(self) -> Any:
        for code in ("Throttling", "ThrottlingException", "PriorRequestNotComplete", "TooManyRequestsException"):
            with self.stubbed() as (stubber, route53):
                stubber.add_client_error("change_resource_record_sets", code, "Rate exceeded", http_status_code=400)
                problem = yield self.failure(route53.announce(node_id(), "192.0.2.1"))
            self.assertEqual(problem, (f"Route 53 throttles requests ({code})", True, False))

    @inlineCallbacks
    def test_permanent_errors(self) -> Any:
        for code, message, expected in (
            ("AccessDenied", "User: arn is not authorized", "route53:ListResourceRecordSets): User: arn"),
            ("InvalidClientTokenId", "The security token is invalid", "AWS does not know these credentials"),
            ("ExpiredToken", "", "these AWS credentials have expired"),
            ("NoSuchHostedZone", "No hosted zone found", "there is no hosted zone Z1 in this AWS account"),
            ("NoSuchHealthCheck", "no 0-a", "of health-check= does not exist: no 0-a"),
            (
                "InvalidChangeBatch",
                "[RRSet of type A with DNS name gw.example.com. is not permitted\nas it conflicts]",
                "hosted zone Z1 refuses the record gw.example.com: [RRSet of type A with DNS name "
                "gw.example.com. is not permitted as it conflicts]",
            ),
        ):
            with self.stubbed() as (stubber, route53):
                stubber.add_client_error("change_resource_record_sets", code, message, http_status_code=403)
                problem, throttled, hopeless = yield self.failure(route53.announce(node_id(), "192.0.2.1"))
            self.assertIn(expected, problem)
            self.assertEqual((throttled, hopeless), (False, True))

    @inlineCallbacks
    def test_other_errors_are_temporary(self) -> Any:
        with self.stubbed() as (stubber, route53):
            stubber.add_client_error(
                "list_resource_record_sets", "ServiceUnavailable", "Try later", http_status_code=503
            )
            problem = yield self.failure(route53.announced())
        self.assertEqual(problem, ("Route 53 answered ServiceUnavailable: Try later", False, False))

    def record(self, node: str, name: str = f"{NAME}.", **more: Any) -> dict[str, Any]:
        values = {"Type": "A", "TTL": 30, "MultiValueAnswer": True, "ResourceRecords": [{"Value": "192.0.2.1"}]}
        return {"Name": name, "SetIdentifier": node, **values, **more}

    def page(self, *records: dict[str, Any], after: dict[str, Any] | None = None) -> dict[str, Any]:
        page: dict[str, Any] = {
            "ResourceRecordSets": list(records),
            "IsTruncated": after is not None,
            "MaxItems": "300",
        }
        if after:
            page.update({f"NextRecord{key}": after[key] for key in ("Name", "Type")})
            page["NextRecordIdentifier"] = after["SetIdentifier"]
        return page

    def add_change(self, stubber: Stubber, *records: dict[str, Any]) -> None:
        changes = [{"Action": "DELETE", "ResourceRecordSet": record} for record in records]
        info = {"Id": "C1", "Status": "PENDING", "SubmittedAt": "2030-01-01T00:00:00Z"}
        stubber.add_response(
            "change_resource_record_sets",
            {"ChangeInfo": info},
            {"HostedZoneId": "Z1", "ChangeBatch": {"Changes": changes}},
        )

    @inlineCallbacks
    def test_listing_of_several_pages_ends_with_the_name(self) -> Any:
        first, second, third = node_id(), node_id(), node_id()
        start = {"HostedZoneId": "Z1", "StartRecordName": NAME, "StartRecordType": "A"}
        with self.stubbed() as (stubber, route53):
            for _ in range(2):
                stubber.add_response(
                    "list_resource_record_sets", self.page(self.record(first), after=self.record(second)), start
                )
                stubber.add_response(
                    "list_resource_record_sets",
                    # There is one more page, which is not requested.
                    self.page(
                        self.record(second, Type="AAAA", ResourceRecords=[{"Value": "2001:DB8::2"}]),
                        self.record(third, name="gx.example.com."),
                        after=self.record(third, name="gx.example.com."),
                    ),
                    {**start, "StartRecordName": f"{NAME}.", "StartRecordIdentifier": second},
                )
            self.add_change(
                stubber,
                self.record(first),
                self.record(second, Type="AAAA", ResourceRecords=[{"Value": "2001:DB8::2"}]),
            )
            self.assertEqual((yield route53.announced()), {first: "192.0.2.1", second: "2001:db8::2"})
            # The records are deleted exactly as listed, in one batch.
            yield route53.withdraw(frozenset([first, second, third]))

    @inlineCallbacks
    def test_escaped_name(self) -> Any:
        mine = node_id()
        with self.stubbed(name="*.example.com") as (stubber, route53):
            records = self.page(self.record(mine, name="\\052.example.com."))
            stubber.add_response("list_resource_record_sets", records)
            self.assertEqual((yield route53.announced()), {mine: "192.0.2.1"})

    @inlineCallbacks
    def test_refused_batch_is_rebuilt(self) -> Any:
        first, second = node_id(), node_id()
        with self.stubbed() as (stubber, route53):
            stubber.add_response("list_resource_record_sets", self.page(self.record(first), self.record(second)))
            stubber.add_client_error("change_resource_record_sets", "InvalidChangeBatch", "[… but it was not found]")
            stubber.add_response("list_resource_record_sets", self.page(self.record(second)))
            self.add_change(stubber, self.record(second))
            yield route53.withdraw(frozenset([first, second]))

    @inlineCallbacks
    def test_refused_batches_are_limited(self) -> Any:
        first = node_id()
        with self.stubbed() as (stubber, route53):
            for _ in range(MAX_WITHDRAW_ATTEMPTS):
                stubber.add_response("list_resource_record_sets", self.page(self.record(first)))
                stubber.add_client_error(
                    "change_resource_record_sets", "InvalidChangeBatch", "[not the current values]"
                )
            problem, throttled, hopeless = yield self.failure(route53.withdraw(frozenset([first])))
        self.assertIn(f"records of {NAME} keep changing during the withdrawal: [not the current", problem)
        self.assertEqual((throttled, hopeless), (False, False))

    @inlineCallbacks
    def test_throttled_batch_is_not_retried_at_once(self) -> Any:
        with self.stubbed() as (stubber, route53):
            stubber.add_response("list_resource_record_sets", self.page(self.record(first := node_id())))
            stubber.add_client_error("change_resource_record_sets", "PriorRequestNotComplete")
            _, throttled, _ = yield self.failure(route53.withdraw(frozenset([first])))
        self.assertTrue(throttled)

    @inlineCallbacks
    def test_second_form_of_invalid_change_batch(self) -> Any:
        client = self.service(
            make_client=lambda: RefusingClient({"Messages": {"Message": "it conflicts"}, "Error": {"Code": ""}})
        )
        problem, _, hopeless = yield self.failure(client.announce(node_id(), "192.0.2.1"))
        self.assertIn("it conflicts", problem)
        self.assertTrue(hopeless)

    @inlineCallbacks
    def test_unknown_exception(self) -> Any:
        def fail() -> Any:
            raise ValueError("Invalid endpoint: nonsense\nand more")

        problem = yield self.failure(self.service(make_client=fail).announced())
        self.assertEqual(problem, ("the request to Route 53 failed: Invalid endpoint: nonsense and more", False, False))


# Making a client takes some tenths of a second.


@functools.cache
def _default_client() -> Any:
    """Make a client as a node does, in the environment of the first test that needs one."""
    return make_client()


@functools.cache
def _client() -> Any:
    return moto.server().client("route53")


class RefusingClient:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def change_resource_record_sets(self, **parameters: Any) -> None:
        raise ClientError(self._answer, "ChangeResourceRecordSets")

    def close(self) -> None:
        pass


checked = settings(deadline=None, max_examples=100)
addresses = st.ip_addresses().map(str)
identifiers = st.uuids().map(str)


def records(identifier: st.SearchStrategy[str], value: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, object]]:
    """Records of a listing, as any program may have made them."""
    return st.fixed_dictionaries(
        {"Name": st.just("gw.example.com."), "Type": st.sampled_from(["A", "AAAA", "CNAME", "TXT"])},
        optional={
            "SetIdentifier": identifier,
            "MultiValueAnswer": st.booleans(),
            "ResourceRecords": st.lists(st.fixed_dictionaries({"Value": value}), max_size=2),
        },
    )


class RecordTests(SynchronousTestCase):
    @checked
    @given(records(identifiers | st.text(max_size=40) | identifiers.map(str.upper), addresses | st.text(max_size=20)))
    @example({"Name": "", "Type": "A", "SetIdentifier": "{" + "a" * 32 + "}", "MultiValueAnswer": True})
    def test_is_node_record(self, record: dict[str, object]) -> None:
        """A node's record has a canonical UUID as its identifier; its address is valid or empty."""
        if _is_node_record(record):
            self.assertEqual(str(uuid.UUID(str(record["SetIdentifier"]))), record["SetIdentifier"])
            self.assertIn(record["Type"], ("A", "AAAA"))
            self.assertIs(record["MultiValueAnswer"], True)
        address = _record_address(record)
        if address:
            self.assertEqual(str(ipaddress.ip_address(address)), address)

    @checked
    @given(identifiers, addresses)
    def test_record_of_a_node(self, identifier: str, address: str) -> None:
        record = {
            "Name": "gw.example.com.",
            "Type": "A" if "." in address else "AAAA",
            "SetIdentifier": identifier,
            "MultiValueAnswer": True,
            "ResourceRecords": [{"Value": address}],
        }
        self.assertTrue(_is_node_record(record))
        self.assertEqual(ipaddress.ip_address(_record_address(record)), ipaddress.ip_address(address))


class NameTests(SynchronousTestCase):
    @checked
    @given(st.text(st.characters(codec="latin-1"), max_size=20))
    def test_escapes(self, name: str) -> None:
        """Every character may be escaped by its octal number."""
        name = name.replace("\\", "")
        escaped = "".join(f"\\{ord(character):03o}" for character in name)
        self.assertEqual(_unescape_name(escaped + "."), name.rstrip(".").lower())
        self.assertEqual(_unescape_name(name), name.rstrip(".").lower())
