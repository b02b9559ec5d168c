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

from gateway.api.access import Guard
from gateway.api.query import Query
from gateway.api.responses import SERVER, Answer, refusal, refused
from gateway.auth.backend_tokens import NOTHING, Grant
from gateway.metrics import Metrics
from gateway.protocol.handshake import Refusal
from gateway.util.log import Troubles


class OneInATurn(http.HTTPChannel):
    """The way of one HTTP connection through its requests."""

    transport: Any
    callLater: Callable[..., IDelayedCall]
    _buffer: bytes
    _resting: IDelayedCall | None = None
    #: the backend does not read its answers
    _full = False

    @property
    def paused(self) -> bool:  # type: ignore[override]
        """Whether what was read is not to be parsed now."""
        return self._full or self._resting is not None

    def requestDone(self, request: Any) -> None:
        """A request was answered."""
        # Set before what follows is handed back to the parser.
        self._resting = self.callLater(0, self._go_on)
        super().requestDone(request)
        if self._buffer:
            self.transport.pauseProducing()
        else:
            self._stop_resting()

    def _go_on(self) -> None:
        self._resting = None
        if not self._full:
            self.transport.resumeProducing()
            LineReceiver.dataReceived(self, b"")

    def _stop_resting(self) -> None:
        resting, self._resting = self._resting, None
        if resting is not None:
            resting.cancel()

    def pauseProducing(self) -> None:
        """The backend does not read its answers: read nothing from it, and go on with nothing that was read."""
        super().pauseProducing()
        self._full = True
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """It has read them."""
        self._full = False
        super().resumeProducing()
        if self._resting is None:
            self.transport.resumeProducing()
            LineReceiver.dataReceived(self, b"")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self._stop_resting()
        super().connectionLost(reason)


#: the most bytes of a request line and its headers
MAX_HEADERS = 16384
#: seconds that a connection may be idle between requests, or not read its answer; and that a request may take from
#: its first byte to its last
IDLE_TIMEOUT = 60
#: a body in more pieces than this must have pieces of this many bytes on average: each costs as much as a large one
MAX_PIECES = 256
SMALL_PIECE = 16
#: so many bytes are parsed at a time: what is left of them is copied for each chunk
SLICE = 4096
#: seconds for which the rest of a refused request is read and dropped: a close with unread bytes would be a reset,
#: and the answer might not arrive
LINGER = 2.0

_INTERNAL = refusal(500, "internal", "the gateway failed to answer; its log says why")
HEADERS_TOO_LARGE = refusal(
    431, "headers", f"the request line and the headers are larger than {MAX_HEADERS} bytes together"
)
TOO_SLOW = refusal(408, "slow", "the request did not arrive in time")
_NOT_HTTP = refusal(400, "http", "this is not HTTP/1.1 as this server understands it")
_FOLDED = refusal(400, "http", "a header is continued on a second line; send it in one (RFC 9112, section 5.2)")
_FRAMING = refusal(
    400,
    "http",
    "a body comes either with one Content-Length, or with HTTP/1.1 and exactly one Transfer-Encoding, chunked "
    "(RFC 9112, section 6)",
)
_TINY_CHUNKS = refusal(
    400,
    "chunks",
    f"the body comes in more than {MAX_PIECES} chunks of less than {SMALL_PIECE} bytes on average; send larger ones, "
    "or a Content-Length",
)


@attrs.frozen
class Site:
    """What all HTTP connections of a node share. ``body_limit`` is in bytes, ``now`` gives seconds since 1970."""

    guard: Guard
    metrics: Metrics
    reactor: Any
    now: Callable[[], float]
    body_limit: int
    respond: Callable[[Request], Coroutine[Deferred[Any], Any, Answer]]
    too_large: Callable[[Request], Answer]
    troubles: Troubles


class _Aborted(Exception):
    """What is left of this segment is not to be parsed."""


class Request(http.Request):
    """One request: what may be read of it, and :meth:`answer`."""

    channel: Channel

    def __init__(self, channel: Channel, queued: object = None) -> None:
        super().__init__(channel)
        self.site = channel.site
        #: what who sent it may do
        self.grant: Grant = NOTHING
        self._body = bytearray()
        self._size = 0
        self._chunked = False
        #: how many chunks, or parts of them, came
        self._pieces = 0
        self._refused: Answer | None = None
        self._work: Deferred[Answer] | None = None

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
            self.grant = self.site.guard.check(self.method.decode("latin-1"), path, self.header_values)
        except Refusal as refusal:
            self._refused = refused(refusal)
        self._chunked = length is None
        if length is not None and length > self.site.body_limit:
            self._abort(self._refused or self.site.too_large(self))
        elif self._refused is not None and length != 0:
            # A body may take its time to come, of whoever may not even ask; and one in chunks must be parsed.
            self._abort(self._refused)

    def handleContentChunk(self, data: bytes) -> None:
        """A piece of the body: kept, unless the request is refused already. Raises ``_Aborted`` if it is too much."""
        self._size += len(data)
        self._pieces += self._chunked
        if self._size > self.site.body_limit:
            self._abort(self._refused or self.site.too_large(self))
            raise _Aborted
        if self._pieces > MAX_PIECES and self._size < self._pieces * SMALL_PIECE:
            self._abort(_TINY_CHUNKS)
            raise _Aborted
        if self._refused is None:
            self._body += data

    def _abort(self, answer: Answer) -> None:
        self._body.clear()
        # Or "100 Continue" would follow the refusal.
        self.requestHeaders.removeHeader(b"Expect")
        self.channel.refuse(answer, bodiless=self.method == b"HEAD")

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """All of it is here."""
        if self._refused is not None:
            self.answer(self._refused)
            return
        self._work = Deferred.fromCoroutine(self.site.respond(self))
        self._work.addErrback(self._failed).addCallback(self.answer)
        self._work.addErrback(lambda failure: self.site.troubles.report("an answer could not be sent", failure))

    def connectionLost(self, reason: Failure) -> None:
        """The backend went away: what was being done for it ends."""
        super().connectionLost(reason)
        if self._work is not None:
            self._work.cancel()

    def _failed(self, failure: Failure) -> Answer:
        if not (failure.check(CancelledError) and self._disconnected):
            self.site.troubles.report("a request to the backend endpoint failed", failure)
        return _INTERNAL

    def answer(self, answer: Answer) -> None:
        """Send the response, and be done."""
        if self._disconnected:
            return
        self.site.metrics.api_requests[str(answer.status)] += 1
        # twisted.web does not know every phrase.
        self.setResponseCode(answer.status, HTTPStatus(answer.status).phrase.encode())
        headers = self.responseHeaders
        headers.setRawHeaders(b"Server", [SERVER.encode("ascii")])
        headers.setRawHeaders(b"Date", [http.datetimeToString(self.site.now())])
        for name, value in answer.headers:
            headers.setRawHeaders(name, [value])
        if answer.status not in http.NO_BODY_CODES:
            headers.setRawHeaders(b"Content-Length", [b"%d" % len(answer.body)])
        if answer.body:
            headers.setRawHeaders(b"Content-Type", [answer.content_type.encode("ascii")])
        self.write(answer.body)
        self.finish()


class Channel(OneInATurn):
    """One connection: requests one after the other, pipelined if the backend likes."""

    MAX_LENGTH = MAX_HEADERS
    totalHeadersSize = MAX_HEADERS
    maxHeaders = 100
    requestFactory = Request  # type: ignore[assignment]
    #: there is one whenever any of the methods is called
    transport: Any

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.timeOut = IDLE_TIMEOUT
        self.callLater = site.reactor.callLater
        self._refused = False
        self._closing = False
        self._ending: IDelayedCall | None = None
        #: when it had its last answer, by the reactor's clock
        self.idle_since = site.reactor.seconds()

    # What the rest of the endpoint asks.

    @property
    def ending(self) -> bool:
        """Whether it is about to be closed."""
        return self._ending is not None

    @property
    def idle(self) -> bool:
        """Whether it is kept alive, but nothing is in progress on it."""
        return not (self._arriving or self.paused or self.ending)

    # What LineReceiver and HTTPChannel call.

    def dataReceived(self, data: bytes) -> None:
        """Bytes: parsed, or dropped once a refusal was sent."""
        if self._refused:
            return
        if not self._arriving:
            self.resetTimeout()
        # Not HTTPChannel's, which grants more time with each byte.
        for at in range(0, len(data), SLICE):
            LineReceiver.dataReceived(self, data[at : at + SLICE])

    @property
    def _arriving(self) -> bool:
        """Whether some of a request is here, and not all of it was answered."""
        return bool(self.requests or self._buffer)

    def lineReceived(self, line: bytes) -> None:
        """A line of the header; not after a refusal, or the request would be carried out all the same."""
        if self._refused:
            return
        if self.requests and line[:1] in (b" ", b"\t"):
            self.refuse(_FOLDED)
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
        if _is_framed(request):
            super().allHeadersReceived()
        else:
            self.refuse(_FRAMING)

    def allContentReceived(self) -> None:
        """All of a request is here; not after a refusal, or it would be carried out all the same."""
        if not self._refused:
            super().allContentReceived()

    def rawDataReceived(self, data: bytes) -> None:
        """A piece of a body, or requests that came before their turn."""
        if not self._refused:
            with contextlib.suppress(_Aborted):
                super().rawDataReceived(data)

    def checkPersistence(self, request: Request, version: bytes) -> bool:
        """Whether another request may follow."""
        if self._closing:
            request.responseHeaders.setRawHeaders(b"Connection", [b"close"])
            return False
        return bool(super().checkPersistence(request, version))

    def requestDone(self, request: Request) -> None:
        """A request was answered."""
        self.idle_since = self.site.reactor.seconds()
        super().requestDone(request)

    def resumeProducing(self) -> None:
        """It has read its answers."""
        # What it sent meanwhile was not read.
        self.resetTimeout()
        super().resumeProducing()

    def timeoutConnection(self) -> None:
        """Nothing came for too long, or not the rest of a request; or it does not read."""
        if self._arriving and not self.paused:
            self.refuse(TOO_SLOW)
        else:
            self._hang_up()

    def loseConnection(self) -> None:
        """Close once everything is sent, but do not wait for ever for a backend that does not read."""
        super().loseConnection()
        if self._ending is None:
            self._end_in(IDLE_TIMEOUT, self.transport.abortConnection)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self._forget_end()
        super().connectionLost(reason)

    def _respondToBadRequestAndDisconnect(self) -> None:
        self.refuse(_NOT_HTTP)

    # What the rest of the endpoint calls.

    def refuse(self, answer: Answer, *, bodiless: bool = False) -> None:
        """Answer a request that is not read to its end, and read no other."""
        if self._refused:
            return
        self._refused = True
        self.site.metrics.api_requests[str(answer.status)] += 1
        lines = [
            b"HTTP/1.1 %d %b" % (answer.status, HTTPStatus(answer.status).phrase.encode()),
            b"Server: %b" % SERVER.encode("ascii"),
            b"Date: %b" % http.datetimeToString(self.site.now()),
            b"Connection: close",
            b"Content-Type: %b" % answer.content_type.encode("ascii"),
            b"Content-Length: %d" % len(answer.body),
            *(f"{name}: {value}".encode("ascii") for name, value in answer.headers),
            b"",
            b"" if bodiless else answer.body,
        ]
        self.transport.write(b"\r\n".join(lines))
        self.setTimeout(None)
        self._end_in(LINGER, self._hang_up)

    def shut_down(self) -> None:
        """Take no further request; one that is in progress is still answered."""
        self._closing = True
        self.persistent = 0
        # One that was read, but whose turn has not come, is not in progress: it is sent again elsewhere.
        if not self.requests:
            self._hang_up()

    def _hang_up(self) -> None:
        self._end_in(LINGER, self.transport.abortConnection)
        self.loseConnection()

    def _end_in(self, delay: float, end: Callable[[], None]) -> None:
        self._forget_end()
        self._ending = self.callLater(delay, end)

    def _forget_end(self) -> None:
        if self._ending is not None and self._ending.active():
            self._ending.cancel()


def _is_framed(request: Request) -> bool:
    """Whether it is beyond doubt where a request ends; Content-Length by itself was looked at already."""
    headers = request.requestHeaders
    encodings = headers.getRawHeaders(b"Transfer-Encoding")
    if encodings is None:
        return True
    only = [encoding.lower() for encoding in encodings] == [b"chunked"]
    return only and request.clientproto == b"HTTP/1.1" and not headers.hasHeader(b"Content-Length")
