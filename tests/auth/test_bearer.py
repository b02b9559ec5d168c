"""Tests of gateway.auth.bearer."""

from __future__ import annotations

import base64

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.bearer import decode_bearer64, is_bearer

VISIBLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=40)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def encode(token: bytes) -> str:
    return base64.urlsafe_b64encode(token).decode().rstrip("=")


class Bearer64Tests(SynchronousTestCase):
    def problem(self, encoded: str) -> str:
        error = self.assertRaises(ValueError, decode_bearer64, encoded)
        return str(error)

    def test_tokens(self) -> None:
        for encoded, token in (("c2VjcmV0", "secret"), ("YS9iPQ", "a/b="), ("Pj4-Pz8_", ">>>???"), ("", "")):
            self.assertEqual(decode_bearer64(encoded), token)

    def test_not_base64url(self) -> None:
        for encoded in (
            "YS9iPQ==",
            "YS9iPQ=",
            "Pj4+Pz8/",
            "YS9i\nPQ",
            "YS9iPQ\n",
            "YS9 iPQ",
            "YS9i.PQ",
            "YS9i\xe9",
            "Y",
            "YS9iP",
        ):
            self.assertIn("must be base64url", self.problem(encoded))

    def test_not_canonical(self) -> None:
        """RFC 4648, section 3.5: the last character has unused bits."""
        self.assertEqual(decode_bearer64("YQ"), "a")
        for encoded in ("YR", "YS9iPR", "YWF"):
            self.assertIn("is not canonical", self.problem(encoded))

    def test_characters(self) -> None:
        for token in (b"a b", b"a\n", b"\x00", b"\x7f", "\xe9".encode(), b"\xff\xfe", b" "):
            self.assertIn("visible", self.problem(encode(token)))

    @settings(deadline=None, max_examples=200)
    @given(VISIBLE)
    def test_every_token(self, token: str) -> None:
        encoded = encode(token.encode())
        self.assertEqual(decode_bearer64(encoded), token)
        self.assertTrue(set(encoded) <= set(ALPHABET))

    @settings(deadline=None, max_examples=500)
    @given(st.one_of(st.text(max_size=20), st.text(ALPHABET, max_size=20)))
    @example("YQ==")
    @example("YR")
    def test_one_encoding_of_each_token(self, encoded: str) -> None:
        """What is decoded is encoded to the same text, and no error has anything of it."""
        try:
            token = decode_bearer64(encoded)
        except ValueError as e:
            if len(encoded) > 12:
                self.assertNotIn(encoded, str(e))
        else:
            self.assertEqual(encode(token.encode()), encoded)
            self.assertTrue(all("!" <= character <= "~" for character in token))


class IsBearerTests(SynchronousTestCase):
    def test_prefixes(self) -> None:
        for name in ("wsgateway.bearer.T", "wsgateway.bearer64.VA", "wsgateway.bearer.", "wsgateway.bearer64."):
            self.assertTrue(is_bearer(name))
        for name in ("wsgateway.jsonrpc.v1", "wsgateway.bearer", "wsgateway.bearer64", "bearer64.VA", "x"):
            self.assertFalse(is_bearer(name))
