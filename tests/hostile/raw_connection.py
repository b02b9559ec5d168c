"""Raw connections to a node, and their outcomes in one or two words.

Uses neither code of the gateway nor a WebSocket library, so that any bytes can be sent.

    503 full          status and error word of the response to an opening handshake or an HTTP request
    101               the connection was opened
    closed 1009       a close frame with that code
    dropped           end of the connection or reset, without a close frame
    nothing           no data within the timeout
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import select
import socket
import struct
import time
from collections.abc import Iterator

#: opcodes (RFC 6455, section 5.2)
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
#: seconds
TIMEOUT = 10.0
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
MASK = b"\x37\xfa\x21\x3d"

_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[^\r\n]*\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_NUMBERS = itertools.count(random.randrange(1 << 20))


def source() -> str:
    """Return a loopback address that was hardly ever used as a source."""
    number = next(_NUMBERS) % (1 << 22)
    return f"127.{64 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def name() -> str:
    """Return an unused client_id."""
    return f"evil-{os.getpid()}-{next(_NUMBERS)}"


def request(method: str, target: str, *lines: str, body: bytes = b"", host: str = "127.0.0.1") -> bytes:
    """Build an HTTP request; the head is encoded as Latin-1."""
    head = [f"{method} {target} HTTP/1.1", *([f"Host: {host}"] if host else []), *lines]
    if body:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def opening(client_id: str, *lines: str, target: str = "", without: str = "") -> bytes:
    """Build a valid opening handshake, plus ``lines``, ``without`` one header."""
    fine = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {KEY}"]
    kept = [line for line in fine if not without or not line.startswith(f"{without}:")]
    host = "" if without == "Host" else "127.0.0.1"
    return request("GET", target or f"/v1/connect?client_id={client_id}", *kept, *lines, host=host)


def masked(payload: bytes, mask: bytes = MASK) -> bytes:
    """Mask a payload (RFC 6455, section 5.3)."""
    size = len(payload)
    repeated = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return (int.from_bytes(payload, "big") ^ repeated).to_bytes(size, "big")


def frame(
    payload: bytes | str = b"",
    opcode: int = TEXT,
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bool = True,
    length: int | None = None,
    form: int | None = None,
) -> bytes:
    """Build a frame. ``length`` is the announced length, true or not; ``form`` its encoding: 7, 16 or 64 bits."""
    data = payload.encode("latin-1") if isinstance(payload, str) else payload
    size = len(data) if length is None else length
    bits = form or (7 if size < 126 else 16 if size < 65536 else 64)
    first = fin << 7 | rsv << 4 | opcode
    if bits == 7:
        head = struct.pack("!BB", first, size | mask << 7)
    elif bits == 16:
        head = struct.pack("!BBH", first, 126 | mask << 7, size)
    else:
        head = struct.pack("!BBQ", first, 127 | mask << 7, size)
    return head + (MASK + masked(data) if mask else data)


def close(code: int, reason: bytes = b"") -> bytes:
    """Build a close frame."""
    return frame(struct.pack("!H", code) + reason, CLOSE)


class RawConnection:
    def __init__(
        self, address: tuple[str, int], *, source_address: str = "", timeout: float = TIMEOUT, buffer: int = 0
    ) -> None:
        """``source_address`` is the local address; ``buffer`` the size of the receive buffer."""
        self.socket = socket.socket()
        self.socket.settimeout(timeout)
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        if source_address:
            self.socket.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
            self.socket.bind((source_address, 0))
        self.socket.connect(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timeout = timeout
        self._buffer = b""
        #: where send_repeatedly() continues
        self._send_offset = 0
        #: whether the last read found data
        self.alive = True

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.drop()

    def drop(self) -> None:
        """Reset the connection, so that nothing of it stays in the kernel."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Send all data; return ``False`` if the connection is closed or the timeout passes."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def send_until_blocked(self, data: bytes, timeout: float = 0.5) -> int:
        """Send until the peer accepts nothing for ``timeout`` seconds; return the number of bytes sent."""
        sent = 0
        self.socket.settimeout(timeout)
        with contextlib.suppress(OSError):
            while sent < len(data):
                sent += self.socket.send(data[sent : sent + 262144])
        self.socket.settimeout(self._timeout)
        return sent

    def send_repeatedly(self, data: bytes, max_bytes: int, timeout: float = 0.2) -> bool:
        """Send ``data`` repeatedly, up to ``max_bytes``, continuing where the last call ended.

        Returns ``False`` if the peer accepts nothing for ``timeout`` seconds.
        """
        sent = 0
        self.socket.settimeout(timeout)
        try:
            while sent < max_bytes:
                taken = self.socket.send(data[self._send_offset : self._send_offset + 262144])
                sent += taken
                self._send_offset = (self._send_offset + taken) % len(data)
        except OSError:
            pass
        finally:
            self.socket.settimeout(self._timeout)
        return sent >= max_bytes

    def read(self) -> bool:
        """Read data into the buffer; return ``False`` at the end. Raises ``TimeoutError``."""
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            raise
        except OSError:
            self.alive = False
            return False
        self._buffer += data
        self.alive = bool(data)
        return self.alive

    def is_reset(self) -> bool:
        """Whether the peer has reset the connection, checked without reading."""
        poll = select.poll()
        poll.register(self.socket, 0)
        return bool(poll.poll(0))

    def has_answer(self) -> bool:
        """Whether there is unprocessed data."""
        return bool(self._buffer)

    def read_all(self) -> None:
        """Read and discard all available data."""
        self._buffer = b""
        self.socket.settimeout(0)
        try:
            while self.alive:
                self.alive = bool(self.socket.recv(262144))
        except BlockingIOError:
            pass
        except OSError:
            self.alive = False
        self.socket.settimeout(self._timeout)

    def response(self) -> str:
        """Read a response; return its status and error word."""
        try:
            while b"\r\n\r\n" not in self._buffer:
                if not self.read():
                    return "dropped"
            head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            status = _STATUS.match(head + b"\r\n")
            if status is None:
                return "no HTTP"
            length = _LENGTH.search(head)
            while len(self._buffer) < (int(length[1]) if length else 0):
                if not self.read():
                    return "cut off"
        except TimeoutError:
            return "nothing"
        size = int(length[1]) if length else 0
        body, self._buffer = self._buffer[:size], self._buffer[size:]
        return f"{status[1].decode()} {_word(body)}".rstrip()

    def frame(self) -> tuple[int, bytes] | None:
        """Read the next frame; return opcode and payload, ``None`` at the end. Raises ``TimeoutError``."""
        while (next_frame := _whole(self._buffer)) is None:
            if not self.read():
                return None
        opcode, start, end = next_frame
        payload, self._buffer = self._buffer[start:end], self._buffer[end:]
        return opcode, payload

    def whole_frames(self) -> Iterator[tuple[int, bytes]]:
        """Yield the complete frames in the buffer."""
        while (next_frame := _whole(self._buffer)) is not None:
            opcode, start, end = next_frame
            payload, self._buffer = self._buffer[start:end], self._buffer[end:]
            yield opcode, payload

    def read_outcome(self, timeout: float = 0.0) -> str:
        """Read until the connection ends; return how it ended."""
        ends = time.monotonic() + (timeout or self._timeout)
        try:
            while time.monotonic() < ends:
                self.socket.settimeout(max(0.01, ends - time.monotonic()))
                next_frame = self.frame()
                if next_frame is None:
                    return "dropped"
                if next_frame[0] == CLOSE:
                    return f"closed {int.from_bytes(next_frame[1][:2], 'big') or 1005}"
        except TimeoutError:
            pass
        return "nothing"

    def rest(self) -> bytes:
        """Read until the end; return everything."""
        with contextlib.suppress(TimeoutError):
            while self.read():
                pass
        return self._buffer

    def wait_closed(self, timeout: float = TIMEOUT) -> bool:
        """Whether the peer closes the connection within ``timeout`` seconds; discards all data."""
        ends = time.monotonic() + timeout
        with contextlib.suppress(TimeoutError):
            while time.monotonic() < ends:
                self.socket.settimeout(max(0.01, ends - time.monotonic()))
                self._buffer = b""
                if not self.read():
                    return True
        return False

    def texts(self) -> Iterator[str]:
        """Send a ping, and yield the text messages that arrive before its pong: then all sent data was handled."""
        self.send(frame(b"so far", PING))
        while (next_frame := self.frame()) is not None and next_frame != (PONG, b"so far"):
            if next_frame[0] == TEXT:
                yield next_frame[1].decode()
            elif next_frame[0] == CLOSE:
                yield f"closed {int.from_bytes(next_frame[1][:2], 'big')}"

    def text(self) -> str:
        """Return the next text message; an empty text at the end."""
        while (next_frame := self.frame()) is not None:
            if next_frame[0] == TEXT:
                return next_frame[1].decode()
        return ""


def _whole(data: bytes) -> tuple[int, int, int] | None:
    """Return opcode, start and end of the payload of the first frame, or ``None`` if it is incomplete."""
    if len(data) < 2:
        return None
    size, start = data[1] & 127, 2
    if size >= 126:
        start = 4 if size == 126 else 10
        size = int.from_bytes(data[2:start], "big")
    return (data[0] & 15, start, start + size) if len(data) >= start + size else None


def _word(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(error["code"]) if isinstance(error, dict) else str(error)
