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

from gateway.net.accept import CALM, MOST_EVENTS, Newcomers


class Echo(Protocol):
    """Sends everything back; ``boom`` is an error."""

    def connectionMade(self) -> None:
        self.factory.made.append(self)

    def dataReceived(self, data: bytes) -> None:
        self.factory.heard.append(data)
        if data == b"boom":
            raise ZeroDivisionError
        self.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.lost.append(reason.type.__name__)


class Echoes(Factory):
    protocol = Echo
    noisy = False

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.heard: list[bytes] = []
        self.lost: list[str] = []


class NewcomersTests(TestCase):
    def setUp(self) -> None:
        self.calls = itertools.count()
        self.newcomers = Newcomers(reactor, lambda: next(self.calls))
        self.newcomers.start()
        self.factory = Echoes()
        self.port: Any = reactor.listenTCP(0, self.factory, interface="127.0.0.1", backlog=200)
        self.newcomers.take(self.port)

    async def tearDown(self) -> None:
        await self.port.stopListening()
        for protocol in self.factory.made:
            protocol.transport.abortConnection()
        await self.turn()
        self.assertEqual((self.newcomers._selectables, self.newcomers._watched), ({}, {}))
        self.newcomers.stop()
        self.assertNotIn(self.newcomers, reactor.getReaders())

    def dial(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port.getHost().port))
        client.setblocking(False)
        self.addCleanup(client.close)
        return client

    def turn(self) -> Deferred[None]:
        return deferLater(reactor, 0)

    async def until(self, condition: Any) -> None:
        while not condition():
            await self.turn()

    async def receive(self, client: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                some = client.recv(65536)
            except BlockingIOError:
                await self.turn()
                continue
            if not some:
                break
            data += some
        return data

    async def test_echo(self) -> None:
        client = self.dial()
        client.send(b"hello")
        self.assertEqual(await self.receive(client, 5), b"hello")
        transport = self.factory.made[0].transport
        self.assertIs(transport.reactor, self.newcomers)
        self.assertNotIn(transport, reactor.getReaders())
        self.assertNotIn(self.port, reactor.getReaders())

    async def test_more_than_the_kernel_takes(self) -> None:
        """What waits is written when there is room."""
        client = self.dial()
        await self.until(lambda: self.factory.made)
        self.factory.made[0].transport.write(b"x" * 20_000_000)
        self.assertEqual(len(await self.receive(client, 20_000_000)), 20_000_000)

    async def test_every_end(self) -> None:
        for end, name in ((None, "ConnectionDone"), (struct.pack("ii", 1, 0), "ConnectionLost")):
            client = self.dial()
            client.send(b"x")
            await self.receive(client, 1)
            if end:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, end)
            client.close()
            await self.until(lambda: self.factory.lost)
            self.assertEqual(self.factory.lost.pop(), name)

    async def test_its_own_end(self) -> None:
        client = self.dial()
        await self.until(lambda: self.factory.made)
        self.factory.made[0].transport.write(b"bye")
        self.factory.made[0].transport.loseConnection()
        self.assertEqual(await self.receive(client, 4), b"bye")
        await self.until(lambda: self.factory.lost)

    async def test_an_error(self) -> None:
        """It ends that connection, and no other."""
        one, two = self.dial(), self.dial()
        one.send(b"boom")
        await self.until(lambda: self.factory.lost)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        two.send(b"x")
        self.assertEqual(await self.receive(two, 1), b"x")

    async def test_paused(self) -> None:
        client = self.dial()
        await self.until(lambda: self.factory.made)
        transport = self.factory.made[0].transport
        transport.pauseProducing()
        client.send(b"x")
        for _ in range(10):
            await self.turn()
        self.assertEqual(self.factory.heard, [])
        transport.resumeProducing()
        self.assertEqual(await self.receive(client, 1), b"x")

    async def test_a_few_in_each_turn(self) -> None:
        """However many are ready, the reactor goes on with everything else between them."""
        clients = [self.dial() for _ in range(100)]
        await self.until(lambda: len(self.factory.made) == 100)
        for client in clients:
            client.send(b"x")
        self.newcomers._seconds = lambda: 0.0
        in_turns = []
        while len(self.factory.heard) < 100:
            before = len(self.factory.heard)
            self.newcomers.doRead()
            in_turns.append(len(self.factory.heard) - before)
        self.assertLessEqual(max(in_turns), MOST_EVENTS)
        del self.factory.heard[:]
        for client in clients:
            client.send(b"x")
        times = iter(range(10_000))
        self.newcomers._seconds = lambda: float(next(times))
        self.newcomers.doRead()
        self.assertEqual(len(self.factory.heard), 1)
        self.newcomers._seconds = reactor.seconds
        await self.until(lambda: len(self.factory.heard) == 100)

    async def test_many_while_there_are_no_calls(self) -> None:
        clients = [self.dial() for _ in range(100)]
        await self.until(lambda: len(self.factory.made) == 100)
        now = [1000.0, 5]
        self.newcomers._seconds, self.newcomers._calls = lambda: now[0], lambda: int(now[1])
        self.newcomers._calls_before = 4
        heard = []
        for now[0], now[1] in ((1000.0, 5), (1000.0 + CALM / 2, 5), (1000.0 + CALM, 5), (1000.0 + CALM, 6)):
            for client in clients:
                client.send(b"x")
            before = len(self.factory.heard)
            self.newcomers.doRead()
            heard.append(len(self.factory.heard) - before)
            while len(self.factory.heard) < 100 * len(heard):
                self.newcomers.doRead()
        # The kernel may not have brought all of them yet.
        self.assertEqual([number > MOST_EVENTS for number in heard], [False, False, True, False])
        self.newcomers._seconds = reactor.seconds

    async def test_released(self) -> None:
        """From then on it is the reactor's, whatever it was watched for."""
        client = self.dial()
        await self.until(lambda: self.factory.made)
        transport = self.factory.made[0].transport
        transport.write(b"x" * 10_000_000)
        self.newcomers.release(transport)
        self.newcomers.release(transport)
        self.assertIs(transport.reactor, reactor)
        self.assertIn(transport, reactor.getReaders())
        self.assertEqual(len(await self.receive(client, 10_000_000)), 10_000_000)
        client.send(b"y")
        self.assertEqual(await self.receive(client, 1), b"y")
        client.close()
        await self.until(lambda: self.factory.lost)
        self.assertNotIn(transport, reactor.getReaders())

    async def test_released_while_it_is_paused(self) -> None:
        client = self.dial()
        await self.until(lambda: self.factory.made)
        transport = self.factory.made[0].transport
        transport.pauseProducing()
        self.newcomers.release(transport)
        self.assertNotIn(transport, reactor.getReaders())
        transport.resumeProducing()
        client.send(b"x")
        self.assertEqual(await self.receive(client, 1), b"x")
