"""Tests for :mod:`gateway.rpc.remote`: calls to clients that other nodes hold.

Tests for :mod:`gateway.rpc.remote`: notifications to clients that other nodes hold.

Calls to clients of this node that were told to go to another one.

Tests for :mod:`gateway.rpc.remote`: a node that may have lost its clients without a word asks before it calls them.
"""

from __future__ import annotations

import json
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location
from gateway.rpc.errors import NotDelivered, NotDeliveredError
from gateway.rpc.handoff import HANDOFF_TIMEOUT
from gateway.rpc.location_cache import FALLBACK_TIMEOUT
from gateway.rpc.pending import Call, Reply
from tests.fakes.rpc import LEASE, RecordingCall, RemoteDeliveryTestCase, remote_location, result

REPLY = Reply(b"1", None)
UNREACHABLE = RpcError(ErrorKind.NODE_UNREACHABLE, "x", sent=False)


class TryCallTests(RemoteDeliveryTestCase):
    """A location is remembered, and the link is open."""

    def setUp(self) -> None:
        super().setUp()
        self.remember(remote_location())

    def test_answered(self) -> None:
        call = self.call_remote()
        self.assertEqual(self.remote_nodes.requests, [(remote_location(), "m", b"[1]", 5.0, False)])
        self.assertEqual((call.results, self.dispatcher.calls_in_flight()), ([], 1))
        self.remote_nodes.reply(REPLY)
        self.assertEqual((call.results, self.call_counts()), ([REPLY], (1, 1, {})))
        self.assertEqual(self.registry.queries, [])
        self.assert_nothing_left()

    def test_error_of_the_client(self) -> None:
        reply = Reply(None, b'{"code":1,"message":"no"}')
        call = self.call_remote()
        self.remote_nodes.reply(reply)
        self.assertEqual((call.results, self.call_counts()), ([reply], (1, 1, {})))

    def test_as_a_deferred(self) -> None:
        call = self.dispatcher.call("x", "m", None)
        self.assertEqual(self.remote_nodes.requests, [(remote_location(), "m", None, 30.0, False)])
        self.remote_nodes.reply(REPLY)
        self.assertEqual((self.successResultOf(call), self.call_counts()), (REPLY, (1, 1, {})))

    def test_timeout_is_clamped(self) -> None:
        self.dispatcher.try_call(RecordingCall(), "x", "m", None, 1e9)
        self.assertEqual(self.remote_nodes.requests[0][3], 300.0)

    def test_failed(self) -> None:
        """What the node says, or what becomes of the link, is passed on."""
        for kind, sent in (
            (ErrorKind.TIMEOUT, True),
            (ErrorKind.CONNECTION_LOST, True),
            (ErrorKind.NODE_UNREACHABLE, True),
            (ErrorKind.TOO_MANY_CALLS, False),
        ):
            self.remember(remote_location())
            call = self.call_remote()
            error = RpcError(kind, "x", sent=sent, detail="why")
            self.remote_nodes.fail(error)
            self.assertIs(self.error_of(call), error)
            # Where the client is may no longer be true.
            doubted = kind in (ErrorKind.CONNECTION_LOST, ErrorKind.NODE_UNREACHABLE)
            self.assertEqual(self.remembered(), None if doubted else remote_location())
        codes = {"-32002": 1, "-32003": 1, "-32004": 1, "-32005": 1}
        self.assertEqual(self.call_counts(), (4, 0, codes))
        self.assert_nothing_left()

    def test_not_possible_at_once(self) -> None:
        """Nothing is done."""
        self.remote_nodes.connected.clear()
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "y", "m", None))
        self.clock.advance(LEASE)
        self.remote_nodes.connected.add("other-node")
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))
        self.dispatcher = self.make_dispatcher(1024, None)
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))
        self.assertEqual((self.call_counts(), self.registry.queries, self.remote_nodes.requests), ((0, 0, {}), [], []))
        self.assert_nothing_left()

    def test_refused(self) -> None:
        for ask in (self.dispatcher.try_call, lambda call, *args: self.dispatcher._remote.call(call, *args, 5.0)):
            for method, kind in (("gateway.x", ErrorKind.INVALID_REQUEST), ("m" * 2000, ErrorKind.TOO_LARGE)):
                with self.assertRaises(RpcError) as caught:
                    ask(RecordingCall(), "x", method, None)
                self.assertEqual((caught.exception.kind, caught.exception.sent), (kind, False))
        self.assertEqual(self.call_counts(), (4, 0, {"-32600": 2, "-32006": 2}))
        self.assertEqual(self.remote_nodes.requests, [])
        self.assert_nothing_left()

    def test_this_node_is_going_away(self) -> None:
        """What is in flight goes on; clients that are here are called all the same."""
        self.dispatcher.try_call(RecordingCall(), "x", "m", None)
        self.dispatcher.refuse_new_calls()
        for client_id in ("x", "z"):
            error = self.error_of(self.dispatcher.call(client_id, "m", None))
            self.assertEqual((error.kind, error.sent), (ErrorKind.NODE_UNREACHABLE, False))
            error = self.error_of(self.dispatcher.notify(client_id, "m", None))
            self.assertEqual((error.kind, error.sent), (ErrorKind.NODE_UNREACHABLE, False))
        self.connect("y")
        self.assertTrue(self.dispatcher.try_call(RecordingCall(), "y", "m", None))
        self.assertEqual(self.dispatcher.calls_in_flight(), 2)

    def test_too_many(self) -> None:
        """On this node, with those to clients that are here; and on the link."""
        self.connect("y")
        for _ in range(4):
            self.dispatcher.try_call(RecordingCall(), "y", "m", None)
            self.call_remote()
        for client_id in ("x", "y"):
            with self.assertRaises(RpcError) as caught:
                self.dispatcher.try_call(RecordingCall(), client_id, "m", None)
            self.assertEqual(caught.exception.kind, ErrorKind.TOO_MANY_CALLS)
        self.assertEqual(self.error_of(self.dispatcher.notify("z", "m", None)).kind, ErrorKind.TOO_MANY_CALLS)
        self.remote_nodes.reply(REPLY)
        self.remote_nodes.pending.reserve(5)
        with self.assertRaises(RpcError) as caught:
            self.dispatcher.try_call(RecordingCall(), "x", "m", None)
        self.assertEqual(caught.exception.kind, ErrorKind.TOO_MANY_CALLS)
        self.assertEqual(self.call_counts(), (11, 1, {"-32005": 3}))
        self.assertEqual(self.dispatcher.calls_in_flight(), 7)
        self.connect("z")
        self.assertTrue(self.dispatcher.try_call(RecordingCall(), "z", "m", None))

    def test_link_at_fault(self) -> None:
        def broken(call: Call) -> None:
            self.remote_nodes.pending.discard(call)
            raise ZeroDivisionError

        self.remote_nodes.on_call = broken
        with self.assertRaises(RpcError) as caught:
            self.dispatcher.try_call(RecordingCall(), "x", "m", None)
        self.assertEqual((caught.exception.kind, caught.exception.sent), (ErrorKind.NODE_UNREACHABLE, True))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(self.call_counts(), (1, 0, {"-32004": 1}))
        self.assert_nothing_left()

    def test_a_node_that_does_not_read(self) -> None:
        """Its link is open, but takes nothing: the client may have gone elsewhere for that."""

        def stuck(call: Call) -> None:
            if call.owner == "other-node":
                self.remote_nodes.pending.discard(call)
                raise UNREACHABLE

        self.remote_nodes.on_call = stuck
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))
        self.registry.result = remote_location("third-node", generation=8)
        self.remote_nodes.connected.add("third-node")
        call = self.dispatcher.call("x", "m", None)
        self.remote_nodes.reply(REPLY)
        self.assertEqual((self.successResultOf(call), self.call_counts()), (REPLY, (1, 1, {})))
        self.assert_nothing_left()

    def test_who_asked_is_at_fault(self) -> None:
        class RaisingCall(RecordingCall):
            def complete(self, result: Reply | RpcError) -> None:
                raise ZeroDivisionError

        call = RaisingCall()
        self.dispatcher.try_call(call, "x", "m", None)
        self.remote_nodes.reply(REPLY)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_nothing_left()

    def test_over_before_it_was_asked(self) -> None:
        """In the same turn: it is settled or missed while it is sent, or who asked goes."""
        self.remote_nodes.on_call = lambda call: self.remote_nodes.fail(RpcError(ErrorKind.CONNECTION_LOST, "x"))
        self.assertEqual(self.error_of(self.call_remote()).kind, ErrorKind.CONNECTION_LOST)
        self.assertEqual(self.call_counts(), (1, 0, {"-32003": 1}))
        self.remember(remote_location())
        call = RecordingCall()
        self.remote_nodes.on_call = lambda _: self.dispatcher.cancel(call)
        self.assertTrue(self.dispatcher.try_call(call, "x", "m", None))
        self.assertEqual((call.results, self.call_counts()), ([], (2, 0, {"-32003": 1})))
        self.assert_nothing_left()

    def test_a_client_that_comes_here(self) -> None:
        """It is no longer looked for elsewhere."""
        self.connect("x")
        self.disconnect("x")
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))
        self.remember(remote_location())
        self.dispatcher.node_down("other-node")
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))


class LookupFirstTests(RemoteDeliveryTestCase):
    """Nothing is remembered, or no link is open."""

    def test_looked_up(self) -> None:
        call = self.dispatcher.call("x", "m", b"[1]", 9.0)
        self.assertEqual(self.remote_nodes.requests, [(remote_location(), "m", b"[1]", 9.0, False)])
        self.remote_nodes.reply(REPLY)
        self.assertEqual((self.successResultOf(call), self.call_counts()), (REPLY, (1, 1, {})))
        self.call_remote()
        self.assertEqual(self.registry.queries, ["x"])

    def test_connected(self) -> None:
        self.remote_nodes.connected.clear()
        call = self.dispatcher.call("x", "m", None, 9.0)
        ((location, connecting),) = self.remote_nodes.connecting
        self.assertEqual((location, self.remote_nodes.requests), (remote_location(), []))
        self.clock.advance(2)
        self.remote_nodes.connected.add("other-node")
        connecting.callback(None)
        self.assertEqual(self.remote_nodes.requests, [(remote_location(), "m", None, 7.0, False)])
        self.remote_nodes.reply(REPLY)
        self.assertEqual((self.successResultOf(call), self.call_counts()), (REPLY, (1, 1, {})))
        self.assert_nothing_left()

    def test_many_at_once(self) -> None:
        """One look-up for all."""
        found: Deferred[Location | None] = Deferred()
        self.registry.result = found
        calls = [self.dispatcher.call("x", "m", None) for _ in range(5)]
        self.assertEqual((self.registry.queries, self.dispatcher.calls_in_flight()), (["x"], 5))
        found.callback(remote_location())
        self.assertEqual(len(self.remote_nodes.requests), 5)
        for call in calls:
            self.remote_nodes.reply(REPLY, 0)
            self.assertEqual(self.successResultOf(call), REPLY)
        self.assert_nothing_left()

    def test_all_wait_for_the_same_claim(self) -> None:
        """And none is refused for the place that it has itself."""
        self.sessions.claiming["x"] = []
        calls = [self.dispatcher.call("x", "m", None) for _ in range(8)]
        self.assertEqual(self.error_of(self.dispatcher.call("x", "m", None)).kind, ErrorKind.TOO_MANY_CALLS)
        self.sessions.generations["x"] = 3
        self.sessions.finish_claim("x")
        self.assertEqual(len(self.sent("x")), 4)
        self.assertEqual({self.error_of(call).detail for call in calls[4:]}, {None}, "too many for the client")

    def test_a_connection_that_turns_out_to_be_dead(self) -> None:
        """It was about to be sent here, and goes on to be sought."""
        self.sessions.claiming["x"] = []
        call = self.dispatcher.call("x", "m", None)
        self.sessions.on_send = lambda client_id, payload: self.disconnect("x")
        self.connect("x")
        self.sessions.finish_claim("x")
        self.assertEqual(len(self.remote_nodes.requests), 1)
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.assertEqual(len(self.remote_nodes.cancelled_calls), 1)
        self.assert_nothing_left()

    def test_deadline_while_it_connects(self) -> None:
        self.remote_nodes.connected.clear()
        call = self.dispatcher.call("x", "m", None, 5.0)
        self.clock.advance(4.99)
        self.assertNoResult(call)
        self.clock.advance(0.06)
        error = self.error_of(call)
        self.assertEqual((error.kind, error.sent), (ErrorKind.NODE_UNREACHABLE, False))
        self.assertEqual((self.remote_nodes.cancel_count, self.call_counts()), (1, (1, 0, {"-32004": 1})))
        self.assert_nothing_left()

    def test_deadline_in_the_turn_in_which_it_is_connected(self) -> None:
        self.remote_nodes.connected.clear()
        call = self.dispatcher.call("x", "m", None, 4.99)
        self.clock.rightNow = 4.995
        self.remote_nodes.connected.add("other-node")
        self.remote_nodes.connecting[0][1].callback(None)
        self.assertEqual((self.error_of(call).kind, self.remote_nodes.requests), (ErrorKind.NODE_UNREACHABLE, []))
        self.assert_nothing_left()

    def test_a_link_that_is_gone_again(self) -> None:
        self.remote_nodes.connected.clear()
        self.remote_nodes.connect_result = lambda location: succeed(None)
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual((error.kind, error.sent), (ErrorKind.NODE_UNREACHABLE, False))
        self.assertEqual(error.detail, "node other cannot be reached")
        self.assert_nothing_left()

    def test_connect_at_fault(self) -> None:
        self.remote_nodes.connected.clear()
        self.remote_nodes.connect_result = lambda location: fail(ZeroDivisionError())
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual(error.kind, ErrorKind.NODE_UNREACHABLE)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        lost = RpcError(ErrorKind.CONNECTION_LOST, "x")
        self.remote_nodes.connect_result = lambda location: fail(lost)
        self.assertIs(self.error_of(self.dispatcher.call("x", "m", None)), lost)
        self.assert_nothing_left()


class CancelTests(RemoteDeliveryTestCase):
    """Who asked goes: nothing stays, and nothing comes."""

    def cancel(self, call: Deferred[Any]) -> None:
        self.assertEqual(self.dispatcher.calls_in_flight(), 1)
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.assertEqual(self.call_counts(), (1, 0, {}))
        self.assert_nothing_left()

    def test_at_the_node(self) -> None:
        self.remember(remote_location())
        call = self.dispatcher.call("x", "m", None)
        (at_the_node,) = self.remote_nodes.calls
        self.cancel(call)
        self.assertEqual(self.remote_nodes.cancelled_calls, [at_the_node])
        # What comes of it all the same.
        at_the_node.complete(REPLY)
        at_the_node.not_delivered(NotDelivered.NOT_HERE)
        self.dispatcher.cancel(call)
        self.assertEqual(len(self.remote_nodes.cancelled_calls), 1)
        self.assertEqual(self.call_counts(), (1, 0, {}))
        self.assert_nothing_left()

    def test_while_it_is_looked_up(self) -> None:
        cancelled: list[object] = []
        self.registry.result = Deferred(cancelled.append)
        self.cancel(self.dispatcher.call("x", "m", None))
        self.assertEqual((len(cancelled), self.remote_nodes.cancelled_calls), (1, []))

    def test_while_it_connects(self) -> None:
        self.remote_nodes.connected.clear()
        self.cancel(self.dispatcher.call("x", "m", None))
        self.assertEqual((self.remote_nodes.cancel_count, self.remote_nodes.cancelled_calls), (1, []))

    def test_while_it_is_looked_up_again(self) -> None:
        self.remember(remote_location())
        self.registry.result = Deferred()
        call = self.dispatcher.call("x", "m", None)
        self.remote_nodes.not_deliver(NotDelivered.NOT_HERE)
        self.cancel(call)

    def test_here_by_now(self) -> None:
        self.remember(remote_location())
        call = self.dispatcher.call("x", "m", None)
        self.connect("x")
        self.remote_nodes.not_deliver(NotDelivered.NOT_HERE)
        (request,) = self.sent("x")
        self.cancel(call)
        self.receive("x", result(request["id"]))
        self.assertEqual(self.metrics.late_responses, 1)

    def test_missed_twice(self) -> None:
        """Not by the same node."""
        self.remember(remote_location())
        self.registry.result = Deferred()
        self.dispatcher.call("x", "m", None).addErrback(lambda failure: None)
        (at_the_node,) = self.remote_nodes.calls
        self.remote_nodes.not_deliver(NotDelivered.NOT_HERE)
        at_the_node.not_delivered(NotDelivered.NOT_HERE)
        self.assertEqual((self.registry.queries, self.dispatcher.calls_in_flight()), (["x"], 1))

    def test_what_is_not_the_hubs(self) -> None:
        """One that was settled."""
        self.remember(remote_location())
        call = self.call_remote()
        self.remote_nodes.reply(REPLY)
        self.dispatcher.cancel(call)
        self.assertEqual((call.results, self.remote_nodes.cancelled_calls), ([REPLY], []))


MOVED = remote_location("third-node", generation=8)


class NotifyTests(RemoteDeliveryTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.telling = self.dispatcher.notify("x", "m", b"[1]")

    def answer(self, outcome: Exception | None, registry: Any = MOVED) -> None:
        """The node that was asked last answers; the registry knows that meanwhile."""
        self.registry.result = registry
        telling = self.remote_nodes.notifying[-1]
        if outcome is None:
            telling.callback(None)
        else:
            telling.errback(outcome)

    def assert_failed(self, kind: ErrorKind, sent: bool) -> None:
        error = self.error_of(self.telling)
        self.assertEqual((error.kind, error.client_id, error.sent), (kind, "x", sent))
        self.assert_nothing_left()

    def test_told(self) -> None:
        self.assertEqual(self.remote_nodes.notifications, [(remote_location(), "m", b"[1]", 30.0, False)])
        self.assertNoResult(self.telling)
        self.answer(None)
        self.assertIsNone(self.successResultOf(self.telling))
        # It is counted where the client is.
        self.assertEqual((self.call_counts(), self.metrics.notifications), ((0, 0, {}), {}))
        self.assert_nothing_left()

    def test_remembered(self) -> None:
        self.answer(None)
        self.dispatcher.notify("x", "m", None)
        self.assertEqual((len(self.remote_nodes.notifications), self.registry.queries), (2, ["x"]))

    def test_missed(self) -> None:
        for miss in NotDelivered:
            self.clock.advance(2)
            self.answer(NotDeliveredError(miss))
            self.assertEqual(self.remote_nodes.notifications[-1], (MOVED, "m", b"[1]", 28.0, False))
            self.answer(None)
            self.successResultOf(self.telling)
            self.dispatcher._locations.drop("x")
            self.registry.result = remote_location()
            self.telling = self.dispatcher.notify("x", "m", b"[1]")

    def test_missed_again(self) -> None:
        self.answer(NotDeliveredError(NotDelivered.NOT_HERE))
        self.answer(NotDeliveredError(NotDelivered.NOT_HERE))
        self.assert_failed(ErrorKind.NOT_CONNECTED, False)

    def test_lease_lost_and_the_registry_away(self) -> None:
        self.answer(NotDeliveredError(NotDelivered.LEASE_LOST), RegistryUnavailableError("gone"))
        self.assertEqual(self.remote_nodes.notifications[-1], (remote_location(), "m", b"[1]", 30.0, True))

    def test_unreachable(self) -> None:
        self.answer(RpcError(ErrorKind.NODE_UNREACHABLE, "x", sent=False))
        self.answer(None)
        self.successResultOf(self.telling)

    def test_failed(self) -> None:
        """The errors of the node, and of the link, are passed on."""
        self.answer(RpcError(ErrorKind.NODE_UNREACHABLE, "x", sent=True))
        self.assert_failed(ErrorKind.NODE_UNREACHABLE, True)
        self.assertEqual((self.call_counts(), self.remembered()), ((0, 0, {}), None))

    def test_at_fault(self) -> None:
        self.answer(ZeroDivisionError())
        self.assert_failed(ErrorKind.NODE_UNREACHABLE, True)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_it_is_here_by_now(self) -> None:
        self.connect("x", 9)
        self.answer(NotDeliveredError(NotDelivered.NOT_HERE))
        self.successResultOf(self.telling)
        self.assertEqual([sent[:2] for sent in self.sessions.sent], [("x", 9)])
        self.assertEqual(self.metrics.notifications, {"to_client": 1})
        self.assert_nothing_left()

    def test_the_node_keeps_the_deadline(self) -> None:
        self.clock.advance(40)
        self.assertNoResult(self.telling)
        self.answer(NotDeliveredError(NotDelivered.NOT_HERE), Deferred())
        self.clock.advance(0.06)
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE, False)

    def test_cancel(self) -> None:
        self.telling.cancel()
        self.failureResultOf(self.telling, CancelledError)
        self.assertEqual((self.remote_nodes.cancel_count, self.remote_nodes.cancelled_calls), (1, []))
        self.assert_nothing_left()

    def test_cancel_while_it_is_looked_up_again(self) -> None:
        self.answer(NotDeliveredError(NotDelivered.NOT_HERE), Deferred())
        self.telling.cancel()
        self.failureResultOf(self.telling, CancelledError)
        self.assert_nothing_left()

    def test_refused(self) -> None:
        for method, kind in (("gateway.x", ErrorKind.INVALID_REQUEST), ("m" * 2000, ErrorKind.TOO_LARGE)):
            self.assertEqual(self.error_of(self.dispatcher.notify("x", method, None)).kind, kind)
        self.assertEqual(len(self.remote_nodes.notifications), 1)


class HandoffTests(RemoteDeliveryTestCase):
    def test_a_client_that_was_told_to_go_to_another_node(self) -> None:
        """It is called there as soon as it is there."""
        self.connect("x", 5)
        self.dispatcher.begin_goaway("x", 5, True)
        first = self.dispatcher.call("x", "m", None)
        self.disconnect("x")
        second = self.dispatcher.call("x", "m", None)
        self.assertEqual((self.remote_nodes.requests, self.sent("x")), ([], []))
        self.dispatcher.client_superseded("x", 6)
        self.assertEqual(len(self.remote_nodes.calls), 2)
        self.remote_nodes.reply(REPLY)
        self.remote_nodes.reply(REPLY)
        self.assertEqual((self.successResultOf(first), self.successResultOf(second)), (REPLY, REPLY))
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assert_nothing_left()

    def test_one_that_was_told_to_go_and_does_not_arrive(self) -> None:
        self.registry.result = None
        self.connect("x", 5)
        self.dispatcher.begin_goaway("x", 5, True)
        self.disconnect("x")
        call, impatient = self.dispatcher.call("x", "m", None), self.dispatcher.call("x", "m", None, 1.0)
        self.clock.advance(1.1)
        self.assertNoResult(call)
        for asked, after in ((impatient, 0.0), (call, HANDOFF_TIMEOUT)):
            self.clock.advance(after)
            error = self.error_of(asked)
            self.assertEqual((error.kind, error.sent), (ErrorKind.NOT_CONNECTED, False))
        self.assert_nothing_left()

    def test_one_that_was_told_to_go_and_comes_back(self) -> None:
        self.connect("x", 5)
        self.dispatcher.begin_goaway("x", 5, True)
        self.disconnect("x")
        call = self.dispatcher.call("x", "m", None)
        self.connect("x", 6)
        (request,) = self.sent("x")
        self.receive("x", result(request["id"]), 6)
        self.assertEqual(self.successResultOf(call), REPLY)

    def test_a_call_that_waits_for_one_that_was_told_to_go_is_cancelled(self) -> None:
        self.connect("x", 5)
        self.dispatcher.begin_goaway("x", 5, True)
        self.disconnect("x")
        call = self.dispatcher.call("x", "m", None)
        call.cancel()
        self.failureResultOf(call)
        self.dispatcher.client_superseded("x", 6)
        self.assertEqual(self.remote_nodes.requests, [])
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assert_nothing_left()


class OwnershipUncertainTests(RemoteDeliveryTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.membership.uncertain = True
        self.connect("x", 5)

    def test_called_where_the_registry_says(self) -> None:
        call = self.dispatcher.call("x", "m", None)
        self.assertEqual(self.sessions.sent, [])
        self.remote_nodes.reply(REPLY)
        self.assertEqual(self.successResultOf(call), REPLY)
        self.assertEqual((self.sessions.sent, self.call_counts()), ([], (1, 1, {})))

    def test_nothing_is_handed_over_at_once(self) -> None:
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))
        self.assertFalse(self.dispatcher.try_notify("x", "m", None))
        self.assertEqual(self.sessions.sent, [])

    def test_called_here_if_the_registry_knows_nothing_newer(self) -> None:
        for outcome in (
            None,
            remote_location("this-node", generation=5),
            remote_location(generation=4),
            RegistryUnavailableError("away"),
        ):
            self.registry.result = outcome
            self.sessions.sent.clear()
            call = self.dispatcher.call("x", "m", None)
            ((_, generation, payload),) = self.sessions.sent
            self.assertEqual(generation, 5)
            self.dispatcher.message_received(
                "x", 5, json.dumps({"jsonrpc": "2.0", "id": json.loads(payload)["id"], "result": 1}).encode()
            )
            self.assertEqual(self.successResultOf(call), REPLY)

    def test_called_here_if_the_registry_hangs(self) -> None:
        self.registry.result = Deferred()
        self.dispatcher.call("x", "m", None)
        self.clock.advance(FALLBACK_TIMEOUT)
        self.assertEqual(len(self.sessions.sent), 1)

    def test_told_where_the_registry_says(self) -> None:
        telling = self.dispatcher.notify("x", "m", None)
        self.assertEqual((self.sessions.sent, len(self.remote_nodes.notifications)), ([], 1))
        self.assertNoResult(telling)

    def test_what_another_node_asks_names_the_claim(self) -> None:
        """It was found in the registry just now."""
        self.assertTrue(self.dispatcher.call_session(RecordingCall(), "x", 5, "m", None))
        self.assertTrue(self.dispatcher.notify_session("x", 5, "m", None))
        self.assertEqual(len(self.sessions.sent), 2)
