"""The simulated database: the registry's real statements on SQLite, behind a network, and the faults of a server.

All nodes share one database in memory. Each job of a node runs at once, as one transaction, when its request arrives;
its result arrives a while later. As on MySQL a node has five connections, so its jobs overlap.

    node -- request, latency --> the job runs and commits -- result, latency --> node
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from gateway.registry import schema_versions
from gateway.registry.job_queue import ErrorKind, Priority
from gateway.registry.sqlite import SQLite
from tests.simulation.network import Network
from tests.simulation.scheduler import Event, Scheduler

#: the host of the database
DATABASE_HOST = "10.1.0.1"
#: the time of the database when a run starts, in microseconds since 1970
EPOCH = 1_700_000_000_000_000
#: latency of the database itself, in seconds
MIN_DURATION, MAX_DURATION = 0.0002, 0.003
#: time after which a driver gives up, in seconds
DRIVER_TIMEOUT = 4.0
#: states that a fail-over can go back to, one for each commit
MAX_SNAPSHOTS = 24


class ConnectionLostError(sqlite3.OperationalError):
    """The connection to the server is lost, or there is none."""


class TooLargeError(sqlite3.DataError):
    """The server refuses a transaction because of its size."""


class SharedConnection(sqlite3.Connection):
    """The connection to the database in memory, as the registry uses it."""

    def reconnect(self) -> None:
        """Do nothing: :class:`SimulatedDatabase` decides whether the server can be reached."""


class SimulatedDatabase:
    """The server, with its faults."""

    def __init__(self, scheduler: Scheduler, network: Network) -> None:
        self.scheduler = scheduler
        self.network = network
        self.random = scheduler.make_random("database")
        #: how far the server's clock is off, in seconds
        self.clock_offset = 0.0
        #: whether it refuses connections
        self.is_away = False
        #: whether it takes requests and answers none
        self.is_hanging = False
        #: share of the jobs that are rolled back as by a dead-lock
        self.deadlock_share = 0.0
        #: share of the jobs whose result is lost after the commit
        self.lost_result_share = 0.0
        #: further latency, in seconds
        self.slowness = 0.0
        #: rows that one transaction may change; 0 for no limit
        self.max_changes = 0
        #: whether states are kept for a fail-over
        self.keeps_snapshots = False
        self._snapshots: deque[sqlite3.Connection] = deque(maxlen=MAX_SNAPSHOTS)
        self._hanging: list[Callable[[], None]] = []
        self._in_flight: dict[Job, None] = {}
        self.connection = sqlite3.connect(
            ":memory:", isolation_level=None, check_same_thread=False, factory=SharedConnection
        )
        self.connection.create_function("now_us", 0, self.now)
        schema_versions.apply(self.connection, "sqlite", "BEGIN IMMEDIATE")

    def now(self) -> int:
        """Return the server's clock, in microseconds since 1970."""
        return EPOCH + round((self.scheduler.now + self.clock_offset) * 1e6)

    def rows(self, statement: str, *values: object) -> list[Any]:
        """Read rows, for the checks."""
        return self.connection.execute(statement, values).fetchall()

    def submit(self, host: str, run: Callable[[Any], Any], finish: Callable[[Any], None]) -> None:
        """Run a job for a node; ``finish`` is called with the result or a ``Failure``, when that arrives there."""
        Job(self, host, run, finish).send()

    def set_away(self, is_away: bool) -> None:
        """Refuse connections and lose those that exist, or accept them again."""
        self.is_away = is_away
        if is_away:
            self._lose_connections()

    def set_hanging(self, is_hanging: bool) -> None:
        """Answer nothing, or go on; what has arrived meanwhile is carried out then."""
        self.is_hanging = is_hanging
        if not is_hanging:
            hanging, self._hanging = self._hanging, []
            for resume in hanging:
                resume()

    def fail_over(self, commits: int) -> None:
        """Go on with the state of some commits ago: another server takes over that has not seen them."""
        self._lose_connections()
        for _ in range(min(commits, len(self._snapshots) - 1)):
            self._snapshots.pop()
        if self._snapshots:
            self._snapshots[-1].backup(self.connection)

    def _lose_connections(self) -> None:
        for job in list(self._in_flight):
            job.lose()

    # Jobs.

    def hang(self, resume: Callable[[], None]) -> None:
        self._hanging.append(resume)

    def run(self, run: Callable[[Any], Any]) -> Any:
        """Run a job; returns its result, or a ``Failure``."""
        if self.random.random() < self.deadlock_share:
            return Failure(sqlite3.OperationalError("database is locked"))
        before = self.connection.total_changes
        try:
            result = run(LimitedConnection(self.connection, self.max_changes) if self.max_changes else self.connection)
        except Exception:  # noqa: BLE001 - it is the node's
            return Failure()
        if self.keeps_snapshots and self.connection.total_changes != before:
            self._snapshots.append(sqlite3.connect(":memory:", check_same_thread=False))
            self.connection.backup(self._snapshots[-1])
        return result

    def loses_result(self) -> bool:
        return self.random.random() < self.lost_result_share

    def started(self, job: Job) -> None:
        self._in_flight[job] = None

    def finished(self, job: Job) -> None:
        self._in_flight.pop(job, None)


class LimitedConnection:
    """A connection on which a transaction that changes too many rows cannot be committed."""

    def __init__(self, connection: SharedConnection, max_changes: int) -> None:
        self._connection = connection
        self._max_changes = max_changes
        self._before = connection.total_changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def commit(self) -> None:
        if self._connection.total_changes - self._before > self._max_changes:
            raise TooLargeError("the transaction is too large")
        self._connection.commit()


class Job:
    """One job of a node, and its result on the way back."""

    def __init__(
        self, database: SimulatedDatabase, host: str, run: Callable[[Any], Any], finish: Callable[[Any], None]
    ) -> None:
        self._database = database
        self._host = host
        self._run = run
        self._finish: Callable[[Any], None] | None = finish
        self._timeout: Event | None = None

    def send(self) -> None:
        database = self._database
        database.started(self)
        self._timeout = database.scheduler.after(DRIVER_TIMEOUT, self.lose)
        if database.is_away:
            database.scheduler.after(0.001, self.lose)
        else:
            database.network.send(self._host, DATABASE_HOST, self._arrived)

    def lose(self) -> None:
        """The node's driver finds the connection lost."""
        self._deliver(Failure(ConnectionLostError("the connection is lost")))

    def _arrived(self) -> None:
        database = self._database
        if database.is_hanging:
            database.hang(self._arrived)
        elif database.is_away:
            self.lose()
        else:
            duration = database.random.uniform(MIN_DURATION, MAX_DURATION) + database.slowness
            database.scheduler.after(duration, self._execute)

    def _execute(self) -> None:
        database = self._database
        if database.is_away:
            self.lose()
            return
        result = database.run(self._run)
        if database.loses_result():
            self.lose()
        else:
            database.network.send(DATABASE_HOST, self._host, lambda: self._deliver(result))

    def _deliver(self, result: Any) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            self._database.finished(self)
            if self._timeout is not None:
                self._timeout.cancel()
            finish(result)


class NodeDatabase(SQLite):
    """The database as one node uses it."""

    #: as on MySQL
    queue_priorities: tuple[tuple[Priority, ...], ...] = (
        (Priority.HEARTBEAT,),
        (Priority.WRITES,),
        (Priority.WRITES,),
        (Priority.READS,),
        (Priority.MAINTENANCE,),
    )
    max_batch_size = 50
    retry_timeout: float | None = 2.0

    def __init__(self, database: SimulatedDatabase, reactor: Any) -> None:
        super().__init__("simulated", database.now)
        self._database = database
        self._reactor = reactor

    def make_pool(self, pool_factory: Callable[..., Any], reactor: Any) -> Any:
        return SimulatedPool(self._database, self._reactor)

    def check(self) -> None:
        """Do nothing: the schema is up to date."""

    def classify(self, error: BaseException | None) -> ErrorKind:
        return ErrorKind.CONNECTION_LOST if isinstance(error, ConnectionLostError) else super().classify(error)


class SimulatedPool:
    """A pool of one connection, as :class:`~gateway.registry.job_queue.SingleConnectionPool` uses it."""

    def __init__(self, database: SimulatedDatabase, reactor: Any) -> None:
        self._database = database
        self._reactor = reactor
        self.connectionFactory: Callable[[Any], Any] = lambda pool: database.connection

    def runWithConnection(self, work: Callable[[Any], Any]) -> Deferred[Any]:
        deferred: Deferred[Any] = Deferred()

        def run(connection: Any) -> Any:
            self.connectionFactory(self)
            return work(connection)

        self._database.submit(self._reactor.host, run, lambda result: self._reactor.run(deferred.callback, result))
        return deferred

    def close(self) -> None:
        """Do nothing."""
