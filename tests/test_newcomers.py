"""Tests of gateway.net.accept, with Twisted's own ports and transports."""

from __future__ import annotations

import itertools
import socket
import struct
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from gateway.net.accept import IDLE_AFTER, MAX_EVENTS, HandshakePoller


class EchoProtocol(Protocol):
    """Sends everything back; ``boom`` is an error."""

    def connectionMade(self) -> None:
        self.factory.connections.append(self)

    def dataReceived(self, data: bytes) -> None:
        self.factory.received.append(data)
        if data == b"boom":
            raise ZeroDivisionError
        self.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.lost.append(reason.type.__name__)


class EchoFactory(Factory):
    protocol = EchoProtocol
    noisy = False

    def __init__(self) -> None:
        self.connections: list[Any] = []
        self.received: list[bytes] = []
        self.lost: list[str] = []


class HandshakePollerTests(TestCase):
    def setUp(self) -> None:
        self.calls = itertools.count()
        self.poller = HandshakePoller(reactor, lambda: next(self.calls))
        self.poller.start()
        self.factory = EchoFactory()
        self.port: Any = reactor.listenTCP(0, self.factory, interface="127.0.0.1", backlog=200)
        self.poller.adopt_port(self.port)

    async def tearDown(self) -> None:
        await self.port.stopListening()
        for protocol in self.factory.connections:
            protocol.transport.abortConnection()
        await self.next_turn()
        self.assertEqual((self.poller._selectables, self.poller._event_masks), ({}, {}))
        self.poller.stop()
        self.assertNotIn(self.poller, reactor.getReaders())

    def dial(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port.getHost().port))
        client.setblocking(False)
        self.addCleanup(client.close)
        return client

    def next_turn(self) -> Deferred[None]:
        return deferLater(reactor, 0)

    async def wait_until(self, condition: Any) -> None:
        while not condition():
            await self.next_turn()

    async def receive(self, client: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                some = client.recv(65536)
            except BlockingIOError:
                await self.next_turn()
                continue
            if not some:
                break
            data += some
        return data

    async def test_echo(self) -> None:
        client = self.dial()
        client.send(b"hello")
        self.assertEqual(await self.receive(client, 5), b"hello")
        transport = self.factory.connections[0].transport
        self.assertIs(transport.reactor, self.poller)
        self.assertNotIn(transport, reactor.getReaders())
        self.assertNotIn(self.port, reactor.getReaders())

    async def test_more_than_the_kernel_takes(self) -> None:
        """What waits is written when there is room."""
        client = self.dial()
        await self.wait_until(lambda: self.factory.connections)
        self.factory.connections[0].transport.write(b"x" * 20_000_000)
        self.assertEqual(len(await self.receive(client, 20_000_000)), 20_000_000)

    async def test_every_end(self) -> None:
        for end, name in ((None, "ConnectionDone"), (struct.pack("ii", 1, 0), "ConnectionLost")):
            client = self.dial()
            client.send(b"x")
            await self.receive(client, 1)
            if end:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, end)
            client.close()
            await self.wait_until(lambda: self.factory.lost)
            self.assertEqual(self.factory.lost.pop(), name)

    async def test_its_own_end(self) -> None:
        client = self.dial()
        await self.wait_until(lambda: self.factory.connections)
        self.factory.connections[0].transport.write(b"bye")
        self.factory.connections[0].transport.loseConnection()
        self.assertEqual(await self.receive(client, 4), b"bye")
        await self.wait_until(lambda: self.factory.lost)

    async def test_an_error(self) -> None:
        """It ends that connection, and no other."""
        one, two = self.dial(), self.dial()
        one.send(b"boom")
        await self.wait_until(lambda: self.factory.lost)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        two.send(b"x")
        self.assertEqual(await self.receive(two, 1), b"x")

    async def test_paused(self) -> None:
        client = self.dial()
        await self.wait_until(lambda: self.factory.connections)
        transport = self.factory.connections[0].transport
        transport.pauseProducing()
        client.send(b"x")
        for _ in range(10):
            await self.next_turn()
        self.assertEqual(self.factory.received, [])
        transport.resumeProducing()
        self.assertEqual(await self.receive(client, 1), b"x")

    async def test_a_few_in_each_turn(self) -> None:
        """However many are ready, the reactor goes on with everything else between them."""
        clients = [self.dial() for _ in range(100)]
        await self.wait_until(lambda: len(self.factory.connections) == 100)
        for client in clients:
            client.send(b"x")
        self.poller._clock = lambda: 0.0
        in_turns = []
        while len(self.factory.received) < 100:
            before = len(self.factory.received)
            self.poller.doRead()
            in_turns.append(len(self.factory.received) - before)
        self.assertLessEqual(max(in_turns), MAX_EVENTS)
        del self.factory.received[:]
        for client in clients:
            client.send(b"x")
        times = iter(range(10_000))
        self.poller._clock = lambda: float(next(times))
        self.poller.doRead()
        self.assertEqual(len(self.factory.received), 1)
        self.poller._clock = reactor.seconds
        await self.wait_until(lambda: len(self.factory.received) == 100)

    async def test_many_while_there_are_no_calls(self) -> None:
        clients = [self.dial() for _ in range(100)]
        await self.wait_until(lambda: len(self.factory.connections) == 100)
        now = [1000.0, 5]
        self.poller._clock, self.poller._call_count = lambda: now[0], lambda: int(now[1])
        self.poller._last_call_count = 4
        heard = []
        for now[0], now[1] in (
            (1000.0, 5),
            (1000.0 + IDLE_AFTER / 2, 5),
            (1000.0 + IDLE_AFTER, 5),
            (1000.0 + IDLE_AFTER, 6),
        ):
            for client in clients:
                client.send(b"x")
            before = len(self.factory.received)
            self.poller.doRead()
            heard.append(len(self.factory.received) - before)
            while len(self.factory.received) < 100 * len(heard):
                self.poller.doRead()
        # The kernel may not have brought all of them yet.
        self.assertEqual([number > MAX_EVENTS for number in heard], [False, False, True, False])
        self.poller._clock = reactor.seconds

    async def test_released(self) -> None:
        """From then on it is the reactor's, whatever it was watched for."""
        client = self.dial()
        await self.wait_until(lambda: self.factory.connections)
        transport = self.factory.connections[0].transport
        transport.write(b"x" * 10_000_000)
        self.poller.release(transport)
        self.poller.release(transport)
        self.assertIs(transport.reactor, reactor)
        self.assertIn(transport, reactor.getReaders())
        self.assertEqual(len(await self.receive(client, 10_000_000)), 10_000_000)
        client.send(b"y")
        self.assertEqual(await self.receive(client, 1), b"y")
        client.close()
        await self.wait_until(lambda: self.factory.lost)
        self.assertNotIn(transport, reactor.getReaders())

    async def test_released_while_it_is_paused(self) -> None:
        client = self.dial()
        await self.wait_until(lambda: self.factory.connections)
        transport = self.factory.connections[0].transport
        transport.pauseProducing()
        self.poller.release(transport)
        self.assertNotIn(transport, reactor.getReaders())
        transport.resumeProducing()
        client.send(b"x")
        self.assertEqual(await self.receive(client, 1), b"x")
