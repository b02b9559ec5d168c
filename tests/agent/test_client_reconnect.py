"""Tests of the agent's reconnection with an in-memory gateway."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs, formatEvent

from gateway.agent import Agent
from gateway.agent.client import MAX_HANDED_OFF
from tests.builders.agent import AgentTestCase


class ReconnectTests(AgentTestCase):
    def test_backoff_grows_and_resets(self) -> None:
        """Delays are half of 1, 2, 4 and at most 8 s: the jitter is 0.5."""
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

    def test_immediate_failures_do_not_block_the_reactor(self) -> None:
        self.gateway.listening = False
        agent = self.gateway.agent("demo-1", jitter=lambda: 0.0)
        agent.start()
        self.assertEqual([call.getTime() for call in self.gateway.clock.getDelayedCalls()], [0.0])
        self.successResultOf(agent.stop())

    def test_close_codes_that_reconnect(self) -> None:
        for code in (1000, 1001, 1011, 1012, 1013):
            self.setUp()
            agent = self.start_agent()
            self.gateway.disconnect("demo-1", code)
            self.assert_next_attempt_after(0.5)
            self.assertTrue(agent.connected)

    def test_close_codes_that_stop(self) -> None:
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

    def test_1008_with_a_client_certificate(self) -> None:
        """The certificate may have been renewed; with a fixed token, a refusal is still final."""
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

    def test_1008_without_client_certificate(self) -> None:
        """Without a ``tls`` function, or without TLS, there is no certificate that may change."""
        for options in ({"url": "wss://gateway.test"}, {"tls": lambda host: None}):
            self.setUp()
            agent = self.start_agent(**options)
            self.gateway.disconnect("demo-1", 1008, "the token has expired")
            self.gateway.flush()
            self.assert_stopped(agent, 1008, "expired")

    def test_log_name_without_client_id(self) -> None:
        with capturedLogs() as logs:
            agent = Agent(
                "wss://gateway.test", reactor=self.gateway.clock, connect=self.gateway.endpoint, tls=lambda host: None
            )
            self.gateway.listening = False
            agent.start()
            self.gateway.flush()
        self.assertIn("agent (by its certificate or token): could not connect", formatEvent(logs[0]))

    def test_final_refusals(self) -> None:
        for status in (400, 401, 403, 404):
            self.gateway.refuse(status)
            agent = self.start_agent()
            self.assert_stopped(agent, status, f"the gateway answered {status} (")

    def test_refusals_of_a_proxy_reconnect(self) -> None:
        for status in (400, 401, 403, 404):
            self.setUp()
            self.gateway.refuse(status, word="Not Found")
            agent = self.start_agent()
            self.assert_next_attempt_after(0.5)
            self.assertTrue(agent.connected)

    def test_other_refusals_reconnect(self) -> None:
        self.gateway.refuse(502)
        agent = self.start_agent()
        self.assert_next_attempt_after(0.5)
        self.assertTrue(agent.connected)

    def test_pings_keep_the_connection_open(self) -> None:
        agent = self.start_agent(idle_timeout=120.0)
        self.gateway.advance(3600)
        self.assertTrue(agent.connected)
        self.assertEqual(self.attempts(), 1)

    def test_idle_timeout(self) -> None:
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

    def test_redirect_is_followed_at_once(self) -> None:
        self.redirect()
        agent = self.start_agent()
        self.assertTrue(agent.connected)
        self.assertEqual(agent.connected_url, self.OTHER_URL)

    def test_configured_url_after_a_redirected_connection(self) -> None:
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

    def test_redirect_never_downgrades_tls(self) -> None:
        self.redirect()
        agent = self.start_agent(url="wss://gateway.test")
        self.assertFalse(agent.connected)
        self.assertEqual(self.attempts(), 1)
        self.gateway.advance(0.5)
        self.assertTrue(agent.connected)
        self.assertTrue(self.urls()[-1].startswith("wss://"))

    def test_invalid_location(self) -> None:
        for url in ("", "ws://[", "mailto:x", "ws://b/\x01"):
            self.setUp()
            self.redirect(url)
            agent = self.start_agent()
            self.assert_next_attempt_after(0.5)
            self.assertTrue(agent.connected)


class TicketTests(RedirectTestCase):
    """URLs with a ticket."""

    TICKET_URL = f"{RedirectTestCase.OTHER_URL}&wsgateway_ticket=v1.secret"

    def test_followed_with_the_token_as_well(self) -> None:
        for send_away in (
            lambda: self.gateway.refuse(307, {"Location": self.TICKET_URL}),
            lambda: self.gateway.goaway("demo-1", self.TICKET_URL, 0.0),
        ):
            self.setUp()
            agent = self.start_agent(token="T")
            send_away()
            if self.attempts() == 1:
                self.gateway.drop("demo-1")
            self.gateway.advance(1)
            self.assertEqual(self.urls()[-1], self.TICKET_URL)
            self.assertEqual(self.gateway.openings[-1].headers["authorization"], "Bearer T")
            self.assertEqual(agent.connected_url, self.OTHER_URL)

    def test_refused_ticket(self) -> None:
        """Back to the configured url, as often as it takes."""
        agent = self.start_agent()
        home = self.urls()[0]
        for _ in range(3):
            self.gateway.refuse(401, word="ticket")
            self.gateway.goaway("demo-1", self.TICKET_URL, 0.0)
            self.assertEqual(self.urls()[-1], self.TICKET_URL)
            self.gateway.advance(60)
            self.assertEqual(agent.connected_url, home)
            self.gateway.advance(60)

    def test_not_logged(self) -> None:
        with capturedLogs() as logs:
            agent = self.start_agent()
            self.gateway.refuse(401, word="ticket")
            self.gateway.goaway("demo-1", self.TICKET_URL, 0.0)
            self.gateway.advance(60)
            self.gateway.goaway("demo-1", self.TICKET_URL, 0.0)
            self.gateway.advance(60)
            self.gateway.goaway("demo-1", f"ftp://x/{self.TICKET_URL}", 0.0)
            self.gateway.advance(60)
            self.gateway.refuse(404)
            self.gateway.drop("demo-1")
            self.gateway.advance(60)
        self.assertIn("401 (ticket", repr([formatEvent(event) for event in logs]))
        self.assertIn("ignored the url", repr([formatEvent(event) for event in logs]))
        self.assertNotIn("secret", repr(logs))
        self.assertNotIn("secret", repr(agent.connected_url))


class GoAwayTests(RedirectTestCase):
    def test_goaway_url_after_its_delay(self) -> None:
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
        """Return an agent with a call in flight, the Deferred its handler awaits, and the call."""
        waiting: Deferred[str] = Deferred()
        agent = self.start_agent(methods={"slow": lambda params: waiting, "echo": lambda params: params})
        return agent, waiting, self.gateway.call("demo-1", "slow")

    def test_response_is_sent_on_the_old_connection(self) -> None:
        """After the delay new calls use the new connection, while the old one stays open for the response."""
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

    def test_goaway_without_url_waits_for_the_close(self) -> None:
        agent, waiting, answer = self.start_slow_call()
        self.gateway.goaway("demo-1", None, 0.0, close=False)
        self.gateway.advance(20)
        self.assertEqual((agent.connected, self.attempts()), (True, 1))
        waiting.callback("done")
        self.gateway.flush()
        self.assertEqual(self.successResultOf(answer), "done")

    def test_close_of_handed_off_connection_is_ignored(self) -> None:
        agent, waiting, answer = self.start_slow_call()
        old = self.gateway._get_connection("demo-1")
        self.gateway.goaway("demo-1", self.OTHER_URL, 0.0, close=False)
        old.close_with(4001, "replaced")
        self.gateway.advance(60)
        self.assertEqual((agent.connected_url, self.attempts()), (self.OTHER_URL, 2))
        self.failureResultOf(answer)
        waiting.callback("late")

    def test_goaway_on_handed_off_connection_is_ignored(self) -> None:
        agent, waiting, answer = self.start_slow_call()
        old = self.gateway._get_connection("demo-1")
        self.gateway.goaway("demo-1", self.OTHER_URL, 0.0, close=False)
        old.session.notify("gateway.goaway", {"url": "ws://third.test/v1/connect?client_id=demo-1", "after": 0})
        self.gateway.advance(20)
        self.assertEqual((agent.connected_url, self.attempts()), (self.OTHER_URL, 2))
        waiting.callback("done")
        self.gateway.flush()
        self.assertEqual(self.successResultOf(answer), "done")

    def test_stop_with_handed_off_connection(self) -> None:
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

    def test_stop_before_handoff(self) -> None:
        agent, waiting, answer = self.start_slow_call()
        self.gateway.goaway("demo-1", self.OTHER_URL, 3.0, close=False)
        stopped = agent.stop()
        self.gateway.flush()
        self.successResultOf(stopped)
        waiting.callback("late")
        self.failureResultOf(answer)
        self.assertEqual((self.attempts(), self.gateway.clock.getDelayedCalls()), (1, []))

    def test_repeated_goaways_back_off(self) -> None:
        """The gateway closes none of the connections: delays grow, and the number of connections is limited."""
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
        """Only the later one is followed."""
        agent, waiting, answer = self.start_slow_call()
        self.gateway.goaway("demo-1", "ws://third.test/v1/connect?client_id=demo-1", 1.0, close=False)
        self.gateway.goaway("demo-1", self.OTHER_URL, 2.0, close=False)
        self.gateway.advance(10)
        self.assertEqual((agent.connected_url, self.attempts()), (self.OTHER_URL, 2))
        waiting.callback("done")
        self.gateway.flush()
        self.assertEqual(self.successResultOf(answer), "done")

    def test_goaway_is_forgotten_with_its_connection(self) -> None:
        agent = self.start_agent()
        home = agent.connected_url
        self.gateway.goaway("demo-1", self.OTHER_URL, 0.0)
        self.assertEqual(agent.connected_url, self.OTHER_URL)
        self.gateway.disconnect("demo-1", 1012)
        self.gateway.advance(60)
        self.assertEqual(agent.connected_url, home)

    def test_goaway_url_is_unreachable(self) -> None:
        agent = self.start_agent()
        home = agent.connected_url
        self.gateway.goaway("demo-1", self.OTHER_URL, 1.0)
        self.gateway.listening = False
        self.gateway.advance(1.0)
        self.gateway.listening = True
        self.assert_next_attempt_after(1.0)
        self.assertEqual(agent.connected_url, home)

    def test_goaway_url_refuses(self) -> None:
        agent = self.start_agent()
        home = agent.connected_url
        self.gateway.refuse(403)
        self.gateway.goaway("demo-1", self.OTHER_URL, 0.0)
        self.assertEqual(self.urls()[-1], self.OTHER_URL)
        self.assert_next_attempt_after(1.0)
        self.assertEqual(agent.connected_url, home)

    def test_goaway_never_downgrades_tls(self) -> None:
        agent = self.start_agent(url="wss://gateway.test")
        home = agent.connected_url
        self.gateway.goaway("demo-1", self.OTHER_URL, 2.0)
        self.assert_next_attempt_after(2.0)
        self.assertEqual(agent.connected_url, home)

    def test_invalid_goaway(self) -> None:
        for params in (None, [1], {"url": 7, "after": "soon"}, {"url": "", "after": -1}, {"after": 1e300}):
            self.setUp()
            agent = self.start_agent()
            self.gateway.notify("demo-1", "gateway.goaway", params)
            self.assertTrue(agent.connected)
            self.gateway.disconnect("demo-1", 1012)
            self.gateway.advance(3600)
            self.assertTrue(agent.connected)
