"""A column of addresses: ``host:port`` of each parked client, in a few bytes.

As texts they would be the largest part of a parked connection.

The table of parked connections: open connections of clients on which nothing is going on.

A parked connection has no object of its own, no transport, no protocol and no timer. It is a row: one entry in each of
a few columns, which are indexed by its file descriptor (``fd``), and one entry in the dict of client ids. All parked
sockets are registered with one epoll. An epoll is itself a file that can be polled, so that Twisted's reactor watches
that single one; when any of the sockets can be read it calls :meth:`Parking.doRead`.

    client -> text message, ping, pong      whole frames, one or many: handled here, the connection stays parked
    client <- text message, ping, pong      written here, together at the end of a turn
    anything else                           wakes it: it leaves the table and becomes an Autobahn protocol

What wakes a connection: bytes that are no whole frame of the fast lane (frames.py), with these bytes; a write that the
kernel takes in part, with what is left of it; whoever wants to close it, or to read no more from it for a while.

A row can go at any moment, in the midst of its own bytes: what handles a message may close the connection, or wake it.
So a row is looked at anew after every call that leaves this module.
"""

from __future__ import annotations

import os
import select
import socket
from array import array
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.clients.interface import Client, IKeeper, Leaver, Presence
from gateway.clients.keepalive import EXPIRED, UNIT, units_of, whole_seconds
from gateway.metrics import Metrics
from gateway.net.transport import reset
from gateway.protocol.frames import (
    CLOSE_INTERNAL_ERROR,
    CLOSE_POLICY,
    EMPTY_PING,
    MAX_PAYLOAD,
    PING,
    PONG,
    TEXT,
    decode,
    encode,
)
from gateway.util.cork import Turn
from gateway.util.log import Troubles
from gateway.util.rate_limit import MAX_BAD_MESSAGES, Rate

#: what a number stands for; its lower 48 bits are the address and port, or the port
_IPV4, _IPV6, _UNIX, _OTHER = 1 << 48, 2 << 48, 3 << 48, 4 << 48
_PORT, _REST = 0xFFFF, (1 << 48) - 1
_IPV6_SIZE = 16


class Addresses:
    """Addresses by number. What is got is what was set, to the letter."""

    def __init__(self) -> None:
        self._numbers = array("Q")
        #: for IPv6 alone, and only as long as the highest number of one
        self._ipv6 = bytearray()
        #: what is neither, such as a link-local address with its interface
        self._others: dict[int, str] = {}

    def grow(self, size: int) -> None:
        """Make room for so many."""
        self._numbers.extend(array("Q", bytes(8 * max(0, size - len(self._numbers)))))

    def set(self, index: int, address: str) -> None:
        """Keep one."""
        self.clear(index)
        self._numbers[index] = self._encode(index, address)
        if self.get(index) != address:
            self._numbers[index] = _OTHER
            self._others[index] = address

    def get(self, index: int) -> str:
        """The one that was set last."""
        number = self._numbers[index]
        kind = number & ~_REST
        if kind == _IPV4:
            return f"{socket.inet_ntoa((number >> 16 & 0xFFFFFFFF).to_bytes(4, 'big'))}:{number & _PORT}"
        if kind == _IPV6:
            host = bytes(self._ipv6[index * _IPV6_SIZE : (index + 1) * _IPV6_SIZE])
            return f"[{socket.inet_ntop(socket.AF_INET6, host)}]:{number & _PORT}"
        return "unix" if kind == _UNIX else self._others[index]

    def clear(self, index: int) -> None:
        """Forget one."""
        if self._others:
            self._others.pop(index, None)

    def _encode(self, index: int, address: str) -> int:
        if address == "unix":
            return _UNIX
        host, _, port = address.rpartition(":")
        try:
            number = int(port) & _PORT
            if host[:1] != "[":
                return _IPV4 | int.from_bytes(socket.inet_aton(host), "big") << 16 | number
            packed = socket.inet_pton(socket.AF_INET6, host[1:-1])
        except (ValueError, OSError):
            return _UNIX
        missing = (index + 1) * _IPV6_SIZE - len(self._ipv6)
        if missing > 0:
            # In steps, since addresses come in the order of their numbers.
            self._ipv6.extend(bytes(missing + len(self._ipv6) // 8))
        self._ipv6[index * _IPV6_SIZE : (index + 1) * _IPV6_SIZE] = packed
        return _IPV6 | number


#: How many sockets are read in one turn of the reactor, and for how long, in seconds: then it is the turn of timers,
#: and of all else.
MAX_EVENTS, LONGEST_TURN = 512, 0.01
#: How much is read from one of them at once, in bytes: from 128 KiB on the C library asks the kernel for the memory of
#: each read anew, which takes several times as long as the read itself.
READ_SIZE = 65536
#: what is larger is not gathered until the end of the turn, in bytes; nor are more than so many messages to one client
GATHERED, MOST_GATHERED = 16384, 256


@implementer(IReadDescriptor)
class Parking:
    """All parked connections of one node."""

    def __init__(
        self, keeper: IKeeper, *, reactor: Any, turn: Turn, metrics: Metrics, max_message_size: int, rate: Rate | None
    ) -> None:
        """``max_message_size`` is in bytes; ``rate`` is what each client may send, ``None`` for no limit."""
        #: client_id -> fd
        self.fds: dict[str, int] = {}
        self._keeper = keeper
        self._received: Callable[[str, int, bytes], int] = keeper.message_received
        self._reactor: IReactorFDSet = reactor
        self._seconds: Callable[[], float] = reactor.seconds
        self._turn = turn
        self._metrics = metrics
        self._most = min(max_message_size, MAX_PAYLOAD)
        self._rate = rate
        self._troubles = Troubles(reactor.seconds)
        self._epoll = select.epoll()
        #: what the epoll told of and was not read yet, the next one last
        self._readable: list[tuple[int, int]] = []
        #: fd -> what is to be written at the end of the turn
        self._gathered: dict[int, list[bytes]] = {}
        #: the time, the fd that is read, when it was heard of before, and what became of it if it left meanwhile
        self._now = 0.0
        self._reading = -1
        self._heard_before = 0.0
        self._left: Client | None = None
        self._woken: Any = None
        #: where the sweep is
        self._cursor = 0
        self._make_columns()

    def _make_columns(self) -> None:
        """Each has an entry for every file descriptor up to the highest that was ever parked."""
        #: the name of the client; ``None`` where no connection is parked
        self._ids: list[str | None] = []
        self.generations = array("q")
        self._connected_at = array("d")
        self._heard_at = array("d")
        self._pinged_at = array("d")
        #: the state of its Rate
        self._full_at = array("d")
        #: when its token expires, in whole seconds since 1970; 0: never
        self._until = array("I")
        #: messages in a row that were no JSON-RPC 2.0
        self._bad = bytearray()
        self._families = bytearray()
        self._addresses = Addresses()

    # In and out.

    def start(self) -> None:
        """Begin to read."""
        self._reactor.addReader(self)

    def stop(self) -> None:
        """End; the connections that are left are dropped."""
        self._reactor.removeReader(self)
        for fd in list(self.fds.values()):
            self._lose(fd)
        self._epoll.close()

    def park(self, client: Client, fd: int, family: int, heard_at: float) -> None:
        """Take a connection and its socket. What has come meanwhile is read in the next turn."""
        if fd >= len(self._ids):
            self._grow(fd + 1)
        self._epoll.register(fd, select.EPOLLIN)
        self.fds[client.client_id] = fd
        self._ids[fd] = client.client_id
        self.generations[fd] = client.generation
        self._connected_at[fd] = client.connected_at
        self._heard_at[fd] = heard_at
        self._pinged_at[fd] = client.pinged_at
        self._full_at[fd] = client.full_at
        self._until[fd] = whole_seconds(client.until)
        self._bad[fd] = client.bad
        self._families[fd] = family
        self._addresses.set(fd, client.address)

    def _grow(self, size: int) -> None:
        more = size - len(self._ids) + max(256, size // 16)
        self._ids.extend([None] * more)
        doubles = (self._connected_at, self._heard_at, self._pinged_at, self._full_at)
        for numbers in (self.generations, self._until, *doubles):
            numbers.frombytes(bytes(numbers.itemsize * more))
        self._bad.extend(bytes(more))
        self._families.extend(bytes(more))
        self._addresses.grow(len(self._ids))

    def _leave(self, fd: int, unread: bytes = b"", unsent: bytes = b"") -> Leaver:
        client_id = self._ids[fd]
        assert client_id is not None
        # Before anything else is done with the socket: a duplicate of it would keep it registered for ever.
        self._epoll.unregister(fd)
        self._ids[fd] = None
        del self.fds[client_id]
        client = Client(
            client_id=client_id,
            address=self._addresses.get(fd),
            generation=self.generations[fd],
            connected_at=self._connected_at[fd],
            claimed=True,
            bad=self._bad[fd],
            full_at=self._full_at[fd],
            pinged_at=self._pinged_at[fd],
            until=self._until[fd],
        )
        self._addresses.clear(fd)
        heard_at = self._heard_at[fd]
        heard_before = heard_at
        if fd == self._reading:
            self._left = client
            heard_before = self._heard_before
        gathered = self._gathered.pop(fd, None)
        if gathered is not None:
            unsent = b"".join(gathered) + unsent
        return Leaver(client, fd, self._families[fd], heard_at, heard_before, unread, unsent)

    def wake(self, client_id: str) -> None:
        """Hand a connection back to its keeper."""
        self._wake(self.fds[client_id])

    def _wake(self, fd: int, unread: bytes = b"", unsent: bytes = b"") -> None:
        self._metrics.woken += 1
        woken = self._keeper.wake(self._leave(fd, unread, unsent))
        if fd == self._reading:
            self._woken = woken

    def _lose(self, fd: int, abort: bool = False) -> None:
        client = self._leave(fd).client
        if abort:
            reset(fd)
        else:
            os.close(fd)
        self._keeper.lost(client)

    # What it is asked.

    def __len__(self) -> int:
        return len(self.fds)

    def presence(self, client_id: str) -> Presence | None:
        """The parked connection of a client."""
        fd = self.fds.get(client_id)
        if fd is None:
            return None
        return Presence(client_id, self.generations[fd], self._connected_at[fd], self._addresses.get(fd))

    def renew(self, client_id: str, until: float) -> None:
        """A client proved anew who it is; ``until`` is in seconds since 1970, 0: for ever."""
        self._until[self.fds[client_id]] = whole_seconds(until)

    # Bytes out.

    def send(self, client_id: str, payload: bytes, generation: int = 0) -> int:
        """See :meth:`~gateway.clients.interface.IEdge.send`."""
        fd = self.fds.get(client_id)
        if fd is None:
            return 0
        here = self.generations[fd]
        if generation and generation != here:
            return 0
        return here if self._put(fd, encode(payload)) else 0

    def _put(self, fd: int, frame: bytes) -> bool:
        """Write a frame, now or at the end of the turn. ``False`` if that shows that the connection is lost."""
        if self._turn.on and len(frame) <= GATHERED:
            gathered = self._gathered.get(fd)
            if gathered is None:
                if not self._gathered:
                    self._turn.at_end(self._flush)
                self._gathered[fd] = [frame]
                return True
            if len(gathered) < MOST_GATHERED:
                gathered.append(frame)
                return True
        if fd in self._gathered:
            frame = b"".join((*self._gathered.pop(fd), frame))
        return self._write(fd, frame)

    def _flush(self) -> None:
        while self._gathered:
            fd, frames = self._gathered.popitem()
            try:
                self._write(fd, frames[0] if len(frames) == 1 else b"".join(frames))
            except Exception:  # noqa: BLE001 (the others must not suffer)
                self._troubles.report("an error in writing to a connection")

    def _write(self, fd: int, data: bytes) -> bool:
        try:
            written = os.write(fd, data)
        except BlockingIOError:
            written = 0
        except OSError:
            self._lose(fd)
            return False
        if written < len(data):
            self._wake(fd, unsent=data[written:])
        return True

    # Bytes in.

    def fileno(self) -> int:
        """The file that the reactor is to watch."""
        return self._epoll.fileno()

    def logPrefix(self) -> str:
        """How Twisted names it."""
        return "parking"

    def connectionLost(self, reason: Failure) -> None:
        """Twisted says so to all that it watches when it ends."""

    def doRead(self) -> None:
        """Some of the sockets can be read."""
        self._now = self._seconds()
        if not self._readable:
            self._readable = self._epoll.poll(0, MAX_EVENTS)
            self._readable.reverse()
        begun = self._turn.begin()
        try:
            # Those that are left are still readable: the reactor comes back for them.
            while self._readable and self._seconds() - self._now < LONGEST_TURN:
                fd, _ = self._readable.pop()
                try:
                    self._read(fd)
                except Exception:  # noqa: BLE001 (what escapes would make the reactor drop the whole table)
                    self._troubles.report("an error in reading from a connection")
        finally:
            if begun:
                self._turn.end()

    def _read(self, fd: int) -> None:
        if self._ids[fd] is None:
            # It left since the epoll told of it, and its number may be that of somebody else's file by now.
            return
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose(fd)
            return
        self._heard_before = self._heard_at[fd]
        self._heard_at[fd] = self._now
        self._reading = fd
        try:
            self._handle(fd, data)
        finally:
            self._reading = -1
            self._left = self._woken = None

    def _handle(self, fd: int, data: bytes) -> None:
        at, end = 0, len(data)
        while at < end:
            frame = decode(data, at, self._most)
            if frame is None:
                self._wake(fd, unread=data[at:])
                return
            opcode, payload, at = frame
            if opcode == TEXT:
                self._message(fd, payload)
            else:
                self._control(fd, opcode, payload)
            if self._left is not None:
                # It left in the midst of its own bytes: what follows is for what it became, unless it is lost.
                if self._woken is not None and at < end:
                    self._woken.dataReceived(data[at:])
                return

    def _message(self, fd: int, payload: bytes) -> None:
        client_id, generation = self._ids[fd], self.generations[fd]
        assert client_id is not None
        if self._rate is not None and self._meter(fd, 1 if len(payload) <= UNIT else units_of(payload)):
            # Before it is handled, since that may wake or close the connection.
            self._keeper.pause(client_id, generation)
        try:
            handled = self._received(client_id, generation, payload)
        except Exception:  # noqa: BLE001
            self._troubles.report("an error in handling a message")
            self._keeper.end(client_id, generation, CLOSE_INTERNAL_ERROR, "internal error")
            return
        if handled != 1 or self._bad[fd]:
            self._reckon(fd, client_id, generation, handled)

    def _reckon(self, fd: int, client_id: str, generation: int, handled: int) -> None:
        """Charge for a batch, and count what was no JSON-RPC 2.0; of a connection that is, or was just now, here.

        ``handled`` is how many messages it was; 0, or less than 0 of a batch, when something in it was none.
        """
        left = self._left
        more = abs(handled) - 1
        if more > 0 and self._rate is not None:
            if left is not None:
                left.full_at = self._rate.take(left.full_at, self._now, more)
            else:
                self._full_at[fd] = self._rate.take(self._full_at[fd], self._now, more)
        if left is not None:
            left.bad = 0 if handled > 0 else left.bad + 1
            bad = left.bad
        else:
            bad = self._bad[fd] = 0 if handled > 0 else self._bad[fd] + 1
        if bad >= MAX_BAD_MESSAGES:
            reason = f"{bad} messages in a row were no JSON-RPC 2.0"
            self._keeper.end(client_id, generation, CLOSE_POLICY, reason)

    def _meter(self, fd: int, units: int) -> bool:
        """Count so many small messages; whether they are more than the client may send."""
        rate = self._rate
        if rate is None:
            return False
        full_at, now = self._full_at[fd], self._now
        # take() and wait() of Rate, written out: as calls they take as long as all the rest of the counting.
        self._full_at[fd] = (full_at if full_at > now else now) + rate.each * units
        return full_at - now > rate.margin

    def _control(self, fd: int, opcode: int, payload: bytes) -> None:
        """A ping or a pong (RFC 6455, section 5.5)."""
        client_id, generation = self._ids[fd], self.generations[fd]
        assert client_id is not None
        over = self._meter(fd, 1)
        if opcode == PING:
            self._put(fd, encode(payload, PONG))
        if over:
            self._keeper.pause(client_id, generation)

    # Keep-alive.

    def sweep(self, slices: int, now: float, interval: float, timeout: float, spare: bool, today: float) -> None:
        """Look at the next of so many slices of the table: close who came by a token that has expired ``today``
        (seconds since 1970), ping who was silent for ``interval`` seconds, and drop who stayed silent for ``timeout``
        after it, unless they are to be spared: this process may have been stopped, and their answers wait unread."""
        first = self._cursor
        last = min(len(self._ids), first + -(-len(self._ids) // slices))
        self._cursor = last if last < len(self._ids) else 0
        for fd in range(first, last):
            client_id = self._ids[fd]
            if client_id is None:
                continue
            try:
                if 0 < self._until[fd] <= today:
                    self._metrics.expired += 1
                    self._keeper.end(client_id, self.generations[fd], CLOSE_POLICY, EXPIRED)
                elif now - self._heard_at[fd] >= interval:
                    self._visit(fd, now, timeout, spare)
            except Exception:  # noqa: BLE001 (the others must not suffer)
                self._troubles.report("an error in keeping a connection alive")

    def _visit(self, fd: int, now: float, timeout: float, spare: bool) -> None:
        if self._pinged_at[fd] <= self._heard_at[fd]:
            # No ping is out: it was heard of since the last one.
            self._pinged_at[fd] = now
            self._put(fd, EMPTY_PING)
        elif now - self._pinged_at[fd] >= timeout and not spare:
            self._metrics.ping_timeouts += 1
            self._lose(fd, abort=True)
