"""Tests of gateway.websocket.limits."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.handshake import Refusal
from gateway.websocket.limits import Openings

HOST = "192.0.2.1"


class OpeningsTest(SynchronousTestCase):
    def openings(self, most: float = 4096, per_address: float = 200) -> Openings:
        self.clock = Clock()
        self.clock.advance(1000)
        return Openings(self.clock.seconds, most, per_address)

    def located(self, openings: Openings, host: str, count: int) -> list[str]:
        networks = []
        for _ in range(count):
            openings.begin()
            networks.append(openings.locate(host))
        return networks

    def test_in_all(self) -> None:
        openings = self.openings(2)
        openings.begin()
        openings.begin()
        refusal = self.assertRaises(Refusal, openings.begin)
        self.assertEqual((refusal.status, refusal.word), (503, "openings"))
        self.assertEqual(openings.total, 3)
        openings.end("")
        openings.end("")
        openings.begin()

    def test_of_one_network(self) -> None:
        openings = self.openings(per_address=20)
        networks = self.located(openings, HOST, 100)
        refusal = self.assertRaises(Refusal, openings.locate, HOST)
        self.assertEqual((refusal.status, refusal.word, refusal.headers), (429, "rate", (("Retry-After", "1"),)))
        self.located(openings, "192.0.2.2", 100)
        openings.end(networks.pop())
        self.located(openings, HOST, 1)
        self.assertRaises(Refusal, openings.locate, HOST)

    def test_a_low_rate(self) -> None:
        """Many clients may well be behind one address."""
        openings = self.openings(per_address=1)
        self.located(openings, HOST, 64)
        self.assertRaises(Refusal, openings.locate, HOST)

    def test_a_network_of_ipv6(self) -> None:
        openings = self.openings(per_address=1)
        for number in range(64):
            openings.locate(f"2001:db8:1:2::{number:x}")
        self.assertRaises(Refusal, openings.locate, "2001:db8:1:2:ffff::")
        openings.locate("2001:db8:1:3::")

    def test_no_limits_per_address(self) -> None:
        openings = self.openings(per_address=0)
        networks = self.located(openings, HOST, 1000)
        for network in networks:
            openings.heard(network)
            openings.end(network)
        self.assertEqual(openings.total, 0)

    def test_no_address(self) -> None:
        openings = self.openings(per_address=1)
        for network in self.located(openings, "", 1000):
            openings.heard(network)

    def test_a_second(self) -> None:
        openings = self.openings(per_address=2)
        network = openings.locate(HOST)
        openings.heard(network)
        openings.heard(network)
        refusal = self.assertRaises(Refusal, openings.heard, network)
        self.assertEqual((refusal.status, refusal.word, refusal.headers), (429, "rate", (("Retry-After", "1"),)))
        openings.heard(openings.locate("192.0.2.2"))
        self.clock.advance(0.5)
        openings.heard(network)

    def test_enough_were_told(self) -> None:
        """Those beyond are dropped, as long as they would be refused."""
        openings = self.openings(per_address=2)
        network = openings.locate(HOST)
        self.assertFalse(openings.drops(HOST))
        for _ in range(2):
            openings.heard(network)
        self.assertEqual([openings.drops(HOST) for _ in range(52)], [False] * 50 + [True] * 2)
        self.assertFalse(openings.drops("192.0.2.2"))
        self.clock.advance(0.5)
        self.assertFalse(openings.drops(HOST))

    def test_enough_of_the_silent_were_told(self) -> None:
        openings = self.openings(per_address=20)
        self.located(openings, HOST, 100)
        self.assertEqual([openings.drops(HOST) for _ in range(51)], [False] * 50 + [True])
        openings.end(openings.locate("192.0.2.2"))
        self.assertTrue(openings.drops(HOST))

    def test_enough_were_told_that_there_are_too_many(self) -> None:
        openings = self.openings(2, 0)
        openings.begin()
        self.assertEqual([openings.drops(HOST) for _ in range(60)], [False] * 60)
        openings.begin()
        hosts = [f"192.0.2.{number}" for number in range(51)]
        self.assertEqual([openings.drops(host) for host in hosts], [False] * 50 + [True])
        openings.end("")
        self.assertFalse(openings.drops(HOST))

    def test_nothing_is_kept(self) -> None:
        openings = self.openings()
        for network in self.located(openings, HOST, 10):
            openings.end(network)
        self.assertEqual((openings.total, openings._of_one), (0, {}))
