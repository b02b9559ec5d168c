"""Tests of gateway.auth.jwks, one of them with a real HTTP server."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.resource import Resource
from twisted.web.server import Site
from zope.interface.verify import verifyObject

from gateway.auth.algorithms import DEFAULT_ALGORITHMS
from gateway.auth.errors import KeysUnavailableError, VerificationError
from gateway.auth.interface import Identity, ITokenVerifier
from gateway.auth.jwks import MAX_AGE, MISSING_KEY_INTERVAL, JwksCache, JwksVerifier
from gateway.auth.keys import KeySet, VerificationKey
from gateway.metrics import Metrics
from gateway.net.errors import FetchError
from gateway.settings import ConfigError
from tests.builders.tokens import (
    EC,
    EC384,
    NOW,
    OTHER_EC,
    OTHER_RSA,
    RSA,
    jwk,
    jwks,
    pem,
    rejection_reason,
    sign,
    verify,
)


def parse(document: bytes) -> KeySet:
    """Parse a document with one key for each word; ``!word`` is a key that is left out."""
    if document == b"nonsense":
        raise ValueError("the answer is no JSON")
    if document == b"broken":
        raise LookupError("a mistake in here")
    words = document.decode().split()
    keys = tuple(VerificationKey(word, frozenset({"RS256"}), word) for word in words if word[0] != "!")
    return KeySet(keys, ", ".join(word[1:] for word in words if word[0] == "!"))


class JwksCacheTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.fetches: list[Deferred[bytes]] = []
        self.cache = JwksCache(
            "idp",
            self.fetch,
            parse,
            clock=self.clock,
            metrics=self.metrics,
            jitter=lambda: 1.0,
        )

    def fetch(self) -> Deferred[bytes]:
        self.fetches.append(Deferred())
        return self.fetches[-1]

    def answer(self, document: bytes) -> None:
        self.fetches[-1].callback(document)

    def fail_fetch(self, problem: str = "no answer within 3 s") -> None:
        self.fetches[-1].errback(FetchError(problem))

    def start_cache(self, document: bytes = b"a") -> None:
        """Start the cache, with these keys."""
        self.cache.start()
        self.answer(document)

    def refresh_for_missing_key(self) -> Deferred[None]:
        waiting = self.cache.refresh_for_missing_key()
        assert waiting is not None
        return waiting

    def kids(self) -> list[str | None] | None:
        return None if self.cache.keys is None else [key.kid for key in self.cache.keys.keys]


class FirstFetchTests(JwksCacheTestCase):
    """Before the first successful fetch."""

    def test_fetched_at_start(self) -> None:
        self.assertRaises(KeysUnavailableError, self.cache.refresh_for_missing_key)
        self.cache.start()
        self.assertEqual(len(self.fetches), 1)
        self.assertIsNone(self.kids())
        self.answer(b"a b")
        self.assertEqual(self.kids(), ["a", "b"])
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.metrics.key_failures, 0)

    def test_verification_waits_for_the_first_fetch(self) -> None:
        self.cache.start()
        waiting = [self.refresh_for_missing_key(), self.refresh_for_missing_key()]
        self.assertEqual(len(self.fetches), 1)
        self.assertNoResult(waiting[0])
        self.answer(b"a")
        for each in waiting:
            self.assertIsNone(self.successResultOf(each))

    def test_a_failure(self) -> None:
        self.cache.start()
        waiting = self.refresh_for_missing_key()
        self.fail_fetch()
        self.failureResultOf(waiting, KeysUnavailableError)
        # Verification fails at once during the backoff.
        self.assertRaises(KeysUnavailableError, self.cache.refresh_for_missing_key)
        self.assertEqual(self.metrics.key_failures, 1)
        self.clock.advance(1)
        self.assertEqual(len(self.fetches), 2)
        waiting = self.refresh_for_missing_key()
        self.answer(b"a")
        self.successResultOf(waiting)
        self.assertEqual(self.kids(), ["a"])

    def test_retries_back_off(self) -> None:
        self.cache.start()
        for pause in (1, 2, 4, 8, 16, 30, 30):
            self.fail_fetch()
            self.clock.advance(pause - 0.01)
            before = len(self.fetches)
            self.clock.advance(0.01)
            self.assertEqual(len(self.fetches), before + 1)

    def test_many_failures(self) -> None:
        self.cache.start()
        for _ in range(2000):
            self.fail_fetch()
            self.clock.advance(30)
        self.assertEqual(len(self.fetches), 2001)

    def test_an_outage_is_logged_once(self) -> None:
        with capturedLogs() as logs:
            self.cache.start()
            self.fail_fetch()
            self.clock.advance(1)
            self.fail_fetch("something else")
            self.clock.advance(2)
            self.answer(b"a")
        lines = [event["log_format"].format(**event) for event in logs]
        self.assertEqual(
            lines,
            [
                "idp: keys cannot be fetched: no answer within 3 s; this is retried, and no token is accepted before "
                "that",
                "idp: keys can be fetched again, after 3 s",
            ],
        )
        self.assertEqual(self.metrics.key_failures, 2)

    def test_an_invalid_document(self) -> None:
        with capturedLogs() as logs:
            self.start_cache(b"nonsense")
        self.assertIn("the answer is no JSON", logs[0]["problem"])
        self.assertEqual(self.metrics.key_failures, 1)
        self.clock.advance(1)
        self.answer(b"a")
        self.assertEqual(self.kids(), ["a"])

    def test_a_mistake_is_a_failure_with_a_traceback(self) -> None:
        self.start_cache(b"broken")
        self.assertEqual(len(self.flushLoggedErrors(LookupError)), 1)
        self.clock.advance(1)
        self.answer(b"a")
        self.assertEqual(self.kids(), ["a"])

    def test_a_fetch_that_fires_synchronously(self) -> None:
        outcomes = [fail(FetchError("no")), succeed(b"a"), succeed(b"b")]
        cache = JwksCache("idp", lambda: outcomes.pop(0), parse, clock=self.clock, metrics=self.metrics)
        cache.start()
        self.assertRaises(KeysUnavailableError, cache.refresh_for_missing_key)
        self.clock.advance(1)
        waiting = cache.refresh_for_missing_key()
        assert waiting is not None
        self.successResultOf(waiting)
        self.assertEqual(outcomes, [])


class MissingKeyTests(JwksCacheTestCase):
    """A key that is not in the cache."""

    def test_once_a_minute(self) -> None:
        self.start_cache()
        waiting = [self.refresh_for_missing_key(), self.refresh_for_missing_key()]
        self.assertEqual(len(self.fetches), 2)
        self.answer(b"a b")
        for each in waiting:
            self.successResultOf(each)
        self.clock.advance(MISSING_KEY_INTERVAL - 0.1)
        self.assertIsNone(self.cache.refresh_for_missing_key())
        self.assertEqual(len(self.fetches), 2)
        self.clock.advance(0.1)
        self.assertNoResult(self.refresh_for_missing_key())
        self.assertEqual(len(self.fetches), 3)

    def test_one_that_fails(self) -> None:
        """The old keys stay in use; a token with a new key cannot be verified."""
        self.start_cache()
        waiting = self.refresh_for_missing_key()
        self.fail_fetch()
        self.failureResultOf(waiting, KeysUnavailableError)
        self.assertEqual(self.kids(), ["a"])
        self.assertRaises(KeysUnavailableError, self.cache.refresh_for_missing_key)
        self.clock.advance(1)
        # A fetch that is in progress anyway is waited for.
        waiting = self.refresh_for_missing_key()
        self.answer(b"a b")
        self.successResultOf(waiting)
        self.assertIsNone(self.cache.refresh_for_missing_key())
        self.assertEqual(len(self.fetches), 3)

    def test_a_cancelled_wait_ends(self) -> None:
        self.start_cache()
        waiting = [self.refresh_for_missing_key(), self.refresh_for_missing_key()]
        waiting[0].cancel()
        self.failureResultOf(waiting[0], CancelledError)
        self.assertFalse(self.fetches[1].called)
        self.answer(b"b")
        self.successResultOf(waiting[1])
        self.assertEqual(self.kids(), ["b"])


class MaxAgeTests(JwksCacheTestCase):
    """Keys in use are fetched again."""

    def test_old_keys_are_fetched_in_the_background(self) -> None:
        self.start_cache()
        self.clock.advance(MAX_AGE - 0.1)
        self.cache.touch()
        self.assertEqual(len(self.fetches), 1)
        self.clock.advance(0.1)
        self.assertEqual(len(self.fetches), 1, "the keys were not used")
        self.cache.touch()
        self.cache.touch()
        self.assertEqual(len(self.fetches), 2)
        self.assertEqual(self.kids(), ["a"])
        self.answer(b"b")
        self.assertEqual(self.kids(), ["b"])
        # This does not start MISSING_KEY_INTERVAL.
        self.assertNoResult(self.refresh_for_missing_key())

    def test_not_more_often_while_it_fails(self) -> None:
        self.start_cache()
        self.clock.advance(MAX_AGE)
        self.cache.touch()
        self.fail_fetch()
        self.cache.touch()
        self.assertEqual(len(self.fetches), 2)
        self.assertEqual(self.kids(), ["a"])
        self.clock.advance(1)
        self.assertEqual(len(self.fetches), 3)

    def test_reload(self) -> None:
        self.start_cache()
        self.cache.reload()
        self.assertEqual(len(self.fetches), 2)
        self.answer(b"b")
        self.assertEqual(self.kids(), ["b"])
        # This does not start MISSING_KEY_INTERVAL.
        self.assertNoResult(self.refresh_for_missing_key())

    def test_reload_while_fetching(self) -> None:
        self.start_cache()
        self.cache.reload()
        self.cache.reload()
        self.cache.reload()
        self.assertEqual(len(self.fetches), 2)
        self.answer(b"b")
        self.assertEqual(len(self.fetches), 3)
        self.answer(b"c")
        self.assertEqual(self.kids(), ["c"])
        self.assertEqual(len(self.fetches), 3)

    def test_reload_during_the_backoff(self) -> None:
        self.cache.start()
        self.fail_fetch()
        self.cache.reload()
        self.answer(b"a")
        self.assertEqual(self.kids(), ["a"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_left_out_keys_are_logged_once(self) -> None:
        with capturedLogs() as logs:
            self.start_cache(b"a !x")
            for document in (b"b !x", b"c !y", b"d"):
                self.cache.reload()
                self.answer(document)
        self.assertEqual(
            [event["log_format"].format(**event) for event in logs],
            ["idp: left out of its keys: x", "idp: left out of its keys: y"],
        )

    def test_a_set_without_a_key_is_a_failure(self) -> None:
        """The old keys stay in use, and the fetch is retried."""
        for document, left_out in ((b"", ""), (b"!x", " (left out: x)")):
            self.start_cache()
            with capturedLogs() as logs:
                self.cache.reload()
                self.answer(document)
                self.clock.advance(1)
                self.answer(document)
            self.assertEqual(self.kids(), ["a"])
            self.assertEqual(
                [event["log_format"].format(**event) for event in logs],
                [
                    f"idp: keys cannot be fetched: no usable key is published{left_out}; "
                    "this is retried, and the old keys stay in use"
                ],
            )
            self.clock.advance(2)
            self.answer(b"b")
            self.assertEqual(self.kids(), ["b"])

    def test_a_set_without_a_key_at_first(self) -> None:
        self.cache.start()
        waiting = self.refresh_for_missing_key()
        self.answer(b"!x")
        self.failureResultOf(waiting, KeysUnavailableError)
        self.clock.advance(1)
        self.answer(b"a")
        self.assertEqual(self.kids(), ["a"])


class StopTests(JwksCacheTestCase):
    def test_stop_while_idle(self) -> None:
        self.start_cache()
        self.successResultOf(self.cache.stop())
        self.clock.advance(MAX_AGE)
        self.cache.touch()
        self.cache.reload()
        self.assertRaises(KeysUnavailableError, self.cache.refresh_for_missing_key)
        self.assertEqual(len(self.fetches), 1)

    def test_stop_while_fetching(self) -> None:
        self.cache.start()
        self.cache.reload()
        waiting = self.refresh_for_missing_key()
        self.successResultOf(self.cache.stop())
        self.failureResultOf(waiting, KeysUnavailableError)
        self.assertEqual(len(self.fetches), 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.metrics.key_failures, 0)

    def test_stop_waits_for_the_end_of_the_request(self) -> None:
        requests: list[Deferred[bytes]] = []

        def fetch() -> Deferred[bytes]:
            requests.append(Deferred(lambda _: None))
            return Deferred.fromCoroutine(lingering(requests[-1]))

        async def lingering(request: Deferred[bytes]) -> bytes:
            try:
                return await request
            except CancelledError:
                await released
                raise

        released: Deferred[None] = Deferred()
        cache = JwksCache("idp", fetch, parse, clock=self.clock, metrics=self.metrics)
        cache.start()
        stopped = cache.stop()
        self.assertNoResult(stopped)
        released.callback(None)
        self.successResultOf(stopped)

    def test_stop_during_the_backoff(self) -> None:
        self.cache.start()
        self.fail_fetch()
        self.successResultOf(self.cache.stop())
        self.assertEqual(self.clock.getDelayedCalls(), [])


class MissingKeyIntervalTests(JwksCacheTestCase):
    def miss_twice(self) -> None:
        """Miss a key, and miss one again 10 s later."""
        self.start_cache()
        waiting = self.refresh_for_missing_key()
        self.answer(b"a")
        self.successResultOf(waiting)
        self.clock.advance(10)
        for _ in range(200):
            self.assertIsNone(self.cache.refresh_for_missing_key())

    def test_once_more_when_the_minute_is_over(self) -> None:
        """In the background, for the client's next try."""
        self.miss_twice()
        self.clock.advance(MISSING_KEY_INTERVAL - 10.1)
        self.assertEqual(len(self.fetches), 2)
        self.clock.advance(0.1)
        self.assertEqual(len(self.fetches), 3)
        self.answer(b"a b")
        self.assertEqual(self.kids(), ["a", "b"])
        # That fetch started the next MISSING_KEY_INTERVAL.
        self.assertIsNone(self.cache.refresh_for_missing_key())
        self.clock.advance(MISSING_KEY_INTERVAL)
        self.assertEqual(len(self.fetches), 4)
        self.answer(b"a b")
        self.clock.advance(10 * MISSING_KEY_INTERVAL)
        self.assertEqual(len(self.fetches), 4, "the keys were not used")

    def test_not_once_more_if_they_were_fetched_meanwhile(self) -> None:
        self.miss_twice()
        self.cache.reload()
        self.answer(b"a b")
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_not_once_more_while_it_fails(self) -> None:
        self.miss_twice()
        self.clock.advance(MISSING_KEY_INTERVAL - 11)
        self.cache.reload()
        self.assertRaises(KeysUnavailableError, self.failing)
        self.clock.advance(0.5)
        self.assertEqual(len(self.fetches), 3)

    def failing(self) -> None:
        self.fail_fetch()
        self.cache.refresh_for_missing_key()

    def test_not_once_more_after_the_end(self) -> None:
        self.miss_twice()
        self.successResultOf(self.cache.stop())
        self.assertEqual(self.clock.getDelayedCalls(), [])


ROBOT = Identity("robot-7")
URL = "https://idp.example.com/keys?x=secret"


def make(clock: Any, url: str = URL, **more: Any) -> JwksVerifier:
    options: dict[str, Any] = {
        "audience": None,
        "issuer": None,
        "wall_clock": lambda: NOW,
        "metrics": Metrics(),
        **more,
    }
    return JwksVerifier(url, options.pop("algorithms", DEFAULT_ALGORITHMS), reactor=clock, **options)


class JwksTests(SynchronousTestCase):
    """Verification with keys that are fetched synchronously."""

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
        identity = verify(verifier, token)
        return self.successResultOf(identity) if isinstance(identity, Deferred) else identity

    def test_by_kid(self) -> None:
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

    def test_another_key_with_the_same_kid(self) -> None:
        """The signature is wrong, so nothing is fetched."""
        verifier = self.make(jwk(RSA, "a"), jwk(EC, "b"))
        self.assertIsNone(verify(verifier, sign(OTHER_RSA, "RS256", {"kid": "a"})))
        self.assertIsNone(verify(verifier, sign(EC, "ES256", {"kid": "a"})))
        self.assertIsNone(verify(verifier, sign(RSA, "RS256", {"kid": "b"})))
        self.assertEqual(self.fetched, 1)

    def test_without_a_kid(self) -> None:
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
        # The old key is gone.
        self.assertIsNone(verify(verifier, sign(EC, "ES256", {"kid": "a"})))
        self.assertEqual(self.fetched, 2)

    def test_a_new_key_without_a_kid(self) -> None:
        verifier = self.make(jwk(EC))
        self.published = jwks(jwk(OTHER_EC))
        self.assertEqual(self.verified(verifier, sign(OTHER_EC, "ES256")), ROBOT)

    def test_an_unknown_key(self) -> None:
        verifier = self.make(jwk(EC, "a"))
        for _ in range(10):
            self.assertIsNone(self.verified(verifier, sign(OTHER_EC, "ES256", {"kid": "x"})))
        self.assertEqual(self.fetched, 2)
        self.clock.advance(60)
        self.assertIsNone(self.verified(verifier, sign(OTHER_EC, "ES256", {"kid": "x"})))
        self.assertEqual(self.fetched, 3)

    def test_a_new_key_within_the_minute(self) -> None:
        """The first client is told to try again later, and is accepted then, even if others keep trying."""
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

    def test_nothing_is_fetched_for_tokens_that_no_key_could_verify(self) -> None:
        """Nothing is fetched for tokens for other services, or those that are signed but not accepted."""
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

    def test_old_keys_are_refreshed_on_use(self) -> None:
        verifier = self.make(jwk(EC, "a"))
        token = sign(EC, "ES256", {"kid": "a"})
        self.published = jwks(jwk(OTHER_EC, "b"))
        self.clock.advance(600)
        # The token that causes the fetch may be verified with the old or the new keys.
        verify(verifier, token)
        self.assertEqual(self.fetched, 2)
        self.assertIsNone(self.verified(verifier, token))

    def test_before_the_first_fetch(self) -> None:
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
        self.assertIn("jwks:url='http://idp.example.com/' is not valid: over http the keys", str(error))


class ServedTests(TestCase):
    async def test_end_to_end(self) -> None:
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
