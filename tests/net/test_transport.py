"""Tests of gateway.net.transport on Twisted's own transports: detach idle connections, and adopt their sockets."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import ssl
import struct
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import trustme
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import SynchronousTestCase

from gateway.net.accept import HandshakePoller
from gateway.net.proxy_protocol import ProxyProtocolFactory
from gateway.net.transport import (
    adopt_socket,
    detach_idle,
    flush,
    plain_transport,
    release_to_reactor,
    reset_socket,
    unsent_bytes,
)
from gateway.protocol.frames import encode
from tests.builders.frames import build_frame, build_request, close_frame, parse_frames, text_frame
from tests.builders.sockets import (
    connection_end,
    fill_send_buffer,
    read_available,
    read_frames,
    tcp_pair,
    wait_readable,
)
from tests.fakes.clients import FakeNode
from tests.fakes.parked import ParkingNode

PARTIAL = text_frame(b"split")[:-2]


def collect_all_garbage() -> None:
    """Collect until nothing is left: finalizers of other tests' objects leave garbage for the next collection."""
    while gc.collect():
        pass


class TransportTestCase(SynchronousTestCase):
    """Test with clients that stay awake until the test parks them."""

    options: dict[str, Any] = {"park_after": 1e9}

    def setUp(self) -> None:
        self.node = ParkingNode(**self.options)
        self.addCleanup(self.node.close)

    def connect(self, pair: tuple[socket.socket, socket.socket] | None = None) -> tuple[socket.socket, Any, Any]:
        """Connect a client; return its socket, the server's transport and its protocol."""
        peer = self.node.connect("a", pair)
        protocol = self.node.protocol()
        return peer, protocol.transport, protocol

    def detached(self, protocol: Any) -> tuple[int, int]:
        detached = detach_idle(protocol)
        assert detached is not None
        self.addCleanup(_close, detached[0])
        return detached


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


class DetachIdleTest(TransportTestCase):
    """detach_idle()"""

    def test_socket_can_be_used(self) -> None:
        for pair in (socket.socketpair(), tcp_pair(), tcp_pair("::1")):
            self.setUp()
            family, number = pair[0].family, pair[0].fileno()
            peer, _transport, protocol = self.connect(pair)
            fd, detached_family = self.detached(protocol)
            self.assertEqual((fd, detached_family), (number, int(family)))
            self.assertIs(type(detached_family), int)
            self.assertFalse(os.get_blocking(fd))
            os.write(fd, b"peer")
            peer.send(b"here")
            wait_readable(peer.fileno())
            wait_readable(fd)
            self.assertEqual((peer.recv(9), os.read(fd, 9)), (b"peer", b"here"))

    def test_no_reference_in_twisted(self) -> None:
        peer, transport, protocol = self.connect()
        before = self.node.factory.countConnections
        self.detached(protocol)
        self.assertNotIn(transport, self.node.reactor.readers | self.node.reactor.writers)
        self.assertEqual(self.node.factory.countConnections, before - 1)
        # Remaining references do no harm.
        transport.write(b"late")
        transport.loseConnection()
        transport.abortConnection()
        transport.connectionLost(None)
        protocol.sendData = None
        protocol.close_with(1000)
        self.node.step()
        self.assertEqual(read_available(peer), b"")
        self.assertEqual(connection_end(peer), "open")

    def assert_refused(self, protocol: Any) -> None:
        transport = protocol.transport
        before = dict(vars(protocol)), transport.socket.fileno(), transport.producer, transport.connected
        watched = set(self.node.reactor.readers)
        self.assertIsNone(detach_idle(protocol))
        self.assertEqual(
            (dict(vars(protocol)), transport.socket.fileno(), transport.producer, transport.connected), before
        )
        self.assertEqual(self.node.reactor.readers, watched)
        self.assertIs(transport.protocol, protocol)

    def test_partial_frame(self) -> None:
        for data in (text_frame(b"{}")[:1], PARTIAL, text_frame(b"x" * 200)[:3], build_frame(9, b"p")[:-1]):
            self.setUp()
            peer, _, protocol = self.connect()
            self.node.send(peer, data)
            self.assert_refused(protocol)

    def test_within_a_message(self) -> None:
        peer, _, protocol = self.connect()
        self.node.send(peer, build_frame(1, b"one", fin=False))
        self.assert_refused(protocol)
        self.node.send(peer, build_frame(9, b""))
        self.assert_refused(protocol)
        self.node.send(peer, build_frame(0, b"two"))
        self.detached(protocol)

    def test_header_without_its_payload(self) -> None:
        peer, _, protocol = self.connect()
        self.node.send(peer, build_frame(1, b"x" * 100000)[:14])
        self.assertEqual(protocol.data, b"")
        self.assert_refused(protocol)

    def test_full_send_buffer(self) -> None:
        peer, transport, protocol = self.connect()
        size = fill_send_buffer(transport.fileno())
        message = b"x" * 1000
        protocol.send_text(message)
        self.assert_refused(protocol)
        # The transport sends it later.
        self.assertEqual(len(read_available(peer)), size)
        self.node.step()
        self.assertEqual(read_frames(peer), [(1, message)])
        self.detached(protocol)

    def test_partial_write(self) -> None:
        peer, _transport, protocol = self.connect()
        message = os.urandom(1000000)
        protocol.send_text(message)
        self.assertIsNone(detach_idle(protocol))
        received = b""
        while len(received) < len(encode(message)):
            received += read_available(peer)
            self.node.step(1)
        self.assertEqual(received, encode(message))
        self.detached(protocol)

    def test_first_write(self) -> None:
        """Twisted would send it only in the next reactor iteration."""
        peer, transport, protocol = self.connect()
        protocol.send_text(b"one")
        self.assertEqual(read_available(peer), b"")
        self.detached(protocol)
        self.assertEqual(read_frames(peer), [(1, b"one")])
        self.assertNotIn(transport, self.node.reactor.writers)

    def test_first_write_to_a_closed_peer(self) -> None:
        peer, _transport, protocol = self.connect()
        peer.close()
        protocol.send_text(b"one")
        self.assertIsNone(detach_idle(protocol))
        self.node.step()
        self.assertEqual(self.node.sessions.count(), 0)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})

    def test_closing(self) -> None:
        _there, transport, protocol = self.connect()
        transport.disconnecting = True
        self.assert_refused(protocol)
        transport.disconnecting = False
        transport._aborting = True
        self.assert_refused(protocol)

    def test_lost(self) -> None:
        peer, _transport, protocol = self.connect()
        peer.close()
        self.node.step()
        self.assertIsNone(detach_idle(protocol))

    def test_transport_of_another_kind(self) -> None:
        """An unknown transport is never detached."""
        protocol = FakeNode().connect().protocol
        self.assertIsNone(plain_transport(protocol.transport))
        self.assertIsNone(detach_idle(protocol))
        self.assertFalse(protocol.parkable)

    def test_tls(self) -> None:
        """The state of a TLS connection is not in its socket."""
        _there, transport, protocol = self.connect()
        self.assertTrue(protocol.parkable)
        transport.TLS = True
        self.assertIsNone(plain_transport(transport))
        self.assertFalse(protocol.parkable)
        self.assert_refused(protocol)
        self.assertIsNone(protocol.detach_idle())
        transport.TLS = False

    def test_tls_endpoint(self) -> None:
        """TLS as a wrapper around the protocol."""
        authority = trustme.CA()
        pem = authority.issue_cert("localhost").private_key_and_cert_chain_pem.bytes()
        options = PrivateCertificate.loadPEM(pem).options()
        plain = self.node.dial(
            wrap=lambda factory: TLSMemoryBIOFactory(options, False, factory, clock=self.node.reactor)
        )
        context = ssl.create_default_context()
        authority.configure_trust(context)
        peer = context.wrap_socket(plain, server_hostname="localhost", do_handshake_on_connect=False)
        self.addCleanup(peer.close)
        self.retry(peer.do_handshake)
        self.retry(lambda: peer.send(build_request()))
        self.assertTrue(self.retry(lambda: peer.recv(1000)).startswith(b"HTTP/1.1 101 "))
        protocol = self.node.protocol()
        protocol.send_text(b"one")
        self.assertFalse(protocol.parkable)
        self.assertIsNone(detach_idle(protocol))
        self.assertEqual(parse_frames(self.retry(lambda: peer.recv(1000))), [(1, b"one")])

    def retry(self, call: Callable[[], Any]) -> Any:
        """Retry a call on a TLS socket, which needs bytes from the server first."""
        for _ in range(20):
            try:
                return call()
            except ssl.SSLWantReadError:
                self.node.step()
        return call()

    def test_no_reference_cycle(self) -> None:
        """Parked connections are freed without the garbage collector."""
        for pair in (socket.socketpair(), tcp_pair()):
            self.setUp()
            peer = self.node.connect("a", pair)
            client = self.node.table.awake["a"]
            dying = weakref.ref(client.connection), weakref.ref(client.connection.transport)
            client.idle_before_park = 0.0
            # Finalizers of other tests' objects may leave garbage for the next collection.
            while gc.collect():
                pass
            gc.disable()
            try:
                self.node.advance(1)
                self.assertEqual(self.node.sessions.parked_count(), 1)
                self.assertEqual([ref() for ref in dying], [None, None])
                del client
                self.assertEqual(gc.collect(), 0)
                # Again, after it was adopted.
                self.node.send(peer, PARTIAL)
                dying = weakref.ref(self.node.protocol()), weakref.ref(self.node.protocol().transport)
                self.node.table.awake["a"].idle_before_park = 0.0
                self.node.send(peer, text_frame(b"split")[-2:])
                self.node.advance(1)
                self.assertEqual(self.node.sessions.parked_count(), 1)
                self.assertEqual([ref() for ref in dying], [None, None])
                self.assertEqual(gc.collect(), 0)
            finally:
                gc.enable()


class ProxyTest(TransportTestCase):
    """Connections with the PROXY protocol"""

    HEADER = b"PROXY TCP4 198.51.100.7 203.0.113.1 4242 80\r\n"

    def setUp(self) -> None:
        super().setUp()
        self.factory = self.node.factory.with_proxy_protocol()
        self.proxied = ProxyProtocolFactory(self.factory)

    def connect_through(self, client_id: str = "a") -> socket.socket:
        peer = self.node.dial(wrap=lambda factory: self.proxied)
        peer.send(self.HEADER + build_request(f"/v1/connect?client_id={client_id}"))
        self.node.step()
        self.assertTrue(read_available(peer).startswith(b"HTTP/1.1 101 "))
        return peer

    def test_detach(self) -> None:
        peer = self.connect_through()
        protocol = self.node.protocol()
        wrapper = protocol.transport
        transport = wrapper.transport
        self.assertIs(plain_transport(wrapper), transport)
        self.assertTrue(protocol.parkable)
        protocol.send_text(b"one")
        fd, _ = self.detached(protocol)
        self.assertEqual(read_frames(peer), [(1, b"one")])
        self.assertEqual(self.factory.countConnections, 0)
        self.assertNotIn(transport, self.node.reactor.readers)
        os.write(fd, b"peer")
        self.assertEqual(peer.recv(9), b"peer")

    def test_no_reference_cycle(self) -> None:
        # zope's record of the interfaces that wrappers provide, which all share, is a cycle: create it first.
        self.connect_through("stays")
        self.connect_through()
        protocol = self.node.protocol()
        dying = [weakref.ref(obj) for obj in (protocol, protocol.transport, protocol.transport.transport)]
        del protocol
        self.node.table.awake["a"].idle_before_park = 0.0
        collect_all_garbage()
        gc.disable()
        try:
            self.node.advance(1)
            self.assertEqual([ref() for ref in dying], [None] * 3)
            self.assertEqual(gc.collect(), 0)
        finally:
            gc.enable()

    def test_adopted_without_the_wrapper(self) -> None:
        """The client's address is kept, and no second PROXY header is expected."""
        peer = self.connect_through()
        self.node.table.awake["a"].idle_before_park = 0.0
        self.node.advance(1)
        self.assertEqual(self.node.sessions.parked_count(), 1)
        info = self.node.sessions.get("a")
        assert info is not None
        self.assertEqual(info.address, "198.51.100.7:4242")
        self.node.send(peer, PARTIAL)
        self.assertEqual(self.node.sessions.get("a"), info)
        self.assertEqual(self.node.protocol().address, "198.51.100.7:4242")
        self.node.send(peer, text_frame(b"split")[-2:])
        self.assertEqual(self.node.handler.messages, [b"split"])
        peer.send(close_frame(1000))
        self.node.step()
        self.assertEqual(read_frames(peer), [(8, b"\x03\xe8")])
        self.assertEqual(connection_end(peer), "end")
        self.assertEqual((self.node.factory.countConnections, self.factory.countConnections), (0, 0))


class ReleaseToReactorTest(SynchronousTestCase):
    """release_to_reactor()"""

    def test_innermost_transport(self) -> None:
        poller = HandshakePoller(Clock())
        self.addCleanup(poller._epoll.close)
        released: list[object] = []
        self.patch(poller, "release", released.append)
        transport = StringTransport()
        transport.reactor = poller
        release_to_reactor(transport)
        wrapper = ProtocolWrapper(WrappingFactory(Factory()), Protocol())
        wrapper.transport = transport
        release_to_reactor(wrapper)
        self.assertEqual(released, [transport, transport])

    def test_other_transports(self) -> None:
        """Nothing happens to a transport of the reactor, or of none."""
        release_to_reactor(StringTransport())
        transport = StringTransport()
        transport.reactor = Clock()
        release_to_reactor(transport)


class AdoptSocketTest(TransportTestCase):
    """adopt_socket()"""

    def adopt(self, pair: tuple[socket.socket, socket.socket]) -> tuple[socket.socket, Any]:
        """Connect, park and wake a client; return its socket and the server's protocol."""
        peer = self.node.connect("a", pair)
        self.node.table.awake["a"].idle_before_park = 0.0
        self.node.advance(1)
        self.assertEqual(self.node.sessions.parked_count(), 1)
        self.node.table.get("a")
        return peer, self.node.protocol()

    def test_open(self) -> None:
        for pair in (socket.socketpair(), tcp_pair(), tcp_pair("::1")):
            self.setUp()
            number = pair[0].fileno()
            peer, protocol = self.adopt(pair)
            self.assertEqual(protocol.transport.socket.fileno(), number)
            self.assertEqual(protocol.state, protocol.STATE_OPEN)
            for data in (
                text_frame(b"one") + PARTIAL,
                text_frame(b"split")[-2:] + build_frame(1, b"a", fin=False),
                build_frame(0, b"b"),
            ):
                peer.send(data)
                wait_readable(number)
                self.node.step()
            self.assertEqual(self.node.handler.messages, [b"one", b"split", b"ab"])
            protocol.send_text(b"back")
            self.node.step()
            self.assertEqual(parse_frames(self.node.receive(peer)), [(1, b"back")])

    def test_close_handshake(self) -> None:
        for pair in (socket.socketpair(), tcp_pair()):
            self.setUp()
            peer, protocol = self.adopt(pair)
            peer.send(close_frame(4321, b"bye"))
            wait_readable(protocol.transport.fileno())
            self.node.step()
            wait_readable(peer.fileno())
            self.assertEqual(read_frames(peer), [(8, struct.pack("!H", 1000))])
            self.assertEqual(connection_end(peer), "end")
            self.assertEqual(self.node.sessions.count(), 0)
            self.assertEqual(self.node.metrics.closed, {"other": 1})
            self.assertEqual(self.node.factory.countConnections, 0)

    def test_closed_by_the_server(self) -> None:
        peer, protocol = self.adopt(socket.socketpair())
        protocol.close_with(4003, "go")
        self.node.step()
        self.assertEqual(read_frames(peer), [(8, struct.pack("!H", 4003) + b"go")])
        peer.send(close_frame(4003))
        self.node.step()
        self.assertEqual(connection_end(peer), "end")

    def test_closed_by_the_server_without_an_answer(self) -> None:
        peer, protocol = self.adopt(socket.socketpair())
        protocol.close_with(4003, "go")
        self.node.advance(4)
        self.assertEqual(read_frames(peer), [(8, struct.pack("!H", 4003) + b"go")])
        self.assertEqual(connection_end(peer), "end")
        self.assertNotIn(protocol, self.node.reactor.readers)

    def test_slow_reader(self) -> None:
        """The limits on queued bytes still hold."""
        _there, protocol = self.adopt(socket.socketpair())
        protocol.send_text(b"x" * 1000000)
        for _ in range(10):
            protocol.send_text(b"x" * 1000000)
        self.assertEqual(self.node.metrics.slow_readers, 1)
        self.assertEqual(self.node.metrics.closed, {"1013": 1})

    def test_no_handshake_timeout(self) -> None:
        self.adopt(socket.socketpair())
        self.node.clock.advance(60)
        self.node.step()
        self.assertEqual(self.node.sessions.count(), 1)

    def test_reset_while_parked(self) -> None:
        """After a reset the socket has no peer name (ENOTCONN); the reactor detects the loss."""
        here, peer = tcp_pair()
        number = here.fileno()
        self.node.connect("a", (here, peer))
        self.node.table.awake["a"].idle_before_park = 0.0
        self.node.advance(1)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()
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

    def test_without_a_free_file_descriptor(self) -> None:
        """Adopting needs no further one."""
        _there, protocol = self.adopt(socket.socketpair())
        fd, family = detach_idle(protocol)
        with (
            mock.patch("os.dup", side_effect=OSError(errno.EMFILE, "too many")),
            mock.patch("socket.fromfd", side_effect=OSError(errno.EMFILE, "too many")),
        ):
            adopted = adopt_socket(self.node.reactor, self.node.factory, fd, family)
        self.assertEqual(adopted.transport.fileno(), fd)

    def test_repr(self) -> None:
        """Twisted logs it."""
        _, protocol = self.adopt(socket.socketpair())
        self.assertEqual(repr(protocol.transport), f"<ClientProtocol on {protocol.transport.fileno()}>")


class SocketHelpersTest(TransportTestCase):
    """unsent_bytes(), flush(), reset_socket()"""

    def test_unsent_bytes(self) -> None:
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
        here, peer = tcp_pair()
        fd = here.detach()
        reset_socket(fd)
        wait_readable(peer.fileno())
        self.assertEqual(connection_end(peer), "reset")
        with self.assertRaises(OSError):
            os.fstat(fd)
        peer.close()

    def test_reset_of_a_unix_socket(self) -> None:
        here, peer = socket.socketpair()
        reset_socket(here.detach())
        self.assertEqual(connection_end(peer), "end")
        peer.close()

    def test_reset_without_a_free_file(self) -> None:
        """It is closed normally."""
        here, peer = tcp_pair()
        with mock.patch("gateway.net.transport.os.dup", side_effect=OSError(errno.EMFILE, "too many")):
            reset_socket(here.detach())
        wait_readable(peer.fileno())
        self.assertEqual(connection_end(peer), "end")
        peer.close()
