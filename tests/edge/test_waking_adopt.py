"""Tests of gateway.net.transport: from a bare socket to a transport and a protocol in its open state."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Any
from unittest import mock

from gateway.net.transport import adopt, detach, flush, reset, unsent
from tests.edge.fakes import close, frame, parse_frames, text
from tests.edge.parked import arrived, frames, over, stuff, tcp_pair
from tests.edge.test_waking import WakingTest

PARTIAL = text(b"split")[:-2]


class AdoptTest(WakingTest):
    """adopt()"""

    def adopt(self, pair: tuple[socket.socket, socket.socket]) -> tuple[socket.socket, Any]:
        """A connection that was open and parked, and is no more."""
        there = self.node.connect("a", pair)
        self.node.table.awake["a"].linger = 0.0
        self.node.advance(1)
        self.assertEqual(self.node.edge.parked(), 1)
        self.node.table.get("a")
        return there, self.node.protocol()

    def test_open(self) -> None:
        for pair in (socket.socketpair(), tcp_pair(), tcp_pair("::1")):
            self.setUp()
            number = pair[0].fileno()
            there, protocol = self.adopt(pair)
            self.assertEqual(protocol.transport.socket.fileno(), number)
            self.assertEqual(protocol.state, protocol.STATE_OPEN)
            for data in (text(b"one") + PARTIAL, text(b"split")[-2:] + frame(1, b"a", fin=False), frame(0, b"b")):
                there.send(data)
                arrived(number)
                self.node.step()
            self.assertEqual(self.node.handler.messages, [b"one", b"split", b"ab"])
            protocol.send_text(b"back")
            self.node.step()
            self.assertEqual(parse_frames(self.node.receive(there)), [(1, b"back")])

    def test_close_handshake(self) -> None:
        for pair in (socket.socketpair(), tcp_pair()):
            self.setUp()
            there, protocol = self.adopt(pair)
            there.send(close(4321, b"bye"))
            arrived(protocol.transport.fileno())
            self.node.step()
            arrived(there.fileno())
            self.assertEqual(frames(there), [(8, struct.pack("!H", 1000))])
            self.assertEqual(over(there), "end")
            self.assertEqual(self.node.edge.count(), 0)
            self.assertEqual(self.node.metrics.closed, {"other": 1})
            self.assertEqual(self.node.factory.countConnections, 0)

    def test_closed_from_here(self) -> None:
        there, protocol = self.adopt(socket.socketpair())
        protocol.close_with(4003, "go")
        self.node.step()
        self.assertEqual(frames(there), [(8, struct.pack("!H", 4003) + b"go")])
        there.send(close(4003))
        self.node.step()
        self.assertEqual(over(there), "end")

    def test_closed_from_here_and_never_answered(self) -> None:
        there, protocol = self.adopt(socket.socketpair())
        protocol.close_with(4003, "go")
        self.node.advance(4)
        self.assertEqual(frames(there), [(8, struct.pack("!H", 4003) + b"go")])
        self.assertEqual(over(there), "end")
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
        self.assertEqual(self.node.edge.count(), 1)

    def test_lost_meanwhile(self) -> None:
        """After a reset it has no peer any more (ENOTCONN); the reactor finds its end."""
        here, there = tcp_pair()
        number = here.fileno()
        self.node.connect("a", (here, there))
        self.node.table.awake["a"].linger = 0.0
        self.node.advance(1)
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        there.close()
        arrived(number)
        self.node.table.get("a")
        self.assertEqual((self.node.edge.parked(), self.node.edge.count()), (0, 1))
        with self.assertRaises(OSError) as raised:
            self.node.protocol().transport.socket.getpeername()
        self.assertEqual(raised.exception.errno, errno.ENOTCONN)
        self.node.step()
        self.assertEqual(self.node.metrics.closed, {"1006": 1})
        self.assertEqual((self.node.edge.count(), self.node.factory.countConnections), (0, 0))
        with self.assertRaises(OSError):
            os.fstat(number)

    def test_without_a_free_file(self) -> None:
        """It needs none of its own."""
        _there, protocol = self.adopt(socket.socketpair())
        fd, family = detach(protocol)
        with (
            mock.patch("os.dup", side_effect=OSError(errno.EMFILE, "too many")),
            mock.patch("socket.fromfd", side_effect=OSError(errno.EMFILE, "too many")),
        ):
            adopted = adopt(self.node.reactor, self.node.factory, fd, family)
        self.assertEqual(adopted.transport.fileno(), fd)

    def test_named(self) -> None:
        """In Twisted's own log lines."""
        _, protocol = self.adopt(socket.socketpair())
        self.assertEqual(repr(protocol.transport), f"<ClientProtocol on {protocol.transport.fileno()}>")


class SmallTest(WakingTest):
    """unsent(), flush(), reset()"""

    def test_unsent(self) -> None:
        _there, transport, _ = self.connect()
        self.assertEqual(unsent(transport), 0)
        transport.write(b"x" * 1000)
        transport.write(b"x" * 1000)
        self.assertEqual(unsent(transport), 2000)
        self.assertTrue(flush(transport))
        self.assertEqual(unsent(transport), 0)
        stuff(transport.fileno())
        transport.write(b"x")
        self.assertFalse(flush(transport))
        self.assertEqual(unsent(object()), float("inf"))

    def test_reset(self) -> None:
        here, there = tcp_pair()
        fd = here.detach()
        reset(fd)
        arrived(there.fileno())
        self.assertEqual(over(there), "reset")
        with self.assertRaises(OSError):
            os.fstat(fd)
        there.close()

    def test_reset_of_what_has_none(self) -> None:
        here, there = socket.socketpair()
        reset(here.detach())
        self.assertEqual(over(there), "end")
        there.close()

    def test_reset_without_a_free_file(self) -> None:
        """It is closed all the same."""
        here, there = tcp_pair()
        with mock.patch("gateway.net.transport.os.dup", side_effect=OSError(errno.EMFILE, "too many")):
            reset(here.detach())
        arrived(there.fileno())
        self.assertEqual(over(there), "end")
        there.close()
