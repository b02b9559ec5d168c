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

#: so many events are seen to in one turn of the reactor, and for so long, in seconds; and while there are no calls
MOST_EVENTS, LONGEST_TURN = 16, 0.002
MOST_AT_LEISURE, LONGEST_AT_LEISURE = 256, 0.02
#: so long after a call there may be another one, in seconds
CALM = 0.05

_ENDED = select.EPOLLHUP | select.EPOLLERR


@implementer(IReadDescriptor)
class Newcomers:
    """Stands where ports and their transports have the reactor, and is it but for what they read and write."""

    _log = Logger()

    def __init__(self, reactor: Any, calls: Callable[[], int] = lambda: 0) -> None:
        """``calls`` tells how many there have been."""
        self._reactor: IReactorFDSet = reactor
        self._calls = calls
        self._calls_before = 0
        self._calm_at = -math.inf
        self._epoll = select.epoll()
        #: what is watched, by file descriptor, and for what
        self._selectables: dict[int, Any] = {}
        self._watched: dict[int, int] = {}
        self._seconds = reactor.seconds

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
        self._watched.clear()

    def at_leisure(self) -> bool:
        """Whether there were no calls for a while, that would have to wait."""
        calls = self._calls()
        if calls != self._calls_before:
            self._calls_before = calls
            self._calm_at = self._seconds() + CALM
            return False
        return bool(self._seconds() >= self._calm_at)

    def take(self, port: Any) -> None:
        """Have a listening port, and what it accepts from now on, here. It is one of Twisted's, and reads."""
        port.stopReading()
        port.reactor = self
        port.startReading()

    def release(self, transport: Any) -> None:
        """Leave a transport to the reactor."""
        if transport.reactor is not self:
            return
        watched = self._watched.get(transport.fileno(), 0)
        self._watch(transport, watched, 0)
        transport.reactor = self._reactor
        if watched & select.EPOLLIN:
            self._reactor.addReader(transport)
        if watched & select.EPOLLOUT:
            self._reactor.addWriter(transport)

    # IReactorFDSet, as far as transports need it.

    def addReader(self, reader: Any) -> None:
        """Watch for what can be read."""
        self._watch(reader, 0, select.EPOLLIN)

    def addWriter(self, writer: Any) -> None:
        """Watch for when there is room."""
        self._watch(writer, 0, select.EPOLLOUT)

    def removeReader(self, reader: Any) -> None:
        """Do so no longer."""
        self._watch(reader, select.EPOLLIN, 0)

    def removeWriter(self, writer: Any) -> None:
        """Do so no longer."""
        self._watch(writer, select.EPOLLOUT, 0)

    def _watch(self, selectable: Any, less: int, more: int) -> None:
        fd = selectable.fileno()
        if fd == -1:
            # It is closed already.
            fd = next((fd for fd, one in self._selectables.items() if one is selectable), -1)
        before = self._watched.get(fd, 0)
        after = before & ~less | more
        if fd == -1 or after == before:
            return
        if not after:
            del self._watched[fd], self._selectables[fd]
            self._epoll.unregister(fd)
            return
        if before:
            self._epoll.modify(fd, after)
        else:
            self._epoll.register(fd, after)
        self._watched[fd] = after
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
        began = self._seconds()
        most, longest = MOST_EVENTS, LONGEST_TURN
        if self.at_leisure():
            most, longest = MOST_AT_LEISURE, LONGEST_AT_LEISURE
        for fd, event in self._epoll.poll(0, most):
            selectable = self._selectables.get(fd)
            if selectable is not None:
                self._see_to(selectable, event)
            if self._seconds() - began > longest:
                # Those that are left are still ready: the reactor comes back for them.
                break

    def _see_to(self, selectable: Any, event: int) -> None:
        """What Twisted's own reactors do for what is ready."""
        why: BaseException | None = None
        in_read = False
        try:
            if event & _ENDED and not event & select.EPOLLIN:
                in_read = bool(self._watched.get(selectable.fileno(), 0) & select.EPOLLIN)
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
PAUSE = 0.25
#: so many are accepted in one turn while there are no calls; else one
BURST = 64
#: the log tells of it once in so many seconds
TELL_EVERY = 10.0

#: the word by which it is counted when the files that are left are not for this endpoint
RESERVE = "reserve"

_OF_PROCESS = "raise LimitNOFILE or `ulimit -n` (it is {limit}), or lower --capacity"
_OF_MEMORY = "the system is short of memory: lower --capacity, or start nodes elsewhere"
#: what accept() says when there is no file for one more connection -> what to do about it
_REMEDIES = {
    RESERVE: _OF_PROCESS,
    "EMFILE": _OF_PROCESS,
    "ENFILE": "raise the system's limit, fs.file-max, or lower --capacity",
    "ENOBUFS": _OF_MEMORY,
    "ENOMEM": _OF_MEMORY,
}
_SHORT_OF: dict[int | None, str] = {getattr(errno, name): name for name in _REMEDIES if name != RESERVE}


class Accepting:
    """How all endpoints of a node do without files."""

    _log = Logger()

    def __init__(self, clock: Any, metrics: Metrics, newcomers: Newcomers | None = None) -> None:
        """``newcomers`` take the ports of :meth:`guard` that leave files to others: those of clients."""
        self._newcomers = newcomers
        self.clock = clock
        self._metrics = metrics
        self._told_at = -math.inf
        self._untold = 0

    def guard(self, ports: Iterable[IListeningPort], leave: int = 0) -> None:
        """Let ports wait where they find no file, or only the last ``leave`` of those that the process may open.

        A port that has no socket of its own, of whatever kind of endpoint that is, stays as it is.
        """
        # What is known here of Twisted's ports: they call port.socket.accept() until that raises EAGAIN.
        for port in ports:
            if hasattr(port, "socket") and hasattr(port, "stopReading"):
                port.socket = _Listener(self, port, leave)
                if leave and self._newcomers is not None:
                    self._newcomers.take(port)

    def at_leisure(self) -> bool:
        """Whether nobody has to wait for what comes."""
        return self._newcomers is not None and self._newcomers.at_leisure()

    def short(self, reason: str) -> None:
        """Count one failure, and log the first of them in a while. ``reason`` is the name of an errno, or RESERVE."""
        self._metrics.accept_errors[reason] += 1
        now = self.clock.seconds()
        if now - self._told_at < TELL_EVERY:
            self._untold += 1
            return
        self._told_at, untold, self._untold = now, self._untold, 0
        self._log.warn(
            "no file for one more connection ({reason}; {untold} times more since this was last said), so new ones "
            "wait: {remedy}",
            reason=reason,
            untold=untold,
            remedy=_REMEDIES[reason].format(limit=open_file_limit()),
        )


class _Listener:
    """Stands where a port has its listening socket, and is it but for :meth:`accept` and :meth:`close`."""

    def __init__(self, accepting: Accepting, port: Any, leave: int) -> None:
        self._accepting = accepting
        self._port = port
        self._socket = port.socket
        # A new file has the lowest number that is free.
        self._highest = open_file_limit() - leave if leave else math.inf
        self._waiting: IDelayedCall | None = None
        self._accepted = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def accept(self) -> Any:
        """Accept one connection; raise EAGAIN, as if there were none, after a few, and when there is no file for it."""
        if self._accepted >= (BURST if self._accepting.at_leisure() else 1):
            # The port asks until it hears this; the others are still there in the next turn.
            self._accepted = 0
            raise _none()
        try:
            if self._next_file() < self._highest:
                accepted = self._socket.accept()
                self._accepted += 1
                return accepted
            reason = RESERVE
        except OSError as e:
            if e.errno not in _SHORT_OF:
                raise
            reason = _SHORT_OF[e.errno]
        self._wait()
        self._accepting.short(reason)
        raise _none()

    def _next_file(self) -> float:
        if self._highest == math.inf:
            return 0
        number = os.dup(self._socket.fileno())
        os.close(number)
        return number

    def _wait(self) -> None:
        self._port.stopReading()
        if self._waiting is None:
            self._waiting = self._accepting.clock.callLater(PAUSE, self._go_on)

    def _go_on(self) -> None:
        self._waiting = None
        # A port that was told to stop closes in a later turn of the reactor.
        if not self._port.disconnecting:
            self._port.startReading()

    def close(self) -> None:
        """Close the socket."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        self._socket.close()


def _none() -> BlockingIOError:
    """What says that no connection waits."""
    return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
