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

from gateway.auth.algorithms import USUAL
from gateway.auth.interface import Identity, ITokenVerifier, KeysUnavailable
from gateway.auth.jwks import Jwks
from gateway.settings import ConfigError
from gateway.telemetry.metrics import Metrics
from tests.auth.signing import EC, EC384, NOW, OTHER_EC, OTHER_RSA, RSA, jwk, jwks, pem, sign

ROBOT = Identity("robot-7")
URL = "https://idp.example.com/keys?x=secret"


def make(clock: Any, url: str = URL, **more: Any) -> Jwks:
    given: dict[str, Any] = {"audience": None, "issuer": None, "now": lambda: NOW, "metrics": Metrics(), **more}
    return Jwks(url, given.pop("algorithms", USUAL), reactor=clock, **given)


class JwksTests(SynchronousTestCase):
    """By keys that are there at once."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.published = b""
        self.fetched = 0

    def make(self, *keys: dict[str, Any], **more: Any) -> Jwks:
        self.published = jwks(*keys)
        verifier = make(self.clock, **more)
        self.patch(verifier._issuer, "_fetch", self.fetch)
        verifier._issuer.start()
        return verifier

    def fetch(self) -> Deferred[bytes]:
        self.fetched += 1
        return succeed(self.published)

    def verified(self, verifier: Jwks, token: str) -> Identity | None:
        said = verifier.verify(token)
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
            self.assertEqual(verifier.verify(sign(key, algorithm, {"kid": kid})), ROBOT)
        self.assertEqual(self.fetched, 1)

    def test_another_key_by_that_name(self) -> None:
        """That says all: nothing is fetched for it."""
        verifier = self.make(jwk(RSA, "a"), jwk(EC, "b"))
        self.assertIsNone(verifier.verify(sign(OTHER_RSA, "RS256", {"kid": "a"})))
        self.assertIsNone(verifier.verify(sign(EC, "ES256", {"kid": "a"})))
        self.assertIsNone(verifier.verify(sign(RSA, "RS256", {"kid": "b"})))
        self.assertEqual(self.fetched, 1)

    def test_without_a_name(self) -> None:
        verifier = self.make(jwk(OTHER_RSA, "a"), jwk(RSA, "b"), jwk(EC))
        self.assertEqual(verifier.verify(sign(RSA, "RS256")), ROBOT)
        self.assertEqual(verifier.verify(sign(EC, "ES256")), ROBOT)
        self.assertEqual(verifier.verify(sign(EC, "ES256", {"kid": "x"})), ROBOT)
        self.assertEqual(self.fetched, 1)

    def test_a_new_key(self) -> None:
        verifier = self.make(jwk(EC, "a"))
        self.published = jwks(jwk(OTHER_EC, "b"))
        self.assertEqual(self.verified(verifier, sign(OTHER_EC, "ES256", {"kid": "b"})), ROBOT)
        self.assertEqual(self.fetched, 2)
        # The old one is no more.
        self.assertIsNone(verifier.verify(sign(EC, "ES256", {"kid": "a"})))
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
            self.assertIsNone(verifier.verify(token))
        self.assertEqual(self.fetched, 1)
        self.assertEqual(verifier.verify(sign(EC, "ES256", {"kid": "a"}, iss="I", aud="A")), ROBOT)

    def test_expired(self) -> None:
        token = sign(EC, "ES256", {"kid": "a"}, exp=NOW - 60)
        self.assertEqual(self.make(jwk(EC, "a")).verify(token), Identity("robot-7", NOW - 60))

    def test_algorithms(self) -> None:
        verifier = self.make(jwk(RSA, "a", alg="RS512"), algorithms=("RS256", "RS512"))
        self.assertIsNone(verifier.verify(sign(RSA, "RS256", {"kid": "a"})))
        self.assertEqual(verifier.verify(sign(RSA, "RS512", {"kid": "a"})), ROBOT)
        self.assertIsNone(verifier.verify(sign(RSA, "RS384", {"kid": "a"})))

    def test_they_are_looked_at_again(self) -> None:
        verifier = self.make(jwk(EC, "a"))
        token = sign(EC, "ES256", {"kid": "a"})
        self.published = jwks(jwk(OTHER_EC, "b"))
        self.clock.advance(600)
        # The one that brings it about is still judged by the old ones, or by the new.
        verifier.verify(token)
        self.assertEqual(self.fetched, 2)
        self.assertIsNone(self.verified(verifier, token))

    def test_before_there_are_any(self) -> None:
        verifier = make(self.clock)
        self.assertIsNone(verifier.verify("opaque"))
        self.assertRaises(KeysUnavailable, verifier.verify, sign(EC, "ES256"))

    @settings(deadline=None, max_examples=100)
    @given(st.text() | st.lists(st.text("abcABC012-_="), max_size=4).map(".".join))
    def test_any_text(self, token: str) -> None:
        self.assertIsNone(self.make(jwk(EC)).verify(token))

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
            self.assertEqual(await verifier.verify(token), ROBOT)
            self.assertEqual(verifier.verify(token), ROBOT)
            verifier.reload()
        finally:
            await verifier.stop()
            await port.stopListening()
