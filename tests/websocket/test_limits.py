"""Tests of gateway.websocket.limits.

Tests of gateway.websocket.limits.

Tests of gateway.websocket.limits.
"""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.abstract import FileDescriptor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.protocols.policies import ProtocolWrapper
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.trial.unittest import SynchronousTestCase

from gateway.metrics import Metrics
from gateway.net.proxy_protocol import ProxyProtocolEndpoint
from gateway.protocol.errors import RequestRefusedError
from gateway.util.timers import TimerWheel
from gateway.websocket.limits import (
    MAX_INCOMPLETE_MESSAGES,
    SLOW_CONSUMER_TIMEOUT,
    HandshakeLimiter,
    ReassemblyBudget,
    SlowConsumerDetector,
    unsent_bytes,
)
from tests.builders.frames import build_frame, close_frame
from tests.fakes.clients import FakeNode

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


class FakeConnection:
    def __init__(self) -> None:
        self.closed: list[int] = []

    def close_with(self, code: int, reason: str = "") -> None:
        self.closed.append(code)


class ReassemblyBudgetTest(SynchronousTestCase):
    def test_who_is_silent_for_longest_is_the_first_to_go(self) -> None:
        metrics = Metrics()
        unfinished = ReassemblyBudget(10, metrics)
        senders = [FakeConnection() for _ in range(MAX_INCOMPLETE_MESSAGES)]
        for sender in senders:
            unfinished.charge(sender, 9)
        for sender in reversed(senders):
            unfinished.charge(sender, 1)
        self.assertEqual([sender.closed for sender in senders], [[]] * MAX_INCOMPLETE_MESSAGES)
        unfinished.charge(FakeConnection(), 11)
        self.assertEqual([sender.closed for sender in senders[-3:]], [[], [1013], [1013]])
        self.assertEqual(metrics.slow_senders, 2)
        self.assertEqual(unfinished.total_bytes, 10 * (MAX_INCOMPLETE_MESSAGES - 2) + 11)

    def test_those_that_are_whole_or_gone_do_not_count(self) -> None:
        unfinished = ReassemblyBudget(1, Metrics())
        one = FakeConnection()
        for _ in range(3):
            unfinished.charge(one, MAX_INCOMPLETE_MESSAGES)
            unfinished.release(one)
            unfinished.release(one)
        self.assertEqual((one.closed, unfinished.total_bytes), ([], 0))

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 700)), max_size=60))
    def test_never_more(self, said: list[tuple[int, int]]) -> None:
        unfinished = ReassemblyBudget(4, Metrics())
        senders = [FakeConnection() for _ in range(6)]
        for number, size in said:
            if size % 7:
                unfinished.charge(senders[number], size)
            else:
                unfinished.release(senders[number])
            self.assertLessEqual(unfinished.total_bytes, 4 * MAX_INCOMPLETE_MESSAGES)
            self.assertEqual(unfinished.total_bytes, sum(unfinished._held.values()))


class ReassemblyBudgetConnectionTest(SynchronousTestCase):
    """Real connections."""

    SIZE = 100

    def setUp(self) -> None:
        self.node = FakeNode(max_message_size=self.SIZE, capacity=1000, openings_per_address=0)
        self.unfinished = self.node.factory.reassembly_budget

    def test_every_end_of_a_message(self) -> None:
        """However a message ends, nothing is held of it."""
        half = build_frame(1, b"x" * 50, fin=False)
        for end in (
            build_frame(0, b""),
            close_frame(1000),
            build_frame(2, b""),
            build_frame(0, b"x" * 51),
            b"\xff" * 20,
            build_frame(0, b"\xff"),
        ):
            client = self.node.connect()
            client.send(half)
            self.assertEqual(self.unfinished.total_bytes, 50)
            client.send(end)
            self.assertEqual(self.unfinished.total_bytes, 0, end)
            client.lose()
        client = self.node.connect()
        client.send(half + build_frame(0, b"x" * 40)[:-1])
        self.assertEqual(self.unfinished.total_bytes, 89)
        client.lose()
        self.assertEqual((self.unfinished.total_bytes, self.unfinished._held), (0, {}))

    def test_too_many(self) -> None:
        """Those that began last can still end theirs."""
        clients = [self.node.connect(f"c{number}") for number in range(MAX_INCOMPLETE_MESSAGES + 2)]
        for client in clients:
            client.send(build_frame(1, b"x" * self.SIZE, fin=False))
        self.assertEqual([client.close_code() for client in clients[:2]], [1013, 1013])
        self.assertEqual(self.node.sessions.count(), MAX_INCOMPLETE_MESSAGES)
        clients[2].send(build_frame(0, b""))
        self.assertEqual(self.node.handler.messages, [b"x" * self.SIZE])
        self.assertEqual(self.node.metrics.closed, {"1013": 2})


class Descriptor(FileDescriptor):
    """A transport of Twisted's whose kernel takes as many bytes as the test says."""

    def __init__(self) -> None:
        super().__init__(MemoryReactorClock())
        self.connected = 1
        self.taken = 0

    def writeSomeData(self, data: bytes) -> int:
        taken = min(len(data), self.taken)
        self.taken -= taken
        return taken

    def send(self, size: int) -> None:
        """The kernel takes so many bytes."""
        self.taken = size
        while self.taken and unsent_bytes(self):
            self.doWrite()


class UnsentBytesTest(SynchronousTestCase):
    """unsent()"""

    def test_descriptor(self) -> None:
        transport = Descriptor()
        self.assertEqual(unsent_bytes(transport), 0)
        transport.write(b"x" * 300000)
        self.assertEqual(unsent_bytes(transport), 300000)
        transport.send(70000)
        transport.write(b"y" * 50)
        self.assertEqual(unsent_bytes(transport), 230050)
        transport.send(230050)
        self.assertEqual(unsent_bytes(transport), 0)

    def test_behind_the_proxy_protocol(self) -> None:
        reactor, protocol = MemoryReactorClock(), Protocol()
        ProxyProtocolEndpoint(serverFromString(reactor, "tcp:1")).listen(Factory.forProtocol(lambda: protocol))
        transport: Any = Descriptor()
        reactor.tcpServers[0][1].buildProtocol(None).makeConnection(transport)
        self.assertIsNot(protocol.transport, transport)
        protocol.transport.write(b"abc")
        self.assertEqual(unsent_bytes(protocol.transport), 3)

    def test_behind_tls(self) -> None:
        """It is a wrapper of the same kind."""
        self.assertTrue(issubclass(TLSMemoryBIOProtocol, ProtocolWrapper))

    def test_another_transport(self) -> None:
        self.assertEqual(unsent_bytes(StringTransport()), math.inf)


class SlowConsumerDetectorTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.transport = Descriptor()
        self.slow: list[float] = []
        self.began = self.clock.seconds()
        self.backlog = SlowConsumerDetector(
            self.transport, TimerWheel(self.clock), 100, 50, lambda: self.slow.append(self.clock.seconds() - self.began)
        )

    def write(self, size: int) -> None:
        self.transport.write(b"x" * size)
        self.backlog.add_written(size)

    def advance(self, seconds: float) -> None:
        self.clock.pump([0.25] * round(seconds * 4))

    def test_nothing_is_read(self) -> None:
        self.write(101)
        self.advance(10)
        self.assertEqual(self.slow, [SLOW_CONSUMER_TIMEOUT])

    def test_a_little_waits(self) -> None:
        self.write(100)
        self.advance(10)
        self.assertEqual(self.slow, [])
        self.write(1)
        self.write(1)
        self.assertEqual(self.slow, [10.0])

    def test_a_burst(self) -> None:
        self.write(150)
        self.assertEqual(self.slow, [])
        self.write(1)
        self.assertEqual(self.slow, [0.0])
        self.advance(10)
        self.assertEqual(self.slow, [0.0])

    def test_what_filled_the_buffer_is_not_counted(self) -> None:
        self.transport.write(b"x" * 1000)
        self.write(100)
        self.advance(10)
        self.assertEqual(self.slow, [])

    def test_a_link_that_is_always_busy(self) -> None:
        """Its buffer is never empty, but little waits in it."""
        self.transport.write(b"x" * 50)
        for _ in range(100):
            self.write(40)
            self.transport.send(40)
            self.advance(0.25)
        self.assertEqual(self.slow, [])
        self.write(80)
        self.assertEqual(self.slow, [25.0])

    def test_ended(self) -> None:
        self.write(140)
        self.backlog.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.write(1000)
        self.backlog.stop()
        self.assertEqual(self.slow, [])

    def test_ended_by_what_it_calls(self) -> None:
        backlog = SlowConsumerDetector(self.transport, TimerWheel(self.clock), 0, 1000, lambda: backlog.stop())
        self.backlog.stop()
        backlog.add_written(1)
        self.transport.write(b"x")
        self.advance(10)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_pause_of_this_process_is_not_the_readers(self) -> None:
        """All of it passes at once, and timers come before anything is written."""
        self.write(120)
        self.clock.advance(1000)
        self.transport.send(20)
        self.advance(10)
        self.assertEqual(self.slow, [])
