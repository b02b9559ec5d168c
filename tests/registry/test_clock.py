"""Tests for :mod:`gateway.registry.clock`."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.clock import DatabaseClock, UnobservedClock

SECOND = 1_000_000
LEASE, HEARTBEAT = 15.0, 5.0
HOUR = 3600.0


class ClockCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.monotonic = 100.0
        self.database = 1_000_000.0
        self.clock = DatabaseClock(lambda: self.monotonic, lease=LEASE, heartbeat=HEARTBEAT)

    def now(self) -> int:
        return round(self.database * SECOND)

    def advance(self, seconds: float, database: float | None = None) -> None:
        self.monotonic += seconds
        self.database += seconds if database is None else database

    def observe(self, duration: float = 0.0) -> float:
        sent_at = self.monotonic
        self.advance(duration)
        step, self.observed_horizon = self.clock.observe(self.now(), sent_at)
        return step

    def horizon(self, duration: float = 0.0) -> int:
        """The statement takes ``duration`` seconds, and reads the clock first."""
        now, sent_at = self.now(), self.monotonic
        self.advance(duration)
        return self.clock.horizon(now, sent_at)

    def is_live(self, age: float) -> bool:
        return self.clock.is_live(round((self.database - age) * SECOND), self.now())

    def assert_judges_nothing(self) -> None:
        for age in (-HOUR, 0.0, HOUR):
            self.assertTrue(self.is_live(age))

    def assert_judges(self) -> None:
        self.assertEqual(
            [self.is_live(age) for age in (-HOUR, -4.0, 0.0, 14.0, HOUR)], [False, True, True, True, False]
        )


class DatabaseClockTests(ClockCase):
    def test_steady(self) -> None:
        for _ in range(4):
            self.assertEqual(self.observe(), 0.0)
            self.advance(HEARTBEAT)
        self.assertTrue(self.clock.is_steady())
        self.assert_judges()

    def test_the_future_is_not_judged_before_one_lease(self) -> None:
        """A node that has just joined does not know whether the clock was set."""
        self.observe()
        self.assertEqual([self.is_live(age) for age in (-HOUR, HOUR)], [True, False])
        self.advance(LEASE)
        self.assert_judges()

    def test_step(self) -> None:
        for step in (-HOUR, HOUR):
            self.setUp()
            self.observe()
            self.advance(LEASE)
            self.observe()
            self.advance(1.0, 1.0 + step)
            # Before the next heartbeat, too.
            self.assert_judges_nothing()
            self.advance(4.0)
            self.assertAlmostEqual(self.observe(), step)
            self.assertFalse(self.clock.is_steady())
            self.assert_judges_nothing()
            self.advance(LEASE - 0.1)
            self.assert_judges_nothing()
            self.advance(0.2)
            self.assertTrue(self.clock.is_steady())
            self.assert_judges()

    def test_small_step(self) -> None:
        self.observe()
        self.advance(5.0, 9.9)
        self.assertEqual(self.observe(), 0.0)
        self.assertEqual(self.observed_horizon, 0)
        expected = self.now() + 5 * SECOND
        self.advance(5.0, 0.1)
        self.assertEqual(self.observe(), 0.0)
        self.assertEqual(self.observed_horizon, expected)

    def test_slow_answers_are_no_step(self) -> None:
        self.observe(duration=4.0)
        self.advance(5.0)
        self.assertEqual(self.observe(duration=4.0), 0.0)

    def test_process_that_was_suspended(self) -> None:
        """Both clocks have moved."""
        self.observe()
        self.advance(HOUR)
        self.assertFalse(self.is_live(LEASE))
        self.assertEqual(self.observe(), 0.0)

    def test_horizon(self) -> None:
        self.assertEqual(self.horizon(), 0)
        self.observe()
        self.advance(3.0)
        self.assertEqual(self.horizon(), 0)
        expected = self.now()
        self.advance(0.0, -HOUR)
        self.assertEqual(self.horizon(), expected)

    def test_horizon_of_a_step_shorter_than_the_time_since_the_heartbeat(self) -> None:
        self.observe()
        self.advance(4.0, 1.0)
        self.assertEqual(self.horizon(), self.now() + 3 * SECOND)

    def test_horizon_of_a_slow_answer(self) -> None:
        self.observe()
        self.advance(4.0)
        self.assertEqual(self.horizon(duration=3.0), 0)

    def test_was_set(self) -> None:
        self.observe()
        self.advance(4.0)
        self.assertFalse(self.clock.was_set(self.now()))
        self.advance(0.0, 3.0)
        self.assertTrue(self.clock.was_set(self.now()))
        self.observe()
        # Until the other nodes have sent heartbeats.
        self.advance(LEASE - 0.1)
        self.assertTrue(self.clock.was_set(self.now()))
        self.advance(0.2)
        self.assertFalse(self.clock.was_set(self.now()))

    def test_a_slow_answer_is_no_step_ahead(self) -> None:
        self.observe(duration=4.0)
        self.advance(4.0, 8.0)
        self.assertFalse(self.clock.was_set(self.now()))

    def test_unobserved(self) -> None:
        self.clock = UnobservedClock(LEASE)
        self.assertEqual([self.is_live(age) for age in (0.0, 14.0, 15.0)], [True, True, False])

    @given(st.lists(st.tuples(st.floats(0.0, 30.0), st.floats(-100.0, 100.0), st.floats(0.0, 4.0)), max_size=20))
    def test_any_steps(self, steps: list[tuple[float, float, float]]) -> None:
        """A step of more than a heartbeat, beyond what a slow answer may explain, is found."""
        self.setUp()
        self.observe()
        for seconds, step, duration in steps:
            self.advance(seconds, seconds + step)
            found = self.observe(duration)
            if abs(step) > HEARTBEAT + 8.1:
                self.assertTrue(found)
                self.assertEqual(found > 0, step > 0)
                self.assertFalse(self.clock.is_steady())
            elif abs(step) < HEARTBEAT - 0.1:
                self.assertEqual(found, 0.0)
