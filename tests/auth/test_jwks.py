"""Tests of gateway.auth.jwks, with a real HTTP server where keys are fetched."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.resource import Resource
from twisted.web.server import Site
from zope.interface.verify import verifyObject

from gateway.auth.algorithms import DEFAULT_ALGORITHMS
from gateway.auth.interface import Identity, ITokenVerifier, KeysUnavailableError
from gateway.auth.jwks import JwksVerifier
from gateway.auth.refusals import VerificationError
from gateway.metrics import Metrics
from gateway.settings import ConfigError
from tests.auth.signing import EC, EC384, NOW, OTHER_EC, OTHER_RSA, RSA, jwk, jwks, pem, rejection_reason, sign, verify

ROBOT = Identity("robot-7")
URL = "https://idp.example.com/keys?x=secret"


def make(clock: Any, url: str = URL, **more: Any) -> JwksVerifier:
    given: dict[str, Any] = {"audience": None, "issuer": None, "wall_clock": lambda: NOW, "metrics": Metrics(), **more}
    return JwksVerifier(url, given.pop("algorithms", DEFAULT_ALGORITHMS), reactor=clock, **given)


class JwksTests(SynchronousTestCase):
    """By keys that are there at once."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.published = b""
        self.fetched = 0

    def make(self, *keys: dict[str, Any], **more: Any) -> JwksVerifier:
        self.published = jwks(*keys)
        verifier = make(self.clock, **more)
        self.patch(verifier._cache, "_fetch", self.fetch)
        verifier._cache.start()
        return verifier

    def fetch(self) -> Deferred[bytes]:
        self.fetched += 1
        return succeed(self.published)

    def verified(self, verifier: JwksVerifier, token: str) -> Identity | None:
        said = verify(verifier, token)
        return self.successResultOf(said) if isinstance(said, Deferred) else said

    def test_by_name(self) -> None:
        verifier = self.make(jwk(RSA, "a"), jwk(EC, "b"), jwk(EC384, "c"))
        verifyObject(ITokenVerifier, verifier)
        for key, algorithm, kid in (
            (RSA, "RS256", "a"),
            (RSA, "PS512", "a"),
            (EC, "ES256", "b"),
            (EC384, "ES384", "c"),
        ):
            self.assertEqual(verify(verifier, sign(key, algorithm, {"kid": kid})), ROBOT)
        self.assertEqual(self.fetched, 1)

    def test_another_key_by_that_name(self) -> None:
        """That says all: nothing is fetched for it."""
        verifier = self.make(jwk(RSA, "a"), jwk(EC, "b"))
        self.assertIsNone(verify(verifier, sign(OTHER_RSA, "RS256", {"kid": "a"})))
        self.assertIsNone(verify(verifier, sign(EC, "ES256", {"kid": "a"})))
        self.assertIsNone(verify(verifier, sign(RSA, "RS256", {"kid": "b"})))
        self.assertEqual(self.fetched, 1)

    def test_without_a_name(self) -> None:
        verifier = self.make(jwk(OTHER_RSA, "a"), jwk(RSA, "b"), jwk(EC))
        self.assertEqual(verify(verifier, sign(RSA, "RS256")), ROBOT)
        self.assertEqual(verify(verifier, sign(EC, "ES256")), ROBOT)
        self.assertEqual(verify(verifier, sign(EC, "ES256", {"kid": "x"})), ROBOT)
        self.assertEqual(self.fetched, 1)

    def test_a_new_key(self) -> None:
        verifier = self.make(jwk(EC, "a"))
        self.published = jwks(jwk(OTHER_EC, "b"))
        self.assertEqual(self.verified(verifier, sign(OTHER_EC, "ES256", {"kid": "b"})), ROBOT)
        self.assertEqual(self.fetched, 2)
        # The old one is no more.
        self.assertIsNone(verify(verifier, sign(EC, "ES256", {"kid": "a"})))
        self.assertEqual(self.fetched, 2)

    def test_a_new_key_without_a_name(self) -> None:
        verifier = self.make(jwk(EC))
        self.published = jwks(jwk(OTHER_EC))
        self.assertEqual(self.verified(verifier, sign(OTHER_EC, "ES256")), ROBOT)

    def test_a_key_that_nobody_has(self) -> None:
        verifier = self.make(jwk(EC, "a"))
        for _ in range(10):
            self.assertIsNone(self.verified(verifier, sign(OTHER_EC, "ES256", {"kid": "x"})))
        self.assertEqual(self.fetched, 2)
        self.clock.advance(60)
        self.assertIsNone(self.verified(verifier, sign(OTHER_EC, "ES256", {"kid": "x"})))
        self.assertEqual(self.fetched, 3)

    def test_a_new_key_within_the_minute(self) -> None:
        """The first to come with it is told to come back; when he does, it is there, whoever else keeps asking."""
        verifier = self.make(jwk(EC, "a"))
        self.verified(verifier, sign(OTHER_RSA, "RS256", {"kid": "a stranger's"}))
        self.clock.advance(10)
        self.published = jwks(jwk(EC, "a"), jwk(OTHER_EC, "b"))
        token = sign(OTHER_EC, "ES256", {"kid": "b"})
        error = self.assertRaises(VerificationError, verifier.verify, token)
        self.assertEqual(error.reason, "unknown_key")
        self.assertEqual(str(error), "this token's key is not known here yet; try again in a minute")
        self.clock.advance(50)
        self.assertEqual(verifier.verify(token), ROBOT)
        self.assertEqual(self.fetched, 3)

    def test_reasons(self) -> None:
        verifier = self.make(jwk(EC, "a"), audience="A")
        unknown = sign(OTHER_EC, "ES256", {"kid": "x"})
        failure = self.failureResultOf(verifier.verify(unknown), VerificationError)
        self.assertEqual((failure.value.reason, str(failure.value)), ("unknown_key", "this token is not known here"))
        self.assertEqual(rejection_reason(verifier, unknown), "unknown_key")
        self.assertEqual(rejection_reason(verifier, sign(OTHER_EC, "ES256", {"kid": "a"})), "signature")
        self.assertEqual(rejection_reason(verifier, sign(EC, "ES256", {"kid": "a"}, aud="B")), "audience")
        self.assertEqual(rejection_reason(verifier, "opaque"), "malformed")

    def test_what_no_key_could_mend(self) -> None:
        """Nothing is fetched for what is not meant for here, or is signed and all the same not accepted."""
        verifier = self.make(jwk(EC, "a"), issuer="I", audience="A")
        for token in (
            "",
            "opaque",
            "a.b.c",
            sign(OTHER_EC, "ES256", {"kid": "x"}),
            sign(OTHER_EC, "ES256", {"kid": "x"}, iss="other"),
            sign(pem(EC)[30:90], "HS256", {"kid": "x"}, iss="I", aud="A"),
            sign(EC, "ES256", {"kid": "a"}, iss="I", aud="other"),
            sign(EC, "ES256", {"kid": "a"}, iss="I", aud="A", nbf=NOW + 60),
            sign(EC, "ES256", {"kid": "a"}, iss="I", aud="A", sub="a b"),
        ):
            self.assertIsNone(verify(verifier, token))
        self.assertEqual(self.fetched, 1)
        self.assertEqual(verify(verifier, sign(EC, "ES256", {"kid": "a"}, iss="I", aud="A")), ROBOT)

    def test_expired(self) -> None:
        token = sign(EC, "ES256", {"kid": "a"}, exp=NOW - 60)
        self.assertEqual(verify(self.make(jwk(EC, "a")), token), Identity("robot-7", NOW - 60))

    def test_algorithms(self) -> None:
        verifier = self.make(jwk(RSA, "a", alg="RS512"), algorithms=("RS256", "RS512"))
        self.assertIsNone(verify(verifier, sign(RSA, "RS256", {"kid": "a"})))
        self.assertEqual(verify(verifier, sign(RSA, "RS512", {"kid": "a"})), ROBOT)
        self.assertIsNone(verify(verifier, sign(RSA, "RS384", {"kid": "a"})))

    def test_they_are_looked_at_again(self) -> None:
        verifier = self.make(jwk(EC, "a"))
        token = sign(EC, "ES256", {"kid": "a"})
        self.published = jwks(jwk(OTHER_EC, "b"))
        self.clock.advance(600)
        # The one that brings it about is still judged by the old ones, or by the new.
        verify(verifier, token)
        self.assertEqual(self.fetched, 2)
        self.assertIsNone(self.verified(verifier, token))

    def test_before_there_are_any(self) -> None:
        verifier = make(self.clock)
        self.assertIsNone(verify(verifier, "opaque"))
        self.assertRaises(KeysUnavailableError, verifier.verify, sign(EC, "ES256"))

    @settings(deadline=None, max_examples=100)
    @given(st.text() | st.lists(st.text("abcABC012-_="), max_size=4).map(".".join))
    def test_any_text(self, token: str) -> None:
        self.assertIsNone(verify(self.make(jwk(EC)), token))

    def test_bad_url(self) -> None:
        error = self.assertRaises(ConfigError, make, self.clock, "http://idp.example.com/?x=secret")
        self.assertEqual(error.option, "auth")
        self.assertIn("jwks:url='http://idp.example.com/' will not do: by http anybody", str(error))


class ServedTests(TestCase):
    async def test_all_of_it(self) -> None:
        page = Resource()
        page.isLeaf = True
        page.render_GET = lambda request: jwks(jwk(EC, "a"))
        port = reactor.listenTCP(0, Site(page), interface="127.0.0.1")
        verifier = make(reactor, f"http://127.0.0.1:{port.getHost().port}/keys?x=secret")
        try:
            with capturedLogs() as logs:
                verifier.start()
            (warned,) = (event for event in logs if "audience=" in event["log_format"])
            self.assertNotIn("secret", str(warned["kind"]))
            token = sign(EC, "ES256", {"kid": "a"})
            self.assertEqual(await verify(verifier, token), ROBOT)
            self.assertEqual(verify(verifier, token), ROBOT)
            verifier.reload()
        finally:
            await verifier.stop()
            await port.stopListening()
