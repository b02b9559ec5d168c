"""Tests for :mod:`gateway.rpc.remote`: notifications to clients that other nodes hold."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred

from gateway.protocol.errors import Kind, RpcError
from gateway.registry.interface import RegistryUnavailable
from gateway.rpc.interface import Miss, Missed
from tests.rpc.fakes import SeekingTestCase, elsewhere

MOVED = elsewhere("third-node", generation=8)


class NotifyTests(SeekingTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.telling = self.hub.notify("x", "m", b"[1]")

    def answer(self, outcome: Exception | None, registry: Any = MOVED) -> None:
        """The node that was asked last answers; the registry knows that meanwhile."""
        self.registry.outcome = registry
        telling = self.elsewhere.telling[-1]
        if outcome is None:
            telling.callback(None)
        else:
            telling.errback(outcome)

    def assert_failed(self, kind: Kind, sent: bool) -> None:
        error = self.error_of(self.telling)
        self.assertEqual((error.kind, error.client_id, error.sent), (kind, "x", sent))
        self.assert_nothing_left()

    def test_told(self) -> None:
        self.assertEqual(self.elsewhere.told, [(elsewhere(), "m", b"[1]", 30.0, False)])
        self.assertNoResult(self.telling)
        self.answer(None)
        self.assertIsNone(self.successResultOf(self.telling))
        # It is counted where the client is.
        self.assertEqual((self.counted(), self.metrics.notifications), ((0, 0, {}), {}))
        self.assert_nothing_left()

    def test_remembered(self) -> None:
        self.answer(None)
        self.hub.notify("x", "m", None)
        self.assertEqual((len(self.elsewhere.told), self.registry.asked), (2, ["x"]))

    def test_missed(self) -> None:
        for miss in Miss:
            self.clock.advance(2)
            self.answer(Missed(miss))
            self.assertEqual(self.elsewhere.told[-1], (MOVED, "m", b"[1]", 28.0, False))
            self.answer(None)
            self.successResultOf(self.telling)
            self.hub._locations.drop("x")
            self.registry.outcome = elsewhere()
            self.telling = self.hub.notify("x", "m", b"[1]")

    def test_missed_again(self) -> None:
        self.answer(Missed(Miss.NOT_HERE))
        self.answer(Missed(Miss.NOT_HERE))
        self.assert_failed(Kind.NOT_CONNECTED, False)

    def test_lease_lost_and_the_registry_away(self) -> None:
        self.answer(Missed(Miss.LEASE_LOST), RegistryUnavailable("gone"))
        self.assertEqual(self.elsewhere.told[-1], (elsewhere(), "m", b"[1]", 30.0, True))

    def test_unreachable(self) -> None:
        self.answer(RpcError(Kind.NODE_UNREACHABLE, "x", sent=False))
        self.answer(None)
        self.successResultOf(self.telling)

    def test_failed(self) -> None:
        """The errors of the node, and of the link, are passed on."""
        self.answer(RpcError(Kind.NODE_UNREACHABLE, "x", sent=True))
        self.assert_failed(Kind.NODE_UNREACHABLE, True)
        self.assertEqual((self.counted(), self.remembered()), ((0, 0, {}), None))

    def test_at_fault(self) -> None:
        self.answer(ZeroDivisionError())
        self.assert_failed(Kind.NODE_UNREACHABLE, True)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_it_is_here_by_now(self) -> None:
        self.connect("x", 9)
        self.answer(Missed(Miss.NOT_HERE))
        self.successResultOf(self.telling)
        self.assertEqual([sent[:2] for sent in self.edge.sent], [("x", 9)])
        self.assertEqual(self.metrics.notifications, {"to_client": 1})
        self.assert_nothing_left()

    def test_the_node_keeps_the_deadline(self) -> None:
        self.clock.advance(40)
        self.assertNoResult(self.telling)
        self.answer(Missed(Miss.NOT_HERE), Deferred())
        self.clock.advance(0.06)
        self.assert_failed(Kind.REGISTRY_UNAVAILABLE, False)

    def test_cancel(self) -> None:
        self.telling.cancel()
        self.failureResultOf(self.telling, CancelledError)
        self.assertEqual((self.elsewhere.cancelled, self.elsewhere.forgotten), (1, []))
        self.assert_nothing_left()

    def test_cancel_while_it_is_looked_up_again(self) -> None:
        self.answer(Missed(Miss.NOT_HERE), Deferred())
        self.telling.cancel()
        self.failureResultOf(self.telling, CancelledError)
        self.assert_nothing_left()

    def test_refused(self) -> None:
        for method, kind in (("gateway.x", Kind.INVALID_REQUEST), ("m" * 2000, Kind.TOO_LARGE)):
            self.assertEqual(self.error_of(self.hub.notify("x", method, None)).kind, kind)
        self.assertEqual(len(self.elsewhere.told), 1)
