"""Tests for :mod:`gateway.rpc.dispatcher`: calls and notifications to clients of this node, with and without Deferreds,
and of other nodes."""

from __future__ import annotations

from twisted.internet.defer import CancelledError

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.jsonrpc import encode_notification
from gateway.registry.interface import SessionKey
from gateway.rpc.pending import PendingCalls, Reply
from tests.builders.dispatcher import (
    MAX_MESSAGE_SIZE,
    DispatcherTestCase,
    RemoteDeliveryTestCase,
    remote_location,
    result,
)
from tests.fakes.rpc import RecordingCall

REPLY = Reply(b"1", None)


class CallTests(DispatcherTestCase):
    """Calls to clients connected to this node."""

    def setUp(self) -> None:
        super().setUp()
        self.connect("x")

    def test_call(self) -> None:
        call = self.dispatcher.call("x", "disk.usage", b'{ "path" : "\\u002f" }')
        ((client_id, generation, payload),) = self.sessions.sent
        uuid = payload[23:59]
        self.assertEqual((client_id, generation), ("x", 1))
        self.assertEqual(
            payload,
            b'{"jsonrpc":"2.0","id":"%b","method":"disk.usage","params":{ "path" : "\\u002f" }}' % uuid,
        )
        self.assertNoResult(call)
        self.assertEqual(self.dispatcher.calls_in_flight(), 1)
        self.assertIsNone(self.receive("x", b'{"jsonrpc":"2.0","result":{ "free":1.0e1 },"id":"%b"}' % uuid))
        self.assertEqual(self.successResultOf(call), Reply(b'{ "free":1.0e1 }', None))
        self.assertEqual((self.metrics.calls, self.metrics.calls_answered), (1, 1))
        self.assertEqual(self.registry.queries, [])
        self.assert_nothing_left()

    def test_error_of_the_client(self) -> None:
        """It is passed on like a result."""
        uuid, call = self.start_call("x")
        self.receive("x", b'{"jsonrpc":"2.0","id":"%b","error":{"code":5 ,"message":"no"}}' % uuid.encode())
        self.assertEqual(self.successResultOf(call), Reply(None, b'{"code":5 ,"message":"no"}'))
        self.assertEqual(self.metrics.calls_answered, 1)

    def test_many_in_flight(self) -> None:
        started = [self.start_call("x") for _ in range(4)]
        self.assertEqual(len({uuid for uuid, _ in started}), 4)
        for n, (uuid, _) in reversed(list(enumerate(started))):
            self.receive("x", result(uuid, n))
        self.assertEqual([self.successResultOf(call).result for _, call in started], [b"0", b"1", b"2", b"3"])

    def test_escaped_id(self) -> None:
        uuid, call = self.start_call("x")
        self.receive("x", b'{"jsonrpc":"2.0","id":"\\u00%x%b","result":1}' % (ord(uuid[0]), uuid[1:].encode()))
        self.assertEqual(self.successResultOf(call), REPLY)

    def test_timeout(self) -> None:
        """At its deadline, never before; the late response is dropped."""
        call = self.dispatcher.call("x", "m", None, 5.0)
        (request,) = self.sent("x")
        self.clock.advance(4.99)
        self.assertNoResult(call)
        self.clock.advance(0.06)
        error = self.error_of(call)
        self.assertEqual((error.kind, error.client_id, error.sent), (ErrorKind.TIMEOUT, "x", True))
        self.assertEqual(self.metrics.calls_failed, {"-32002": 1})
        self.assertTrue(self.receive("x", result(request["id"])))
        self.assertEqual((self.metrics.late_responses, self.metrics.calls_answered), (1, 0))
        self.assertEqual(self.sessions.sent, [])
        self.assert_nothing_left()

    def test_default_timeout(self) -> None:
        call = self.dispatcher.call("x", "m", None)
        self.clock.advance(29.9)
        self.assertNoResult(call)
        self.clock.advance(0.2)
        self.assertEqual(self.error_of(call).kind, ErrorKind.TIMEOUT)

    def test_timeout_is_clamped(self) -> None:
        call = self.dispatcher.call("x", "m", None, 1e9)
        self.clock.advance(299.9)
        self.assertNoResult(call)
        self.clock.advance(0.2)
        self.assertEqual(self.error_of(call).kind, ErrorKind.TIMEOUT)

    def test_cancel(self) -> None:
        uuid, call = self.start_call("x")
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.assertTrue(self.receive("x", result(uuid)))
        self.assertEqual(self.metrics.late_responses, 1)
        self.assertEqual(self.metrics.calls_failed, {})
        self.assert_nothing_left()

    def test_gateway_methods(self) -> None:
        error = self.error_of(self.dispatcher.call("x", "gateway.goaway", None))
        self.assertEqual((error.kind, error.sent), (ErrorKind.INVALID_REQUEST, False))
        error = self.error_of(self.dispatcher.notify("x", "gateway.goaway", None))
        self.assertEqual(error.kind, ErrorKind.INVALID_REQUEST)
        error = self.error_of(self.dispatcher.notify_prefix("x", "gateway.goaway", None))
        self.assertEqual(error.kind, ErrorKind.INVALID_REQUEST)
        self.assertEqual(self.sessions.sent, [])
        self.dispatcher.call("x", "gatewayx", None)
        self.assertEqual(len(self.sessions.sent), 1)

    def test_too_large(self) -> None:
        """The limit applies to the whole message, to the byte."""
        self.dispatcher.call("x", "é\n", b'["%b"]' % (b"x" * 400))
        over = MAX_MESSAGE_SIZE - len(self.sessions.sent[0][2])
        self.dispatcher.call("x", "é\n", b'["%b"]' % (b"x" * (400 + over)))
        self.assertEqual(len(self.sessions.sent[1][2]), MAX_MESSAGE_SIZE)
        error = self.error_of(self.dispatcher.call("x", "é\n", b'["%b"]' % (b"x" * (401 + over))))
        self.assertEqual((error.kind, error.sent), (ErrorKind.TOO_LARGE, False))
        error = self.error_of(self.dispatcher.call("x", '"' * 600, None))
        self.assertEqual(error.kind, ErrorKind.TOO_LARGE)
        error = self.error_of(self.dispatcher.notify("x", "m", b'["%b"]' % (b"x" * 1024)))
        self.assertEqual((error.kind, error.sent), (ErrorKind.TOO_LARGE, False))
        self.assertEqual(len(self.sessions.sent), 2)
        self.assertEqual(self.metrics.calls_failed, {"-32006": 2})

    def test_too_large_for_a_notification(self) -> None:
        """It is measured without the id of a call."""
        room = MAX_MESSAGE_SIZE - len(encode_notification("m", b'[""]'))
        self.successResultOf(self.dispatcher.notify("x", "m", b'["%b"]' % (b"x" * room)))
        self.assertEqual(len(self.sessions.sent[0][2]), MAX_MESSAGE_SIZE)
        error = self.error_of(self.dispatcher.notify("x", "m", b'["%b"]' % (b"x" * (room + 1))))
        self.assertEqual(error.kind, ErrorKind.TOO_LARGE)

    def test_too_many(self) -> None:
        started = [self.start_call("x") for _ in range(4)]
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual((error.kind, error.client_id, error.sent), (ErrorKind.TOO_MANY_CALLS, "x", False))
        self.connect("y")
        self.start_call("y")
        self.receive("x", result(started[0][0]))
        self.start_call("x")
        self.assertEqual(self.metrics.calls_failed, {"-32005": 1})

    def test_goaway(self) -> None:
        """Calls in flight continue, and no new ones start."""
        id, call = self.start_call("x")
        self.dispatcher.begin_goaway(SessionKey("x", self.sessions.generation("x")))
        self.dispatcher.begin_goaway(SessionKey("nobody", 1))
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual((error.kind, error.sent), (ErrorKind.NOT_CONNECTED, False))
        self.receive("x", {"jsonrpc": "2.0", "id": 5, "method": "m"})
        (answer,) = self.sent("x")
        self.assertEqual((answer["id"], answer["error"]["code"], answer["error"]["data"]["sent"]), (5, -32004, False))
        self.assertEqual(self.upstream.calls, [])
        self.assertEqual(self.dispatcher.calls_in_flight_on(SessionKey("x", 1)), 1)
        self.assertTrue(self.dispatcher.is_finishing_calls(SessionKey("x", 1)))
        self.receive("x", result(id))
        self.successResultOf(call)
        self.assertEqual(self.dispatcher.calls_in_flight_on(SessionKey("x", 1)), 0)
        self.assertFalse(self.dispatcher.is_finishing_calls(SessionKey("x", 1)))
        self.assertEqual(self.dispatcher.calls_in_flight_on(SessionKey("nobody", 1)), 0)
        self.disconnect("x")
        self.connect("x", 2)
        self.start_call("x")
        self.assertEqual(self.dispatcher._local.goaway_sessions, set())

    def test_too_many_on_the_node(self) -> None:
        for client_id in "abc":
            self.connect(client_id)
        for client_id in "aaabbbxx":
            self.start_call(client_id)
        self.assertEqual(self.error_of(self.dispatcher.call("c", "m", None)).kind, ErrorKind.TOO_MANY_CALLS)
        self.assertEqual(self.sent("c"), [])

    def test_disconnect(self) -> None:
        """All calls in flight to that client fail at once, and no others."""
        self.connect("y")
        first, second, other = self.start_call("x")[1], self.start_call("x")[1], self.start_call("y")[1]
        self.disconnect("x")
        for call in (first, second):
            error = self.error_of(call)
            self.assertEqual((error.kind, error.client_id, error.sent), (ErrorKind.CONNECTION_LOST, "x", True))
        self.assertNoResult(other)
        self.assertEqual(self.metrics.calls_failed, {"-32003": 2})
        self.disconnect("y")
        self.error_of(other)
        self.assert_nothing_left()

    def test_send_fails(self) -> None:
        """A connection that turns out to be lost while sending has not received the call."""
        self.sessions.on_send = lambda client_id, payload: self.disconnect("x")
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual((error.kind, error.sent), (ErrorKind.NOT_CONNECTED, False))
        self.assert_nothing_left()

    def test_answered_while_it_is_sent(self) -> None:
        self.sessions.on_send = lambda client_id, payload: self.assertIsNone(
            self.receive("x", result(payload[23:59].decode()))
        )
        self.assertEqual(self.successResultOf(self.dispatcher.call("x", "m", None)), REPLY)

    def test_unexpected(self) -> None:
        """An internal error is logged; the caller learns that the client may have received the call."""

        def broken(client_id: str, payload: bytes) -> None:
            raise ZeroDivisionError

        self.sessions.on_send = broken
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual((error.kind, error.sent), (ErrorKind.NODE_UNREACHABLE, True))
        error = self.error_of(self.dispatcher.notify("x", "m", None))
        self.assertEqual((error.kind, error.sent), (ErrorKind.NODE_UNREACHABLE, True))
        error = self.error_of(self.dispatcher.notify_prefix("x", "m", None))
        self.assertEqual(error.kind, ErrorKind.NODE_UNREACHABLE)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 3)
        self.assertEqual(self.metrics.calls_failed, {"-32004": 1})
        self.assert_nothing_left()


class MatchingTests(DispatcherTestCase):
    """A response counts only if it comes from the connection that was called."""

    def test_another_client(self) -> None:
        self.connect("x")
        self.connect("y")
        uuid, call = self.start_call("x")
        self.assertTrue(self.receive("y", result(uuid)))
        self.assertFalse(self.receive("y", b'{"jsonrpc":"2.0","id":"%b","result":nope}' % uuid.encode()))
        self.assertFalse(self.receive("y", {"jsonrpc": "2.0", "id": uuid, "result": 1, "error": 2}))
        self.assertTrue(self.receive("y", [result(uuid)]))
        self.assertNoResult(call)
        self.assertEqual((self.metrics.late_responses, self.metrics.calls_answered), (2, 0))
        self.receive("x", result(uuid))
        self.assertEqual(self.successResultOf(call), REPLY)

    def test_replaced_connection(self) -> None:
        self.connect("x", 1)
        uuid, first = self.start_call("x")
        self.disconnect("x")
        self.connect("x", 2)
        self.assertEqual(self.error_of(first).kind, ErrorKind.CONNECTION_LOST)
        new_uuid, second = self.start_call("x")
        # A late response on the old connection, and a response to the old call on the new one.
        self.receive("x", result(new_uuid), 1)
        self.receive("x", result(uuid), 2)
        self.assertNoResult(second)
        self.assertEqual(self.metrics.late_responses, 2)
        self.receive("x", result(new_uuid), 2)
        self.assertEqual(self.successResultOf(second), REPLY)

    def test_late_disconnect_of_a_replaced_connection(self) -> None:
        self.connect("x", 2)
        _, call = self.start_call("x")
        self.dispatcher.client_disconnected(SessionKey("x", 1))
        self.assertNoResult(call)

    def test_answered_twice(self) -> None:
        self.connect("x")
        uuid, call = self.start_call("x")
        self.receive("x", result(uuid, 1))
        self.assertTrue(self.receive("x", result(uuid, 2)))
        self.assertEqual(self.successResultOf(call), REPLY)
        self.assertEqual((self.metrics.calls_answered, self.metrics.late_responses), (1, 1))

    def test_ids_that_no_call_has(self) -> None:
        self.connect("x")
        _, call = self.start_call("x")
        for id in (1, 1.5, None, "", "é", "not-a-uuid", "5f0c1d2e-0000-4000-8000-0123456789ab"):
            self.assertTrue(self.receive("x", result(id)))
        self.assertNoResult(call)
        self.assertEqual(self.metrics.late_responses, 7)
        self.assertEqual(self.sessions.sent, [])

    def test_broken_response(self) -> None:
        """It cannot be parsed, but its call can be identified."""
        self.connect("x")
        for broken in (
            b'{"jsonrpc":"2.0","id":"%b","result":NaN}',
            b'{"jsonrpc":"2.0","result":{"id":1,},"id":"%b"}',
            b'{"jsonrpc":"2.0","id":"%b","result":"\\ud800"}',
            b'{"jsonrpc":"2.0","id":"%b","result":1,"error":{"code":1,"message":"m"}}',
            b'{"id":"%b","result":1}',
            b'[{"jsonrpc":"2.0","id":"%b","error":"no"}]',
        ):
            uuid, call = self.start_call("x")
            self.assertFalse(self.receive("x", broken % uuid.encode()), broken)
            error = self.error_of(call)
            self.assertEqual((error.kind, error.sent), (ErrorKind.CONNECTION_LOST, True))
            self.assertIn("could not be read", error.detail or "")
            self.assertEqual(len(self.sent("x")), 1)

    def test_ids_outside_of_responses(self) -> None:
        self.connect("x")
        uuid, call = self.start_call("x")
        self.receive("x", {"jsonrpc": "2.0", "method": 5, "params": {"id": uuid}})
        self.assertNoResult(call)


class NotifyTests(DispatcherTestCase):
    def test_notify(self) -> None:
        self.connect("x")
        self.assertIsNone(self.successResultOf(self.dispatcher.notify("x", "policy.changed", b"[ 3 ]")))
        self.assertEqual(self.sessions.sent, [("x", 1, b'{"jsonrpc":"2.0","method":"policy.changed","params":[ 3 ]}')])
        self.assertEqual(self.metrics.notifications, {"to_client": 1})
        self.assertEqual((self.metrics.calls, self.dispatcher.calls_in_flight()), (0, 0))


class RaisingCall(RecordingCall):
    """Raises when it is completed."""

    __slots__ = ()

    def complete(self, result: Reply | RpcError) -> None:
        super().complete(result)
        raise ZeroDivisionError


class TryCallTests(DispatcherTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.connect("x")
        self.call = RecordingCall()

    def start_call_id(self) -> str:
        """Call a connected client; returns the id of the call."""
        self.assertTrue(self.dispatcher.try_call(self.call, "x", "m", None))
        (request,) = self.sent("x")
        return request["id"]

    def error(self) -> RpcError:
        (error,) = self.call.results
        assert isinstance(error, RpcError)
        return error

    def test_answered(self) -> None:
        id = self.start_call_id()
        self.assertEqual(self.call.results, [])
        self.receive("x", result(id))
        self.receive("x", result(id))
        self.assertEqual(self.call.results, [REPLY])
        self.assertEqual((self.metrics.calls, self.metrics.calls_answered, self.metrics.late_responses), (1, 1, 1))
        self.assert_nothing_left()

    def test_not_here(self) -> None:
        """Nothing is done, even with other invalid arguments, and the registry is not queried."""
        for method in ("m", "gateway.x", "m" * 2000):
            self.assertFalse(self.dispatcher.try_call(self.call, "y", method, None))
            self.assertFalse(self.dispatcher.try_notify("y", method, None))
        self.assertEqual((self.call.results, self.metrics.calls, self.metrics.calls_failed), ([], 0, {}))
        self.assertEqual((self.registry.queries, self.sessions.sent), ([], []))

    def test_refused(self) -> None:
        for method, kind in (("gateway.x", ErrorKind.INVALID_REQUEST), ("m" * 2000, ErrorKind.TOO_LARGE)):
            with self.assertRaises(RpcError) as caught:
                self.dispatcher.try_call(self.call, "x", method, None)
            self.assertEqual((caught.exception.kind, caught.exception.sent), (kind, False))
            with self.assertRaises(RpcError) as caught:
                self.dispatcher.try_notify("x", method, None)
            self.assertEqual(caught.exception.kind, kind)
        for _ in range(4):
            self.dispatcher.try_call(RecordingCall(), "x", "m", None)
        with self.assertRaises(RpcError) as caught:
            self.dispatcher.try_call(self.call, "x", "m", None)
        self.assertEqual(caught.exception.kind, ErrorKind.TOO_MANY_CALLS)
        self.assertEqual(self.call.results, [])
        self.assertEqual(self.metrics.calls, 7)
        self.assertEqual(self.metrics.calls_failed, {"-32600": 1, "-32006": 1, "-32005": 1})

    def test_deadline(self) -> None:
        self.dispatcher.try_call(self.call, "x", "m", None, 1e9)
        self.clock.advance(299.9)
        self.assertEqual(self.call.results, [])
        self.clock.advance(0.2)
        self.assertEqual((self.error().kind, self.error().sent), (ErrorKind.TIMEOUT, True))
        self.assertEqual(self.metrics.calls_failed, {"-32002": 1})
        self.assert_nothing_left()

    def test_cancel(self) -> None:
        id = self.start_call_id()
        self.dispatcher.cancel(self.call)
        self.dispatcher.cancel(self.call)
        self.receive("x", result(id))
        self.assertEqual((self.call.results, self.metrics.late_responses), ([], 1))
        self.assertEqual((self.metrics.calls, self.metrics.calls_answered, self.metrics.calls_failed), (1, 0, {}))
        self.assert_nothing_left()

    def test_disconnect(self) -> None:
        self.start_call_id()
        self.disconnect("x")
        self.assertEqual((self.error().kind, self.error().client_id), (ErrorKind.CONNECTION_LOST, "x"))
        self.assertEqual(self.metrics.calls_failed, {"-32003": 1})

    def test_connection_turns_out_to_be_lost(self) -> None:
        """Nothing was sent: the call is not completed, and not counted."""
        self.sessions.on_send = lambda client_id, payload: self.disconnect("x")
        self.assertFalse(self.dispatcher.try_call(self.call, "x", "m", None))
        self.assertEqual((self.call.results, self.metrics.calls, self.metrics.calls_failed), ([], 0, {}))
        self.assert_nothing_left()

    def test_lost_connection_counts_once_with_a_deferred(self) -> None:
        self.sessions.on_send = lambda client_id, payload: self.disconnect("x")
        self.assertEqual(self.error_of(self.dispatcher.call("x", "m", None)).kind, ErrorKind.NOT_CONNECTED)
        self.assertEqual((self.metrics.calls, self.metrics.calls_failed), (1, {"-32001": 1}))

    def test_connection_is_lost_while_sending(self) -> None:
        """The call is completed after try_call() has sent it and before it returns."""

        def lost(client_id: str, payload: bytes) -> None:
            self.dispatcher.client_disconnected(SessionKey("x", 1))
            self.assertEqual(self.call.results, [])

        self.sessions.on_send = lost
        self.assertTrue(self.dispatcher.try_call(self.call, "x", "m", None))
        self.assertEqual(self.error().kind, ErrorKind.CONNECTION_LOST)
        self.assertEqual((self.metrics.calls, self.metrics.calls_failed), (1, {"-32003": 1}))

    def test_unexpected(self) -> None:
        def broken(client_id: str, payload: bytes) -> None:
            raise ZeroDivisionError

        self.sessions.on_send = broken
        with self.assertRaises(RpcError) as caught:
            self.dispatcher.try_call(self.call, "x", "m", None)
        self.assertEqual((caught.exception.kind, caught.exception.sent), (ErrorKind.NODE_UNREACHABLE, True))
        self.assertEqual((self.metrics.calls, self.metrics.calls_failed), (1, {"-32004": 1}))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_nothing_left()

    def test_notify(self) -> None:
        self.assertTrue(self.dispatcher.try_notify("x", "m", b"[ 3 ]"))
        self.assertEqual(self.sessions.sent, [("x", 1, b'{"jsonrpc":"2.0","method":"m","params":[ 3 ]}')])
        self.assertEqual(self.metrics.notifications, {"to_client": 1})
        self.sessions.on_send = lambda client_id, payload: self.disconnect("x")
        self.assertFalse(self.dispatcher.try_notify("x", "m", None))
        self.assertEqual(self.metrics.notifications, {"to_client": 1})


class CallObjectTests(DispatcherTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.failures: list[RpcError] = []
        self.pending = PendingCalls(self.clock, max_calls=9, max_per_owner=9, on_failure=self.failures.append)
        self.call = RecordingCall()

    def test_early_result(self) -> None:
        """A result that arrives while the request is sent is reported after that."""
        error = RpcError(ErrorKind.CONNECTION_LOST, "x")
        for outcome, end in ((REPLY, self.pending.resolve), (error, self.pending.fail)):
            call = RecordingCall()
            id = self.pending.start(call, "a", "x", 5)
            self.assertTrue(end("a", id, outcome))  # type: ignore[operator]
            self.assertFalse(end("a", id, outcome))  # type: ignore[operator]
            self.assertEqual((call.results, self.failures, len(self.pending)), ([], [], 0))
            self.pending.mark_sent(call)
            self.assertEqual(call.results, [outcome])
        self.assertEqual(self.failures, [error])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_deadline_before_it_was_sent(self) -> None:
        self.pending.start(self.call, "a", "x", 5)
        self.clock.advance(6)
        self.assertEqual(self.call.results, [])
        self.pending.mark_sent(self.call)
        self.assertEqual([error.kind for error in self.failures], [ErrorKind.TIMEOUT])
        self.assertEqual(self.call.results, self.failures)

    def test_error_in_complete(self) -> None:
        """Neither the responder nor any other call is affected."""
        first, second = RaisingCall(), RecordingCall()
        for call in (first, second):
            self.pending.start(call, "a", "x", 5)
            self.pending.mark_sent(call)
        self.assertEqual(
            self.pending.fail_owner("a", lambda client_id: RpcError(ErrorKind.CONNECTION_LOST, client_id)), 2
        )
        self.assertEqual((len(first.results), len(second.results)), (1, 1))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_ids(self) -> None:
        """They are raw JSON strings."""
        id, _ = self.pending.add("a", "x", 5)
        self.assertRegex(id, rb'^"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"$')


class SessionCallTests(RemoteDeliveryTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.connect("x", 7)

    def test_call(self) -> None:
        call = RecordingCall()
        self.assertTrue(self.dispatcher.call_session(call, SessionKey("x", 7), "m", None, 5.0))
        (request,) = self.sent("x")
        self.receive("x", result(request["id"]), 7)
        self.assertEqual((call.results, self.call_counts()), ([REPLY], (1, 1, {})))

    def test_call_another_connection(self) -> None:
        """Nothing is done, and it is never passed on to another node."""
        self.remember(remote_location(client_id="y"))
        for client_id, generation in (("x", 6), ("x", 8), ("x", 0), ("y", 7), ("y", 0)):
            self.assertFalse(
                self.dispatcher.call_session(RecordingCall(), SessionKey(client_id, generation), "gateway.x", None, 5.0)
            )
            self.assertFalse(self.dispatcher.notify_session(SessionKey(client_id, generation), "gateway.x", None))
        self.assertEqual((self.call_counts(), self.registry.queries, self.remote_nodes.requests), ((0, 0, {}), [], []))
        self.assertEqual(self.sessions.sent, [])

    def test_connection_turns_out_to_be_lost(self) -> None:
        self.remember(remote_location())
        self.sessions.on_send = lambda client_id, payload: self.disconnect("x")
        self.assertFalse(self.dispatcher.call_session(RecordingCall(), SessionKey("x", 7), "m", None, 5.0))
        self.assertEqual((self.call_counts(), self.remote_nodes.requests), ((0, 0, {}), []))
        self.assert_nothing_left()

    def test_refused(self) -> None:
        with self.assertRaises(RpcError) as caught:
            self.dispatcher.call_session(RecordingCall(), SessionKey("x", 7), "gateway.x", None, 5.0)
        self.assertEqual(caught.exception.kind, ErrorKind.INVALID_REQUEST)
        with self.assertRaises(RpcError) as caught:
            self.dispatcher.notify_session(SessionKey("x", 7), "m" * 2000, None)
        self.assertEqual(caught.exception.kind, ErrorKind.TOO_LARGE)
        self.assertEqual(self.call_counts(), (1, 0, {"-32600": 1}))

    def test_notify(self) -> None:
        self.assertTrue(self.dispatcher.notify_session(SessionKey("x", 7), "m", b"[3]"))
        self.assertEqual(self.sessions.sent, [("x", 7, b'{"jsonrpc":"2.0","method":"m","params":[3]}')])

    def test_own_lease_has_expired(self) -> None:
        """Calls of its own backends continue."""
        self.membership.lease_held = False
        call = RecordingCall()
        self.assertTrue(self.dispatcher.try_call(call, "x", "m", None))
        self.assertEqual(len(self.sent("x")), 1)
