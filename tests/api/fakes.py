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

from gateway.api.endpoint import BackendFactory
from gateway.api.upstream import Upstream
from gateway.clients.interface import IEdge, Presence
from gateway.cluster.auth import NotAPeer
from gateway.cluster.interface import INode, IPeers
from gateway.metrics import Metrics
from gateway.protocol.errors import Kind, RpcError
from gateway.registry.interface import IRegistry, Location, NodeStatus, RegistryUnavailable
from gateway.rpc.interface import IHub
from gateway.rpc.pending import Call, Reply
from gateway.settings import Settings
from tests.api.wire import UPGRADE, Response, Transport, frame, frames, request, responses

NODE_ID = "11111111-1111-4111-8111-111111111111"
OTHER_ID = "22222222-2222-4222-8222-222222222222"


@implementer(IHub)
class FakeHub:
    """Keeps what it was asked; answers what ``answers`` says, else waits in ``waiting``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bytes | None, float | None]] = []
        self.notifications: list[tuple[str, str, bytes | None]] = []
        self.prefixes: list[tuple[str, str, bytes | None]] = []
        self.answers: deque[Reply | Exception] = deque()
        self.notify_outcomes: deque[Exception | None] = deque()
        self.prefix_outcome: int | Exception = 3
        self.waiting: list[Deferred[Reply]] = []
        self.cancelled = 0
        #: of clients that were told to go
        self.arrivals: dict[str, Deferred[None]] = {}
        #: set by whoever makes both
        self.edge: FakeEdge
        #: whether clients that are here take what they are asked by ask_here() and notify_to()
        self.here = False
        #: what they were asked, each with its call; what they were told; and the calls that were forgotten
        self.asked: list[tuple[Call, tuple[str, str, bytes | None, float | None]]] = []
        self.told: list[tuple[str, str, bytes | None]] = []
        self.forgotten: list[Call] = []
        #: what those raise
        self.problems: deque[RpcError] = deque()

    def call(self, client_id, method, params, timeout=None):
        self.calls.append((client_id, method, params, timeout))
        if self.answers:
            answer = self.answers.popleft()
            return succeed(answer) if isinstance(answer, Reply) else fail(answer)
        waiting: Deferred[Reply] = Deferred(self._cancelled)
        self.waiting.append(waiting)
        return waiting

    def ask(self, call, client_id, method, params, timeout=None):
        return False

    def call_here(self, client_id, generation, method, params, timeout=None):
        raise NotImplementedError

    def ask_here(self, call, client_id, generation, method, params, timeout=None):
        taken = self._takes(client_id, generation)
        if taken:
            self.asked.append((call, (client_id, method, params, timeout)))
        return taken

    def _takes(self, client_id, generation):
        if not generation or self.edge.generation(client_id) != generation:
            return False
        if self.problems:
            raise self.problems.popleft()
        return self.here

    def forget(self, call):
        self.forgotten.append(call)

    def _cancelled(self, waiting):
        self.cancelled += 1

    def notify(self, client_id, method, params):
        self.notifications.append((client_id, method, params))
        outcome = self.notify_outcomes.popleft() if self.notify_outcomes else None
        return succeed(None) if outcome is None else fail(outcome)

    def notify_here(self, client_id, method, params):
        return False

    def arrival(self, client_id):
        return self.arrivals.get(client_id)

    def notify_to(self, client_id, generation, method, params):
        taken = self._takes(client_id, generation)
        if taken:
            self.told.append((client_id, method, params))
        return taken

    def notify_prefix(self, prefix, method, params):
        self.prefixes.append((prefix, method, params))
        return fail(self.prefix_outcome) if isinstance(self.prefix_outcome, Exception) else succeed(self.prefix_outcome)


@implementer(IEdge)
class FakeEdge:
    """Clients that are connected here."""

    def __init__(self) -> None:
        self.here: dict[str, Presence] = {}
        self.closed: list[tuple[str, int, str]] = []
        self.closing: Deferred[bool] | None = None
        self.openings: dict[str, Deferred[None]] = {}
        #: who waits for their outcomes
        self.waiters: list[Deferred[None]] = []
        self.moved: list[tuple[str, int]] = []
        self.restored: list[tuple[str, int]] = []

    def add(self, client_id, generation=7):
        self.here[client_id] = Presence(client_id, generation, 1700000000.25, "192.0.2.7:4711")

    def get(self, client_id):
        return self.here.get(client_id)

    def generation(self, client_id):
        return self.here[client_id].generation if client_id in self.here else 0

    def opening(self, client_id, newer_than=0):
        outcome = self.openings.get(client_id)
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
        found = self.here.pop(client_id, None) is not None
        return self.closing if self.closing is not None else succeed(found)

    def superseded(self, client_id, generation):
        self.moved.append((client_id, generation))

    def restore(self, client_id, generation):
        self.restored.append((client_id, generation))

    def opened(self, client_id, generation=7):
        """A claim is in, and its connection is open; 0 is a claim that was none."""
        if generation:
            self.add(client_id, generation)
        self.openings.pop(client_id).callback(None)

    def renew(self, client_id, generation, until):
        raise NotImplementedError

    def send(self, client_id, payload, generation=0):
        raise NotImplementedError

    def client_ids(self):
        return list(self.here)

    def count(self):
        return len(self.here)


@implementer(IRegistry)
class FakeRegistry:
    """The rows of clients, and the nodes."""

    def __init__(self) -> None:
        self.rows: dict[str, Location] = {}
        self.statuses: list[NodeStatus] = []
        self.away = False
        self.asked: list[tuple[Any, ...]] = []

    def add(self, client_id, node_id=OTHER_ID, generation=9, live=True):
        self.rows[client_id] = Location(
            client_id, node_id, "other", "ws://other:8081", generation, 1700000001.0, "[2001:db8::1]:80", live
        )

    def _answer(self, value):
        return fail(RegistryUnavailable("away")) if self.away else succeed(value)

    def find(self, client_id):
        self.asked.append(("find", client_id))
        return self._answer(self.rows.get(client_id))

    def clients(self, after, limit, node_id=None, prefix=""):
        self.asked.append(("clients", after, limit, node_id, prefix))
        rows = [
            row
            for client_id, row in sorted(self.rows.items())
            if client_id > after and client_id.startswith(prefix) and node_id in (None, row.node_id)
        ]
        return self._answer(rows[:limit])

    def nodes(self):
        return self._answer(self.statuses)

    def join(self, node_id, name="other"):
        self.statuses.append(NodeStatus(node_id, name, "ws://a", f"ws://{name}:8081", 3, 100, "up", 1.5))


@implementer(IPeers)
class FakePeers:
    """Other nodes: what they were asked, and what they answer, each once."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.answers: deque[Any] = deque()

    def _ask(self, *asked):
        self.asked.append(asked)
        answer = self.answers.popleft()
        if isinstance(answer, Deferred):
            return answer
        return fail(answer) if isinstance(answer, Exception) else succeed(answer)

    def unused(self, *args):
        raise NotImplementedError

    has = has_room = taken_back = moved = unused

    def close(self, location, code, reason):
        return self._ask("close", location.node_id, location.client_id, location.generation, code, reason)

    def notify_prefix(self, node, prefix, method, params):
        return self._ask("notify_prefix", node.node_id, prefix, method, params)

    def drain(self, node):
        return self._ask("drain", node.node_id)

    def rebalance(self, node):
        return self._ask("rebalance", node.node_id)


@implementer(INode)
class FakeNode:
    """This node."""

    node_id = NODE_ID
    name = "here"
    public_url = "ws://127.0.0.1:8080"
    peer_url = "ws://127.0.0.1:8081"

    def __init__(self) -> None:
        self.why = ""
        self.judges = True
        self.leased = True
        self.drains = 0
        #: who was told to go
        self.away: list[tuple[str, int, str]] = []
        self.draining: Deferred[None] = Deferred()

    def unready(self):
        return self.why

    def has_lease(self):
        return self.leased

    def steady(self):
        return self.judges

    def send_away(self, client_id, generation, reason):
        self.away.append((client_id, generation, reason))
        return True

    def drain(self):
        self.drains += 1
        return self.draining


class Connection:
    """One connection to the endpoint, from the backend's side."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.clock, self.transport = endpoint.clock, Transport()
        self.protocol = endpoint.factory.buildProtocol(self.transport.getPeer())
        self.protocol.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        self.protocol.dataReceived(data)

    def responses(self, heads: int = 0) -> list[Response]:
        """What was answered since the last time, as HTTP; of requests that came together, one in each turn."""
        self.clock.advance(0)
        data = self.transport.value()
        self.transport.clear()
        return responses(data, heads)

    def lose(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionDone()))


class Endpoint:
    """The backend endpoint on fakes."""

    def __init__(self, grant_of=None, peers=None, peer_ok=None, relays=None, balance=None, **settings) -> None:
        self.clock = Clock()
        self.hub = FakeHub()
        self.edge = self.hub.edge = FakeEdge()
        self.registry = FakeRegistry()
        self.node = FakeNode()
        self.metrics = Metrics()
        self.settings = Settings(capacity=100, **settings)
        self.upstream = Upstream(clock=self.clock, metrics=self.metrics, settings=self.settings, node_id=NODE_ID)
        self.factory = BackendFactory(
            hub=self.hub,
            edge=self.edge,
            registry=self.registry,
            node=self.node,
            upstream=self.upstream,
            metrics=self.metrics,
            settings=self.settings,
            grant_of=grant_of,
            reactor=self.clock,
            now=lambda: 1700000000.0 + self.clock.seconds(),
            peers=peers,
            peer_ok=peer_ok,
            relays=relays,
            balance=balance,
        )

    def connect(self) -> Connection:
        return Connection(self)

    def ask(self, method, target, body=None, headers=()) -> Response:
        """One request on a connection of its own; there must be one response."""
        connection = self.connect()
        connection.send(request(method, target, body, headers))
        found = connection.responses(heads=1 if method == "HEAD" else 0)
        assert len(found) == 1, found
        return found[0]


class Backend(Connection):
    """A WebSocket of a backend, open."""

    def __init__(self, endpoint: Endpoint, headers=(), target="/v1/backend") -> None:
        super().__init__(endpoint)
        self.send(request("GET", target, headers=(*UPGRADE, *headers)))
        self.opening = self.transport.value()
        assert self.opening.startswith(b"HTTP/1.1 101 "), self.opening
        self.transport.clear()

    def tell(self, message: Any) -> None:
        """Send one text message; anything but bytes is made JSON."""
        self.send(frame(message if isinstance(message, bytes) else msgspec.json.encode(message)))

    def frames(self) -> list[tuple[int, bytes]]:
        data = self.transport.value()
        self.transport.clear()
        return frames(data)

    def heard(self) -> list[Any]:
        """The messages that came since the last time."""
        found = self.frames()
        assert all(opcode == 1 for opcode, _ in found), found
        return [msgspec.json.decode(payload) for _, payload in found]

    def close_code(self) -> int:
        """The code of the close frame that came."""
        opcode, payload = self.frames()[-1]
        assert opcode == 8, opcode
        return int.from_bytes(payload[:2], "big")


def peer_ok(authorization, method, target, client_id, address):
    """Whoever says so is a peer, by the node_id that it gives."""
    scheme, _, node_id = authorization.partition(" ")
    assert scheme.lower() == "wsgateway-peer", scheme
    if not node_id or (method, target, client_id, address) != ("GET", "/v1/backend", "", ""):
        raise NotAPeer("the signature is wrong")
    return node_id


def credentials(node_id=OTHER_ID):
    return (("Authorization", f"Wsgateway-Peer {node_id}"),)


class Link(Backend):
    """Another node's link, open."""

    def __init__(self, endpoint: Endpoint, node_id=OTHER_ID) -> None:
        super().__init__(endpoint, credentials(node_id))


def rpc_error(kind: Kind, client_id: str | None = "x", **more: Any) -> RpcError:
    return RpcError(kind, client_id, **more)
