"""Tests of gateway.websocket.limits."""

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
    HandshakeTicket,
    ReassemblyBudget,
    SlowConsumerDetector,
    unsent_bytes,
)
from tests.builders.frames import build_frame, close_frame
from tests.fakes.clients import FakeNode

HOST = "192.0.2.1"


class HandshakeLimiterTest(SynchronousTestCase):
    def limiter(self, max_handshakes: float = 4096, per_address: float = 200) -> HandshakeLimiter:
        self.clock = Clock()
        self.clock.advance(1000)
        return HandshakeLimiter(self.clock.seconds, max_handshakes, per_address)

    def identified(self, limiter: HandshakeLimiter, host: str) -> HandshakeTicket:
        ticket = limiter.started()
        ticket.identified(host)
        return ticket

    def assert_too_many(self, limiter: HandshakeLimiter, host: str) -> RequestRefusedError:
        ticket = limiter.started()
        refusal = self.assertRaises(RequestRefusedError, ticket.identified, host)
        ticket.finished()
        return refusal

    def test_limit_in_total(self) -> None:
        limiter = self.limiter(2)
        tickets = [limiter.started(), limiter.started()]
        refusal = self.assertRaises(RequestRefusedError, limiter.started)
        self.assertEqual((refusal.status, refusal.reason), (503, "openings"))
        self.assertEqual(limiter.in_progress, 2)
        tickets[0].finished()
        limiter.started()

    def test_limit_of_one_network(self) -> None:
        limiter = self.limiter(per_address=20)
        tickets = [self.identified(limiter, HOST) for _ in range(100)]
        refusal = self.assert_too_many(limiter, HOST)
        self.assertEqual((refusal.status, refusal.reason, refusal.headers), (429, "rate", (("Retry-After", "1"),)))
        for _ in range(100):
            self.identified(limiter, "192.0.2.2")
        tickets.pop().finished()
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
        for ticket in [self.identified(limiter, HOST) for _ in range(1000)]:
            ticket.charged()
            ticket.finished()
        self.assertEqual(limiter.in_progress, 0)

    def test_no_address(self) -> None:
        limiter = self.limiter(per_address=1)
        for ticket in [self.identified(limiter, "") for _ in range(1000)]:
            ticket.charged()

    def test_rate_of_one_network(self) -> None:
        limiter = self.limiter(per_address=2)
        self.identified(limiter, HOST).charged()
        self.identified(limiter, HOST).charged()
        refusal = self.assertRaises(RequestRefusedError, self.identified(limiter, HOST).charged)
        self.assertEqual((refusal.status, refusal.reason, refusal.headers), (429, "rate", (("Retry-After", "1"),)))
        self.identified(limiter, "192.0.2.2").charged()
        self.clock.advance(0.5)
        self.identified(limiter, HOST).charged()

    def test_charged_once(self) -> None:
        limiter = self.limiter(per_address=1)
        ticket = self.identified(limiter, HOST)
        for _ in range(3):
            ticket.charged()
        self.assertRaises(RequestRefusedError, self.identified(limiter, HOST).charged)

    def test_finished_once(self) -> None:
        limiter = self.limiter()
        tickets = [self.identified(limiter, HOST), self.identified(limiter, HOST)]
        for _ in range(3):
            tickets[0].finished()
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
        ticket = limiter.started()
        hosts = [f"192.0.2.{number}" for number in range(51)]
        self.assertEqual([limiter.should_drop(host) for host in hosts], [False] * 50 + [True])
        ticket.finished()
        self.assertFalse(limiter.should_drop(HOST))

    def test_nothing_is_kept(self) -> None:
        limiter = self.limiter()
        for ticket in [self.identified(limiter, HOST) for _ in range(10)]:
            ticket.finished()
        self.assertEqual((limiter.in_progress, limiter._per_network), (0, {}))


class FakeConnection:
    def __init__(self) -> None:
        self.closed: list[int] = []

    def close_with(self, code: int, reason: str = "") -> None:
        self.closed.append(code)


class ReassemblyBudgetTest(SynchronousTestCase):
    def test_closes_those_that_were_charged_least_recently(self) -> None:
        metrics = Metrics()
        budget = ReassemblyBudget(10, metrics)
        senders = [FakeConnection() for _ in range(MAX_INCOMPLETE_MESSAGES)]
        for sender in senders:
            budget.charge(sender, 9)
        for sender in reversed(senders):
            budget.charge(sender, 1)
        self.assertEqual([sender.closed for sender in senders], [[]] * MAX_INCOMPLETE_MESSAGES)
        budget.charge(FakeConnection(), 11)
        self.assertEqual([sender.closed for sender in senders[-3:]], [[], [1013], [1013]])
        self.assertEqual(metrics.slow_senders, 2)
        self.assertEqual(budget.total_bytes, 10 * (MAX_INCOMPLETE_MESSAGES - 2) + 11)

    def test_released_messages_do_not_count(self) -> None:
        budget = ReassemblyBudget(1, Metrics())
        sender = FakeConnection()
        for _ in range(3):
            budget.charge(sender, MAX_INCOMPLETE_MESSAGES)
            budget.release(sender)
            budget.release(sender)
        self.assertEqual((sender.closed, budget.total_bytes), ([], 0))

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 700)), max_size=60))
    def test_limit_is_never_exceeded(self, charges: list[tuple[int, int]]) -> None:
        budget = ReassemblyBudget(4, Metrics())
        senders = [FakeConnection() for _ in range(6)]
        for number, size in charges:
            if size % 7:
                budget.charge(senders[number], size)
            else:
                budget.release(senders[number])
            self.assertLessEqual(budget.total_bytes, 4 * MAX_INCOMPLETE_MESSAGES)
            self.assertEqual(budget.total_bytes, sum(budget._held.values()))


class ReassemblyBudgetConnectionTest(SynchronousTestCase):
    """The budget as charged by real connections."""

    SIZE = 100

    def setUp(self) -> None:
        self.node = FakeNode(max_message_size=self.SIZE, capacity=1000, openings_per_address=0)
        self.budget = self.node.factory.reassembly_budget

    def test_every_end_of_a_message(self) -> None:
        """The bytes of a message are released however it ends."""
        fragment = build_frame(1, b"x" * 50, fin=False)
        for end in (
            build_frame(0, b""),
            close_frame(1000),
            build_frame(2, b""),
            build_frame(0, b"x" * 51),
            b"\xff" * 20,
            build_frame(0, b"\xff"),
        ):
            client = self.node.connect()
            client.send(fragment)
            self.assertEqual(self.budget.total_bytes, 50)
            client.send(end)
            self.assertEqual(self.budget.total_bytes, 0, end)
            client.lose()
        client = self.node.connect()
        client.send(fragment + build_frame(0, b"x" * 40)[:-1])
        self.assertEqual(self.budget.total_bytes, 89)
        client.lose()
        self.assertEqual((self.budget.total_bytes, self.budget._held), (0, {}))

    def test_too_many_incomplete_messages(self) -> None:
        """The connections charged most recently can still complete theirs."""
        clients = [self.node.connect(f"c{number}") for number in range(MAX_INCOMPLETE_MESSAGES + 2)]
        for client in clients:
            client.send(build_frame(1, b"x" * self.SIZE, fin=False))
        self.assertEqual([client.close_code() for client in clients[:2]], [1013, 1013])
        self.assertEqual(self.node.sessions.count(), MAX_INCOMPLETE_MESSAGES)
        clients[2].send(build_frame(0, b""))
        self.assertEqual(self.node.handler.messages, [b"x" * self.SIZE])
        self.assertEqual(self.node.metrics.closed, {"1013": 2})


class Descriptor(FileDescriptor):
    """A transport of Twisted's with a simulated kernel buffer."""

    def __init__(self) -> None:
        super().__init__(MemoryReactorClock())
        self.connected = 1
        self.room = 0

    def writeSomeData(self, data: bytes) -> int:
        size = min(len(data), self.room)
        self.room -= size
        return size

    def send(self, size: int) -> None:
        """Let the kernel take that many bytes."""
        self.room = size
        while self.room and unsent_bytes(self):
            self.doWrite()


class UnsentBytesTest(SynchronousTestCase):
    """unsent_bytes()"""

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
        """The TLS protocol is a wrapper of the same base class."""
        self.assertTrue(issubclass(TLSMemoryBIOProtocol, ProtocolWrapper))

    def test_another_transport(self) -> None:
        self.assertEqual(unsent_bytes(StringTransport()), math.inf)


class SlowConsumerDetectorTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.transport = Descriptor()
        self.slow: list[float] = []
        self.started_at = self.clock.seconds()
        self.detector = SlowConsumerDetector(
            self.transport,
            TimerWheel(self.clock),
            100,
            50,
            lambda: self.slow.append(self.clock.seconds() - self.started_at),
        )

    def write(self, size: int) -> None:
        self.transport.write(b"x" * size)
        self.detector.add_written(size)

    def advance(self, seconds: float) -> None:
        self.clock.pump([0.25] * round(seconds * 4))

    def test_reader_that_reads_nothing(self) -> None:
        self.write(101)
        self.advance(10)
        self.assertEqual(self.slow, [SLOW_CONSUMER_TIMEOUT])

    def test_little_is_queued(self) -> None:
        self.write(100)
        self.advance(10)
        self.assertEqual(self.slow, [])
        self.write(1)
        self.write(1)
        self.assertEqual(self.slow, [10.0])

    def test_burst(self) -> None:
        self.write(150)
        self.assertEqual(self.slow, [])
        self.write(1)
        self.assertEqual(self.slow, [0.0])
        self.advance(10)
        self.assertEqual(self.slow, [0.0])

    def test_bytes_that_filled_the_buffer_are_not_counted(self) -> None:
        self.transport.write(b"x" * 1000)
        self.write(100)
        self.advance(10)
        self.assertEqual(self.slow, [])

    def test_link_that_is_always_busy(self) -> None:
        """The buffer is never empty, but little is queued in it."""
        self.transport.write(b"x" * 50)
        for _ in range(100):
            self.write(40)
            self.transport.send(40)
            self.advance(0.25)
        self.assertEqual(self.slow, [])
        self.write(80)
        self.assertEqual(self.slow, [25.0])

    def test_stopped(self) -> None:
        self.write(140)
        self.detector.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.write(1000)
        self.detector.stop()
        self.assertEqual(self.slow, [])

    def test_stopped_by_its_callback(self) -> None:
        detector = SlowConsumerDetector(self.transport, TimerWheel(self.clock), 0, 1000, lambda: detector.stop())
        self.detector.stop()
        detector.add_written(1)
        self.transport.write(b"x")
        self.advance(10)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_time_in_which_the_process_was_stopped_does_not_count(self) -> None:
        """All of it passes at once, and timers run before anything is written."""
        self.write(120)
        self.clock.advance(1000)
        self.transport.send(20)
        self.advance(10)
        self.assertEqual(self.slow, [])
