"""Tests of gateway.cluster.auth, some with generated input, and of TLS on real sockets."""

from __future__ import annotations

import hashlib
import hmac
import os
import ssl
import stat
from typing import Any
from unittest import mock

import trustme
from hypothesis import example, given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import Certificate
from twisted.internet.testing import StringTransport
from twisted.logger import LogLevel, capturedLogs
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.cluster import auth
from gateway.cluster.auth import (
    MAX_HOSTS,
    MAX_SECRET_SIZE,
    MAX_SIGNATURE_LIFETIME,
    MIN_SECRET_SIZE,
    NONCE_WINDOW,
    SIGNATURE_LIFETIME,
    WRONG_NODE,
    ClusterSecret,
    PeerAuth,
    PeerTLS,
)
from gateway.cluster.errors import PeerAuthenticationError, WrongNodeError
from gateway.net import tls
from gateway.net.certificates import Certificates
from gateway.net.tls import describe_tls_error, verified_certificate
from gateway.settings import ConfigError, Settings


class ClusterSecretCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = self.mktemp()
        os.mkdir(self.folder)
        self.path = os.path.join(self.folder, "secret")

    def write(self, content: bytes, mode: int = 0o600) -> None:
        with open(self.path, "wb") as file:
            file.write(content)
        os.chmod(self.path, mode)

    def problem(self, do) -> str:
        with self.assertRaises(ConfigError) as caught:
            do()
        text = str(caught.exception)
        self.assertTrue(text.startswith("--cluster-secret-file: "), text)
        self.assertNotIn("\n", text)
        return text


class SecretFileTests(ClusterSecretCase):
    """--cluster-secret-file."""

    def load(self) -> ClusterSecret:
        return ClusterSecret.from_settings(Settings(capacity=9, cluster_secret_file=self.path))

    def test_white_space_is_stripped(self) -> None:
        self.write(b"\n a secret of many words \xff\r\n")
        secret = self.load()
        self.assertEqual(secret(), b"a secret of many words \xff")
        self.assertEqual(secret.get_or_create(), secret())

    def test_sizes(self) -> None:
        for size, good in ((0, False), (MIN_SECRET_SIZE - 1, False), (MIN_SECRET_SIZE, True), (MAX_SECRET_SIZE, True)):
            self.write(b"x" * size)
            if good:
                self.assertTrue(self.load()())
            else:
                self.assertIn(f"has {size} bytes; a secret has {MIN_SECRET_SIZE} to", self.problem(self.load))
        self.write(b"x" * (MAX_SECRET_SIZE + 1))
        self.assertIn(f"more than {MAX_SECRET_SIZE} bytes", self.problem(self.load))

    def test_white_space_does_not_count(self) -> None:
        self.write(b"x" + b" " * 40)
        self.assertIn("has 1 bytes", self.problem(self.load))

    def test_unreadable_file(self) -> None:
        self.assertIn("No such file", self.problem(self.load))
        os.mkdir(self.path)
        self.assertIn("directory", self.problem(self.load))

    def test_warns_if_readable_by_others(self) -> None:
        for mode, warned in ((0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1)):
            self.write(b"x" * 32, mode)
            with capturedLogs() as logs:
                self.load()
            self.assertEqual([log["log_level"] for log in logs], [LogLevel.warn] * warned, oct(mode))

    def test_reload(self) -> None:
        self.write(b"x" * 32)
        secret = self.load()
        self.write(b"y" * 32)
        self.assertEqual(secret(), b"x" * 32)
        secret.reload()
        self.assertEqual(secret(), b"y" * 32)
        self.write(b"short")
        self.problem(secret.reload)
        self.assertEqual(secret(), b"y" * 32)

    def test_required_with_a_database_server(self) -> None:
        settings = mock.Mock(cluster_secret_file="", registry="mysql://gw@db/gw")
        self.problem(lambda: ClusterSecret.from_settings(settings))


class GeneratedSecretTests(ClusterSecretCase):
    """Beside a sqlite: registry."""

    def setUp(self) -> None:
        super().setUp()
        self.path += ".sqlite.secret"

    def load(self) -> ClusterSecret:
        return ClusterSecret.from_settings(Settings(capacity=9, registry="sqlite:" + self.path[: -len(".secret")]))

    def test_created_only_to_sign(self) -> None:
        secret = self.load()
        self.assertEqual(secret(), b"")
        secret.reload()
        self.assertEqual(os.listdir(self.folder), [])
        made = secret.get_or_create()
        self.assertRegex(made, b"^[0-9a-f]{64}$")
        self.assertEqual(os.listdir(self.folder), [os.path.basename(self.path)])
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        self.assertEqual([secret(), secret.get_or_create()], [made, made])

    def test_created_with_its_final_mode(self) -> None:
        before = os.umask(0)
        self.addCleanup(os.umask, before)
        opened = []
        real = os.open
        with mock.patch("gateway.cluster.auth.os.open", lambda *args: opened.append(args[1:]) or real(*args)):
            self.load().get_or_create()
        self.assertEqual(opened, [(os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)])
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    def test_other_nodes_find_it(self) -> None:
        first, second, late = self.load(), self.load(), self.load()
        made = first.get_or_create()
        self.assertEqual([second.get_or_create(), late(), self.load()()], [made] * 3)

    def test_created_by_another_node_at_the_same_time(self) -> None:
        secret = self.load()
        real = os.link

        def link(source: str, target: str) -> None:
            self.write(b"the other node's secret")
            real(source, target)

        with mock.patch("gateway.cluster.auth.os.link", link):
            self.assertEqual(secret.get_or_create(), b"the other node's secret")
        self.assertEqual(os.listdir(self.folder), [os.path.basename(self.path)])

    def test_failure_leaves_no_file(self) -> None:
        secret = self.load()
        with mock.patch("gateway.cluster.auth.os.link", side_effect=OSError(1, "Operation not permitted")):
            self.assertIn("cannot be created: Operation not permitted", self.problem(secret.get_or_create))
        self.assertEqual(os.listdir(self.folder), [])

    def test_missing_folder(self) -> None:
        self.path = os.path.join(self.folder, "none", "registry.secret")
        self.assertIn("cannot be created: No such file", self.problem(self.load().get_or_create))

    def test_bad_file(self) -> None:
        self.write(b"short")
        self.assertIn("has 5 bytes", self.problem(self.load))
        os.unlink(self.path)
        secret = self.load()
        self.write(b"short")
        self.problem(secret)
        self.problem(secret.get_or_create)


A, B, C = (f"{digit * 8}-0000-4000-8000-000000000000" for digit in "abc")
SECRET = b"a secret of both nodes"
REQUEST = ("GET", "/v1/relay?client_id=x&address=1", "x", "192.0.2.1:4711")


class PeerAuthTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.wall_time = 1763000000.25
        self.secret = SECRET
        self.a = PeerAuth(A, lambda: SECRET, lambda: self.wall_time)
        self.b = PeerAuth(B, lambda: self.secret, lambda: self.wall_time)

    def assert_refused(self, problem: str, header: str, *request: str) -> None:
        with self.assertRaises(PeerAuthenticationError) as caught:
            self.b.verify(header, *(request or REQUEST))
        self.assertIn(problem, str(caught.exception))

    def test_form(self) -> None:
        header = self.a.sign(B, *REQUEST)
        scheme, _, value = header.partition(" ")
        version, sender, to, expires, nonce, mac = value.split(".")
        self.assertEqual((scheme, version, sender, to, int(expires)), ("Wsgateway-Peer", "v1", A, B, 1763000030))
        self.assertRegex(nonce, "^[0-9a-f]{32}$")
        lines = "\n".join((value.rpartition(".")[0], *REQUEST)).encode()
        self.assertEqual(mac, hmac.new(SECRET, lines, hashlib.sha256).hexdigest())

    def test_round_trip(self) -> None:
        self.assertEqual(self.b.verify(self.a.sign(B, *REQUEST), *REQUEST), A)
        self.assertEqual(self.b.verify(self.a.sign(B, "GET", "/v1/backend"), "GET", "/v1/backend"), A)
        header = self.a.sign(B, *REQUEST).replace("Wsgateway-Peer", "wsgateway-PEER")
        self.assertEqual(self.b.verify(header, *REQUEST), A)

    def test_each_field_is_signed(self) -> None:
        for index, other in enumerate(("POST", "/v1/relay", "y", "192.0.2.1:4712")):
            request = [*REQUEST]
            request[index] = other
            self.assert_refused("the cluster secrets differ", self.a.sign(B, *REQUEST), *request)
        header = self.a.sign(B, *REQUEST)
        self.assert_refused("secrets differ", header.replace(A, C))
        for index in (3, 4, 5):
            fields = header.split(".")
            fields[index] = fields[index][:-1] + ("0" if fields[index][-1] != "0" else "1")
            self.assert_refused("secrets differ", ".".join(fields))

    def test_line_feeds_are_rejected(self) -> None:
        header = self.a.sign(B, "GET", "/", "x\ny", "z")
        self.assert_refused("is not Wsgateway-Peer", header, "GET", "/", "x\ny", "z")
        self.assert_refused("is not Wsgateway-Peer", header, "GET", "/", "x", "y\nz")

    def test_another_node(self) -> None:
        header = self.a.sign(C, *REQUEST)
        self.assert_refused(WRONG_NODE, header)
        self.assertRaises(WrongNodeError, self.b.verify, header, *REQUEST)
        self.secret = SECRET + b"!"
        self.assert_refused("secrets differ", header)

    def test_secret(self) -> None:
        header = self.a.sign(B, *REQUEST)
        self.secret = SECRET + b"!"
        self.assert_refused("secrets differ", header)
        self.secret = b""
        self.assert_refused("no cluster secret", header)
        self.b._secret = mock.Mock(side_effect=ConfigError("cluster-secret-file", "bad"))
        self.assert_refused("cannot read its own cluster secret", header)
        self.b._secret = lambda: SECRET
        self.assertEqual(self.b.verify(header, *REQUEST), A)

    def test_secret_of_a_file(self) -> None:
        path = self.mktemp()
        a, b = (PeerAuth(each, ClusterSecret(path, create_if_missing=True), lambda: self.wall_time) for each in (A, B))
        with self.assertRaises(PeerAuthenticationError):
            b.verify(self.a.sign(B, *REQUEST), *REQUEST)
        self.assertEqual(b.verify(a.sign(B, *REQUEST), *REQUEST), A)

    def test_expiry(self) -> None:
        started_at = self.wall_time
        for later, good in ((0, True), (29.5, True), (31, False), (-30, True), (-31, False)):
            self.wall_time = started_at
            header = self.a.sign(B, *REQUEST)
            self.wall_time = started_at + later
            if good:
                self.assertEqual(self.b.verify(header, *REQUEST), A, later)
            else:
                self.assert_refused("clocks", header)
        self.assertEqual((SIGNATURE_LIFETIME, MAX_SIGNATURE_LIFETIME), (30, 60))

    def test_accepted_once(self) -> None:
        header = self.a.sign(B, *REQUEST)
        self.b.verify(header, *REQUEST)
        self.wall_time += 29
        self.assert_refused("used before", header)
        self.assertEqual(self.b.verify(self.a.sign(B, *REQUEST), *REQUEST), A)

    def test_nonce_of_a_rejected_signature_is_not_kept(self) -> None:
        header = self.a.sign(B, *REQUEST)
        self.assert_refused("secrets differ", header[:-1] + ("0" if header[-1] != "0" else "1"))
        self.assertEqual(len(self.b._nonces), 0)
        self.b.verify(header, *REQUEST)

    def test_nonces_are_bounded(self) -> None:
        self.patch(auth, "MAX_NONCES", 3)
        for _ in range(3):
            self.b.verify(self.a.sign(B, *REQUEST), *REQUEST)
            self.wall_time += 1
        header = self.a.sign(B, *REQUEST)
        self.assert_refused("more than 3 requests", header)
        # The first nonce is 60 s old.
        self.wall_time += NONCE_WINDOW - 3
        self.b.verify(self.a.sign(B, *REQUEST), *REQUEST)
        self.assertEqual(len(self.b._nonces), 3)
        self.wall_time += NONCE_WINDOW
        self.b.verify(self.a.sign(B, *REQUEST), *REQUEST)
        self.assertEqual(len(self.b._nonces), 1)

    def test_malformed(self) -> None:
        header = self.a.sign(B, *REQUEST)
        for bad in (
            "",
            "Bearer x",
            header + " ",
            header + "\n",
            " " + header,
            header.replace("v1", "v2"),
            header.replace(" ", ""),
            header[:-1],
            header + "0",
            header.upper(),
            header.replace("1763000030", "17630000e0"),
            header.replace("1763000030", "1" * 16),
            header.replace("1763000030", "\u0661" * 10),
            header.replace("1763000030", "-1"),
            header.replace(A, ""),
            header.replace(A, "a.b"),
            header.replace(A, "a" * 65),
        ):
            self.assert_refused("is not Wsgateway-Peer", bad)

    @settings(deadline=None, max_examples=200)
    @given(
        st.one_of(st.text(max_size=300), st.text("v1.0af- ", max_size=200).map("Wsgateway-Peer ".__add__)), st.text()
    )
    def test_generated(self, header: str, target: str) -> None:
        with self.assertRaises(PeerAuthenticationError):
            PeerAuth(B, lambda: SECRET).verify(header, "GET", target)

    @settings(deadline=None, max_examples=100)
    @given(st.text(), st.text(), st.text())
    def test_generated_round_trip(self, target: str, client_id: str, address: str) -> None:
        a, b = PeerAuth(A, lambda: SECRET, lambda: 9.0), PeerAuth(B, lambda: SECRET, lambda: 9.0)
        header = a.sign(B, "GET", target, client_id, address)
        if "\n" in target + client_id + address:
            with self.assertRaises(PeerAuthenticationError):
                b.verify(header, "GET", target, client_id, address)
        else:
            self.assertEqual(b.verify(header, "GET", target, client_id, address), A)


class GeneratedInputTests(ClusterSecretCase):
    """Any content is accepted, or rejected with an error that does not contain it."""

    @settings(deadline=None, max_examples=60)
    @given(st.binary(max_size=40) | st.text(min_size=MIN_SECRET_SIZE, max_size=40).map(str.encode))
    @example(b" " * MAX_SECRET_SIZE)
    @example(b"x" * MAX_SECRET_SIZE + b"\n")
    def test_any_content(self, content: bytes) -> None:
        self.write(content)
        stripped = content.strip()
        if len(stripped) >= MIN_SECRET_SIZE and len(content) <= MAX_SECRET_SIZE:
            self.assertEqual(self.load()(), stripped)
            return
        problem = self.problem(self.load)
        # A shorter secret may be a word of the message.
        if len(stripped) > 8:
            self.assertNotIn(stripped.decode("latin-1"), problem)

    def load(self) -> ClusterSecret:
        return ClusterSecret.from_settings(Settings(capacity=9, cluster_secret_file=self.path))


class PeerTLSOptionsTests(SynchronousTestCase):
    def test_options_are_cached_until_reload(self) -> None:
        made = PeerTLS()
        self.assertIs(made.options("a.example"), made.options("a.example"))
        self.assertIsNot(made.options("a.example"), made.options("b.example"))
        before = made.options("a.example")
        made.reload()
        self.assertIsNot(made.options("a.example"), before)

    def test_cache_is_bounded(self) -> None:
        with mock.patch.object(auth, "optionsForClientTLS"):
            made = PeerTLS()
            for i in range(3 * MAX_HOSTS):
                made.options(f"{i}.example")
                self.assertLessEqual(len(made._options), MAX_HOSTS)

    def test_tls_1_2_is_the_minimum(self) -> None:
        factory = TLSMemoryBIOFactory(PeerTLS().options("a.example"), True, Factory.forProtocol(Protocol))
        transport = StringTransport()
        factory.buildProtocol(None).makeConnection(transport)
        # The extension supported_versions of its ClientHello (RFC 8446, section 4.2.1): 1.3 and 1.2.
        self.assertIn(b"\x00\x2b\x00\x05\x04\x03\x04\x03\x03", transport.value())


class RecordingProtocol(Protocol):
    """Sends a greeting, and records the connection's end."""

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
    """With a node that requests a certificate."""

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
        """Listen as a node at that address."""
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
        """Return the certificate that this node presented."""
        endpoint = wrapClientTLS(own.options(host), HostnameEndpoint(reactor, host, port))
        protocol = await endpoint.connect(Factory.forProtocol(RecordingProtocol))
        try:
            await protocol.received
            return bytes(await self.connections[-1].received)
        finally:
            for talker in (protocol, *self.connections):
                talker.received.addErrback(lambda _: None)
            protocol.transport.abortConnection()

    async def test_presents_its_certificate_and_the_new_one_after_reload(self) -> None:
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

    async def test_without_a_certificate(self) -> None:
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
