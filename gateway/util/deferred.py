"""Several that wait for one thing."""

from __future__ import annotations

from typing import Generic, TypeVar

from twisted.internet.defer import Deferred

T = TypeVar("T")


class Waiters(Generic[T]):
    """Deferreds that fire together. One that is cancelled waits no longer."""

    def __init__(self) -> None:
        self._waiting: list[Deferred[T]] = []

    def wait(self) -> Deferred[T]:
        """A new Deferred for the next :meth:`fire` or :meth:`fail`."""
        waiter: Deferred[T] = Deferred(self._forget)
        self._waiting.append(waiter)
        return waiter

    def fire(self, value: T) -> None:
        """Fire all that wait now."""
        waiting, self._waiting[:] = self._waiting[:], []
        for waiter in waiting:
            if not waiter.called:  # one of them may have cancelled another
                waiter.callback(value)

    def fail(self, error: Exception) -> None:
        """Fail all that wait now."""
        waiting, self._waiting[:] = self._waiting[:], []
        for waiter in waiting:
            if not waiter.called:
                waiter.errback(error)

    def _forget(self, waiter: Deferred[T]) -> None:
        # One that is about to be fired is no longer in the list.
        if waiter in self._waiting:
            self._waiting.remove(waiter)
