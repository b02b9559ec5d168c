"""Build connected socket pairs, and read from them."""

from __future__ import annotations

import os
import select
import socket
import struct

from tests.builders.frames import parse_frames

#: what a blocked test fails after, in seconds
TEST_TIMEOUT = 30.0


def is_ready(fd: int, event: int, wait: float = 0.0) -> bool:
    """Whether a file can be read or written, or becomes so in time."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(wait * 1000))


def wait_readable(fd: int) -> None:
    """Wait until something can be read: what was sent over TCP takes its time."""
    assert is_ready(fd, select.POLLIN, TEST_TIMEOUT), "nothing arrived"


def tcp_pair(host: str = "127.0.0.1") -> tuple[socket.socket, socket.socket]:
    """A server's and a client's end of a TCP connection."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        there = socket.create_connection(listening.getsockname()[:2])
        here, _ = listening.accept()
    return here, there


def seqpacket_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends between which each write arrives on its own."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def small_buffer_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends between which few bytes may be under way."""
    here, there = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return here, there


def fill_send_buffer(here: int) -> int:
    """Write until the kernel takes no more; returns how many bytes it took."""
    size = 0
    for step in (1000, 1):
        try:
            while True:
                size += os.write(here, bytes(step))
        except BlockingIOError:
            pass
    return size


def read_available(there: socket.socket) -> bytes:
    """All that has come."""
    data = b""
    while is_ready(there.fileno(), select.POLLIN):
        some = there.recv(1 << 20)
        if not some:
            break
        data += some
    return data


def read_frames(there: socket.socket) -> list[tuple[int, bytes]]:
    """The frames that have come, each of them whole."""
    return parse_frames(read_available(there))


def read_close_code(there: socket.socket) -> int | None:
    """The code of the close frame that has come, or ``None``."""
    codes = [payload for opcode, payload in read_frames(there) if opcode == 8]
    assert len(codes) < 2, "two close frames"
    return struct.unpack("!H", codes[0][:2])[0] if codes else None


def connection_end(there: socket.socket) -> str:
    """How the connection ended, from the client's end: ``end``, ``reset``, or ``open`` when it did not."""
    there.setblocking(False)
    try:
        while there.recv(65536):
            pass
        return "end"
    except ConnectionResetError:
        return "reset"
    except BlockingIOError:
        return "open"
