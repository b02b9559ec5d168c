"""Tests of gateway.websocket.limits."""

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
from gateway.util.timers import TimerWheel
from gateway.websocket.limits import SLOW_CONSUMER_TIMEOUT, SlowConsumerDetector, unsent_bytes


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
