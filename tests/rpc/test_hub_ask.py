"""Tests for what :mod:`gateway.rpc.dispatcher` and :mod:`gateway.rpc.pending` do for those who need no Deferred."""

from __future__ import annotations

from gateway.protocol.errors import Kind, RpcError
from gateway.rpc.pending import Pending, Reply
from tests.rpc.fakes import HubTestCase, Told, result

REPLY = Reply(b"1", None)


class Raises(Told):
    """Cannot stand what it came to."""

    __slots__ = ()

    def settle(self, outcome: Reply | RpcError) -> None:
        super().settle(outcome)
        raise ZeroDivisionError


class AskTests(HubTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.connect("x")
        self.call = Told()

    def asked(self) -> str:
        """Call a client that is here; the id of the call."""
        self.assertTrue(self.hub.ask(self.call, "x", "m", None))
        (request,) = self.sent("x")
        return request["id"]

    def error(self) -> RpcError:
        (error,) = self.call.outcomes
        assert isinstance(error, RpcError)
        return error

    def test_answered(self) -> None:
        id = self.asked()
        self.assertEqual(self.call.outcomes, [])
        self.receive("x", result(id))
        self.receive("x", result(id))
        self.assertEqual(self.call.outcomes, [REPLY])
        self.assertEqual((self.metrics.calls, self.metrics.calls_answered, self.metrics.late_responses), (1, 1, 1))
        self.assert_nothing_left()

    def test_not_here(self) -> None:
        """Nothing is done, whatever else is wrong with it, and nobody is asked."""
        for method in ("m", "gateway.x", "m" * 2000):
            self.assertFalse(self.hub.ask(self.call, "y", method, None))
            self.assertFalse(self.hub.notify_here("y", method, None))
        self.assertEqual((self.call.outcomes, self.metrics.calls, self.metrics.calls_failed), ([], 0, {}))
        self.assertEqual((self.registry.asked, self.edge.sent), ([], []))

    def test_refused(self) -> None:
        for method, kind in (("gateway.x", Kind.INVALID_REQUEST), ("m" * 2000, Kind.TOO_LARGE)):
            with self.assertRaises(RpcError) as caught:
                self.hub.ask(self.call, "x", method, None)
            self.assertEqual((caught.exception.kind, caught.exception.sent), (kind, False))
            with self.assertRaises(RpcError) as caught:
                self.hub.notify_here("x", method, None)
            self.assertEqual(caught.exception.kind, kind)
        for _ in range(4):
            self.hub.ask(Told(), "x", "m", None)
        with self.assertRaises(RpcError) as caught:
            self.hub.ask(self.call, "x", "m", None)
        self.assertEqual(caught.exception.kind, Kind.TOO_MANY_CALLS)
        self.assertEqual(self.call.outcomes, [])
        self.assertEqual(self.metrics.calls, 7)
        self.assertEqual(self.metrics.calls_failed, {"-32600": 1, "-32006": 1, "-32005": 1})

    def test_deadline(self) -> None:
        self.hub.ask(self.call, "x", "m", None, 1e9)
        self.clock.advance(299.9)
        self.assertEqual(self.call.outcomes, [])
        self.clock.advance(0.2)
        self.assertEqual((self.error().kind, self.error().sent), (Kind.TIMEOUT, True))
        self.assertEqual(self.metrics.calls_failed, {"-32002": 1})
        self.assert_nothing_left()

    def test_forgotten(self) -> None:
        id = self.asked()
        self.hub.forget(self.call)
        self.hub.forget(self.call)
        self.receive("x", result(id))
        self.assertEqual((self.call.outcomes, self.metrics.late_responses), ([], 1))
        self.assertEqual((self.metrics.calls, self.metrics.calls_answered, self.metrics.calls_failed), (1, 0, {}))
        self.assert_nothing_left()

    def test_disconnect(self) -> None:
        self.asked()
        self.disconnect("x")
        self.assertEqual((self.error().kind, self.error().client_id), (Kind.CONNECTION_LOST, "x"))
        self.assertEqual(self.metrics.calls_failed, {"-32003": 1})

    def test_a_connection_that_turns_out_to_be_dead(self) -> None:
        """Nothing was sent: neither is the call settled, nor is anything counted."""
        self.edge.on_send = lambda client_id, payload: self.disconnect("x")
        self.assertFalse(self.hub.ask(self.call, "x", "m", None))
        self.assertEqual((self.call.outcomes, self.metrics.calls, self.metrics.calls_failed), ([], 0, {}))
        self.assert_nothing_left()

    def test_such_a_connection_is_counted_once_with_a_deferred(self) -> None:
        self.edge.on_send = lambda client_id, payload: self.disconnect("x")
        self.assertEqual(self.error_of(self.hub.call("x", "m", None)).kind, Kind.NOT_CONNECTED)
        self.assertEqual((self.metrics.calls, self.metrics.calls_failed), (1, {"-32001": 1}))

    def test_a_connection_that_is_lost_once_it_was_sent(self) -> None:
        """In the same turn: who asked is told, after ask() has begun to send and before it returns."""

        def lost(client_id: str, payload: bytes) -> None:
            self.hub.client_disconnected("x", 1)
            self.assertEqual(self.call.outcomes, [])

        self.edge.on_send = lost
        self.assertTrue(self.hub.ask(self.call, "x", "m", None))
        self.assertEqual(self.error().kind, Kind.CONNECTION_LOST)
        self.assertEqual((self.metrics.calls, self.metrics.calls_failed), (1, {"-32003": 1}))

    def test_unexpected(self) -> None:
        def broken(client_id: str, payload: bytes) -> None:
            raise ZeroDivisionError

        self.edge.on_send = broken
        with self.assertRaises(RpcError) as caught:
            self.hub.ask(self.call, "x", "m", None)
        self.assertEqual((caught.exception.kind, caught.exception.sent), (Kind.NODE_UNREACHABLE, True))
        self.assertEqual((self.metrics.calls, self.metrics.calls_failed), (1, {"-32004": 1}))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_nothing_left()

    def test_notify(self) -> None:
        self.assertTrue(self.hub.notify_here("x", "m", b"[ 3 ]"))
        self.assertEqual(self.edge.sent, [("x", 1, b'{"jsonrpc":"2.0","method":"m","params":[ 3 ]}')])
        self.assertEqual(self.metrics.notifications, {"to_client": 1})
        self.edge.on_send = lambda client_id, payload: self.disconnect("x")
        self.assertFalse(self.hub.notify_here("x", "m", None))
        self.assertEqual(self.metrics.notifications, {"to_client": 1})


class PendingTests(HubTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.failures: list[RpcError] = []
        self.pending = Pending(self.clock, max_calls=9, max_per_owner=9, failed=self.failures.append)
        self.call = Told()

    def test_early(self) -> None:
        """What comes while the request leaves is told when it has left."""
        error = RpcError(Kind.CONNECTION_LOST, "x")
        for outcome, end in ((REPLY, self.pending.resolve), (error, self.pending.fail)):
            call = Told()
            id = self.pending.start(call, "a", "x", 5)
            self.assertTrue(end("a", id, outcome))  # type: ignore[operator]
            self.assertFalse(end("a", id, outcome))  # type: ignore[operator]
            self.assertEqual((call.outcomes, self.failures, len(self.pending)), ([], [], 0))
            self.pending.sent(call)
            self.assertEqual(call.outcomes, [outcome])
        self.assertEqual(self.failures, [error])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_deadline_before_it_was_sent(self) -> None:
        self.pending.start(self.call, "a", "x", 5)
        self.clock.advance(6)
        self.assertEqual(self.call.outcomes, [])
        self.pending.sent(self.call)
        self.assertEqual([error.kind for error in self.failures], [Kind.TIMEOUT])
        self.assertEqual(self.call.outcomes, self.failures)

    def test_who_asked_is_at_fault(self) -> None:
        """Neither who answered nor any other call suffers."""
        first, second = Raises(), Told()
        for call in (first, second):
            self.pending.start(call, "a", "x", 5)
            self.pending.sent(call)
        self.assertEqual(self.pending.fail_owner("a", lambda client_id: RpcError(Kind.CONNECTION_LOST, client_id)), 2)
        self.assertEqual((len(first.outcomes), len(second.outcomes)), (1, 1))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_ids(self) -> None:
        """They are raw JSON strings."""
        id, _ = self.pending.add("a", "x", 5)
        self.assertRegex(id, rb'^"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"$')
