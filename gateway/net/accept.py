"""Limit connections accepted per reactor iteration, and back off when file descriptors run out.

Twisted's reactor handles everything that is ready in one iteration, and a listening port accepts all waiting
connections at once, a hundred or more. In a connection storm, messages on established connections would wait behind
these accepts and then behind the opening handshakes: up to half a second.

:class:`HandshakePoller` polls listening ports and connections in handshake in a separate epoll with low priority. An
epoll is itself a file descriptor that can be polled, so the reactor watches only that one, and handles few of its
events per iteration; more while there are no calls, which costs less CPU for each.

    listening port, and connections that it accepts    this epoll
    open connection                                    released: parked (clients/parked.py), or left to the reactor

:class:`AcceptLimiter` makes ports accept one connection per iteration, and pause when accept() fails for lack of file
descriptors. Such a connection stays in the listen queue and keeps the listening socket readable, so a reactor that only
retries spins. Twisted instead accepts these connections with a reserved descriptor and closes them at once, with three
log lines each; the clients reconnect as fast as they can. A pause is better for clients: descriptors are scarce while
many arrive at once, handshakes that fail end within seconds, and the waiting connections then get in. A closed client
would start again and prolong the rush. If the shortage lasts, the listen queue fills up, the kernel stops answering
new connections, and the connect timeouts of clients direct them to other nodes.

The client endpoints leave the last file descriptors to backends, health checks and the registry.
"""

from __future__ import annotations

import errno
import math
import os
import select
from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IDelayedCall,
    IHalfCloseableDescriptor,
    IListeningPort,
    IReactorFDSet,
    IReadDescriptor,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.settings import open_file_limit
from gateway.util.log import LogLimiter

#: maximum number of events handled per reactor iteration
MAX_EVENTS = 16
#: the same while there are no calls
MAX_EVENTS_WHEN_IDLE = 256
#: maximum time spent on them per reactor iteration, in seconds
MAX_DURATION = 0.002
#: the same while there are no calls
MAX_DURATION_WHEN_IDLE = 0.02
#: time since the last call after which the node is considered idle, in seconds
IDLE_AFTER = 0.05

_HANGUP = select.EPOLLHUP | select.EPOLLERR


@implementer(IReadDescriptor)
class HandshakePoller:
    """Poll ports and transports in place of the reactor. All other attributes are those of the reactor."""

    _log = Logger()

    def __init__(self, reactor: Any, call_count: Callable[[], int] = lambda: 0) -> None:
        """``call_count`` returns the total number of calls so far."""
        self._reactor: IReactorFDSet = reactor
        self._call_count = call_count
        self._last_call_count = 0
        self._idle_at = -math.inf
        self._epoll = select.epoll()
        #: watched selectables by file descriptor
        self._selectables: dict[int, Any] = {}
        #: events that each is watched for, by file descriptor
        self._event_masks: dict[int, int] = {}
        self._clock = reactor.seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def start(self) -> None:
        """Start polling."""
        self._reactor.addReader(self)

    def stop(self) -> None:
        """Stop polling. Remaining selectables get no more events."""
        self._reactor.removeReader(self)
        self._epoll.close()
        self._selectables.clear()
        self._event_masks.clear()

    def is_idle(self) -> bool:
        """Return whether there were no calls for :data:`IDLE_AFTER` seconds, which would otherwise be delayed."""
        calls = self._call_count()
        if calls != self._last_call_count:
            self._last_call_count = calls
            self._idle_at = self._clock() + IDLE_AFTER
            return False
        return bool(self._clock() >= self._idle_at)

    def adopt_port(self, port: Any) -> None:
        """Poll a listening port, and connections that it accepts from now on. The port must be reading."""
        port.stopReading()
        port.reactor = self
        port.startReading()

    def release(self, transport: Any) -> None:
        """Return a transport to the reactor."""
        if transport.reactor is not self:
            return
        watched = self._event_masks.get(transport.fileno(), 0)
        self._update_events(transport, watched, 0)
        transport.reactor = self._reactor
        if watched & select.EPOLLIN:
            self._reactor.addReader(transport)
        if watched & select.EPOLLOUT:
            self._reactor.addWriter(transport)

    # The part of IReactorFDSet that transports use.

    def addReader(self, reader: Any) -> None:
        self._update_events(reader, 0, select.EPOLLIN)

    def addWriter(self, writer: Any) -> None:
        self._update_events(writer, 0, select.EPOLLOUT)

    def removeReader(self, reader: Any) -> None:
        self._update_events(reader, select.EPOLLIN, 0)

    def removeWriter(self, writer: Any) -> None:
        self._update_events(writer, select.EPOLLOUT, 0)

    def _update_events(self, selectable: Any, remove: int, add: int) -> None:
        fd = selectable.fileno()
        if fd == -1:
            # The selectable is already closed.
            fd = next((number for number, other in self._selectables.items() if other is selectable), -1)
        before = self._event_masks.get(fd, 0)
        after = before & ~remove | add
        if fd == -1 or after == before:
            return
        if not after:
            del self._event_masks[fd], self._selectables[fd]
            self._epoll.unregister(fd)
            return
        if before:
            self._epoll.modify(fd, after)
        else:
            self._epoll.register(fd, after)
        self._event_masks[fd] = after
        self._selectables[fd] = selectable

    # IReadDescriptor: the reactor watches the epoll.

    def fileno(self) -> int:
        return self._epoll.fileno()

    def logPrefix(self) -> str:
        return "handshakes"

    def connectionLost(self, reason: Failure) -> None:
        """Do nothing: the reactor calls this on every descriptor that it watches when it stops."""

    def doRead(self) -> None:
        """Handle ready selectables, up to a number and a duration."""
        started_at = self._clock()
        max_events, max_duration = MAX_EVENTS, MAX_DURATION
        if self.is_idle():
            max_events, max_duration = MAX_EVENTS_WHEN_IDLE, MAX_DURATION_WHEN_IDLE
        for fd, event in self._epoll.poll(0, max_events):
            selectable = self._selectables.get(fd)
            if selectable is not None:
                self._dispatch(selectable, event)
            if self._clock() - started_at > max_duration:
                # The others are still ready: the reactor calls again.
                break

    def _dispatch(self, selectable: Any, event: int) -> None:
        """Do what Twisted's reactors do for a selectable that is ready."""
        reason: BaseException | None = None
        in_read = False
        try:
            if event & _HANGUP and not event & select.EPOLLIN:
                in_read = bool(self._event_masks.get(selectable.fileno(), 0) & select.EPOLLIN)
                reason = ConnectionDone() if in_read else ConnectionLost()
            else:
                if event & select.EPOLLIN:
                    reason = selectable.doRead()
                    in_read = True
                if not reason and event & select.EPOLLOUT:
                    reason = selectable.doWrite()
                    in_read = False
        except Exception as e:  # noqa: BLE001 - an error ends this connection, not the others
            self._log.failure("an error in a connection")
            reason = e
        if reason:
            self._disconnect(selectable, reason, in_read)

    def _disconnect(self, selectable: Any, reason: BaseException, in_read: bool) -> None:
        self.removeReader(selectable)
        try:
            if in_read and isinstance(reason, ConnectionDone) and IHalfCloseableDescriptor.providedBy(selectable):
                selectable.readConnectionLost(Failure(reason))
            else:
                self.removeWriter(selectable)
                selectable.connectionLost(Failure(reason))
        except Exception:  # noqa: BLE001
            self._log.failure("an error while a connection was closed")


#: how long a port accepts nothing after accept() failed for lack of file descriptors, in seconds
ACCEPT_PAUSE = 0.25
#: maximum number of connections that a port accepts per reactor iteration while there are no calls; otherwise 1
MAX_ACCEPTS_WHEN_IDLE = 64
#: minimum time between two log lines about a shortage, in seconds
LOG_INTERVAL = 10.0

#: the reason that is counted if the remaining file descriptors are reserved for other endpoints
RESERVE = "reserve"

_RAISE_PROCESS_LIMIT = "raise LimitNOFILE or `ulimit -n` (it is {limit}), or lower --capacity"
_REDUCE_MEMORY = "the system is short of memory: lower --capacity, or start nodes on other machines"
#: errno of accept() for lack of file descriptors or memory, or RESERVE -> remedy
_REMEDIES = {
    RESERVE: _RAISE_PROCESS_LIMIT,
    "EMFILE": _RAISE_PROCESS_LIMIT,
    "ENFILE": "raise the system's limit, fs.file-max, or lower --capacity",
    "ENOBUFS": _REDUCE_MEMORY,
    "ENOMEM": _REDUCE_MEMORY,
}
_SHORTAGE_ERRNOS: dict[int | None, str] = {getattr(errno, name): name for name in _REMEDIES if name != RESERVE}


class AcceptLimiter:
    """Throttle the listening ports of a node, and report a shortage of file descriptors."""

    _log = Logger()

    def __init__(self, clock: Any, metrics: Metrics, poller: HandshakePoller | None = None) -> None:
        """``poller`` adopts the ports that reserve files for others: those of clients."""
        self._poller = poller
        self.clock = clock
        self._metrics = metrics
        self._log_limiter = LogLimiter(clock.seconds, LOG_INTERVAL)

    def throttle(self, ports: Iterable[IListeningPort], reserved_files: int = 0) -> None:
        """Throttle ports, and pause them while fewer than ``reserved_files`` more files can be opened.

        A port without a socket of its own is left unchanged, whatever kind of endpoint it belongs to.
        """
        # Relies on Twisted's ports: they call port.socket.accept() until that raises EAGAIN.
        for port in ports:
            if hasattr(port, "socket") and hasattr(port, "stopReading"):
                port.socket = ThrottledSocket(self, port, reserved_files)
                if reserved_files and self._poller is not None:
                    self._poller.adopt_port(port)

    def is_idle(self) -> bool:
        """Return whether no calls would be delayed by accepting more connections."""
        return self._poller is not None and self._poller.is_idle()

    def record_shortage(self, reason: str) -> None:
        """Count one failed accept, and log it at most every :data:`LOG_INTERVAL` seconds.

        ``reason`` is the name of an errno, or :data:`RESERVE`.
        """
        self._metrics.accept_errors[reason] += 1
        suppressed = self._log_limiter.allow()
        if suppressed is None:
            return
        self._log.warn(
            "no file descriptor for a new connection ({reason}; {suppressed} more times since this was last logged), "
            "so new connections wait: {remedy}",
            reason=reason,
            suppressed=suppressed,
            remedy=_REMEDIES[reason].format(limit=open_file_limit()),
        )


class ThrottledSocket:
    """Listening socket of a port, with a throttled :meth:`accept`. Other attributes are those of the real socket."""

    def __init__(self, limiter: AcceptLimiter, port: Any, reserved_files: int) -> None:
        self._limiter = limiter
        self._port = port
        self._socket = port.socket
        # A new file gets the lowest free number.
        self._max_fd = open_file_limit() - reserved_files if reserved_files else math.inf
        self._pause_timer: IDelayedCall | None = None
        self._accepted_in_iteration = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def accept(self) -> Any:
        """Accept one connection.

        Raises EAGAIN, as if no connection were waiting, at the limit of this reactor iteration and for lack of file
        descriptors.
        """
        if self._accepted_in_iteration >= (MAX_ACCEPTS_WHEN_IDLE if self._limiter.is_idle() else 1):
            # The port calls until it gets EAGAIN; the next iteration accepts more.
            self._accepted_in_iteration = 0
            raise _would_block()
        try:
            if self._next_fd() < self._max_fd:
                accepted = self._socket.accept()
                self._accepted_in_iteration += 1
                return accepted
            reason = RESERVE
        except OSError as e:
            if e.errno not in _SHORTAGE_ERRNOS:
                raise
            reason = _SHORTAGE_ERRNOS[e.errno]
        self._pause()
        self._limiter.record_shortage(reason)
        raise _would_block()

    def _next_fd(self) -> float:
        if self._max_fd == math.inf:
            return 0
        fd = os.dup(self._socket.fileno())
        os.close(fd)
        return fd

    def _pause(self) -> None:
        self._port.stopReading()
        if self._pause_timer is None:
            self._pause_timer = self._limiter.clock.callLater(ACCEPT_PAUSE, self._resume)

    def _resume(self) -> None:
        self._pause_timer = None
        # A port that stops listening is closed in a later reactor iteration.
        if not self._port.disconnecting:
            self._port.startReading()

    def close(self) -> None:
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None
        self._socket.close()


def _would_block() -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
