"""Build connected socket pairs, and read from them."""

from __future__ import annotations

import os
import select
import socket
import struct

from tests.builders.frames import parse_frames

#: timeout of a test that waits for a socket, in seconds
TEST_TIMEOUT = 30.0


def is_ready(fd: int, event: int, wait: float = 0.0) -> bool:
    """Return whether a file is readable or writable, waiting for at most ``wait`` seconds."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(wait * 1000))


def wait_readable(fd: int) -> None:
    """Wait until a socket is readable: data sent over TCP takes a moment."""
    assert is_ready(fd, select.POLLIN, TEST_TIMEOUT), "nothing arrived"


def tcp_pair(host: str = "127.0.0.1") -> tuple[socket.socket, socket.socket]:
    """Return the server's and the client's end of a TCP connection."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        there = socket.create_connection(listener.getsockname()[:2])
        here, _ = listener.accept()
    return here, there


def seqpacket_pair() -> tuple[socket.socket, socket.socket]:
    """Return two sockets between which each write arrives separately."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def small_buffer_pair() -> tuple[socket.socket, socket.socket]:
    """Return two sockets with a small send buffer on the server's side."""
    here, there = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return here, there


def fill_send_buffer(here: int) -> int:
    """Write until the kernel accepts no more; returns the number of bytes written."""
    size = 0
    for step in (1000, 1):
        try:
            while True:
                size += os.write(here, bytes(step))
        except BlockingIOError:
            pass
    return size


def read_available(there: socket.socket) -> bytes:
    """Read all bytes that have arrived."""
    data = b""
    while is_ready(there.fileno(), select.POLLIN):
        chunk = there.recv(1 << 20)
        if not chunk:
            break
        data += chunk
    return data


def read_frames(there: socket.socket) -> list[tuple[int, bytes]]:
    """Read the frames that have arrived, each of them complete."""
    return parse_frames(read_available(there))


def read_close_code(there: socket.socket) -> int | None:
    """Return the code of the close frame that has arrived, or ``None``."""
    codes = [payload for opcode, payload in read_frames(there) if opcode == 8]
    assert len(codes) < 2, "two close frames"
    return struct.unpack("!H", codes[0][:2])[0] if codes else None


def connection_end(there: socket.socket) -> str:
    """Return how the connection ended for the client: ``end``, ``reset``, or ``open`` if it has not."""
    there.setblocking(False)
    try:
        while there.recv(65536):
            pass
        return "end"
    except ConnectionResetError:
        return "reset"
    except BlockingIOError:
        return "open"
