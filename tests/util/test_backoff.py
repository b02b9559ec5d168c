"""Tests of gateway.util.backoff."""

from __future__ import annotations

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
