"""Client of the EC2 instance metadata service, version 2 (IMDSv2).

    -> PUT /latest/api/token                   X-aws-ec2-metadata-token-ttl-seconds: 21600
    <- 200, the token                          X-aws-ec2-metadata-token-ttl-seconds: 21600
    -> GET /latest/meta-data/instance-id       X-aws-ec2-metadata-token: the token
    <- 200, i-0123456789abcdef0 · 404, no such item · 401, the token has expired

The endpoint is http://169.254.169.254 or AWS_EC2_METADATA_SERVICE_ENDPOINT. Version 1, without a token, is not used:
instances may disable it.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import hyperlink
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from gateway.cloud.errors import AwsError
from gateway.net import http_client
from gateway.net.errors import ResponseTooLargeError
from gateway.net.http_client import HTTPResponse
from gateway.util.log import one_line

#: the environment variable that the AWS SDKs read as well
ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
DEFAULT_ENDPOINT = "http://169.254.169.254"
#: seconds for one request
REQUEST_TIMEOUT = 2.0
#: seconds; the requested lifetime of a token, the maximum of the service
TOKEN_TTL = 21600
#: seconds before its expiry when a token is renewed
TOKEN_RENEWAL_MARGIN = 60.0
#: bytes
MAX_BODY_SIZE = 4096

_TOKEN_PATH = "/latest/api/token"
_TOKEN_TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
_TOKEN_HEADER = "X-aws-ec2-metadata-token"
_ABSENT_HINT = (
    "this is not an EC2 instance, its metadata service is disabled, or this is a container on it and "
    "HttpPutResponseHopLimit is 1 (set it to 2)"
)
_WORD = re.compile(r"[A-Za-z0-9:-]{1,64}")
_BLANKS = " \t\r\n"
_PRINTABLE = re.compile(r"[!-~]+")


def endpoint_url(environment: Mapping[str, str] = os.environ) -> str:
    """Return the url of the metadata service, without a trailing slash.

    Raises ``ValueError`` if the environment variable is not a usable url.
    """
    value = environment.get(ENDPOINT_VARIABLE, "")
    if not value:
        return DEFAULT_ENDPOINT
    try:
        url = hyperlink.URL.from_text(value)
    except ValueError:
        url = hyperlink.URL()
    if url.scheme != "http" or not url.host or not value.isascii() or url.query or url.fragment or url.userinfo:
        raise ValueError(f"{ENDPOINT_VARIABLE} is {value!r}; write http://host[:port]")
    return f"http{value[4:]}".rstrip("/")


class Imds:
    """Read items of this instance's metadata. Every Deferred fails only with :class:`AwsError`.

    ``timeout`` is in seconds, for each request; one item takes at most four requests. ``clock`` is monotonic. Raises
    ``ValueError`` as :func:`endpoint_url` does if ``url`` is empty.
    """

    def __init__(
        self,
        reactor: Any,
        url: str = "",
        *,
        timeout: float = REQUEST_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url or endpoint_url()
        self._reactor = reactor
        self._timeout = timeout
        self._clock = clock
        self._token = ""
        self._token_expires_at = 0.0

    def instance_id(self) -> Deferred[str]:
        """Return the id of the instance, such as ``i-0123456789abcdef0``."""
        return Deferred.fromCoroutine(self._required_word("instance-id"))

    def region(self) -> Deferred[str]:
        """Return the region, such as ``eu-central-1``."""
        return Deferred.fromCoroutine(self._required_word("placement/region"))

    def target_lifecycle_state(self) -> Deferred[str | None]:
        """Return the target lifecycle state, such as ``InService`` or ``Terminated``; ``None`` outside of a group."""
        return Deferred.fromCoroutine(self._get_item("autoscaling/target-lifecycle-state", parse_word))

    def local_ipv4(self) -> Deferred[str]:
        """Return the private address of the instance."""
        return Deferred.fromCoroutine(self._required_address("local-ipv4"))

    def public_ipv4(self) -> Deferred[str | None]:
        """Return the public address of the instance, or ``None``."""
        return Deferred.fromCoroutine(self._get_item("public-ipv4", parse_ipv4))

    async def _required_word(self, item: str) -> str:
        return _require(item, await self._get_item(item, parse_word))

    async def _required_address(self, item: str) -> str:
        return _require(item, await self._get_item(item, parse_ipv4))

    async def _get_item(self, item: str, parse: Callable[[bytes], str]) -> str | None:
        response = await self._get(f"/latest/meta-data/{item}")
        if response.code == 404:
            return None
        if response.code != 200:
            raise AwsError(f"the metadata service answered {response.code} for {item}", kind=str(response.code))
        try:
            return parse(response.body)
        except ValueError:
            value = one_line(response.body[:60].decode("latin-1"))
            raise AwsError(f"the metadata service returned {value} for {item}", kind="unreadable") from None

    async def _get(self, path: str) -> HTTPResponse:
        response = await self._request(b"GET", path, {_TOKEN_HEADER: await self._valid_token()})
        if response.code == 401:
            # The clocks differ, or the instance was stopped or moved to another host.
            self._token = ""
            response = await self._request(b"GET", path, {_TOKEN_HEADER: await self._valid_token()})
        return response

    async def _valid_token(self) -> str:
        if not self._token or self._clock() >= self._token_expires_at:
            requested_at = self._clock()
            response = await self._request(b"PUT", _TOKEN_PATH, {_TOKEN_TTL_HEADER: str(TOKEN_TTL)})
            if response.code != 200:
                problem = f"the metadata service at {self._url} refused a token ({response.code}): {_ABSENT_HINT}"
                raise AwsError(problem, kind=f"token {response.code}")
            token = response.body.decode("latin-1")
            if not _PRINTABLE.fullmatch(token):
                raise AwsError(f"the metadata service at {self._url} returned an invalid token", kind="token")
            ttl = parse_token_ttl(response.headers.getRawHeaders(_TOKEN_TTL_HEADER, [""])[0])
            self._token, self._token_expires_at = token, requested_at + ttl - min(TOKEN_RENEWAL_MARGIN, ttl / 10)
        return self._token

    async def _request(self, method: bytes, path: str, headers: dict[str, str]) -> HTTPResponse:
        def timed_out(result: object, timeout: float) -> Failure:
            problem = f"no response from {self._url} within {timeout:g} s: {_ABSENT_HINT}"
            return Failure(AwsError(problem, kind="silent"))

        exchange = Deferred.fromCoroutine(self._exchange(method, path, headers))
        return await exchange.addTimeout(self._timeout, self._reactor, timed_out)

    async def _exchange(self, method: bytes, path: str, headers: dict[str, str]) -> HTTPResponse:
        url = (self._url + path).encode()
        try:
            return await http_client.request(
                self._reactor, method, url, headers, timeout=self._timeout, max_body_size=MAX_BODY_SIZE
            )
        except ResponseTooLargeError:
            raise AwsError(f"the metadata service returned more than {MAX_BODY_SIZE} bytes", kind="long") from None
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - any connection error
            problem = f"the request to {self._url} failed: {one_line(e) or type(e).__name__}: {_ABSENT_HINT}"
            raise AwsError(problem, kind=type(e).__name__) from None


def _require(item: str, value: str | None) -> str:
    if value is None:
        raise AwsError(f"the metadata service has no {item}", kind="404")
    return value


def parse_word(body: bytes) -> str:
    """Return the body as one word of letters, digits, hyphens and colons. Raises ``ValueError``."""
    text = body.decode("ascii").strip(_BLANKS)
    if not _WORD.fullmatch(text):
        raise ValueError(text)
    return text


def parse_ipv4(body: bytes) -> str:
    """Return the body as an IPv4 address. Raises ``ValueError``."""
    return str(ipaddress.IPv4Address(body.decode("ascii").strip(_BLANKS)))


def parse_token_ttl(header: str) -> float:
    """Return the lifetime of a token in seconds: its response header, or ``TOKEN_TTL`` if that is unusable."""
    if re.fullmatch(r"[0-9]{1,9}", header):
        return float(min(int(header), TOKEN_TTL))
    return float(TOKEN_TTL)
