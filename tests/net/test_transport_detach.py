"""Tests of gateway.net.transport: an open connection gets another protocol, and a transport gives up its socket."""

from __future__ import annotations

import gc
import os
import select
import socket
import weakref
from typing import Any

from twisted.internet import tcp
from twisted.internet.protocol import ClientFactory, Protocol
from twisted.internet.ssl import CertificateOptions
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import SynchronousTestCase

from gateway.net.proxy_protocol import ProxyProtocolFactory
from gateway.net.transport import can_detach, detach_socket, half_close_socket, swap_protocol
from tests.builders.frames import build_request, text_frame
from tests.builders.sockets import connection_end, fill_send_buffer, is_ready, tcp_pair, wait_readable
from tests.builders.sockets import read_available as received
from tests.fakes.parked import ParkingNode
from tests.fakes.reactor import FakeFDReactor
from tests.net import test_transport


class RecordingProtocol(Protocol):
    """Says what it hears."""

    received = b""
    lost = False

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Any = None) -> None:
        self.lost = True


class SwapProtocolTest(test_transport.TransportTestCase):
    """hand_over()"""

    def swap_protocol(self, there: socket.socket, protocol: Any) -> RecordingProtocol:
        heir = RecordingProtocol()
        before = self.node.factory.countConnections
        self.assertEqual(swap_protocol(protocol, heir), b"")
        self.assertEqual(self.node.factory.countConnections, before - 1)
        there.send(b"to the heir")
        self.node.step()
        self.assertEqual(heir.received, b"to the heir")
        heir.transport.write(b"of the heir")
        self.node.step()
        self.assertEqual(received(there), b"of the heir")
        # Whoever still holds the old one can do no harm.
        protocol.close_with(1000)
        protocol.sendData = None
        self.assertEqual(received(there), b"")
        return heir

    def test_plain(self) -> None:
        there, transport, protocol = self.connect()
        heir = self.swap_protocol(there, protocol)
        self.assertIs(heir.transport, transport)
        self.assertIsNone(transport.producer)
        there.close()
        self.node.step()
        self.assertTrue(heir.lost)

    def test_behind_a_wrapper(self) -> None:
        there = self.node.dial(wrap=ProxyProtocolFactory)
        there.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 4711 80\r\n" + build_request("/v1/connect?client_id=a"))
        self.node.step()
        received(there)
        heir = self.swap_protocol(there, self.node.protocol())
        there.close()
        self.node.step()
        self.assertTrue(heir.lost)

    def test_what_was_read(self) -> None:
        """In the midst of the opening, as Autobahn says that it is open."""
        heir = RecordingProtocol()
        unread: list[bytes] = []
        self.patch(self.node.sessions, "opened", lambda client, protocol: unread.append(swap_protocol(protocol, heir)))
        there = self.node.dial()
        there.send(build_request("/v1/connect?client_id=a") + text_frame(b"early") + b"\x81")
        self.node.step()
        self.assertEqual(unread, [text_frame(b"early") + b"\x81"])
        self.assertIn(b" 101 ", received(there))
        self.assertEqual((self.node.handler.messages, heir.received), ([], b""))

    def test_nothing_stays(self) -> None:
        there, _, protocol = self.connect()
        gone = weakref.ref(protocol)
        self.node.table.awake.clear()
        self.node.table._idle_detector._busy.clear()
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        self.swap_protocol(there, protocol)
        del protocol
        self.assertIsNone(gone())


class DetachSocketTest(SynchronousTestCase):
    """take(), takeable()"""

    def setUp(self) -> None:
        self.reactor = FakeFDReactor()
        self.there: list[socket.socket] = []
        self.addCleanup(lambda: [one.close() for one in self.there])

    def transport(self, pair: tuple[socket.socket, socket.socket] | None = None) -> Any:
        here, there = pair or tcp_pair()
        there.setblocking(False)
        self.there.append(there)
        heir = RecordingProtocol()
        transport = tcp.Server(here, heir, here.getpeername(), None, 0, self.reactor)
        transport.repstr = "<an end>"
        heir.makeConnection(transport)
        self.addCleanup(lambda: hasattr(transport, "socket") and transport.socket.close())
        return transport

    def test_socket(self) -> None:
        transport = self.transport()
        number = transport.fileno()
        self.assertTrue(can_detach(transport))
        fd, unsent = detach_socket(transport)
        self.addCleanup(os.close, fd)
        self.assertEqual((fd, unsent), (number, b""))
        self.assertEqual((self.reactor.readers, self.reactor.writers), (set(), set()))
        self.assertFalse(can_detach(transport))
        transport.loseConnection()
        transport.abortConnection()
        transport.write(b"late")
        self.reactor.step()
        self.assertEqual(connection_end(self.there[0]), "open")

    def test_what_has_not_left(self) -> None:
        transport = self.transport()
        there = self.there[0]
        size = fill_send_buffer(transport.fileno())
        transport.write(b"a" * 400_000)
        self.reactor.step()
        there.setblocking(True)
        some = b""
        while len(some) < size + 1000:
            some += there.recv(65536)
            self.reactor.step()
        transport.write(b"b" * 1000)
        transport.write(b"c")
        fd, unsent = detach_socket(transport)
        os.set_blocking(fd, True)
        while is_ready(there.fileno(), select.POLLIN, 0.2):
            some += there.recv(1 << 20)
        self.assertEqual(some[size:] + unsent, b"a" * 400_000 + b"b" * 1000 + b"c")
        os.close(fd)

    def test_not_while_it_ends(self) -> None:
        for end in ("loseConnection", "abortConnection", "loseWriteConnection"):
            transport = self.transport()
            getattr(transport, end)()
            self.assertFalse(can_detach(transport), end)
            self.reactor.step()
            self.assertFalse(can_detach(transport), end)

    def test_not_with_tls(self) -> None:
        transport = self.transport()
        node = ParkingNode()
        self.addCleanup(node.close)
        wrapper = TLSMemoryBIOFactory(CertificateOptions(), True, node.factory, node.reactor).buildProtocol(None)
        wrapper.transport = transport
        self.assertFalse(can_detach(wrapper))
        self.assertFalse(can_detach(object()))

    def test_outgoing(self) -> None:
        """Neither it nor what Twisted made to connect it waits for the garbage collector."""
        made: list[Any] = []

        class Connecting(ClientFactory):
            noisy = False

            def startedConnecting(self, connector: Any) -> None:
                self.connector = connector

            def buildProtocol(self, addr: object) -> RecordingProtocol:
                made.append(RecordingProtocol())
                return made[-1]

        with socket.create_server(("127.0.0.1", 0)) as listening:
            gc.collect()
            gc.disable()
            self.addCleanup(gc.enable)
            connector = tcp.Connector("127.0.0.1", listening.getsockname()[1], Connecting(), None, None, self.reactor)
            connector.connect()
            for _ in range(1000):
                self.reactor.step()
                if made:
                    break
            there, _ = listening.accept()
            self.there.append(there)
            transport = made[0].transport
            gone = weakref.ref(transport), weakref.ref(connector)
            fd, _ = detach_socket(transport)
            made.clear()
            del transport, connector
            self.assertEqual([ref() for ref in gone], [None, None])
            os.write(fd, b"out")
            self.assertEqual(there.recv(9), b"out")
            os.close(fd)


class HalfCloseSocketTest(SynchronousTestCase):
    """half_close()"""

    def test_both_kinds(self) -> None:
        for here, there in (socket.socketpair(), tcp_pair(), tcp_pair("::1")):
            with here, there:
                here.send(b"last")
                half_close_socket(here.fileno())
                wait_readable(there.fileno())
                self.assertEqual((there.recv(4), there.recv(4)), (b"last", b""))
                there.send(b"still heard")
                wait_readable(here.fileno())
                self.assertEqual(here.recv(99), b"still heard")

    def test_one_that_was_reset(self) -> None:
        here, there = tcp_pair()
        with here:
            here.send(b"unread")
            wait_readable(there.fileno())
            there.close()
            self.assertTrue(is_ready(here.fileno(), select.POLLHUP, 5))
            half_close_socket(here.fileno())
            self.assertGreaterEqual(here.fileno(), 0)
