"""Tests for :mod:`gateway.rpc.remote`: a node that may have lost its clients without a word asks before it calls them."""

from __future__ import annotations

import json

from twisted.internet.defer import Deferred

from gateway.registry.interface import RegistryUnavailable
from gateway.rpc.location_cache import PATIENCE
from gateway.rpc.pending import Reply
from tests.rpc.fakes import SeekingTestCase, Told, elsewhere

REPLY = Reply(b"1", None)


class DoubtTests(SeekingTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.doubtful = True
        self.connect("x", 5)

    def test_called_where_the_registry_says(self) -> None:
        call = self.hub.call("x", "m", None)
        self.assertEqual(self.edge.sent, [])
        self.elsewhere.answers(REPLY)
        self.assertEqual(self.successResultOf(call), REPLY)
        self.assertEqual((self.edge.sent, self.counted()), ([], (1, 1, {})))

    def test_nothing_is_handed_over_at_once(self) -> None:
        self.assertFalse(self.hub.ask(Told(), "x", "m", None))
        self.assertFalse(self.hub.notify_here("x", "m", None))
        self.assertEqual(self.edge.sent, [])

    def test_called_here_if_the_registry_knows_nothing_newer(self) -> None:
        for outcome in (
            None,
            elsewhere("this-node", generation=5),
            elsewhere(generation=4),
            RegistryUnavailable("away"),
        ):
            self.registry.outcome = outcome
            self.edge.sent.clear()
            call = self.hub.call("x", "m", None)
            ((_, generation, payload),) = self.edge.sent
            self.assertEqual(generation, 5)
            self.hub.message_received(
                "x", 5, json.dumps({"jsonrpc": "2.0", "id": json.loads(payload)["id"], "result": 1}).encode()
            )
            self.assertEqual(self.successResultOf(call), REPLY)

    def test_called_here_if_the_registry_hangs(self) -> None:
        self.registry.outcome = Deferred()
        self.hub.call("x", "m", None)
        self.clock.advance(PATIENCE)
        self.assertEqual(len(self.edge.sent), 1)

    def test_told_where_the_registry_says(self) -> None:
        telling = self.hub.notify("x", "m", None)
        self.assertEqual((self.edge.sent, len(self.elsewhere.told)), ([], 1))
        self.assertNoResult(telling)

    def test_what_another_node_asks_names_the_claim(self) -> None:
        """It was found in the registry just now."""
        self.assertTrue(self.hub.ask_here(Told(), "x", 5, "m", None))
        self.assertTrue(self.hub.notify_to("x", 5, "m", None))
        self.assertEqual(len(self.edge.sent), 2)
