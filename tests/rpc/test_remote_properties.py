"""Tests for :mod:`gateway.rpc.remote`: whatever happens, in whatever order, each message is completed once."""

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
from tests.builders.dispatcher import MAX_CALLS, RemoteDeliveryTestCase, remote_location, result
from tests.fakes.rpc import RecordingCall

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
    """Events around a dispatcher, one at a time, chosen among those possible."""

    def __init__(self, test: RemoteDeliveryTestCase) -> None:
        self.test = test
        self.dispatcher, self.remote_nodes, self.sessions = test.dispatcher, test.remote_nodes, test.sessions
        self.lookups: list[Deferred[Location | None]] = []
        self.calls: list[RecordingCall] = []
        self.deferreds: list[tuple[Deferred[Any], list[object]]] = []
        self.cancelled = 0
        self.generation = 10
        test.registry.find = self.find  # type: ignore[method-assign]

    def find(self, client_id: str) -> Deferred[Location | None]:
        lookup: Deferred[Location | None] = Deferred()
        self.lookups.append(lookup)
        return lookup

    def step(self, n: int) -> None:
        kinds = [
            kind
            for kind in (self.backend_actions(), self.client_actions(), self.node_actions(), self.result_actions())
            if kind
        ]
        # Prefer messages and their results.
        kinds += [kinds[0], kinds[-1], kinds[-1]]
        n, kind = divmod(n, len(kinds))
        kinds[kind][n % len(kinds[kind])]()

    def backend_actions(self) -> list[Action]:
        forgets = [partial(self.cancel, call) for call in self.calls if not call.results]
        cancels = [deferred.cancel for deferred, results in self.deferreds if not results]
        return [self.start_call, self.start_call, self.call_deferred, self.notify, *forgets, *cancels]

    def start_call(self) -> None:
        call = RecordingCall()
        try:
            if self.dispatcher.try_call(call, "x", "m", None, 5.0):
                self.calls.append(call)
        except RpcError:
            # The calls are counted, and check() compares.
            return

    def call_deferred(self) -> None:
        self.track(self.dispatcher.call("x", "m", None, 5.0))

    def notify(self) -> None:
        self.track(self.dispatcher.notify("x", "m", None))

    def track(self, deferred: Deferred[Any]) -> None:
        results: list[object] = []
        deferred.addBoth(results.append)
        self.deferreds.append((deferred, results))

    def cancel(self, call: RecordingCall) -> None:
        self.dispatcher.cancel(call)
        self.calls.remove(call)
        self.cancelled += 1

    def client_actions(self) -> list[Action]:
        if "x" in self.sessions.generations:
            responds = [
                partial(self.test.receive, "x", result(request["id"]), self.generation)
                for request in self.test.sent("x")
                if "id" in request
            ]
            return [lambda: self.test.disconnect("x"), *responds]
        if "x" in self.sessions.claiming:
            return [self.connect, lambda: self.sessions.finish_claim("x")]
        return [
            self.connect,
            lambda: self.sessions.claiming.update(x=[]),
            *(partial(self.test.remember, location) for location in REMOTE_LOCATIONS),
        ]

    def connect(self) -> None:
        self.generation += 1
        self.test.connect("x", self.generation)
        if "x" in self.sessions.claiming:
            self.sessions.finish_claim("x")

    def node_actions(self) -> list[Action]:
        def steady() -> None:
            self.test.membership.stable = not self.test.membership.stable

        def lease() -> None:
            self.test.membership.lease_held = not self.test.membership.lease_held

        waits = [partial(self.advance, seconds) for seconds in (0.1, 1.0, 4.0, 20.0)]
        return [*waits, *(partial(self.toggle_connection, node_id) for node_id in NODES), steady, lease]

    def toggle_connection(self, node_id: str) -> None:
        self.remote_nodes.connected ^= {node_id}
        if node_id not in self.remote_nodes.connected:
            self.remote_nodes.pending.fail_owner(node_id, lambda client_id: LOST)

    def advance(self, seconds: float) -> None:
        self.test.clock.pump([0.05] * round(seconds / 0.05))

    def result_actions(self) -> list[Action]:
        """Results of requests to other nodes, and of registry lookups."""
        self.lookups = [lookup for lookup in self.lookups if not lookup.called]
        actions = [partial(fire, lookup, result) for lookup in self.lookups for result in LOOKUP_RESULTS]
        remote_nodes = self.remote_nodes
        remote_nodes.connecting = [result for result in remote_nodes.connecting if not result[1].called]
        for _, connecting in remote_nodes.connecting:
            actions += [partial(fire, connecting, result) for result in (None, UNREACHABLE)]
        remote_nodes.notifying = [notifying for notifying in remote_nodes.notifying if not notifying.called]
        for notifying in remote_nodes.notifying:
            actions += [
                partial(fire, notifying, result)
                for result in (None, UNREACHABLE, LOST, *map(NotDeliveredError, NotDelivered))
            ]
        remote_nodes.calls = [call for call in remote_nodes.calls if remote_nodes.pending._calls.get(call.id) is call]
        for n in range(len(remote_nodes.calls)):
            actions += [
                partial(remote_nodes.reply, REPLY, n),
                *(partial(remote_nodes.not_deliver, reason, n) for reason in NotDelivered),
            ]
            actions += [partial(remote_nodes.fail, error, n) for error in (UNREACHABLE, LOST)]
        return actions

    def check(self) -> None:
        """Assert that each message is in exactly one place, and nothing else is left anywhere."""
        dispatcher, remote = self.dispatcher, self.dispatcher._remote
        pending_count = sum(not call.results for call in self.calls) + sum(not results for _, results in self.deferreds)
        self.test.assertEqual(len(dispatcher._pending) + len(remote), pending_count)
        self.test.assertEqual(len(remote._deadlines) + len(self.remote_nodes.pending), len(remote))
        waiting = [call for queue in remote.queues.values() for call in queue.waiting]
        self.test.assertEqual(len(waiting), len(remote._deadlines))
        self.test.assertEqual([call.number for call in waiting], sorted(call.number for call in waiting))
        self.test.assertEqual(dispatcher._pending._max_calls + len(remote), MAX_CALLS)
        lookups = sum(not lookup.called for lookup in self.lookups)
        connecting = sum(not connecting.called for _, connecting in self.remote_nodes.connecting)
        allowed = len(remote._deadlines) + dispatcher._locations._probing + len(dispatcher.orphaned_rows)
        self.test.assertLessEqual(lookups + connecting, allowed)
        self.test.assertFalse(self.test.flushLoggedErrors())

    def finish(self) -> None:
        """Let all deadlines pass, and fire what only others complete."""
        for _ in range(20):
            if "x" in self.sessions.claiming:
                self.sessions.finish_claim("x")
            for notifying in self.remote_nodes.notifying:
                fire(notifying, None)
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
    def test_completed_once(self, acts: list[int]) -> None:
        self.make()
        world = Simulation(self)
        for n in acts:
            world.step(n)
            world.check()
        world.finish()
        for results in [call.results for call in world.calls] + [results for _, results in world.deferreds]:
            self.assertEqual(len(results), 1)
        world.check()
        self.assert_nothing_left()
        # Each call is counted once, by its result.
        given_up = world.cancelled
        for deferred, (outcome,) in world.deferreds:
            if isinstance(deferred, DeferredCall) and isinstance(outcome, Failure):
                given_up += outcome.check(CancelledError) is not None
        calls, answered, failed = self.call_counts()
        self.assertEqual(calls, answered + sum(failed.values()) + given_up)
