"""The backend endpoint: one port, several protocols.

    -> GET /v1/backend HTTP/1.1, Upgrade: websocket      the WebSocket of backends (websocket.py)
       … with Authorization: Wsgateway-Peer              the link of another node (peer_websocket.py)
    -> GET /v1/relay?… HTTP/1.1, Upgrade: websocket      a client's connection that another node relays: handed over
    -> anything else                                     HTTP (channel.py, http.py)

The bytes of a new connection are held until its first header block is complete; then the protocol that it is for gets
them, and everything that follows. There are only so many files for backends: one connection more than that, and the
one that has been idle for longest is closed; where none is idle, the new one is told so. Where there is no room even
for that, the one goes that has said nothing for longest.

    -> a header block, and nobody idle                   <- 503 {"error":"full"}, Connection: close

Links and relays do not count among these.
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
from gateway.api.directory import ClientDirectory
from gateway.api.handlers import ClientHandlers, NodeHandlers, body_too_large
from gateway.api.http_server import HEADERS_TOO_LARGE, MAX_HEAD_SIZE, REQUEST_TIMED_OUT, HTTPConnection, HTTPContext
from gateway.api.methods import BackendMethods
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
from gateway.rpc.interface import IDispatcher, IMembership
from gateway.settings import Settings, files_reserved_for_backends, open_file_limit, reserved_files
from gateway.util.cork import Cork
from gateway.util.log import RateLimitedLogger

#: how long the first header block may take, in seconds
HEAD_TIMEOUT = 5.0
#: how long connections may take to close when the node stops, in seconds
CLOSE_TIMEOUT = 4.0
#: so many connections a node has for backends, of the files that the capacity for clients leaves free
MAX_CONNECTIONS = reserved_files() * 5 // 8
#: so many more may be there to be told that it is full, or to end; the rest is dropped without a word
MAX_EXCESS_CONNECTIONS = reserved_files() // 8

#: where other nodes bring clients' connections
RELAY_PATH = b"/v1/relay"

_BACKEND_PATH = BackendProtocol.path.encode("ascii")
_HEAD_END = b"\r\n\r\n"
_HEALTH_REQUEST = re.compile(rb"(GET|HEAD) /(healthz|readyz)[ ?]")
_NO_FILES_LEFT = error_response(
    503, "full", "the last files of this node are not for clients; another node takes this one"
)
_FULL = error_response(
    503,
    "full",
    f"all {MAX_CONNECTIONS} connections that this node has for backends are in use; try again later",
    retry_after_header(1),
)


class ProtocolDetector(Protocol):
    """A new connection, and then the way to the protocol that it turned out to be for."""

    #: there is one whenever any of the methods is called
    transport: Any

    def __init__(self, factory: BackendEndpoint) -> None:
        self._factory = factory
        self._buffer = b""
        self._protocol: HTTPConnection | BackendProtocol | None = None
        self._timer: IDelayedCall | None = None

    def connectionMade(self) -> None:
        """A backend connected."""
        self._factory.connections[self] = None
        self._factory.awaiting_head[self] = None
        self._timer = self._factory.reactor.callLater(HEAD_TIMEOUT, self._timed_out)
        # The answer must wait: a client takes one that comes before its request for an error.
        self._factory.make_room()
        if self._factory.count() > MAX_CONNECTIONS + MAX_EXCESS_CONNECTIONS:
            # Nobody can keep others out, not even health checks, by saying nothing.
            oldest = next(iter(self._factory.awaiting_head))
            del self._factory.awaiting_head[oldest]
            oldest.abort()

    def dataReceived(self, data: bytes) -> None:
        """Bytes of the first header block; later ones do not come this way."""
        searched = max(0, len(self._buffer) - len(_HEAD_END) + 1)
        self._buffer += data
        end = self._buffer.find(_HEAD_END, searched, MAX_HEAD_SIZE)
        if end >= 0:
            self._detect(self._buffer[:end])
        elif len(self._buffer) >= MAX_HEAD_SIZE:
            self._switch_to_http().refuse(HEADERS_TOO_LARGE)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self._cancel_timer()
        # The bound method is a cycle.
        self.__dict__.pop("dataReceived", None)
        inner, self._protocol = self._protocol, None
        if inner is not None:
            inner.connectionLost(reason)
        self._factory.connection_lost(self)

    @property
    def http_connection(self) -> HTTPConnection | None:
        """What speaks HTTP here, if that is what is spoken."""
        return self._protocol if isinstance(self._protocol, HTTPConnection) else None

    @property
    def is_peer(self) -> bool:
        """Whether it is another node's link."""
        return isinstance(self._protocol, PeerServerProtocol) and self._protocol.state == self._protocol.STATE_OPEN

    def shut_down(self, code: int, reason: str) -> None:
        """End it; a WebSocket with that close code, HTTP after the request that is in progress."""
        if isinstance(self._protocol, HTTPConnection):
            self._protocol.shut_down()
        elif self._protocol is not None and self._protocol.state == self._protocol.STATE_OPEN:
            self._protocol.close_with(code, reason)
        else:
            self.abort()

    def abort(self) -> None:
        """Drop it at once."""
        self.transport.abortConnection()

    def _detect(self, head: bytes) -> None:
        held, self._buffer = self._buffer, b""
        path = upgrade_path(head)
        if path == RELAY_PATH and self._factory.relay_factory is not None:
            # Files are numbered from the lowest that is free.
            if socket_fd(self.transport) >= open_file_limit() - files_reserved_for_backends():
                self._switch_to_http().refuse(_NO_FILES_LEFT)
            else:
                self._hand_over_to_relay(self._factory.relay_factory, held)
            return
        if path == _BACKEND_PATH and has_peer_credentials(_authorization(head)):
            self._switch_to(self._factory.peer_factory.buildProtocol(self.transport.getPeer()), held)
            return
        full = not self._factory.make_room()
        if full and not _HEALTH_REQUEST.match(head):
            self._switch_to_http().refuse(_FULL)
            return
        if path == _BACKEND_PATH:
            self._switch_to(self._factory.backend_factory.buildProtocol(self.transport.getPeer()), held)
        else:
            self._switch_to(HTTPConnection(self._factory.http_context), held)
        if full:
            # Who asks whether the node is well gets an answer, and makes room again.
            self.shut_down(CloseCode.TRY_AGAIN_LATER, "full")

    def _hand_over_to_relay(self, factory: IProtocolFactory, data: bytes) -> None:
        """Give the connection to the protocol of a client's. It is parked like any other, for which nothing may be
        between the transport and that: nothing of this one stays."""
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

    def _switch_to_http(self) -> HTTPConnection:
        channel = HTTPConnection(self._factory.http_context)
        self._switch_to(channel)
        return channel

    def _switch_to(self, protocol: HTTPConnection | BackendProtocol, data: bytes = b"") -> None:
        self._cancel_timer()
        self._protocol = protocol
        # Transports look it up at each read: the detour costs nothing from here on.
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


def upgrade_path(head: bytes) -> bytes:
    """The path of a request that asks for another protocol; empty for one that does not."""
    first, *lines = head.split(b"\r\n")
    target = first.split(b" ")[1:2]
    if not target or not any(line.partition(b":")[0].lower() == b"upgrade" for line in lines):
        return b""
    return target[0].partition(b"?")[0]


def _authorization(head: bytes) -> str:
    """The value of the first ``Authorization`` header. (Where there are more, the opening handshake is refused.)"""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"authorization":
            return value.decode("latin-1")
    return ""


@implementer(IProtocolFactory, IProtocolNegotiationFactory)
class BackendEndpoint:
    """Makes the connections of every ``--backend`` endpoint of a node."""

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
        authenticate_backend: AuthenticateBackend | None,
        reactor: Any,
        wall_clock: Callable[[], float] = time.time,
        cork: Cork | None = None,
        peers: IPeerClient | None = None,
        authenticate_peer: AuthenticatePeer | None = None,
        relay_factory: IProtocolFactory | None = None,
        rebalancer: IRebalancer | None = None,
    ) -> None:
        """``grant_of`` tells what a backend's token is for; ``None``: nobody is asked for one. ``now`` is the wall
        clock, in seconds since 1970; the reactor's own may be monotonic.

        Other nodes are asked by ``peers``, and let in by ``peer_ok``; ``relays`` makes the protocols of the connections
        that they relay, each of which then has its transport to itself. ``balance`` moves clients to them. ``None``:
        there is no such.
        """
        directory = ClientDirectory(sessions, registry, node, membership, peers)
        guard = AccessPolicy.make(
            authenticate_backend=authenticate_backend,
            urls=(settings.public_url, settings.peer_url),
            authenticate_peer=authenticate_peer,
        )
        api = Router(
            ClientHandlers(
                dispatcher=dispatcher, directory=directory, registry=registry, node=node, metrics=metrics, peers=peers
            ),
            NodeHandlers(registry=registry, node=node, metrics=metrics, peers=peers, rebalancer=rebalancer),
        )
        limit = settings.max_message_size + MAX_ENVELOPE_SIZE
        self.reactor = reactor
        self.http_context = HTTPContext(
            guard,
            metrics,
            reactor,
            wall_clock,
            limit,
            api.handle,
            body_too_large(limit),
            RateLimitedLogger(reactor.seconds),
        )
        self.relay_factory = relay_factory
        shared: Any = {
            "access_policy": guard,
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
                node=node,
                membership=membership,
                clock=reactor,
                settings=settings,
                rebalancer=rebalancer,
            ),
            **shared,
        )
        self.connections: dict[ProtocolDetector, None] = {}
        #: those of them whose first header block has not come, the oldest first
        self.awaiting_head: dict[ProtocolDetector, None] = {}
        self._close_waiters: list[Deferred[None]] = []

    def buildProtocol(self, addr: IAddress | None) -> ProtocolDetector:
        """Make the protocol of a new connection."""
        return ProtocolDetector(self)

    def doStart(self) -> None:
        """An endpoint listens."""

    def doStop(self) -> None:
        """An endpoint listens no more; its connections live on until :meth:`close_all`."""

    def acceptableProtocols(self) -> list[bytes]:
        """What is spoken behind TLS; without it Twisted fails every handshake that offers a protocol (ALPN)."""
        return [b"http/1.1"]

    def count(self) -> int:
        """How many connections there are, but for other nodes' links."""
        return len(self.connections) - self.peer_factory.count()

    def make_room(self) -> bool:
        """Whether there is room for all connections; now, or once an idle one is closed, which happens here."""
        if self.count() <= MAX_CONNECTIONS:
            return True
        channels = [front.http_connection for front in self.connections if not front.is_peer]
        if sum(channel is None or not channel.is_closing for channel in channels) <= MAX_CONNECTIONS:
            return True
        idle = [channel for channel in channels if channel is not None and channel.is_idle]
        if not idle:
            return False
        min(idle, key=lambda channel: channel.idle_since).shut_down()
        return True

    def connection_lost(self, connection: ProtocolDetector) -> None:
        """A connection is lost."""
        self.connections.pop(connection, None)
        if not self.connections:
            waiting, self._close_waiters = self._close_waiters, []
            for all_gone in waiting:
                all_gone.callback(None)

    def close_all(self, code: int, reason: str) -> Deferred[None]:
        """End every connection: WebSockets with that close code, HTTP after the request that is in progress; after
        ``CLOSING_TIMEOUT`` seconds what is left is dropped. Fires when none is left."""
        all_gone: Deferred[None] = Deferred(self._close_waiters.remove)
        self._close_waiters.append(all_gone)
        for front in list(self.connections):
            front.shut_down(code, reason)
        if not self.connections:
            self._close_waiters.remove(all_gone)
            all_gone.callback(None)
            return all_gone
        timer = self.reactor.callLater(CLOSE_TIMEOUT, self._abort_all)
        return all_gone.addBoth(_cancel_pending, timer)

    def _abort_all(self) -> None:
        for front in list(self.connections):
            front.abort()


def _cancel_pending(result: Any, timer: IDelayedCall) -> Any:
    if timer.active():
        timer.cancel()
    return result
