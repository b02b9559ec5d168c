"""Tests of gateway.net.tls in memory, with OpenSSL as the client.

tests.cluster.test_auth and tests.net.test_http_client test TLS over real connections.
"""

from __future__ import annotations

import datetime
import random
import ssl
from collections import Counter
from typing import Any
from unittest import mock

import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.endpoints import TCP4ServerEndpoint, quoteStringArgument, serverFromString
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHandshakeListener, IProtocolNegotiationFactory, ISSLTransport
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.net import tls
from gateway.net.proxy_protocol import ProxyProtocolEndpoint
from gateway.net.tls import (
    CHUNK_SIZE,
    CREDIT_PER_SECOND,
    EMPTY_RECORD_COST,
    MAX_CREDIT,
    MAX_RECORD_SIZE,
    RECORD_COST,
    MemoryBIOConnection,
    TLSFactory,
    TLSHandshakeErrors,
    describe_tls_error,
    split_description,
)
from tests.builders.tls import CA, CHAIN, KEY, EchoProtocol, FilesTestCase, TLSPair, combined_certificates, only_version


class SplitDescriptionTests(SynchronousTestCase):
    def test_fields(self) -> None:
        for description, fields in [
            ("ssl:1", ["ssl", "1"]),
            ("ssl:1:interface=::1", ["ssl", "1", ("interface", ""), "", "1"]),
            (r"ssl:1:interface=\:\:1", ["ssl", "1", ("interface", "::1")]),
            (r"ssl:a\=b:c=d=e:\\", ["ssl", "a=b", ("c", "d=e"), "\\"]),
            ("ssl:", ["ssl", ""]),
            ("ssl:=:=a", ["ssl", ("", ""), ("", "a")]),
            ("ssl:a\\", ["ssl", "a"]),
        ]:
            self.assertEqual(split_description(description), fields)

    @settings(deadline=None)
    @given(
        st.lists(st.text().filter(lambda text: "=" not in text)),
        st.lists(st.tuples(st.text("abc", min_size=1), st.text())),
    )
    def test_fields_quoted_by_twisted(self, texts: list[str], pairs: list[tuple[str, str]]) -> None:
        quoted = [quoteStringArgument(text) for text in texts]
        quoted += [f"{name}={quoteStringArgument(value)}" for name, value in pairs]
        self.assertEqual(split_description(":".join(["ssl", *quoted])), ["ssl", *texts, *pairs])


class EndpointTests(FilesTestCase):
    def test_address_and_backlog(self) -> None:
        key, chain, extra = self.write_file(KEY), self.write_file(CHAIN[0]), self.write_file(b"".join(CHAIN[1:]))
        reactor, factory = MemoryReactorClock(), Factory()
        description = rf"ssl:8443:interface=\:\:1:backlog=4096:privateKey={key}:certKey={chain}:extraCertChain={extra}"
        self.assertTrue(tls.is_tls(description))
        self.successResultOf(tls.parse_endpoint(reactor, description).listen(factory))
        ((port, tls_factory, backlog, interface),) = reactor.tcpServers
        self.assertEqual((port, backlog, interface), (8443, 4096, "::1"))
        self.assertIs(tls_factory.wrappedFactory, factory)

    def test_defaults_are_those_of_twisted(self) -> None:
        together = self.write_file(KEY + b"".join(CHAIN))
        reactor = MemoryReactorClock()
        self.successResultOf(tls.parse_endpoint(reactor, f"ssl:1:{together}").listen(Factory()))
        ((_, _, backlog, interface),) = reactor.tcpServers
        self.assertEqual((backlog, interface), (50, ""))
        with self.assertRaisesRegex(FileNotFoundError, "server.pem"):
            tls.parse_endpoint(reactor, "ssl:1")

    def test_client_certificates(self) -> None:
        pem, authority = self.write_file(KEY + b"".join(CHAIN)), self.write_file(CA.cert_pem.bytes())
        for rest, mode in [
            (f":clientCAs={authority}", ssl.CERT_REQUIRED),
            (f":clientCAs={authority}:required=yes", ssl.CERT_REQUIRED),
            (f":required=no:clientCAs={authority}", ssl.CERT_OPTIONAL),
        ]:
            self.assertTrue(tls.is_tls(f"mtls:1:{pem}{rest}"))
            endpoint = tls.parse_endpoint(MemoryReactorClock(), f"mtls:1:{pem}{rest}")
            self.assertEqual(endpoint.certificates.context.verify_mode, mode)
        self.assertEqual(self.certificates().context.verify_mode, ssl.CERT_NONE)
        for rest, problem in [
            ("", "clientCAs=FILE is missing"),
            (":clientCAs=", "clientCAs=FILE is missing"),
            (":clientCAs=/no/such", "/no/such"),
            (f":clientCAs={self.write_file(KEY)}", "has no certificate"),
            (f":clientCAs={authority}:required=maybe", "required must be yes or no"),
            (f":clientCAs={authority}:colour=red", "mtls: got an unexpected .*colour"),
        ]:
            with self.assertRaisesRegex((ValueError, TypeError, OSError), problem, msg=rest):
                tls.parse_endpoint(MemoryReactorClock(), f"mtls:1:{pem}{rest}")

    def test_mtls_is_available_to_any_twisted_program(self) -> None:
        pem, authority = self.write_file(KEY + b"".join(CHAIN)), self.write_file(CA.cert_pem.bytes())
        reactor = MemoryReactorClock()
        description = f"mtls:8443:privateKey={pem}:clientCAs={authority}:interface=127.0.0.1:backlog=1024"
        self.successResultOf(serverFromString(reactor, description).listen(Factory()))
        ((port, factory, backlog, interface),) = reactor.tcpServers
        self.assertIsInstance(factory, TLSFactory)
        self.assertEqual((port, backlog, interface), (8443, 1024, "127.0.0.1"))
        with self.assertRaisesRegex(ValueError, "clientCAs=FILE is missing"):
            serverFromString(reactor, f"mtls:8443:privateKey={pem}")

    def test_layer_between_tcp_and_tls(self) -> None:
        pem, reactor, wrapped = self.write_file(KEY + b"".join(CHAIN)), MemoryReactorClock(), []
        endpoint = tls.parse_endpoint(
            reactor, f"ssl:1:{pem}", lambda tcp: wrapped.append(tcp) or ProxyProtocolEndpoint(tcp)
        )
        self.successResultOf(endpoint.listen(Factory()))
        self.assertIsInstance(wrapped[0], TCP4ServerEndpoint)
        self.assertIsInstance(reactor.tcpServers[0][1].wrappedFactory, TLSFactory)

    def test_refuses_invalid_endpoint_strings(self) -> None:
        key, chain = self.write_file(KEY), self.write_file(b"".join(CHAIN))
        for rest, problem in [
            ("", "invalid literal"),
            (f"x:{key}:{chain}", "invalid literal"),
            (f"1:{key}:{chain}:backlog=x", "invalid literal"),
            (f"1:{key}:{chain}:colour=red", "ssl: got an unexpected .*colour"),
            (f"1:{key}:{chain}:clientCAs={chain}", "use mtls:"),
            (f"1:{key}:{chain}:privateKey={key}", "ssl: got multiple values .*privateKey"),
            (f"1:{key}:{chain}:SSLv3_METHOD", "sslmethod=SSLv3_METHOD is not one of TLS_METHOD"),
            ("1:/no/such", "/no/such"),
            (f"1:{key}:/no/such", "/no/such"),
            (f"1:{key}:{chain}:extraCertChain=/no/such", "/no/such"),
            (f"1:{key}:{chain}:dhParameters=/no/such", "/no/such"),
            (f"1:{key}:{key}", f"{key} has no certificate"),
            (f"1:{key}:{chain}:extraCertChain={key}", f"{key} has no certificate"),
            (f"1:{chain}:{chain}:extraCertChain={chain}", f"{chain} cannot be used: "),
            (f"1:{key}:{chain}:dhParameters={key}", f"{key} cannot be used: "),
        ]:
            with self.assertRaisesRegex((ValueError, TypeError, OSError), problem, msg=rest):
                tls.parse_endpoint(MemoryReactorClock(), f"ssl:{rest}")


class ConnectionTests(FilesTestCase):
    def test_handshake_and_echo(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            pair = TLSPair(self.certificates(), configure=only_version(version))
            pair.handshake()
            self.assertEqual(pair.client.version(), version.name.replace("_", "."))
            pair.send(b"hello")
            self.assertEqual(pair.received, b"hello")
            self.assertTrue(ISSLTransport.providedBy(pair.wrapper))

    def test_messages_and_chunks_of_any_size(self) -> None:
        chance = random.Random(7)
        for max_size in (3, 1000, CHUNK_SIZE, CHUNK_SIZE + 1, 70000):
            pair = TLSPair(self.certificates(), next_chunk_size=lambda max_size=max_size: chance.randint(1, max_size))
            pair.handshake()
            sent = b""
            for size in (1, 100, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 16384, 16385, 100000):
                data = chance.randbytes(size)
                pair.send(data)
                sent += data
            self.assertEqual(pair.server.received, sent)
            self.assertEqual(pair.received, sent)

    def test_server_can_write_before_the_handshake_completes(self) -> None:
        class WritesAtOnce(EchoProtocol):
            def connectionMade(self) -> None:
                self.transport.write(b"welcome" * 2000)

        pair = TLSPair(self.certificates(), protocol=WritesAtOnce)
        pair.handshake()
        self.assertEqual(pair.received, b"welcome" * 2000)

    def test_data_passes_openssl_in_chunks(self) -> None:
        """The buffers of OpenSSL never shrink."""
        pair = TLSPair(self.certificates())
        pair.handshake()
        connection = pair.wrapper._tlsConnection
        pair.server.echoes = False
        largest = [0, 0]
        incoming, outgoing = connection._incoming_bio, connection._outgoing_bio

        class WatchedBIO:
            def __init__(self, bio: ssl.MemoryBIO, index: int) -> None:
                self.bio, self.index = bio, index

            @property
            def pending(self) -> int:
                return self.bio.pending

            def write(self, data: bytes) -> int:
                largest[self.index] = max(largest[self.index], self.bio.pending + len(data))
                return self.bio.write(data)

            def read(self, size: int) -> bytes:
                largest[self.index] = max(largest[self.index], self.bio.pending)
                return self.bio.read(size)

        connection._incoming_bio, connection._outgoing_bio = WatchedBIO(incoming, 0), WatchedBIO(outgoing, 1)
        pair.send(bytes(1000000))
        self.assertEqual(len(pair.server.received), 1000000)
        pair.server.transport.write(bytes(1000000))
        pair.exchange()
        self.assertEqual(len(pair.received), 1000000)
        self.assertEqual(largest[0], CHUNK_SIZE)
        # One chunk as a TLS record.
        self.assertLess(CHUNK_SIZE, largest[1])
        self.assertLess(largest[1], CHUNK_SIZE + 100)

    def test_handshake_listener(self) -> None:
        done = []

        @implementer(IHandshakeListener)
        class Listener(EchoProtocol):
            def handshakeCompleted(self) -> None:
                done.append(self.transport.negotiatedProtocol)
                self.assertion = self.transport.getPeerCertificate()

        pair = TLSPair(self.certificates(), protocol=Listener)
        pair.handshake()
        self.assertEqual(done, [None])
        self.assertIsNone(pair.server.assertion)

    def test_alpn(self) -> None:
        @implementer(IProtocolNegotiationFactory)
        class ALPNFactory(Factory):
            protocol = EchoProtocol

            def acceptableProtocols(self) -> list[bytes]:
                return [b"http/1.1"]

        path, reactor = self.write_file(KEY + b"".join(CHAIN)), MemoryReactorClock()
        endpoint = tls.parse_endpoint(reactor, f"ssl:1:{path}")
        self.successResultOf(endpoint.listen(ALPNFactory()))
        certificates = endpoint.certificates
        for _ in range(2):
            for offered, chosen in [(["h2", "http/1.1"], b"http/1.1"), (["h2"], None)]:
                pair = TLSPair(
                    certificates, configure=lambda context, offered=offered: context.set_alpn_protocols(offered)
                )
                pair.handshake()
                self.assertEqual(pair.wrapper.negotiatedProtocol, chosen)
            certificates.load()


class PyOpenSSLTests(FilesTestCase):
    def test_without_input(self) -> None:
        connection = MemoryBIOConnection(self.certificates().context)
        self.assertRaises(SSL.WantReadError, connection.bio_read, 10)
        self.assertRaises(SSL.WantReadError, connection.do_handshake)
        self.assertRaises(SSL.WantReadError, connection.send, b"x")
        self.assertEqual(connection.get_alpn_proto_negotiated(), b"")


class DescribeTLSErrorTests(SynchronousTestCase):
    def test_descriptions(self) -> None:
        for error, expected in [
            (ConnectionDone(), "^$"),
            (None, "^$"),
            (VerificationError([]), "^its certificate is not for the host"),
            (SSL.Error([("SSL routines", "", "certificate verify failed")]), "SSL_CERT_FILE"),
            (SSL.Error([("SSL routines", "", "wrong version number")]), r"^TLS failed \(wrong version number\)$"),
            (SSL.Error([]), "TLS failed"),
            (SSL.Error(), "TLS failed"),
            (SSL.ZeroReturnError(), "TLS failed"),
            (SSL.SysCallError(-1, "Unexpected EOF"), "TLS failed"),
        ]:
            self.assertRegex(describe_tls_error(error), expected)
            self.assertNotIn("\n", describe_tls_error(error))


_BOTH_VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
_CERTIFICATES = combined_certificates()


class RecordCreditTests(FilesTestCase):
    def pair(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> TLSPair:
        pair = TLSPair(self.certificates(), configure=only_version(version))
        pair.handshake()
        pair.server.echoes = False
        pair.wrapper.factory.handshake_errors = TLSHandshakeErrors("listen", Metrics(), pair.clock.seconds)
        return pair

    def failures(self, pair: TLSPair) -> Counter[str]:
        failures: Any = pair.wrapper.factory.handshake_errors
        return Counter(failures._metrics.tls_failures)

    def records(self, pair: TLSPair, count: int, size: int = 1) -> bytes:
        for _ in range(count):
            pair.client.write(bytes(size))
        return pair.outgoing.read()

    def test_available_records_are_delivered_at_once(self) -> None:
        pair = self.pair()
        with mock.patch.object(pair.server, "dataReceived", side_effect=pair.server.dataReceived) as data_received:
            pair.wrapper.dataReceived(self.records(pair, 700))
        self.assertEqual(data_received.call_count, 1)
        self.assertEqual(len(pair.server.received), 700)

    def test_endless_records_of_one_byte_are_refused(self) -> None:
        for version in _BOTH_VERSIONS:
            pair = self.pair(version)
            count = 0
            while not pair.transport.disconnecting and count < 10000:
                pair.wrapper.dataReceived(self.records(pair, 100))
                count += 100
            self.assertTrue(MAX_CREDIT // RECORD_COST <= count <= MAX_CREDIT // RECORD_COST + 300, count)
            self.assertEqual(self.failures(pair), {"records": 1})

    def test_a_rate_within_the_credit_is_accepted_forever(self) -> None:
        pair = self.pair()
        for _ in range(20):
            pair.wrapper.dataReceived(self.records(pair, CREDIT_PER_SECOND // RECORD_COST))
            pair.clock.advance(1)
        self.assertFalse(pair.transport.disconnecting)

    def test_endless_small_messages_are_accepted(self) -> None:
        for version in _BOTH_VERSIONS:
            pair = self.pair(version)
            for _ in range(20):
                pair.wrapper.dataReceived(self.records(pair, 1000, RECORD_COST))
            self.assertFalse(pair.transport.disconnecting)
            self.assertEqual(len(pair.server.received), 20000 * RECORD_COST)

    def test_records_without_plaintext(self) -> None:
        """Such as KeyUpdates, which Python cannot send: OpenSSL accepts them and returns no plaintext."""
        pair = self.pair()
        connection = pair.wrapper._tlsConnection
        connection._incoming_bio = mock.Mock()
        sent = 0
        while not pair.transport.disconnecting and sent < 10000:
            pair.wrapper.dataReceived(b"\x17\x03\x03\0\x16" + bytes(22))
            sent += 1
        self.assertEqual(sent, MAX_CREDIT // EMPTY_RECORD_COST + 1)
        self.assertEqual(self.failures(pair), {"records": 1})

    def test_records_without_plaintext_cost_the_same_between_others(self) -> None:
        connection = MemoryBIOConnection(_CERTIFICATES.context)
        connection._handshake_done, connection._ssl_object = True, mock.Mock(read=mock.Mock(return_value=1))
        for _ in range(100):
            connection._feed_openssl(0)
            connection._pending_input = b"\x17\x03\x03\0\x16" + bytes(22) + b"\x17\x03\x03\0\x12" + bytes(18)
            connection._feed_openssl(1000)
            connection._read_record(0)
        self.assertEqual(connection._record_credit, MAX_CREDIT - 100 * (EMPTY_RECORD_COST + RECORD_COST - 1))

    @given(st.lists(st.integers(0, MAX_RECORD_SIZE + 256), max_size=30), st.integers(0, 2**32))
    def test_records_are_counted_in_chunks_of_any_size(self, sizes: list[int], seed: int) -> None:
        chance, connection = random.Random(seed), MemoryBIOConnection(_CERTIFICATES.context)
        data = b"".join(b"\x17\x03\x03" + size.to_bytes(2, "big") + bytes(size) for size in sizes)
        at = counted = 0
        while at < len(data):
            step = chance.choice((1, 2, 3, 7, 4096))
            counted += connection._count_records(data[at : at + step])
            at += step
        self.assertEqual(counted, len(sizes))


class ResumptionTests(FilesTestCase):
    def test_ticket_does_not_outlast_the_certificate(self) -> None:
        """With TLS 1.2; with TLS 1.3 there are no tickets."""
        authority = self.write_file(CA.cert_pem.bytes())
        certificates = self.certificates(client_cas=authority)
        soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)
        own = CA.issue_cert("robot-7", not_after=soon)
        context = ssl.create_default_context(cadata=CA.cert_pem.bytes().decode())
        only_version(ssl.TLSVersion.TLSv1_2)(context)
        own.configure_cert(context)
        first = TLSPair(certificates, context=context)
        first.handshake()
        again = TLSPair(certificates, context=context, session=first.client.session)
        again.handshake()
        self.assertTrue(again.client.session_reused)
        later = TLSPair(certificates, context=context, session=first.client.session)
        later.wrapper.factory.handshake_errors = TLSHandshakeErrors(
            "backend", metrics := Metrics(), later.clock.seconds
        )
        with mock.patch.object(tls.time, "time", return_value=soon.timestamp() + 1):
            later.client_read()
            later.exchange()
            later.client.write(b"let me in")
            later.wrapper.dataReceived(later.outgoing.read())
        self.assertTrue(later.transport.disconnecting)
        self.assertEqual(later.server.received, b"")
        self.assertEqual(metrics.tls_failures, {"certificate_expired": 1})


class HandshakeErrorTests(FilesTestCase):
    def setUp(self) -> None:
        self.metrics, self.clock, self.lines = Metrics(), Clock(), []
        log = mock.Mock(warn=lambda text, **values: self.lines.append(text.format(**values)))
        self.patch(TLSHandshakeErrors, "_log", log)
        self.failures = TLSHandshakeErrors("listen", self.metrics, self.clock.seconds)

    def fail(self, own: trustme.LeafCert | None = None, *, trusts: bool = True, **options: Any) -> None:
        pair = TLSPair(
            self.certificates(**options),
            configure=lambda context: own.configure_cert(context) if own else None,
            context=None if trusts else ssl.create_default_context(),
        )
        pair.wrapper.factory.handshake_errors = self.failures
        try:
            pair.handshake()
        except (ssl.SSLError, AssertionError):
            pair.wrapper.dataReceived(pair.outgoing.read())

    def test_failures_about_certificates_are_logged(self) -> None:
        options = {"client_cas": self.write_file(CA.cert_pem.bytes())}
        yesterday = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
        self.fail(**options)
        self.fail(trustme.CA().issue_cert("robot-7"), **options)
        self.fail(CA.issue_cert("robot-7", not_after=yesterday), **options)
        self.fail(trusts=False)
        self.assertEqual(
            self.metrics.tls_failures,
            {"no_certificate": 1, "unknown_ca": 1, "certificate_expired": 1, "refused_by_client": 1},
        )
        self.assertEqual(len(self.lines), 1)
        self.assertIn("--listen: TLS failed with 192.168.1.1: the client has no certificate", self.lines[0])
        self.clock.advance(tls.LOG_INTERVAL)
        self.fail(trustme.CA().issue_cert("robot-7"), **options)
        self.assertEqual(len(self.lines), 2)
        self.assertIn(
            "not signed by a CA in the file clientCAs (3 more times since this was last logged, from 1 ", self.lines[1]
        )

    def test_other_failures_are_only_counted(self) -> None:
        for data, reason in [(b"GET / HTTP/1.1\r\n\r\n", "not_tls"), (b"\x80\x2e\x01\0\x02" + bytes(50), None)]:
            pair = TLSPair(_CERTIFICATES)
            pair.wrapper.factory.handshake_errors = self.failures
            pair.wrapper.dataReceived(data)
            if reason:
                self.assertEqual(self.metrics.tls_failures, {reason: 1})
        pair = TLSPair(_CERTIFICATES)
        pair.wrapper.factory.handshake_errors = self.failures
        pair.clock.advance(10)
        self.assertEqual(self.metrics.tls_failures["timeout"], 1)
        self.assertEqual(self.lines, [])

    def test_number_of_addresses_is_bounded(self) -> None:
        for number in range(tls.MAX_HOSTS + 500):
            self.failures.record(mock.Mock(host=str(number)), "unknown_ca")
        self.assertEqual(len(self.failures._hosts), tls.MAX_HOSTS)
        self.assertEqual(len(self.lines), 1)
