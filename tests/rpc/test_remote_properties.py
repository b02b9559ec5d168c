"""Tests for :mod:`gateway.rpc.remote`: whatever happens, in whatever order, each message is settled once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location
from gateway.rpc.errors import NotDelivered, NotDeliveredError
from gateway.rpc.pending import DeferredCall, Reply
from tests.fakes.rpc import MAX_CALLS, RecordingCall, RemoteDeliveryTestCase, remote_location, result

REPLY = Reply(b"1", None)
NODES = ("other-node", "third-node")
UNREACHABLE = RpcError(ErrorKind.NODE_UNREACHABLE, "x", sent=False)
LOST = RpcError(ErrorKind.CONNECTION_LOST, "x")
REMOTE_LOCATIONS = [remote_location(node_id, generation=generation) for node_id in NODES for generation in (7, 8)]
LOOKUP_RESULTS = (
    None,
    RegistryUnavailableError("gone"),
    remote_location("this-node"),
    remote_location(live=False),
    *REMOTE_LOCATIONS,
)

Action = Callable[[], None]


class Simulation:
    """What happens around a hub, one thing at a time, of those that can happen."""

    def __init__(self, test: RemoteDeliveryTestCase) -> None:
        self.test = test
        self.hub, self.elsewhere, self.edge = test.dispatcher, test.remote_nodes, test.sessions
        self.lookups: list[Deferred[Location | None]] = []
        self.calls: list[RecordingCall] = []
        self.deferreds: list[tuple[Deferred[Any], list[object]]] = []
        self.cancelled = 0
        self.generation = 10
        test.registry.find = self.find  # type: ignore[method-assign]

    def find(self, client_id: str) -> Deferred[Location | None]:
        looking: Deferred[Location | None] = Deferred()
        self.lookups.append(looking)
        return looking

    def step(self, n: int) -> None:
        kinds = [
            kind
            for kind in (self.backend_actions(), self.client_actions(), self.node_actions(), self.result_actions())
            if kind
        ]
        # Messages, and what comes of them, are what it is about.
        kinds += [kinds[0], kinds[-1], kinds[-1]]
        n, kind = divmod(n, len(kinds))
        kinds[kind][n % len(kinds[kind])]()

    def backend_actions(self) -> list[Action]:
        forgets = [partial(self.cancel, call) for call in self.calls if not call.results]
        cancels = [deferred.cancel for deferred, outcomes in self.deferreds if not outcomes]
        return [self.start_call, self.start_call, self.call_deferred, self.notify, *forgets, *cancels]

    def start_call(self) -> None:
        call = RecordingCall()
        try:
            if self.hub.try_call(call, "x", "m", None, 5.0):
                self.calls.append(call)
        except RpcError:
            # It is counted, and that is looked at.
            return

    def call_deferred(self) -> None:
        self.track(self.hub.call("x", "m", None, 5.0))

    def notify(self) -> None:
        self.track(self.hub.notify("x", "m", None))

    def track(self, deferred: Deferred[Any]) -> None:
        outcomes: list[object] = []
        deferred.addBoth(outcomes.append)
        self.deferreds.append((deferred, outcomes))

    def cancel(self, call: RecordingCall) -> None:
        self.hub.cancel(call)
        self.calls.remove(call)
        self.cancelled += 1

    def client_actions(self) -> list[Action]:
        if "x" in self.edge.generations:
            responds = [
                partial(self.test.receive, "x", result(one["id"]), self.generation)
                for one in self.test.sent("x")
                if "id" in one
            ]
            return [lambda: self.test.disconnect("x"), *responds]
        if "x" in self.edge.claiming:
            return [self.connect, lambda: self.edge.finish_claim("x")]
        return [
            self.connect,
            lambda: self.edge.claiming.update(x=[]),
            *(partial(self.test.remember, one) for one in REMOTE_LOCATIONS),
        ]

    def connect(self) -> None:
        self.generation += 1
        self.test.connect("x", self.generation)
        if "x" in self.edge.claiming:
            self.edge.finish_claim("x")

    def node_actions(self) -> list[Action]:
        def steady() -> None:
            self.test.membership.stable = not self.test.membership.stable

        def lease() -> None:
            self.test.membership.lease_held = not self.test.membership.lease_held

        waits = [partial(self.advance, seconds) for seconds in (0.1, 1.0, 4.0, 20.0)]
        return [*waits, *(partial(self.toggle_connection, node_id) for node_id in NODES), steady, lease]

    def toggle_connection(self, node_id: str) -> None:
        self.elsewhere.connected ^= {node_id}
        if node_id not in self.elsewhere.connected:
            self.elsewhere.pending.fail_owner(node_id, lambda client_id: LOST)

    def advance(self, seconds: float) -> None:
        self.test.clock.pump([0.05] * round(seconds / 0.05))

    def result_actions(self) -> list[Action]:
        """Of what other nodes, and the registry, were asked."""
        self.lookups = [looking for looking in self.lookups if not looking.called]
        outcomes = [partial(fire, looking, one) for looking in self.lookups for one in LOOKUP_RESULTS]
        there = self.elsewhere
        there.connecting = [one for one in there.connecting if not one[1].called]
        for _, connecting in there.connecting:
            outcomes += [partial(fire, connecting, one) for one in (None, UNREACHABLE)]
        there.notifying = [telling for telling in there.notifying if not telling.called]
        for telling in there.notifying:
            outcomes += [
                partial(fire, telling, one) for one in (None, UNREACHABLE, LOST, *map(NotDeliveredError, NotDelivered))
            ]
        there.calls = [call for call in there.calls if there.pending._calls.get(call.id) is call]
        for n in range(len(there.calls)):
            outcomes += [
                partial(there.reply, REPLY, n),
                *(partial(there.not_deliver, miss, n) for miss in NotDelivered),
            ]
            outcomes += [partial(there.fail, error, n) for error in (UNREACHABLE, LOST)]
        return outcomes

    def check(self) -> None:
        """Each message is in one place, and nothing else is anywhere."""
        hub, seeking = self.hub, self.hub._remote
        waiting = sum(not call.results for call in self.calls) + sum(not outcomes for _, outcomes in self.deferreds)
        self.test.assertEqual(len(hub._pending) + len(seeking), waiting)
        telling = sum(not telling.called for telling in self.elsewhere.notifying)
        self.test.assertEqual(len(seeking._deadlines) + len(self.elsewhere.pending) + telling, len(seeking))
        self.test.assertEqual(hub._pending._max_calls + len(seeking), MAX_CALLS)
        asking = sum(not looking.called for looking in self.lookups)
        connecting = sum(not connecting.called for _, connecting in self.elsewhere.connecting)
        self.test.assertLessEqual(asking + connecting, len(seeking._deadlines) + hub._locations._probing)
        self.test.assertFalse(self.test.flushLoggedErrors())

    def finish(self) -> None:
        """All deadlines pass; what is only told by others is told."""
        for _ in range(20):
            if "x" in self.edge.claiming:
                self.edge.finish_claim("x")
            for telling in self.elsewhere.notifying:
                fire(telling, None)
            self.advance(5)


def fire(deferred: Deferred[Any], result: object) -> None:
    if deferred.called:
        return
    if isinstance(result, Exception):
        deferred.errback(result)
    else:
        deferred.callback(result)


class GeneratedTests(RemoteDeliveryTestCase):
    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(min_value=0, max_value=99999), min_size=20, max_size=60))
    def test_settled_once(self, acts: list[int]) -> None:
        self.make()
        world = Simulation(self)
        for n in acts:
            world.step(n)
            world.check()
        world.finish()
        for outcomes in [call.results for call in world.calls] + [outcomes for _, outcomes in world.deferreds]:
            self.assertEqual(len(outcomes), 1)
        world.check()
        self.assert_nothing_left()
        # Each call is counted once, as what it came to.
        given_up = world.cancelled
        for deferred, (outcome,) in world.deferreds:
            if isinstance(deferred, DeferredCall) and isinstance(outcome, Failure):
                given_up += outcome.check(CancelledError) is not None
        calls, answered, failed = self.call_counts()
        self.assertEqual(calls, answered + sum(failed.values()) + given_up)
