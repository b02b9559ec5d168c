"""The sockets of those who are not let in yet, in an epoll of their own: a few of them are seen to in each turn.

A reactor sees to all that is ready in one turn. A thousand clients that come, or give up, at once take a tenth of a
second, in which no call is passed on. Here they wait for each other, and nobody waits for them: an epoll is itself a
file that can be polled, so that the reactor watches that single one. While there are no calls, more of them are seen to
at once: that takes less of the processor for each.

    a listening port, and what it accepts      here
    a connection that was opened               parked (edge/parking.py), or left to the reactor: release()
"""

from __future__ import annotations

import math
import select
from collections.abc import Callable
from typing import Any

from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableDescriptor, IReactorFDSet, IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

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
