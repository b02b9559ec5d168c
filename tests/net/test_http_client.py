"""Tests of gateway.net.http_client, over real connections; gateway.cloud.imds uses it, too."""

from __future__ import annotations

import contextlib
import os
from typing import Any
from unittest import mock

import trustme
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.net.errors import FetchError, ResponseTooLargeError
from gateway.net.http_client import (
    FETCH_TIMEOUT,
    MAX_DOCUMENT_SIZE,
    MAX_HEADERS_SIZE,
    BoundedGet,
    HTTPResponse,
    check_fetch_url,
    request,
    strip_query,
)
from tests.builders.ports import free_port


class FakeServer(Factory):
    """Answer each request with some bytes, then with others repeatedly until the connection is closed."""

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

    async def test_response(self) -> None:
        response = await self.send_request(
            FakeServer(b"HTTP/1.1 200 OK\r\nX: y\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc")
        )
        self.assertEqual((response.code, response.headers.getRawHeaders("x"), response.body), (200, ["y"], b"abc"))

    async def test_body_of_another_status_is_not_read(self) -> None:
        response = await self.send_request(FakeServer(b"HTTP/1.1 404 No\r\n\r\n", b"x" * 1000))
        self.assertEqual((response.code, response.body), (404, b""))

    async def test_refuses_endless_responses(self) -> None:
        """Header lines, a single header line and the body are limited."""
        status_line = b"HTTP/1.1 200 OK\r\n"
        for server in (
            FakeServer(status_line, b"X: y\r\n" * 100),
            FakeServer(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
            FakeServer(status_line + b"\r\n", b"x" * 100),
        ):
            with self.assertRaises(ResponseTooLargeError):
                await self.send_request(server)
        with self.assertRaises(Exception):  # noqa: B017 - Twisted's own limit of a line may apply first
            await self.send_request(FakeServer(status_line + b"X: ", b"y" * MAX_HEADERS_SIZE))


def http(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


class CannedProtocol(Protocol):
    """Send the response of the factory for any bytes, and close the connection if the factory says so."""

    factory: CannedServer

    def connectionMade(self) -> None:
        self.factory.connected.append(self)

    def dataReceived(self, data: bytes) -> None:
        self.factory.requests.append(data)
        if self.factory.response is not None:
            assert self.transport is not None
            self.transport.write(self.factory.response)
            if self.factory.closes_after_response:
                self.transport.loseConnection()
        elif self.factory.request_received is not None:
            self.factory.request_received.callback(None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.lost.callback(None)


class CannedServer(Factory):
    protocol = CannedProtocol
    noisy = False

    def __init__(self, response: bytes | None, closes_after_response: bool = True) -> None:
        self.response = response
        self.closes_after_response = closes_after_response
        self.requests: list[bytes] = []
        self.connected: list[CannedProtocol] = []
        self.request_received: Deferred[None] | None = Deferred() if response is None else None
        self.lost: Deferred[None] = Deferred()


class CannedServerTestCase(TestCase):
    def listen(self, server: CannedServer, context: Any = None) -> int:
        """Listen until the end of the test; return the port."""
        if context is None:
            port: IListeningPort = reactor.listenTCP(0, server, interface="127.0.0.1")
        else:
            port = reactor.listenSSL(0, server, context, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        number: int = port.getHost().port
        return number


class FetchTests(CannedServerTestCase):
    def getter(self, server: CannedServer) -> BoundedGet:
        return BoundedGet(reactor, f"http://127.0.0.1:{self.listen(server)}/keys?a=b")

    async def fetch_error(self, response: bytes, closes: bool = True) -> str:
        server = CannedServer(response, closes)
        document = self.getter(server)
        try:
            await document.fetch()
        except FetchError as e:
            self.assertEqual(len(str(e).splitlines()), 1)
            self.assertEqual(len(server.requests), 1)
            await server.lost
            return str(e)
        self.fail("the response was accepted")

    async def test_fetch(self) -> None:
        server = CannedServer(http(b'{"keys":[]}'))
        self.assertEqual(await self.getter(server).fetch(), b'{"keys":[]}')
        (received,) = server.requests
        self.assertEqual(received.splitlines()[0], b"GET /keys?a=b HTTP/1.1")
        self.assertIn(b"\r\nAccept: application/json\r\n", received)
        await server.lost

    async def test_response_without_content_length(self) -> None:
        server = CannedServer(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc")
        self.assertEqual(await self.getter(server).fetch(), b"abc")
        await server.lost

    async def test_other_statuses(self) -> None:
        self.assertEqual(await self.fetch_error(http(b"", status="404 Not Found")), "the response has status 404")
        self.assertEqual(await self.fetch_error(http(b"keys", status="204 No Content")), "the response has status 204")

    async def test_does_not_wait_for_the_body_of_another_status(self) -> None:
        unfinished = b"HTTP/1.1 500 Oh\r\nContent-Length: 9\r\n\r\nabc"
        self.assertEqual(await self.fetch_error(unfinished, closes=False), "the response has status 500")

    async def test_does_not_follow_redirects(self) -> None:
        target = CannedServer(http(b"{}"))
        location = f"Location: http://127.0.0.1:{self.listen(target)}/"
        self.assertEqual(
            await self.fetch_error(http(b"", location, status="302 Found")), "the response has status 302, a redirect"
        )
        self.assertEqual(target.connected, [])

    async def test_size_limit(self) -> None:
        longest = CannedServer(http(b"x" * MAX_DOCUMENT_SIZE))
        self.assertEqual(len(await self.getter(longest).fetch()), MAX_DOCUMENT_SIZE)
        await longest.lost
        announced = f"HTTP/1.1 200 OK\r\nContent-Length: {MAX_DOCUMENT_SIZE + 1}\r\n\r\n".encode()
        unannounced = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * (MAX_DOCUMENT_SIZE + 1)
        for response in (announced, unannounced):
            self.assertEqual(await self.fetch_error(response), f"the response has more than {MAX_DOCUMENT_SIZE} bytes")

    async def test_refuses_invalid_and_incomplete_responses(self) -> None:
        for response in (b"", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", b"\0" * 100):
            self.assertNotEqual(await self.fetch_error(response), "")

    async def test_error_for_responses_that_are_not_http(self) -> None:
        """Python's own messages would not help."""
        ok = b"HTTP/1.1 200 OK\r\n"
        for response in (
            b"SSH-2.0-x\r\n\r\n",
            b"HTTP/x.y 200 OK\r\n\r\n",
            ok + b"no colon\r\n\r\n",
            ok + b"Content-Length: x\r\n\r\n",
            ok + b"Transfer-Encoding: foo\r\n\r\n",
            ok + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        ):
            self.assertEqual(await self.fetch_error(response), "the response is not valid HTTP", response)

    async def test_connection_refused(self) -> None:
        document = BoundedGet(reactor, f"http://localhost:{free_port()}/")
        failure = await self.assertFailure(document.fetch(), FetchError)
        self.assertIn("onnection", str(failure))

    def test_timeout(self) -> None:
        clock = MemoryReactorClock()
        fetching = BoundedGet(clock, "http://127.0.0.1:8080/keys").fetch()
        clock.advance(FETCH_TIMEOUT - 0.01)
        self.assertNoResult(fetching)
        clock.advance(0.01)
        self.assertEqual(str(self.failureResultOf(fetching, FetchError).value), "no response within 3 s")
        self.assertEqual(clock.getDelayedCalls(), [])

    async def test_cancelled_before_the_response(self) -> None:
        silent = CannedServer(None)
        fetching = self.getter(silent).fetch()
        await silent.request_received
        fetching.cancel()
        await self.assertFailure(fetching, CancelledError)
        await silent.lost

    async def test_cancelled_during_the_response(self) -> None:
        slow = CannedServer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", closes_after_response=False)
        started: Deferred[None] = Deferred()
        with mock.patch(
            "gateway.net.http_client._BodyCollector.dataReceived",
            side_effect=lambda data: started.called or started.callback(None),
        ):
            fetching = self.getter(slow).fetch()
            await started
        fetching.cancel()
        await self.assertFailure(fetching, CancelledError)
        await slow.lost


class TLSTests(CannedServerTestCase):
    def setUp(self) -> None:
        self.ca = trustme.CA()

    def secure(self, name: str, server: CannedServer) -> int:
        certificate = self.ca.issue_cert(name)
        pem = certificate.private_key_and_cert_chain_pem.bytes()
        return self.listen(server, PrivateCertificate.loadPEM(pem).options())

    def trusted(self) -> Any:
        path = self.mktemp()
        self.ca.cert_pem.write_to_path(path)
        return mock.patch.dict(os.environ, {"SSL_CERT_FILE": os.path.abspath(path)})

    async def test_trusted_certificate(self) -> None:
        server = CannedServer(http(b"{}"))
        with self.trusted():
            document = BoundedGet(reactor, f"https://localhost:{self.secure('localhost', server)}/")
            self.assertEqual(await document.fetch(), b"{}")
        await server.lost

    async def test_certificate_for_another_name(self) -> None:
        server = CannedServer(http(b"{}"))
        with self.trusted():
            document = BoundedGet(reactor, f"https://localhost:{self.secure('idp.example.com', server)}/")
            failure = await self.assertFailure(document.fetch(), FetchError)
        self.assertEqual(str(failure), "its certificate is not for the host in this url")
        self.assertEqual(server.requests, [])

    async def test_untrusted_certificate(self) -> None:
        server = CannedServer(http(b"{}"))
        document = BoundedGet(reactor, f"https://localhost:{self.secure('localhost', server)}/")
        failure = await self.assertFailure(document.fetch(), FetchError)
        self.assertRegex(str(failure), r"no trusted CA has signed it \(.*\); is SSL_CERT_FILE required\?$")
        self.assertEqual(server.requests, [])


class CheckFetchURLTests(SynchronousTestCase):
    def test_valid_urls(self) -> None:
        for url in (
            "https://idp.example.com/keys?a=b",
            "https://192.0.2.1:8443",
            "http://localhost:8080/",
            "http://127.9.9.9/keys",
            "http://[::1]:8080/keys",
        ):
            check_fetch_url(url)

    def test_invalid_urls(self) -> None:
        for url, problem in (
            ("http://idp.example.com/keys", "over http the keys could be replaced in transit; write https"),
            ("http://192.0.2.1/", "write https"),
            ("http://localhost.example.com/", "write https"),
            ("ftp://localhost/", "write https://host"),
            ("file:///etc/passwd", "write https://host"),
            ("keys.json", "write https://host"),
            ("https://", "write https://host"),
            ("https:///keys", "write https://host"),
            ("https://idp:0/", "write https://host"),
            ("https://idp:99999/", "its host or port is invalid"),
            ("https://[::1/", "its host or port is invalid"),
            ("https://user:secret@idp/", "it contains a user or a fragment"),
            ("https://idp/#x", "it contains a user or a fragment"),
            ("https://idp/ keys", "it contains characters that a URL cannot contain"),
            ("https://idp/\r\nX: y", "it contains characters that a URL cannot contain"),
            ("https://\xe9.example.com/", "it contains characters that a URL cannot contain"),
        ):
            with self.assertRaisesRegex(ValueError, problem):
                check_fetch_url(url)

    @given(st.text() | st.text("htps:/[]@#?.0aZ%\\", max_size=20).map("https://".__add__))
    def test_any_text_is_accepted_or_refused(self, url: str) -> None:
        with contextlib.suppress(ValueError):
            BoundedGet(MemoryReactorClock(), url)

    def test_strip_query(self) -> None:
        self.assertEqual(strip_query("https://idp/keys?api_key=secret"), "https://idp/keys")
