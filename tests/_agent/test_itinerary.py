"""Where an agent goes next."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from gateway.agent.reconnect import Backoff, GoAway, Itinerary
from gateway.protocol.uri import parse
from gateway.websocket.client import Ended, OpeningFailed, Refused

HOME = parse("ws://home:80/v1/connect?client_id=x")
AWAY = parse("ws://away:80/v1/connect?client_id=x&wsgateway_hop=1")


def itinerary(*, new_token: bool = False) -> Itinerary:
    """One whose waits are 1, 2, 4, 8, 10, 10 …"""
    return Itinerary(HOME, Backoff(1.0, 10.0, lambda: 1.0), new_token=new_token)


class FailureTests(SynchronousTestCase):
    def test_waits_grow_until_begin(self) -> None:
        way = itinerary()
        self.assertEqual(way.begin().target, HOME)
        delays = [way.after_failure(HOME, OSError("no")).delay for _ in range(3)]
        self.assertEqual(delays, [1.0, 2.0, 4.0])
        self.assertEqual(way.begin().delay, 0.0)
        self.assertEqual(way.after_failure(HOME, OSError("no")).delay, 1.0)

    def test_why(self) -> None:
        step = itinerary().after_failure(HOME, OSError("no route"))
        self.assertEqual(step.why, f"could not connect to {HOME.url}: OSError: no route")
        step = itinerary().after_failure(HOME, OpeningFailed("not open within 30 s"))
        self.assertTrue(step.why.endswith("x: not open within 30 s"))

    def test_refusals_that_are_final(self) -> None:
        for status in [400, 401, 403, 404]:
            step = itinerary().after_failure(HOME, Refused(status, {}, b""))
            self.assertIsNotNone(step.stop)
            assert step.stop is not None
            self.assertEqual(step.stop.code, status)
            self.assertIn(f"the gateway answered {status}", step.stop.reason)

    def test_refusals_with_a_new_token(self) -> None:
        delays = {}
        for status in [400, 401, 403, 404]:
            step = itinerary(new_token=True).after_failure(HOME, Refused(status, {}, b""))
            self.assertIsNone(step.stop)
            delays[status] = step.delay
        self.assertEqual(delays, {400: 10.0, 401: 1.0, 403: 1.0, 404: 10.0})

    def test_retry_after_and_the_wait(self) -> None:
        way = itinerary()
        self.assertEqual(way.after_failure(HOME, Refused(503, {"retry-after": "5"}, b"")).delay, 6.0)
        self.assertEqual(way.after_failure(HOME, Refused(429, {"retry-after": "5"}, b"")).delay, 7.0)

    def test_no_refusal_at_a_url_that_was_handed_out_is_final(self) -> None:
        for status in [400, 401, 403, 404, 503]:
            step = itinerary().after_failure(AWAY, Refused(status, {}, b""))
            self.assertEqual((step.stop, step.target, step.delay), (None, HOME, 1.0))


class RedirectTests(SynchronousTestCase):
    def test_three_then_home(self) -> None:
        way = itinerary()
        redirect = Refused(307, {"location": AWAY.url}, b"")
        for _ in range(3):
            step = way.after_failure(HOME, redirect)
            self.assertEqual((step.target, step.delay), (AWAY, 0.0))
        step = way.after_failure(AWAY, redirect)
        self.assertEqual((step.target, step.delay), (HOME, 1.0))
        self.assertEqual(way.after_failure(HOME, redirect).target, AWAY)

    def test_a_connection_ends_the_count(self) -> None:
        way = itinerary()
        redirect = Refused(307, {"location": AWAY.url}, b"")
        for _ in range(5):
            self.assertEqual(way.after_failure(HOME, redirect).target, AWAY)
            way.after_end(AWAY, Ended(1006, ""), stayed=1.0, goaway=None)

    def test_what_cannot_be_followed(self) -> None:
        secure = parse("wss://home/v1/connect")
        way = Itinerary(secure, Backoff(1.0, 10.0, lambda: 1.0), new_token=False)
        step = way.after_failure(secure, Refused(307, {"location": "ws://away/v1/connect"}, b""))
        self.assertEqual((step.target, step.delay), (secure, 1.0))
        self.assertIn("does not follow 'ws://away/v1/connect': it would go on without TLS", step.why)


class EndTests(SynchronousTestCase):
    def test_short_connections_count_as_failures(self) -> None:
        way = itinerary()
        ended = Ended(1006, "")
        delays = [way.after_end(HOME, ended, stayed=9.9, goaway=None).delay for _ in range(3)]
        self.assertEqual(delays, [1.0, 2.0, 4.0])
        self.assertEqual(way.after_end(HOME, ended, stayed=10.0, goaway=None).delay, 1.0)

    def test_stop(self) -> None:
        step = itinerary().after_end(HOME, Ended(4001, "re\nplaced"), stayed=1.0, goaway=None)
        assert step.stop is not None
        self.assertEqual(step.stop.code, 4001)
        self.assertEqual(step.stop.reason, r"the gateway closed the connection with 4001 're\nplaced'")

    def test_later(self) -> None:
        self.assertEqual(itinerary().after_end(HOME, Ended(4003, ""), stayed=1.0, goaway=None).delay, 10.0)

    def test_home_after_a_connection_elsewhere(self) -> None:
        self.assertEqual(itinerary().after_end(AWAY, Ended(1006, ""), stayed=1.0, goaway=None).target, HOME)


class GoAwayTests(SynchronousTestCase):
    def step(self, goaway: GoAway, code: int = 1012) -> tuple[object, float]:
        step = itinerary().after_end(HOME, Ended(code, ""), stayed=1.0, goaway=goaway)
        return step.target, step.delay

    def test_to_the_url_after_the_wait(self) -> None:
        self.assertEqual(self.step(GoAway(AWAY.url, 1.5)), (AWAY, 1.5))
        self.assertEqual(self.step(GoAway(AWAY.url, 0.0)), (AWAY, 0.0))

    def test_without_url_or_wait(self) -> None:
        self.assertEqual(self.step(GoAway(None, 1.5)), (HOME, 1.5))
        self.assertEqual(self.step(GoAway(AWAY.url, None)), (AWAY, 1.0))

    def test_if_the_connection_broke_first(self) -> None:
        self.assertEqual(self.step(GoAway(AWAY.url, 1.5), 1006), (AWAY, 1.5))

    def test_not_against_another_order(self) -> None:
        self.assertEqual(self.step(GoAway(AWAY.url, 1.5), 4003), (HOME, 10.0))
        self.assertIsNotNone(
            itinerary().after_end(HOME, Ended(4001, ""), stayed=1.0, goaway=GoAway(AWAY.url, 1.5)).stop
        )

    def test_weaker_scheme(self) -> None:
        secure = parse("wss://home/v1/connect")
        way = Itinerary(secure, Backoff(1.0, 10.0, lambda: 1.0), new_token=False)
        step = way.after_end(secure, Ended(1012, ""), stayed=1.0, goaway=GoAway("ws://away/v1/connect", 1.5))
        self.assertEqual((step.target, step.delay), (secure, 1.5))
        self.assertIn("without TLS", step.why)

    def test_failure_there_leads_home(self) -> None:
        way = itinerary()
        way.after_end(HOME, Ended(1012, ""), stayed=100.0, goaway=GoAway(AWAY.url, 1.5))
        step = way.after_failure(AWAY, OSError("refused"))
        self.assertEqual((step.target, step.delay), (HOME, 2.0))

    def test_sent_on_again_and_again_it_slows_down(self) -> None:
        way = itinerary()
        goaway = GoAway(AWAY.url, 0.0)
        delays = [way.after_end(AWAY, Ended(1012, ""), stayed=0.0, goaway=goaway).delay for _ in range(4)]
        self.assertEqual(delays, [0.0, 2.0, 4.0, 8.0])

    def test_read(self) -> None:
        self.assertEqual(GoAway.read({"reason": "drain", "url": "ws://b", "after": 2}), GoAway("ws://b", 2.0))
        for params in [None, [], ["ws://b"], {}, {"url": 7, "after": None}]:
            self.assertEqual(GoAway.read(params), GoAway(None, None))
        self.assertEqual(GoAway.read({"after": "soon"}), GoAway(None, 0.0))
        self.assertEqual(GoAway.read({"after": 1e300}), GoAway(None, 3600.0))
