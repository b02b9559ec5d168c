"""Tests of gateway.clients.admission: where a client is to be that arrives."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from gateway.clients.admission import CLAIM_TIMEOUT, MAX_REPLACEMENTS
from gateway.clients.interface import Arrival, Elsewhere, IPlacement, IRelay
from gateway.protocol.handshake import Refusal
from gateway.registry.interface import HeldElsewhere, Location, Place
from tests.edge.fakes import FakeClient, FakeNode, request


def held(generation: int = 7, *, live: bool = True, state: str = "up") -> Location:
    return Location(
        "a", "node-b", "b", "ws://192.0.2.2:81", generation, 0.0, "198.51.100.7:1", live, "ws://192.0.2.2", state
    )


@implementer(IPlacement)
class FakePlacement:
    """Answers as the test says; notes what it is asked."""

    def __init__(self, *, routes: bool = True) -> None:
        self.routes = routes
        self.steady = True
        self.arrivals: list[Arrival] = []
        self.others = True
        self.routed: list[Location] = []
        self.sent: list[Place] = []
        self.told: list[tuple[str, int, Location]] = []
        self.answer: Elsewhere | Refusal | Deferred[Any] | None = None

    def judges(self) -> bool:
        return self.steady

    def route(self, arrival: Arrival, held: Location) -> Deferred[Elsewhere | None]:
        self.routed.append(held)
        return self.overflow(arrival)

    def places(self) -> bool:
        return self.others

    def send(self, arrival: Arrival, place: Place) -> Deferred[Elsewhere | None]:
        self.sent.append(place)
        return self.overflow(arrival)

    def overflow(self, arrival: Arrival) -> Deferred[Elsewhere | None]:
        self.arrivals.append(arrival)
        if isinstance(self.answer, Deferred):
            return self.answer
        return fail(self.answer) if isinstance(self.answer, Refusal) else succeed(self.answer)

    def taken(self, client_id: str, generation: int, before: Location) -> None:
        self.told.append((client_id, generation, before))

    def taken_back(self, client_id: str, generation: int, before: Location) -> None:
        self.told.append((client_id, -generation, before))


@implementer(IRelay)
class FakeRelay:
    def __init__(self) -> None:
        self.attached: Any = None
        self.abandoned = False

    def attach(self, protocol: Any) -> None:
        self.attached = protocol

    def abandon(self) -> None:
        self.abandoned = True


class AdmissionCase(SynchronousTestCase):
    routes = True

    def setUp(self) -> None:
        self.start()

    def start(self, **options: Any) -> None:
        self.node = FakeNode(openings_per_address=0, **options)
        self.registry = self.node.registry
        self.placement = FakePlacement(routes=self.routes)
        self.node.edge.place_by(self.placement)
        self.registry.auto = False

    def arrive(self, query: str = "client_id=a", *extra: tuple[str, str]) -> FakeClient:
        client = self.node.dial()
        client.send(request(f"/v1/connect?{query}", extra=extra))
        return client

    def is_held(self, location: Location | None = None) -> None:
        self.registry.claims[-1][2].errback(HeldElsewhere(location or held()))


class RouteTest(AdmissionCase):
    """A client that another node holds is sent there."""

    def test_the_fake_is_true_to_the_interface(self) -> None:
        verifyObject(IPlacement, self.placement)
        verifyObject(IRelay, FakeRelay())

    def test_one_that_nobody_has_is_claimed_over_nobody(self) -> None:
        client = self.arrive()
        self.assertEqual(self.registry.asked, [(0, True)])
        self.registry.grant()
        client.expect_open()
        self.assertEqual((self.placement.routed, self.placement.told), ([], []))

    def test_a_node_that_is_not_steady_judges_nobody(self) -> None:
        self.placement.steady = False
        self.arrive()
        self.assertEqual(self.registry.asked, [(0, False)])

    def test_redirected(self) -> None:
        url = "ws://192.0.2.2/v1/connect?client_id=a&wsgateway_hop=1"
        self.placement.answer = Elsewhere(url=url)
        client = self.arrive(
            "client_id=a", ("Wsgateway-Redirect", "1"), ("Sec-WebSocket-Protocol", "x, wsgateway.bearer.T")
        )
        self.is_held()
        status, word, headers = client.refusal()
        self.assertEqual((status, word, headers["Location"]), (307, "elsewhere", url))
        self.assertEqual(self.placement.routed, [held()])
        self.assertEqual(self.placement.arrivals, [Arrival("a", "192.0.2.1:4711", follows=True, subprotocols=("x",))])

    def test_relayed(self) -> None:
        relay = FakeRelay()
        self.placement.answer = Elsewhere(relay=relay)
        client = self.arrive()
        self.is_held()
        client.expect_open()
        self.assertIs(relay.attached, client.protocol)
        self.assertEqual((self.node.edge.count(), self.node.handler.seen), (0, []))
        self.assertFalse(self.placement.arrivals[0].follows)
        client.lose()
        self.assertEqual(self.registry.released, [])

    def test_calls_do_not_wait_for_one_that_is_being_sent_on(self) -> None:
        self.placement.answer = Deferred()
        self.arrive()
        waiting = self.node.edge.opening("a")
        assert waiting is not None
        self.is_held()
        self.assertIsNone(self.successResultOf(waiting))
        self.assertIsNone(self.node.edge.opening("a"))

    def test_dies_while_its_relay_is_opened(self) -> None:
        cancelled: list[object] = []
        self.placement.answer = Deferred(cancelled.append)
        client = self.arrive()
        self.is_held()
        client.lose()
        self.assertEqual(len(cancelled), 1)

    def test_refused_there(self) -> None:
        self.placement.answer = Refusal(429, "replaced", "too often", [("Retry-After", "9")])
        client = self.arrive()
        self.is_held()
        self.assertEqual(client.refusal()[:2], (429, "replaced"))

    def test_claimed_over_a_node_that_does_not_have_it(self) -> None:
        client = self.arrive()
        self.is_held()
        self.assertEqual(self.registry.asked, [(0, True), (7, True)])
        self.registry.grant(before=held())
        client.expect_open()
        self.assertEqual(self.placement.told, [("a", 1, held())])

    def test_one_that_moves_all_the_time_is_claimed_in_the_end(self) -> None:
        client = self.arrive()
        self.is_held()
        self.is_held(held(8))
        self.assertEqual(self.registry.asked, [(0, True), (7, True), (None, True)])
        self.registry.grant()
        client.expect_open()

    def test_the_time_for_all_claims_is_that_of_one(self) -> None:
        client = self.arrive()
        self.node.advance(2)
        self.is_held()
        self.node.advance(CLAIM_TIMEOUT - 2)
        self.assertEqual(client.refusal()[:2], (503, "registry"))

    def test_one_that_was_sent_here_is_never_sent_on(self) -> None:
        for query in ("client_id=a&wsgateway_hop=1", "wsgateway_hop=1&client_id=a"):
            client = self.arrive(query)
            self.assertEqual(self.registry.asked[-1], (None, True))
            self.registry.grant(before=held())
            client.expect_open()
        self.assertEqual(self.placement.arrivals, [])

    def test_whoever_had_it_is_told_when_it_is_open_and_not_before(self) -> None:
        self.arrive("client_id=a&wsgateway_hop=1").lose()
        self.assertEqual(self.registry.cancelled, ["a"])
        self.assertEqual(self.placement.told, [])

    def test_whoever_had_it_is_told_once_the_row_of_one_that_could_not_be_opened_is_gone(self) -> None:
        client = self.arrive("client_id=a&wsgateway_hop=1")
        self.registry.releases = []
        client.protocol.state = client.protocol.STATE_CLOSED
        self.registry.grant(before=held())
        self.assertEqual(self.placement.told, [])
        self.registry.releases[0].callback(None)
        self.assertEqual(self.placement.told, [("a", -1, held())])


class FullTest(AdmissionCase):
    """A node without room sends new clients on."""

    def setUp(self) -> None:
        self.start(capacity="1")
        self.arrive("client_id=z")
        self.registry.grant()

    def test_sent_on(self) -> None:
        self.placement.answer = Elsewhere(url="ws://192.0.2.3/v1/connect?client_id=a&wsgateway_hop=1")
        self.assertEqual(self.arrive().refusal()[:2], (307, "elsewhere"))
        self.assertEqual(len(self.registry.claims), 1)

    def test_nowhere_to_go(self) -> None:
        self.assertEqual(self.arrive().refusal()[:2], (503, "full"))

    def test_one_that_was_sent_here_is_not_sent_on(self) -> None:
        self.placement.answer = Elsewhere(relay=FakeRelay())
        self.assertEqual(self.arrive("client_id=a&wsgateway_hop=1").refusal()[:2], (503, "full"))

    def test_one_that_is_here_is_replaced(self) -> None:
        client = self.arrive("client_id=z")
        self.registry.grant()
        client.expect_open()


class TakeoverTest(AdmissionCase):
    """A client that another node holds is taken over."""

    routes = False

    def take(self, before: Location | None = None) -> None:
        client = self.arrive()
        self.registry.grant(before=before or held())
        client.expect_open()
        client.lose()

    def test_claimed_over_whoever_has_it(self) -> None:
        self.take()
        self.assertEqual(self.registry.asked, [(None, True)])
        self.assertEqual(self.placement.told, [("a", 1, held())])

    def test_two_programs_do_not_evict_each_other_for_ever(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.take()
        client = self.arrive()
        self.assertEqual(self.registry.asked[-1], (0, True))
        self.is_held()
        status, word, headers = client.refusal()
        self.assertEqual((status, word, headers["Retry-After"]), (429, "replaced", "60"))
        self.assertEqual(self.placement.routed, [])

    def test_nor_do_those_that_say_that_they_were_sent_here(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.take()
        client = self.arrive("client_id=a&wsgateway_hop=1")
        self.is_held()
        self.assertEqual(client.refusal()[:2], (429, "replaced"))

    def test_it_may_leave_a_node_that_is_dead_or_draining_as_often_as_it_must(self) -> None:
        for _ in range(MAX_REPLACEMENTS + 1):
            self.take(held(state="draining"))
            self.take(held(live=False))
        self.assertEqual(set(self.registry.asked), {(None, True)})

    def test_after_too_many_it_may_still_leave_a_dead_node(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.take()
        client = self.arrive()
        self.is_held(held(9, live=False))
        self.assertEqual(self.registry.asked[-1], (9, True))
        self.registry.grant(before=held(9, live=False))
        client.expect_open()


class SupersededTest(AdmissionCase):
    """Another node says that it claimed a client."""

    def setUp(self) -> None:
        super().setUp()
        self.client = self.arrive()
        self.registry.grant(generation=5)
        self.client.expect_open()

    def test_an_older_connection_is_closed(self) -> None:
        self.node.edge.superseded("a", 6)
        self.assertEqual(self.client.close_code(), 4001)
        self.assertEqual((self.node.edge.count(), self.node.metrics.replaced), (0, 1))
        self.assertEqual(self.node.handler.superseded, [("a", 6)])

    def test_one_that_was_told_to_go_stays_while_it_has_calls(self) -> None:
        self.node.handler.busy.add("a")
        self.node.edge.superseded("a", 6)
        self.assertIsNone(self.client.close_code())
        self.assertEqual((self.node.edge.count(), self.node.metrics.replaced), (1, 0))
        self.node.handler.busy.clear()
        self.node.edge.superseded("a", 6)
        self.assertEqual(self.client.close_code(), 4001)

    def test_an_older_claim_is_nothing_to_it(self) -> None:
        for generation in (4, 5):
            self.node.edge.superseded("a", generation)
            self.node.edge.restore("a", generation)
        self.node.edge.superseded("b", 9)
        self.node.edge.restore("b", 9)
        self.assertEqual(self.registry.reclaimed, [])
        self.assertEqual(self.node.edge.count(), 1)

    def test_it_is_claimed_again_after_a_newer_claim_that_was_taken_back(self) -> None:
        self.node.edge.restore("a", 6)
        self.assertEqual(self.registry.reclaimed, [("a", 5, "192.0.2.1:4711")])
        self.assertIsNone(self.client.close_code())

    def test_it_stays_while_nobody_has_told_what_becomes_of_another_newer_claim(self) -> None:
        self.registry.reclaims["a"] = None
        self.node.edge.restore("a", 6)
        self.assertEqual(len(self.registry.reclaimed), 1)
        self.assertIsNone(self.client.close_code())
        self.assertEqual(self.node.edge.count(), 1)

    def test_a_claim_under_way_that_turns_out_to_be_older(self) -> None:
        newer = self.arrive("client_id=a&wsgateway_hop=1")
        self.node.edge.superseded("a", 9)
        self.assertEqual(self.client.close_code(), 4001)
        self.registry.grant(generation=8)
        newer.expect_open()
        self.assertEqual(newer.close_code(), 4001)
        self.assertEqual(self.node.edge._admission._superseded, {})

    def test_a_claim_under_way_that_turns_out_to_be_newer(self) -> None:
        newer = self.arrive("client_id=a&wsgateway_hop=1")
        self.node.edge.superseded("a", 9)
        self.registry.grant(generation=10)
        newer.expect_open()
        self.assertIsNone(newer.close_code())

    def test_waiting_for_a_newer_connection_than_the_one_that_is_open(self) -> None:
        self.assertIsNone(self.node.edge.opening("a", 5))
        self.arrive("client_id=a&wsgateway_hop=1")
        self.assertIsNone(self.node.edge.opening("a", 4))
        waiting = self.node.edge.opening("a", 5)
        assert waiting is not None
        self.assertNoResult(waiting)
        self.registry.grant(generation=6)
        self.successResultOf(waiting)
        self.assertIsNone(self.node.edge.opening("a", 6))

    def test_evictions_by_other_nodes_count(self) -> None:
        for _ in range(MAX_REPLACEMENTS):
            self.node.edge.superseded("a", self.registry.generation + 1)
            client = self.arrive("client_id=a&wsgateway_hop=1")
            self.registry.grant()
            client.expect_open()
        self.assertEqual(self.arrive("client_id=a&wsgateway_hop=1").refusal()[:2], (429, "replaced"))
