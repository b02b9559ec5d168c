"""Clients on their way from one node to another."""

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.rpc.handoff import HOLD, Departing


class DepartingTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.departing = Departing(self.clock)
        self.departing.begin("x", 5)

    def wait(self) -> Deferred[None]:
        waiting = self.departing.wait("x")
        assert waiting is not None
        return waiting

    def assert_nothing_left(self) -> None:
        self.assertEqual((len(self.departing), self.departing._waiters), (0, {}))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_nobody_waits_for_others(self) -> None:
        self.assertIsNone(self.departing.wait("y"))

    def test_arrived(self) -> None:
        first, second = self.wait(), self.wait()
        self.departing.gone("x", 5)
        self.assertNoResult(first)
        self.departing.arrived("x", 6)
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertIsNone(self.departing.wait("x"))
        self.clock.advance(HOLD)
        self.assert_nothing_left()

    def test_what_is_not_newer_is_no_arrival(self) -> None:
        waiting = self.wait()
        for generation in (4, 5):
            self.departing.arrived("x", generation)
        self.departing.arrived("y", 9)
        self.assertNoResult(waiting)

    def test_it_does_not_come(self) -> None:
        self.departing.gone("x", 5)
        self.clock.advance(HOLD - 0.1)
        waiting = self.wait()
        self.assertNoResult(waiting)
        self.clock.advance(0.1)
        self.successResultOf(waiting)
        self.assert_nothing_left()

    def test_one_that_stays_for_its_calls_holds_nobody_up_for_ever(self) -> None:
        waiting = self.wait()
        self.clock.advance(HOLD)
        self.successResultOf(waiting)
        self.assertEqual((len(self.departing), self.departing._waiters), (1, {"x": []}))

    def test_the_end_of_another_connection(self) -> None:
        self.departing.gone("x", 4)
        self.departing.gone("y", 5)
        self.clock.advance(2 * HOLD)
        self.assertEqual(len(self.departing), 1)

    def test_told_again_before_it_was_given_up(self) -> None:
        self.departing.gone("x", 5)
        self.clock.advance(HOLD / 2)
        self.departing.begin("x", 7)
        self.clock.advance(HOLD)
        self.assertEqual(len(self.departing), 1)
        self.departing.gone("x", 7)
        self.clock.advance(HOLD)
        self.assert_nothing_left()

    def test_each_in_its_time(self) -> None:
        self.departing.begin("y", 1)
        self.departing.gone("x", 5)
        self.clock.advance(HOLD / 2)
        self.departing.gone("y", 1)
        self.clock.advance(HOLD / 2)
        self.assertEqual(len(self.departing), 1)
        self.clock.advance(HOLD / 2)
        self.assert_nothing_left()

    def test_cancelled(self) -> None:
        first, second = self.wait(), self.wait()
        first.addErrback(lambda _: None)
        first.cancel()
        self.departing.arrived("x", 6)
        self.successResultOf(second)
        self.assert_nothing_left()
