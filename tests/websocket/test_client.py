"""Tests of gateway.websocket.client: one connection to the gateway, as bytes."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.testing import HIGH_WATER_MARK
from gateway.websocket.client import CLOSE_TIMEOUT, MAX_HEADERS_SIZE, MAX_REFUSAL_BODY_SIZE, CloseEvent
from gateway.websocket.errors import ConnectionClosedError, HandshakeError, HandshakeRefusedError
from tests.fakes.websocket_server import FakeServer, close_frame, frame


class ConnectionTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.server = FakeServer(self.clock)
        self.connection = self.server.connection

    def open_failure(self, kind: type[Exception]) -> str:
        return str(self.failureResultOf(self.connection.opened, kind).value)

    def assert_disconnects(self) -> None:
        """The transport is asked to close; once it is lost, no timer is left."""
        self.assertTrue(self.server.transport.disconnecting)
        self.assertNoResult(self.connection.disconnected)
        self.server.lose_connection()
        self.successResultOf(self.connection.disconnected)
        self.assertEqual(self.clock.getDelayedCalls(), [])


class OpeningHandshakeTests(ConnectionTestCase):
    """RFC 6455, section 4.1."""

    def test_request(self) -> None:
        lines = self.server.request.split(b"\r\n")
        self.assertEqual(lines[0], b"GET /v1/connect?client_id=x HTTP/1.1")
        for line in [
            b"Host: gw:8080",
            b"Authorization: Bearer T",
            b"Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1",
            b"Sec-WebSocket-Version: 13",
        ]:
            self.assertIn(line, lines)
        self.assertNotIn(b"Sec-WebSocket-Extensions", self.server.request)
        self.assertNotIn(b"Origin", self.server.request)

    def test_ipv6_host(self) -> None:
        self.assertIn(b"\r\nHost: [::1]:80\r\n", FakeServer(self.clock, "ws://[::1]/").request)

    def test_open(self) -> None:
        self.assertNoResult(self.connection.opened)
        self.server.complete_handshake()
        self.successResultOf(self.connection.opened)
        self.assertNoResult(self.connection.closed)

    def test_byte_by_byte_with_a_message(self) -> None:
        for byte in self.server.handshake_response() + frame(1, b"{}"):
            self.server.send(bytes([byte]))
        self.assertEqual(self.server.messages, [b"{}"])

    def test_message_in_one_segment_with_the_response(self) -> None:
        self.server.send(self.server.handshake_response() + frame(1, b"{}"))
        self.assertEqual(self.server.messages, [b"{}"])

    def test_refusal(self) -> None:
        body = b'{"error":"draining","message":"soon gone"}'
        self.server.send(
            b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        self.assertNoResult(self.connection.opened)
        self.server.send(body)
        refusal = self.failureResultOf(self.connection.opened, HandshakeRefusedError).value
        self.assertEqual((refusal.status, refusal.retry_after), (503, 7.0))
        self.assertEqual(str(refusal), "the gateway answered 503 (draining: soon gone)")
        self.assertNoResult(self.connection.closed)
        self.assert_disconnects()

    def test_refusal_without_its_body(self) -> None:
        self.server.send(b"HTTP/1.1 307 Temporary Redirect\r\nLocation: ws://b/\r\nContent-Length: 9\r\n\r\nx")
        self.server.lose_connection()
        self.assertEqual(self.failureResultOf(self.connection.opened, HandshakeRefusedError).value.location, "ws://b/")

    def test_refusal_without_a_usable_length(self) -> None:
        for length in [
            b"",
            b"Content-Length: -5\r\n",
            b"Content-Length: x\r\n",
            b"Content-Length: " + b"9" * 5000 + b"\r\n",
        ]:
            self.server = FakeServer(self.clock)
            self.connection = self.server.connection
            self.server.send(b"HTTP/1.0 403 Forbidden\r\n%b\r\n" % length)
            self.assertEqual(self.failureResultOf(self.connection.opened, HandshakeRefusedError).value.status, 403)
            self.assert_disconnects()

    def test_refusal_with_an_endless_body(self) -> None:
        self.server.send(
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 999999999\r\n\r\n" + b"x" * (MAX_REFUSAL_BODY_SIZE - 1)
        )
        self.assertNoResult(self.connection.opened)
        self.server.send(b"x")
        self.assertEqual(self.open_failure(HandshakeRefusedError), "the response is 403, and not the gateway's")
        self.assert_disconnects()

    def test_invalid_responses(self) -> None:
        for response in [
            b"\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
            b"HTTP/1.1\r\n\r\n",
            b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/1.1 1011 X\r\n\r\n",
            b"HTTP/1.1 101 \xff\r\n\r\n",
            b"HTTP/1.1 101 X\r\nSec-WebSocket-Accept: wrong\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        ]:
            self.server = FakeServer(self.clock)
            self.connection = self.server.connection
            self.server.send(response)
            self.open_failure(HandshakeError)
            self.assert_disconnects()

    def test_extension_that_was_not_offered(self) -> None:
        response = self.server.handshake_response()[:-2] + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
        self.server.send(response)
        self.open_failure(HandshakeError)
        self.assert_disconnects()

    def test_subprotocol_that_was_not_offered(self) -> None:
        self.server.send(self.server.handshake_response().replace(b"jsonrpc.v1", b"jsonrpc.v2"))
        self.open_failure(HandshakeError)
        self.assert_disconnects()

    def test_endless_headers(self) -> None:
        self.server.send(b"HTTP/1.1 101 X\r\n" + b"x" * MAX_HEADERS_SIZE)
        self.assertIn("more than 16384 bytes", self.open_failure(HandshakeError))
        self.assert_disconnects()

    def test_lost_before_a_response(self) -> None:
        self.server.lose_connection()
        self.assertEqual(self.open_failure(HandshakeError), "Connection was closed cleanly.")
        self.assertEqual(self.clock.getDelayedCalls(), [])


class OpenConnectionTestCase(ConnectionTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.server.complete_handshake()
        self.successResultOf(self.connection.opened)

    def close_event(self) -> CloseEvent:
        event: CloseEvent = self.successResultOf(self.connection.closed)
        return event


class MessageTests(OpenConnectionTestCase):
    def test_received(self) -> None:
        self.server.send(frame(1, b"{}") + frame(1, b"[", first=0) + frame(0, b"", first=0) + frame(0, b"]"))
        self.assertEqual(self.server.messages, [b"{}", b"[]"])

    def test_sent(self) -> None:
        self.assertTrue(self.connection.send(b"{}"))
        self.assertEqual(self.server.received_frames(), [(1, b"{}")])

    def test_ping_is_answered(self) -> None:
        self.server.send(frame(9, b"hello"))
        self.assertEqual(self.server.received_frames(), [(10, b"hello")])

    def test_binary(self) -> None:
        self.server.send(frame(2, b"{}"))
        self.assertEqual(
            self.server.received_frames(), [(8, struct.pack("!H", 1003) + b"messages are text here, not binary")]
        )
        self.assertEqual(
            self.close_event(), CloseEvent(1003, "messages are text here, not binary", initiated_locally=True)
        )
        self.assertEqual(self.server.messages, [])
        self.assert_disconnects()

    def test_protocol_errors(self) -> None:
        for data, code in [
            (frame(1, b"\xff"), 1007),
            (frame(3, b""), 1002),
            (frame(1, b"", first=0xC0), 1002),
            (frame(0, b""), 1002),
            (frame(8, b"x"), 1002),
            (close_frame(1005), 1002),
            (close_frame(1000, b"\xff"), 1007),
            (frame(1, b"x" * 100001), 1009),
            (b"\x01\x7f" + struct.pack("!Q", 2**62), 1009),
        ]:
            self.setUp()
            self.server.send(data + frame(1, b"{}"))
            ((opcode, payload),) = self.server.received_frames()
            self.assertEqual((opcode, struct.unpack("!H", payload[:2])[0]), (8, code), data[:20])
            event = self.close_event()
            self.assertEqual((event.code, event.initiated_locally), (code, True))
            self.assertEqual(self.server.messages, [])
            self.assert_disconnects()

    def test_memory_of_empty_frames(self) -> None:
        self.server.send(frame(1, b"[", first=0) + frame(0, b"", first=0) * 1000)
        self.assertEqual(self.connection.message_data, [b"["])

    def test_handler_that_raises(self) -> None:
        def fail(payload: bytes) -> None:
            raise KeyError("bug")

        self.connection.on_message = fail
        self.server.send(frame(1, b"{}"))
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)
        self.assertEqual(self.close_event().code, 1006)
        self.assert_disconnects()


class CloseTests(OpenConnectionTestCase):
    def test_closed_by_the_gateway(self) -> None:
        self.server.send(close_frame(1012, b"drain") + frame(1, b"{}"))
        self.assertEqual(self.close_event(), CloseEvent(1012, "drain"))
        self.assertEqual(self.server.received_frames(), [(8, struct.pack("!H", 1012) + b"drain")])
        self.assertEqual(self.server.messages, [])
        self.assertFalse(self.connection.send(b"{}"))
        self.assertFalse(self.server.transport.disconnecting)
        self.server.lose_connection()
        self.successResultOf(self.connection.disconnected)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_closed_without_a_code(self) -> None:
        self.server.send(frame(8))
        self.assertEqual(self.close_event(), CloseEvent(1005, ""))

    def test_closed_by_a_gateway_that_keeps_tcp_open(self) -> None:
        self.server.send(close_frame(1000))
        self.clock.advance(CLOSE_TIMEOUT - 0.1)
        self.assertFalse(self.server.transport.disconnecting)
        self.clock.advance(0.1)
        self.assertTrue(self.server.transport.is_aborted)
        self.assert_disconnects()

    def test_closed_by_this_side(self) -> None:
        self.connection.close()
        self.assertEqual(self.server.received_frames(), [(8, struct.pack("!H", 1000))])
        self.assertEqual(self.close_event(), CloseEvent(1000, "closed by this side", initiated_locally=True))
        self.assertFalse(self.server.transport.disconnecting)
        self.server.send(close_frame(1000))
        self.connection.close()
        self.clock.advance(CLOSE_TIMEOUT)
        self.assertTrue(self.server.transport.is_aborted)
        self.assert_disconnects()

    def test_lost(self) -> None:
        self.server.lose_connection()
        self.assertEqual(self.close_event(), CloseEvent(1006, "Connection was closed cleanly."))
        self.successResultOf(self.connection.disconnected)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_idle_timeout(self) -> None:
        self.clock.advance(119)
        self.server.send(frame(9))
        self.clock.advance(119)
        self.assertNoResult(self.connection.closed)
        self.clock.advance(1)
        self.assertEqual(
            self.close_event(), CloseEvent(1006, "nothing received from the gateway for 120 s", initiated_locally=True)
        )
        self.assertTrue(self.server.transport.is_aborted)
        self.assert_disconnects()

    def test_close_during_handshake(self) -> None:
        server = FakeServer(self.clock)
        server.connection.close()
        self.failureResultOf(server.connection.opened, HandshakeError)
        self.assertTrue(server.transport.is_aborted)


class WritableTests(OpenConnectionTestCase):
    def test_room(self) -> None:
        self.connection.send(b"x" * 1000)
        self.successResultOf(self.connection.wait_writable())

    def test_room_again(self) -> None:
        self.connection.send(b"x" * HIGH_WATER_MARK)
        writable = self.connection.wait_writable()
        self.assertNoResult(writable)
        self.server.transport.take_unsent()
        self.successResultOf(writable)
        self.successResultOf(self.connection.wait_writable())

    def test_lost_while_waiting(self) -> None:
        self.connection.send(b"x" * HIGH_WATER_MARK)
        writable = self.connection.wait_writable()
        self.server.lose_connection()
        self.failureResultOf(writable, ConnectionClosedError)


class GeneratedInputTests(SynchronousTestCase):
    """Whatever the server sends, nothing is raised or logged, and the connection is open or closing."""

    def assert_consistent(self, server: FakeServer) -> None:
        connection = server.connection
        self.assertEqual(self.flushLoggedErrors(), [])
        connection.opened.addErrback(lambda failure: failure.trap(HandshakeError, HandshakeRefusedError))
        if connection.opened.called and connection.state != connection.STATE_OPEN:
            server.connection._clock.advance(CLOSE_TIMEOUT)
            self.assertTrue(server.transport.disconnecting)
        server.lose_connection()
        self.successResultOf(connection.disconnected)
        self.assertEqual(connection._clock.getDelayedCalls(), [])

    @settings(deadline=None, max_examples=200)
    @given(
        st.sampled_from([b"", b"HTTP/1.1 ", b"HTTP/1.1 101 X\r\n", b"HTTP/1.1 503 X\r\n"]),
        st.lists(
            st.binary(max_size=30) | st.sampled_from([b"\r\n", b"\r\n\r\n", b"Connection:", b"Upgrade: websocket\r\n"])
        ),
    )
    def test_handshake(self, start: bytes, segments: list[bytes]) -> None:
        server = FakeServer(Clock())
        for segment in [start, *segments]:
            server.send(segment)
        self.assert_consistent(server)

    @settings(deadline=None, max_examples=200)
    @given(st.binary(max_size=100))
    def test_headers_of_101(self, headers: bytes) -> None:
        server = FakeServer(Clock())
        server.send(server.handshake_response()[:-2] + b"Sec-WebSocket-Extensions: " + headers + b"\r\n\r\n")
        self.assert_consistent(server)

    FRAMES = st.builds(
        lambda first, opcode, payload: frame(opcode, payload, first=first),
        st.sampled_from([0x80, 0x80, 0, 0xC0]),
        st.integers(0, 15),
        st.binary(max_size=130),
    )

    @settings(deadline=None, max_examples=300)
    @given(st.lists(st.binary(max_size=40) | FRAMES | st.integers(0, 65535).map(close_frame), max_size=6))
    def test_open(self, segments: list[bytes]) -> None:
        server = FakeServer(Clock()).complete_handshake()
        for segment in segments:
            server.send(segment)
        self.assert_consistent(server)
