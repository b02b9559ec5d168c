"""Tests of gateway.net.proxy_protocol."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from typing import Any
from unittest import mock

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Factory
from twisted.internet.testing import MemoryReactorClock
from twisted.protocols.haproxy._v2parser import V2Parser
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from gateway.metrics import Metrics
from gateway.net import proxy_protocol
from gateway.net.errors import InvalidProxyHeaderError
from gateway.net.proxy_protocol import (
    MAX_V1_SIZE,
    MAX_V2_SIZE,
    ProxyHeaderErrors,
    ProxyProtocolEndpoint,
    ProxyProtocolFactory,
    parse_header,
)
from tests.builders.frames import build_request
from tests.builders.tls import EchoProtocol
from tests.fakes.clients import FakeClient, FakeNode, FakeTransport

V2 = b"\r\n\r\n\0\r\nQUIT\n"
V2_LOCAL = V2 + b"\x20\x00\x00\x00"


def make_v2_header(family: int, body: bytes, command: int = 0x21) -> bytes:
    return V2 + bytes([command, family]) + struct.pack("!H", len(body)) + body


TCP4 = make_v2_header(0x11, bytes([192, 0, 2, 7, 10, 0, 0, 1]) + struct.pack("!2H", 4711, 443))
TCP6 = make_v2_header(0x21, ipaddress.ip_address("2001:db8::7").packed * 2 + struct.pack("!2H", 4711, 443))

_ports = st.integers(0, 65535)


class ParseHeaderTests(SynchronousTestCase):
    def parsed(self, header: bytes) -> tuple[Any, Any]:
        for rest in (b"", b"GET"):
            parsed = parse_header(header + rest)
            assert parsed is not None
            self.assertEqual(parsed[1], len(header))
        return parsed[0]

    @settings(deadline=None)
    @given(st.ip_addresses(v=4), st.ip_addresses(v=6), _ports)
    def test_addresses(self, v4: ipaddress.IPv4Address, v6: ipaddress.IPv6Address, port: int) -> None:
        ports = struct.pack("!2H", port, 80)
        for header, expected in [
            (f"PROXY TCP4 {v4} 10.0.0.1 {port} 80\r\n".encode(), IPv4Address("TCP", str(v4), port)),
            (f"PROXY TCP6 {v6.exploded} ::1 {port} 80\r\n".encode(), IPv6Address("TCP", str(v6), port)),
            (make_v2_header(0x11, v4.packed * 2 + ports), IPv4Address("TCP", str(v4), port)),
            (make_v2_header(0x21, v6.packed * 2 + ports + b"\x04\x00\x03abc"), IPv6Address("TCP", str(v6), port)),
        ]:
            source, destination = self.parsed(header)
            self.assertEqual(source, expected)
            self.assertEqual(destination.port, 80)

    def test_connections_of_the_load_balancer_itself(self) -> None:
        for header in (
            b"PROXY UNKNOWN\r\n",
            b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n",
            b"PROXY UNKNOWN " + b"x" * (MAX_V1_SIZE - 16) + b"\r\n",
            V2_LOCAL,
            make_v2_header(0x11, bytes(12), command=0x20),
            make_v2_header(0x00, b"whatever"),
            make_v2_header(0x31, b"/client".ljust(108, b"\0") + b"/server".ljust(108, b"\0")),
            make_v2_header(0x12, bytes(12)),
        ):
            self.assertEqual(self.parsed(header), (None, None), header)

    def test_invalid_headers(self) -> None:
        for header in (
            *(
                b"GET / HTTP/1.1\r\n",
                b"\x16\x03\x01\x02\x00\x01",
                b"PROXX",
                b"proxy tcp4",
                b"\r\n\r\n\0\r\nQUIT\r",
                b"\n",
            ),
            *(
                b"PROXY\r\n",
                b"PROXY TCP4\r\n",
                b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
                b"PROXY  TCP4 1.2.3.4 1.2.3.4 1 2\r\n",
            ),
            *(
                b"PROXY TCP5 1.2.3.4 1.2.3.4 1 2\r\n",
                b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 3\r\n",
                b"PROXY UDP4 a b 1 2\r\n",
            ),
            *(
                b"PROXY TCP4 ::1 ::1 1 2\r\n",
                b"PROXY TCP6 1.2.3.4 1.2.3.4 1 2\r\n",
                b"PROXY TCP4 1.2.3 1.2.3.4 1 2\r\n",
            ),
            *(b"PROXY TCP4 1.2.3.4 1.2.3.4 +1 2\r\n", b"PROXY TCP4 1.2.3.4 1.2.3.4 1_0 2\r\n"),
            *(b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 2\r\n", b"PROXY TCP4 1.2.3.4 1.2.3.4 -1 2\r\n"),
            *(b"PROXY TCP4 \xff 1.2.3.4 1 2\r\n", b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", b"PROXY UNKNOWNS\r\n"),
            b"PROXY UNKNOWN " + b"x" * (MAX_V1_SIZE - 14),
            make_v2_header(0x11, bytes(11)),
            make_v2_header(0x21, bytes(12)),
            make_v2_header(0x31, bytes(215)),
            make_v2_header(0x41, bytes(300)),
            make_v2_header(0x13, bytes(12)),
            *(make_v2_header(0x11, bytes(12), command=command) for command in (0x11, 0x31, 0x22, 0x2F)),
            V2 + b"\x21\x11" + struct.pack("!H", MAX_V2_SIZE - 15),
            V2 + b"\x21\x11\xff\xff",
        ):
            self.assertRaises(InvalidProxyHeaderError, parse_header, header)

    def test_every_prefix_of_a_header_is_incomplete(self) -> None:
        for header in (b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 443\r\n", b"PROXY UNKNOWN\r\n", TCP4, TCP6, V2_LOCAL):
            for size in range(len(header)):
                self.assertIsNone(parse_header(header[:size]))
            self.assertIsNotNone(parse_header(header))
        self.assertIsNone(parse_header(V2 + b"\x21\x11" + struct.pack("!H", MAX_V2_SIZE - 16)))

    @settings(deadline=None)
    @given(
        st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(b"PROXY ".__add__), st.binary().map(V2.__add__))
    )
    @example(b"PROXY TCP4 \xb2 1.1.1.1 1 2\r\n")
    def test_any_bytes(self, data: bytes) -> None:
        try:
            parsed = parse_header(data)
        except InvalidProxyHeaderError as e:
            # The message is logged, so it contains nothing of the bytes received.
            self.assertTrue(str(e).isprintable() and len(str(e)) < 60)
        else:
            self.assertTrue(parsed is None or 0 < parsed[1] <= len(data))

    @settings(deadline=None)
    @given(
        st.sampled_from([b"PROXY TCP6 2001:db8::7 ::1 4711 443\r\n", TCP4, TCP6, V2_LOCAL]),
        st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4),
    )
    def test_mutated_headers(self, header: bytes, changes: list[tuple[int, int]]) -> None:
        changed = bytearray(header)
        for at, value in changes:
            changed[at % len(changed)] = value
        self.test_any_bytes.hypothesis.inner_test(self, bytes(changed))

    def test_errors_of_the_v2_parser_are_caught(self) -> None:
        with mock.patch.object(V2Parser, "parse", side_effect=KeyError(17)):
            self.assertRaises(InvalidProxyHeaderError, parse_header, TCP4)


class WrapperTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.now, self.metrics = 100.0, Metrics()
        self.factory = ProxyProtocolFactory(
            Factory.forProtocol(EchoProtocol), ProxyHeaderErrors(self.metrics, lambda: self.now)
        )

    def connect(self) -> tuple[Any, FakeTransport]:
        transport = FakeTransport("10.0.0.9")
        connection = self.factory.buildProtocol(None)
        connection.makeConnection(transport)
        return connection, transport

    def test_header_in_chunks_of_any_size(self) -> None:
        for header, host in [
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 443\r\n", "192.0.2.7"),
            (TCP6, "2001:db8::7"),
            (b"PROXY UNKNOWN\r\n", "10.0.0.9"),
            (V2_LOCAL, "10.0.0.9"),
        ]:
            for step in (1, 7, 8, 16, 1000):
                connection, transport = self.connect()
                data = header + b"hello"
                for at in range(0, len(data), step):
                    connection.dataReceived(data[at : at + step])
                self.assertEqual(transport.pop_written(), b"hello")
                self.assertEqual(connection.wrappedProtocol.transport.getPeer().host, host)
                self.assertEqual(connection._header_buffer, None)
                # Another header is data of the client.
                connection.dataReceived(V2_LOCAL)
                self.assertEqual(transport.pop_written(), V2_LOCAL)

    def test_destination_address(self) -> None:
        connection, _ = self.connect()
        before = connection.getHost()
        connection.dataReceived(TCP4)
        self.assertEqual(connection.getHost(), IPv4Address("TCP", "10.0.0.1", 443))
        self.assertNotEqual(before, connection.getHost())

    def test_drops_and_logs_an_invalid_header(self) -> None:
        with mock.patch.object(proxy_protocol._log, "warn") as warn:
            for _ in range(5):
                connection, transport = self.connect()
                connection.dataReceived(b"PROXY TCP4 192.0.2.7 10.0.0.1 471")
                self.assertFalse(transport.aborted)
                connection.dataReceived(b"11 443\n secret \r\n more")
                self.assertTrue(transport.aborted)
                # Bytes after it are dropped and not buffered.
                connection.dataReceived(b"PROXY UNKNOWN\r\nhello")
                self.assertEqual((connection._header_buffer, connection.wrappedProtocol.received), (None, b""))
            self.assertEqual(warn.call_count, 1)
            self.now += 10
            self.connect()[0].dataReceived(b"x")
        self.assertEqual(self.metrics.refused, {"proxy": 6})
        self.assertEqual([call.kwargs["suppressed"] for call in warn.call_args_list], [0, 4])
        self.assertEqual(warn.call_args_list[0].kwargs["host"], "10.0.0.9")
        self.assertNotIn("secret", str(warn.call_args_list))

    def test_drops_an_invalid_header_without_header_errors(self) -> None:
        self.factory.header_errors = None
        connection, transport = self.connect()
        connection.dataReceived(b"x")
        self.assertTrue(transport.aborted)

    def test_drops_a_connection_that_the_wrapped_factory_drops(self) -> None:
        factory = ProxyProtocolFactory(mock.Mock(buildProtocol=lambda address: None))
        self.assertIsNone(factory.buildProtocol(None))

    def test_connection_lost(self) -> None:
        connection, _ = self.connect()
        echo = connection.wrappedProtocol
        reason: Any = object()
        connection.connectionLost(reason)
        self.assertIs(echo.lost, reason)

    def test_endpoint(self) -> None:
        reactor, factory = MemoryReactorClock(), Factory()
        self.successResultOf(ProxyProtocolEndpoint(serverFromString(reactor, "tcp:1")).listen(factory))
        self.assertIs(reactor.tcpServers[0][1].wrappedFactory, factory)


class ClientAddressTests(SynchronousTestCase):
    """In front of the client endpoint of a node."""

    def setUp(self) -> None:
        self.node = FakeNode()
        header_errors = ProxyHeaderErrors(self.node.metrics, self.node.clock.seconds)
        self.factory = ProxyProtocolFactory(self.node.factory.with_proxy_protocol(), header_errors)

    def dial(self) -> FakeClient:
        return FakeClient(self.factory, FakeTransport("10.0.0.9"))

    def assert_times_out(self, send: Callable[[FakeClient], None]) -> None:
        client = self.dial()
        send(client)
        self.node.advance(4.75)
        self.assertFalse(client.transport.aborted)
        self.node.advance(0.75)
        self.assertTrue(client.transport.aborted)

    def test_incomplete_header_times_out(self) -> None:
        self.assert_times_out(lambda client: None)
        self.assert_times_out(lambda client: client.send(TCP4[:20]))
        self.assert_times_out(lambda client: client.send(b"PROXY TCP4 192.0.2.7 "))
        self.assert_times_out(lambda client: client.send(TCP4))
        self.assert_times_out(lambda client: client.send(V2_LOCAL + build_request()[:20]))
        self.assertEqual(self.node.metrics.refused, {"timeout": 5})

    def test_header_sent_byte_by_byte_times_out(self) -> None:
        client = self.dial()
        for byte in TCP4[:5]:
            client.send(bytes([byte]))
            self.assertFalse(client.transport.aborted)
            self.node.advance(1)
        self.node.advance(0.5)
        self.assertTrue(client.transport.aborted)

    def test_connection_of_the_load_balancer(self) -> None:
        client = self.dial()
        client.send(V2_LOCAL + build_request())
        self.assertEqual(self.node.registry.claims[0][:2], ("a", "10.0.0.9:4711"))

    def test_invalid_header_is_not_counted_as_a_timeout(self) -> None:
        client = self.dial()
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        self.assertTrue(client.transport.aborted)
        client.protocol.connectionLost(Failure(ConnectionDone()))
        self.node.advance(6)
        self.assertEqual(self.node.metrics.refused, {"proxy": 1})
