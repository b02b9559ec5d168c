"""Relays of this node: each connects a client's socket with a socket to the node that has the client.

    client -> this node -> the client's node        the bytes as they are, both ways
    client <- this node <- the client's node
    either side ends, or is lost                    the other gets what was sent, then the end; both close soon after

A relay starts as a :class:`BufferedRelay`, an object with two transports of Twisted, and stays one if a side has TLS.
Otherwise it is spliced in the next reactor iteration: it becomes two rows, one for each of its sockets, and no object
of its own. A row is one entry in each of a few columns, which are indexed by file descriptor (``fd``). All these
sockets are registered with one epoll, which Twisted's reactor watches, as in gateway/clients/parked.py.

What the kernel does not accept at one side is kept, and the other side is not read until it has been sent: no relay
keeps more than one read's worth. When one side is lost, the other gets what is left for it, and the end. What it still
sends is read and discarded meanwhile, since a socket that is closed with unread bytes is reset, and its unsent bytes
are lost.
"""

from __future__ import annotations

import contextlib
import os
import select
from array import array
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import Any

from twisted.internet.interfaces import IFileDescriptorReceiver, IPushProducer, IReactorFDSet
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.net.transport import can_detach, detach_socket, half_close_socket, plain_transport, write_now
from gateway.util.epoll import NestedEpoll
from gateway.util.log import RateLimitedLogger
from gateway.util.timers import Timer, TimerWheel

#: how long the second side may stay open after the first has ended, in seconds
CLOSE_TIMEOUT = 3.0
#: interval at which a side that is not read is checked for loss, in seconds
LOSS_CHECK_INTERVAL = 5.0


class BufferedRelay:
    """A relay between two transports of Twisted, each the producer of the other."""

    def __init__(self, relays: SocketRelays, client_id: str, node_id: str) -> None:
        self.client_id = client_id
        self.node_id = node_id
        self.client = RelayEnd(self)
        self.node = RelayEnd(self)
        self.client.other, self.node.other = self.node, self.client
        self.relays = relays
        self._timer: Timer | None = None

    def start(self, to_client: bytes, to_node: bytes) -> None:
        """Start to relay, once both ends have transports; ``to_client`` and ``to_node`` were received before."""
        for end, other, data in ((self.client, self.node, to_client), (self.node, self.client, to_node)):
            if end.state is not RelayEndState.LOST:
                end.transport.registerProducer(other, True)
                end.transport.write(data)
        for end in (self.client, self.node):
            if end.state is RelayEndState.LOST:
                self._finish_other(end)
            else:
                end.transport.resumeProducing()
        # Not now: one of the transports may be reading.
        self.relays.reactor.callLater(0, self._try_splice)

    def _try_splice(self) -> None:
        """Become two rows of :class:`SocketRelays`, if both ends are plain sockets."""
        is_open = all(end.state is RelayEndState.OPEN for end in (self.client, self.node))
        try:
            if is_open and self.relays.splice(self, self.client.transport, self.node.transport):
                self._detach()
        except Exception:  # noqa: BLE001
            self.relays.error_log.failure("error in starting a relay")
            self.abort()

    def _detach(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for end in (self.client, self.node):
            end.detach()

    def end_lost(self, end: RelayEnd) -> None:
        """Handle the loss of an end's transport."""
        if end.other is None:
            return
        if end.other.state is RelayEndState.LOST:
            self._detach()
            self.relays.remove(self)
        else:
            self._finish_other(end)

    def _finish_other(self, end: RelayEnd) -> None:
        if end.other is not None:
            end.other.finish()
        self.start_close_timer()

    def start_close_timer(self) -> None:
        """Abort the relay after ``CLOSE_TIMEOUT``."""
        if self._timer is None:
            self._timer = self.relays.timers.call_later(CLOSE_TIMEOUT, self._close_timed_out)

    def _close_timed_out(self) -> None:
        self.abort()

    def close(self) -> None:
        """Close both ends once they have been sent what was received for them."""
        for end in (self.client, self.node):
            if end.state is not RelayEndState.LOST:
                end.finish()
        self.start_close_timer()

    def abort(self) -> None:
        """Abort both transports."""
        for end in (self.client, self.node):
            end.abort()
        if self.client.state is self.node.state is RelayEndState.LOST:
            self._detach()
            self.relays.remove(self)


class RelayEndState(Enum):
    """State of one end of a relay.

    OPEN -finish()-> FINISHED      OPEN, FINISHED -connectionLost()-> LOST      any -detach()-> DETACHED
    """

    OPEN = auto()
    #: nothing more is sent than what its transport has
    FINISHED = auto()
    #: the transport is closed
    LOST = auto()
    DETACHED = auto()


@implementer(IPushProducer, IFileDescriptorReceiver)
class RelayEnd(Protocol):
    """Protocol of one of the two transports; what it receives is for the other end, whose transport controls it as a
    producer."""

    #: set before :meth:`BufferedRelay.start`
    transport: Any = None
    state = RelayEndState.OPEN

    def __init__(self, relay: BufferedRelay) -> None:
        self._relay: BufferedRelay | None = relay
        self.other: RelayEnd | None = None
        self._timer: Timer | None = None

    def dataReceived(self, data: bytes) -> None:
        other = self.other
        if other is not None and other.state is RelayEndState.OPEN:
            write_now(other.transport, data)

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """Close a file descriptor that a client has sent over a UNIX socket."""
        os.close(descriptor)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.state = RelayEndState.LOST
        self._stop_loss_check()
        if self._relay is not None:
            self._relay.end_lost(self)

    def finish(self) -> None:
        """Send what is left, and then the end."""
        if self.state is not RelayEndState.OPEN:
            return
        self.state = RelayEndState.FINISHED
        self.transport.unregisterProducer()
        if plain_transport(self.transport) is not None:
            self.transport.loseWriteConnection()
        else:
            self.transport.loseConnection()
        # Read on, to notice the end of the other direction.
        self.resumeProducing()

    def abort(self) -> None:
        """Abort the transport."""
        if self.transport is None:
            self.state = RelayEndState.LOST
        elif self.state is not RelayEndState.LOST:
            self.transport.abortConnection()

    def detach(self) -> None:
        """Drop all references: the relay has ended, or is spliced."""
        self._stop_loss_check()
        self.state = RelayEndState.DETACHED
        self._relay = self.other = self.transport = None

    # IPushProducer, for the transport of the other end.

    def pauseProducing(self) -> None:
        if self.state is RelayEndState.OPEN:
            self.transport.pauseProducing()
            if self._timer is None and self._relay is not None:
                self._timer = self._relay.relays.timers.call_later(LOSS_CHECK_INTERVAL, self._check_loss)

    def resumeProducing(self) -> None:
        self._stop_loss_check()
        if self.state in (RelayEndState.OPEN, RelayEndState.FINISHED):
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """Do nothing: :meth:`BufferedRelay.end_lost` handles the loss of the other end."""

    def _stop_loss_check(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_loss(self) -> None:
        """Abort a lost transport: Twisted does not notice that while it does not read, and the other side may accept
        nothing for any length of time."""
        self._timer = None
        poll = select.poll()
        poll.register(self.transport.fileno(), 0)
        if poll.poll(0):
            self.abort()
        elif self._relay is not None:
            self._timer = self._relay.relays.timers.call_later(LOSS_CHECK_INTERVAL, self._check_loss)


#: the most sockets handled in one reactor iteration; see gateway/clients/parked.py
MAX_EVENTS = 512
#: the longest time spent on sockets in one reactor iteration, in seconds
MAX_ITERATION_TIME = 0.01
#: the most bytes read from a socket at once
READ_SIZE = 2**16

_IN = select.EPOLLIN
_OUT = select.EPOLLOUT
_HUP = select.EPOLLHUP | select.EPOLLERR
#: interest of an fd that is not registered with the epoll
_UNREGISTERED = 128

# Flags of a socket.
#: it is a client's, not another node's
_CLIENT = 1
#: nothing more can be read from it
_EOF_RECEIVED = 2
#: nothing more is sent to it than what is in ``_unsent``
_EOF_PENDING = 4
#: nothing more can be sent to it
_EOF_SENT = 8


class SocketRelays(NestedEpoll):
    """The relays of this node."""

    def __init__(self, reactor: Any, metrics: Metrics) -> None:
        super().__init__("relays", reactor.seconds, max_events=MAX_EVENTS, max_duration=MAX_ITERATION_TIME)
        self.reactor: Any = reactor
        self._metrics = metrics
        self._reactor: IReactorFDSet = reactor
        self.timers = TimerWheel(reactor)
        self.error_log = RateLimitedLogger(reactor.seconds)
        #: fds that were closed since the events were polled
        self._closed: set[int] = set()
        #: client_id -> the fd of its socket, or its buffered relay
        self._by_client: dict[str, int | BufferedRelay] = {}
        self._buffered: dict[BufferedRelay, None] = {}
        self._spliced = 0
        #: fd -> bytes that could not be sent yet
        self._unsent: dict[int, bytes] = {}
        #: client's fd -> timer that closes both sockets, even if bytes are left
        self._close_timers: dict[int, Timer] = {}
        # The columns. Each has an entry for every file descriptor up to the highest one used so far.
        #: the other socket of the relay, -1 if there is none
        self._partners = array("i")
        #: the client_id or node_id of the remote end
        self._endpoint_ids: list[str | None] = []
        self._flags = bytearray()
        #: the events for which the fd is registered
        self._interest = bytearray()

    def start(self) -> None:
        """Start to watch the epoll."""
        self._reactor.addReader(self)

    def stop(self) -> None:
        """Abort all relays, and start no more."""
        self._reactor.removeReader(self)
        for relay in list(self._buffered):
            relay.abort()
        for fd in self._client_fds():
            self._close_now(fd)
        self._epoll.close()

    def create(self, client_id: str, node_id: str) -> BufferedRelay:
        """Make a relay of a client to a node. The caller sets the transports of its two ends, and then calls
        :meth:`BufferedRelay.start` or :meth:`BufferedRelay.abort`."""
        self._metrics.relayed += 1
        relay = BufferedRelay(self, client_id, node_id)
        self._buffered[relay] = None
        self._replace(client_id, relay)
        return relay

    def _replace(self, client_id: str, relay: int | BufferedRelay) -> None:
        older = self._by_client.get(client_id)
        self._by_client[client_id] = relay
        # The client's node has sent that connection its close frame, or does so now, and waits no longer than this.
        if isinstance(older, BufferedRelay):
            older.start_close_timer()
        elif older is not None:
            self._start_close_timer(older)

    def remove(self, relay: BufferedRelay) -> None:
        """Remove a buffered relay that has ended, or is spliced."""
        self._buffered.pop(relay, None)
        if self._by_client.get(relay.client_id) is relay:
            del self._by_client[relay.client_id]

    def splice(self, relay: BufferedRelay, client: Any, node: Any) -> bool:
        """Take over the sockets of a buffered relay. Returns ``False``, and changes nothing, if that is not
        possible."""
        if not (can_detach(client) and can_detach(node)):
            return False
        fds = [plain_transport(transport).fileno() for transport in (client, node)]
        self._grow(max(fds) + 1)
        registered = []
        try:
            for fd in fds:
                self._epoll.register(fd, _IN)
                registered.append(fd)
        except (OSError, ValueError):
            # The kernel watches no more files, or this node is stopping.
            for fd in registered:
                self._epoll.unregister(fd)
            return False
        client_fd, node_fd = fds
        for fd, partner, endpoint_id, flags, transport in (
            (client_fd, node_fd, relay.client_id, _CLIENT, client),
            (node_fd, client_fd, relay.node_id, 0, node),
        ):
            _, unsent = detach_socket(transport)
            self._partners[fd] = partner
            self._endpoint_ids[fd] = endpoint_id
            self._flags[fd] = flags
            self._interest[fd] = _IN
            if unsent:
                self._unsent[fd] = unsent
        self._spliced += 1
        if self._by_client.get(relay.client_id) is relay:
            self._by_client[relay.client_id] = client_fd
        else:
            self._start_close_timer(client_fd)
        self.remove(relay)
        for fd in fds:
            self._guarded(self._flush, fd)
        return True

    def _grow(self, size: int) -> None:
        if size <= len(self._endpoint_ids):
            return
        more = size - len(self._endpoint_ids) + max(256, size // 16)
        self._partners.extend([-1] * more)
        self._endpoint_ids.extend([None] * more)
        self._flags.extend(bytes(more))
        self._interest.extend(bytes(more))

    def count(self) -> int:
        """Return the number of relays."""
        return self._spliced + len(self._buffered)

    def endpoints(self) -> list[tuple[str, str]]:
        """Return the client_id and node_id of each relay, as a new list. A client can have two relays for a moment."""
        endpoints = [(relay.client_id, relay.node_id) for relay in self._buffered]
        endpoints += [
            (self._endpoint_ids[fd] or "", self._endpoint_ids[self._partners[fd]] or "") for fd in self._client_fds()
        ]
        return endpoints

    def client_ids(self) -> list[str]:
        """Return the client_ids of all relays, as a new list."""
        return [client_id for client_id, _ in self.endpoints()]

    def _client_fds(self) -> list[int]:
        if not self._spliced:
            return []
        return [fd for fd, flags in enumerate(self._flags) if flags & _CLIENT]

    # Closing.

    def close(self, client_id: str) -> bool:
        """Close the relay of a client once both sides have been sent what was received for them. Returns ``False`` if
        there is none."""
        relay = self._by_client.get(client_id)
        if isinstance(relay, BufferedRelay):
            relay.close()
        elif relay is not None:
            self._guarded(self._close_gracefully, relay)
        return relay is not None

    def close_all_to(self, node_id: str) -> None:
        """Close all relays to a node that is gone."""
        for relay in list(self._buffered):
            if relay.node_id == node_id:
                relay.close()
        for fd in self._client_fds():
            if self._endpoint_ids[self._partners[fd]] == node_id:
                self._guarded(self._close_gracefully, fd)

    def _close_gracefully(self, fd: int) -> None:
        self._start_close_timer(fd)
        for end in (fd, self._partners[fd]):
            # The last bytes most likely hold the reason of the close.
            if self._interest[end] & _IN:
                self._read(end)
            if self._partners[fd] < 0:
                return
        for end in (fd, self._partners[fd]):
            self._finish_writing(end)
        self._update_pair(fd)

    def _start_close_timer(self, fd: int) -> None:
        """Close both sockets of a relay after ``CLOSE_TIMEOUT``."""
        client_fd = fd if self._flags[fd] & _CLIENT else self._partners[fd]
        if client_fd not in self._close_timers:
            self._close_timers[client_fd] = self.timers.call_later(CLOSE_TIMEOUT, partial(self._close_now, client_fd))

    def _finish_writing(self, fd: int) -> None:
        """Send a socket no more than what is unsent, and then the end."""
        self._flags[fd] |= _EOF_PENDING
        if fd not in self._unsent and not self._flags[fd] & _EOF_SENT:
            self._flags[fd] |= _EOF_SENT
            half_close_socket(fd)

    def _eof_received(self, fd: int) -> None:
        """Handle the end of a socket's input."""
        self._flags[fd] |= _EOF_RECEIVED
        self._start_close_timer(fd)
        self._finish_writing(self._partners[fd])
        self._update_pair(fd)

    def _write_failed(self, fd: int) -> None:
        """Handle a socket that accepts no more bytes; what it has sent may still be read."""
        self._flags[fd] |= _EOF_PENDING | _EOF_SENT
        self._unsent.pop(fd, None)
        self._start_close_timer(fd)
        self._update_pair(fd)

    def _update_pair(self, fd: int) -> None:
        """Update the interest of both sockets, or close them if both directions have ended."""
        other = self._partners[fd]
        if self._flags[fd] & self._flags[other] & _EOF_RECEIVED and self._flags[fd] & self._flags[other] & _EOF_SENT:
            self._close_now(fd)
        else:
            self._update_interest(fd)
            self._update_interest(other)

    def _close_now(self, fd: int) -> None:
        other = self._partners[fd]
        client_fd = fd if self._flags[fd] & _CLIENT else other
        client_id = self._endpoint_ids[client_fd]
        if client_id is not None and self._by_client.get(client_id) == client_fd:
            del self._by_client[client_id]
        timer = self._close_timers.pop(client_fd, None)
        if timer is not None:
            timer.cancel()
        self._spliced -= 1
        for end in (fd, other):
            if self._interest[end] != _UNREGISTERED:
                # Before the socket is closed: afterwards its number may be that of another file.
                with contextlib.suppress(OSError):
                    self._epoll.unregister(end)
            self._partners[end] = -1
            self._endpoint_ids[end] = None
            self._flags[end] = self._interest[end] = 0
            self._unsent.pop(end, None)
            self._closed.add(end)
            os.close(end)

    # Reading and writing.

    def _poll(self) -> list[tuple[int, int]]:
        self._closed.clear()
        return super()._poll()

    def _guarded(self, handle: Callable[[int], None], fd: int) -> None:
        """Close the relay if ``handle`` fails: the other relays must not be affected."""
        try:
            handle(fd)
        except Exception:  # noqa: BLE001
            self._failed(fd)

    def _failed(self, fd: int) -> None:
        self.error_log.failure("error in relaying")
        # An event that is not handled would recur forever.
        if self._partners[fd] >= 0:
            self._close_now(fd)

    def _ready(self, fd: int, event: int) -> None:
        if fd in self._closed:
            # The number of a socket that was closed after the poll may be that of another relay by now.
            return
        if self._interest[fd] & _IN:
            if event & (_IN | _HUP):
                self._read(fd)
        elif event & _HUP and fd not in self._unsent:
            # The socket is lost, but bytes from it wait for the other side; the rest is read after them.
            self._epoll.unregister(fd)
            self._interest[fd] = _UNREGISTERED
            self._start_close_timer(fd)
        if event & (_OUT | _HUP) and fd in self._unsent:
            self._flush(fd)

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            # Connection reset: the other side gets what was received before, and the end.
            data = b""
        if not data:
            self._eof_received(fd)
            return
        other = self._partners[fd]
        if self._flags[other] & _EOF_PENDING:
            # Discarded: a socket that is closed with unread bytes is reset, and its unsent bytes are lost.
            return
        try:
            written = os.write(other, data)
        except BlockingIOError:
            written = 0
        except OSError:
            self._write_failed(other)
            return
        if written < len(data):
            self._unsent[other] = data[written:]
            self._update_pair(fd)

    def _flush(self, fd: int) -> None:
        """Send the unsent bytes of a socket."""
        data = self._unsent.get(fd)
        if data is None:
            return
        try:
            written = os.write(fd, data)
        except BlockingIOError:
            written = 0
        except OSError:
            self._write_failed(fd)
            return
        if written < len(data):
            self._unsent[fd] = data[written:]
        else:
            del self._unsent[fd]
            if self._flags[fd] & _EOF_PENDING:
                self._finish_writing(fd)
        self._update_pair(fd)

    def _update_interest(self, fd: int) -> None:
        """Register a socket for the events that can be handled now, and no others."""
        eof_received = self._flags[fd] & _EOF_RECEIVED
        interest = 0 if eof_received or self._partners[fd] in self._unsent else _IN
        if fd in self._unsent:
            interest |= _OUT
        current = self._interest[fd]
        if current == _UNREGISTERED:
            if not interest:
                return
            self._epoll.register(fd, interest)
        elif interest == current:
            return
        elif interest or not eof_received:
            self._epoll.modify(fd, interest)
        else:
            # The kernel reports the hang-up of a socket for as long as it is registered.
            self._epoll.unregister(fd)
            interest = _UNREGISTERED
        self._interest[fd] = interest
