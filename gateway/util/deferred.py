"""Deferreds that several callers share."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

T = TypeVar("T")


def detached(source: Deferred[T]) -> Deferred[T]:
    """Return a Deferred that fires as ``source`` does, and whose cancelling does not cancel ``source``."""
    copy: Deferred[T] = Deferred()

    def fired(result: T | Failure) -> T | Failure:
        copy.callback(result)
        return result

    source.addBoth(fired)
    return copy


class Observers(Generic[T]):
    """Deferreds that fire together. Cancelling one removes it; the others are not affected."""

    def __init__(self) -> None:
        self._observers: list[Deferred[T]] = []

    def __len__(self) -> int:
        return len(self._observers)

    def observe(self) -> Deferred[T]:
        """Return a new Deferred, which fires with the next :meth:`callback` or :meth:`errback`."""
        observer: Deferred[T] = Deferred(self._remove)
        self._observers.append(observer)
        return observer

    def callback(self, value: T) -> None:
        """Fire the current observers with ``value``."""
        observers, self._observers[:] = self._observers[:], []
        for observer in observers:
            if not observer.called:  # a callback may have cancelled another observer
                observer.callback(value)

    def errback(self, error: Exception) -> None:
        """Fail the current observers with ``error``."""
        observers, self._observers[:] = self._observers[:], []
        for observer in observers:
            if not observer.called:
                observer.errback(error)

    def _remove(self, observer: Deferred[T]) -> None:
        # An observer that is about to be fired is no longer in the list.
        if observer in self._observers:
            self._observers.remove(observer)


class KeyedLocks:
    """Locks by key, each first come, first served. A lock takes memory only while it is held.

    A lock is passed on in the next reactor iteration, so that what its holder does after the release, such as sending a
    response, comes before all that the next one does.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        #: the keys of the locks that are held, with what waits for each
        self.held: dict[Hashable, deque[Deferred[None]]] = {}

    def acquire(self, key: Hashable) -> Deferred[None]:
        """Fire when the lock is held by the caller: at once if it was free. Cancelling it leaves the line."""
        waiters = self.held.get(key)
        if waiters is None:
            self.held[key] = deque()
            return succeed(None)
        waiter: Deferred[None] = Deferred(waiters.remove)
        waiters.append(waiter)
        return waiter

    def release(self, key: Hashable) -> None:
        """Pass the lock on to the next in line, if there is one."""
        if self.held[key]:
            self._clock.callLater(0, self._pass_on, key)
        else:
            del self.held[key]

    def _pass_on(self, key: Hashable) -> None:
        waiters = self.held[key]
        if waiters:
            waiters.popleft().callback(None)
        else:
            del self.held[key]
