"""Tests of gateway.clients.keepalive: keep-alive, and clients that send too much."""

from __future__ import annotations

import socket
import struct

from twisted.trial.unittest import SynchronousTestCase

from gateway.clients.keepalive import units_of
from tests.edge.fakes import FakeClient, FakeNode, frame, text
from tests.edge.parked import ParkedNode, arrived, over, take, tcp_pair

PONG = frame(10, b"")


class SweepTest(SynchronousTestCase):
    """Keep-alive"""

    def setUp(self) -> None:
        self.node = FakeNode(ping_interval=50, ping_timeout=20)
        self.node.edge.start()
        self.addCleanup(self.node.edge.stop)

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
        self.assertEqual(self.node.edge.count(), 0)
        self.assertEqual(self.node.registry.released, [("a", 1)])

    def test_a_process_that_was_stopped_blames_nobody(self) -> None:
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

    def test_client_that_talks_is_not_pinged(self) -> None:
        client = self.node.connect()
        client.frames()
        for _ in range(10):
            self.node.advance(45)
            client.send(text(b"{}"))
        self.assertEqual(self.pings(client), 0)

    def test_any_byte_is_a_sign_of_life(self) -> None:
        client = self.node.connect()
        client.frames()
        self.node.advance(53)
        client.send(PONG[:1])
        self.node.advance(40)
        self.assertFalse(client.transport.aborted)

    def test_many_are_spread(self) -> None:
        clients = [self.node.connect(f"c{number}") for number in range(40)]
        for client in clients:
            client.frames()
        self.node.advance(49.75)
        per_tick = []
        for _ in range(10):
            self.node.advance(0.5)
            per_tick.append(sum(self.pings(client) for client in clients))
        self.assertEqual(sum(per_tick), 40)
        self.assertEqual(max(per_tick), 10)

    def test_one_timer(self) -> None:
        before = len(self.node.clock.getDelayedCalls())
        for number in range(20):
            self.node.connect(f"c{number}")
        self.node.advance(10)
        self.assertEqual(len(self.node.clock.getDelayedCalls()), before)

    def test_short_times(self) -> None:
        node = FakeNode(ping_interval=0.2, ping_timeout=0.1)
        node.edge.start()
        self.addCleanup(node.edge.stop)
        client = node.connect()
        client.frames()
        node.advance(0.23, 0.01)
        self.assertEqual(self.pings(client), 1)
        node.advance(0.12, 0.01)
        self.assertTrue(client.transport.aborted)

    def test_stop(self) -> None:
        client = self.node.connect()
        self.node.edge.start()
        self.node.edge.stop()
        self.node.edge.stop()
        self.node.advance(200, 1)
        self.assertFalse(client.transport.aborted)

    def test_expired(self) -> None:
        """A client that is awake, even while it is not read from."""
        for client_id in ("talks", "paused", "forever"):
            client = self.node.connect(client_id)
            record = self.node.edge._table.awake[client_id]
            if client_id != "forever":
                self.assertTrue(self.node.edge.renew(client_id, record.generation, self.node.today + 60.5))
            if client_id == "paused":
                self.node.edge._pauses.pause(record)
            client.frames()
        self.node.today += 60
        self.node.advance(3)
        self.assertEqual(self.node.edge.count(), 3)
        self.node.today += 1
        self.node.advance(3)
        self.assertEqual(self.node.edge.client_ids(), ["forever"])
        self.assertEqual(self.node.metrics.closed, {"1008": 2})
        self.assertEqual(self.node.metrics.expired, 2)

    def test_rounds_of_long_intervals(self) -> None:
        """A token that has expired does not wait for the keep-alive."""
        node = FakeNode(ping_interval=3600, ping_timeout=3600)
        node.edge.start()
        self.addCleanup(node.edge.stop)
        clients = [node.connect(f"c{number}") for number in range(40)]
        for client_id in node.edge.client_ids():
            node.edge.renew(client_id, node.edge.generation(client_id), node.today - 1)
        node.advance(2.5)
        self.assertEqual((len(clients), node.edge.count()), (40, 0))

    def test_error_with_one(self) -> None:
        bad, good = self.node.connect("bad"), self.node.connect("good")
        bad.protocol.ping = lambda: 1 / 0
        good.frames()
        self.node.advance(53)
        self.assertEqual(self.pings(good), 1)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


class ParkedSweepTest(SynchronousTestCase):
    """Keep-alive of parked connections"""

    def setUp(self) -> None:
        self.node = ParkedNode(ping_interval=50, ping_timeout=20)
        self.addCleanup(self.node.close)

    def test_silent_client(self) -> None:
        there = self.node.connect("a", tcp_pair())
        self.node.advance(49.75)
        self.assertEqual(take(there), b"")
        self.node.advance(2.5)
        arrived(there.fileno())
        self.assertEqual(take(there), b"\x89\x00")
        self.node.advance(17)
        self.assertEqual(self.node.edge.parked(), 1)
        self.node.advance(5.5)
        arrived(there.fileno())
        self.assertEqual(over(there), "reset")
        self.assertEqual(self.node.metrics.ping_timeouts, 1)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})
        self.assertEqual(self.node.edge.count(), 0)
        self.assertEqual(self.node.registry.released, [("a", 1)])
        # All of it while it was parked.
        self.assertEqual(self.node.metrics.woken, 0)

    def test_client_that_answers(self) -> None:
        there = self.node.connect()
        for _ in range(5):
            self.node.advance(53)
            self.assertEqual(take(there), b"\x89\x00")
            there.send(PONG)
            self.node.step()
        self.assertEqual((self.node.edge.parked(), self.node.metrics.woken), (1, 0))

    def test_a_process_that_was_stopped_blames_nobody(self) -> None:
        there = self.node.connect()
        self.node.advance(53)
        self.assertEqual(take(there), b"\x89\x00")
        self.node.clock.advance(60)
        self.node.advance(3)
        self.assertEqual(self.node.edge.parked(), 1)
        there.send(PONG)
        self.node.step()
        self.node.advance(45)
        self.assertEqual(take(there), b"")
        self.node.advance(30)
        self.assertEqual(self.node.edge.count(), 0)

    def test_many_are_spread(self) -> None:
        """By their numbers: each slice of the table has as many rows."""
        peers = [self.node.connect(f"c{number}") for number in range(100)]
        self.node.advance(49.75)
        per_tick = []
        for _ in range(12):
            self.node.advance(0.5)
            per_tick.append(sum(take(there) == b"\x89\x00" for there in peers))
        self.assertEqual(sum(per_tick), 100)
        self.assertGreater(len([pinged for pinged in per_tick if pinged]), 1)

    def test_parked_and_awake(self) -> None:
        """Each of them is pinged once in its time."""
        parked, awake = self.node.connect("a"), self.node.connect("b")
        awake.send(text(b"{}")[:1])
        self.node.step()
        self.assertEqual(self.node.edge.parked(), 1)
        self.node.advance(53)
        self.assertEqual((take(parked), take(awake)), (b"\x89\x00", b"\x89\x00"))

    def test_parked_and_woken_again_and_again(self) -> None:
        """It is silent for as long as it is, wherever it is."""
        there = self.node.connect()
        for _ in range(106):
            self.node.table.get("a")
            self.node.table.awake["a"].linger = 0.0
            self.node.advance(0.5)
        self.assertEqual(take(there), b"\x89\x00")
        self.node.advance(23)
        self.assertEqual((over(there), self.node.metrics.ping_timeouts), ("end", 1))

    def test_one_timer(self) -> None:
        before = len(self.node.clock.getDelayedCalls())
        for number in range(20):
            self.node.connect(f"c{number}")
        self.node.advance(10)
        self.assertEqual(len(self.node.clock.getDelayedCalls()), before)


class PausesTest(SynchronousTestCase):
    """Messages per second and client"""

    def setUp(self) -> None:
        self.node = FakeNode(messages_per_client=10)
        self.client = self.node.connect()

    def test_too_many(self) -> None:
        """They are read more slowly, in their order, and nothing is closed."""
        sent = [b"%d" % number for number in range(35)]
        self.client.send(b"".join(map(text, sent)))
        self.assertEqual(self.node.handler.messages, sent[:11])
        self.assertTrue(self.client.transport.paused)
        self.assertEqual(self.node.metrics.paused_clients, 1)
        self.node.advance(1, 0.05)
        self.assertIn(len(self.node.handler.messages), range(19, 23))
        self.node.advance(2, 0.05)
        self.assertEqual(self.node.handler.messages, sent)
        self.assertFalse(self.client.transport.paused)
        self.assertEqual(self.node.edge.count(), 1)
        self.assertEqual(self.node.clock.getDelayedCalls(), [])

    def test_within_the_rate(self) -> None:
        for _ in range(30):
            self.client.send(text(b"{}"))
            self.node.advance(0.1, 0.1)
        self.assertEqual(self.node.metrics.paused_clients, 0)

    def test_pings_and_fragments_count(self) -> None:
        for data in (frame(9, b""), frame(10, b""), frame(1, b"", fin=False) + frame(0, b"", fin=False) * 20):
            self.setUp()
            self.client.send(data * 20)
            self.assertEqual(self.node.metrics.paused_clients, 1)

    def test_large_messages_count_for_more(self) -> None:
        self.node = FakeNode(messages_per_client=10)
        client = self.node.connect()
        client.send(text(b"x" * 100000))
        client.send(text(b"{}") * 6)
        # Seven, three, and the one that is too many.
        self.assertEqual(len(self.node.handler.messages), 1 + 3 + 1)
        self.assertEqual(self.node.metrics.paused_clients, 1)

    def test_a_batch_counts_for_what_is_in_it(self) -> None:
        for handled in (100, -100):
            self.node = FakeNode(messages_per_client=10)
            self.node.handler.handled = handled
            client = self.node.connect()
            client.send(text(b"batch"))
            self.node.handler.handled = None
            client.send(text(b"{}") * 3)
            # It can be read only when it is there; the next message is one too many, and read, too.
            self.assertEqual(len(self.node.handler.messages), 2)
            self.node.advance(8.9, 0.05)
            self.assertEqual(len(self.node.handler.messages), 2)
            self.node.advance(1, 0.05)
            self.assertGreater(len(self.node.handler.messages), 2)

    def test_something_bad_in_a_batch_is_one_bad_message(self) -> None:
        self.node.handler.handled = -3
        for _ in range(8):
            self.assertIsNone(self.client.close_code())
            self.client.send(text(b"batch"))
            self.node.advance(1)
        self.assertEqual(self.client.close_code(), 1008)

    def test_units(self) -> None:
        for size, units in ((0, 1), (1, 1), (16384, 1), (16385, 2), (1048576, 64)):
            self.assertEqual(units_of(b"[" * size), units, size)

    def test_others_are_not_slowed(self) -> None:
        other = self.node.connect("b")
        self.client.send(text(b"{}") * 20)
        other.send(text(b"{}"))
        self.assertFalse(other.transport.paused)

    def test_one_timer(self) -> None:
        for name in "bcd":
            self.node.connect(name).send(text(b"{}") * 20)
        self.client.send(text(b"{}") * 20)
        self.assertEqual(self.node.metrics.paused_clients, 4)
        self.assertEqual(len(self.node.clock.getDelayedCalls()), 1)

    def test_gone_while_paused(self) -> None:
        self.client.send(text(b"{}") * 20)
        self.client.lose()
        self.node.advance(3, 0.05)
        self.assertEqual(len(self.node.handler.messages), 11)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})

    def test_closed_while_paused(self) -> None:
        self.client.send(text(b"{}") * 20)
        self.node.edge.close("a", 4003, "go")
        self.assertFalse(self.client.transport.paused)
        self.node.advance(3, 0.05)
        self.assertEqual(len(self.node.handler.messages), 11)

    def test_paused_is_not_silent(self) -> None:
        node = FakeNode(messages_per_client=0.01, ping_interval=10, ping_timeout=10)
        node.edge.start()
        self.addCleanup(node.edge.stop)
        client = node.connect()
        client.send(text(b"{}") * 3)
        self.assertTrue(client.transport.paused)
        node.advance(60)
        self.assertFalse(client.transport.aborted)

    def test_no_limit(self) -> None:
        self.node = FakeNode(messages_per_client=0)
        self.node.connect().send(text(b"{}") * 1000)
        self.assertEqual(len(self.node.handler.messages), 1000)

    def test_stop(self) -> None:
        self.client.send(text(b"{}") * 20)
        self.node.edge.stop()
        self.node.advance(6)
        self.assertEqual(self.node.clock.getDelayedCalls(), [])


class LostWhilePausedTest(SynchronousTestCase):
    """A client that sent far too much, and is gone"""

    def setUp(self) -> None:
        self.node = ParkedNode(messages_per_client=10)
        self.addCleanup(self.node.close)
        self.client = self.node.connect("a", tcp_pair())
        self.node.send(self.client, text(b"{}") * 1000)
        self.assertTrue(self.node.table.awake["a"].paused)

    def test_reset(self) -> None:
        """It does not stay until what it had sent is read."""
        other = self.node.connect("b")
        self.node.send(other, text(b"{}") * 1000, "b")
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.close()
        self.node.advance(1.25)
        self.assertEqual(self.node.edge.client_ids(), ["b"])
        self.assertEqual(self.node.metrics.closed, {"1006": 1})
        self.assertEqual(self.node.registry.released, [("a", 1)])

    def test_no_more_to_say(self) -> None:
        """Who just sends no more may still read answers: all that it sent is handled."""
        self.client.shutdown(socket.SHUT_WR)
        self.node.advance(120)
        self.assertEqual(len(self.node.handler.messages), 1000)
        self.assertEqual(self.node.edge.count(), 0)
