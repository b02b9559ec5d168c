"""Tests of gateway.cluster.routing."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from gateway.clients.interface import Arrival, Elsewhere, IPlacement, IRelay
from gateway.cluster.interface import INode, IPeers, IRelaying, PeerUnreachable
from gateway.cluster.membership import Fleet
from gateway.cluster.routing import PATIENCE, RELAY_PATIENCE, Placement, connect_url
from gateway.protocol.handshake import Refusal
from gateway.registry.interface import Location, NodeStatus, Place, RegistryUnavailable
from tests.cluster.fakes import FakeNode, FakePeers, FakeRelaying, location, status

RELAYED = Arrival("a", "192.0.2.1:5")
FOLLOWS = Arrival("a", "192.0.2.1:5", follows=True)


@implementer(IRelay)
class Relay:
    def attach(self, protocol: Any) -> None:
        raise AssertionError("nobody connects")

    def abandon(self) -> None:
        raise AssertionError("nobody gives up")


class FakeRegistry:
    def __init__(self) -> None:
        self.listed: list[NodeStatus] = []
        self.found: Any = None
        self.place: Any = None

    def nodes(self) -> Deferred[list[NodeStatus]]:
        return succeed(self.listed)

    def find(self, client_id: str) -> Deferred[Location | None]:
        if isinstance(self.found, Deferred):
            return self.found
        return fail(self.found) if isinstance(self.found, Exception) else succeed(self.found)

    def placed(self, client_id: str) -> Deferred[Place | None]:
        if isinstance(self.place, Deferred):
            return self.place
        return fail(self.place) if isinstance(self.place, Exception) else succeed(self.place)


class PlacementCase(SynchronousTestCase):
    routes = True

    def setUp(self) -> None:
        self.clock = Clock()
        self.node = FakeNode()
        self.peers = FakePeers()
        self.relay = Relay()
        self.relaying = FakeRelaying(self.relay)
        self.registry = FakeRegistry()
        self.fleet = Fleet(self.registry, "a", self.node.steady)  # type: ignore[arg-type]
        self.room = 1
        self.placement = Placement(
            routes=self.routes,
            node=self.node,
            registry=self.registry,  # type: ignore[arg-type]
            peers=self.peers,
            relaying=self.relaying,
            fleet=self.fleet,
            clock=self.clock,
            relay_room=lambda opening: self.room > opening,
        )

    def route(self, held: Location, arrival: Arrival = RELAYED) -> Elsewhere | None:
        return self.successResultOf(self.placement.route(arrival, held))


class RouteTest(PlacementCase):
    def test_interfaces(self) -> None:
        verifyObject(IPlacement, self.placement)
        for interface, fake in ((INode, self.node), (IPeers, self.peers), (IRelaying, self.relaying)):
            verifyObject(interface, fake)

    def test_relayed_to_who_has_it(self) -> None:
        self.assertEqual(self.route(location()), Elsewhere(relay=self.relay))
        self.assertEqual(self.peers.asked, [(location(), PATIENCE)])
        self.assertEqual(self.relaying.asked, [(RELAYED, "b", "ws://b:81", RELAY_PATIENCE)])

    def test_redirected_if_it_follows(self) -> None:
        self.assertEqual(self.route(location(), FOLLOWS), Elsewhere(url=connect_url("ws://b", "a")))
        self.assertEqual(self.relaying.asked, [])

    def test_not_redirected_to_the_url_that_led_here(self) -> None:
        self.node.public_url = "ws://b"
        self.assertEqual(self.route(location(), FOLLOWS), Elsewhere(relay=self.relay))

    def test_stays_if_that_node_is_draining(self) -> None:
        self.assertIsNone(self.route(location(state="draining")))
        self.assertEqual(self.peers.asked, [])

    def test_stays_if_that_node_was_at_this_ones_address(self) -> None:
        self.node.peer_url = "ws://b:81"
        self.assertIsNone(self.route(location()))

    def test_stays_if_that_node_does_not_have_it(self) -> None:
        self.peers.here = False
        self.assertIsNone(self.route(location()))

    def test_stays_if_that_node_does_not_answer(self) -> None:
        self.peers.here = PeerUnreachable("silent", sent=True)
        self.assertIsNone(self.route(location()))

    def test_unknown_if_a_node_whose_lease_ran_out_does_not_answer(self) -> None:
        """The database may have been away: then nobody's lease holds."""
        self.peers.here = PeerUnreachable("silent", sent=True)
        refusal = self.failureResultOf(self.placement.route(RELAYED, location(live=False)), Refusal).value
        self.assertEqual((refusal.status, refusal.word), (503, "registry"))

    def test_stays_if_nobody_is_where_a_node_was_whose_lease_ran_out(self) -> None:
        self.peers.here = PeerUnreachable("refused", refused=True)
        self.assertIsNone(self.route(location(live=False)))

    def test_relayed_to_a_node_whose_lease_ran_out_but_which_has_it(self) -> None:
        self.assertEqual(self.route(location(live=False)), Elsewhere(relay=self.relay))

    def test_stays_if_no_relay_can_be_opened(self) -> None:
        self.relaying.outcome = PeerUnreachable("silent", sent=True)
        self.assertIsNone(self.route(location()))

    def test_stays_if_there_are_no_files_for_a_relay(self) -> None:
        self.room = 0
        self.assertIsNone(self.route(location()))
        self.assertEqual(self.relaying.asked, [])
        self.assertIsNotNone(self.route(location(), FOLLOWS))

    def test_relays_that_are_being_opened_count(self) -> None:
        self.relaying.outcome = opening = Deferred()
        first = self.placement.route(RELAYED, location())
        self.assertIsNone(self.route(location()))
        opening.callback(self.relay)
        self.successResultOf(first)
        self.relaying.outcome = self.relay
        self.assertIsNotNone(self.route(location()))

    def test_refused_there(self) -> None:
        self.relaying.outcome = Refusal(429, "replaced", "too often")
        self.failureResultOf(self.placement.route(RELAYED, location()), Refusal)

    def test_who_had_it_is_told(self) -> None:
        self.placement.taken("a", 9, location())
        self.placement.taken_back("a", 10, location())
        self.assertEqual(self.peers.told, [(location(), 9), (location(), -10)])

    def test_judges_when_steady(self) -> None:
        self.assertTrue(self.placement.judges())
        self.node.is_steady = False
        self.assertFalse(self.placement.judges())

    def test_urls_are_complete(self) -> None:
        self.assertEqual(
            connect_url("wss://gw/x", "acme/robot+1"),
            "wss://gw/x/v1/connect?client_id=acme%2Frobot%2B1&wsgateway_hop=1",
        )


class SendTest(PlacementCase):
    """A client that is placed on another node."""

    place = Place("c", "c", "ws://c", "ws://c:81")

    def send(self, arrival: Arrival = RELAYED) -> Elsewhere | None:
        return self.successResultOf(self.placement.send(arrival, self.place))

    def test_only_where_there_are_others(self) -> None:
        self.assertFalse(self.placement.places())
        self.registry.listed = [status("a"), status("c")]
        self.successResultOf(self.fleet.look())
        self.assertTrue(self.placement.places())

    def test_redirected_if_it_follows(self) -> None:
        self.assertEqual(self.send(FOLLOWS), Elsewhere(url=connect_url("ws://c", "a")))
        self.assertEqual((self.peers.asked_for_room, self.relaying.asked), ([("c", PATIENCE)], []))

    def test_relayed(self) -> None:
        self.assertEqual(self.send(), Elsewhere(relay=self.relay))
        self.assertEqual(self.relaying.asked, [(RELAYED, "c", "ws://c:81", RELAY_PATIENCE)])

    def test_relayed_to_a_node_with_the_url_that_led_here(self) -> None:
        self.node.public_url = "ws://c"
        self.assertEqual(self.send(FOLLOWS), Elsewhere(relay=self.relay))

    def test_not_to_a_node_that_takes_none_or_does_not_answer(self) -> None:
        for answer in (False, PeerUnreachable("silent", sent=True), PeerUnreachable("refused", refused=True)):
            self.peers.room["c"] = answer
            self.assertIsNone(self.send(FOLLOWS))
            self.assertIsNone(self.send())
        self.assertEqual(self.relaying.asked, [])

    def test_no_relay_can_be_opened(self) -> None:
        self.relaying.outcome = PeerUnreachable("silent", sent=True)
        self.assertIsNone(self.send())

    def test_refused_there(self) -> None:
        self.relaying.outcome = Refusal(429, "replaced", "too often")
        self.failureResultOf(self.placement.send(RELAYED, self.place), Refusal)


class OverflowTest(PlacementCase):
    def look(self, *nodes: NodeStatus) -> None:
        self.registry.listed = list(nodes)
        self.successResultOf(self.fleet.look())

    def overflow(self, arrival: Arrival = RELAYED) -> Elsewhere | None:
        return self.successResultOf(self.placement.overflow(arrival))

    def test_alone(self) -> None:
        self.registry.found = RegistryUnavailable("not even asked")
        self.assertIsNone(self.overflow())

    def test_to_who_holds_it(self) -> None:
        self.look(status("b"), status("c"))
        self.registry.found = location("b")
        self.assertEqual(self.overflow(FOLLOWS), Elsewhere(url=connect_url("ws://b", "a")))

    def test_to_the_emptiest(self) -> None:
        self.look(status("b", clients=9), status("c"))
        for found in (None, location("a"), location("b", state="draining")):
            self.registry.found = found
            self.assertEqual(self.overflow(FOLLOWS), Elsewhere(url=connect_url("ws://c", "a")))
            self.assertEqual(self.overflow(), Elsewhere(relay=self.relay))
        self.assertEqual({(name, url) for _, name, url, _ in self.relaying.asked}, {("c", "ws://c:81")})

    def test_to_where_it_is_placed(self) -> None:
        self.look(status("b"), status("c"), status("d", clients=50))
        self.registry.found = location("b")
        self.registry.place = Place("d", "d", "ws://d", "ws://d:81")
        self.assertEqual(self.overflow(FOLLOWS), Elsewhere(url=connect_url("ws://d", "a")))
        self.peers.room["d"] = False
        self.assertEqual(self.overflow(FOLLOWS), Elsewhere(url=connect_url("ws://b", "a")))
        self.registry.place = Place("a", "a", "ws://a", "ws://a:81")
        self.assertEqual(self.overflow(FOLLOWS), Elsewhere(url=connect_url("ws://b", "a")))

    def test_nowhere(self) -> None:
        self.look(status("b", clients=100))
        self.assertIsNone(self.overflow())

    def test_registry_away(self) -> None:
        self.look(status("b"))
        self.registry.found = self.registry.place = RegistryUnavailable("away")
        self.failureResultOf(self.placement.overflow(RELAYED), Refusal)

    def test_registry_hangs(self) -> None:
        self.look(status("b"))
        self.registry.found = Deferred()
        waiting = self.placement.overflow(RELAYED)
        self.clock.advance(PATIENCE)
        self.failureResultOf(waiting, Refusal)


class TakeoverTest(PlacementCase):
    routes = False

    def test_to_the_emptiest_whoever_holds_it(self) -> None:
        self.registry.listed = [status("b", clients=9), status("c")]
        self.successResultOf(self.fleet.look())
        self.registry.found = RegistryUnavailable("not even asked")
        self.assertEqual(
            self.successResultOf(self.placement.overflow(FOLLOWS)), Elsewhere(url=connect_url("ws://c", "a"))
        )
