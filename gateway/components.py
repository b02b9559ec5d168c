"""What a node is made of: each part, and which of the others it knows. Nothing is opened here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred

from gateway.api.endpoint import BackendFactory
from gateway.api.responses import ENVELOPE
from gateway.api.upstream import Upstream
from gateway.auth.authenticator import Authenticators
from gateway.auth.backend_tokens import BackendTokens
from gateway.clients.endpoint import ClientFactory, RelayedFactory
from gateway.clients.sessions import Edge
from gateway.cloud.dns import make_names
from gateway.cluster.auth import Credentials, NotAPeer, PeerTLS, Secret
from gateway.cluster.drain import Departures, Farewells
from gateway.cluster.interface import INode
from gateway.cluster.membership import Fleet
from gateway.cluster.peer_client import Peers
from gateway.cluster.rebalance import Balance
from gateway.cluster.reconcile import Audit
from gateway.cluster.relay import Relays
from gateway.cluster.relay_client import Relaying
from gateway.cluster.routing import Placement
from gateway.metrics import Metrics
from gateway.net.certificates import Renewals
from gateway.net.proxy_protocol import BadHeaders
from gateway.registry.factory import make_registry
from gateway.registry.interface import Location, RegistryUnavailable
from gateway.rpc.dispatcher import Hub
from gateway.rpc.token_renewal import Renewal
from gateway.settings import Settings, open_file_limit, reserved_files
from gateway.util.cork import Turn
from gateway.websocket.limits import Unfinished

if TYPE_CHECKING:
    from gateway.cloud.autoscaling import Autoscaling


#: how many open files one relay takes: the client's, and the one to the other node
FILES_PER_RELAY = 2


class Parts:
    """The parts of one node."""

    def __init__(self, settings: Settings, node: INode, reactor: Any) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for a file that cannot be read, and for a registry that cannot
        be used as it is named."""
        self._settings = settings
        self._node = node
        self._reactor = reactor
        self._turn = Turn(reactor.seconds)
        self.metrics = Metrics()
        self.certificates = Renewals(self.metrics.gauges)
        self.bad_headers = BadHeaders(self.metrics, reactor.seconds)
        self.authenticators = Authenticators(settings.auth, reactor=reactor, metrics=self.metrics)
        self.backend_tokens = BackendTokens(settings.backend_token_file) if settings.backend_token_file else None
        self.registry = make_registry(settings, reactor=reactor, metrics=self.metrics)
        self._make_hub()
        self._make_fleet()
        self._make_departures()
        self._make_cloud()
        self._make_endpoints()
        self._add_gauges()

    def _make_hub(self) -> None:
        settings, node = self._settings, self._node
        self.hub = Hub(
            registry=self.registry,
            clock=self._reactor,
            metrics=self.metrics,
            node_id=node.node_id,
            steady=node.steady,
            has_lease=node.has_lease,
            doubtful=node.doubtful,
            lease=settings.lease,
            call_timeout=settings.call_timeout,
            max_call_timeout=settings.max_call_timeout,
            max_message_size=settings.max_message_size,
            max_calls=settings.max_calls,
            max_calls_per_client=settings.max_calls_per_client,
        )
        self.edge = Edge(
            registry=self.registry,
            clock=self._reactor,
            settings=settings,
            metrics=self.metrics,
            handler=self.hub,
            available=node.unready,
        )
        self.upstream = Upstream(clock=self._reactor, metrics=self.metrics, settings=settings, node_id=node.node_id)
        self.hub.connect(self.edge, self.upstream)
        self.hub.renew_by(Renewal(self.authenticators, self.edge, self.metrics, self._reactor.seconds))

    def _make_fleet(self) -> None:
        settings, node, reactor = self._settings, self._node, self._reactor
        self.secret = Secret.of(settings)
        self.credentials = Credentials(node.node_id, self.secret)
        peer_tls = PeerTLS(own=self.certificates.of_peers)
        self.certificates.watchers.append(peer_tls.renew)
        self.fleet = Fleet(self.registry, node.node_id, node.steady)
        self.peers = Peers(
            node_id=node.node_id,
            credentials=self.credentials,
            reactor=reactor,
            turn=self._turn,
            metrics=self.metrics,
            heartbeat=settings.heartbeat,
            lease=settings.lease,
            max_message_size=settings.max_message_size + ENVELOPE,
            max_calls=settings.max_calls,
            tls=peer_tls,
        )
        self.hub.elsewhere = self.peers
        self.registry.taken_back = self._taken_back
        self.relays = Relays(reactor=reactor, metrics=self.metrics)
        self.relaying = Relaying(
            reactor=reactor,
            credentials=self.credentials,
            relays=self.relays,
            heartbeat=settings.heartbeat,
            lease=settings.lease,
            metrics=self.metrics,
            tls=peer_tls,
        )
        self.placement = Placement(
            routes=settings.on_elsewhere == "route",
            node=node,
            registry=self.registry,
            peers=self.peers,
            relaying=self.relaying,
            fleet=self.fleet,
            clock=reactor,
            relay_room=self._has_relay_room,
        )
        self.edge.place_by(self.placement)
        self.audit = Audit(edge=self.edge, registry=self.registry, clock=reactor, alone=lambda: not len(self.fleet))
        self.fleet.watchers.append(self.peers.nodes_changed)
        self.fleet.mourners += [self.relays.end_all, self.hub.node_gone]

    def _make_departures(self) -> None:
        """What sends clients to other nodes."""
        settings = self._settings
        self.farewells = Farewells(
            self.edge,
            self._reactor,
            longest_call=settings.max_call_timeout,
            let_go=self.hub.let_go,
            in_flight=self.hub.calls_in_flight_on,
            release=self.registry.release,
            alone=lambda: not len(self.fleet),
        )
        self.departures = Departures(
            registry=self.registry,
            peers=self.peers,
            clock=self._reactor,
            cut=self.relays.end,
            longest_call=settings.max_call_timeout,
        )
        self.balance = Balance(
            node=self._node,
            edge=self.edge,
            registry=self.registry,
            fleet=self.fleet,
            peers=self.peers,
            farewells=self.farewells,
            clock=self._reactor,
            metrics=self.metrics,
            settings=settings,
            in_flight=self.hub.calls_in_flight_on,
        )
        self.fleet.watchers.append(self.balance.looked)

    def _make_cloud(self) -> None:
        settings, node = self._settings, self._node
        self.autoscaling = self._make_autoscaling() if settings.autoscaling else None
        self.names = make_names(
            settings,
            node_id=node.node_id,
            reactor=self._reactor,
            metrics=self.metrics,
            live=lambda: [node.node_id, *(other.node_id for other in self.fleet.others())],
            look=lambda: Deferred.fromCoroutine(self._live_nodes()),
            machine=self.autoscaling.address if self.autoscaling is not None else None,
        )
        if self.names is not None:
            self.fleet.mourners.append(self.names.node_gone)

    async def _live_nodes(self) -> list[str] | None:
        """The live nodes, read anew; ``None`` while this node may not judge others."""
        try:
            nodes = await self.registry.nodes()
        except RegistryUnavailable:
            return None
        return [node.node_id for node in nodes] if self._node.steady() else None

    def _make_autoscaling(self) -> Autoscaling:
        # Not imported at the top: it takes memory that only such a node needs.
        from gateway.cloud.autoscaling import Autoscaling

        return Autoscaling(
            self._settings.autoscaling,
            reactor=self._reactor,
            metrics=self.metrics,
            clients=self.edge.count,
            capacity=self._settings.capacity,
            taking=lambda: not self._node.unready(),
            drain=self._node.drain,
            neighbours=self._neighbours,
        )

    def _neighbours(self) -> int:
        """How many clients are still on other nodes of this machine; one that does not drain yet may get more."""
        host = urlsplit(self._node.peer_url).hostname
        others = [node for node in self.fleet.others() if urlsplit(node.peer_url).hostname == host]
        return sum(node.clients + (node.state == "up") for node in others)

    def _taken_back(self, client_id: str, generation: int, before: Location | None) -> None:
        self.edge.restore(client_id, generation)
        if before is not None:
            self.peers.taken_back(before, generation)

    def _has_relay_room(self, opening: int) -> bool:
        files = self.edge.count() + FILES_PER_RELAY * (self.relays.count() + opening + 1)
        return files < open_file_limit() - reserved_files()

    def _make_endpoints(self) -> None:
        common: dict[str, Any] = {
            "settings": self._settings,
            "metrics": self.metrics,
            "reactor": self._reactor,
            "turn": self._turn,
        }
        unfinished = Unfinished(self._settings.max_message_size, self.metrics)
        self.clients = ClientFactory(
            edge=self.edge, authenticators=self.authenticators, unfinished=unfinished, **common
        )
        self.proxied_clients = self.clients.through_proxy()
        self.edge.park_on(self._reactor, self.clients.wake, self._turn)
        self.relayed_clients = RelayedFactory(
            edge=self.edge, peer_ok=self.credentials.verify, not_a_peer=NotAPeer, unfinished=unfinished, **common
        )
        self.backends = BackendFactory(
            hub=self.hub,
            edge=self.edge,
            registry=self.registry,
            node=self._node,
            upstream=self.upstream,
            grant_of=self.backend_tokens.grant if self.backend_tokens else None,
            peers=self.peers,
            peer_ok=self.credentials.verify,
            relays=self.relayed_clients,
            balance=self.balance,
            **common,
        )

    def _add_gauges(self) -> None:
        gauges = self.metrics.gauges
        gauges["clients"] = ("Clients connected here.", self.edge.count)
        gauges["parked"] = ("Of these, the parked ones.", self.edge.parked)
        gauges["relays"] = ("Clients of other nodes whose bytes go through here.", self.relays.count)
        gauges["peers"] = ("Links to other nodes that are open.", self.peers.count)
        gauges["nodes"] = ("Other nodes that are live.", self.fleet.__len__)
        gauges["capacity"] = ("The most clients here.", lambda: self._settings.capacity)
        gauges["calls_in_flight"] = ("Calls to clients, and from them, in flight.", self.hub.calls_in_flight)
        if self.names is not None:
            gauges["dns_announced"] = ("1 while this node's record is known to be in DNS.", self.names.announced)
        gauges["ready"] = ("1 while this node takes clients.", lambda: not self._node.unready())

    def open_clients(self) -> int:
        """How many sockets of clients are open, those among them that are just closing; less the parked ones."""
        factories = (self.clients, self.proxied_clients, self.relayed_clients)
        return sum(factory.countConnections for factory in factories)
