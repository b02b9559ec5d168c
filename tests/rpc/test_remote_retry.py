"""Tests for :mod:`gateway.rpc.remote`: the node of the next attempt, for calls and notifications."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location
from gateway.rpc.errors import NotDelivered, NotDeliveredError
from gateway.rpc.location_cache import FALLBACK_TIMEOUT, OUTAGE_WINDOW
from gateway.rpc.pending import Reply
from tests.builders.dispatcher import LEASE, RemoteDeliveryTestCase, remote_location, result
from tests.fakes.rpc import RecordingCall

REPLY = Reply(b"1", None)
MOVED = remote_location("third-node", generation=8)
GONE = RegistryUnavailableError("gone")


class RetryPolicyTestCase(RemoteDeliveryTestCase):
    """A call is at the node of the cached location."""

    def setUp(self) -> None:
        super().setUp()
        self.remote_nodes.connected.add("third-node")
        self.remember(remote_location())
        self.call = self.call_remote()

    def retried_at(self) -> list[tuple[Location, bool]]:
        """Return the nodes of all attempts after the first, and whether each was to deliver with an expired lease
        too."""
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

    def test_moved_to_a_node_that_is_not_connected(self) -> None:
        self.remote_nodes.connected.remove("third-node")
        self.not_deliver(MOVED)
        self.remote_nodes.connected.add("third-node")
        self.remote_nodes.connecting[0][1].callback(None)
        self.assert_answered()

    def test_connected_here_meanwhile(self) -> None:
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

    def test_about_to_be_connected_here(self) -> None:
        self.sessions.claiming["x"] = []
        self.not_deliver(remote_location("this-node"))
        self.connect("x", 9)
        self.sessions.finish_claim("x")
        self.assertEqual((len(self.sent("x")), self.registry.queries), (1, []))

    def test_not_connected(self) -> None:
        self.not_deliver(None)
        self.assert_failed(ErrorKind.NOT_CONNECTED)
        self.assertIsNone(self.remembered())

    def test_once(self) -> None:
        """At either node, though the client may have been about to connect there."""
        self.not_deliver(remote_location())
        self.assertEqual(self.retried_at(), [(remote_location(), False)])
        self.not_deliver(MOVED)
        self.assert_failed(ErrorKind.NOT_CONNECTED)
        self.assertEqual((len(self.registry.queries), self.dispatcher._locations.get_expired("x")), (1, None))

    def test_looked_up_afresh(self) -> None:
        """Not by a lookup in progress."""
        self.dispatcher._locations.drop("x")
        self.registry.result = Deferred()
        self.dispatcher.call("x", "m", None).addErrback(lambda failure: None)
        self.not_deliver(MOVED)
        # The other call follows.
        self.assertEqual((self.registry.queries, self.retried_at()), (["x", "x"], [(MOVED, False)] * 2))

    def test_registry_unavailable(self) -> None:
        """There is no point in an attempt at a node that does not have the client."""
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

    def test_reclaimed(self) -> None:
        """By the same node, which has been able to write since."""
        claimed = remote_location(generation=8)
        self.not_deliver(claimed)
        self.assertEqual(self.retried_at(), [(claimed, False)])
        self.assert_answered()

    def test_not_connected(self) -> None:
        self.not_deliver(None)
        self.assert_failed(ErrorKind.NOT_CONNECTED)

    def test_registry_is_available(self) -> None:
        """Then that node must not deliver it with an expired lease."""
        self.not_deliver(remote_location(live=False))
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE)
        self.assertEqual(self.retried_at(), [])
        self.assertIn("could not renew its lease", self.error_of(self.call).detail or "")

    def test_lease_is_valid_again(self) -> None:
        self.not_deliver(remote_location())
        self.assertEqual(self.retried_at(), [(remote_location(), False)])
        self.assert_answered()

    def test_lease_is_valid_again_and_lost_again(self) -> None:
        self.not_deliver(remote_location())
        self.not_deliver(remote_location())
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE)

    def test_registry_unavailable(self) -> None:
        self.not_deliver(GONE)
        self.assertEqual(self.retried_at(), [(remote_location(), True)])
        self.assert_answered()

    def test_registry_hangs(self) -> None:
        self.not_deliver(Deferred())
        self.clock.advance(FALLBACK_TIMEOUT)
        self.assertEqual(self.retried_at(), [(remote_location(), True)])
        self.assert_answered()

    def test_own_lease_has_expired_too(self) -> None:
        """A registry that accepts no heartbeats counts as unavailable, though lookups succeed."""
        self.membership.lease_held = False
        self.not_deliver(remote_location(live=False))
        self.assertEqual(self.retried_at(), [(remote_location(live=False), True)])
        self.assert_answered()

    def test_while_the_registry_stays_unavailable(self) -> None:
        """The first call does not drop the location, and the next ones are sent at once."""
        self.not_deliver(GONE)
        self.assert_answered()
        for _ in range(5):
            self.call_remote()
            self.assertEqual(self.retried_at()[-1], (remote_location(), True))
            self.remote_nodes.reply(REPLY)
            self.clock.advance(OUTAGE_WINDOW / 5)

    def test_lease_lost_and_not_here(self) -> None:
        """Each reason has one further attempt."""
        self.not_deliver(GONE)
        self.registry.result = MOVED
        self.remote_nodes.not_deliver(NotDelivered.NOT_HERE)
        self.assertEqual(self.retried_at(), [(remote_location(), True), (MOVED, False)])
        self.remote_nodes.not_deliver(NotDelivered.LEASE_LOST)
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE)


class UnreachableTests(RetryPolicyTestCase):
    """The node received nothing: connecting failed, or the request was not sent."""

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

    def test_both_unreachable(self) -> None:
        self.remote_nodes.connected.clear()
        self.unreachable(MOVED)
        self.assert_failed(ErrorKind.NODE_UNREACHABLE)
        self.assertEqual(self.registry.queries, ["x"])

    def test_same_node(self) -> None:
        self.unreachable(remote_location())
        self.assert_failed(ErrorKind.NODE_UNREACHABLE)

    def test_same_node_with_an_expired_lease(self) -> None:
        self.unreachable(remote_location(live=False))
        self.assert_failed(ErrorKind.NOT_CONNECTED)

    def test_same_node_with_an_expired_lease_while_unstable(self) -> None:
        self.membership.stable = False
        self.unreachable(remote_location(live=False))
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE)

    def test_not_connected(self) -> None:
        self.unreachable(None)
        self.assert_failed(ErrorKind.NOT_CONNECTED)

    def test_registry_unavailable(self) -> None:
        """The location is kept for the next call, as there is no better one."""
        self.unreachable(GONE)
        self.assert_failed(ErrorKind.NODE_UNREACHABLE)
        self.remote_nodes.connected.add("other-node")
        self.call_remote()

    def test_deadline(self) -> None:
        self.unreachable(Deferred())
        self.clock.advance(5.05)
        self.assert_failed(ErrorKind.NODE_UNREACHABLE)


class FirstLookupTests(RemoteDeliveryTestCase):
    def both(self) -> list[Deferred[Any]]:
        return [self.dispatcher.call("x", "m", None), self.dispatcher.notify("x", "m", None)]

    def test_expired_lease(self) -> None:
        self.registry.result = remote_location(live=False)
        for notified in self.both():
            self.assertEqual(self.error_of(notified).kind, ErrorKind.NOT_CONNECTED)
        self.assertEqual((self.remote_nodes.requests, self.remote_nodes.notifications), ([], []))

    def test_expired_lease_while_unstable(self) -> None:
        """Its node is tried."""
        self.membership.stable = False
        self.registry.result = remote_location(live=False)
        call, notified = self.both()
        self.remote_nodes.reply(REPLY)
        self.remote_nodes.notifying[0].callback(None)
        self.assertEqual((self.successResultOf(call), self.successResultOf(notified)), (REPLY, None))

    def test_expired_lease_and_lease_lost(self) -> None:
        self.membership.stable = False
        self.registry.result = remote_location(live=False)
        call, notified = self.both()
        self.remote_nodes.not_deliver(NotDelivered.LEASE_LOST)
        self.remote_nodes.notifying[0].errback(NotDeliveredError(NotDelivered.LEASE_LOST))
        # The registry was unavailable until just now, and still has the same claim: its lease does not matter.
        self.assertEqual(
            [asked[4] for asked in self.remote_nodes.requests + self.remote_nodes.notifications], [False, True] * 2
        )
        self.remote_nodes.not_deliver(NotDelivered.LEASE_LOST)
        self.remote_nodes.notifying[1].errback(NotDeliveredError(NotDelivered.LEASE_LOST))
        for each in (call, notified):
            self.assertEqual(self.error_of(each).kind, ErrorKind.REGISTRY_UNAVAILABLE)
        self.assert_nothing_left()

    def test_expired_lease_and_unreachable(self) -> None:
        self.membership.stable = False
        self.registry.result = remote_location(live=False)
        self.remote_nodes.connected.clear()
        self.remote_nodes.connect_result = lambda location: fail(RpcError(ErrorKind.NODE_UNREACHABLE, "x", sent=False))
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual((error.kind, error.sent), (ErrorKind.REGISTRY_UNAVAILABLE, False))
        self.assertIn("not known yet", error.detail or "")

    def test_expired_location_while_the_registry_is_unavailable(self) -> None:
        self.remember(remote_location())
        self.clock.advance(LEASE)
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))
        self.registry.result = GONE
        call, notified = self.both()
        self.remote_nodes.reply(REPLY)
        self.remote_nodes.notifying[0].callback(None)
        self.successResultOf(call)
        self.successResultOf(notified)
        self.assertEqual(
            [asked[-1] for asked in self.remote_nodes.requests + self.remote_nodes.notifications], [True, True]
        )
        # From now on without waiting.
        self.call_remote()

    def test_expired_location_while_the_registry_hangs(self) -> None:
        """The deadline is not spent waiting for it."""
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
