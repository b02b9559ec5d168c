"""Sending clients away: what they are told, and when they are closed."""

from collections import Counter

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.drain import LONGEST_WAIT, TICK, Farewells
from gateway.rpc.handoff import HOLD
from tests.cluster.fake_edge import FakeEdge


class FarewellsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.edge = FakeEdge(self.clock, 3)
        self.calls: Counter[tuple[str, int]] = Counter()
        self.let_go: list[tuple[str, int, bool]] = []
        self.alone = True
        self.farewells = Farewells(
            self.edge,
            self.clock,
            longest_call=60,
            let_go=lambda *connection: self.let_go.append(connection),
            in_flight=lambda *connection: self.calls[connection],
            release=self.edge.release,
            alone=lambda: self.alone,
        )

    def advance(self, seconds: float) -> None:
        self.clock.pump([TICK] * round(seconds / TICK))

    def test_one_without_calls(self) -> None:
        self.assertTrue(self.farewells.say("c-0", "rebalance", "ws://x/c-0"))
        goaway = self.edge.told["c-0"]
        self.assertEqual(goaway["method"], "gateway.goaway")
        self.assertTrue(0 <= goaway["params"].pop("after") <= LONGEST_WAIT)
        self.assertEqual(goaway["params"], {"reason": "rebalance", "url": "ws://x/c-0"})
        self.assertEqual(self.let_go, [("c-0", 1, False)])
        self.assertEqual(self.edge.closed, {"c-0": (0.0, 1012)})
        self.assertEqual((len(self.farewells), self.clock.getDelayedCalls()), (0, []))

    def test_no_url(self) -> None:
        self.farewells.say("c-0", "drain", None)
        self.assertNotIn("url", self.edge.told["c-0"]["params"])

    def test_one_that_is_not_here(self) -> None:
        self.assertFalse(self.farewells.say("nobody", "drain", None))
        self.assertEqual((self.let_go, self.edge.told), ([], {}))

    def test_calls_are_waited_for(self) -> None:
        self.calls["c-0", 1] = 1
        self.farewells.say("c-0", "drain", None)
        self.assertEqual(self.farewells.told("c-0"), 1)
        self.assertFalse(self.farewells.say("c-0", "drain", None))
        self.advance(59)
        self.assertEqual(self.edge.closed, {})
        self.calls.clear()
        self.advance(2 * TICK)
        self.assertEqual(self.edge.closed["c-0"][1], 1012)
        self.assertEqual((self.farewells.told("c-0"), self.clock.getDelayedCalls()), (0, []))

    def test_calls_are_not_waited_for_for_ever(self) -> None:
        self.calls["c-0", 1] = 1
        self.farewells.say("c-0", "drain", None)
        self.advance(60 + TICK)
        self.assertIn("c-0", self.edge.closed)

    def test_a_newer_connection_is_spared(self) -> None:
        """It came back to this node meanwhile."""
        self.calls["c-0", 1] = 1
        self.farewells.say("c-0", "drain", None)
        self.edge.generations["c-0"] = 2
        self.calls.clear()
        self.advance(1)
        self.assertEqual((self.edge.closed, len(self.farewells)), ({}, 0))

    def test_a_newer_connection_is_told_on_its_own(self) -> None:
        self.calls["c-0", 1] = self.calls["c-0", 2] = 1
        self.farewells.say("c-0", "drain", None)
        self.edge.generations["c-0"] = 2
        self.assertTrue(self.farewells.say("c-0", "drain", None))
        self.calls["c-0", 2] = 0
        self.advance(1)
        self.assertIn("c-0", self.edge.closed)

    def test_a_registry_that_is_away(self) -> None:
        self.edge.registry_is_away = True
        self.farewells.say("c-0", "drain", None)
        self.assertIn("c-0", self.edge.closed)

    def test_its_row_stays_for_a_moment_where_there_is_another_node(self) -> None:
        self.alone = False
        self.farewells.say("c-0", "drain", None)
        self.assertEqual(self.let_go, [("c-0", 1, True)])
        self.assertEqual((self.edge.closed["c-0"][1], self.edge.rows), (1012, {("c-0", 1)}))
        self.advance(HOLD / 2)
        self.farewells.say("c-1", "drain", None)
        self.advance(HOLD / 2 + TICK)
        self.assertEqual(self.edge.rows, {("c-1", 1)})
        self.advance(HOLD)
        self.assertEqual((self.edge.rows, self.clock.getDelayedCalls()), (set(), []))

    def test_a_row_that_cannot_be_removed(self) -> None:
        self.alone, self.edge.registry_is_away = False, True
        self.farewells.say("c-0", "drain", None)
        self.advance(HOLD + TICK)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop(self) -> None:
        self.farewells.stop()
        self.calls["c-0", 1] = 1
        self.farewells.say("c-0", "drain", None)
        self.farewells.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
