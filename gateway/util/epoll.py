"""An epoll object inside the reactor: one file descriptor for the reactor, any number of sockets behind it.

    reactor --doRead--> NestedEpoll --_ready(fd, event)--> the subclass, for a bounded number of sockets

An epoll file descriptor is readable while any of its sockets is ready, so ``reactor.addReader`` of one object brings in
all of them, without an object for each (epoll(7)).
"""

from __future__ import annotations

import select
from collections.abc import Callable

from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer


@implementer(IReadDescriptor)
class NestedEpoll:
    """Dispatch the events of an epoll object in slices, so that no reactor iteration takes long.

    A subclass implements :meth:`_ready` and :meth:`_failed`, and may override :meth:`_poll`. Events that are left after
    ``max_duration`` seconds of ``clock`` are dispatched in the next iteration: the subclass must ignore those of
    sockets that it has closed in the meantime.
    """

    def __init__(self, name: str, clock: Callable[[], float], *, max_events: int, max_duration: float) -> None:
        self._name = name
        self._clock = clock
        self._max_events = max_events
        self._max_duration = max_duration
        self._epoll = select.epoll()
        #: when the current iteration, or the last one, began
        self._now = 0.0
        #: (fd, events) that are not dispatched yet, the next one last
        self._pending_events: list[tuple[int, int]] = []

    def fileno(self) -> int:
        """Return the epoll file descriptor."""
        return self._epoll.fileno()

    def logPrefix(self) -> str:
        """Return the name for Twisted's log."""
        return self._name

    def connectionLost(self, reason: Failure) -> None:
        """Do nothing: Twisted calls this for all readers when the reactor stops."""

    def doRead(self) -> None:
        """Dispatch events for at most ``max_duration`` seconds."""
        self._now = self._clock()
        if not self._pending_events:
            self._pending_events = self._poll()
        while self._pending_events and self._clock() - self._now < self._max_duration:
            fd, event = self._pending_events.pop()
            try:
                self._ready(fd, event)
            except Exception:  # noqa: BLE001 (an error that escapes makes the reactor drop this reader)
                self._failed(fd)

    def _poll(self) -> list[tuple[int, int]]:
        """Return up to ``max_events`` events, the first one last."""
        events = self._epoll.poll(0, self._max_events)
        events.reverse()
        return events

    def _ready(self, fd: int, event: int) -> None:
        """Handle one event."""
        raise NotImplementedError

    def _failed(self, fd: int) -> None:
        """Handle an exception that :meth:`_ready` raised; it is the current one."""
        raise NotImplementedError
