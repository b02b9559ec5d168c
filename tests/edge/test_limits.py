"""Tests of gateway.util.rate_limit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.handshake import retry_after
from gateway.util.log import Troubles
from gateway.util.rate_limit import Rate, RateByKey, Recent, network_of


class RateTest(SynchronousTestCase):
    """Rate"""

    def allowed(self, rate: Rate, times: list[float]) -> list[bool]:
        full_at, outcome = 0.0, []
        for now in times:
            outcome.append(not rate.wait(full_at, now))
            if outcome[-1]:
                full_at = rate.take(full_at, now)
        return outcome

    def test_one_seconds_worth_at_once(self) -> None:
        self.assertEqual(self.allowed(Rate(3), [100.0] * 5), [True] * 3 + [False] * 2)

    def test_refills(self) -> None:
        times = [100.0] * 3 + [100.3, 100.34, 100.34, 100.67]
        self.assertEqual(self.allowed(Rate(3), times), [True] * 3 + [False, True, False, True])

    def test_less_than_one_a_second(self) -> None:
        self.assertEqual(self.allowed(Rate(0.1), [50.0, 50.0, 59.9, 60.0]), [True, False, False, True])

    def test_several_at_once(self) -> None:
        rate = Rate(10)
        full_at = rate.take(0.0, 100.0, 25)
        self.assertAlmostEqual(rate.wait(full_at, 100.0), 1.6)
        self.assertEqual(rate.wait(full_at, 101.6), 0.0)

    def test_wait(self) -> None:
        rate = Rate(0.5)
        self.assertAlmostEqual(rate.wait(rate.take(0.0, 10.0), 10.5), 1.5)

    @settings(deadline=None, max_examples=100)
    @given(st.integers(1, 1000), st.lists(st.floats(0, 0.05), max_size=200))
    def test_never_more(self, per_second: int, gaps: list[float]) -> None:
        """In any stretch of time, at most its length times the rate, and a full bucket."""
        now, times = 1e6, []
        for gap in gaps:
            now += gap
            times.append(now)
        taken = [time for time, ok in zip(times, self.allowed(Rate(per_second), times), strict=True) if ok]
        for first in range(0, len(taken), 7):
            for last in range(first, len(taken), 5):
                stretch = taken[last] - taken[first]
                self.assertLessEqual(last - first + 1, per_second + stretch * per_second + 1e-3)


class RateByKeyTest(SynchronousTestCase):
    """RateByKey"""

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)

    def test_looking_takes_none(self) -> None:
        clock = Clock()
        rates = RateByKey(2, clock.seconds)
        self.assertFalse(rates.is_over("a"))
        self.assertEqual(len(rates), 0)
        for _ in range(2):
            self.assertFalse(rates.is_over("a"))
            self.assertEqual(rates.wait("a"), 0)
        self.assertTrue(rates.is_over("a"))
        self.assertFalse(rates.is_over("b"))
        clock.advance(0.5)
        self.assertFalse(rates.is_over("a"))
        self.assertFalse(RateByKey(0, clock.seconds).is_over("a"))

    def test_keys_are_apart(self) -> None:
        rate = RateByKey(1, self.clock.seconds)
        self.assertEqual(rate.wait("a"), 0.0)
        self.assertEqual(rate.wait("a"), 1.0)
        self.assertEqual(rate.wait("b"), 0.0)

    def test_who_is_refused_pays_nothing(self) -> None:
        rate = RateByKey(1, self.clock.seconds)
        rate.wait("a")
        for _ in range(10):
            rate.wait("a")
        self.clock.advance(1)
        self.assertEqual(rate.wait("a"), 0.0)

    def test_no_limit(self) -> None:
        rate = RateByKey(0, self.clock.seconds)
        self.assertEqual({rate.wait("a") for _ in range(1000)}, {0.0})
        self.assertEqual(len(rate), 0)

    def test_idle_ones_are_forgotten(self) -> None:
        rate = RateByKey(10, self.clock.seconds)
        for key in range(100):
            rate.wait(str(key))
        self.assertEqual(len(rate), 100)
        self.clock.advance(2)
        for key in range(200, 300):
            rate.wait(str(key))
        self.assertLessEqual(len(rate), 101)

    def test_memory_is_bounded(self) -> None:
        rate = RateByKey(1, self.clock.seconds, most_keys=10)
        for key in range(100):
            rate.wait(str(key))
        self.assertEqual(len(rate), 10)
        self.assertEqual(rate.wait("99"), 1.0)


class RecentTest(SynchronousTestCase):
    """Recent"""

    def setUp(self) -> None:
        self.clock = Clock()
        self.recent = Recent(2, 60.0, self.clock.seconds, most_keys=5)

    def test_window(self) -> None:
        self.assertEqual(self.recent.wait("a"), 0.0)
        self.recent.add("a")
        self.clock.advance(10)
        self.assertEqual(self.recent.wait("a"), 0.0)
        self.recent.add("a")
        self.assertEqual(self.recent.wait("a"), 50.0)
        self.assertEqual(self.recent.wait("b"), 0.0)
        self.clock.advance(50)
        self.assertEqual(self.recent.wait("a"), 0.0)
        self.recent.add("a")
        self.assertEqual(self.recent.wait("a"), 10.0)

    def test_old_ones_are_forgotten(self) -> None:
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
    """network_of(), retry_after() and Troubles"""

    def test_networks(self) -> None:
        self.assertEqual(network_of("192.0.2.7"), "192.0.2.7")
        self.assertEqual(network_of("::ffff:192.0.2.7"), "192.0.2.7")
        self.assertEqual(network_of("2001:db8:1:2:3:4:5:6"), network_of("2001:db8:1:2::"))
        self.assertNotEqual(network_of("2001:db8:1:2::"), network_of("2001:db8:1:3::"))
        self.assertEqual(network_of("fe80::1%eth0"), network_of("fe80::2"))
        self.assertEqual(network_of(""), "")
        self.assertEqual(network_of("somewhere"), "")

    def test_retry_after(self) -> None:
        self.assertEqual([retry_after(wait)[1] for wait in (0.0, 0.2, 1.0, 1.1, 40)], ["1", "1", "1", "2", "40"])

    def test_troubles(self) -> None:
        clock = Clock()
        troubles = Troubles(clock.seconds, every=10.0)

        def boom(what: str) -> None:
            try:
                raise ZeroDivisionError
            except ZeroDivisionError:
                troubles.report(what)

        for _ in range(5):
            boom("one")
        boom("two")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)
        clock.advance(10)
        boom("one")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
