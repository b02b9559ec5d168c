"""The agent when its token is about to expire."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs

from gateway.agent import Agent, NotConnected
from gateway.testing import Received
from tests._agent.case import AgentTestCase
from tests._agent.test_token import jwt

EPOCH = 1_800_000_000.0


class TokenRenewalTests(AgentTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.made = 0

    def now(self) -> float:
        return EPOCH + self.gateway.clock.seconds()

    def token(self) -> str:
        """A token for 100 s."""
        self.made += 1
        return jwt({"exp": self.now() + 100, "n": self.made})

    def start_with_token(self, **options: Any) -> Agent:
        return self.start_agent(**{"token": self.token, "now": self.now, **options})

    def sent_tokens(self) -> list[Any]:
        """What was said of tokens since."""
        said = [received.params for received in self.gateway.received if received.method == "gateway.token"]
        self.gateway.received.clear()
        return said

    def test_before_it_expires(self) -> None:
        self.start_with_token()
        self.assertEqual(
            self.gateway.openings[0].headers["authorization"], f"Bearer {jwt({'exp': EPOCH + 100, 'n': 1})}"
        )
        self.gateway.advance(79.9)
        self.assertEqual(self.sent_tokens(), [])
        self.gateway.advance(0.1)
        self.assertEqual(self.sent_tokens(), [{"token": jwt({"exp": EPOCH + 180, "n": 2})}])
        self.gateway.advance(80)
        self.assertEqual(self.sent_tokens(), [{"token": jwt({"exp": EPOCH + 260, "n": 3})}])
        self.assertEqual(self.attempts(), 1)

    def test_when_asked_to(self) -> None:
        tokens = ["one", "two"]
        agent = self.start_with_token(token=lambda: tokens.pop(0))
        self.gateway.advance(1000)
        self.assertEqual(self.sent_tokens(), [])
        self.successResultOf(agent.renew())
        self.gateway.flush()
        self.assertEqual(self.gateway.received, [Received("demo-1", "gateway.token", {"token": "two"})])

    def test_as_soon_as_it_is_connected(self) -> None:
        self.start_with_token(on_connected=lambda agent: agent.renew())
        self.assertEqual(self.sent_tokens(), [{"token": jwt({"exp": EPOCH + 100, "n": 2})}])

    def test_where_it_cannot_be(self) -> None:
        agent = self.start_agent(token="opaque")
        self.assertIn("not a callable", str(self.failureResultOf(agent.renew(), ValueError).value))
        self.failureResultOf(self.gateway.agent("x").renew(), ValueError)
        self.failureResultOf(self.gateway.agent("x", token=self.token).renew(), NotConnected)

    def test_a_static_token(self) -> None:
        """There is no other one."""
        self.start_with_token(token=self.token())
        self.gateway.advance(200)
        self.assertEqual(self.sent_tokens(), [])

    def test_a_source_without_one(self) -> None:
        agent = self.start_with_token(token=lambda: None)
        self.assertTrue(agent.connected)
        self.failureResultOf(agent.renew(), ValueError)

    def test_each_connection_by_its_own(self) -> None:
        self.start_with_token()
        self.gateway.advance(40)
        self.gateway.drop("demo-1")
        self.gateway.advance(0.5)
        self.assertEqual((self.attempts(), self.made), (2, 2))
        self.gateway.advance(79.9)
        self.assertEqual(self.sent_tokens(), [])
        self.gateway.advance(0.2)
        self.assertEqual(len(self.sent_tokens()), 1)

    def test_by_the_newer_connection_alone(self) -> None:
        """The older one is left to the gateway, and so is when it ends."""
        serving: Deferred[None] = Deferred()
        agent = self.start_with_token(methods={"slow": lambda params: serving})
        self.gateway.call("demo-1", "slow").addErrback(lambda _: None)
        self.gateway.goaway("demo-1", "ws://other.test/v1/connect?client_id=demo-1", 2.0, close=False)
        self.gateway.advance(2)
        self.assertEqual(self.attempts(), 2)
        self.gateway.advance(80)
        self.assertEqual(len(self.sent_tokens()), 1)
        agent.stop()
        self.gateway.flush()
        self.assert_stopped(agent, None, "told to stop")

    def test_stopped_while_it_is_asked(self) -> None:
        coming: list[Any] = [self.token(), Deferred()]
        agent = self.start_with_token(token=lambda: coming.pop(0))
        waiting = agent.renew()
        agent.stop()
        self.gateway.flush()
        self.failureResultOf(waiting, NotConnected)
        self.assert_stopped(agent, None, "told to stop")

    def test_expired(self) -> None:
        """The gateway had no new one in time."""
        tokens: list[Any] = [self.token(), *[LookupError("shut")] * 4]

        def token() -> str:
            given = tokens.pop(0) if tokens else self.token()
            if isinstance(given, Exception):
                raise given
            return given

        agent = self.start_with_token(token=token)
        self.gateway.advance(81)
        self.gateway.disconnect("demo-1", 1008, "token expired")
        self.gateway.advance(10)
        self.assertTrue(agent.connected)
        self.assertEqual(self.sent_tokens(), [])

    def test_never_logged(self) -> None:
        tokens = ["SECRET-1", "SECRET 2", "SECRET-3"]
        with capturedLogs() as logs:
            agent = self.start_with_token(token=lambda: tokens.pop(0))
            self.failureResultOf(agent.renew(), ValueError)
            self.successResultOf(agent.renew())
        self.assertNotIn("SECRET", repr(logs))
        self.assertEqual(len([event for event in logs if "no new token" in event["log_format"]]), 1)


class InvalidNotificationTests(AgentTestCase):
    def test_a_goaway_that_cannot_be_read(self) -> None:
        """It is ignored, with one line however often it comes."""
        agent = self.start_agent()
        session = self.gateway._connections["demo-1"].session
        with capturedLogs() as logs:
            for _ in range(10):
                session._send(b'{"jsonrpc":"2.0","method":"gateway.goaway","params":{"after":1e400}}')
            self.gateway.flush()
        self.assertEqual(
            [event["log_format"] for event in logs], ["notification {method!a}: its params could not be read"]
        )
        self.assertNotIn("log_failure", logs[0])
        self.assertTrue(agent.connected)
        self.assertEqual(self.attempts(), 1)
