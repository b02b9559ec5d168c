"""The opening handshake of RFC 6455 as bytes, on both sides. No I/O, no state.

As a server: parse the request, and write the response of one that is refused (RequestRefusedError).

-> GET /v1/connect?client_id=robot-7 HTTP/1.1          and header lines, an empty line: at most 16 KiB
<- HTTP/1.1 400 Bad Request                             with {"error": "client_id", "message": "…"}, then closed

Stricter than RFC 9112 where leniency lets two programs parse one request differently: lines end in CRLF only; no
control or C1 character, not even a tab; no folded line; no blank before a colon; a header that must be unique is given
once.

As the client of another node, for a relay: parse its response.

<- HTTP/1.1 101 Switching Protocols          Upgrade: websocket, Connection: Upgrade, Sec-WebSocket-Accept: …
<- HTTP/1.1 429 Too Many Requests            {"error": "replaced", "message": "…"}, Retry-After, Content-Length

Strict as well: another node is trusted with a client's bytes, not with this node's memory or log.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable
from http import HTTPStatus

import attrs
import msgspec

from gateway.protocol.errors import InvalidResponseError, RequestRefusedError

#: bytes that the head of a request or response may have, its empty line included
MAX_HEAD = 2**14
#: bytes of a response's body that are read, at most
MAX_RESPONSE_BODY = 2**12
#: characters of a client's text that a message may quote
MAX_REPR_CHARS = 64
#: error words of the refusals, by status, that a client would get from this node as well; the first is the default
FORWARDED_REFUSALS = {429: ("replaced", "rate")}

_HEAD_END = b"\r\n\r\n"
# A CR at the very end may still get its LF.
_FORBIDDEN_IN_REQUEST = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]|(?<!\r)\n|\r(?!\n|\Z)")
_FORBIDDEN_IN_RESPONSE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
_REQUEST_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([!-~]+) HTTP/([0-9])\.([0-9])")
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-9][0-9]{2})(?: .*)?")
_HEADER_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):(.*)")
_ABSOLUTE_FORM = re.compile(r"(?:https?|wss?)://[^/?#]+", re.IGNORECASE)
_WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
_DECIMAL = re.compile(r"[0-9]{1,9}")
_SINGLE_REQUEST_HEADERS = frozenset(
    {"host", "authorization", "origin", "sec-websocket-key", "sec-websocket-version", "content-length"}
)
_SINGLE_RESPONSE_HEADERS = frozenset(
    {"content-length", "sec-websocket-accept", "sec-websocket-protocol", "upgrade", "retry-after"}
)
#: characters of another node's message that are forwarded
_MAX_MESSAGE = 256
#: seconds of another node's Retry-After that are forwarded, at most
_MAX_RETRY_AFTER = 3600
#: RFC 6455, section 1.3
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def retry_after_header(seconds: float) -> tuple[str, str]:
    """Return a Retry-After header, in whole seconds, at least 1."""
    return "Retry-After", str(max(1, math.ceil(seconds)))


def encode_response(status: int, body: bytes, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """Return a whole HTTP response with a JSON body, after which the connection is closed.

    No cache may keep it (RFC 9111, section 5.2.2.5).
    """
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body


def encode_refusal(refusal: RequestRefusedError) -> bytes:
    """Return the whole HTTP response to a request that is refused."""
    body = json.dumps({"error": refusal.reason, "message": refusal.message}, separators=(",", ":")).encode("ascii")
    return encode_response(refusal.status, body, refusal.headers)


def safe_repr(text: str) -> str:
    """Quote a client's text for a message or a log line: escaped, and cut to ``MAX_REPR_CHARS``."""
    return ascii(text if len(text) <= MAX_REPR_CHARS else text[:MAX_REPR_CHARS] + "...")


@attrs.frozen
class HandshakeRequest:
    """A valid request to open a WebSocket (RFC 6455, section 4.2.1)."""

    path: str
    #: what follows the ``?``, not decoded; it may have a ticket
    query: str = attrs.field(repr=False)
    #: by name in lower case; the values of a repeated header are joined by ``, ``
    headers: dict[str, str]
    #: the value of Sec-WebSocket-Key
    key: str
    #: the subprotocols offered, in the client's order
    subprotocols: tuple[str, ...]


def find_request_head(data: bytes, scanned: int) -> int:
    """Find the end of a request's head.

    Returns its length with the empty line, or 0 while it is incomplete. ``scanned`` is how many bytes of ``data`` the
    previous call has seen. Raises :class:`RequestRefusedError` as soon as the head has a forbidden byte or is too long.
    """
    end = data.find(_HEAD_END, max(0, scanned - 3), MAX_HEAD)
    head = data[: end + 4] if end >= 0 else data[:MAX_HEAD]
    forbidden = _FORBIDDEN_IN_REQUEST.search(head, max(0, scanned - 1))
    if forbidden:
        raise RequestRefusedError(
            400, "header", f"the request has the forbidden byte 0x{forbidden[0][0]:02x} at {forbidden.start()}"
        )
    if end < 0 and len(data) >= MAX_HEAD:
        raise RequestRefusedError(400, "header", f"the request's head has more than {MAX_HEAD} bytes")
    return end + 4 if end >= 0 else 0


def parse_request(head: bytes, path: str) -> HandshakeRequest:
    """Parse the whole head of a request, as found by :func:`find_request_head`.

    Raises :class:`RequestRefusedError` unless it is a valid opening handshake for ``path``.
    """
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise RequestRefusedError(400, "request", f"{safe_repr(first)} is not an HTTP request line")
    method, target, major, minor = line.groups()
    requested, _, query = _origin_form(target).partition("?")
    if requested != path:
        raise RequestRefusedError(404, "path", f"there is nothing at {safe_repr(requested)}; clients connect to {path}")
    if method != "GET":
        raise RequestRefusedError(400, "method", f"the method is {safe_repr(method)}; a WebSocket is opened by GET")
    if (major, minor) != ("1", "1"):
        raise RequestRefusedError(400, "request", f"this is HTTP/{major}.{minor}; a WebSocket is opened by HTTP/1.1")
    headers = _parse_headers(lines)
    key = _check_upgrade_request(headers)
    return HandshakeRequest(requested, query, headers, key, _parse_subprotocols(headers))


def _origin_form(target: str) -> str:
    """Return the path and query of a request target (RFC 9112, section 3.2)."""
    if "#" in target:
        raise RequestRefusedError(400, "request", "the URL has a fragment (#); that of a WebSocket must not")
    if target.startswith("/"):
        return target
    absolute = _ABSOLUTE_FORM.match(target)
    if absolute is None:
        raise RequestRefusedError(400, "request", f"{safe_repr(target)} is not a path")
    rest = target[absolute.end() :]
    return rest if rest.startswith("/") else "/" + rest


def _parse_headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)
        if match is None:
            raise RequestRefusedError(400, "header", f"{safe_repr(line.partition(':')[0])} is not a header name")
        name, value = match[1].lower(), match[2].strip(" ")
        if name not in headers:
            headers[name] = value
        elif name in _SINGLE_REQUEST_HEADERS or name.startswith("wsgateway-"):
            raise RequestRefusedError(400, "header", f"the header {safe_repr(name)} is given twice")
        else:
            headers[name] += ", " + value
    if "host" not in headers:
        raise RequestRefusedError(400, "header", "the Host header is missing")
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        # The bytes of a body would be taken for frames.
        raise RequestRefusedError(400, "header", "the request has a body; an opening handshake must not")
    return headers


def _has_token(headers: dict[str, str], name: str, token: str) -> bool:
    return any(part.strip(" ").lower() == token for part in headers.get(name, "").split(","))


def _check_upgrade_request(headers: dict[str, str]) -> str:
    """Check that the headers ask for a WebSocket, and return the key (RFC 6455, section 4.2.1)."""
    if not _has_token(headers, "upgrade", "websocket"):
        raise RequestRefusedError(
            400, "upgrade", "this path opens WebSockets only: the header `Upgrade: websocket` is missing"
        )
    if not _has_token(headers, "connection", "upgrade"):
        raise RequestRefusedError(400, "upgrade", "the header `Connection: Upgrade` is missing")
    version = headers.get("sec-websocket-version", "")
    if version != "13":
        raise RequestRefusedError(
            400,
            "upgrade",
            f"the Sec-WebSocket-Version is {safe_repr(version)}; only 13 is supported",
            [("Sec-WebSocket-Version", "13")],
        )
    key = headers.get("sec-websocket-key", "")
    if not _WEBSOCKET_KEY.fullmatch(key):
        raise RequestRefusedError(400, "upgrade", "the Sec-WebSocket-Key is not 16 bytes in base64")
    return key


def _parse_subprotocols(headers: dict[str, str]) -> tuple[str, ...]:
    # A subprotocol may carry a token: never quote one.
    offered = [part.strip(" ") for part in headers.get("sec-websocket-protocol", "").split(",")]
    offered = [part for part in offered if part]
    if len(set(offered)) < len(offered):
        raise RequestRefusedError(400, "upgrade", "a subprotocol is offered twice in Sec-WebSocket-Protocol")
    if any(" " in part or not part.isascii() for part in offered):
        raise RequestRefusedError(400, "upgrade", "a subprotocol in Sec-WebSocket-Protocol has a blank or is not ASCII")
    return tuple(offered)


@attrs.frozen
class HandshakeResponse:
    """The head of a response."""

    status: int
    #: by name in lower case
    headers: dict[str, str]

    def body_size(self) -> int:
        """Return how many bytes of the body to read; 0 if it is too large, or its length is unknown."""
        size = self.headers.get("content-length", "")
        return int(size) if _DECIMAL.fullmatch(size) and int(size) <= MAX_RESPONSE_BODY else 0


def find_response_head(data: bytes) -> int:
    """Find the end of the head at the start of ``data``.

    Returns its length with the empty line, or 0 while it is incomplete. Raises :class:`InvalidResponseError`.
    """
    end = data.find(_HEAD_END, 0, MAX_HEAD)
    if end < 0 and len(data) >= MAX_HEAD:
        raise InvalidResponseError(f"its head is more than {MAX_HEAD} bytes")
    if _FORBIDDEN_IN_RESPONSE.search(data, 0, end + 4 if end >= 0 else len(data)):
        raise InvalidResponseError("its head has control characters")
    return end + 4 if end >= 0 else 0


def parse_response(head: bytes) -> HandshakeResponse:
    """Parse a whole head. Raises :class:`InvalidResponseError`."""
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise InvalidResponseError("it is not HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)
        if match is None:
            raise InvalidResponseError("a line of its head is not a header")
        name, value = match[1].lower(), match[2].strip(" \t")
        if name in headers and name in _SINGLE_RESPONSE_HEADERS:
            raise InvalidResponseError(f"its head has {name} twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return HandshakeResponse(int(status[1]), headers)


def accept_key(key: str) -> str:
    """Return the Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455, section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode("ascii") + _GUID).digest()).decode("ascii")


def check_upgrade_response(response: HandshakeResponse, key: str, offered: tuple[str, ...]) -> None:
    """Check a response of status 101 (RFC 6455, section 4.1). ``offered`` are the subprotocols of the request.

    Raises :class:`InvalidResponseError`.
    """
    headers = response.headers
    if headers.get("upgrade", "").lower() != "websocket":
        raise InvalidResponseError("its Upgrade is not websocket")
    if "upgrade" not in (part.strip(" \t").lower() for part in headers.get("connection", "").split(",")):
        raise InvalidResponseError("its Connection is not Upgrade")
    if headers.get("sec-websocket-accept") != accept_key(key):
        raise InvalidResponseError("its Sec-WebSocket-Accept is wrong")
    if "sec-websocket-extensions" in headers:
        raise InvalidResponseError("it selects an extension that was not offered")
    if headers.get("sec-websocket-protocol", offered[0] if offered else None) not in (*offered, None):
        raise InvalidResponseError("it selects a subprotocol that was not offered")


def parse_refusal(response: HandshakeResponse, body: bytes) -> RequestRefusedError | None:
    """Return the refusal in a response, if this node would refuse alike, else ``None``; ``body`` may be anything."""
    reasons = FORWARDED_REFUSALS.get(response.status)
    if reasons is None:
        return None
    try:
        fields = msgspec.json.decode(body, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = {}
    reason = fields.get("error", "")
    message = "".join(c if c.isascii() and c.isprintable() else "?" for c in fields.get("message", "")[:_MAX_MESSAGE])
    retry_after = response.headers.get("retry-after", "")
    seconds = min(int(retry_after), _MAX_RETRY_AFTER) if _DECIMAL.fullmatch(retry_after) else 1
    return RequestRefusedError(
        response.status,
        reason if reason in reasons else reasons[0],
        message or "the node that has this client refused it",
        [retry_after_header(seconds)],
    )
