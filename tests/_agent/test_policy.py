"""When an agent comes back."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.agent.reconnect import Backoff, Then, after_end, after_refusal
from gateway.websocket.client import LONGEST_WAIT, Ended, Refused, wait_asked_for


class AfterEndTests(SynchronousTestCase):
    """The table of close codes."""

    def test_codes(self) -> None:
        for code, then in {
            1000: Then.AGAIN,
            1001: Then.AGAIN,
            1002: Then.STOP,
            1003: Then.STOP,
            1005: Then.AGAIN,
            1006: Then.AGAIN,
            1007: Then.STOP,
            1008: Then.STOP,
            1009: Then.STOP,
            1010: Then.STOP,
            1011: Then.AGAIN,
            1012: Then.AGAIN,
            1013: Then.AGAIN,
            3000: Then.AGAIN,
            4001: Then.STOP,
            4003: Then.LATER,
        }.items():
            self.assertIs(after_end(Ended(code, ""), new_token=False), then, code)

    def test_1008_with_a_new_token(self) -> None:
        self.assertIs(after_end(Ended(1008, ""), new_token=True), Then.AGAIN)
        self.assertIs(after_end(Ended(4001, ""), new_token=True), Then.STOP)

    def test_what_this_side_complained_of_stops_nobody(self) -> None:
        for code in [1002, 1003, 1007, 1009]:
            self.assertIs(after_end(Ended(code, "", ours=True), new_token=False), Then.LATER)
        self.assertIs(after_end(Ended(1006, "", ours=True), new_token=False), Then.AGAIN)


class RefusalTests(SynchronousTestCase):
    def test_statuses(self) -> None:
        for status in [400, 401, 403, 404]:
            self.assertIs(after_refusal(status, new_token=False), Then.STOP)
        for status in [200, 307, 429, 500, 502, 503]:
            self.assertIs(after_refusal(status, new_token=False), Then.AGAIN)

    def test_statuses_with_a_new_token(self) -> None:
        for status, then in {400: Then.LATER, 401: Then.AGAIN, 403: Then.AGAIN, 404: Then.LATER}.items():
            self.assertIs(after_refusal(status, new_token=True), then)

    def test_text(self) -> None:
        body = b'{"error":"token","message":"expired"}'
        self.assertEqual(str(Refused(401, {}, body)), "the gateway answered 401 (token: expired)")
        self.assertEqual(str(Refused(502, {}, b"<html>")), "the gateway answered 502")
        self.assertEqual(str(Refused(502, {}, b"[" * 4000)), "the gateway answered 502")

    def test_text_is_escaped_and_short(self) -> None:
        text = str(Refused(401, {}, b'{"error":"a\\nb\\u009b","message":"' + b"x" * 3000 + b'"}'))
        self.assertIn(r"(a\nb\x9b: xxx", text)
        self.assertLess(len(text), 300)

    def test_retry_after(self) -> None:
        for text, seconds in [
            ("7", 7.0),
            ("0", 0.0),
            ("-1", 0.0),
            ("1.5", 0.0),
            ("99999", LONGEST_WAIT),
            ("9" * 5000, 0.0),
            ("٣", 0.0),
            ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
            ("", 0.0),
        ]:
            self.assertEqual(Refused(503, {"retry-after": text}, b"").retry_after, seconds, text)
        self.assertEqual(Refused(429, {"retry-after": "7"}, b"").retry_after, 7.0)
        self.assertEqual(Refused(403, {"retry-after": "7"}, b"").retry_after, 0.0)
        self.assertEqual(Refused(503, {}, b"").retry_after, 0.0)

    def test_location(self) -> None:
        self.assertEqual(Refused(307, {"location": "ws://b/"}, b"").location, "ws://b/")
        self.assertIsNone(Refused(307, {}, b"").location)
        self.assertIsNone(Refused(503, {"location": "ws://b/"}, b"").location)


class WaitAskedForTests(SynchronousTestCase):
    def test_numbers(self) -> None:
        for value, seconds in [
            (1.5, 1.5),
            (2, 2.0),
            (-1, 0.0),
            (float("inf"), LONGEST_WAIT),
            (float("nan"), 0.0),
            (10**400, LONGEST_WAIT),
            (True, 0.0),
            ("3", 0.0),
            (None, 0.0),
        ]:
            self.assertEqual(wait_asked_for(value), seconds, value)


class BackoffTests(SynchronousTestCase):
    def test_grows_to_the_maximum(self) -> None:
        backoff = Backoff(1.0, 10.0, lambda: 1.0)
        self.assertEqual([backoff.next() for _ in range(6)], [1.0, 2.0, 4.0, 8.0, 10.0, 10.0])

    def test_full_jitter(self) -> None:
        numbers = iter([0.0, 0.25, 1.0])
        backoff = Backoff(1.0, 10.0, lambda: next(numbers))
        self.assertEqual([backoff.next() for _ in range(3)], [0.0, 0.5, 4.0])

    def test_late(self) -> None:
        backoff = Backoff(1.0, 10.0, lambda: 0.0)
        self.assertEqual(backoff.next(late=True), 10.0)

    def test_reset(self) -> None:
        backoff = Backoff(1.0, 10.0, lambda: 1.0)
        self.assertFalse(backoff.failing)
        backoff.next()
        self.assertTrue(backoff.failing)
        backoff.reset()
        self.assertFalse(backoff.failing)
        self.assertEqual(backoff.next(), 1.0)

    def test_settled_after(self) -> None:
        self.assertEqual(Backoff(1.0, 10.0, lambda: 1.0).settled_after, 10.0)
        self.assertEqual(Backoff(1.0, 300.0, lambda: 1.0).settled_after, 60.0)

    def test_bad_waits(self) -> None:
        for waits in [(0, 1), (-1, 1), (2, 1), (1, float("inf")), (float("nan"), 1), (1, float("nan"))]:
            with self.assertRaisesRegex(ValueError, "is not"):
                Backoff(*waits, lambda: 1.0)

    @settings(deadline=None, max_examples=100)
    @given(st.floats(0.001, 100), st.floats(1, 36), st.integers(0, 200), st.floats(0, 1))
    def test_bounds(self, initial: float, factor: float, failures: int, random: Any) -> None:
        """Never below nothing, never above the maximum, never above what so many failures allow."""
        maximum = min(initial * factor, LONGEST_WAIT)
        backoff = Backoff(initial, maximum, lambda: random)
        for _ in range(failures):
            backoff.next()
        delay = backoff.next()
        self.assertTrue(0 <= delay <= maximum)
        self.assertTrue(delay <= initial * 2.0**failures)
