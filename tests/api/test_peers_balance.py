"""What another node can ask of the balance of this one."""

from __future__ import annotations

from tests.api.case import LinkTestCase, call
from tests.api.fakes import Endpoint, Link, peer_ok
from tests.cluster.fakes import FakeBalance


class BalanceTests(LinkTestCase):
    def result(self, method):
        return self.asked(method, {})["result"]

    def test_has_room(self):
        self.assertIs(self.result("peer.has_room"), True)
        for number in range(98):
            self.edge.add(f"c{number}")
        self.assertIs(self.result("peer.has_room"), True)
        self.edge.add("last")
        self.assertIs(self.result("peer.has_room"), False)
        del self.edge.here["last"]
        for why in ("draining", "registry", "starting"):
            self.node.why = why
            self.assertIs(self.result("peer.has_room"), False)

    def test_rebalance(self):
        balance = FakeBalance(moving=250)
        self.link = self.backend = Link(Endpoint(peer_ok=peer_ok, balance=balance))
        self.assertEqual((self.result("peer.rebalance"), balance.begun), ({"moving": 250}, 1))

    def test_rebalance_where_it_is_off(self):
        for balance in (None, FakeBalance(rate=0.0)):
            self.link = self.backend = Link(Endpoint(peer_ok=peer_ok, balance=balance))
            self.link.tell(call("u", "peer.rebalance", {}))
            self.assertIn("--rebalance-rate", self.failed(-32600, None))
