"""Tests of gateway.clients.keepalive: pings, token expiry, and throttling."""

from __future__ import annotations

import socket
import struct

from twisted.trial.unittest import SynchronousTestCase

from gateway.clients.keepalive import message_units
from gateway.registry.interface import SessionKey
from gateway.websocket.connection import MIN_FREE_FRAGMENT
from tests.builders.frames import build_frame, text_frame
from tests.builders.sockets import connection_end, read_available, tcp_pair, wait_readable
from tests.fakes.clients import FakeClient, FakeNode
from tests.fakes.parked import ParkingNode

PONG = build_frame(10, b"")


class KeepAliveTest(SynchronousTestCase):
    """Awake connections"""

    def setUp(self) -> None:
        self.node = FakeNode(ping_interval=50, ping_timeout=20)
        self.node.sessions.start()
        self.addCleanup(self.node.sessions.stop)

    def pings(self, client: FakeClient) -> int:
        return [opcode for opcode, _ in client.frames()].count(9)

    def test_silent_client(self) -> None:
        client = self.node.connect()
        client.frames()
        self.node.advance(49.75)
        self.assertEqual(self.pings(client), 0)
        self.node.advance(2.5)
        self.assertEqual(self.pings(client), 1)
        self.node.advance(17)
        self.assertFalse(client.transport.aborted)
        self.node.advance(5.5)
        self.assertTrue(client.transport.aborted)
        self.assertEqual(self.pings(client), 0)
        self.assertEqual(self.node.metrics.ping_timeouts, 1)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})
        self.assertEqual(self.node.sessions.count(), 0)
        self.assertEqual(self.node.registry.released, [("a", 1)])

    def test_process_that_was_stopped_aborts_no_connection(self) -> None:
        client = self.node.connect()
        self.node.advance(53)
        self.assertEqual(self.pings(client), 1)
        self.node.clock.advance(60)
        self.node.advance(3)
        self.assertFalse(client.transport.aborted)
        client.send(PONG)
        self.node.advance(30)
        self.assertFalse(client.transport.aborted)
        self.node.advance(50)
        self.assertTrue(client.transport.aborted)

    def test_client_that_answers(self) -> None:
        client = self.node.connect()
        for _ in range(5):
            client.transport.clear()
            self.node.advance(53)
            self.assertEqual(self.pings(client), 1)
            client.send(PONG)
        self.assertFalse(client.transport.aborted)

    def test_active_client_is_not_pinged(self) -> None:
        client = self.node.connect()
        client.frames()
        for _ in range(10):
            self.node.advance(45)
            client.send(text_frame(b"{}"))
        self.assertEqual(self.pings(client), 0)

    def test_any_byte_counts(self) -> None:
        client = self.node.connect()
        client.frames()
        self.node.advance(53)
        client.send(PONG[:1])
        self.node.advance(40)
        self.assertFalse(client.transport.aborted)

    def test_sweep_in_slices(self) -> None:
        clients = [self.node.connect(f"c{number}") for number in range(40)]
        for client in clients:
            client.frames()
        self.node.advance(49.75)
        per_tick = []
        for _ in range(10):
            self.node.advance(0.5)
            per_tick.append(sum(self.pings(client) for client in clients))
        self.assertEqual(sum(per_tick), 40)
        self.assertEqual(max(per_tick), 14)

    def test_pings_are_at_most_two_seconds_late(self) -> None:
        clients = {}
        for number in range(60):
            clients[number] = self.node.connect(f"c{number}")
            clients[number].frames()
            self.node.advance(0.25)
        late = []
        for tick in range(240):
            self.node.advance(0.25)
            for number in [number for number, client in clients.items() if self.pings(client)]:
                del clients[number]
                late.append(0.25 * (60 + tick + 1 - number) - 50)
        self.assertEqual(len(late), 60)
        self.assertTrue(min(late) >= 0 and max(late) <= 2, late)

    def test_one_timer(self) -> None:
        before = len(self.node.clock.getDelayedCalls())
        for number in range(20):
            self.node.connect(f"c{number}")
        self.node.advance(10)
        self.assertEqual(len(self.node.clock.getDelayedCalls()), before)

    def test_short_times(self) -> None:
        node = FakeNode(ping_interval=0.2, ping_timeout=0.1)
        node.sessions.start()
        self.addCleanup(node.sessions.stop)
        client = node.connect()
        client.frames()
        node.advance(0.23, 0.01)
        self.assertEqual(self.pings(client), 1)
        node.advance(0.12, 0.01)
        self.assertTrue(client.transport.aborted)

    def test_stop(self) -> None:
        client = self.node.connect()
        self.node.sessions.start()
        self.node.sessions.stop()
        self.node.sessions.stop()
        self.node.advance(200, 1)
        self.assertFalse(client.transport.aborted)

    def test_expired(self) -> None:
        """A client that is awake, even while its reading is paused."""
        for client_id in ("talks", "paused", "forever"):
            client = self.node.connect(client_id)
            record = self.node.sessions._table.awake[client_id]
            if client_id != "forever":
                self.assertTrue(
                    self.node.sessions.renew(SessionKey(client_id, record.generation), self.node.wall_time + 60.5)
                )
            if client_id == "paused":
                self.node.sessions._throttle.pause(record)
            client.frames()
        self.node.wall_time += 60
        self.node.advance(3)
        self.assertEqual(self.node.sessions.count(), 3)
        self.node.wall_time += 1
        self.node.advance(3)
        self.assertEqual(self.node.sessions.client_ids(), ["forever"])
        self.assertEqual(self.node.metrics.closed, {"1008": 2})
        self.assertEqual(self.node.metrics.expired, 2)

    def test_rounds_of_long_intervals(self) -> None:
        """A token that has expired does not wait for the keep-alive."""
        node = FakeNode(ping_interval=3600, ping_timeout=3600)
        node.sessions.start()
        self.addCleanup(node.sessions.stop)
        clients = [node.connect(f"c{number}") for number in range(40)]
        for client_id in node.sessions.client_ids():
            node.sessions.renew(SessionKey(client_id, node.sessions.generation(client_id)), node.wall_time - 1)
        node.advance(2.5)
        self.assertEqual((len(clients), node.sessions.count()), (40, 0))

    def test_error_of_one_connection(self) -> None:
        bad, good = self.node.connect("bad"), self.node.connect("good")
        bad.protocol.ping = lambda: 1 / 0
        good.frames()
        self.node.advance(53)
        self.assertEqual(self.pings(good), 1)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


class ParkedKeepAliveTest(SynchronousTestCase):
    """Parked connections"""

    def setUp(self) -> None:
        self.node = ParkingNode(ping_interval=50, ping_timeout=20)
        self.addCleanup(self.node.close)

    def test_silent_client(self) -> None:
        client_end = self.node.connect("a", tcp_pair())
        self.node.advance(49.75)
        self.assertEqual(read_available(client_end), b"")
        self.node.advance(2.5)
        wait_readable(client_end.fileno())
        self.assertEqual(read_available(client_end), b"\x89\x00")
        self.node.advance(17)
        self.assertEqual(self.node.sessions.parked_count(), 1)
        self.node.advance(5.5)
        wait_readable(client_end.fileno())
        self.assertEqual(connection_end(client_end), "reset")
        self.assertEqual(self.node.metrics.ping_timeouts, 1)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})
        self.assertEqual(self.node.sessions.count(), 0)
        self.assertEqual(self.node.registry.released, [("a", 1)])
        # It was parked throughout.
        self.assertEqual(self.node.metrics.woken, 0)

    def test_client_that_answers(self) -> None:
        client_end = self.node.connect()
        for _ in range(5):
            self.node.advance(53)
            self.assertEqual(read_available(client_end), b"\x89\x00")
            client_end.send(PONG)
            self.node.step()
        self.assertEqual((self.node.sessions.parked_count(), self.node.metrics.woken), (1, 0))

    def test_process_that_was_stopped_aborts_no_connection(self) -> None:
        client_end = self.node.connect()
        self.node.advance(53)
        self.assertEqual(read_available(client_end), b"\x89\x00")
        self.node.clock.advance(60)
        self.node.advance(3)
        self.assertEqual(self.node.sessions.parked_count(), 1)
        client_end.send(PONG)
        self.node.step()
        self.node.advance(45)
        self.assertEqual(read_available(client_end), b"")
        self.node.advance(30)
        self.assertEqual(self.node.sessions.count(), 0)

    def test_sweep_in_slices(self) -> None:
        """By file descriptor: each slice of the table has as many rows."""
        peers = [self.node.connect(f"c{number}") for number in range(100)]
        self.node.advance(49.75)
        per_tick = []
        for _ in range(12):
            self.node.advance(0.5)
            per_tick.append(sum(read_available(client_end) == b"\x89\x00" for client_end in peers))
        self.assertEqual(sum(per_tick), 100)
        self.assertGreater(len([pinged for pinged in per_tick if pinged]), 1)
        # At most 2 s late.
        self.assertEqual(sum(per_tick[:5]), 100)

    def test_parked_and_awake(self) -> None:
        """Each is pinged once per interval."""
        parked, awake = self.node.connect("a"), self.node.connect("b")
        awake.send(text_frame(b"{}")[:1])
        self.node.step()
        self.assertEqual(self.node.sessions.parked_count(), 1)
        self.node.advance(53)
        self.assertEqual((read_available(parked), read_available(awake)), (b"\x89\x00", b"\x89\x00"))

    def test_silence_spans_parking_and_waking(self) -> None:
        """Parking and waking do not restart the interval."""
        client_end = self.node.connect()
        for _ in range(106):
            self.node.table.get("a")
            self.node.table.awake["a"].idle_before_park = 0.0
            self.node.advance(0.5)
        self.assertEqual(read_available(client_end), b"\x89\x00")
        self.node.advance(23)
        self.assertEqual((connection_end(client_end), self.node.metrics.ping_timeouts), ("end", 1))

    def test_one_timer(self) -> None:
        before = len(self.node.clock.getDelayedCalls())
        for number in range(20):
            self.node.connect(f"c{number}")
        self.node.advance(10)
        self.assertEqual(len(self.node.clock.getDelayedCalls()), before)


class InboundThrottleTest(SynchronousTestCase):
    """Messages per second and client"""

    client_continues = False

    def setUp(self) -> None:
        self.node = FakeNode(messages_per_client=10)
        self.client = self.node.connect()

    def test_too_many(self) -> None:
        """They are read more slowly, in order, and nothing is closed."""
        sent = [b"%d" % number for number in range(35)]
        self.client.send(b"".join(map(text_frame, sent)))
        self.assertEqual(self.node.handler.messages, sent[:11])
        self.assertTrue(self.client.transport.paused)
        self.assertEqual(self.node.metrics.paused_clients, 1)
        self.node.advance(1, 0.05)
        self.assertIn(len(self.node.handler.messages), range(19, 23))
        self.node.advance(2, 0.05)
        self.assertEqual(self.node.handler.messages, sent)
        self.assertFalse(self.client.transport.paused)
        self.assertEqual(self.node.sessions.count(), 1)
        self.assertEqual(self.node.clock.getDelayedCalls(), [])

    def test_responses_to_calls_in_flight_are_not_counted(self) -> None:
        """Nor their size, nor their large fragments."""
        for _ in range(30):
            self.client.send(text_frame(b"answer"))
            self.client.send(text_frame(b"answer" + b"x" * 600_000))
            for final in (False, False, True):
                payload = b"answer" + b"x" * MIN_FREE_FRAGMENT
                self.client.send(build_frame(0 if self.client_continues else 1, payload, fin=final))
                self.client_continues = not final
        self.assertEqual((len(self.node.handler.messages), self.node.metrics.paused_clients), (90, 0))
        # Other messages have their whole allowance.
        self.client.send(text_frame(b"{}") * 10)
        self.assertEqual(self.node.metrics.paused_clients, 0)

    def test_invalid_messages_in_a_row_end_with_a_response(self) -> None:
        for _ in range(8):
            self.client.send(text_frame(b"bad"))
            self.client.send(text_frame(b"answer"))
        self.assertIsNone(self.client.close_code())

    def test_within_the_rate(self) -> None:
        for _ in range(30):
            self.client.send(text_frame(b"{}"))
            self.node.advance(0.1, 0.1)
        self.assertEqual(self.node.metrics.paused_clients, 0)

    def test_pings_and_fragments_count(self) -> None:
        for data in (
            build_frame(9, b""),
            build_frame(10, b""),
            build_frame(1, b"", fin=False) + build_frame(0, b"", fin=False) * 20,
        ):
            self.setUp()
            self.client.send(data * 20)
            self.assertEqual(self.node.metrics.paused_clients, 1)

    def test_large_messages_count_for_more(self) -> None:
        self.node = FakeNode(messages_per_client=10)
        client = self.node.connect()
        client.send(text_frame(b"x" * 100000))
        client.send(text_frame(b"{}") * 6)
        # Seven, three, and the excess message.
        self.assertEqual(len(self.node.handler.messages), 1 + 3 + 1)
        self.assertEqual(self.node.metrics.paused_clients, 1)

    def test_batch_counts_each_message(self) -> None:
        for handled in (100, -100):
            self.node = FakeNode(messages_per_client=10)
            self.node.handler.message_count = handled
            client = self.node.connect()
            client.send(text_frame(b"batch"))
            self.node.handler.message_count = None
            client.send(text_frame(b"{}") * 3)
            # The batch is counted only once it is parsed. The next message exceeds the rate, and is read too.
            self.assertEqual(len(self.node.handler.messages), 2)
            self.node.advance(8.9, 0.05)
            self.assertEqual(len(self.node.handler.messages), 2)
            self.node.advance(1, 0.05)
            self.assertGreater(len(self.node.handler.messages), 2)

    def test_invalid_message_in_a_batch_counts_once(self) -> None:
        self.node.handler.message_count = -3
        for _ in range(8):
            self.assertIsNone(self.client.close_code())
            self.client.send(text_frame(b"batch"))
            self.node.advance(1)
        self.assertEqual(self.client.close_code(), 1008)

    def test_units(self) -> None:
        for size, units in ((0, 1), (1, 1), (16384, 1), (16385, 2), (1048576, 64)):
            self.assertEqual(message_units(b"[" * size), units, size)

    def test_others_are_not_slowed(self) -> None:
        other = self.node.connect("b")
        self.client.send(text_frame(b"{}") * 20)
        other.send(text_frame(b"{}"))
        self.assertFalse(other.transport.paused)

    def test_one_timer(self) -> None:
        for name in "bcd":
            self.node.connect(name).send(text_frame(b"{}") * 20)
        self.client.send(text_frame(b"{}") * 20)
        self.assertEqual(self.node.metrics.paused_clients, 4)
        self.assertEqual(len(self.node.clock.getDelayedCalls()), 1)

    def test_lost_while_paused(self) -> None:
        self.client.send(text_frame(b"{}") * 20)
        self.client.lose()
        self.node.advance(3, 0.05)
        self.assertEqual(len(self.node.handler.messages), 11)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})

    def test_closed_while_paused(self) -> None:
        self.client.send(text_frame(b"{}") * 20)
        self.node.sessions.close("a", 4003, "go")
        self.assertFalse(self.client.transport.paused)
        self.node.advance(3, 0.05)
        self.assertEqual(len(self.node.handler.messages), 11)

    def test_paused_is_not_silent(self) -> None:
        node = FakeNode(messages_per_client=0.01, ping_interval=10, ping_timeout=10)
        node.sessions.start()
        self.addCleanup(node.sessions.stop)
        client = node.connect()
        client.send(text_frame(b"{}") * 3)
        self.assertTrue(client.transport.paused)
        node.advance(60)
        self.assertFalse(client.transport.aborted)

    def test_no_limit(self) -> None:
        self.node = FakeNode(messages_per_client=0)
        self.node.connect().send(text_frame(b"{}") * 1000)
        self.assertEqual(len(self.node.handler.messages), 1000)

    def test_stop(self) -> None:
        self.client.send(text_frame(b"{}") * 20)
        self.node.sessions.stop()
        self.node.advance(6)
        self.assertEqual(self.node.clock.getDelayedCalls(), [])


class LostWhileThrottledTest(SynchronousTestCase):
    """A client that sent far too much, and whose connection is lost"""

    def setUp(self) -> None:
        self.node = ParkingNode(messages_per_client=10)
        self.addCleanup(self.node.close)
        self.client = self.node.connect("a", tcp_pair())
        self.node.send(self.client, text_frame(b"{}") * 1000)
        self.assertTrue(self.node.table.awake["a"].paused)

    def test_reset(self) -> None:
        """Its session does not stay until all that it sent is read."""
        other = self.node.connect("b")
        self.node.send(other, text_frame(b"{}") * 1000, "b")
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.close()
        self.node.advance(1.25)
        self.assertEqual(self.node.sessions.client_ids(), ["b"])
        self.assertEqual(self.node.metrics.closed, {"1006": 1})
        self.assertEqual(self.node.registry.released, [("a", 1)])

    def test_half_closed(self) -> None:
        """A client that only stops sending may still read responses: all that it sent is handled."""
        self.client.shutdown(socket.SHUT_WR)
        self.node.advance(120)
        self.assertEqual(len(self.node.handler.messages), 1000)
        self.assertEqual(self.node.sessions.count(), 0)
