"""Tests of gateway.clients.admission: a client that is placed on another node."""

from __future__ import annotations

from twisted.internet.defer import Deferred

from gateway.clients.admission import MAX_REPLACEMENTS
from gateway.clients.interface import RouteDecision
from gateway.protocol.handshake import RequestRefusedError
from gateway.registry.interface import AssignedElsewhereError, Assignment
from tests.edge.test_admission import AdmissionTestCase, FakeRelay, owner_location


class AssignmentTest(AdmissionTestCase):
    """A client that was told to move to another node is sent there, wherever it is."""

    assignment = Assignment("node-c", "c", "ws://192.0.2.3", "ws://192.0.2.3:81")

    def fail_placed_elsewhere(self) -> None:
        self.registry.claims[-1][2].errback(AssignedElsewhereError("a", self.assignment))

    def test_sent_there(self) -> None:
        url = "ws://192.0.2.3/v1/connect?client_id=a&wsgateway_hop=1"
        self.router.decision = RouteDecision(url=url)
        client = self.connect("client_id=a", ("Wsgateway-Redirect", "1"))
        self.assertEqual(self.registry.assignments_honored, [True])
        self.fail_placed_elsewhere()
        status, word, headers = client.refusal()
        self.assertEqual((status, word, headers["Location"]), (307, "elsewhere", url))
        self.assertEqual((self.router.sent, self.router.routed), ([self.assignment], []))

    def test_relayed_there_though_it_is_still_here(self) -> None:
        self.connect()
        self.registry.grant()
        relay = FakeRelay()
        self.router.decision = RouteDecision(relay=relay)
        client = self.connect()
        self.fail_placed_elsewhere()
        client.expect_open()
        self.assertIs(relay.attached, client.protocol)
        self.assertEqual(self.node.sessions.generation("a"), 1)

    def test_a_node_that_does_not_take_it(self) -> None:
        """Then it is as if it were not placed: no loop."""
        client = self.connect()
        self.fail_placed_elsewhere()
        self.assertEqual(
            (self.registry.claim_policies, self.registry.assignments_honored), ([(0, True)] * 2, [True, False])
        )
        self.registry.grant()
        client.expect_open()

    def test_a_node_that_does_not_take_it_while_another_holds_it(self) -> None:
        client = self.connect()
        self.fail_placed_elsewhere()
        self.fail_held_elsewhere()
        self.assertEqual((self.router.routed, self.router.sent), ([owner_location()], [self.assignment]))
        self.assertEqual(
            (self.registry.claim_policies[-1], self.registry.assignments_honored[-1]), ((None, True), False)
        )
        self.registry.grant(previous_owner=owner_location())
        client.expect_open()

    def test_a_node_that_does_not_answer_in_time(self) -> None:
        self.router.decision = answer = Deferred()
        client = self.connect()
        self.fail_placed_elsewhere()
        self.node.advance(1)
        answer.callback(None)
        self.registry.grant()
        client.expect_open()

    def test_refused_there(self) -> None:
        self.router.decision = RequestRefusedError(429, "replaced", "too often", [("Retry-After", "9")])
        client = self.connect()
        self.fail_placed_elsewhere()
        self.assertEqual(client.refusal()[:2], (429, "replaced"))

    def test_one_that_was_sent_here_is_claimed_whatever_its_placement_says(self) -> None:
        self.connect("client_id=a&wsgateway_hop=1")
        self.assertEqual((self.registry.claim_policies, self.registry.assignments_honored), ([(None, True)], [False]))

    def test_without_other_nodes_nobody_looks(self) -> None:
        self.router.peers_exist = False
        self.connect()
        self.assertEqual(self.registry.assignments_honored, [False])

    def test_two_programs_with_one_client_id(self) -> None:
        """A placement does not let them evict each other more often."""
        for _ in range(MAX_REPLACEMENTS):
            client = self.connect("client_id=a&wsgateway_hop=1")
            self.registry.grant(previous_owner=owner_location())
            client.lose()
        self.connect()
        self.assertEqual((self.registry.claim_policies[-1], self.registry.assignments_honored[-1]), ((0, True), False))

    def test_where_clients_are_taken_over_it_is_sent_all_the_same(self) -> None:
        self.router.routes_to_owner = False
        self.router.decision = RouteDecision(relay=FakeRelay())
        client = self.connect()
        self.assertEqual((self.registry.claim_policies, self.registry.assignments_honored), ([(None, True)], [True]))
        self.fail_placed_elsewhere()
        client.expect_open()
