"""Tests for :mod:`tests.simulation.scheduler`."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.simulation.scheduler import Scheduler


class FakePollable:
    """Ready as often as it is told."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.is_dirty = True
        self.polls = 0

    def poll(self) -> None:
        self.polls += 1
        self.left -= 1
        self.is_dirty = self.left > 0


class SchedulerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.scheduler = Scheduler(1, keep_trace=True)
        self.calls: list[tuple[float, str]] = []

    def call(self, name: str) -> None:
        self.calls.append((self.scheduler.now, name))

    def test_events_are_handled_in_order_of_time(self) -> None:
        self.scheduler.at(2.0, self.call, "b")
        self.scheduler.at(1.0, self.call, "a")
        self.scheduler.at(2.0, self.call, "c")
        self.scheduler.after(9.0, self.call, "later")
        self.scheduler.run(5.0)
        self.assertEqual((self.calls, self.scheduler.now), ([(1.0, "a"), (2.0, "b"), (2.0, "c")], 5.0))
        self.scheduler.run(10.0)
        self.assertEqual(self.calls[-1], (9.0, "later"))

    def test_cancelled(self) -> None:
        self.scheduler.at(1.0, self.call, "a").cancel()
        self.scheduler.run(5.0)
        self.assertEqual((self.calls, self.scheduler.handled), ([], 0))

    def test_not_before_now(self) -> None:
        self.scheduler.run(3.0)
        self.scheduler.at(1.0, self.call, "a")
        self.scheduler.run(4.0)
        self.assertEqual(self.calls, [(3.0, "a")])

    def test_stop(self) -> None:
        self.scheduler.at(1.0, self.scheduler.stop)
        self.scheduler.at(2.0, self.call, "a")
        self.scheduler.run(5.0)
        self.assertEqual((self.calls, self.scheduler.now), ([], 1.0))

    def test_polls_until_nothing_is_ready(self) -> None:
        pollable = FakePollable(3)
        self.scheduler.pollables.append(pollable)
        self.scheduler.run(1.0)
        self.assertEqual(pollable.polls, 3)

    def test_endless_loop(self) -> None:
        def again() -> None:
            self.scheduler.after(0.0, again)

        again()
        with self.assertRaises(RuntimeError):
            self.scheduler.run(1.0)

    def test_trace(self) -> None:
        before = self.scheduler.trace_hash()
        self.scheduler.trace("x -> y")
        self.assertEqual(self.scheduler.lines, ["   0.000000 x -> y"])
        self.assertNotEqual(self.scheduler.trace_hash(), before)

    def test_randomness_of_parts(self) -> None:
        """What one part draws does not change what another one does."""
        first = Scheduler(7).make_random("a").random()
        scheduler = Scheduler(7)
        scheduler.make_random("b").random()
        self.assertEqual(scheduler.make_random("a").random(), first)
        self.assertNotEqual(Scheduler(8).make_random("a").random(), first)
