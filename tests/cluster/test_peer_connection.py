"""Tests of gateway.cluster.peer_connection, some with generated input, and on real sockets."""

from __future__ import annotations

import json
import struct
from typing import Any

import trustme
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.ssl import Certificate, CertificateOptions, PrivateCertificate
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.cluster.auth import PeerAuth, PeerTLS
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.features import FEATURES_HEADER, Feature, encode_features
from gateway.cluster.peer_client import PeerClient
from gateway.cluster.peer_connection import (
    MAX_CORKED,
    OPEN_TIMEOUT,
    PeerConnection,
    make_connection,
    open_connection,
    peer_target,
)
from gateway.metrics import Metrics
from gateway.protocol.frames import PING, PONG, encode
from gateway.rpc.pending import DeferredCall, Reply
from gateway.util.cork import Cork
from gateway.websocket.errors import HandshakeError, HandshakeRefusedError
from tests.builders.frames import build_frame
from tests.fakes.peer import A, FakeNetwork, location


class PeerConnectionCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.net = FakeNetwork()
        self.cork = Cork(self.net.seconds)
        self.received: list[bytes] = []
        self.handle = lambda connection, payload: self.received.append(payload)

    def open_connection(self, url: str = "ws://b.example:8081") -> PeerConnection:
        target = peer_target(url)
        connection = make_connection(
            target,
            "Wsgateway-Peer x",
            clock=self.net,
            cork=self.cork,
            max_message_size=100000,
            message_received=lambda connection, payload: self.handle(connection, payload),
        )
        self.opened = open_connection(connection, target, self.net, PeerTLS())
        return connection

    def connected(self) -> PeerConnection:
        connection = self.open_connection()
        self.peer = self.net.open()
        self.successResultOf(self.opened)
        return connection


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

    def test_features(self) -> None:
        connection = self.open_connection()
        peer = self.net.accept()
        self.assertIn(f"\r\n{FEATURES_HEADER}: {encode_features()}\r\n", peer.http_request.decode())
        peer.open(f"{FEATURES_HEADER}: mark, later\r\n".encode())
        self.assertEqual(connection.features, {Feature.MARK})

    def test_older_peer_has_no_features(self) -> None:
        connection = self.connected()
        self.assertEqual(connection.features, frozenset())

    def test_invalid_url(self) -> None:
        for url in ("b.example:8081", "http://b.example", "ws://", "ws://b.example:x"):
            with self.assertRaises(ValueError):
                peer_target(url)

    def test_open(self) -> None:
        connection = self.open_connection()
        peer = self.net.accept()
        self.assertNoResult(self.opened)
        self.assertFalse(connection.send(b"early"))
        peer.open()
        self.successResultOf(self.opened)
        self.assertTrue(connection.send(b"hello"))
        self.assertEqual(peer.payloads(), [b"hello"])
        self.net.advance(3600)
        self.assertNoResult(connection.closed)

    def test_refused(self) -> None:
        connection = self.open_connection()
        self.net.accept().refuse(401, "peer", "the cluster secrets differ")
        refused = self.failureResultOf(self.opened, HandshakeRefusedError).value
        self.assertEqual(str(refused), "the gateway answered 401 (peer: the cluster secrets differ)")
        self.assertNoResult(connection.closed)

    def test_connection_refused(self) -> None:
        self.open_connection()
        self.net.refuse()
        self.failureResultOf(self.opened, ConnectionRefusedError)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_response_without_upgrade(self) -> None:
        self.open_connection()
        peer = self.net.accept()
        peer.send(b"SSH-2.0-x\r\n\r\n")
        self.failureResultOf(self.opened, HandshakeError)
        self.assertTrue(peer.transport.is_aborted)

    def test_lost_during_the_handshake(self) -> None:
        self.open_connection()
        self.net.accept().disconnect()
        self.failureResultOf(self.opened, HandshakeError)

    def test_timeout(self) -> None:
        """It covers connecting and the opening handshake together."""
        self.open_connection()
        self.net.advance(OPEN_TIMEOUT - 1)
        peer = self.net.accept()
        self.net.advance(0.9)
        self.assertNoResult(self.opened)
        self.net.advance(0.1)
        self.assertIn("not open within 3 s", str(self.failureResultOf(self.opened, HandshakeError).value))
        self.assertTrue(peer.transport.is_aborted)
        peer.disconnect()
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
        peer = self.net.accept()
        self.opened.cancel()
        self.failureResultOf(self.opened, CancelledError)
        self.assertTrue(peer.transport.is_aborted)
        peer.disconnect()
        self.assertEqual(self.net.getDelayedCalls(), [])


class MessageTests(PeerConnectionCase):
    def test_corked_messages_are_one_write(self) -> None:
        connection = self.connected()
        self.cork.cork()
        for payload in (b"a", b"b" * 300, b"c"):
            self.assertTrue(connection.send(payload))
        self.assertEqual(self.peer.transport._unsent, [])
        self.cork.uncork()
        self.assertEqual(len(self.peer.transport._unsent), 1)
        self.assertEqual(self.peer.payloads(), [b"a", b"b" * 300, b"c"])
        connection.send(b"d")
        self.assertEqual(self.peer.payloads(), [b"d"])

    def test_masking_keys_differ(self) -> None:
        connection = self.connected()
        for _ in range(50):
            connection.send(b"")
        data = self.peer.transport.take_unsent()
        self.assertEqual(len({data[at + 2 : at + 6] for at in range(0, len(data), 6)}), 50)

    def test_cork_is_bounded(self) -> None:
        connection = self.connected()
        self.cork.cork()
        for _ in range(3):
            connection.send(b"x" * (MAX_CORKED // 2 + 1))
        self.assertEqual(len(self.peer.payloads()), 2)
        self.cork.uncork()
        self.assertEqual(len(self.peer.payloads()), 1)

    def test_input_is_handled_corked(self) -> None:
        connection = self.connected()
        self.handle = lambda connection, payload: self.received.append(self.cork.is_corked) or connection.send(payload)
        self.peer.send_messages(b"a", b"b")
        self.assertEqual(self.received, [True, True])
        self.assertFalse(self.cork.is_corked)
        self.assertEqual(len(self.peer.transport._unsent), 1)
        self.assertEqual(self.peer.payloads(), [b"a", b"b"])
        self.assertEqual(connection.take_unsent(), [])

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
        peer = self.net.accept()
        real = peer.send
        peer.send = lambda data: real(data + encode(b"early"))
        peer.open()
        self.assertEqual(self.received, [b"early"])

    def test_ping(self) -> None:
        connection = self.connected()
        self.cork.cork()
        connection.send(b"a")
        self.peer.send(encode(b"p", PING))
        self.cork.uncork()
        self.assertEqual(self.peer.frames(), [(1, b"a"), (PONG, b"p")])

    def assert_closed(self, connection: PeerConnection, code: int) -> None:
        self.assertEqual(self.successResultOf(connection.closed).code, code)
        self.assertFalse(connection.send(b"x"))

    def test_protocol_errors(self) -> None:
        for data, code in (
            (b"\x81\x80\0\0\0\0", 1002),
            (b"\xc1\x00", 1002),
            (b"\x83\x00", 1002),
            (encode(b"\xff"), 1007),
            (b"\x82\x01x", 1003),
            (encode(b"x" * 100001), 1009),
        ):
            connection = self.connected()
            self.peer.send(encode(b"good") + data + encode(b"not read"))
            self.assert_closed(connection, code)
            self.assertEqual(self.received, [b"good"])
            opcode, payload = self.peer.frames()[-1]
            self.assertEqual((opcode, payload[:2]), (8, struct.pack("!H", code)))
            self.received.clear()

    def test_handler_that_fails(self) -> None:
        connection = self.connected()
        self.handle = lambda connection, payload: 1 / 0
        self.peer.send_messages(b"a", b"b")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_closed(connection, 1006)
        self.assertFalse(self.cork.is_corked)
        self.assertTrue(self.peer.transport.is_aborted)


class CloseTests(PeerConnectionCase):
    def test_closed(self) -> None:
        connection = self.connected()
        self.cork.cork()
        connection.send(b"last")
        connection.close_with(1001, "x" * 200)
        self.cork.uncork()
        last, (opcode, payload) = self.peer.frames()
        self.assertEqual((last, opcode), ((1, b"last"), 8))
        self.assertEqual(payload, b"\x03\xe9" + b"x" * 123)
        self.assertEqual(self.successResultOf(connection.closed).code, 1001)
        self.peer.send_messages(b"late")
        self.assertEqual(self.received, [])
        self.net.advance(2)
        self.assertTrue(self.peer.transport.is_aborted)
        self.peer.disconnect()
        self.successResultOf(connection.disconnected)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_closed_by_the_peer(self) -> None:
        connection = self.connected()
        self.peer.send(b"\x88\x02\x03\xe9")
        self.assertEqual(self.successResultOf(connection.closed).code, 1001)
        self.assertEqual(self.peer.frames()[-1], (8, b"\x03\xe9"))

    def test_aborted_while_corked(self) -> None:
        """Corked messages are unsent."""
        connection = self.connected()
        self.cork.cork()
        connection.send(b"never")
        connection.abort("broken")
        self.assertEqual(connection.take_unsent(), [b"never"])
        self.cork.uncork()
        self.assertEqual(self.peer.payloads(), [])

    def test_idle_time(self) -> None:
        connection = self.connected()
        self.assertEqual([connection.check_idle(5.0) for _ in range(3)], [0.0, 5.0, 10.0])
        self.assertEqual(self.peer.frames(), [(PING, b"")] * 2)
        self.peer.send(encode(b"", PONG))
        self.assertEqual([connection.check_idle(5.0) for _ in range(2)], [0.0, 5.0])
        connection.reset_idle()
        self.assertEqual(connection.check_idle(5.0), 0.0)

    def test_congested(self) -> None:
        connection = self.connected()
        connection.send(b"x" * 60000)
        self.assertFalse(connection.is_congested(1000))
        connection.send(b"x" * 60000)
        self.assertTrue(connection.is_congested(120000))
        self.assertFalse(connection.is_congested(130000))
        self.peer.payloads()
        self.assertFalse(connection.is_congested(1000))


payloads = st.text(max_size=20).map(str.encode)
whole = payloads.map(encode) | st.sampled_from([encode(b"p", PING), encode(b"", PONG), encode(b"x" * 300)])
fragments = payloads.map(
    lambda payload: build_frame(1, payload, fin=False, masked=False) + build_frame(0, b"", masked=False)
)
others = st.sampled_from(
    [
        build_frame(2, b"b", masked=False),
        build_frame(1, b"\xff", masked=False),
        build_frame(1, b"m"),
        build_frame(9, b"p" * 126, masked=False),
    ]
    + [
        build_frame(8, b"\x03\xe8", masked=False),
        build_frame(3, b"", masked=False),
        build_frame(0, b"", masked=False),
        b"\x81\x7f\xff",
    ]
)
streams = st.lists(whole | whole | fragments | others | st.binary(max_size=9), max_size=6).map(b"".join)


class GeneratedInputTests(PeerConnectionCase):
    def receive(self, pieces: list[bytes]) -> tuple[list[bytes], bool]:
        """Return the messages received in these pieces, and whether the connection is still open."""
        self.setUp()
        connection = self.connected()
        for piece in pieces:
            self.peer.protocol.dataReceived(piece)
        return self.received, connection.state == connection.STATE_OPEN

    @settings(deadline=None, max_examples=100)
    @given(streams, st.integers(1, 20))
    @example(
        encode(b"one")
        + build_frame(1, b"a", fin=False, masked=False)
        + build_frame(0, b"b", masked=False)
        + encode(b"c"),
        1,
    )
    def test_any_fragmentation(self, data: bytes, size: int) -> None:
        """The same messages are received, each of them UTF-8; an error that is logged fails the test."""
        expected = self.receive([data])
        self.assertEqual(self.receive([data[at : at + size] for at in range(0, len(data), size)]), expected)
        for payload in expected[0]:
            payload.decode()

    @settings(deadline=None, max_examples=50)
    @given(st.lists(payloads, max_size=5))
    def test_all_messages_are_received(self, sent: list[bytes]) -> None:
        self.assertEqual(self.receive([b"".join(map(encode, sent))]), (sent, True))


SECRET = b"the secret of these nodes"


class _Echo(WebSocketServerProtocol):  # type: ignore[misc]
    """Responds to each call with its params."""

    def onConnect(self, request: Any) -> Any:
        self.factory.requests.append((request.path, request.headers.get("authorization")))
        return request.protocols[0]

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        request = json.loads(payload)
        result = request["params"].get("params", True)
        response = {"jsonrpc": "2.0", "id": request["id"], "result": result}
        self.sendMessage(json.dumps(response, separators=(",", ":")).encode())

    def onClose(self, wasClean: bool, code: int, reason: str) -> None:
        if not self.factory.closed.called:
            self.factory.closed.callback((wasClean, code))


class SocketTests(TestCase):
    async def listen(self, tls: Any = None) -> tuple[Any, int]:
        from twisted.internet import reactor

        factory = WebSocketServerFactory(reactor=reactor)
        factory.protocol = _Echo
        factory.requests, factory.closed = [], Deferred()
        server = factory if tls is None else TLSMemoryBIOFactory(tls, False, factory)
        port = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(server)
        self.addCleanup(port.stopListening)
        return factory, port.getHost().port

    def make_peer_client(self, **options: Any) -> PeerClient:
        from twisted.internet import reactor

        self.cork = Cork(reactor.seconds)
        peer_client = PeerClient(
            node_id=A,
            peer_auth=PeerAuth(A, lambda: SECRET),
            reactor=reactor,
            cork=self.cork,
            metrics=Metrics(),
            heartbeat=5.0,
            lease=15.0,
            max_message_size=2000000,
            max_calls=100,
            **options,
        )
        self.addCleanup(peer_client.stop)
        return peer_client

    async def assert_calls(self, factory: Any, peer_client: PeerClient, url: str) -> None:
        target = location(url=url)
        await peer_client.connect(target)
        # Small messages, some of several reads, one larger than a transport's buffer, many in one write.
        for size in (1, 200, 70000, 1500000):
            params = b'["%b"]' % (b"x" * size)
            self.assertEqual(await self.call(peer_client, target, params), Reply(params, None))
        self.cork.cork()
        calls = [self.call(peer_client, target, b"[%d]" % n) for n in range(50)]
        self.cork.uncork()
        self.assertEqual([await call for call in calls], [Reply(b"[%d]" % n, None) for n in range(50)])
        self.assertTrue(await peer_client.has_client(target, 1.0))
        await peer_client.stop()
        self.assertEqual(await factory.closed, (True, 1001))
        ((path, authorization),) = factory.requests
        self.assertEqual(path, "/v1/backend")
        verified = PeerAuth(target.node_id, lambda: SECRET).verify(authorization, "GET", path)
        self.assertEqual(verified, A)

    def call(self, peer_client: PeerClient, target: Any, params: bytes) -> DeferredCall:
        call = DeferredCall(peer_client.cancel)
        self.assertTrue(peer_client.try_send(call, target, "m", params, 30.0))
        return call

    async def test_tcp(self) -> None:
        factory, port = await self.listen()
        await self.assert_calls(factory, self.make_peer_client(), f"ws://127.0.0.1:{port}")

    async def test_tls(self) -> None:
        authority = trustme.CA()
        factory, port = await self.listen(_certificate(authority, "localhost"))
        roots = Certificate.loadPEM(authority.cert_pem.bytes())
        await self.assert_calls(factory, self.make_peer_client(tls=PeerTLS(roots)), f"wss://localhost:{port}")

    async def test_tls_with_an_address(self) -> None:
        authority = trustme.CA()
        factory, port = await self.listen(_certificate(authority, "127.0.0.1"))
        roots = Certificate.loadPEM(authority.cert_pem.bytes())
        await self.assert_calls(factory, self.make_peer_client(tls=PeerTLS(roots)), f"wss://127.0.0.1:{port}")

    async def assert_not_verified(self, host: str, reason: str, trusted: bool = True) -> None:
        authority = trustme.CA()
        factory, port = await self.listen(_certificate(authority, host))
        root = Certificate.loadPEM((authority if trusted else trustme.CA()).cert_pem.bytes())
        for peer_client in (self.make_peer_client(tls=PeerTLS(root)), self.make_peer_client()):
            with self.assertRaises(PeerUnreachableError) as caught:
                await peer_client.has_client(location(url=f"wss://localhost:{port}"), 5.0)
            self.assertFalse(caught.exception.sent)
            if peer_client._pool._tls._trust_root is not None:
                self.assertIn(reason, str(caught.exception))
        self.assertEqual(factory.requests, [])

    async def test_tls_with_another_host(self) -> None:
        """Nothing is sent to it, nor to a host whose certificate is not trusted by the platform."""
        await self.assert_not_verified("other.example", "not for the host in this url")

    async def test_tls_with_another_authority(self) -> None:
        await self.assert_not_verified("localhost", "certificate verify failed", trusted=False)

    async def test_connection_refused(self) -> None:
        from twisted.internet import reactor

        listening = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(WebSocketServerFactory())
        port = listening.getHost().port
        await listening.stopListening()
        with self.assertRaises(PeerUnreachableError) as caught:
            await self.make_peer_client().has_client(location(url=f"ws://127.0.0.1:{port}"), 1.0)
        self.assertTrue(caught.exception.refused)


def _certificate(authority: trustme.CA, host: str) -> CertificateOptions:
    pem = authority.issue_cert(host).private_key_and_cert_chain_pem.bytes()
    return PrivateCertificate.loadPEM(pem).options()
