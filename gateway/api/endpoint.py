"""Backend endpoint: one port for several protocols.

    -> GET /v1/backend HTTP/1.1, Upgrade: websocket      backend WebSocket (backend.py)
       … with Authorization: Wsgateway-Peer              peer connection (peer_server.py)
    -> GET /v1/relay?… HTTP/1.1, Upgrade: websocket      a client's connection relayed by a peer: handed over
    -> anything else                                     HTTP (http_server.py, router.py)

The bytes of a new connection are buffered until its first header block is complete; then the protocol that it is for
receives them, and everything that follows. Proxies that pool connections send requests of several clients on one
connection: a request for a WebSocket after others goes the same way.

File descriptors for backends are limited. A connection over ``MAX_CONNECTIONS`` closes the HTTP connection that has
been idle longest; if none is idle, it is refused. Over ``MAX_EXCESS_CONNECTIONS`` more, the oldest connection without a
complete header block is dropped.

    -> a header block, and no connection is idle         <- 503 {"error":"full"}, Connection: close

Peer connections and relays are not counted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IDelayedCall, IProtocolFactory, IProtocolNegotiationFactory
from twisted.internet.protocol import Protocol, connectionDone
from twisted.protocols.policies import ProtocolWrapper
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.api.access import AccessPolicy, AuthenticateBackend, AuthenticatePeer, has_peer_credentials
from gateway.api.backend import BackendFactory, BackendProtocol
from gateway.api.client_handlers import ClientHandlers, body_too_large
from gateway.api.directory import ClientDirectory
from gateway.api.http_server import (
    BACKEND_PATH,
    HEADERS_TOO_LARGE,
    MAX_HEAD_SIZE,
    RELAY_PATH,
    REQUEST_TIMED_OUT,
    HTTPConnection,
    HTTPContext,
    upgrade_path,
)
from gateway.api.methods import BackendMethods
from gateway.api.node_handlers import NodeHandlers
from gateway.api.peer_server import PeerMethods, PeerServerFactory, PeerServerProtocol
from gateway.api.responses import MAX_ENVELOPE_SIZE, error_response
from gateway.api.router import Router
from gateway.api.upstream import BackendDispatcher
from gateway.clients.interface import IClientSessions
from gateway.cluster.interface import INode, IPeerClient, IRebalancer
from gateway.metrics import Metrics
from gateway.net.transport import socket_fd
from gateway.protocol.frames import CloseCode
from gateway.protocol.handshake import retry_after_header
from gateway.registry.interface import IRegistry
from gateway.rpc.interface import IDispatcher, IMembership, IOrphanedRows
from gateway.settings import Settings, files_reserved_for_backends, open_file_limit, reserved_files
from gateway.util.cork import Cork
from gateway.util.deferred import Observers
from gateway.util.log import RateLimitedLogger

#: seconds for the first header block
HEAD_TIMEOUT = 5.0
#: seconds for connections to close when the node stops
CLOSE_TIMEOUT = 4.0
#: connections of backends: a share of the file descriptors that --capacity leaves free
MAX_CONNECTIONS = reserved_files() * 5 // 8
#: further connections, to be refused or while closing
MAX_EXCESS_CONNECTIONS = reserved_files() // 8

_HEAD_END = b"\r\n\r\n"
_HEALTH_REQUEST = re.compile(rb"(GET|HEAD) /(healthz|readyz)[ ?]")
_NO_FILES_LEFT = error_response(
    503, "full", "the last file descriptors of this node are reserved for backends; another node takes the client"
)
_FULL = error_response(
    503,
    "full",
    f"all {MAX_CONNECTIONS} connections that this node has for backends are in use; try again later",
    retry_after_header(1),
)


class ProtocolDetector(Protocol):
    """Detect the protocol of a new connection by its first header block, then forward everything to that protocol."""

    #: set before any of the methods is called
    transport: Any

    def __init__(self, factory: BackendEndpoint) -> None:
        self._factory = factory
        self._buffer = b""
        self._protocol: HTTPConnection | BackendProtocol | None = None
        self._timer: IDelayedCall | None = None

    def connectionMade(self) -> None:
        """Register the connection, and start the timeout of its first header block."""
        self._factory.connections[self] = None
        self._factory.awaiting_head[self] = None
        self._timer = self._factory.reactor.callLater(HEAD_TIMEOUT, self._timed_out)
        # A refusal waits for the request: HTTP clients treat an earlier response as an error.
        self._factory.make_room()
        if self._factory.count() > MAX_CONNECTIONS + MAX_EXCESS_CONNECTIONS:
            # Silent connections must not keep others out, such as health checks.
            oldest = next(iter(self._factory.awaiting_head))
            del self._factory.awaiting_head[oldest]
            oldest.abort()

    def dataReceived(self, data: bytes) -> None:
        """Buffer the first header block. Later input goes to the detected protocol directly."""
        searched = max(0, len(self._buffer) - len(_HEAD_END) + 1)
        self._buffer += data
        end = self._buffer.find(_HEAD_END, searched, MAX_HEAD_SIZE)
        if end >= 0:
            self._detect(self._buffer[:end])
        elif len(self._buffer) >= MAX_HEAD_SIZE:
            self._switch_to_http().refuse(HEADERS_TOO_LARGE)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tell the detected protocol, and unregister the connection."""
        self._cancel_timer()
        # The bound method is part of a reference cycle.
        self.__dict__.pop("dataReceived", None)
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.connectionLost(reason)
        self._factory.connection_lost(self)

    @property
    def http_connection(self) -> HTTPConnection | None:
        """The HTTP connection, if the protocol is HTTP."""
        return self._protocol if isinstance(self._protocol, HTTPConnection) else None

    @property
    def is_peer(self) -> bool:
        """Whether this is an open peer connection."""
        return isinstance(self._protocol, PeerServerProtocol) and self._protocol.state == self._protocol.STATE_OPEN

    def shut_down(self, code: int, reason: str) -> None:
        """Close a WebSocket with that close code, HTTP after the request in progress; abort anything else."""
        if isinstance(self._protocol, HTTPConnection):
            self._protocol.shut_down()
        elif self._protocol is not None and self._protocol.state == self._protocol.STATE_OPEN:
            self._protocol.close_with(code, reason)
        else:
            self.abort()

    def abort(self) -> None:
        """Abort the connection."""
        self.transport.abortConnection()

    def _detect(self, head: bytes) -> None:
        data, self._buffer = self._buffer, b""
        path = upgrade_path(head)
        if path == RELAY_PATH and self._factory.relay_factory is not None:
            # The number of a new descriptor is the lowest that is free.
            if socket_fd(self.transport) >= open_file_limit() - files_reserved_for_backends():
                self._switch_to_http().refuse(_NO_FILES_LEFT)
            else:
                self._hand_over_to_relay(self._factory.relay_factory, data)
            return
        if path == BACKEND_PATH and has_peer_credentials(_authorization(head)):
            self._switch_to(self._factory.peer_factory.buildProtocol(self.transport.getPeer()), data)
            return
        full = not self._factory.make_room()
        if full and not _HEALTH_REQUEST.match(head):
            self._switch_to_http().refuse(_FULL)
            return
        if path == BACKEND_PATH:
            self._switch_to(self._factory.backend_factory.buildProtocol(self.transport.getPeer()), data)
        else:
            self._switch_to(self._make_http_connection(), data)
        if full:
            # A health check is answered, then closed to make room again.
            self.shut_down(CloseCode.TRY_AGAIN_LATER, "full")

    def _hand_over_to_relay(self, factory: IProtocolFactory, data: bytes) -> None:
        """Hand the transport over to a client protocol.

        The connection may be parked, so nothing may stand between the transport and the client protocol: this object
        keeps no reference to either.
        """
        self._cancel_timer()
        transport = self.transport
        protocol: Any = factory.buildProtocol(transport.getPeer())
        if isinstance(transport, ProtocolWrapper):
            transport.wrappedProtocol = protocol
        else:
            transport.protocol = protocol
        self.transport = None
        self._factory.connection_lost(self)
        protocol.makeConnection(transport)
        protocol.dataReceived(data)

    def _make_http_connection(self) -> HTTPConnection:
        return HTTPConnection(self._factory.http_context, self._upgrade)

    def _upgrade(self, data: bytes) -> None:
        """Detect the protocol again: proxies that pool connections send an upgrade after other requests."""
        self._protocol = None
        del self.dataReceived
        self._buffer = data
        self._detect(data[: data.index(_HEAD_END)])

    def _switch_to_http(self) -> HTTPConnection:
        connection = self._make_http_connection()
        self._switch_to(connection)
        return connection

    def _switch_to(self, protocol: HTTPConnection | BackendProtocol, data: bytes = b"") -> None:
        self._cancel_timer()
        self._protocol = protocol
        # Transports look this attribute up at each read, so forwarding costs nothing from here on.
        self.dataReceived = protocol.dataReceived  # type: ignore[method-assign]
        protocol.makeConnection(self.transport)
        if data:
            protocol.dataReceived(data)

    def _timed_out(self) -> None:
        if self._buffer:
            self._buffer = b""
            self._switch_to_http().refuse(REQUEST_TIMED_OUT)
        else:
            self.abort()

    def _cancel_timer(self) -> None:
        self._factory.awaiting_head.pop(self, None)
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None


def _authorization(head: bytes) -> str:
    """Return the first ``Authorization`` header. (The opening handshake refuses a second one.)"""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"authorization":
            return value.decode("latin-1")
    return ""


@implementer(IProtocolFactory, IProtocolNegotiationFactory)
class BackendEndpoint:
    """Factory of the connections of all ``--backend`` endpoints of a node."""

    def __init__(
        self,
        *,
        dispatcher: IDispatcher,
        sessions: IClientSessions,
        registry: IRegistry,
        node: INode,
        membership: IMembership,
        upstream: BackendDispatcher,
        metrics: Metrics,
        settings: Settings,
        orphaned_rows: IOrphanedRows,
        authenticate_backend: AuthenticateBackend | None,
        reactor: Any,
        wall_clock: Callable[[], float] = time.time,
        cork: Cork | None = None,
        peers: IPeerClient | None = None,
        authenticate_peer: AuthenticatePeer | None = None,
        relay_factory: IProtocolFactory | None = None,
        rebalancer: IRebalancer | None = None,
    ) -> None:
        """Without ``authenticate_backend`` backends need no token; without ``authenticate_peer`` no peer is admitted.

        ``wall_clock`` returns seconds since 1970; the reactor's own clock may be monotonic. ``peers`` sends requests to
        other nodes; ``relay_factory`` makes the protocols of relayed clients, which take over the transport;
        ``rebalancer`` moves clients to other nodes. Each of these may be ``None``.
        """
        directory = ClientDirectory(sessions, registry, node, membership, orphaned_rows, peers)
        access_policy = AccessPolicy.make(
            authenticate_backend=authenticate_backend,
            urls=(settings.public_url, settings.peer_url),
            authenticate_peer=authenticate_peer,
        )
        router = Router(
            ClientHandlers(
                dispatcher=dispatcher, directory=directory, registry=registry, node=node, metrics=metrics, peers=peers
            ),
            NodeHandlers(registry=registry, node=node, metrics=metrics, peers=peers, rebalancer=rebalancer),
        )
        limit = settings.max_message_size + MAX_ENVELOPE_SIZE
        self.reactor = reactor
        self.http_context = HTTPContext(
            access_policy=access_policy,
            metrics=metrics,
            reactor=reactor,
            wall_clock=wall_clock,
            max_body_size=limit,
            handle=router.handle,
            body_too_large=body_too_large(limit),
            error_log=RateLimitedLogger(reactor.seconds),
            upgrade_paths=(BACKEND_PATH,) if relay_factory is None else (BACKEND_PATH, RELAY_PATH),
        )
        self.relay_factory = relay_factory
        shared: Any = {
            "access_policy": access_policy,
            "upstream": upstream,
            "metrics": metrics,
            "settings": settings,
            "reactor": reactor,
            "cork": cork,
        }
        self.backend_factory = BackendFactory(
            methods=BackendMethods(dispatcher=dispatcher, directory=directory, upstream=upstream), **shared
        )
        self.peer_factory = PeerServerFactory(
            methods=PeerMethods(
                dispatcher=dispatcher,
                sessions=sessions,
                registry=registry,
                node=node,
                membership=membership,
                clock=reactor,
                settings=settings,
                orphaned_rows=orphaned_rows,
                rebalancer=rebalancer,
            ),
            **shared,
        )
        self.connections: dict[ProtocolDetector, None] = {}
        #: the connections without a first header block, the oldest first
        self.awaiting_head: dict[ProtocolDetector, None] = {}
        self._closed: Observers[None] = Observers()

    def buildProtocol(self, addr: IAddress | None) -> ProtocolDetector:
        """Make the protocol detector of a new connection."""
        return ProtocolDetector(self)

    def doStart(self) -> None:
        """Do nothing: an endpoint listens."""

    def doStop(self) -> None:
        """Do nothing: an endpoint stopped listening, and its connections stay open until :meth:`close_all`."""

    def acceptableProtocols(self) -> list[bytes]:
        """Return the ALPN protocols. Without any, Twisted fails every TLS handshake that offers one."""
        return [b"http/1.1"]

    def count(self) -> int:
        """Return the number of connections, without peer connections."""
        return len(self.connections) - self.peer_factory.count()

    def make_room(self) -> bool:
        """Return whether there is room for all connections, closing the longest idle one if that makes room."""
        if self.count() <= MAX_CONNECTIONS:
            return True
        connections = [detector.http_connection for detector in self.connections if not detector.is_peer]
        if sum(connection is None or not connection.is_closing for connection in connections) <= MAX_CONNECTIONS:
            return True
        idle = [connection for connection in connections if connection is not None and connection.is_idle]
        if not idle:
            return False
        min(idle, key=lambda connection: connection.idle_since).shut_down()
        return True

    def connection_lost(self, connection: ProtocolDetector) -> None:
        """Unregister a closed connection."""
        self.connections.pop(connection, None)
        if not self.connections:
            self._closed.callback(None)

    def close_all(self, code: int, reason: str) -> Deferred[None]:
        """Close all connections: WebSockets with that close code, HTTP after the request in progress.

        Fires when no connection is left; after ``CLOSE_TIMEOUT`` seconds the rest is aborted.
        """
        closed = self._closed.observe()
        for connection in list(self.connections):
            connection.shut_down(code, reason)
        if not self.connections:
            self._closed.callback(None)
            return closed
        timer = self.reactor.callLater(CLOSE_TIMEOUT, self._abort_all)
        return closed.addBoth(_cancel_timer, timer)

    def _abort_all(self) -> None:
        for connection in list(self.connections):
            connection.abort()


def _cancel_timer(result: Any, timer: IDelayedCall) -> Any:
    if timer.active():
        timer.cancel()
    return result
