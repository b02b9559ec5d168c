"""Tests of gateway.clients.limit_log."""

from __future__ import annotations

from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.builders.frames import build_frame, build_request, text_frame
from tests.fakes.clients import FakeNode, FakeTransport


class LimitLogTests(SynchronousTestCase):
    def lines(self, events: list[dict[str, object]]) -> list[str]:
        return [formatEvent(event) for event in events if "client" in formatEvent(event)]

    def test_refusals(self) -> None:
        node = FakeNode(openings_per_address=1, capacity=1)
        with capturedLogs() as events:
            node.connect("a")
            client = node.dial()
            client.send(build_request("/v1/connect?client_id=robot%2F7"))
            client = node.dial("192.0.2.9")
            client.send(build_request("/v1/connect?client_id=b"))
        rate, full = self.lines(events)
        self.assertEqual(
            rate,
            "a client at 192.0.2.1:4711 was refused (rate), its id is not known: --openings-per-address 1",
        )
        self.assertEqual(full, "a client at 192.0.2.9:4711 was refused (full), it says it is 'b': --capacity 1")

    def test_other_refusals(self) -> None:
        node = FakeNode()
        with capturedLogs() as events:
            node.dial().send(build_request("/v1/other?client_id=a"))
        self.assertEqual(self.lines(events), [])

    def test_dropped(self) -> None:
        node = FakeNode(openings_per_address=1)
        node.connect("a")
        while node.factory.handshake_limiter._refusal_limiter.acquire("192.0.2.1") == 0:
            pass
        with capturedLogs() as events:
            self.assertIsNone(node.factory.buildProtocol(FakeTransport().getPeer()))
        (line,) = self.lines(events)
        self.assertTrue(line.startswith("a client at 192.0.2.1:4711 was dropped without a response: --openings-"), line)

    def test_slowed(self) -> None:
        node = FakeNode(messages_per_client=10)
        client = node.connect("a")
        other = node.connect("b")
        with capturedLogs() as events:
            client.send(text_frame(b"{}") * 20)
            other.send(text_frame(b"{}") * 20)
            node.clock.advance(11)
            client.send(text_frame(b"{}") * 30)
        first, second = self.lines(events)
        self.assertEqual(first, "client a at 192.0.2.1:4711 is slowed: --messages-per-client 10")
        # At most one such line in ten seconds; the counter has all.
        self.assertEqual(second, first + " (1 more since the last report)")
        self.assertEqual(node.metrics.paused_clients, 3)

    def test_message_too_large(self) -> None:
        node = FakeNode(max_message_size=100)
        client = node.connect("a")
        with capturedLogs() as events:
            client.send(build_frame(1, b"x" * 101))
        self.assertEqual(self.lines(events), ["client a at 192.0.2.1:4711 is disconnected: --max-message-size 100"])
        self.assertEqual(client.close_code(), 1009)
