"""Tests of gateway.net.certificates."""

from __future__ import annotations

import datetime
import os
import ssl
from typing import Any
from unittest import mock

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway.net import certificates as module
from gateway.net.certificates import EXPIRY_WARNING_WINDOW, CertificateReloader, Certificates
from gateway.net.errors import FileContentError
from tests.builders.tls import CA, CHAIN, KEY, LEAF, FilesTestCase, TLSPair, only_version


class LoadTests(FilesTestCase):
    def test_chain_in_two_files(self) -> None:
        """The client knows only the root CA."""
        certificates = Certificates(
            self.write_file(KEY), self.write_file(CHAIN[0]), self.write_file(b"".join(CHAIN[1:]))
        )
        TLSPair(certificates).handshake()
        with self.assertRaises(ssl.SSLCertVerificationError):
            TLSPair(Certificates(self.write_file(KEY), self.write_file(CHAIN[0]))).handshake()

    def test_new_files_apply_to_new_connections(self) -> None:
        path = self.write_file(KEY + b"".join(CHAIN))
        certificates = Certificates(path)
        before = TLSPair(certificates)
        before.handshake()
        other = trustme.CA()
        with open(path, "wb") as file:
            file.write(other.issue_cert("node.example").private_key_and_cert_chain_pem.bytes())
        certificates.load()
        before.send(b"still here")
        self.assertEqual(before.received, b"still here")
        with self.assertRaises(ssl.SSLCertVerificationError):
            TLSPair(certificates).handshake()
        # Files that cannot be used change nothing.
        context = certificates.context
        with open(path, "wb") as file:
            file.write(b"rubbish")
        self.assertRaises(ValueError, certificates.load)
        self.assertIs(certificates.context, context)

    def test_refuses_an_encrypted_key_without_prompting(self) -> None:
        locked = load_pem_private_key(KEY, None).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
        )
        with self.assertRaisesRegex(ValueError, "the key is encrypted"):
            Certificates(self.write_file(locked), self.write_file(b"".join(CHAIN)))

    def test_refuses_the_key_of_another_certificate(self) -> None:
        other = trustme.CA().issue_cert("other.example").private_key_pem.bytes()
        with self.assertRaisesRegex(ValueError, "the key does not match the certificate"):
            Certificates(self.write_file(other), self.write_file(b"".join(CHAIN)))

    def test_refuses_a_key_of_another_kind(self) -> None:
        files = {}
        for kind in (trustme.KeyType.RSA, trustme.KeyType.ECDSA):
            issued = trustme.CA().issue_cert("node.example", key_type=kind)
            files[kind] = [
                self.write_file(issued.private_key_pem.bytes()),
                self.write_file(b"".join(pem.bytes() for pem in issued.cert_chain_pems)),
            ]
        (rsa_key, rsa_chain), (ec_key, ec_chain) = files.values()
        for key, chain in ((rsa_key, ec_chain), (ec_key, rsa_chain)):
            with self.assertRaisesRegex(FileContentError, f"{chain} and {key} .*: the key is of another kind than"):
                Certificates(key, chain)

    def test_refuses_an_invalid_certificate(self) -> None:
        rubbish = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
        for chain, authorities in [(rubbish, CHAIN[0]), (b"".join(CHAIN), rubbish)]:
            authority = self.write_file(authorities)
            with self.assertRaisesRegex(ValueError, "cannot be used"):
                Certificates(self.write_file(KEY), self.write_file(chain), client_cas=authority)

    def test_warns_of_a_world_readable_key(self) -> None:
        key, chain = self.write_file(KEY), self.write_file(b"".join(CHAIN))
        for mode, warned in [(0o600, False), (0o640, False), (0o644, True), (0o604, True)]:
            os.chmod(key, mode)
            with mock.patch.object(module._log, "warn") as warn:
                Certificates(key, chain)
            self.assertEqual(warn.called, warned, oct(mode))
        self.assertEqual(warn.call_args.kwargs["path"], key)

    def test_old_versions_and_options_are_disabled(self) -> None:
        context = self.certificates().context
        self.assertEqual(context.minimum_version, ssl.TLSVersion.TLSv1_2)
        for option in (ssl.OP_NO_RENEGOTIATION, ssl.OP_NO_COMPRESSION):
            self.assertTrue(context.options & option)


_TLS12, _TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


class ClientCertificateTests(FilesTestCase):
    def mutual(self, *authorities: trustme.CA, required: bool = True) -> Certificates:
        self.path = self.write_file("# Zürich\n".encode().join(authority.cert_pem.bytes() for authority in authorities))
        return self.certificates(client_cas=self.path, required=required)

    def connect(self, certificates: Certificates, own: Any = None, version: ssl.TLSVersion = _TLS13) -> TLSPair:
        """Complete a handshake with a client that has that certificate."""

        def configure(context: ssl.SSLContext) -> None:
            only_version(version)(context)
            if own is not None:
                own.configure_cert(context)

        pair = TLSPair(certificates, configure=configure)
        pair.client_read()
        pair.exchange()
        return pair

    def assert_accepted(self, certificates: Certificates, own: Any = None) -> None:
        for version in (_TLS12, _TLS13):
            pair = self.connect(certificates, own, version)
            pair.send(b"hello")
            self.assertEqual(pair.received, b"hello")
            actual = pair.wrapper._tlsConnection.verified_certificate()
            expected = None if own is None else ssl.PEM_cert_to_DER_cert(own.cert_chain_pems[0].bytes().decode())
            self.assertEqual(actual, expected)

    def assert_refused(self, certificates: Certificates, own: Any = None) -> None:
        for version in (_TLS12, _TLS13):
            with self.assertRaisesRegex(ssl.SSLError, "ALERT"):
                self.connect(certificates, own, version)

    def test_required_certificate(self) -> None:
        certificates = self.mutual(CA)
        self.assert_accepted(certificates, CA.issue_cert("robot-7"))
        self.assert_accepted(certificates, CA.create_child_ca().issue_cert("robot-7"))
        self.assert_refused(certificates)
        self.assert_refused(certificates, trustme.CA().issue_cert("robot-7"))
        extension = self.connect(certificates, CA.issue_cert("robot-7")).wrapper.getPeerCertificate().to_cryptography()
        self.assertIn("robot-7", str(list(extension.extensions)))

    def test_optional_certificate(self) -> None:
        """A certificate that is presented is verified."""
        certificates = self.mutual(CA, required=False)
        self.assert_accepted(certificates)
        self.assert_accepted(certificates, CA.issue_cert("robot-7"))
        self.assert_refused(certificates, trustme.CA().issue_cert("robot-7"))

    def test_purpose_and_expiry_are_verified(self) -> None:
        certificates = self.mutual(CA)
        yesterday = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
        self.assert_refused(certificates, CA.issue_cert("robot-7", not_after=yesterday))
        self.assert_accepted(certificates, _issue(CA, ExtendedKeyUsageOID.CLIENT_AUTH))
        self.assert_refused(certificates, _issue(CA, ExtendedKeyUsageOID.SERVER_AUTH))

    def test_several_cas_one_of_them_intermediate(self) -> None:
        other, child = trustme.CA(), CA.create_child_ca()
        certificates = self.mutual(other, child)
        self.assert_accepted(certificates, other.issue_cert("robot-7"))
        self.assert_accepted(certificates, child.issue_cert("robot-7"))
        self.assert_refused(certificates, CA.issue_cert("robot-7"))

    def test_removed_ca_is_not_trusted_even_for_a_resumed_session(self) -> None:
        gone = trustme.CA()
        certificates = self.mutual(CA, gone)
        before = self.connect(certificates, gone.issue_cert("robot-7"), _TLS12)
        session, context = before.client.session, before.client.context

        def again() -> TLSPair:
            pair = TLSPair(certificates, context=context, session=session)
            pair.client_read()
            pair.exchange()
            return pair

        self.assertTrue(again().client.session_reused)
        with open(self.path, "wb") as file:
            file.write(CA.cert_pem.bytes())
        certificates.load()
        with self.assertRaisesRegex(ssl.SSLError, "ALERT"):
            again()
        before.send(b"still here")
        self.assertEqual(before.received, b"still here")

    def test_tls_1_3_has_no_session_tickets_with_client_certificates(self) -> None:
        pair = self.connect(self.mutual(CA), CA.issue_cert("robot-7"))
        self.assertFalse(pair.client.session.has_ticket)
        plain = self.connect(self.certificates())
        self.assertTrue(plain.client.session.has_ticket)


def _issue(authority: trustme.CA, purpose: x509.ObjectIdentifier) -> trustme.LeafCert:
    """Issue a certificate for one purpose."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "robot-7")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .sign(load_pem_private_key(authority.private_key_pem.bytes(), None), hashes.SHA256())
    )
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return trustme.LeafCert(key_pem, certificate.public_bytes(Encoding.PEM), [])


class CertificateReloaderTests(FilesTestCase):
    def setUp(self) -> None:
        self.gauges: dict[str, Any] = {}
        self.expires_at = LEAF_EXPIRES_AT
        self.now = self.expires_at - 2 * EXPIRY_WARNING_WINDOW
        self.reloads: list[bool] = []
        self.reloader = CertificateReloader(self.gauges, lambda: self.now, on_reload=lambda: self.reloads.append(True))

    def logged(self, action: Any, level: str = "warn") -> list[str]:
        with mock.patch.object(module._log, level) as log:
            action()
        return [call.args[0].format(**call.kwargs) for call in log.call_args_list]

    def test_warns_of_expiry(self) -> None:
        path = self.write_file(KEY + b"".join(CHAIN))
        os.chmod(path, 0o600)
        certificates = Certificates(path)
        self.assertEqual(self.gauges, {})
        self.assertEqual(self.logged(lambda: self.reloader.add("listen", certificates)), [])
        self.assertEqual(self.gauges["certificate_expires"][1](), self.expires_at)
        self.now = self.expires_at - EXPIRY_WARNING_WINDOW + 1
        (line,) = self.logged(self.reloader.reload)
        self.assertRegex(line, f"--listen: the certificate in {path} expires in 13 days, on .* UTC; renew")
        self.now = self.expires_at + 1
        (line,) = self.logged(self.reloader.reload)
        self.assertRegex(line, f"--listen: the certificate in {path} expired on .* UTC; renew")

    def test_warns_of_a_certificate_that_is_not_valid_yet(self) -> None:
        later = datetime.datetime(2031, 5, 5, tzinfo=datetime.timezone.utc)
        issued = CA.issue_cert("b", not_before=later, not_after=later + datetime.timedelta(days=90))
        with issued.private_key_and_cert_chain_pem.tempfile() as path:
            os.chmod(path, 0o600)
            self.now = later.timestamp() - 1
            (line,) = self.logged(lambda: self.reloader.add("listen", Certificates(path)))
            self.assertRegex(line, f"--listen: the certificate in {path} is not valid before 2031-05-05 00:00 UTC, and")
            self.now += 1
            self.assertEqual(self.logged(self.reloader.reload), [])

    def test_first_expiry(self) -> None:
        soon = datetime.datetime(2031, 5, 5, tzinfo=datetime.timezone.utc)
        with CA.issue_cert("b", not_after=soon).private_key_and_cert_chain_pem.tempfile() as path:
            os.chmod(path, 0o600)
            self.reloader.add("listen", self.certificates())
            self.reloader.add("backend", Certificates(path))
        self.assertEqual(self.reloader.first_expiry(), min(self.expires_at, soon.timestamp()))

    def test_reload_keeps_the_old_certificates_of_an_invalid_file(self) -> None:
        files = [self.write_file(KEY + b"".join(CHAIN)) for _ in range(5)]
        authority = self.write_file(CA.cert_pem.bytes())
        for path in files:
            os.chmod(path, 0o600)
            self.reloader.add("listen", Certificates(path, client_cas=authority if path == files[3] else ""))
        before = [certificates.context for _, certificates in self.reloader._certificates]
        os.unlink(files[0])
        with open(files[1], "wb") as file:
            file.write(KEY + CA.issue_cert("node.example").cert_chain_pems[0].bytes())
        with open(files[2], "wb") as file:
            file.write(b"rubbish")
        os.unlink(authority)
        lines = self.logged(self.reloader.reload, "error")
        for line, (path, problem) in zip(
            lines,
            [
                (files[0], "No such file"),
                (files[1], "does not match"),
                (files[2], "no certificate"),
                (authority, "No such file"),
            ],
            strict=True,
        ):
            self.assertRegex(line, f"^--listen: {path}.*{problem}.*; the previous content stays in effect$")
            self.assertNotIn("\n", line)
        after = [certificates.context for _, certificates in self.reloader._certificates]
        self.assertEqual(after[:4], before[:4])
        self.assertIsNot(after[4], before[4])
        self.assertEqual(self.reloads, [True])
        self.assertFalse(self.reloader.reload())

    def test_certificates_for_peers(self) -> None:
        authority = self.write_file(CA.cert_pem.bytes())
        plain, clients, first, second = (
            self.certificates(client_cas=path) for path in ("", authority, authority, authority)
        )
        for option, certificates, expected in [
            ("backend", plain, None),
            ("listen", clients, None),
            ("backend", first, first),
            ("backend", second, first),
        ]:
            self.reloader.add(option, certificates)
            self.assertIs(self.reloader.for_peers(), expected)


LEAF_EXPIRES_AT = x509.load_pem_x509_certificate(LEAF.cert_chain_pems[0].bytes()).not_valid_after_utc.timestamp()
