"""Several that wait for one thing."""

from __future__ import annotations

from typing import Generic, TypeVar

from twisted.internet.defer import Deferred

T = TypeVar("T")


class Observers(Generic[T]):
    """Deferreds that fire together. One that is cancelled waits no longer."""

    def __init__(self) -> None:
        self._observers: list[Deferred[T]] = []

    def observe(self) -> Deferred[T]:
        """A new Deferred for the next :meth:`fire` or :meth:`fail`."""
        waiter: Deferred[T] = Deferred(self._remove)
        self._observers.append(waiter)
        return waiter

    def callback(self, value: T) -> None:
        """Fire all that wait now."""
        waiting, self._observers[:] = self._observers[:], []
        for waiter in waiting:
            if not waiter.called:  # one of them may have cancelled another
                waiter.callback(value)

    def errback(self, error: Exception) -> None:
        """Fail all that wait now."""
        waiting, self._observers[:] = self._observers[:], []
        for waiter in waiting:
            if not waiter.called:
                waiter.errback(error)

    def _remove(self, observer: Deferred[T]) -> None:
        # One that is about to be fired is no longer in the list.
        if observer in self._observers:
            self._observers.remove(observer)
