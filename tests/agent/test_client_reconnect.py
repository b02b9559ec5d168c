"""The agent when a connection, or an attempt at one, has ended."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs, formatEvent

from gateway.agent import Agent
from gateway.agent.client import MAX_HANDED_OFF
from tests.builders.agent import AgentTestCase


class ReconnectTests(AgentTestCase):
    def test_waits_grow_and_are_forgotten(self) -> None:
        """Waits are half of 1, 2, 4 and at most 8 s: the jitter is 0.5 here."""
        self.start_agent(backoff=(1.0, 8.0))
        for delay in (0.5, 1.0, 2.0, 4.0, 4.0):
            self.gateway.drop("demo-1")
            self.assert_next_attempt_after(delay)
        self.gateway.advance(8)
        self.gateway.drop("demo-1")
        self.assert_next_attempt_after(0.5)

    def test_jitter_bounds(self) -> None:
        self.start_agent(jitter=lambda: 0.0)
        self.gateway.drop("demo-1")
        self.assertEqual(self.attempts(), 2)
        other = self.gateway.agent("other", jitter=lambda: 1.0)
        other.start()
        self.gateway.flush()
        self.gateway.drop("other")
        self.assert_next_attempt_after(1.0)

    def test_tcp_refused(self) -> None:
        self.gateway.listening = False
        agent = self.start_agent()
        self.gateway.advance(0.4)
        self.gateway.listening = True
        self.assert_next_attempt_after(0.1)
        self.assertTrue(agent.connected)

    def test_attempts_that_fail_at_once_leave_time_to_others(self) -> None:
        self.gateway.listening = False
        agent = self.gateway.agent("demo-1", jitter=lambda: 0.0)
        agent.start()
        self.assertEqual([call.getTime() for call in self.gateway.clock.getDelayedCalls()], [0.0])
        self.successResultOf(agent.stop())

    def test_codes_to_come_back_from(self) -> None:
        for code in (1000, 1001, 1011, 1012, 1013):
            self.setUp()
            agent = self.start_agent()
            self.gateway.disconnect("demo-1", code)
            self.assert_next_attempt_after(0.5)
            self.assertTrue(agent.connected)

    def test_codes_to_stop_at(self) -> None:
        for code in (1002, 1003, 1007, 1008, 1009, 4001):
            self.setUp()
            agent = self.start_agent()
            self.gateway.disconnect("demo-1", code, "why")
            self.assert_stopped(agent, code, f"the gateway closed the connection with {code} 'why'")

    def test_disconnected_by_an_operator(self) -> None:
        self.start_agent(backoff=(1.0, 8.0))
        self.gateway.disconnect("demo-1", 4003)
        self.assert_next_attempt_after(8.0)

    def test_replaced(self) -> None:
        first, second = self.start_agent(), self.start_agent()
        self.assertIn("4001 'replaced'", self.successResultOf(first.whenStopped()).reason)
        self.assertTrue(second.connected)
        self.assertEqual(self.gateway.clients, ["demo-1"])

    def test_busy(self) -> None:
        for status in (429, 503):
            self.setUp()
            self.gateway.refuse(status, {"Retry-After": "7"})
            agent = self.start_agent()
            self.assert_next_attempt_after(7.5)
            self.assertTrue(agent.connected)

    def test_a_certificate_that_has_ended(self) -> None:
        """It may have been renewed; beside a token that stays the same one, only what is no refusal is about it."""
        for token, refused_for_good in ((None, False), ("T", True)):
            self.setUp()
            agent = self.start_agent(url="wss://gateway.test", tls=lambda host: None, token=token)
            self.gateway.disconnect("demo-1", 1008, "the token has expired")
            self.gateway.refuse(401)
            self.assert_next_attempt_after(0.5)
            if refused_for_good:
                self.assert_stopped(agent, 401, "the gateway answered 401")
            else:
                self.gateway.advance(1)
                self.assertTrue(agent.connected)

    def test_without_one(self) -> None:
        """What no function of the program's gives stays as it is."""
        for options in ({"url": "wss://gateway.test"}, {"tls": lambda host: None}):
            self.setUp()
            agent = self.start_agent(**options)
            self.gateway.disconnect("demo-1", 1008, "the token has expired")
            self.gateway.flush()
            self.assert_stopped(agent, 1008, "expired")

    def test_one_that_is_known_by_its_certificate_alone(self) -> None:
        with capturedLogs() as logs:
            agent = Agent(
                "wss://gateway.test", reactor=self.gateway.clock, connect=self.gateway.endpoint, tls=lambda host: None
            )
            self.gateway.listening = False
            agent.start()
            self.gateway.flush()
        self.assertIn("agent (by its certificate or token): could not connect", formatEvent(logs[0]))

    def test_refused_for_good(self) -> None:
        for status in (400, 401, 403, 404):
            self.gateway.refuse(status, word="because")
            agent = self.start_agent()
            self.assert_stopped(agent, status, f"the gateway answered {status} (because: refused by the test)")

    def test_refused_by_something_else(self) -> None:
        self.gateway.refuse(502)
        agent = self.start_agent()
        self.assert_next_attempt_after(0.5)
        self.assertTrue(agent.connected)

    def test_pings_keep_it(self) -> None:
        agent = self.start_agent(idle_timeout=120.0)
        self.gateway.advance(3600)
        self.assertTrue(agent.connected)
        self.assertEqual(self.attempts(), 1)

    def test_silence(self) -> None:
        agent = self.start_agent(idle_timeout=120.0)
        self.gateway.freeze("demo-1")
        self.gateway.advance(119.9)
        self.assertTrue(agent.connected)
        self.gateway.advance(0.1)
        self.assertFalse(agent.connected)
        self.assert_next_attempt_after(0.5)
        self.assertTrue(agent.connected)


class RedirectTestCase(AgentTestCase):
    OTHER_URL = "ws://elsewhere:81/v1/connect?client_id=demo-1&wsgateway_hop=1"

    def urls(self) -> list[str]:
        return [opening.url for opening in self.gateway.openings]


class RedirectTests(RedirectTestCase):
    def redirect(self, url: str = RedirectTestCase.OTHER_URL, times: int = 1) -> None:
        self.gateway.refuse(307, {"Location": url}, times=times)

    def test_followed_at_once(self) -> None:
        self.redirect()
        agent = self.start_agent()
        self.assertTrue(agent.connected)
        self.assertEqual(agent.connected_url, self.OTHER_URL)

    def test_home_after_a_connection_elsewhere(self) -> None:
        self.redirect()
        self.start_agent()
        self.gateway.drop("demo-1")
        self.gateway.advance(0.5)
        self.assertNotEqual(self.urls()[-1], self.OTHER_URL)

    def test_three_hops(self) -> None:
        self.redirect(times=4)
        agent = self.start_agent()
        self.assertFalse(agent.connected)
        self.assertEqual(self.attempts(), 4)
        self.assert_next_attempt_after(0.5)
        self.assertTrue(agent.connected)
        self.assertEqual(agent.connected_url, self.urls()[0])

    def test_never_without_tls_after_tls(self) -> None:
        self.redirect()
        agent = self.start_agent(url="wss://gateway.test")
        self.assertFalse(agent.connected)
        self.assertEqual(self.attempts(), 1)
        self.gateway.advance(0.5)
        self.assertTrue(agent.connected)
        self.assertTrue(self.urls()[-1].startswith("wss://"))

    def test_location_that_is_no_url(self) -> None:
        for url in ("", "ws://[", "mailto:x", "ws://b/\x01"):
            self.setUp()
            self.redirect(url)
            agent = self.start_agent()
            self.assert_next_attempt_after(0.5)
            self.assertTrue(agent.connected)


class GoAwayTests(RedirectTestCase):
    def test_to_the_url_after_the_wait(self) -> None:
        agent = self.start_agent()
        self.gateway.goaway("demo-1", self.OTHER_URL, 3.5)
        self.assertFalse(agent.connected)
        self.assert_next_attempt_after(3.5)
        self.assertEqual(agent.connected_url, self.OTHER_URL)

    def test_without_a_url(self) -> None:
        agent = self.start_agent()
        home = agent.connected_url
        self.gateway.goaway("demo-1", None, 3.5)
        self.assert_next_attempt_after(3.5)
        self.assertEqual(agent.connected_url, home)

    def start_slow_call(self) -> tuple[Agent, Deferred[str], Deferred[object]]:
        """An agent with a call in flight, what its handler awaits, and the call."""
        waiting: Deferred[str] = Deferred()
        agent = self.start_agent(methods={"slow": lambda params: waiting, "echo": lambda params: params})
        return agent, waiting, self.gateway.call("demo-1", "slow")

    def test_it_answers_a_call_on_the_connection_that_it_came_by(self) -> None:
        """It goes on after the wait, and can be called there, while the first connection stays for the response."""
        agent, waiting, answer = self.start_slow_call()
        self.gateway.goaway("demo-1", self.OTHER_URL, 2.0, close=False)
        self.gateway.advance(1.9)
        self.assertNotEqual(agent.connected_url, self.OTHER_URL)
        self.gateway.advance(0.1)
        self.assertEqual(agent.connected_url, self.OTHER_URL)
        self.assertEqual(self.successResultOf(self.gateway.call("demo-1", "echo", [1])), [1])
        self.assertNoResult(answer)
        waiting.callback("done")
        self.gateway.flush()
        self.assertEqual(self.successResultOf(answer), "done")
        self.gateway.advance(60)
        self.assertEqual((agent.connected_url, self.attempts()), (self.OTHER_URL, 2))
        self.assertEqual(agent._handed_off, set())

    def test_it_waits_for_the_end_where_no_url_is_named(self) -> None:
        agent, waiting, answer = self.start_slow_call()
        self.gateway.goaway("demo-1", None, 0.0, close=False)
        self.gateway.advance(20)
        self.assertEqual((agent.connected, self.attempts()), (True, 1))
        waiting.callback("done")
        self.gateway.flush()
        self.assertEqual(self.successResultOf(answer), "done")

    def test_the_end_of_one_that_it_left_is_nothing_to_it(self) -> None:
        agent, waiting, answer = self.start_slow_call()
        old = self.gateway._get_connection("demo-1")
        self.gateway.goaway("demo-1", self.OTHER_URL, 0.0, close=False)
        old.close_with(4001, "replaced")
        self.gateway.advance(60)
        self.assertEqual((agent.connected_url, self.attempts()), (self.OTHER_URL, 2))
        self.failureResultOf(answer)
        waiting.callback("late")

    def test_a_goaway_over_one_that_it_left_is_nothing_to_it(self) -> None:
        agent, waiting, answer = self.start_slow_call()
        old = self.gateway._get_connection("demo-1")
        self.gateway.goaway("demo-1", self.OTHER_URL, 0.0, close=False)
        old.session.notify("gateway.goaway", {"url": "ws://third.test/v1/connect?client_id=demo-1", "after": 0})
        self.gateway.advance(20)
        self.assertEqual((agent.connected_url, self.attempts()), (self.OTHER_URL, 2))
        waiting.callback("done")
        self.gateway.flush()
        self.assertEqual(self.successResultOf(answer), "done")

    def test_stopped_while_one_that_it_left_is_open(self) -> None:
        agent, waiting, answer = self.start_slow_call()
        self.gateway.goaway("demo-1", self.OTHER_URL, 0.0, close=False)
        self.assertEqual(len(agent._handed_off), 1)
        stopped = agent.stop()
        self.gateway.advance(5)
        self.successResultOf(stopped)
        self.assertEqual((agent._handed_off, self.gateway.clients), (set(), []))
        waiting.callback("late")
        self.failureResultOf(answer)
        self.assertEqual(self.gateway.clock.getDelayedCalls(), [])

    def test_stopped_before_the_time_to_go(self) -> None:
        agent, waiting, answer = self.start_slow_call()
        self.gateway.goaway("demo-1", self.OTHER_URL, 3.0, close=False)
        stopped = agent.stop()
        self.gateway.flush()
        self.successResultOf(stopped)
        waiting.callback("late")
        self.failureResultOf(answer)
        self.assertEqual((self.attempts(), self.gateway.clock.getDelayedCalls()), (1, []))

    def test_sent_from_pillar_to_post(self) -> None:
        """By a gateway that closes none of the connections: ever more slowly, and not to more than a few."""
        agent, waiting, answer = self.start_slow_call()
        self.gateway.advance(60)
        times = []
        for _ in range(20):
            connection = self.gateway._get_connection("demo-1")
            connection.on_replaced = lambda: None
            before = self.attempts()
            connection.session.notify("gateway.goaway", {"url": self.OTHER_URL, "after": 0})
            self.gateway.advance(0.3)
            times.append(self.attempts() - before)
        self.assertEqual(times[0], 1)
        self.assertLessEqual(sum(times), 3)
        self.gateway.advance(300)
        for _ in range(20):
            self.gateway._get_connection("demo-1").on_replaced = lambda: None
            self.gateway._get_connection("demo-1").session.notify("gateway.goaway", {"url": self.OTHER_URL, "after": 0})
            self.gateway.advance(100)
        self.assertEqual(len(agent._handed_off), MAX_HANDED_OFF)
        waiting.callback("late")
        self.failureResultOf(answer)
        stopped = agent.stop()
        self.gateway.advance(10)
        self.successResultOf(stopped)

    def test_two_goaways(self) -> None:
        """The later one counts, once."""
        agent, waiting, answer = self.start_slow_call()
        self.gateway.goaway("demo-1", "ws://third.test/v1/connect?client_id=demo-1", 1.0, close=False)
        self.gateway.goaway("demo-1", self.OTHER_URL, 2.0, close=False)
        self.gateway.advance(10)
        self.assertEqual((agent.connected_url, self.attempts()), (self.OTHER_URL, 2))
        waiting.callback("done")
        self.gateway.flush()
        self.assertEqual(self.successResultOf(answer), "done")

    def test_forgotten_with_its_connection(self) -> None:
        agent = self.start_agent()
        home = agent.connected_url
        self.gateway.goaway("demo-1", self.OTHER_URL, 0.0)
        self.assertEqual(agent.connected_url, self.OTHER_URL)
        self.gateway.disconnect("demo-1", 1012)
        self.gateway.advance(60)
        self.assertEqual(agent.connected_url, home)

    def test_unreachable(self) -> None:
        agent = self.start_agent()
        home = agent.connected_url
        self.gateway.goaway("demo-1", self.OTHER_URL, 1.0)
        self.gateway.listening = False
        self.gateway.advance(1.0)
        self.gateway.listening = True
        self.assert_next_attempt_after(1.0)
        self.assertEqual(agent.connected_url, home)

    def test_refused_there(self) -> None:
        agent = self.start_agent()
        home = agent.connected_url
        self.gateway.refuse(403)
        self.gateway.goaway("demo-1", self.OTHER_URL, 0.0)
        self.assertEqual(self.urls()[-1], self.OTHER_URL)
        self.assert_next_attempt_after(1.0)
        self.assertEqual(agent.connected_url, home)

    def test_never_to_a_weaker_scheme(self) -> None:
        agent = self.start_agent(url="wss://gateway.test")
        home = agent.connected_url
        self.gateway.goaway("demo-1", self.OTHER_URL, 2.0)
        self.assert_next_attempt_after(2.0)
        self.assertEqual(agent.connected_url, home)

    def test_nonsense(self) -> None:
        for params in (None, [1], {"url": 7, "after": "soon"}, {"url": "", "after": -1}, {"after": 1e300}):
            self.setUp()
            agent = self.start_agent()
            self.gateway.notify("demo-1", "gateway.goaway", params)
            self.assertTrue(agent.connected)
            self.gateway.disconnect("demo-1", 1012)
            self.gateway.advance(3600)
            self.assertTrue(agent.connected)
