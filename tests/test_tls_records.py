"""Records of TLS that carry next to nothing, and what that may cost; and failures of TLS, counted and told of."""

from __future__ import annotations

import datetime
import random
import ssl
from collections import Counter
from typing import Any
from unittest import mock

import trustme
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from gateway.metrics import Metrics
from gateway.net import tls
from gateway.net.tls import (
    CREDIT_PER_SECOND,
    EMPTY_RECORD_COST,
    MAX_CREDIT,
    MAX_RECORD_SIZE,
    RECORD_COST,
    MemoryBIOConnection,
    TLSHandshakeErrors,
)
from tests.tls_pair import CA, FilesTestCase, TLSPair, combined_certificates, only_version

_BOTH_VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
_CERTIFICATES = combined_certificates()


class RecordCreditTests(FilesTestCase):
    def pair(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> TLSPair:
        pair = TLSPair(self.certificates(), configure=only_version(version))
        pair.handshake()
        pair.server.echoes = False
        pair.wrapper.factory.handshake_errors = TLSHandshakeErrors("listen", Metrics(), pair.clock.seconds)
        return pair

    def failed(self, pair: TLSPair) -> Counter[str]:
        failures: Any = pair.wrapper.factory.handshake_errors
        return Counter(failures._metrics.tls_failures)

    def records(self, pair: TLSPair, count: int, size: int = 1) -> bytes:
        for _ in range(count):
            pair.client.write(bytes(size))
        return pair.outgoing.read()

    def test_what_is_there_is_handed_on_at_once(self) -> None:
        pair = self.pair()
        with mock.patch.object(pair.server, "dataReceived", side_effect=pair.server.dataReceived) as handed_on:
            pair.wrapper.dataReceived(self.records(pair, 700))
        self.assertEqual(handed_on.call_count, 1)
        self.assertEqual(len(pair.server.received), 700)

    def test_records_of_a_byte_without_end(self) -> None:
        for version in _BOTH_VERSIONS:
            pair = self.pair(version)
            count = 0
            while not pair.transport.disconnecting and count < 10000:
                pair.wrapper.dataReceived(self.records(pair, 100))
                count += 100
            self.assertTrue(MAX_CREDIT // RECORD_COST <= count <= MAX_CREDIT // RECORD_COST + 300, count)
            self.assertEqual(self.failed(pair), {"records": 1})

    def test_some_of_them_for_ever(self) -> None:
        pair = self.pair()
        for _ in range(20):
            pair.wrapper.dataReceived(self.records(pair, CREDIT_PER_SECOND // RECORD_COST))
            pair.clock.advance(1)
        self.assertFalse(pair.transport.disconnecting)

    def test_small_messages_without_end(self) -> None:
        for version in _BOTH_VERSIONS:
            pair = self.pair(version)
            for _ in range(20):
                pair.wrapper.dataReceived(self.records(pair, 1000, RECORD_COST))
            self.assertFalse(pair.transport.disconnecting)
            self.assertEqual(len(pair.server.received), 20000 * RECORD_COST)

    def test_records_that_carry_nothing(self) -> None:
        """As KeyUpdates do, which Python cannot send: OpenSSL takes them, and gives nothing for them."""
        pair = self.pair()
        connection = pair.wrapper._tlsConnection
        connection._incoming_bio = mock.Mock()
        sent = 0
        while not pair.transport.disconnecting and sent < 10000:
            pair.wrapper.dataReceived(b"\x17\x03\x03\0\x16" + bytes(22))
            sent += 1
        self.assertEqual(sent, MAX_CREDIT // EMPTY_RECORD_COST + 1)
        self.assertEqual(self.failed(pair), {"records": 1})

    def test_such_between_others_cost_the_same(self) -> None:
        connection = MemoryBIOConnection(_CERTIFICATES.context)
        connection._handshake_done, connection._ssl_object = True, mock.Mock(read=mock.Mock(return_value=1))
        for _ in range(100):
            connection._feed_openssl(0)
            connection._pending_input = b"\x17\x03\x03\0\x16" + bytes(22) + b"\x17\x03\x03\0\x12" + bytes(18)
            connection._feed_openssl(1000)
            connection._read_record(0)
        self.assertEqual(connection._record_credit, MAX_CREDIT - 100 * (EMPTY_RECORD_COST + RECORD_COST - 1))

    @given(st.lists(st.integers(0, MAX_RECORD_SIZE + 256), max_size=30), st.integers(0, 2**32))
    def test_records_are_counted_however_they_come(self, sizes: list[int], seed: int) -> None:
        chance, connection = random.Random(seed), MemoryBIOConnection(_CERTIFICATES.context)
        data = b"".join(b"\x17\x03\x03" + size.to_bytes(2, "big") + bytes(size) for size in sizes)
        at = counted = 0
        while at < len(data):
            step = chance.choice((1, 2, 3, 7, 4096))
            counted += connection._count_records(data[at : at + step])
            at += step
        self.assertEqual(counted, len(sizes))


class ResumptionTests(FilesTestCase):
    def test_a_ticket_does_not_outlast_the_certificate(self) -> None:
        """Of TLS 1.2; of TLS 1.3 there are none."""
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
        self.metrics, self.clock, self.said = Metrics(), Clock(), []
        log = mock.Mock(warn=lambda text, **values: self.said.append(text.format(**values)))
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

    def test_certificates(self) -> None:
        asking = {"client_cas": self.write_file(CA.cert_pem.bytes())}
        yesterday = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
        self.fail(**asking)
        self.fail(trustme.CA().issue_cert("robot-7"), **asking)
        self.fail(CA.issue_cert("robot-7", not_after=yesterday), **asking)
        self.fail(trusts=False)
        self.assertEqual(
            self.metrics.tls_failures,
            {"no_certificate": 1, "unknown_ca": 1, "certificate_expired": 1, "refused_by_client": 1},
        )
        self.assertEqual(len(self.said), 1)
        self.assertIn("--listen: TLS failed with 192.168.1.1: the client has no certificate", self.said[0])
        self.clock.advance(tls.LOG_INTERVAL)
        self.fail(trustme.CA().issue_cert("robot-7"), **asking)
        self.assertEqual(len(self.said), 2)
        self.assertIn("of no CA in the file clientCAs (3 times more since this was last said, with 1 ", self.said[1])

    def test_what_is_only_counted(self) -> None:
        for said, word in [(b"GET / HTTP/1.1\r\n\r\n", "not_tls"), (b"\x80\x2e\x01\0\x02" + bytes(50), None)]:
            pair = TLSPair(_CERTIFICATES)
            pair.wrapper.factory.handshake_errors = self.failures
            pair.wrapper.dataReceived(said)
            if word:
                self.assertEqual(self.metrics.tls_failures, {word: 1})
        pair = TLSPair(_CERTIFICATES)
        pair.wrapper.factory.handshake_errors = self.failures
        pair.clock.advance(10)
        self.assertEqual(self.metrics.tls_failures["timeout"], 1)
        self.assertEqual(self.said, [])

    def test_addresses_are_remembered_up_to_a_bound(self) -> None:
        for number in range(tls.MAX_HOSTS + 500):
            self.failures.record(mock.Mock(host=str(number)), "unknown_ca")
        self.assertEqual(len(self.failures._hosts), tls.MAX_HOSTS)
        self.assertEqual(len(self.said), 1)
