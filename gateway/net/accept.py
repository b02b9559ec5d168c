"""The sockets of those who are not let in yet, in an epoll of their own: a few of them are seen to in each turn.

A reactor sees to all that is ready in one turn. A thousand clients that come, or give up, at once take a tenth of a
second, in which no call is passed on. Here they wait for each other, and nobody waits for them: an epoll is itself a
file that can be polled, so that the reactor watches that single one. While there are no calls, more of them are seen to
at once: that takes less of the processor for each.

    a listening port, and what it accepts      here
    a connection that was opened               parked (edge/parking.py), or left to the reactor: release()

Accepting connections: few in each turn of the reactor, and what is done when the files run out.

Twisted accepts all that wait at once, a hundred and more. What is said on connections that are open would wait behind
all of them, and then behind their opening handshakes: in a storm of connections for half a second.

A connection that cannot be accepted stays in the listening socket's queue, which makes that socket readable for ever:
a reactor that only tries again does nothing else. Twisted keeps one file in reserve, by which it accepts those who wait
and closes them at once, with three lines in the log each time; they come back as fast as they can.

Here an endpoint that finds no file stops listening to its queue for a moment, and those in it wait. That is better for
clients: files are short while many arrive at once, and an opening handshake that leads to nothing is over in seconds,
so that those who wait get in; who is closed instead has to come again from the start, and brings the rush back. Where
it takes longer, the queue fills up, the kernel no longer answers new connections, and their own time-outs send them
elsewhere.

The clients' endpoints leave the last files to backends, health checks and the registry.
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

#: so many events are seen to in one turn of the reactor, and for so long, in seconds; and while there are no calls
MAX_EVENTS, MAX_DURATION = 16, 0.002
MAX_EVENTS_WHEN_IDLE, MAX_DURATION_WHEN_IDLE = 256, 0.02
#: so long after a call there may be another one, in seconds
IDLE_AFTER = 0.05

_HANGUP = select.EPOLLHUP | select.EPOLLERR


@implementer(IReadDescriptor)
class HandshakePoller:
    """Stands where ports and their transports have the reactor, and is it but for what they read and write."""

    _log = Logger()

    def __init__(self, reactor: Any, call_count: Callable[[], int] = lambda: 0) -> None:
        """``calls`` tells how many there have been."""
        self._reactor: IReactorFDSet = reactor
        self._call_count = call_count
        self._last_call_count = 0
        self._idle_at = -math.inf
        self._epoll = select.epoll()
        #: what is watched, by file descriptor, and for what
        self._selectables: dict[int, Any] = {}
        self._event_masks: dict[int, int] = {}
        self._clock = reactor.seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def start(self) -> None:
        """Begin to look."""
        self._reactor.addReader(self)

    def stop(self) -> None:
        """Look no more; whatever is still here is not heard of again."""
        self._reactor.removeReader(self)
        self._epoll.close()
        self._selectables.clear()
        self._event_masks.clear()

    def is_idle(self) -> bool:
        """Whether there were no calls for a while, that would have to wait."""
        calls = self._call_count()
        if calls != self._last_call_count:
            self._last_call_count = calls
            self._idle_at = self._clock() + IDLE_AFTER
            return False
        return bool(self._clock() >= self._idle_at)

    def adopt_port(self, port: Any) -> None:
        """Have a listening port, and what it accepts from now on, here. It is one of Twisted's, and reads."""
        port.stopReading()
        port.reactor = self
        port.startReading()

    def release(self, transport: Any) -> None:
        """Leave a transport to the reactor."""
        if transport.reactor is not self:
            return
        watched = self._event_masks.get(transport.fileno(), 0)
        self._update_events(transport, watched, 0)
        transport.reactor = self._reactor
        if watched & select.EPOLLIN:
            self._reactor.addReader(transport)
        if watched & select.EPOLLOUT:
            self._reactor.addWriter(transport)

    # IReactorFDSet, as far as transports need it.

    def addReader(self, reader: Any) -> None:
        """Watch for what can be read."""
        self._update_events(reader, 0, select.EPOLLIN)

    def addWriter(self, writer: Any) -> None:
        """Watch for when there is room."""
        self._update_events(writer, 0, select.EPOLLOUT)

    def removeReader(self, reader: Any) -> None:
        """Do so no longer."""
        self._update_events(reader, select.EPOLLIN, 0)

    def removeWriter(self, writer: Any) -> None:
        """Do so no longer."""
        self._update_events(writer, select.EPOLLOUT, 0)

    def _update_events(self, selectable: Any, remove: int, add: int) -> None:
        fd = selectable.fileno()
        if fd == -1:
            # It is closed already.
            fd = next((fd for fd, one in self._selectables.items() if one is selectable), -1)
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

    # What the reactor watches.

    def fileno(self) -> int:
        """The file that the reactor is to watch."""
        return self._epoll.fileno()

    def logPrefix(self) -> str:
        """How Twisted names it."""
        return "newcomers"

    def connectionLost(self, reason: Failure) -> None:
        """Twisted says so to all that it watches when it ends."""

    def doRead(self) -> None:
        """Some of them are ready."""
        began = self._clock()
        most, longest = MAX_EVENTS, MAX_DURATION
        if self.is_idle():
            most, longest = MAX_EVENTS_WHEN_IDLE, MAX_DURATION_WHEN_IDLE
        for fd, event in self._epoll.poll(0, most):
            selectable = self._selectables.get(fd)
            if selectable is not None:
                self._dispatch(selectable, event)
            if self._clock() - began > longest:
                # Those that are left are still ready: the reactor comes back for them.
                break

    def _dispatch(self, selectable: Any, event: int) -> None:
        """What Twisted's own reactors do for what is ready."""
        why: BaseException | None = None
        in_read = False
        try:
            if event & _HANGUP and not event & select.EPOLLIN:
                in_read = bool(self._event_masks.get(selectable.fileno(), 0) & select.EPOLLIN)
                why = ConnectionDone() if in_read else ConnectionLost()
            else:
                if event & select.EPOLLIN:
                    why = selectable.doRead()
                    in_read = True
                if not why and event & select.EPOLLOUT:
                    why = selectable.doWrite()
                    in_read = False
        except Exception as e:  # noqa: BLE001 - whatever it raises is its own end, not that of the others
            self._log.failure("an error in a connection")
            why = e
        if why:
            self._disconnect(selectable, why, in_read)

    def _disconnect(self, selectable: Any, why: BaseException, in_read: bool) -> None:
        self.removeReader(selectable)
        try:
            if in_read and isinstance(why, ConnectionDone) and IHalfCloseableDescriptor.providedBy(selectable):
                selectable.readConnectionLost(Failure(why))
            else:
                self.removeWriter(selectable)
                selectable.connectionLost(Failure(why))
        except Exception:  # noqa: BLE001
            self._log.failure("an error in the end of a connection")


#: how long an endpoint that found no file accepts nothing, in seconds
ACCEPT_PAUSE = 0.25
#: so many are accepted in one turn while there are no calls; else one
MAX_ACCEPTS_WHEN_IDLE = 64
#: the log tells of it once in so many seconds
LOG_INTERVAL = 10.0

#: the word by which it is counted when the files that are left are not for this endpoint
RESERVE = "reserve"

_RAISE_PROCESS_LIMIT = "raise LimitNOFILE or `ulimit -n` (it is {limit}), or lower --capacity"
_REDUCE_MEMORY = "the system is short of memory: lower --capacity, or start nodes elsewhere"
#: what accept() says when there is no file for one more connection -> what to do about it
_REMEDIES = {
    RESERVE: _RAISE_PROCESS_LIMIT,
    "EMFILE": _RAISE_PROCESS_LIMIT,
    "ENFILE": "raise the system's limit, fs.file-max, or lower --capacity",
    "ENOBUFS": _REDUCE_MEMORY,
    "ENOMEM": _REDUCE_MEMORY,
}
_SHORTAGE_ERRNOS: dict[int | None, str] = {getattr(errno, name): name for name in _REMEDIES if name != RESERVE}


class AcceptLimiter:
    """How all endpoints of a node do without files."""

    _log = Logger()

    def __init__(self, clock: Any, metrics: Metrics, poller: HandshakePoller | None = None) -> None:
        """``newcomers`` take the ports of :meth:`guard` that leave files to others: those of clients."""
        self._poller = poller
        self.clock = clock
        self._metrics = metrics
        self._log_limiter = LogLimiter(clock.seconds, LOG_INTERVAL)

    def throttle(self, ports: Iterable[IListeningPort], reserved_files: int = 0) -> None:
        """Let ports wait where they find no file, or only the last ``leave`` of those that the process may open.

        A port that has no socket of its own, of whatever kind of endpoint that is, stays as it is.
        """
        # What is known here of Twisted's ports: they call port.socket.accept() until that raises EAGAIN.
        for port in ports:
            if hasattr(port, "socket") and hasattr(port, "stopReading"):
                port.socket = ThrottledSocket(self, port, reserved_files)
                if reserved_files and self._poller is not None:
                    self._poller.adopt_port(port)

    def is_idle(self) -> bool:
        """Whether nobody has to wait for what comes."""
        return self._poller is not None and self._poller.is_idle()

    def record_shortage(self, reason: str) -> None:
        """Count one failure, and log the first of them in a while. ``reason`` is the name of an errno, or RESERVE."""
        self._metrics.accept_errors[reason] += 1
        untold = self._log_limiter.allow()
        if untold is None:
            return
        self._log.warn(
            "no file for one more connection ({reason}; {untold} times more since this was last said), so new ones "
            "wait: {remedy}",
            reason=reason,
            untold=untold,
            remedy=_REMEDIES[reason].format(limit=open_file_limit()),
        )


class ThrottledSocket:
    """Stands where a port has its listening socket, and is it but for :meth:`accept` and :meth:`close`."""

    def __init__(self, limiter: AcceptLimiter, port: Any, reserved_files: int) -> None:
        self._limiter = limiter
        self._port = port
        self._socket = port.socket
        # A new file has the lowest number that is free.
        self._max_fd = open_file_limit() - reserved_files if reserved_files else math.inf
        self._pause_timer: IDelayedCall | None = None
        self._accepted_in_turn = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def accept(self) -> Any:
        """Accept one connection; raise EAGAIN, as if there were none, after a few, and when there is no file for it."""
        if self._accepted_in_turn >= (MAX_ACCEPTS_WHEN_IDLE if self._limiter.is_idle() else 1):
            # The port asks until it hears this; the others are still there in the next turn.
            self._accepted_in_turn = 0
            raise _would_block()
        try:
            if self._next_fd() < self._max_fd:
                accepted = self._socket.accept()
                self._accepted_in_turn += 1
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
        number = os.dup(self._socket.fileno())
        os.close(number)
        return number

    def _pause(self) -> None:
        self._port.stopReading()
        if self._pause_timer is None:
            self._pause_timer = self._limiter.clock.callLater(ACCEPT_PAUSE, self._resume)

    def _resume(self) -> None:
        self._pause_timer = None
        # A port that was told to stop closes in a later turn of the reactor.
        if not self._port.disconnecting:
            self._port.startReading()

    def close(self) -> None:
        """Close the socket."""
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None
        self._socket.close()


def _would_block() -> BlockingIOError:
    """What says that no connection waits."""
    return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
