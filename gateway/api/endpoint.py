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

from gateway.api.access import GrantOf, Guard, PeerOk, is_of_peer
from gateway.api.backend import BackendProtocol, BackendSockets
from gateway.api.directory import Directory
from gateway.api.handlers import Clients, Nodes, too_large
from gateway.api.http_server import HEADERS_TOO_LARGE, MAX_HEADERS, TOO_SLOW, Channel, Site
from gateway.api.methods import Methods
from gateway.api.peer_server import PeerMethods, PeerProtocol, PeerSockets
from gateway.api.responses import ENVELOPE, refusal
from gateway.api.router import Api
from gateway.api.upstream import Upstream
from gateway.clients.interface import IEdge
from gateway.cluster.interface import IBalance, INode, IPeers
from gateway.metrics import Metrics
from gateway.net.transport import file_number
from gateway.protocol.frames import CLOSE_TRY_AGAIN_LATER
from gateway.protocol.handshake import retry_after
from gateway.registry.interface import IRegistry
from gateway.rpc.interface import IHub
from gateway.settings import Settings, files_left_to_backends, open_file_limit, reserved_files
from gateway.util.cork import Turn
from gateway.util.log import Troubles

#: how long the first header block may take, in seconds
OPENING_TIMEOUT = 5.0
#: how long connections may take to close when the node stops, in seconds
CLOSING_TIMEOUT = 4.0
#: so many connections a node has for backends, of the files that the capacity for clients leaves free
MAX_CONNECTIONS = reserved_files() * 5 // 8
#: so many more may be there to be told that it is full, or to end; the rest is dropped without a word
MAX_REFUSED = reserved_files() // 8

#: where other nodes bring clients' connections
RELAY = b"/v1/relay"

_BACKEND = BackendProtocol.path.encode("ascii")
_END = b"\r\n\r\n"
_HEALTH = re.compile(rb"(GET|HEAD) /(healthz|readyz)[ ?]")
_NO_FILES = refusal(503, "full", "the last files of this node are not for clients; another node takes this one")
_FULL = refusal(
    503,
    "full",
    f"all {MAX_CONNECTIONS} connections that this node has for backends are in use; try again later",
    retry_after(1),
)


class Front(Protocol):
    """A new connection, and then the way to the protocol that it turned out to be for."""

    #: there is one whenever any of the methods is called
    transport: Any

    def __init__(self, factory: BackendFactory) -> None:
        self._factory = factory
        self._held = b""
        self._inner: Channel | BackendProtocol | None = None
        self._timer: IDelayedCall | None = None

    def connectionMade(self) -> None:
        """A backend connected."""
        self._factory.connections[self] = None
        self._factory.silent[self] = None
        self._timer = self._factory.reactor.callLater(OPENING_TIMEOUT, self._late)
        # The answer must wait: a client takes one that comes before its request for an error.
        self._factory.make_room()
        if self._factory.count() > MAX_CONNECTIONS + MAX_REFUSED:
            # Nobody can keep others out, not even health checks, by saying nothing.
            oldest = next(iter(self._factory.silent))
            del self._factory.silent[oldest]
            oldest.abort()

    def dataReceived(self, data: bytes) -> None:
        """Bytes of the first header block; later ones do not come this way."""
        searched = max(0, len(self._held) - len(_END) + 1)
        self._held += data
        end = self._held.find(_END, searched, MAX_HEADERS)
        if end >= 0:
            self._choose(self._held[:end])
        elif len(self._held) >= MAX_HEADERS:
            self._become_http().refuse(HEADERS_TOO_LARGE)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self._stop_timer()
        # The bound method is a cycle.
        self.__dict__.pop("dataReceived", None)
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.connectionLost(reason)
        self._factory.gone(self)

    @property
    def channel(self) -> Channel | None:
        """What speaks HTTP here, if that is what is spoken."""
        return self._inner if isinstance(self._inner, Channel) else None

    @property
    def is_link(self) -> bool:
        """Whether it is another node's link."""
        return isinstance(self._inner, PeerProtocol) and self._inner.state == self._inner.STATE_OPEN

    def shut_down(self, code: int, reason: str) -> None:
        """End it; a WebSocket with that close code, HTTP after the request that is in progress."""
        if isinstance(self._inner, Channel):
            self._inner.shut_down()
        elif self._inner is not None and self._inner.state == self._inner.STATE_OPEN:
            self._inner.close_with(code, reason)
        else:
            self.abort()

    def abort(self) -> None:
        """Drop it at once."""
        self.transport.abortConnection()

    def _choose(self, head: bytes) -> None:
        held, self._held = self._held, b""
        path = upgrade_path(head)
        if path == RELAY and self._factory.relays is not None:
            # Files are numbered from the lowest that is free.
            if file_number(self.transport) >= open_file_limit() - files_left_to_backends():
                self._become_http().refuse(_NO_FILES)
            else:
                self._hand_over(self._factory.relays, held)
            return
        if path == _BACKEND and is_of_peer(_authorization(head)):
            self._become(self._factory.links.buildProtocol(self.transport.getPeer()), held)
            return
        full = not self._factory.make_room()
        if full and not _HEALTH.match(head):
            self._become_http().refuse(_FULL)
            return
        if path == _BACKEND:
            self._become(self._factory.sockets.buildProtocol(self.transport.getPeer()), held)
        else:
            self._become(Channel(self._factory.site), held)
        if full:
            # Who asks whether the node is well gets an answer, and makes room again.
            self.shut_down(CLOSE_TRY_AGAIN_LATER, "full")

    def _hand_over(self, relays: IProtocolFactory, held: bytes) -> None:
        """Give the connection to the protocol of a client's. It is parked like any other, for which nothing may be
        between the transport and that: nothing of this one stays."""
        self._stop_timer()
        transport = self.transport
        protocol: Any = relays.buildProtocol(transport.getPeer())
        if isinstance(transport, ProtocolWrapper):
            transport.wrappedProtocol = protocol
        else:
            transport.protocol = protocol
        self.transport = None
        self._factory.gone(self)
        protocol.makeConnection(transport)
        protocol.dataReceived(held)

    def _become_http(self) -> Channel:
        channel = Channel(self._factory.site)
        self._become(channel)
        return channel

    def _become(self, inner: Channel | BackendProtocol, held: bytes = b"") -> None:
        self._stop_timer()
        self._inner = inner
        # Transports look it up at each read: the detour costs nothing from here on.
        self.dataReceived = inner.dataReceived  # type: ignore[method-assign]
        inner.makeConnection(self.transport)
        if held:
            inner.dataReceived(held)

    def _late(self) -> None:
        if self._held:
            self._held = b""
            self._become_http().refuse(TOO_SLOW)
        else:
            self.abort()

    def _stop_timer(self) -> None:
        self._factory.silent.pop(self, None)
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
class BackendFactory:
    """Makes the connections of every ``--backend`` endpoint of a node."""

    def __init__(
        self,
        *,
        hub: IHub,
        edge: IEdge,
        registry: IRegistry,
        node: INode,
        upstream: Upstream,
        metrics: Metrics,
        settings: Settings,
        grant_of: GrantOf | None,
        reactor: Any,
        now: Callable[[], float] = time.time,
        turn: Turn | None = None,
        peers: IPeers | None = None,
        peer_ok: PeerOk | None = None,
        relays: IProtocolFactory | None = None,
        balance: IBalance | None = None,
    ) -> None:
        """``grant_of`` tells what a backend's token is for; ``None``: nobody is asked for one. ``now`` is the wall
        clock, in seconds since 1970; the reactor's own may be monotonic.

        Other nodes are asked by ``peers``, and let in by ``peer_ok``; ``relays`` makes the protocols of the connections
        that they relay, each of which then has its transport to itself. ``balance`` moves clients to them. ``None``:
        there is no such.
        """
        directory = Directory(edge, registry, node, peers)
        guard = Guard.make(grant_of=grant_of, urls=(settings.public_url, settings.peer_url), peer_ok=peer_ok)
        api = Api(
            Clients(hub=hub, directory=directory, registry=registry, node=node, metrics=metrics, peers=peers),
            Nodes(registry=registry, node=node, metrics=metrics, peers=peers, balance=balance),
        )
        limit = settings.max_message_size + ENVELOPE
        self.reactor = reactor
        self.site = Site(guard, metrics, reactor, now, limit, api.respond, too_large(limit), Troubles(reactor.seconds))
        self.relays = relays
        shared: Any = {
            "guard": guard,
            "upstream": upstream,
            "metrics": metrics,
            "settings": settings,
            "reactor": reactor,
            "turn": turn,
        }
        self.sockets = BackendSockets(methods=Methods(hub=hub, directory=directory, upstream=upstream), **shared)
        self.links = PeerSockets(
            methods=PeerMethods(hub=hub, edge=edge, node=node, clock=reactor, settings=settings, balance=balance),
            **shared,
        )
        self.connections: dict[Front, None] = {}
        #: those of them whose first header block has not come, the oldest first
        self.silent: dict[Front, None] = {}
        self._all_gone: list[Deferred[None]] = []

    def buildProtocol(self, addr: IAddress | None) -> Front:
        """Make the protocol of a new connection."""
        return Front(self)

    def doStart(self) -> None:
        """An endpoint listens."""

    def doStop(self) -> None:
        """An endpoint listens no more; its connections live on until :meth:`close_all`."""

    def acceptableProtocols(self) -> list[bytes]:
        """What is spoken behind TLS; without it Twisted fails every handshake that offers a protocol (ALPN)."""
        return [b"http/1.1"]

    def count(self) -> int:
        """How many connections there are, but for other nodes' links."""
        return len(self.connections) - self.links.count()

    def make_room(self) -> bool:
        """Whether there is room for all connections; now, or once an idle one is closed, which happens here."""
        if self.count() <= MAX_CONNECTIONS:
            return True
        channels = [front.channel for front in self.connections if not front.is_link]
        if sum(channel is None or not channel.ending for channel in channels) <= MAX_CONNECTIONS:
            return True
        idle = [channel for channel in channels if channel is not None and channel.idle]
        if not idle:
            return False
        min(idle, key=lambda channel: channel.idle_since).shut_down()
        return True

    def gone(self, front: Front) -> None:
        """A connection is lost."""
        self.connections.pop(front, None)
        if not self.connections:
            waiting, self._all_gone = self._all_gone, []
            for all_gone in waiting:
                all_gone.callback(None)

    def close_all(self, code: int, reason: str) -> Deferred[None]:
        """End every connection: WebSockets with that close code, HTTP after the request that is in progress; after
        ``CLOSING_TIMEOUT`` seconds what is left is dropped. Fires when none is left."""
        all_gone: Deferred[None] = Deferred(self._all_gone.remove)
        self._all_gone.append(all_gone)
        for front in list(self.connections):
            front.shut_down(code, reason)
        if not self.connections:
            self._all_gone.remove(all_gone)
            all_gone.callback(None)
            return all_gone
        timer = self.reactor.callLater(CLOSING_TIMEOUT, self._abort_all)
        return all_gone.addBoth(_stopped, timer)

    def _abort_all(self) -> None:
        for front in list(self.connections):
            front.abort()


def _stopped(result: Any, timer: IDelayedCall) -> Any:
    if timer.active():
        timer.cancel()
    return result
