"""What a node is made of: each part, and which of the others it knows. Nothing is opened here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred

from gateway.api.endpoint import BackendEndpoint
from gateway.api.responses import MAX_ENVELOPE_SIZE
from gateway.api.upstream import BackendDispatcher
from gateway.auth.authenticator import AuthenticatorChain
from gateway.auth.backend_tokens import BackendTokens
from gateway.clients.endpoint import ClientFactory, RelayedClientFactory
from gateway.clients.sessions import ClientSessions
from gateway.cloud.dns import make_registrar
from gateway.cluster.auth import ClusterSecret, PeerAuth, PeerTLS
from gateway.cluster.drain import GracefulDisconnect, RelayDrain
from gateway.cluster.errors import PeerAuthenticationError
from gateway.cluster.interface import INode
from gateway.cluster.membership import NodeDirectory
from gateway.cluster.peer_client import PeerClient
from gateway.cluster.rebalance import Rebalancer
from gateway.cluster.reconcile import Reconciler
from gateway.cluster.relay import SocketRelays
from gateway.cluster.relay_client import RelayDialer
from gateway.cluster.routing import ClientRouter
from gateway.metrics import Metrics
from gateway.net.certificates import CertificateReloader
from gateway.net.proxy_protocol import ProxyHeaderErrors
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.factory import make_registry
from gateway.registry.interface import Location
from gateway.rpc.dispatcher import Dispatcher
from gateway.rpc.token_renewal import TokenRenewal
from gateway.settings import Settings, open_file_limit, reserved_files
from gateway.util.cork import Cork
from gateway.websocket.limits import ReassemblyBudget

if TYPE_CHECKING:
    from gateway.cloud.autoscaling import Autoscaling


#: how many open files one relay takes: the client's, and the one to the other node
FILES_PER_RELAY = 2


class Components:
    """The parts of one node."""

    def __init__(self, settings: Settings, node: INode, reactor: Any) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for a file that cannot be read, and for a registry that cannot
        be used as it is named."""
        self._settings = settings
        self._node = node
        self._reactor = reactor
        self._cork = Cork(reactor.seconds)
        self.metrics = Metrics()
        self.certificate_reloader = CertificateReloader(self.metrics.gauges)
        self.proxy_header_errors = ProxyHeaderErrors(self.metrics, reactor.seconds)
        self.authenticator = AuthenticatorChain(settings.auth, reactor=reactor, metrics=self.metrics)
        self.backend_tokens = BackendTokens(settings.backend_token_file) if settings.backend_token_file else None
        self.registry = make_registry(settings, reactor=reactor, metrics=self.metrics)
        self._make_dispatcher()
        self._make_cluster()
        self._make_drain()
        self._make_cloud()
        self._make_endpoints()
        self._add_gauges()

    def _make_dispatcher(self) -> None:
        settings, node = self._settings, self._node
        self.dispatcher = Dispatcher(
            registry=self.registry,
            clock=self._reactor,
            metrics=self.metrics,
            node_id=node.node_id,
            is_stable=node.is_stable,
            has_lease=node.has_lease,
            ownership_uncertain=node.ownership_uncertain,
            lease=settings.lease,
            call_timeout=settings.call_timeout,
            max_call_timeout=settings.max_call_timeout,
            max_message_size=settings.max_message_size,
            max_calls=settings.max_calls,
            max_calls_per_client=settings.max_calls_per_client,
        )
        self.sessions = ClientSessions(
            registry=self.registry,
            clock=self._reactor,
            settings=settings,
            metrics=self.metrics,
            handler=self.dispatcher,
            unready_reason=node.unready_reason,
        )
        self.backend_dispatcher = BackendDispatcher(
            clock=self._reactor, metrics=self.metrics, settings=settings, node_id=node.node_id
        )
        self.dispatcher.attach(self.sessions, self.backend_dispatcher)
        self.dispatcher.set_token_renewal(
            TokenRenewal(self.authenticator, self.sessions, self.metrics, self._reactor.seconds)
        )

    def _make_cluster(self) -> None:
        settings, node, reactor = self._settings, self._node, self._reactor
        self.cluster_secret = ClusterSecret.from_settings(settings)
        self.peer_auth = PeerAuth(node.node_id, self.cluster_secret)
        peer_tls = PeerTLS(own_certificates=self.certificate_reloader.for_peers)
        self.certificate_reloader.on_reload.append(peer_tls.reload)
        self.node_directory = NodeDirectory(self.registry, node.node_id, node.is_stable)
        self.peer_client = PeerClient(
            node_id=node.node_id,
            peer_auth=self.peer_auth,
            reactor=reactor,
            cork=self._cork,
            metrics=self.metrics,
            heartbeat=settings.heartbeat,
            lease=settings.lease,
            max_message_size=settings.max_message_size + MAX_ENVELOPE_SIZE,
            max_calls=settings.max_calls,
            tls=peer_tls,
        )
        self.dispatcher.remote_nodes = self.peer_client
        self.registry.claim_revoked = self._claim_revoked
        self.relays = SocketRelays(reactor=reactor, metrics=self.metrics)
        self.relay_dialer = RelayDialer(
            reactor=reactor,
            peer_auth=self.peer_auth,
            relays=self.relays,
            heartbeat=settings.heartbeat,
            lease=settings.lease,
            metrics=self.metrics,
            tls=peer_tls,
        )
        self.client_router = ClientRouter(
            routes_to_owner=settings.on_elsewhere == "route",
            node=node,
            registry=self.registry,
            peer_client=self.peer_client,
            relay_dialer=self.relay_dialer,
            node_directory=self.node_directory,
            clock=reactor,
            has_relay_room=self._has_relay_room,
        )
        self.sessions.set_router(self.client_router)
        self.reconciler = Reconciler(
            sessions=self.sessions,
            registry=self.registry,
            clock=reactor,
            is_single_node=lambda: not len(self.node_directory),
        )
        self.node_directory.on_nodes_changed.append(self.peer_client.nodes_changed)
        self.node_directory.on_node_down += [self.relays.close_all_to, self.dispatcher.node_down]

    def _make_drain(self) -> None:
        """What sends clients to other nodes."""
        settings = self._settings
        self.graceful_disconnect = GracefulDisconnect(
            self.sessions,
            self._reactor,
            max_call_timeout=settings.max_call_timeout,
            begin_goaway=self.dispatcher.begin_goaway,
            in_flight=self.dispatcher.calls_in_flight_on,
            release=self.registry.release,
            is_single_node=lambda: not len(self.node_directory),
        )
        self.relay_drain = RelayDrain(
            registry=self.registry,
            peer_client=self.peer_client,
            clock=self._reactor,
            close_relay=self.relays.close,
            max_call_timeout=settings.max_call_timeout,
        )
        self.rebalancer = Rebalancer(
            node=self._node,
            sessions=self.sessions,
            registry=self.registry,
            node_directory=self.node_directory,
            peer_client=self.peer_client,
            graceful_disconnect=self.graceful_disconnect,
            clock=self._reactor,
            metrics=self.metrics,
            settings=settings,
            in_flight=self.dispatcher.calls_in_flight_on,
        )
        self.node_directory.on_nodes_changed.append(self.rebalancer.nodes_changed)

    def _make_cloud(self) -> None:
        settings, node = self._settings, self._node
        self.autoscaling = self._make_autoscaling() if settings.autoscaling else None
        self.dns_registrar = make_registrar(
            settings,
            node_id=node.node_id,
            reactor=self._reactor,
            metrics=self.metrics,
            live_nodes=lambda: [node.node_id, *(other.node_id for other in self.node_directory.peer_nodes())],
            refresh_live_nodes=lambda: Deferred.fromCoroutine(self._live_nodes()),
            instance_address=self.autoscaling.address if self.autoscaling is not None else None,
        )
        if self.dns_registrar is not None:
            self.node_directory.on_node_down.append(self.dns_registrar.node_down)

    async def _live_nodes(self) -> list[str] | None:
        """The live nodes, read anew; ``None`` while this node may not judge others."""
        try:
            nodes = await self.registry.nodes()
        except RegistryUnavailableError:
            return None
        return [node.node_id for node in nodes] if self._node.is_stable() else None

    def _make_autoscaling(self) -> Autoscaling:
        # Not imported at the top: it takes memory that only such a node needs.
        from gateway.cloud.autoscaling import Autoscaling

        return Autoscaling(
            self._settings.autoscaling,
            reactor=self._reactor,
            metrics=self.metrics,
            clients=self.sessions.count,
            capacity=self._settings.capacity,
            accepts_clients=lambda: not self._node.unready_reason(),
            drain=self._node.drain,
            colocated_clients=self._clients_on_other_local_nodes,
        )

    def _clients_on_other_local_nodes(self) -> int:
        """How many clients are still on other nodes of this machine; one that does not drain yet may get more."""
        host = urlsplit(self._node.peer_url).hostname
        others = [node for node in self.node_directory.peer_nodes() if urlsplit(node.peer_url).hostname == host]
        return sum(node.clients + (node.state == "up") for node in others)

    def _claim_revoked(self, client_id: str, generation: int, previous_owner: Location | None) -> None:
        self.sessions.restore_claim(client_id, generation)
        if previous_owner is not None:
            self.peer_client.notify_claim_revoked(previous_owner, generation)

    def _has_relay_room(self, dialing: int) -> bool:
        files = self.sessions.count() + FILES_PER_RELAY * (self.relays.count() + dialing + 1)
        return files < open_file_limit() - reserved_files()

    def _make_endpoints(self) -> None:
        common: dict[str, Any] = {
            "settings": self._settings,
            "metrics": self.metrics,
            "reactor": self._reactor,
            "cork": self._cork,
        }
        unfinished = ReassemblyBudget(self._settings.max_message_size, self.metrics)
        self.client_factory = ClientFactory(
            sessions=self.sessions, authenticator=self.authenticator, reassembly_budget=unfinished, **common
        )
        self.proxied_client_factory = self.client_factory.with_proxy_protocol()
        self.sessions.enable_parking(self._reactor, self.client_factory.wake, self._cork)
        self.relayed_client_factory = RelayedClientFactory(
            sessions=self.sessions,
            authenticate_peer=self.peer_auth.verify,
            authentication_error=PeerAuthenticationError,
            reassembly_budget=unfinished,
            **common,
        )
        self.backend_endpoint = BackendEndpoint(
            dispatcher=self.dispatcher,
            sessions=self.sessions,
            registry=self.registry,
            node=self._node,
            upstream=self.backend_dispatcher,
            authenticate_backend=self.backend_tokens.grant if self.backend_tokens else None,
            peers=self.peer_client,
            authenticate_peer=self.peer_auth.verify,
            relay_factory=self.relayed_client_factory,
            rebalancer=self.rebalancer,
            **common,
        )

    def _add_gauges(self) -> None:
        gauges = self.metrics.gauges
        gauges["clients"] = ("Clients connected here.", self.sessions.count)
        gauges["parked"] = ("Of these, the parked ones.", self.sessions.parked_count)
        gauges["relays"] = ("Clients of other nodes whose bytes go through here.", self.relays.count)
        gauges["peers"] = ("Links to other nodes that are open.", self.peer_client.count)
        gauges["nodes"] = ("Other nodes that are live.", self.node_directory.__len__)
        gauges["capacity"] = ("The most clients here.", lambda: self._settings.capacity)
        gauges["calls_in_flight"] = ("Calls to clients, and from them, in flight.", self.dispatcher.calls_in_flight)
        if self.dns_registrar is not None:
            gauges["dns_announced"] = (
                "1 while this node's record is known to be in DNS.",
                self.dns_registrar.announced,
            )
        gauges["ready"] = ("1 while this node takes clients.", lambda: not self._node.unready_reason())

    def open_client_sockets(self) -> int:
        """How many sockets of clients are open, those among them that are just closing; less the parked ones."""
        factories = (self.client_factory, self.proxied_client_factory, self.relayed_client_factory)
        return sum(factory.countConnections for factory in factories)
