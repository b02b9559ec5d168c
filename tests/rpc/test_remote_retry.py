"""Tests for :mod:`gateway.rpc.remote`: where a client is asked next, as calls and notifications find it."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location
from gateway.rpc.errors import NotDelivered, NotDeliveredError
from gateway.rpc.location_cache import FALLBACK_TIMEOUT, OUTAGE_WINDOW
from gateway.rpc.pending import Reply
from tests.fakes.rpc import LEASE, RecordingCall, RemoteDeliveryTestCase, remote_location, result

REPLY = Reply(b"1", None)
MOVED = remote_location("third-node", generation=8)
GONE = RegistryUnavailableError("gone")


class RetryPolicyTestCase(RemoteDeliveryTestCase):
    """A call is at the node where the client is remembered to be."""

    def setUp(self) -> None:
        super().setUp()
        self.remote_nodes.connected.add("third-node")
        self.remember(remote_location())
        self.call = self.call_remote()

    def retried_at(self) -> list[tuple[Location, bool]]:
        """Where it was asked since the first time, and whether whatever the lease."""
        return [(location, stale) for location, _, _, _, stale in self.remote_nodes.requests[1:]]

    def assert_answered(self) -> None:
        self.remote_nodes.reply(REPLY)
        self.assertEqual((self.call.results, self.call_counts()), ([REPLY], (1, 1, {})))
        self.assert_nothing_left()

    def assert_failed(self, kind: ErrorKind) -> None:
        error = self.error_of(self.call)
        self.assertEqual((error.kind, error.client_id, error.sent), (kind, "x", False))
        self.assertEqual(self.call_counts(), (1, 0, {str(kind.value.code): 1}))
        self.assert_nothing_left()


class NotHereTests(RetryPolicyTestCase):
    def not_deliver(self, lookup_result: Any) -> None:
        self.registry.result = lookup_result
        self.remote_nodes.not_deliver(NotDelivered.NOT_HERE)

    def test_moved(self) -> None:
        self.clock.advance(2)
        self.not_deliver(MOVED)
        self.assertEqual((self.registry.queries, self.retried_at()), (["x"], [(MOVED, False)]))
        self.assertEqual(self.remote_nodes.requests[1][1:4], ("m", b"[1]", 3.0))
        self.assertEqual(self.remembered(), MOVED)
        self.assert_answered()

    def test_to_a_node_without_a_link(self) -> None:
        self.remote_nodes.connected.remove("third-node")
        self.not_deliver(MOVED)
        self.remote_nodes.connected.add("third-node")
        self.remote_nodes.connecting[0][1].callback(None)
        self.assert_answered()

    def test_it_is_here_by_now(self) -> None:
        for outcome in (None, remote_location("this-node")):
            self.registry.result = found = Deferred()
            self.remote_nodes.not_deliver(NotDelivered.NOT_HERE)
            self.connect("x", 9)
            found.callback(outcome)
            (request,) = self.sent("x")
            self.receive("x", result(request["id"]), 9)
            self.assertEqual(self.call.results, [REPLY])
            self.disconnect("x")
            self.remember(remote_location())
            self.call = self.call_remote()
        self.remote_nodes.reply(REPLY)
        self.assertEqual(self.call_counts(), (3, 3, {}))
        self.assert_nothing_left()

    def test_it_is_about_to_be_here(self) -> None:
        self.sessions.claiming["x"] = []
        self.not_deliver(remote_location("this-node"))
        self.connect("x", 9)
        self.sessions.finish_claim("x")
        self.assertEqual((len(self.sent("x")), self.registry.queries), (1, []))

    def test_nowhere(self) -> None:
        self.not_deliver(None)
        self.assert_failed(ErrorKind.NOT_CONNECTED)
        self.assertIsNone(self.remembered())

    def test_once(self) -> None:
        """Wherever that is: it may have been about to be open there."""
        self.not_deliver(remote_location())
        self.assertEqual(self.retried_at(), [(remote_location(), False)])
        self.not_deliver(MOVED)
        self.assert_failed(ErrorKind.NOT_CONNECTED)
        self.assertEqual((len(self.registry.queries), self.dispatcher._locations.get_expired("x")), (1, None))

    def test_looked_up_afresh(self) -> None:
        """Not by a question that may have been answered before."""
        self.dispatcher._locations.drop("x")
        self.registry.result = Deferred()
        self.dispatcher.call("x", "m", None).addErrback(lambda failure: None)
        self.not_deliver(MOVED)
        self.assertEqual((self.registry.queries, self.retried_at()), (["x", "x"], [(MOVED, False)]))

    def test_registry_away(self) -> None:
        """Nothing is better than to ask where it is not."""
        self.not_deliver(GONE)
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE)

    def test_deadline(self) -> None:
        self.not_deliver(Deferred())
        self.clock.advance(5.05)
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE)


class LeaseLostTests(RetryPolicyTestCase):
    def not_deliver(self, lookup_result: Any) -> None:
        self.registry.result = lookup_result
        self.remote_nodes.not_deliver(NotDelivered.LEASE_LOST)

    def test_moved(self) -> None:
        self.not_deliver(MOVED)
        self.assertEqual(self.retried_at(), [(MOVED, False)])
        self.assert_answered()

    def test_claimed_again(self) -> None:
        """By the same node, which has been able to write since."""
        claimed = remote_location(generation=8)
        self.not_deliver(claimed)
        self.assertEqual(self.retried_at(), [(claimed, False)])
        self.assert_answered()

    def test_nowhere(self) -> None:
        self.not_deliver(None)
        self.assert_failed(ErrorKind.NOT_CONNECTED)

    def test_the_registry_answers(self) -> None:
        """Then it is not for that node to say."""
        self.not_deliver(remote_location(live=False))
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE)
        self.assertEqual(self.retried_at(), [])
        self.assertIn("could not renew its lease", self.error_of(self.call).detail or "")

    def test_its_lease_is_back(self) -> None:
        self.not_deliver(remote_location())
        self.assertEqual(self.retried_at(), [(remote_location(), False)])
        self.assert_answered()

    def test_its_lease_is_back_and_lost_again(self) -> None:
        self.not_deliver(remote_location())
        self.not_deliver(remote_location())
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE)

    def test_the_registry_is_away(self) -> None:
        self.not_deliver(GONE)
        self.assertEqual(self.retried_at(), [(remote_location(), True)])
        self.assert_answered()

    def test_the_registry_hangs(self) -> None:
        self.not_deliver(Deferred())
        self.clock.advance(FALLBACK_TIMEOUT)
        self.assertEqual(self.retried_at(), [(remote_location(), True)])
        self.assert_answered()

    def test_this_node_cannot_renew_its_lease_either(self) -> None:
        """A registry that takes no heartbeats is away, though it is still there."""
        self.membership.lease_held = False
        self.not_deliver(remote_location(live=False))
        self.assertEqual(self.retried_at(), [(remote_location(live=False), True)])
        self.assert_answered()

    def test_while_the_registry_stays_away(self) -> None:
        """The location is not lost with the first call, and the next ones go at once."""
        self.not_deliver(GONE)
        self.assert_answered()
        for _ in range(5):
            self.call_remote()
            self.assertEqual(self.retried_at()[-1], (remote_location(), True))
            self.remote_nodes.reply(REPLY)
            self.clock.advance(OUTAGE_WINDOW / 5)

    def test_and_it_was_not_here_either(self) -> None:
        """Each is tried once."""
        self.not_deliver(GONE)
        self.registry.result = MOVED
        self.remote_nodes.not_deliver(NotDelivered.NOT_HERE)
        self.assertEqual(self.retried_at(), [(remote_location(), True), (MOVED, False)])
        self.remote_nodes.not_deliver(NotDelivered.LEASE_LOST)
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE)


class UnreachableTests(RetryPolicyTestCase):
    """Nothing reached the node: no link can be made, or what was sent has not left."""

    def setUp(self) -> None:
        super().setUp()
        self.error = RpcError(ErrorKind.NODE_UNREACHABLE, "x", sent=False)
        self.remote_nodes.connect_result = lambda location: fail(self.error)
        self.remote_nodes.connected.remove("other-node")

    def unreachable(self, outcome: Any) -> None:
        self.registry.result = outcome
        self.remote_nodes.fail(self.error)

    def test_moved(self) -> None:
        self.unreachable(MOVED)
        self.assertEqual(self.retried_at(), [(MOVED, False)])
        self.assert_answered()

    def test_both(self) -> None:
        self.remote_nodes.connected.clear()
        self.unreachable(MOVED)
        self.assert_failed(ErrorKind.NODE_UNREACHABLE)
        self.assertEqual(self.registry.queries, ["x"])

    def test_the_same(self) -> None:
        self.unreachable(remote_location())
        self.assert_failed(ErrorKind.NODE_UNREACHABLE)

    def test_the_same_whose_lease_is_out(self) -> None:
        self.unreachable(remote_location(live=False))
        self.assert_failed(ErrorKind.NOT_CONNECTED)

    def test_the_same_of_which_nothing_can_be_told(self) -> None:
        self.membership.stable = False
        self.unreachable(remote_location(live=False))
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE)

    def test_nowhere(self) -> None:
        self.unreachable(None)
        self.assert_failed(ErrorKind.NOT_CONNECTED)

    def test_registry_away(self) -> None:
        """The location is kept for the next call, as there is no better one."""
        self.unreachable(GONE)
        self.assert_failed(ErrorKind.NODE_UNREACHABLE)
        self.remote_nodes.connected.add("other-node")
        self.call_remote()

    def test_deadline(self) -> None:
        self.unreachable(Deferred())
        self.clock.advance(5.05)
        self.assert_failed(ErrorKind.NODE_UNREACHABLE)


class FirstLookUpTests(RemoteDeliveryTestCase):
    def both(self) -> list[Deferred[Any]]:
        return [self.dispatcher.call("x", "m", None), self.dispatcher.notify("x", "m", None)]

    def test_a_lease_that_is_out(self) -> None:
        self.registry.result = remote_location(live=False)
        for told in self.both():
            self.assertEqual(self.error_of(told).kind, ErrorKind.NOT_CONNECTED)
        self.assertEqual((self.remote_nodes.requests, self.remote_nodes.notifications), ([], []))

    def test_a_lease_of_which_nothing_can_be_told(self) -> None:
        """Its node is tried."""
        self.membership.stable = False
        self.registry.result = remote_location(live=False)
        call, told = self.both()
        self.remote_nodes.reply(REPLY)
        self.remote_nodes.notifying[0].callback(None)
        self.assertEqual((self.successResultOf(call), self.successResultOf(told)), (REPLY, None))

    def test_such_a_node_cannot_tell_either(self) -> None:
        self.membership.stable = False
        self.registry.result = remote_location(live=False)
        call, told = self.both()
        self.remote_nodes.not_deliver(NotDelivered.LEASE_LOST)
        self.remote_nodes.notifying[0].errback(NotDeliveredError(NotDelivered.LEASE_LOST))
        # The registry was away until just now, and still names the same claim: it is asked whatever its lease.
        self.assertEqual(
            [asked[4] for asked in self.remote_nodes.requests + self.remote_nodes.notifications], [False, True] * 2
        )
        self.remote_nodes.not_deliver(NotDelivered.LEASE_LOST)
        self.remote_nodes.notifying[1].errback(NotDeliveredError(NotDelivered.LEASE_LOST))
        for each in (call, told):
            self.assertEqual(self.error_of(each).kind, ErrorKind.REGISTRY_UNAVAILABLE)
        self.assert_nothing_left()

    def test_such_a_node_cannot_be_reached(self) -> None:
        self.membership.stable = False
        self.registry.result = remote_location(live=False)
        self.remote_nodes.connected.clear()
        self.remote_nodes.connect_result = lambda location: fail(RpcError(ErrorKind.NODE_UNREACHABLE, "x", sent=False))
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual((error.kind, error.sent), (ErrorKind.REGISTRY_UNAVAILABLE, False))
        self.assertIn("cannot be told yet", error.detail or "")

    def test_an_older_location_while_the_registry_is_away(self) -> None:
        self.remember(remote_location())
        self.clock.advance(LEASE)
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))
        self.registry.result = GONE
        call, told = self.both()
        self.remote_nodes.reply(REPLY)
        self.remote_nodes.notifying[0].callback(None)
        self.successResultOf(call)
        self.successResultOf(told)
        self.assertEqual(
            [asked[-1] for asked in self.remote_nodes.requests + self.remote_nodes.notifications], [True, True]
        )
        # From now on at once.
        self.call_remote()

    def test_an_older_location_while_the_registry_hangs(self) -> None:
        """The deadline is not spent on waiting for it."""
        for timeout, wait in ((30.0, FALLBACK_TIMEOUT), (0.4, 0.2)):
            self.remember(remote_location())
            self.clock.advance(LEASE)
            self.registry.result = Deferred()
            call = self.dispatcher.call("x", "m", None, timeout)
            self.clock.advance(wait - 0.01)
            self.assertEqual(self.remote_nodes.calls, [])
            self.clock.advance(0.02)
            self.remote_nodes.reply(REPLY)
            self.successResultOf(call)
            self.clock.advance(OUTAGE_WINDOW)
        self.assert_nothing_left()

    def test_the_registry_answers_in_time(self) -> None:
        self.remember(remote_location())
        self.clock.advance(LEASE)
        self.registry.result = found = Deferred()
        self.dispatcher.call("x", "m", None)
        self.clock.advance(FALLBACK_TIMEOUT - 0.01)
        found.callback(MOVED)
        self.assertEqual(self.remote_nodes.connecting[0][0], MOVED)
