"""Where an agent goes next."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from gateway.agent.reconnect import Backoff, GoAway, ReconnectPolicy
from gateway.protocol.uri import parse_uri
from gateway.websocket.client import CloseEvent, HandshakeError, HandshakeRefusedError

CONFIGURED = parse_uri("ws://home:80/v1/connect?client_id=x")
HANDED_OUT = parse_uri("ws://away:80/v1/connect?client_id=x&wsgateway_hop=1")


def reconnect_policy(*, token_may_change: bool = False) -> ReconnectPolicy:
    """One whose waits are 1, 2, 4, 8, 10, 10 …"""
    return ReconnectPolicy(CONFIGURED, Backoff(1.0, 10.0, lambda: 1.0), token_may_change=token_may_change)


class FailureTests(SynchronousTestCase):
    def test_waits_grow_until_begin(self) -> None:
        way = reconnect_policy()
        self.assertEqual(way.first_attempt().target, CONFIGURED)
        delays = [way.after_failure(CONFIGURED, OSError("no")).delay for _ in range(3)]
        self.assertEqual(delays, [1.0, 2.0, 4.0])
        self.assertEqual(way.first_attempt().delay, 0.0)
        self.assertEqual(way.after_failure(CONFIGURED, OSError("no")).delay, 1.0)

    def test_why(self) -> None:
        step = reconnect_policy().after_failure(CONFIGURED, OSError("no route"))
        self.assertEqual(step.reason, f"could not connect to {CONFIGURED.url}: OSError: no route")
        step = reconnect_policy().after_failure(CONFIGURED, HandshakeError("not open within 30 s"))
        self.assertTrue(step.reason.endswith("x: not open within 30 s"))

    def test_refusals_that_are_final(self) -> None:
        for status in [400, 401, 403, 404]:
            step = reconnect_policy().after_failure(CONFIGURED, HandshakeRefusedError(status, {}, b""))
            self.assertIsNotNone(step.stop)
            assert step.stop is not None
            self.assertEqual(step.stop.code, status)
            self.assertIn(f"the gateway answered {status}", step.stop.reason)

    def test_refusals_with_a_new_token(self) -> None:
        delays = {}
        for status in [400, 401, 403, 404]:
            step = reconnect_policy(token_may_change=True).after_failure(
                CONFIGURED, HandshakeRefusedError(status, {}, b"")
            )
            self.assertIsNone(step.stop)
            delays[status] = step.delay
        self.assertEqual(delays, {400: 10.0, 401: 1.0, 403: 1.0, 404: 10.0})

    def test_retry_after_and_the_wait(self) -> None:
        way = reconnect_policy()
        self.assertEqual(
            way.after_failure(CONFIGURED, HandshakeRefusedError(503, {"retry-after": "5"}, b"")).delay, 6.0
        )
        self.assertEqual(
            way.after_failure(CONFIGURED, HandshakeRefusedError(429, {"retry-after": "5"}, b"")).delay, 7.0
        )

    def test_no_refusal_at_a_url_that_was_handed_out_is_final(self) -> None:
        for status in [400, 401, 403, 404, 503]:
            step = reconnect_policy().after_failure(HANDED_OUT, HandshakeRefusedError(status, {}, b""))
            self.assertEqual((step.stop, step.target, step.delay), (None, CONFIGURED, 1.0))


class RedirectTests(SynchronousTestCase):
    def test_three_then_home(self) -> None:
        way = reconnect_policy()
        redirect = HandshakeRefusedError(307, {"location": HANDED_OUT.url}, b"")
        for _ in range(3):
            step = way.after_failure(CONFIGURED, redirect)
            self.assertEqual((step.target, step.delay), (HANDED_OUT, 0.0))
        step = way.after_failure(HANDED_OUT, redirect)
        self.assertEqual((step.target, step.delay), (CONFIGURED, 1.0))
        self.assertEqual(way.after_failure(CONFIGURED, redirect).target, HANDED_OUT)

    def test_a_connection_ends_the_count(self) -> None:
        way = reconnect_policy()
        redirect = HandshakeRefusedError(307, {"location": HANDED_OUT.url}, b"")
        for _ in range(5):
            self.assertEqual(way.after_failure(CONFIGURED, redirect).target, HANDED_OUT)
            way.after_close(HANDED_OUT, CloseEvent(1006, ""), connected_for=1.0, goaway=None)

    def test_what_cannot_be_followed(self) -> None:
        secure = parse_uri("wss://home/v1/connect")
        way = ReconnectPolicy(secure, Backoff(1.0, 10.0, lambda: 1.0), token_may_change=False)
        step = way.after_failure(secure, HandshakeRefusedError(307, {"location": "ws://away/v1/connect"}, b""))
        self.assertEqual((step.target, step.delay), (secure, 1.0))
        self.assertIn("does not follow 'ws://away/v1/connect': it would go on without TLS", step.reason)


class CloseTests(SynchronousTestCase):
    def test_short_connections_count_as_failures(self) -> None:
        way = reconnect_policy()
        ended = CloseEvent(1006, "")
        delays = [way.after_close(CONFIGURED, ended, connected_for=9.9, goaway=None).delay for _ in range(3)]
        self.assertEqual(delays, [1.0, 2.0, 4.0])
        self.assertEqual(way.after_close(CONFIGURED, ended, connected_for=10.0, goaway=None).delay, 1.0)

    def test_stop(self) -> None:
        step = reconnect_policy().after_close(
            CONFIGURED, CloseEvent(4001, "re\nplaced"), connected_for=1.0, goaway=None
        )
        assert step.stop is not None
        self.assertEqual(step.stop.code, 4001)
        self.assertEqual(step.stop.reason, r"the gateway closed the connection with 4001 're\nplaced'")

    def test_later(self) -> None:
        self.assertEqual(
            reconnect_policy().after_close(CONFIGURED, CloseEvent(4003, ""), connected_for=1.0, goaway=None).delay, 10.0
        )

    def test_home_after_a_connection_elsewhere(self) -> None:
        self.assertEqual(
            reconnect_policy().after_close(HANDED_OUT, CloseEvent(1006, ""), connected_for=1.0, goaway=None).target,
            CONFIGURED,
        )


class GoAwayTests(SynchronousTestCase):
    def next_attempt(self, goaway: GoAway, code: int = 1012) -> tuple[object, float]:
        step = reconnect_policy().after_close(CONFIGURED, CloseEvent(code, ""), connected_for=1.0, goaway=goaway)
        return step.target, step.delay

    def test_to_the_url_after_the_wait(self) -> None:
        self.assertEqual(self.next_attempt(GoAway(HANDED_OUT.url, 1.5)), (HANDED_OUT, 1.5))
        self.assertEqual(self.next_attempt(GoAway(HANDED_OUT.url, 0.0)), (HANDED_OUT, 0.0))

    def test_without_url_or_wait(self) -> None:
        self.assertEqual(self.next_attempt(GoAway(None, 1.5)), (CONFIGURED, 1.5))
        self.assertEqual(self.next_attempt(GoAway(HANDED_OUT.url, None)), (HANDED_OUT, 1.0))

    def test_if_the_connection_broke_first(self) -> None:
        self.assertEqual(self.next_attempt(GoAway(HANDED_OUT.url, 1.5), 1006), (HANDED_OUT, 1.5))

    def test_not_against_another_order(self) -> None:
        self.assertEqual(self.next_attempt(GoAway(HANDED_OUT.url, 1.5), 4003), (CONFIGURED, 10.0))
        self.assertIsNotNone(
            reconnect_policy()
            .after_close(CONFIGURED, CloseEvent(4001, ""), connected_for=1.0, goaway=GoAway(HANDED_OUT.url, 1.5))
            .stop
        )

    def test_weaker_scheme(self) -> None:
        secure = parse_uri("wss://home/v1/connect")
        way = ReconnectPolicy(secure, Backoff(1.0, 10.0, lambda: 1.0), token_may_change=False)
        step = way.after_close(
            secure, CloseEvent(1012, ""), connected_for=1.0, goaway=GoAway("ws://away/v1/connect", 1.5)
        )
        self.assertEqual((step.target, step.delay), (secure, 1.5))
        self.assertIn("without TLS", step.reason)

    def test_failure_there_leads_home(self) -> None:
        way = reconnect_policy()
        way.after_close(CONFIGURED, CloseEvent(1012, ""), connected_for=100.0, goaway=GoAway(HANDED_OUT.url, 1.5))
        step = way.after_failure(HANDED_OUT, OSError("refused"))
        self.assertEqual((step.target, step.delay), (CONFIGURED, 2.0))

    def test_sent_on_again_and_again_it_slows_down(self) -> None:
        way = reconnect_policy()
        goaway = GoAway(HANDED_OUT.url, 0.0)
        delays = [
            way.after_close(HANDED_OUT, CloseEvent(1012, ""), connected_for=0.0, goaway=goaway).delay for _ in range(4)
        ]
        self.assertEqual(delays, [0.0, 2.0, 4.0, 8.0])

    def test_read(self) -> None:
        self.assertEqual(GoAway.from_params({"reason": "drain", "url": "ws://b", "after": 2}), GoAway("ws://b", 2.0))
        for params in [None, [], ["ws://b"], {}, {"url": 7, "after": None}]:
            self.assertEqual(GoAway.from_params(params), GoAway(None, None))
        self.assertEqual(GoAway.from_params({"after": "soon"}), GoAway(None, 0.0))
        self.assertEqual(GoAway.from_params({"after": 1e300}), GoAway(None, 3600.0))
