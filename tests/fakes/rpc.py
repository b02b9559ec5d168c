"""What the hub talks to, in memory, for its tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer, verify

from gateway.clients.interface import IClientHandler, IClientSessions, SessionInfo
from gateway.metrics import Metrics
from gateway.protocol.errors import RpcError
from gateway.registry.interface import IRegistry, Location
from gateway.rpc.dispatcher import Dispatcher
from gateway.rpc.errors import NotDelivered
from gateway.rpc.interface import IDispatcher, IRemoteNodes, IUpstream
from gateway.rpc.pending import Call, PendingCalls, Reply
from gateway.rpc.token_renewal import TokenRenewal

MAX_MESSAGE_SIZE = 1024
MAX_CALLS = 8
#: in seconds
LEASE = 15.0


class RecordingCall(Call):
    """Keeps what it came to."""

    __slots__ = ("results",)

    def __init__(self) -> None:
        self.results: list[Reply | RpcError] = []

    def complete(self, result: Reply | RpcError) -> None:
        self.results.append(result)


@implementer(IClientSessions)
class FakeClientSessions:
    """Connections that are a generation and a list of what was sent to them."""

    def __init__(self) -> None:
        self.generations: dict[str, int] = {}
        self.sent: list[tuple[str, int, bytes]] = []
        self.claiming: dict[str, list[Deferred[None]]] = {}
        self.renewed: list[tuple[str, int, float]] = []
        #: what waits for slow readers, in bytes, and how often that was asked
        self.buffered_bytes = self.buffer_queries = 0
        #: what happens while a message is sent
        self.on_send: Callable[[str, bytes], None] = lambda client_id, payload: None

    def get(self, client_id: str) -> SessionInfo | None:
        generation = self.generations.get(client_id)
        return None if generation is None else SessionInfo(client_id, generation, 0.0, "192.0.2.1:5")

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

    def claim_in_progress(self, client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        if client_id not in self.claiming or client_id in self.generations:
            return None
        waiting: Deferred[None] = Deferred(lambda d: self.claiming[client_id].remove(d))
        self.claiming[client_id].append(waiting)
        return waiting

    def finish_claim(self, client_id: str) -> None:
        """The outcome of a claim is known."""
        for waiting in self.claiming.pop(client_id):
            waiting.callback(None)

    def close(
        self, client_id: str, code: int, reason: str, generation: int = 0, *, keep_row: bool = False
    ) -> Deferred[bool]:
        raise NotImplementedError

    def renew(self, client_id: str, generation: int, expires_at: float) -> bool:
        if generation != self.generation(client_id):
            return False
        self.renewed.append((client_id, generation, expires_at))
        return True

    def close_superseded(self, client_id: str, generation: int) -> None:
        raise NotImplementedError

    restore_claim = close_superseded

    def client_ids(self) -> list[str]:
        return list(self.generations)

    def count(self) -> int:
        return len(self.generations)

    def unsent_bytes(self) -> int:
        self.buffer_queries += 1
        return self.buffered_bytes


@implementer(IUpstream)
class FakeUpstream:
    """Records what it is told; calls are answered by the test."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.calls: list[tuple[str, str, bytes | None, Deferred[Reply]]] = []
        self.cancelled = 0

    def call(self, client_id: str, method: str, params: bytes | None) -> Deferred[Reply]:
        def cancel(_: Deferred[Reply]) -> None:
            self.cancelled += 1

        call: Deferred[Reply] = Deferred(cancel)
        self.calls.append((client_id, method, params, call))
        return call

    def message(self, client_id: str, method: str, params: bytes | None) -> None:
        self.events.append(("message", client_id, method, params))

    def connected(self, client_id: str, generation: int) -> None:
        self.events.append(("connected", client_id, generation))

    def disconnected(self, client_id: str, generation: int) -> None:
        self.events.append(("disconnected", client_id, generation))


@implementer(IRemoteNodes)
class FakeRemoteNodes:
    """Links, to the nodes in ``open``, on which nothing is said but what the test says."""

    def __init__(self, clock: Clock) -> None:
        #: keeps the deadlines, as the real one does
        self.pending = PendingCalls(clock, max_calls=8, max_per_owner=8)
        self.connected: set[str] = set()
        self.requests: list[tuple[Location, str, bytes | None, float, bool]] = []
        self.calls: list[Call] = []
        self.notifications: list[tuple[Location, str, bytes | None, float, bool]] = []
        self.connecting: list[tuple[Location, Deferred[None]]] = []
        self.notifying: list[Deferred[None]] = []
        self.cancelled_calls: list[Call] = []
        self.cancel_count = 0
        #: what connect() comes to, and notify(): ``None`` is left to the test
        self.connect_result: Callable[[Location], Deferred[None]] | None = None
        #: what happens while a call is asked
        self.on_call: Callable[[Call], None] = lambda call: None

    def connect(self, location: Location) -> Deferred[None]:
        if location.node_id in self.connected:
            return succeed(None)
        if self.connect_result is not None:
            return self.connect_result(location)
        connecting: Deferred[None] = Deferred(self._cancelled)
        self.connecting.append((location, connecting))
        return connecting

    def _cancelled(self, _: object) -> None:
        self.cancel_count += 1

    def try_call(
        self, call: Call, location: Location, method: str, params: bytes | None, timeout: float, *, stale: bool = False
    ) -> bool:
        if location.node_id not in self.connected:
            return False
        self.pending.start(call, location.node_id, location.client_id, timeout)
        self.requests.append((location, method, params, timeout, stale))
        self.calls.append(call)
        self.on_call(call)
        self.pending.mark_sent(call)
        return True

    def cancel(self, call: Call) -> None:
        self.cancelled_calls.append(call)
        self.pending.discard(call)

    def notify(
        self, location: Location, method: str, params: bytes | None, timeout: float, *, stale: bool = False
    ) -> Deferred[None]:
        self.notifications.append((location, method, params, timeout, stale))
        telling: Deferred[None] = Deferred(self._cancelled)
        self.notifying.append(telling)
        return telling

    # What the test says.

    def reply(self, result: Reply, n: int = -1) -> None:
        """The client answers the call that was asked last."""
        call = self.calls.pop(n)
        assert self.pending.resolve(call.owner, call.id, result)

    def fail(self, error: RpcError, n: int = -1) -> None:
        """The same with an error. ``TIMEOUT`` at the deadline is ``NODE_UNREACHABLE`` of the real one."""
        call = self.calls.pop(n)
        assert self.pending.fail(call.owner, call.id, error)

    def not_deliver(self, reason: NotDelivered, n: int = -1) -> None:
        """The node did not pass it on."""
        call = self.calls.pop(n)
        assert call.id in self.pending._calls
        self.pending.discard(call)
        call.not_delivered(reason)


class FakeMembership:
    """The lease of this node, as the test says."""

    def __init__(self, stable: bool = True, lease_held: bool = True, uncertain: bool = False) -> None:
        self.stable = stable
        self.lease_held = lease_held
        self.uncertain = uncertain

    def is_stable(self) -> bool:
        return self.stable

    def has_lease(self) -> bool:
        return self.lease_held

    def ownership_uncertain(self) -> bool:
        return self.uncertain


class FakeRegistry:
    """Look-ups only: what ``outcome`` is, at once, or by the test."""

    def __init__(self) -> None:
        self.result: Location | Exception | Deferred[Location | None] | None = None
        self.queries: list[str] = []

    def find(self, client_id: str) -> Deferred[Location | None]:
        self.queries.append(client_id)
        if isinstance(self.result, Deferred):
            return self.result
        if isinstance(self.result, Exception):
            return fail(self.result)
        return succeed(self.result)


class DispatcherTestCase(SynchronousTestCase):
    """A hub between fakes."""

    has_remote_nodes = False

    def setUp(self) -> None:
        self.make()

    def make(self, max_message_size: int = MAX_MESSAGE_SIZE) -> None:
        self.membership = FakeMembership()
        self.clock = Clock()
        self.metrics = Metrics()
        self.sessions = FakeClientSessions()
        self.upstream = FakeUpstream()
        self.registry = FakeRegistry()
        self.remote_nodes = FakeRemoteNodes(self.clock)
        self.dispatcher = self.make_dispatcher(max_message_size, self.remote_nodes if self.has_remote_nodes else None)
        for interface, provider in (
            (IDispatcher, self.dispatcher),
            (IClientHandler, self.dispatcher),
            (IClientSessions, self.sessions),
            (IUpstream, self.upstream),
            (IRemoteNodes, self.remote_nodes),
        ):
            verify.verifyObject(interface, provider)
        self.assertEqual(IRegistry["find"].getSignatureInfo()["positional"], ("client_id",), "the fake has to keep up")

    def make_dispatcher(self, max_message_size: int, remote_nodes: IRemoteNodes | None) -> Dispatcher:
        return Dispatcher(
            sessions=self.sessions,
            upstream=self.upstream,
            registry=self.registry,
            membership=self.membership,
            clock=self.clock,
            metrics=self.metrics,
            call_timeout=30.0,
            max_call_timeout=300.0,
            max_message_size=max_message_size,
            max_calls=MAX_CALLS,
            max_calls_per_client=4,
            node_id="this-node",
            lease=LEASE,
            remote_nodes=remote_nodes,
            token_renewal=self.make_token_renewal(),
        )

    def make_token_renewal(self) -> TokenRenewal | None:
        return None

    def connect(self, client_id: str, generation: int = 1) -> None:
        self.sessions.generations[client_id] = generation
        self.dispatcher.client_connected(client_id, generation)

    def disconnect(self, client_id: str) -> None:
        self.dispatcher.client_disconnected(client_id, self.sessions.generations.pop(client_id))

    def sent(self, client_id: str) -> list[Any]:
        """What was sent to a client, read; it is taken from the list."""
        taken = [json.loads(payload) for to, _, payload in self.sessions.sent if to == client_id]
        self.sessions.sent = [one for one in self.sessions.sent if one[0] != client_id]
        return taken

    def start_call(self, client_id: str) -> tuple[str, Deferred[Reply]]:
        """Call a client that is here; the UUID of the call and its Deferred."""
        call = self.dispatcher.call(client_id, "m", None)
        (request,) = self.sent(client_id)
        return request["id"], call

    def receive(self, client_id: str, message: Any, generation: int = 1) -> int:
        """A message comes from a client; what is no bytes is encoded."""
        payload = message if isinstance(message, bytes) else json.dumps(message).encode()
        return self.dispatcher.message_received(client_id, generation, payload)

    def error_of(self, call: Deferred[Any] | RecordingCall) -> RpcError:
        if isinstance(call, RecordingCall):
            (error,) = call.results
        else:
            error = self.failureResultOf(call, RpcError).value
        assert isinstance(error, RpcError)
        return error

    def assert_nothing_left(self) -> None:
        """No call, no timer and nobody who waits is left behind."""
        self.assertEqual(self.dispatcher.calls_in_flight(), 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertFalse(any(self.sessions.claiming.values()))
        seeking = self.dispatcher._remote
        for pending in (self.dispatcher._pending, seeking._deadlines, self.remote_nodes.pending):
            self.assertEqual((pending._calls, pending._owners, pending._slots), ({}, {}, {}))
        self.assertEqual(self.dispatcher._pending._max_calls, MAX_CALLS)
        self.assertEqual((self.dispatcher._inbound._calls, self.dispatcher._locations._lookups), ({}, {}))


class RemoteDeliveryTestCase(DispatcherTestCase):
    """A hub that has a way to other nodes; the link to one is open, and the registry knows one client there."""

    has_remote_nodes = True

    def make(self, max_message_size: int = MAX_MESSAGE_SIZE) -> None:
        super().make(max_message_size)
        self.remote_nodes.connected.add("other-node")
        self.registry.result = remote_location()

    def remember(self, location: Location) -> None:
        """A location is remembered."""
        self.dispatcher._locations.put(location)

    def remembered(self, client_id: str = "x") -> Location | None:
        return self.dispatcher._locations.get(client_id, self.clock.seconds())

    def call_remote(self) -> RecordingCall:
        """Ask a client that is remembered to be on a node whose link is open."""
        call = RecordingCall()
        self.assertTrue(self.dispatcher.try_call(call, "x", "m", b"[1]", 5.0))
        return call

    def call_counts(self) -> tuple[int, int, dict[str, int]]:
        """Calls that were taken on, that were answered, and that failed, by their codes."""
        return self.metrics.calls, self.metrics.calls_answered, dict(self.metrics.calls_failed)


def result(id: Any, value: Any = 1) -> dict[str, Any]:
    """A response that carries a result."""
    return {"jsonrpc": "2.0", "id": id, "result": value}


def remote_location(
    node_id: str = "other-node", client_id: str = "x", live: bool = True, generation: int = 7
) -> Location:
    """Where a client is that another node holds."""
    return Location(client_id, node_id, "other", "ws://192.0.2.2:8081", generation, 0.0, "192.0.2.1:5", live)
