"""A relay between two transports of Twisted: one that has TLS at an end, or that has just begun.

What the kernel does not take at one end stops the reading at the other: the transport there is its producer. When one
end is lost, the other gets what is left for it, and the end; what still comes from it is swallowed meanwhile, since a
socket that is closed with bytes unread is reset, and what was sent to it is lost.

The relays of this node: for each, a client's socket and one to the node that has the client.

    client -> this node -> the client's node        the bytes as they are, both ways
    client <- this node <- the client's node
    either ends, or is lost                         what it had said arrives, then the end; both are closed soon after

A relay has no object of its own. It is two rows, one for each of its sockets: one entry in each of a few columns, which
are indexed by file descriptor (``fd``). All sockets are registered with one epoll, which Twisted's reactor watches, as
in gateway/clients/parked.py. One that has TLS at an end is a :class:`~gateway.cluster.relay.Pipe`, and each is for its
first turn of the reactor.

What the kernel does not take is kept, and its sender is not read until it is gone: no relay keeps more than one read's
worth.
"""

from __future__ import annotations

import contextlib
import os
import select
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.internet.interfaces import IFileDescriptorReceiver, IPushProducer, IReactorFDSet, IReadDescriptor
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.net.transport import can_detach, detach_socket, half_close_socket, plain_transport, write_now
from gateway.util.log import RateLimitedLogger
from gateway.util.timers import Timer, TimerWheel

#: how long the second end may take after the first, in seconds
CLOSE_TIMEOUT = 3.0
#: how often it is looked whether an end is lost that is not read, in seconds
LOSS_CHECK_INTERVAL = 5.0


class BufferedRelay:
    """One relay."""

    def __init__(self, relays: SocketRelays, client_id: str, node_id: str) -> None:
        self.client_id = client_id
        self.node_id = node_id
        #: the protocols of its two transports
        self.client = RelayEnd(self)
        self.node = RelayEnd(self)
        self.client.other, self.node.other = self.node, self.client
        self.relays = relays
        self._timer: Timer | None = None

    def start(self, to_client: bytes, to_node: bytes) -> None:
        """Both ends have their transports; ``to_client`` and ``to_node`` are what came before."""
        for end, other, data in ((self.client, self.node, to_client), (self.node, self.client, to_node)):
            if not end.is_lost:
                end.transport.registerProducer(other, True)
                end.transport.write(data)
        for end in (self.client, self.node):
            if end.is_lost:
                self._finish_other(end)
            else:
                end.transport.resumeProducing()
        # Not now: it may be called while one of them reads.
        self.relays.reactor.callLater(0, self._try_splice)

    def _try_splice(self) -> None:
        """Become two rows, if both ends are sockets."""
        whole = not any(end.is_lost or end.is_finished for end in (self.client, self.node))
        try:
            if whole and self.relays.splice(self, self.client.transport, self.node.transport):
                self._detach()
        except Exception:  # noqa: BLE001
            self.relays.error_log.failure("an error in beginning a relay")
            self.abort()

    def _detach(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for end in (self.client, self.node):
            end.detach()

    def end_lost(self, end: RelayEnd) -> None:
        """The transport of an end is gone."""
        if end.other is None:
            return
        if end.other.is_lost:
            self._detach()
            self.relays.remove(self)
        else:
            self._finish_other(end)

    def _finish_other(self, end: RelayEnd) -> None:
        if end.other is not None:
            end.other.finish()
        self.start_close_timer()

    def start_close_timer(self) -> None:
        """From here on it has so many seconds."""
        if self._timer is None:
            self._timer = self.relays.timers.call_later(CLOSE_TIMEOUT, self._close_timed_out)

    def _close_timed_out(self) -> None:
        self.abort()

    def close(self) -> None:
        """What is under way arrives, then the end."""
        for end in (self.client, self.node):
            if not end.is_lost:
                end.finish()
        self.start_close_timer()

    def abort(self) -> None:
        """Drop both ends."""
        for end in (self.client, self.node):
            end.abort()
        if self.client.is_lost and self.node.is_lost:
            self._detach()
            self.relays.remove(self)


@implementer(IPushProducer, IFileDescriptorReceiver)
class RelayEnd(Protocol):
    """One of the two transports; what comes from it is for the other."""

    #: there is one from before :meth:`Pipe.go`
    transport: Any = None
    #: it is gone
    is_lost = False
    #: nothing more is to be sent to it
    is_finished = False

    def __init__(self, relay: BufferedRelay) -> None:
        self._relay: BufferedRelay | None = relay
        self.other: RelayEnd | None = None
        self._timer: Timer | None = None

    def dataReceived(self, data: bytes) -> None:
        """Bytes came."""
        other = self.other
        if other is not None and not other.is_finished and not other.is_lost:
            write_now(other.transport, data)

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """A file came over a UNIX socket."""
        os.close(descriptor)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The transport is gone."""
        self.is_lost = True
        self._stop_loss_check()
        if self._relay is not None:
            self._relay.end_lost(self)

    def finish(self) -> None:
        """Send what is left, and then the end."""
        if self.is_finished:
            return
        self.is_finished = True
        self.transport.unregisterProducer()
        if plain_transport(self.transport) is not None:
            self.transport.loseWriteConnection()
        else:
            self.transport.loseConnection()
        # Its own end is to be seen.
        self.resumeProducing()

    def abort(self) -> None:
        """Drop it at once."""
        if self.transport is None:
            self.is_lost = True
        elif not self.is_lost:
            self.transport.abortConnection()

    def detach(self) -> None:
        """It has done its work."""
        self._stop_loss_check()
        self._relay = self.other = self.transport = None

    # What the transport at the other end, whose producer it is, asks for.

    def pauseProducing(self) -> None:
        """Read no more."""
        if not self.is_finished and not self.is_lost:
            self.transport.pauseProducing()
            if self._timer is None and self._relay is not None:
                self._timer = self._relay.relays.timers.call_later(LOSS_CHECK_INTERVAL, self._check_loss)

    def resumeProducing(self) -> None:
        """Go on."""
        self._stop_loss_check()
        if not self.is_lost:
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """The other end is gone."""

    def _stop_loss_check(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_loss(self) -> None:
        """Twisted does not see the end of a transport that is not read; the other side may take nothing for ever."""
        self._timer = None
        poll = select.poll()
        poll.register(self.transport.fileno(), 0)
        if poll.poll(0):
            self.abort()
        elif self._relay is not None:
            self._timer = self._relay.relays.timers.call_later(LOSS_CHECK_INTERVAL, self._check_loss)


#: How many sockets are looked at in one turn of the reactor, and for how long, in seconds; and how much is read from
#: one of them at once, in bytes. See gateway/clients/parked.py.
MAX_EVENTS, MAX_ITERATION_TIME, READ_SIZE = 512, 0.01, 65536

_IN, _OUT, _HUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR
#: stands where an fd has its events that is not registered with the epoll
_UNREGISTERED = 128

# What is known of a socket.
#: it is a client's, not another node's
_CLIENT = 1
#: nothing more comes from it
_EOF_RECEIVED = 2
#: nothing more is to be sent to it than what waits
_EOF_PENDING = 4
#: nothing more can be sent to it
_EOF_SENT = 8


@implementer(IReadDescriptor)
class SocketRelays:
    """All relays of one node."""

    def __init__(self, reactor: Any, metrics: Metrics) -> None:
        self.reactor: Any = reactor
        self._metrics = metrics
        self._reactor: IReactorFDSet = reactor
        self._clock: Callable[[], float] = reactor.seconds
        self.timers = TimerWheel(reactor)
        self.error_log = RateLimitedLogger(reactor.seconds)
        self._epoll = select.epoll()
        #: what the epoll told of and was not looked at yet, the next one last; the fds that were closed since
        self._events: list[tuple[int, int]] = []
        self._closed: set[int] = set()
        #: client_id -> the fd of its socket, or its pipe
        self._by_client: dict[str, int | BufferedRelay] = {}
        self._buffered: dict[BufferedRelay, None] = {}
        self._spliced = 0
        #: fd -> what it is still to be sent
        self._unsent: dict[int, bytes] = {}
        #: client's fd -> when both are closed, whatever is left to be sent
        self._close_timers: dict[int, Timer] = {}
        # The columns. Each has an entry for every file descriptor up to the highest that there ever was.
        #: the other socket of the relay, -1 where there is none
        self._partners = array("i")
        #: who is at its other end: a client_id, or a node_id
        self._endpoint_ids: list[str | None] = []
        self._flags = bytearray()
        #: the events for which it is registered
        self._interest = bytearray()

    # In and out.

    def start(self) -> None:
        """Begin to read."""
        self._reactor.addReader(self)

    def stop(self) -> None:
        """End all relays at once, and begin no more."""
        self._reactor.removeReader(self)
        for pipe in list(self._buffered):
            pipe.abort()
        for fd in self._client_fds():
            self._close_now(fd)
        self._epoll.close()

    def create(self, client_id: str, node_id: str) -> BufferedRelay:
        """A relay of a client to a node, for whose two ends transports are to be had at once: then it goes
        (:meth:`Pipe.go`), or is aborted."""
        self._metrics.relayed += 1
        pipe = BufferedRelay(self, client_id, node_id)
        self._buffered[pipe] = None
        self._replace(client_id, pipe)
        return pipe

    def _replace(self, client_id: str, relay: int | BufferedRelay) -> None:
        older = self._by_client.get(client_id)
        self._by_client[client_id] = relay
        # Its node has told that one that it is replaced, or does so now, and waits no longer than this.
        if isinstance(older, BufferedRelay):
            older.start_close_timer()
        elif older is not None:
            self._start_close_timer(older)

    def remove(self, relay: BufferedRelay) -> None:
        """A pipe is over."""
        self._buffered.pop(relay, None)
        if self._by_client.get(relay.client_id) is relay:
            del self._by_client[relay.client_id]

    def splice(self, relay: BufferedRelay, client: Any, node: Any) -> bool:
        """Take the sockets of a pipe's transports. ``False``, and nothing is changed, where that cannot be done."""
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
            # The kernel watches no more files, or this node ends.
            for fd in registered:
                self._epoll.unregister(fd)
            return False
        near, far = fds
        for fd, other, name, flags, transport in (
            (near, far, relay.client_id, _CLIENT, client),
            (far, near, relay.node_id, 0, node),
        ):
            _, unsent = detach_socket(transport)
            self._partners[fd] = other
            self._endpoint_ids[fd] = name
            self._flags[fd] = flags
            self._interest[fd] = _IN
            if unsent:
                self._unsent[fd] = unsent
        self._spliced += 1
        if self._by_client.get(relay.client_id) is relay:
            self._by_client[relay.client_id] = near
        else:
            self._start_close_timer(near)
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

    # What it is asked.

    def count(self) -> int:
        """How many relays there are."""
        return self._spliced + len(self._buffered)

    def endpoints(self) -> list[tuple[str, str]]:
        """The client_id and the node_id of each, as a new list. A client can be there twice for a moment."""
        found = [(pipe.client_id, pipe.node_id) for pipe in self._buffered]
        found += [
            (self._endpoint_ids[fd] or "", self._endpoint_ids[self._partners[fd]] or "") for fd in self._client_fds()
        ]
        return found

    def client_ids(self) -> list[str]:
        """Whose connections they are, as a new list."""
        return [client_id for client_id, _ in self.endpoints()]

    def _client_fds(self) -> list[int]:
        if not self._spliced:
            return []
        return [fd for fd, flags in enumerate(self._flags) if flags & _CLIENT]

    # Ends.

    def close(self, client_id: str) -> bool:
        """End the relay of a client: what is under way arrives, then the end. ``False`` if there is none."""
        relay = self._by_client.get(client_id)
        if isinstance(relay, BufferedRelay):
            relay.close()
        elif relay is not None:
            self._guarded(self._close_gracefully, relay)
        return relay is not None

    def close_all_to(self, node_id: str) -> None:
        """End all relays to a node that is gone."""
        for pipe in list(self._buffered):
            if pipe.node_id == node_id:
                pipe.close()
        for fd in self._client_fds():
            if self._endpoint_ids[self._partners[fd]] == node_id:
                self._guarded(self._close_gracefully, fd)

    def _close_gracefully(self, fd: int) -> None:
        self._start_close_timer(fd)
        for one in (fd, self._partners[fd]):
            # What was said last is most likely why it ends.
            if self._interest[one] & _IN:
                self._read(one)
            if self._partners[fd] < 0:
                return
        for one in (fd, self._partners[fd]):
            self._finish_writing(one)
        self._update_pair(fd)

    def _start_close_timer(self, fd: int) -> None:
        """From here on it has so many seconds."""
        near = fd if self._flags[fd] & _CLIENT else self._partners[fd]
        if near not in self._close_timers:
            self._close_timers[near] = self.timers.call_later(CLOSE_TIMEOUT, partial(self._close_now, near))

    def _finish_writing(self, fd: int) -> None:
        """Nothing more is sent to a socket than what waits for it."""
        self._flags[fd] |= _EOF_PENDING
        if fd not in self._unsent and not self._flags[fd] & _EOF_SENT:
            self._flags[fd] |= _EOF_SENT
            half_close_socket(fd)

    def _eof_received(self, fd: int) -> None:
        """Nothing more comes from a socket."""
        self._flags[fd] |= _EOF_RECEIVED
        self._start_close_timer(fd)
        self._finish_writing(self._partners[fd])
        self._update_pair(fd)

    def _write_failed(self, fd: int) -> None:
        """Nothing more can be sent to a socket. What it had said before may still be read."""
        self._flags[fd] |= _EOF_PENDING | _EOF_SENT
        self._unsent.pop(fd, None)
        self._start_close_timer(fd)
        self._update_pair(fd)

    def _update_pair(self, fd: int) -> None:
        """Something has changed: watch for what is to be expected now, or close both."""
        other = self._partners[fd]
        if self._flags[fd] & self._flags[other] & _EOF_RECEIVED and self._flags[fd] & self._flags[other] & _EOF_SENT:
            self._close_now(fd)
        else:
            self._update_interest(fd)
            self._update_interest(other)

    def _close_now(self, fd: int) -> None:
        other = self._partners[fd]
        near = fd if self._flags[fd] & _CLIENT else other
        name = self._endpoint_ids[near]
        if name is not None and self._by_client.get(name) == near:
            del self._by_client[name]
        timer = self._close_timers.pop(near, None)
        if timer is not None:
            timer.cancel()
        self._spliced -= 1
        for one in (fd, other):
            if self._interest[one] != _UNREGISTERED:
                # Before the socket is closed: its number may be somebody else's then.
                with contextlib.suppress(OSError):
                    self._epoll.unregister(one)
            self._partners[one] = -1
            self._endpoint_ids[one] = None
            self._flags[one] = self._interest[one] = 0
            self._unsent.pop(one, None)
            self._closed.add(one)
            os.close(one)

    # Bytes.

    def fileno(self) -> int:
        """The file that the reactor is to watch."""
        return self._epoll.fileno()

    def logPrefix(self) -> str:
        """How Twisted names it."""
        return "relays"

    def connectionLost(self, reason: Failure) -> None:
        """Twisted says so to all that it watches when it ends."""

    def doRead(self) -> None:
        """Something is to be done for some of the sockets."""
        began = self._clock()
        if not self._events:
            self._closed.clear()
            self._events = self._epoll.poll(0, MAX_EVENTS)
            self._events.reverse()
        # Those that are left are still as they are: the reactor comes back for them.
        while self._events and self._clock() - began < MAX_ITERATION_TIME:
            fd, event = self._events.pop()
            # One that was closed since the epoll told of it may be another relay's by now.
            if fd not in self._closed:
                self._guarded(self._handle, fd, event)

    def _guarded(self, handle: Callable[..., None], fd: int, *args: int) -> None:
        """What escapes would make the reactor drop all relays, and what is not handled would come again for ever."""
        try:
            handle(fd, *args)
        except Exception:  # noqa: BLE001
            self.error_log.failure("an error in relaying")
            if self._partners[fd] >= 0:
                self._close_now(fd)

    def _handle(self, fd: int, event: int) -> None:
        if self._interest[fd] & _IN:
            if event & (_IN | _HUP):
                self._read(fd)
        elif event & _HUP and fd not in self._unsent:
            # It is lost, while what it said before waits for the other side. Then the rest is read.
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
            # It was reset. The other side gets what it said before, and an end.
            data = b""
        if not data:
            self._eof_received(fd)
            return
        other = self._partners[fd]
        if self._flags[other] & _EOF_PENDING:
            # Swallowed: a socket that is closed with bytes unread is reset, and what was sent to it is lost.
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
        """Send what waits for a socket."""
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
        """Be told of what can be done with a socket now, and of nothing else."""
        ended = self._flags[fd] & _EOF_RECEIVED
        wanted = 0 if ended or self._partners[fd] in self._unsent else _IN
        if fd in self._unsent:
            wanted |= _OUT
        had = self._interest[fd]
        if had == _UNREGISTERED:
            if not wanted:
                return
            self._epoll.register(fd, wanted)
        elif wanted == had:
            return
        elif wanted or not ended:
            self._epoll.modify(fd, wanted)
        else:
            # The kernel tells of the end of a socket for as long as it is registered.
            self._epoll.unregister(fd)
            wanted = _UNREGISTERED
        self._interest[fd] = wanted
