"""Route the clients that arrive at this node.

    assigned to another node                  -> there, if that node accepts clients and responds
    owned by a node that is up and responds   -> there, by a 307 if the client accepts redirects, else by a relay
    owned by a node that is dead, draining,
    or does not respond within a second       -> here
    this node is full                         -> to the assigned node; else to the owner; else to the node with the
                                                 most room

A 307 goes only to another public URL: behind a load balancer that all nodes share, it could lead to any node.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

import attrs
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from gateway.auth.interface import Identity
from gateway.auth.tickets import Tickets
from gateway.clients.interface import ConnectRequest, IClientRouter, RouteDecision
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import INode, IPeerClient, IRelayDialer
from gateway.cluster.membership import NodeDirectory
from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import retry_after_header
from gateway.protocol.uri import TICKET_PARAMETER
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Assignment, IRegistry, Location, NodeStatus, SessionKey
from gateway.rpc.interface import IMembership
from gateway.settings import ConfigError

#: timeout of requests to peers and the registry about the route of a client, in seconds
ROUTE_TIMEOUT = 1.0
#: timeout of opening a relay, for which the other node claims the client, in seconds
RELAY_TIMEOUT = 2.5


def connect_url(public_url: str, client_id: str) -> str:
    """Return the complete URL for a client that is sent to a node, marked so that the client is not sent on from
    there."""
    return f"{public_url}/v1/connect?client_id={quote(client_id, safe='')}&wsgateway_hop=1"


@attrs.frozen
class Destination:
    """Where a client is sent."""

    #: the complete URL, without a ticket
    url: str
    #: the node that the client reaches there; empty if that may be any node
    node_id: str = ""

    def url_with_ticket(self, tickets: Tickets | None, identity: Identity | None, after: float = 0.0) -> str:
        """Return the URL, with a ticket if the client gets one for that node. It is to connect in ``after`` seconds;
        ``identity`` is what it has proved."""
        if tickets is None or identity is None or not self.node_id:
            return self.url
        try:
            return f"{self.url}&{TICKET_PARAMETER}={tickets.issue(identity, self.node_id, after)}"
        except ConfigError:
            # Without a cluster secret the client needs its token. Peer connections report the problem.
            return self.url


def destination_at(
    node_directory: NodeDirectory, node: NodeStatus | Assignment | Location, client_id: str
) -> Destination:
    """Return the public URL of another node as the destination of a client."""
    has_own_url = node_directory.has_own_url(node.node_id, node.public_url)
    return Destination(connect_url(node.public_url, client_id), node.node_id if has_own_url else "")


@implementer(IClientRouter)
class ClientRouter:
    """Routes the clients that arrive at this node."""

    def __init__(
        self,
        *,
        routes_to_owner: bool,
        node: INode,
        membership: IMembership,
        registry: IRegistry,
        peer_client: IPeerClient,
        relay_dialer: IRelayDialer,
        node_directory: NodeDirectory,
        clock: IReactorTime,
        has_relay_room: Callable[[int], bool],
        tickets: Tickets | None = None,
    ) -> None:
        """With ``routes_to_owner`` a client whose session another node has is sent there, rather than taken over.
        ``has_relay_room`` tells whether there are file descriptors left for one more relay, besides the given number of
        relays that are being opened. Without ``tickets`` no URL has one."""
        self.routes_to_owner = routes_to_owner
        self._node = node
        self._membership = membership
        self._registry = registry
        self._peer_client = peer_client
        self._relay_dialer = relay_dialer
        self._node_directory = node_directory
        self._clock = clock
        self._has_relay_room = has_relay_room
        self._tickets = tickets
        #: number of relays that are being opened
        self._relays_opening = 0

    def may_evict_expired(self) -> bool:
        return self._membership.is_stable()

    def notify_takeover(self, key: SessionKey, previous_owner: Location) -> None:
        self._peer_client.notify_takeover(previous_owner, key.generation)

    def notify_claim_revoked(self, key: SessionKey, previous_owner: Location) -> None:
        self._peer_client.notify_claim_revoked(previous_owner, key.generation)

    def route_to_owner(self, request: ConnectRequest, owner: Location) -> Deferred[RouteDecision | None]:
        return Deferred.fromCoroutine(self._route_to_owner(request, owner))

    async def _route_to_owner(self, request: ConnectRequest, owner: Location) -> RouteDecision | None:
        # An owner with this node's own address is gone: this node listens there now.
        if owner.state != "up" or owner.peer_url == self._node.peer_url:
            return None
        try:
            if not await self._peer_client.has_client(owner, ROUTE_TIMEOUT):
                return None
        except PeerUnreachableError as e:
            if owner.live or e.refused:
                return None
            # Its lease has expired, which proves nothing while the database may have been unavailable.
            raise _owner_unknown() from None
        return await self._redirect_or_relay(request, owner)

    def has_peers(self) -> bool:
        return len(self._node_directory) > 0

    def route_to(self, request: ConnectRequest, assignment: Assignment) -> Deferred[RouteDecision | None]:
        return Deferred.fromCoroutine(self._route_to(request, assignment))

    async def _route_to(self, request: ConnectRequest, assignment: Assignment) -> RouteDecision | None:
        try:
            # The registry lists a dead node for some seconds more, and its number of clients is as old.
            if not await self._peer_client.has_room(assignment, ROUTE_TIMEOUT):
                return None
        except PeerUnreachableError:
            return None
        return await self._redirect_or_relay(request, assignment)

    def route_overflow(self, request: ConnectRequest) -> Deferred[RouteDecision | None]:
        return Deferred.fromCoroutine(self._route_overflow(request))

    async def _route_overflow(self, request: ConnectRequest) -> RouteDecision | None:
        if not len(self._node_directory):
            return None
        decision = await self._route_to_assigned(request)
        if decision is not None:
            return decision
        if self.routes_to_owner:
            try:
                owner = await self._registry.find(request.client_id).addTimeout(ROUTE_TIMEOUT, self._clock)
            except (RegistryUnavailableError, TimeoutError):
                raise _owner_unknown() from None
            if owner is not None and owner.node_id != self._node.node_id:
                decision = await self._route_to_owner(request, owner)
                if decision is not None:
                    return decision
        node = self._node_directory.least_loaded()
        if node is None:
            return None
        return await self._redirect_or_relay(request, node)

    async def _route_to_assigned(self, request: ConnectRequest) -> RouteDecision | None:
        try:
            assignment = await self._registry.assignment(request.client_id).addTimeout(ROUTE_TIMEOUT, self._clock)
        except (RegistryUnavailableError, TimeoutError):
            return None
        if assignment is None or assignment.node_id == self._node.node_id:
            return None
        return await self._route_to(request, assignment)

    async def _redirect_or_relay(
        self, request: ConnectRequest, node: NodeStatus | Assignment | Location
    ) -> RouteDecision | None:
        if request.accepts_redirect and node.public_url not in ("", self._node.public_url):
            destination = destination_at(self._node_directory, node, request.client_id)
            return RouteDecision(url=destination.url_with_ticket(self._tickets, _ticket_identity(request)))
        if not self._has_relay_room(self._relays_opening):
            return None
        self._relays_opening += 1
        try:
            return RouteDecision(
                relay=await self._relay_dialer.dial(request, node.node_id, node.peer_url, RELAY_TIMEOUT)
            )
        except PeerUnreachableError:
            return None
        finally:
            self._relays_opening -= 1


def _ticket_identity(request: ConnectRequest) -> Identity | None:
    if not request.ticket_method:
        return None
    return Identity(request.client_id, request.expires_at, method=request.ticket_method)


def _owner_unknown() -> RequestRefusedError:
    return RequestRefusedError(
        503, "registry", "it is not known yet which node has this client", [retry_after_header(2)]
    )
