"""What a node asks of others by HTTP: one request on a connection of its own, bounded in bytes.

    -> GET /keys HTTP/1.1
    <- HTTP/1.1 200 OK, the answer        of another status, without its body; no redirect is followed

By https the server's name is verified with the certificates that this machine trusts, or those of SSL_CERT_FILE.

A document of another server, by HTTP or HTTPS: bounded in size and time.

-> GET /keys HTTP/1.1                  Accept: application/json
<- HTTP/1.1 200 OK, the document       anything else is a failure; no redirect is followed
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IProtocol, IStreamClientEndpoint
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.ssl import optionsForClientTLS
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent, ResponseDone, ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgentEndpointFactory
from zope.interface import implementer

from gateway import __version__
from gateway.net.tls import explain_tls

#: bytes that the status line and the headers of an answer may have, beside its body
MOST_HEADERS = 65536


class TooLong(Exception):
    """An answer of more bytes than it may have."""


@attrs.frozen
class Answer:
    """An answer; without a body unless its code is 200."""

    code: int
    headers: Headers
    body: bytes


async def request(
    reactor: Any, method: bytes, url: bytes, headers: Mapping[str, str], *, timeout: float, most: int
) -> Answer:
    """Ask. ``timeout`` is in seconds, for the connection to be made; a time for all of it is the caller's to set, by
    cancelling. ``most`` is what the body may have, in bytes.

    Raises :class:`TooLong`, ``CancelledError``, and what becomes of connections.
    """
    endpoints = _Endpoints(reactor, timeout, most + MOST_HEADERS)
    # Without a pool each request has a connection of its own: there are few.
    agent: Any = Agent.usingEndpointFactory(reactor, endpoints)
    try:
        response = await agent.request(method, url, Headers({name: [value] for name, value in headers.items()}))
        collector = _Collector(most)
        if response.code != 200:
            collector.refuse(None)
        elif response.length is not UNKNOWN_LENGTH and response.length > most:
            collector.refuse(TooLong())
        response.deliverBody(collector)
        return Answer(response.code, response.headers, await collector.whole)
    except (TooLong, CancelledError):
        raise
    except Exception as e:  # noqa: BLE001 - Agent names no end of its errors
        if endpoints.over:
            raise TooLong from None
        reason: BaseException = e.reasons[0].value if isinstance(e, ResponseFailed) and e.reasons else e
        raise reason from None


@implementer(IAgentEndpointFactory)
class _Endpoints:
    """Where Agent connects to. By itself it would log each connection, its beginning and its end."""

    def __init__(self, reactor: Any, timeout: float, most: int) -> None:
        self._reactor = reactor
        self._timeout = timeout
        self.left = most
        #: whether more came than may
        self.over = False

    def endpointForURI(self, uri: URI) -> _Endpoint:
        endpoint: Any = HostnameEndpoint(self._reactor, uri.host, uri.port, self._timeout)
        if uri.scheme == b"https":
            endpoint = wrapClientTLS(optionsForClientTLS(uri.host.decode("ascii")), endpoint)
        return _Endpoint(self, endpoint)


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(self, counts: _Endpoints, endpoint: IStreamClientEndpoint) -> None:
        self._counts = counts
        self._endpoint = endpoint

    def connect(self, protocolFactory: Any) -> Deferred[IProtocol]:
        protocolFactory.noisy = False
        factory = WrappingFactory(protocolFactory)
        factory.noisy = False
        counts = self._counts

        class Counted(_Counted):
            endpoints = counts

        factory.protocol = Counted
        connecting: Deferred[Any] = self._endpoint.connect(factory)
        return connecting.addCallback(lambda wrapper: wrapper.wrappedProtocol)


class _Counted(ProtocolWrapper):
    """Ends a connection on which too much comes: Agent reads headers without an end."""

    endpoints: _Endpoints

    def dataReceived(self, data: bytes) -> None:
        endpoints = self.endpoints
        endpoints.left -= len(data)
        if endpoints.left < 0:
            endpoints.over = True
            self.abortConnection()
        else:
            super().dataReceived(data)  # type: ignore[no-untyped-call]


class _Collector(Protocol):
    """Reads the body of a response, up to a size."""

    def __init__(self, most: int) -> None:
        self.whole: Deferred[bytes] = Deferred(lambda _: self._leave())
        self._most = most
        self._pieces: list[bytes] = []
        self._size = 0

    def connectionMade(self) -> None:
        if self.whole.called:
            self._leave()

    def refuse(self, problem: TooLong | None) -> None:
        """Read no more of it; without a problem it is not wanted."""
        self._pieces.clear()
        if not self.whole.called:
            self.whole.callback(b"") if problem is None else self.whole.errback(problem)
        self._leave()

    def dataReceived(self, data: bytes) -> None:
        self._size += len(data)
        self._pieces.append(data)
        if self._size > self._most:
            self.refuse(TooLong())

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.whole.called:
            return
        if reason.check(ResponseDone, PotentialDataLoss):
            self.whole.callback(b"".join(self._pieces))
        else:
            self.whole.errback(reason)

    def _leave(self) -> None:
        transport: Any = self.transport
        if transport is not None:
            getattr(transport, "abortConnection", transport.loseConnection)()


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

    def fetch(self) -> Deferred[bytes]:
        """The document as it is now. Fails with :class:`FetchFailed`, or when it is cancelled."""

        def too_late(result: object, timeout: float) -> Failure:
            return Failure(FetchFailed(f"no answer within {timeout:g} s"))

        return Deferred.fromCoroutine(self._fetch()).addTimeout(TIMEOUT, self._reactor, too_late)

    async def _fetch(self) -> bytes:
        headers = {"Accept": "application/json", "User-Agent": f"wsgateway/{__version__}"}
        try:
            answer = await request(self._reactor, b"GET", self._url, headers, timeout=TIMEOUT, most=MOST_BYTES)
        except TooLong:
            raise FetchFailed(f"the answer has more than {MOST_BYTES} bytes") from None
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - whatever becomes of connections
            raise FetchFailed(_one_line(e)) from None
        if answer.code != 200:
            redirect = ", a redirect" if 300 <= answer.code < 400 else ""
            raise FetchFailed(f"the answer is {answer.code}{redirect}")
        return answer.body


def _one_line(error: BaseException) -> str:
    """What a log line may have of an error."""
    explained = explain_tls(error)
    if explained:
        return explained
    # What Agent raises for an answer that it cannot read has no name that is public, or is Python's own.
    unreadable = isinstance(error, (ValueError, LookupError)) and not isinstance(error, UnicodeError)
    if unreadable or type(error).__module__ in ("twisted.web.http", "twisted.web._newclient"):
        return "its answer is no HTTP"
    text = ascii(" ".join(str(error).split()))[1:-1] or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
