"""When an agent comes back."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.agent.reconnect import Action, Backoff, action_after_close, action_after_refusal
from gateway.websocket.client import MAX_DELAY, CloseEvent, HandshakeRefusedError, parse_delay


class ActionAfterCloseTests(SynchronousTestCase):
    """The table of close codes."""

    def test_codes(self) -> None:
        for code, then in {
            1000: Action.RETRY,
            1001: Action.RETRY,
            1002: Action.STOP,
            1003: Action.STOP,
            1005: Action.RETRY,
            1006: Action.RETRY,
            1007: Action.STOP,
            1008: Action.STOP,
            1009: Action.STOP,
            1010: Action.STOP,
            1011: Action.RETRY,
            1012: Action.RETRY,
            1013: Action.RETRY,
            3000: Action.RETRY,
            4001: Action.STOP,
            4003: Action.RETRY_AT_MAX_DELAY,
        }.items():
            self.assertIs(action_after_close(CloseEvent(code, ""), token_may_change=False), then, code)

    def test_1008_with_a_new_token(self) -> None:
        self.assertIs(action_after_close(CloseEvent(1008, ""), token_may_change=True), Action.RETRY)
        self.assertIs(action_after_close(CloseEvent(4001, ""), token_may_change=True), Action.STOP)

    def test_what_this_side_complained_of_stops_nobody(self) -> None:
        for code in [1002, 1003, 1007, 1009]:
            self.assertIs(
                action_after_close(CloseEvent(code, "", initiated_locally=True), token_may_change=False),
                Action.RETRY_AT_MAX_DELAY,
            )
        self.assertIs(
            action_after_close(CloseEvent(1006, "", initiated_locally=True), token_may_change=False), Action.RETRY
        )


class HandshakeRefusedErrorTests(SynchronousTestCase):
    def test_statuses(self) -> None:
        for status in [400, 401, 403, 404]:
            self.assertIs(action_after_refusal(status, token_may_change=False), Action.STOP)
        for status in [200, 307, 429, 500, 502, 503]:
            self.assertIs(action_after_refusal(status, token_may_change=False), Action.RETRY)

    def test_statuses_with_a_new_token(self) -> None:
        for status, then in {
            400: Action.RETRY_AT_MAX_DELAY,
            401: Action.RETRY,
            403: Action.RETRY,
            404: Action.RETRY_AT_MAX_DELAY,
        }.items():
            self.assertIs(action_after_refusal(status, token_may_change=True), then)

    def test_text(self) -> None:
        body = b'{"error":"token","message":"expired"}'
        self.assertEqual(str(HandshakeRefusedError(401, {}, body)), "the gateway answered 401 (token: expired)")
        self.assertEqual(str(HandshakeRefusedError(502, {}, b"<html>")), "the gateway answered 502")
        self.assertEqual(str(HandshakeRefusedError(502, {}, b"[" * 4000)), "the gateway answered 502")

    def test_text_is_escaped_and_short(self) -> None:
        text = str(HandshakeRefusedError(401, {}, b'{"error":"a\\nb\\u009b","message":"' + b"x" * 3000 + b'"}'))
        self.assertIn(r"(a\nb\x9b: xxx", text)
        self.assertLess(len(text), 300)

    def test_retry_after(self) -> None:
        for text, seconds in [
            ("7", 7.0),
            ("0", 0.0),
            ("-1", 0.0),
            ("1.5", 0.0),
            ("99999", MAX_DELAY),
            ("9" * 5000, 0.0),
            ("٣", 0.0),
            ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
            ("", 0.0),
        ]:
            self.assertEqual(HandshakeRefusedError(503, {"retry-after": text}, b"").retry_after, seconds, text)
        self.assertEqual(HandshakeRefusedError(429, {"retry-after": "7"}, b"").retry_after, 7.0)
        self.assertEqual(HandshakeRefusedError(403, {"retry-after": "7"}, b"").retry_after, 0.0)
        self.assertEqual(HandshakeRefusedError(503, {}, b"").retry_after, 0.0)

    def test_location(self) -> None:
        self.assertEqual(HandshakeRefusedError(307, {"location": "ws://b/"}, b"").location, "ws://b/")
        self.assertIsNone(HandshakeRefusedError(307, {}, b"").location)
        self.assertIsNone(HandshakeRefusedError(503, {"location": "ws://b/"}, b"").location)


class ParseDelayTests(SynchronousTestCase):
    def test_numbers(self) -> None:
        for value, seconds in [
            (1.5, 1.5),
            (2, 2.0),
            (-1, 0.0),
            (float("inf"), MAX_DELAY),
            (float("nan"), 0.0),
            (10**400, MAX_DELAY),
            (True, 0.0),
            ("3", 0.0),
            (None, 0.0),
        ]:
            self.assertEqual(parse_delay(value), seconds, value)


class BackoffTests(SynchronousTestCase):
    def test_grows_to_the_maximum(self) -> None:
        backoff = Backoff(1.0, 10.0, lambda: 1.0)
        self.assertEqual([backoff.next_delay() for _ in range(6)], [1.0, 2.0, 4.0, 8.0, 10.0, 10.0])

    def test_full_jitter(self) -> None:
        numbers = iter([0.0, 0.25, 1.0])
        backoff = Backoff(1.0, 10.0, lambda: next(numbers))
        self.assertEqual([backoff.next_delay() for _ in range(3)], [0.0, 0.5, 4.0])

    def test_late(self) -> None:
        backoff = Backoff(1.0, 10.0, lambda: 0.0)
        self.assertEqual(backoff.next_delay(at_maximum=True), 10.0)

    def test_reset(self) -> None:
        backoff = Backoff(1.0, 10.0, lambda: 1.0)
        self.assertFalse(backoff.is_failing)
        backoff.next_delay()
        self.assertTrue(backoff.is_failing)
        backoff.reset()
        self.assertFalse(backoff.is_failing)
        self.assertEqual(backoff.next_delay(), 1.0)

    def test_settled_after(self) -> None:
        self.assertEqual(Backoff(1.0, 10.0, lambda: 1.0).reset_after, 10.0)
        self.assertEqual(Backoff(1.0, 300.0, lambda: 1.0).reset_after, 60.0)

    def test_bad_waits(self) -> None:
        for waits in [(0, 1), (-1, 1), (2, 1), (1, float("inf")), (float("nan"), 1), (1, float("nan"))]:
            with self.assertRaisesRegex(ValueError, "is not"):
                Backoff(*waits, lambda: 1.0)

    @settings(deadline=None, max_examples=100)
    @given(st.floats(0.001, 100), st.floats(1, 36), st.integers(0, 200), st.floats(0, 1))
    def test_bounds(self, initial: float, factor: float, failures: int, random: Any) -> None:
        """Never below nothing, never above the maximum, never above what so many failures allow."""
        maximum = min(initial * factor, MAX_DELAY)
        backoff = Backoff(initial, maximum, lambda: random)
        for _ in range(failures):
            backoff.next_delay()
        delay = backoff.next_delay()
        self.assertTrue(0 <= delay <= maximum)
        self.assertTrue(delay <= initial * 2.0**failures)
