"""The backend endpoint on fakes, and connections to it from the side of backends and peers."""

from __future__ import annotations

from typing import Any

import msgspec
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from gateway.api.endpoint import BackendEndpoint
from gateway.api.upstream import BackendDispatcher
from gateway.cluster.features import ALL_FEATURES, FEATURES_HEADER, encode_features
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.settings import Settings
from tests.builders.http import UPGRADE, FakeTransport, HTTPResponse, frame, frames, request, responses
from tests.fakes.api import (
    NODE_ID,
    OTHER_ID,
    FakeClientSessions,
    FakeDispatcher,
    FakeNode,
    FakeOrphanedRows,
    FakeRegistry,
)
from tests.fakes.rpc import FakeMembership


class EndpointConnection:
    """Connection to the endpoint, from the backend's side."""

    def __init__(self, endpoint: EndpointHarness) -> None:
        self.clock, self.transport = endpoint.clock, FakeTransport()
        self.protocol = endpoint.factory.buildProtocol(self.transport.getPeer())
        self.protocol.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        self.protocol.dataReceived(data)

    def responses(self, heads: int = 0) -> list[HTTPResponse]:
        """Return the HTTP responses since the last call, after running the reactor iterations of pipelined requests."""
        self.clock.advance(0)
        data = self.transport.value()
        self.transport.clear()
        return responses(data, heads)

    def disconnect(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionDone()))


class EndpointHarness:
    """The backend endpoint on fakes."""

    def __init__(
        self,
        authenticate_backend=None,
        peers=None,
        authenticate_peer=None,
        relay_factory=None,
        rebalancer=None,
        **settings,
    ) -> None:
        self.clock = Clock()
        self.dispatcher = FakeDispatcher()
        self.sessions = self.dispatcher.sessions = FakeClientSessions()
        self.registry = FakeRegistry()
        self.orphaned_rows = FakeOrphanedRows(self.registry, self.sessions)
        self.node = FakeNode()
        self.membership = FakeMembership()
        self.metrics = Metrics()
        self.settings = Settings(capacity=100, **settings)
        self.upstream = BackendDispatcher(
            clock=self.clock, metrics=self.metrics, settings=self.settings, node_id=NODE_ID
        )
        self.factory = BackendEndpoint(
            dispatcher=self.dispatcher,
            sessions=self.sessions,
            registry=self.registry,
            node=self.node,
            membership=self.membership,
            upstream=self.upstream,
            metrics=self.metrics,
            settings=self.settings,
            orphaned_rows=self.orphaned_rows,
            authenticate_backend=authenticate_backend,
            reactor=self.clock,
            wall_clock=lambda: 1700000000.0 + self.clock.seconds(),
            peers=peers,
            authenticate_peer=authenticate_peer,
            relay_factory=relay_factory,
            rebalancer=rebalancer,
        )

    def connect(self) -> EndpointConnection:
        return EndpointConnection(self)

    def request(self, method, target, body=None, headers=()) -> HTTPResponse:
        """Send a request on a new connection, and return its one response."""
        connection = self.connect()
        connection.send(request(method, target, body, headers))
        received = connection.responses(heads=1 if method == "HEAD" else 0)
        assert len(received) == 1, received
        return received[0]


class BackendWebSocket(EndpointConnection):
    """Open WebSocket of a backend."""

    def __init__(self, endpoint: EndpointHarness, headers=(), target="/v1/backend") -> None:
        super().__init__(endpoint)
        self.send(request("GET", target, headers=(*UPGRADE, *headers)))
        self.opening = self.transport.value()
        assert self.opening.startswith(b"HTTP/1.1 101 "), self.opening
        self.transport.clear()

    def send_message(self, message: Any) -> None:
        """Send a text message; anything but bytes is encoded as JSON."""
        self.send(frame(message if isinstance(message, bytes) else msgspec.json.encode(message)))

    def frames(self) -> list[tuple[int, bytes]]:
        data = self.transport.value()
        self.transport.clear()
        return frames(data)

    def messages(self) -> list[Any]:
        """Return the messages received since the last call."""
        received = self.frames()
        assert all(opcode == 1 for opcode, _ in received), received
        return [msgspec.json.decode(payload) for _, payload in received]

    def close_code(self) -> int:
        """Return the code of the received close frame."""
        opcode, payload = self.frames()[-1]
        assert opcode == 8, opcode
        return int.from_bytes(payload[:2], "big")


def peer_credentials(node_id=OTHER_ID):
    return (("Authorization", f"Wsgateway-Peer {node_id}"),)


class PeerWebSocket(BackendWebSocket):
    """Open connection of a peer."""

    def __init__(self, endpoint: EndpointHarness, node_id=OTHER_ID, features=ALL_FEATURES) -> None:
        super().__init__(endpoint, (*peer_credentials(node_id), (FEATURES_HEADER, encode_features(features))))


def rpc_error(kind: ErrorKind, client_id: str | None = "x", **more: Any) -> RpcError:
    return RpcError(kind, client_id, **more)
