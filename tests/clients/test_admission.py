"""Tests of gateway.clients.admission: routing, capacity, takeover and assignments."""

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
from gateway.registry.interface import Assignment, Location, SessionKey
from tests.builders.frames import build_frame, build_request
from tests.fakes.clients import FakeClient, FakeNode


def owner_location(generation: int = 7, *, live: bool = True, state: str = "up") -> Location:
    return Location(
        "a", "node-b", "b", "ws://192.0.2.2:81", generation, 0.0, "198.51.100.7:1", live, "ws://192.0.2.2", state
    )


@implementer(IClientRouter)
class FakeClientRouter:
    """Returns what the test sets, and records its calls."""

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

    def notify_takeover(self, key: SessionKey, previous_owner: Location) -> None:
        self.notified.append((*key, previous_owner))

    def notify_claim_revoked(self, key: SessionKey, previous_owner: Location) -> None:
        self.notified.append((key.client_id, -key.generation, previous_owner))


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
    """A client owned by another node is routed there."""

    def test_fake_provides_the_interface(self) -> None:
        verifyObject(IClientRouter, self.router)
        verifyObject(IRelay, FakeRelay())

    def test_claim_takes_over_from_no_node(self) -> None:
        client = self.connect()
        self.assertEqual(self.registry.claim_policies, [(0, True)])
        self.registry.grant()
        client.expect_open()
        self.assertEqual((self.router.routed, self.router.notified), ([], []))

    def test_unstable_node_evicts_no_expired_owner(self) -> None:
        self.router.steady = False
        self.connect()
        self.assertEqual(self.registry.claim_policies, [(0, False)])

    def test_redirected(self) -> None:
        url = "ws://192.0.2.2/v1/connect?client_id=a&wsgateway_hop=1"
        self.router.decision = RouteDecision(url=url)
        client = self.connect(
            "client_id=a", ("Wsgateway-Redirect", "1"), ("Sec-WebSocket-Protocol", "x, wsgateway.bearer64.VA")
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

    def test_calls_do_not_wait_while_a_client_is_routed(self) -> None:
        self.router.decision = Deferred()
        self.connect()
        waiter = self.node.sessions.claim_in_progress("a")
        assert waiter is not None
        self.fail_held_elsewhere()
        self.assertIsNone(self.successResultOf(waiter))
        self.assertIsNone(self.node.sessions.claim_in_progress("a"))

    def test_lost_while_its_relay_is_opened(self) -> None:
        cancelled: list[object] = []
        self.router.decision = Deferred(cancelled.append)
        client = self.connect()
        self.fail_held_elsewhere()
        client.lose()
        self.assertEqual(len(cancelled), 1)

    def test_refused_by_the_owner(self) -> None:
        self.router.decision = RequestRefusedError(429, "replaced", "too often", [("Retry-After", "9")])
        client = self.connect()
        self.fail_held_elsewhere()
        self.assertEqual(client.refusal()[:2], (429, "replaced"))

    def test_taken_over_from_a_node_that_does_not_have_it(self) -> None:
        client = self.connect()
        self.fail_held_elsewhere()
        self.assertEqual(self.registry.claim_policies, [(0, True), (7, True)])
        self.registry.grant(previous_owner=owner_location())
        client.expect_open()
        self.assertEqual(self.router.notified, [("a", 1, owner_location())])

    def test_claimed_after_it_has_moved_too_often(self) -> None:
        client = self.connect()
        self.fail_held_elsewhere()
        self.fail_held_elsewhere(owner_location(8))
        self.assertEqual(self.registry.claim_policies, [(0, True), (7, True), (None, True)])
        self.registry.grant()
        client.expect_open()

    def test_all_claims_share_one_timeout(self) -> None:
        client = self.connect()
        self.node.advance(2)
        self.fail_held_elsewhere()
        self.node.advance(CLAIM_TIMEOUT - 2)
        self.assertEqual(client.refusal()[:2], (503, "registry"))

    def test_redirected_client_is_never_routed_again(self) -> None:
        for query in ("client_id=a&wsgateway_hop=1", "wsgateway_hop=1&client_id=a"):
            client = self.connect(query)
            self.assertEqual(self.registry.claim_policies[-1], (None, True))
            self.registry.grant(previous_owner=owner_location())
            client.expect_open()
        self.assertEqual(self.router.requests, [])

    def test_previous_owner_is_notified_once_open(self) -> None:
        self.connect("client_id=a&wsgateway_hop=1").lose()
        self.assertEqual(self.registry.cancelled, ["a"])
        self.assertEqual(self.router.notified, [])

    def test_previous_owner_is_notified_of_a_revoked_claim_once_released(self) -> None:
        client = self.connect("client_id=a&wsgateway_hop=1")
        self.registry.pending_releases = []
        client.protocol.state = client.protocol.STATE_CLOSED
        self.registry.grant(previous_owner=owner_location())
        self.assertEqual(self.router.notified, [])
        self.registry.pending_releases[0].callback(None)
        self.assertEqual(self.router.notified, [("a", -1, owner_location())])


class FullTest(AdmissionTestCase):
    """A full node routes new clients away."""

    def setUp(self) -> None:
        self.start(capacity="1")
        self.connect("client_id=z")
        self.registry.grant()

    def test_routed_away(self) -> None:
        self.router.decision = RouteDecision(url="ws://192.0.2.3/v1/connect?client_id=a&wsgateway_hop=1")
        self.assertEqual(self.connect().refusal()[:2], (307, "elsewhere"))
        self.assertEqual(len(self.registry.claims), 1)

    def test_no_node_with_capacity(self) -> None:
        self.assertEqual(self.connect().refusal()[:2], (503, "full"))

    def test_redirected_client_is_refused(self) -> None:
        self.router.decision = RouteDecision(relay=FakeRelay())
        self.assertEqual(self.connect("client_id=a&wsgateway_hop=1").refusal()[:2], (503, "full"))

    def test_connected_client_is_replaced(self) -> None:
        client = self.connect("client_id=z")
        self.registry.grant()
        client.expect_open()


class TakeoverTest(AdmissionTestCase):
    """A client owned by another node is taken over."""

    routes_to_owner = False

    def take_over(self, previous_owner: Location | None = None) -> None:
        client = self.connect()
        self.registry.grant(previous_owner=previous_owner or owner_location())
        client.expect_open()
        client.lose()

    def test_taken_over_from_any_node(self) -> None:
        self.take_over()
        self.assertEqual(self.registry.claim_policies, [(None, True)])
        self.assertEqual(self.router.notified, [("a", 1, owner_location())])

    def test_two_programs_do_not_evict_each_other_without_end(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.take_over()
        client = self.connect()
        self.assertEqual(self.registry.claim_policies[-1], (0, True))
        self.fail_held_elsewhere()
        status, word, headers = client.refusal()
        self.assertEqual((status, word, headers["Retry-After"]), (429, "replaced", "60"))
        self.assertEqual(self.router.routed, [])

    def test_nor_do_two_redirected_programs(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.take_over()
        client = self.connect("client_id=a&wsgateway_hop=1")
        self.fail_held_elsewhere()
        self.assertEqual(client.refusal()[:2], (429, "replaced"))

    def test_leaving_dead_or_draining_nodes_is_not_limited(self) -> None:
        for _ in range(MAX_REPLACEMENTS + 1):
            self.take_over(owner_location(state="draining"))
            self.take_over(owner_location(live=False))
        self.assertEqual(set(self.registry.claim_policies), {(None, True)})

    def test_may_leave_a_dead_node_after_too_many_replacements(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.take_over()
        client = self.connect()
        self.fail_held_elsewhere(owner_location(9, live=False))
        self.assertEqual(self.registry.claim_policies[-1], (9, True))
        self.registry.grant(previous_owner=owner_location(9, live=False))
        client.expect_open()


class SupersededTest(AdmissionTestCase):
    """Another node reports a newer claim of a client."""

    def setUp(self) -> None:
        super().setUp()
        self.client = self.connect()
        self.registry.grant(generation=5)
        self.client.expect_open()

    def test_older_connection_is_closed(self) -> None:
        self.node.sessions.close_superseded(SessionKey("a", 6))
        self.assertEqual(self.client.close_code(), 4001)
        self.assertEqual((self.node.sessions.count(), self.node.metrics.replaced), (0, 1))
        self.assertEqual(self.node.handler.superseded, [("a", 6)])

    def test_connection_with_goaway_stays_while_it_has_calls(self) -> None:
        self.node.handler.finishing_calls.add("a")
        self.node.sessions.close_superseded(SessionKey("a", 6))
        self.assertIsNone(self.client.close_code())
        self.assertEqual((self.node.sessions.count(), self.node.metrics.replaced), (1, 0))
        self.node.handler.finishing_calls.clear()
        self.node.sessions.close_superseded(SessionKey("a", 6))
        self.assertEqual(self.client.close_code(), 4001)

    def test_older_claim_is_ignored(self) -> None:
        for generation in (4, 5):
            self.node.sessions.close_superseded(SessionKey("a", generation))
            self.node.sessions.restore_claim(SessionKey("a", generation))
        self.node.sessions.close_superseded(SessionKey("b", 9))
        self.node.sessions.restore_claim(SessionKey("b", 9))
        self.assertEqual(self.registry.reclaimed, [])
        self.assertEqual(self.node.sessions.count(), 1)

    def test_reclaimed_after_a_newer_claim_was_revoked(self) -> None:
        self.node.sessions.restore_claim(SessionKey("a", 6))
        self.assertEqual(self.registry.reclaimed, [("a", 5, "192.0.2.1:4711")])
        self.assertIsNone(self.client.close_code())

    def test_stays_while_another_newer_claim_is_undecided(self) -> None:
        self.registry.reclaim_results["a"] = None
        self.node.sessions.restore_claim(SessionKey("a", 6))
        self.assertEqual(len(self.registry.reclaimed), 1)
        self.assertIsNone(self.client.close_code())
        self.assertEqual(self.node.sessions.count(), 1)

    def test_claim_in_progress_turns_out_to_be_older(self) -> None:
        newer = self.connect("client_id=a&wsgateway_hop=1")
        self.node.sessions.close_superseded(SessionKey("a", 9))
        self.assertEqual(self.client.close_code(), 4001)
        self.registry.grant(generation=8)
        newer.expect_open()
        self.assertEqual(newer.close_code(), 4001)
        self.assertEqual(self.node.sessions._admission._newest_claim_elsewhere, {})

    def test_claim_in_progress_turns_out_to_be_newer(self) -> None:
        newer = self.connect("client_id=a&wsgateway_hop=1")
        self.node.sessions.close_superseded(SessionKey("a", 9))
        self.registry.grant(generation=10)
        newer.expect_open()
        self.assertIsNone(newer.close_code())

    def test_waits_for_a_newer_connection_than_the_open_one(self) -> None:
        self.assertIsNone(self.node.sessions.claim_in_progress("a", 5))
        self.connect("client_id=a&wsgateway_hop=1")
        self.assertIsNone(self.node.sessions.claim_in_progress("a", 4))
        waiter = self.node.sessions.claim_in_progress("a", 5)
        assert waiter is not None
        self.assertNoResult(waiter)
        self.registry.grant(generation=6)
        self.successResultOf(waiter)
        self.assertIsNone(self.node.sessions.claim_in_progress("a", 6))

    def test_evictions_by_other_nodes_count(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.node.sessions.close_superseded(SessionKey("a", self.registry.generation + 1))
            client = self.connect("client_id=a&wsgateway_hop=1")
            self.registry.grant()
            client.expect_open()
        newer = self.connect("client_id=a&wsgateway_hop=1")
        # The connection that would be replaced answers a ping.
        self.node.advance(0.25)
        client.send(build_frame(10, b""))
        self.node.advance(0.25)
        self.assertEqual(newer.refusal()[:2], (429, "replaced"))


class AssignmentTest(AdmissionTestCase):
    """A client assigned to another node is routed there, whichever node owns it."""

    assignment = Assignment("node-c", "c", "ws://192.0.2.3", "ws://192.0.2.3:81")

    def fail_placed_elsewhere(self) -> None:
        self.registry.claims[-1][2].errback(AssignedElsewhereError("a", self.assignment))

    def test_redirected(self) -> None:
        url = "ws://192.0.2.3/v1/connect?client_id=a&wsgateway_hop=1"
        self.router.decision = RouteDecision(url=url)
        client = self.connect("client_id=a", ("Wsgateway-Redirect", "1"))
        self.assertEqual(self.registry.assignments_honored, [True])
        self.fail_placed_elsewhere()
        status, word, headers = client.refusal()
        self.assertEqual((status, word, headers["Location"]), (307, "elsewhere", url))
        self.assertEqual((self.router.sent, self.router.routed), ([self.assignment], []))

    def test_relayed_though_still_connected_here(self) -> None:
        self.connect()
        self.registry.grant()
        relay = FakeRelay()
        self.router.decision = RouteDecision(relay=relay)
        client = self.connect()
        self.fail_placed_elsewhere()
        client.expect_open()
        self.assertIs(relay.attached, client.protocol)
        self.assertEqual(self.node.sessions.generation("a"), 1)

    def test_assigned_node_does_not_accept_it(self) -> None:
        """The client is claimed as if it were not assigned: there is no loop."""
        client = self.connect()
        self.fail_placed_elsewhere()
        self.assertEqual(
            (self.registry.claim_policies, self.registry.assignments_honored), ([(0, True)] * 2, [True, False])
        )
        self.registry.grant()
        client.expect_open()

    def test_assigned_node_does_not_accept_it_and_another_owns_it(self) -> None:
        client = self.connect()
        self.fail_placed_elsewhere()
        self.fail_held_elsewhere()
        self.assertEqual((self.router.routed, self.router.sent), ([owner_location()], [self.assignment]))
        self.assertEqual(
            (self.registry.claim_policies[-1], self.registry.assignments_honored[-1]), ((None, True), False)
        )
        self.registry.grant(previous_owner=owner_location())
        client.expect_open()

    def test_assigned_node_does_not_answer_in_time(self) -> None:
        self.router.decision = answer = Deferred()
        client = self.connect()
        self.fail_placed_elsewhere()
        self.node.advance(1)
        answer.callback(None)
        self.registry.grant()
        client.expect_open()

    def test_refused_by_the_assigned_node(self) -> None:
        self.router.decision = RequestRefusedError(429, "replaced", "too often", [("Retry-After", "9")])
        client = self.connect()
        self.fail_placed_elsewhere()
        self.assertEqual(client.refusal()[:2], (429, "replaced"))

    def test_redirected_client_is_claimed_despite_its_assignment(self) -> None:
        self.connect("client_id=a&wsgateway_hop=1")
        self.assertEqual((self.registry.claim_policies, self.registry.assignments_honored), ([(None, True)], [False]))

    def test_ignored_without_other_nodes(self) -> None:
        self.router.peers_exist = False
        self.connect()
        self.assertEqual(self.registry.assignments_honored, [False])

    def test_two_programs_with_one_client_id(self) -> None:
        """An assignment does not let them evict each other more often."""
        for _ in range(MAX_REPLACEMENTS):
            client = self.connect("client_id=a&wsgateway_hop=1")
            self.registry.grant(previous_owner=owner_location())
            client.lose()
        self.connect()
        self.assertEqual((self.registry.claim_policies[-1], self.registry.assignments_honored[-1]), ((0, True), False))

    def test_routed_though_clients_are_taken_over(self) -> None:
        self.router.routes_to_owner = False
        self.router.decision = RouteDecision(relay=FakeRelay())
        client = self.connect()
        self.assertEqual((self.registry.claim_policies, self.registry.assignments_honored), ([(None, True)], [True]))
        self.fail_placed_elsewhere()
        client.expect_open()
