"""Tests of gateway.net.transport: swap the protocol of a transport, and detach its socket."""

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
    """Record received bytes and the loss of the connection."""

    received = b""
    lost = False

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Any = None) -> None:
        self.lost = True


class SwapProtocolTest(test_transport.TransportTestCase):
    """swap_protocol()"""

    def swap_protocol(self, peer: socket.socket, protocol: Any) -> RecordingProtocol:
        successor = RecordingProtocol()
        before = self.node.factory.countConnections
        self.assertEqual(swap_protocol(protocol, successor), b"")
        self.assertEqual(self.node.factory.countConnections, before - 1)
        peer.send(b"received")
        self.node.step()
        self.assertEqual(successor.received, b"received")
        successor.transport.write(b"sent")
        self.node.step()
        self.assertEqual(received(peer), b"sent")
        # Remaining references to the old one do no harm.
        protocol.close_with(1000)
        protocol.sendData = None
        self.assertEqual(received(peer), b"")
        return successor

    def test_plain(self) -> None:
        peer, transport, protocol = self.connect()
        successor = self.swap_protocol(peer, protocol)
        self.assertIs(successor.transport, transport)
        self.assertIsNone(transport.producer)
        peer.close()
        self.node.step()
        self.assertTrue(successor.lost)

    def test_wrapped(self) -> None:
        peer = self.node.dial(wrap=ProxyProtocolFactory)
        peer.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 4711 80\r\n" + build_request("/v1/connect?client_id=a"))
        self.node.step()
        received(peer)
        successor = self.swap_protocol(peer, self.node.protocol())
        peer.close()
        self.node.step()
        self.assertTrue(successor.lost)

    def test_unread_bytes(self) -> None:
        """The protocol is swapped while Autobahn reports that the connection is open."""
        successor = RecordingProtocol()
        unread: list[bytes] = []
        self.patch(
            self.node.sessions, "opened", lambda client, protocol: unread.append(swap_protocol(protocol, successor))
        )
        peer = self.node.dial()
        peer.send(build_request("/v1/connect?client_id=a") + text_frame(b"early") + b"\x81")
        self.node.step()
        self.assertEqual(unread, [text_frame(b"early") + b"\x81"])
        self.assertIn(b" 101 ", received(peer))
        self.assertEqual((self.node.handler.messages, successor.received), ([], b""))

    def test_old_protocol_is_freed(self) -> None:
        peer, _, protocol = self.connect()
        protocol_ref = weakref.ref(protocol)
        self.node.table.awake.clear()
        self.node.table._idle_detector._busy.clear()
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        self.swap_protocol(peer, protocol)
        del protocol
        self.assertIsNone(protocol_ref())


class DetachSocketTest(SynchronousTestCase):
    """detach_socket(), can_detach()"""

    def setUp(self) -> None:
        self.reactor = FakeFDReactor()
        self.peers: list[socket.socket] = []
        self.addCleanup(lambda: [peer.close() for peer in self.peers])

    def transport(self, pair: tuple[socket.socket, socket.socket] | None = None) -> Any:
        here, peer = pair or tcp_pair()
        peer.setblocking(False)
        self.peers.append(peer)
        successor = RecordingProtocol()
        transport = tcp.Server(here, successor, here.getpeername(), None, 0, self.reactor)
        transport.repstr = "<an end>"
        successor.makeConnection(transport)
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
        self.assertEqual(connection_end(self.peers[0]), "open")

    def test_unsent_bytes(self) -> None:
        transport = self.transport()
        peer = self.peers[0]
        size = fill_send_buffer(transport.fileno())
        transport.write(b"a" * 400_000)
        self.reactor.step()
        peer.setblocking(True)
        data = b""
        while len(data) < size + 1000:
            data += peer.recv(65536)
            self.reactor.step()
        transport.write(b"b" * 1000)
        transport.write(b"c")
        fd, unsent = detach_socket(transport)
        os.set_blocking(fd, True)
        while is_ready(peer.fileno(), select.POLLIN, 0.2):
            data += peer.recv(1 << 20)
        self.assertEqual(data[size:] + unsent, b"a" * 400_000 + b"b" * 1000 + b"c")
        os.close(fd)

    def test_not_while_closing(self) -> None:
        for method in ("loseConnection", "abortConnection", "loseWriteConnection"):
            transport = self.transport()
            getattr(transport, method)()
            self.assertFalse(can_detach(transport), method)
            self.reactor.step()
            self.assertFalse(can_detach(transport), method)

    def test_not_with_tls(self) -> None:
        transport = self.transport()
        node = ParkingNode()
        self.addCleanup(node.close)
        wrapper = TLSMemoryBIOFactory(CertificateOptions(), True, node.factory, node.reactor).buildProtocol(None)
        wrapper.transport = transport
        self.assertFalse(can_detach(wrapper))
        self.assertFalse(can_detach(object()))

    def test_outgoing_connection(self) -> None:
        """The transport and its connector are freed without the garbage collector."""
        built: list[Any] = []

        class Connecting(ClientFactory):
            noisy = False

            def startedConnecting(self, connector: Any) -> None:
                self.connector = connector

            def buildProtocol(self, addr: object) -> RecordingProtocol:
                built.append(RecordingProtocol())
                return built[-1]

        with socket.create_server(("127.0.0.1", 0)) as listening:
            gc.collect()
            gc.disable()
            self.addCleanup(gc.enable)
            connector = tcp.Connector("127.0.0.1", listening.getsockname()[1], Connecting(), None, None, self.reactor)
            connector.connect()
            for _ in range(1000):
                self.reactor.step()
                if built:
                    break
            peer, _ = listening.accept()
            self.peers.append(peer)
            transport = built[0].transport
            refs = weakref.ref(transport), weakref.ref(connector)
            fd, _ = detach_socket(transport)
            built.clear()
            del transport, connector
            self.assertEqual([ref() for ref in refs], [None, None])
            os.write(fd, b"out")
            self.assertEqual(peer.recv(9), b"out")
            os.close(fd)


class HalfCloseSocketTest(SynchronousTestCase):
    """half_close_socket()"""

    def test_all_families(self) -> None:
        for here, peer in (socket.socketpair(), tcp_pair(), tcp_pair("::1")):
            with here, peer:
                here.send(b"last")
                half_close_socket(here.fileno())
                wait_readable(peer.fileno())
                self.assertEqual((peer.recv(4), peer.recv(4)), (b"last", b""))
                peer.send(b"still read")
                wait_readable(here.fileno())
                self.assertEqual(here.recv(99), b"still read")

    def test_after_a_reset(self) -> None:
        here, peer = tcp_pair()
        with here:
            here.send(b"unread")
            wait_readable(peer.fileno())
            peer.close()
            self.assertTrue(is_ready(here.fileno(), select.POLLHUP, 5))
            half_close_socket(here.fileno())
            self.assertGreaterEqual(here.fileno(), 0)
