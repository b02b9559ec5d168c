"""Tests of gateway.auth.certificate."""

from __future__ import annotations

import datetime
import ipaddress

from cryptography.x509 import DNSName, IPAddress, UniformResourceIdentifier
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.certificate import certificate_identity
from gateway.auth.errors import TokenRefusedError
from gateway.auth.interface import Identity
from tests.builders.certificates import DNS, END, MAIL, URI, certificate


class IdentityTests(SynchronousTestCase):
    def refused(self, der: bytes) -> str:
        return str(self.assertRaises(TokenRefusedError, certificate_identity, der))

    def test_the_first_name(self) -> None:
        until = END.timestamp()
        self.assertEqual(certificate_identity(certificate(DNS, URI)), Identity("robot-7.example.com", until))
        self.assertEqual(certificate_identity(certificate(MAIL, URI, DNS)), Identity("spiffe://acme/robot/7", until))

    def test_no_name(self) -> None:
        for der in (certificate(), certificate(MAIL), certificate(IPAddress(ipaddress.ip_address("::1")))):
            self.assertIn("has no DNS name and no URI as its SubjectAlternativeName", self.refused(der))

    def test_a_name_that_is_no_client_id(self) -> None:
        """A later name that is a client_id is not used."""
        for name in (
            DNSName("*.example.com"),
            UniformResourceIdentifier("urn:a?b"),
            DNSName("a" * 129),
            DNSName("."),
            UniformResourceIdentifier("https://acme/"),
        ):
            problem = self.refused(certificate(name, DNS))
            self.assertEqual(problem, "the first DNS name or URI of this client certificate is not a client_id")

    def test_expired_before_1970(self) -> None:
        """A certificate that expired before 1970 has expired: its time is not 0, which would mean never."""
        early = certificate(DNS, end=datetime.datetime(1960, 1, 2))
        self.assertEqual(certificate_identity(early), Identity("robot-7.example.com", 1.0))

    def test_truncated(self) -> None:
        der = certificate(DNS)
        for end in range(0, len(der), 7):
            self.refused(der[:end])

    @given(st.binary())
    def test_any_bytes(self, der: bytes) -> None:
        self.refused(der)

    @given(st.integers(0, 10_000), st.integers(0, 255))
    def test_any_byte_changed(self, at: int, byte: int) -> None:
        der = bytearray(certificate(DNS))
        der[at % len(der)] = byte
        try:
            identity = certificate_identity(bytes(der))
        except TokenRefusedError:
            return
        self.assertGreater(identity.expires_at, 0)
