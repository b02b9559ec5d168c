"""Tests of gateway.websocket.slow_consumer."""

from __future__ import annotations

import math
from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.protocols.policies import ProtocolWrapper
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.trial.unittest import SynchronousTestCase

from gateway.net.proxy_protocol import ProxyProtocolEndpoint
from gateway.net.transport import unsent_bytes
from gateway.util.timers import TimerWheel
from gateway.websocket.slow_consumer import SLOW_CONSUMER_TIMEOUT, SlowConsumerDetector


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
