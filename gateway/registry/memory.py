"""A registry in memory, for tests: the real one on an SQLite database that is no file, without threads.

Everything but claims and releases is done at once, within the call; claims and releases at the next turn of the clock.
The database's clock is the clock that is given, from a fixed day on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar

from twisted.enterprise import adbapi
from twisted.internet.defer import Deferred, execute
from twisted.internet.interfaces import IReactorTime
from twisted.python.reflect import namedModule
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.registry.interface import IRegistry
from gateway.registry.job_queue import Lane, Turn, Work
from gateway.registry.sql import SQLRegistry
from gateway.registry.sqlite import SQLite

T = TypeVar("T")

#: when the clock was 0, in microseconds since 1970
EPOCH = 1_700_000_000_000_000


class InlinePool:
    """As ``adbapi.ConnectionPool`` with one connection, but it does what it is asked within the call."""

    connectionFactory: Callable[[Any], Any] = adbapi.Connection
    reconnect = False

    def __init__(self, module: str, *args: Any, cp_openfun: Callable[[Any], None], **kwargs: Any) -> None:
        self._connect = namedModule(module).connect
        self._args = args
        self._kwargs = {name: value for name, value in kwargs.items() if not name.startswith("cp_")}
        self._prepare = cp_openfun
        self._connection: Any = None

    def connect(self) -> Any:
        """Return the connection, made if there is none."""
        if self._connection is None:
            connection = self._connect(*self._args, **self._kwargs)
            self._prepare(connection)
            self._connection = connection
        return self._connection

    def disconnect(self, connection: Any) -> None:
        """Close the connection."""
        connection.close()
        self._connection = None

    def runWithConnection(self, work: Work[T]) -> Deferred[T]:
        """Do some work."""
        return execute(lambda: work(self.connectionFactory(self)))

    def close(self) -> None:
        """Close the connection if there is one."""
        self.finalClose()

    def finalClose(self) -> None:
        """As ``close``, which calls this."""
        if self._connection is not None:
            self.disconnect(self._connection)


class _Memory(SQLite):
    """A database in memory, which outlives its registries' connections to it."""

    def __init__(self, clock: IReactorTime) -> None:
        super().__init__("the registry in memory", lambda: EPOCH + round(clock.seconds() * 1e6))
        self.connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)


class _MemoryPool(InlinePool):
    """A pool whose only connection is that of a database in memory."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__("sqlite3", cp_openfun=memory.prepare)
        memory.prepare(memory.connection)
        self._connection = memory.connection
        self.available = True

    def disconnect(self, connection: Any) -> None:
        """Keep it: it is the database."""

    def runWithConnection(self, work: Work[T]) -> Deferred[T]:
        """Do some work, or fail as a database would that is away."""
        if self.available:
            return super().runWithConnection(work)
        return execute(_away)


def _away() -> Any:
    raise sqlite3.OperationalError("it is away, as a test wished")


class _HoldingLane(Lane):
    """A lane that can keep claims and releases waiting."""

    held: list[Callable[[], object]] | None = None

    def submit(
        self, turn: Turn, operation: str, make: Callable[[], Work[T] | None], *, quiet: bool = False
    ) -> Deferred[T | None]:
        """As a lane does; but writes wait while they are held."""
        if turn is not Turn.WRITES or self.held is None:
            return super().submit(turn, operation, make, quiet=quiet)
        later: Deferred[T | None] = Deferred()
        self.held.append(lambda: self.submit(turn, operation, make).chainDeferred(later))
        return later


@implementer(IRegistry)
class MemoryRegistry(SQLRegistry):
    """An :class:`~gateway.registry.interface.IRegistry` in memory.

    ``lease`` is in seconds. Two registries, for two nodes, share one database when the second is made ``beside`` the
    first. As with any registry, ``open`` and ``join`` come before the first claim.
    """

    lane_factory = _HoldingLane

    def __init__(self, clock: IReactorTime, lease: float = 15.0, *, beside: MemoryRegistry | None = None) -> None:
        self._memory: _Memory = _Memory(clock) if beside is None else beside._memory
        self._inline = _MemoryPool(self._memory)
        super().__init__(
            self._memory,
            lease=lease,
            reactor=clock,
            metrics=Metrics(),
            monotonic=clock.seconds,
            make_pool=lambda *args, **kwargs: self._inline,
            gather=0.0,
        )

    @property
    def available(self) -> bool:
        """Whether the database answers; while it does not, everything fails with ``RegistryUnavailable``."""
        return self._inline.available

    @available.setter
    def available(self, value: bool) -> None:
        self._inline.available = value
        if value and self._batches is not None:
            self._batches.back()

    def close(self) -> Deferred[None]:
        """As any registry does; what is held goes on."""
        if self._lanes:
            self.let_go()
        return super().close()

    def _holding(self) -> _HoldingLane:
        lane = self._lanes[Turn.WRITES]
        assert isinstance(lane, _HoldingLane)
        return lane

    def hold(self) -> None:
        """Keep claims and releases waiting."""
        lane = self._holding()
        if lane.held is None:
            lane.held = []

    def let_go(self) -> None:
        """Let them go on."""
        lane = self._holding()
        held, lane.held = lane.held or [], None
        for send in held:
            send()
