"""Tests of gateway.auth.jwt."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import warnings
from typing import Any

import jwt
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.auth.algorithms import parse_algorithms
from gateway.auth.interface import MAX_TOKEN_LENGTH, Identity, ITokenVerifier
from gateway.auth.jwt import JwtVerifier
from gateway.settings import ConfigError
from tests.builders.tokens import (
    EC,
    EC384,
    ED448,
    ED25519,
    NOW,
    OTHER_EC,
    OTHER_RSA,
    RSA,
    jwk,
    pem,
    raw_token,
    rejection_reason,
    sign,
    verify,
)

SECRET = b"0123456789abcdef" * 4
ROBOT = Identity("robot-7")


class JwtTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.now = NOW

    def write(self, content: bytes, path: str | None = None) -> str:
        path = path or self.mktemp()
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, 0o600)
        return path

    def make(
        self, content: bytes, *algorithms: str, audience: str | None = None, issuer: str | None = None, path: str = ""
    ) -> JwtVerifier:
        return JwtVerifier(
            self.write(content, path or None),
            algorithms,
            audience=audience,
            issuer=issuer,
            wall_clock=lambda: self.now,
        )


class SignatureTests(JwtTestCase):
    def test_each_algorithm(self) -> None:
        algorithms = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
        verifier = self.make(pem(ED25519) + pem(RSA) + pem(EC) + pem(EC384), *algorithms)
        verifyObject(ITokenVerifier, verifier)
        signers = {"R": RSA, "P": RSA, "ES256": EC, "ES384": EC384, "EdDSA": ED25519}
        for algorithm in algorithms:
            key = signers.get(algorithm) or signers[algorithm[0]]
            self.assertEqual(verify(verifier, sign(key, algorithm)), ROBOT, algorithm)

    def test_names_of_eddsa(self) -> None:
        """RFC 9864. Signed without PyJWT, which may not know these names."""
        for key, own, other in ((ED25519, "Ed25519", "Ed448"), (ED448, "Ed448", "Ed25519")):
            verifier = self.make(pem(key), *parse_algorithms("jwt", "EdDSA"))
            strict = self.make(pem(key), own)
            for name, accepted, accepted_by_name in (("EdDSA", True, False), (own, True, True), (other, False, False)):
                signed = raw_token({"alg": name}, {"sub": "robot-7"}).rpartition(".")[0]
                signature = base64.urlsafe_b64encode(key.sign(signed.encode())).rstrip(b"=").decode()
                token = f"{signed}.{signature}"
                self.assertEqual(verify(verifier, token), ROBOT if accepted else None)
                self.assertEqual(verify(strict, token), ROBOT if accepted_by_name else None)
                self.assertIsNone(verify(verifier, f"{token[:-4]}AAAA"))

    def test_secrets(self) -> None:
        verifier = self.make(SECRET + b"\n", "HS256", "HS384")
        self.assertEqual(verify(verifier, sign(SECRET, "HS256")), ROBOT)
        self.assertEqual(verify(verifier, sign(SECRET, "HS384", {"kid": "any"})), ROBOT)
        self.assertIsNone(verify(verifier, sign(SECRET, "HS512")))
        self.assertIsNone(verify(verifier, sign(SECRET[1:], "HS256")))

    def test_old_and_new_keys(self) -> None:
        """Each key of the file is tried, regardless of the token's kid."""
        verifier = self.make(pem(OTHER_RSA) + pem(RSA), "RS256")
        self.assertEqual(verify(verifier, sign(RSA, "RS256", {"kid": "new"})), ROBOT)
        self.assertEqual(verify(verifier, sign(OTHER_RSA, "RS256")), ROBOT)

    def test_another_key(self) -> None:
        verifier = self.make(pem(RSA) + pem(EC), "RS256", "ES256")
        self.assertIsNone(verify(verifier, sign(OTHER_RSA, "RS256")))
        self.assertIsNone(verify(verifier, sign(OTHER_EC, "ES256")))
        self.assertIsNone(verify(verifier, sign(EC384, "ES384")))

    def test_an_algorithm_that_is_not_allowed(self) -> None:
        self.assertIsNone(verify(self.make(pem(RSA), "RS256"), sign(RSA, "RS384")))

    def test_an_algorithm_of_another_key(self) -> None:
        """The header names an allowed algorithm which is only for the other key."""
        verifier = self.make(pem(RSA) + pem(EC), "RS256", "ES256")
        _, claims, signature = sign(EC, "ES256").split(".")
        self.assertIsNone(verify(verifier, f"{raw_token({'alg': 'RS256'}, {}).split('.')[0]}.{claims}.{signature}"))

    def test_without_a_signature(self) -> None:
        verifier = self.make(pem(RSA), "RS256")
        for algorithm in ("none", "None", "NONE", "nOnE", "", None, 0, ["RS256"], {"RS256": 1}):
            self.assertIsNone(verify(verifier, raw_token({"alg": algorithm}, {"sub": "robot-7"})), algorithm)
        self.assertIsNone(verify(verifier, raw_token({}, {"sub": "robot-7"})))
        header, claims, _ = sign(RSA, "RS256").split(".")
        self.assertIsNone(verify(verifier, f"{header}.{claims}."))

    def test_the_public_key_as_a_secret(self) -> None:
        """A token that is signed by HMAC with the public key as secret is refused."""
        verifier = self.make(pem(RSA), "RS256")
        for secret in (pem(RSA), pem(RSA).strip()):
            signed = raw_token({"alg": "HS256", "typ": "JWT"}, {"sub": "robot-7"}).rpartition(".")[0]
            digest = hmac.digest(secret, signed.encode(), hashlib.sha256)
            self.assertIsNone(verify(verifier, f"{signed}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"))

    def test_a_changed_token(self) -> None:
        verifier = self.make(pem(EC), "ES256")
        header, claims, signature = sign(EC, "ES256").split(".")
        self.assertEqual(verify(verifier, f"{header}.{claims}.{signature}"), ROBOT)
        other = sign(EC, "ES256", sub="robot-8").split(".")[1]
        flipped = ("B" if signature[0] == "A" else "A") + signature[1:]
        for token in (f"{header}.{other}.{signature}", f"{header}.{claims}.{flipped}", f"{header}.{claims}"):
            self.assertIsNone(verify(verifier, token))

    def test_keys_in_the_header_are_ignored(self) -> None:
        verifier = self.make(pem(RSA), "RS256", "ES256")
        for header in (
            {"jwk": jwk(OTHER_RSA)},
            {"jku": "http://127.0.0.1:1/keys"},
            {"x5u": "http://127.0.0.1:1/chain"},
            {"x5c": [base64.b64encode(b"certificate").decode()]},
            {"kid": "../../dev/null"},
        ):
            self.assertIsNone(verify(verifier, sign(OTHER_RSA, "RS256", header)), header)
            # A token that is signed by the right key may have them: they are ignored.
            self.assertEqual(verify(verifier, sign(RSA, "RS256", header)), ROBOT, header)

    def test_critical_extensions(self) -> None:
        """RFC 7515, section 4.1.11"""
        verifier = self.make(SECRET, "HS256")
        for crit in (["exp"], ["b64"], [], "exp", None):
            token = self.signed({"alg": "HS256", "crit": crit, "b64": True}, {"sub": "robot-7"})
            self.assertIsNone(verify(verifier, token), crit)
        self.assertEqual(verify(verifier, self.signed({"alg": "HS256"}, {"sub": "robot-7"})), ROBOT)

    def signed(self, header: Any, claims: Any) -> str:
        """Sign any payload."""
        start = raw_token(header, claims).rpartition(".")[0]
        digest = hmac.digest(SECRET, start.encode(), hashlib.sha256)
        return f"{start}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"

    def test_signed_but_not_a_token(self) -> None:
        verifier = self.make(SECRET, "HS256")
        header = {"alg": "HS256"}
        deep = b'{"sub":"robot-7","x":' + b"[" * 2500 + b"]" * 2500 + b"}"
        long = b'{"sub":"robot-7","exp":' + b"9" * 5000 + b"}"
        for claims in ([], "robot-7", 1, None, b"\xff", b"{", b'{"sub":"robot-7"}x', long):
            self.assertIsNone(verify(verifier, self.signed(header, claims)), claims)
        self.assertIn(verify(verifier, self.signed(header, deep)), (ROBOT, None))
        for wrong in ([], "HS256", b"{", {"alg": "HS256", "kid": 1}, {"alg": "HS256", "kid": None, "b64": False}):
            self.assertIsNone(verify(verifier, self.signed(wrong, {"sub": "robot-7"})), wrong)

    def test_length(self) -> None:
        verifier = self.make(SECRET, "HS256")
        short = sign(SECRET, "HS256", x="x" * (MAX_TOKEN_LENGTH * 3 // 4 - 120))
        self.assertLessEqual(len(short), MAX_TOKEN_LENGTH)
        self.assertEqual(verify(verifier, short), ROBOT)
        self.assertIsNone(verify(verifier, sign(SECRET, "HS256", x="x" * MAX_TOKEN_LENGTH)))

    @settings(deadline=None, max_examples=100)
    @given(
        st.text(st.characters(), max_size=60)
        | st.binary(max_size=60).map(lambda b: b.decode("latin-1"))
        | st.lists(st.binary(max_size=40).map(base64.urlsafe_b64encode).map(bytes.decode), max_size=4).map(".".join)
    )
    def test_any_text(self, token: str) -> None:
        self.assertIsNone(verify(self.make(SECRET, "HS256"), token))

    @settings(deadline=None, max_examples=100)
    @given(
        st.dictionaries(
            st.sampled_from(["sub", "exp", "nbf", "iat", "aud", "iss", "jti"]),
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text() | st.none()),
        )
    )
    def test_any_claims(self, claims: dict[str, Any]) -> None:
        """Any claims, signed by the right key."""
        token = self.signed({"alg": "HS256"}, {"sub": "robot-7", **claims})
        for verifier in (self.make(SECRET, "HS256"), self.make(SECRET, "HS256", audience="A", issuer="I")):
            identity = verify(verifier, token)
            if identity is not None:
                self.assertEqual(identity.client_id, claims.get("sub", "robot-7"))
                self.assertGreaterEqual(identity.expires_at, 1.0 if "exp" in claims else 0.0)


class ClaimsTests(JwtTestCase):
    def identity(self, **claims: Any) -> Identity | None:
        return verify(self.make(pem(EC), "ES256"), sign(EC, "ES256", **claims))

    def test_subject(self) -> None:
        self.assertEqual(self.identity(sub="acme/robot@7"), Identity("acme/robot@7"))
        self.assertEqual(self.identity(sub="spiffe://acme/robot/7"), Identity("spiffe://acme/robot/7"))
        for sub in ("", ".", "..", "a b", "a//b", "a/../b", "x" * 129, "a\n", "\xe9", 7, True, ["a"], {"a": "b"}):
            self.assertIsNone(verify(self.make(SECRET, "HS256"), self.odd(sub=sub)), sub)
        self.assertIsNone(self.identity(sub=None))

    def odd(self, **claims: Any) -> str:
        """Sign claims that PyJWT would refuse to sign."""
        payload = json.dumps({"sub": "robot-7", **claims}).encode()
        return jwt.api_jws.encode(payload, SECRET, "HS256")

    def test_expiry(self) -> None:
        """The verifier returns the time of expiry, and the caller checks it."""
        self.assertEqual(self.identity(exp=NOW + 60), Identity("robot-7", NOW + 60))
        self.assertEqual(self.identity(exp=NOW + 0.5), Identity("robot-7", NOW + 0.5))
        self.assertEqual(self.identity(exp=int(NOW)), Identity("robot-7", NOW))
        for over in (0, -1, 0.5, -0.0):
            self.assertEqual(self.identity(exp=over), Identity("robot-7", 1.0))
        self.assertEqual(self.identity(), Identity("robot-7", 0.0))

    def test_not_yet(self) -> None:
        for claim in ("nbf", "iat"):
            self.assertEqual(self.identity(**{claim: NOW + 30}), ROBOT)
            self.assertIsNone(self.identity(**{claim: NOW + 30.5}))
            self.assertEqual(self.identity(**{claim: 0}), ROBOT)
        self.assertIsNone(self.identity(nbf=NOW + 60, iat=NOW))
        self.now += 60
        self.assertEqual(self.identity(nbf=NOW + 60, iat=NOW), ROBOT)

    def test_invalid_times(self) -> None:
        verifier = self.make(SECRET, "HS256")
        for claim in ("exp", "nbf", "iat"):
            for value in (
                *(True, False, None, "1800000000", "", [], {}),
                *(float("nan"), float("inf"), -float("inf"), 1e300, 10**400, 253402300800, -(10**20)),
            ):
                self.assertIsNone(verify(verifier, self.odd(**{claim: value})), (claim, value))
        self.assertEqual(verify(verifier, self.odd(exp=253402300799)), Identity("robot-7", 253402300799.0))

    def test_audience(self) -> None:
        verifier = self.make(pem(EC), "ES256", audience="gateway")
        for aud in ("gateway", ["other", "gateway"]):
            self.assertEqual(verify(verifier, sign(EC, "ES256", aud=aud)), ROBOT)
        for aud in ("other", ["other"], [], "", "gatewa", None):
            self.assertIsNone(verify(verifier, sign(EC, "ES256", aud=aud)), aud)
        odd = self.make(SECRET, "HS256", audience="gateway")
        for value in (True, 7, {"gateway": 1}, [7, "gateway"], [["gateway"]]):
            self.assertIsNone(verify(odd, self.odd(aud=value)), value)
        # Without audience=, any audience is accepted.
        self.assertEqual(self.identity(aud="other"), ROBOT)

    def test_issuer(self) -> None:
        verifier = self.make(pem(EC), "ES256", issuer="https://idp.example.com/")
        self.assertEqual(verify(verifier, sign(EC, "ES256", iss="https://idp.example.com/")), ROBOT)
        for iss in ("https://idp.example.com", "https://idp.example.com/x", "", None):
            self.assertIsNone(verify(verifier, sign(EC, "ES256", iss=iss)), iss)
        odd = self.make(SECRET, "HS256", issuer="I")
        for value in (["I"], {"I": 1}, True, 7):
            self.assertIsNone(verify(odd, self.odd(iss=value)), value)
        self.assertEqual(self.identity(iss="other"), ROBOT)

    def test_reasons(self) -> None:
        verifier = self.make(SECRET, "HS256", audience="A", issuer="I")
        good = {"aud": "A", "iss": "I"}
        for reason, token in (
            ("malformed", "opaque"),
            ("malformed", raw_token({"alg": "HS256", "kid": 7}, good)),
            ("malformed", self.odd(**good, exp="soon")),
            ("algorithm", sign(SECRET, "HS384", **good)),
            ("issuer", sign(SECRET, "HS256", aud="A")),
            ("signature", sign(SECRET[1:], "HS256", **good)),
            ("audience", sign(SECRET, "HS256", iss="I")),
            ("audience", sign(SECRET, "HS256", iss="I", aud="B")),
            ("not_yet", sign(SECRET, "HS256", **good, nbf=NOW + 60)),
            ("subject", sign(SECRET, "HS256", **good, sub=None)),
            ("other", sign(SECRET, "HS256", {"crit": ["x"]}, **good)),
        ):
            self.assertEqual(rejection_reason(verifier, token), reason, token)


class FileTests(JwtTestCase):
    def test_reload(self) -> None:
        path = self.mktemp()
        verifier = self.make(pem(EC), "ES256", path=path)
        self.write(pem(OTHER_EC), path)
        verifier.reload()
        self.assertIsNone(verify(verifier, sign(EC, "ES256")))
        self.assertEqual(verify(verifier, sign(OTHER_EC, "ES256")), ROBOT)

    def test_reload_of_a_bad_file(self) -> None:
        path = self.mktemp()
        verifier = self.make(pem(EC), "ES256", path=path)
        self.write(pem(OTHER_EC)[:-20], path)
        self.assertRaises(ConfigError, verifier.reload)
        self.assertEqual(verify(verifier, sign(EC, "ES256")), ROBOT)

    def log_lines(self, verifier: JwtVerifier) -> list[str]:
        with capturedLogs() as logs:
            verifier.start()
        return [event["log_format"].format(**event) for event in logs]

    def test_warnings(self) -> None:
        self.assertEqual(self.log_lines(self.make(pem(EC), "ES256", audience="a")), [])
        (line,) = self.log_lines(self.make(pem(EC), "ES256"))
        self.assertIn("a token that the same issuer made for another service is accepted", line)
        self.assertEqual(self.log_lines(self.make(SECRET, "HS256", audience="a")), [])
        (line,) = self.log_lines(self.make(SECRET[:31], "HS256", audience="a"))
        self.assertIn("the secret has 31 bytes; use 32 random bytes", line)
        (line,) = self.log_lines(self.make(SECRET[:32], "HS512", audience="a"))
        self.assertIn("the secret has 32 bytes; use 64 random bytes", line)
        self.assertNotIn(SECRET.decode(), line)

    def test_a_world_readable_secret(self) -> None:
        """It is warned of at start and at each reload; public keys are not."""
        verifier = self.make(SECRET, "HS256", audience="a", path="secret")
        os.chmod("secret", 0o644)
        wanted = ["--auth: secret can be read by all users of this machine; chmod o-r it"]
        self.assertEqual(self.log_lines(verifier), wanted)
        with capturedLogs() as logs:
            verifier.reload()
        self.assertEqual([event["log_format"].format(**event) for event in logs], wanted)
        verifier = self.make(pem(EC), "ES256", audience="a", path="public")
        os.chmod("public", 0o644)
        self.assertEqual(self.log_lines(verifier), [])

    def test_a_short_secret_is_warned_of_once(self) -> None:
        """PyJWT's own warning, at the first token, is suppressed."""
        verifier = self.make(SECRET[:16], "HS256", audience="gateway")
        with warnings.catch_warnings(record=True) as caught, capturedLogs() as logs:
            verifier.reload()
            token = sign(SECRET[:16], "HS256", aud="gateway")
            self.assertEqual(verify(verifier, token), ROBOT)
        self.assertEqual((len(caught), len(logs)), (0, 1))
