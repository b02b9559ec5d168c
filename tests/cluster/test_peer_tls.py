"""Tests of gateway.cluster.auth, on real sockets where TLS is spoken."""

from __future__ import annotations

import ssl
from typing import Any
from unittest import mock

import trustme
from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import Certificate
from twisted.internet.testing import StringTransport
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.cluster import auth
from gateway.cluster.auth import MAX_HOSTS, PeerTLS
from gateway.net import tls
from gateway.net.certificates import Certificates
from gateway.net.tls import describe_tls_error, verified_certificate


class PeerTLSOptionsTests(SynchronousTestCase):
    def test_they_are_kept_and_made_anew(self) -> None:
        made = PeerTLS()
        self.assertIs(made.options("a.example"), made.options("a.example"))
        self.assertIsNot(made.options("a.example"), made.options("b.example"))
        before = made.options("a.example")
        made.reload()
        self.assertIsNot(made.options("a.example"), before)

    def test_not_for_any_number_of_hosts(self) -> None:
        with mock.patch.object(auth, "optionsForClientTLS"):
            made = PeerTLS()
            for i in range(3 * MAX_HOSTS):
                made.options(f"{i}.example")
                self.assertLessEqual(len(made._options), MAX_HOSTS)

    def test_tls_1_2_is_the_least(self) -> None:
        factory = TLSMemoryBIOFactory(PeerTLS().options("a.example"), True, Factory.forProtocol(Protocol))
        transport = StringTransport()
        factory.buildProtocol(None).makeConnection(transport)
        # The extension supported_versions of its ClientHello (RFC 8446, section 4.2.1): 1.3 and 1.2.
        self.assertIn(b"\x00\x2b\x00\x05\x04\x03\x04\x03\x03", transport.value())


class RecordingProtocol(Protocol):
    """Says hello, and keeps what became of it."""

    def __init__(self) -> None:
        self.received: Deferred[Any] = Deferred()

    def connectionMade(self) -> None:
        self.transport.write(b"hello")

    def dataReceived(self, data: bytes) -> None:
        if not self.received.called:
            self.received.callback(verified_certificate(self.transport) or data)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        if not self.received.called:
            self.received.errback(reason)


class PeerTLSHandshakeTests(TestCase):
    """With a node that asks for a certificate."""

    def setUp(self) -> None:
        self.ca, self.other = trustme.CA(), trustme.CA()
        self.authorities, self.pem = self.mktemp(), self.mktemp()
        for ca in (self.ca, self.other):
            ca.cert_pem.write_to_path(self.authorities, append=True)
        self.root = Certificate.loadPEM(self.ca.cert_pem.bytes())

    def issue(self, ca: trustme.CA, *names: str) -> trustme.LeafCert:
        leaf = ca.issue_cert(*names)
        leaf.private_key_and_cert_chain_pem.write_to_path(self.pem)
        return leaf

    async def listen(self, host: str) -> int:
        """A node at that address."""
        self.issue(self.ca, host)
        interface = host.replace(":", r"\:")
        description = f"mtls:0:interface={interface}:privateKey={self.pem}:clientCAs={self.authorities}"
        self.connections: list[RecordingProtocol] = []

        def build() -> RecordingProtocol:
            self.connections.append(RecordingProtocol())
            return self.connections[-1]

        port = await tls.parse_endpoint(reactor, description).listen(Factory.forProtocol(build))
        self.addCleanup(port.stopListening)
        return int(port.getHost().port)

    async def exchange(self, own: PeerTLS, host: str, port: int) -> bytes:
        """The certificate that the node has seen of this one."""
        endpoint = wrapClientTLS(own.options(host), HostnameEndpoint(reactor, host, port))
        protocol = await endpoint.connect(Factory.forProtocol(RecordingProtocol))
        try:
            await protocol.received
            return bytes(await self.connections[-1].received)
        finally:
            for talker in (protocol, *self.connections):
                talker.received.addErrback(lambda _: None)
            protocol.transport.abortConnection()

    async def test_it_shows_what_it_has_and_after_that_what_is_new(self) -> None:
        for host in ("127.0.0.1", "::1"):
            port = await self.listen(host)
            first = self.issue(self.other.create_child_ca(), "first")
            certificates = Certificates(self.pem)
            own = PeerTLS(self.root, lambda certificates=certificates: certificates)
            self.assertEqual(await self.exchange(own, host, port), _der(first))
            second = self.issue(self.other, "second")
            certificates.load()
            own.reload()
            self.assertEqual(await self.exchange(own, host, port), _der(second))

    async def test_with_nothing_to_show(self) -> None:
        port = await self.listen("127.0.0.1")
        with self.assertRaises(SSL.Error) as caught:
            await self.exchange(PeerTLS(self.root), "127.0.0.1", port)
        self.assertIn("certificate required", describe_tls_error(caught.exception))

    async def test_a_certificate_for_another_address(self) -> None:
        port = await self.listen("0.0.0.0")
        with self.assertRaises(VerificationError) as caught:
            await self.exchange(PeerTLS(self.root), "127.0.0.1", port)
        self.assertEqual(describe_tls_error(caught.exception), "its certificate is not for the host in this url")


def _der(leaf: trustme.LeafCert) -> bytes:
    return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())
