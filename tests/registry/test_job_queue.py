"""Tests of gateway.registry.job_queue."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.metrics import Metrics
from gateway.registry.errors import RegistryRefusedError, RegistryUnavailableError
from gateway.registry.job_queue import LOG_INTERVAL, MAX_LOST_CONNECTIONS, ErrorKind, JobQueue, Priority


class TransientError(Exception):
    pass


class FakeExecutor:
    """An executor that runs work when the test says so."""

    def __init__(self) -> None:
        self.running: list[tuple[Any, Deferred[Any]]] = []
        self.reconnects: list[bool] = []

    def run(self, work: Any, reconnect: bool) -> Deferred[Any]:
        deferred: Deferred[Any] = Deferred()
        self.running.append((work, deferred))
        self.reconnects.append(reconnect)
        return deferred

    def answer(self, error: Exception | None = None, *, begin: bool = False) -> None:
        ((work, deferred),) = self.running
        self.running = []
        if begin:
            work("connection")
        if error is None:
            deferred.callback(work("connection"))
        else:
            deferred.errback(error)

    def classify(self, error: BaseException | None) -> ErrorKind:
        if isinstance(error, ConnectionError):
            return ErrorKind.CONNECTION_LOST
        if isinstance(error, TransientError):
            return ErrorKind.RETRYABLE
        return ErrorKind.REFUSED if isinstance(error, ValueError) else ErrorKind.UNAVAILABLE

    def explain(self, error: BaseException | None) -> str:
        return f"the database: {error}" if isinstance(error, OSError | TransientError | ValueError) else ""


class JobQueueTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.executor = FakeExecutor()
        self.metrics = Metrics()
        self.queue = JobQueue(self.clock, self.executor, self.metrics)
        self.done: list[str] = []

    def submit(self, priority: Priority, name: str) -> Deferred[Any]:
        def work(connection: str) -> str:
            self.done.append(name)
            return f"{name} by {connection}"

        return self.queue.submit(priority, name, lambda: work)

    def answer_all(self) -> None:
        while self.executor.running:
            self.executor.answer()

    def test_one_at_a_time_each_with_its_own_result(self) -> None:
        first, second = self.submit(Priority.READS, "first"), self.submit(Priority.READS, "second")
        self.assertEqual(len(self.executor.running), 1)
        self.answer_all()
        self.assertEqual(self.successResultOf(first), "first by connection")
        self.assertEqual(self.successResultOf(second), "second by connection")

    def test_the_heartbeat_goes_first_and_the_others_round_robin(self) -> None:
        self.submit(Priority.READS, "r0")
        for name in ("r1", "r2", "w1", "w2", "c1", "c2"):
            self.submit({"r": Priority.READS, "w": Priority.WRITES, "c": Priority.MAINTENANCE}[name[0]], name)
        self.submit(Priority.HEARTBEAT, "h")
        self.answer_all()
        self.assertEqual(self.done, ["r0", "h", "w1", "c1", "r1", "w2", "c2", "r2"])

    def test_work_is_made_when_the_job_is_started_and_may_be_none(self) -> None:
        made: list[str] = []

        def make() -> None:
            made.append("made")

        self.submit(Priority.READS, "first")
        nothing = self.queue.submit(Priority.READS, "nothing", make)
        last = self.submit(Priority.READS, "last")
        self.assertEqual(made, [])
        self.answer_all()
        self.assertIsNone(self.successResultOf(nothing))
        self.successResultOf(last)

    def test_a_job_cancelled_in_the_queue_is_not_run(self) -> None:
        self.submit(Priority.READS, "first")
        cancelled = self.submit(Priority.READS, "cancelled")
        cancelled.cancel()
        self.failureResultOf(cancelled, CancelledError)
        self.answer_all()
        self.assertEqual(self.done, ["first"])

    def test_a_job_cancelled_while_it_runs_goes_on(self) -> None:
        for error in (None, OSError("broken")):
            cancelled = self.submit(Priority.READS, "cancelled")
            cancelled.cancel()
            self.failureResultOf(cancelled, CancelledError)
            after = self.submit(Priority.READS, "after")
            self.executor.answer(error)
            self.answer_all()
            self.successResultOf(after)

    def test_a_retryable_failure_is_retried_for_a_second(self) -> None:
        job = self.submit(Priority.WRITES, "batch")
        self.submit(Priority.HEARTBEAT, "h")
        self.executor.answer(TransientError("locked"))
        self.assertEqual(self.executor.running, [])
        self.clock.advance(0.01)
        self.executor.answer()
        self.assertEqual(self.done, ["batch"])
        self.assertEqual(self.successResultOf(job), "batch by connection")
        self.assertEqual(self.metrics.registry_errors, {})

    def test_the_retry_timeout_ends_retries(self) -> None:
        job = self.submit(Priority.WRITES, "batch")
        tries = 0
        while self.executor.running:
            self.executor.answer(TransientError("locked"))
            tries += 1
            self.clock.advance(1)
        self.assertEqual(tries, 2)
        error = self.failureResultOf(job, RegistryUnavailableError).value
        self.assertEqual(str(error), "the database: locked")
        self.assertIsInstance(error.__cause__, TransientError)
        self.assertEqual(self.metrics.registry_errors, {"batch": 1})

    def test_a_job_that_took_long_is_not_retried(self) -> None:
        job = self.submit(Priority.WRITES, "batch")
        self.clock.advance(5)
        self.executor.answer(TransientError("locked"))
        self.failureResultOf(job, RegistryUnavailableError)

    def submit_divisible(self) -> Deferred[Any]:
        return self.queue.submit(Priority.WRITES, "batch", lambda: lambda connection: None, divisible=True)

    def test_refused_work_is_not_retried(self) -> None:
        for job in (self.submit(Priority.WRITES, "batch"), self.submit_divisible()):
            self.executor.answer(ValueError("too large"))
            self.failureResultOf(job, RegistryRefusedError)

    def test_work_that_loses_one_connection_after_the_other_is_refused(self) -> None:
        job = self.submit_divisible()
        for _ in range(MAX_LOST_CONNECTIONS):
            self.assertNoResult(job)
            self.executor.answer(ConnectionError("lost"), begin=True)
            self.clock.advance(0.1)
        self.failureResultOf(job, RegistryRefusedError)

    def test_a_database_that_cannot_be_reached_refuses_nothing(self) -> None:
        job = self.submit_divisible()
        # It is lost in the work, then before it: there is no new connection.
        self.executor.answer(ConnectionError("lost"), begin=True)
        while self.executor.running or self.clock.getDelayedCalls():
            self.clock.advance(0.1)
            if self.executor.running:
                self.executor.answer(ConnectionError("lost"))
        error = self.failureResultOf(job, RegistryUnavailableError).value
        self.assertNotIsInstance(error, RegistryRefusedError)

    def test_only_work_that_can_be_divided_is_refused_for_its_lost_connections(self) -> None:
        job = self.submit(Priority.HEARTBEAT, "heartbeat")
        for _ in range(MAX_LOST_CONNECTIONS + 1):
            self.executor.answer(ConnectionError("lost"), begin=True)
            self.clock.advance(0.1)
        self.executor.answer()
        self.successResultOf(job)

    def test_a_failure_is_followed_by_a_new_connection(self) -> None:
        for error in (OSError("broken"), None, None):
            self.submit(Priority.READS, "find").addErrback(lambda _: None)
            self.executor.answer(error)
        self.assertEqual(self.executor.reconnects, [False, True, False])

    def test_failures_are_logged_rate_limited(self) -> None:
        with capturedLogs() as events:
            for _ in range(5):
                self.failureResultOf_failed("find")
            self.clock.advance(LOG_INTERVAL)
            self.failureResultOf_failed("nodes")
        texts = [event["log_format"].format(**event) for event in events]
        self.assertEqual(
            texts,
            [
                "registry: find failed: the database: disk is full",
                "registry: nodes failed: the database: disk is full (4 more since the last such line)",
            ],
        )
        self.assertEqual(self.metrics.registry_errors, {"find": 5, "nodes": 1})

    def failureResultOf_failed(self, operation: str) -> None:
        job = self.submit(Priority.READS, operation)
        self.executor.answer(OSError("disk is full"))
        self.failureResultOf(job, RegistryUnavailableError)

    def test_a_quiet_job_logs_nothing(self) -> None:
        with capturedLogs() as events:
            job = self.queue.submit(Priority.HEARTBEAT, "open", lambda: lambda connection: None, quiet=True)
            self.executor.answer(OSError("broken"))
        self.failureResultOf(job, RegistryUnavailableError)
        self.assertEqual(events, [])

    def test_an_error_of_the_program_is_logged_with_its_traceback(self) -> None:
        job = self.submit(Priority.READS, "find")
        with capturedLogs() as events:
            self.executor.answer(ZeroDivisionError())
        self.assertEqual(str(self.failureResultOf(job, RegistryUnavailableError).value), "internal error in find")
        self.assertEqual([event["log_level"] for event in events], [LogLevel.critical])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_closing_waits_for_the_running_job_and_fails_the_queued(self) -> None:
        running, waiting = self.submit(Priority.READS, "running"), self.submit(Priority.MAINTENANCE, "waiting")
        closed = self.queue.close()
        self.failureResultOf(waiting, RegistryUnavailableError)
        self.assertNoResult(closed)
        self.executor.answer()
        self.successResultOf(running)
        self.successResultOf(closed)
        self.failureResultOf(self.submit(Priority.READS, "late"), RegistryUnavailableError)
        self.assertEqual(self.done, ["running"])

    def test_closing_an_idle_queue(self) -> None:
        self.successResultOf(self.queue.close())
