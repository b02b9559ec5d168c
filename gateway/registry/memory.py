"""A registry in memory, for tests: the SQL registry on an SQLite database in memory, without threads.

Claims and releases are written at the next tick of the clock; everything else is done synchronously, within the call.
The database's clock is the given clock, counted from :data:`EPOCH`.
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

#: the database's time at which the given clock is 0, in microseconds since 1970
EPOCH = 1_700_000_000_000_000


class InlinePool:
    """An ``adbapi.ConnectionPool`` with one connection that runs its work synchronously, within the call."""

    connectionFactory: Callable[[Any], Any] = adbapi.Connection
    reconnect = False

    def __init__(self, module: str, *args: Any, cp_openfun: Callable[[Any], None], **kwargs: Any) -> None:
        self._connect = namedModule(module).connect
        self._args = args
        self._kwargs = {name: value for name, value in kwargs.items() if not name.startswith("cp_")}
        self._prepare_connection = cp_openfun
        self._connection: Any = None

    def connect(self) -> Any:
        """Return the connection, opened if necessary."""
        if self._connection is None:
            connection = self._connect(*self._args, **self._kwargs)
            self._prepare_connection(connection)
            self._connection = connection
        return self._connection

    def disconnect(self, connection: Any) -> None:
        connection.close()
        self._connection = None

    def runWithConnection(self, work: Work[T]) -> Deferred[T]:
        """Call ``work`` with the connection. Fires with its result."""
        return execute(lambda: work(self.connectionFactory(self)))

    def close(self) -> None:
        """Close the connection if it is open."""
        self.finalClose()

    def finalClose(self) -> None:
        """Implement :meth:`close`."""
        if self._connection is not None:
            self.disconnect(self._connection)


class _MemoryDatabase(SQLite):
    """A database in memory, which outlives the registries that use it."""

    def __init__(self, clock: IReactorTime) -> None:
        super().__init__("the registry in memory", lambda: EPOCH + round(clock.seconds() * 1e6))
        self.connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)


class _MemoryPool(InlinePool):
    """A pool whose only connection is the one of a database in memory."""

    def __init__(self, database: _MemoryDatabase) -> None:
        super().__init__("sqlite3", cp_openfun=database.prepare)
        database.prepare(database.connection)
        self._connection = database.connection
        self.available = True

    def disconnect(self, connection: Any) -> None:
        """Do nothing: the connection is the database."""

    def runWithConnection(self, work: Work[T]) -> Deferred[T]:
        """Call ``work`` with the connection, or fail while the database is made unavailable."""
        if self.available:
            return super().runWithConnection(work)
        return execute(_raise_unavailable)


def _raise_unavailable() -> Any:
    raise sqlite3.OperationalError("unable to open the database: made unavailable by a test")


class _HoldableJobQueue(JobQueue):
    """A job queue that can hold back claims and releases."""

    held_submissions: list[Callable[[], object]] | None = None

    def submit(
        self,
        priority: Priority,
        operation: str,
        make_work: Callable[[], Work[T] | None],
        *,
        quiet: bool = False,
        divisible: bool = False,
    ) -> Deferred[T | None]:
        """Queue a job, unless it is a write and writes are held back."""
        if priority is not Priority.WRITES or self.held_submissions is None:
            return super().submit(priority, operation, make_work, quiet=quiet, divisible=divisible)
        later: Deferred[T | None] = Deferred()
        self.held_submissions.append(
            lambda: self.submit(priority, operation, make_work, divisible=divisible).chainDeferred(later)
        )
        return later


@implementer(IRegistry)
class MemoryRegistry(SQLRegistry):
    """An :class:`~gateway.registry.interface.IRegistry` in memory.

    ``lease`` is in seconds. For two nodes, make the second registry with ``shared_with=`` the first: they use one
    database. As with any registry, call ``open`` and ``join`` before the first claim.
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
        """Whether the database answers. While ``False``, everything fails with ``RegistryUnavailableError``."""
        return self._inline_pool.available

    @available.setter
    def available(self, value: bool) -> None:
        self._inline_pool.available = value
        if value and self._batcher is not None:
            self._batcher.retry_now()

    def close(self) -> Deferred[None]:
        """Release held writes, then write what is queued, and disconnect."""
        if self._queues:
            self.release_writes()
        return super().close()

    def _holdable_queue(self) -> _HoldableJobQueue:
        queue = self._queues[Priority.WRITES]
        assert isinstance(queue, _HoldableJobQueue)
        return queue

    def hold_writes(self) -> None:
        """Hold back claims and releases until :meth:`release_writes`."""
        queue = self._holdable_queue()
        if queue.held_submissions is None:
            queue.held_submissions = []

    def release_writes(self) -> None:
        """Submit the claims and releases that were held back."""
        queue = self._holdable_queue()
        submissions, queue.held_submissions = queue.held_submissions or [], None
        for submit in submissions:
            submit()
