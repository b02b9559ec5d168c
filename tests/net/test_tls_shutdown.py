"""Tests of gateway.net.tls: how connections end, and hostile clients."""

from __future__ import annotations

import ssl
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.python.failure import Failure

from gateway.net.certificates import Certificates
from gateway.net.tls import CHUNK_SIZE, MAX_HANDSHAKE_SIZE, MAX_UNSOLICITED_SIZE
from tests.builders.tls import EchoProtocol, FilesTestCase, TLSPair, combined_certificates, only_version

_CERTIFICATES: Certificates = combined_certificates()


class ShutdownTests(FilesTestCase):
    def pair(self, **options: Any) -> TLSPair:
        pair = TLSPair(self.certificates(), **options)
        pair.handshake()
        return pair

    def lose(self, pair: TLSPair, reason: Exception) -> None:
        pair.wrapper.connectionLost(Failure(reason))

    def test_server_closes(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            pair = self.pair(configure=only_version(version))
            pair.server.transport.write(b"good-bye")
            pair.server.transport.loseConnection()
            self.assertFalse(pair.transport.disconnecting)
            pair.exchange()
            self.assertEqual(pair.received, b"good-bye")
            # The transport is closed only after the response of the client.
            pair.client.unwrap()
            pair.wrapper.dataReceived(pair.outgoing.read())
            self.assertTrue(pair.transport.disconnecting)
            self.lose(pair, ConnectionDone())
            self.assertTrue(pair.server.lost.check(ConnectionDone))

    def test_client_closes(self) -> None:
        pair = self.pair()
        with self.assertRaises(ssl.SSLWantReadError):
            pair.client.unwrap()
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertTrue(pair.transport.disconnecting)
        pair.incoming.write(pair.transport.value())
        pair.client.unwrap()
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(ConnectionDone))

    def test_data_before_close_notify_is_delivered(self) -> None:
        pair = self.pair()
        pair.client.write(b"last words")
        with self.assertRaises(ssl.SSLWantReadError):
            pair.client.unwrap()
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertEqual(pair.server.received, b"last words")

    def test_data_in_transit_when_the_server_closes_is_delivered(self) -> None:
        class ClosesOnData(EchoProtocol):
            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                self.transport.loseConnection()

        pair = TLSPair(self.certificates(), protocol=ClosesOnData)
        pair.handshake()
        pair.server.echoes = False
        # Two records in one segment, then another one.
        pair.client.write(b"first")
        pair.client.write(b"second")
        pair.wrapper.dataReceived(pair.outgoing.read())
        pair.client.write(b"third")
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertEqual(pair.server.received, b"firstsecondthird")
        self.assertFalse(pair.transport.disconnecting)
        pair.incoming.write(pair.transport.value())
        pair.client.unwrap()
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertTrue(pair.transport.disconnecting)

    def test_connection_lost(self) -> None:
        pair = self.pair()
        self.lose(pair, ConnectionLost())
        self.assertTrue(pair.server.lost.check(ConnectionLost))

    def test_end_without_close_notify(self) -> None:
        """Twisted reports ConnectionLost, since data may be missing."""
        pair = self.pair()
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(ConnectionLost))

    def test_abort_connection(self) -> None:
        pair = self.pair()
        pair.wrapper.abortConnection()
        self.assertTrue(pair.transport.disconnected or pair.transport.disconnecting)
        pair.wrapper.dataReceived(b"more")
        self.assertEqual(pair.server.received, b"")

    def test_invalid_bytes_in_place_of_a_handshake(self) -> None:
        pair = TLSPair(self.certificates())
        pair.wrapper.dataReceived(b"GET / HTTP/1.1\r\n\r\n")
        self.assertTrue(pair.transport.disconnecting)
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(SSL.Error))

    def test_invalid_record_after_the_handshake(self) -> None:
        pair = self.pair()
        pair.wrapper.dataReceived(b"\x17\x03\x03\x00\x20" + bytes(32))
        self.assertTrue(pair.transport.disconnecting)
        self.assertEqual(pair.server.received, b"")
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(SSL.Error))

    def test_connection_lost_in_the_handshake(self) -> None:
        pair = TLSPair(self.certificates())
        pair.client_read()
        pair.wrapper.dataReceived(pair.outgoing.read()[:100])
        self.lose(pair, ConnectionDone())
        self.assertIsNotNone(pair.server.lost)

    def test_close_before_the_handshake_completes(self) -> None:
        pair = TLSPair(self.certificates())
        pair.wrapper.loseConnection()
        self.assertTrue(pair.transport.disconnected or pair.transport.disconnecting)

    def test_old_versions_are_refused(self) -> None:
        self.assertEqual(self.certificates().context.minimum_version, ssl.TLSVersion.TLSv1_2)
        # If this OpenSSL still supports them.
        for version in [ssl.TLSVersion.TLSv1_1] * ssl.HAS_TLSv1_1 + [ssl.TLSVersion.TLSv1] * ssl.HAS_TLSv1:
            pair = TLSPair(self.certificates(), configure=only_version(version))
            with self.assertRaisesRegex(ssl.SSLError, "ALERT_PROTOCOL_VERSION"):
                pair.handshake()
            self.assertTrue(pair.transport.disconnecting)
        pair = TLSPair(self.certificates(method="TLSv1_2_METHOD"))
        pair.handshake()
        self.assertEqual(pair.client.version(), "TLSv1.2")


class HostileClientTests(FilesTestCase):
    def test_handshake_timeout(self) -> None:
        for sent in (0, 1, 100):
            pair = TLSPair(self.certificates())
            pair.client_read()
            hello = pair.outgoing.read()
            pair.wrapper.dataReceived(hello[:sent])
            for byte in range(5):
                pair.clock.advance(1)
                pair.wrapper.dataReceived(hello[sent + byte : sent + byte + 1])
                self.assertFalse(pair.transport.disconnected)
            pair.clock.advance(0.5)
            self.assertTrue(pair.transport.disconnected)
            self.lose(pair)
            self.assertEqual(pair.clock.getDelayedCalls(), [])

    def lose(self, pair: TLSPair) -> None:
        pair.wrapper.connectionLost(Failure(ConnectionDone()))
        self.assertIsNotNone(pair.server.lost)

    def test_completed_handshake_has_no_timer(self) -> None:
        pair = TLSPair(self.certificates())
        pair.handshake()
        self.assertEqual(pair.clock.getDelayedCalls(), [])
        pair.clock.advance(60)
        pair.send(b"still here")
        self.assertEqual(pair.received, b"still here")

    def test_lost_connection_has_no_timer(self) -> None:
        pair = TLSPair(self.certificates())
        self.lose(pair)
        self.assertEqual(pair.clock.getDelayedCalls(), [])

    def test_connection_aborted_in_connection_made(self) -> None:
        class Refusing(EchoProtocol):
            def connectionMade(self) -> None:
                self.transport.abortConnection()

        pair = TLSPair(self.certificates(), protocol=Refusing)
        self.assertTrue(pair.transport.disconnected)
        self.lose(pair)
        self.assertEqual(pair.clock.getDelayedCalls(), [])

    def test_size_of_a_handshake_is_limited(self) -> None:
        """OpenSSL would buffer up to 128 KiB for each connection."""
        pair = TLSPair(self.certificates())
        # A ClientHello of 130,000 bytes, in records of 16 KiB.
        hello = b"\x01" + (130_000).to_bytes(3, "big") + b"\x03\x03" + bytes(32) + b"\0" + b"\x7f\xfe" + bytes(130_000)
        sent = 0
        while not pair.transport.disconnecting:
            record = b"\x16\x03\x01\x40\x00" + hello[sent : sent + 16384]
            for at in range(0, len(record), 1000):
                if not pair.transport.disconnecting:
                    pair.wrapper.dataReceived(record[at : at + 1000])
            sent += 16384
        self.assertLessEqual(sent, MAX_HANDSHAKE_SIZE + 16384)
        self.lose(pair)
        self.assertTrue(pair.server.lost.check(SSL.Error))

    def test_data_after_the_handshake_in_one_segment(self) -> None:
        """Data in the same segment as the end of the handshake does not count as handshake."""
        pair = TLSPair(self.certificates())
        pair.server.echoes = False
        pair.client_read()
        pair.wrapper.dataReceived(pair.outgoing.read())
        pair.incoming.write(pair.transport.value())
        pair.client.do_handshake()
        pair.client.write(bytes(3 * MAX_HANDSHAKE_SIZE))
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertEqual(pair.server.received, bytes(3 * MAX_HANDSHAKE_SIZE))

    def test_unread_responses_of_openssl_are_limited(self) -> None:
        """TLS itself has requests, such as KeyUpdates; unread responses to them use memory."""
        pair = TLSPair(self.certificates())
        pair.handshake()
        connection = pair.wrapper._tlsConnection
        read, sizes = connection._ssl_object.read, []

        class RespondsOnRead:
            def __getattr__(self, name: str) -> Any:
                return getattr(ssl_object, name)

            def read(self, *args: Any) -> int:
                sizes.append(connection._outgoing_bio.write(b"a response of OpenSSL itself"))
                return read(*args)

        ssl_object, connection._ssl_object = connection._ssl_object, RespondsOnRead()
        for _ in range(500):
            if not pair.transport.disconnecting:
                pair.client.write(b"x")
                pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertTrue(pair.transport.disconnecting)
        self.assertLess(sum(sizes), MAX_UNSOLICITED_SIZE + 2 * CHUNK_SIZE)
        self.lose(pair)

    def test_bytes_that_are_not_tls(self) -> None:
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x80\x2e\x01\0\x02" + bytes(50), b"\x16\x03\x01\xff\xff" + bytes(99)):
            pair = TLSPair(self.certificates())
            pair.wrapper.dataReceived(data)
            self.assertTrue(pair.transport.disconnecting, data)
            self.lose(pair)
            self.assertEqual(pair.clock.getDelayedCalls(), [])

    @settings(deadline=None, max_examples=60)
    @given(st.binary(min_size=1, max_size=3000), st.integers(1, 1000), st.booleans())
    def test_any_bytes(self, data: bytes, step: int, after_handshake: bool) -> None:
        """They cause only TLS errors, and the protocol receives nothing."""
        pair = TLSPair(_CERTIFICATES)
        if after_handshake:
            pair.handshake()
        for at in range(0, len(data), step):
            pair.wrapper.dataReceived(data[at : at + step])
        self.assertEqual(pair.server.received, b"")
        self.lose(pair)
