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
from gateway.registry.job_queue import JobQueue, Priority, Work
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
        self._prepare_connection = cp_openfun
        self._connection: Any = None

    def connect(self) -> Any:
        """Return the connection, made if there is none."""
        if self._connection is None:
            connection = self._connect(*self._args, **self._kwargs)
            self._prepare_connection(connection)
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


class _MemoryDatabase(SQLite):
    """A database in memory, which outlives its registries' connections to it."""

    def __init__(self, clock: IReactorTime) -> None:
        super().__init__("the registry in memory", lambda: EPOCH + round(clock.seconds() * 1e6))
        self.connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)


class _MemoryPool(InlinePool):
    """A pool whose only connection is that of a database in memory."""

    def __init__(self, database: _MemoryDatabase) -> None:
        super().__init__("sqlite3", cp_openfun=database.prepare)
        database.prepare(database.connection)
        self._connection = database.connection
        self.available = True

    def disconnect(self, connection: Any) -> None:
        """Keep it: it is the database."""

    def runWithConnection(self, work: Work[T]) -> Deferred[T]:
        """Do some work, or fail as a database would that is away."""
        if self.available:
            return super().runWithConnection(work)
        return execute(_raise_unavailable)


def _raise_unavailable() -> Any:
    raise sqlite3.OperationalError("it is away, as a test wished")


class _HoldableJobQueue(JobQueue):
    """A lane that can keep claims and releases waiting."""

    held_submissions: list[Callable[[], object]] | None = None

    def submit(
        self, priority: Priority, operation: str, make_work: Callable[[], Work[T] | None], *, quiet: bool = False
    ) -> Deferred[T | None]:
        """As a lane does; but writes wait while they are held."""
        if priority is not Priority.WRITES or self.held_submissions is None:
            return super().submit(priority, operation, make_work, quiet=quiet)
        later: Deferred[T | None] = Deferred()
        self.held_submissions.append(lambda: self.submit(priority, operation, make_work).chainDeferred(later))
        return later


@implementer(IRegistry)
class MemoryRegistry(SQLRegistry):
    """An :class:`~gateway.registry.interface.IRegistry` in memory.

    ``lease`` is in seconds. Two registries, for two nodes, share one database when the second is made ``beside`` the
    first. As with any registry, ``open`` and ``join`` come before the first claim.
    """

    job_queue_factory = _HoldableJobQueue

    def __init__(self, clock: IReactorTime, lease: float = 15.0, *, shared_with: MemoryRegistry | None = None) -> None:
        self._memory_database: _MemoryDatabase = (
            _MemoryDatabase(clock) if shared_with is None else shared_with._memory_database
        )
        self._inline_pool = _MemoryPool(self._memory_database)
        super().__init__(
            self._memory_database,
            lease=lease,
            reactor=clock,
            metrics=Metrics(),
            clock=clock.seconds,
            make_pool=lambda *args, **kwargs: self._inline_pool,
            batch_delay=0.0,
        )

    @property
    def available(self) -> bool:
        """Whether the database answers; while it does not, everything fails with ``RegistryUnavailable``."""
        return self._inline_pool.available

    @available.setter
    def available(self, value: bool) -> None:
        self._inline_pool.available = value
        if value and self._batcher is not None:
            self._batcher.retry_now()

    def close(self) -> Deferred[None]:
        """As any registry does; what is held goes on."""
        if self._queues:
            self.release_writes()
        return super().close()

    def _holdable_queue(self) -> _HoldableJobQueue:
        lane = self._queues[Priority.WRITES]
        assert isinstance(lane, _HoldableJobQueue)
        return lane

    def hold_writes(self) -> None:
        """Keep claims and releases waiting."""
        lane = self._holdable_queue()
        if lane.held_submissions is None:
            lane.held_submissions = []

    def release_writes(self) -> None:
        """Let them go on."""
        lane = self._holdable_queue()
        held, lane.held_submissions = lane.held_submissions or [], None
        for send in held:
            send()
