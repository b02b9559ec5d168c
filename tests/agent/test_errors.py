"""Tests of gateway.agent.errors."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from gateway import agent
from gateway.agent import errors
from gateway.agent.errors import AgentError, CallFailed, CallTimedOut, ConnectionLost, NotConnected, RpcFailed, Stopped


class ErrorTests(SynchronousTestCase):
    def test_each_failure_of_a_call_is_one(self) -> None:
        for kind in (NotConnected, ConnectionLost, CallTimedOut, RpcFailed):
            self.assertTrue(issubclass(kind, CallFailed), kind)

    def test_what_a_handler_raises_is_no_failure_of_a_call(self) -> None:
        """Else a handler that calls and does not catch would pass an error object on as its own."""
        self.assertFalse(issubclass(AgentError, CallFailed))
        self.assertFalse(issubclass(RpcFailed, AgentError))

    def test_an_error_object(self) -> None:
        for kind in (AgentError, RpcFailed):
            error = kind(-32001, "client not connected", {"sent": False})
            self.assertEqual((error.code, error.message, error.data), (-32001, "client not connected", {"sent": False}))
            self.assertEqual(str(error), "-32001 client not connected")
            self.assertIsNone(kind(1, "one").data)

    def test_why_an_agent_stopped(self) -> None:
        self.assertEqual(Stopped(4001, "superseded"), Stopped(4001, "superseded"))
        self.assertNotEqual(Stopped(4001, "superseded"), Stopped(None, "superseded"))

    def test_all_are_to_be_had_where_agents_are(self) -> None:
        for name in (
            "AgentError",
            "CallFailed",
            "CallTimedOut",
            "ConnectionLost",
            "NotConnected",
            "RpcFailed",
            "Stopped",
        ):
            self.assertIs(getattr(agent, name), getattr(errors, name))
