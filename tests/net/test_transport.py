"""Tests of gateway.net.transport: from a transport to a bare socket and back, on Twisted's own transports.

Tests of gateway.net.transport: from a bare socket to a transport and a protocol in its open state.
"""

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


class TransportTestCase(SynchronousTestCase):
    """Stands on a client that is awake, and stays so until the test parks it."""

    options: dict[str, Any] = {"park_after": 1e9}

    def setUp(self) -> None:
        self.node = ParkingNode(**self.options)
        self.addCleanup(self.node.close)

    def connect(self, pair: tuple[socket.socket, socket.socket] | None = None) -> tuple[socket.socket, Any, Any]:
        """The client's end, the transport, the protocol."""
        there = self.node.connect("a", pair)
        protocol = self.node.protocol()
        return there, protocol.transport, protocol

    def detached(self, protocol: Any) -> tuple[int, int]:
        taken = detach_idle(protocol)
        assert taken is not None
        self.addCleanup(_close, taken[0])
        return taken


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


class DetachIdleTest(TransportTestCase):
    """detach()"""

    def test_the_socket_is_whole(self) -> None:
        for pair in (socket.socketpair(), tcp_pair(), tcp_pair("::1")):
            self.setUp()
            family, number = pair[0].family, pair[0].fileno()
            there, _transport, protocol = self.connect(pair)
            fd, found = self.detached(protocol)
            self.assertEqual((fd, found), (number, int(family)))
            self.assertIs(type(found), int)
            self.assertFalse(os.get_blocking(fd))
            os.write(fd, b"there")
            there.send(b"here")
            wait_readable(there.fileno())
            wait_readable(fd)
            self.assertEqual((there.recv(9), os.read(fd, 9)), (b"there", b"here"))

    def test_twisted_knows_nothing_of_it_any_more(self) -> None:
        there, transport, protocol = self.connect()
        before = self.node.factory.countConnections
        self.detached(protocol)
        self.assertNotIn(transport, self.node.reactor.readers | self.node.reactor.writers)
        self.assertEqual(self.node.factory.countConnections, before - 1)
        # Whoever still holds them can do no harm.
        transport.write(b"late")
        transport.loseConnection()
        transport.abortConnection()
        transport.connectionLost(None)
        protocol.sendData = None
        protocol.close_with(1000)
        self.node.step()
        self.assertEqual(read_available(there), b"")
        self.assertEqual(connection_end(there), "open")

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

    def test_part_of_a_frame(self) -> None:
        for data in (text_frame(b"{}")[:1], PARTIAL, text_frame(b"x" * 200)[:3], build_frame(9, b"p")[:-1]):
            self.setUp()
            there, _, protocol = self.connect()
            self.node.send(there, data)
            self.assert_refused(protocol)

    def test_inside_of_a_message(self) -> None:
        there, _, protocol = self.connect()
        self.node.send(there, build_frame(1, b"one", fin=False))
        self.assert_refused(protocol)
        self.node.send(there, build_frame(9, b""))
        self.assert_refused(protocol)
        self.node.send(there, build_frame(0, b"two"))
        self.detached(protocol)

    def test_header_without_its_payload(self) -> None:
        there, _, protocol = self.connect()
        self.node.send(there, build_frame(1, b"x" * 100000)[:14])
        self.assertEqual(protocol.data, b"")
        self.assert_refused(protocol)

    def test_what_the_kernel_does_not_take(self) -> None:
        there, transport, protocol = self.connect()
        size = fill_send_buffer(transport.fileno())
        message = b"x" * 1000
        protocol.send_text(message)
        self.assert_refused(protocol)
        # It is sent in its own time.
        self.assertEqual(len(read_available(there)), size)
        self.node.step()
        self.assertEqual(read_frames(there), [(1, message)])
        self.detached(protocol)

    def test_what_the_kernel_takes_in_part(self) -> None:
        there, _transport, protocol = self.connect()
        message = os.urandom(1000000)
        protocol.send_text(message)
        self.assertIsNone(detach_idle(protocol))
        received = b""
        while len(received) < len(encode(message)):
            received += read_available(there)
            self.node.step(1)
        self.assertEqual(received, encode(message))
        self.detached(protocol)

    def test_first_write(self) -> None:
        """Twisted would send it in the next turn only."""
        there, transport, protocol = self.connect()
        protocol.send_text(b"one")
        self.assertEqual(read_available(there), b"")
        self.detached(protocol)
        self.assertEqual(read_frames(there), [(1, b"one")])
        self.assertNotIn(transport, self.node.reactor.writers)

    def test_first_write_to_somebody_who_is_gone(self) -> None:
        there, _transport, protocol = self.connect()
        there.close()
        protocol.send_text(b"one")
        self.assertIsNone(detach_idle(protocol))
        self.node.step()
        self.assertEqual(self.node.sessions.count(), 0)
        self.assertEqual(self.node.metrics.closed, {"1006": 1})

    def test_being_closed(self) -> None:
        _there, transport, protocol = self.connect()
        transport.disconnecting = True
        self.assert_refused(protocol)
        transport.disconnecting = False
        transport._aborting = True
        self.assert_refused(protocol)

    def test_lost_meanwhile(self) -> None:
        there, _transport, protocol = self.connect()
        there.close()
        self.node.step()
        self.assertIsNone(detach_idle(protocol))

    def test_transport_of_another_kind(self) -> None:
        """Of what it knows nothing about it keeps away."""
        protocol = FakeNode().connect().protocol
        self.assertIsNone(plain_transport(protocol.transport))
        self.assertIsNone(detach_idle(protocol))
        self.assertFalse(protocol.parkable)

    def test_tls(self) -> None:
        """The state of such a connection is not in its socket."""
        _there, transport, protocol = self.connect()
        self.assertTrue(protocol.parkable)
        transport.TLS = True
        self.assertIsNone(plain_transport(transport))
        self.assertFalse(protocol.parkable)
        self.assert_refused(protocol)
        self.assertIsNone(protocol.detach_idle())
        transport.TLS = False

    def test_behind_tls(self) -> None:
        """On an endpoint of Twisted's."""
        authority = trustme.CA()
        pem = authority.issue_cert("localhost").private_key_and_cert_chain_pem.bytes()
        options = PrivateCertificate.loadPEM(pem).options()
        plain = self.node.dial(
            wrap=lambda factory: TLSMemoryBIOFactory(options, False, factory, clock=self.node.reactor)
        )
        context = ssl.create_default_context()
        authority.configure_trust(context)
        there = context.wrap_socket(plain, server_hostname="localhost", do_handshake_on_connect=False)
        self.addCleanup(there.close)
        self.soon(there.do_handshake)
        self.soon(lambda: there.send(build_request()))
        self.assertTrue(self.soon(lambda: there.recv(1000)).startswith(b"HTTP/1.1 101 "))
        protocol = self.node.protocol()
        protocol.send_text(b"one")
        self.assertFalse(protocol.parkable)
        self.assertIsNone(detach_idle(protocol))
        self.assertEqual(parse_frames(self.soon(lambda: there.recv(1000))), [(1, b"one")])

    def soon(self, call: Callable[[], Any]) -> Any:
        """What a TLS connection can only do when it has heard from the other end."""
        for _ in range(20):
            try:
                return call()
            except ssl.SSLWantReadError:
                self.node.step()
        return call()

    def test_no_reference_cycle(self) -> None:
        """The garbage collector would have to find each of them, in its own time."""
        for pair in (socket.socketpair(), tcp_pair()):
            self.setUp()
            there = self.node.connect("a", pair)
            client = self.node.table.awake["a"]
            dying = weakref.ref(client.connection), weakref.ref(client.connection.transport)
            client.idle_before_park = 0.0
            # What finalizers of other tests' objects leave is found by the next collection only.
            while gc.collect():
                pass
            gc.disable()
            try:
                self.node.advance(1)
                self.assertEqual(self.node.sessions.parked_count(), 1)
                self.assertEqual([one() for one in dying], [None, None])
                del client
                self.assertEqual(gc.collect(), 0)
                # And again, after it was adopted.
                self.node.send(there, PARTIAL)
                dying = weakref.ref(self.node.protocol()), weakref.ref(self.node.protocol().transport)
                self.node.table.awake["a"].idle_before_park = 0.0
                self.node.send(there, text_frame(b"split")[-2:])
                self.node.advance(1)
                self.assertEqual(self.node.sessions.parked_count(), 1)
                self.assertEqual([one() for one in dying], [None, None])
                self.assertEqual(gc.collect(), 0)
            finally:
                gc.enable()


class ProxyTest(TransportTestCase):
    """Behind a load balancer that speaks the PROXY protocol"""

    HEADER = b"PROXY TCP4 198.51.100.7 203.0.113.1 4242 80\r\n"

    def setUp(self) -> None:
        super().setUp()
        self.factory = self.node.factory.with_proxy_protocol()
        self.proxied = ProxyProtocolFactory(self.factory)

    def connect_through(self, client_id: str = "a") -> socket.socket:
        there = self.node.dial(wrap=lambda factory: self.proxied)
        there.send(self.HEADER + build_request(f"/v1/connect?client_id={client_id}"))
        self.node.step()
        self.assertTrue(read_available(there).startswith(b"HTTP/1.1 101 "))
        return there

    def test_detach(self) -> None:
        there = self.connect_through()
        protocol = self.node.protocol()
        wrapper = protocol.transport
        transport = wrapper.transport
        self.assertIs(plain_transport(wrapper), transport)
        self.assertTrue(protocol.parkable)
        protocol.send_text(b"one")
        fd, _ = self.detached(protocol)
        self.assertEqual(read_frames(there), [(1, b"one")])
        self.assertEqual(self.factory.countConnections, 0)
        self.assertNotIn(transport, self.node.reactor.readers)
        os.write(fd, b"there")
        self.assertEqual(there.recv(9), b"there")

    def test_no_reference_cycle(self) -> None:
        # What all wrappers share, zope's record of what they provide, is one.
        self.connect_through("stays")
        self.connect_through()
        protocol = self.node.protocol()
        dying = [weakref.ref(one) for one in (protocol, protocol.transport, protocol.transport.transport)]
        del protocol
        self.node.table.awake["a"].idle_before_park = 0.0
        gc.collect()
        gc.disable()
        try:
            self.node.advance(1)
            self.assertEqual([one() for one in dying], [None] * 3)
            self.assertEqual(gc.collect(), 0)
        finally:
            gc.enable()

    def test_never_back_through_the_wrapper(self) -> None:
        """The real address is kept, and no further header expected."""
        there = self.connect_through()
        self.node.table.awake["a"].idle_before_park = 0.0
        self.node.advance(1)
        self.assertEqual(self.node.sessions.parked_count(), 1)
        presence = self.node.sessions.get("a")
        assert presence is not None
        self.assertEqual(presence.address, "198.51.100.7:4242")
        self.node.send(there, PARTIAL)
        self.assertEqual(self.node.sessions.get("a"), presence)
        self.assertEqual(self.node.protocol().address, "198.51.100.7:4242")
        self.node.send(there, text_frame(b"split")[-2:])
        self.assertEqual(self.node.handler.messages, [b"split"])
        there.send(close_frame(1000))
        self.node.step()
        self.assertEqual(read_frames(there), [(8, b"\x03\xe8")])
        self.assertEqual(connection_end(there), "end")
        self.assertEqual((self.node.factory.countConnections, self.factory.countConnections), (0, 0))


class ReleaseToReactorTest(SynchronousTestCase):
    """settle()"""

    def test_the_innermost_transport(self) -> None:
        newcomers = HandshakePoller(Clock())
        self.addCleanup(newcomers._epoll.close)
        released: list[object] = []
        self.patch(newcomers, "release", released.append)
        transport = StringTransport()
        transport.reactor = newcomers
        release_to_reactor(transport)
        wrapper = ProtocolWrapper(WrappingFactory(Factory()), Protocol())
        wrapper.transport = transport
        release_to_reactor(wrapper)
        self.assertEqual(released, [transport, transport])

    def test_of_others(self) -> None:
        """Nothing is done to a transport that is the reactor's already, or has none."""
        release_to_reactor(StringTransport())
        transport = StringTransport()
        transport.reactor = Clock()
        release_to_reactor(transport)


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
