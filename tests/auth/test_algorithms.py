"""Tests of gateway.auth.algorithms."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.algorithms import DEFAULT_ALGORITHMS, parse_algorithms
from gateway.settings import ConfigError


class ParseTests(SynchronousTestCase):
    def refused(self, text: str) -> str:
        error = self.assertRaises(ConfigError, parse_algorithms, "jwt", text)
        self.assertEqual(error.option, "auth")
        return str(error)

    def test_names(self) -> None:
        self.assertEqual(parse_algorithms("jwt", "RS256, ES256,RS256"), ("RS256", "ES256"))
        self.assertEqual(parse_algorithms("jwt", "HS256,HS512"), ("HS256", "HS512"))
        self.assertEqual(parse_algorithms("jwks", ",".join(DEFAULT_ALGORITHMS)), DEFAULT_ALGORITHMS)

    def test_names_of_eddsa(self) -> None:
        """RFC 9864: EdDSA may be either, and an issuer may change to the name of its own."""
        self.assertEqual(parse_algorithms("jwt", "ES256,EdDSA"), ("ES256", "EdDSA", "Ed25519", "Ed448"))
        self.assertEqual(parse_algorithms("jwt", "Ed448,EdDSA"), ("Ed448", "EdDSA", "Ed25519"))
        self.assertEqual(parse_algorithms("jwt", "Ed25519"), ("Ed25519",))
        for name in ("EdDSA", "Ed25519", "Ed448"):
            self.assertIn(name, DEFAULT_ALGORITHMS)

    def test_none_is_not_an_algorithm(self) -> None:
        for text in ("none", "None", "NONE", "RS256,none"):
            self.assertIn("anyone could make a token without a signature", self.refused(text))

    def test_unknown(self) -> None:
        for text in ("RS255", "rs256", "", "RS256,", "RS256 ES256", "ES521"):
            self.assertIn("is not an algorithm; there are HS256, HS384, HS512, RS256,", self.refused(text))

    def test_secrets_and_public_keys(self) -> None:
        """With both allowed, a public key could be used as a secret, to sign tokens."""
        self.assertIn("anyone could sign with the public key", self.refused("RS256,HS256"))
        self.assertIn("anyone could sign with the public key", self.refused("HS512,EdDSA"))

    @given(st.text())
    def test_any_text(self, text: str) -> None:
        try:
            parse_algorithms("jwt", text)
        except ConfigError as e:
            self.assertEqual(len(str(e).splitlines()), 1)
