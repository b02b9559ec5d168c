"""On which node a client is to be that arrives at this one.

    told to move to another node           -> there, wherever it is, if that takes clients and answers
    held by a node that is up and answers     -> there, by a 307 if the client follows it, else by a relay
    held by one that is dead, draining, or
    silent for a second                       -> here
    this node is full                         -> to where it was told to move; to who holds it; else to the node with
                                                 the most room

A 307 goes to another public url alone: behind a load balancer that all nodes share, it would lead anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from gateway.clients.interface import ConnectRequest, IClientRouter, RouteDecision
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import INode, IPeerClient, IRelayDialer
from gateway.cluster.membership import NodeDirectory
from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import retry_after_header
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Assignment, IRegistry, Location
from gateway.rpc.interface import IMembership

#: how long a node may take to answer that it has a client, and to take one, for which it has to claim it, in seconds
ROUTE_TIMEOUT, RELAY_TIMEOUT = 1.0, 2.5


def connect_url(public_url: str, client_id: str) -> str:
    """The complete url by which a client is sent to a node: whoever follows it is not sent on."""
    return f"{public_url}/v1/connect?client_id={quote(client_id, safe='')}&wsgateway_hop=1"


@implementer(IClientRouter)
class ClientRouter:
    """Places the clients that arrive at this node.

    ``routes``: a client that another node holds is sent there, rather than taken over. ``relay_room`` tells whether
    there are open files left for one more relay, besides so many that are being opened.
    """

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
    ) -> None:
        self.routes_to_owner = routes_to_owner
        self._node = node
        self._membership = membership
        self._registry = registry
        self._peer_client = peer_client
        self._relay_dialer = relay_dialer
        self._node_directory = node_directory
        self._clock = clock
        self._has_relay_room = has_relay_room
        #: relays that are being opened
        self._relays_opening = 0

    def may_evict_expired(self) -> bool:
        """See :meth:`IPlacement.judges`."""
        return self._membership.is_stable()

    def notify_takeover(self, client_id: str, generation: int, previous_owner: Location) -> None:
        """See :meth:`IPlacement.taken`."""
        self._peer_client.notify_takeover(previous_owner, generation)

    def notify_claim_revoked(self, client_id: str, generation: int, previous_owner: Location) -> None:
        """See :meth:`IPlacement.taken_back`."""
        self._peer_client.notify_claim_revoked(previous_owner, generation)

    def route_to_owner(self, request: ConnectRequest, owner: Location) -> Deferred[RouteDecision | None]:
        """See :meth:`IPlacement.route`."""
        return Deferred.fromCoroutine(self._route_to_owner(request, owner))

    async def _route_to_owner(self, request: ConnectRequest, owner: Location) -> RouteDecision | None:
        # Who was at this node's own address before it is no more.
        if owner.state != "up" or owner.peer_url == self._node.peer_url:
            return None
        try:
            if not await self._peer_client.has_client(owner, ROUTE_TIMEOUT):
                return None
        except PeerUnreachableError as e:
            if owner.live or e.refused:
                return None
            # Its lease has run out, which says nothing as long as the database may have been away.
            raise _owner_unknown() from None
        return await self._redirect_or_relay(request, owner.node_id, owner.public_url, owner.peer_url)

    def has_peers(self) -> bool:
        """See :meth:`IPlacement.places`."""
        return len(self._node_directory) > 0

    def route_to(self, request: ConnectRequest, assignment: Assignment) -> Deferred[RouteDecision | None]:
        """See :meth:`IPlacement.send`."""
        return Deferred.fromCoroutine(self._route_to(request, assignment))

    async def _route_to(self, request: ConnectRequest, assignment: Assignment) -> RouteDecision | None:
        try:
            # By its lease a node that is dead lives for some seconds more; and its count of clients is as old.
            if not await self._peer_client.has_room(assignment, ROUTE_TIMEOUT):
                return None
        except PeerUnreachableError:
            return None
        return await self._redirect_or_relay(request, assignment.node_id, assignment.public_url, assignment.peer_url)

    def route_overflow(self, request: ConnectRequest) -> Deferred[RouteDecision | None]:
        """See :meth:`IPlacement.overflow`."""
        return Deferred.fromCoroutine(self._route_overflow(request))

    async def _route_overflow(self, request: ConnectRequest) -> RouteDecision | None:
        if not len(self._node_directory):
            return None
        elsewhere = await self._route_to_assigned(request)
        if elsewhere is not None:
            return elsewhere
        if self.routes_to_owner:
            try:
                held = await self._registry.find(request.client_id).addTimeout(ROUTE_TIMEOUT, self._clock)
            except (RegistryUnavailableError, TimeoutError):
                raise _owner_unknown() from None
            if held is not None and held.node_id != self._node.node_id:
                elsewhere = await self._route_to_owner(request, held)
                if elsewhere is not None:
                    return elsewhere
        node = self._node_directory.least_loaded()
        return (
            None
            if node is None
            else await self._redirect_or_relay(request, node.node_id, node.public_url, node.peer_url)
        )

    async def _route_to_assigned(self, request: ConnectRequest) -> RouteDecision | None:
        try:
            place = await self._registry.assignment(request.client_id).addTimeout(ROUTE_TIMEOUT, self._clock)
        except (RegistryUnavailableError, TimeoutError):
            return None
        if place is None or place.node_id == self._node.node_id:
            return None
        return await self._route_to(request, place)

    async def _redirect_or_relay(
        self, request: ConnectRequest, node_id: str, public_url: str, peer_url: str
    ) -> RouteDecision | None:
        if request.accepts_redirect and public_url != self._node.public_url:
            return RouteDecision(url=connect_url(public_url, request.client_id))
        if not self._has_relay_room(self._relays_opening):
            return None
        self._relays_opening += 1
        try:
            return RouteDecision(relay=await self._relay_dialer.dial(request, node_id, peer_url, RELAY_TIMEOUT))
        except PeerUnreachableError:
            return None
        finally:
            self._relays_opening -= 1


def _owner_unknown() -> RequestRefusedError:
    return RequestRefusedError(
        503, "registry", "it cannot be told yet which node has this client", [retry_after_header(2)]
    )
