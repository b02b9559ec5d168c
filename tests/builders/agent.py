"""Base class for tests of the agent."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from gateway.agent import Agent, NotConnected
from gateway.testing import MemoryGateway


class AgentTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.gateway = MemoryGateway()

    def start_agent(self, **options: Any) -> Agent:
        agent = self.gateway.agent("demo-1", **options)
        agent.start()
        self.gateway.flush()
        return agent

    def attempts(self) -> int:
        return len(self.gateway.openings)

    def assert_next_attempt_after(self, seconds: float) -> None:
        """Assert that the next attempt comes after exactly that delay."""
        before = self.attempts()
        self.gateway.advance(seconds - 0.01)
        self.assertEqual(self.attempts(), before, "too early")
        self.gateway.advance(0.01)
        self.assertEqual(self.attempts(), before + 1, "no attempt")

    def assert_stopped(self, agent: Agent, code: int | None, reason: str) -> None:
        stopped = self.successResultOf(agent.whenStopped())
        self.assertEqual(stopped.code, code)
        self.assertIn(reason, stopped.reason)
        self.assertFalse(agent.connected)
        self.assertEqual(self.gateway.clock.getDelayedCalls(), [])
        self.failureResultOf(agent.whenConnected(), NotConnected)
