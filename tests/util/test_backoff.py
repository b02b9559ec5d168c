"""Tests of gateway.util.backoff."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.util.backoff import Backoff, half_jitter


class BackoffTests(SynchronousTestCase):
    def test_delays_double_up_to_the_maximum(self) -> None:
        backoff = Backoff(0.5, 3.0)
        self.assertEqual([backoff.next_delay() for _ in range(5)], [0.5, 1.0, 2.0, 3.0, 3.0])

    def test_reset(self) -> None:
        backoff = Backoff(0.5, 3.0)
        backoff.next_delay()
        backoff.reset()
        self.assertEqual((backoff.failures, backoff.next_delay()), (0, 0.5))

    def test_peek_counts_nothing(self) -> None:
        backoff = Backoff(0.5, 3.0)
        self.assertEqual([backoff.peek_delay(), backoff.peek_delay(), backoff.next_delay()], [0.5, 0.5, 0.5])

    def test_at_maximum(self) -> None:
        backoff = Backoff(0.5, 3.0, jitter=lambda: 0.0)
        self.assertEqual((backoff.next_delay(at_maximum=True), backoff.failures), (3.0, 1))

    def test_jitter_multiplies(self) -> None:
        backoff = Backoff(1.0, 8.0, jitter=lambda: 0.5)
        self.assertEqual([backoff.next_delay() for _ in range(4)], [0.5, 1.0, 2.0, 4.0])

    def test_any_number_of_failures(self) -> None:
        backoff = Backoff(1e-9, 60.0)
        backoff.failures = 10**6
        self.assertEqual(backoff.next_delay(), 60.0)

    def test_half_jitter(self) -> None:
        factors = [half_jitter() for _ in range(100)]
        self.assertTrue(all(0.5 <= factor <= 1.0 for factor in factors))
        self.assertGreater(len(set(factors)), 1)

    @settings(deadline=None, max_examples=100)
    @given(st.floats(0.001, 100), st.floats(1, 36), st.integers(0, 200), st.floats(0, 1))
    def test_bounds(self, initial: float, factor: float, failures: int, random: Any) -> None:
        """Delays are never negative, never above the maximum, and never above the bound for the number of failures."""
        maximum = initial * factor
        backoff = Backoff(initial, maximum, lambda: random)
        for _ in range(failures):
            backoff.next_delay()
        delay = backoff.next_delay()
        self.assertTrue(0 <= delay <= maximum)
        self.assertTrue(delay <= initial * 2.0**failures)
