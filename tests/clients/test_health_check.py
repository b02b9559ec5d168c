"""Tests of gateway.clients.health_check."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.clients.health_check import health_response, may_be_health_check
from tests.fakes.clients import FakeClient, FakeNode

HEAD = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"


def request(line: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([line, *headers, b"", b""])


class ResponseTests(SynchronousTestCase):
    def test_responses(self) -> None:
        for line, ready, status, body in (
            (b"GET /healthz HTTP/1.1", True, b"200 OK", b'{"healthy":true}'),
            (b"GET /healthz HTTP/1.1", False, b"200 OK", b'{"healthy":true}'),
            (b"GET /readyz HTTP/1.1", True, b"200 OK", b'{"ready":true}'),
            (b"GET /readyz?from=lb HTTP/1.0", True, b"200 OK", b'{"ready":true}'),
            (b"GET /readyz HTTP/1.1", False, b"503 Service Unavailable", b'{"ready":false}'),
        ):
            head = HEAD % (status, len(body))
            for method, expected in ((b"GET", head + body), (b"HEAD", head)):
                received = health_response(request(line.replace(b"GET", method), b"Host: anything"), lambda: ready)  # noqa: B023
                self.assertEqual(received, expected)

    def test_anything_else(self) -> None:
        for line in (
            b"GET /v1/connect HTTP/1.1",
            b"POST /healthz HTTP/1.1",
            b"GET /healthz/ HTTP/1.1",
            b"GET /metrics HTTP/1.1",
        ):
            self.assertIsNone(health_response(request(line), lambda: True))

    def test_first_bytes(self) -> None:
        for data in (b"", b"G", b"GET /h", b"GET /readyz HTTP/1.1\r\n", b"HEAD /healthz"):
            self.assertTrue(may_be_health_check(data), data)
        for data in (b"P", b"GET /v", b"\x16\x03", b"HEAD /x", b"GET  /healthz"):
            self.assertFalse(may_be_health_check(data), data)

    @given(
        st.binary(max_size=60) | st.sampled_from([b"GET /healthz HTTP/1.1\r\n\r\n", b"HEAD /readyz HTTP/1.0\r\n\r\n"])
    )
    def test_a_request_with_a_response_has_its_first_bytes(self, head: bytes) -> None:
        if health_response(head, lambda: True) is not None:
            for length in range(len(head)):
                self.assertTrue(may_be_health_check(head[:length]))


class EndpointTests(SynchronousTestCase):
    """At the client endpoint"""

    def check(self, node: FakeNode, line: bytes) -> FakeClient:
        client = node.dial()
        client.send(request(line, b"Host: 10.0.0.1"), step=5)
        return client

    def test_closes(self) -> None:
        node = FakeNode()
        client = self.check(node, b"GET /healthz HTTP/1.1")
        self.assertTrue(client.transport.pop_written().endswith(b'{"healthy":true}'))
        self.assertTrue(client.transport.disconnecting or client.transport.half_closed)
        client.lose()
        self.assertEqual((node.factory.handshake_limiter.in_progress, node.metrics.refused), (0, {}))
        self.assertEqual(node.registry.claims, [])

    def test_readiness(self) -> None:
        for word in ("starting", "draining", "registry", ""):
            node = FakeNode()
            node.unready_reason = word
            received = self.check(node, b"GET /readyz HTTP/1.1").transport.pop_written()
            self.assertIn(b'{"ready":false}' if word else b'{"ready":true}', received)
            self.assertNotIn(word.encode() or b"reason", received)
