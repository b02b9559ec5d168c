"""gateway.cluster.peer_connection"""

from __future__ import annotations

import struct

from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectionRefusedError
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.auth import PeerTLS
from gateway.cluster.peer_connection import MAX_GATHERED, OPEN_TIMEOUT, Link, link_target, make_link, open_link
from gateway.protocol.frames import PING, PONG, encode
from gateway.util.cork import Turn
from gateway.websocket.client import OpeningFailed, Refused
from tests.cluster.far import Net


class LinkCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.net = Net()
        self.turn = Turn(self.net.seconds)
        self.received: list[bytes] = []
        self.handle = lambda link, payload: self.received.append(payload)

    def make(self, url: str = "ws://b.example:8081") -> Link:
        target = link_target(url)
        link = make_link(
            target,
            "Wsgateway-Peer x",
            clock=self.net,
            turn=self.turn,
            max_message_size=100000,
            received=lambda link, payload: self.handle(link, payload),
        )
        self.opening = open_link(link, target, self.net, PeerTLS())
        return link

    def linked(self) -> Link:
        link = self.make()
        self.far = self.net.open()
        self.successResultOf(self.opening)
        return link


class OpeningTests(LinkCase):
    def test_request(self) -> None:
        self.make("ws://b.example:8081/a/prefix/")
        self.assertEqual(self.net.tcpClients[0][:2], ("192.0.2.2", 8081))
        request = self.net.accept().request.decode()
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
                link_target(url)

    def test_open(self) -> None:
        link = self.make()
        far = self.net.accept()
        self.assertNoResult(self.opening)
        self.assertFalse(link.send(b"early"))
        far.open()
        self.successResultOf(self.opening)
        self.assertTrue(link.send(b"hello"))
        self.assertEqual(far.raw(), [b"hello"])
        self.net.advance(3600)
        self.assertNoResult(link.closing)

    def test_refused(self) -> None:
        link = self.make()
        self.net.accept().refuse(401, "peer", "the cluster secrets differ")
        refused = self.failureResultOf(self.opening, Refused).value
        self.assertEqual(str(refused), "the gateway answered 401 (peer: the cluster secrets differ)")
        self.assertNoResult(link.closing)

    def test_nobody_listens(self) -> None:
        self.make()
        self.net.refuse()
        self.failureResultOf(self.opening, ConnectionRefusedError)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_no_websocket(self) -> None:
        self.make()
        far = self.net.accept()
        far.send(b"SSH-2.0-x\r\n\r\n")
        self.failureResultOf(self.opening, OpeningFailed)
        self.assertTrue(far.transport.aborted)

    def test_lost_meanwhile(self) -> None:
        self.make()
        self.net.accept().lose()
        self.failureResultOf(self.opening, OpeningFailed)

    def test_timeout(self) -> None:
        """Of connecting and of the opening handshake together."""
        self.make()
        self.net.advance(OPEN_TIMEOUT - 1)
        far = self.net.accept()
        self.net.advance(0.9)
        self.assertNoResult(self.opening)
        self.net.advance(0.1)
        self.assertIn("not open within 3 s", str(self.failureResultOf(self.opening, OpeningFailed).value))
        self.assertTrue(far.transport.aborted)
        far.lose()
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_timeout_of_connecting(self) -> None:
        self.make()
        self.net.advance(OPEN_TIMEOUT)
        self.assertIn("not open within 3 s", str(self.failureResultOf(self.opening, OpeningFailed).value))

    def test_cancelled_while_it_connects(self) -> None:
        self.make()
        self.opening.cancel()
        self.failureResultOf(self.opening, CancelledError)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_cancelled(self) -> None:
        self.make()
        far = self.net.accept()
        self.opening.cancel()
        self.failureResultOf(self.opening, CancelledError)
        self.assertTrue(far.transport.aborted)
        far.lose()
        self.assertEqual(self.net.getDelayedCalls(), [])


class MessageTests(LinkCase):
    def test_a_turn_is_one_write(self) -> None:
        link = self.linked()
        self.turn.begin()
        for payload in (b"a", b"b" * 300, b"c"):
            self.assertTrue(link.send(payload))
        self.assertEqual(self.far.transport._written, [])
        self.turn.end()
        self.assertEqual(len(self.far.transport._written), 1)
        self.assertEqual(self.far.raw(), [b"a", b"b" * 300, b"c"])
        link.send(b"d")
        self.assertEqual(self.far.raw(), [b"d"])

    def test_each_has_a_key_of_its_own(self) -> None:
        link = self.linked()
        for _ in range(50):
            link.send(b"")
        data = self.far.transport.take()
        self.assertEqual(len({data[at + 2 : at + 6] for at in range(0, len(data), 6)}), 50)

    def test_much_is_not_gathered(self) -> None:
        link = self.linked()
        self.turn.begin()
        for _ in range(3):
            link.send(b"x" * (MAX_GATHERED // 2 + 1))
        self.assertEqual(len(self.far.raw()), 2)
        self.turn.end()
        self.assertEqual(len(self.far.raw()), 1)

    def test_received_in_a_turn(self) -> None:
        link = self.linked()
        self.handle = lambda link, payload: self.received.append(self.turn.on) or link.send(payload)
        self.far.say(b"a", b"b")
        self.assertEqual(self.received, [True, True])
        self.assertFalse(self.turn.on)
        self.assertEqual(len(self.far.transport._written), 1)
        self.assertEqual(self.far.raw(), [b"a", b"b"])
        self.assertEqual(link.take_gathered(), [])

    def test_received_in_pieces(self) -> None:
        self.linked()
        payloads = [b"", b"a", "\u00e9".encode(), b"x" * 126, b"y" * 65535, b"z" * 65536, b"end"]
        data = b"".join(map(encode, payloads))
        for size in (1000, 70000, 7):
            self.received.clear()
            for at in range(0, len(data), size):
                self.far.send(data[at : at + size])
            self.assertEqual(self.received, payloads)

    def test_received_byte_by_byte(self) -> None:
        self.linked()
        for byte in encode(b"a") + encode(b"", PING) + encode(b"x" * 130) + b"\x01\x01b\x80\x01c" + encode(b"d"):
            self.far.send(bytes((byte,)))
        self.assertEqual(self.received, [b"a", b"x" * 130, b"bc", b"d"])
        self.assertEqual(self.far.frames(), [(PONG, b"")])

    def test_received_with_the_101(self) -> None:
        self.make()
        far = self.net.accept()
        real = far.send
        far.send = lambda data: real(data + encode(b"early"))
        far.open()
        self.assertEqual(self.received, [b"early"])

    def test_ping(self) -> None:
        link = self.linked()
        self.turn.begin()
        link.send(b"a")
        self.far.send(encode(b"p", PING))
        self.turn.end()
        self.assertEqual(self.far.frames(), [(1, b"a"), (PONG, b"p")])

    def ends(self, link: Link, code: int) -> None:
        self.assertEqual(self.successResultOf(link.closing).code, code)
        self.assertFalse(link.send(b"x"))

    def test_what_breaks_the_protocol(self) -> None:
        for data, code in (
            (b"\x81\x80\0\0\0\0", 1002),
            (b"\xc1\x00", 1002),
            (b"\x83\x00", 1002),
            (encode(b"\xff"), 1007),
            (b"\x82\x01x", 1003),
            (encode(b"x" * 100001), 1009),
        ):
            link = self.linked()
            self.far.send(encode(b"good") + data + encode(b"not read"))
            self.ends(link, code)
            self.assertEqual(self.received, [b"good"])
            opcode, payload = self.far.frames()[-1]
            self.assertEqual((opcode, payload[:2]), (8, struct.pack("!H", code)))
            self.received.clear()

    def test_handler_that_fails(self) -> None:
        link = self.linked()
        self.handle = lambda link, payload: 1 / 0
        self.far.say(b"a", b"b")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.ends(link, 1006)
        self.assertFalse(self.turn.on)
        self.assertTrue(self.far.transport.aborted)


class EndTests(LinkCase):
    def test_closed(self) -> None:
        link = self.linked()
        self.turn.begin()
        link.send(b"last")
        link.close_with(1001, "x" * 200)
        self.turn.end()
        last, (opcode, payload) = self.far.frames()
        self.assertEqual((last, opcode), ((1, b"last"), 8))
        self.assertEqual(payload, b"\x03\xe9" + b"x" * 123)
        self.assertEqual(self.successResultOf(link.closing).code, 1001)
        self.far.say(b"late")
        self.assertEqual(self.received, [])
        self.net.advance(2)
        self.assertTrue(self.far.transport.aborted)
        self.far.lose()
        self.successResultOf(link.gone)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_closed_by_the_other(self) -> None:
        link = self.linked()
        self.far.send(b"\x88\x02\x03\xe9")
        self.assertEqual(self.successResultOf(link.closing).code, 1001)
        self.assertEqual(self.far.frames()[-1], (8, b"\x03\xe9"))

    def test_aborted_in_a_turn(self) -> None:
        """What was gathered has not left."""
        link = self.linked()
        self.turn.begin()
        link.send(b"never")
        link.abort("broken")
        self.assertEqual(link.take_gathered(), [b"never"])
        self.turn.end()
        self.assertEqual(self.far.raw(), [])

    def test_silence(self) -> None:
        link = self.linked()
        self.assertEqual([link.silence(5.0) for _ in range(3)], [0.0, 5.0, 10.0])
        self.assertEqual(self.far.frames(), [(PING, b"")] * 2)
        self.far.send(encode(b"", PONG))
        self.assertEqual([link.silence(5.0) for _ in range(2)], [0.0, 5.0])
        link.forgive()
        self.assertEqual(link.silence(5.0), 0.0)

    def test_full(self) -> None:
        link = self.linked()
        link.send(b"x" * 60000)
        self.assertFalse(link.is_full(1000))
        link.send(b"x" * 60000)
        self.assertTrue(link.is_full(120000))
        self.assertFalse(link.is_full(130000))
        self.far.raw()
        self.assertFalse(link.is_full(1000))
