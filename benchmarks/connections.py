"""Connections of a load generator: many clients and one backend."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from benchmarks import measure
from benchmarks.dialects import PAYLOAD, PING, PONG, client_id, dialect_of, frame

#: maximum number of concurrent opening handshakes
MAX_HANDSHAKES_IN_PROGRESS = 100
#: time without any bytes from the server after which a message counts as lost, in seconds
TIMEOUT = 10
#: maximum number of events per epoll call
EVENTS = 256


class LoadError(Exception):
    """The server did something unexpected, which the message describes in one line."""


@dataclass(frozen=True)
class Shape:
    """Layout of the messages of one kind: length, first bytes, and position of an id."""

    length: int
    start: bytes
    id_from: int
    id_to: int

    @classmethod
    def of(cls, message: bytes, marks: tuple[bytes, bytes] | None) -> Shape:
        """Derive the layout from the first message, and from the bytes before and after the id if there is one."""
        before, after = marks or (b"", b"")
        at = message.find(before)
        if at < 0 or PAYLOAD not in message:
            raise LoadError(f"unexpected message: {message[:200]!r}")
        at += len(before)
        return cls(len(message), message[:4], at, message.index(after, at))


def open_websocket(connection: socket.socket, port: int, path: str) -> None:
    """Send an opening handshake; :func:`await_open` reads the response."""
    connection.sendall(
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )


def await_open(connection: socket.socket) -> bytes:
    """Read the response to an opening handshake; return the bytes after it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        data += more
        if not more:
            break
    if not data.startswith(b"HTTP/1.1 101"):
        raise LoadError(f"the opening handshake was refused: {data[:200]!r}")
    return data.partition(b"\r\n\r\n")[2]


def frames_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the complete frames of a server, each with the position of the next one."""
    position = 0
    while len(data) - position >= 2:
        size, head = data[position + 1] & 127, 2
        if size == 126:
            size, head = int.from_bytes(data[position + 2 : position + 4], "big"), 4
        end = position + head + size
        if end > len(data):
            return
        yield end, data[position:end]
        position = end


class Connections:
    """Connections of clients ``agent-00000`` and so on, and of one backend, to a server."""

    def __init__(self, server: measure.Server, clients: int) -> None:
        self.server = server
        self.clients = clients
        self.dialect = dialect_of(server.name)
        self._sockets: list[socket.socket] = []
        self._epoll = select.epoll()
        # client number -> fd and back
        self.fds: list[int] = []
        self.numbers: dict[int, int] = {}
        self._partial: dict[int, bytes] = {}
        self._unsent = b""

    def __enter__(self) -> Connections:
        try:
            for first in range(0, self.clients, MAX_HANDSHAKES_IN_PROGRESS):
                self._open_clients(range(first, min(first + MAX_HANDSHAKES_IN_PROGRESS, self.clients)))
            self.backend = self._open_backend()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()
        self._epoll.close()

    def _connect(self, port: int) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets.append(connection)
        return connection

    def _open_clients(self, numbers: range) -> None:
        opened = []
        for number in numbers:
            connection = self._connect(self.server.port)
            open_websocket(connection, self.server.port, self.server.client_path(client_id(number)))
            opened.append(connection)
        for connection in opened:
            await_open(connection)
        for number, connection in zip(numbers, opened, strict=True):
            if hello := self.dialect.hello_client(number):
                connection.sendall(hello)
                self._await_reply(connection, b"PONG")
            self._add(connection)
            self.numbers[connection.fileno()] = number
            self.fds.append(connection.fileno())

    def _open_backend(self) -> int:
        connection = self._connect(self.server.backend_port)
        if self.dialect.backend_is_websocket:
            open_websocket(connection, self.server.backend_port, self.server.backend_path)
            await_open(connection)
        if hello := self.dialect.hello_backend():
            connection.sendall(hello)
            self._await_reply(connection, b"result" if self.dialect.backend_is_websocket else b"PONG")
        self._add(connection)
        return connection.fileno()

    def _await_reply(self, connection: socket.socket, word: bytes) -> None:
        data = b""
        while word not in data:
            more = connection.recv(65536)
            data += more
            if not more or b"-ERR" in data or b'"error"' in data:
                raise LoadError(f"refused: {data[-200:]!r}")

    def _add(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._epoll.register(connection.fileno(), select.EPOLLIN)

    # Uncommon cases.

    def send_backend(self, data: bytes) -> None:
        """Write to the backend's connection, and buffer what the kernel does not accept."""
        data = self._unsent + data
        try:
            sent = os.write(self.backend, data)
        except BlockingIOError:
            sent = 0
        if bool(self._unsent) != (sent < len(data)):
            more = select.EPOLLOUT if sent < len(data) else 0
            self._epoll.modify(self.backend, select.EPOLLIN | more)
        self._unsent = data[sent:]

    def client_messages(self, fd: int, data: bytes, shape: Shape) -> list[bytes]:
        """Split the bytes read by a client, if they are not exactly one message, into messages of full length."""
        if not data:
            raise LoadError(f"{self.server.name} has closed the connection of {client_id(self.numbers[fd])}")
        data = self._partial.pop(fd, b"") + data
        messages, position = [], 0
        for position, message in frames_of(data):  # noqa: B007
            opcode = message[0] & 15
            if opcode == PING:
                os.write(fd, frame(message[2:], PONG))
            elif len(message) == shape.length:
                messages.append(message)
            elif not self.dialect.backend_is_websocket:
                messages += self._nats_messages(fd, message, shape)
            else:
                raise LoadError(f"unexpected message: {message[:200]!r}")
        if position < len(data):
            self._partial[fd] = data[position:]
        return messages

    def _nats_messages(self, fd: int, message: bytes, shape: Shape) -> list[bytes]:
        """Split a frame of NATS, which can contain several messages, and answer its PING."""
        head = shape.length - (4 if shape.length > 129 else 2)
        payload = message[4 if message[1] & 127 == 126 else 2 :]
        if b"PING\r\n" in payload:
            os.write(fd, frame(b"PONG\r\n"))
            payload = payload.replace(b"PING\r\n", b"")
        if len(payload) % head:
            raise LoadError(f"unexpected message: {payload[:200]!r}")
        return [bytes(shape.length - head) + payload[i : i + head] for i in range(0, len(payload), head)]

    def _skip_control(self, data: bytes, position: int) -> int:
        """Answer a ping in the bytes read by the backend; return the position of the next message."""
        if data.startswith(b"PING\r\n", position):
            self.send_backend(b"PONG\r\n")
            return position + 6
        if data[position] & 15 == PING and self.dialect.backend_is_websocket:
            end = position + 2 + (data[position + 1] & 127)
            self.send_backend(frame(data[position + 2 : end], PONG))
            return end
        raise LoadError(f"unexpected message: {data[position : position + 200]!r}")

    def poll(self) -> list[tuple[int, int]]:
        """Wait for connections that are readable, or writable with unsent bytes."""
        if events := self._epoll.poll(TIMEOUT, EVENTS):
            return events
        raise LoadError(f"{self.server.name} has sent nothing for {TIMEOUT} s: a message is lost")

    def backend_ids(self, shape: Shape) -> list[bytes]:
        """Read the backend's connection; return the ids of the received messages."""
        data = self._read_backend()
        if self._unsent:
            self.send_backend(b"")
        length, start, id_from, id_to = shape.length, shape.start, shape.id_from, shape.id_to
        ids, position, end = [], 0, len(data)
        while end - position >= length:
            if data.startswith(start, position):
                ids.append(data[position + id_from : position + id_to])
                position += length
            else:
                position = self._skip_control(data, position)
        if position < end:
            self._partial[self.backend] = data[position:]
        return ids

    def _read_backend(self) -> bytes:
        try:
            data = os.read(self.backend, 262144)
        except BlockingIOError:  # it was only writable
            return b""
        if not data:
            raise LoadError(f"{self.server.name} has closed the backend's connection")
        return self._partial.pop(self.backend, b"") + data

    # The first message of a kind determines the layout of the others.

    def sample(self, fd: int) -> bytes:
        """Wait for a single message on a connection, and return it."""
        data, end = b"", time.monotonic() + TIMEOUT
        websocket = fd != self.backend or self.dialect.backend_is_websocket
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                data += os.read(fd, 65536)
            if data.endswith(b"PING\r\n"):
                data = b""
            if data and (not websocket or any(end == len(data) for end, _ in frames_of(data))):
                return data
            time.sleep(0.001)
        raise LoadError(f"{self.server.name} has not delivered a message in {TIMEOUT} s, only {data[:200]!r}")

    def order(self, in_flight: int) -> tuple[list[int], list[int]]:
        """Return the first clients, and the successor of each client: disjoint chains of clients in random order."""
        if not 0 < in_flight <= self.clients:
            raise ValueError(f"in_flight must be 1 to {self.clients}, the number of clients")
        order = list(range(self.clients))
        random.Random(1).shuffle(order)
        following = [0] * self.clients
        for position, number in enumerate(order):
            after = position + in_flight
            following[number] = order[after if after < self.clients else position % in_flight]
        return order[:in_flight], following
