"""Priority job queue in front of a single database connection.

The heartbeat always goes first; the other priorities are served round-robin, so none starves:

    HEARTBEAT           before all others
    WRITES              a batch of claims and releases
    READS               lookups, lists
    MAINTENANCE         rows of dead nodes and expired assignments, in segments

The work of a job is made when the job is started, so a batch takes all requests queued until then. A job that fails
with a retryable error (such as a lock held by another transaction) is retried for a second or two. Every other failure
becomes a ``RegistryUnavailableError``; it is counted, and logged at most once every ten seconds. If the database is
there, but refused the work, that is a ``RegistryRefusedError``: less work may succeed. A server or proxy that refuses a
statement may also close the connection, so a job that can be divided and loses one connection after the other is
refused as well.
"""

from __future__ import annotations

import enum
import random
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.metrics import Metrics
from gateway.registry.errors import RegistryRefusedError, RegistryUnavailableError
from gateway.util.log import LogLimiter

T = TypeVar("T")

#: work for a thread, with a DB-API connection
Work = Callable[[Any], T]

#: default seconds for which a job with a retryable error is retried
RETRY_TIMEOUT = 1.0
#: seconds before the first retry, at most
INITIAL_BACKOFF = 0.01
#: connections that a job loses, with the work begun, before the work is considered the cause
MAX_LOST_CONNECTIONS = 3
#: seconds between two log lines
LOG_INTERVAL = 10.0


class Priority(enum.Enum):
    """The kind of a job."""

    HEARTBEAT = enum.auto()
    WRITES = enum.auto()
    READS = enum.auto()
    MAINTENANCE = enum.auto()


def bind(function: Callable[..., T], *args: object) -> Work[T]:
    """Make work that calls a function with the connection, followed by these arguments."""
    return lambda connection: function(connection, *args)


class ErrorKind(enum.Enum):
    """What an error says about the next try."""

    #: the same work may succeed soon
    RETRYABLE = enum.auto()
    #: as ``RETRYABLE``: the connection was lost
    CONNECTION_LOST = enum.auto()
    #: the database cannot be used now
    UNAVAILABLE = enum.auto()
    #: the database refused this work, or it has a defect; other work may succeed
    REFUSED = enum.auto()


class ErrorClassifier(Protocol):
    """Classify the errors of a database."""

    def classify(self, error: BaseException | None) -> ErrorKind:
        """Return the kind of an error."""

    def explain(self, error: BaseException | None) -> str:
        """Describe an error in one line for the log, or return an empty text if it is not the database's."""


class JobExecutor(ErrorClassifier, Protocol):
    """Run the work of jobs, and classify its errors."""

    def run(self, work: Work[T], reconnect: bool) -> Deferred[T]:
        """Run work in a thread, with a new connection if ``reconnect``. Fires with its result."""


class SingleConnectionPool:
    """Run work on the connection of an ``adbapi`` pool of size one.

    What is raised in the pool's thread holds no reference to the connection or a cursor.
    """

    def __init__(self, errors: ErrorClassifier, pool: Any) -> None:
        self._pool = pool
        self._reconnect = False
        self.classify = errors.classify
        self.explain = errors.explain
        self._connect = pool.connectionFactory
        pool.connectionFactory = _without_frame_locals(self._connection)

    def _connection(self, pool: Any) -> Any:
        """Return the connection. Called in the pool's thread for each job."""
        connection = self._connect(pool)
        if self._reconnect:
            connection.reconnect()
        return connection

    def run(self, work: Work[T], reconnect: bool) -> Deferred[T]:
        """Run work in the pool's thread, with a new connection if ``reconnect``."""
        self._reconnect = reconnect
        return cast("Deferred[T]", self._pool.runWithConnection(_without_frame_locals(work)))

    def close(self) -> None:
        """Disconnect. No work may be running."""
        self._pool.close()


def _without_frame_locals(work: Work[T]) -> Work[T]:
    """Clear the local variables of all frames in the traceback of an exception before it leaves the thread: a cursor
    or connection among them would be freed in the reactor's thread."""

    def run(connection: Any) -> T:
        try:
            return work(connection)
        except BaseException as e:
            error: BaseException | None = e
            while error is not None:
                traceback.clear_frames(error.__traceback__)
                error = error.__context__
            raise

    return run


@attrs.define(eq=False)
class _Job:
    operation: str
    make_work: Callable[[], Work[Any] | None]
    deferred: Deferred[Any]
    quiet: bool
    divisible: bool
    work: Work[Any] | None = None
    started_at: float = 0.0
    backoff: float = INITIAL_BACKOFF
    #: whether the work was begun in this try; set in the thread
    begun: bool = False
    lost_connections: int = 0

    def begin(self, connection: Any) -> Any:
        """Run the work of a divisible job, in the thread."""
        assert self.work is not None
        self.begun = True
        return self.work(connection)


class JobQueue:
    """Run jobs one at a time. ``retry_timeout`` is in seconds, for each job."""

    _log = Logger()

    def __init__(
        self, clock: IReactorTime, executor: JobExecutor, metrics: Metrics, retry_timeout: float | None = None
    ) -> None:
        self._clock = clock
        self._retry_timeout = RETRY_TIMEOUT if retry_timeout is None else retry_timeout
        self._executor = executor
        self._metrics = metrics
        self._queues: dict[Priority, deque[_Job]] = {priority: deque() for priority in Priority}
        self._rotation = deque([Priority.WRITES, Priority.READS, Priority.MAINTENANCE])
        self._running: _Job | None = None
        self._reconnect = False
        self._closed: Deferred[None] | None = None
        self._log_limiter = LogLimiter(clock.seconds, LOG_INTERVAL)

    def submit(
        self,
        priority: Priority,
        operation: str,
        make_work: Callable[[], Work[T] | None],
        *,
        quiet: bool = False,
        divisible: bool = False,
    ) -> Deferred[T | None]:
        """Queue a job. ``make_work`` is called when it is started; it may return ``None`` if there is nothing to do.

        Fires with the result of the work. Fails with ``RegistryUnavailableError``, whose ``__cause__`` is the error of
        the database; it is not logged if ``quiet``. A job is ``divisible`` if the caller can do with less work after
        ``RegistryRefusedError``. Cancelling the Deferred removes a job that was not started yet; one that is running
        goes on.
        """
        if self._closed is not None:
            return fail(RegistryUnavailableError("the registry is closed"))
        queue = self._queues[priority]

        def cancel(_: Deferred[T | None]) -> None:
            if job in queue:
                queue.remove(job)
            else:
                job.deferred = Deferred()
                job.deferred.addErrback(lambda _: None)

        job = _Job(operation, make_work, Deferred(cancel), quiet, divisible)
        deferred = job.deferred
        queue.append(job)
        self._run_next()
        return deferred

    def close(self) -> Deferred[None]:
        """Fail the queued jobs. Fires when the running job has ended."""
        if self._closed is None:
            self._closed = Deferred() if self._running else succeed(None)
            for queue in self._queues.values():
                while queue:
                    queue.popleft().deferred.errback(RegistryUnavailableError("the registry is closed"))
        return self._closed

    def _run_next(self) -> None:
        while self._running is None:
            job = self._pop_next()
            if job is None:
                return
            self._running = job
            job.work = job.make_work()
            if job.work is None:
                self._succeeded(None, job)
            else:
                job.started_at = self._clock.seconds()
                self._run(job, job.begin if job.divisible else job.work)

    def _pop_next(self) -> _Job | None:
        heartbeats = self._queues[Priority.HEARTBEAT]
        if heartbeats:
            return heartbeats.popleft()
        for priority in list(self._rotation):
            if self._queues[priority]:
                self._rotation.remove(priority)
                self._rotation.append(priority)
                return self._queues[priority].popleft()
        return None

    def _run(self, job: _Job, work: Work[Any]) -> None:
        reconnect, self._reconnect = self._reconnect, False
        job.begun = False
        deferred = self._executor.run(work, reconnect)
        deferred.addCallbacks(self._succeeded, self._failed, callbackArgs=(job,), errbackArgs=(job, work))

    def _succeeded(self, result: object, job: _Job) -> None:
        job.deferred.callback(result)
        self._finish()

    def _finish(self) -> None:
        self._running = None
        if self._closed is not None:
            self._closed.callback(None)
        else:
            self._run_next()

    def _failed(self, failure: Failure, job: _Job, work: Work[Any]) -> None:
        error = failure.value
        elapsed = self._clock.seconds() - job.started_at
        kind = self._executor.classify(error)
        if kind is ErrorKind.CONNECTION_LOST and job.begun:
            job.lost_connections += 1
            if job.lost_connections >= MAX_LOST_CONNECTIONS:
                kind = ErrorKind.REFUSED
        retryable = kind in (ErrorKind.RETRYABLE, ErrorKind.CONNECTION_LOST)
        left = self._retry_timeout - elapsed
        if retryable and left > 0:
            # With jitter, so that two transactions that blocked each other do not do so again.
            self._clock.callLater(min(job.backoff * random.uniform(0.5, 1.0), left), self._run, job, work)
            job.backoff *= 2
            return
        # The connection may be in any state, except after a lock timeout, so the next job gets a new one.
        self._reconnect = not retryable
        self._metrics.registry_errors[job.operation] += 1
        problem = self._executor.explain(error)
        if not job.quiet:
            self._log_failure(job.operation, problem, failure)
        error_class = RegistryRefusedError if kind is ErrorKind.REFUSED else RegistryUnavailableError
        unavailable = error_class(problem or f"internal error in {job.operation}")
        unavailable.__cause__ = error
        job.deferred.errback(unavailable)
        self._finish()

    def _log_failure(self, operation: str, problem: str, failure: Failure) -> None:
        count = self._log_limiter.allow()
        if count is None:
            return
        more = f" ({count} more since the last such line)" if count else ""
        if problem:
            self._log.warn(
                "registry: {operation} failed: {problem}{more}", operation=operation, problem=problem, more=more
            )
        else:
            self._log.failure("registry: {operation} failed{more}", failure, operation=operation, more=more)
