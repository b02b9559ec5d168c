"""Look-ups by client_id: those that wait for their turn go as one statement."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from gateway.registry.interface import RegistryUnavailable

#: the most client_ids of one statement
MOST = 200

T = TypeVar("T")


class LookUps(Generic[T]):
    """``submit`` is given a callable that makes the next statement when its turn has come; ``find`` carries it out in
    a thread: what was found, by client_id."""

    def __init__(
        self,
        submit: Callable[[Callable[[], Callable[[Any], dict[str, T]]]], Deferred[dict[str, T] | None]],
        find: Callable[[Any, list[str]], dict[str, T]],
    ) -> None:
        self._submit = submit
        self._find = find
        self._waiting: dict[str, list[Deferred[T | None]]] = {}
        self._taken: dict[str, list[Deferred[T | None]]] = {}
        self._submitted = False

    def find(self, client_id: str) -> Deferred[T | None]:
        """What there is of a client, or ``None``."""
        waiting = self._waiting.setdefault(client_id, [])
        deferred: Deferred[T | None] = Deferred(waiting.remove)
        waiting.append(deferred)
        self._next()
        return deferred

    def _next(self) -> None:
        if self._waiting and not self._submitted:
            self._submitted = True
            self._submit(self._compose).addCallbacks(self._found, self._failed)

    def _compose(self) -> Callable[[Any], dict[str, T]]:
        asked = list(islice(self._waiting, MOST))
        self._taken = {client_id: self._waiting.pop(client_id) for client_id in asked}
        return lambda connection: self._find(connection, asked)

    def _found(self, found: dict[str, T] | None) -> None:
        taken, self._taken = self._taken, {}
        self._submitted = False
        for client_id, waiting in taken.items():
            while waiting:
                waiting.pop(0).callback((found or {}).get(client_id))
        self._next()

    def _failed(self, failure: Failure) -> None:
        # Whoever is behind them would wait as long for the same answer.
        waiting = [*self._taken.values(), *self._waiting.values()]
        self._taken, self._waiting = {}, {}
        self._submitted = False
        for each in waiting:
            while each:
                each.pop(0).errback(RegistryUnavailable(failure.getErrorMessage()))
