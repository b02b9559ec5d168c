"""Tests for :mod:`gateway.rpc.remote`: calls and notifications to clients of other nodes, clients in handoff, and a
node that may have lost ownership of its clients."""

from __future__ import annotations

import json
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location, SessionKey
from gateway.rpc.errors import NotDelivered, NotDeliveredError
from gateway.rpc.handoff import HANDOFF_TIMEOUT
from gateway.rpc.location_cache import FALLBACK_TIMEOUT
from gateway.rpc.pending import Call, Reply
from tests.builders.dispatcher import LEASE, RemoteDeliveryTestCase, remote_location, result
from tests.fakes.rpc import RecordingCall

REPLY = Reply(b"1", None)
UNREACHABLE = RpcError(ErrorKind.NODE_UNREACHABLE, "x", sent=False)


class TryCallTests(RemoteDeliveryTestCase):
    """The location is cached, and its node is connected."""

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
        """Errors of the node, or of its connection, are passed on."""
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
            # The location may be outdated.
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

    def test_refuse_new_calls(self) -> None:
        """Calls in flight continue; clients connected here are still called."""
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
        """On this node, including calls to its own clients; and on the peer connection."""
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

    def test_remote_nodes_raise(self) -> None:
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

    def test_congested_peer_connection(self) -> None:
        """It is open, but accepts nothing: the client may have moved for that reason."""

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

    def test_error_in_complete(self) -> None:
        class RaisingCall(RecordingCall):
            def complete(self, result: Reply | RpcError) -> None:
                raise ZeroDivisionError

        call = RaisingCall()
        self.dispatcher.try_call(call, "x", "m", None)
        self.remote_nodes.reply(REPLY)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_nothing_left()

    def test_ends_while_it_is_sent(self) -> None:
        """It is completed or cancelled before try_call() returns."""
        self.remote_nodes.on_call = lambda call: self.remote_nodes.fail(RpcError(ErrorKind.CONNECTION_LOST, "x"))
        self.assertEqual(self.error_of(self.call_remote()).kind, ErrorKind.CONNECTION_LOST)
        self.assertEqual(self.call_counts(), (1, 0, {"-32003": 1}))
        self.remember(remote_location())
        call = RecordingCall()
        self.remote_nodes.on_call = lambda _: self.dispatcher.cancel(call)
        self.assertTrue(self.dispatcher.try_call(call, "x", "m", None))
        self.assertEqual((call.results, self.call_counts()), ([], (2, 0, {"-32003": 1})))
        self.assert_nothing_left()

    def test_client_connects_here(self) -> None:
        """Its cached location is dropped."""
        self.connect("x")
        self.disconnect("x")
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))
        self.remember(remote_location())
        self.dispatcher.node_down("other-node")
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))


class LookupFirstTests(RemoteDeliveryTestCase):
    """No location is cached, or its node is not connected."""

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
        """They share one lookup."""
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
        """None is refused because of the place that it has itself."""
        self.sessions.claiming["x"] = []
        calls = [self.dispatcher.call("x", "m", None) for _ in range(8)]
        self.assertEqual(self.error_of(self.dispatcher.call("x", "m", None)).kind, ErrorKind.TOO_MANY_CALLS)
        self.sessions.generations["x"] = 3
        self.sessions.finish_claim("x")
        self.assertEqual(len(self.sent("x")), 4)
        (detail,) = {self.error_of(call).detail for call in calls[4:]}
        self.assertIn("--max-calls-per-client 4", detail)

    def test_local_connection_turns_out_to_be_lost(self) -> None:
        """The call was about to be sent here, and the search continues."""
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

    def test_deadline_in_the_iteration_in_which_it_connects(self) -> None:
        self.remote_nodes.connected.clear()
        call = self.dispatcher.call("x", "m", None, 4.99)
        self.clock.rightNow = 4.995
        self.remote_nodes.connected.add("other-node")
        self.remote_nodes.connecting[0][1].callback(None)
        self.assertEqual((self.error_of(call).kind, self.remote_nodes.requests), (ErrorKind.NODE_UNREACHABLE, []))
        self.assert_nothing_left()

    def test_peer_connection_is_lost_again(self) -> None:
        self.remote_nodes.connected.clear()
        self.remote_nodes.connect_result = lambda location: succeed(None)
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual((error.kind, error.sent), (ErrorKind.NODE_UNREACHABLE, False))
        self.assertEqual(error.detail, "node other cannot be reached")
        self.assert_nothing_left()

    def test_connect_raises(self) -> None:
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
    """The caller cancels: nothing is left, and no result is reported."""

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
        # Late results.
        at_the_node.complete(REPLY)
        at_the_node.not_delivered(NotDelivered.NOT_HERE)
        self.dispatcher.cancel(call)
        self.assertEqual(len(self.remote_nodes.cancelled_calls), 1)
        self.assertEqual(self.call_counts(), (1, 0, {}))
        self.assert_nothing_left()

    def test_during_the_lookup(self) -> None:
        cancelled: list[object] = []
        self.registry.result = Deferred(cancelled.append)
        self.cancel(self.dispatcher.call("x", "m", None))
        self.assertEqual((len(cancelled), self.remote_nodes.cancelled_calls), (1, []))

    def test_while_it_connects(self) -> None:
        self.remote_nodes.connected.clear()
        self.cancel(self.dispatcher.call("x", "m", None))
        self.assertEqual((self.remote_nodes.cancel_count, self.remote_nodes.cancelled_calls), (1, []))

    def test_during_the_second_lookup(self) -> None:
        self.remember(remote_location())
        self.registry.result = Deferred()
        call = self.dispatcher.call("x", "m", None)
        self.remote_nodes.not_deliver(NotDelivered.NOT_HERE)
        self.cancel(call)

    def test_after_a_local_call(self) -> None:
        self.remember(remote_location())
        call = self.dispatcher.call("x", "m", None)
        self.connect("x")
        self.remote_nodes.not_deliver(NotDelivered.NOT_HERE)
        (request,) = self.sent("x")
        self.cancel(call)
        self.receive("x", result(request["id"]))
        self.assertEqual(self.metrics.late_responses, 1)

    def test_not_delivered_twice(self) -> None:
        """The second report of one node is ignored."""
        self.remember(remote_location())
        self.registry.result = Deferred()
        self.dispatcher.call("x", "m", None).addErrback(lambda failure: None)
        (at_the_node,) = self.remote_nodes.calls
        self.remote_nodes.not_deliver(NotDelivered.NOT_HERE)
        at_the_node.not_delivered(NotDelivered.NOT_HERE)
        self.assertEqual((self.registry.queries, self.dispatcher.calls_in_flight()), (["x"], 1))

    def test_completed_call(self) -> None:
        """Reports about a completed call, and cancelling it, do nothing."""
        self.remember(remote_location())
        call = self.call_remote()
        self.remote_nodes.reply(REPLY)
        self.dispatcher.cancel(call)
        self.assertEqual((call.results, self.remote_nodes.cancelled_calls), ([REPLY], []))


MOVED = remote_location("third-node", generation=8)


class NotifyTests(RemoteDeliveryTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.remote_nodes.connected.add("third-node")
        self.telling = self.dispatcher.notify("x", "m", b"[1]")

    def answer(self, outcome: Exception | None, registry: Any = MOVED) -> None:
        """The last node answers; meanwhile the registry has that result."""
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

    def test_delivered(self) -> None:
        self.assertEqual(self.remote_nodes.notifications, [(remote_location(), "m", b"[1]", 30.0, False)])
        self.assertNoResult(self.telling)
        self.answer(None)
        self.assertIsNone(self.successResultOf(self.telling))
        # The other node counts it.
        self.assertEqual((self.call_counts(), self.metrics.notifications), ((0, 0, {}), {}))
        self.assert_nothing_left()

    def test_cached(self) -> None:
        self.answer(None)
        self.dispatcher.notify("x", "m", None)
        self.assertEqual((len(self.remote_nodes.notifications), self.registry.queries), (2, ["x"]))

    def test_not_here(self) -> None:
        for miss in NotDelivered:
            self.clock.advance(2)
            self.answer(NotDeliveredError(miss))
            self.assertEqual(self.remote_nodes.notifications[-1], (MOVED, "m", b"[1]", 28.0, False))
            self.answer(None)
            self.successResultOf(self.telling)
            self.dispatcher._locations.drop("x")
            self.registry.result = remote_location()
            self.telling = self.dispatcher.notify("x", "m", b"[1]")

    def test_not_here_twice(self) -> None:
        self.answer(NotDeliveredError(NotDelivered.NOT_HERE))
        self.answer(NotDeliveredError(NotDelivered.NOT_HERE))
        self.assert_failed(ErrorKind.NOT_CONNECTED, False)

    def test_lease_lost_and_registry_unavailable(self) -> None:
        self.answer(NotDeliveredError(NotDelivered.LEASE_LOST), RegistryUnavailableError("gone"))
        self.assertEqual(self.remote_nodes.notifications[-1], (remote_location(), "m", b"[1]", 30.0, True))

    def test_unreachable(self) -> None:
        self.answer(RpcError(ErrorKind.NODE_UNREACHABLE, "x", sent=False))
        self.answer(None)
        self.successResultOf(self.telling)

    def test_failed(self) -> None:
        """Errors of the node, and of its connection, are passed on."""
        self.answer(RpcError(ErrorKind.NODE_UNREACHABLE, "x", sent=True))
        self.assert_failed(ErrorKind.NODE_UNREACHABLE, True)
        self.assertEqual((self.call_counts(), self.remembered()), ((0, 0, {}), None))

    def test_remote_nodes_raise(self) -> None:
        self.answer(None)

        def broken(call: object) -> None:
            raise ZeroDivisionError

        self.remote_nodes.on_call = broken
        self.dispatcher._locations.drop("x")
        self.telling = self.dispatcher.notify("x", "m", b"[1]")
        self.remote_nodes.pending.discard(self.remote_nodes.notifying[-1]._call)
        self.assert_failed(ErrorKind.NODE_UNREACHABLE, True)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_connected_here_meanwhile(self) -> None:
        self.connect("x", 9)
        self.answer(NotDeliveredError(NotDelivered.NOT_HERE))
        self.successResultOf(self.telling)
        self.assertEqual([sent[:2] for sent in self.sessions.sent], [("x", 9)])
        self.assertEqual(self.metrics.notifications, {"to_client": 1})
        self.assert_nothing_left()

    def test_the_node_keeps_the_deadline(self) -> None:
        self.clock.advance(29.9)
        self.assertNoResult(self.telling)
        self.clock.advance(0.2)
        self.assert_failed(ErrorKind.TIMEOUT, True)

    def test_deadline_during_the_second_lookup(self) -> None:
        self.clock.advance(29.9)
        self.answer(NotDeliveredError(NotDelivered.NOT_HERE), Deferred())
        self.clock.advance(0.2)
        self.assert_failed(ErrorKind.REGISTRY_UNAVAILABLE, False)

    def test_cancel(self) -> None:
        self.telling.cancel()
        self.failureResultOf(self.telling, CancelledError)
        self.assertEqual(len(self.remote_nodes.cancelled_calls), 1)
        self.assert_nothing_left()

    def test_cancel_during_the_second_lookup(self) -> None:
        self.answer(NotDeliveredError(NotDelivered.NOT_HERE), Deferred())
        self.telling.cancel()
        self.failureResultOf(self.telling, CancelledError)
        self.assert_nothing_left()

    def test_refused(self) -> None:
        for method, kind in (("gateway.x", ErrorKind.INVALID_REQUEST), ("m" * 2000, ErrorKind.TOO_LARGE)):
            self.assertEqual(self.error_of(self.dispatcher.notify("x", method, None)).kind, kind)
        self.assertEqual(len(self.remote_nodes.notifications), 1)


class HandoffTests(RemoteDeliveryTestCase):
    def test_connects_to_another_node(self) -> None:
        """It is called there as soon as it is connected."""
        self.connect("x", 5)
        self.dispatcher.begin_goaway(SessionKey("x", 5), True)
        first = self.dispatcher.call("x", "m", None)
        self.disconnect("x")
        second = self.dispatcher.call("x", "m", None)
        self.assertEqual((self.remote_nodes.requests, self.sent("x")), ([], []))
        self.dispatcher.client_superseded(SessionKey("x", 6))
        self.assertEqual(len(self.remote_nodes.calls), 2)
        self.remote_nodes.reply(REPLY)
        self.remote_nodes.reply(REPLY)
        self.assertEqual((self.successResultOf(first), self.successResultOf(second)), (REPLY, REPLY))
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assert_nothing_left()

    def test_does_not_connect_again(self) -> None:
        self.registry.result = None
        self.connect("x", 5)
        self.dispatcher.begin_goaway(SessionKey("x", 5), True)
        self.disconnect("x")
        call, impatient = self.dispatcher.call("x", "m", None), self.dispatcher.call("x", "m", None, 1.0)
        self.clock.advance(1.1)
        self.assertNoResult(call)
        for asked, after in ((impatient, 0.0), (call, HANDOFF_TIMEOUT)):
            self.clock.advance(after)
            error = self.error_of(asked)
            self.assertEqual((error.kind, error.sent), (ErrorKind.NOT_CONNECTED, False))
        self.assert_nothing_left()

    def test_connects_to_this_node_again(self) -> None:
        self.connect("x", 5)
        self.dispatcher.begin_goaway(SessionKey("x", 5), True)
        self.disconnect("x")
        call = self.dispatcher.call("x", "m", None)
        self.connect("x", 6)
        (request,) = self.sent("x")
        self.receive("x", result(request["id"]), 6)
        self.assertEqual(self.successResultOf(call), REPLY)

    def test_cancel_a_waiting_call(self) -> None:
        self.connect("x", 5)
        self.dispatcher.begin_goaway(SessionKey("x", 5), True)
        self.disconnect("x")
        call = self.dispatcher.call("x", "m", None)
        call.cancel()
        self.failureResultOf(call)
        self.dispatcher.client_superseded(SessionKey("x", 6))
        self.assertEqual(self.remote_nodes.requests, [])
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assert_nothing_left()


class OwnershipUncertainTests(RemoteDeliveryTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.membership.uncertain = True
        self.connect("x", 5)

    def test_called_at_the_node_in_the_registry(self) -> None:
        call = self.dispatcher.call("x", "m", None)
        self.assertEqual(self.sessions.sent, [])
        self.remote_nodes.reply(REPLY)
        self.assertEqual(self.successResultOf(call), REPLY)
        self.assertEqual((self.sessions.sent, self.call_counts()), ([], (1, 1, {})))

    def test_nothing_is_sent_without_a_lookup(self) -> None:
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None))
        self.assertFalse(self.dispatcher.try_notify("x", "m", None))
        self.assertEqual(self.sessions.sent, [])

    def test_called_here_if_the_registry_has_no_newer_claim(self) -> None:
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

    def test_notified_at_the_node_in_the_registry(self) -> None:
        telling = self.dispatcher.notify("x", "m", None)
        self.assertEqual((self.sessions.sent, len(self.remote_nodes.notifications)), ([], 1))
        self.assertNoResult(telling)

    def test_requests_of_other_nodes_name_the_generation(self) -> None:
        """They are served: the other node has just found it in the registry."""
        self.assertTrue(self.dispatcher.call_session(RecordingCall(), SessionKey("x", 5), "m", None))
        self.assertTrue(self.dispatcher.notify_session(SessionKey("x", 5), "m", None))
        self.assertEqual(len(self.sessions.sent), 2)
