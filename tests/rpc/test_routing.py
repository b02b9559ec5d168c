"""Tests for :mod:`gateway.rpc.remote`: where a client is asked next, as calls and notifications find it."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail

from gateway.protocol.errors import Kind, RpcError
from gateway.registry.interface import Location, RegistryUnavailable
from gateway.rpc.interface import Miss, Missed
from gateway.rpc.location_cache import AWAY, PATIENCE
from gateway.rpc.pending import Reply
from tests.rpc.fakes import LEASE, SeekingTestCase, Told, elsewhere, result

REPLY = Reply(b"1", None)
MOVED = elsewhere("third-node", generation=8)
GONE = RegistryUnavailable("gone")


class RoutingTestCase(SeekingTestCase):
    """A call is at the node where the client is remembered to be."""

    def setUp(self) -> None:
        super().setUp()
        self.elsewhere.open.add("third-node")
        self.know(elsewhere())
        self.call = self.asked_there()

    def asked(self) -> list[tuple[Location, bool]]:
        """Where it was asked since the first time, and whether whatever the lease."""
        return [(location, stale) for location, _, _, _, stale in self.elsewhere.asked[1:]]

    def assert_answered(self) -> None:
        self.elsewhere.answers(REPLY)
        self.assertEqual((self.call.outcomes, self.counted()), ([REPLY], (1, 1, {})))
        self.assert_nothing_left()

    def assert_failed(self, kind: Kind) -> None:
        error = self.error_of(self.call)
        self.assertEqual((error.kind, error.client_id, error.sent), (kind, "x", False))
        self.assertEqual(self.counted(), (1, 0, {str(kind.value.code): 1}))
        self.assert_nothing_left()


class NotHereTests(RoutingTestCase):
    def misses(self, outcome: Any) -> None:
        self.registry.outcome = outcome
        self.elsewhere.misses(Miss.NOT_HERE)

    def test_moved(self) -> None:
        self.clock.advance(2)
        self.misses(MOVED)
        self.assertEqual((self.registry.asked, self.asked()), (["x"], [(MOVED, False)]))
        self.assertEqual(self.elsewhere.asked[1][1:4], ("m", b"[1]", 3.0))
        self.assertEqual(self.remembered(), MOVED)
        self.assert_answered()

    def test_to_a_node_without_a_link(self) -> None:
        self.elsewhere.open.remove("third-node")
        self.misses(MOVED)
        self.elsewhere.open.add("third-node")
        self.elsewhere.connecting[0][1].callback(None)
        self.assert_answered()

    def test_it_is_here_by_now(self) -> None:
        for outcome in (None, elsewhere("this-node")):
            self.registry.outcome = found = Deferred()
            self.elsewhere.misses(Miss.NOT_HERE)
            self.connect("x", 9)
            found.callback(outcome)
            (request,) = self.sent("x")
            self.receive("x", result(request["id"]), 9)
            self.assertEqual(self.call.outcomes, [REPLY])
            self.disconnect("x")
            self.know(elsewhere())
            self.call = self.asked_there()
        self.elsewhere.answers(REPLY)
        self.assertEqual(self.counted(), (3, 3, {}))
        self.assert_nothing_left()

    def test_it_is_about_to_be_here(self) -> None:
        self.edge.claiming["x"] = []
        self.misses(elsewhere("this-node"))
        self.connect("x", 9)
        self.edge.claimed("x")
        self.assertEqual((len(self.sent("x")), self.registry.asked), (1, []))

    def test_nowhere(self) -> None:
        self.misses(None)
        self.assert_failed(Kind.NOT_CONNECTED)
        self.assertIsNone(self.remembered())

    def test_once(self) -> None:
        """Wherever that is: it may have been about to be open there."""
        self.misses(elsewhere())
        self.assertEqual(self.asked(), [(elsewhere(), False)])
        self.misses(MOVED)
        self.assert_failed(Kind.NOT_CONNECTED)
        self.assertEqual((len(self.registry.asked), self.hub._locations.older("x")), (1, None))

    def test_looked_up_afresh(self) -> None:
        """Not by a question that may have been answered before."""
        self.hub._locations.drop("x")
        self.registry.outcome = Deferred()
        self.hub.call("x", "m", None).addErrback(lambda failure: None)
        self.misses(MOVED)
        self.assertEqual((self.registry.asked, self.asked()), (["x", "x"], [(MOVED, False)]))

    def test_registry_away(self) -> None:
        """Nothing is better than to ask where it is not."""
        self.misses(GONE)
        self.assert_failed(Kind.REGISTRY_UNAVAILABLE)

    def test_deadline(self) -> None:
        self.misses(Deferred())
        self.clock.advance(5.05)
        self.assert_failed(Kind.REGISTRY_UNAVAILABLE)


class LeaseLostTests(RoutingTestCase):
    def misses(self, outcome: Any) -> None:
        self.registry.outcome = outcome
        self.elsewhere.misses(Miss.LEASE_LOST)

    def test_moved(self) -> None:
        self.misses(MOVED)
        self.assertEqual(self.asked(), [(MOVED, False)])
        self.assert_answered()

    def test_claimed_again(self) -> None:
        """By the same node, which has been able to write since."""
        claimed = elsewhere(generation=8)
        self.misses(claimed)
        self.assertEqual(self.asked(), [(claimed, False)])
        self.assert_answered()

    def test_nowhere(self) -> None:
        self.misses(None)
        self.assert_failed(Kind.NOT_CONNECTED)

    def test_the_registry_answers(self) -> None:
        """Then it is not for that node to say."""
        self.misses(elsewhere(live=False))
        self.assert_failed(Kind.REGISTRY_UNAVAILABLE)
        self.assertEqual(self.asked(), [])
        self.assertIn("could not renew its lease", self.error_of(self.call).detail or "")

    def test_its_lease_is_back(self) -> None:
        self.misses(elsewhere())
        self.assertEqual(self.asked(), [(elsewhere(), False)])
        self.assert_answered()

    def test_its_lease_is_back_and_lost_again(self) -> None:
        self.misses(elsewhere())
        self.misses(elsewhere())
        self.assert_failed(Kind.REGISTRY_UNAVAILABLE)

    def test_the_registry_is_away(self) -> None:
        self.misses(GONE)
        self.assertEqual(self.asked(), [(elsewhere(), True)])
        self.assert_answered()

    def test_the_registry_hangs(self) -> None:
        self.misses(Deferred())
        self.clock.advance(PATIENCE)
        self.assertEqual(self.asked(), [(elsewhere(), True)])
        self.assert_answered()

    def test_this_node_cannot_renew_its_lease_either(self) -> None:
        """A registry that takes no heartbeats is away, though it is still there."""
        self.leased = False
        self.misses(elsewhere(live=False))
        self.assertEqual(self.asked(), [(elsewhere(live=False), True)])
        self.assert_answered()

    def test_while_the_registry_stays_away(self) -> None:
        """The location is not lost with the first call, and the next ones go at once."""
        self.misses(GONE)
        self.assert_answered()
        for _ in range(5):
            self.asked_there()
            self.assertEqual(self.asked()[-1], (elsewhere(), True))
            self.elsewhere.answers(REPLY)
            self.clock.advance(AWAY / 5)

    def test_and_it_was_not_here_either(self) -> None:
        """Each is tried once."""
        self.misses(GONE)
        self.registry.outcome = MOVED
        self.elsewhere.misses(Miss.NOT_HERE)
        self.assertEqual(self.asked(), [(elsewhere(), True), (MOVED, False)])
        self.elsewhere.misses(Miss.LEASE_LOST)
        self.assert_failed(Kind.REGISTRY_UNAVAILABLE)


class UnreachableTests(RoutingTestCase):
    """Nothing reached the node: no link can be made, or what was sent has not left."""

    def setUp(self) -> None:
        super().setUp()
        self.error = RpcError(Kind.NODE_UNREACHABLE, "x", sent=False)
        self.elsewhere.connects = lambda location: fail(self.error)
        self.elsewhere.open.remove("other-node")

    def unreachable(self, outcome: Any) -> None:
        self.registry.outcome = outcome
        self.elsewhere.fails(self.error)

    def test_moved(self) -> None:
        self.unreachable(MOVED)
        self.assertEqual(self.asked(), [(MOVED, False)])
        self.assert_answered()

    def test_both(self) -> None:
        self.elsewhere.open.clear()
        self.unreachable(MOVED)
        self.assert_failed(Kind.NODE_UNREACHABLE)
        self.assertEqual(self.registry.asked, ["x"])

    def test_the_same(self) -> None:
        self.unreachable(elsewhere())
        self.assert_failed(Kind.NODE_UNREACHABLE)

    def test_the_same_whose_lease_is_out(self) -> None:
        self.unreachable(elsewhere(live=False))
        self.assert_failed(Kind.NOT_CONNECTED)

    def test_the_same_of_which_nothing_can_be_told(self) -> None:
        self.steady = False
        self.unreachable(elsewhere(live=False))
        self.assert_failed(Kind.REGISTRY_UNAVAILABLE)

    def test_nowhere(self) -> None:
        self.unreachable(None)
        self.assert_failed(Kind.NOT_CONNECTED)

    def test_registry_away(self) -> None:
        """The location is kept for the next call, as there is no better one."""
        self.unreachable(GONE)
        self.assert_failed(Kind.NODE_UNREACHABLE)
        self.elsewhere.open.add("other-node")
        self.asked_there()

    def test_deadline(self) -> None:
        self.unreachable(Deferred())
        self.clock.advance(5.05)
        self.assert_failed(Kind.NODE_UNREACHABLE)


class FirstLookUpTests(SeekingTestCase):
    def both(self) -> list[Deferred[Any]]:
        return [self.hub.call("x", "m", None), self.hub.notify("x", "m", None)]

    def test_a_lease_that_is_out(self) -> None:
        self.registry.outcome = elsewhere(live=False)
        for told in self.both():
            self.assertEqual(self.error_of(told).kind, Kind.NOT_CONNECTED)
        self.assertEqual((self.elsewhere.asked, self.elsewhere.told), ([], []))

    def test_a_lease_of_which_nothing_can_be_told(self) -> None:
        """Its node is tried."""
        self.steady = False
        self.registry.outcome = elsewhere(live=False)
        call, told = self.both()
        self.elsewhere.answers(REPLY)
        self.elsewhere.telling[0].callback(None)
        self.assertEqual((self.successResultOf(call), self.successResultOf(told)), (REPLY, None))

    def test_such_a_node_cannot_tell_either(self) -> None:
        self.steady = False
        self.registry.outcome = elsewhere(live=False)
        call, told = self.both()
        self.elsewhere.misses(Miss.LEASE_LOST)
        self.elsewhere.telling[0].errback(Missed(Miss.LEASE_LOST))
        # The registry was away until just now, and still names the same claim: it is asked whatever its lease.
        self.assertEqual([asked[4] for asked in self.elsewhere.asked + self.elsewhere.told], [False, True] * 2)
        self.elsewhere.misses(Miss.LEASE_LOST)
        self.elsewhere.telling[1].errback(Missed(Miss.LEASE_LOST))
        for each in (call, told):
            self.assertEqual(self.error_of(each).kind, Kind.REGISTRY_UNAVAILABLE)
        self.assert_nothing_left()

    def test_such_a_node_cannot_be_reached(self) -> None:
        self.steady = False
        self.registry.outcome = elsewhere(live=False)
        self.elsewhere.open.clear()
        self.elsewhere.connects = lambda location: fail(RpcError(Kind.NODE_UNREACHABLE, "x", sent=False))
        error = self.error_of(self.hub.call("x", "m", None))
        self.assertEqual((error.kind, error.sent), (Kind.REGISTRY_UNAVAILABLE, False))
        self.assertIn("cannot be told yet", error.detail or "")

    def test_an_older_location_while_the_registry_is_away(self) -> None:
        self.know(elsewhere())
        self.clock.advance(LEASE)
        self.assertFalse(self.hub.ask(Told(), "x", "m", None))
        self.registry.outcome = GONE
        call, told = self.both()
        self.elsewhere.answers(REPLY)
        self.elsewhere.telling[0].callback(None)
        self.successResultOf(call)
        self.successResultOf(told)
        self.assertEqual([asked[-1] for asked in self.elsewhere.asked + self.elsewhere.told], [True, True])
        # From now on at once.
        self.asked_there()

    def test_an_older_location_while_the_registry_hangs(self) -> None:
        """The deadline is not spent on waiting for it."""
        for timeout, wait in ((30.0, PATIENCE), (0.4, 0.2)):
            self.know(elsewhere())
            self.clock.advance(LEASE)
            self.registry.outcome = Deferred()
            call = self.hub.call("x", "m", None, timeout)
            self.clock.advance(wait - 0.01)
            self.assertEqual(self.elsewhere.calls, [])
            self.clock.advance(0.02)
            self.elsewhere.answers(REPLY)
            self.successResultOf(call)
            self.clock.advance(AWAY)
        self.assert_nothing_left()

    def test_the_registry_answers_in_time(self) -> None:
        self.know(elsewhere())
        self.clock.advance(LEASE)
        self.registry.outcome = found = Deferred()
        self.hub.call("x", "m", None)
        self.clock.advance(PATIENCE - 0.01)
        found.callback(MOVED)
        self.assertEqual(self.elsewhere.connecting[0][0], MOVED)
