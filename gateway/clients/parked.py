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

from gateway.clients.interface import IParkingOwner, Session, SessionInfo, UnparkedSession
from gateway.clients.keepalive import BYTES_PER_UNIT, EXPIRED_REASON, message_units, pack_expiry
from gateway.metrics import Metrics
from gateway.net.transport import reset_socket
from gateway.protocol.frames import EMPTY_PING, MAX_PAYLOAD, PING, PONG, TEXT, CloseCode, decode, encode
from gateway.protocol.jsonrpc import MAX_BAD_MESSAGES
from gateway.util.cork import Cork
from gateway.util.log import RateLimitedLogger
from gateway.util.rate_limit import TokenBucket

#: what a number stands for; its lower 48 bits are the address and port, or the port
_IPV4, _IPV6, _UNIX, _STRING = 1 << 48, 2 << 48, 3 << 48, 4 << 48
_PORT_MASK, _VALUE_MASK = 0xFFFF, (1 << 48) - 1
_IPV6_SIZE = 16


class AddressColumn:
    """Addresses by number. What is got is what was set, to the letter."""

    def __init__(self) -> None:
        self._packed = array("Q")
        #: for IPv6 alone, and only as long as the highest number of one
        self._ipv6 = bytearray()
        #: what is neither, such as a link-local address with its interface
        self._strings: dict[int, str] = {}

    def grow(self, size: int) -> None:
        """Make room for so many."""
        self._packed.extend(array("Q", bytes(8 * max(0, size - len(self._packed)))))

    def set(self, index: int, address: str) -> None:
        """Keep one."""
        self.clear(index)
        self._packed[index] = self._encode(index, address)
        if self.get(index) != address:
            self._packed[index] = _STRING
            self._strings[index] = address

    def get(self, index: int) -> str:
        """The one that was set last."""
        number = self._packed[index]
        kind = number & ~_VALUE_MASK
        if kind == _IPV4:
            return f"{socket.inet_ntoa((number >> 16 & 0xFFFFFFFF).to_bytes(4, 'big'))}:{number & _PORT_MASK}"
        if kind == _IPV6:
            host = bytes(self._ipv6[index * _IPV6_SIZE : (index + 1) * _IPV6_SIZE])
            return f"[{socket.inet_ntop(socket.AF_INET6, host)}]:{number & _PORT_MASK}"
        return "unix" if kind == _UNIX else self._strings[index]

    def clear(self, index: int) -> None:
        """Forget one."""
        if self._strings:
            self._strings.pop(index, None)

    def _encode(self, index: int, address: str) -> int:
        if address == "unix":
            return _UNIX
        host, _, port = address.rpartition(":")
        try:
            number = int(port) & _PORT_MASK
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
MAX_EVENTS, MAX_ITERATION_TIME = 512, 0.01
#: How much is read from one of them at once, in bytes: from 128 KiB on the C library asks the kernel for the memory of
#: each read anew, which takes several times as long as the read itself.
READ_SIZE = 65536
#: what is larger is not gathered until the end of the turn, in bytes; nor are more than so many messages to one client
MAX_CORKED_FRAME, MAX_CORKED_MESSAGES = 16384, 256


@implementer(IReadDescriptor)
class ParkedSessions:
    """All parked connections of one node."""

    def __init__(
        self,
        owner: IParkingOwner,
        *,
        reactor: Any,
        cork: Cork,
        metrics: Metrics,
        max_message_size: int,
        rate_limit: TokenBucket | None,
    ) -> None:
        """``max_message_size`` is in bytes; ``rate`` is what each client may send, ``None`` for no limit."""
        #: client_id -> fd
        self.fds: dict[str, int] = {}
        self._owner = owner
        self._on_message: Callable[[str, int, bytes], int] = owner.message_received
        self._reactor: IReactorFDSet = reactor
        self._clock: Callable[[], float] = reactor.seconds
        self._cork = cork
        self._metrics = metrics
        self._max_payload = min(max_message_size, MAX_PAYLOAD)
        self._rate_limit = rate_limit
        self._error_log = RateLimitedLogger(reactor.seconds)
        self._epoll = select.epoll()
        #: what the epoll told of and was not read yet, the next one last
        self._readable: list[tuple[int, int]] = []
        #: fd -> what is to be written at the end of the turn
        self._corked_frames: dict[int, list[bytes]] = {}
        #: the time, the fd that is read, when it was heard of before, and what became of it if it left meanwhile
        self._now = 0.0
        self._reading_fd = -1
        self._previously_received_at = 0.0
        self._left_session: Session | None = None
        self._woken_protocol: Any = None
        #: where the sweep is
        self._sweep_cursor = 0
        self._make_columns()

    def _make_columns(self) -> None:
        """Each has an entry for every file descriptor up to the highest that was ever parked."""
        #: the name of the client; ``None`` where no connection is parked
        self._client_ids: list[str | None] = []
        self.generations = array("q")
        self._connected_at = array("d")
        self._last_received_at = array("d")
        self._pinged_at = array("d")
        #: the state of its Rate
        self._tat = array("d")
        #: when its token expires, in whole seconds since 1970; 0: never
        self._expires_at = array("I")
        #: messages in a row that were no JSON-RPC 2.0
        self._consecutive_bad = bytearray()
        self._families = bytearray()
        self._addresses = AddressColumn()

    # In and out.

    def start(self) -> None:
        """Begin to read."""
        self._reactor.addReader(self)

    def stop(self) -> None:
        """End; the connections that are left are dropped."""
        self._reactor.removeReader(self)
        for fd in list(self.fds.values()):
            self._drop(fd)
        self._epoll.close()

    def park(self, session: Session, fd: int, family: int, last_received_at: float) -> None:
        """Take a connection and its socket. What has come meanwhile is read in the next turn."""
        if fd >= len(self._client_ids):
            self._grow(fd + 1)
        self._epoll.register(fd, select.EPOLLIN)
        self.fds[session.client_id] = fd
        self._client_ids[fd] = session.client_id
        self.generations[fd] = session.generation
        self._connected_at[fd] = session.connected_at
        self._last_received_at[fd] = last_received_at
        self._pinged_at[fd] = session.pinged_at
        self._tat[fd] = session.tat
        self._expires_at[fd] = pack_expiry(session.expires_at)
        self._consecutive_bad[fd] = session.consecutive_bad
        self._families[fd] = family
        self._addresses.set(fd, session.address)

    def _grow(self, size: int) -> None:
        more = size - len(self._client_ids) + max(256, size // 16)
        self._client_ids.extend([None] * more)
        doubles = (self._connected_at, self._last_received_at, self._pinged_at, self._tat)
        for numbers in (self.generations, self._expires_at, *doubles):
            numbers.frombytes(bytes(numbers.itemsize * more))
        self._consecutive_bad.extend(bytes(more))
        self._families.extend(bytes(more))
        self._addresses.grow(len(self._client_ids))

    def _unpark(self, fd: int, unread: bytes = b"", unsent: bytes = b"") -> UnparkedSession:
        client_id = self._client_ids[fd]
        assert client_id is not None
        # Before anything else is done with the socket: a duplicate of it would keep it registered for ever.
        self._epoll.unregister(fd)
        self._client_ids[fd] = None
        del self.fds[client_id]
        client = Session(
            client_id=client_id,
            address=self._addresses.get(fd),
            generation=self.generations[fd],
            connected_at=self._connected_at[fd],
            claimed=True,
            consecutive_bad=self._consecutive_bad[fd],
            tat=self._tat[fd],
            pinged_at=self._pinged_at[fd],
            expires_at=self._expires_at[fd],
        )
        self._addresses.clear(fd)
        heard_at = self._last_received_at[fd]
        heard_before = heard_at
        if fd == self._reading_fd:
            self._left_session = client
            heard_before = self._previously_received_at
        gathered = self._corked_frames.pop(fd, None)
        if gathered is not None:
            unsent = b"".join(gathered) + unsent
        return UnparkedSession(client, fd, self._families[fd], heard_at, heard_before, unread, unsent)

    def wake(self, client_id: str) -> None:
        """Hand a connection back to its keeper."""
        self._wake(self.fds[client_id])

    def _wake(self, fd: int, unread: bytes = b"", unsent: bytes = b"") -> None:
        self._metrics.woken += 1
        woken = self._owner.wake(self._unpark(fd, unread, unsent))
        if fd == self._reading_fd:
            self._woken_protocol = woken

    def _drop(self, fd: int, abort: bool = False) -> None:
        client = self._unpark(fd).session
        if abort:
            reset_socket(fd)
        else:
            os.close(fd)
        self._owner.connection_lost(client)

    # What it is asked.

    def __len__(self) -> int:
        return len(self.fds)

    def session_info(self, client_id: str) -> SessionInfo | None:
        """The parked connection of a client."""
        fd = self.fds.get(client_id)
        if fd is None:
            return None
        return SessionInfo(client_id, self.generations[fd], self._connected_at[fd], self._addresses.get(fd))

    def renew(self, client_id: str, expires_at: float) -> None:
        """A client proved anew who it is; ``until`` is in seconds since 1970, 0: for ever."""
        self._expires_at[self.fds[client_id]] = pack_expiry(expires_at)

    # Bytes out.

    def send(self, client_id: str, payload: bytes, generation: int = 0) -> int:
        """See :meth:`~gateway.clients.interface.IEdge.send`."""
        fd = self.fds.get(client_id)
        if fd is None:
            return 0
        here = self.generations[fd]
        if generation and generation != here:
            return 0
        return here if self._write_or_cork(fd, encode(payload)) else 0

    def _write_or_cork(self, fd: int, frame: bytes) -> bool:
        """Write a frame, now or at the end of the turn. ``False`` if that shows that the connection is lost."""
        if self._cork.is_corked and len(frame) <= MAX_CORKED_FRAME:
            gathered = self._corked_frames.get(fd)
            if gathered is None:
                if not self._corked_frames:
                    self._cork.on_flush(self._flush)
                self._corked_frames[fd] = [frame]
                return True
            if len(gathered) < MAX_CORKED_MESSAGES:
                gathered.append(frame)
                return True
        if fd in self._corked_frames:
            frame = b"".join((*self._corked_frames.pop(fd), frame))
        return self._write(fd, frame)

    def _flush(self) -> None:
        while self._corked_frames:
            fd, frames = self._corked_frames.popitem()
            try:
                self._write(fd, frames[0] if len(frames) == 1 else b"".join(frames))
            except Exception:  # noqa: BLE001 (the others must not suffer)
                self._error_log.failure("an error in writing to a connection")

    def _write(self, fd: int, data: bytes) -> bool:
        try:
            written = os.write(fd, data)
        except BlockingIOError:
            written = 0
        except OSError:
            self._drop(fd)
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
        self._now = self._clock()
        if not self._readable:
            self._readable = self._epoll.poll(0, MAX_EVENTS)
            self._readable.reverse()
        begun = self._cork.cork()
        try:
            # Those that are left are still readable: the reactor comes back for them.
            while self._readable and self._clock() - self._now < MAX_ITERATION_TIME:
                fd, _ = self._readable.pop()
                try:
                    self._read(fd)
                except Exception:  # noqa: BLE001 (what escapes would make the reactor drop the whole table)
                    self._error_log.failure("an error in reading from a connection")
        finally:
            if begun:
                self._cork.uncork()

    def _read(self, fd: int) -> None:
        if self._client_ids[fd] is None:
            # It left since the epoll told of it, and its number may be that of somebody else's file by now.
            return
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(fd)
            return
        self._previously_received_at = self._last_received_at[fd]
        self._last_received_at[fd] = self._now
        self._reading_fd = fd
        try:
            self._handle_frames(fd, data)
        finally:
            self._reading_fd = -1
            self._left_session = self._woken_protocol = None

    def _handle_frames(self, fd: int, data: bytes) -> None:
        at, end = 0, len(data)
        while at < end:
            frame = decode(data, at, self._max_payload)
            if frame is None:
                self._wake(fd, unread=data[at:])
                return
            opcode, payload, at = frame
            if opcode == TEXT:
                self._handle_text(fd, payload)
            else:
                self._handle_control(fd, opcode, payload)
            if self._left_session is not None:
                # It left in the midst of its own bytes: what follows is for what it became, unless it is lost.
                if self._woken_protocol is not None and at < end:
                    self._woken_protocol.dataReceived(data[at:])
                return

    def _handle_text(self, fd: int, payload: bytes) -> None:
        client_id, generation = self._client_ids[fd], self.generations[fd]
        assert client_id is not None
        if self._rate_limit is not None and self._charge(
            fd, 1 if len(payload) <= BYTES_PER_UNIT else message_units(payload)
        ):
            # Before it is handled, since that may wake or close the connection.
            self._owner.pause_session(client_id, generation)
        try:
            handled = self._on_message(client_id, generation, payload)
        except Exception:  # noqa: BLE001
            self._error_log.failure("an error in handling a message")
            self._owner.close_session(client_id, generation, CloseCode.INTERNAL_ERROR, "internal error")
            return
        if handled != 1 or self._consecutive_bad[fd]:
            self._account_message(fd, client_id, generation, handled)

    def _account_message(self, fd: int, client_id: str, generation: int, handled: int) -> None:
        """Charge for a batch, and count what was no JSON-RPC 2.0; of a connection that is, or was just now, here.

        ``handled`` is how many messages it was; 0, or less than 0 of a batch, when something in it was none.
        """
        left = self._left_session
        more = abs(handled) - 1
        if more > 0 and self._rate_limit is not None:
            if left is not None:
                left.tat = self._rate_limit.charge(left.tat, self._now, more)
            else:
                self._tat[fd] = self._rate_limit.charge(self._tat[fd], self._now, more)
        if left is not None:
            left.consecutive_bad = 0 if handled > 0 else left.consecutive_bad + 1
            bad = left.consecutive_bad
        else:
            bad = self._consecutive_bad[fd] = 0 if handled > 0 else self._consecutive_bad[fd] + 1
        if bad >= MAX_BAD_MESSAGES:
            reason = f"{bad} messages in a row were no JSON-RPC 2.0"
            self._owner.close_session(client_id, generation, CloseCode.POLICY_VIOLATION, reason)

    def _charge(self, fd: int, units: int) -> bool:
        """Count so many small messages; whether they are more than the client may send."""
        rate = self._rate_limit
        if rate is None:
            return False
        full_at, now = self._tat[fd], self._now
        # take() and wait() of Rate, written out: as calls they take as long as all the rest of the counting.
        self._tat[fd] = (full_at if full_at > now else now) + rate.emission_interval * units
        return full_at - now > rate.tolerance

    def _handle_control(self, fd: int, opcode: int, payload: bytes) -> None:
        """A ping or a pong (RFC 6455, section 5.5)."""
        client_id, generation = self._client_ids[fd], self.generations[fd]
        assert client_id is not None
        over = self._charge(fd, 1)
        if opcode == PING:
            self._write_or_cork(fd, encode(payload, PONG))
        if over:
            self._owner.pause_session(client_id, generation)

    # Keep-alive.

    def sweep(self, slices: int, now: float, interval: float, timeout: float, forgive: bool, wall_time: float) -> None:
        """Look at the next of so many slices of the table: close who came by a token that has expired ``today``
        (seconds since 1970), ping who was silent for ``interval`` seconds, and drop who stayed silent for ``timeout``
        after it, unless they are to be spared: this process may have been stopped, and their answers wait unread."""
        first = self._sweep_cursor
        last = min(len(self._client_ids), first + -(-len(self._client_ids) // slices))
        self._sweep_cursor = last if last < len(self._client_ids) else 0
        for fd in range(first, last):
            client_id = self._client_ids[fd]
            if client_id is None:
                continue
            try:
                if 0 < self._expires_at[fd] <= wall_time:
                    self._metrics.expired += 1
                    self._owner.close_session(
                        client_id, self.generations[fd], CloseCode.POLICY_VIOLATION, EXPIRED_REASON
                    )
                elif now - self._last_received_at[fd] >= interval:
                    self._check_alive(fd, now, timeout, forgive)
            except Exception:  # noqa: BLE001 (the others must not suffer)
                self._error_log.failure("an error in keeping a connection alive")

    def _check_alive(self, fd: int, now: float, timeout: float, forgive: bool) -> None:
        if self._pinged_at[fd] <= self._last_received_at[fd]:
            # No ping is out: it was heard of since the last one.
            self._pinged_at[fd] = now
            self._write_or_cork(fd, EMPTY_PING)
        elif now - self._pinged_at[fd] >= timeout and not forgive:
            self._metrics.ping_timeouts += 1
            self._drop(fd, abort=True)
