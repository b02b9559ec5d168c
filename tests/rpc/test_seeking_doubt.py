"""Tests for :mod:`gateway.rpc.remote`: a node that may have lost its clients without a word asks before it calls them."""

from __future__ import annotations

import json

from twisted.internet.defer import Deferred

from gateway.registry.interface import RegistryUnavailableError
from gateway.rpc.location_cache import FALLBACK_TIMEOUT
from gateway.rpc.pending import Reply
from tests.rpc.fakes import RecordingCall, RemoteDeliveryTestCase, remote_location

REPLY = Reply(b"1", None)


class OwnershipUncertainTests(RemoteDeliveryTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.ownership_uncertain = True
        self.connect("x", 5)

    def test_called_where_the_registry_says(self) -> None:
        call = self.dispatcher.call("x", "m", None)
        self.assertEqual(self.sessions.sent, [])
        self.remote_nodes.reply(REPLY)
        self.assertEqual(self.successResultOf(call), REPLY)
        self.assertEqual((self.sessions.sent, self.call_counts()), ([], (1, 1, {})))

    def test_nothing_is_handed_over_at_once(self) -> None:
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))
        self.assertFalse(self.dispatcher.try_notify("x", "m", None))
        self.assertEqual(self.sessions.sent, [])

    def test_called_here_if_the_registry_knows_nothing_newer(self) -> None:
        for outcome in (
            None,
            remote_location("this-node", generation=5),
            remote_location(generation=4),
            RegistryUnavailableError("away"),
        ):
            self.registry.result = outcome
            self.sessions.sent.clear()
            call = self.dispatcher.call("x", "m", None)
            ((_, generation, payload),) = self.sessions.sent
            self.assertEqual(generation, 5)
            self.dispatcher.message_received(
                "x", 5, json.dumps({"jsonrpc": "2.0", "id": json.loads(payload)["id"], "result": 1}).encode()
            )
            self.assertEqual(self.successResultOf(call), REPLY)

    def test_called_here_if_the_registry_hangs(self) -> None:
        self.registry.result = Deferred()
        self.dispatcher.call("x", "m", None)
        self.clock.advance(FALLBACK_TIMEOUT)
        self.assertEqual(len(self.sessions.sent), 1)

    def test_told_where_the_registry_says(self) -> None:
        telling = self.dispatcher.notify("x", "m", None)
        self.assertEqual((self.sessions.sent, len(self.remote_nodes.notifications)), ([], 1))
        self.assertNoResult(telling)

    def test_what_another_node_asks_names_the_claim(self) -> None:
        """It was found in the registry just now."""
        self.assertTrue(self.dispatcher.call_session(RecordingCall(), "x", 5, "m", None))
        self.assertTrue(self.dispatcher.notify_session("x", 5, "m", None))
        self.assertEqual(len(self.sessions.sent), 2)
