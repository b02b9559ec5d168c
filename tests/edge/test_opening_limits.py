"""Tests of gateway.websocket.limits."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.handshake import RequestRefusedError
from gateway.websocket.limits import HandshakeLimiter

HOST = "192.0.2.1"


class HandshakeLimiterTest(SynchronousTestCase):
    def limiter(self, most: float = 4096, per_address: float = 200) -> HandshakeLimiter:
        self.clock = Clock()
        self.clock.advance(1000)
        return HandshakeLimiter(self.clock.seconds, most, per_address)

    def identified(self, openings: HandshakeLimiter, host: str, count: int) -> list[str]:
        networks = []
        for _ in range(count):
            openings.started()
            networks.append(openings.identified(host))
        return networks

    def test_in_all(self) -> None:
        openings = self.limiter(2)
        openings.started()
        openings.started()
        refusal = self.assertRaises(RequestRefusedError, openings.started)
        self.assertEqual((refusal.status, refusal.reason), (503, "openings"))
        self.assertEqual(openings.in_progress, 3)
        openings.finished("")
        openings.finished("")
        openings.started()

    def test_of_one_network(self) -> None:
        openings = self.limiter(per_address=20)
        networks = self.identified(openings, HOST, 100)
        refusal = self.assertRaises(RequestRefusedError, openings.identified, HOST)
        self.assertEqual((refusal.status, refusal.reason, refusal.headers), (429, "rate", (("Retry-After", "1"),)))
        self.identified(openings, "192.0.2.2", 100)
        openings.finished(networks.pop())
        self.identified(openings, HOST, 1)
        self.assertRaises(RequestRefusedError, openings.identified, HOST)

    def test_a_low_rate(self) -> None:
        """Many clients may well be behind one address."""
        openings = self.limiter(per_address=1)
        self.identified(openings, HOST, 64)
        self.assertRaises(RequestRefusedError, openings.identified, HOST)

    def test_a_network_of_ipv6(self) -> None:
        openings = self.limiter(per_address=1)
        for number in range(64):
            openings.identified(f"2001:db8:1:2::{number:x}")
        self.assertRaises(RequestRefusedError, openings.identified, "2001:db8:1:2:ffff::")
        openings.identified("2001:db8:1:3::")

    def test_no_limits_per_address(self) -> None:
        openings = self.limiter(per_address=0)
        networks = self.identified(openings, HOST, 1000)
        for network in networks:
            openings.charged(network)
            openings.finished(network)
        self.assertEqual(openings.in_progress, 0)

    def test_no_address(self) -> None:
        openings = self.limiter(per_address=1)
        for network in self.identified(openings, "", 1000):
            openings.charged(network)

    def test_a_second(self) -> None:
        openings = self.limiter(per_address=2)
        network = openings.identified(HOST)
        openings.charged(network)
        openings.charged(network)
        refusal = self.assertRaises(RequestRefusedError, openings.charged, network)
        self.assertEqual((refusal.status, refusal.reason, refusal.headers), (429, "rate", (("Retry-After", "1"),)))
        openings.charged(openings.identified("192.0.2.2"))
        self.clock.advance(0.5)
        openings.charged(network)

    def test_enough_were_told(self) -> None:
        """Those beyond are dropped, as long as they would be refused."""
        openings = self.limiter(per_address=2)
        network = openings.identified(HOST)
        self.assertFalse(openings.should_drop(HOST))
        for _ in range(2):
            openings.charged(network)
        self.assertEqual([openings.should_drop(HOST) for _ in range(52)], [False] * 50 + [True] * 2)
        self.assertFalse(openings.should_drop("192.0.2.2"))
        self.clock.advance(0.5)
        self.assertFalse(openings.should_drop(HOST))

    def test_enough_of_the_silent_were_told(self) -> None:
        openings = self.limiter(per_address=20)
        self.identified(openings, HOST, 100)
        self.assertEqual([openings.should_drop(HOST) for _ in range(51)], [False] * 50 + [True])
        openings.finished(openings.identified("192.0.2.2"))
        self.assertTrue(openings.should_drop(HOST))

    def test_enough_were_told_that_there_are_too_many(self) -> None:
        openings = self.limiter(2, 0)
        openings.started()
        self.assertEqual([openings.should_drop(HOST) for _ in range(60)], [False] * 60)
        openings.started()
        hosts = [f"192.0.2.{number}" for number in range(51)]
        self.assertEqual([openings.should_drop(host) for host in hosts], [False] * 50 + [True])
        openings.finished("")
        self.assertFalse(openings.should_drop(HOST))

    def test_nothing_is_kept(self) -> None:
        openings = self.limiter()
        for network in self.identified(openings, HOST, 10):
            openings.finished(network)
        self.assertEqual((openings.in_progress, openings._per_network), (0, {}))
