"""What an EC2 instance tells of itself: the instance metadata service, version 2 (IMDSv2).

    -> PUT /latest/api/token                   X-aws-ec2-metadata-token-ttl-seconds: 21600
    <- 200, the token                          X-aws-ec2-metadata-token-ttl-seconds: 21600
    -> GET /latest/meta-data/instance-id       X-aws-ec2-metadata-token: the token
    <- 200, i-0123456789abcdef0 · 404, there is no such item · 401, the token is not valid any more

It is at http://169.254.169.254, or where AWS_EC2_METADATA_SERVICE_ENDPOINT says. Version 1, without a token, is not
tried: instances may forbid it.
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

#: the environment variable that the SDKs of AWS read, too
ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
#: where it is in every instance
DEFAULT_ENDPOINT = "http://169.254.169.254"
#: seconds that one request may take
REQUEST_TIMEOUT = 2.0
#: seconds that a token is wished to be valid, the most that there is; and how long before its end it is renewed
TOKEN_TTL, TOKEN_RENEWAL_MARGIN = 21600, 60.0
#: bytes of the longest answer that is read
MAX_BODY_SIZE = 4096

_TOKEN_PATH = "/latest/api/token"
_TOKEN_TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
_TOKEN_HEADER = "X-aws-ec2-metadata-token"
_ABSENT_HINT = (
    "this is no EC2 instance, its metadata service is switched off, or this is a container on it and "
    "HttpPutResponseHopLimit is 1 (2 would be right)"
)
_WORD = re.compile(r"[A-Za-z0-9:-]{1,64}")
_BLANKS = " \t\r\n"
_PRINTABLE = re.compile(r"[!-~]+")


def endpoint_url(environment: Mapping[str, str] = os.environ) -> str:
    """The url of the metadata service, without a slash at its end.

    Raises ``ValueError`` for one that cannot be used.
    """
    given = environment.get(ENDPOINT_VARIABLE, "")
    if not given:
        return DEFAULT_ENDPOINT
    try:
        url = hyperlink.URL.from_text(given)
    except ValueError:
        url = hyperlink.URL()
    if url.scheme != "http" or not url.host or not given.isascii() or url.query or url.fragment or url.userinfo:
        raise ValueError(f"{ENDPOINT_VARIABLE} is {given!r}; write http://host[:port]")
    return f"http{given[4:]}".rstrip("/")


class Imds:
    """The metadata service of this instance. Every Deferred fails with :class:`AwsError` alone.

    ``timeout`` is in seconds, for each request; at most four are made for one item. ``monotonic`` is a clock that is
    never set. Raises ``ValueError`` as :func:`endpoint` does when no ``url`` is given.
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
        """Such as ``i-0123456789abcdef0``."""
        return Deferred.fromCoroutine(self._required_word("instance-id"))

    def region(self) -> Deferred[str]:
        """Such as ``eu-central-1``."""
        return Deferred.fromCoroutine(self._required_word("placement/region"))

    def target_lifecycle_state(self) -> Deferred[str | None]:
        """The lifecycle state that this instance is in or goes to, such as ``InService`` or ``Terminated``; ``None``
        where there is none, as in an instance that is of no group."""
        return Deferred.fromCoroutine(self._get_item("autoscaling/target-lifecycle-state", parse_word))

    def local_ipv4(self) -> Deferred[str]:
        """The instance's own address."""
        return Deferred.fromCoroutine(self._required_address("local-ipv4"))

    def public_ipv4(self) -> Deferred[str | None]:
        """The address by which the internet reaches it; ``None`` if it has none."""
        return Deferred.fromCoroutine(self._get_item("public-ipv4", parse_ipv4))

    async def _required_word(self, item: str) -> str:
        return _require(item, await self._get_item(item, parse_word))

    async def _required_address(self, item: str) -> str:
        return _require(item, await self._get_item(item, parse_ipv4))

    async def _get_item(self, item: str, read: Callable[[bytes], str]) -> str | None:
        answer = await self._get(f"/latest/meta-data/{item}")
        if answer.code == 404:
            return None
        if answer.code != 200:
            raise AwsError(f"the metadata service answers {answer.code} for {item}", kind=str(answer.code))
        try:
            return read(answer.body)
        except ValueError:
            said = one_line(answer.body[:60].decode("latin-1"))
            raise AwsError(f"the metadata service says {said} for {item}", kind="unreadable") from None

    async def _get(self, path: str) -> HTTPResponse:
        answer = await self._request(b"GET", path, {_TOKEN_HEADER: await self._valid_token()})
        if answer.code == 401:
            # Its clock is not this one's; or the instance was stopped meanwhile, or restored on another host.
            self._token = ""
            answer = await self._request(b"GET", path, {_TOKEN_HEADER: await self._valid_token()})
        return answer

    async def _valid_token(self) -> str:
        if not self._token or self._clock() >= self._token_expires_at:
            asked = self._clock()
            answer = await self._request(b"PUT", _TOKEN_PATH, {_TOKEN_TTL_HEADER: str(TOKEN_TTL)})
            if answer.code != 200:
                problem = f"the metadata service at {self._url} gives no token ({answer.code}): {_ABSENT_HINT}"
                raise AwsError(problem, kind=f"token {answer.code}")
            token = answer.body.decode("latin-1")
            if not _PRINTABLE.fullmatch(token):
                raise AwsError(f"the metadata service at {self._url} gives a token of other characters", kind="token")
            valid = parse_token_ttl(answer.headers.getRawHeaders(_TOKEN_TTL_HEADER, [""])[0])
            self._token, self._token_expires_at = token, asked + valid - min(TOKEN_RENEWAL_MARGIN, valid / 10)
        return self._token

    async def _request(self, method: bytes, path: str, headers: dict[str, str]) -> HTTPResponse:
        def too_late(result: object, timeout: float) -> Failure:
            return Failure(AwsError(f"no answer from {self._url} within {timeout:g} s: {_ABSENT_HINT}", kind="silent"))

        answering = Deferred.fromCoroutine(self._exchange(method, path, headers))
        return await answering.addTimeout(self._timeout, self._reactor, too_late)

    async def _exchange(self, method: bytes, path: str, headers: dict[str, str]) -> HTTPResponse:
        url = (self._url + path).encode()
        try:
            return await http_client.request(
                self._reactor, method, url, headers, timeout=self._timeout, max_body_size=MAX_BODY_SIZE
            )
        except ResponseTooLargeError:
            raise AwsError(f"an answer of more than {MAX_BODY_SIZE} bytes", kind="long") from None
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - whatever becomes of connections
            problem = f"{self._url} cannot be asked: {one_line(e) or type(e).__name__}: {_ABSENT_HINT}"
            raise AwsError(problem, kind=type(e).__name__) from None


def _require(item: str, value: str | None) -> str:
    if value is None:
        raise AwsError(f"the metadata service has no {item}", kind="404")
    return value


def parse_word(body: bytes) -> str:
    """The one word of an answer: letters, digits, hyphens and colons. Raises ``ValueError``."""
    text = body.decode("ascii").strip(_BLANKS)
    if not _WORD.fullmatch(text):
        raise ValueError(text)
    return text


def parse_ipv4(body: bytes) -> str:
    """The IPv4 address of an answer. Raises ``ValueError``."""
    return str(ipaddress.IPv4Address(body.decode("ascii").strip(_BLANKS)))


def parse_token_ttl(header: str) -> float:
    """How long a token is valid, by the header of its answer; what was wished for where that says nothing."""
    if re.fullmatch(r"[0-9]{1,9}", header):
        return float(min(int(header), TOKEN_TTL))
    return float(TOKEN_TTL)
