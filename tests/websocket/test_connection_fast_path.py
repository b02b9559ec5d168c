"""Tests of gateway.websocket.connection: the fast path past Autobahn, corking, and detaching an idle connection."""

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
    """Record each write separately."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)
        super().write(data)


class FastPathTestCase(SynchronousTestCase):
    """Test with one awake client; ``steps`` counts the calls of Autobahn's parser."""

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
        """They do not reach Autobahn."""
        self.client.send(
            text_frame(b"one") + build_frame(9, b"p") + build_frame(10, b"") + text_frame(b"x" * 65535), 1 << 20
        )
        self.assertEqual(self.node.handler.messages, [b"one", b"x" * 65535])
        self.assertEqual(self.client.frames(), [(10, b"p")])
        self.assertEqual((self.steps, self.protocol.data), (0, b""))

    def test_other_frames_go_to_autobahn(self) -> None:
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

    def test_resumes_after_a_fragmented_message(self) -> None:
        self.client.send(build_frame(1, b"one", fin=False))
        self.client.send(build_frame(0, b""))
        steps = self.steps
        self.client.send(text_frame(b"two"))
        self.assertEqual(self.node.handler.messages, [b"one", b"two"])
        self.assertEqual(self.steps, steps)

    def test_not_within_a_fragmented_message(self) -> None:
        """A text frame there is a protocol error (RFC 6455, section 5.4)."""
        self.client.send(build_frame(1, b"one", fin=False))
        self.client.send(text_frame(b"two"))
        self.assertEqual(self.node.handler.messages, [])
        self.assertEqual(self.client.close_code(), 1002)

    def test_not_after_a_partial_frame(self) -> None:
        """Bytes that look like a frame may be the payload of another."""
        inner = text_frame(b"not a message")
        whole = build_frame(1, inner.decode("latin-1").encode())
        self.client.send(whole[:20])
        self.client.send(whole[20:])
        self.assertEqual(self.node.handler.messages, [inner.decode("latin-1").encode()])

    def test_partial_frames_are_kept(self) -> None:
        """A read of a busy connection ends anywhere: else nearly all bytes would go to Autobahn."""
        self.protocol.buffers_partial_frames = True
        data = text_frame(b"one") + text_frame(b"x" * 200) + build_frame(9, b"p") + text_frame(b"two")
        for cut in range(1, len(data)):
            self.node.handler.events.clear()
            for segment in (data[:cut], data[cut:]):
                self.client.send(segment)
            self.assertEqual(self.node.handler.messages, [b"one", b"x" * 200, b"two"])
            self.assertEqual(self.client.frames(), [(10, b"p")])
            self.node.advance(1)
        # Partial pings are not kept.
        self.assertGreater(self.steps, 0)
        self.steps = 0
        for at in range(len(text_frame(b"one"))):
            self.client.send(text_frame(b"one")[at : at + 1])
        self.assertEqual((self.node.handler.messages[-1], self.steps, self.protocol.data), (b"one", 0, b""))

    def test_partial_frames_with_errors_are_not_kept(self) -> None:
        for data in (text_frame(b"x" * 100001)[:20], build_frame(2, b"b")[:-1], build_frame(1, b"a", rsv=4)[:2]):
            self.setUp()
            self.protocol.buffers_partial_frames = True
            self.client.send(data)
            self.assertIn(self.client.close_code(), (1002, 1003, 1009))

    def test_closed_between_frames_of_one_read(self) -> None:
        self.node.handler.on_message = lambda payload: self.protocol.close_with(4003)
        self.client.send(text_frame(b"one") + text_frame(b"two") + build_frame(9, b"p"))
        self.assertEqual(self.node.handler.messages, [b"one"])
        self.assertEqual(self.client.frames(), [(8, b"\x0f\xa3")])
        self.client.send(close_frame(4003))
        self.assertTrue(self.client.transport.disconnecting)

    def test_paused_between_frames_of_one_read(self) -> None:
        self.node.handler.on_message = lambda payload: self.protocol.pause_reading()
        self.client.send(text_frame(b"one") + build_frame(9, b"p") + text_frame(b"two")[:-1])
        self.assertEqual(self.node.handler.messages, [b"one"])
        self.client.send(text_frame(b"two")[-1:])
        self.assertEqual(self.client.frames(), [])
        self.protocol.resume_reading()
        self.assertEqual(self.node.handler.messages, [b"one", b"two"])
        self.assertEqual(self.client.frames(), [(10, b"p")])

    def test_more_bytes_while_a_message_is_handled(self) -> None:
        """They are handled after those that were read before."""
        data = text_frame(b"one") + text_frame(b"two") + text_frame(b"three") + text_frame(b"four")
        for cut in range(len(text_frame(b"one")), len(data)):
            self.setUp()
            more = [data[cut:]]
            self.node.handler.on_message = lambda payload, more=more: more and self.client.send(more.pop())
            self.client.send(data[:cut])
            self.assertEqual(self.node.handler.messages, [b"one", b"two", b"three", b"four"])
            self.assertEqual(self.protocol.data, b"")

    def test_handler_that_raises(self) -> None:
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
        """The results are the same with and without the fast path."""
        results = []
        for fast in (True, False):
            node = FakeNode(messages_per_client=0)
            client = node.connect()
            if not fast:
                client.protocol.process_fast = lambda data: data
            client.send(b"".join(pieces), step)
            results.append((node.handler.events, client.frames(), node.metrics.closed, client.transport.disconnecting))
        self.assertEqual(*results)


class FastPathSendTest(FastPathTestCase):
    """Bytes out"""

    def test_not_corked(self) -> None:
        writes = self.record()
        self.assertTrue(self.protocol.send_text(b"one"))
        self.assertTrue(self.protocol.send_text(b"x" * 200))
        self.assertEqual(writes, [encode(b"one"), encode(b"x" * 200)])

    def test_corked(self) -> None:
        writes = self.record()
        for _ in range(2):
            self.cork.cork()
            for payload in (b"one", b"two", b"three"):
                self.assertTrue(self.protocol.send_text(payload))
            self.assertEqual(writes, [])
            self.cork.uncork()
            self.assertEqual(writes, [encode(b"one") + encode(b"two") + encode(b"three")])
            writes.clear()

    def test_responses_to_one_read(self) -> None:
        """The responses to several messages of one read leave in one write."""
        writes = self.record()
        self.node.handler.on_message = self.protocol.send_text
        self.client.send(text_frame(b"one") + text_frame(b"two"))
        self.assertEqual(writes, [encode(b"one") + encode(b"two")])

    def test_other_frames_follow_the_corked_ones(self) -> None:
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

    def test_corked_bytes_are_bounded(self) -> None:
        writes = self.record()
        message = b"x" * 10000
        self.cork.cork()
        for _ in range(20):
            self.protocol.send_text(message)
        self.assertTrue(MAX_CORKED_BYTES < len(writes[0]) <= MAX_CORKED_BYTES + len(encode(message)))
        self.cork.uncork()
        self.assertEqual(b"".join(writes), encode(message) * 20)

    def test_large_messages(self) -> None:
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

    def test_lost_while_corked(self) -> None:
        self.cork.cork()
        self.protocol.send_text(b"one")
        self.client.lose()
        self.cork.uncork()
        self.assertFalse(self.cork.is_corked)

    def test_corked_frames_count_as_written(self) -> None:
        """A slow reader is detected, corked or not."""
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
    """detach_idle(): the conditions that gateway.net.transport cannot check"""

    def setUp(self) -> None:
        self.node = ParkingNode(park_after=1e9)
        self.addCleanup(self.node.close)
        self.peer = self.node.connect()
        self.protocol = self.node.protocol()

    def detach_and_park(self) -> None:
        detached = self.protocol.detach_idle()
        assert detached is not None
        self.node.table.awake.clear()
        self.node.parked.park(_session(), *detached, self.node.clock.seconds())

    def assert_stays(self) -> None:
        self.assertIsNone(self.protocol.detach_idle())
        self.assertEqual(self.protocol.state, self.protocol.STATE_OPEN)

    def test_parkable(self) -> None:
        self.assertTrue(self.protocol.parkable)
        self.assertFalse(FakeNode().connect().protocol.parkable)

    def test_idle(self) -> None:
        self.detach_and_park()
        self.peer.send(text_frame(b"one"))
        self.node.step()
        self.assertEqual(self.node.handler.messages, [b"one"])

    def test_paused(self) -> None:
        self.protocol.pause_reading()
        self.assert_stays()
        self.protocol.resume_reading()
        self.detach_and_park()

    def test_closing(self) -> None:
        self.protocol.close_with(4003)
        self.assertIsNone(self.protocol.detach_idle())
        self.node.step()
        self.assertEqual(read_frames(self.peer), [(8, b"\x0f\xa3")])

    def test_while_its_message_is_handled(self) -> None:
        results = []
        self.node.handler.on_message = lambda payload: results.append(self.protocol.detach_idle())
        self.peer.send(text_frame(b"one") + build_frame(1, b"t", fin=False) + build_frame(0, b"wo"))
        self.node.step()
        self.assertEqual((self.node.handler.messages, results), ([b"one", b"two"], [None, None]))

    def test_with_corked_frames(self) -> None:
        self.node.cork.cork()
        self.protocol.send_text(b"one")
        self.assert_stays()
        self.node.cork.uncork()
        self.detach_and_park()
        self.assertEqual(read_frames(self.peer), [(1, b"one")])

    def test_full_buffer(self) -> None:
        self.protocol.send_text(b"x" * 1000000)
        self.assertIsNotNone(self.protocol._slow_consumer)
        self.assert_stays()
        received = b""
        while len(received) < len(encode(b"x" * 1000000)):
            received += read_available(self.peer)
            self.node.step(1)
        self.assertIsNone(self.protocol._slow_consumer)
        self.detach_and_park()


def _session() -> Session:
    return Session("a", "unix", generation=1, claimed=True)
