"""What a node answers to an opening handshake, as bytes.

<- HTTP/1.1 101 Switching Protocols          Upgrade: websocket, Connection: Upgrade, Sec-WebSocket-Accept: …
<- HTTP/1.1 429 Too Many Requests            {"error": "replaced", "message": "…"}, Retry-After, Content-Length

Sans-I/O, and strict: another node is trusted with a client's bytes, not with this one's memory or log.
"""

from __future__ import annotations

import base64
import hashlib
import re

import attrs
import msgspec

from gateway.edge.head import Refusal
from gateway.edge.limits import retry_after

#: the largest head, and the largest body that is read, in bytes
MAX_HEAD, MAX_BODY = 16384, 4096

#: the refusals that a client would get from this node as well -> their words, the first where it is another
SAME_HERE = {429: ("replaced", "rate")}
_MAX_MESSAGE, _MAX_RETRY = 256, 3600

_END = b"\r\n\r\n"
_FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-9][0-9]{2})(?: .*)?")
_HEADER_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):(.*)")
_NUMBER = re.compile(r"[0-9]{1,9}")
_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_ONCE = frozenset({"content-length", "sec-websocket-accept", "sec-websocket-protocol", "upgrade", "retry-after"})


class BadAnswer(Exception):
    """It is no answer to an opening handshake. The text has nothing of it."""


@attrs.frozen
class Answer:
    """The head of an answer."""

    status: int
    #: by lower-case name
    headers: dict[str, str]

    def body_size(self) -> int:
        """How many bytes of its body are to be read; 0 where they are not worth it."""
        size = self.headers.get("content-length", "")
        return int(size) if _NUMBER.fullmatch(size) and int(size) <= MAX_BODY else 0


def find_head(data: bytes) -> int:
    """The length of the head at the beginning of ``data``, with its empty line; 0 when that has yet to come.

    Raises :class:`BadAnswer`.
    """
    end = data.find(_END, 0, MAX_HEAD)
    if end < 0 and len(data) >= MAX_HEAD:
        raise BadAnswer(f"its head is more than {MAX_HEAD} bytes")
    if _FORBIDDEN.search(data, 0, end + 4 if end >= 0 else len(data)):
        raise BadAnswer("its head has control characters")
    return end + 4 if end >= 0 else 0


def parse_head(head: bytes) -> Answer:
    """Read a whole head. Raises :class:`BadAnswer`."""
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise BadAnswer("it is no HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        found = _HEADER_LINE.fullmatch(line)
        if found is None:
            raise BadAnswer("a line of its head is no header")
        name, value = found[1].lower(), found[2].strip(" \t")
        if name in headers and name in _ONCE:
            raise BadAnswer(f"its head has {name} twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Answer(int(status[1]), headers)


def accept_of(key: str) -> str:
    """The Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455, section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode("ascii") + _MAGIC).digest()).decode("ascii")


def check_upgrade(answer: Answer, key: str, offered: tuple[str, ...]) -> None:
    """Check an answer of status 101 (RFC 6455, section 4.1). ``offered`` are subprotocols.

    Raises :class:`BadAnswer`.
    """
    headers = answer.headers
    if headers.get("upgrade", "").lower() != "websocket":
        raise BadAnswer("its Upgrade is not websocket")
    if "upgrade" not in (part.strip(" \t").lower() for part in headers.get("connection", "").split(",")):
        raise BadAnswer("its Connection is not Upgrade")
    if headers.get("sec-websocket-accept") != accept_of(key):
        raise BadAnswer("its Sec-WebSocket-Accept is wrong")
    if "sec-websocket-extensions" in headers:
        raise BadAnswer("it speaks an extension that was not offered")
    if headers.get("sec-websocket-protocol", offered[0] if offered else None) not in (*offered, None):
        raise BadAnswer("it speaks a subprotocol that was not offered")


def refusal_of(answer: Answer, body: bytes) -> Refusal | None:
    """The refusal that an answer is, if it would be the same at this node; ``body`` may be anything."""
    words = SAME_HERE.get(answer.status)
    if words is None:
        return None
    try:
        said = msgspec.json.decode(body, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = {}
    word = said.get("error", "")
    message = "".join(c if c.isascii() and c.isprintable() else "?" for c in said.get("message", "")[:_MAX_MESSAGE])
    wait = answer.headers.get("retry-after", "")
    seconds = min(int(wait), _MAX_RETRY) if _NUMBER.fullmatch(wait) else 1
    return Refusal(
        answer.status,
        word if word in words else words[0],
        message or "the node that has this client refused it",
        [retry_after(seconds)],
    )
