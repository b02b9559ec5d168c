"""A document of another server, by HTTP: bounded in size and time.

    -> GET /keys HTTP/1.1                  Accept: application/json
    <- HTTP/1.1 200 OK, the document       anything else is a failure; no redirect is followed

By https the server's name is verified with the certificates that this machine trusts, or those of SSL_CERT_FILE.
"""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IProtocol, IStreamClientEndpoint, ITransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.ssl import optionsForClientTLS
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent, ResponseDone, ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgentEndpointFactory
from zope.interface import implementer

from gateway import __version__

#: seconds that it may take, from the look-up of the name on
TIMEOUT = 3.0
#: bytes of the longest document
MOST_BYTES = 1048576

#: characters of an error of elsewhere that stand in a log line
_LONGEST = 300


class FetchFailed(Exception):
    """There is no document. The text says why, in one line."""


def check_url(url: str) -> None:
    """Raises ``ValueError`` for a url by which nothing can be fetched safely."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it has characters that no url has")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("its host or port cannot be read") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise ValueError("write https://host[:port]/path")
    if "@" in parts.netloc or "#" in url:
        raise ValueError("it has a user or a fragment")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError("by http anybody on the way could give other keys; write https")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_query(url: str) -> str:
    """A url as it may be logged."""
    return url.partition("?")[0]


class Document:
    """What is at one url."""

    def __init__(self, reactor: Any, url: str) -> None:
        """Raises ``ValueError`` as :func:`check_url` does."""
        check_url(url)
        self._url = url.encode("ascii")
        self._reactor = reactor
        # Without a pool each request has a connection of its own: there are few.
        self._agent = Agent.usingEndpointFactory(reactor, _Endpoints(reactor))

    def fetch(self) -> Deferred[bytes]:
        """The document as it is now. Fails with :class:`FetchFailed`, or when it is cancelled."""

        def too_late(result: object, timeout: float) -> Failure:
            return Failure(FetchFailed(f"no answer within {timeout:g} s"))

        return Deferred.fromCoroutine(self._fetch()).addTimeout(TIMEOUT, self._reactor, too_late)

    async def _fetch(self) -> bytes:
        headers = Headers({"Accept": ["application/json"], "User-Agent": [f"wsgateway/{__version__}"]})
        try:
            response = await self._agent.request(b"GET", self._url, headers)
            collector = _Collector()
            if response.code != 200:
                redirect = ", a redirect" if 300 <= response.code < 400 else ""
                collector.refuse(f"the answer is {response.code}{redirect}")
            elif response.length is not UNKNOWN_LENGTH and response.length > MOST_BYTES:
                collector.refuse_length()
            response.deliverBody(collector)
            return await collector.whole
        except (FetchFailed, CancelledError):
            raise
        except Exception as e:  # noqa: BLE001 - Agent names no end of its errors
            reason = e.reasons[0].value if isinstance(e, ResponseFailed) and e.reasons else e
            if isinstance(reason, CancelledError):
                raise reason from None
            raise FetchFailed(_one_line(reason)) from None


@implementer(IAgentEndpointFactory)
class _Endpoints:
    """Where Agent connects to. By itself it would log each connection, its beginning and its end."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def endpointForURI(self, uri: URI) -> _Endpoint:
        endpoint: Any = HostnameEndpoint(self._reactor, uri.host, uri.port, TIMEOUT)
        if uri.scheme == b"https":
            endpoint = wrapClientTLS(optionsForClientTLS(uri.host.decode("ascii")), endpoint)
        return _Endpoint(endpoint)


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(self, endpoint: IStreamClientEndpoint) -> None:
        self._endpoint = endpoint

    def connect(self, protocolFactory: Any) -> Deferred[IProtocol]:
        protocolFactory.noisy = False
        connecting: Deferred[IProtocol] = self._endpoint.connect(protocolFactory)
        return connecting


class _Collector(Protocol):
    """Reads the body of a response, up to a size."""

    def __init__(self) -> None:
        self.whole: Deferred[bytes] = Deferred(lambda _: self._leave())
        self._pieces: list[bytes] = []
        self._size = 0

    def connectionMade(self) -> None:
        if self.whole.called:
            self._leave()

    def refuse(self, problem: str) -> None:
        """Read no more of it."""
        if not self.whole.called:
            self.whole.errback(FetchFailed(problem))
        self._leave()

    def refuse_length(self) -> None:
        """Read no more of it, for it is too long."""
        self.refuse(f"the answer has more than {MOST_BYTES} bytes")

    def dataReceived(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > MOST_BYTES:
            self.refuse_length()
        else:
            self._pieces.append(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.whole.called:
            return
        if reason.check(ResponseDone, PotentialDataLoss):
            self.whole.callback(b"".join(self._pieces))
        else:
            self.whole.errback(reason)

    def _leave(self) -> None:
        transport: ITransport | None = self.transport
        if transport is not None:
            getattr(transport, "abortConnection", transport.loseConnection)()


def _one_line(error: BaseException) -> str:
    """What a log line may have of an error."""
    text = ascii(" ".join(str(error).split()))[1:-1] or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
