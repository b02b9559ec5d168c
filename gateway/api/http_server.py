"""HTTP/1.1 server of the backend endpoint: twisted.web's parser, with every buffer bounded and every response JSON.

    -> POST /v1/clients/x/rpc HTTP/1.1 …       <- HTTP/1.1 200 OK, Content-Length; the connection is kept alive
    -> a body over the limit                   <- 413 (headers: 431), Connection: close; the rest is read and dropped
    -> not HTTP, or ambiguous framing          <- 400, Connection: close
    -> a request that does not end             <- 408, Connection: close
    -> GET /v1/backend, Upgrade: websocket     the transport is handed over (endpoint.py), also after other requests

Pipelined requests (RFC 9112, section 9.3.2) are handled one per reactor iteration, so that one connection cannot delay
the others; twisted.web handles all of them at once.

    -> GET /healthz, GET /healthz, GET /healthz, …       a thousand in one segment
    <- 200, and in the next reactor iteration 200, …     reading is paused until the last one

twisted.web also spools a body of any size to a file, answers a request that it cannot parse without a body (and still
runs it if the bad header was not the last), accepts several Transfer-Encodings, waits forever for a request that sends
a byte now and then, and keeps answering a peer that reads nothing. This module prevents all of that.

Paths and queries are parsed from raw bytes:

    /v1/clients/acme%2Frobot/rpc?timeout=2.5     the client acme/robot, and 2.5 seconds
    /v1/clients/acme/robot/rpc                   the same client: a slash in a client_id may be encoded or not
    /v1/rpc?client_id=acme%2Frobot               the same client, at a path that no proxy changes

A path is split before it is percent-decoded, and decoded once. In a query ``+`` is a plus sign: client_ids may contain
one, but never a space. A parameter may be given once, however its name is encoded.
"""

# twisted.web.http is annotated in part.
# mypy: allow-untyped-calls

from __future__ import annotations

import contextlib
import enum
import re
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any, Final

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import connectionDone
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure
from twisted.web import http

from gateway.api.access import AccessPolicy
from gateway.api.errors import BadRequestError
from gateway.api.responses import Response, error_response, refusal_response, standard_headers
from gateway.auth.backend_tokens import NO_GRANT, Grant
from gateway.metrics import Metrics
from gateway.protocol.client_id import CLIENT_ID_RULE, is_client_id, is_client_id_part, is_former_client_id
from gateway.protocol.errors import RequestRefusedError
from gateway.util.log import RateLimitedLogger

_NODE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_SECONDS = re.compile(r"[0-9]{1,15}(\.[0-9]{0,15})?|\.[0-9]{1,15}")
_INTEGER = re.compile(r"[0-9]{1,9}")

#: prefix of the path of a client
CLIENTS_PATH: Final = b"/v1/clients/"
#: path of backend WebSockets and peer connections
BACKEND_PATH: Final = b"/v1/backend"
#: path at which peers relay clients' connections
RELAY_PATH: Final = b"/v1/relay"
#: suffix of the path for calls to a client
RPC_SUFFIX: Final = b"/rpc"
#: path for calls to the client of the query
RPC_PATH: Final = b"/v1/rpc"


def percent_decode(raw: bytes) -> str:
    """Decode ``%XX`` once, as UTF-8 (RFC 3986, section 2.1). Raises ``ValueError``."""
    if b"%" in raw:
        if _BAD_ESCAPE.search(raw):
            raise ValueError("a % without two hexadecimal digits")
        raw = _ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode("ascii")), raw)
    return raw.decode("utf-8")


def parse_client_id(raw: bytes) -> str:
    """Parse the percent-encoded client_id of a path. Raises ``BadRequestError``."""
    try:
        text = percent_decode(raw)
    except ValueError:
        raise BadRequestError("client_id", "the client_id in the path is not percent-encoded UTF-8") from None
    if not is_client_id(text):
        raise BadRequestError("client_id", f"the path has no valid client_id: it is {CLIENT_ID_RULE}")
    return text


def rpc_client_id(target: bytes) -> str | None:
    """Return the client_id of a request target for calls; ``None`` for any other target."""
    path, _, query = target.partition(b"?")
    with contextlib.suppress(BadRequestError):
        if path == RPC_PATH:
            return Query(query).get_client_id()
        if path.startswith(CLIENTS_PATH) and path.endswith(RPC_SUFFIX):
            return parse_client_id(path[len(CLIENTS_PATH) : -len(RPC_SUFFIX)])
    return None


def upgrade_path(head: bytes) -> bytes:
    """Return the path of an upgrade request; empty for any other request."""
    first, *lines = head.split(b"\r\n")
    target = first.split(b" ")[1:2]
    if not target or not any(line.partition(b":")[0].lower() == b"upgrade" for line in lines):
        return b""
    return target[0].partition(b"?")[0]


class Query:
    """Parsed query parameters. Unknown ones are ignored. The getters raise ``BadRequestError``."""

    def __init__(self, raw: bytes) -> None:
        self._values: dict[str, list[bytes]] = {}
        for part in raw.split(b"&"):
            key, _, value = part.partition(b"=")
            # A name that cannot be decoded is unknown.
            with contextlib.suppress(ValueError):
                self._values.setdefault(percent_decode(key), []).append(value)

    def get(self, name: str) -> str | None:
        """Return a decoded parameter, or ``None``."""
        values = self._values.get(name)
        if values is None:
            return None
        if len(values) > 1:
            raise BadRequestError(name, f"{name} is given more than once")
        try:
            return percent_decode(values[0])
        except ValueError:
            raise BadRequestError(name, f"{name} is not percent-encoded UTF-8") from None

    def get_client_id(self, *, or_former: bool = False) -> str:
        """Return the parameter ``client_id``, which must be given. With ``or_former`` it may be one of those that are
        none any more: the registry may have rows of them."""
        text = self.get("client_id")
        if text is None:
            raise BadRequestError("client_id", "name the client in the query: ?client_id=…, percent-encoded")
        if not is_client_id(text) and not (or_former and is_former_client_id(text)):
            raise BadRequestError("client_id", f"the query has no valid client_id: it is {CLIENT_ID_RULE}")
        return text

    def get_client_id_part(self, name: str) -> str | None:
        """Return a client_id or a prefix of client_ids, possibly empty, or ``None``."""
        text = self.get(name)
        if text is not None and not is_client_id_part(text):
            raise BadRequestError(name, f"{name} is up to 128 characters of A-Z a-z 0-9 . _ : @ / + = -")
        return text

    def get_node_id(self, name: str) -> str | None:
        """Return a node_id, or ``None``."""
        text = self.get(name)
        if text is not None and not _NODE_ID.fullmatch(text):
            raise BadRequestError(name, f"{name} is a node_id, as in GET /v1/nodes")
        return text

    def get_int(self, name: str, default: int, minimum: int, maximum: int) -> int:
        """Return an integer from ``minimum`` to ``maximum``, or ``default``."""
        text = self.get(name)
        if text is None:
            return default
        if not _INTEGER.fullmatch(text) or not minimum <= int(text) <= maximum:
            raise BadRequestError(name, f"{name} is an integer from {minimum} to {maximum}")
        return int(text)


def parse_seconds(name: str, text: str) -> float:
    """Parse a positive decimal number of seconds. Raises ``BadRequestError``."""
    if not _SECONDS.fullmatch(text) or float(text) <= 0:
        raise BadRequestError("timeout", f"{name} is not a positive number of seconds, such as 5 or 0.5")
    return float(text)


#: bytes of a request line and its headers
MAX_HEAD_SIZE = 2**14
#: seconds from a request's first byte to its last, and seconds without reading a response
REQUEST_TIMEOUT = 60
#: seconds between requests: longer than load balancers and proxies keep idle connections to a server (AWS, nginx and
#: varnish 60 s, Caddy 120 s), or a request would now and then meet the closing connection
KEEP_ALIVE_TIMEOUT = 150
#: chunks of a body that may be smaller than MIN_CHUNK_SIZE on average: each costs as much as a large one
MAX_SMALL_CHUNKS = 256
#: bytes of a chunk, on average, in a body of more chunks than that
MIN_CHUNK_SIZE = 16
#: bytes parsed at a time: the parser copies the rest of its input for each chunk
PARSE_SIZE = 4096
#: seconds in which the rest of a refused request is read and dropped. Closing with unread bytes resets the connection,
#: and the response might be lost.
LINGER_TIMEOUT = 2.0

_INTERNAL_ERROR = error_response(500, "internal", "the gateway failed to handle the request; see its log")
HEADERS_TOO_LARGE = error_response(
    431, "headers", f"the request line and the headers are larger than {MAX_HEAD_SIZE} bytes together"
)
REQUEST_TIMED_OUT = error_response(408, "slow", "the request did not arrive in time")
_NOT_HTTP = error_response(400, "http", "this is not a valid HTTP/1.1 request")
_FOLDED_HEADER = error_response(
    400, "http", "a header is continued on a second line; send it on one line (RFC 9112, section 5.2)"
)
_AMBIGUOUS_LENGTH = error_response(
    400,
    "http",
    "send a body either with one Content-Length, or with HTTP/1.1 and exactly one Transfer-Encoding, chunked "
    "(RFC 9112, section 6)",
)
_ENCODED_BODY = error_response(
    415,
    "encoding",
    "the body has a Content-Encoding; send it as it is (RFC 9110, section 15.5.16)",
    ("Accept-Encoding", "identity"),
)
_TINY_CHUNKS = error_response(
    400,
    "chunks",
    f"the body has more than {MAX_SMALL_CHUNKS} chunks of less than {MIN_CHUNK_SIZE} bytes on average; "
    "send larger chunks, or a Content-Length",
)


@attrs.frozen
class HTTPContext:
    """What all HTTP connections of a node share. ``max_body_size`` is in bytes, ``wall_clock`` returns seconds since
    1970."""

    access_policy: AccessPolicy
    metrics: Metrics
    reactor: Any
    wall_clock: Callable[[], float]
    max_body_size: int
    handle: Callable[[HTTPRequest], Coroutine[Deferred[Any], Any, Response]]
    body_too_large: Callable[[HTTPRequest], Response]
    error_log: RateLimitedLogger
    #: paths at which a request with an ``Upgrade`` header is for another protocol
    upgrade_paths: tuple[bytes, ...] = ()


class _AbortedError(Exception):
    """Stop parsing the current segment."""


class HTTPRequest(http.Request):
    """One HTTP request. Handlers read it; :meth:`respond` answers it."""

    channel: HTTPConnection

    def __init__(self, channel: HTTPConnection, queued: object = None) -> None:
        super().__init__(channel)
        self.context = channel.context
        #: what the backend's token allows
        self.grant: Grant = NO_GRANT
        self._body = bytearray()
        self._body_size = 0
        self._chunked = False
        #: chunks, or parts of them, received so far
        self._chunk_count = 0
        self._refusal: Response | None = None
        self._handling: Deferred[Response] | None = None

    # Read by handlers.

    @property
    def raw_path(self) -> bytes:
        """The path as received, percent-encoded."""
        return self.uri.partition(b"?")[0]

    @property
    def query(self) -> Query:
        """The parsed query parameters."""
        return Query(self.uri.partition(b"?")[2])

    def body(self) -> bytes:
        """Return the whole body."""
        return bytes(self._body)

    def header_values(self, name: str) -> list[str]:
        """Return the values of a header, in order."""
        return [value.decode("latin-1") for value in self.requestHeaders.getRawHeaders(name.encode("ascii"), [])]

    # Called by HTTPConnection.

    def parseCookies(self) -> None:
        """Skip cookies."""

    def gotLength(self, length: int | None) -> None:
        """Apply the access policy, before a body is requested (100 Continue) or kept.

        ``length`` is ``None`` for a chunked body.
        """
        path = self.raw_path.decode("latin-1")
        try:
            self.grant = self.context.access_policy.check(self.method.decode("latin-1"), path, self.header_values)
        except RequestRefusedError as refusal:
            self._refusal = refusal_response(refusal)
        if self._refusal is None and length != 0 and _is_encoded(self.header_values("Content-Encoding")):
            self._refusal = _ENCODED_BODY
        self._chunked = length is None
        if length is not None and length > self.context.max_body_size:
            self._refuse(self._refusal or self.context.body_too_large(self))
        elif self._refusal is not None and length != 0:
            # Do not wait for the body of a refused request, nor parse its chunks.
            self._refuse(self._refusal)

    def handleContentChunk(self, data: bytes) -> None:
        """Keep a piece of the body, unless the request is refused. Raises ``_AbortedError`` if it exceeds a limit."""
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
        # Otherwise "100 Continue" would follow the refusal.
        self.requestHeaders.removeHeader(b"Expect")
        self.channel.refuse(response, head_only=self.method == b"HEAD")

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """Handle the complete request."""
        if self._refusal is not None:
            self.respond(self._refusal)
            return
        self._handling = Deferred.fromCoroutine(self.context.handle(self))
        self._handling.addErrback(self._handler_failed).addCallback(self.respond)
        self._handling.addErrback(
            lambda failure: self.context.error_log.failure("a response could not be sent", failure)
        )

    def connectionLost(self, reason: Failure) -> None:
        """Cancel the handler: the backend is gone."""
        super().connectionLost(reason)
        if self._handling is not None:
            self._handling.cancel()

    def _handler_failed(self, failure: Failure) -> Response:
        if not (failure.check(CancelledError) and self._disconnected):
            self.context.error_log.failure("a request to the backend endpoint failed", failure)
        return _INTERNAL_ERROR

    def respond(self, response: Response) -> None:
        """Send the response and finish the request."""
        if self._disconnected:
            return
        self.context.metrics.api_requests[str(response.status)] += 1
        # twisted.web does not know every reason phrase.
        self.setResponseCode(response.status, HTTPStatus(response.status).phrase.encode())
        headers = [*standard_headers(response, self.context.wall_clock()), *response.headers]
        if self.channel.persistent:
            headers.append(("Keep-Alive", f"timeout={KEEP_ALIVE_TIMEOUT}"))
        for name, value in headers:
            self.responseHeaders.setRawHeaders(name, [value])
        self.write(response.body)
        self.finish()


class ConnectionState(enum.Enum):
    """State of an HTTP connection.

    OPEN -> DRAINING          shut_down() with a request in progress
    OPEN -> CLOSING           shut_down() without one; idle for KEEP_ALIVE_TIMEOUT, or not reading for
                              REQUEST_TIMEOUT; Connection: close
    OPEN -> UPGRADED          a request for a WebSocket, after others
    OPEN, DRAINING -> REFUSED a request that is refused before it was read to its end
    DRAINING -> CLOSING       the request in progress is answered
    REFUSED -> CLOSING        after LINGER_TIMEOUT
    """

    #: takes requests
    OPEN = enum.auto()
    #: answers the request in progress, then closes
    DRAINING = enum.auto()
    #: refused a request; input is dropped
    REFUSED = enum.auto()
    #: closes once everything is sent; input is dropped
    CLOSING = enum.auto()
    #: another protocol has the transport
    UPGRADED = enum.auto()


class HTTPConnection(http.HTTPChannel):
    """HTTP/1.1 connection of a backend: one request after the other, pipelined or not."""

    MAX_LENGTH = MAX_HEAD_SIZE
    totalHeadersSize = MAX_HEAD_SIZE
    maxHeaders = 100
    requestFactory = HTTPRequest  # type: ignore[assignment]
    #: set before any of the methods is called
    transport: Any
    callLater: Callable[..., IDelayedCall]
    _buffer: bytes

    _state = ConnectionState.OPEN
    _close_timer: IDelayedCall | None = None
    #: runs while pipelined requests wait for the next reactor iteration
    _resume_timer: IDelayedCall | None = None
    #: whether the transport's send buffer is full: the backend does not read its responses
    _congested = False

    def __init__(self, context: HTTPContext, on_upgrade: Callable[[bytes], None] | None = None) -> None:
        """``on_upgrade`` is called with the input from a request for a WebSocket on, and takes the transport over."""
        super().__init__()
        self.context = context
        self._on_upgrade = on_upgrade
        #: the lines of the head that is being received
        self._head: list[bytes] = []
        #: input that follows what is being parsed
        self._unparsed = b""
        self.timeOut = REQUEST_TIMEOUT
        self.callLater = context.reactor.callLater
        #: time of the last response, by the reactor's clock
        self.idle_since = context.reactor.seconds()

    # Called by the endpoint.

    @property
    def is_closing(self) -> bool:
        """Whether the connection is about to close."""
        return self._state in (ConnectionState.REFUSED, ConnectionState.CLOSING)

    @property
    def _drops_input(self) -> bool:
        return self.is_closing or self._state is ConnectionState.UPGRADED

    @property
    def is_idle(self) -> bool:
        """Whether the connection is kept alive without a request in progress."""
        return not (self._request_in_progress or self.paused or self.is_closing)

    def refuse(self, response: Response, *, head_only: bool = False) -> None:
        """Answer a request before it is read to its end, drop further input, and close after ``LINGER_TIMEOUT``."""
        if self.is_closing:
            return
        self._state = ConnectionState.REFUSED
        self.context.metrics.api_requests[str(response.status)] += 1
        lines = [
            b"HTTP/1.1 %d %b" % (response.status, HTTPStatus(response.status).phrase.encode()),
            b"Connection: close",
            *(
                f"{name}: {value}".encode("ascii")
                for name, value in (*standard_headers(response, self.context.wall_clock()), *response.headers)
            ),
            b"",
            b"" if head_only else response.body,
        ]
        self.transport.write(b"\r\n".join(lines))
        self.setTimeout(None)
        self._close_after(LINGER_TIMEOUT, self._close)

    def shut_down(self) -> None:
        """Take no further request, and close once the request in progress is answered."""
        if self._state is ConnectionState.OPEN:
            self._state = ConnectionState.DRAINING
        self.persistent = 0
        # A pipelined request that waits for its turn is not in progress: the backend sends it again elsewhere.
        if not self.requests:
            self._close()

    # Called by LineReceiver and HTTPChannel: input.

    @property
    def paused(self) -> bool:  # type: ignore[override]
        """Whether buffered input must not be parsed now."""
        return self._congested or self._resume_timer is not None

    @property
    def _request_in_progress(self) -> bool:
        """Whether a request is partly received, or not yet answered."""
        return bool(self.requests or self._buffer)

    def dataReceived(self, data: bytes) -> None:
        """Parse input, or drop it while closing."""
        if self._drops_input:
            return
        if not self._request_in_progress:
            self.setTimeout(REQUEST_TIMEOUT)
        # HTTPChannel.dataReceived would restart the timeout with each byte.
        for at in range(0, len(data), PARSE_SIZE):
            self._unparsed = data[at + PARSE_SIZE :]
            LineReceiver.dataReceived(self, data[at : at + PARSE_SIZE])
            if self._state is ConnectionState.UPGRADED:
                break
        self._unparsed = b""

    def lineReceived(self, line: bytes) -> None:
        """Parse a line of the head; not after a refusal, or the request would still be handled."""
        if self._drops_input:
            return
        if self.requests and line[:1] in (b" ", b"\t"):
            self.refuse(_FOLDED_HEADER)
            return
        if line or self.requests:
            self._head.append(line)
        super().lineReceived(line)

    def headerReceived(self, line: bytes) -> bool:
        """Parse a whole header. Returns ``False`` if it was refused."""
        try:
            return bool(super().headerReceived(line))
        except ValueError:
            # A Content-Length with more digits than int() accepts.
            self.refuse(_NOT_HTTP)
            return False

    def lineLengthExceeded(self, line: bytes) -> None:
        """Refuse a line without an end."""
        self.refuse(HEADERS_TOO_LARGE)

    def allHeadersReceived(self) -> None:
        """Set the request line on the request before its headers are checked, and refuse ambiguous framing."""
        request = self.requests[-1]
        request.method, request.uri, request.clientproto = self._command, self._path, self._version
        head, self._head = b"\r\n".join(self._head), []
        if self._on_upgrade is not None and upgrade_path(head) in self.context.upgrade_paths:
            self._upgrade(self._on_upgrade, head)
        elif _has_valid_framing(request):
            super().allHeadersReceived()
        else:
            self.refuse(_AMBIGUOUS_LENGTH)

    def _upgrade(self, on_upgrade: Callable[[bytes], None], head: bytes) -> None:
        """Hand the transport over with everything from this request on. All earlier requests are answered."""
        self._state = ConnectionState.UPGRADED
        self.requests.clear()
        self.setTimeout(None)
        data, self._buffer = head + b"\r\n" + self._buffer + self._unparsed, b""
        self.transport.unregisterProducer()
        on_upgrade(data)

    def allContentReceived(self) -> None:
        """Handle a complete request; not after a refusal."""
        if not self._drops_input:
            super().allContentReceived()

    def rawDataReceived(self, data: bytes) -> None:
        """Parse a piece of a body, or buffer pipelined requests."""
        if not self._drops_input:
            with contextlib.suppress(_AbortedError):
                super().rawDataReceived(data)

    def _respondToBadRequestAndDisconnect(self) -> None:
        self.refuse(_NOT_HTTP)

    # Called by HTTPChannel and HTTPRequest: responses.

    def checkPersistence(self, request: HTTPRequest, version: bytes) -> bool:
        """Return whether another request may follow."""
        if self._state is not ConnectionState.OPEN:
            request.responseHeaders.setRawHeaders(b"Connection", [b"close"])
            return False
        return bool(super().checkPersistence(request, version))

    def requestDone(self, request: HTTPRequest) -> None:
        """Leave pipelined requests to the next reactor iteration, and pause reading until then."""
        self.idle_since = self.context.reactor.seconds()
        # Set before HTTPChannel hands the pipelined requests back to the parser.
        self._resume_timer = self.callLater(0, self._resume)
        super().requestDone(request)
        if self._buffer and not self._drops_input:
            self.transport.pauseProducing()
        else:
            self._cancel_resume_timer()
            if not (self._drops_input or self._congested):
                self.setTimeout(KEEP_ALIVE_TIMEOUT)

    def _resume(self) -> None:
        self._resume_timer = None
        if not self._congested:
            self._resume_parsing()

    def _resume_parsing(self) -> None:
        self.transport.resumeProducing()
        LineReceiver.dataReceived(self, b"")

    def _cancel_resume_timer(self) -> None:
        timer, self._resume_timer = self._resume_timer, None
        if timer is not None:
            timer.cancel()

    # Called by the transport.

    def pauseProducing(self) -> None:
        """Stop reading and parsing while the backend does not read its responses."""
        super().pauseProducing()
        self._congested = True
        if self.timeOut is not None:
            self.setTimeout(REQUEST_TIMEOUT)
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """Read and parse again: the send buffer is empty."""
        self._congested = False
        if self.timeOut is not None and not self._drops_input:
            # Input was not read meanwhile: the timeout starts again.
            self.setTimeout(REQUEST_TIMEOUT if self._request_in_progress else KEEP_ALIVE_TIMEOUT)
        super().resumeProducing()
        if self._resume_timer is None:
            self._resume_parsing()

    def timeoutConnection(self) -> None:
        """Refuse a request that did not end in time, or close an idle connection, or one that does not read."""
        if self._request_in_progress and not self.paused:
            self.refuse(REQUEST_TIMED_OUT)
        else:
            self._close()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Cancel all timers, and the handler of the request in progress."""
        self._cancel_close_timer()
        self._cancel_resume_timer()
        super().connectionLost(reason)

    # Closing.

    def loseConnection(self) -> None:
        """Close once everything is sent; abort after ``REQUEST_TIMEOUT`` if the backend does not read."""
        super().loseConnection()
        if not self.is_closing:
            self._state = ConnectionState.CLOSING
            self._close_after(REQUEST_TIMEOUT, self.transport.abortConnection)

    def _close(self) -> None:
        self._state = ConnectionState.CLOSING
        self._close_after(LINGER_TIMEOUT, self.transport.abortConnection)
        self.loseConnection()

    def _close_after(self, delay: float, close: Callable[[], None]) -> None:
        self._cancel_close_timer()
        self._close_timer = self.callLater(delay, close)

    def _cancel_close_timer(self) -> None:
        if self._close_timer is not None and self._close_timer.active():
            self._close_timer.cancel()


def _is_encoded(encodings: list[str]) -> bool:
    """Whether a body with these Content-Encoding headers differs from its content (RFC 9110, section 8.4)."""
    codings = [coding.strip().lower() for value in encodings for coding in value.split(",")]
    return any(coding not in ("", "identity") for coding in codings)


def _has_valid_framing(request: HTTPRequest) -> bool:
    """Return whether the end of a request is unambiguous (RFC 9112, section 6). HTTPChannel has checked
    Content-Length."""
    headers = request.requestHeaders
    encodings = headers.getRawHeaders(b"Transfer-Encoding")
    if encodings is None:
        return True
    only = [encoding.lower() for encoding in encodings] == [b"chunked"]
    return only and request.clientproto == b"HTTP/1.1" and not headers.hasHeader(b"Content-Length")
