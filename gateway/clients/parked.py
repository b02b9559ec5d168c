"""Parked sessions: open, idle client connections, kept as rows of a columnar table.

A parked session has no object, transport, protocol or timer of its own. It is a row: one entry in each of a few
columns, indexed by its file descriptor (``fd``), and one entry in the dict of client ids. All parked sockets are
registered with one epoll instance. Since an epoll file descriptor can be polled itself, the reactor watches that one
only, and calls :meth:`ParkedSessions.doRead` when any parked socket is readable.

    client -> text message, ping, pong      whole frames, one or many: handled here, the session stays parked
    client <- text message, ping, pong      written here, flushed when the cork is released
    anything else                           wakes it: it leaves the table and becomes an Autobahn protocol

A session is woken by: bytes that are not whole frames of the fast path (``protocol.frames``), together with these
bytes; a write that the kernel accepts in part, together with the rest; a caller that closes it, or pauses reading from
it.

A row can be removed at any moment, even while its own bytes are handled: the handler of a message may close the session
or wake it. So a row is checked again after every call that leaves this module.

Pings and token expiry of parked sessions are handled here (:meth:`ParkedSessions.sweep`), those of awake sessions in
:mod:`gateway.clients.keepalive`, whose timer also starts each sweep.
"""

from __future__ import annotations

import os
import select
import socket
from array import array
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReactorFDSet

from gateway.auth.interface import AuthMethod, Identity
from gateway.clients.expiry import EXPIRED_REASON, has_expired, pack_expiry
from gateway.clients.interface import IParkingOwner, Session, SessionInfo, UnparkedSession
from gateway.clients.keepalive import BYTES_PER_UNIT, message_units
from gateway.metrics import Metrics
from gateway.net.transport import reset_socket
from gateway.protocol.frames import EMPTY_PING, MAX_PAYLOAD, PING, PONG, TEXT, CloseCode, decode, encode
from gateway.protocol.jsonrpc import MAX_BAD_MESSAGES
from gateway.registry.interface import SessionKey
from gateway.util.cork import Cork
from gateway.util.epoll import NestedEpoll
from gateway.util.log import RateLimitedLogger
from gateway.util.rate_limit import TokenBucket

#: Kinds of addresses, in the upper 16 bits of an entry. The lower 48 bits hold an IPv4 address and port, or an IPv6
#: port.
_IPV4 = 1 << 48
_IPV6 = 2 << 48
_UNIX = 3 << 48
_STRING = 4 << 48
_PORT_MASK = 0xFFFF
_VALUE_MASK = (1 << 48) - 1
#: bytes
_IPV6_SIZE = 16

#: sockets read per reactor iteration
MAX_EVENTS = 512
#: time spent reading per reactor iteration, in seconds; then timers and other sockets get their turn
MAX_ITERATION_TIME = 0.01
#: Bytes per read. From 128 KiB on, the C library requests the memory of each read from the kernel, which takes several
#: times as long as the read itself.
READ_SIZE = 2**16
#: bytes; larger frames are not corked
MAX_CORKED_FRAME = 2**14
#: corked messages per client
MAX_CORKED_MESSAGES = 256


class AddressColumn:
    """Column of addresses (``host:port``), packed into a few bytes each.

    As strings they would be the largest part of a parked session. What is read is exactly what was set.
    """

    def __init__(self) -> None:
        self._packed = array("Q")
        #: IPv6 addresses only; as long as the highest index of one
        self._ipv6 = bytearray()
        #: addresses that fit neither, such as a link-local address with its interface
        self._strings: dict[int, str] = {}

    def grow(self, size: int) -> None:
        """Make room for that many addresses."""
        self._packed.extend(array("Q", bytes(8 * max(0, size - len(self._packed)))))

    def set(self, index: int, address: str) -> None:
        self.clear(index)
        self._packed[index] = self._encode(index, address)
        if self.get(index) != address:
            self._packed[index] = _STRING
            self._strings[index] = address

    def get(self, index: int) -> str:
        packed = self._packed[index]
        kind = packed & ~_VALUE_MASK
        if kind == _IPV4:
            return f"{socket.inet_ntoa((packed >> 16 & 0xFFFFFFFF).to_bytes(4, 'big'))}:{packed & _PORT_MASK}"
        if kind == _IPV6:
            host = bytes(self._ipv6[index * _IPV6_SIZE : (index + 1) * _IPV6_SIZE])
            return f"[{socket.inet_ntop(socket.AF_INET6, host)}]:{packed & _PORT_MASK}"
        return "unix" if kind == _UNIX else self._strings[index]

    def clear(self, index: int) -> None:
        if self._strings:
            self._strings.pop(index, None)

    def _encode(self, index: int, address: str) -> int:
        if address == "unix":
            return _UNIX
        host, _, port = address.rpartition(":")
        try:
            port_number = int(port) & _PORT_MASK
            if host[:1] != "[":
                return _IPV4 | int.from_bytes(socket.inet_aton(host), "big") << 16 | port_number
            packed = socket.inet_pton(socket.AF_INET6, host[1:-1])
        except (ValueError, OSError):
            # Not this address either: set() sees the mismatch, and stores the string.
            return _UNIX
        missing = (index + 1) * _IPV6_SIZE - len(self._ipv6)
        if missing > 0:
            # Grow in steps, since addresses come in the order of their indexes.
            self._ipv6.extend(bytes(missing + len(self._ipv6) // 8))
        self._ipv6[index * _IPV6_SIZE : (index + 1) * _IPV6_SIZE] = packed
        return _IPV6 | port_number


class ParkedSessions(NestedEpoll):
    """Table of the parked sessions of one node."""

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
        """``max_message_size`` is in bytes. ``rate_limit`` is the message rate of each client, ``None`` for no
        limit."""
        super().__init__("parking", reactor.seconds, max_events=MAX_EVENTS, max_duration=MAX_ITERATION_TIME)
        #: client_id -> fd
        self.fds: dict[str, int] = {}
        self._owner = owner
        self._on_message: Callable[[str, int, bytes], int | None] = owner.message_received
        self._reactor: IReactorFDSet = reactor
        self._cork = cork
        self._metrics = metrics
        self._max_payload = min(max_message_size, MAX_PAYLOAD)
        self._rate_limit = rate_limit
        self._error_log = RateLimitedLogger(reactor.seconds)
        #: fd -> frames to be written when the cork is released
        self._corked_frames: dict[int, list[bytes]] = {}
        #: State of the read in progress: its fd (-1: none); when that fd was last read before; the session that left
        #: the table since, and the protocol it has become.
        self._reading_fd = -1
        self._previously_received_at = 0.0
        self._left_session: Session | None = None
        self._woken_protocol: Any = None
        #: first index of the next slice of the sweep
        self._sweep_cursor = 0
        self._make_columns()

    def _make_columns(self) -> None:
        """Create the columns. Each has an entry for every file descriptor up to the highest one that was ever
        parked."""
        #: ``None``: no session is parked on that fd
        self._client_ids: list[str | None] = []
        self.generations = array("q")
        self._connected_at = array("d")
        self._last_received_at = array("d")
        self._pinged_at = array("d")
        #: state of the client's TokenBucket
        self._tat = array("d")
        #: when the token expires, in whole seconds since 1970; 0: never
        self._expires_at = array("I")
        #: AuthMethod for the client's tickets
        self._ticket_methods = bytearray()
        #: consecutive messages that were not JSON-RPC 2.0
        self._consecutive_bad = bytearray()
        #: address family of the socket
        self._families = bytearray()
        self._addresses = AddressColumn()

    # Parking and waking.

    def start(self) -> None:
        """Start reading from parked sockets."""
        self._reactor.addReader(self)

    def stop(self) -> None:
        """Stop reading, and drop all sessions that are still parked."""
        self._reactor.removeReader(self)
        for fd in list(self.fds.values()):
            self._drop(fd)
        self._epoll.close()

    def park(self, session: Session, fd: int, family: int, last_received_at: float) -> None:
        """Add a session and its socket. Bytes that are already there are read in the next reactor iteration."""
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
        self._ticket_methods[fd] = session.ticket_method
        self._consecutive_bad[fd] = session.consecutive_bad
        self._families[fd] = family
        self._addresses.set(fd, session.address)

    def _grow(self, size: int) -> None:
        more = size - len(self._client_ids) + max(256, size // 16)
        self._client_ids.extend([None] * more)
        doubles = (self._connected_at, self._last_received_at, self._pinged_at, self._tat)
        for numbers in (self.generations, self._expires_at, *doubles):
            numbers.frombytes(bytes(numbers.itemsize * more))
        self._ticket_methods.extend(bytes(more))
        self._consecutive_bad.extend(bytes(more))
        self._families.extend(bytes(more))
        self._addresses.grow(len(self._client_ids))

    def _unpark(self, fd: int, unread: bytes = b"", unsent: bytes = b"") -> UnparkedSession:
        client_id = self._client_ids[fd]
        assert client_id is not None
        # First: a duplicate of the socket would keep it registered.
        self._epoll.unregister(fd)
        self._client_ids[fd] = None
        del self.fds[client_id]
        session = Session(
            client_id=client_id,
            address=self._addresses.get(fd),
            generation=self.generations[fd],
            connected_at=self._connected_at[fd],
            claimed=True,
            consecutive_bad=self._consecutive_bad[fd],
            tat=self._tat[fd],
            pinged_at=self._pinged_at[fd],
            expires_at=self._expires_at[fd],
            ticket_method=AuthMethod(self._ticket_methods[fd]),
        )
        self._addresses.clear(fd)
        last_received_at = self._last_received_at[fd]
        previously_received_at = last_received_at
        if fd == self._reading_fd:
            self._left_session = session
            previously_received_at = self._previously_received_at
        frames = self._corked_frames.pop(fd, None)
        if frames is not None:
            unsent = b"".join(frames) + unsent
        return UnparkedSession(
            session, fd, self._families[fd], last_received_at, previously_received_at, unread, unsent
        )

    def wake(self, client_id: str) -> None:
        """Unpark a session and pass it to the owner."""
        self._wake(self.fds[client_id])

    def _wake(self, fd: int, unread: bytes = b"", unsent: bytes = b"") -> None:
        self._metrics.woken += 1
        protocol = self._owner.wake(self._unpark(fd, unread, unsent))
        if fd == self._reading_fd:
            self._woken_protocol = protocol

    def _drop(self, fd: int, abort: bool = False) -> None:
        session = self._unpark(fd).session
        if abort:
            reset_socket(fd)
        else:
            os.close(fd)
        self._owner.connection_lost(session)

    # Queries.

    def __len__(self) -> int:
        return len(self.fds)

    def session_info(self, client_id: str) -> SessionInfo | None:
        """Return the parked session of a client, or ``None``."""
        fd = self.fds.get(client_id)
        if fd is None:
            return None
        return SessionInfo(client_id, self.generations[fd], self._connected_at[fd], self._addresses.get(fd))

    def ticket_identity(self, client_id: str) -> Identity | None:
        """Return what a client has proved, as :meth:`IClientSessions.ticket_identity` does."""
        fd = self.fds[client_id]
        method = self._ticket_methods[fd]
        return Identity(client_id, self._expires_at[fd], method=AuthMethod(method)) if method else None

    def renew(self, client_id: str, expires_at: float) -> None:
        """Set when a session expires, in seconds since 1970; 0: never."""
        self._expires_at[self.fds[client_id]] = pack_expiry(expires_at)

    # Writing.

    def send(self, client_id: str, payload: bytes, generation: int = 0) -> int:
        """Send one text message, as :meth:`IClientSessions.send` does."""
        fd = self.fds.get(client_id)
        if fd is None:
            return 0
        parked_generation = self.generations[fd]
        if generation and generation != parked_generation:
            return 0
        return parked_generation if self._write_or_cork(fd, encode(payload)) else 0

    def _write_or_cork(self, fd: int, frame: bytes) -> bool:
        """Write a frame, now or when the cork is released. Returns ``False`` if the connection turns out to be lost."""
        if self._cork.is_corked and len(frame) <= MAX_CORKED_FRAME:
            corked = self._corked_frames.get(fd)
            if corked is None:
                if not self._corked_frames:
                    self._cork.on_flush(self._flush)
                self._corked_frames[fd] = [frame]
                return True
            if len(corked) < MAX_CORKED_MESSAGES:
                corked.append(frame)
                return True
        if fd in self._corked_frames:
            frame = b"".join((*self._corked_frames.pop(fd), frame))
        return self._write(fd, frame)

    def _flush(self) -> None:
        while self._corked_frames:
            fd, frames = self._corked_frames.popitem()
            try:
                self._write(fd, frames[0] if len(frames) == 1 else b"".join(frames))
            except Exception:  # noqa: BLE001 (the other connections must still be written to)
                self._error_log.failure("error in writing to a parked connection")

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

    # Reading.

    def doRead(self) -> None:
        """Read from readable sockets, within the limits of one reactor iteration."""
        corked = self._cork.cork()
        try:
            super().doRead()
        finally:
            if corked:
                self._cork.uncork()

    def _failed(self, fd: int) -> None:
        self._error_log.failure("error in reading from a parked connection")

    def _ready(self, fd: int, event: int) -> None:
        if self._client_ids[fd] is None:
            # It has left since the poll, and its fd may be another file by now.
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
                # It left while its own bytes were handled: the rest is for the protocol it has become, unless it is
                # lost.
                if self._woken_protocol is not None and at < end:
                    self._woken_protocol.dataReceived(data[at:])
                return

    def _handle_text(self, fd: int, payload: bytes) -> None:
        client_id, generation = self._client_ids[fd], self.generations[fd]
        assert client_id is not None
        try:
            handled = self._on_message(client_id, generation, payload)
        except Exception:  # noqa: BLE001
            self._error_log.failure("error in handling a message")
            self._owner.close_session(SessionKey(client_id, generation), CloseCode.INTERNAL_ERROR, "internal error")
            return
        if self._left_session is not None or self._consecutive_bad[fd] or len(payload) > BYTES_PER_UNIT:
            self._account_message(fd, client_id, generation, payload, handled)
        elif handled == 1:
            if self._charge(fd, 1):
                self._owner.pause_session(SessionKey(client_id, generation))
        elif handled is not None:
            self._account_message(fd, client_id, generation, payload, handled)

    def _account_message(self, fd: int, client_id: str, generation: int, payload: bytes, handled: int | None) -> None:
        """Charge for a message or batch, and count invalid messages, of a session that is parked or has just left the
        table. ``handled`` is what :meth:`IClientHandler.message_received` has returned."""
        session = self._left_session
        if handled is not None and self._rate_limit is not None:
            units = message_units(payload) + max(0, abs(handled) - 1)
            if session is None:
                exceeded = self._charge(fd, units)
            else:
                exceeded = self._rate_limit.wait_time(session.tat, self._now) > 0
                session.tat = self._rate_limit.charge(session.tat, self._now, units)
            if exceeded:
                self._owner.pause_session(SessionKey(client_id, generation))
                session = self._left_session
        is_valid = handled is None or handled > 0
        if session is not None:
            session.consecutive_bad = 0 if is_valid else session.consecutive_bad + 1
            consecutive_bad = session.consecutive_bad
        else:
            consecutive_bad = self._consecutive_bad[fd] = 0 if is_valid else self._consecutive_bad[fd] + 1
        if consecutive_bad >= MAX_BAD_MESSAGES:
            reason = f"{consecutive_bad} messages in a row were no JSON-RPC 2.0"
            self._owner.close_session(SessionKey(client_id, generation), CloseCode.POLICY_VIOLATION, reason)

    def _charge(self, fd: int, units: int) -> bool:
        """Charge a client for that many messages. Returns whether it exceeds its rate."""
        rate_limit = self._rate_limit
        if rate_limit is None:
            return False
        tat, now = self._tat[fd], self._now
        # TokenBucket.charge() and wait_time() inlined: the calls would take as long as the rest of the accounting.
        self._tat[fd] = (tat if tat > now else now) + rate_limit.emission_interval * units
        return tat - now > rate_limit.tolerance

    def _handle_control(self, fd: int, opcode: int, payload: bytes) -> None:
        """Handle a ping or a pong (RFC 6455, section 5.5)."""
        client_id, generation = self._client_ids[fd], self.generations[fd]
        assert client_id is not None
        exceeded = self._charge(fd, 1)
        if opcode == PING:
            self._write_or_cork(fd, encode(payload, PONG))
        if exceeded:
            self._owner.pause_session(SessionKey(client_id, generation))

    # Keep-alive.

    def sweep(self, slices: int, now: float, interval: float, timeout: float, forgive: bool, wall_time: float) -> None:
        """Check the next of ``slices`` slices of the table.

        Closes sessions whose token has expired at ``wall_time`` (seconds since 1970), pings those silent for
        ``interval`` seconds, and aborts those that stay silent for ``timeout`` seconds after the ping. ``forgive``
        suspends the aborts: this process may have been stopped, and answers to its pings wait unread.
        """
        start = self._sweep_cursor
        stop = min(len(self._client_ids), start + -(-len(self._client_ids) // slices))
        self._sweep_cursor = stop if stop < len(self._client_ids) else 0
        for fd in range(start, stop):
            client_id = self._client_ids[fd]
            if client_id is None:
                continue
            try:
                if has_expired(self._expires_at[fd], wall_time):
                    self._metrics.expired += 1
                    self._owner.close_session(
                        SessionKey(client_id, self.generations[fd]), CloseCode.POLICY_VIOLATION, EXPIRED_REASON
                    )
                elif now - self._last_received_at[fd] >= interval:
                    self._check_alive(fd, now, timeout, forgive)
            except Exception:  # noqa: BLE001 (the other sessions must still be checked)
                self._error_log.failure("error in the keep-alive of a parked connection")

    def _check_alive(self, fd: int, now: float, timeout: float, forgive: bool) -> None:
        if self._pinged_at[fd] <= self._last_received_at[fd]:
            # Bytes have come since the last ping: none is unanswered.
            self._pinged_at[fd] = now
            self._write_or_cork(fd, EMPTY_PING)
        elif now - self._pinged_at[fd] >= timeout and not forgive:
            self._metrics.ping_timeouts += 1
            self._drop(fd, abort=True)
