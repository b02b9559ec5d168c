"""Tests of gateway.net.transport: from a bare socket to a transport and a protocol in its open state."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Any
from unittest import mock

from gateway.net.transport import adopt_socket, detach_idle, flush, reset_socket, unsent_bytes
from tests.edge.fakes import build_frame, close_frame, parse_frames, text_frame
from tests.edge.parked import connection_end, fill_send_buffer, read_frames, tcp_pair, wait_readable
from tests.edge.test_waking import TransportTestCase

PARTIAL = text_frame(b"split")[:-2]


class AdoptSocketTest(TransportTestCase):
    """adopt()"""

    def adopt(self, pair: tuple[socket.socket, socket.socket]) -> tuple[socket.socket, Any]:
        """A connection that was open and parked, and is no more."""
        there = self.node.connect("a", pair)
        self.node.table.awake["a"].idle_before_park = 0.0
        self.node.advance(1)
        self.assertEqual(self.node.sessions.parked_count(), 1)
        self.node.table.get("a")
        return there, self.node.protocol()

    def test_open(self) -> None:
        for pair in (socket.socketpair(), tcp_pair(), tcp_pair("::1")):
            self.setUp()
            number = pair[0].fileno()
            there, protocol = self.adopt(pair)
            self.assertEqual(protocol.transport.socket.fileno(), number)
            self.assertEqual(protocol.state, protocol.STATE_OPEN)
            for data in (
                text_frame(b"one") + PARTIAL,
                text_frame(b"split")[-2:] + build_frame(1, b"a", fin=False),
                build_frame(0, b"b"),
            ):
                there.send(data)
                wait_readable(number)
                self.node.step()
            self.assertEqual(self.node.handler.messages, [b"one", b"split", b"ab"])
            protocol.send_text(b"back")
            self.node.step()
            self.assertEqual(parse_frames(self.node.receive(there)), [(1, b"back")])

    def test_close_handshake(self) -> None:
        for pair in (socket.socketpair(), tcp_pair()):
            self.setUp()
            there, protocol = self.adopt(pair)
            there.send(close_frame(4321, b"bye"))
            wait_readable(protocol.transport.fileno())
            self.node.step()
            wait_readable(there.fileno())
            self.assertEqual(read_frames(there), [(8, struct.pack("!H", 1000))])
            self.assertEqual(connection_end(there), "end")
            self.assertEqual(self.node.sessions.count(), 0)
            self.assertEqual(self.node.metrics.closed, {"other": 1})
            self.assertEqual(self.node.factory.countConnections, 0)

    def test_closed_from_here(self) -> None:
        there, protocol = self.adopt(socket.socketpair())
        protocol.close_with(4003, "go")
        self.node.step()
        self.assertEqual(read_frames(there), [(8, struct.pack("!H", 4003) + b"go")])
        there.send(close_frame(4003))
        self.node.step()
        self.assertEqual(connection_end(there), "end")

    def test_closed_from_here_and_never_answered(self) -> None:
        there, protocol = self.adopt(socket.socketpair())
        protocol.close_with(4003, "go")
        self.node.advance(4)
        self.assertEqual(read_frames(there), [(8, struct.pack("!H", 4003) + b"go")])
        self.assertEqual(connection_end(there), "end")
        self.assertNotIn(protocol, self.node.reactor.readers)

    def test_slow_reader(self) -> None:
        """The bounds of what may wait for it are the same."""
        _there, protocol = self.adopt(socket.socketpair())
        protocol.send_text(b"x" * 1000000)
        for _ in range(10):
            protocol.send_text(b"x" * 1000000)
        self.assertEqual(self.node.metrics.slow_readers, 1)
        self.assertEqual(self.node.metrics.closed, {"1013": 1})

    def test_no_opening_timer(self) -> None:
        self.adopt(socket.socketpair())
        self.node.clock.advance(60)
        self.node.step()
        self.assertEqual(self.node.sessions.count(), 1)

    def test_lost_meanwhile(self) -> None:
        """After a reset it has no peer any more (ENOTCONN); the reactor finds its end."""
        here, there = tcp_pair()
        number = here.fileno()
        self.node.connect("a", (here, there))
        self.node.table.awake["a"].idle_before_park = 0.0
        self.node.advance(1)
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        there.close()
        wait_readable(number)
        self.node.table.get("a")
        self.assertEqual((self.node.sessions.parked_count(), self.node.sessions.count()), (0, 1))
        with self.assertRaises(OSError) as raised:
            self.node.protocol().transport.socket.getpeername()
        self.assertEqual(raised.exception.errno, errno.ENOTCONN)
        self.node.step()
        self.assertEqual(self.node.metrics.closed, {"1006": 1})
        self.assertEqual((self.node.sessions.count(), self.node.factory.countConnections), (0, 0))
        with self.assertRaises(OSError):
            os.fstat(number)

    def test_without_a_free_file(self) -> None:
        """It needs none of its own."""
        _there, protocol = self.adopt(socket.socketpair())
        fd, family = detach_idle(protocol)
        with (
            mock.patch("os.dup", side_effect=OSError(errno.EMFILE, "too many")),
            mock.patch("socket.fromfd", side_effect=OSError(errno.EMFILE, "too many")),
        ):
            adopted = adopt_socket(self.node.reactor, self.node.factory, fd, family)
        self.assertEqual(adopted.transport.fileno(), fd)

    def test_named(self) -> None:
        """In Twisted's own log lines."""
        _, protocol = self.adopt(socket.socketpair())
        self.assertEqual(repr(protocol.transport), f"<ClientProtocol on {protocol.transport.fileno()}>")


class SocketHelpersTest(TransportTestCase):
    """unsent(), flush(), reset()"""

    def test_unsent(self) -> None:
        _there, transport, _ = self.connect()
        self.assertEqual(unsent_bytes(transport), 0)
        transport.write(b"x" * 1000)
        transport.write(b"x" * 1000)
        self.assertEqual(unsent_bytes(transport), 2000)
        self.assertTrue(flush(transport))
        self.assertEqual(unsent_bytes(transport), 0)
        fill_send_buffer(transport.fileno())
        transport.write(b"x")
        self.assertFalse(flush(transport))
        self.assertEqual(unsent_bytes(object()), float("inf"))

    def test_reset(self) -> None:
        here, there = tcp_pair()
        fd = here.detach()
        reset_socket(fd)
        wait_readable(there.fileno())
        self.assertEqual(connection_end(there), "reset")
        with self.assertRaises(OSError):
            os.fstat(fd)
        there.close()

    def test_reset_of_what_has_none(self) -> None:
        here, there = socket.socketpair()
        reset_socket(here.detach())
        self.assertEqual(connection_end(there), "end")
        there.close()

    def test_reset_without_a_free_file(self) -> None:
        """It is closed all the same."""
        here, there = tcp_pair()
        with mock.patch("gateway.net.transport.os.dup", side_effect=OSError(errno.EMFILE, "too many")):
            reset_socket(here.detach())
        wait_readable(there.fileno())
        self.assertEqual(connection_end(there), "end")
        there.close()
