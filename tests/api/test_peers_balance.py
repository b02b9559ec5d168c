"""What another node can ask of the balance of this one."""

from __future__ import annotations

from tests.api.case import PeerConnectionTestCase, call
from tests.api.fakes import EndpointHarness, PeerWebSocket, authenticate_peer
from tests.cluster.fakes import FakeRebalancer


class RebalanceTests(PeerConnectionTestCase):
    def result(self, method):
        return self.request(method, {})["result"]

    def test_has_room(self):
        self.assertIs(self.result("peer.has_room"), True)
        for number in range(98):
            self.sessions.add(f"c{number}")
        self.assertIs(self.result("peer.has_room"), True)
        self.sessions.add("last")
        self.assertIs(self.result("peer.has_room"), False)
        del self.sessions.clients["last"]
        for why in ("draining", "registry", "starting"):
            self.node.not_ready_because = why
            self.assertIs(self.result("peer.has_room"), False)

    def test_rebalance(self):
        balance = FakeRebalancer(moving=250)
        self.peer = self.backend = PeerWebSocket(
            EndpointHarness(authenticate_peer=authenticate_peer, rebalancer=balance)
        )
        self.assertEqual((self.result("peer.rebalance"), balance.runs), ({"moving": 250}, 1))

    def test_rebalance_where_it_is_off(self):
        for balance in (None, FakeRebalancer(rate=0.0)):
            self.peer = self.backend = PeerWebSocket(
                EndpointHarness(authenticate_peer=authenticate_peer, rebalancer=balance)
            )
            self.peer.send_message(call("u", "peer.rebalance", {}))
            self.assertIn("--rebalance-rate", self.assert_failed(-32600, None))
