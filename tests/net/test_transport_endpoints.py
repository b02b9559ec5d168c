"""Tests of gateway.net.transport on Twisted's endpoints, with a running reactor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import clientFromString, serverFromString
from twisted.internet.protocol import Factory, Protocol
from twisted.trial.unittest import TestCase

from gateway.auth.authenticator import AuthenticatorChain
from gateway.clients.endpoint import ClientFactory
from gateway.clients.sessions import ClientSessions
from gateway.clients.table import ParkingOptions
from gateway.metrics import Metrics
from gateway.net.proxy_protocol import ProxyProtocolEndpoint
from gateway.util.cork import Cork
from tests.builders.frames import build_frame, build_request, close_frame, parse_frames, text_frame
from tests.fakes.clients import FakeHandler, FakeRegistry, build_settings

PARTIAL = text_frame(b"split")[:-2]


class WaitingClient(Protocol):
    """A client that can wait for a condition."""

    received = b""
    closed = False
    waiting: tuple[Callable[[], bool], Deferred[None]] | None = None

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        self.check_waiting()

    def connectionLost(self, reason: Any = None) -> None:
        self.closed = True
        self.check_waiting()

    def check_waiting(self) -> None:
        if self.waiting is not None and self.waiting[0]():
            waiting, self.waiting = self.waiting, None
            waiting[1].callback(None)

    def until(self, condition: Callable[[], bool]) -> Deferred[None]:
        """Fire when ``condition`` holds, now or after bytes were received or the connection was lost."""
        fulfilled: Deferred[None] = Deferred()
        self.waiting = condition, fulfilled
        self.check_waiting()
        return fulfilled

    async def read(self, size: int) -> bytes:
        await self.until(lambda: len(self.received) >= size)
        data, self.received = self.received[:size], self.received[size:]
        return data


class EndpointTest(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.handler, self.metrics = FakeHandler(), Metrics()
        settings, cork = build_settings(), Cork(reactor.seconds)
        self.sessions = ClientSessions(
            *(FakeRegistry(), reactor, settings, self.metrics, lambda _: self.handler, lambda: ""),
            parking=ParkingOptions(reactor, cork, lambda unparked: self.factory.wake(unparked)),
        )
        self.factory = ClientFactory(
            sessions=self.sessions,
            authenticator=AuthenticatorChain(()),
            settings=settings,
            metrics=self.metrics,
            reactor=reactor,
            cork=cork,
        )
        self.sessions.start()
        self.addCleanup(self.sessions.stop)

    async def connect(self, listening: str, connecting: str, header: bytes = b"") -> WaitingClient:
        """Connect a client, and wait until it is parked."""
        factory = self.factory.with_proxy_protocol() if header else self.factory
        endpoint = serverFromString(reactor, listening)
        port = await (ProxyProtocolEndpoint(endpoint) if header else endpoint).listen(factory)
        self.addCleanup(port.stopListening)
        target = connecting.format(port=getattr(port.getHost(), "port", 0))
        peer: WaitingClient = await clientFromString(reactor, target).connect(Factory.forProtocol(WaitingClient))
        self.addCleanup(peer.transport.abortConnection)
        peer.transport.write(header + build_request())
        await peer.until(lambda: peer.received.endswith(b"\r\n\r\n"))
        self.assertTrue(peer.received.startswith(b"HTTP/1.1 101 "))
        peer.received = b""
        # It is parked in the reactor iteration that opened it, or in the next one: both are done when a pong arrives.
        await self.pong(peer)
        self.assertEqual((self.sessions.parked_count(), self.metrics.woken), (1, 0))
        return peer

    async def pong(self, peer: WaitingClient) -> None:
        peer.transport.write(build_frame(9, b"p"))
        self.assertEqual(await peer.read(3), b"\x8a\x01p")

    async def check(self, peer: WaitingClient) -> None:
        """Exchange messages while parked, wake, park again, and close."""
        self.handler.on_message = lambda payload: self.sessions.send("a", payload)
        peer.transport.write(text_frame(b"one"))
        self.assertEqual(parse_frames(await peer.read(5)), [(1, b"one")])
        self.assertEqual(self.metrics.woken, 0)
        peer.transport.write(text_frame(b"two") + PARTIAL)
        self.assertEqual(parse_frames(await peer.read(5)), [(1, b"two")])
        self.assertEqual((self.sessions.parked_count(), self.metrics.woken), (0, 1))
        self.sessions._table.awake["a"].idle_before_park = 0.0
        peer.transport.write(text_frame(b"split")[-2:])
        self.assertEqual(parse_frames(await peer.read(7)), [(1, b"split")])
        await self.pong(peer)
        self.assertEqual(self.sessions.parked_count(), 1)
        peer.transport.write(close_frame(1000))
        self.assertEqual(await peer.read(4), b"\x88\x02\x03\xe8")
        await peer.until(lambda: peer.closed)
        self.assertEqual((self.sessions.count(), self.metrics.closed), (0, {"1000": 1}))

    def address(self) -> str:
        info = self.sessions.get("a")
        assert info is not None
        return info.address

    async def test_tcp(self) -> None:
        peer = await self.connect("tcp:0:interface=127.0.0.1", "tcp:127.0.0.1:{port}")
        here = peer.transport.getHost()
        self.assertEqual(self.address(), f"{here.host}:{here.port}")
        await self.check(peer)

    async def test_unix(self) -> None:
        path = self.mktemp()
        peer = await self.connect(f"unix:{path}", f"unix:{path}")
        self.assertEqual(self.address(), "unix")
        await self.check(peer)

    async def test_haproxy(self) -> None:
        peer = await self.connect(
            "tcp:0:interface=127.0.0.1",
            "tcp:127.0.0.1:{port}",
            b"PROXY TCP6 2001:db8::7 2001:db8::1 4242 80\r\n",
        )
        self.assertEqual(self.address(), "[2001:db8::7]:4242")
        await self.check(peer)
