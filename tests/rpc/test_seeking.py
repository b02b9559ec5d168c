"""Tests for :mod:`gateway.rpc.remote`: calls to clients that other nodes hold."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.interface import Location
from gateway.rpc.interface import NotDelivered
from gateway.rpc.pending import Call, Reply
from tests.rpc.fakes import LEASE, RecordingCall, RemoteDeliveryTestCase, remote_location, result

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
        self.dispatcher.remote_nodes = None
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
        self.remote_nodes.on_not_delivered(at_the_node, NotDelivered.NOT_HERE)
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
        self.remote_nodes.on_not_delivered(at_the_node, NotDelivered.NOT_HERE)
        self.assertEqual((self.registry.queries, self.dispatcher.calls_in_flight()), (["x"], 1))

    def test_what_is_not_the_hubs(self) -> None:
        """A call of somebody else's that was missed, or one that was settled."""
        self.remote_nodes.on_not_delivered(RecordingCall(), NotDelivered.NOT_HERE)
        self.remember(remote_location())
        call = self.call_remote()
        self.remote_nodes.reply(REPLY)
        self.dispatcher.cancel(call)
        self.assertEqual((call.results, self.remote_nodes.cancelled_calls), ([REPLY], []))
