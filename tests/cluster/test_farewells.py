"""Sending clients away: what they are told, and when they are closed."""

from collections import Counter

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.drain import MAX_RECONNECT_DELAY, POLL_INTERVAL, GracefulDisconnect
from gateway.rpc.handoff import HANDOFF_TIMEOUT
from tests.cluster.fake_edge import FakeClientSessions


class GracefulDisconnectTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.sessions = FakeClientSessions(self.clock, 3)
        self.calls: Counter[tuple[str, int]] = Counter()
        self.goaways_begun: list[tuple[str, int, bool]] = []
        self.is_single_node = True
        self.graceful_disconnect = GracefulDisconnect(
            self.sessions,
            self.clock,
            max_call_timeout=60,
            begin_goaway=lambda *connection: self.goaways_begun.append(connection),
            in_flight=lambda *connection: self.calls[connection],
            release=self.sessions.release,
            is_single_node=lambda: self.is_single_node,
        )

    def advance(self, seconds: float) -> None:
        self.clock.pump([POLL_INTERVAL] * round(seconds / POLL_INTERVAL))

    def test_one_without_calls(self) -> None:
        self.assertTrue(self.graceful_disconnect.send_goaway("c-0", "rebalance", "ws://x/c-0"))
        goaway = self.sessions.goaways["c-0"]
        self.assertEqual(goaway["method"], "gateway.goaway")
        self.assertTrue(0 <= goaway["params"].pop("after") <= MAX_RECONNECT_DELAY)
        self.assertEqual(goaway["params"], {"reason": "rebalance", "url": "ws://x/c-0"})
        self.assertEqual(self.goaways_begun, [("c-0", 1, False)])
        self.assertEqual(self.sessions.closed, {"c-0": (0.0, 1012)})
        self.assertEqual((len(self.graceful_disconnect), self.clock.getDelayedCalls()), (0, []))

    def test_no_url(self) -> None:
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.assertNotIn("url", self.sessions.goaways["c-0"]["params"])

    def test_one_that_is_not_here(self) -> None:
        self.assertFalse(self.graceful_disconnect.send_goaway("nobody", "drain", None))
        self.assertEqual((self.goaways_begun, self.sessions.goaways), ([], {}))

    def test_calls_are_waited_for(self) -> None:
        self.calls["c-0", 1] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.assertEqual(self.graceful_disconnect.goaway_sent("c-0"), 1)
        self.assertFalse(self.graceful_disconnect.send_goaway("c-0", "drain", None))
        self.advance(59)
        self.assertEqual(self.sessions.closed, {})
        self.calls.clear()
        self.advance(2 * POLL_INTERVAL)
        self.assertEqual(self.sessions.closed["c-0"][1], 1012)
        self.assertEqual((self.graceful_disconnect.goaway_sent("c-0"), self.clock.getDelayedCalls()), (0, []))

    def test_calls_are_not_waited_for_for_ever(self) -> None:
        self.calls["c-0", 1] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.advance(60 + POLL_INTERVAL)
        self.assertIn("c-0", self.sessions.closed)

    def test_a_newer_connection_is_spared(self) -> None:
        """It came back to this node meanwhile."""
        self.calls["c-0", 1] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.sessions.generations["c-0"] = 2
        self.calls.clear()
        self.advance(1)
        self.assertEqual((self.sessions.closed, len(self.graceful_disconnect)), ({}, 0))

    def test_a_newer_connection_is_told_on_its_own(self) -> None:
        self.calls["c-0", 1] = self.calls["c-0", 2] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.sessions.generations["c-0"] = 2
        self.assertTrue(self.graceful_disconnect.send_goaway("c-0", "drain", None))
        self.calls["c-0", 2] = 0
        self.advance(1)
        self.assertIn("c-0", self.sessions.closed)

    def test_a_registry_that_is_away(self) -> None:
        self.sessions.registry_unavailable = True
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.assertIn("c-0", self.sessions.closed)

    def test_its_row_stays_for_a_moment_where_there_is_another_node(self) -> None:
        self.is_single_node = False
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.assertEqual(self.goaways_begun, [("c-0", 1, True)])
        self.assertEqual((self.sessions.closed["c-0"][1], self.sessions.kept_rows), (1012, {("c-0", 1)}))
        self.advance(HANDOFF_TIMEOUT / 2)
        self.graceful_disconnect.send_goaway("c-1", "drain", None)
        self.advance(HANDOFF_TIMEOUT / 2 + POLL_INTERVAL)
        self.assertEqual(self.sessions.kept_rows, {("c-1", 1)})
        self.advance(HANDOFF_TIMEOUT)
        self.assertEqual((self.sessions.kept_rows, self.clock.getDelayedCalls()), (set(), []))

    def test_a_row_that_cannot_be_removed(self) -> None:
        self.is_single_node, self.sessions.registry_unavailable = False, True
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.advance(HANDOFF_TIMEOUT + POLL_INTERVAL)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop(self) -> None:
        self.graceful_disconnect.stop()
        self.calls["c-0", 1] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.graceful_disconnect.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
