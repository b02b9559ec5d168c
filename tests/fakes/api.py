"""What the backend endpoint talks to, replaced; and the endpoint itself, spoken to in bytes."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.api.endpoint import BackendEndpoint
from gateway.api.upstream import BackendDispatcher
from gateway.clients.interface import IClientSessions, SessionInfo
from gateway.cluster.errors import PeerAuthenticationError
from gateway.cluster.interface import INode, IPeerClient
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, Location, NodeStatus
from gateway.rpc.interface import IDispatcher
from gateway.rpc.pending import Call, Reply
from gateway.settings import Settings
from tests.builders.http import UPGRADE, FakeTransport, HTTPResponse, frame, frames, request, responses
from tests.fakes.rpc import FakeMembership

NODE_ID = "11111111-1111-4111-8111-111111111111"
OTHER_ID = "22222222-2222-4222-8222-222222222222"


@implementer(IDispatcher)
class FakeDispatcher:
    """Keeps what it was asked; answers what ``answers`` says, else waits in ``waiting``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bytes | None, float | None]] = []
        self.notifications: list[tuple[str, str, bytes | None]] = []
        self.prefix_notifications: list[tuple[str, str, bytes | None]] = []
        self.results: deque[Reply | Exception] = deque()
        self.notify_results: deque[Exception | None] = deque()
        self.prefix_result: int | Exception = 3
        self.pending: list[Deferred[Reply]] = []
        self.cancel_count = 0
        #: of clients that were told to go
        self.handoffs: dict[str, Deferred[None]] = {}
        #: set by whoever makes both
        self.sessions: FakeClientSessions
        #: whether clients that are here take what they are asked by ask_here() and notify_to()
        self.accepts_session_calls = False
        #: what they were asked, each with its call; what they were told; and the calls that were forgotten
        self.session_calls: list[tuple[Call, tuple[str, str, bytes | None, float | None]]] = []
        self.session_notifications: list[tuple[str, str, bytes | None]] = []
        self.cancelled_calls: list[Call] = []
        #: what those raise
        self.errors: deque[RpcError] = deque()

    def call(self, client_id, method, params, timeout=None):
        self.calls.append((client_id, method, params, timeout))
        if self.results:
            answer = self.results.popleft()
            return succeed(answer) if isinstance(answer, Reply) else fail(answer)
        waiting: Deferred[Reply] = Deferred(self._cancelled)
        self.pending.append(waiting)
        return waiting

    def try_call(self, call, client_id, method, params, timeout=None):
        return False

    def call_here(self, client_id, generation, method, params, timeout=None):
        raise NotImplementedError

    def call_session(self, call, client_id, generation, method, params, timeout=None):
        taken = self._accepts(client_id, generation)
        if taken:
            self.session_calls.append((call, (client_id, method, params, timeout)))
        return taken

    def _accepts(self, client_id, generation):
        if not generation or self.sessions.generation(client_id) != generation:
            return False
        if self.errors:
            raise self.errors.popleft()
        return self.accepts_session_calls

    def cancel(self, call):
        self.cancelled_calls.append(call)

    def _cancelled(self, waiting):
        self.cancel_count += 1

    def notify(self, client_id, method, params):
        self.notifications.append((client_id, method, params))
        outcome = self.notify_results.popleft() if self.notify_results else None
        return succeed(None) if outcome is None else fail(outcome)

    def try_notify(self, client_id, method, params):
        return False

    def wait_for_handoff(self, client_id):
        return self.handoffs.get(client_id)

    def notify_session(self, client_id, generation, method, params):
        taken = self._accepts(client_id, generation)
        if taken:
            self.session_notifications.append((client_id, method, params))
        return taken

    def notify_prefix(self, prefix, method, params):
        self.prefix_notifications.append((prefix, method, params))
        return fail(self.prefix_result) if isinstance(self.prefix_result, Exception) else succeed(self.prefix_result)


@implementer(IClientSessions)
class FakeClientSessions:
    """Clients that are connected here."""

    def __init__(self) -> None:
        self.clients: dict[str, SessionInfo] = {}
        self.closed: list[tuple[str, int, str]] = []
        self.close_result: Deferred[bool] | None = None
        self.claims: dict[str, Deferred[None]] = {}
        #: who waits for their outcomes
        self.waiters: list[Deferred[None]] = []
        self.superseded_by: list[tuple[str, int]] = []
        self.restored: list[tuple[str, int]] = []

    def add(self, client_id, generation=7):
        self.clients[client_id] = SessionInfo(client_id, generation, 1700000000.25, "192.0.2.7:4711")

    def get(self, client_id):
        return self.clients.get(client_id)

    def generation(self, client_id):
        return self.clients[client_id].generation if client_id in self.clients else 0

    def claim_in_progress(self, client_id, newer_than=0):
        outcome = self.claims.get(client_id)
        if outcome is None or outcome.called or self.generation(client_id) > newer_than:
            return None
        waiting: Deferred[None] = Deferred(lambda waiting: self.waiters.remove(waiting))
        self.waiters.append(waiting)
        outcome.addCallback(lambda _: waiting in self.waiters and waiting.callback(None))
        return waiting

    def close(self, client_id, code, reason, generation=0, *, keep_row=False):
        if generation not in (0, self.generation(client_id)):
            return succeed(False)
        self.closed.append((client_id, code, reason))
        found = self.clients.pop(client_id, None) is not None
        return self.close_result if self.close_result is not None else succeed(found)

    def close_superseded(self, client_id, generation):
        self.superseded_by.append((client_id, generation))

    def restore_claim(self, client_id, generation):
        self.restored.append((client_id, generation))

    def finish_claim(self, client_id, generation=7):
        """A claim is in, and its connection is open; 0 is a claim that was none."""
        if generation:
            self.add(client_id, generation)
        self.claims.pop(client_id).callback(None)

    def renew(self, client_id, generation, expires_at):
        raise NotImplementedError

    def send(self, client_id, payload, generation=0):
        raise NotImplementedError

    def client_ids(self):
        return list(self.clients)

    def count(self):
        return len(self.clients)


@implementer(IRegistry)
class FakeRegistry:
    """The rows of clients, and the nodes."""

    def __init__(self) -> None:
        self.rows: dict[str, Location] = {}
        self.statuses: list[NodeStatus] = []
        self.unavailable = False
        self.queries: list[tuple[Any, ...]] = []

    def add(self, client_id, node_id=OTHER_ID, generation=9, live=True):
        self.rows[client_id] = Location(
            client_id, node_id, "other", "ws://other:8081", generation, 1700000001.0, "[2001:db8::1]:80", live
        )

    def _result(self, value):
        return fail(RegistryUnavailableError("away")) if self.unavailable else succeed(value)

    def find(self, client_id):
        self.queries.append(("find", client_id))
        return self._result(self.rows.get(client_id))

    def clients(self, after, limit, node_id=None, prefix=""):
        self.queries.append(("clients", after, limit, node_id, prefix))
        rows = [
            row
            for client_id, row in sorted(self.rows.items())
            if client_id > after and client_id.startswith(prefix) and node_id in (None, row.node_id)
        ]
        return self._result(rows[:limit])

    def nodes(self):
        return self._result(self.statuses)

    def add_node(self, node_id, name="other"):
        self.statuses.append(NodeStatus(node_id, name, "ws://a", f"ws://{name}:8081", 3, 100, "up", 1.5))


@implementer(IPeerClient)
class FakePeerClient:
    """Other nodes: what they were asked, and what they answer, each once."""

    def __init__(self) -> None:
        self.requests: list[tuple[Any, ...]] = []
        self.results: deque[Any] = deque()

    def _request(self, *asked):
        self.requests.append(asked)
        answer = self.results.popleft()
        if isinstance(answer, Deferred):
            return answer
        return fail(answer) if isinstance(answer, Exception) else succeed(answer)

    def unused(self, *args):
        raise NotImplementedError

    has_client = has_room = notify_claim_revoked = notify_takeover = unused

    def close_session(self, location, code, reason):
        return self._request("close", location.node_id, location.client_id, location.generation, code, reason)

    def notify_prefix(self, node, prefix, method, params):
        return self._request("notify_prefix", node.node_id, prefix, method, params)

    def drain(self, node):
        return self._request("drain", node.node_id)

    def rebalance(self, node):
        return self._request("rebalance", node.node_id)


@implementer(INode)
class FakeNode:
    """This node."""

    node_id = NODE_ID
    name = "here"
    public_url = "ws://127.0.0.1:8080"
    peer_url = "ws://127.0.0.1:8081"

    def __init__(self) -> None:
        self.not_ready_because = ""
        self.drain_count = 0
        #: who was told to go
        self.sent_away: list[tuple[str, int, str]] = []
        self.draining: Deferred[None] = Deferred()

    def unready_reason(self):
        return self.not_ready_because

    def send_goaway(self, client_id, generation, reason):
        self.sent_away.append((client_id, generation, reason))
        return True

    def drain(self):
        self.drain_count += 1
        return self.draining


class EndpointConnection:
    """One connection to the endpoint, from the backend's side."""

    def __init__(self, endpoint: EndpointHarness) -> None:
        self.clock, self.transport = endpoint.clock, FakeTransport()
        self.protocol = endpoint.factory.buildProtocol(self.transport.getPeer())
        self.protocol.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        self.protocol.dataReceived(data)

    def responses(self, heads: int = 0) -> list[HTTPResponse]:
        """What was answered since the last time, as HTTP; of requests that came together, one in each turn."""
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
        """One request on a connection of its own; there must be one response."""
        connection = self.connect()
        connection.send(request(method, target, body, headers))
        found = connection.responses(heads=1 if method == "HEAD" else 0)
        assert len(found) == 1, found
        return found[0]


class BackendWebSocket(EndpointConnection):
    """A WebSocket of a backend, open."""

    def __init__(self, endpoint: EndpointHarness, headers=(), target="/v1/backend") -> None:
        super().__init__(endpoint)
        self.send(request("GET", target, headers=(*UPGRADE, *headers)))
        self.opening = self.transport.value()
        assert self.opening.startswith(b"HTTP/1.1 101 "), self.opening
        self.transport.clear()

    def send_message(self, message: Any) -> None:
        """Send one text message; anything but bytes is made JSON."""
        self.send(frame(message if isinstance(message, bytes) else msgspec.json.encode(message)))

    def frames(self) -> list[tuple[int, bytes]]:
        data = self.transport.value()
        self.transport.clear()
        return frames(data)

    def messages(self) -> list[Any]:
        """The messages that came since the last time."""
        found = self.frames()
        assert all(opcode == 1 for opcode, _ in found), found
        return [msgspec.json.decode(payload) for _, payload in found]

    def close_code(self) -> int:
        """The code of the close frame that came."""
        opcode, payload = self.frames()[-1]
        assert opcode == 8, opcode
        return int.from_bytes(payload[:2], "big")


def authenticate_peer(authorization, method, target, client_id, address):
    """Whoever says so is a peer, by the node_id that it gives."""
    scheme, _, node_id = authorization.partition(" ")
    assert scheme.lower() == "wsgateway-peer", scheme
    if not node_id or (method, target, client_id, address) != ("GET", "/v1/backend", "", ""):
        raise PeerAuthenticationError("the signature is wrong")
    return node_id


def peer_credentials(node_id=OTHER_ID):
    return (("Authorization", f"Wsgateway-Peer {node_id}"),)


class PeerWebSocket(BackendWebSocket):
    """Another node's link, open."""

    def __init__(self, endpoint: EndpointHarness, node_id=OTHER_ID) -> None:
        super().__init__(endpoint, peer_credentials(node_id))


def rpc_error(kind: ErrorKind, client_id: str | None = "x", **more: Any) -> RpcError:
    return RpcError(kind, client_id, **more)
