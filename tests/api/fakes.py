"""What the backend endpoint talks to, replaced; and the endpoint itself, spoken to in bytes."""

from __future__ import annotations

import struct
from collections import deque
from typing import Any

import attrs
import msgspec
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.api.endpoint import BackendFactory
from gateway.api.upstream import Upstream
from gateway.cluster.interface import INode
from gateway.edge.interface import IEdge, Presence
from gateway.registry.interface import IRegistry, Location, NodeStatus, RegistryUnavailable
from gateway.rpc.errors import Kind, RpcError
from gateway.rpc.interface import IHub, Reply
from gateway.settings import Settings
from gateway.telemetry.metrics import Metrics

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

    def forget(self, call):
        raise NotImplementedError

    def _cancelled(self, waiting):
        self.cancelled += 1

    def notify(self, client_id, method, params):
        self.notifications.append((client_id, method, params))
        outcome = self.notify_outcomes.popleft() if self.notify_outcomes else None
        return succeed(None) if outcome is None else fail(outcome)

    def notify_here(self, client_id, method, params):
        return False

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

    def add(self, client_id, generation=7):
        self.here[client_id] = Presence(client_id, generation, 1700000000.25, "192.0.2.7:4711")

    def get(self, client_id):
        return self.here.get(client_id)

    def generation(self, client_id):
        return self.here[client_id].generation if client_id in self.here else 0

    def opening(self, client_id):
        return self.openings.get(client_id)

    def close(self, client_id, code, reason, generation=0):
        self.closed.append((client_id, code, reason))
        found = self.here.pop(client_id, None) is not None
        return self.closing if self.closing is not None else succeed(found)

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
        self.drains = 0
        self.draining: Deferred[None] = Deferred()

    def unready(self):
        return self.why

    def steady(self):
        return self.judges

    def drain(self):
        self.drains += 1
        return self.draining


class Transport(StringTransport):
    """A transport that can be full, and that tells its protocol when it was told to end."""

    aborted = False
    protocol: Any = None

    def abortConnection(self):
        self.aborted = True
        super().abortConnection()

    def pauseProducing(self):
        if self.producerState == "producing":
            super().pauseProducing()

    def resumeProducing(self):
        # Unlike StringTransport, real transports take it at any time.
        self.producerState = "producing"

    def fill(self):
        """The send buffer is full."""
        self.producer.pauseProducing()

    def drain(self):
        """It is empty again."""
        self.producer.resumeProducing()


@attrs.define
class Response:
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes
    phrase: str = ""

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def responses(data: bytes, heads: int = 0) -> list[Response]:
    """Read HTTP responses to the last byte; the first ``heads`` are to HEAD and have no body."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        version, status, phrase = first.split(" ", 2)
        assert version == "HTTP/1.1", first
        if status == "100":
            continue
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        assert len(headers) == len(lines), lines
        length = int(headers.get("content-length", 0))
        if heads > len(found):
            length = 0
        assert len(data) >= length, (head, data)
        found.append(Response(int(status), headers, data[:length], phrase))
        data = data[length:]
    return found


class Connection:
    """One connection to the endpoint, from the backend's side."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.transport = Transport()
        self.protocol = endpoint.factory.buildProtocol(self.transport.getPeer())
        self.protocol.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        self.protocol.dataReceived(data)

    def responses(self, heads: int = 0) -> list[Response]:
        """What was answered since the last time, as HTTP."""
        data = self.transport.value()
        self.transport.clear()
        return responses(data, heads)

    def lose(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionDone()))


class Endpoint:
    """The backend endpoint on fakes."""

    def __init__(self, token_ok=None, **settings) -> None:
        self.clock = Clock()
        self.hub = FakeHub()
        self.edge = FakeEdge()
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
            token_ok=token_ok,
            reactor=self.clock,
            now=lambda: 1700000000.0 + self.clock.seconds(),
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


def request(method, target, body=None, headers=()) -> bytes:
    """An HTTP request; JSON if it has a body."""
    lines = [f"{method} {target} HTTP/1.1"]
    given = {name.lower() for name, _ in headers}
    if "host" not in given:
        lines.append("Host: localhost:8081")
    if (body is not None or method == "POST") and "content-type" not in given:
        lines.append("Content-Type: application/json")
    if body is not None and "content-length" not in given:
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def frame(payload: bytes, opcode: int = 1) -> bytes:
    """A masked frame, as a client sends it (RFC 6455, section 5.2)."""
    mask = b"\x01\x02\x03\x04"
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    return head + mask + masked


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """The opcode and payload of each frame that a server sent."""
    found = []
    while data:
        opcode, size, at = data[0] & 0x0F, data[1], 2
        assert data[0] & 0xF0 == 0x80, data[0]
        if size == 126:
            size, at = struct.unpack("!H", data[2:4])[0], 4
        elif size == 127:
            size, at = struct.unpack("!Q", data[2:10])[0], 10
        found.append((opcode, data[at : at + size]))
        data = data[at + size :]
    return found


UPGRADE = (
    ("Upgrade", "websocket"),
    ("Connection", "Upgrade"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("Sec-WebSocket-Version", "13"),
)


class Backend(Connection):
    """A WebSocket of a backend, open."""

    def __init__(self, endpoint: Endpoint, headers=()) -> None:
        super().__init__(endpoint)
        self.send(request("GET", "/v1/backend", headers=(*UPGRADE, *headers)))
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


def rpc_error(kind: Kind, client_id: str | None = "x", **more: Any) -> RpcError:
    return RpcError(kind, client_id, **more)
