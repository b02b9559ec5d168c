"""HTTP messages and WebSocket frames as bytes, from the backend's side."""

from __future__ import annotations

import struct
from typing import Any

import attrs
import msgspec
from twisted.internet.testing import StringTransport


class FakeTransport(StringTransport):
    """A transport whose send buffer can be full, and which records an abort."""

    aborted = False
    protocol: Any = None

    def abortConnection(self):
        self.aborted = True
        super().abortConnection()

    def pauseProducing(self):
        if self.producerState == "producing":
            super().pauseProducing()

    def resumeProducing(self):
        # Unlike StringTransport, real transports allow this at any time.
        self.producerState = "producing"

    def fill_buffer(self):
        """Fill the send buffer."""
        self.producer.pauseProducing()

    def drain_buffer(self):
        """Empty the send buffer."""
        self.producer.resumeProducing()


@attrs.define
class HTTPResponse:
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes
    phrase: str = ""

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def responses(data: bytes, heads: int = 0) -> list[HTTPResponse]:
    """Parse HTTP responses to the last byte. The first ``heads`` answer HEAD requests and have no body."""
    parsed = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        version, status, phrase = first.split(" ", 2)
        assert version == "HTTP/1.1", first
        if status == "100":
            continue
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        assert len(headers) == len(lines), lines
        length = int(headers.get("content-length", 0))
        if heads > len(parsed):
            length = 0
        assert len(data) >= length, (head, data)
        parsed.append(HTTPResponse(int(status), headers, data[:length], phrase))
        data = data[length:]
    return parsed


def request(method, target, body=None, headers=()) -> bytes:
    """Return an HTTP request, with JSON as the content type of a body."""
    lines = [f"{method} {target} HTTP/1.1"]
    names = {name.lower() for name, _ in headers}
    if "host" not in names:
        lines.append("Host: localhost:8081")
    if (body is not None or method == "POST") and "content-type" not in names:
        lines.append("Content-Type: application/json")
    if body is not None and "content-length" not in names:
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def frame(payload: bytes, opcode: int = 1) -> bytes:
    """Return a masked frame, as a client sends it (RFC 6455, section 5.2)."""
    mask = b"\x01\x02\x03\x04"
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    return head + mask + masked


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """Parse the frames of a server into opcodes and payloads."""
    parsed = []
    while data:
        opcode, size, at = data[0] & 0x0F, data[1], 2
        assert data[0] & 0xF0 == 0x80, data[0]
        if size == 126:
            size, at = struct.unpack("!H", data[2:4])[0], 4
        elif size == 127:
            size, at = struct.unpack("!Q", data[2:10])[0], 10
        parsed.append((opcode, data[at : at + size]))
        data = data[at + size :]
    return parsed


UPGRADE = (
    ("Upgrade", "websocket"),
    ("Connection", "Upgrade"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("Sec-WebSocket-Version", "13"),
)
