"""Tests for :mod:`gateway.rpc.remote`: notifications to clients that other nodes hold."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.interface import RegistryUnavailableError
from gateway.rpc.interface import NotDelivered, NotDeliveredError
from tests.rpc.fakes import RemoteDeliveryTestCase, remote_location

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
