"""Test cases with a dispatcher on fakes."""

from __future__ import annotations

import json
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import verify

from gateway.clients.interface import IClientHandler, IClientSessions
from gateway.metrics import Metrics
from gateway.protocol.errors import RpcError
from gateway.registry.interface import IRegistry, Location, SessionKey
from gateway.rpc.dispatcher import Dispatcher
from gateway.rpc.interface import IDispatcher, IRemoteNodes, IUpstream
from gateway.rpc.pending import Reply
from gateway.rpc.token_renewal import TokenRenewal
from tests.fakes.rpc import (
    FakeClientSessions,
    FakeMembership,
    FakeRegistry,
    FakeRemoteNodes,
    FakeUpstream,
    RecordingCall,
)

MAX_MESSAGE_SIZE = 1024
MAX_CALLS = 8
#: seconds
LEASE = 15.0


class DispatcherTestCase(SynchronousTestCase):
    """A dispatcher with fake sessions, upstream, registry and remote nodes."""

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
        self.dispatcher.client_connected(SessionKey(client_id, generation))

    def disconnect(self, client_id: str) -> None:
        self.dispatcher.client_disconnected(SessionKey(client_id, self.sessions.generations.pop(client_id)))

    def sent(self, client_id: str) -> list[Any]:
        """Return the messages sent to a client, parsed, and forget them."""
        messages = [json.loads(payload) for recipient, _, payload in self.sessions.sent if recipient == client_id]
        self.sessions.sent = [entry for entry in self.sessions.sent if entry[0] != client_id]
        return messages

    def start_call(self, client_id: str) -> tuple[str, Deferred[Reply]]:
        """Call a connected client; returns the UUID of the call and its Deferred."""
        call = self.dispatcher.call(client_id, "m", None)
        (request,) = self.sent(client_id)
        return request["id"], call

    def receive(self, client_id: str, message: Any, generation: int = 1) -> int | None:
        """Receive a message from a client; anything but bytes is encoded."""
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
        """Assert that no call, timer or waiter is left."""
        self.assertEqual(self.dispatcher.calls_in_flight(), 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertFalse(any(self.sessions.claiming.values()))
        remote = self.dispatcher._remote
        for pending in (self.dispatcher._pending, remote._deadlines, self.remote_nodes.pending):
            self.assertEqual((pending._calls, pending._owners, pending._slots), ({}, {}, {}))
        self.assertEqual(self.dispatcher._pending._max_calls, MAX_CALLS)
        self.assertEqual((self.dispatcher._inbound._calls, self.dispatcher._locations._lookups), ({}, {}))
        self.assertEqual(remote.queues, {})


class RemoteDeliveryTestCase(DispatcherTestCase):
    """A dispatcher with remote nodes: one is connected, and the registry knows one client there."""

    has_remote_nodes = True

    def make(self, max_message_size: int = MAX_MESSAGE_SIZE) -> None:
        super().make(max_message_size)
        self.remote_nodes.connected.add("other-node")
        self.registry.result = remote_location()

    def remember(self, location: Location) -> None:
        """Put a location into the cache."""
        self.dispatcher._locations.put(location)

    def remembered(self, client_id: str = "x") -> Location | None:
        return self.dispatcher._locations.get(client_id, self.clock.seconds())

    def call_remote(self) -> RecordingCall:
        """Call a client whose location is cached and whose node is connected."""
        call = RecordingCall()
        self.assertTrue(self.dispatcher.try_call(call, "x", "m", b"[1]", 5.0))
        return call

    def call_counts(self) -> tuple[int, int, dict[str, int]]:
        """Return the number of calls, of answered calls, and of failed calls by code."""
        return self.metrics.calls, self.metrics.calls_answered, dict(self.metrics.calls_failed)


def result(id: Any, value: Any = 1) -> dict[str, Any]:
    """Build a response with a result."""
    return {"jsonrpc": "2.0", "id": id, "result": value}


def remote_location(
    node_id: str = "other-node", client_id: str = "x", live: bool = True, generation: int = 7
) -> Location:
    """Build the location of a client of another node."""
    return Location(client_id, node_id, "other", "ws://192.0.2.2:8081", generation, 0.0, "192.0.2.1:5", live)
