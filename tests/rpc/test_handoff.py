"""Clients on their way from one node to another."""

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.rpc.handoff import HANDOFF_TIMEOUT, HandoffTracker


class HandoffTrackerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.handoffs = HandoffTracker(self.clock)
        self.handoffs.start("x", 5)

    def wait(self) -> Deferred[None]:
        waiting = self.handoffs.wait("x")
        assert waiting is not None
        return waiting

    def assert_nothing_left(self) -> None:
        self.assertEqual((len(self.handoffs), self.handoffs._waiters), (0, {}))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_nobody_waits_for_others(self) -> None:
        self.assertIsNone(self.handoffs.wait("y"))

    def test_arrived(self) -> None:
        first, second = self.wait(), self.wait()
        self.handoffs.disconnected("x", 5)
        self.assertNoResult(first)
        self.handoffs.connected("x", 6)
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertIsNone(self.handoffs.wait("x"))
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assert_nothing_left()

    def test_what_is_not_newer_is_no_arrival(self) -> None:
        waiting = self.wait()
        for generation in (4, 5):
            self.handoffs.connected("x", generation)
        self.handoffs.connected("y", 9)
        self.assertNoResult(waiting)

    def test_it_does_not_come(self) -> None:
        self.handoffs.disconnected("x", 5)
        self.clock.advance(HANDOFF_TIMEOUT - 0.1)
        waiting = self.wait()
        self.assertNoResult(waiting)
        self.clock.advance(0.1)
        self.successResultOf(waiting)
        self.assert_nothing_left()

    def test_one_that_stays_for_its_calls_holds_nobody_up_for_ever(self) -> None:
        waiting = self.wait()
        self.clock.advance(HANDOFF_TIMEOUT)
        self.successResultOf(waiting)
        self.assertEqual((len(self.handoffs), self.handoffs._waiters), (1, {"x": []}))

    def test_the_end_of_another_connection(self) -> None:
        self.handoffs.disconnected("x", 4)
        self.handoffs.disconnected("y", 5)
        self.clock.advance(2 * HANDOFF_TIMEOUT)
        self.assertEqual(len(self.handoffs), 1)

    def test_told_again_before_it_was_given_up(self) -> None:
        self.handoffs.disconnected("x", 5)
        self.clock.advance(HANDOFF_TIMEOUT / 2)
        self.handoffs.start("x", 7)
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assertEqual(len(self.handoffs), 1)
        self.handoffs.disconnected("x", 7)
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assert_nothing_left()

    def test_each_in_its_time(self) -> None:
        self.handoffs.start("y", 1)
        self.handoffs.disconnected("x", 5)
        self.clock.advance(HANDOFF_TIMEOUT / 2)
        self.handoffs.disconnected("y", 1)
        self.clock.advance(HANDOFF_TIMEOUT / 2)
        self.assertEqual(len(self.handoffs), 1)
        self.clock.advance(HANDOFF_TIMEOUT / 2)
        self.assert_nothing_left()

    def test_cancelled(self) -> None:
        first, second = self.wait(), self.wait()
        first.addErrback(lambda _: None)
        first.cancel()
        self.handoffs.connected("x", 6)
        self.successResultOf(second)
        self.assert_nothing_left()
