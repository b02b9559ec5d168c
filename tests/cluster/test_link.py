"""gateway.cluster.peer_connection"""

from __future__ import annotations

import struct

from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectionRefusedError
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.auth import PeerTLS
from gateway.cluster.peer_connection import (
    MAX_CORKED,
    OPEN_TIMEOUT,
    PeerConnection,
    make_connection,
    open_connection,
    peer_target,
)
from gateway.protocol.frames import PING, PONG, encode
from gateway.util.cork import Cork
from gateway.websocket.client import HandshakeError, HandshakeRefusedError
from tests.cluster.far import FakeNetwork


class PeerConnectionCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.net = FakeNetwork()
        self.cork = Cork(self.net.seconds)
        self.received: list[bytes] = []
        self.handle = lambda link, payload: self.received.append(payload)

    def open_connection(self, url: str = "ws://b.example:8081") -> PeerConnection:
        target = peer_target(url)
        link = make_connection(
            target,
            "Wsgateway-Peer x",
            clock=self.net,
            cork=self.cork,
            max_message_size=100000,
            message_received=lambda link, payload: self.handle(link, payload),
        )
        self.opened = open_connection(link, target, self.net, PeerTLS())
        return link

    def connected(self) -> PeerConnection:
        link = self.open_connection()
        self.peer = self.net.open()
        self.successResultOf(self.opened)
        return link


class OpeningTests(PeerConnectionCase):
    def test_request(self) -> None:
        self.open_connection("ws://b.example:8081/a/prefix/")
        self.assertEqual(self.net.tcpClients[0][:2], ("192.0.2.2", 8081))
        request = self.net.accept().http_request.decode()
        self.assertTrue(request.startswith("GET /a/prefix/v1/backend HTTP/1.1\r\n"), request)
        for header in (
            "Host: b.example:8081",
            "Authorization: Wsgateway-Peer x",
            "User-Agent: wsgateway/",
            "Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1\r\n",
        ):
            self.assertIn(f"\r\n{header}", request)
        self.assertNotIn("Extensions", request)

    def test_url_that_is_none(self) -> None:
        for url in ("b.example:8081", "http://b.example", "ws://", "ws://b.example:x"):
            with self.assertRaises(ValueError):
                peer_target(url)

    def test_open(self) -> None:
        link = self.open_connection()
        far = self.net.accept()
        self.assertNoResult(self.opened)
        self.assertFalse(link.send(b"early"))
        far.open()
        self.successResultOf(self.opened)
        self.assertTrue(link.send(b"hello"))
        self.assertEqual(far.payloads(), [b"hello"])
        self.net.advance(3600)
        self.assertNoResult(link.closed)

    def test_refused(self) -> None:
        link = self.open_connection()
        self.net.accept().refuse(401, "peer", "the cluster secrets differ")
        refused = self.failureResultOf(self.opened, HandshakeRefusedError).value
        self.assertEqual(str(refused), "the gateway answered 401 (peer: the cluster secrets differ)")
        self.assertNoResult(link.closed)

    def test_nobody_listens(self) -> None:
        self.open_connection()
        self.net.refuse()
        self.failureResultOf(self.opened, ConnectionRefusedError)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_no_websocket(self) -> None:
        self.open_connection()
        far = self.net.accept()
        far.send(b"SSH-2.0-x\r\n\r\n")
        self.failureResultOf(self.opened, HandshakeError)
        self.assertTrue(far.transport.is_aborted)

    def test_lost_meanwhile(self) -> None:
        self.open_connection()
        self.net.accept().disconnect()
        self.failureResultOf(self.opened, HandshakeError)

    def test_timeout(self) -> None:
        """Of connecting and of the opening handshake together."""
        self.open_connection()
        self.net.advance(OPEN_TIMEOUT - 1)
        far = self.net.accept()
        self.net.advance(0.9)
        self.assertNoResult(self.opened)
        self.net.advance(0.1)
        self.assertIn("not open within 3 s", str(self.failureResultOf(self.opened, HandshakeError).value))
        self.assertTrue(far.transport.is_aborted)
        far.disconnect()
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_timeout_of_connecting(self) -> None:
        self.open_connection()
        self.net.advance(OPEN_TIMEOUT)
        self.assertIn("not open within 3 s", str(self.failureResultOf(self.opened, HandshakeError).value))

    def test_cancelled_while_it_connects(self) -> None:
        self.open_connection()
        self.opened.cancel()
        self.failureResultOf(self.opened, CancelledError)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_cancelled(self) -> None:
        self.open_connection()
        far = self.net.accept()
        self.opened.cancel()
        self.failureResultOf(self.opened, CancelledError)
        self.assertTrue(far.transport.is_aborted)
        far.disconnect()
        self.assertEqual(self.net.getDelayedCalls(), [])


class MessageTests(PeerConnectionCase):
    def test_a_turn_is_one_write(self) -> None:
        link = self.connected()
        self.cork.cork()
        for payload in (b"a", b"b" * 300, b"c"):
            self.assertTrue(link.send(payload))
        self.assertEqual(self.peer.transport._unsent, [])
        self.cork.uncork()
        self.assertEqual(len(self.peer.transport._unsent), 1)
        self.assertEqual(self.peer.payloads(), [b"a", b"b" * 300, b"c"])
        link.send(b"d")
        self.assertEqual(self.peer.payloads(), [b"d"])

    def test_each_has_a_key_of_its_own(self) -> None:
        link = self.connected()
        for _ in range(50):
            link.send(b"")
        data = self.peer.transport.take_unsent()
        self.assertEqual(len({data[at + 2 : at + 6] for at in range(0, len(data), 6)}), 50)

    def test_much_is_not_gathered(self) -> None:
        link = self.connected()
        self.cork.cork()
        for _ in range(3):
            link.send(b"x" * (MAX_CORKED // 2 + 1))
        self.assertEqual(len(self.peer.payloads()), 2)
        self.cork.uncork()
        self.assertEqual(len(self.peer.payloads()), 1)

    def test_received_in_a_turn(self) -> None:
        link = self.connected()
        self.handle = lambda link, payload: self.received.append(self.cork.is_corked) or link.send(payload)
        self.peer.send_messages(b"a", b"b")
        self.assertEqual(self.received, [True, True])
        self.assertFalse(self.cork.is_corked)
        self.assertEqual(len(self.peer.transport._unsent), 1)
        self.assertEqual(self.peer.payloads(), [b"a", b"b"])
        self.assertEqual(link.take_unsent(), [])

    def test_received_in_pieces(self) -> None:
        self.connected()
        payloads = [b"", b"a", "\u00e9".encode(), b"x" * 126, b"y" * 65535, b"z" * 65536, b"end"]
        data = b"".join(map(encode, payloads))
        for size in (1000, 70000, 7):
            self.received.clear()
            for at in range(0, len(data), size):
                self.peer.send(data[at : at + size])
            self.assertEqual(self.received, payloads)

    def test_received_byte_by_byte(self) -> None:
        self.connected()
        for byte in encode(b"a") + encode(b"", PING) + encode(b"x" * 130) + b"\x01\x01b\x80\x01c" + encode(b"d"):
            self.peer.send(bytes((byte,)))
        self.assertEqual(self.received, [b"a", b"x" * 130, b"bc", b"d"])
        self.assertEqual(self.peer.frames(), [(PONG, b"")])

    def test_received_with_the_101(self) -> None:
        self.open_connection()
        far = self.net.accept()
        real = far.send
        far.send = lambda data: real(data + encode(b"early"))
        far.open()
        self.assertEqual(self.received, [b"early"])

    def test_ping(self) -> None:
        link = self.connected()
        self.cork.cork()
        link.send(b"a")
        self.peer.send(encode(b"p", PING))
        self.cork.uncork()
        self.assertEqual(self.peer.frames(), [(1, b"a"), (PONG, b"p")])

    def assert_closed(self, connection: PeerConnection, code: int) -> None:
        self.assertEqual(self.successResultOf(connection.closed).code, code)
        self.assertFalse(connection.send(b"x"))

    def test_what_breaks_the_protocol(self) -> None:
        for data, code in (
            (b"\x81\x80\0\0\0\0", 1002),
            (b"\xc1\x00", 1002),
            (b"\x83\x00", 1002),
            (encode(b"\xff"), 1007),
            (b"\x82\x01x", 1003),
            (encode(b"x" * 100001), 1009),
        ):
            link = self.connected()
            self.peer.send(encode(b"good") + data + encode(b"not read"))
            self.assert_closed(link, code)
            self.assertEqual(self.received, [b"good"])
            opcode, payload = self.peer.frames()[-1]
            self.assertEqual((opcode, payload[:2]), (8, struct.pack("!H", code)))
            self.received.clear()

    def test_handler_that_fails(self) -> None:
        link = self.connected()
        self.handle = lambda link, payload: 1 / 0
        self.peer.send_messages(b"a", b"b")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_closed(link, 1006)
        self.assertFalse(self.cork.is_corked)
        self.assertTrue(self.peer.transport.is_aborted)


class CloseTests(PeerConnectionCase):
    def test_closed(self) -> None:
        link = self.connected()
        self.cork.cork()
        link.send(b"last")
        link.close_with(1001, "x" * 200)
        self.cork.uncork()
        last, (opcode, payload) = self.peer.frames()
        self.assertEqual((last, opcode), ((1, b"last"), 8))
        self.assertEqual(payload, b"\x03\xe9" + b"x" * 123)
        self.assertEqual(self.successResultOf(link.closed).code, 1001)
        self.peer.send_messages(b"late")
        self.assertEqual(self.received, [])
        self.net.advance(2)
        self.assertTrue(self.peer.transport.is_aborted)
        self.peer.disconnect()
        self.successResultOf(link.disconnected)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_closed_by_the_other(self) -> None:
        link = self.connected()
        self.peer.send(b"\x88\x02\x03\xe9")
        self.assertEqual(self.successResultOf(link.closed).code, 1001)
        self.assertEqual(self.peer.frames()[-1], (8, b"\x03\xe9"))

    def test_aborted_in_a_turn(self) -> None:
        """What was gathered has not left."""
        link = self.connected()
        self.cork.cork()
        link.send(b"never")
        link.abort("broken")
        self.assertEqual(link.take_unsent(), [b"never"])
        self.cork.uncork()
        self.assertEqual(self.peer.payloads(), [])

    def test_silence(self) -> None:
        link = self.connected()
        self.assertEqual([link.check_idle(5.0) for _ in range(3)], [0.0, 5.0, 10.0])
        self.assertEqual(self.peer.frames(), [(PING, b"")] * 2)
        self.peer.send(encode(b"", PONG))
        self.assertEqual([link.check_idle(5.0) for _ in range(2)], [0.0, 5.0])
        link.reset_idle()
        self.assertEqual(link.check_idle(5.0), 0.0)

    def test_full(self) -> None:
        link = self.connected()
        link.send(b"x" * 60000)
        self.assertFalse(link.is_congested(1000))
        link.send(b"x" * 60000)
        self.assertTrue(link.is_congested(120000))
        self.assertFalse(link.is_congested(130000))
        self.peer.payloads()
        self.assertFalse(link.is_congested(1000))
