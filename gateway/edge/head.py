"""The opening handshake as bytes: the head of a client's request, and the answer to one that is refused.

-> GET /v1/connect?client_id=robot-7 HTTP/1.1          and its header lines, an empty line: at most 16 KiB
<- HTTP/1.1 400 Bad Request                             with {"error": "client_id", "message": "…"}, then the end

Sans-I/O. Stricter than RFC 9112 where leniency lets two programs read one request differently: lines end in CRLF
alone, no control or C1 character (a tab neither), no folded line, no blank before a colon, and what may be given once
is given once.
"""

from __future__ import annotations

import http
import json
import re
from collections.abc import Sequence

import attrs

#: the largest head of a request, in bytes, its empty line included
MAX_HEAD = 16384

#: How many characters of what a client sent are shown in a message.
SHOWN = 64

_END = b"\r\n\r\n"
# A CR at the very end may yet get its LF.
_FORBIDDEN = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]|(?<!\r)\n|\r(?!\n|\Z)")
_REQUEST_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([!-~]+) HTTP/([0-9])\.([0-9])")
_HEADER_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):(.*)")
_ABSOLUTE = re.compile(r"(?:https?|wss?)://[^/?#]+", re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
_ONCE = frozenset({"host", "authorization", "origin", "sec-websocket-key", "sec-websocket-version", "content-length"})


def shown(text: str) -> str:
    """What a client sent as it may be shown in a message or a log line: quoted, escaped, cut."""
    return ascii(text if len(text) <= SHOWN else text[:SHOWN] + "...")


class Refusal(Exception):
    """An opening handshake that is answered with an HTTP error.

    ``word`` names the reason for programs (and is counted), ``message`` says it to a person; ``headers`` are added to
    the response.
    """

    def __init__(self, status: int, word: str, message: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        self.status = status
        self.word = word
        self.message = message
        self.headers = tuple(headers)
        for name, value in self.headers:
            if not (name + value).isascii() or not (name + value).isprintable():
                raise ValueError(f"the header {name!r}: {value!r} cannot be sent")
        super().__init__(f"{status} {word}: {message}")

    def response(self) -> bytes:
        """The whole HTTP response."""
        body = json.dumps({"error": self.word, "message": self.message}, separators=(",", ":")).encode("ascii")
        lines = [
            f"HTTP/1.1 {self.status} {http.HTTPStatus(self.status).phrase}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        return "\r\n".join(lines).encode("ascii") + _END + body


@attrs.frozen
class Request:
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


def split_head(data: bytes, searched: int) -> int:
    """Find the end of a request's head.

    Returns its length with the empty line, or 0 when that has yet to come. ``searched`` is how much of ``data`` was
    seen by the call before. Raises :class:`Refusal` as soon as it can be told that the head will not do.
    """
    end = data.find(_END, max(0, searched - 3), MAX_HEAD)
    head = data[: end + 4] if end >= 0 else data[:MAX_HEAD]
    forbidden = _FORBIDDEN.search(head, max(0, searched - 1))
    if forbidden:
        raise Refusal(
            400, "header", f"the request has the byte 0x{forbidden[0][0]:02x} at {forbidden.start()}, which may not be"
        )
    if end < 0 and len(data) >= MAX_HEAD:
        raise Refusal(400, "header", f"the request's header lines are more than {MAX_HEAD} bytes")
    return end + 4 if end >= 0 else 0


def parse_head(head: bytes, path: str) -> Request:
    """Read a whole head, found by :func:`split_head`, of a request that is to be for ``path``.

    Raises :class:`Refusal`.
    """
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise Refusal(400, "request", f"{shown(first)} is no HTTP request line")
    method, target, major, minor = line.groups()
    requested, _, query = _origin_form(target).partition("?")
    if requested != path:
        raise Refusal(404, "path", f"there is nothing at {shown(requested)}; clients connect to {path}")
    if method != "GET":
        raise Refusal(400, "method", f"the method is {shown(method)}; a WebSocket is opened by GET")
    if (major, minor) != ("1", "1"):
        raise Refusal(400, "request", f"this is HTTP/{major}.{minor}; a WebSocket is opened by HTTP/1.1")
    headers = _parse_headers(lines)
    key = _check_upgrade(headers)
    return Request(requested, query, headers, key, _subprotocols(headers))


def _origin_form(target: str) -> str:
    """The path and query of a request target (RFC 9112, section 3.2)."""
    if "#" in target:
        raise Refusal(400, "request", "the url has a fragment (#); a WebSocket's may not")
    if target.startswith("/"):
        return target
    absolute = _ABSOLUTE.match(target)
    if absolute is None:
        raise Refusal(400, "request", f"{shown(target)} is no path that can be requested")
    rest = target[absolute.end() :]
    return rest if rest.startswith("/") else "/" + rest


def _parse_headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        found = _HEADER_LINE.fullmatch(line)
        if found is None:
            raise Refusal(400, "header", f"{shown(line.partition(':')[0])} is no header name")
        name, value = found[1].lower(), found[2].strip(" ")
        if name not in headers:
            headers[name] = value
        elif name in _ONCE or name.startswith("wsgateway-"):
            raise Refusal(400, "header", f"the header {shown(name)} is given twice")
        else:
            headers[name] += ", " + value
    if "host" not in headers:
        raise Refusal(400, "header", "the Host header is missing")
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        # The bytes of a body would be taken for frames.
        raise Refusal(400, "header", "the request has a body; one that opens a WebSocket may not")
    return headers


def _has_token(headers: dict[str, str], name: str, token: str) -> bool:
    return any(part.strip(" ").lower() == token for part in headers.get(name, "").split(","))


def _check_upgrade(headers: dict[str, str]) -> str:
    """Check what makes a request an opening handshake, and return its key (RFC 6455, section 4.2.1)."""
    if not _has_token(headers, "upgrade", "websocket"):
        raise Refusal(400, "upgrade", "this is where WebSockets are opened: the header `Upgrade: websocket` is missing")
    if not _has_token(headers, "connection", "upgrade"):
        raise Refusal(400, "upgrade", "the header `Connection: Upgrade` is missing")
    version = headers.get("sec-websocket-version", "")
    if version != "13":
        raise Refusal(
            400,
            "upgrade",
            f"the Sec-WebSocket-Version is {shown(version)}; 13 is spoken here",
            [("Sec-WebSocket-Version", "13")],
        )
    key = headers.get("sec-websocket-key", "")
    if not _KEY.fullmatch(key):
        raise Refusal(400, "upgrade", "the Sec-WebSocket-Key is not 16 bytes in base64")
    return key


def _subprotocols(headers: dict[str, str]) -> tuple[str, ...]:
    # A subprotocol may carry a token: never show one.
    offered = [part.strip(" ") for part in headers.get("sec-websocket-protocol", "").split(",")]
    offered = [part for part in offered if part]
    if len(set(offered)) < len(offered):
        raise Refusal(400, "upgrade", "a subprotocol is offered twice in Sec-WebSocket-Protocol")
    if any(" " in part or not part.isascii() for part in offered):
        raise Refusal(400, "upgrade", "a subprotocol in Sec-WebSocket-Protocol has a blank or is not ASCII")
    return tuple(offered)
