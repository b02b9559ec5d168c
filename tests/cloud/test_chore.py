from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.cloud.registrar import NameServiceError, RetryingTask
from gateway.metrics import Metrics


class RetryingTaskTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.done: list[float] = []
        self.problem: Exception | None = None
        self.holding: Deferred[None] | None = None
        self.task = RetryingTask("the work", self.work, self.clock, self.metrics, lambda low, high: high)

    async def work(self) -> None:
        self.done.append(self.clock.seconds())
        if self.holding is not None:
            await self.holding
        if self.problem:
            raise self.problem

    def times(self, seconds: int) -> list[float]:
        """When it was done within so many seconds, from now."""
        began, self.done[:] = self.clock.seconds(), []
        self.clock.pump([0.5] * (2 * seconds))
        return [at - began for at in self.done]

    def test_when_it_is_due(self) -> None:
        self.task.run_within(5)
        self.task.run_within(2)
        self.task.run_within(9)
        self.assertEqual(self.times(20), [2])

    def test_the_pauses_grow_to_a_minute_and_begin_anew(self) -> None:
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.assertEqual(self.times(310)[:8], [0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 63.5, 123.5])
        self.problem = None
        self.assertEqual(len(self.times(60)), 1)
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.assertEqual(self.times(4), [0.5, 1.5, 3.5])

    def test_the_pauses_are_spread(self) -> None:
        asked: list[tuple[float, float]] = []

        def uniform(low: float, high: float) -> float:
            asked.append((low, high))
            return low

        self.task = RetryingTask("the work", self.work, self.clock, self.metrics, uniform)
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.assertEqual(self.times(3), [0.5, 1.0, 2.0])
        self.assertEqual(set(asked), {(0.5, 1.0)})

    def test_longer_pauses_where_it_is_throttled(self) -> None:
        self.problem = NameServiceError("slowly", throttled=True)
        self.task.run_within(0)
        self.assertEqual(self.times(700)[:8], [0.5, 4.5, 12.5, 28.5, 60.5, 124.5, 252.5, 508.5])

    def test_long_pauses_from_the_first_where_it_is_hopeless(self) -> None:
        self.problem = NameServiceError("no rights", permanent=True)
        self.task.run_within(0)
        self.assertEqual(self.times(130), [0.5, 60.5, 120.5])

    def test_a_pause_holds_what_is_due_meanwhile(self) -> None:
        self.problem = NameServiceError("away", permanent=True)
        self.task.run_within(0)
        self.times(1)
        self.task.run_within(0)
        self.assertEqual(self.times(70), [59.5])

    def test_now_is_in_spite_of_a_pause(self) -> None:
        self.problem = NameServiceError("away", permanent=True)
        self.task.run_within(0)
        self.times(1)
        waiter = self.task.run_now()
        self.assertNoResult(waiter)
        self.assertEqual(self.times(1), [0.5])
        self.successResultOf(waiter)
        # And it goes on being tried.
        self.assertEqual(self.times(60), [59.5])

    def test_now_waits_for_what_is_under_way_and_then_for_its_own(self) -> None:
        self.holding = first = Deferred()
        self.task.run_within(0)
        self.times(1)
        waiter = self.task.run_now()
        self.assertEqual(self.times(1), [])
        self.holding = second = Deferred()
        self.problem = NameServiceError("away")
        first.callback(None)
        self.assertEqual(self.times(1), [0.5])
        self.assertNoResult(waiter)
        self.problem = None
        second.callback(None)
        self.successResultOf(waiter)

    def test_who_waits_may_give_up(self) -> None:
        self.holding = Deferred()
        waiter = self.task.run_now().addTimeout(5, self.clock)
        self.times(6)
        self.failureResultOf(waiter)
        self.holding.callback(None)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_stop_waits_for_what_is_under_way_and_begins_nothing(self) -> None:
        self.holding = Deferred()
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.times(1)
        waiter, stopped = self.task.run_now(), self.task.stop()
        self.assertNoResult(stopped)
        self.holding.callback(None)
        self.successResultOf(stopped)
        self.successResultOf(waiter)
        self.task.run_within(0)
        self.successResultOf(self.task.run_now())
        self.assertEqual(self.times(100), [])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop_in_a_pause(self) -> None:
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.times(1)
        self.successResultOf(self.task.stop())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_failure_is_told_once_and_anew_when_it_is_another(self) -> None:
        with capturedLogs() as logs:
            self.problem = NameServiceError("away")
            self.task.run_within(0)
            self.times(100)
            self.problem = NameServiceError("no rights", permanent=True)
            self.times(200)
            self.problem = None
            self.times(100)
            self.task.run_within(0)
            self.times(1)
        told = [(event["log_level"], event.get("problem", event["log_format"])) for event in logs]
        self.assertEqual(
            told,
            [
                (LogLevel.warn, "away"),
                (LogLevel.error, "no rights"),
                (LogLevel.info, "{what} works again, after {away:.0f} s"),
            ],
        )
        self.assertGreater(self.metrics.dns_failures, 8)
        self.assertIn(b"wsgateway_dns_failures_total", self.metrics.text())

    def test_an_error_in_the_work_is_logged_once_and_it_goes_on(self) -> None:
        self.problem = ZeroDivisionError("oops")
        self.task.run_within(0)
        self.assertEqual(self.times(4), [0.5, 1.5, 3.5])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
