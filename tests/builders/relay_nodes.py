"""The parts of two nodes that a relay needs, on trial's reactor: clients connect to B, and their sessions are on A."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trustme
from twisted.internet import reactor as running_reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.ssl import Certificate, optionsForClientTLS
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from gateway.auth.authenticator import AuthenticatorChain
from gateway.clients.endpoint import ClientFactory, RelayedClientFactory
from gateway.clients.interface import ConnectRequest, RouteDecision
from gateway.clients.sessions import ClientSessions
from gateway.clients.table import ParkingOptions
from gateway.cluster.auth import PeerAuth, PeerTLS
from gateway.cluster.errors import PeerAuthenticationError
from gateway.cluster.relay import SocketRelays
from gateway.cluster.relay_client import RelayDialer, RelayHandshake
from gateway.metrics import Metrics
from gateway.net import tls
from gateway.protocol.handshake import accept_key
from gateway.util.cork import Cork
from tests.builders.frames import build_request
from tests.fakes.clients import FakeHandler, FakeRegistry, build_settings

reactor: Any = running_reactor
#: timeout of waits, in seconds
WAIT_TIMEOUT = 20.0
A, B = "node-a", "node-b"
ca = trustme.CA()
AUTHORITY = Certificate.loadPEM(ca.cert_pem.bytes())


def secret() -> bytes:
    return b"a secret of sixteen bytes or more"


def count_open_sockets() -> int:
    """Return the number of open sockets and epolls; other files are opened and closed by the reactor itself."""
    kinds = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            kinds.append(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0])
    return kinds.count("socket") + kinds.count("anon_inode")


async def wait_until(condition: Callable[[], Any]) -> None:
    """Let the reactor run until ``condition`` returns a true value."""
    end = reactor.seconds() + WAIT_TIMEOUT
    while not condition():
        if reactor.seconds() > end:
            raise AssertionError("timeout")
        await deferLater(reactor, 0.002)


class RecordingProtocol(Protocol):
    """A client, or a server that sends one response: records its input, and the loss of the connection."""

    transport: Any

    def __init__(self, response: bytes | None = None) -> None:
        self.received = bytearray()
        self.lost: Failure | None = None
        self._response = response

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        if self._response is not None and b"\r\n\r\n" in self.received:
            response, self._response = self._response, None
            self.transport.write(response)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost = reason

    async def expect(self, size: int) -> bytes:
        """Wait for ``size`` bytes, and take them."""
        await wait_until(lambda: len(self.received) >= size or self.lost)
        data = bytes(self.received[:size])
        del self.received[:size]
        assert len(data) == size, f"received only {data!r}"
        return data

    async def expect_head(self) -> bytes:
        await wait_until(lambda: b"\r\n\r\n" in self.received or self.lost)
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        return bytes(head)


class RelayingSessions:
    """Sessions of a node that relays every client to the other."""

    def __init__(self, nodes: TwoNodesCase) -> None:
        self._nodes = nodes
        self.connect_requests: list[ConnectRequest] = []
        self.timeout = 5.0

    def admit(self, request: ConnectRequest) -> Deferred[RouteDecision]:
        self.connect_requests.append(request)
        dialing = self._nodes.relay_dialer.dial(request, A, self._nodes.peer_url, self.timeout)
        return dialing.addCallback(lambda relay: RouteDecision(relay=relay))


class TwoNodesCase(TestCase):
    """Base class: node A, to which node B relays."""

    def setUp(self) -> None:
        self.files_before = count_open_sockets()
        self.folder = Path(tempfile.mkdtemp())
        ca.issue_cert("127.0.0.1", "localhost").private_key_and_cert_chain_pem.write_to_path(str(self.folder / "own"))
        self.ports: list[Any] = []
        self.clients: list[RecordingProtocol] = []
        self.settings = build_settings()
        self._make_a()
        self._make_b()
        self.peer_url = ""

    def _make_a(self) -> None:
        self.registry, self.handler, self.metrics_a = FakeRegistry(), FakeHandler(), Metrics()
        cork = Cork(reactor.seconds)
        self.sessions = ClientSessions(
            *(self.registry, reactor, self.settings, self.metrics_a, lambda _: self.handler, lambda: ""),
            parking=ParkingOptions(reactor, cork, lambda unparked: clients.wake(unparked)),
        )
        common: dict[str, Any] = {
            "sessions": self.sessions,
            "settings": self.settings,
            "metrics": self.metrics_a,
            "reactor": reactor,
            "cork": cork,
        }
        clients = ClientFactory(authenticator=AuthenticatorChain(()), **common)
        self.peer_auth = PeerAuth(A, secret)
        self.relayed_factory = RelayedClientFactory(
            authenticate_peer=self.peer_auth.verify, authentication_error=PeerAuthenticationError, **common
        )
        self.sessions.start()

    def _make_b(self) -> None:
        self.metrics_b = Metrics()
        self.relays = SocketRelays(reactor, self.metrics_b)
        self.relays.start()
        self.relay_dialer = RelayDialer(
            reactor,
            PeerAuth(B, secret),
            self.relays,
            self.metrics_b,
            heartbeat=5,
            lease=15,
            tls=PeerTLS(AUTHORITY),
        )
        self.sessions_b = RelayingSessions(self)
        self.factory_b = ClientFactory(
            sessions=self.sessions_b,  # type: ignore[arg-type]
            authenticator=AuthenticatorChain(()),
            settings=self.settings,
            metrics=self.metrics_b,
            reactor=reactor,
        )

    async def tearDown(self) -> None:  # type: ignore[override]
        for port in self.ports:
            await port.stopListening()
        for protocol in self.clients:
            if protocol.lost is None:
                protocol.transport.abortConnection()
        self.relays.stop()
        await self.sessions.close_all(1001, "")
        await wait_until(lambda: all(protocol.lost for protocol in self.clients))
        self.sessions.stop()
        # Connections whose closing handshake is in progress.
        await wait_until(lambda: not self.relayed_factory.countConnections)
        await wait_until(lambda: count_open_sockets() <= self.files_before)
        await wait_until(lambda: not [c for c in reactor.getDelayedCalls() if "TimerWheel._fire" in str(c.func)])

    async def listen(self, factory: Factory, secure: bool = False) -> int:
        own = str(self.folder / "own")
        if secure:
            endpoint = tls.parse_endpoint(reactor, f"ssl:0:privateKey={own}:certKey={own}:interface=127.0.0.1")
            port: Any = await endpoint.listen(factory)
        else:
            port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        self.ports.append(port)
        return int(port.getHost().port)

    async def serve_a(self, secure: bool = False) -> None:
        port = await self.listen(self.relayed_factory, secure)
        self.peer_url = f"{'wss' if secure else 'ws'}://127.0.0.1:{port}"

    async def serve_response(self, response: bytes | None) -> list[RecordingProtocol]:
        """Listen in place of node A, with a fixed response; returns the list of connections accepted so far."""
        connections: list[RecordingProtocol] = []

        class RespondingFactory(Factory):
            noisy = False

            def buildProtocol(self, addr: object) -> RecordingProtocol:
                connections.append(RecordingProtocol(response))
                return connections[-1]

        port = await self.listen(RespondingFactory())
        self.peer_url = f"ws://127.0.0.1:{port}"
        return connections

    async def dial(self, secure: bool = False) -> RecordingProtocol:
        """Open a connection to node B."""
        port = await self.listen(self.factory_b, secure)
        endpoint: Any = HostnameEndpoint(reactor, "localhost", port)
        if secure:
            endpoint = wrapClientTLS(optionsForClientTLS("localhost", AUTHORITY), endpoint)
        protocol: RecordingProtocol = await endpoint.connect(Factory.forProtocol(RecordingProtocol))
        self.clients.append(protocol)
        return protocol

    async def connect(self, secure: bool = False, client_id: str = "robot", **kwargs: Any) -> RecordingProtocol:
        """Connect a client to node B, which relays it to node A."""
        client = await self.dial(secure)
        client.transport.write(build_request(f"/v1/connect?client_id={client_id}", **kwargs))
        head = await client.expect_head()
        assert head.startswith(b"HTTP/1.1 101 "), head
        return client


CONNECT_REQUEST = ConnectRequest("robot", "192.0.2.7:4711")


def client_request() -> bytes:
    """Return a client's request to node B."""
    return build_request("/v1/connect?client_id=robot")


def upgrade_response(received: bytearray) -> bytes:
    key = received.decode("latin-1").partition("Sec-WebSocket-Key: ")[2].partition("\r\n")[0]
    lines = (
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: WebSocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept_key(key)}",
    )
    return "\r\n".join((*lines, "", "")).encode("ascii")


def routed_by_relay(relay: RelayHandshake) -> Deferred[Any]:
    return succeed(RouteDecision(relay=relay))


async def reactor_turn() -> None:
    await deferLater(reactor, 0)
