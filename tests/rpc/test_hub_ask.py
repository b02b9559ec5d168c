"""Tests for what :mod:`gateway.rpc.dispatcher` and :mod:`gateway.rpc.pending` do for those who need no Deferred."""

from __future__ import annotations

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.rpc.pending import PendingCalls, Reply
from tests.rpc.fakes import DispatcherTestCase, RecordingCall, result

REPLY = Reply(b"1", None)


class RaisingCall(RecordingCall):
    """Cannot stand what it came to."""

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
        """Call a client that is here; the id of the call."""
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
        """Nothing is done, whatever else is wrong with it, and nobody is asked."""
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

    def test_forgotten(self) -> None:
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

    def test_a_connection_that_turns_out_to_be_dead(self) -> None:
        """Nothing was sent: neither is the call settled, nor is anything counted."""
        self.sessions.on_send = lambda client_id, payload: self.disconnect("x")
        self.assertFalse(self.dispatcher.try_call(self.call, "x", "m", None))
        self.assertEqual((self.call.results, self.metrics.calls, self.metrics.calls_failed), ([], 0, {}))
        self.assert_nothing_left()

    def test_such_a_connection_is_counted_once_with_a_deferred(self) -> None:
        self.sessions.on_send = lambda client_id, payload: self.disconnect("x")
        self.assertEqual(self.error_of(self.dispatcher.call("x", "m", None)).kind, ErrorKind.NOT_CONNECTED)
        self.assertEqual((self.metrics.calls, self.metrics.calls_failed), (1, {"-32001": 1}))

    def test_a_connection_that_is_lost_once_it_was_sent(self) -> None:
        """In the same turn: who asked is told, after ask() has begun to send and before it returns."""

        def lost(client_id: str, payload: bytes) -> None:
            self.dispatcher.client_disconnected("x", 1)
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

    def test_early(self) -> None:
        """What comes while the request leaves is told when it has left."""
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

    def test_who_asked_is_at_fault(self) -> None:
        """Neither who answered nor any other call suffers."""
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
