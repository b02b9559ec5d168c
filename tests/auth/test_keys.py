"""Tests of gateway.auth.keys."""

from __future__ import annotations

import json
from typing import Any

import trustme
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.algorithms import DEFAULT_ALGORITHMS
from gateway.auth.keys import MAX_KEYS, KeySet, VerificationKey, parse_jwks, read_key_file
from gateway.settings import ConfigError
from tests.builders.tokens import EC, EC384, ED448, ED25519, RSA, jwk, jwks, pem, private_pem

ALL_OF_RSA = {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
FIELDS = ("kty", "crv", "kid", "n", "e", "x", "y", "d", "k", "use", "key_ops", "alg")


class FileTests(SynchronousTestCase):
    """Tests of read_key_file()."""

    def write(self, content: bytes) -> str:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(content)
        return path

    def refused(self, content: bytes, *algorithms: str) -> str:
        path = self.write(content)
        error = self.assertRaises(ConfigError, read_key_file, path, algorithms or ("RS256", "ES256"))
        self.assertEqual(error.option, "auth")
        self.assertIn(path, str(error))
        self.assertEqual(len(str(error).splitlines()), 1)
        return str(error)

    def test_public_keys(self) -> None:
        """Old and new keys in one file, with any text between them."""
        path = self.write(b"# old\n" + pem(RSA) + b"# new\r\n" + pem(EC).replace(b"\n", b"\r\n") + pem(ED25519))
        keys = read_key_file(path, ("RS256", "ES256"))
        self.assertEqual([set(key.algorithms) for key in keys], [{"RS256"}, {"ES256"}])
        self.assertEqual(keys[0].key.public_numbers(), RSA.public_key().public_numbers())
        self.assertEqual([key.kid for key in keys], [None, None])

    def test_other_forms(self) -> None:
        """The key of a certificate, and an RSA key in PKCS #1."""
        certificate = trustme.CA().issue_cert("idp.example.com").cert_chain_pems[0].bytes()
        pkcs1 = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.PKCS1)
        keys = read_key_file(self.write(certificate + pkcs1), ("RS256", "PS512", "ES256"))
        self.assertEqual([set(key.algorithms) for key in keys], [{"ES256"}, {"RS256", "PS512"}])

    def test_secret(self) -> None:
        (key,) = read_key_file(self.write(b" 0123456789abcdef\n"), ("HS256", "HS512"))
        self.assertEqual(key.key, b"0123456789abcdef")
        self.assertEqual(key.algorithms, {"HS256", "HS512"})

    def test_short_secret(self) -> None:
        self.assertIn("a secret of 15 bytes can be guessed", self.refused(b"0123456789abcde\n", "HS256"))
        self.assertIn("a secret of 0 bytes can be guessed", self.refused(b"\n", "HS256"))

    def test_a_public_key_is_no_secret(self) -> None:
        for content in (pem(RSA), json.dumps(jwk(RSA)).encode(), b"ssh-rsa AAAAB3NzaC1yc2EAAAA"):
            self.assertIn("has a key of another kind, and no secret", self.refused(content, "HS256"))

    def test_private_keys(self) -> None:
        for content in (private_pem(RSA), pem(RSA) + private_pem(EC)):
            problem = self.refused(content)
            self.assertIn("has a private key", problem)
            self.assertIn("openssl pkey -in KEY -pubout", problem)

    def test_errors_name_what_is_wrong(self) -> None:
        short = rsa.generate_private_key(65537, 1024)
        damaged = pem(RSA)[:60] + b"!" + pem(RSA)[61:]
        for content, problem in (
            (b"", "has no public key and no certificate in PEM"),
            (b"0123456789abcdef0123456789abcdef", "has no public key and no certificate"),
            (pem(RSA)[:-10], "has a PEM block that does not end"),
            (pem(EC) + damaged, "its PUBLIC KEY no. 2 cannot be read"),
            (pem(short), "its PUBLIC KEY no. 1 has 1024 bits; 2048 to 16384 are right"),
            (pem(ED25519), "has no key for RS256,ES256"),
            (pem(EC384), "has no key for RS256,ES256"),
            (pem(dsa.generate_private_key(1024)), "has no key for RS256,ES256"),
            (b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----", "has a X509 CRL; write public keys"),
            (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "its CERTIFICATE no. 1 cannot be read"),
            (pem(EC) * 17, "has more than 16 keys"),
            (b" " * 65537, "has more than 65536 bytes"),
        ):
            self.assertIn(problem, self.refused(content))

    def test_no_file(self) -> None:
        for path in (self.mktemp(), ".", "a\0b"):
            error = self.assertRaises(ConfigError, read_key_file, path, ("RS256",))
            self.assertIn("cannot be read: ", str(error))
            self.assertEqual(len(str(error).splitlines()), 1)

    @settings(deadline=None, max_examples=100)
    @given(
        st.lists(
            st.sampled_from([pem(EC), pem(RSA)[:40], private_pem(EC), b"-----BEGIN CERTIFICATE-----\n"]) | st.binary()
        ),
        st.sampled_from([("RS256",), ("HS256",), ("EdDSA", "ES512")]),
    )
    def test_any_content(self, pieces: list[bytes], algorithms: tuple[str, ...]) -> None:
        try:
            keys = read_key_file(self.write(b"".join(pieces)), algorithms)
        except ConfigError as e:
            self.assertEqual(len(str(e).splitlines()), 1)
        else:
            self.assertTrue(all(key.algorithms for key in keys))


class SetTests(SynchronousTestCase):
    """Tests of parse_jwks()."""

    def left_out(self, *keys: Any, algorithms: tuple[str, ...] = DEFAULT_ALGORITHMS) -> str:
        keyset = parse_jwks(jwks(*keys), algorithms)
        self.assertEqual(keyset.keys, ())
        return keyset.left_out

    def test_keys(self) -> None:
        keyset = parse_jwks(
            jwks(jwk(RSA, "r"), jwk(EC, "e", use="sig", extra=[1]), jwk(ED25519), jwk(EC384, "x")), DEFAULT_ALGORITHMS
        )
        self.assertEqual([key.kid for key in keyset.keys], ["r", "e", None, "x"])
        self.assertEqual(
            [set(key.algorithms) for key in keyset.keys], [ALL_OF_RSA, {"ES256"}, {"EdDSA", "Ed25519"}, {"ES384"}]
        )
        self.assertEqual(keyset.left_out, "")

    def test_a_key_for_one_algorithm(self) -> None:
        keyset = parse_jwks(jwks(jwk(RSA, alg="PS256", key_ops=["verify"])), ("RS256", "PS256"))
        self.assertEqual(keyset.keys[0].algorithms, {"PS256"})

    def test_names_of_eddsa(self) -> None:
        """RFC 9864: a key is for tokens with either name of its algorithm."""
        for key, own in ((ED25519, "Ed25519"), (ED448, "Ed448")):
            for named in ({}, {"alg": "EdDSA"}, {"alg": own}):
                keyset = parse_jwks(jwks(jwk(key, **named)), DEFAULT_ALGORITHMS)
                self.assertEqual([set(each.algorithms) for each in keyset.keys], [{"EdDSA", own}])
                keyset = parse_jwks(jwks(jwk(key, **named)), ("ES256", own))
                self.assertEqual([set(each.algorithms) for each in keyset.keys], [{own}])
        wrong = jwk(ED25519, alg="Ed448"), jwk(ED448, alg="Ed25519"), jwk(EC, alg="Ed25519")
        self.assertEqual(self.left_out(*wrong), "3 for other algorithms")

    def test_unusable_keys_are_left_out(self) -> None:
        public = jwk(RSA)
        self.assertEqual(self.left_out({"kty": "oct", "k": "AAAA"}, {"kty": "oct"}), "2 symmetric")
        self.assertIn("1 private", self.left_out({**public, "d": "AAAA"}))
        self.assertEqual(self.left_out({"kty": "PQ"}, {"kty": 1}, {"kty": ["RSA"]}, {}), "4 of unknown type")
        self.assertEqual(self.left_out({**public, "use": "enc"}, {**public, "key_ops": []}), "2 not for signatures")
        self.assertEqual(self.left_out({**public, "alg": "RSA-OAEP"}, {**public, "alg": []}), "2 for other algorithms")
        self.assertEqual(self.left_out(public, algorithms=("ES256",)), "1 for other algorithms")
        self.assertEqual(
            self.left_out(
                1, None, "x", [], {"kty": "RSA"}, {**public, "n": 1}, {**public, "e": "A"}, {**public, "kid": 1}
            ),
            "8 that cannot be read",
        )
        wrong = {**jwk(EC), "x": jwk(EC384)["x"]}
        nowhere = {**jwk(EC), "y": jwk(EC)["x"]}
        unknown = {"kty": "OKP", "crv": "X25519", "x": jwk(ED25519)["x"]}
        long = {**public, "n": "_" * 100_000}
        self.assertEqual(self.left_out(wrong, nowhere, unknown, long), "4 that cannot be read")
        self.assertIn("1 of RSA with fewer than 2048", self.left_out(jwk(rsa.generate_private_key(65537, 1024))))
        self.assertEqual(self.left_out(jwk(ec.generate_private_key(ec.SECP256K1()))), "1 for other algorithms")

    def test_an_empty_set(self) -> None:
        self.assertEqual(parse_jwks(b'{"keys":[]}', DEFAULT_ALGORITHMS), KeySet())

    def test_invalid_documents(self) -> None:
        for document, problem in (
            (b"", "the answer is no JSON"),
            (b"<html>", "the answer is no JSON"),
            (b"[" * 100_000, "the answer is no JSON"),
            (b'{"keys":"\xff"}', "the answer is no JSON"),
            (b"[]", "no JSON Web Key Set"),
            (b"{}", "no JSON Web Key Set"),
            (b'{"keys":{}}', "no JSON Web Key Set"),
            (jwks(*[{}] * (MAX_KEYS + 1)), "the set has 65 keys; 64 are the most"),
        ):
            with self.assertRaisesRegex(ValueError, problem):
                parse_jwks(document, DEFAULT_ALGORITHMS)

    @settings(deadline=None, max_examples=200)
    @given(
        st.lists(
            st.builds(
                lambda key, changes: {**key, **changes},
                st.sampled_from([jwk(RSA), jwk(EC), jwk(ED25519), {}]),
                st.dictionaries(
                    st.sampled_from(FIELDS),
                    st.none()
                    | st.integers()
                    | st.text()
                    | st.sampled_from(["RSA", "EC", "OKP", "P-256"])
                    | st.lists(st.text()),
                ),
            )
            | st.recursive(st.none() | st.text(), lambda inner: st.lists(inner, max_size=2)),
            max_size=4,
        )
    )
    def test_any_keys(self, keys: list[Any]) -> None:
        keyset = parse_jwks(jwks(*keys), DEFAULT_ALGORITHMS)
        self.assertLessEqual(len(keyset.keys), len(keys))

    @given(st.binary())
    def test_any_document(self, document: bytes) -> None:
        try:
            parse_jwks(document, DEFAULT_ALGORITHMS)
        except ValueError as e:
            self.assertIn("the answer is no", str(e))


class KeySetTests(SynchronousTestCase):
    def keys(self, *kids: str | None) -> KeySet:
        return KeySet(tuple(VerificationKey(number, frozenset({"RS256"}), kid) for number, kid in enumerate(kids)))

    def fitting(self, keyset: KeySet, kid: str | None, algorithm: str = "RS256") -> list[int]:
        return [key.key for key in keyset.candidates(algorithm, kid)]

    def test_by_kid(self) -> None:
        keyset = self.keys("a", None, "b", "b")
        self.assertEqual(self.fitting(keyset, "b"), [2, 3])
        self.assertEqual(self.fitting(keyset, "c"), [1])
        self.assertEqual(self.fitting(keyset, None), [0, 1, 2, 3])
        self.assertEqual(self.fitting(keyset, "b", "ES256"), [])
        self.assertTrue(keyset.has_kid("a"))
        self.assertFalse(keyset.has_kid("c"))
        self.assertFalse(keyset.has_kid(None))

    def test_the_number_of_candidates_is_limited(self) -> None:
        self.assertEqual(len(self.fitting(self.keys(*["a"] * 40), None)), 16)

    def test_of_other_algorithms(self) -> None:
        """Keys for other algorithms do not count towards the maximum."""
        keys = (*self.keys(*["a"] * 40).keys, VerificationKey("it", frozenset({"ES256"}), "b"))
        self.assertEqual([key.key for key in KeySet(keys).candidates("ES256", None)], ["it"])
