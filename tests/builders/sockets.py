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
        client_end = socket.create_connection(listener.getsockname()[:2])
        server_end, _ = listener.accept()
    return server_end, client_end


def seqpacket_pair() -> tuple[socket.socket, socket.socket]:
    """Return two sockets between which each write arrives separately."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def small_buffer_pair() -> tuple[socket.socket, socket.socket]:
    """Return two sockets with a small send buffer on the server's side."""
    server_end, client_end = socket.socketpair()
    server_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return server_end, client_end


def fill_send_buffer(server_end: int) -> int:
    """Write until the kernel accepts no more; returns the number of bytes written."""
    size = 0
    for step in (1000, 1):
        try:
            while True:
                size += os.write(server_end, bytes(step))
        except BlockingIOError:
            pass
    return size


def read_available(client_end: socket.socket) -> bytes:
    """Read all bytes that have arrived."""
    data = b""
    while is_ready(client_end.fileno(), select.POLLIN):
        chunk = client_end.recv(1 << 20)
        if not chunk:
            break
        data += chunk
    return data


def read_frames(client_end: socket.socket) -> list[tuple[int, bytes]]:
    """Read the frames that have arrived, each of them complete."""
    return parse_frames(read_available(client_end))


def read_close_code(client_end: socket.socket) -> int | None:
    """Return the code of the close frame that has arrived, or ``None``."""
    codes = [payload for opcode, payload in read_frames(client_end) if opcode == 8]
    assert len(codes) < 2, "two close frames"
    return struct.unpack("!H", codes[0][:2])[0] if codes else None


def connection_end(client_end: socket.socket) -> str:
    """Return how the connection ended for the client: ``end``, ``reset``, or ``open`` if it has not."""
    client_end.setblocking(False)
    try:
        while client_end.recv(65536):
            pass
        return "end"
    except ConnectionResetError:
        return "reset"
    except BlockingIOError:
        return "open"
