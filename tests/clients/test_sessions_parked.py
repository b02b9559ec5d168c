"""Tests of gateway.clients.sessions with parking, on real sockets."""

from __future__ import annotations

import socket
import struct
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from gateway.clients.interface import SessionInfo
from gateway.clients.sessions import MAX_BAD_MESSAGES
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import SessionKey
from tests.builders.frames import build_frame, build_request, close_frame, text_frame
from tests.builders.sockets import (
    connection_end,
    fill_send_buffer,
    read_available,
    read_close_code,
    read_frames,
    small_buffer_pair,
    tcp_pair,
    wait_readable,
)
from tests.fakes.parked import ParkingNode

PARTIAL = text_frame(b"split")[:-2]
REST = text_frame(b"split")[-2:]


class ParkedTestCase(SynchronousTestCase):
    """Two clients that are parked."""

    options: dict[str, Any] = {}

    def setUp(self) -> None:
        self.use(**self.options)
        self.a, self.b = self.node.connect("a"), self.node.connect("b")
        self.assertEqual(self.sessions.parked_count(), 2)

    def use(self, **options: Any) -> None:
        self.node = ParkingNode(**options)
        self.addCleanup(self.node.close)
        self.sessions, self.handler = self.node.sessions, self.node.handler

    def wake(self, client_end: socket.socket) -> None:
        """Let a client send a part of a message."""
        client_end.send(PARTIAL)
        self.node.step()

    def assert_gone(self, client_id: str, generation: int) -> None:
        """Assert that the handler was notified once, the row released once, and nothing is left."""
        self.assertIsNone(self.sessions.get(client_id))
        self.assertEqual(self.handler.connection_events.count(("disconnected", client_id, generation)), 1)
        self.assertEqual(self.node.registry.released.count((client_id, generation)), 1)
        self.assertEqual(self.sessions.send(client_id, b"x", generation), 0)


class ParkedClientSessionsTest(ParkedTestCase):
    """IClientSessions with parked connections"""

    def test_queries(self) -> None:
        self.assertEqual(self.sessions.get("a"), SessionInfo("a", 1, 1001.0, "unix"))
        self.assertEqual((self.sessions.generation("a"), self.sessions.generation("b")), (1, 2))
        self.assertEqual(sorted(self.sessions.client_ids()), ["a", "b"])
        self.assertEqual((self.sessions.count(), self.sessions.parked_count(), self.sessions.unsent_bytes()), (2, 2, 0))
        self.assertIsNone(self.sessions.claim_in_progress("a"))
        self.assertEqual(self.sessions.send("a", b"one"), 1)
        self.assertEqual(self.sessions.send("b", b"two", 2), 2)
        self.assertEqual(self.sessions.send("b", b"no", 1), 0)
        self.assertEqual((read_frames(self.a), read_frames(self.b)), ([(1, b"one")], [(1, b"two")]))
        self.assertEqual(self.node.metrics.woken, 0)

    def test_addresses(self) -> None:
        client_end = self.node.connect("c", tcp_pair())
        host, port = client_end.getsockname()
        self.assertEqual(self.sessions.get("c"), SessionInfo("c", 3, 1003.0, f"{host}:{port}"))
        self.assertEqual(self.sessions.parked_count(), 3)

    def test_messages(self) -> None:
        self.a.send(text_frame(b"one") + build_frame(9, b"p") + text_frame(b"two"))
        self.node.step()
        self.assertEqual(
            [seen for seen in self.handler.events if seen[0] == "message"],
            [("message", "a", 1, b"one"), ("message", "a", 1, b"two")],
        )
        self.assertEqual(read_frames(self.a), [(10, b"p")])
        self.assertEqual(self.sessions.parked_count(), 2)

    def test_close(self) -> None:
        self.node.registry.pending_releases = []
        closed = self.sessions.close("a", 4003, "go")
        self.assertIsNone(self.sessions.get("a"))
        self.assert_gone("a", 1)
        self.assertNoResult(closed)
        self.node.registry.pending_releases[0].callback(None)
        self.assertIs(self.successResultOf(closed), True)
        self.node.step()
        self.assertEqual(read_frames(self.a), [(8, struct.pack("!H", 4003) + b"go")])
        self.a.send(close_frame(4003))
        self.node.step()
        self.assertEqual(connection_end(self.a), "end")
        self.assert_gone("a", 1)
        self.assertEqual(self.node.metrics.closed, {"4003": 1})
        self.assertEqual(self.sessions.parked_count(), 1)

    def test_close_of_another_generation(self) -> None:
        self.assertIs(self.successResultOf(self.sessions.close("a", 4003, "go", 2)), False)
        self.assertEqual(self.sessions.parked_count(), 2)

    def test_close_a_lost_client(self) -> None:
        """The loss is detected only now; the session is removed."""
        client_end = self.node.connect("c", tcp_pair())
        client_end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client_end.close()
        wait_readable(self.node.parked.fds["c"])
        self.sessions.close("c", 4003, "go")
        self.node.step()
        self.assert_gone("c", 3)
        self.assertEqual(self.sessions.count(), 2)

    def test_closed_by_the_client(self) -> None:
        self.a.send(text_frame(b"last") + close_frame(1000))
        self.node.step()
        self.assertEqual(self.handler.messages, [b"last"])
        self.assertEqual(read_frames(self.a), [(8, b"\x03\xe8")])
        self.assertEqual(connection_end(self.a), "end")
        self.assert_gone("a", 1)
        self.assertEqual(self.node.metrics.closed, {"1000": 1})

    def test_lost(self) -> None:
        self.a.close()
        self.node.step()
        self.assert_gone("a", 1)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})

    def test_half_closed(self) -> None:
        self.a.send(build_frame(9, b"p"))
        self.a.shutdown(socket.SHUT_WR)
        self.node.step()
        self.assertEqual(read_frames(self.a), [(10, b"p")])
        self.assertEqual(connection_end(self.a), "end")
        self.assert_gone("a", 1)

    def test_replaced(self) -> None:
        newer = self.node.connect("a")
        self.node.step()
        self.assertEqual(read_close_code(self.a), 4001)
        self.assertEqual(self.sessions.generation("a"), 3)
        self.assertEqual(self.handler.connection_events[2:], [("disconnected", "a", 1), ("connected", "a", 3)])
        # The row belongs to the newer one.
        self.assertEqual(self.node.registry.released, [])
        self.sessions.send("a", b"hello")
        self.assertEqual(read_frames(newer), [(1, b"hello")])
        self.assertEqual((self.sessions.count(), self.sessions.parked_count(), self.node.metrics.replaced), (2, 2, 1))

    def test_full(self) -> None:
        """Parked sessions count."""
        self.use(capacity=1)
        self.node.connect("a")
        client_end = self.node.dial()
        client_end.send(_opening("b"))
        self.node.step()
        self.assertTrue(read_available(client_end).startswith(b"HTTP/1.1 503 "))

    def test_close_all(self) -> None:
        self.wake(self.b)
        closed = self.sessions.close_all(1001, "going away")
        self.assertIsNone(self.successResultOf(closed))
        self.node.step()
        self.assertEqual([read_close_code(self.a), read_close_code(self.b)], [1001, 1001])
        self.assertEqual(self.sessions.count(), 0)
        self.assertEqual(sorted(self.node.registry.released), [("a", 1), ("b", 2)])

    def test_reclaim(self) -> None:
        """Only sessions that are closed are woken."""
        self.node.connect("c")
        self.node.registry.reclaim_results["b"] = None
        self.assertIsNone(self.successResultOf(self.sessions.reclaim_all()))
        self.assertEqual(sorted(self.node.registry.reclaimed), [("a", 1, "unix"), ("b", 2, "unix"), ("c", 3, "unix")])
        self.node.step()
        self.assertEqual((read_close_code(self.a), read_close_code(self.b)), (None, 4001))
        self.assertEqual((self.node.metrics.woken, self.sessions.parked_count()), (1, 2))

    def test_closed_while_reclaimed(self) -> None:
        waiting: Deferred[Any] = Deferred()
        self.node.registry.reclaim_results["a"] = waiting
        self.sessions.reclaim_all()
        self.a.close()
        self.node.step()
        waiting.callback(object())
        self.assertEqual(self.node.registry.released, [("a", 1), ("a", 1)])

    def test_failed_newer_claim(self) -> None:
        """The row that it may have removed is restored, and the client stays parked."""
        self.node.registry.grants_at_once = False
        client_end = self.node.dial()
        client_end.send(_opening("a"))
        self.node.step()
        self.node.registry.claims[-1][2].errback(RegistryUnavailableError("away"))
        self.sessions.restore_claim(SessionKey("a", 99))
        self.assertEqual(self.node.registry.reclaimed, [("a", 1, "unix")])
        self.assertEqual(self.sessions.parked_count(), 2)

    def test_stop(self) -> None:
        self.sessions.stop()
        self.assertEqual([connection_end(self.a), connection_end(self.b)], ["end", "end"])
        self.assertEqual(self.sessions.count(), 0)
        self.assertEqual(self.node.clock.getDelayedCalls(), [])
        self.patch(self.sessions, "stop", lambda: None)


def _opening(client_id: str) -> bytes:
    return build_request(f"/v1/connect?client_id={client_id}")


class ReentrantTest(ParkedTestCase):
    """A handler that changes connections while their input is handled"""

    def test_closes_another_with_data_in_the_same_iteration(self) -> None:
        self.a.send(text_frame(b"one"))
        self.b.send(text_frame(b"one"))
        closing: list[str] = []

        def close_the_other(payload: bytes) -> None:
            _, client_id, _, _ = self.handler.events[-1]
            closing.append("b" if client_id == "a" else "a")
            self.sessions.close(closing[-1], 4003, "go")

        self.handler.on_message = close_the_other
        self.node.step()
        (other,) = closing
        # What it had sent is not handled any more.
        self.assertEqual(self.handler.messages, [b"one"])
        self.assertEqual(read_close_code(self.a if other == "a" else self.b), 4003)
        self.assert_gone(other, 1 if other == "a" else 2)
        self.assertEqual(self.sessions.parked_count(), 1)

    def test_closes_itself(self) -> None:
        self.handler.on_message = lambda payload: self.sessions.close("a", 4003, "go")
        self.a.send(text_frame(b"one") + text_frame(b"two") + build_frame(9, b"p") + close_frame(4003))
        self.node.step()
        self.assertEqual(self.handler.messages, [b"one"])
        # The answer to the close frame was among the rest.
        self.assertEqual(read_frames(self.a), [(8, struct.pack("!H", 4003) + b"go")])
        self.assertEqual(connection_end(self.a), "end")
        self.assert_gone("a", 1)

    def test_answers_and_closes(self) -> None:
        def answer(payload: bytes) -> None:
            self.sessions.send("a", b"re " + payload)
            if payload == b"two":
                self.sessions.close("a", 4003, "")

        self.handler.on_message = answer
        self.a.send(text_frame(b"one") + text_frame(b"two") + text_frame(b"three"))
        self.node.step()
        self.assertEqual(read_frames(self.a), [(1, b"re one"), (1, b"re two"), (8, b"\x0f\xa3")])

    def test_wakes_itself(self) -> None:
        """The rest goes to its new protocol, in order."""
        self.handler.on_message = lambda payload: payload == b"two" and self.node.table.get("a")
        self.a.send(b"".join(text_frame(payload) for payload in (b"one", b"two", b"three", b"four")) + PARTIAL)
        self.node.step()
        self.a.send(REST)
        self.node.step()
        self.assertEqual(self.handler.messages, [b"one", b"two", b"three", b"four", b"split"])

    def test_fails(self) -> None:
        self.a.send(text_frame(b"boom") + text_frame(b"after"))
        self.b.send(text_frame(b"fine"))
        self.node.step()
        self.assertEqual(sorted(self.handler.messages), [b"boom", b"fine"])
        self.assertEqual(read_frames(self.a), [(8, struct.pack("!H", 1011) + b"internal error")])
        self.assert_gone("a", 1)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


class ParkAndWakeTest(ParkedTestCase):
    """Nothing is lost, forgotten or reordered between parked and awake"""

    def test_bad_messages_across_parking(self) -> None:
        for number in range(MAX_BAD_MESSAGES):
            self.assertEqual(read_available(self.a), b"")
            if number % 3 == 1:
                self.node.table.get("a")
            self.a.send(text_frame(b"bad"))
            self.node.step()
            if number % 3 == 2:
                self.node.advance(2)
                self.assertEqual(self.sessions.parked_count(), 2)
        self.assertEqual(
            read_frames(self.a), [(8, struct.pack("!H", 1008) + b"8 messages in a row were no JSON-RPC 2.0")]
        )
        self.assert_gone("a", 1)

    def test_bad_messages_in_one_segment(self) -> None:
        for split in range(1, MAX_BAD_MESSAGES):
            self.setUp()
            data = text_frame(b"bad") * split + build_frame(1, b"bad", fin=False) + build_frame(0, b"")
            self.a.send(data + text_frame(b"bad") * (MAX_BAD_MESSAGES - split - 2))
            self.node.step()
            if split < MAX_BAD_MESSAGES - 1:
                self.assertEqual(read_available(self.a), b"")
                self.a.send(text_frame(b"bad"))
                self.node.step()
            self.assertEqual(read_close_code(self.a), 1008)

    def test_rate_across_parking(self) -> None:
        """Messages are read more slowly, in order, nothing is closed; and the client is parked again afterwards."""
        self.use(messages_per_client=10)
        client_end = self.node.connect("a")
        sent = [b"%d" % number for number in range(35)]
        client_end.send(b"".join(map(text_frame, sent)) + PARTIAL)
        self.node.step()
        self.assertEqual(self.handler.messages, sent[:11])
        self.assertEqual(self.node.metrics.paused_clients, 1)
        self.node.advance(1, 0.05)
        self.assertIn(len(self.handler.messages), range(19, 23))
        self.node.advance(2.5, 0.05)
        self.assertEqual(self.handler.messages, sent)
        client_end.send(REST)
        self.node.advance(2)
        self.assertEqual(self.handler.messages, [*sent, b"split"])
        self.assertEqual((self.sessions.parked_count(), self.node.metrics.closed), (1, {}))

    def test_rate_is_not_reset(self) -> None:
        """Waking and parking do not refill the bucket."""
        self.use(messages_per_client=10)
        client_end = self.node.connect("a")
        for _ in range(3):
            client_end.send(text_frame(b"{}") * 3 + build_frame(1, b"{}", fin=False))
            self.node.step()
            client_end.send(build_frame(0, b""))
            self.node.table.awake["a"].idle_before_park = 0.0
            self.node.table._idle_detector.watch(self.node.table.awake["a"])
            self.node.step()
        self.assertEqual(self.node.metrics.paused_clients, 1)

    def test_slow_reader(self) -> None:
        """What the kernel does not accept is buffered up to a limit; then the connection is closed with 1013."""
        self.use(send_buffer=65536, max_message_size=10000)
        client_end = self.node.connect("a", small_buffer_pair())
        fill_send_buffer(self.node.parked.fds["a"])
        sent = 0
        while self.node.metrics.slow_readers == 0:
            if not self.sessions.send("a", b"x" * 10000):
                break
            sent += 1
            self.node.step()
            self.assertLess(sent, 100)
        self.assertEqual(self.node.metrics.slow_readers, 1)
        self.assertEqual(self.node.metrics.closed, {"1013": 1})
        self.assertGreater(sent * 10000, 65536)
        client_end.close()

    def test_reader_that_was_slow_for_a_moment(self) -> None:
        """It gets everything in order, and is parked again."""
        client_end = self.node.connect("c", small_buffer_pair())
        size = fill_send_buffer(self.node.parked.fds["c"])
        sent = [b"%d" % number * 1000 for number in range(50)]
        for payload in sent:
            self.assertEqual(self.sessions.send("c", payload), 3)
        data = b""
        while len(data) < size + sum(map(len, sent)) + 4 * len(sent):
            data += read_available(client_end)
            self.node.step(1)
        client_end.close()
        self.assertEqual(data[size:], b"".join(struct.pack("!BBH", 0x81, 126, len(one)) + one for one in sent))

    def test_bytes_received_while_parking(self) -> None:
        """Bytes that are in the socket by then are read from there."""
        self.wake(self.a)
        self.node.table.awake["a"].idle_before_park = 0.0
        self.a.send(REST)
        self.node.reactor.step()
        self.a.send(text_frame(b"meanwhile") + PARTIAL)
        self.node.step()
        self.a.send(REST)
        self.node.advance(2)
        self.assertEqual(self.handler.messages, [b"split", b"meanwhile", b"split"])
        self.assertEqual(self.sessions.parked_count(), 2)

    def test_pinged_while_parked(self) -> None:
        """A ping sent while parked is answered while awake."""
        self.use(ping_interval=50, ping_timeout=20)
        client_end = self.node.connect("a", tcp_pair())
        self.node.advance(53)
        self.assertEqual(read_frames(client_end), [(9, b"")])
        self.node.table.get("a")
        self.node.table.awake["a"].idle_before_park = 1e9
        self.node.advance(22)
        wait_readable(client_end.fileno())
        self.assertEqual(connection_end(client_end), "reset")
        self.assertEqual(self.node.metrics.ping_timeouts, 1)
