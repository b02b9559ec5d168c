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
from gateway.net.errors import FetchError, ResponseTooLargeError
from gateway.net.tls import describe_tls_error

#: bytes that the status line and the headers of an answer may have, beside its body
MAX_HEADERS_SIZE = 65536


@attrs.frozen
class HTTPResponse:
    """An answer; without a body unless its code is 200."""

    code: int
    headers: Headers
    body: bytes


async def request(
    reactor: Any, method: bytes, url: bytes, headers: Mapping[str, str], *, timeout: float, max_body_size: int
) -> HTTPResponse:
    """Ask. ``timeout`` is in seconds, for the connection to be made; a time for all of it is the caller's to set, by
    cancelling. ``most`` is what the body may have, in bytes.

    Raises :class:`TooLong`, ``CancelledError``, and what becomes of connections.
    """
    endpoints = _BoundedEndpointFactory(reactor, timeout, max_body_size + MAX_HEADERS_SIZE)
    # Without a pool each request has a connection of its own: there are few.
    agent: Any = Agent.usingEndpointFactory(reactor, endpoints)
    try:
        response = await agent.request(method, url, Headers({name: [value] for name, value in headers.items()}))
        collector = _BodyCollector(max_body_size)
        if response.code != 200:
            collector.discard(None)
        elif response.length is not UNKNOWN_LENGTH and response.length > max_body_size:
            collector.discard(ResponseTooLargeError())
        response.deliverBody(collector)
        return HTTPResponse(response.code, response.headers, await collector.body)
    except (ResponseTooLargeError, CancelledError):
        raise
    except Exception as e:  # noqa: BLE001 - Agent names no end of its errors
        if endpoints.exceeded:
            raise ResponseTooLargeError from None
        reason: BaseException = e.reasons[0].value if isinstance(e, ResponseFailed) and e.reasons else e
        raise reason from None


@implementer(IAgentEndpointFactory)
class _BoundedEndpointFactory:
    """Where Agent connects to. By itself it would log each connection, its beginning and its end."""

    def __init__(self, reactor: Any, timeout: float, max_bytes: int) -> None:
        self._reactor = reactor
        self._timeout = timeout
        self.remaining = max_bytes
        #: whether more came than may
        self.exceeded = False

    def endpointForURI(self, uri: URI) -> _BoundedEndpoint:
        endpoint: Any = HostnameEndpoint(self._reactor, uri.host, uri.port, self._timeout)
        if uri.scheme == b"https":
            endpoint = wrapClientTLS(optionsForClientTLS(uri.host.decode("ascii")), endpoint)
        return _BoundedEndpoint(self, endpoint)


@implementer(IStreamClientEndpoint)
class _BoundedEndpoint:
    def __init__(self, bounds: _BoundedEndpointFactory, endpoint: IStreamClientEndpoint) -> None:
        self._bounds = bounds
        self._endpoint = endpoint

    def connect(self, protocolFactory: Any) -> Deferred[IProtocol]:
        protocolFactory.noisy = False
        factory = WrappingFactory(protocolFactory)
        factory.noisy = False
        counts = self._bounds

        class Counted(_BoundedProtocol):
            endpoints = counts

        factory.protocol = Counted
        connecting: Deferred[Any] = self._endpoint.connect(factory)
        return connecting.addCallback(lambda wrapper: wrapper.wrappedProtocol)


class _BoundedProtocol(ProtocolWrapper):
    """Ends a connection on which too much comes: Agent reads headers without an end."""

    endpoints: _BoundedEndpointFactory

    def dataReceived(self, data: bytes) -> None:
        endpoints = self.endpoints
        endpoints.remaining -= len(data)
        if endpoints.remaining < 0:
            endpoints.exceeded = True
            self.abortConnection()
        else:
            super().dataReceived(data)  # type: ignore[no-untyped-call]


class _BodyCollector(Protocol):
    """Reads the body of a response, up to a size."""

    def __init__(self, max_size: int) -> None:
        self.body: Deferred[bytes] = Deferred(lambda _: self._abort())
        self._max_size = max_size
        self._chunks: list[bytes] = []
        self._size = 0

    def connectionMade(self) -> None:
        if self.body.called:
            self._abort()

    def discard(self, error: ResponseTooLargeError | None) -> None:
        """Read no more of it; without a problem it is not wanted."""
        self._chunks.clear()
        if not self.body.called:
            self.body.callback(b"") if error is None else self.body.errback(error)
        self._abort()

    def dataReceived(self, data: bytes) -> None:
        self._size += len(data)
        self._chunks.append(data)
        if self._size > self._max_size:
            self.discard(ResponseTooLargeError())

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.body.called:
            return
        if reason.check(ResponseDone, PotentialDataLoss):
            self.body.callback(b"".join(self._chunks))
        else:
            self.body.errback(reason)

    def _abort(self) -> None:
        transport: Any = self.transport
        if transport is not None:
            getattr(transport, "abortConnection", transport.loseConnection)()


#: seconds that it may take, from the look-up of the name on
FETCH_TIMEOUT = 3.0
#: bytes of the longest document
MAX_DOCUMENT_SIZE = 1048576

#: characters of an error of elsewhere that stand in a log line
_MAX_ERROR_LENGTH = 300


def check_fetch_url(url: str) -> None:
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


def strip_query(url: str) -> str:
    """A url as it may be logged."""
    return url.partition("?")[0]


class BoundedGet:
    """What is at one url."""

    def __init__(self, reactor: Any, url: str) -> None:
        """Raises ``ValueError`` as :func:`check_url` does."""
        check_fetch_url(url)
        self._url = url.encode("ascii")
        self._reactor = reactor

    def fetch(self) -> Deferred[bytes]:
        """The document as it is now. Fails with :class:`FetchFailed`, or when it is cancelled."""

        def too_late(result: object, timeout: float) -> Failure:
            return Failure(FetchError(f"no answer within {timeout:g} s"))

        return Deferred.fromCoroutine(self._fetch()).addTimeout(FETCH_TIMEOUT, self._reactor, too_late)

    async def _fetch(self) -> bytes:
        headers = {"Accept": "application/json", "User-Agent": f"wsgateway/{__version__}"}
        try:
            answer = await request(
                self._reactor, b"GET", self._url, headers, timeout=FETCH_TIMEOUT, max_body_size=MAX_DOCUMENT_SIZE
            )
        except ResponseTooLargeError:
            raise FetchError(f"the answer has more than {MAX_DOCUMENT_SIZE} bytes") from None
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - whatever becomes of connections
            raise FetchError(_describe_error(e)) from None
        if answer.code != 200:
            redirect = ", a redirect" if 300 <= answer.code < 400 else ""
            raise FetchError(f"the answer is {answer.code}{redirect}")
        return answer.body


def _describe_error(error: BaseException) -> str:
    """What a log line may have of an error."""
    explained = describe_tls_error(error)
    if explained:
        return explained
    # What Agent raises for an answer that it cannot read has no name that is public, or is Python's own.
    unreadable = isinstance(error, (ValueError, LookupError)) and not isinstance(error, UnicodeError)
    if unreadable or type(error).__module__ in ("twisted.web.http", "twisted.web._newclient"):
        return "its answer is no HTTP"
    text = ascii(" ".join(str(error).split()))[1:-1] or type(error).__name__
    return text if len(text) <= _MAX_ERROR_LENGTH else f"{text[:_MAX_ERROR_LENGTH]}…"
