"""Opens many WebSocket clients and holds them, with as little memory of its own as can be.

One process, plain sockets by their numbers, one epoll, no object per client. It is told what to do by lines on its
standard input, and answers each, when it is done, by a line of JSON on its standard output:

    -> open 17000          open so many more clients, some hundreds in progress at a time
    <- {"open": 18000, "opened": 17000, "failed": 0, "lost": 0, "seconds": 4.1, ...}
    -> close 17000         reset so many of them, the newest first
    <- {"open": 1000, ...}
    -> stat                how things are
    <- {"open": 1000, "lost": 0, "calls": 12, "pings": 3, "cpu": 2.2, ...}
    -> quit                or the end of the input: reset all, and end

What a server sends meanwhile is looked at: calls are answered with their own params, pings with pongs, the rest is
dropped. So few modules are imported because a million clients need fifty of these processes.

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

#: the key and answer of RFC 6455, section 1.3: what is measured is the server, not the client's random numbers
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
REQUEST = (
    "GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n"
)
MASK = b"\x37\xfa\x21\x3d"
TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A
#: connect(2) without a port of one's own until then; since Linux 4.2, and not in every Python's socket module
IP_BIND_ADDRESS_NO_PORT = 24
#: close(2) resets the connection, so that no thousands of TIME_WAIT are left for the next run
RESET = b"\x01\x00\x00\x00\x00\x00\x00\x00"
#: states of a client, by fd
NONE, CONNECTING, ASKED, OPEN = range(4)  # in this order
#: what ends all openings, since no more sockets are to be had
EXHAUSTED = {EMFILE, ENFILE, ENOBUFS, ENOMEM}


def masked(payload: bytes, opcode: int = TEXT, mask: bytes = MASK) -> bytes:
    """A client's frame; the first byte is ``opcode``, FIN included."""
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
    """The whole frames of a server in some bytes: (first byte, payload) of each, and the bytes that are left."""
    found = []
    at, end = 0, len(data)
    while end - at >= 2:
        size, head = data[at + 1] & 127, at + 2
        if size >= 126:
            more = 2 if size == 126 else 8
            size, head = int.from_bytes(data[head : head + more], "big"), head + more
        if head > end or head + size > end:
            break
        found.append((data[at], data[head : head + size]))
        at = head + size
    return found, data[at:]


def answer(call: bytes) -> bytes:
    """The response to a call: its params come back. ``id`` comes before the params, and those are last."""
    at = call.find(b'"id":')
    if at < 0:
        return b""
    number = call[at + 5 : call.index(b",", at)]
    at = call.find(b'"params":', at)
    return b'{"jsonrpc":"2.0","id":' + number + b',"result":' + (call[at + 9 : -1] if at > 0 else b"null") + b"}"


class Clients:
    """Clients of one server. ``open``, then ``turn`` until ``busy`` is false; ``turn`` on for as long as they live."""

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
        """``path`` and ``hello`` (what a client sends as a binary frame when it is open) may have ``{id}``, which is
        made from the client's number by ``name``. ``source`` is the first of ``sources`` addresses to connect from,
        in turn: one has some 28,000 ports for one server."""
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
        #: the fds of those that are open, in the order of their opening
        self.fds = array.array("i")
        self.opened = self.failed = self.lost = self.calls = self.pings = 0
        #: what the first refusal or error said
        self.problem = ""
        #: called with (fd, first byte, payload) for each frame, in the place of what is done otherwise
        self.received = self._received

    @property
    def busy(self) -> bool:
        """Whether clients are still being opened."""
        return self._progress > 0 or self._next < self._wanted

    def open(self, count: int) -> None:
        """Open so many more."""
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
            self._ask(fd)

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

    def _ask(self, fd: int) -> None:
        """Send the opening handshake, if it is connected; on loopback it usually is, at once."""
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
        self._states[fd] = ASKED
        self._epoll.modify(fd, select.EPOLLIN)

    def _fail(self, problem: str | None) -> None:
        self.failed += 1
        self.problem = self.problem or problem or ""

    def _drop(self, fd: int) -> None:
        self._states[fd] = NONE
        self._partial.pop(fd, None)
        os.close(fd)

    def poll_once(self, timeout: float = 0.0, most: int = 1024) -> int:
        """Handle what has come, waiting up to so many seconds for the first; how many clients it came from."""
        events = self._epoll.poll(timeout, most)
        for fd, _ in events:
            state = self._states[fd]
            if state == CONNECTING:
                self._ask(fd)
            if state < ASKED:
                continue
            try:
                data = os.read(fd, 65536)
            except BlockingIOError:
                continue
            except OSError as e:
                data = b""
                self.problem = self.problem or str(e)
            if state == ASKED:
                self._asked(fd, data)
            else:
                self._data(fd, data)
        if self._next < self._wanted:
            self._begin()
        return len(events)

    def _asked(self, fd: int, data: bytes) -> None:
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
            self._data(fd, rest)

    def _data(self, fd: int, data: bytes) -> None:
        if not data:
            self.lost += 1
            self.fds.remove(fd)
            self._drop(fd)
            return
        found, rest = frames(self._partial.pop(fd, b"") + data)
        if rest:
            self._partial[fd] = rest
        for first, payload in found:
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
        """Write to a client's connection. What the kernel does not take is not sent again: all is small here."""
        try:
            os.write(fd, data)
        except OSError as e:
            self.problem = self.problem or str(e)

    def number(self, fd: int) -> int:
        """Which client it is."""
        return self._numbers[fd]

    def close(self, count: int) -> None:
        """Reset so many of those that are open, the newest first."""
        for _ in range(min(count, len(self.fds))):
            self._drop(self.fds.pop())

    def close_all(self) -> None:
        """Reset all, and be of no use any more."""
        self.close(len(self.fds))
        self._epoll.close()

    def fileno(self) -> int:
        """Readable when :meth:`turn` has something to do."""
        return self._epoll.fileno()

    def watch(self, fd: int) -> None:
        """Have :meth:`turn` return when there is something to read from a file that is none of the clients."""
        if fd >= len(self._states):
            raise ValueError(f"{fd} is not one of the first files")
        self._epoll.register(fd, select.EPOLLIN)


def later(address: str, count: int) -> str:
    """The IPv4 address so many after another."""
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
    told = [f'"{name}": {value}' for name, value in facts.items()]
    problem = clients.problem[:200].replace("\\", "/").replace('"', "'")
    told.append(f'"problem": "{problem}"')
    return ("{" + ", ".join(told) + "}\n").encode()


def serve(clients: Clients) -> None:
    """Do what the standard input says."""
    os.set_blocking(0, False)
    clients.watch(0)
    said = b""
    waiting: deque[list[str]] = deque()
    opening, began = False, 0.0
    while True:
        clients.poll_once(-1)
        try:
            data = os.read(0, 4096)
        except BlockingIOError:
            pass
        else:
            if not data:
                return
            *lines, said = (said + data).split(b"\n")
            waiting.extend(line.decode().split() for line in lines)
        if opening and not clients.busy:
            opening = False
            os.write(1, _stat(clients, seconds=round(time.monotonic() - began, 6)))
        while waiting and not opening:
            command, *given = waiting.popleft()
            if command == "quit":
                return
            if command == "open":
                opening, began = True, time.monotonic()
                clients.open(int(given[0]))
                if not clients.busy:
                    opening = False
                    os.write(1, _stat(clients, seconds=0))
                continue
            if command == "close":
                clients.close(int(given[0]))
            os.write(1, _stat(clients))


#: option -> (what it is for Clients, how its text is read)
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
    """Hold clients as the command line and the standard input say."""
    given: dict[str, object] = {}
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        name, read = OPTIONS[option]
        given[name] = read(value)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    serve(Clients(**given))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1:])
