"""Tests of gateway.agent.reconnect, with generated input as well."""

from __future__ import annotations

import json
import math

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.agent.reconnect import (
    MAX_REDIRECTS,
    Action,
    Attempt,
    GoAway,
    ReconnectPolicy,
    action_after_close,
    action_after_refusal,
    make_backoff,
)
from gateway.protocol.uri import parse_uri
from gateway.util.backoff import Backoff
from gateway.websocket.client import CloseEvent
from gateway.websocket.errors import MAX_DELAY, HandshakeError, HandshakeRefusedError, parse_delay

CONFIGURED = parse_uri("ws://home:80/v1/connect?client_id=x")
HANDED_OUT = parse_uri("ws://away:80/v1/connect?client_id=x&wsgateway_hop=1")


def reconnect_policy(*, token_may_change: bool = False) -> ReconnectPolicy:
    """Make a policy with delays of 1, 2, 4, 8, 10, 10 … seconds."""
    return ReconnectPolicy(CONFIGURED, Backoff(1.0, 10.0, lambda: 1.0), token_may_change=token_may_change)


FINAL_WORDS = {400: "client_id", 401: "token", 403: "origin", 404: "path"}
FINAL_REFUSALS = {status: b'{"error":"%b","message":"no"}' % word.encode() for status, word in FINAL_WORDS.items()}


class FailureTests(SynchronousTestCase):
    def test_delays_grow_until_reset(self) -> None:
        policy = reconnect_policy()
        self.assertEqual(policy.first_attempt().target, CONFIGURED)
        delays = [policy.after_failure(CONFIGURED, OSError("no")).delay for _ in range(3)]
        self.assertEqual(delays, [1.0, 2.0, 4.0])
        self.assertEqual(policy.first_attempt().delay, 0.0)
        self.assertEqual(policy.after_failure(CONFIGURED, OSError("no")).delay, 1.0)

    def test_reason(self) -> None:
        attempt = reconnect_policy().after_failure(CONFIGURED, OSError("no route"))
        self.assertEqual(attempt.reason, f"could not connect to {CONFIGURED.url}: OSError: no route")
        attempt = reconnect_policy().after_failure(CONFIGURED, HandshakeError("not open within 30 s"))
        self.assertTrue(attempt.reason.endswith("x: not open within 30 s"))

    def test_final_refusals(self) -> None:
        for status, body in FINAL_REFUSALS.items():
            attempt = reconnect_policy().after_failure(CONFIGURED, HandshakeRefusedError(status, {}, body))
            self.assertIsNotNone(attempt.stop)
            assert attempt.stop is not None
            self.assertEqual(attempt.stop.code, status)
            self.assertIn(f"the gateway answered {status}", attempt.stop.reason)

    def test_refusals_of_a_proxy(self) -> None:
        """They say nothing about the gateway: a deployment, or a default backend."""
        for status in [400, 401, 403, 404]:
            for body in (
                b"",
                b"<html><h1>404 Not Found</h1></html>",
                b"not json {",
                b'{"message":"no Route matched with those values"}',
                b'{"error":"Not Found","message":"no"}',
                b'{"error":"token","message":"expired","status":401}',
                b'{"error":"draining","message":"soon gone"}',
                b'["token"]',
            ):
                attempt = reconnect_policy().after_failure(CONFIGURED, HandshakeRefusedError(status, {}, body))
                self.assertIsNone(attempt.stop, body)
                self.assertEqual(attempt.delay, 1.0)

    def test_refusals_if_token_may_change(self) -> None:
        delays = {}
        for status, body in FINAL_REFUSALS.items():
            attempt = reconnect_policy(token_may_change=True).after_failure(
                CONFIGURED, HandshakeRefusedError(status, {}, body)
            )
            self.assertIsNone(attempt.stop)
            delays[status] = attempt.delay
        self.assertEqual(delays, {400: 10.0, 401: 1.0, 403: 1.0, 404: 10.0})

    def test_retry_after_is_added_to_the_backoff(self) -> None:
        policy = reconnect_policy()
        self.assertEqual(
            policy.after_failure(CONFIGURED, HandshakeRefusedError(503, {"retry-after": "5"}, b"")).delay, 6.0
        )
        self.assertEqual(
            policy.after_failure(CONFIGURED, HandshakeRefusedError(429, {"retry-after": "5"}, b"")).delay, 7.0
        )

    def test_refusal_at_goaway_url_is_not_final(self) -> None:
        for status in [400, 401, 403, 404, 503]:
            attempt = reconnect_policy().after_failure(HANDED_OUT, HandshakeRefusedError(status, {}, b""))
            self.assertEqual((attempt.stop, attempt.target, attempt.delay), (None, CONFIGURED, 1.0))

    def test_refused_ticket_leads_back_to_the_configured_url(self) -> None:
        target = parse_uri(f"{HANDED_OUT.url}&wsgateway_ticket=v1.secret")
        policy = reconnect_policy()
        redirect = HandshakeRefusedError(307, {"location": target.url}, b"")
        self.assertEqual(policy.after_failure(CONFIGURED, redirect).target, target)
        refusal = HandshakeRefusedError(401, {}, b'{"error":"ticket","message":"used"}')
        attempt = policy.after_failure(target, refusal)
        self.assertEqual((attempt.target, attempt.delay, attempt.stop), (CONFIGURED, 1.0, None))
        self.assertIn("401 (ticket: used)", attempt.reason)
        self.assertNotIn("secret", attempt.reason)
        # Sent there once more, it follows.
        self.assertEqual(policy.after_failure(CONFIGURED, redirect).target, target)


class RedirectTests(SynchronousTestCase):
    def test_three_redirects_then_configured_url(self) -> None:
        policy = reconnect_policy()
        redirect = HandshakeRefusedError(307, {"location": HANDED_OUT.url}, b"")
        for _ in range(3):
            attempt = policy.after_failure(CONFIGURED, redirect)
            self.assertEqual((attempt.target, attempt.delay), (HANDED_OUT, 0.0))
        attempt = policy.after_failure(HANDED_OUT, redirect)
        self.assertEqual((attempt.target, attempt.delay), (CONFIGURED, 1.0))
        self.assertEqual(policy.after_failure(CONFIGURED, redirect).target, HANDED_OUT)

    def test_connection_resets_the_redirect_count(self) -> None:
        policy = reconnect_policy()
        redirect = HandshakeRefusedError(307, {"location": HANDED_OUT.url}, b"")
        for _ in range(5):
            self.assertEqual(policy.after_failure(CONFIGURED, redirect).target, HANDED_OUT)
            policy.after_close(HANDED_OUT, CloseEvent(1006, ""), connected_for=1.0, goaway=None)

    def test_invalid_redirects(self) -> None:
        secure = parse_uri("wss://home/v1/connect")
        policy = ReconnectPolicy(secure, Backoff(1.0, 10.0, lambda: 1.0), token_may_change=False)
        attempt = policy.after_failure(secure, HandshakeRefusedError(307, {"location": "ws://away/v1/connect"}, b""))
        self.assertEqual((attempt.target, attempt.delay), (secure, 1.0))
        self.assertIn("ignored the url 'ws://away/v1/connect': ", attempt.reason)


class CloseTests(SynchronousTestCase):
    def test_reasons(self) -> None:
        for event, goaway, reason in (
            (CloseEvent(1006, "Connection was closed cleanly."), None, "connection lost (1006)"),
            (CloseEvent(1001, "going away"), None, "the connection was closed with 1001 'going away'"),
            (CloseEvent(1012, "drain"), GoAway(None, 1.5), "the gateway asked to reconnect (1012 'drain')"),
        ):
            attempt = reconnect_policy().after_close(CONFIGURED, event, connected_for=1.0, goaway=goaway)
            self.assertEqual(attempt.reason, reason)

    def test_short_connections_count_as_failures(self) -> None:
        policy = reconnect_policy()
        ended = CloseEvent(1006, "")
        delays = [policy.after_close(CONFIGURED, ended, connected_for=9.9, goaway=None).delay for _ in range(3)]
        self.assertEqual(delays, [1.0, 2.0, 4.0])
        self.assertEqual(policy.after_close(CONFIGURED, ended, connected_for=10.0, goaway=None).delay, 1.0)

    def test_stop(self) -> None:
        attempt = reconnect_policy().after_close(
            CONFIGURED, CloseEvent(4001, "re\nplaced"), connected_for=1.0, goaway=None
        )
        assert attempt.stop is not None
        self.assertEqual(attempt.stop.code, 4001)
        self.assertEqual(attempt.stop.reason, r"the gateway closed the connection with 4001 're\nplaced'")

    def test_retry_at_max_delay(self) -> None:
        self.assertEqual(
            reconnect_policy().after_close(CONFIGURED, CloseEvent(4003, ""), connected_for=1.0, goaway=None).delay, 10.0
        )

    def test_configured_url_after_a_redirected_connection(self) -> None:
        self.assertEqual(
            reconnect_policy().after_close(HANDED_OUT, CloseEvent(1006, ""), connected_for=1.0, goaway=None).target,
            CONFIGURED,
        )


class GoAwayTests(SynchronousTestCase):
    def next_attempt(self, goaway: GoAway, code: int = 1012) -> tuple[object, float]:
        attempt = reconnect_policy().after_close(CONFIGURED, CloseEvent(code, ""), connected_for=1.0, goaway=goaway)
        return attempt.target, attempt.delay

    def test_goaway_url_after_its_delay(self) -> None:
        self.assertEqual(self.next_attempt(GoAway(HANDED_OUT.url, 1.5)), (HANDED_OUT, 1.5))
        self.assertEqual(self.next_attempt(GoAway(HANDED_OUT.url, 0.0)), (HANDED_OUT, 0.0))

    def test_goaway_without_url_or_delay(self) -> None:
        self.assertEqual(self.next_attempt(GoAway(None, 1.5)), (CONFIGURED, 1.5))
        self.assertEqual(self.next_attempt(GoAway(HANDED_OUT.url, None)), (HANDED_OUT, 1.0))

    def test_connection_lost_after_goaway(self) -> None:
        self.assertEqual(self.next_attempt(GoAway(HANDED_OUT.url, 1.5), 1006), (HANDED_OUT, 1.5))

    def test_final_close_code_after_goaway(self) -> None:
        self.assertEqual(self.next_attempt(GoAway(HANDED_OUT.url, 1.5), 4003), (CONFIGURED, 10.0))
        self.assertIsNotNone(
            reconnect_policy()
            .after_close(CONFIGURED, CloseEvent(4001, ""), connected_for=1.0, goaway=GoAway(HANDED_OUT.url, 1.5))
            .stop
        )

    def test_goaway_never_downgrades_tls(self) -> None:
        secure = parse_uri("wss://home/v1/connect")
        policy = ReconnectPolicy(secure, Backoff(1.0, 10.0, lambda: 1.0), token_may_change=False)
        attempt = policy.after_close(
            secure, CloseEvent(1012, ""), connected_for=1.0, goaway=GoAway("ws://away/v1/connect", 1.5)
        )
        self.assertEqual((attempt.target, attempt.delay), (secure, 1.5))
        self.assertIn("without TLS", attempt.reason)

    def test_failure_at_goaway_url_returns_to_configured_url(self) -> None:
        policy = reconnect_policy()
        policy.after_close(CONFIGURED, CloseEvent(1012, ""), connected_for=100.0, goaway=GoAway(HANDED_OUT.url, 1.5))
        attempt = policy.after_failure(HANDED_OUT, OSError("refused"))
        self.assertEqual((attempt.target, attempt.delay), (CONFIGURED, 2.0))

    def test_repeated_goaways_back_off(self) -> None:
        policy = reconnect_policy()
        goaway = GoAway(HANDED_OUT.url, 0.0)
        delays = [
            policy.after_close(HANDED_OUT, CloseEvent(1012, ""), connected_for=0.0, goaway=goaway).delay
            for _ in range(4)
        ]
        self.assertEqual(delays, [0.0, 2.0, 4.0, 8.0])

    def test_from_params(self) -> None:
        self.assertEqual(GoAway.from_params({"reason": "drain", "url": "ws://b", "after": 2}), GoAway("ws://b", 2.0))
        for params in [None, [], ["ws://b"], {}, {"url": 7, "after": None}]:
            self.assertEqual(GoAway.from_params(params), GoAway(None, None))
        self.assertEqual(GoAway.from_params({"after": "soon"}), GoAway(None, 0.0))
        self.assertEqual(GoAway.from_params({"after": 1e300}), GoAway(None, 3600.0))


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

    def test_1008_if_token_may_change(self) -> None:
        self.assertIs(action_after_close(CloseEvent(1008, ""), token_may_change=True), Action.RETRY)
        self.assertIs(action_after_close(CloseEvent(4001, ""), token_may_change=True), Action.STOP)

    def test_locally_initiated_close_never_stops(self) -> None:
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
        for status, word in FINAL_WORDS.items():
            self.assertIs(action_after_refusal(status, word, token_may_change=False), Action.STOP)
            self.assertIs(action_after_refusal(status, "", token_may_change=False), Action.RETRY)
        for status in [200, 307, 429, 500, 502, 503]:
            self.assertIs(action_after_refusal(status, "internal", token_may_change=False), Action.RETRY)

    def test_statuses_if_token_may_change(self) -> None:
        for status, then in {
            400: Action.RETRY_AT_MAX_DELAY,
            401: Action.RETRY,
            403: Action.RETRY,
            404: Action.RETRY_AT_MAX_DELAY,
        }.items():
            self.assertIs(action_after_refusal(status, FINAL_WORDS[status], token_may_change=True), then)

    def test_text(self) -> None:
        body = b'{"error":"token","message":"expired"}'
        self.assertEqual(str(HandshakeRefusedError(401, {}, body)), "the gateway answered 401 (token: expired)")
        self.assertEqual(str(HandshakeRefusedError(502, {}, b"<html>")), "the response is 502, and not the gateway's")
        self.assertEqual(str(HandshakeRefusedError(502, {}, b"[" * 4000)), "the response is 502, and not the gateway's")

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
    def test_full_jitter(self) -> None:
        numbers = iter([0.0, 0.25, 1.0])
        backoff = make_backoff(1.0, 10.0, lambda: next(numbers))
        self.assertEqual([backoff.next_delay() for _ in range(3)], [0.0, 0.5, 4.0])

    def test_a_connection_of_a_minute_is_a_success(self) -> None:
        for maximum, reset_after in ((10.0, 10.0), (300.0, 60.0)):
            for connected_for, delay in ((reset_after - 0.1, 4.0), (reset_after, 1.0)):
                backoff = Backoff(1.0, maximum)
                backoff.failures = 2
                policy = ReconnectPolicy(CONFIGURED, backoff, token_may_change=False)
                attempt = policy.after_close(CONFIGURED, CloseEvent(1006, ""), connected_for=connected_for, goaway=None)
                self.assertEqual(attempt.delay, delay)

    def test_invalid_delays(self) -> None:
        for waits in [(0, 1), (-1, 1), (2, 1), (1, float("inf")), (float("nan"), 1), (1, float("nan"))]:
            with self.assertRaisesRegex(ValueError, "is not"):
                make_backoff(*waits, lambda: 1.0)


generated = settings(deadline=None, max_examples=150)
#: urls, almost-urls, and other texts
urls = st.sampled_from(["ws://c:1/x?y=z", "wss://c", "https://c/", "/relative", "//c", "ws://[::1", "ws://c:x", ""])
urls = urls | urls.map(lambda url: url + "\r\nX: y") | st.text(max_size=20)
json_values = st.none() | st.booleans() | st.integers() | st.floats() | urls | st.lists(st.integers(), max_size=2)
goaways = st.dictionaries(st.sampled_from(["url", "after", "reason"]), json_values) | json_values


def is_valid(attempt: Attempt) -> bool:
    """Whether an attempt has a valid target and delay."""
    return attempt.stop is not None or (0 <= attempt.delay < math.inf and bool(attempt.target.host))


class GeneratedGoAwayTests(SynchronousTestCase):
    @generated
    @given(goaways)
    @example({"url": "ws://c", "after": 10**400})
    @example({"after": math.nan})
    @example({"after": True})
    def test_any_input(self, params: object) -> None:
        goaway = GoAway.from_params(params)
        self.assertTrue(goaway.url is None or isinstance(goaway.url, str))
        if goaway.after is not None:
            self.assertTrue(0 <= goaway.after <= MAX_DELAY, goaway)

    @generated
    @given(goaways, st.floats(0, 1e6), st.integers(1000, 4999))
    def test_any_goaway_has_a_valid_attempt(self, params: object, duration: float, code: int) -> None:
        goaway = GoAway.from_params(params)
        attempt = reconnect_policy().after_goaway(HANDED_OUT, goaway, connected_for=duration)
        self.assertTrue(attempt is None or is_valid(attempt))
        attempt = reconnect_policy().after_close(
            HANDED_OUT, CloseEvent(code, "why\r\n"), connected_for=duration, goaway=goaway
        )
        self.assertTrue(is_valid(attempt))
        self.assertTrue(attempt.reason.isprintable())


class GeneratedRefusalTests(SynchronousTestCase):
    @generated
    @given(st.integers(100, 599), urls, st.text(max_size=9), st.binary(max_size=60))
    @example(503, "", "9" * 400, b"")
    @example(307, "ws://c:99999/", "1", json.dumps({"error": 1}).encode())
    def test_any_input(self, status: int, location: str, retry_after: str, body: bytes) -> None:
        """The target is valid, and redirects end."""
        policy = reconnect_policy()
        refused = HandshakeRefusedError(status, {"location": location, "retry-after": retry_after}, body)
        steps = [policy.after_failure(HANDED_OUT, refused) for _ in range(MAX_REDIRECTS + 1)]
        self.assertTrue(all(map(is_valid, steps)))
        self.assertTrue(steps[-1].target == CONFIGURED or steps[-1].stop is not None)
