"""Tests of gateway.websocket.connection: what is sent, and the end of a connection."""

from __future__ import annotations

import gc
import struct
import weakref
from typing import Any

from twisted.internet.interfaces import ISSLTransport
from zope.interface import directlyProvides, providedBy

from gateway.websocket.connection import CLOSE_TIMEOUT, MAX_CLOSING_BYTES, MAX_CLOSING_FRAMES
from gateway.websocket.limits import SLOW_CONSUMER_TIMEOUT
from tests.edge.fakes import FakeNode, build_frame, close_frame, parse_frames, text_frame
from tests.edge.test_wire import ServerConnectionTestCase


class SendTest(ServerConnectionTestCase):
    """Frames out"""

    def test_text(self) -> None:
        for size in (0, 125, 126, 65535, 65536):
            self.assertTrue(self.client.protocol.send_text(b"x" * size))
            self.assertEqual(self.client.frames(), [(1, b"x" * size)])

    def test_not_when_closing_or_gone(self) -> None:
        self.client.protocol.close_with(4003)
        self.client.transport.clear()
        self.assertFalse(self.client.protocol.send_text(b"x"))
        self.client.protocol.ping()
        self.client.lose()
        self.assertFalse(self.client.protocol.send_text(b"x"))
        self.assertEqual(self.client.transport.pop_written(), b"")

    def test_slow_reader(self) -> None:
        self.client.transport.block()
        # What filled the buffer is not counted, be it as large as a message can be.
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

    def test_reader_that_gets_too_much_later(self) -> None:
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

    def test_large_messages_within_one_turn(self) -> None:
        """A transport writes nothing before the turn is over, however well its other end reads."""
        self.client.transport.block()
        for _ in range(6):
            self.client.protocol.send_text(b"x" * 14000)
        self.client.transport.unblock()
        self.node.advance(2 * SLOW_CONSUMER_TIMEOUT)
        self.assertEqual(self.client.frames(), [(1, b"x" * 14000)] * 6)
        self.assertEqual(self.node.metrics.slow_readers, 0)
        self.assertEqual(self.node.clock.getDelayedCalls(), [])

    def test_burst_without_end(self) -> None:
        """Four of the largest messages beyond the send buffer are the most."""
        self.client.transport.block()
        self.client.protocol.send_text(b"filler")
        self.client.protocol.send_text(b"x" * (65536 + 4 * 2000 - 10))
        self.assertEqual([opcode for opcode, _ in self.client.frames()], [1, 1])
        self.client.protocol.send_text(b"")
        self.assertEqual(self.node.metrics.slow_readers, 1)
        self.assert_closed_with(1013)

    def test_choked_reader_that_is_gone(self) -> None:
        for how in (lambda: self.client.lose(), lambda: self.client.protocol.close_with(4003)):
            self.setUp()
            self.client.transport.block()
            for _ in range(3):
                self.client.protocol.send_text(b"x" * 30000)
            how()
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
    """Closing, and what is left afterwards"""

    def test_the_client_closes(self) -> None:
        self.client.send(close_frame(1001, b"done") + text_frame(b"after"))
        self.assertEqual(self.client.frames(), [(8, struct.pack("!H", 1000))])
        self.assertEqual(self.node.metrics.closed, {"1001": 1})
        self.assertTrue(self.client.transport.disconnecting)
        self.assertFalse(self.client.transport.aborted)
        self.assertEqual(self.node.handler.messages, [])
        self.client.lose()
        self.assertEqual(self.node.metrics.closed, {"1001": 1})
        self.assertEqual(len(self.node.handler.connection_events), 2)

    def test_codes_of_the_clients_choice_are_counted_as_one(self) -> None:
        for code in (1000, 3000, 3001, 4000, 4001, 4003, 4999):
            self.node.connect("b").send(close_frame(code))
        self.assertEqual(self.node.metrics.closed, {"1000": 1, "4001": 1, "4003": 1, "other": 4})

    def test_the_client_closes_without_a_code(self) -> None:
        self.client.send(close_frame())
        self.assertEqual(self.node.metrics.closed, {"1005": 1})

    def test_the_client_vanishes(self) -> None:
        self.client.lose(clean=False)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})

    def test_every_code_can_be_sent(self) -> None:
        """Autobahn's sendClose() takes 1000 and 3000 to 4999 alone."""
        for code in (1000, 1001, 1008, 1011, 1012, 1013, 4001, 4003):
            client = self.node.connect("b")
            client.protocol.close_with(code, "why")
            self.assertEqual(client.frames(), [(8, struct.pack("!H", code) + b"why")])

    def test_the_reason_is_cut(self) -> None:
        """RFC 6455, section 5.5: 125 bytes with the code; and still UTF-8."""
        self.client.protocol.close_with(4003, "\u20ac" * 100)
        [(_, payload)] = self.client.frames()
        self.assertEqual(payload[2:], "\u20ac".encode() * 41)

    def test_answered_close(self) -> None:
        self.client.protocol.close_with(4003)
        self.assertEqual(self.node.sessions.count(), 0)
        self.client.send(close_frame(4003))
        # An orderly end: a reset could destroy what the client has yet to read.
        self.assertTrue(self.client.transport.disconnecting)
        self.assertFalse(self.client.transport.aborted)
        self.assertIsNone(self.client.transport.producer)

    def test_unanswered_close(self) -> None:
        self.client.protocol.close_with(4003)
        self.node.advance(CLOSE_TIMEOUT - 0.25)
        self.assertFalse(self.client.transport.aborted)
        self.node.advance(0.5)
        self.assertTrue(self.client.transport.aborted)

    def test_end_that_hangs(self) -> None:
        """The client closes but does not read: the transport never gets rid of its buffer."""
        self.client.send(close_frame(1000))
        self.node.advance(CLOSE_TIMEOUT + 0.25)
        self.assertTrue(self.client.transport.aborted)

    def steps(self) -> list[int]:
        """One number for each step of Autobahn's in reading frames from now on."""
        steps: list[int] = []
        read = self.client.protocol.processData
        self.client.protocol.processData = lambda: steps.append(1) or read()
        return steps

    def test_frames_under_way(self) -> None:
        """The answer to a close frame is found behind them."""
        self.client.protocol.close_with(4003)
        self.client.send(text_frame(b"{}") * (MAX_CLOSING_FRAMES - 1) + close_frame(4003))
        self.assertTrue(self.client.transport.disconnecting)

    def test_flood_instead_of_an_answer(self) -> None:
        steps = self.steps()
        self.client.send(build_frame(2, b"x") + build_frame(9, b"") * 5000)
        self.client.send(build_frame(9, b"") * 5000)
        self.assertLess(len(steps), 2 * MAX_CLOSING_FRAMES + 10)
        self.assertEqual(self.client.protocol.data, b"")
        # The close frame has yet to leave.
        self.assertFalse(self.client.transport.aborted)
        self.assertEqual(self.client.close_code(), 1003)
        for _ in range(3):
            self.client.send(build_frame(9, b"") * 60000)
        self.assertTrue(self.client.transport.aborted)
        self.assertLess(len(steps), 2 * MAX_CLOSING_FRAMES + 10)

    def test_flood_instead_of_an_answer_that_ends(self) -> None:
        self.client.send(build_frame(2, b"x") + build_frame(9, b"") * 1000)
        self.node.advance(CLOSE_TIMEOUT + 0.25)
        self.assertTrue(self.client.transport.aborted)

    def test_rest_of_a_message_that_is_too_large(self) -> None:
        """Its sender is to see why: it can answer only when it has sent all of it."""
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
        for how in (lambda: self.client.protocol.close_with(4003), lambda: self.client.send(close_frame(1000))):
            self.setUp()
            how()
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

    def test_bytes_after_the_end_are_dropped(self) -> None:
        """TLS goes on delivering after loseConnection()."""
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

    def test_nothing_is_left(self) -> None:
        """No reference cycle: the garbage collector is not needed."""

        def gone() -> list[Any]:
            return [ref for ref in refs if ref() is None]

        refs = []
        gc.disable()
        self.addCleanup(gc.enable)
        for how in (lambda c: c.lose(), lambda c: c.send(close_frame(1000)), lambda c: c.protocol.close_with(4003)):
            client = self.node.connect("b")
            refs.append(weakref.ref(client.protocol))
            how(client)
            client.lose()
            client.transport.protocol = None
            del client
        self.node.handler.on_message = None
        self.node.advance(20)
        self.assertEqual(len(gone()), 3)

    def test_parse_frames_reads_what_was_sent(self) -> None:
        self.assertEqual(parse_frames(b"\x81\x01a\x88\x00"), [(1, b"a"), (8, b"")])
