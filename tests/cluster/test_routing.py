"""Tests of gateway.cluster.routing."""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from gateway.auth.interface import AuthMethod, Identity
from gateway.auth.tickets import Tickets
from gateway.clients.interface import ConnectRequest, IClientRouter, IRelay, RouteDecision
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import INode, IPeerClient, IRelayDialer
from gateway.cluster.membership import NodeDirectory
from gateway.cluster.routing import RELAY_TIMEOUT, ROUTE_TIMEOUT, ClientRouter, connect_url
from gateway.protocol.errors import RequestRefusedError
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Assignment, Location, NodeStatus, SessionKey
from gateway.settings import ConfigError
from tests.fakes.cluster import FakeNode, FakePeerClient, FakeRelayDialer, location, node_status
from tests.fakes.rpc import FakeMembership

CONNECT_REQUEST = ConnectRequest("a", "192.0.2.1:5")
REDIRECTABLE_REQUEST = ConnectRequest("a", "192.0.2.1:5", accepts_redirect=True)


@implementer(IRelay)
class FakeRelay:
    def attach(self, protocol: Any) -> None:
        raise AssertionError("unexpected attach")

    def abandon(self) -> None:
        raise AssertionError("unexpected abandon")


class FakeRegistry:
    def __init__(self) -> None:
        self.node_list: list[NodeStatus] = []
        self.owner: Any = None
        self.assignment_result: Any = None

    def nodes(self) -> Deferred[list[NodeStatus]]:
        return succeed(self.node_list)

    def find(self, client_id: str) -> Deferred[Location | None]:
        if isinstance(self.owner, Deferred):
            return self.owner
        return fail(self.owner) if isinstance(self.owner, Exception) else succeed(self.owner)

    def assignment(self, client_id: str) -> Deferred[Assignment | None]:
        if isinstance(self.assignment_result, Deferred):
            return self.assignment_result
        return (
            fail(self.assignment_result)
            if isinstance(self.assignment_result, Exception)
            else succeed(self.assignment_result)
        )


class ClientRouterCase(SynchronousTestCase):
    routes_to_owner = True

    def setUp(self) -> None:
        self.clock = Clock()
        self.node = FakeNode()
        self.peer_client = FakePeerClient()
        self.relay = FakeRelay()
        self.relay_dialer = FakeRelayDialer(self.relay)
        self.registry = FakeRegistry()
        self.membership = FakeMembership()
        self.node_directory = NodeDirectory(self.registry, "a", self.membership)  # type: ignore[arg-type]
        self.relay_room = 1
        self.router = ClientRouter(
            routes_to_owner=self.routes_to_owner,
            node=self.node,
            membership=self.membership,
            registry=self.registry,  # type: ignore[arg-type]
            peer_client=self.peer_client,
            relay_dialer=self.relay_dialer,
            node_directory=self.node_directory,
            clock=self.clock,
            has_relay_room=lambda opening: self.relay_room > opening,
            tickets=Tickets("a", lambda: b"secret", wall_clock=lambda: 1000.0),
        )

    def route(self, owner: Location, request: ConnectRequest = CONNECT_REQUEST) -> RouteDecision | None:
        return self.successResultOf(self.router.route_to_owner(request, owner))


class TicketTest(ClientRouterCase):
    """Redirects of clients that get tickets"""

    REQUEST = ConnectRequest("a", "192.0.2.1:5", accepts_redirect=True, expires_at=2000.0, ticket_method=AuthMethod.JWT)

    def setUp(self) -> None:
        super().setUp()
        self.registry.node_list = [node_status("a"), node_status("b"), node_status("c")]
        self.successResultOf(self.node_directory.refresh())

    def redeem(self, decision: RouteDecision | None, node_id: str) -> Identity:
        """Redeem the ticket of a redirect at a node."""
        assert decision is not None
        url, _, ticket = decision.url.partition("&wsgateway_ticket=")
        self.assertEqual(url, connect_url(f"ws://{node_id}", "a"))
        self.assertNotIn(ticket[:20], repr(decision))
        tickets = Tickets(node_id, lambda: b"secret", wall_clock=lambda: 1000.0)
        return tickets.redeem(ticket, "a", {AuthMethod.JWT})

    def test_to_the_owner_or_the_assigned_or_the_emptiest_node(self) -> None:
        assignment = Assignment("c", "c", "ws://c", "ws://c:81")
        for routing, node_id in (
            (self.router.route_to_owner(self.REQUEST, location()), "b"),
            (self.router.route_to(self.REQUEST, assignment), "c"),
            (self.router.route_overflow(self.REQUEST), "b"),
        ):
            identity = self.redeem(self.successResultOf(routing), node_id)
            self.assertEqual((identity, identity.method), (Identity("a", 2000.0), AuthMethod.JWT))

    def test_only_for_clients_that_get_tickets(self) -> None:
        self.assertEqual(self.route(location(), REDIRECTABLE_REQUEST), RouteDecision(url=connect_url("ws://b", "a")))
        relayed = attrs.evolve(self.REQUEST, accepts_redirect=False)
        self.assertEqual(self.route(location(), relayed), RouteDecision(relay=self.relay))

    def test_not_if_several_nodes_have_the_url(self) -> None:
        shared = attrs.evolve(node_status("c"), public_url="ws://b")
        self.registry.node_list = [node_status("a"), node_status("b"), shared]
        self.successResultOf(self.node_directory.refresh())
        self.assertEqual(self.route(location(), self.REQUEST), RouteDecision(url=connect_url("ws://b", "a")))

    def test_not_without_a_cluster_secret(self) -> None:
        def fail() -> bytes:
            raise ConfigError("cluster-secret-file", "it cannot be read")

        self.router._tickets = Tickets("a", fail)
        self.assertEqual(self.route(location(), self.REQUEST), RouteDecision(url=connect_url("ws://b", "a")))

    def test_relayed_to_a_node_without_a_url(self) -> None:
        unnamed = attrs.evolve(location(), public_url="")
        self.assertEqual(self.route(unnamed, self.REQUEST), RouteDecision(relay=self.relay))


class RouteToOwnerTest(ClientRouterCase):
    def test_interfaces(self) -> None:
        verifyObject(IClientRouter, self.router)
        for interface, fake in ((INode, self.node), (IPeerClient, self.peer_client), (IRelayDialer, self.relay_dialer)):
            verifyObject(interface, fake)

    def test_relayed_to_the_owner(self) -> None:
        self.assertEqual(self.route(location()), RouteDecision(relay=self.relay))
        self.assertEqual(self.peer_client.has_client_requests, [(location(), ROUTE_TIMEOUT)])
        self.assertEqual(self.relay_dialer.dials, [(CONNECT_REQUEST, "b", "ws://b:81", RELAY_TIMEOUT)])

    def test_redirected_if_it_accepts(self) -> None:
        self.assertEqual(self.route(location(), REDIRECTABLE_REQUEST), RouteDecision(url=connect_url("ws://b", "a")))
        self.assertEqual(self.relay_dialer.dials, [])

    def test_not_redirected_to_its_own_url(self) -> None:
        self.node.public_url = "ws://b"
        self.assertEqual(self.route(location(), REDIRECTABLE_REQUEST), RouteDecision(relay=self.relay))

    def test_stays_if_the_owner_is_draining(self) -> None:
        self.assertIsNone(self.route(location(state="draining")))
        self.assertEqual(self.peer_client.has_client_requests, [])

    def test_stays_if_the_owner_had_this_nodes_address(self) -> None:
        self.node.peer_url = "ws://b:81"
        self.assertIsNone(self.route(location()))

    def test_stays_if_the_owner_does_not_have_it(self) -> None:
        self.peer_client.result = False
        self.assertIsNone(self.route(location()))

    def test_stays_if_the_owner_does_not_respond(self) -> None:
        self.peer_client.result = PeerUnreachableError("silent", sent=True)
        self.assertIsNone(self.route(location()))

    def test_owner_unknown_if_it_is_expired_and_does_not_respond(self) -> None:
        """The database may have been unavailable: then no lease is valid."""
        self.peer_client.result = PeerUnreachableError("silent", sent=True)
        refusal = self.failureResultOf(
            self.router.route_to_owner(CONNECT_REQUEST, location(live=False)), RequestRefusedError
        ).value
        self.assertEqual((refusal.status, refusal.reason), (503, "registry"))

    def test_stays_if_an_expired_owner_refuses_the_connection(self) -> None:
        self.peer_client.result = PeerUnreachableError("refused", refused=True)
        self.assertIsNone(self.route(location(live=False)))

    def test_relayed_to_an_expired_owner_that_has_it(self) -> None:
        self.assertEqual(self.route(location(live=False)), RouteDecision(relay=self.relay))

    def test_stays_if_no_relay_can_be_opened(self) -> None:
        self.relay_dialer.result = PeerUnreachableError("silent", sent=True)
        self.assertIsNone(self.route(location()))

    def test_stays_without_room_for_a_relay(self) -> None:
        self.relay_room = 0
        self.assertIsNone(self.route(location()))
        self.assertEqual(self.relay_dialer.dials, [])
        self.assertIsNotNone(self.route(location(), REDIRECTABLE_REQUEST))

    def test_opening_relays_count(self) -> None:
        self.relay_dialer.result = opening = Deferred()
        first = self.router.route_to_owner(CONNECT_REQUEST, location())
        self.assertIsNone(self.route(location()))
        opening.callback(self.relay)
        self.successResultOf(first)
        self.relay_dialer.result = self.relay
        self.assertIsNotNone(self.route(location()))

    def test_refused_by_the_other_node(self) -> None:
        self.relay_dialer.result = RequestRefusedError(429, "replaced", "too often")
        self.failureResultOf(self.router.route_to_owner(CONNECT_REQUEST, location()), RequestRefusedError)

    def test_previous_owner_is_notified(self) -> None:
        self.router.notify_takeover(SessionKey("a", 9), location())
        self.router.notify_claim_revoked(SessionKey("a", 10), location())
        self.assertEqual(self.peer_client.notices, [(location(), 9), (location(), -10)])

    def test_evicts_expired_owners_when_stable(self) -> None:
        self.assertTrue(self.router.may_evict_expired())
        self.membership.stable = False
        self.assertFalse(self.router.may_evict_expired())

    def test_urls_are_complete(self) -> None:
        self.assertEqual(
            connect_url("wss://gw/x", "acme/robot+1"),
            "wss://gw/x/v1/connect?client_id=acme%2Frobot%2B1&wsgateway_hop=1",
        )


class RouteToAssignedTest(ClientRouterCase):
    """A client that is assigned to another node."""

    assigned_node = Assignment("c", "c", "ws://c", "ws://c:81")

    def route_to(self, request: ConnectRequest = CONNECT_REQUEST) -> RouteDecision | None:
        return self.successResultOf(self.router.route_to(request, self.assigned_node))

    def test_has_peers(self) -> None:
        self.assertFalse(self.router.has_peers())
        self.registry.node_list = [node_status("a"), node_status("c")]
        self.successResultOf(self.node_directory.refresh())
        self.assertTrue(self.router.has_peers())

    def test_redirected_if_it_accepts(self) -> None:
        self.assertEqual(self.route_to(REDIRECTABLE_REQUEST), RouteDecision(url=connect_url("ws://c", "a")))
        self.assertEqual((self.peer_client.has_room_requests, self.relay_dialer.dials), ([("c", ROUTE_TIMEOUT)], []))

    def test_relayed(self) -> None:
        self.assertEqual(self.route_to(), RouteDecision(relay=self.relay))
        self.assertEqual(self.relay_dialer.dials, [(CONNECT_REQUEST, "c", "ws://c:81", RELAY_TIMEOUT)])

    def test_relayed_to_a_node_with_the_same_url(self) -> None:
        self.node.public_url = "ws://c"
        self.assertEqual(self.route_to(REDIRECTABLE_REQUEST), RouteDecision(relay=self.relay))

    def test_not_to_a_node_without_room_or_response(self) -> None:
        for answer in (False, PeerUnreachableError("silent", sent=True), PeerUnreachableError("refused", refused=True)):
            self.peer_client.has_room_results["c"] = answer
            self.assertIsNone(self.route_to(REDIRECTABLE_REQUEST))
            self.assertIsNone(self.route_to())
        self.assertEqual(self.relay_dialer.dials, [])

    def test_no_relay_can_be_opened(self) -> None:
        self.relay_dialer.result = PeerUnreachableError("silent", sent=True)
        self.assertIsNone(self.route_to())

    def test_refused_by_the_other_node(self) -> None:
        self.relay_dialer.result = RequestRefusedError(429, "replaced", "too often")
        self.failureResultOf(self.router.route_to(CONNECT_REQUEST, self.assigned_node), RequestRefusedError)


class OverflowTest(ClientRouterCase):
    def refresh(self, *nodes: NodeStatus) -> None:
        self.registry.node_list = list(nodes)
        self.successResultOf(self.node_directory.refresh())

    def overflow(self, request: ConnectRequest = CONNECT_REQUEST) -> RouteDecision | None:
        return self.successResultOf(self.router.route_overflow(request))

    def test_single_node(self) -> None:
        self.registry.owner = RegistryUnavailableError("not even asked")
        self.assertIsNone(self.overflow())

    def test_to_the_owner(self) -> None:
        self.refresh(node_status("b"), node_status("c"))
        self.registry.owner = location("b")
        self.assertEqual(self.overflow(REDIRECTABLE_REQUEST), RouteDecision(url=connect_url("ws://b", "a")))

    def test_to_the_least_loaded(self) -> None:
        self.refresh(node_status("b", clients=9), node_status("c"))
        for found in (None, location("a"), location("b", state="draining")):
            self.registry.owner = found
            self.assertEqual(self.overflow(REDIRECTABLE_REQUEST), RouteDecision(url=connect_url("ws://c", "a")))
            self.assertEqual(self.overflow(), RouteDecision(relay=self.relay))
        self.assertEqual({(name, url) for _, name, url, _ in self.relay_dialer.dials}, {("c", "ws://c:81")})

    def test_to_the_assigned_node(self) -> None:
        self.refresh(node_status("b"), node_status("c"), node_status("d", clients=50))
        self.registry.owner = location("b")
        self.registry.assignment_result = Assignment("d", "d", "ws://d", "ws://d:81")
        self.assertEqual(self.overflow(REDIRECTABLE_REQUEST), RouteDecision(url=connect_url("ws://d", "a")))
        self.peer_client.has_room_results["d"] = False
        self.assertEqual(self.overflow(REDIRECTABLE_REQUEST), RouteDecision(url=connect_url("ws://b", "a")))
        self.registry.assignment_result = Assignment("a", "a", "ws://a", "ws://a:81")
        self.assertEqual(self.overflow(REDIRECTABLE_REQUEST), RouteDecision(url=connect_url("ws://b", "a")))

    def test_nowhere(self) -> None:
        self.refresh(node_status("b", clients=100))
        self.assertIsNone(self.overflow())

    def test_registry_unavailable(self) -> None:
        self.refresh(node_status("b"))
        self.registry.owner = self.registry.assignment_result = RegistryUnavailableError("away")
        self.failureResultOf(self.router.route_overflow(CONNECT_REQUEST), RequestRefusedError)

    def test_registry_hangs(self) -> None:
        self.refresh(node_status("b"))
        self.registry.owner = Deferred()
        waiting = self.router.route_overflow(CONNECT_REQUEST)
        self.clock.advance(ROUTE_TIMEOUT)
        self.failureResultOf(waiting, RequestRefusedError)


class TakeoverTest(ClientRouterCase):
    routes_to_owner = False

    def test_to_the_least_loaded_despite_an_owner(self) -> None:
        self.registry.node_list = [node_status("b", clients=9), node_status("c")]
        self.successResultOf(self.node_directory.refresh())
        self.registry.owner = RegistryUnavailableError("not even asked")
        self.assertEqual(
            self.successResultOf(self.router.route_overflow(REDIRECTABLE_REQUEST)),
            RouteDecision(url=connect_url("ws://c", "a")),
        )
