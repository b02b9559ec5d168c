"""Tests of gateway.websocket.connection: frames received and sent on an open connection, and closing it."""

from __future__ import annotations

import gc
import os
import struct
import weakref
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.interfaces import IFileDescriptorReceiver, ISSLTransport
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import directlyProvides, providedBy

from gateway.websocket.connection import CLOSE_TIMEOUT, MAX_CLOSING_BYTES, MAX_CLOSING_FRAMES
from gateway.websocket.slow_consumer import SLOW_CONSUMER_TIMEOUT
from tests.builders.frames import build_frame, close_frame, parse_frames, text_frame
from tests.fakes.clients import FakeClient, FakeNode


class ServerConnectionTestCase(SynchronousTestCase):
    """Test with one client whose connection is open."""

    def setUp(self) -> None:
        self.node = FakeNode(max_message_size=2000, send_buffer=65536)
        self.client = self.node.connect()

    def assert_closed_with(self, code: int, client: FakeClient | None = None) -> None:
        client = client or self.client
        self.assertEqual(client.close_code(), code)
        self.assertEqual(self.node.metrics.closed[str(code)], 1)
        self.assertEqual(self.node.sessions.count(), 0)
        self.assertEqual(self.node.handler.events[-1][0], "disconnected")


class ConnectionSettingsTest(SynchronousTestCase):
    """Autobahn's settings on a connection"""

    def test_values(self) -> None:
        protocol = FakeNode(max_message_size=4321, send_buffer=65537).connect().protocol
        self.assertEqual(protocol.maxMessagePayloadSize, 4321)
        self.assertEqual(protocol.send_buffer, 65537)
        self.assertEqual(protocol.versions, [13])
        self.assertFalse(protocol.failByDrop)
        self.assertFalse(protocol.webStatus)
        self.assertIsNone(protocol.perMessageCompressionAccept([object()]))
        self.assertTrue(protocol.transport.no_delay)


class ReceiveTest(ServerConnectionTestCase):
    """Frames in"""

    def test_text(self) -> None:
        self.client.send(text_frame(b"one") + text_frame("zw\u00f6lf".encode()) + text_frame(b""))
        self.assertEqual(self.node.handler.messages, [b"one", "zw\u00f6lf".encode(), b""])
        self.assertIs(type(self.node.handler.messages[0]), bytes)

    def test_segmentation_does_not_matter(self) -> None:
        data = (
            text_frame(b"one")
            + build_frame(1, b"t", fin=False)
            + build_frame(9, b"p")
            + build_frame(0, b"wo")
            + text_frame(b"x" * 200)
        )
        for step in (1, 2, 3, 5, 64):
            node = FakeNode()
            client = node.connect()
            client.send(data, step)
            self.assertEqual(node.handler.messages, [b"one", b"two", b"x" * 200])
            self.assertEqual(client.frames(), [(10, b"p")])

    def test_fragments(self) -> None:
        self.client.send(
            build_frame(1, b"a", fin=False) + build_frame(0, b"", fin=False) + build_frame(0, b"b", fin=False)
        )
        self.assertEqual(self.node.handler.messages, [])
        self.client.send(build_frame(0, b"c"))
        self.assertEqual(self.node.handler.messages, [b"abc"])
        self.assertIs(type(self.node.handler.messages[0]), bytes)

    def test_memory_of_many_fragments(self) -> None:
        """RFC 6455, section 5.4 allows any number of fragments, and empty ones."""
        self.node = FakeNode(messages_per_client=0)
        self.client = self.node.connect()
        self.client.send(build_frame(1, b"a", fin=False))
        held = vars(self.client.protocol)
        for fragment in (build_frame(0, b"", fin=False) * 3000, build_frame(0, b"b", fin=False) * 1500):
            self.client.send(fragment)
            sizes = [len(value) for value in held.values() if isinstance(value, (list, bytes, bytearray, dict))]
            self.assertLess(sum(sizes), 2000)
        self.client.send(build_frame(0, b"c"))
        self.assertEqual(self.node.handler.messages, [b"a" + b"b" * 1500 + b"c"])

    def test_memory_of_a_frame_in_many_segments(self) -> None:
        whole = text_frame(b"x" * 1900)
        self.client.send(whole[:-1], step=1)
        lists = [value for value in vars(self.client.protocol).values() if isinstance(value, list)]
        self.assertLess(sum(map(len, lists)), 10)
        self.client.send(whole[-1:])
        self.assertEqual(self.node.handler.messages, [b"x" * 1900])

    def test_binary(self) -> None:
        self.client.send(build_frame(2, b"x") + text_frame(b"y"))
        self.assert_closed_with(1003)
        self.assertEqual(self.node.handler.messages, [])

    def test_binary_closes_at_the_first_fragment(self) -> None:
        self.client.send(build_frame(2, b"x", fin=False))
        self.assert_closed_with(1003)

    def test_bad_utf8(self) -> None:
        """RFC 6455, section 8.1; at any segmentation."""
        for payload in (b"\xff", b"a\xc0\xaf", b"\xed\xa0\x80", b"\xe2\x82", b"\xf4\x90\x80\x80"):
            for step in (1, 1000):
                self.setUp()
                self.client.send(text_frame(payload) + text_frame(b"y"), step)
                self.assert_closed_with(1007)
                self.assertEqual(self.node.handler.messages, [])

    def test_bad_utf8_closes_before_the_message_ends(self) -> None:
        self.client.send(build_frame(1, b"ab\xff", fin=False))
        self.assert_closed_with(1007)

    def test_character_across_fragments(self) -> None:
        self.client.send(build_frame(1, b"\xe2", fin=False) + build_frame(0, b"\x82\xac"))
        self.assertEqual(self.node.handler.messages, [b"\xe2\x82\xac"])

    def test_size(self) -> None:
        self.client.send(text_frame(b"x" * 2000))
        self.assertEqual(self.node.handler.messages, [b"x" * 2000])
        # The header alone is enough.
        self.client.send(text_frame(b"x" * 2001)[:8])
        self.assert_closed_with(1009)

    def test_size_of_fragments(self) -> None:
        self.client.send(build_frame(1, b"x" * 1999, fin=False) + build_frame(0, b"xx"))
        self.assert_closed_with(1009)

    def test_size_of_an_enormous_frame(self) -> None:
        self.client.send(struct.pack("!BBQ", 0x81, 0xFF, 2**63 - 1) + b"mask")
        self.assert_closed_with(1009)

    def test_protocol_errors(self) -> None:
        """RFC 6455, section 5: each closes with 1002, once, and nothing after it is delivered."""
        for data in (
            text_frame(b"x")[:1] + b"\x01x",
            build_frame(1, b"x", masked=False),
            build_frame(1, b"x", rsv=4),
            build_frame(1, b"x", rsv=1),
            build_frame(3, b""),
            build_frame(11, b""),
            build_frame(0, b"x"),
            build_frame(1, b"x", fin=False) + text_frame(b"y"),
            build_frame(9, b"x", fin=False),
            build_frame(9, b"x" * 126),
            struct.pack("!BBQ", 0x89, 0xFF, 2**62) + b"mask",
            struct.pack("!BBQ", 0x81, 0xFF, 2**63) + b"mask",
            b"\x81\xfe\x00\x05maskabcde",
            build_frame(8, b"x"),
            close_frame(999),
            close_frame(1005),
            close_frame(5000),
        ):
            for step in (1, 1000):
                self.setUp()
                self.client.send(data + text_frame(b"after") + build_frame(1, b"again", masked=False), step)
                self.assert_closed_with(1002)
                self.assertEqual(self.node.handler.messages, [])

    def test_flood_after_a_protocol_error(self) -> None:
        """No byte is kept of a control frame whose header announces 2**62 bytes."""
        self.client.send(struct.pack("!BBQ", 0x89, 0xFF, 2**62) + b"mask")
        for _ in range(50):
            self.client.send(b"x" * 65536)
        held = gc.get_referents(vars(self.client.protocol))
        parts = [part for value in held for part in (value if isinstance(value, list) else [value])]
        self.assertLess(sum(len(part) for part in parts if isinstance(part, bytes)), 1000)
        self.assertEqual(self.client.close_code(), 1002)

    def test_nothing_is_delivered_after_a_close_frame_was_sent(self) -> None:
        self.client.send(build_frame(1, b"half", fin=False))
        self.client.protocol.close_with(4003, "go")
        self.client.send(
            build_frame(0, b"")
            + text_frame(b"more")
            + build_frame(9, b"ping")
            + text_frame(b"\xff")
            + build_frame(2, b"x")
        )
        self.assertEqual(self.node.handler.messages, [])
        self.assertEqual(self.client.frames(), [(8, struct.pack("!H", 4003) + b"go")])

    def test_ping(self) -> None:
        self.client.send(build_frame(9, b"hello") + build_frame(9, b"") + build_frame(10, b"unasked"))
        self.assertEqual(self.client.frames(), [(10, b"hello"), (10, b"")])

    def test_error_in_the_handler(self) -> None:
        self.client.send(text_frame(b"boom") + text_frame(b"after"))
        self.assertEqual(self.node.handler.messages, [b"boom"])
        self.assert_closed_with(1011)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_errors_are_logged_at_a_limited_rate(self) -> None:
        for _ in range(3):
            self.client.send(text_frame(b"boom"))
            self.client = self.node.connect()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_error_in_autobahn(self) -> None:
        calls: list[int] = []

        def fail() -> None:
            calls.append(1)
            raise RuntimeError("surprise")

        self.client.protocol.processData = fail
        # A fragment: a whole message would not reach Autobahn.
        self.client.send(build_frame(1, b"x", fin=False))
        self.assert_closed_with(1011)
        # Where the next frame starts is unknown: nothing more is parsed.
        self.client.send(text_frame(b"y"))
        self.assertEqual(len(calls), 1)
        self.node.advance(CLOSE_TIMEOUT + 0.25)
        self.assertTrue(self.client.transport.aborted)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)

    def test_last_received_at(self) -> None:
        self.node.advance(5)
        self.client.send(b"\x81")
        self.assertEqual(self.client.protocol.last_received_at, self.node.clock.seconds())

    @settings(deadline=None, max_examples=100)
    @given(
        st.lists(
            st.sampled_from(
                [
                    text_frame(b"{}"),
                    build_frame(9, b"p"),
                    build_frame(1, b"a", fin=False),
                    build_frame(0, b"b"),
                    b"\x00",
                ]
            )
        )
    )
    @example([build_frame(1, b"a", fin=False), build_frame(0, b"b"), text_frame(b"{}")])
    def test_generated(self, parts: list[bytes]) -> None:
        """Any sequence of frames gives the same messages and responses at any segmentation."""
        results = []
        for step in (1, 3, 65536):
            node = FakeNode()
            client = node.connect()
            client.send(b"".join(parts), step)
            results.append((node.handler.messages, client.frames()))
        self.assertEqual(results[0], results[1])
        self.assertEqual(results[0], results[2])

    @settings(deadline=None, max_examples=150)
    @given(st.binary(max_size=200))
    def test_generated_bytes(self, data: bytes) -> None:
        node = FakeNode()
        client = node.connect()
        client.send(data)
        codes = {struct.unpack("!H", payload[:2])[0] for opcode, payload in client.frames() if opcode == 8}
        self.assertLessEqual(codes, {1000, 1002, 1003, 1007, 1009})
        client.lose()
        self.assertEqual(node.sessions.count(), 0)


class PauseReadingTest(ServerConnectionTestCase):
    """pause_reading() and resume_reading()"""

    def test_between_messages_of_one_segment(self) -> None:
        def pause(payload: bytes) -> None:
            self.client.protocol.pause_reading()

        self.node.handler.on_message = pause
        self.client.send(text_frame(b"one") + text_frame(b"two") + text_frame(b"three"))
        self.assertEqual(self.node.handler.messages, [b"one"])
        self.assertTrue(self.client.transport.paused)
        self.client.protocol.resume_reading()
        self.assertEqual(self.node.handler.messages, [b"one", b"two"])
        self.node.handler.on_message = None
        self.client.protocol.resume_reading()
        self.assertEqual(self.node.handler.messages, [b"one", b"two", b"three"])
        self.assertFalse(self.client.transport.paused)

    def test_closing_resumes_reading(self) -> None:
        """The peer's close frame must be read."""
        self.client.protocol.pause_reading()
        self.client.send(text_frame(b"unread"))
        self.client.protocol.close_with(4003)
        self.assertFalse(self.client.transport.paused)
        self.client.protocol.pause_reading()
        self.assertFalse(self.client.transport.paused)
        self.client.send(close_frame(4003))
        self.assertEqual(self.node.handler.messages, [])
        self.assertTrue(self.client.transport.disconnecting)

    def test_resumed_within_a_message(self) -> None:
        """The current message is handled completely before the next frame."""

        def pause_and_resume(payload: bytes) -> None:
            self.client.protocol.pause_reading()
            self.client.protocol.resume_reading()

        self.node.handler.on_message = pause_and_resume
        data = text_frame(b"one") + text_frame(b"two")
        self.client.send(data[:-2])
        self.client.send(data[-2:])
        self.assertEqual(self.node.handler.messages, [b"one", b"two"])

    def test_close_within_a_message_that_paused(self) -> None:
        """The current frame is handled completely before the next one."""

        def pause_and_close(payload: bytes) -> None:
            self.client.protocol.pause_reading()
            self.client.protocol.close_with(4003)

        self.node.handler.on_message = pause_and_close
        self.client.send(text_frame(b"one") + close_frame(4003))
        self.assertEqual(self.client.close_code(), 4003)
        self.assertTrue(self.client.transport.disconnecting)

    def test_file_descriptor_over_a_unix_socket(self) -> None:
        """The descriptor is closed, and the connection goes on."""
        reading, writing = os.pipe()
        self.addCleanup(os.close, writing)
        self.assertTrue(IFileDescriptorReceiver.providedBy(self.client.protocol))
        self.client.protocol.fileDescriptorReceived(reading)
        self.assertRaises(OSError, os.fstat, reading)
        self.client.send(text_frame(b"{}"))
        self.assertEqual(self.node.handler.messages, [b"{}"])


class SendTest(ServerConnectionTestCase):
    """Frames out"""

    def test_text(self) -> None:
        for size in (0, 125, 126, 65535, 65536):
            self.assertTrue(self.client.protocol.send_text(b"x" * size))
            self.assertEqual(self.client.frames(), [(1, b"x" * size)])

    def test_not_when_closing_or_lost(self) -> None:
        self.client.protocol.close_with(4003)
        self.client.transport.clear()
        self.assertFalse(self.client.protocol.send_text(b"x"))
        self.client.protocol.ping()
        self.client.lose()
        self.assertFalse(self.client.protocol.send_text(b"x"))
        self.assertEqual(self.client.transport.pop_written(), b"")

    def test_slow_reader(self) -> None:
        self.client.transport.block()
        # What filled the buffer is not counted, however large.
        for size in (65536, 65536 - 10, 0, 0, 1):
            self.client.protocol.send_text(b"x" * size)
        self.node.advance(SLOW_CONSUMER_TIMEOUT - 0.25)
        self.assertEqual([opcode for opcode, _ in self.client.frames()], [1] * 5)
        self.node.advance(0.75)
        self.assertEqual(self.node.metrics.slow_readers, 1)
        self.assert_closed_with(1013)
        self.assertFalse(self.client.protocol.send_text(b"x"))
        self.node.advance(CLOSE_TIMEOUT + 0.25)
        self.assertTrue(self.client.transport.aborted)

    def test_slow_reader_that_exceeds_the_limit_later(self) -> None:
        self.client.transport.block()
        self.client.protocol.send_text(b"filler")
        self.client.protocol.send_text(b"x" * (65536 - 8))
        self.node.advance(10)
        self.client.protocol.send_text(b"")
        self.client.protocol.send_text(b"")
        self.assertEqual([opcode for opcode, _ in self.client.frames()], [1] * 4)
        self.client.protocol.send_text(b"")
        self.assertEqual(self.node.metrics.slow_readers, 1)
        self.assert_closed_with(1013)

    def test_large_messages_within_one_reactor_iteration(self) -> None:
        """A transport writes nothing before the iteration ends, however fast the peer reads."""
        self.client.transport.block()
        for _ in range(6):
            self.client.protocol.send_text(b"x" * 14000)
        self.client.transport.unblock()
        self.node.advance(2 * SLOW_CONSUMER_TIMEOUT)
        self.assertEqual(self.client.frames(), [(1, b"x" * 14000)] * 6)
        self.assertEqual(self.node.metrics.slow_readers, 0)
        self.assertEqual(self.node.clock.getDelayedCalls(), [])

    def test_burst_over_the_limit(self) -> None:
        """The limit is four of the largest messages beyond the send buffer."""
        self.client.transport.block()
        self.client.protocol.send_text(b"filler")
        self.client.protocol.send_text(b"x" * (65536 + 4 * 2000 - 10))
        self.assertEqual([opcode for opcode, _ in self.client.frames()], [1, 1])
        self.client.protocol.send_text(b"")
        self.assertEqual(self.node.metrics.slow_readers, 1)
        self.assert_closed_with(1013)

    def test_slow_reader_that_closes_or_is_lost(self) -> None:
        for end in (lambda: self.client.lose(), lambda: self.client.protocol.close_with(4003)):
            self.setUp()
            self.client.transport.block()
            for _ in range(3):
                self.client.protocol.send_text(b"x" * 30000)
            end()
            self.node.advance(2 * SLOW_CONSUMER_TIMEOUT + CLOSE_TIMEOUT)
            self.assertEqual(self.node.metrics.slow_readers, 0)
            self.assertEqual(self.node.clock.getDelayedCalls(), [])

    def test_slow_reader_of_pongs(self) -> None:
        self.client.transport.block()
        for _ in range(10):
            self.client.send(build_frame(9, b"x" * 120) * 100)
            self.node.advance(2)
        self.assertEqual(self.node.metrics.slow_readers, 1)

    def test_reader_that_catches_up(self) -> None:
        for _ in range(5):
            self.client.transport.block()
            self.client.protocol.send_text(b"x")
            self.client.protocol.send_text(b"x" * 70000)
            self.node.advance(SLOW_CONSUMER_TIMEOUT - 0.5)
            self.client.transport.unblock()
        self.assertEqual(self.node.metrics.slow_readers, 0)
        self.assertEqual(self.node.sessions.count(), 1)


class CloseTest(ServerConnectionTestCase):
    """The closing handshake, and what remains afterwards"""

    def test_closed_by_the_client(self) -> None:
        self.client.send(close_frame(1001, b"done") + text_frame(b"after"))
        self.assertEqual(self.client.frames(), [(8, struct.pack("!H", 1000))])
        self.assertEqual(self.node.metrics.closed, {"1001": 1})
        self.assertTrue(self.client.transport.disconnecting)
        self.assertFalse(self.client.transport.aborted)
        self.assertEqual(self.node.handler.messages, [])
        self.client.lose()
        self.assertEqual(self.node.metrics.closed, {"1001": 1})
        self.assertEqual(len(self.node.handler.connection_events), 2)

    def test_unknown_codes_of_clients_are_counted_together(self) -> None:
        for code in (1000, 3000, 3001, 4000, 4001, 4003, 4999):
            self.node.connect("b").send(close_frame(code))
        self.assertEqual(self.node.metrics.closed, {"1000": 1, "4001": 1, "4003": 1, "other": 4})

    def test_closed_by_the_client_without_a_code(self) -> None:
        self.client.send(close_frame())
        self.assertEqual(self.node.metrics.closed, {"1005": 1})

    def test_connection_lost(self) -> None:
        self.client.lose(clean=False)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})

    def test_every_code_can_be_sent(self) -> None:
        """Autobahn's sendClose() accepts only 1000 and 3000 to 4999."""
        for code in (1000, 1001, 1008, 1011, 1012, 1013, 4001, 4003):
            client = self.node.connect("b")
            client.protocol.close_with(code, "why")
            self.assertEqual(client.frames(), [(8, struct.pack("!H", code) + b"why")])

    def test_long_reason_is_cut(self) -> None:
        """RFC 6455, section 5.5: 125 bytes with the code, and valid UTF-8."""
        self.client.protocol.close_with(4003, "\u20ac" * 100)
        [(_, payload)] = self.client.frames()
        self.assertEqual(payload[2:], "\u20ac".encode() * 41)

    def test_answered_close(self) -> None:
        self.client.protocol.close_with(4003)
        self.assertEqual(self.node.sessions.count(), 0)
        self.client.send(close_frame(4003))
        # Not aborted: a reset could destroy what the client has not read yet.
        self.assertTrue(self.client.transport.disconnecting)
        self.assertFalse(self.client.transport.aborted)
        self.assertIsNone(self.client.transport.producer)

    def test_unanswered_close(self) -> None:
        self.client.protocol.close_with(4003)
        self.node.advance(CLOSE_TIMEOUT - 0.25)
        self.assertFalse(self.client.transport.aborted)
        self.node.advance(0.5)
        self.assertTrue(self.client.transport.aborted)

    def test_close_that_hangs(self) -> None:
        """The client closes but does not read: the transport cannot flush its buffer."""
        self.client.send(close_frame(1000))
        self.node.advance(CLOSE_TIMEOUT + 0.25)
        self.assertTrue(self.client.transport.aborted)

    def steps(self) -> list[int]:
        """Record a number for each call of Autobahn's parser from now on."""
        steps: list[int] = []
        read = self.client.protocol.processData
        self.client.protocol.processData = lambda: steps.append(1) or read()
        return steps

    def test_frames_in_transit(self) -> None:
        """The answer to a close frame is found after them."""
        self.client.protocol.close_with(4003)
        self.client.send(text_frame(b"{}") * (MAX_CLOSING_FRAMES - 1) + close_frame(4003))
        self.assertTrue(self.client.transport.disconnecting)

    def test_flood_instead_of_an_answer(self) -> None:
        steps = self.steps()
        self.client.send(build_frame(2, b"x") + build_frame(9, b"") * 5000)
        self.client.send(build_frame(9, b"") * 5000)
        self.assertLess(len(steps), 2 * MAX_CLOSING_FRAMES + 10)
        self.assertEqual(self.client.protocol.data, b"")
        # The close frame may still be in transit.
        self.assertFalse(self.client.transport.aborted)
        self.assertEqual(self.client.close_code(), 1003)
        for _ in range(3):
            self.client.send(build_frame(9, b"") * 60000)
        self.assertTrue(self.client.transport.aborted)
        self.assertLess(len(steps), 2 * MAX_CLOSING_FRAMES + 10)

    def test_silence_after_a_flood_instead_of_an_answer(self) -> None:
        self.client.send(build_frame(2, b"x") + build_frame(9, b"") * 1000)
        self.node.advance(CLOSE_TIMEOUT + 0.25)
        self.assertTrue(self.client.transport.aborted)

    def test_rest_of_a_message_that_is_too_large(self) -> None:
        """It is read, so that the sender gets the close code: it can answer only after the whole message."""
        size = MAX_CLOSING_BYTES - 65536
        self.client.send(struct.pack("!BBQ", 0x81, 0xFF, size) + b"mask")
        self.client.send(b"x" * size)
        self.assert_closed_with(1009)
        self.client.send(close_frame(1009))
        self.assertTrue(self.client.transport.disconnecting)
        self.assertFalse(self.client.transport.aborted)

    def test_message_without_end(self) -> None:
        self.client.send(struct.pack("!BBQ", 0x81, 0xFF, 2**62) + b"mask")
        self.client.send(b"x" * (MAX_CLOSING_BYTES + 1))
        self.assertTrue(self.client.transport.aborted)

    def test_no_timer_outlives_the_connection(self) -> None:
        for end in (lambda: self.client.protocol.close_with(4003), lambda: self.client.send(close_frame(1000))):
            self.setUp()
            end()
            self.client.lose()
            self.node.advance(10)
            self.assertFalse(self.client.transport.aborted)

    def test_abort(self) -> None:
        self.client.protocol.abort()
        self.assertTrue(self.client.transport.aborted)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})
        self.client.protocol.abort()
        self.client.lose(clean=False)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})

    def test_bytes_after_closing_are_discarded(self) -> None:
        """A TLS transport delivers bytes after loseConnection()."""
        self.client.send(close_frame(1000))
        for _ in range(17):
            self.client.send(b"x" * 65536)
        self.assertEqual(self.client.protocol.data, b"")
        self.assertTrue(self.client.transport.aborted)

    def test_tls_waits_for_no_producer(self) -> None:
        node = FakeNode()
        client = node.dial()
        directlyProvides(client.transport, ISSLTransport, providedBy(client.transport))
        client.send(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertTrue(client.transport.disconnecting)
        self.assertFalse(client.transport.half_closed)

    def test_no_reference_cycle(self) -> None:
        """A closed connection is freed without the garbage collector."""

        def freed() -> list[Any]:
            return [ref for ref in refs if ref() is None]

        refs = []
        gc.disable()
        self.addCleanup(gc.enable)
        for end in (lambda c: c.lose(), lambda c: c.send(close_frame(1000)), lambda c: c.protocol.close_with(4003)):
            client = self.node.connect("b")
            refs.append(weakref.ref(client.protocol))
            end(client)
            client.lose()
            client.transport.protocol = None
            del client
        self.node.handler.on_message = None
        self.node.advance(20)
        self.assertEqual(len(freed()), 3)

    def test_helper_parse_frames(self) -> None:
        self.assertEqual(parse_frames(b"\x81\x01a\x88\x00"), [(1, b"a"), (8, b"")])
