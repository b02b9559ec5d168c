"""Tests of gateway.util.rate_limit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.handshake import retry_after_header
from gateway.util.rate_limit import KeyedRateLimiter, SlidingWindow, TokenBucket, network_key


class TokenBucketTest(SynchronousTestCase):
    def allowed(self, rate: TokenBucket, times: list[float]) -> list[bool]:
        full_at, outcome = 0.0, []
        for now in times:
            outcome.append(not rate.wait_time(full_at, now))
            if outcome[-1]:
                full_at = rate.charge(full_at, now)
        return outcome

    def test_burst_of_one_second(self) -> None:
        self.assertEqual(self.allowed(TokenBucket(3), [100.0] * 5), [True] * 3 + [False] * 2)

    def test_refills(self) -> None:
        times = [100.0] * 3 + [100.3, 100.34, 100.34, 100.67]
        self.assertEqual(self.allowed(TokenBucket(3), times), [True] * 3 + [False, True, False, True])

    def test_less_than_one_a_second(self) -> None:
        self.assertEqual(self.allowed(TokenBucket(0.1), [50.0, 50.0, 59.9, 60.0]), [True, False, False, True])

    def test_several_at_once(self) -> None:
        rate = TokenBucket(10)
        full_at = rate.charge(0.0, 100.0, 25)
        self.assertAlmostEqual(rate.wait_time(full_at, 100.0), 1.6)
        self.assertEqual(rate.wait_time(full_at, 101.6), 0.0)

    def test_wait(self) -> None:
        rate = TokenBucket(0.5)
        self.assertAlmostEqual(rate.wait_time(rate.charge(0.0, 10.0), 10.5), 1.5)

    @settings(deadline=None, max_examples=100)
    @given(st.integers(1, 1000), st.lists(st.floats(0, 0.05), max_size=200))
    def test_never_more_than_the_rate(self, per_second: int, gaps: list[float]) -> None:
        """In any period, at most its length times the rate, and a full bucket."""
        now, times = 1e6, []
        for gap in gaps:
            now += gap
            times.append(now)
        taken = [time for time, ok in zip(times, self.allowed(TokenBucket(per_second), times), strict=True) if ok]
        for first in range(0, len(taken), 7):
            for last in range(first, len(taken), 5):
                stretch = taken[last] - taken[first]
                self.assertLessEqual(last - first + 1, per_second + stretch * per_second + 1e-3)


class KeyedRateLimiterTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)

    def test_is_limited_takes_none(self) -> None:
        clock = Clock()
        rates = KeyedRateLimiter(2, clock.seconds)
        self.assertFalse(rates.is_limited("a"))
        self.assertEqual(len(rates), 0)
        for _ in range(2):
            self.assertFalse(rates.is_limited("a"))
            self.assertEqual(rates.acquire("a"), 0)
        self.assertTrue(rates.is_limited("a"))
        self.assertFalse(rates.is_limited("b"))
        clock.advance(0.5)
        self.assertFalse(rates.is_limited("a"))
        self.assertFalse(KeyedRateLimiter(0, clock.seconds).is_limited("a"))

    def test_keys_are_independent(self) -> None:
        rate = KeyedRateLimiter(1, self.clock.seconds)
        self.assertEqual(rate.acquire("a"), 0.0)
        self.assertEqual(rate.acquire("a"), 1.0)
        self.assertEqual(rate.acquire("b"), 0.0)

    def test_refusal_takes_none(self) -> None:
        rate = KeyedRateLimiter(1, self.clock.seconds)
        rate.acquire("a")
        for _ in range(10):
            rate.acquire("a")
        self.clock.advance(1)
        self.assertEqual(rate.acquire("a"), 0.0)

    def test_no_limit(self) -> None:
        rate = KeyedRateLimiter(0, self.clock.seconds)
        self.assertEqual({rate.acquire("a") for _ in range(1000)}, {0.0})
        self.assertEqual(len(rate), 0)

    def test_idle_keys_are_forgotten(self) -> None:
        rate = KeyedRateLimiter(10, self.clock.seconds)
        for key in range(100):
            rate.acquire(str(key))
        self.assertEqual(len(rate), 100)
        self.clock.advance(2)
        for key in range(200, 300):
            rate.acquire(str(key))
        self.assertLessEqual(len(rate), 101)

    def test_memory_is_bounded(self) -> None:
        rate = KeyedRateLimiter(1, self.clock.seconds, max_keys=10)
        for key in range(100):
            rate.acquire(str(key))
        self.assertEqual(len(rate), 10)
        self.assertEqual(rate.acquire("99"), 1.0)


class SlidingWindowTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.recent = SlidingWindow(2, 60.0, self.clock.seconds, max_keys=5)

    def test_window(self) -> None:
        self.assertEqual(self.recent.wait_time("a"), 0.0)
        self.recent.add("a")
        self.clock.advance(10)
        self.assertEqual(self.recent.wait_time("a"), 0.0)
        self.recent.add("a")
        self.assertEqual(self.recent.wait_time("a"), 50.0)
        self.assertEqual(self.recent.wait_time("b"), 0.0)
        self.clock.advance(50)
        self.assertEqual(self.recent.wait_time("a"), 0.0)
        self.recent.add("a")
        self.assertEqual(self.recent.wait_time("a"), 10.0)

    def test_old_keys_are_forgotten(self) -> None:
        for key in "abc":
            self.recent.add(key)
        self.clock.advance(61)
        self.recent.add("d")
        self.recent.add("e")
        self.assertEqual(len(self.recent), 2)

    def test_memory_is_bounded(self) -> None:
        for key in range(50):
            self.recent.add(str(key))
        self.assertEqual(len(self.recent), 5)


class SmallTest(SynchronousTestCase):
    """network_key() and retry_after_header()"""

    def test_network_key(self) -> None:
        self.assertEqual(network_key("192.0.2.7"), "192.0.2.7")
        self.assertEqual(network_key("::ffff:192.0.2.7"), "192.0.2.7")
        self.assertEqual(network_key("2001:db8:1:2:3:4:5:6"), network_key("2001:db8:1:2::"))
        self.assertNotEqual(network_key("2001:db8:1:2::"), network_key("2001:db8:1:3::"))
        self.assertEqual(network_key("fe80::1%eth0"), network_key("fe80::2"))
        self.assertEqual(network_key(""), "")
        self.assertEqual(network_key("somewhere"), "")

    def test_retry_after_header(self) -> None:
        self.assertEqual([retry_after_header(wait)[1] for wait in (0.0, 0.2, 1.0, 1.1, 40)], ["1", "1", "1", "2", "40"])
