"""Open many WebSocket clients and keep them connected, with as little memory as possible.

One process, sockets as file descriptors, one epoll, no object per client. Commands are lines on standard input. Each is
answered when it is done, by a line of JSON on standard output:

    -> open 17000          open more clients, some hundreds of handshakes in progress at a time
    <- {"open": 18000, "opened": 17000, "failed": 0, "lost": 0, "seconds": 4.1, ...}
    -> close 17000         reset clients, the newest first
    <- {"open": 1000, ...}
    -> stat                report
    <- {"open": 1000, "lost": 0, "calls": 12, "pings": 3, "cpu": 2.2, ...}
    -> quit                or end of input: reset all clients and exit

The clients answer calls with the params of the call and pings with pongs, and drop everything else. Few modules are
imported, because a million clients need fifty of these processes.

    python -I -S benchmarks/holder.py --host 127.0.0.1 --port 8080 --in-progress 200
"""

import array
import os
import resource
import select
import sys
import time
from _socket import (
    AF_INET,
    IPPROTO_IP,
    IPPROTO_TCP,
    SO_LINGER,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    TCP_NODELAY,
    socket,
)
from collections import deque
from errno import EADDRNOTAVAIL, EINPROGRESS, EMFILE, ENFILE, ENOBUFS, ENOMEM

#: fixed key and its response, from RFC 6455, section 1.3: no random number per client
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
REQUEST = (
    "GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n"
)
MASK = b"\x37\xfa\x21\x3d"
TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A
#: choose the local port in connect(2), not in bind(2); since Linux 4.2, and not in the socket module of every Python
IP_BIND_ADDRESS_NO_PORT = 24
#: SO_LINGER value with which close(2) resets the connection, so that no TIME_WAIT sockets remain for the next run
RESET = b"\x01\x00\x00\x00\x00\x00\x00\x00"
#: states of a client, in ascending order
NONE, CONNECTING, REQUESTED, OPEN = range(4)
#: errors after which no more clients are opened, since no more sockets are available
EXHAUSTED = {EMFILE, ENFILE, ENOBUFS, ENOMEM}


def masked(payload: bytes, opcode: int = TEXT, mask: bytes = MASK) -> bytes:
    """Encode a frame of a client. ``opcode`` is the first byte, FIN bit included."""
    size = len(payload)
    if size < 126:
        head = bytes((opcode, 0x80 | size))
    elif size < 65536:
        head = bytes((opcode, 0x80 | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((opcode, 0x80 | 127)) + size.to_bytes(8, "big")
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "little")
    return head + mask + (int.from_bytes(payload, "little") ^ key).to_bytes(size, "little")


def frames(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Split bytes of a server into complete frames: ``(first byte, payload)`` of each, and the remaining bytes."""
    complete = []
    at, end = 0, len(data)
    while end - at >= 2:
        size, head = data[at + 1] & 127, at + 2
        if size >= 126:
            more = 2 if size == 126 else 8
            size, head = int.from_bytes(data[head : head + more], "big"), head + more
        if head > end or head + size > end:
            break
        complete.append((data[at], data[head : head + size]))
        at = head + size
    return complete, data[at:]


def answer(call: bytes) -> bytes:
    """Encode the response to a call, with its params as result. The params must come last, after ``id``."""
    at = call.find(b'"id":')
    if at < 0:
        return b""
    number = call[at + 5 : call.index(b",", at)]
    at = call.find(b'"params":', at)
    return b'{"jsonrpc":"2.0","id":' + number + b',"result":' + (call[at + 9 : -1] if at > 0 else b"null") + b"}"


class Clients:
    """Clients of one server: call :meth:`open`, then :meth:`poll_once` until :attr:`busy` is false and from then on."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8080,
        *,
        path: str = "/v1/connect?client_id={id}",
        name: str = "agent-{:06d}",
        headers: str = "",
        hello: str = "",
        source: str = "",
        sources: int = 1,
        in_progress: int = 200,
        answering: bool = True,
    ) -> None:
        """``hello`` is sent as a binary frame when a client is open. ``{id}`` in ``path`` and ``hello`` is replaced by
        ``name``, formatted with the number of the client. ``source`` is the first of ``sources`` addresses to connect
        from in turn: each has some 28,000 ports for one server."""
        self._address = (host, port)
        self._path, self._name, self._hello = path, name, hello
        self._request = REQUEST.replace("{host}", host).replace("{port}", str(port)).replace("{key}", KEY.decode())
        self._request = self._request.replace("{headers}", headers.replace("\n", "\r\n") + ("\r\n" if headers else ""))
        self._source, self._sources = source, sources
        self._in_progress, self._answering = in_progress, answering
        self._epoll = select.epoll()
        self._states = bytearray(1024)
        self._numbers = array.array("I", bytes(4096))
        self._partial: dict[int, bytes] = {}
        self._next = self._wanted = self._progress = 0
        #: file descriptors of the open clients, in the order in which they opened
        self.fds = array.array("i")
        self.opened = self.failed = self.lost = self.calls = self.pings = 0
        #: text of the first refusal or error
        self.problem = ""
        #: called with (fd, first byte, payload) for each frame; can be replaced
        self.received = self._received

    @property
    def busy(self) -> bool:
        """Whether opening handshakes are in progress or pending."""
        return self._progress > 0 or self._next < self._wanted

    def open(self, count: int) -> None:
        """Open more clients."""
        self._wanted = self._next + count
        self._begin()

    def _begin(self) -> None:
        while self._progress < self._in_progress and self._next < self._wanted:
            number, self._next = self._next, self._next + 1
            try:
                fd = self._connect(number)
            except OSError as e:
                self._fail(e.strerror)
                if e.errno in EXHAUSTED or e.errno == EADDRNOTAVAIL:
                    self.failed += self._wanted - self._next
                    self._next = self._wanted
                continue
            self._progress += 1
            if fd >= len(self._states):
                self._states.extend(bytes(1024))
                self._numbers.extend(array.array("I", bytes(4096)))
            self._numbers[fd] = number
            self._states[fd] = CONNECTING
            self._epoll.register(fd, select.EPOLLOUT)
            self._send_request(fd)

    def _connect(self, number: int) -> int:
        new = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
        try:
            new.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
            new.setsockopt(SOL_SOCKET, SO_LINGER, RESET)
            if self._source:
                new.setsockopt(IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                new.bind((later(self._source, number % self._sources), 0))
            error = new.connect_ex(self._address)
            if error not in (0, EINPROGRESS):
                raise OSError(error, os.strerror(error))
        except OSError:
            new.close()
            raise
        return new.detach()

    def _send_request(self, fd: int) -> None:
        """Send the opening handshake if the socket is connected; on loopback it usually is at once."""
        path = self._path.replace("{id}", self._name.format(self._numbers[fd]))
        try:
            os.write(fd, self._request.replace("{path}", path).encode())
        except BlockingIOError:
            return
        except OSError as e:
            self._fail(e.strerror)
            self._progress -= 1
            self._drop(fd)
            return
        self._states[fd] = REQUESTED
        self._epoll.modify(fd, select.EPOLLIN)

    def _fail(self, problem: str | None) -> None:
        self.failed += 1
        self.problem = self.problem or problem or ""

    def _drop(self, fd: int) -> None:
        self._states[fd] = NONE
        self._partial.pop(fd, None)
        os.close(fd)

    def poll_once(self, timeout: float = 0.0, max_events: int = 1024) -> int:
        """Handle pending events, and wait up to ``timeout`` seconds for the first. Returns the number of events."""
        events = self._epoll.poll(timeout, max_events)
        for fd, _ in events:
            state = self._states[fd]
            if state == CONNECTING:
                self._send_request(fd)
            if state < REQUESTED:
                continue
            try:
                data = os.read(fd, 65536)
            except BlockingIOError:
                continue
            except OSError as e:
                data = b""
                self.problem = self.problem or str(e)
            if state == REQUESTED:
                self._response_received(fd, data)
            else:
                self._data_received(fd, data)
        if self._next < self._wanted:
            self._begin()
        return len(events)

    def _response_received(self, fd: int, data: bytes) -> None:
        head = self._partial.pop(fd, b"") + data
        if data and b"\r\n\r\n" not in head:
            self._partial[fd] = head
            return
        self._progress -= 1
        if not data or not head.startswith(b"HTTP/1.1 101 ") or ACCEPT not in head:
            self._fail(" ".join(head.decode("latin-1").split()) or "closed before the response")
            self._drop(fd)
            return
        self._states[fd] = OPEN
        self.opened += 1
        self.fds.append(fd)
        if self._hello:
            self.send(fd, masked(self._hello.replace("{id}", self._name.format(self._numbers[fd])).encode(), BINARY))
        rest = head.partition(b"\r\n\r\n")[2]
        if rest:
            self._data_received(fd, rest)

    def _data_received(self, fd: int, data: bytes) -> None:
        if not data:
            self.lost += 1
            self.fds.remove(fd)
            self._drop(fd)
            return
        complete, rest = frames(self._partial.pop(fd, b"") + data)
        if rest:
            self._partial[fd] = rest
        for first, payload in complete:
            self.received(fd, first, payload)

    def _received(self, fd: int, first: int, payload: bytes) -> None:
        if first == PING:
            self.pings += 1
            self.send(fd, masked(payload, PONG))
        elif first == CLOSE:
            self.problem = self.problem or f"closed with {int.from_bytes(payload[:2], 'big')}: {payload[2:].decode()}"
            self.send(fd, masked(payload[:2], CLOSE))
        elif first == TEXT and self._answering:
            response = answer(payload)
            if response:
                self.calls += 1
                self.send(fd, masked(response))

    def send(self, fd: int, data: bytes) -> None:
        """Write to a client's connection. Bytes that the kernel does not accept are dropped: all messages are small."""
        try:
            os.write(fd, data)
        except OSError as e:
            self.problem = self.problem or str(e)

    def number(self, fd: int) -> int:
        """Return the number of a client."""
        return self._numbers[fd]

    def close(self, count: int) -> None:
        """Reset open clients, the newest first."""
        for _ in range(min(count, len(self.fds))):
            self._drop(self.fds.pop())

    def close_all(self) -> None:
        """Reset all clients and close the epoll."""
        self.close(len(self.fds))
        self._epoll.close()

    def fileno(self) -> int:
        """Return a file descriptor that is readable when :meth:`poll_once` has something to do."""
        return self._epoll.fileno()

    def watch(self, fd: int) -> None:
        """Make :meth:`poll_once` return when another file descriptor is readable."""
        if fd >= len(self._states):
            raise ValueError(f"file descriptor {fd} is too large")
        self._epoll.register(fd, select.EPOLLIN)


def later(address: str, count: int) -> str:
    """Return the IPv4 address that is ``count`` after another."""
    number = int.from_bytes(bytes(map(int, address.split("."))), "big") + count
    return ".".join(map(str, number.to_bytes(4, "big")))


def _stat(clients: Clients, **more: float | str) -> bytes:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    facts = {
        "open": len(clients.fds),
        "opened": clients.opened,
        "failed": clients.failed,
        "lost": clients.lost,
        "calls": clients.calls,
        "pings": clients.pings,
        "cpu": round(usage.ru_utime + usage.ru_stime, 6),
        **more,
    }
    fields = [f'"{name}": {value}' for name, value in facts.items()]
    problem = clients.problem[:200].replace("\\", "/").replace('"', "'")
    fields.append(f'"problem": "{problem}"')
    return ("{" + ", ".join(fields) + "}\n").encode()


def serve(clients: Clients) -> None:
    """Execute commands from standard input."""
    os.set_blocking(0, False)
    clients.watch(0)
    partial = b""
    waiting: deque[list[str]] = deque()
    opening, started_at = False, 0.0
    while True:
        clients.poll_once(-1)
        try:
            data = os.read(0, 4096)
        except BlockingIOError:
            pass
        else:
            if not data:
                return
            *lines, partial = (partial + data).split(b"\n")
            waiting.extend(line.decode().split() for line in lines)
        if opening and not clients.busy:
            opening = False
            os.write(1, _stat(clients, seconds=round(time.monotonic() - started_at, 6)))
        while waiting and not opening:
            command, *arguments = waiting.popleft()
            if command == "quit":
                return
            if command == "open":
                opening, started_at = True, time.monotonic()
                clients.open(int(arguments[0]))
                if not clients.busy:
                    opening = False
                    os.write(1, _stat(clients, seconds=0))
                continue
            if command == "close":
                clients.close(int(arguments[0]))
            os.write(1, _stat(clients))


#: option -> (parameter of Clients, converter)
OPTIONS = {
    "--host": ("host", str),
    "--port": ("port", int),
    "--path": ("path", str),
    "--name": ("name", str),
    "--headers": ("headers", str),
    "--hello": ("hello", str),
    "--source": ("source", str),
    "--sources": ("sources", int),
    "--in-progress": ("in_progress", int),
}


def main(arguments: list[str]) -> None:
    """Parse the command line, and execute commands from standard input."""
    values: dict[str, object] = {}
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        name, convert = OPTIONS[option]
        values[name] = convert(value)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    serve(Clients(**values))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1:])
