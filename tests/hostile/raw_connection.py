"""A raw connection to a node, and how what came of it is told in one word or two.

Nothing here is of the gateway or of a WebSocket library: whoever attacks a node writes whatever bytes he likes.

    503 full          the answer to an opening handshake, or to an HTTP request, and the word in its body
    101               it was opened
    closed 1009       the code of the close frame that came
    dropped           the end of the connection came, or a reset, and nothing before it
    nothing           nothing came for as long as was waited
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
#: seconds that an answer may take
TIMEOUT = 10.0
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
MASK = b"\x37\xfa\x21\x3d"

_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[^\r\n]*\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_NUMBERS = itertools.count(random.randrange(1 << 20))


def source() -> str:
    """An address of this machine that hardly anybody has come from yet."""
    number = next(_NUMBERS) % (1 << 22)
    return f"127.{64 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def name() -> str:
    """A client_id that nobody has."""
    return f"evil-{os.getpid()}-{next(_NUMBERS)}"


def request(method: str, target: str, *lines: str, body: bytes = b"", host: str = "127.0.0.1") -> bytes:
    """An HTTP request; a character of its head is a byte."""
    head = [f"{method} {target} HTTP/1.1", *([f"Host: {host}"] if host else []), *lines]
    if body:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def opening(client_id: str, *lines: str, target: str = "", without: str = "") -> bytes:
    """An opening handshake, in order but for ``lines``, which are added, and the header that it is ``without``."""
    fine = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {KEY}"]
    kept = [line for line in fine if not without or not line.startswith(f"{without}:")]
    host = "" if without == "Host" else "127.0.0.1"
    return request("GET", target or f"/v1/connect?client_id={client_id}", *kept, *lines, host=host)


def masked(payload: bytes, mask: bytes = MASK) -> bytes:
    """A payload as a client sends it (RFC 6455, section 5.3)."""
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
    """A frame. ``length`` is what it says of its length, be it true or not; ``form`` is how: 7, 16 or 64 bits."""
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
    """A close frame."""
    return frame(struct.pack("!H", code) + reason, CLOSE)


class RawConnection:
    """One connection."""

    def __init__(
        self, address: tuple[str, int], *, source_address: str = "", timeout: float = TIMEOUT, buffer: int = 0
    ) -> None:
        """``here`` is the address that it comes from; ``buffer`` is the size of its receive buffer."""
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
        #: how much of what is poured was taken
        self._send_offset = 0
        #: whether the last read found no end
        self.alive = True

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.drop()

    def drop(self) -> None:
        """End it by a reset, so that nothing of it stays in the kernel."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Send all of it; ``False`` if that was no longer possible."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def send_until_blocked(self, data: bytes, timeout: float = 0.5) -> int:
        """Send what the other side takes until it has taken nothing for a while; how many bytes that was."""
        sent = 0
        self.socket.settimeout(timeout)
        with contextlib.suppress(OSError):
            while sent < len(data):
                sent += self.socket.send(data[sent : sent + 262144])
        self.socket.settimeout(self._timeout)
        return sent

    def send_repeatedly(self, data: bytes, max_bytes: int, timeout: float = 0.2) -> bool:
        """Send ``data`` over and over, up to so many bytes, and go on where it ended the last time. ``False`` when no
        more was taken for a while."""
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
        """Read more; ``False`` at the end. Raises ``TimeoutError``."""
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
        """Whether the other side has reset it, which can be told without reading."""
        poll = select.poll()
        poll.register(self.socket, 0)
        return bool(poll.poll(0))

    def has_answer(self) -> bool:
        """Whether anything was read that was not looked at yet."""
        return bool(self._buffer)

    def read_all(self) -> None:
        """Read what is there, and forget it."""
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
        """What is answered to a request: the status, and the word in the body."""
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
        """The next frame, its opcode and its payload; ``None`` at the end. Raises ``TimeoutError``."""
        while (found := _whole(self._buffer)) is None:
            if not self.read():
                return None
        opcode, start, end = found
        payload, self._buffer = self._buffer[start:end], self._buffer[end:]
        return opcode, payload

    def whole_frames(self) -> Iterator[tuple[int, bytes]]:
        """The frames that were read and not taken yet."""
        while (found := _whole(self._buffer)) is not None:
            opcode, start, end = found
            payload, self._buffer = self._buffer[start:end], self._buffer[end:]
            yield opcode, payload

    def read_outcome(self, timeout: float = 0.0) -> str:
        """How it ends, whatever comes before."""
        ends = time.monotonic() + (timeout or self._timeout)
        try:
            while time.monotonic() < ends:
                self.socket.settimeout(max(0.01, ends - time.monotonic()))
                found = self.frame()
                if found is None:
                    return "dropped"
                if found[0] == CLOSE:
                    return f"closed {int.from_bytes(found[1][:2], 'big') or 1005}"
        except TimeoutError:
            pass
        return "nothing"

    def rest(self) -> bytes:
        """All that comes until the end."""
        with contextlib.suppress(TimeoutError):
            while self.read():
                pass
        return self._buffer

    def wait_closed(self, timeout: float = TIMEOUT) -> bool:
        """Whether the other side ends it; what comes before is swallowed."""
        ends = time.monotonic() + timeout
        with contextlib.suppress(TimeoutError):
            while time.monotonic() < ends:
                self.socket.settimeout(max(0.01, ends - time.monotonic()))
                self._buffer = b""
                if not self.read():
                    return True
        return False

    def texts(self) -> Iterator[str]:
        """The text messages that come until all that was sent by now is handled: a pong says that it is."""
        self.send(frame(b"so far", PING))
        while (found := self.frame()) is not None and found != (PONG, b"so far"):
            if found[0] == TEXT:
                yield found[1].decode()
            elif found[0] == CLOSE:
                yield f"closed {int.from_bytes(found[1][:2], 'big')}"

    def text(self) -> str:
        """The next text message; an empty text at the end."""
        while (found := self.frame()) is not None:
            if found[0] == TEXT:
                return found[1].decode()
        return ""


def _whole(data: bytes) -> tuple[int, int, int] | None:
    """The first frame of what a server sent: its opcode, and where its payload is."""
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
