"""Tests of gateway.websocket.handshake_limiter."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.errors import RequestRefusedError
from gateway.websocket.handshake_limiter import HandshakeLimiter, HandshakeSlot

HOST = "192.0.2.1"


class HandshakeLimiterTest(SynchronousTestCase):
    def limiter(self, max_handshakes: float = 4096, per_address: float = 200) -> HandshakeLimiter:
        self.clock = Clock()
        self.clock.advance(1000)
        return HandshakeLimiter(self.clock.seconds, max_handshakes, per_address)

    def identified(self, limiter: HandshakeLimiter, host: str) -> HandshakeSlot:
        slot = limiter.started()
        slot.identified(host)
        return slot

    def assert_too_many(self, limiter: HandshakeLimiter, host: str) -> RequestRefusedError:
        slot = limiter.started()
        refusal = self.assertRaises(RequestRefusedError, slot.identified, host)
        slot.finished()
        return refusal

    def test_limit_in_total(self) -> None:
        limiter = self.limiter(2)
        slots = [limiter.started(), limiter.started()]
        refusal = self.assertRaises(RequestRefusedError, limiter.started)
        self.assertEqual((refusal.status, refusal.reason), (503, "openings"))
        self.assertEqual(limiter.in_progress, 2)
        slots[0].finished()
        limiter.started()

    def test_limit_of_one_network(self) -> None:
        limiter = self.limiter(per_address=20)
        slots = [self.identified(limiter, HOST) for _ in range(100)]
        refusal = self.assert_too_many(limiter, HOST)
        self.assertEqual((refusal.status, refusal.reason, refusal.headers), (503, "rate", (("Retry-After", "1"),)))
        for _ in range(100):
            self.identified(limiter, "192.0.2.2")
        slots.pop().finished()
        self.identified(limiter, HOST)
        self.assert_too_many(limiter, HOST)

    def test_low_rate(self) -> None:
        """Many clients may share one address."""
        limiter = self.limiter(per_address=1)
        for _ in range(64):
            self.identified(limiter, HOST)
        self.assert_too_many(limiter, HOST)

    def test_ipv6_network(self) -> None:
        limiter = self.limiter(per_address=1)
        for number in range(64):
            self.identified(limiter, f"2001:db8:1:2::{number:x}")
        self.assert_too_many(limiter, "2001:db8:1:2:ffff::")
        self.identified(limiter, "2001:db8:1:3::")

    def test_no_limits_per_address(self) -> None:
        limiter = self.limiter(per_address=0)
        for slot in [self.identified(limiter, HOST) for _ in range(1000)]:
            slot.charged()
            slot.finished()
        self.assertEqual(limiter.in_progress, 0)

    def test_no_address(self) -> None:
        limiter = self.limiter(per_address=1)
        for slot in [self.identified(limiter, "") for _ in range(1000)]:
            slot.charged()

    def test_rate_of_one_network(self) -> None:
        limiter = self.limiter(per_address=2)
        self.identified(limiter, HOST).charged()
        self.identified(limiter, HOST).charged()
        refusal = self.assertRaises(RequestRefusedError, self.identified(limiter, HOST).charged)
        self.assertEqual((refusal.status, refusal.reason, refusal.headers), (503, "rate", (("Retry-After", "1"),)))
        self.identified(limiter, "192.0.2.2").charged()
        self.clock.advance(0.5)
        self.identified(limiter, HOST).charged()

    def test_charged_once(self) -> None:
        limiter = self.limiter(per_address=1)
        slot = self.identified(limiter, HOST)
        for _ in range(3):
            slot.charged()
        self.assertRaises(RequestRefusedError, self.identified(limiter, HOST).charged)

    def test_finished_once(self) -> None:
        limiter = self.limiter()
        slots = [self.identified(limiter, HOST), self.identified(limiter, HOST)]
        for _ in range(3):
            slots[0].finished()
        self.assertEqual((limiter.in_progress, list(limiter._per_network.values())), (1, [1]))

    def test_drops_beyond_enough_refusals(self) -> None:
        """Connections are dropped while they would be refused, and no longer."""
        limiter = self.limiter(per_address=2)
        self.assertFalse(limiter.should_drop(HOST))
        for _ in range(2):
            self.identified(limiter, HOST).charged()
        self.assertEqual([limiter.should_drop(HOST) for _ in range(52)], [False] * 50 + [True] * 2)
        self.assertFalse(limiter.should_drop("192.0.2.2"))
        self.clock.advance(0.5)
        self.assertFalse(limiter.should_drop(HOST))

    def test_drops_while_a_network_has_too_many_in_progress(self) -> None:
        limiter = self.limiter(per_address=20)
        for _ in range(100):
            self.identified(limiter, HOST)
        self.assertEqual([limiter.should_drop(HOST) for _ in range(51)], [False] * 50 + [True])
        self.identified(limiter, "192.0.2.2").finished()
        self.assertTrue(limiter.should_drop(HOST))

    def test_drops_while_too_many_are_in_progress(self) -> None:
        limiter = self.limiter(2, 0)
        limiter.started()
        self.assertEqual([limiter.should_drop(HOST) for _ in range(60)], [False] * 60)
        slot = limiter.started()
        hosts = [f"192.0.2.{number}" for number in range(51)]
        self.assertEqual([limiter.should_drop(host) for host in hosts], [False] * 50 + [True])
        slot.finished()
        self.assertFalse(limiter.should_drop(HOST))

    def test_nothing_is_kept(self) -> None:
        limiter = self.limiter()
        for slot in [self.identified(limiter, HOST) for _ in range(10)]:
            slot.finished()
        self.assertEqual((limiter.in_progress, limiter._per_network), (0, {}))
