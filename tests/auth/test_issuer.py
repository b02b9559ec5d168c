"""Tests of gateway.auth.jwks."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.interface import KeysUnavailableError
from gateway.auth.jwks import MAX_AGE, MISSING_KEY_INTERVAL, JwksCache
from gateway.auth.keys import KeySet, VerificationKey
from gateway.metrics import Metrics
from gateway.net.http_client import FetchError


def parse(document: bytes) -> KeySet:
    """A key for each word; ``!word`` is left out."""
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
            uniform=lambda least, most: most,
        )

    def fetch(self) -> Deferred[bytes]:
        self.fetches.append(Deferred())
        return self.fetches[-1]

    def answer(self, document: bytes) -> None:
        self.fetches[-1].callback(document)

    def fail_fetch(self, problem: str = "no answer within 3 s") -> None:
        self.fetches[-1].errback(FetchError(problem))

    def start_cache(self, document: bytes = b"a") -> None:
        """Start, with those keys."""
        self.cache.start()
        self.answer(document)

    def refresh_for_missing_key(self) -> Deferred[None]:
        waiting = self.cache.refresh_for_missing_key()
        assert waiting is not None
        return waiting

    def kids(self) -> list[str | None] | None:
        return None if self.cache.keys is None else [key.kid for key in self.cache.keys.keys]


class FirstFetchTests(JwksCacheTestCase):
    """Before there are keys."""

    def test_fetched_at_the_start(self) -> None:
        self.assertRaises(KeysUnavailableError, self.cache.refresh_for_missing_key)
        self.cache.start()
        self.assertEqual(len(self.fetches), 1)
        self.assertIsNone(self.kids())
        self.answer(b"a b")
        self.assertEqual(self.kids(), ["a", "b"])
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.metrics.key_failures, 0)

    def test_who_comes_meanwhile_waits(self) -> None:
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
        # In the pause nobody waits.
        self.assertRaises(KeysUnavailableError, self.cache.refresh_for_missing_key)
        self.assertEqual(self.metrics.key_failures, 1)
        self.clock.advance(1)
        self.assertEqual(len(self.fetches), 2)
        waiting = self.refresh_for_missing_key()
        self.answer(b"a")
        self.successResultOf(waiting)
        self.assertEqual(self.kids(), ["a"])

    def test_pauses_grow(self) -> None:
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

    def test_it_is_said_once(self) -> None:
        with capturedLogs() as logs:
            self.cache.start()
            self.fail_fetch()
            self.clock.advance(1)
            self.fail_fetch("something else")
            self.clock.advance(2)
            self.answer(b"a")
        said = [event["log_format"].format(**event) for event in logs]
        self.assertEqual(
            said,
            [
                "idp: keys cannot be fetched: no answer within 3 s; it is tried again, and no token is accepted before",
                "idp: keys can be fetched again, after 3 s",
            ],
        )
        self.assertEqual(self.metrics.key_failures, 2)

    def test_what_is_no_set_of_keys(self) -> None:
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

    def test_what_is_there_at_once(self) -> None:
        outcomes = [fail(FetchError("no")), succeed(b"a"), succeed(b"b")]
        issuer = JwksCache("idp", lambda: outcomes.pop(0), parse, clock=self.clock, metrics=self.metrics)
        issuer.start()
        self.assertRaises(KeysUnavailableError, issuer.refresh_for_missing_key)
        self.clock.advance(1)
        waiting = issuer.refresh_for_missing_key()
        assert waiting is not None
        self.successResultOf(waiting)
        self.assertEqual(outcomes, [])


class MissingKeyTests(JwksCacheTestCase):
    """A key that is not there."""

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
        """The old keys stay; whether the new one is right cannot be known."""
        self.start_cache()
        waiting = self.refresh_for_missing_key()
        self.fail_fetch()
        self.failureResultOf(waiting, KeysUnavailableError)
        self.assertEqual(self.kids(), ["a"])
        self.assertRaises(KeysUnavailableError, self.cache.refresh_for_missing_key)
        self.clock.advance(1)
        # What is under way anyway is waited for.
        waiting = self.refresh_for_missing_key()
        self.answer(b"a b")
        self.successResultOf(waiting)
        self.assertIsNone(self.cache.refresh_for_missing_key())
        self.assertEqual(len(self.fetches), 3)

    def test_who_is_cancelled_waits_no_longer(self) -> None:
        self.start_cache()
        waiting = [self.refresh_for_missing_key(), self.refresh_for_missing_key()]
        waiting[0].cancel()
        self.failureResultOf(waiting[0], CancelledError)
        self.assertFalse(self.fetches[1].called)
        self.answer(b"b")
        self.successResultOf(waiting[1])
        self.assertEqual(self.kids(), ["b"])


class MaxAgeTests(JwksCacheTestCase):
    """Keys that are in use."""

    def test_in_the_background_when_old(self) -> None:
        self.start_cache()
        self.clock.advance(MAX_AGE - 0.1)
        self.cache.touch()
        self.assertEqual(len(self.fetches), 1)
        self.clock.advance(0.1)
        self.assertEqual(len(self.fetches), 1, "nobody used them")
        self.cache.touch()
        self.cache.touch()
        self.assertEqual(len(self.fetches), 2)
        self.assertEqual(self.kids(), ["a"])
        self.answer(b"b")
        self.assertEqual(self.kids(), ["b"])
        # A minute has not begun by that.
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
        # It does not count for the minute.
        self.assertNoResult(self.refresh_for_missing_key())

    def test_reload_while_it_is_fetched(self) -> None:
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

    def test_reload_in_a_pause(self) -> None:
        self.cache.start()
        self.fail_fetch()
        self.cache.reload()
        self.answer(b"a")
        self.assertEqual(self.kids(), ["a"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_what_is_left_out_is_said_once(self) -> None:
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
        """The old keys stay, and it is tried again."""
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
                    f"idp: keys cannot be fetched: no key is published that could be used{left_out}; "
                    "it is tried again, and the old ones stay"
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
    def test_in_rest(self) -> None:
        self.start_cache()
        self.successResultOf(self.cache.stop())
        self.clock.advance(MAX_AGE)
        self.cache.touch()
        self.cache.reload()
        self.assertRaises(KeysUnavailableError, self.cache.refresh_for_missing_key)
        self.assertEqual(len(self.fetches), 1)

    def test_while_it_is_fetched(self) -> None:
        self.cache.start()
        self.cache.reload()
        waiting = self.refresh_for_missing_key()
        self.successResultOf(self.cache.stop())
        self.failureResultOf(waiting, KeysUnavailableError)
        self.assertEqual(len(self.fetches), 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.metrics.key_failures, 0)

    def test_it_waits_for_the_end_of_the_request(self) -> None:
        requests: list[Deferred[bytes]] = []

        def fetch() -> Deferred[bytes]:
            requests.append(Deferred(lambda _: None))
            return Deferred.fromCoroutine(lingering(requests[-1]))

        async def lingering(request: Deferred[bytes]) -> bytes:
            try:
                return await request
            except CancelledError:
                await over
                raise

        over: Deferred[None] = Deferred()
        issuer = JwksCache("idp", fetch, parse, clock=self.clock, metrics=self.metrics)
        issuer.start()
        stopped = issuer.stop()
        self.assertNoResult(stopped)
        over.callback(None)
        self.successResultOf(stopped)

    def test_in_a_pause(self) -> None:
        self.cache.start()
        self.fail_fetch()
        self.successResultOf(self.cache.stop())
        self.assertEqual(self.clock.getDelayedCalls(), [])
