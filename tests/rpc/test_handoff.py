"""Tests for :mod:`gateway.rpc.handoff`."""

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.interface import SessionKey
from gateway.rpc.handoff import HANDOFF_TIMEOUT, HandoffTracker


class HandoffTrackerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.handoffs = HandoffTracker(self.clock)
        self.handoffs.start(SessionKey("x", 5))

    def wait(self) -> Deferred[None]:
        waiter = self.handoffs.wait("x")
        assert waiter is not None
        return waiter

    def assert_nothing_left(self) -> None:
        self.assertEqual((len(self.handoffs), self.handoffs._waiters), (0, {}))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_no_wait_for_other_clients(self) -> None:
        self.assertIsNone(self.handoffs.wait("y"))

    def test_connected(self) -> None:
        first, second = self.wait(), self.wait()
        self.handoffs.disconnected(SessionKey("x", 5))
        self.assertNoResult(first)
        self.handoffs.connected(SessionKey("x", 6))
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertIsNone(self.handoffs.wait("x"))
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assert_nothing_left()

    def test_only_a_newer_connection_finishes_it(self) -> None:
        waiter = self.wait()
        for generation in (4, 5):
            self.handoffs.connected(SessionKey("x", generation))
        self.handoffs.connected(SessionKey("y", 9))
        self.assertNoResult(waiter)

    def test_timeout_after_disconnect(self) -> None:
        self.handoffs.disconnected(SessionKey("x", 5))
        self.clock.advance(HANDOFF_TIMEOUT - 0.1)
        waiter = self.wait()
        self.assertNoResult(waiter)
        self.clock.advance(0.1)
        self.successResultOf(waiter)
        self.assert_nothing_left()

    def test_wait_ends_though_the_old_connection_stays(self) -> None:
        waiter = self.wait()
        self.clock.advance(HANDOFF_TIMEOUT)
        self.successResultOf(waiter)
        self.assertEqual((len(self.handoffs), len(self.handoffs._waiters["x"])), (1, 0))

    def test_another_connection_is_closed(self) -> None:
        self.handoffs.disconnected(SessionKey("x", 4))
        self.handoffs.disconnected(SessionKey("y", 5))
        self.clock.advance(2 * HANDOFF_TIMEOUT)
        self.assertEqual(len(self.handoffs), 1)

    def test_another_goaway_before_the_timeout(self) -> None:
        self.handoffs.disconnected(SessionKey("x", 5))
        self.clock.advance(HANDOFF_TIMEOUT / 2)
        self.handoffs.start(SessionKey("x", 7))
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assertEqual(len(self.handoffs), 1)
        self.handoffs.disconnected(SessionKey("x", 7))
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assert_nothing_left()

    def test_timeout_of_each_client(self) -> None:
        self.handoffs.start(SessionKey("y", 1))
        self.handoffs.disconnected(SessionKey("x", 5))
        self.clock.advance(HANDOFF_TIMEOUT / 2)
        self.handoffs.disconnected(SessionKey("y", 1))
        self.clock.advance(HANDOFF_TIMEOUT / 2)
        self.assertEqual(len(self.handoffs), 1)
        self.clock.advance(HANDOFF_TIMEOUT / 2)
        self.assert_nothing_left()

    def test_cancelled(self) -> None:
        first, second = self.wait(), self.wait()
        first.addErrback(lambda _: None)
        first.cancel()
        self.handoffs.connected(SessionKey("x", 6))
        self.successResultOf(second)
        self.assert_nothing_left()
