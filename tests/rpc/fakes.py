"""What the hub talks to, in memory, for its tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer, verify

from gateway.clients.interface import IClientHandler, IEdge, Presence
from gateway.metrics import Metrics
from gateway.protocol.errors import RpcError
from gateway.registry.interface import IRegistry, Location
from gateway.rpc.dispatcher import Hub
from gateway.rpc.interface import IElsewhere, IHub, IUpstream, Miss
from gateway.rpc.pending import Call, Pending, Reply

MAX_MESSAGE_SIZE = 1024
MAX_CALLS = 8
#: in seconds
LEASE = 15.0


class Told(Call):
    """Keeps what it came to."""

    __slots__ = ("outcomes",)

    def __init__(self) -> None:
        self.outcomes: list[Reply | RpcError] = []

    def settle(self, outcome: Reply | RpcError) -> None:
        self.outcomes.append(outcome)


@implementer(IEdge)
class FakeEdge:
    """Connections that are a generation and a list of what was sent to them."""

    def __init__(self) -> None:
        self.generations: dict[str, int] = {}
        self.sent: list[tuple[str, int, bytes]] = []
        self.claiming: dict[str, list[Deferred[None]]] = {}
        self.renewed: list[tuple[str, int, float]] = []
        #: what waits for slow readers, in bytes, and how often that was asked
        self.waiting = self.looks = 0
        #: what happens while a message is sent
        self.on_send: Callable[[str, bytes], None] = lambda client_id, payload: None

    def get(self, client_id: str) -> Presence | None:
        generation = self.generations.get(client_id)
        return None if generation is None else Presence(client_id, generation, 0.0, "192.0.2.1:5")

    def generation(self, client_id: str) -> int:
        return self.generations.get(client_id, 0)

    def send(self, client_id: str, payload: bytes, generation: int = 0) -> int:
        here = self.generations.get(client_id, 0)
        if not here or generation not in (0, here):
            return 0
        self.on_send(client_id, payload)
        if self.generations.get(client_id) != here:
            return 0
        self.sent.append((client_id, here, payload))
        return here

    def opening(self, client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        if client_id not in self.claiming or client_id in self.generations:
            return None
        waiting: Deferred[None] = Deferred(lambda d: self.claiming[client_id].remove(d))
        self.claiming[client_id].append(waiting)
        return waiting

    def claimed(self, client_id: str) -> None:
        """The outcome of a claim is known."""
        for waiting in self.claiming.pop(client_id):
            waiting.callback(None)

    def close(
        self, client_id: str, code: int, reason: str, generation: int = 0, *, keep_row: bool = False
    ) -> Deferred[bool]:
        raise NotImplementedError

    def renew(self, client_id: str, generation: int, until: float) -> bool:
        if generation != self.generation(client_id):
            return False
        self.renewed.append((client_id, generation, until))
        return True

    def superseded(self, client_id: str, generation: int) -> None:
        raise NotImplementedError

    restore = superseded

    def client_ids(self) -> list[str]:
        return list(self.generations)

    def count(self) -> int:
        return len(self.generations)

    def unsent(self) -> int:
        self.looks += 1
        return self.waiting


@implementer(IUpstream)
class FakeUpstream:
    """Records what it is told; calls are answered by the test."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.calls: list[tuple[str, str, bytes | None, Deferred[Reply]]] = []
        self.cancelled = 0

    def call(self, client_id: str, method: str, params: bytes | None) -> Deferred[Reply]:
        def cancel(_: Deferred[Reply]) -> None:
            self.cancelled += 1

        call: Deferred[Reply] = Deferred(cancel)
        self.calls.append((client_id, method, params, call))
        return call

    def message(self, client_id: str, method: str, params: bytes | None) -> None:
        self.told.append(("message", client_id, method, params))

    def connected(self, client_id: str, generation: int) -> None:
        self.told.append(("connected", client_id, generation))

    def disconnected(self, client_id: str, generation: int) -> None:
        self.told.append(("disconnected", client_id, generation))


@implementer(IElsewhere)
class FakeElsewhere:
    """Links, to the nodes in ``open``, on which nothing is said but what the test says."""

    def __init__(self, clock: Clock) -> None:
        #: keeps the deadlines, as the real one does
        self.pending = Pending(clock, max_calls=8, max_per_owner=8)
        self.open: set[str] = set()
        self.asked: list[tuple[Location, str, bytes | None, float, bool]] = []
        self.calls: list[Call] = []
        self.told: list[tuple[Location, str, bytes | None, float, bool]] = []
        self.connecting: list[tuple[Location, Deferred[None]]] = []
        self.telling: list[Deferred[None]] = []
        self.forgotten: list[Call] = []
        self.cancelled = 0
        #: what connect() comes to, and notify(): ``None`` is left to the test
        self.connects: Callable[[Location], Deferred[None]] | None = None
        #: what happens while a call is asked
        self.on_ask: Callable[[Call], None] = lambda call: None
        self.missed: Callable[[Call, Miss], None] = lambda call, miss: None

    def connect(self, location: Location) -> Deferred[None]:
        if location.node_id in self.open:
            return succeed(None)
        if self.connects is not None:
            return self.connects(location)
        connecting: Deferred[None] = Deferred(self._cancelled)
        self.connecting.append((location, connecting))
        return connecting

    def _cancelled(self, _: object) -> None:
        self.cancelled += 1

    def ask(
        self, call: Call, location: Location, method: str, params: bytes | None, timeout: float, *, stale: bool = False
    ) -> bool:
        if location.node_id not in self.open:
            return False
        self.pending.start(call, location.node_id, location.client_id, timeout)
        self.asked.append((location, method, params, timeout, stale))
        self.calls.append(call)
        self.on_ask(call)
        self.pending.sent(call)
        return True

    def forget(self, call: Call) -> None:
        self.forgotten.append(call)
        self.pending.forget(call)

    def notify(
        self, location: Location, method: str, params: bytes | None, timeout: float, *, stale: bool = False
    ) -> Deferred[None]:
        self.told.append((location, method, params, timeout, stale))
        telling: Deferred[None] = Deferred(self._cancelled)
        self.telling.append(telling)
        return telling

    # What the test says.

    def answers(self, reply: Reply, n: int = -1) -> None:
        """The client answers the call that was asked last."""
        call = self.calls.pop(n)
        assert self.pending.resolve(call.owner, call.id, reply)

    def fails(self, error: RpcError, n: int = -1) -> None:
        """The same with an error. ``TIMEOUT`` at the deadline is ``NODE_UNREACHABLE`` of the real one."""
        call = self.calls.pop(n)
        assert self.pending.fail(call.owner, call.id, error)

    def misses(self, miss: Miss, n: int = -1) -> None:
        """The node did not pass it on."""
        call = self.calls.pop(n)
        assert call.id in self.pending._calls
        self.pending.forget(call)
        self.missed(call, miss)


class FakeRegistry:
    """Look-ups only: what ``outcome`` is, at once, or by the test."""

    def __init__(self) -> None:
        self.outcome: Location | Exception | Deferred[Location | None] | None = None
        self.asked: list[str] = []

    def find(self, client_id: str) -> Deferred[Location | None]:
        self.asked.append(client_id)
        if isinstance(self.outcome, Deferred):
            return self.outcome
        if isinstance(self.outcome, Exception):
            return fail(self.outcome)
        return succeed(self.outcome)


class HubTestCase(SynchronousTestCase):
    """A hub between fakes."""

    def setUp(self) -> None:
        self.make()

    def make(self, max_message_size: int = MAX_MESSAGE_SIZE) -> None:
        self.steady = self.leased = True
        self.doubtful = False
        self.clock = Clock()
        self.metrics = Metrics()
        self.edge = FakeEdge()
        self.upstream = FakeUpstream()
        self.registry = FakeRegistry()
        self.hub = Hub(
            registry=self.registry,
            clock=self.clock,
            metrics=self.metrics,
            call_timeout=30.0,
            max_call_timeout=300.0,
            max_message_size=max_message_size,
            max_calls=MAX_CALLS,
            max_calls_per_client=4,
            node_id="this-node",
            steady=lambda: self.steady,
            has_lease=lambda: self.leased,
            doubtful=lambda: self.doubtful,
            lease=LEASE,
        )
        self.hub.connect(self.edge, self.upstream)
        self.elsewhere = FakeElsewhere(self.clock)
        for interface, provider in (
            (IHub, self.hub),
            (IClientHandler, self.hub),
            (IEdge, self.edge),
            (IUpstream, self.upstream),
            (IElsewhere, self.elsewhere),
        ):
            verify.verifyObject(interface, provider)
        self.assertEqual(IRegistry["find"].getSignatureInfo()["positional"], ("client_id",), "the fake has to keep up")

    def connect(self, client_id: str, generation: int = 1) -> None:
        self.edge.generations[client_id] = generation
        self.hub.client_connected(client_id, generation)

    def disconnect(self, client_id: str) -> None:
        self.hub.client_disconnected(client_id, self.edge.generations.pop(client_id))

    def sent(self, client_id: str) -> list[Any]:
        """What was sent to a client, read; it is taken from the list."""
        taken = [json.loads(payload) for to, _, payload in self.edge.sent if to == client_id]
        self.edge.sent = [one for one in self.edge.sent if one[0] != client_id]
        return taken

    def ask(self, client_id: str) -> tuple[str, Deferred[Reply]]:
        """Call a client that is here; the UUID of the call and its Deferred."""
        call = self.hub.call(client_id, "m", None)
        (request,) = self.sent(client_id)
        return request["id"], call

    def receive(self, client_id: str, message: Any, generation: int = 1) -> int:
        """A message comes from a client; what is no bytes is encoded."""
        payload = message if isinstance(message, bytes) else json.dumps(message).encode()
        return self.hub.message_received(client_id, generation, payload)

    def error_of(self, call: Deferred[Any] | Told) -> RpcError:
        if isinstance(call, Told):
            (error,) = call.outcomes
        else:
            error = self.failureResultOf(call, RpcError).value
        assert isinstance(error, RpcError)
        return error

    def assert_nothing_left(self) -> None:
        """No call, no timer and nobody who waits is left behind."""
        self.assertEqual(self.hub.calls_in_flight(), 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertFalse(any(self.edge.claiming.values()))
        seeking = self.hub._seeking
        for pending in (self.hub._pending, seeking._searches, self.elsewhere.pending):
            self.assertEqual((pending._calls, pending._owners, pending._slots), ({}, {}, {}))
        self.assertEqual(self.hub._pending._max_calls, MAX_CALLS)
        self.assertEqual((self.hub._inbound._calls, self.hub._locations._look_ups), ({}, {}))


class SeekingTestCase(HubTestCase):
    """A hub that has a way to other nodes; the link to one is open, and the registry knows one client there."""

    def make(self, max_message_size: int = MAX_MESSAGE_SIZE) -> None:
        super().make(max_message_size)
        self.hub.elsewhere = self.elsewhere
        self.elsewhere.open.add("other-node")
        self.registry.outcome = elsewhere()

    def know(self, location: Location) -> None:
        """A location is remembered."""
        self.hub._locations.put(location)

    def remembered(self, client_id: str = "x") -> Location | None:
        return self.hub._locations.get(client_id, self.clock.seconds())

    def asked_there(self) -> Told:
        """Ask a client that is remembered to be on a node whose link is open."""
        call = Told()
        self.assertTrue(self.hub.ask(call, "x", "m", b"[1]", 5.0))
        return call

    def counted(self) -> tuple[int, int, dict[str, int]]:
        """Calls that were taken on, that were answered, and that failed, by their codes."""
        return self.metrics.calls, self.metrics.calls_answered, dict(self.metrics.calls_failed)


def result(id: Any, value: Any = 1) -> dict[str, Any]:
    """A response that carries a result."""
    return {"jsonrpc": "2.0", "id": id, "result": value}


def elsewhere(node_id: str = "other-node", client_id: str = "x", live: bool = True, generation: int = 7) -> Location:
    """Where a client is that another node holds."""
    return Location(client_id, node_id, "other", "ws://192.0.2.2:8081", generation, 0.0, "192.0.2.1:5", live)
