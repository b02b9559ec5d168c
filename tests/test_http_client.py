"""Tests of gateway.net.http_client, where those of its users do not look: gateway.net.http_client, gateway.cloud.imds."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from gateway.net.http_client import MAX_HEADERS_SIZE, HTTPResponse, ResponseTooLargeError, request


class FakeServer(Factory):
    """Answers each request by some bytes, and then again and again by others until the connection is gone."""

    def __init__(self, first: bytes, repeated: bytes = b"") -> None:
        self.first, self.repeated = first, repeated
        self.lost: Deferred[None] = Deferred()

    def buildProtocol(self, addr: Any) -> Protocol:
        return FakeServerProtocol(self)


class FakeServerProtocol(Protocol):
    def __init__(self, server: FakeServer) -> None:
        self.server = server

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(self.server.first)
        if self.server.repeated:
            self.transport.registerProducer(self, False)

    def resumeProducing(self) -> None:
        self.transport.write(self.server.repeated)

    def stopProducing(self) -> None:
        pass

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.server.lost.callback(None)


class RequestTests(TestCase):
    async def send_request(self, server: FakeServer) -> HTTPResponse:
        port: Any = reactor.listenTCP(0, server, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        url = f"http://127.0.0.1:{port.getHost().port}/".encode()
        try:
            return await request(reactor, b"GET", url, {"A": "b"}, timeout=2, max_body_size=1000)
        finally:
            await server.lost

    async def test_answer(self) -> None:
        answer = await self.send_request(
            FakeServer(b"HTTP/1.1 200 OK\r\nX: y\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc")
        )
        self.assertEqual((answer.code, answer.headers.getRawHeaders("x"), answer.body), (200, ["y"], b"abc"))

    async def test_the_body_of_another_status_is_not_read(self) -> None:
        answer = await self.send_request(FakeServer(b"HTTP/1.1 404 No\r\n\r\n", b"x" * 1000))
        self.assertEqual((answer.code, answer.body), (404, b""))

    async def test_without_an_end(self) -> None:
        """Neither the header lines, nor one of them, nor the body may go on for ever."""
        begun = b"HTTP/1.1 200 OK\r\n"
        for server in (
            FakeServer(begun, b"X: y\r\n" * 100),
            FakeServer(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
            FakeServer(begun + b"\r\n", b"x" * 100),
        ):
            with self.assertRaises(ResponseTooLargeError):
                await self.send_request(server)
        with self.assertRaises(Exception):  # noqa: B017 - Twisted's own limit of a line may be the first
            await self.send_request(FakeServer(begun + b"X: ", b"y" * MAX_HEADERS_SIZE))
