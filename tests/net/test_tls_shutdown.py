"""How connections with TLS end: as they should, or by what should not come."""

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
    def pair(self, **more: Any) -> TLSPair:
        pair = TLSPair(self.certificates(), **more)
        pair.handshake()
        return pair

    def lose(self, pair: TLSPair, reason: Exception) -> None:
        pair.wrapper.connectionLost(Failure(reason))

    def test_the_server_ends_it(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            pair = self.pair(configure=only_version(version))
            pair.server.transport.write(b"good-bye")
            pair.server.transport.loseConnection()
            self.assertFalse(pair.transport.disconnecting)
            pair.exchange()
            self.assertEqual(pair.received, b"good-bye")
            # The client answers, and only then is the transport closed.
            pair.client.unwrap()
            pair.wrapper.dataReceived(pair.outgoing.read())
            self.assertTrue(pair.transport.disconnecting)
            self.lose(pair, ConnectionDone())
            self.assertTrue(pair.server.lost.check(ConnectionDone))

    def test_the_client_ends_it(self) -> None:
        pair = self.pair()
        with self.assertRaises(ssl.SSLWantReadError):
            pair.client.unwrap()
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertTrue(pair.transport.disconnecting)
        pair.incoming.write(pair.transport.value())
        pair.client.unwrap()
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(ConnectionDone))

    def test_what_comes_with_the_end_is_not_lost(self) -> None:
        pair = self.pair()
        pair.client.write(b"last words")
        with self.assertRaises(ssl.SSLWantReadError):
            pair.client.unwrap()
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertEqual(pair.server.received, b"last words")

    def test_what_was_on_its_way_when_the_server_ended_it(self) -> None:
        class Ending(EchoProtocol):
            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                self.transport.loseConnection()

        pair = TLSPair(self.certificates(), protocol=Ending)
        pair.handshake()
        pair.server.echoes = False
        # Two records in one segment, and more behind them.
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

    def test_a_connection_that_breaks_off(self) -> None:
        pair = self.pair()
        self.lose(pair, ConnectionLost())
        self.assertTrue(pair.server.lost.check(ConnectionLost))

    def test_one_that_ends_without_a_word_of_tls(self) -> None:
        """Twisted has it that bytes may be missing."""
        pair = self.pair()
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(ConnectionLost))

    def test_it_is_aborted(self) -> None:
        pair = self.pair()
        pair.wrapper.abortConnection()
        self.assertTrue(pair.transport.disconnected or pair.transport.disconnecting)
        pair.wrapper.dataReceived(b"more")
        self.assertEqual(pair.server.received, b"")

    def test_garbage_instead_of_a_handshake(self) -> None:
        pair = TLSPair(self.certificates())
        pair.wrapper.dataReceived(b"GET / HTTP/1.1\r\n\r\n")
        self.assertTrue(pair.transport.disconnecting)
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(SSL.Error))

    def test_garbage_after_it(self) -> None:
        pair = self.pair()
        pair.wrapper.dataReceived(b"\x17\x03\x03\x00\x20" + bytes(32))
        self.assertTrue(pair.transport.disconnecting)
        self.assertEqual(pair.server.received, b"")
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(SSL.Error))

    def test_an_end_in_the_handshake(self) -> None:
        pair = TLSPair(self.certificates())
        pair.client_read()
        pair.wrapper.dataReceived(pair.outgoing.read()[:100])
        self.lose(pair, ConnectionDone())
        self.assertIsNotNone(pair.server.lost)

    def test_closing_before_the_handshake_is_over(self) -> None:
        pair = TLSPair(self.certificates())
        pair.wrapper.loseConnection()
        self.assertTrue(pair.transport.disconnected or pair.transport.disconnecting)

    def test_old_versions_are_refused(self) -> None:
        self.assertEqual(self.certificates().context.minimum_version, ssl.TLSVersion.TLSv1_2)
        # Where this OpenSSL still speaks them.
        for version in [ssl.TLSVersion.TLSv1_1] * ssl.HAS_TLSv1_1 + [ssl.TLSVersion.TLSv1] * ssl.HAS_TLSv1:
            pair = TLSPair(self.certificates(), configure=only_version(version))
            with self.assertRaisesRegex(ssl.SSLError, "ALERT_PROTOCOL_VERSION"):
                pair.handshake()
            self.assertTrue(pair.transport.disconnecting)
        pair = TLSPair(self.certificates(method="TLSv1_2_METHOD"))
        pair.handshake()
        self.assertEqual(pair.client.version(), "TLSv1.2")


class HostileClientTests(FilesTestCase):
    """What a client may do that means no good."""

    def test_a_handshake_that_takes_too_long(self) -> None:
        for said in (0, 1, 100):
            pair = TLSPair(self.certificates())
            pair.client_read()
            hello = pair.outgoing.read()
            pair.wrapper.dataReceived(hello[:said])
            for byte in range(5):
                pair.clock.advance(1)
                pair.wrapper.dataReceived(hello[said + byte : said + byte + 1])
                self.assertFalse(pair.transport.disconnected)
            pair.clock.advance(0.5)
            self.assertTrue(pair.transport.disconnected)
            self.lose(pair)
            self.assertEqual(pair.clock.getDelayedCalls(), [])

    def lose(self, pair: TLSPair) -> None:
        pair.wrapper.connectionLost(Failure(ConnectionDone()))
        self.assertIsNotNone(pair.server.lost)

    def test_one_that_was_over_in_time(self) -> None:
        pair = TLSPair(self.certificates())
        pair.handshake()
        self.assertEqual(pair.clock.getDelayedCalls(), [])
        pair.clock.advance(60)
        pair.send(b"still here")
        self.assertEqual(pair.received, b"still here")

    def test_one_that_breaks_off(self) -> None:
        pair = TLSPair(self.certificates())
        self.lose(pair)
        self.assertEqual(pair.clock.getDelayedCalls(), [])

    def test_a_connection_that_ends_as_it_begins(self) -> None:
        class Refusing(EchoProtocol):
            def connectionMade(self) -> None:
                self.transport.abortConnection()

        pair = TLSPair(self.certificates(), protocol=Refusing)
        self.assertTrue(pair.transport.disconnected)
        self.lose(pair)
        self.assertEqual(pair.clock.getDelayedCalls(), [])

    def test_a_handshake_without_end(self) -> None:
        """OpenSSL would keep up to 128 KiB of each."""
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

    def test_all_of_it_at_once(self) -> None:
        """The last of the handshake may come in one segment with a lot that it is for."""
        pair = TLSPair(self.certificates())
        pair.server.echoes = False
        pair.client_read()
        pair.wrapper.dataReceived(pair.outgoing.read())
        pair.incoming.write(pair.transport.value())
        pair.client.do_handshake()
        pair.client.write(bytes(3 * MAX_HANDSHAKE_SIZE))
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertEqual(pair.server.received, bytes(3 * MAX_HANDSHAKE_SIZE))

    def test_answers_that_nobody_reads(self) -> None:
        """TLS itself has requests, such as for new keys; what they are answered is memory as long as it is not read."""
        pair = TLSPair(self.certificates())
        pair.handshake()
        connection = pair.wrapper._tlsConnection
        read, asked = connection._ssl_object.read, []

        class Asking:
            def __getattr__(self, name: str) -> Any:
                return getattr(self_tls, name)

            def read(self, *args: Any) -> int:
                asked.append(connection._outgoing_bio.write(b"an answer of OpenSSL's own"))
                return read(*args)

        self_tls, connection._ssl_object = connection._ssl_object, Asking()
        for _ in range(500):
            if not pair.transport.disconnecting:
                pair.client.write(b"x")
                pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertTrue(pair.transport.disconnecting)
        self.assertLess(sum(asked), MAX_UNSOLICITED_SIZE + 2 * CHUNK_SIZE)
        self.lose(pair)

    def test_what_is_no_tls(self) -> None:
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x80\x2e\x01\0\x02" + bytes(50), b"\x16\x03\x01\xff\xff" + bytes(99)):
            pair = TLSPair(self.certificates())
            pair.wrapper.dataReceived(said)
            self.assertTrue(pair.transport.disconnecting, said)
            self.lose(pair)
            self.assertEqual(pair.clock.getDelayedCalls(), [])

    @settings(deadline=None, max_examples=60)
    @given(st.binary(min_size=1, max_size=3000), st.integers(1, 1000), st.booleans())
    def test_whatever_comes(self, data: bytes, step: int, after: bool) -> None:
        """No error but that of TLS, and nothing for the protocol."""
        pair = TLSPair(_CERTIFICATES)
        if after:
            pair.handshake()
        for at in range(0, len(data), step):
            pair.wrapper.dataReceived(data[at : at + step])
        self.assertEqual(pair.server.received, b"")
        self.lose(pair)
