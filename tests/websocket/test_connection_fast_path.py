"""Tests of gateway.websocket.connection: what an awake connection does past Autobahn, and its way to be parked."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.clients.interface import Session
from gateway.protocol.frames import encode
from gateway.websocket.connection import MAX_CORKED_BYTES
from tests.builders.frames import build_frame, close_frame, text_frame
from tests.builders.sockets import read_available, read_frames
from tests.fakes.clients import FakeNode, FakeTransport
from tests.fakes.parked import ParkingNode


class RecordingTransport(FakeTransport):
    """Notes each write on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)
        super().write(data)


class FastPathTestCase(SynchronousTestCase):
    """Stands on a client that is awake."""

    def setUp(self) -> None:
        self.node = FakeNode(max_message_size=100000)
        self.client = self.node.connect()
        self.protocol = self.client.protocol
        self.cork = self.node.factory.cork
        self.client.transport.clear()
        self.steps = 0
        process = self.protocol.processData

        def count() -> Any:
            self.steps += 1
            return process()

        self.protocol.processData = count

    def record(self) -> list[bytes]:
        self.protocol.transport = transport = RecordingTransport()
        return transport.writes


class FastPathReceiveTest(FastPathTestCase):
    """Bytes in"""

    def test_whole_frames(self) -> None:
        """Autobahn sees none of them."""
        self.client.send(
            text_frame(b"one") + build_frame(9, b"p") + build_frame(10, b"") + text_frame(b"x" * 65535), 1 << 20
        )
        self.assertEqual(self.node.handler.messages, [b"one", b"x" * 65535])
        self.assertEqual(self.client.frames(), [(10, b"p")])
        self.assertEqual((self.steps, self.protocol.data), (0, b""))

    def test_the_rest_is_autobahns(self) -> None:
        self.client.send(
            text_frame(b"one")
            + build_frame(1, b"t", fin=False)
            + build_frame(9, b"p")
            + build_frame(0, b"wo")
            + text_frame(b"three")
        )
        self.assertEqual(self.node.handler.messages, [b"one", b"two", b"three"])
        self.assertEqual(self.client.frames(), [(10, b"p")])
        self.assertGreater(self.steps, 0)

    def test_back_on_it(self) -> None:
        """Once a message in pieces is over."""
        self.client.send(build_frame(1, b"one", fin=False))
        self.client.send(build_frame(0, b""))
        steps = self.steps
        self.client.send(text_frame(b"two"))
        self.assertEqual(self.node.handler.messages, [b"one", b"two"])
        self.assertEqual(self.steps, steps)

    def test_not_within_a_message_in_pieces(self) -> None:
        """There a text frame breaks the protocol (RFC 6455, section 5.4)."""
        self.client.send(build_frame(1, b"one", fin=False))
        self.client.send(text_frame(b"two"))
        self.assertEqual(self.node.handler.messages, [])
        self.assertEqual(self.client.close_code(), 1002)

    def test_not_behind_a_part_of_a_frame(self) -> None:
        """What looks like a frame is the payload of another."""
        inner = text_frame(b"not a message")
        whole = build_frame(1, inner.decode("latin-1").encode())
        self.client.send(whole[:20])
        self.client.send(whole[20:])
        self.assertEqual(self.node.handler.messages, [inner.decode("latin-1").encode()])

    def test_beginnings_are_kept(self) -> None:
        """Of whoever sends much: then a read ends anywhere, and Autobahn would have nearly all of it."""
        self.protocol.buffers_partial_frames = True
        data = text_frame(b"one") + text_frame(b"x" * 200) + build_frame(9, b"p") + text_frame(b"two")
        for cut in range(1, len(data)):
            self.node.handler.events.clear()
            for part in (data[:cut], data[cut:]):
                self.client.send(part)
            self.assertEqual(self.node.handler.messages, [b"one", b"x" * 200, b"two"])
            self.assertEqual(self.client.frames(), [(10, b"p")])
            self.node.advance(1)
        # Those of a ping are not.
        self.assertGreater(self.steps, 0)
        self.steps = 0
        for at in range(len(text_frame(b"one"))):
            self.client.send(text_frame(b"one")[at : at + 1])
        self.assertEqual((self.node.handler.messages[-1], self.steps, self.protocol.data), (b"one", 0, b""))

    def test_beginnings_of_what_is_wrong_are_not_kept(self) -> None:
        for data in (text_frame(b"x" * 100001)[:20], build_frame(2, b"b")[:-1], build_frame(1, b"a", rsv=4)[:2]):
            self.setUp()
            self.protocol.buffers_partial_frames = True
            self.client.send(data)
            self.assertIn(self.client.close_code(), (1002, 1003, 1009))

    def test_closed_in_the_midst(self) -> None:
        self.node.handler.on_message = lambda payload: self.protocol.close_with(4003)
        self.client.send(text_frame(b"one") + text_frame(b"two") + build_frame(9, b"p"))
        self.assertEqual(self.node.handler.messages, [b"one"])
        self.assertEqual(self.client.frames(), [(8, b"\x0f\xa3")])
        self.client.send(close_frame(4003))
        self.assertTrue(self.client.transport.disconnecting)

    def test_paused_in_the_midst(self) -> None:
        self.node.handler.on_message = lambda payload: self.protocol.pause_reading()
        self.client.send(text_frame(b"one") + build_frame(9, b"p") + text_frame(b"two")[:-1])
        self.assertEqual(self.node.handler.messages, [b"one"])
        self.client.send(text_frame(b"two")[-1:])
        self.assertEqual(self.client.frames(), [])
        self.protocol.resume_reading()
        self.assertEqual(self.node.handler.messages, [b"one", b"two"])
        self.assertEqual(self.client.frames(), [(10, b"p")])

    def test_more_bytes_while_a_message_is_handled(self) -> None:
        """They are handled behind those that were read before."""
        data = text_frame(b"one") + text_frame(b"two") + text_frame(b"three") + text_frame(b"four")
        for cut in range(len(text_frame(b"one")), len(data)):
            self.setUp()
            more = [data[cut:]]
            self.node.handler.on_message = lambda payload, more=more: more and self.client.send(more.pop())
            self.client.send(data[:cut])
            self.assertEqual(self.node.handler.messages, [b"one", b"two", b"three", b"four"])
            self.assertEqual(self.protocol.data, b"")

    def test_handler_that_fails(self) -> None:
        self.client.send(text_frame(b"boom") + text_frame(b"two"))
        self.assertEqual(self.node.handler.messages, [b"boom"])
        self.assertEqual(self.client.close_code(), 1011)
        self.assertFalse(self.cork.is_corked)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_too_large(self) -> None:
        self.node = FakeNode(max_message_size=1000)
        client = self.node.connect()
        client.send(text_frame(b"x" * 1000) + text_frame(b"x" * 1001))
        self.assertEqual(self.node.handler.messages, [b"x" * 1000])
        self.assertEqual(client.close_code(), 1009)

    pieces = st.sampled_from(
        [
            text_frame(b"one"),
            text_frame(b"x" * 200),
            text_frame(b"\xff"),
            build_frame(9, b"p"),
            build_frame(9, b"p" * 126),
            build_frame(10, b""),
            build_frame(1, b"\xe2\x82", fin=False),
            build_frame(0, b"\xac"),
            build_frame(2, b"b"),
            close_frame(1000),
            text_frame(b"bad"),
        ]
    )

    @settings(deadline=None, max_examples=150)
    @given(st.lists(pieces, max_size=12), st.integers(1, 300))
    def test_generated(self, pieces: list[bytes], step: int) -> None:
        """With it and without it: the same."""
        outcomes = []
        for lane in (True, False):
            node = FakeNode(messages_per_client=0)
            client = node.connect()
            if not lane:
                client.protocol.process_fast = lambda data: data
            client.send(b"".join(pieces), step)
            outcomes.append((node.handler.events, client.frames(), node.metrics.closed, client.transport.disconnecting))
        self.assertEqual(*outcomes)


class FastPathSendTest(FastPathTestCase):
    """Bytes out"""

    def test_outside_of_a_turn(self) -> None:
        writes = self.record()
        self.assertTrue(self.protocol.send_text(b"one"))
        self.assertTrue(self.protocol.send_text(b"x" * 200))
        self.assertEqual(writes, [encode(b"one"), encode(b"x" * 200)])

    def test_in_a_turn(self) -> None:
        writes = self.record()
        for _ in range(2):
            self.cork.cork()
            for payload in (b"one", b"two", b"three"):
                self.assertTrue(self.protocol.send_text(payload))
            self.assertEqual(writes, [])
            self.cork.uncork()
            self.assertEqual(writes, [encode(b"one") + encode(b"two") + encode(b"three")])
            writes.clear()

    def test_answers_to_one_read(self) -> None:
        """Whoever is handed many messages answers by one write."""
        writes = self.record()
        self.node.handler.on_message = self.protocol.send_text
        self.client.send(text_frame(b"one") + text_frame(b"two"))
        self.assertEqual(writes, [encode(b"one") + encode(b"two")])

    def test_behind_what_was_gathered(self) -> None:
        """Whatever else Autobahn sends goes behind."""
        for call, expected in (
            (self.protocol.ping, (9, b"")),
            (lambda: self.protocol.sendPong(b"p"), (10, b"p")),
            (lambda: self.protocol.close_with(4003), (8, b"\x0f\xa3")),
        ):
            writes = self.record()
            self.cork.cork()
            self.protocol.send_text(b"one")
            call()
            self.assertEqual(len(writes), 1)
            if expected[0] != 8:
                self.protocol.send_text(b"two")
            self.cork.uncork()
            self.client.transport.clear()
            self.client.transport.write(b"".join(writes))
            self.assertEqual(self.client.frames()[:2], [(1, b"one"), expected])

    def test_much(self) -> None:
        """So much at a time, and no more, waits for the end of a turn."""
        writes = self.record()
        message = b"x" * 10000
        self.cork.cork()
        for _ in range(20):
            self.protocol.send_text(message)
        self.assertTrue(MAX_CORKED_BYTES < len(writes[0]) <= MAX_CORKED_BYTES + len(encode(message)))
        self.cork.uncork()
        self.assertEqual(b"".join(writes), encode(message) * 20)

    def test_large(self) -> None:
        writes = self.record()
        self.cork.cork()
        self.protocol.send_text(b"one")
        self.protocol.send_text(b"x" * 90000)
        self.assertEqual(writes, [encode(b"one") + encode(b"x" * 90000)])
        self.protocol.send_text(b"y" * 90000)
        self.assertEqual(writes[1:], [encode(b"y" * 90000)])
        self.cork.uncork()
        self.assertEqual(len(writes), 2)

    def test_not_open(self) -> None:
        self.protocol.close_with(4003)
        self.client.transport.clear()
        self.assertFalse(self.protocol.send_text(b"one"))
        self.cork.cork()
        self.assertFalse(self.protocol.send_text(b"one"))
        self.cork.uncork()
        self.assertEqual(self.client.frames(), [])

    def test_lost_before_the_end_of_the_turn(self) -> None:
        self.cork.cork()
        self.protocol.send_text(b"one")
        self.client.lose()
        self.cork.uncork()
        self.assertFalse(self.cork.is_corked)

    def test_what_is_gathered_counts_as_waiting(self) -> None:
        """A reader that is too slow is closed, however its messages are written."""
        node = FakeNode(max_message_size=1000, send_buffer=20000)
        client = node.connect()
        client.transport.block()
        client.protocol.send_text(b"x")
        for _ in range(30):
            node.factory.cork.cork()
            client.protocol.send_text(b"x" * 500)
            client.protocol.send_text(b"x" * 500)
            node.factory.cork.uncork()
        self.assertEqual(node.metrics.slow_readers, 1)


class DetachIdleTest(SynchronousTestCase):
    """detach(): what waking.py cannot see"""

    def setUp(self) -> None:
        self.node = ParkingNode(park_after=1e9)
        self.addCleanup(self.node.close)
        self.there = self.node.connect()
        self.protocol = self.node.protocol()

    def assert_stays(self) -> None:
        self.assertIsNone(self.protocol.detach_idle())
        self.assertEqual(self.protocol.state, self.protocol.STATE_OPEN)

    def test_parkable(self) -> None:
        self.assertTrue(self.protocol.parkable)
        self.assertFalse(FakeNode().connect().protocol.parkable)

    def test_quiet(self) -> None:
        taken = self.protocol.detach_idle()
        assert taken is not None
        self.node.table.awake.clear()
        self.node.parked.park(_session(), *taken, self.node.clock.seconds())
        self.there.send(text_frame(b"one"))
        self.node.step()
        self.assertEqual(self.node.handler.messages, [b"one"])

    def test_paused(self) -> None:
        self.protocol.pause_reading()
        self.assert_stays()
        self.protocol.resume_reading()
        self.assertIsNotNone(self._detached())

    def _detached(self) -> Any:
        taken = self.protocol.detach_idle()
        self.node.table.awake.clear()
        self.node.parked.park(_session(), *taken, self.node.clock.seconds())
        return taken

    def test_closing(self) -> None:
        self.protocol.close_with(4003)
        self.assertIsNone(self.protocol.detach_idle())
        self.node.step()
        self.assertEqual(read_frames(self.there), [(8, b"\x0f\xa3")])

    def test_within_its_own_message(self) -> None:
        results = []
        self.node.handler.on_message = lambda payload: results.append(self.protocol.detach_idle())
        self.there.send(text_frame(b"one") + build_frame(1, b"t", fin=False) + build_frame(0, b"wo"))
        self.node.step()
        self.assertEqual((self.node.handler.messages, results), ([b"one", b"two"], [None, None]))

    def test_in_a_turn_in_which_it_has_to_say_something(self) -> None:
        self.node.cork.cork()
        self.protocol.send_text(b"one")
        self.assert_stays()
        self.node.cork.uncork()
        self._detached()
        self.assertEqual(read_frames(self.there), [(1, b"one")])

    def test_full_buffer(self) -> None:
        self.protocol.send_text(b"x" * 1000000)
        self.assertIsNotNone(self.protocol._slow_consumer)
        self.assert_stays()
        received = b""
        while len(received) < len(encode(b"x" * 1000000)):
            received += read_available(self.there)
            self.node.step(1)
        self.assertIsNone(self.protocol._slow_consumer)
        self._detached()


def _session() -> Session:
    return Session("a", "unix", generation=1, claimed=True)
