"""Tests of gateway.websocket.server: the opening handshake, until it is open or refused."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocolNegotiationFactory
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.metrics import Metrics
from gateway.websocket.connection import LINGER_TIMEOUT
from gateway.websocket.server import (
    HandshakeRequest,
    RequestRefusedError,
    ServerFactory,
    ServerProtocol,
    format_address,
)
from tests.builders.frames import WEBSOCKET_ACCEPT, build_frame, build_request, text_frame
from tests.fakes.clients import FakeClient, FakeTransport

PATH = "/v1/connect"


class RecordingProtocol(ServerProtocol):
    """Record the hooks that are called; the test decides on the admission."""

    path = PATH

    def connectionMade(self) -> None:
        self.events: list[Any] = []
        super().connectionMade()

    def admit(self, request: HandshakeRequest) -> Deferred[str | None]:
        self.events.append("admit")
        self.admitted: Deferred[str | None] = self.factory.admission(request)
        return self.admitted

    def admission_abandoned(self) -> None:
        self.events.append("abandoned")

    def opened(self) -> None:
        self.events.append("opened")
        if self.factory.on_open is not None:
            self.factory.on_open(self)

    def text_received(self, payload: bytes) -> None:
        self.events.append(payload)
        if self.factory.on_message is not None:
            self.factory.on_message(self)

    def closed(self, code: int) -> None:
        self.events.append(code)


class HandshakeTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.cancelled: list[Any] = []
        self.factory = ServerFactory(
            RecordingProtocol,
            metrics=self.metrics,
            reactor=self.clock,
            max_message_size=100000,
            send_buffer=65536,
            max_openings=10,
        )
        self.factory.admission = lambda request: Deferred(self.cancelled.append)
        self.factory.on_open = None
        self.factory.on_message = None

    def dial(self) -> FakeClient:
        return FakeClient(self.factory, FakeTransport())

    def advance(self, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.clock.advance(0.25)


class OpenTest(HandshakeTestCase):
    """A handshake that succeeds"""

    def test_response(self) -> None:
        """RFC 6455, section 4.2.2; no Server header, no extension."""
        client = self.dial()
        client.send(build_request(extra=(("Sec-WebSocket-Extensions", "permessage-deflate; x=y, bad==;"),)))
        self.assertEqual(client.transport.pop_written(), b"")
        client.protocol.admitted.callback(None)
        self.assertEqual(
            client.transport.pop_written(),
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + WEBSOCKET_ACCEPT.encode() + b"\r\n\r\n",
        )
        self.assertEqual(client.protocol.events, ["admit", "opened"])

    def test_subprotocol(self) -> None:
        client = self.dial()
        client.send(build_request(extra=(("Sec-WebSocket-Protocol", "one, two"),)))
        client.protocol.admitted.callback("two")
        self.assertIn(b"\r\nSec-WebSocket-Protocol: two\r\n", client.expect_open())

    def test_early_bytes_are_held(self) -> None:
        """They are handled once the connection is open."""
        client = self.dial()
        client.send(build_request() + text_frame(b"one") + build_frame(1, b"t", fin=False))
        client.send(build_frame(0, b"wo"))
        self.assertEqual(client.protocol.events, ["admit"])
        client.protocol.admitted.callback(None)
        self.assertEqual(client.protocol.events, ["admit", "opened", b"one", b"two"])

    def test_second_handshake_is_a_broken_frame(self) -> None:
        client = self.dial()
        client.send(build_request() + build_request())
        client.protocol.admitted.callback(None)
        client.expect_open()
        self.assertEqual(client.close_code(), 1002)
        self.assertEqual(client.protocol.events, ["admit", "opened", 1002])

    def test_early_bytes_are_bounded(self) -> None:
        client = self.dial()
        client.send(build_request() + text_frame(b"x" * 60000))
        self.assertFalse(client.transport.paused)
        client.send(text_frame(b"y" * 6000))
        self.assertTrue(client.transport.paused)
        client.protocol.admitted.callback(None)
        self.assertFalse(client.transport.paused)
        self.assertEqual(client.protocol.events, ["admit", "opened", b"x" * 60000, b"y" * 6000])

    def test_pause_by_an_early_message(self) -> None:
        self.factory.on_message = lambda protocol: protocol.pause_reading()
        client = self.dial()
        client.send(build_request() + text_frame(b"one") + text_frame(b"two"))
        client.protocol.admitted.callback(None)
        self.assertEqual(client.protocol.events, ["admit", "opened", b"one"])
        self.assertTrue(client.transport.paused)

    def test_alpn(self) -> None:
        """Without a protocol, Twisted would fail the TLS handshake of every client that offers one (RFC 7301)."""
        self.assertTrue(IProtocolNegotiationFactory.providedBy(self.factory))
        self.assertEqual(self.factory.acceptableProtocols(), [b"http/1.1"])

    def test_segmentation_does_not_matter(self) -> None:
        for step in (1, 2, 3, 17):
            client = self.dial()
            client.send(build_request() + text_frame(b"one"), step)
            client.protocol.admitted.callback(None)
            self.assertEqual(client.protocol.events, ["admit", "opened", b"one"])

    def test_closed_by_the_open_hook(self) -> None:
        self.factory.on_open = lambda protocol: protocol.close_with(4001)
        client = self.dial()
        client.send(build_request() + text_frame(b"one"))
        client.protocol.admitted.callback(None)
        client.expect_open()
        self.assertEqual(client.close_code(), 4001)
        self.assertEqual(client.protocol.events, ["admit", "opened", 4001])

    def test_no_timeout_once_open(self) -> None:
        client = self.dial()
        client.send(build_request())
        client.protocol.admitted.callback(None)
        self.advance(20)
        self.assertFalse(client.transport.aborted)
        self.assertEqual(self.metrics.refused, {})

    def test_token_is_not_kept(self) -> None:
        client = self.dial()
        client.send(build_request(extra=(("Sec-WebSocket-Protocol", "wsgateway.bearer.s3cret"),)))
        client.protocol.admitted.callback(None)
        self.assertNotIn(b"s3cret", client.expect_open())
        self.assertNotIn("s3cret", repr(vars(client.protocol)))


class RefuseTest(HandshakeTestCase):
    """A handshake that fails"""

    def assert_refused(self, client: FakeClient, status: int, reason: str) -> dict[str, str]:
        *refusal, headers = client.refusal()
        self.assertEqual(refusal, [status, reason])
        self.assertEqual(self.metrics.refused, {reason: 1})
        self.assertEqual(self.factory.handshake_limiter.in_progress, 0)
        return headers

    def test_bad_head(self) -> None:
        client = self.dial()
        client.send(b"GET /x HTTP/1.1\r\n\r\n")
        self.assert_refused(client, 404, "path")
        self.assertEqual(client.protocol.events, [])

    def test_endless_head(self) -> None:
        client = self.dial()
        for _ in range(20):
            client.send(b"GET /" + b"x" * 1000)
        self.assert_refused(client, 400, "header")

    def test_refused_by_admission(self) -> None:
        client = self.dial()
        client.send(build_request())
        client.protocol.admitted.errback(RequestRefusedError(503, "full", "no room", [("Retry-After", "1")]))
        self.assertEqual(self.assert_refused(client, 503, "full")["Retry-After"], "1")
        self.assertEqual(client.protocol.events, ["admit"])

    def test_refused_by_admission_that_raises(self) -> None:
        def refuse(request: HandshakeRequest) -> Any:
            raise RequestRefusedError(403, "origin", "not you")

        self.factory.admission = refuse
        client = self.dial()
        client.send(build_request())
        self.assert_refused(client, 403, "origin")

    def test_error_in_admission(self) -> None:
        client = self.dial()
        client.send(build_request())
        client.protocol.admitted.errback(ZeroDivisionError("secret detail"))
        self.assertNotIn(b"secret", client.transport.value())
        self.assert_refused(client, 500, "internal")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_subprotocol_that_was_not_offered(self) -> None:
        client = self.dial()
        client.send(build_request())
        client.protocol.admitted.callback("other")
        self.assert_refused(client, 500, "internal")
        self.assertEqual(client.protocol.events, ["admit", "abandoned"])
        self.assertEqual(len(self.flushLoggedErrors(Exception)), 1)

    def test_error_in_the_open_hook(self) -> None:
        def fail(protocol: RecordingProtocol) -> None:
            raise ZeroDivisionError

        self.factory.on_open = fail
        client = self.dial()
        client.send(build_request())
        client.protocol.admitted.callback(None)
        client.expect_open()
        self.assertEqual(client.close_code(), 1011)
        self.assertEqual(client.protocol.events, ["admit", "opened", 1011])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_response_reaches_a_client_that_still_sends(self) -> None:
        """The sending side is shut down, input is discarded for LINGER_TIMEOUT, then the connection is aborted."""
        client = self.dial()
        client.send(b"POST /x HTTP/1.1\r\n\r\n" + b"x" * 100)
        self.assertTrue(client.transport.half_closed)
        self.assertFalse(client.transport.disconnecting)
        client.transport.clear()
        client.send(build_request() + b"x" * 10000)
        self.assertEqual(client.transport.pop_written(), b"")
        self.assertEqual(client.protocol.events, [])
        self.advance(LINGER_TIMEOUT - 0.25)
        self.assertFalse(client.transport.aborted)
        self.advance(0.5)
        self.assertTrue(client.transport.aborted)

    def test_discarded_input_is_bounded(self) -> None:
        client = self.dial()
        client.send(b"POST /x HTTP/1.1\r\n\r\n")
        for _ in range(17):
            client.send(b"x" * 65536)
        self.assertTrue(client.transport.aborted)

    def test_lingering_ends_with_the_connection(self) -> None:
        client = self.dial()
        client.send(b"POST /x HTTP/1.1\r\n\r\n")
        client.lose()
        self.advance(10)
        self.assertFalse(client.transport.aborted)

    def test_refusal_resumes_reading(self) -> None:
        client = self.dial()
        client.send(build_request() + b"x" * 70000)
        self.assertTrue(client.transport.paused)
        client.protocol.admitted.errback(RequestRefusedError(503, "full", "no room"))
        self.assertFalse(client.transport.paused)

    def test_refused_by_autobahn(self) -> None:
        client = self.dial()
        client.protocol.failHandshake("the text of the client\r\n", 426)
        self.assertNotIn(b"the text of", client.transport.value())
        self.assert_refused(client, 400, "upgrade")

    def test_too_many_handshakes(self) -> None:
        clients = [self.dial() for _ in range(10)]
        client = self.dial()
        headers = client.refusal()
        self.assertEqual(headers[:2], (503, "openings"))
        self.assertIn("Retry-After", headers[2])
        clients[0].lose()
        clients[1].send(build_request())
        clients[1].protocol.admitted.callback(None)
        clients[2].send(b"GET /x HTTP/1.1\r\n\r\n")
        self.assertEqual(self.factory.handshake_limiter.in_progress, 7)
        client = self.dial()
        self.assertEqual(client.transport.pop_written(), b"")


class TimeTest(HandshakeTestCase):
    """A handshake that times out, or is lost while its admission is pending"""

    def test_timeout_before_the_head(self) -> None:
        client = self.dial()
        client.send(build_request()[:-1])
        self.advance(4.75)
        self.assertFalse(client.transport.aborted)
        self.advance(0.5)
        self.assertTrue(client.transport.aborted)
        self.assertEqual(client.transport.pop_written(), b"")
        self.assertEqual(self.metrics.refused, {"timeout": 1})
        self.assertEqual(self.factory.handshake_limiter.in_progress, 0)

    def test_timeout_of_the_admission(self) -> None:
        client = self.dial()
        self.advance(4)
        client.send(build_request())
        self.advance(1.25)
        self.assertEqual(client.refusal()[:2], (503, "timeout"))
        self.assertEqual(len(self.cancelled), 1)
        self.assertEqual(self.factory.handshake_limiter.in_progress, 0)

    def test_lost_during_admission(self) -> None:
        client = self.dial()
        client.send(build_request())
        client.lose()
        self.assertEqual(len(self.cancelled), 1)
        self.assertEqual(client.protocol.events, ["admit"])
        self.assertEqual(client.transport.pop_written(), b"")
        self.assertEqual(self.factory.handshake_limiter.in_progress, 0)

    def test_lost_during_admission_that_cannot_be_cancelled(self) -> None:
        self.factory.admission = lambda request: Deferred(lambda d: d.callback(None))
        client = self.dial()
        client.send(build_request())
        client.lose()
        self.assertEqual(client.protocol.events, ["admit", "abandoned"])
        self.assertEqual(client.transport.pop_written(), b"")

    def test_lost_before_the_head(self) -> None:
        client = self.dial()
        client.send(b"GET")
        client.lose()
        self.advance(10)
        self.assertEqual(self.factory.handshake_limiter.in_progress, 0)
        self.assertEqual(self.metrics.refused, {})


class AddressTest(SynchronousTestCase):
    """format_address()"""

    def test_addresses(self) -> None:
        self.assertEqual(format_address(IPv4Address("TCP", "192.0.2.1", 80)), "192.0.2.1:80")
        self.assertEqual(format_address(IPv6Address("TCP", "2001:db8::1", 80)), "[2001:db8::1]:80")
        self.assertEqual(format_address(UNIXAddress(b"/run/x")), "unix")


class GeneratedTest(HandshakeTestCase):
    """Any input is refused, opens the connection, or is incomplete; and nothing is logged."""

    def result(self, data: bytes, step: int) -> tuple[list[Any], bytes, bool]:
        self.setUp()
        client = self.dial()
        client.send(data, step)
        if "admit" in client.protocol.events:
            client.protocol.admitted.callback(None)
        return client.protocol.events, client.transport.value(), client.transport.half_closed

    @settings(deadline=None, max_examples=100)
    @given(st.integers(0, len(build_request())), st.binary(max_size=3), st.integers(0, 3), st.binary(max_size=20))
    def test_mutations(self, at: int, inserted: bytes, removed: int, rest: bytes) -> None:
        data = build_request()[:at] + inserted + build_request()[at + removed :] + rest
        result = self.result(data, len(data))
        if result[1]:
            self.assertRegex(result[1], rb"^HTTP/1.1 (101|400|404) ")
        for step in (1, 5):
            self.assertEqual(self.result(data, step), result)

    @settings(deadline=None, max_examples=100)
    @given(st.binary(max_size=200))
    def test_bytes(self, data: bytes) -> None:
        self.assertEqual(self.result(data, 1), self.result(data, len(data) + 1))
