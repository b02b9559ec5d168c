"""Requests that a backend sends without waiting for answers (RFC 9112, section 9.3.2): one in each turn of the reactor.

    -> GET /healthz, GET /healthz, GET /healthz, …       a thousand in one segment
    <- 200, and in the next turn 200, and so on          meanwhile nothing is read from this connection

Twisted answers all of them at once, as far as their answers are there at once; nobody else is heard meanwhile.

The HTTP side of the backend endpoint: twisted.web's parser, with every buffer bounded and every answer JSON.

    -> POST /v1/clients/x/rpc HTTP/1.1 …       <- HTTP/1.1 200 OK, Content-Length, and the connection stays
    -> more than may be                        <- 413 (headers: 431), Connection: close; the rest is read and dropped
    -> no HTTP, or what may be read two ways   <- 400, Connection: close
    -> a request that does not end             <- 408, Connection: close

What twisted.web does of its own: it spools a body of any size to a file, answers what it cannot parse without a
body (and goes on to carry it out if the bad header was not the last), takes several Transfer-Encodings, waits for ever
for a request of which a byte comes now and then, and goes on to answer a peer that reads nothing. None of it happens
here.
"""

# twisted.web.http is annotated in part.
# mypy: allow-untyped-calls

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import connectionDone
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure
from twisted.web import http

from gateway.api.access import AccessPolicy
from gateway.api.query import Query
from gateway.api.responses import SERVER_NAME, Response, error_response, refusal_response
from gateway.auth.backend_tokens import NO_GRANT, Grant
from gateway.metrics import Metrics
from gateway.protocol.errors import RequestRefusedError
from gateway.util.log import RateLimitedLogger


class PipeliningChannel(http.HTTPChannel):
    """The way of one HTTP connection through its requests."""

    transport: Any
    callLater: Callable[..., IDelayedCall]
    _buffer: bytes
    _resume_timer: IDelayedCall | None = None
    #: the backend does not read its answers
    _congested = False

    @property
    def paused(self) -> bool:  # type: ignore[override]
        """Whether what was read is not to be parsed now."""
        return self._congested or self._resume_timer is not None

    def requestDone(self, request: Any) -> None:
        """A request was answered."""
        # Set before what follows is handed back to the parser.
        self._resume_timer = self.callLater(0, self._resume)
        super().requestDone(request)
        if self._buffer:
            self.transport.pauseProducing()
        else:
            self._cancel_resume()

    def _resume(self) -> None:
        self._resume_timer = None
        if not self._congested:
            self.transport.resumeProducing()
            LineReceiver.dataReceived(self, b"")

    def _cancel_resume(self) -> None:
        resting, self._resume_timer = self._resume_timer, None
        if resting is not None:
            resting.cancel()

    def pauseProducing(self) -> None:
        """The backend does not read its answers: read nothing from it, and go on with nothing that was read."""
        super().pauseProducing()
        self._congested = True
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """It has read them."""
        self._congested = False
        super().resumeProducing()
        if self._resume_timer is None:
            self.transport.resumeProducing()
            LineReceiver.dataReceived(self, b"")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self._cancel_resume()
        super().connectionLost(reason)


#: the most bytes of a request line and its headers
MAX_HEAD_SIZE = 16384
#: seconds that a connection may be idle between requests, or not read its answer; and that a request may take from
#: its first byte to its last
IDLE_TIMEOUT = 60
#: a body in more pieces than this must have pieces of this many bytes on average: each costs as much as a large one
MAX_SMALL_CHUNKS = 256
MIN_CHUNK_SIZE = 16
#: so many bytes are parsed at a time: what is left of them is copied for each chunk
PARSE_SIZE = 4096
#: seconds for which the rest of a refused request is read and dropped: a close with unread bytes would be a reset,
#: and the answer might not arrive
LINGER_TIMEOUT = 2.0

_INTERNAL_ERROR = error_response(500, "internal", "the gateway failed to answer; its log says why")
HEADERS_TOO_LARGE = error_response(
    431, "headers", f"the request line and the headers are larger than {MAX_HEAD_SIZE} bytes together"
)
REQUEST_TIMED_OUT = error_response(408, "slow", "the request did not arrive in time")
_NOT_HTTP = error_response(400, "http", "this is not HTTP/1.1 as this server understands it")
_FOLDED_HEADER = error_response(
    400, "http", "a header is continued on a second line; send it in one (RFC 9112, section 5.2)"
)
_AMBIGUOUS_LENGTH = error_response(
    400,
    "http",
    "a body comes either with one Content-Length, or with HTTP/1.1 and exactly one Transfer-Encoding, chunked "
    "(RFC 9112, section 6)",
)
_TINY_CHUNKS = error_response(
    400,
    "chunks",
    f"the body comes in more than {MAX_SMALL_CHUNKS} chunks of less than {MIN_CHUNK_SIZE} bytes on average; send larger ones, "
    "or a Content-Length",
)


@attrs.frozen
class HTTPContext:
    """What all HTTP connections of a node share. ``body_limit`` is in bytes, ``now`` gives seconds since 1970."""

    access_policy: AccessPolicy
    metrics: Metrics
    reactor: Any
    wall_clock: Callable[[], float]
    max_body_size: int
    handle: Callable[[HTTPRequest], Coroutine[Deferred[Any], Any, Response]]
    body_too_large: Callable[[HTTPRequest], Response]
    error_log: RateLimitedLogger


class _AbortedError(Exception):
    """What is left of this segment is not to be parsed."""


class HTTPRequest(http.Request):
    """One request: what may be read of it, and :meth:`answer`."""

    channel: HTTPConnection

    def __init__(self, channel: HTTPConnection, queued: object = None) -> None:
        super().__init__(channel)
        self.context = channel.context
        #: what who sent it may do
        self.grant: Grant = NO_GRANT
        self._body = bytearray()
        self._body_size = 0
        self._chunked = False
        #: how many chunks, or parts of them, came
        self._chunk_count = 0
        self._refusal: Response | None = None
        self._handling: Deferred[Response] | None = None

    # What a handler reads.

    @property
    def raw_path(self) -> bytes:
        """The path as it came, still percent-encoded."""
        return self.uri.partition(b"?")[0]

    @property
    def query(self) -> Query:
        """The parameters of the query."""
        return Query(self.uri.partition(b"?")[2])

    def body(self) -> bytes:
        """The whole body."""
        return bytes(self._body)

    def header_values(self, name: str) -> list[str]:
        """The values of a header, in order."""
        return [value.decode("latin-1") for value in self.requestHeaders.getRawHeaders(name.encode("ascii"), [])]

    # What the channel tells.

    def parseCookies(self) -> None:
        """Nobody here reads cookies."""

    def gotLength(self, length: int | None) -> None:
        """The headers are complete; ``None`` is a chunked body. Judge now, before a body is asked for or kept."""
        path = self.raw_path.decode("latin-1")
        try:
            self.grant = self.context.access_policy.check(self.method.decode("latin-1"), path, self.header_values)
        except RequestRefusedError as refusal:
            self._refusal = refusal_response(refusal)
        self._chunked = length is None
        if length is not None and length > self.context.max_body_size:
            self._refuse(self._refusal or self.context.body_too_large(self))
        elif self._refusal is not None and length != 0:
            # A body may take its time to come, of whoever may not even ask; and one in chunks must be parsed.
            self._refuse(self._refusal)

    def handleContentChunk(self, data: bytes) -> None:
        """A piece of the body: kept, unless the request is refused already. Raises ``_Aborted`` if it is too much."""
        self._body_size += len(data)
        self._chunk_count += self._chunked
        if self._body_size > self.context.max_body_size:
            self._refuse(self._refusal or self.context.body_too_large(self))
            raise _AbortedError
        if self._chunk_count > MAX_SMALL_CHUNKS and self._body_size < self._chunk_count * MIN_CHUNK_SIZE:
            self._refuse(_TINY_CHUNKS)
            raise _AbortedError
        if self._refusal is None:
            self._body += data

    def _refuse(self, response: Response) -> None:
        self._body.clear()
        # Or "100 Continue" would follow the refusal.
        self.requestHeaders.removeHeader(b"Expect")
        self.channel.refuse(response, head_only=self.method == b"HEAD")

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """All of it is here."""
        if self._refusal is not None:
            self.respond(self._refusal)
            return
        self._handling = Deferred.fromCoroutine(self.context.handle(self))
        self._handling.addErrback(self._handler_failed).addCallback(self.respond)
        self._handling.addErrback(
            lambda failure: self.context.error_log.failure("an answer could not be sent", failure)
        )

    def connectionLost(self, reason: Failure) -> None:
        """The backend went away: what was being done for it ends."""
        super().connectionLost(reason)
        if self._handling is not None:
            self._handling.cancel()

    def _handler_failed(self, failure: Failure) -> Response:
        if not (failure.check(CancelledError) and self._disconnected):
            self.context.error_log.failure("a request to the backend endpoint failed", failure)
        return _INTERNAL_ERROR

    def respond(self, response: Response) -> None:
        """Send the response, and be done."""
        if self._disconnected:
            return
        self.context.metrics.api_requests[str(response.status)] += 1
        # twisted.web does not know every phrase.
        self.setResponseCode(response.status, HTTPStatus(response.status).phrase.encode())
        headers = self.responseHeaders
        headers.setRawHeaders(b"Server", [SERVER_NAME.encode("ascii")])
        headers.setRawHeaders(b"Date", [http.datetimeToString(self.context.wall_clock())])
        for name, value in response.headers:
            headers.setRawHeaders(name, [value])
        if response.status not in http.NO_BODY_CODES:
            headers.setRawHeaders(b"Content-Length", [b"%d" % len(response.body)])
        if response.body:
            headers.setRawHeaders(b"Content-Type", [response.content_type.encode("ascii")])
        self.write(response.body)
        self.finish()


class HTTPConnection(PipeliningChannel):
    """One connection: requests one after the other, pipelined if the backend likes."""

    MAX_LENGTH = MAX_HEAD_SIZE
    totalHeadersSize = MAX_HEAD_SIZE
    maxHeaders = 100
    requestFactory = HTTPRequest  # type: ignore[assignment]
    #: there is one whenever any of the methods is called
    transport: Any

    def __init__(self, context: HTTPContext) -> None:
        super().__init__()
        self.context = context
        self.timeOut = IDLE_TIMEOUT
        self.callLater = context.reactor.callLater
        self._refused = False
        self._shutting_down = False
        self._close_timer: IDelayedCall | None = None
        #: when it had its last answer, by the reactor's clock
        self.idle_since = context.reactor.seconds()

    # What the rest of the endpoint asks.

    @property
    def is_closing(self) -> bool:
        """Whether it is about to be closed."""
        return self._close_timer is not None

    @property
    def is_idle(self) -> bool:
        """Whether it is kept alive, but nothing is in progress on it."""
        return not (self._request_in_progress or self.paused or self.is_closing)

    # What LineReceiver and HTTPChannel call.

    def dataReceived(self, data: bytes) -> None:
        """Bytes: parsed, or dropped once a refusal was sent."""
        if self._refused:
            return
        if not self._request_in_progress:
            self.resetTimeout()
        # Not HTTPChannel's, which grants more time with each byte.
        for at in range(0, len(data), PARSE_SIZE):
            LineReceiver.dataReceived(self, data[at : at + PARSE_SIZE])

    @property
    def _request_in_progress(self) -> bool:
        """Whether some of a request is here, and not all of it was answered."""
        return bool(self.requests or self._buffer)

    def lineReceived(self, line: bytes) -> None:
        """A line of the header; not after a refusal, or the request would be carried out all the same."""
        if self._refused:
            return
        if self.requests and line[:1] in (b" ", b"\t"):
            self.refuse(_FOLDED_HEADER)
            return
        super().lineReceived(line)

    def headerReceived(self, line: bytes) -> bool:
        """A whole header. ``False`` when it was refused."""
        try:
            return bool(super().headerReceived(line))
        except ValueError:
            # A Content-Length of more digits than int() takes.
            self.refuse(_NOT_HTTP)
            return False

    def lineLengthExceeded(self, line: bytes) -> None:
        """A line without an end."""
        self.refuse(HEADERS_TOO_LARGE)

    def allHeadersReceived(self) -> None:
        """Let the request know its first line before it is asked to judge its headers."""
        request = self.requests[-1]
        request.method, request.uri, request.clientproto = self._command, self._path, self._version
        if _has_valid_framing(request):
            super().allHeadersReceived()
        else:
            self.refuse(_AMBIGUOUS_LENGTH)

    def allContentReceived(self) -> None:
        """All of a request is here; not after a refusal, or it would be carried out all the same."""
        if not self._refused:
            super().allContentReceived()

    def rawDataReceived(self, data: bytes) -> None:
        """A piece of a body, or requests that came before their turn."""
        if not self._refused:
            with contextlib.suppress(_AbortedError):
                super().rawDataReceived(data)

    def checkPersistence(self, request: HTTPRequest, version: bytes) -> bool:
        """Whether another request may follow."""
        if self._shutting_down:
            request.responseHeaders.setRawHeaders(b"Connection", [b"close"])
            return False
        return bool(super().checkPersistence(request, version))

    def requestDone(self, request: HTTPRequest) -> None:
        """A request was answered."""
        self.idle_since = self.context.reactor.seconds()
        super().requestDone(request)

    def resumeProducing(self) -> None:
        """It has read its answers."""
        # What it sent meanwhile was not read.
        self.resetTimeout()
        super().resumeProducing()

    def timeoutConnection(self) -> None:
        """Nothing came for too long, or not the rest of a request; or it does not read."""
        if self._request_in_progress and not self.paused:
            self.refuse(REQUEST_TIMED_OUT)
        else:
            self._close()

    def loseConnection(self) -> None:
        """Close once everything is sent, but do not wait for ever for a backend that does not read."""
        super().loseConnection()
        if self._close_timer is None:
            self._close_after(IDLE_TIMEOUT, self.transport.abortConnection)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self._cancel_close_timer()
        super().connectionLost(reason)

    def _respondToBadRequestAndDisconnect(self) -> None:
        self.refuse(_NOT_HTTP)

    # What the rest of the endpoint calls.

    def refuse(self, response: Response, *, head_only: bool = False) -> None:
        """Answer a request that is not read to its end, and read no other."""
        if self._refused:
            return
        self._refused = True
        self.context.metrics.api_requests[str(response.status)] += 1
        lines = [
            b"HTTP/1.1 %d %b" % (response.status, HTTPStatus(response.status).phrase.encode()),
            b"Server: %b" % SERVER_NAME.encode("ascii"),
            b"Date: %b" % http.datetimeToString(self.context.wall_clock()),
            b"Connection: close",
            b"Content-Type: %b" % response.content_type.encode("ascii"),
            b"Content-Length: %d" % len(response.body),
            *(f"{name}: {value}".encode("ascii") for name, value in response.headers),
            b"",
            b"" if head_only else response.body,
        ]
        self.transport.write(b"\r\n".join(lines))
        self.setTimeout(None)
        self._close_after(LINGER_TIMEOUT, self._close)

    def shut_down(self) -> None:
        """Take no further request; one that is in progress is still answered."""
        self._shutting_down = True
        self.persistent = 0
        # One that was read, but whose turn has not come, is not in progress: it is sent again elsewhere.
        if not self.requests:
            self._close()

    def _close(self) -> None:
        self._close_after(LINGER_TIMEOUT, self.transport.abortConnection)
        self.loseConnection()

    def _close_after(self, delay: float, close: Callable[[], None]) -> None:
        self._cancel_close_timer()
        self._close_timer = self.callLater(delay, close)

    def _cancel_close_timer(self) -> None:
        if self._close_timer is not None and self._close_timer.active():
            self._close_timer.cancel()


def _has_valid_framing(request: HTTPRequest) -> bool:
    """Whether it is beyond doubt where a request ends; Content-Length by itself was looked at already."""
    headers = request.requestHeaders
    encodings = headers.getRawHeaders(b"Transfer-Encoding")
    if encodings is None:
        return True
    only = [encoding.lower() for encoding in encodings] == [b"chunked"]
    return only and request.clientproto == b"HTTP/1.1" and not headers.hasHeader(b"Content-Length")
