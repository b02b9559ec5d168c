"""Tests of gateway.clients.admission: where a client is to be that arrives.

Tests of gateway.clients.admission: a client that is placed on another node.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from gateway.clients.admission import CLAIM_TIMEOUT, MAX_REPLACEMENTS
from gateway.clients.interface import ConnectRequest, IClientRouter, IRelay, RouteDecision
from gateway.protocol.errors import RequestRefusedError
from gateway.registry.errors import AssignedElsewhereError, OwnedElsewhereError
from gateway.registry.interface import Assignment, Location
from tests.fakes.clients import FakeClient, FakeNode, build_request


def owner_location(generation: int = 7, *, live: bool = True, state: str = "up") -> Location:
    return Location(
        "a", "node-b", "b", "ws://192.0.2.2:81", generation, 0.0, "198.51.100.7:1", live, "ws://192.0.2.2", state
    )


@implementer(IClientRouter)
class FakeClientRouter:
    """Answers as the test says; notes what it is asked."""

    def __init__(self, *, routes: bool = True) -> None:
        self.routes_to_owner = routes
        self.steady = True
        self.requests: list[ConnectRequest] = []
        self.peers_exist = True
        self.routed: list[Location] = []
        self.sent: list[Assignment] = []
        self.notified: list[tuple[str, int, Location]] = []
        self.decision: RouteDecision | RequestRefusedError | Deferred[Any] | None = None

    def may_evict_expired(self) -> bool:
        return self.steady

    def route_to_owner(self, request: ConnectRequest, owner: Location) -> Deferred[RouteDecision | None]:
        self.routed.append(owner)
        return self.route_overflow(request)

    def has_peers(self) -> bool:
        return self.peers_exist

    def route_to(self, request: ConnectRequest, assignment: Assignment) -> Deferred[RouteDecision | None]:
        self.sent.append(assignment)
        return self.route_overflow(request)

    def route_overflow(self, request: ConnectRequest) -> Deferred[RouteDecision | None]:
        self.requests.append(request)
        if isinstance(self.decision, Deferred):
            return self.decision
        return fail(self.decision) if isinstance(self.decision, RequestRefusedError) else succeed(self.decision)

    def notify_takeover(self, client_id: str, generation: int, previous_owner: Location) -> None:
        self.notified.append((client_id, generation, previous_owner))

    def notify_claim_revoked(self, client_id: str, generation: int, previous_owner: Location) -> None:
        self.notified.append((client_id, -generation, previous_owner))


@implementer(IRelay)
class FakeRelay:
    def __init__(self) -> None:
        self.attached: Any = None
        self.abandoned = False

    def attach(self, protocol: Any) -> None:
        self.attached = protocol

    def abandon(self) -> None:
        self.abandoned = True


class AdmissionTestCase(SynchronousTestCase):
    routes_to_owner = True

    def setUp(self) -> None:
        self.start()

    def start(self, **options: Any) -> None:
        self.router = FakeClientRouter(routes=self.routes_to_owner)
        self.node = FakeNode(router=self.router, openings_per_address=0, **options)
        self.registry = self.node.registry
        self.registry.grants_at_once = False

    def connect(self, query: str = "client_id=a", *extra: tuple[str, str]) -> FakeClient:
        client = self.node.dial()
        client.send(build_request(f"/v1/connect?{query}", extra=extra))
        return client

    def fail_held_elsewhere(self, location: Location | None = None) -> None:
        self.registry.claims[-1][2].errback(OwnedElsewhereError(location or owner_location()))


class RouteTest(AdmissionTestCase):
    """A client that another node holds is sent there."""

    def test_the_fake_is_true_to_the_interface(self) -> None:
        verifyObject(IClientRouter, self.router)
        verifyObject(IRelay, FakeRelay())

    def test_one_that_nobody_has_is_claimed_over_nobody(self) -> None:
        client = self.connect()
        self.assertEqual(self.registry.claim_policies, [(0, True)])
        self.registry.grant()
        client.expect_open()
        self.assertEqual((self.router.routed, self.router.notified), ([], []))

    def test_a_node_that_is_not_steady_judges_nobody(self) -> None:
        self.router.steady = False
        self.connect()
        self.assertEqual(self.registry.claim_policies, [(0, False)])

    def test_redirected(self) -> None:
        url = "ws://192.0.2.2/v1/connect?client_id=a&wsgateway_hop=1"
        self.router.decision = RouteDecision(url=url)
        client = self.connect(
            "client_id=a", ("Wsgateway-Redirect", "1"), ("Sec-WebSocket-Protocol", "x, wsgateway.bearer.T")
        )
        self.fail_held_elsewhere()
        status, word, headers = client.refusal()
        self.assertEqual((status, word, headers["Location"]), (307, "elsewhere", url))
        self.assertEqual(self.router.routed, [owner_location()])
        self.assertEqual(
            self.router.requests, [ConnectRequest("a", "192.0.2.1:4711", accepts_redirect=True, subprotocols=("x",))]
        )

    def test_relayed(self) -> None:
        relay = FakeRelay()
        self.router.decision = RouteDecision(relay=relay)
        client = self.connect()
        self.fail_held_elsewhere()
        client.expect_open()
        self.assertIs(relay.attached, client.protocol)
        self.assertEqual((self.node.sessions.count(), self.node.handler.events), (0, []))
        self.assertFalse(self.router.requests[0].accepts_redirect)
        client.lose()
        self.assertEqual(self.registry.released, [])

    def test_calls_do_not_wait_for_one_that_is_being_sent_on(self) -> None:
        self.router.decision = Deferred()
        self.connect()
        waiting = self.node.sessions.claim_in_progress("a")
        assert waiting is not None
        self.fail_held_elsewhere()
        self.assertIsNone(self.successResultOf(waiting))
        self.assertIsNone(self.node.sessions.claim_in_progress("a"))

    def test_dies_while_its_relay_is_opened(self) -> None:
        cancelled: list[object] = []
        self.router.decision = Deferred(cancelled.append)
        client = self.connect()
        self.fail_held_elsewhere()
        client.lose()
        self.assertEqual(len(cancelled), 1)

    def test_refused_there(self) -> None:
        self.router.decision = RequestRefusedError(429, "replaced", "too often", [("Retry-After", "9")])
        client = self.connect()
        self.fail_held_elsewhere()
        self.assertEqual(client.refusal()[:2], (429, "replaced"))

    def test_claimed_over_a_node_that_does_not_have_it(self) -> None:
        client = self.connect()
        self.fail_held_elsewhere()
        self.assertEqual(self.registry.claim_policies, [(0, True), (7, True)])
        self.registry.grant(previous_owner=owner_location())
        client.expect_open()
        self.assertEqual(self.router.notified, [("a", 1, owner_location())])

    def test_one_that_moves_all_the_time_is_claimed_in_the_end(self) -> None:
        client = self.connect()
        self.fail_held_elsewhere()
        self.fail_held_elsewhere(owner_location(8))
        self.assertEqual(self.registry.claim_policies, [(0, True), (7, True), (None, True)])
        self.registry.grant()
        client.expect_open()

    def test_the_time_for_all_claims_is_that_of_one(self) -> None:
        client = self.connect()
        self.node.advance(2)
        self.fail_held_elsewhere()
        self.node.advance(CLAIM_TIMEOUT - 2)
        self.assertEqual(client.refusal()[:2], (503, "registry"))

    def test_one_that_was_sent_here_is_never_sent_on(self) -> None:
        for query in ("client_id=a&wsgateway_hop=1", "wsgateway_hop=1&client_id=a"):
            client = self.connect(query)
            self.assertEqual(self.registry.claim_policies[-1], (None, True))
            self.registry.grant(previous_owner=owner_location())
            client.expect_open()
        self.assertEqual(self.router.requests, [])

    def test_whoever_had_it_is_told_when_it_is_open_and_not_before(self) -> None:
        self.connect("client_id=a&wsgateway_hop=1").lose()
        self.assertEqual(self.registry.cancelled, ["a"])
        self.assertEqual(self.router.notified, [])

    def test_whoever_had_it_is_told_once_the_row_of_one_that_could_not_be_opened_is_gone(self) -> None:
        client = self.connect("client_id=a&wsgateway_hop=1")
        self.registry.pending_releases = []
        client.protocol.state = client.protocol.STATE_CLOSED
        self.registry.grant(previous_owner=owner_location())
        self.assertEqual(self.router.notified, [])
        self.registry.pending_releases[0].callback(None)
        self.assertEqual(self.router.notified, [("a", -1, owner_location())])


class FullTest(AdmissionTestCase):
    """A node without room sends new clients on."""

    def setUp(self) -> None:
        self.start(capacity="1")
        self.connect("client_id=z")
        self.registry.grant()

    def test_sent_on(self) -> None:
        self.router.decision = RouteDecision(url="ws://192.0.2.3/v1/connect?client_id=a&wsgateway_hop=1")
        self.assertEqual(self.connect().refusal()[:2], (307, "elsewhere"))
        self.assertEqual(len(self.registry.claims), 1)

    def test_nowhere_to_go(self) -> None:
        self.assertEqual(self.connect().refusal()[:2], (503, "full"))

    def test_one_that_was_sent_here_is_not_sent_on(self) -> None:
        self.router.decision = RouteDecision(relay=FakeRelay())
        self.assertEqual(self.connect("client_id=a&wsgateway_hop=1").refusal()[:2], (503, "full"))

    def test_one_that_is_here_is_replaced(self) -> None:
        client = self.connect("client_id=z")
        self.registry.grant()
        client.expect_open()


class TakeoverTest(AdmissionTestCase):
    """A client that another node holds is taken over."""

    routes_to_owner = False

    def take_over(self, previous_owner: Location | None = None) -> None:
        client = self.connect()
        self.registry.grant(previous_owner=previous_owner or owner_location())
        client.expect_open()
        client.lose()

    def test_claimed_over_whoever_has_it(self) -> None:
        self.take_over()
        self.assertEqual(self.registry.claim_policies, [(None, True)])
        self.assertEqual(self.router.notified, [("a", 1, owner_location())])

    def test_two_programs_do_not_evict_each_other_for_ever(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.take_over()
        client = self.connect()
        self.assertEqual(self.registry.claim_policies[-1], (0, True))
        self.fail_held_elsewhere()
        status, word, headers = client.refusal()
        self.assertEqual((status, word, headers["Retry-After"]), (429, "replaced", "60"))
        self.assertEqual(self.router.routed, [])

    def test_nor_do_those_that_say_that_they_were_sent_here(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.take_over()
        client = self.connect("client_id=a&wsgateway_hop=1")
        self.fail_held_elsewhere()
        self.assertEqual(client.refusal()[:2], (429, "replaced"))

    def test_it_may_leave_a_node_that_is_dead_or_draining_as_often_as_it_must(self) -> None:
        for _ in range(MAX_REPLACEMENTS + 1):
            self.take_over(owner_location(state="draining"))
            self.take_over(owner_location(live=False))
        self.assertEqual(set(self.registry.claim_policies), {(None, True)})

    def test_after_too_many_it_may_still_leave_a_dead_node(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.take_over()
        client = self.connect()
        self.fail_held_elsewhere(owner_location(9, live=False))
        self.assertEqual(self.registry.claim_policies[-1], (9, True))
        self.registry.grant(previous_owner=owner_location(9, live=False))
        client.expect_open()


class SupersededTest(AdmissionTestCase):
    """Another node says that it claimed a client."""

    def setUp(self) -> None:
        super().setUp()
        self.client = self.connect()
        self.registry.grant(generation=5)
        self.client.expect_open()

    def test_an_older_connection_is_closed(self) -> None:
        self.node.sessions.close_superseded("a", 6)
        self.assertEqual(self.client.close_code(), 4001)
        self.assertEqual((self.node.sessions.count(), self.node.metrics.replaced), (0, 1))
        self.assertEqual(self.node.handler.superseded, [("a", 6)])

    def test_one_that_was_told_to_go_stays_while_it_has_calls(self) -> None:
        self.node.handler.finishing_calls.add("a")
        self.node.sessions.close_superseded("a", 6)
        self.assertIsNone(self.client.close_code())
        self.assertEqual((self.node.sessions.count(), self.node.metrics.replaced), (1, 0))
        self.node.handler.finishing_calls.clear()
        self.node.sessions.close_superseded("a", 6)
        self.assertEqual(self.client.close_code(), 4001)

    def test_an_older_claim_is_nothing_to_it(self) -> None:
        for generation in (4, 5):
            self.node.sessions.close_superseded("a", generation)
            self.node.sessions.restore_claim("a", generation)
        self.node.sessions.close_superseded("b", 9)
        self.node.sessions.restore_claim("b", 9)
        self.assertEqual(self.registry.reclaimed, [])
        self.assertEqual(self.node.sessions.count(), 1)

    def test_it_is_claimed_again_after_a_newer_claim_that_was_taken_back(self) -> None:
        self.node.sessions.restore_claim("a", 6)
        self.assertEqual(self.registry.reclaimed, [("a", 5, "192.0.2.1:4711")])
        self.assertIsNone(self.client.close_code())

    def test_it_stays_while_nobody_has_told_what_becomes_of_another_newer_claim(self) -> None:
        self.registry.reclaim_results["a"] = None
        self.node.sessions.restore_claim("a", 6)
        self.assertEqual(len(self.registry.reclaimed), 1)
        self.assertIsNone(self.client.close_code())
        self.assertEqual(self.node.sessions.count(), 1)

    def test_a_claim_under_way_that_turns_out_to_be_older(self) -> None:
        newer = self.connect("client_id=a&wsgateway_hop=1")
        self.node.sessions.close_superseded("a", 9)
        self.assertEqual(self.client.close_code(), 4001)
        self.registry.grant(generation=8)
        newer.expect_open()
        self.assertEqual(newer.close_code(), 4001)
        self.assertEqual(self.node.sessions._admission._newest_claim_elsewhere, {})

    def test_a_claim_under_way_that_turns_out_to_be_newer(self) -> None:
        newer = self.connect("client_id=a&wsgateway_hop=1")
        self.node.sessions.close_superseded("a", 9)
        self.registry.grant(generation=10)
        newer.expect_open()
        self.assertIsNone(newer.close_code())

    def test_waiting_for_a_newer_connection_than_the_one_that_is_open(self) -> None:
        self.assertIsNone(self.node.sessions.claim_in_progress("a", 5))
        self.connect("client_id=a&wsgateway_hop=1")
        self.assertIsNone(self.node.sessions.claim_in_progress("a", 4))
        waiting = self.node.sessions.claim_in_progress("a", 5)
        assert waiting is not None
        self.assertNoResult(waiting)
        self.registry.grant(generation=6)
        self.successResultOf(waiting)
        self.assertIsNone(self.node.sessions.claim_in_progress("a", 6))

    def test_evictions_by_other_nodes_count(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.node.sessions.close_superseded("a", self.registry.generation + 1)
            client = self.connect("client_id=a&wsgateway_hop=1")
            self.registry.grant()
            client.expect_open()
        self.assertEqual(self.connect("client_id=a&wsgateway_hop=1").refusal()[:2], (429, "replaced"))


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
