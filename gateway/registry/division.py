"""Divide a batch that the database refuses.

A limit of the database, or of a proxy or cluster in front of it, may refuse a batch as a whole, and so may a single
row. A refused batch is halved, and its halves are tried one after the other, until each part is accepted, or is a
single request, which then fails alone: one bad request among N is found after log2(N) refusals.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Generic, TypeVar

from gateway.registry.errors import RegistryRefusedError

#: refusals of parts of one batch, without any that was accepted, after which the database is considered to refuse
#: everything: twice as many as it takes to get from the largest batch to a single request
MAX_REFUSALS = 20
#: batches that are accepted before a limit that was found is tried again
RETRY_LIMIT_AFTER = 1000

T = TypeVar("T")
R = TypeVar("R")


class BatchLimit:
    """The maximum size of a batch: ``maximum``, or less for some time after the database has refused that much."""

    __slots__ = ("_accepted", "_maximum", "value")

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._accepted = 0
        #: the current maximum
        self.value = maximum

    def accepted(self) -> None:
        """Count a batch that was accepted."""
        if self.value < self._maximum:
            self._accepted += 1
            if self._accepted >= RETRY_LIMIT_AFTER:
                self.value = self._maximum

    def refused(self, size: int) -> None:
        """Halve the limit after a batch of this size was refused. A single request that is refused was the cause
        itself."""
        self.value = max(1, min(self.value, size // 2)) if size > 1 else self._maximum
        self._accepted = 0


class Division(Generic[T]):
    """The parts of a refused batch that are still to be tried, in order."""

    __slots__ = ("_refusals", "_rest")

    def __init__(self) -> None:
        #: the next part is the last
        self._rest: list[list[T]] = []
        self._refusals = 0

    def __iter__(self) -> Iterator[T]:
        return (item for part in reversed(self._rest) for item in part)

    def __bool__(self) -> bool:
        return bool(self._rest)

    def accepted(self) -> None:
        """Note that a part was accepted."""
        self._refusals = 0

    def refused(self, part: list[T]) -> bool:
        """Queue the halves of a refused part. Returns ``False`` if so many were refused in a row that the database
        seems to refuse everything."""
        self._refusals += 1
        if self._refusals > MAX_REFUSALS:
            return False
        if len(part) > 1:
            middle = len(part) // 2
            self._rest += [part[middle:], part[:middle]]
        return True

    def next_part(self) -> list[T] | None:
        """Take the next part, or return ``None`` if there is none."""
        return self._rest.pop() if self._rest else None

    def take_all(self) -> list[T]:
        """Take what is left, in order."""
        items = list(self)
        self._rest = []
        return items


async def run_divided(items: list[T], run: Callable[[list[T]], Awaitable[list[R]]]) -> list[R]:
    """Call ``run`` with all items, or, where these are refused, with their parts, and return all results.

    A single item that is refused has no result. Raises the last ``RegistryRefusedError`` if nothing was accepted.
    """
    division: Division[T] = Division()
    part: list[T] | None = items
    results: list[R] = []
    error: RegistryRefusedError | None = None
    accepted = False
    while part is not None:
        try:
            results += await run(part)
        except RegistryRefusedError as e:
            error = e
            if not division.refused(part):
                break
        else:
            accepted = True
            division.accepted()
        part = division.next_part()
    if error is not None and not accepted:
        raise error
    return results
