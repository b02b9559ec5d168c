"""HTTP client for requests of the node itself: one connection per request, bounded in size and time.

    -> GET /keys HTTP/1.1
    <- HTTP/1.1 200 OK, body        other statuses are returned without their body; redirects are not followed

With https, the host name is verified against the trusted certificates of the machine, or those of SSL_CERT_FILE.

:class:`BoundedGet` fetches a JSON document on top of this. Any status but 200 is an error.
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

#: maximum size of status line and headers of a response, in bytes
MAX_HEADERS_SIZE = 2**16
#: timeout of a fetch, name resolution included, in seconds
FETCH_TIMEOUT = 3.0
#: maximum size of a fetched document, in bytes
MAX_DOCUMENT_SIZE = 2**20

#: maximum length of an error of the other side in a log line, in characters
_MAX_ERROR_LENGTH = 300


@attrs.frozen
class HTTPResponse:
    """An HTTP response. ``body`` is empty unless ``code`` is 200."""

    code: int
    headers: Headers
    body: bytes


async def request(
    reactor: Any, method: bytes, url: bytes, headers: Mapping[str, str], *, timeout: float, max_body_size: int
) -> HTTPResponse:
    """Send a request and read the response.

    ``timeout``, in seconds, applies to connecting only: to limit the whole request, cancel it. ``max_body_size`` is in
    bytes.

    Raises :class:`ResponseTooLargeError`, ``CancelledError``, and the errors of the connection.
    """
    endpoints = _BoundedEndpointFactory(reactor, timeout, max_body_size + MAX_HEADERS_SIZE)
    # Without a pool each request has its own connection: requests are rare.
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
    except Exception as e:  # noqa: BLE001 - the errors of Agent are not documented
        if endpoints.exceeded:
            raise ResponseTooLargeError from None
        reason: BaseException = e.reasons[0].value if isinstance(e, ResponseFailed) and e.reasons else e
        raise reason from None


@implementer(IAgentEndpointFactory)
class _BoundedEndpointFactory:
    """Make endpoints that limit the bytes received, and keep Agent from logging each connection."""

    def __init__(self, reactor: Any, timeout: float, max_bytes: int) -> None:
        self._reactor = reactor
        self._timeout = timeout
        self.remaining = max_bytes
        #: whether more bytes than allowed were received
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
        bounds = self._bounds

        class Counted(_BoundedProtocol):
            endpoints = bounds

        factory.protocol = Counted
        connecting: Deferred[Any] = self._endpoint.connect(factory)
        return connecting.addCallback(lambda wrapper: wrapper.wrappedProtocol)


class _BoundedProtocol(ProtocolWrapper):
    """Abort a connection that receives too many bytes: Agent does not limit the size of headers."""

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
    """Collect the body of a response, up to a maximum size. Cancelling ``body`` aborts the connection."""

    def __init__(self, max_size: int) -> None:
        self.body: Deferred[bytes] = Deferred(lambda _: self._abort())
        self._max_size = max_size
        self._chunks: list[bytes] = []
        self._size = 0

    def connectionMade(self) -> None:
        if self.body.called:
            self._abort()

    def discard(self, error: ResponseTooLargeError | None) -> None:
        """Stop reading. ``body`` fails with ``error``, or fires with an empty body without one."""
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


def check_fetch_url(url: str) -> None:
    """Check that a document can be fetched safely from a URL. Raises ``ValueError`` if not."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it contains characters that a URL cannot contain")
    try:
        split = urlsplit(url)
        host, port = split.hostname, split.port
    except ValueError:
        raise ValueError("its host or port is invalid") from None
    if split.scheme not in ("http", "https") or not host or port == 0:
        raise ValueError("write https://host[:port]/path")
    if "@" in split.netloc or "#" in url:
        raise ValueError("it contains a user or a fragment")
    if split.scheme == "http" and not _is_loopback(host):
        raise ValueError("over http the keys could be replaced in transit; write https")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def strip_query(url: str) -> str:
    """Remove the query of a URL, which may contain secrets, for a log line."""
    return url.partition("?")[0]


class BoundedGet:
    """Fetch a JSON document from one URL."""

    def __init__(self, reactor: Any, url: str) -> None:
        """Raises ``ValueError`` for a URL that :func:`check_fetch_url` refuses."""
        check_fetch_url(url)
        self._url = url.encode("ascii")
        self._reactor = reactor

    def fetch(self) -> Deferred[bytes]:
        """Fetch the document.

        The Deferred fails with :class:`FetchError`, also after :data:`FETCH_TIMEOUT` seconds. Cancelling it aborts the
        connection.
        """

        def timed_out(result: object, timeout: float) -> Failure:
            return Failure(FetchError(f"no response within {timeout:g} s"))

        return Deferred.fromCoroutine(self._fetch()).addTimeout(FETCH_TIMEOUT, self._reactor, timed_out)

    async def _fetch(self) -> bytes:
        headers = {"Accept": "application/json", "User-Agent": f"wsgateway/{__version__}"}
        try:
            response = await request(
                self._reactor, b"GET", self._url, headers, timeout=FETCH_TIMEOUT, max_body_size=MAX_DOCUMENT_SIZE
            )
        except ResponseTooLargeError:
            raise FetchError(f"the response has more than {MAX_DOCUMENT_SIZE} bytes") from None
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - any error of the connection
            raise FetchError(_describe_error(e)) from None
        if response.code != 200:
            redirect = ", a redirect" if 300 <= response.code < 400 else ""
            raise FetchError(f"the response has status {response.code}{redirect}")
        return response.body


def _describe_error(error: BaseException) -> str:
    """Describe an error of the connection in one line for the log."""
    description = describe_tls_error(error)
    if description:
        return description
    # For a response that is not HTTP, Agent raises exceptions that are not public, or Python's own.
    is_invalid = isinstance(error, (ValueError, LookupError)) and not isinstance(error, UnicodeError)
    if is_invalid or type(error).__module__ in ("twisted.web.http", "twisted.web._newclient"):
        return "the response is not valid HTTP"
    text = ascii(" ".join(str(error).split()))[1:-1] or type(error).__name__
    return text if len(text) <= _MAX_ERROR_LENGTH else f"{text[:_MAX_ERROR_LENGTH]}…"
