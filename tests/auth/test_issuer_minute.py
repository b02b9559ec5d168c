"""Tests of gateway.auth.jwks: a key that is not there, within the minute after it was looked for."""

from __future__ import annotations

from gateway.auth.interface import KeysUnavailableError
from gateway.auth.jwks import MISSING_KEY_INTERVAL
from tests.auth.test_issuer import JwksCacheTestCase


class MissingKeyIntervalTests(JwksCacheTestCase):
    def asked_again(self) -> None:
        """A key was not there, and 10 s later one was not there again."""
        self.start_cache()
        waiting = self.refresh_for_missing_key()
        self.answer(b"a")
        self.successResultOf(waiting)
        self.clock.advance(10)
        for _ in range(200):
            self.assertIsNone(self.cache.refresh_for_missing_key())

    def test_once_more_when_the_minute_is_over(self) -> None:
        """In the background: it is there when that client comes back."""
        self.asked_again()
        self.clock.advance(MISSING_KEY_INTERVAL - 10.1)
        self.assertEqual(len(self.fetches), 2)
        self.clock.advance(0.1)
        self.assertEqual(len(self.fetches), 3)
        self.answer(b"a b")
        self.assertEqual(self.kids(), ["a", "b"])
        # That was the one of the next minute.
        self.assertIsNone(self.cache.refresh_for_missing_key())
        self.clock.advance(MISSING_KEY_INTERVAL)
        self.assertEqual(len(self.fetches), 4)
        self.answer(b"a b")
        self.clock.advance(10 * MISSING_KEY_INTERVAL)
        self.assertEqual(len(self.fetches), 4, "nobody asked")

    def test_not_once_more_if_they_were_fetched_meanwhile(self) -> None:
        self.asked_again()
        self.cache.reload()
        self.answer(b"a b")
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_not_once_more_while_it_fails(self) -> None:
        self.asked_again()
        self.clock.advance(MISSING_KEY_INTERVAL - 11)
        self.cache.reload()
        self.assertRaises(KeysUnavailableError, self.failing)
        self.clock.advance(0.5)
        self.assertEqual(len(self.fetches), 3)

    def failing(self) -> None:
        self.fail_fetch()
        self.cache.refresh_for_missing_key()

    def test_not_once_more_after_the_end(self) -> None:
        self.asked_again()
        self.successResultOf(self.cache.stop())
        self.assertEqual(self.clock.getDelayedCalls(), [])
