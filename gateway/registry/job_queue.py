"""A pool of one connection, as a lane wants it: what is raised in its thread takes nothing of the connection along.

The way to a database that takes one job at a time.

A small queue in front of a pool of one connection. The heartbeat goes first, always; the others take turns, so that
none starves:

    heartbeat           before all
    writes              a batch of claims and releases
    reads               look-ups, lists
    chores              the rows of dead nodes, in pieces

A job is made when its turn has come, so that a batch takes all that was gathered until then. A job that fails for a
passing reason (somebody else has the lock) is tried again for a second or two. Every other failure becomes
``RegistryUnavailable``; it is counted, and logged at most once every ten seconds.
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
from gateway.registry.errors import RegistryUnavailableError

T = TypeVar("T")


class ErrorClassifier(Protocol):
    """What a database's errors mean."""

    def retryable(self, error: BaseException | None) -> bool:
        """Whether an error may be gone at the next try."""

    def explain(self, error: BaseException | None) -> str:
        """One line for a log, or an empty text for an error that is no database's."""


class SingleConnectionPool:
    """A dialect and its pool of ``adbapi``'s."""

    def __init__(self, errors: ErrorClassifier, pool: Any) -> None:
        self._pool = pool
        self._reconnect = False
        self.retryable = errors.retryable
        self.explain = errors.explain
        self._connect = pool.connectionFactory
        pool.connectionFactory = _without_frame_locals(self._connection)

    def _connection(self, pool: Any) -> Any:
        """Called in the pool's thread for each job. What is raised here leaves no connection behind."""
        connection = self._connect(pool)
        if self._reconnect:
            connection.reconnect()
        return connection

    def run(self, work: Work[T], reconnect: bool) -> Deferred[T]:
        """Carry out work in the pool's thread."""
        self._reconnect = reconnect
        return cast("Deferred[T]", self._pool.runWithConnection(_without_frame_locals(work)))

    def close(self) -> None:
        """Disconnect; nothing must be running."""
        self._pool.close()


def _without_frame_locals(work: Work[T]) -> Work[T]:
    """Let an exception leave its thread without the variables of the frames that it came through: a cursor among them,
    or a connection, would be freed in the reactor's thread."""

    def contained(connection: Any) -> T:
        try:
            return work(connection)
        except BaseException as e:
            error: BaseException | None = e
            while error is not None:
                traceback.clear_frames(error.__traceback__)
                error = error.__context__
            raise

    return contained


#: what a thread does with the DB-API connection that it is given
Work = Callable[[Any], T]

#: seconds for which a job that failed for a passing reason is tried again, if nobody says otherwise, and the longest
#: first pause before that
RETRY_TIMEOUT, INITIAL_BACKOFF = 1.0, 0.01
#: seconds between two log lines
LOG_INTERVAL = 10.0


def bind(function: Callable[..., T], *args: object) -> Work[T]:
    """A piece of work: the function with these arguments behind the connection."""
    return lambda connection: function(connection, *args)


class Priority(enum.Enum):
    """Whose turn it is."""

    HEARTBEAT = enum.auto()
    WRITES = enum.auto()
    READS = enum.auto()
    MAINTENANCE = enum.auto()


class JobExecutor(Protocol):
    """What a lane needs of the database beyond."""

    def run(self, work: Work[T], reconnect: bool) -> Deferred[T]:
        """Carry out work in a thread; on a new connection if ``afresh``."""

    def retryable(self, error: BaseException | None) -> bool:
        """Whether an error may be gone at the next try."""

    def explain(self, error: BaseException | None) -> str:
        """One line for a log, or an empty text for an error that is no database's."""


@attrs.define(eq=False)
class _Job:
    operation: str
    make_work: Callable[[], Work[Any] | None]
    deferred: Deferred[Any]
    quiet: bool
    work: Work[Any] | None = None
    started_at: float = 0.0
    backoff: float = INITIAL_BACKOFF


class JobQueue:
    """Runs jobs one at a time. ``patience`` is in seconds."""

    _log = Logger()

    def __init__(
        self, clock: IReactorTime, executor: JobExecutor, metrics: Metrics, retry_timeout: float | None = None
    ) -> None:
        self._clock = clock
        self._retry_timeout = RETRY_TIMEOUT if retry_timeout is None else retry_timeout
        self._executor = executor
        self._metrics = metrics
        self._queues: dict[Priority, deque[_Job]] = {turn: deque() for turn in Priority}
        self._rotation = deque([Priority.WRITES, Priority.READS, Priority.MAINTENANCE])
        self._running: _Job | None = None
        self._reconnect = False
        self._closed: Deferred[None] | None = None
        self._last_logged_at = -LOG_INTERVAL
        self._suppressed = 0

    def submit(
        self, priority: Priority, operation: str, make_work: Callable[[], Work[T] | None], *, quiet: bool = False
    ) -> Deferred[T | None]:
        """Queue a job; ``make`` is called when its turn has come, and gives the work, or ``None`` for none.

        Fires with what the work returned. Fails with ``RegistryUnavailable``, whose ``__cause__`` is what was wrong;
        nothing is logged of that if ``quiet``. A job that is cancelled before its turn is not done.
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

        job = _Job(operation, make_work, Deferred(cancel), quiet)
        deferred = job.deferred
        queue.append(job)
        self._run_next()
        return deferred

    def close(self) -> Deferred[None]:
        """Fail what waits; fires when nothing runs any more."""
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
                self._run(job, job.work)

    def _pop_next(self) -> _Job | None:
        urgent = self._queues[Priority.HEARTBEAT]
        if urgent:
            return urgent.popleft()
        for turn in list(self._rotation):
            if self._queues[turn]:
                self._rotation.remove(turn)
                self._rotation.append(turn)
                return self._queues[turn].popleft()
        return None

    def _run(self, job: _Job, work: Work[Any]) -> None:
        afresh, self._reconnect = self._reconnect, False
        deferred = self._executor.run(work, afresh)
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
        waited = self._clock.seconds() - job.started_at
        passing = self._executor.retryable(error)
        left = self._retry_timeout - waited
        if passing and left > 0:
            # Whoever was in the way waits for another time.
            self._clock.callLater(min(job.backoff * random.uniform(0.5, 1.0), left), self._run, job, work)
            job.backoff *= 2
            return
        # Whatever state the connection is in, the next job shall not inherit it. (A lock says nothing against it.)
        self._reconnect = not passing
        self._metrics.registry_errors[job.operation] += 1
        problem = self._executor.explain(error)
        if not job.quiet:
            self._log_failure(job.operation, problem, failure)
        unavailable = RegistryUnavailableError(problem or f"internal error in {job.operation}")
        unavailable.__cause__ = error
        job.deferred.errback(unavailable)
        self._finish()

    def _log_failure(self, operation: str, problem: str, failure: Failure) -> None:
        now = self._clock.seconds()
        if now - self._last_logged_at < LOG_INTERVAL:
            self._suppressed += 1
            return
        count, self._suppressed, self._last_logged_at = self._suppressed, 0, now
        more = f" ({count} more since the last such line)" if count else ""
        if problem:
            self._log.warn(
                "registry: {operation} failed: {problem}{more}", operation=operation, problem=problem, more=more
            )
        else:
            self._log.failure("registry: {operation} failed{more}", failure, operation=operation, more=more)
