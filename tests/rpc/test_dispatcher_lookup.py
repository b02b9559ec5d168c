"""Tests for :mod:`gateway.rpc.dispatcher`: clients that are not connected here, or not yet."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred

from gateway.protocol.errors import ErrorKind
from gateway.registry.errors import LeaseLostError, RegistryUnavailableError
from gateway.registry.interface import Location
from gateway.rpc.location_cache import LOOKUP_TIMEOUT
from gateway.rpc.pending import Reply
from tests.builders.dispatcher import DispatcherTestCase, remote_location, result

REPLY = Reply(b"1", None)


class ClaimInProgressTests(DispatcherTestCase):
    """A client whose claim is in progress is waited for."""

    def setUp(self) -> None:
        super().setUp()
        self.sessions.claiming["x"] = []

    def test_open(self) -> None:
        call = self.dispatcher.call("x", "m", None, 5.0)
        notified = self.dispatcher.notify("x", "n", None)
        self.assertEqual(self.sessions.sent, [])
        self.clock.advance(2)
        self.sessions.generations["x"] = 3
        self.sessions.finish_claim("x")
        request, notification = self.sent("x")
        self.assertEqual((request["method"], notification["method"]), ("m", "n"))
        self.successResultOf(notified)
        self.clock.advance(2.9)
        self.assertNoResult(call)
        self.receive("x", result(request["id"]), 3)
        self.assertEqual(self.successResultOf(call), REPLY)
        self.assertEqual(self.registry.queries, [])
        self.assert_nothing_left()

    def test_the_wait_counts(self) -> None:
        """It is part of the call's deadline."""
        call = self.dispatcher.call("x", "m", None, 5.0)
        self.clock.advance(2)
        self.sessions.generations["x"] = 3
        self.sessions.finish_claim("x")
        self.clock.advance(2.9)
        self.assertNoResult(call)
        self.clock.advance(0.2)
        self.assertEqual(self.error_of(call).kind, ErrorKind.TIMEOUT)
        self.assert_nothing_left()

    def test_not_open(self) -> None:
        call = self.dispatcher.call("x", "m", None)
        self.sessions.finish_claim("x")
        self.assertEqual(self.error_of(call).kind, ErrorKind.NOT_CONNECTED)
        self.assertEqual(self.registry.queries, ["x"])
        self.assert_nothing_left()

    def test_another_claim_after_the_first_one(self) -> None:
        call = self.dispatcher.call("x", "m", None)
        first = self.sessions.claiming["x"]
        self.sessions.claiming["x"] = []
        for waiting in first:
            waiting.callback(None)
        self.assertNoResult(call)
        self.sessions.generations["x"] = 3
        self.sessions.finish_claim("x")
        self.assertEqual(len(self.sent("x")), 1)

    def test_deadline(self) -> None:
        for pending in (self.dispatcher.call("x", "m", None, 5.0), self.dispatcher.notify("x", "m", None)):
            self.clock.advance(30)
            error = self.error_of(pending)
            self.assertEqual((error.kind, error.sent), (ErrorKind.NOT_CONNECTED, False))
        self.sessions.generations["x"] = 3
        self.sessions.finish_claim("x")
        self.assertEqual(self.sessions.sent, [])
        self.assert_nothing_left()

    def test_cancel(self) -> None:
        for pending in (self.dispatcher.call("x", "m", None), self.dispatcher.notify("x", "m", None)):
            pending.cancel()
            self.failureResultOf(pending, CancelledError)
        self.assert_nothing_left()
        self.sessions.generations["x"] = 3
        self.sessions.finish_claim("x")
        self.assertEqual(self.sessions.sent, [])

    def test_cancel_after_it_was_sent(self) -> None:
        call = self.dispatcher.call("x", "m", None)
        self.sessions.generations["x"] = 3
        self.sessions.finish_claim("x")
        self.assertEqual(len(self.sent("x")), 1)
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.assert_nothing_left()

    def test_too_many(self) -> None:
        calls = [self.dispatcher.call("x", "m", None) for _ in range(5)]
        self.sessions.generations["x"] = 3
        self.sessions.finish_claim("x")
        self.assertEqual(len(self.sent("x")), 4)
        self.assertEqual(self.error_of(calls[4]).kind, ErrorKind.TOO_MANY_CALLS)


class NoRemoteNodesTests(DispatcherTestCase):
    """Clients that are not connected here: the registry is queried."""

    def both(self) -> list[Deferred[Any]]:
        return [self.dispatcher.call("x", "m", b"[1]", 9.0), self.dispatcher.notify("x", "m", b"[1]")]

    def assert_both(self, kind: ErrorKind, sent: bool) -> None:
        for pending in self.both():
            error = self.error_of(pending)
            self.assertEqual((error.kind, error.client_id, error.sent), (kind, "x", sent))
        self.assert_nothing_left()

    def test_not_connected(self) -> None:
        self.assert_both(ErrorKind.NOT_CONNECTED, False)
        self.assertEqual(self.registry.queries, ["x", "x"])
        self.assertEqual(self.metrics.calls_failed, {"-32001": 1})

    def test_row_of_this_node(self) -> None:
        """The database has lost the release: the client was connected here."""
        self.registry.result = remote_location("this-node")
        self.assert_both(ErrorKind.NOT_CONNECTED, False)
        self.assertEqual(set(self.registry.released), {("x", 7)})

    def test_another_node(self) -> None:
        self.registry.result = remote_location()
        self.assert_both(ErrorKind.NODE_UNREACHABLE, False)

    def test_node_with_an_expired_lease(self) -> None:
        """An unstable node cannot tell whether it is dead; a stable one can."""
        self.registry.result = remote_location(live=False)
        self.membership.stable = False
        self.assert_both(ErrorKind.REGISTRY_UNAVAILABLE, False)
        self.membership.stable = True
        self.assert_both(ErrorKind.NOT_CONNECTED, False)

    def test_registry_unavailable(self) -> None:
        for error in (RegistryUnavailableError("gone"), LeaseLostError("gone")):
            self.registry.result = error
            self.assert_both(ErrorKind.REGISTRY_UNAVAILABLE, False)

    def test_registry_raises(self) -> None:
        self.registry.result = ZeroDivisionError()
        self.assert_both(ErrorKind.REGISTRY_UNAVAILABLE, False)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)

    def test_lookup_hangs(self) -> None:
        for pending in (self.dispatcher.call, self.dispatcher.notify):
            self.registry.result = Deferred()
            done: Deferred[Any] = pending("x", "m", None)
            self.clock.advance(LOOKUP_TIMEOUT - 0.1)
            self.assertNoResult(done)
            self.clock.advance(0.1)
            self.assertEqual(self.error_of(done).kind, ErrorKind.REGISTRY_UNAVAILABLE)
        self.assert_nothing_left()

    def test_deadline_before_the_lookup_returns(self) -> None:
        self.registry.result = Deferred()
        call = self.dispatcher.call("x", "m", None, 1.0)
        self.clock.advance(1)
        error = self.error_of(call)
        self.assertEqual((error.kind, error.sent), (ErrorKind.REGISTRY_UNAVAILABLE, False))
        self.assert_nothing_left()

    def test_cancel_during_the_lookup(self) -> None:
        cancelled = []
        for pending in (self.dispatcher.call, self.dispatcher.notify):
            self.registry.result = Deferred(cancelled.append)
            done: Deferred[Any] = pending("x", "m", None)
            done.cancel()
            self.failureResultOf(done, CancelledError)
        self.assertEqual(len(cancelled), 2)
        self.assert_nothing_left()

    def test_connected_here_meanwhile(self) -> None:
        for outcome in (None, remote_location("this-node"), remote_location()):
            found: Deferred[Location | None] = Deferred()
            self.registry.result = found
            call = self.dispatcher.call("x", "m", None)
            self.connect("x")
            found.callback(outcome)
            (request,) = self.sent("x")
            self.receive("x", result(request["id"]))
            self.assertEqual(self.successResultOf(call), REPLY)
            self.disconnect("x")
        self.assert_nothing_left()

    def test_about_to_be_connected_here(self) -> None:
        """The row is written before the connection opens."""
        found: Deferred[Location | None] = Deferred()
        self.registry.result = found
        self.dispatcher.call("x", "m", None)
        self.sessions.claiming["x"] = []
        found.callback(remote_location("this-node"))
        self.sessions.generations["x"] = 3
        self.sessions.finish_claim("x")
        self.assertEqual(len(self.sent("x")), 1)
