"""Tests for :mod:`gateway.rpc.remote`: whatever happens, in whatever order, each message is settled once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from gateway.protocol.errors import Kind, RpcError
from gateway.registry.interface import Location, RegistryUnavailable
from gateway.rpc.interface import Miss, Missed
from gateway.rpc.pending import DeferredCall, Reply
from tests.rpc.fakes import MAX_CALLS, SeekingTestCase, Told, elsewhere, result

REPLY = Reply(b"1", None)
NODES = ("other-node", "third-node")
UNREACHABLE = RpcError(Kind.NODE_UNREACHABLE, "x", sent=False)
LOST = RpcError(Kind.CONNECTION_LOST, "x")
THERE = [elsewhere(node_id, generation=generation) for node_id in NODES for generation in (7, 8)]
FOUND = (None, RegistryUnavailable("gone"), elsewhere("this-node"), elsewhere(live=False), *THERE)

Act = Callable[[], None]


class World:
    """What happens around a hub, one thing at a time, of those that can happen."""

    def __init__(self, test: SeekingTestCase) -> None:
        self.test = test
        self.hub, self.elsewhere, self.edge = test.hub, test.elsewhere, test.edge
        self.look_ups: list[Deferred[Location | None]] = []
        self.asked: list[Told] = []
        self.told: list[tuple[Deferred[Any], list[object]]] = []
        self.forgotten = 0
        self.generation = 10
        test.registry.find = self.find  # type: ignore[method-assign]

    def find(self, client_id: str) -> Deferred[Location | None]:
        looking: Deferred[Location | None] = Deferred()
        self.look_ups.append(looking)
        return looking

    def do(self, n: int) -> None:
        kinds = [kind for kind in (self.backends(), self.clients(), self.nodes(), self.outcomes()) if kind]
        # Messages, and what comes of them, are what it is about.
        kinds += [kinds[0], kinds[-1], kinds[-1]]
        n, kind = divmod(n, len(kinds))
        kinds[kind][n % len(kinds[kind])]()

    def backends(self) -> list[Act]:
        forgets = [partial(self.forget, call) for call in self.asked if not call.outcomes]
        cancels = [deferred.cancel for deferred, outcomes in self.told if not outcomes]
        return [self.ask, self.ask, self.call, self.notify, *forgets, *cancels]

    def ask(self) -> None:
        call = Told()
        try:
            if self.hub.ask(call, "x", "m", None, 5.0):
                self.asked.append(call)
        except RpcError:
            # It is counted, and that is looked at.
            return

    def call(self) -> None:
        self.keep(self.hub.call("x", "m", None, 5.0))

    def notify(self) -> None:
        self.keep(self.hub.notify("x", "m", None))

    def keep(self, deferred: Deferred[Any]) -> None:
        outcomes: list[object] = []
        deferred.addBoth(outcomes.append)
        self.told.append((deferred, outcomes))

    def forget(self, call: Told) -> None:
        self.hub.forget(call)
        self.asked.remove(call)
        self.forgotten += 1

    def clients(self) -> list[Act]:
        if "x" in self.edge.generations:
            responds = [
                partial(self.test.receive, "x", result(one["id"]), self.generation)
                for one in self.test.sent("x")
                if "id" in one
            ]
            return [lambda: self.test.disconnect("x"), *responds]
        if "x" in self.edge.claiming:
            return [self.come, lambda: self.edge.claimed("x")]
        return [self.come, lambda: self.edge.claiming.update(x=[]), *(partial(self.test.know, one) for one in THERE)]

    def come(self) -> None:
        self.generation += 1
        self.test.connect("x", self.generation)
        if "x" in self.edge.claiming:
            self.edge.claimed("x")

    def nodes(self) -> list[Act]:
        def steady() -> None:
            self.test.steady = not self.test.steady

        def lease() -> None:
            self.test.leased = not self.test.leased

        waits = [partial(self.advance, seconds) for seconds in (0.1, 1.0, 4.0, 20.0)]
        return [*waits, *(partial(self.link, node_id) for node_id in NODES), steady, lease]

    def link(self, node_id: str) -> None:
        self.elsewhere.open ^= {node_id}
        if node_id not in self.elsewhere.open:
            self.elsewhere.pending.fail_owner(node_id, lambda client_id: LOST)

    def advance(self, seconds: float) -> None:
        self.test.clock.pump([0.05] * round(seconds / 0.05))

    def outcomes(self) -> list[Act]:
        """Of what other nodes, and the registry, were asked."""
        self.look_ups = [looking for looking in self.look_ups if not looking.called]
        outcomes = [partial(fire, looking, one) for looking in self.look_ups for one in FOUND]
        there = self.elsewhere
        there.connecting = [one for one in there.connecting if not one[1].called]
        for _, connecting in there.connecting:
            outcomes += [partial(fire, connecting, one) for one in (None, UNREACHABLE)]
        there.telling = [telling for telling in there.telling if not telling.called]
        for telling in there.telling:
            outcomes += [partial(fire, telling, one) for one in (None, UNREACHABLE, LOST, *map(Missed, Miss))]
        there.calls = [call for call in there.calls if there.pending._calls.get(call.id) is call]
        for n in range(len(there.calls)):
            outcomes += [partial(there.answers, REPLY, n), *(partial(there.misses, miss, n) for miss in Miss)]
            outcomes += [partial(there.fails, error, n) for error in (UNREACHABLE, LOST)]
        return outcomes

    def check(self) -> None:
        """Each message is in one place, and nothing else is anywhere."""
        hub, seeking = self.hub, self.hub._seeking
        waiting = sum(not call.outcomes for call in self.asked) + sum(not outcomes for _, outcomes in self.told)
        self.test.assertEqual(len(hub._pending) + len(seeking), waiting)
        telling = sum(not telling.called for telling in self.elsewhere.telling)
        self.test.assertEqual(len(seeking._searches) + len(self.elsewhere.pending) + telling, len(seeking))
        self.test.assertEqual(hub._pending._max_calls + len(seeking), MAX_CALLS)
        asking = sum(not looking.called for looking in self.look_ups)
        connecting = sum(not connecting.called for _, connecting in self.elsewhere.connecting)
        self.test.assertLessEqual(asking + connecting, len(seeking._searches) + hub._locations._probing)
        self.test.assertFalse(self.test.flushLoggedErrors())

    def end(self) -> None:
        """All deadlines pass; what is only told by others is told."""
        for _ in range(20):
            if "x" in self.edge.claiming:
                self.edge.claimed("x")
            for telling in self.elsewhere.telling:
                fire(telling, None)
            self.advance(5)


def fire(deferred: Deferred[Any], outcome: object) -> None:
    if deferred.called:
        return
    if isinstance(outcome, Exception):
        deferred.errback(outcome)
    else:
        deferred.callback(outcome)


class GeneratedTests(SeekingTestCase):
    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(min_value=0, max_value=99999), min_size=20, max_size=60))
    def test_settled_once(self, acts: list[int]) -> None:
        self.make()
        world = World(self)
        for n in acts:
            world.do(n)
            world.check()
        world.end()
        for outcomes in [call.outcomes for call in world.asked] + [outcomes for _, outcomes in world.told]:
            self.assertEqual(len(outcomes), 1)
        world.check()
        self.assert_nothing_left()
        # Each call is counted once, as what it came to.
        given_up = world.forgotten
        for deferred, (outcome,) in world.told:
            if isinstance(deferred, DeferredCall) and isinstance(outcome, Failure):
                given_up += outcome.check(CancelledError) is not None
        calls, answered, failed = self.counted()
        self.assertEqual(calls, answered + sum(failed.values()) + given_up)
