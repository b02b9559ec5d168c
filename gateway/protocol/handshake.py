"""The opening handshake as bytes: the head of a client's request, and the answer to one that is refused.

-> GET /v1/connect?client_id=robot-7 HTTP/1.1          and its header lines, an empty line: at most 16 KiB
<- HTTP/1.1 400 Bad Request                             with {"error": "client_id", "message": "…"}, then the end

Sans-I/O. Stricter than RFC 9112 where leniency lets two programs read one request differently: lines end in CRLF
alone, no control or C1 character (a tab neither), no folded line, no blank before a colon, and what may be given once
is given once.

What a node answers to an opening handshake, as bytes.

<- HTTP/1.1 101 Switching Protocols          Upgrade: websocket, Connection: Upgrade, Sec-WebSocket-Accept: …
<- HTTP/1.1 429 Too Many Requests            {"error": "replaced", "message": "…"}, Retry-After, Content-Length

Sans-I/O, and strict: another node is trusted with a client's bytes, not with this one's memory or log.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re

import attrs
import msgspec

from gateway.protocol.errors import _HEAD_END, InvalidResponseError, RequestRefusedError


def retry_after_header(seconds: float) -> tuple[str, str]:
    """The header that says so: whole seconds, at least 1."""
    return "Retry-After", str(max(1, math.ceil(seconds)))


#: the largest head of a request or a response, in bytes, its empty line included
MAX_HEAD = 16384

#: How many characters of what a client sent are shown in a message.
MAX_REPR_CHARS = 64


# A CR at the very end may yet get its LF.
_FORBIDDEN_IN_REQUEST = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]|(?<!\r)\n|\r(?!\n|\Z)")
_REQUEST_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([!-~]+) HTTP/([0-9])\.([0-9])")
_HEADER_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):(.*)")
_ABSOLUTE_FORM = re.compile(r"(?:https?|wss?)://[^/?#]+", re.IGNORECASE)
_WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
_SINGLE_REQUEST_HEADERS = frozenset(
    {"host", "authorization", "origin", "sec-websocket-key", "sec-websocket-version", "content-length"}
)


def safe_repr(text: str) -> str:
    """What a client sent as it may be shown in a message or a log line: quoted, escaped, cut."""
    return ascii(text if len(text) <= MAX_REPR_CHARS else text[:MAX_REPR_CHARS] + "...")


@attrs.frozen
class HandshakeRequest:
    """A client's request to open a WebSocket, found to be one (RFC 6455, section 4.2.1)."""

    path: str
    #: what follows the ``?``, as it came
    query: str
    #: by lower-case name; the values of a repeated header are joined by ``, ``
    headers: dict[str, str]
    #: the value of Sec-WebSocket-Key
    key: str
    #: the subprotocols that are offered, in the client's order
    subprotocols: tuple[str, ...]


def find_request_head(data: bytes, scanned: int) -> int:
    """Find the end of a request's head.

    Returns its length with the empty line, or 0 when that has yet to come. ``searched`` is how much of ``data`` was
    seen by the call before. Raises :class:`Refusal` as soon as it can be told that the head will not do.
    """
    end = data.find(_HEAD_END, max(0, scanned - 3), MAX_HEAD)
    head = data[: end + 4] if end >= 0 else data[:MAX_HEAD]
    forbidden = _FORBIDDEN_IN_REQUEST.search(head, max(0, scanned - 1))
    if forbidden:
        raise RequestRefusedError(
            400, "header", f"the request has the byte 0x{forbidden[0][0]:02x} at {forbidden.start()}, which may not be"
        )
    if end < 0 and len(data) >= MAX_HEAD:
        raise RequestRefusedError(400, "header", f"the request's header lines are more than {MAX_HEAD} bytes")
    return end + 4 if end >= 0 else 0


def parse_request(head: bytes, path: str) -> HandshakeRequest:
    """Read a whole head, found by :func:`request_head_size`, of a request that is to be for ``path``.

    Raises :class:`Refusal`.
    """
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise RequestRefusedError(400, "request", f"{safe_repr(first)} is no HTTP request line")
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
    """The path and query of a request target (RFC 9112, section 3.2)."""
    if "#" in target:
        raise RequestRefusedError(400, "request", "the url has a fragment (#); a WebSocket's may not")
    if target.startswith("/"):
        return target
    absolute = _ABSOLUTE_FORM.match(target)
    if absolute is None:
        raise RequestRefusedError(400, "request", f"{safe_repr(target)} is no path that can be requested")
    rest = target[absolute.end() :]
    return rest if rest.startswith("/") else "/" + rest


def _parse_headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        found = _HEADER_LINE.fullmatch(line)
        if found is None:
            raise RequestRefusedError(400, "header", f"{safe_repr(line.partition(':')[0])} is no header name")
        name, value = found[1].lower(), found[2].strip(" ")
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
        raise RequestRefusedError(400, "header", "the request has a body; one that opens a WebSocket may not")
    return headers


def _has_token(headers: dict[str, str], name: str, token: str) -> bool:
    return any(part.strip(" ").lower() == token for part in headers.get(name, "").split(","))


def _check_upgrade_request(headers: dict[str, str]) -> str:
    """Check what makes a request an opening handshake, and return its key (RFC 6455, section 4.2.1)."""
    if not _has_token(headers, "upgrade", "websocket"):
        raise RequestRefusedError(
            400, "upgrade", "this is where WebSockets are opened: the header `Upgrade: websocket` is missing"
        )
    if not _has_token(headers, "connection", "upgrade"):
        raise RequestRefusedError(400, "upgrade", "the header `Connection: Upgrade` is missing")
    version = headers.get("sec-websocket-version", "")
    if version != "13":
        raise RequestRefusedError(
            400,
            "upgrade",
            f"the Sec-WebSocket-Version is {safe_repr(version)}; 13 is spoken here",
            [("Sec-WebSocket-Version", "13")],
        )
    key = headers.get("sec-websocket-key", "")
    if not _WEBSOCKET_KEY.fullmatch(key):
        raise RequestRefusedError(400, "upgrade", "the Sec-WebSocket-Key is not 16 bytes in base64")
    return key


def _parse_subprotocols(headers: dict[str, str]) -> tuple[str, ...]:
    # A subprotocol may carry a token: never show one.
    offered = [part.strip(" ") for part in headers.get("sec-websocket-protocol", "").split(",")]
    offered = [part for part in offered if part]
    if len(set(offered)) < len(offered):
        raise RequestRefusedError(400, "upgrade", "a subprotocol is offered twice in Sec-WebSocket-Protocol")
    if any(" " in part or not part.isascii() for part in offered):
        raise RequestRefusedError(400, "upgrade", "a subprotocol in Sec-WebSocket-Protocol has a blank or is not ASCII")
    return tuple(offered)


#: the largest body of a response that is read, in bytes
MAX_RESPONSE_BODY = 4096

#: the refusals that a client would get from this node as well -> their words, the first where it is another
FORWARDED_REFUSALS = {429: ("replaced", "rate")}
_MAX_MESSAGE, _MAX_RETRY_AFTER = 256, 3600

_FORBIDDEN_IN_RESPONSE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-9][0-9]{2})(?: .*)?")
_DECIMAL = re.compile(r"[0-9]{1,9}")
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_SINGLE_RESPONSE_HEADERS = frozenset(
    {"content-length", "sec-websocket-accept", "sec-websocket-protocol", "upgrade", "retry-after"}
)


@attrs.frozen
class HandshakeResponse:
    """The head of an answer."""

    status: int
    #: by lower-case name
    headers: dict[str, str]

    def body_size(self) -> int:
        """How many bytes of its body are to be read; 0 where they are not worth it."""
        size = self.headers.get("content-length", "")
        return int(size) if _DECIMAL.fullmatch(size) and int(size) <= MAX_RESPONSE_BODY else 0


def find_response_head(data: bytes) -> int:
    """The length of the head at the beginning of ``data``, with its empty line; 0 when that has yet to come.

    Raises :class:`BadAnswer`.
    """
    end = data.find(_HEAD_END, 0, MAX_HEAD)
    if end < 0 and len(data) >= MAX_HEAD:
        raise InvalidResponseError(f"its head is more than {MAX_HEAD} bytes")
    if _FORBIDDEN_IN_RESPONSE.search(data, 0, end + 4 if end >= 0 else len(data)):
        raise InvalidResponseError("its head has control characters")
    return end + 4 if end >= 0 else 0


def parse_response(head: bytes) -> HandshakeResponse:
    """Read a whole head. Raises :class:`BadAnswer`."""
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise InvalidResponseError("it is no HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        found = _HEADER_LINE.fullmatch(line)
        if found is None:
            raise InvalidResponseError("a line of its head is no header")
        name, value = found[1].lower(), found[2].strip(" \t")
        if name in headers and name in _SINGLE_RESPONSE_HEADERS:
            raise InvalidResponseError(f"its head has {name} twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return HandshakeResponse(int(status[1]), headers)


def accept_key(key: str) -> str:
    """The Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455, section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode("ascii") + _GUID).digest()).decode("ascii")


def check_upgrade_response(response: HandshakeResponse, key: str, offered: tuple[str, ...]) -> None:
    """Check an answer of status 101 (RFC 6455, section 4.1). ``offered`` are subprotocols.

    Raises :class:`BadAnswer`.
    """
    headers = response.headers
    if headers.get("upgrade", "").lower() != "websocket":
        raise InvalidResponseError("its Upgrade is not websocket")
    if "upgrade" not in (part.strip(" \t").lower() for part in headers.get("connection", "").split(",")):
        raise InvalidResponseError("its Connection is not Upgrade")
    if headers.get("sec-websocket-accept") != accept_key(key):
        raise InvalidResponseError("its Sec-WebSocket-Accept is wrong")
    if "sec-websocket-extensions" in headers:
        raise InvalidResponseError("it speaks an extension that was not offered")
    if headers.get("sec-websocket-protocol", offered[0] if offered else None) not in (*offered, None):
        raise InvalidResponseError("it speaks a subprotocol that was not offered")


def parse_refusal(response: HandshakeResponse, body: bytes) -> RequestRefusedError | None:
    """The refusal that an answer is, if it would be the same at this node; ``body`` may be anything."""
    words = FORWARDED_REFUSALS.get(response.status)
    if words is None:
        return None
    try:
        said = msgspec.json.decode(body, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = {}
    word = said.get("error", "")
    message = "".join(c if c.isascii() and c.isprintable() else "?" for c in said.get("message", "")[:_MAX_MESSAGE])
    wait = response.headers.get("retry-after", "")
    seconds = min(int(wait), _MAX_RETRY_AFTER) if _DECIMAL.fullmatch(wait) else 1
    return RequestRefusedError(
        response.status,
        word if word in words else words[0],
        message or "the node that has this client refused it",
        [retry_after_header(seconds)],
    )
