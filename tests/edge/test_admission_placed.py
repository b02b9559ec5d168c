"""Tests of gateway.clients.admission: a client that is placed on another node."""

from __future__ import annotations

from twisted.internet.defer import Deferred

from gateway.clients.admission import MAX_REPLACEMENTS
from gateway.clients.interface import Elsewhere
from gateway.protocol.handshake import Refusal
from gateway.registry.interface import Place, PlacedElsewhere
from tests.edge.test_admission import AdmissionCase, FakeRelay, held


class PlacedTest(AdmissionCase):
    """A client that was told to move to another node is sent there, wherever it is."""

    place = Place("node-c", "c", "ws://192.0.2.3", "ws://192.0.2.3:81")

    def is_placed(self) -> None:
        self.registry.claims[-1][2].errback(PlacedElsewhere("a", self.place))

    def test_sent_there(self) -> None:
        url = "ws://192.0.2.3/v1/connect?client_id=a&wsgateway_hop=1"
        self.placement.answer = Elsewhere(url=url)
        client = self.arrive("client_id=a", ("Wsgateway-Redirect", "1"))
        self.assertEqual(self.registry.follows, [True])
        self.is_placed()
        status, word, headers = client.refusal()
        self.assertEqual((status, word, headers["Location"]), (307, "elsewhere", url))
        self.assertEqual((self.placement.sent, self.placement.routed), ([self.place], []))

    def test_relayed_there_though_it_is_still_here(self) -> None:
        self.arrive()
        self.registry.grant()
        relay = FakeRelay()
        self.placement.answer = Elsewhere(relay=relay)
        client = self.arrive()
        self.is_placed()
        client.expect_open()
        self.assertIs(relay.attached, client.protocol)
        self.assertEqual(self.node.edge.generation("a"), 1)

    def test_a_node_that_does_not_take_it(self) -> None:
        """Then it is as if it were not placed: no loop."""
        client = self.arrive()
        self.is_placed()
        self.assertEqual((self.registry.asked, self.registry.follows), ([(0, True)] * 2, [True, False]))
        self.registry.grant()
        client.expect_open()

    def test_a_node_that_does_not_take_it_while_another_holds_it(self) -> None:
        client = self.arrive()
        self.is_placed()
        self.is_held()
        self.assertEqual((self.placement.routed, self.placement.sent), ([held()], [self.place]))
        self.assertEqual((self.registry.asked[-1], self.registry.follows[-1]), ((None, True), False))
        self.registry.grant(before=held())
        client.expect_open()

    def test_a_node_that_does_not_answer_in_time(self) -> None:
        self.placement.answer = answer = Deferred()
        client = self.arrive()
        self.is_placed()
        self.node.advance(1)
        answer.callback(None)
        self.registry.grant()
        client.expect_open()

    def test_refused_there(self) -> None:
        self.placement.answer = Refusal(429, "replaced", "too often", [("Retry-After", "9")])
        client = self.arrive()
        self.is_placed()
        self.assertEqual(client.refusal()[:2], (429, "replaced"))

    def test_one_that_was_sent_here_is_claimed_whatever_its_placement_says(self) -> None:
        self.arrive("client_id=a&wsgateway_hop=1")
        self.assertEqual((self.registry.asked, self.registry.follows), ([(None, True)], [False]))

    def test_without_other_nodes_nobody_looks(self) -> None:
        self.placement.others = False
        self.arrive()
        self.assertEqual(self.registry.follows, [False])

    def test_two_programs_with_one_client_id(self) -> None:
        """A placement does not let them evict each other more often."""
        for _ in range(MAX_REPLACEMENTS):
            client = self.arrive("client_id=a&wsgateway_hop=1")
            self.registry.grant(before=held())
            client.lose()
        self.arrive()
        self.assertEqual((self.registry.asked[-1], self.registry.follows[-1]), ((0, True), False))

    def test_where_clients_are_taken_over_it_is_sent_all_the_same(self) -> None:
        self.placement.routes = False
        self.placement.answer = Elsewhere(relay=FakeRelay())
        client = self.arrive()
        self.assertEqual((self.registry.asked, self.registry.follows), ([(None, True)], [True]))
        self.is_placed()
        client.expect_open()
