"""Tests of gateway.util.timers."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.util.timers import MAX_CALLS_PER_ITERATION, TimerWheel


class TimerWheelTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(12345.1)
        self.start = self.clock.seconds()
        self.timers = TimerWheel(self.clock, tick_length=0.25)
        self.fired: list[tuple[str, float]] = []

    def call(self, name: str, delay: float) -> Any:
        return self.timers.call_later(
            delay, lambda: self.fired.append((name, round(self.clock.seconds() - self.start, 3)))
        )

    def test_never_early_and_at_most_a_tick_late(self) -> None:
        for delay in (0.0, 0.1, 0.24, 0.25, 1.0, 3.07):
            self.call(str(delay), delay)
        self.clock.pump([0.01] * 400)
        self.assertEqual(len(self.fired), 6)
        for name, at in self.fired:
            self.assertGreaterEqual(at, float(name) - 1e-6)
            self.assertLessEqual(at, float(name) + 0.27)

    def test_few_reactor_timers(self) -> None:
        for _ in range(1000):
            self.call("x", 5.0)
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)

    def test_few_calls_per_iteration(self) -> None:
        """Thousands of timers that are due together do not block the reactor. One that is cancelled meanwhile is not
        called."""
        timers = [self.call(str(number), 1.0) for number in range(3 * MAX_CALLS_PER_ITERATION)]
        in_turns: list[int] = []
        (due,) = self.clock.getDelayedCalls()
        while due is not None:
            call, args = due.func, due.args
            due.cancel()
            self.clock.rightNow = max(self.clock.seconds(), due.getTime())
            before = len(self.fired)
            call(*args)
            in_turns.append(len(self.fired) - before)
            timers[-1].cancel()
            due = next(iter(self.clock.getDelayedCalls()), None)
            self.assertTrue(due is None or due.getTime() == self.clock.seconds())
        self.assertEqual(in_turns, [MAX_CALLS_PER_ITERATION, MAX_CALLS_PER_ITERATION, MAX_CALLS_PER_ITERATION - 1])
        self.assertEqual(self.timers._buckets, {})

    def test_one_cancels_all_others(self) -> None:
        timers: list[Any] = []
        self.timers.call_later(1.0, lambda: [timer.cancel() for timer in timers] and None)
        timers += [self.call("x", 1.0) for _ in range(MAX_CALLS_PER_ITERATION)]
        self.clock.advance(2)
        self.assertEqual((self.fired, self.timers._buckets, self.clock.getDelayedCalls()), ([], {}, []))

    def test_cancel(self) -> None:
        timers = [self.timers.call_later(1.0, lambda: self.fired.append(("x", 0))) for _ in range(3)]
        timers[1].cancel()
        timers[1].cancel()
        self.clock.advance(2)
        self.assertEqual(len(self.fired), 2)
        timers[0].cancel()

    def test_nothing_is_left(self) -> None:
        for _ in range(3):
            for delay in (1.0, 1.0, 2.0):
                self.timers.call_later(delay, self.fail).cancel()
        self.call("x", 1.0)
        self.clock.advance(2)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.timers._buckets, {})

    def test_cancelled_by_another_of_the_same_tick(self) -> None:
        second = None
        self.timers.call_later(1.0, lambda: second.cancel())
        second = self.timers.call_later(1.0, lambda: self.fired.append(("x", 0)))
        self.clock.advance(2)
        self.assertEqual(self.fired, [])

    def test_error(self) -> None:
        """The other timers of the same tick are called."""
        self.timers.call_later(1.0, lambda: 1 / 0)
        self.call("x", 1.0)
        self.clock.advance(2)
        self.assertEqual(len(self.fired), 1)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_call_later_from_a_timer(self) -> None:
        self.timers.call_later(1.0, lambda: self.call("again", 1.0))
        self.clock.pump([0.05] * 60)
        self.assertEqual([name for name, _ in self.fired], ["again"])
