"""Composition root: construct the components of a node and connect them. Nothing is opened or started here.

Each component gets what it uses as constructor arguments, so the order of construction is the order of use. Where two
components need each other, the one made first gets a method of :class:`Components`, which looks its target up when it
is called:

    registry -> sessions, peer client           _claim_revoked()
    membership -> node directory, peer client   _heartbeat_sent()
    registry -> peer client                     _exchange_floors()
    membership -> sessions, DNS registrar       _reclaim_sessions()
    node directory -> components made after it  _node_down(), _nodes_changed()
    sessions -> client factory                  _build_connection(), when a parked connection wakes
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred

from gateway.api.endpoint import BackendEndpoint
from gateway.api.responses import MAX_ENVELOPE_SIZE
from gateway.api.upstream import BackendDispatcher
from gateway.auth.authenticator import AuthenticatorChain
from gateway.auth.backend_tokens import BackendTokens
from gateway.auth.tickets import Tickets
from gateway.clients.endpoint import ClientFactory, RelayedClientFactory
from gateway.clients.interface import IClientSessions, UnparkedSession
from gateway.clients.sessions import ClientSessions
from gateway.clients.table import ParkingOptions
from gateway.cloud.dns import make_registrar
from gateway.cluster.auth import ClusterSecret, PeerAuth, PeerTLS
from gateway.cluster.drain import Drain, GracefulDisconnect, RelayDrain
from gateway.cluster.errors import PeerAuthenticationError
from gateway.cluster.interface import INodeService, NodeState
from gateway.cluster.membership import Membership, NodeDirectory
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
from gateway.registry.interface import Location, NodeStatus, SessionKey
from gateway.registry.sql import SQLRegistry
from gateway.rpc.dispatcher import Dispatcher
from gateway.rpc.token_renewal import TokenRenewal
from gateway.settings import Settings, open_file_limit, reserved_files
from gateway.util.cork import Cork
from gateway.websocket.reassembly import ReassemblyBudget

if TYPE_CHECKING:
    from gateway.cloud.autoscaling import Autoscaling


#: open files of one relay: the client's socket, and the one to the other node
FILES_PER_RELAY = 2


class Components:
    """The components of one node."""

    def __init__(
        self,
        settings: Settings,
        node: INodeService,
        reactor: Any,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        registry_factory: Callable[..., SQLRegistry] = make_registry,
    ) -> None:
        """``monotonic`` is a clock that is never set; ``registry_factory`` takes the arguments of
        :func:`~gateway.registry.factory.make_registry`.

        Raises :class:`~gateway.settings.ConfigError` if a file cannot be read, or the registry cannot be used as it is
        named.
        """
        self._monotonic = monotonic
        self._registry_factory = registry_factory
        self._settings = settings
        self._node = node
        self._reactor = reactor
        self._cork = Cork(reactor.seconds)
        self.metrics = Metrics()
        self._make_credentials()
        self._make_membership()
        self._make_peers()
        self._make_sessions()
        self._make_rebalancing()
        self._make_endpoints()
        self._make_cloud()
        self._make_drain()
        self._add_gauges()

    # Construction, in order.

    def _make_credentials(self) -> None:
        settings, metrics, clock = self._settings, self.metrics, self._reactor.seconds
        self.certificate_reloader = CertificateReloader(metrics.gauges, on_reload=self._certificates_reloaded)
        self.proxy_header_errors = ProxyHeaderErrors(metrics, clock)
        self.backend_tokens = BackendTokens(settings.backend_token_file) if settings.backend_token_file else None
        self.cluster_secret = ClusterSecret.from_settings(settings)
        self._peer_auth = PeerAuth(self._node.node_id, self.cluster_secret)
        secret = self.cluster_secret
        self._tickets = Tickets(self._node.node_id, secret, signing_secret=secret.get_or_create)
        self.authenticator = AuthenticatorChain(
            settings.auth, reactor=self._reactor, metrics=metrics, tickets=self._tickets
        )
        self._peer_tls = PeerTLS(own_certificates=self.certificate_reloader.for_peers)

    def _make_membership(self) -> None:
        settings = self._settings
        self.registry = self._registry_factory(
            settings,
            reactor=self._reactor,
            metrics=self.metrics,
            on_claim_revoked=self._claim_revoked,
            clock=self._monotonic,
            collect_floors=self._exchange_floors,
        )
        self.membership = Membership(
            self.registry,
            self._reactor,
            lease=settings.lease,
            heartbeat=settings.heartbeat,
            metrics=self.metrics,
            status=self._status,
            reclaim=self._reclaim_sessions,
            on_heartbeat=self._heartbeat_sent,
            monotonic=self._monotonic,
        )
        self.node_directory = NodeDirectory(
            self.registry,
            self._node.node_id,
            self.membership,
            on_node_down=self._node_down,
            on_nodes_changed=self._nodes_changed,
            peer_url=self._peer_url,
        )

    def _make_peers(self) -> None:
        settings, node, reactor, metrics = self._settings, self._node, self._reactor, self.metrics
        self.peer_client = PeerClient(
            node_id=node.node_id,
            peer_auth=self._peer_auth,
            reactor=reactor,
            cork=self._cork,
            metrics=metrics,
            heartbeat=settings.heartbeat,
            lease=settings.lease,
            max_message_size=settings.max_message_size + MAX_ENVELOPE_SIZE,
            max_calls=settings.max_calls,
            tls=self._peer_tls,
            own_url=self._peer_url,
        )
        self.relays = SocketRelays(reactor=reactor, metrics=metrics)
        self.client_router = ClientRouter(
            routes_to_owner=settings.on_elsewhere == "route",
            node=node,
            membership=self.membership,
            registry=self.registry,
            peer_client=self.peer_client,
            relay_dialer=RelayDialer(
                reactor=reactor,
                peer_auth=self._peer_auth,
                relays=self.relays,
                heartbeat=settings.heartbeat,
                lease=settings.lease,
                metrics=metrics,
                tls=self._peer_tls,
            ),
            node_directory=self.node_directory,
            clock=reactor,
            has_relay_room=self._has_relay_room,
            tickets=self._tickets,
        )

    def _make_sessions(self) -> None:
        """Construct the sessions and, for them, the dispatcher."""
        self.backend_dispatcher = BackendDispatcher(
            clock=self._reactor, metrics=self.metrics, settings=self._settings, node_id=self._node.node_id
        )
        self.sessions = ClientSessions(
            registry=self.registry,
            clock=self._reactor,
            settings=self._settings,
            metrics=self.metrics,
            make_handler=self._make_dispatcher,
            unready_reason=self._node.refusal_reason,
            router=self.client_router,
            parking=ParkingOptions(self._reactor, self._cork, self._build_connection),
        )

    def _make_dispatcher(self, sessions: IClientSessions) -> Dispatcher:
        settings = self._settings
        self.dispatcher = Dispatcher(
            sessions=sessions,
            upstream=self.backend_dispatcher,
            registry=self.registry,
            membership=self.membership,
            clock=self._reactor,
            metrics=self.metrics,
            node_id=self._node.node_id,
            lease=settings.lease,
            call_timeout=settings.call_timeout,
            max_call_timeout=settings.max_call_timeout,
            max_message_size=settings.max_message_size,
            max_calls=settings.max_calls,
            max_calls_per_client=settings.max_calls_per_client,
            remote_nodes=self.peer_client,
            token_renewal=TokenRenewal(self.authenticator, sessions, self.metrics, self._reactor.seconds),
        )
        return self.dispatcher

    def _make_rebalancing(self) -> None:
        settings, clock = self._settings, self._reactor
        self.reconciler = Reconciler(
            node_id=self._node.node_id,
            sessions=self.sessions,
            registry=self.registry,
            orphaned_rows=self.dispatcher.orphaned_rows,
            clock=clock,
        )
        self.graceful_disconnect = GracefulDisconnect(
            self.sessions,
            clock,
            calls=self.dispatcher,
            registry=self.registry,
            node_directory=self.node_directory,
            max_call_timeout=settings.max_call_timeout,
            tickets=self._tickets,
        )
        self.rebalancer = Rebalancer(
            node=self._node,
            membership=self.membership,
            sessions=self.sessions,
            registry=self.registry,
            node_directory=self.node_directory,
            peer_client=self.peer_client,
            graceful_disconnect=self.graceful_disconnect,
            clock=clock,
            metrics=self.metrics,
            settings=settings,
            calls=self.dispatcher,
        )

    def _make_endpoints(self) -> None:
        common: dict[str, Any] = {
            "sessions": self.sessions,
            "settings": self._settings,
            "metrics": self.metrics,
            "reactor": self._reactor,
            "cork": self._cork,
        }
        reassembly_budget = ReassemblyBudget(self._settings.max_message_size, self.metrics)
        self.client_factory = ClientFactory(
            authenticator=self.authenticator, reassembly_budget=reassembly_budget, is_ready=self._is_ready, **common
        )
        self.proxied_client_factory = self.client_factory.with_proxy_protocol()
        self.relayed_client_factory = RelayedClientFactory(
            authenticate_peer=self._peer_auth.verify,
            authentication_error=PeerAuthenticationError,
            reassembly_budget=reassembly_budget,
            **common,
        )
        self.backend_endpoint = BackendEndpoint(
            dispatcher=self.dispatcher,
            registry=self.registry,
            node=self._node,
            membership=self.membership,
            upstream=self.backend_dispatcher,
            orphaned_rows=self.dispatcher.orphaned_rows,
            authenticate_backend=self.backend_tokens.grant if self.backend_tokens else None,
            peers=self.peer_client,
            authenticate_peer=self._peer_auth.verify,
            relay_factory=self.relayed_client_factory,
            rebalancer=self.rebalancer,
            **common,
        )

    def _make_cloud(self) -> None:
        self.autoscaling = self._make_autoscaling() if self._settings.autoscaling else None
        self.dns_registrar = make_registrar(
            self._settings,
            node_id=self._node.node_id,
            reactor=self._reactor,
            metrics=self.metrics,
            live_nodes=self._live_node_ids,
            refresh_live_nodes=lambda: Deferred.fromCoroutine(self._refresh_live_nodes()),
            instance_address=self.autoscaling.address if self.autoscaling is not None else None,
        )
        if self.dns_registrar is not None:
            self.client_factory.own_origins.add_dns_name(self.dns_registrar.name)

    def _make_autoscaling(self) -> Autoscaling:
        # Imported here because it takes memory that only nodes with --autoscaling need.
        from gateway.cloud.autoscaling import Autoscaling

        return Autoscaling(
            self._settings.autoscaling,
            reactor=self._reactor,
            metrics=self.metrics,
            clients=self.sessions.count,
            capacity=self._settings.capacity,
            accepts_clients=self._is_ready,
            drain=self._node.drain,
            colocated_clients=self._colocated_clients,
        )

    def _make_drain(self) -> None:
        self.drain = Drain(
            node=self._node,
            clock=self._reactor,
            settings=self._settings,
            sessions=self.sessions,
            dispatcher=self.dispatcher,
            membership=self.membership,
            node_directory=self.node_directory,
            rebalancer=self.rebalancer,
            graceful_disconnect=self.graceful_disconnect,
            relays=self.relays,
            relay_drain=RelayDrain(
                registry=self.registry,
                peer_client=self.peer_client,
                clock=self._reactor,
                close_relay=self.relays.close,
                max_call_timeout=self._settings.max_call_timeout,
            ),
            send_to_backends=self.backend_endpoint.backend_factory.broadcast,
            dns_registrar=self.dns_registrar,
            autoscaling=self.autoscaling,
        )

    def _add_gauges(self) -> None:
        gauges = self.metrics.gauges
        gauges["clients"] = ("Connected clients.", self.sessions.count)
        gauges["parked"] = ("Connected clients that are parked.", self.sessions.parked_count)
        gauges["relays"] = ("Clients of other nodes that this node relays.", self.relays.count)
        gauges["peers"] = ("Open peer connections.", self.peer_client.count)
        gauges["nodes"] = ("Live peers.", self.node_directory.__len__)
        gauges["capacity"] = ("Maximum number of clients, --capacity.", lambda: self._settings.capacity)
        gauges["calls_in_flight"] = ("Calls to and from clients in flight.", self.dispatcher.calls_in_flight)
        if self.dns_registrar is not None:
            gauges["dns_announced"] = (
                "1 while the DNS record of this node is known to exist, else 0.",
                self.dns_registrar.announced,
            )
        gauges["ready"] = ("1 while the node accepts clients, else 0.", self._is_ready)

    # Callbacks of components to those that are constructed after them.

    def _certificates_reloaded(self) -> None:
        self._peer_tls.reload()

    def _claim_revoked(self, key: SessionKey, previous_owner: Location | None) -> None:
        self.sessions.restore_claim(key)
        if previous_owner is not None:
            self.peer_client.notify_claim_revoked(previous_owner, key.generation)

    def _status(self) -> tuple[str, int]:
        """State and number of clients of this node, for the registry."""
        state = NodeState.UP if self._node.state is NodeState.UP else NodeState.DRAINING
        return state.value, self.sessions.count()

    def _peer_url(self) -> str:
        """This node's own peer URL, which is known once its endpoints are bound."""
        return self._node.peer_url

    def _heartbeat_sent(self) -> None:
        self.node_directory.refresh()
        self._exchange_floors().addCallback(self._floors_received)

    def learn_generations(self) -> Deferred[None]:
        """Ask the other live nodes for the highest generations that they know of: this node has just joined, and the
        database may have lost what it knew. Takes some seconds at most."""
        nodes = self.node_directory.peer_nodes()
        learned = self.peer_client.learn_floors(nodes, self.registry.generation_floor)
        return learned.addCallback(self._floors_received)

    def _exchange_floors(self) -> Deferred[list[int]]:
        return self.peer_client.exchange_floors(self.registry.generation_floor)

    def _floors_received(self, generations: list[int]) -> None:
        for generation in generations:
            self.registry.raise_generation_floor(generation)

    def _reclaim_sessions(self) -> Deferred[None]:
        """Claim every client again: the lease had expired, so other nodes may have claimed clients of this node, and
        removed its record from DNS."""
        if self.dns_registrar is not None:
            self.dns_registrar.reannounce()
        return self.sessions.reclaim_all()

    def _nodes_changed(self, nodes: list[NodeStatus]) -> None:
        self.peer_client.nodes_changed(nodes)
        self.rebalancer.nodes_changed(nodes)

    def _node_down(self, node_id: str) -> None:
        self.relays.close_all_to(node_id)
        self.dispatcher.node_down(node_id)
        if self.dns_registrar is not None:
            self.dns_registrar.node_down(node_id)

    def _has_relay_room(self, dialing: int) -> bool:
        """Whether the open-file limit allows one more relay besides those that are being dialed."""
        files = self.sessions.count() + FILES_PER_RELAY * (self.relays.count() + dialing + 1)
        return files < open_file_limit() - reserved_files()

    def _build_connection(self, unparked: UnparkedSession) -> Any:
        return self.client_factory.wake(unparked)

    # Queries of the cloud components, and of the node.

    def _is_ready(self) -> bool:
        return not self._node.unready_reason()

    def _live_node_ids(self) -> list[str]:
        return [self._node.node_id, *(node.node_id for node in self.node_directory.peer_nodes())]

    async def _refresh_live_nodes(self) -> list[str] | None:
        """Read the ids of the live nodes from the registry; ``None`` if this node may not consider others dead."""
        try:
            nodes = await self.registry.nodes()
        except RegistryUnavailableError:
            return None
        return [node.node_id for node in nodes] if self.membership.is_stable() else None

    def _colocated_clients(self) -> int:
        """Number of clients still on other nodes of this machine; one more for each that is not draining yet, since it
        may still accept clients."""
        host = urlsplit(self._node.peer_url).hostname
        others = [node for node in self.node_directory.peer_nodes() if urlsplit(node.peer_url).hostname == host]
        return sum(node.clients + (node.state == "up") for node in others)

    def open_client_sockets(self) -> int:
        """Number of open sockets of clients, including closing ones, without parked ones."""
        factories = (self.client_factory, self.proxied_client_factory, self.relayed_client_factory)
        return sum(factory.countConnections for factory in factories)
