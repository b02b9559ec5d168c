from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.metrics import Metrics
from gateway.registry.interface import RegistryUnavailable
from gateway.registry.job_queue import LOG_INTERVAL, Lane, Turn


class Passing(Exception):
    pass


class FakeDatabase:
    """Carries work out when the test says so."""

    def __init__(self) -> None:
        self.running: list[tuple[Any, Deferred[Any]]] = []
        self.afresh: list[bool] = []

    def run(self, work: Any, afresh: bool) -> Deferred[Any]:
        deferred: Deferred[Any] = Deferred()
        self.running.append((work, deferred))
        self.afresh.append(afresh)
        return deferred

    def answer(self, error: Exception | None = None) -> None:
        ((work, deferred),) = self.running
        self.running = []
        if error is None:
            deferred.callback(work("connection"))
        else:
            deferred.errback(error)

    def retryable(self, error: BaseException | None) -> bool:
        return isinstance(error, Passing)

    def explain(self, error: BaseException | None) -> str:
        return f"the database: {error}" if isinstance(error, OSError | Passing) else ""


class LaneTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.database = FakeDatabase()
        self.metrics = Metrics()
        self.lane = Lane(self.clock, self.database, self.metrics)
        self.done: list[str] = []

    def submit(self, turn: Turn, name: str) -> Deferred[Any]:
        def work(connection: str) -> str:
            self.done.append(name)
            return f"{name} by {connection}"

        return self.lane.submit(turn, name, lambda: work)

    def answer_all(self) -> None:
        while self.database.running:
            self.database.answer()

    def test_one_at_a_time_each_with_its_own_result(self) -> None:
        first, second = self.submit(Turn.READS, "first"), self.submit(Turn.READS, "second")
        self.assertEqual(len(self.database.running), 1)
        self.answer_all()
        self.assertEqual(self.successResultOf(first), "first by connection")
        self.assertEqual(self.successResultOf(second), "second by connection")

    def test_the_heartbeat_first_and_the_others_in_turn(self) -> None:
        self.submit(Turn.READS, "r0")
        for name in ("r1", "r2", "w1", "w2", "c1", "c2"):
            self.submit({"r": Turn.READS, "w": Turn.WRITES, "c": Turn.CHORES}[name[0]], name)
        self.submit(Turn.HEARTBEAT, "h")
        self.answer_all()
        self.assertEqual(self.done, ["r0", "h", "w1", "c1", "r1", "w2", "c2", "r2"])

    def test_a_job_is_made_when_its_turn_has_come_and_may_be_none(self) -> None:
        made: list[str] = []

        def make() -> None:
            made.append("made")

        self.submit(Turn.READS, "first")
        nothing = self.lane.submit(Turn.READS, "nothing", make)
        last = self.submit(Turn.READS, "last")
        self.assertEqual(made, [])
        self.answer_all()
        self.assertIsNone(self.successResultOf(nothing))
        self.successResultOf(last)

    def test_a_job_cancelled_in_the_queue_is_not_done(self) -> None:
        self.submit(Turn.READS, "first")
        cancelled = self.submit(Turn.READS, "cancelled")
        cancelled.cancel()
        self.failureResultOf(cancelled, CancelledError)
        self.answer_all()
        self.assertEqual(self.done, ["first"])

    def test_a_job_cancelled_while_it_runs_is_let_run(self) -> None:
        for error in (None, OSError("broken")):
            cancelled = self.submit(Turn.READS, "cancelled")
            cancelled.cancel()
            self.failureResultOf(cancelled, CancelledError)
            after = self.submit(Turn.READS, "after")
            self.database.answer(error)
            self.answer_all()
            self.successResultOf(after)

    def test_a_passing_failure_is_tried_again_for_a_second(self) -> None:
        job = self.submit(Turn.WRITES, "batch")
        self.submit(Turn.HEARTBEAT, "h")
        self.database.answer(Passing("locked"))
        self.assertEqual(self.database.running, [])
        self.clock.advance(0.01)
        self.database.answer()
        self.assertEqual(self.done, ["batch"])
        self.assertEqual(self.successResultOf(job), "batch by connection")
        self.assertEqual(self.metrics.registry_errors, {})

    def test_patience_ends(self) -> None:
        job = self.submit(Turn.WRITES, "batch")
        tries = 0
        while self.database.running:
            self.database.answer(Passing("locked"))
            tries += 1
            self.clock.advance(1)
        self.assertEqual(tries, 2)
        error = self.failureResultOf(job, RegistryUnavailable).value
        self.assertEqual(str(error), "the database: locked")
        self.assertIsInstance(error.__cause__, Passing)
        self.assertEqual(self.metrics.registry_errors, {"batch": 1})

    def test_what_took_long_is_not_tried_again(self) -> None:
        job = self.submit(Turn.WRITES, "batch")
        self.clock.advance(5)
        self.database.answer(Passing("locked"))
        self.failureResultOf(job, RegistryUnavailable)

    def test_after_a_failure_comes_a_new_connection(self) -> None:
        for error in (OSError("broken"), None, None):
            self.submit(Turn.READS, "find").addErrback(lambda _: None)
            self.database.answer(error)
        self.assertEqual(self.database.afresh, [False, True, False])

    def test_failures_are_logged_now_and_then(self) -> None:
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
        job = self.submit(Turn.READS, operation)
        self.database.answer(OSError("disk is full"))
        self.failureResultOf(job, RegistryUnavailable)

    def test_a_quiet_job_logs_nothing(self) -> None:
        with capturedLogs() as events:
            job = self.lane.submit(Turn.HEARTBEAT, "open", lambda: lambda connection: None, quiet=True)
            self.database.answer(OSError("broken"))
        self.failureResultOf(job, RegistryUnavailable)
        self.assertEqual(events, [])

    def test_an_error_of_the_program_is_logged_with_its_traceback(self) -> None:
        job = self.submit(Turn.READS, "find")
        with capturedLogs() as events:
            self.database.answer(ZeroDivisionError())
        self.assertEqual(str(self.failureResultOf(job, RegistryUnavailable).value), "internal error in find")
        self.assertEqual([event["log_level"] for event in events], [LogLevel.critical])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_closing_waits_for_what_runs_and_fails_what_waits(self) -> None:
        running, waiting = self.submit(Turn.READS, "running"), self.submit(Turn.CHORES, "waiting")
        closed = self.lane.close()
        self.failureResultOf(waiting, RegistryUnavailable)
        self.assertNoResult(closed)
        self.database.answer()
        self.successResultOf(running)
        self.successResultOf(closed)
        self.failureResultOf(self.submit(Turn.READS, "late"), RegistryUnavailable)
        self.assertEqual(self.done, ["running"])

    def test_closing_an_idle_lane(self) -> None:
        self.successResultOf(self.lane.close())
