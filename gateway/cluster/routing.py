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

from gateway.clients.interface import Arrival, Elsewhere, IPlacement
from gateway.cluster.interface import INode, IPeers, IRelaying, PeerUnreachable
from gateway.cluster.membership import Fleet
from gateway.protocol.handshake import Refusal, retry_after
from gateway.registry.interface import IRegistry, Location, Place, RegistryUnavailable

#: how long a node may take to answer that it has a client, and to take one, for which it has to claim it, in seconds
PATIENCE, RELAY_PATIENCE = 1.0, 2.5


def connect_url(public_url: str, client_id: str) -> str:
    """The complete url by which a client is sent to a node: whoever follows it is not sent on."""
    return f"{public_url}/v1/connect?client_id={quote(client_id, safe='')}&wsgateway_hop=1"


@implementer(IPlacement)
class Placement:
    """Places the clients that arrive at this node.

    ``routes``: a client that another node holds is sent there, rather than taken over. ``relay_room`` tells whether
    there are open files left for one more relay, besides so many that are being opened.
    """

    def __init__(
        self,
        *,
        routes: bool,
        node: INode,
        registry: IRegistry,
        peers: IPeers,
        relaying: IRelaying,
        fleet: Fleet,
        clock: IReactorTime,
        relay_room: Callable[[int], bool],
    ) -> None:
        self.routes = routes
        self._node = node
        self._registry = registry
        self._peers = peers
        self._relaying = relaying
        self._fleet = fleet
        self._clock = clock
        self._relay_room = relay_room
        #: relays that are being opened
        self._opening = 0

    def judges(self) -> bool:
        """See :meth:`IPlacement.judges`."""
        return self._node.steady()

    def taken(self, client_id: str, generation: int, before: Location) -> None:
        """See :meth:`IPlacement.taken`."""
        self._peers.moved(before, generation)

    def taken_back(self, client_id: str, generation: int, before: Location) -> None:
        """See :meth:`IPlacement.taken_back`."""
        self._peers.taken_back(before, generation)

    def route(self, arrival: Arrival, held: Location) -> Deferred[Elsewhere | None]:
        """See :meth:`IPlacement.route`."""
        return Deferred.fromCoroutine(self._route(arrival, held))

    async def _route(self, arrival: Arrival, held: Location) -> Elsewhere | None:
        # Who was at this node's own address before it is no more.
        if held.state != "up" or held.peer_url == self._node.peer_url:
            return None
        try:
            if not await self._peers.has(held, PATIENCE):
                return None
        except PeerUnreachable as e:
            if held.live or e.refused:
                return None
            # Its lease has run out, which says nothing as long as the database may have been away.
            raise _unknown() from None
        return await self._send(arrival, held.node_id, held.public_url, held.peer_url)

    def places(self) -> bool:
        """See :meth:`IPlacement.places`."""
        return len(self._fleet) > 0

    def send(self, arrival: Arrival, place: Place) -> Deferred[Elsewhere | None]:
        """See :meth:`IPlacement.send`."""
        return Deferred.fromCoroutine(self._send_placed(arrival, place))

    async def _send_placed(self, arrival: Arrival, place: Place) -> Elsewhere | None:
        try:
            # By its lease a node that is dead lives for some seconds more; and its count of clients is as old.
            if not await self._peers.has_room(place, PATIENCE):
                return None
        except PeerUnreachable:
            return None
        return await self._send(arrival, place.node_id, place.public_url, place.peer_url)

    def overflow(self, arrival: Arrival) -> Deferred[Elsewhere | None]:
        """See :meth:`IPlacement.overflow`."""
        return Deferred.fromCoroutine(self._overflow(arrival))

    async def _overflow(self, arrival: Arrival) -> Elsewhere | None:
        if not len(self._fleet):
            return None
        elsewhere = await self._to_its_place(arrival)
        if elsewhere is not None:
            return elsewhere
        if self.routes:
            try:
                held = await self._registry.find(arrival.client_id).addTimeout(PATIENCE, self._clock)
            except (RegistryUnavailable, TimeoutError):
                raise _unknown() from None
            if held is not None and held.node_id != self._node.node_id:
                elsewhere = await self._route(arrival, held)
                if elsewhere is not None:
                    return elsewhere
        node = self._fleet.emptiest()
        return None if node is None else await self._send(arrival, node.node_id, node.public_url, node.peer_url)

    async def _to_its_place(self, arrival: Arrival) -> Elsewhere | None:
        try:
            place = await self._registry.placed(arrival.client_id).addTimeout(PATIENCE, self._clock)
        except (RegistryUnavailable, TimeoutError):
            return None
        if place is None or place.node_id == self._node.node_id:
            return None
        return await self._send_placed(arrival, place)

    async def _send(self, arrival: Arrival, node_id: str, public_url: str, peer_url: str) -> Elsewhere | None:
        if arrival.follows and public_url != self._node.public_url:
            return Elsewhere(url=connect_url(public_url, arrival.client_id))
        if not self._relay_room(self._opening):
            return None
        self._opening += 1
        try:
            return Elsewhere(relay=await self._relaying.open(arrival, node_id, peer_url, RELAY_PATIENCE))
        except PeerUnreachable:
            return None
        finally:
            self._opening -= 1


def _unknown() -> Refusal:
    return Refusal(503, "registry", "it cannot be told yet which node has this client", [retry_after(2)])
