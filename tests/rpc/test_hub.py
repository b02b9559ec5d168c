"""Tests for :mod:`gateway.rpc.dispatcher`."""

from __future__ import annotations

from twisted.internet.defer import CancelledError

from gateway.protocol.errors import ErrorKind
from gateway.protocol.jsonrpc import encode_notification
from gateway.rpc.pending import Reply
from tests.rpc.fakes import MAX_MESSAGE_SIZE, DispatcherTestCase, result

REPLY = Reply(b"1", None)


class CallTests(DispatcherTestCase):
    """Calls to clients that are connected here."""

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
        self.assertTrue(self.receive("x", b'{"jsonrpc":"2.0","result":{ "free":1.0e1 },"id":"%b"}' % uuid))
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
        asked = [self.start_call("x") for _ in range(4)]
        self.assertEqual(len({uuid for uuid, _ in asked}), 4)
        for n, (uuid, _) in reversed(list(enumerate(asked))):
            self.receive("x", result(uuid, n))
        self.assertEqual([self.successResultOf(call).result for _, call in asked], [b"0", b"1", b"2", b"3"])

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
        """The limit is that of the whole message, to the byte."""
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
        """It is measured as it is sent, without the id of a call."""
        room = MAX_MESSAGE_SIZE - len(encode_notification("m", b'[""]'))
        self.successResultOf(self.dispatcher.notify("x", "m", b'["%b"]' % (b"x" * room)))
        self.assertEqual(len(self.sessions.sent[0][2]), MAX_MESSAGE_SIZE)
        error = self.error_of(self.dispatcher.notify("x", "m", b'["%b"]' % (b"x" * (room + 1))))
        self.assertEqual(error.kind, ErrorKind.TOO_LARGE)

    def test_too_many(self) -> None:
        asked = [self.start_call("x") for _ in range(4)]
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual((error.kind, error.client_id, error.sent), (ErrorKind.TOO_MANY_CALLS, "x", False))
        self.connect("y")
        self.start_call("y")
        self.receive("x", result(asked[0][0]))
        self.start_call("x")
        self.assertEqual(self.metrics.calls_failed, {"-32005": 1})

    def test_a_client_that_was_told_to_go(self) -> None:
        """What is in flight goes on, and nothing new begins."""
        id, call = self.start_call("x")
        self.dispatcher.begin_goaway("x", self.sessions.generation("x"))
        self.dispatcher.begin_goaway("nobody", 1)
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual((error.kind, error.sent), (ErrorKind.NOT_CONNECTED, False))
        self.receive("x", {"jsonrpc": "2.0", "id": 5, "method": "m"})
        (answer,) = self.sent("x")
        self.assertEqual((answer["id"], answer["error"]["code"], answer["error"]["data"]["sent"]), (5, -32004, False))
        self.assertEqual(self.upstream.calls, [])
        self.assertEqual(self.dispatcher.calls_in_flight_on("x", 1), 1)
        self.assertTrue(self.dispatcher.is_finishing_calls("x", 1))
        self.receive("x", result(id))
        self.successResultOf(call)
        self.assertEqual(self.dispatcher.calls_in_flight_on("x", 1), 0)
        self.assertFalse(self.dispatcher.is_finishing_calls("x", 1))
        self.assertEqual(self.dispatcher.calls_in_flight_on("nobody", 1), 0)
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
        """Everything in flight fails at once, and nothing else."""
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
        """A connection that turns out to be dead while it is sent to has not had the call."""
        self.sessions.on_send = lambda client_id, payload: self.disconnect("x")
        error = self.error_of(self.dispatcher.call("x", "m", None))
        self.assertEqual((error.kind, error.sent), (ErrorKind.NOT_CONNECTED, False))
        self.assert_nothing_left()

    def test_answered_while_it_is_sent(self) -> None:
        self.sessions.on_send = lambda client_id, payload: self.assertTrue(
            self.receive("x", result(payload[23:59].decode()))
        )
        self.assertEqual(self.successResultOf(self.dispatcher.call("x", "m", None)), REPLY)

    def test_unexpected(self) -> None:
        """A fault of the node's own is logged; who called is told that the client may have got it."""

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
    """A response counts only if it comes from the very connection that was asked."""

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

    def test_a_replaced_connection(self) -> None:
        self.connect("x", 1)
        uuid, first = self.start_call("x")
        self.disconnect("x")
        self.connect("x", 2)
        self.assertEqual(self.error_of(first).kind, ErrorKind.CONNECTION_LOST)
        new_uuid, second = self.start_call("x")
        # What the old connection still had to say, and the answer to the old call on the new one.
        self.receive("x", result(new_uuid), 1)
        self.receive("x", result(uuid), 2)
        self.assertNoResult(second)
        self.assertEqual(self.metrics.late_responses, 2)
        self.receive("x", result(new_uuid), 2)
        self.assertEqual(self.successResultOf(second), REPLY)

    def test_late_disconnect_of_a_replaced_connection(self) -> None:
        self.connect("x", 2)
        _, call = self.start_call("x")
        self.dispatcher.client_disconnected("x", 1)
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
        """It cannot be read, but whose it is can be."""
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

    def test_ids_in_what_is_no_response(self) -> None:
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
