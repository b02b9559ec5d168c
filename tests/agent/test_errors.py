"""Tests of gateway.agent.errors."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from gateway import agent
from gateway.agent import errors
from gateway.agent.errors import AgentError, CallFailed, CallTimedOut, ConnectionLost, NotConnected, RpcFailed, Stopped


class ErrorTests(SynchronousTestCase):
    def test_call_errors_are_call_failed(self) -> None:
        for kind in (NotConnected, ConnectionLost, CallTimedOut, RpcFailed):
            self.assertTrue(issubclass(kind, CallFailed), kind)

    def test_agent_error_is_not_call_failed(self) -> None:
        """Else an RpcFailed that a handler does not catch would become the handler's own error."""
        self.assertFalse(issubclass(AgentError, CallFailed))
        self.assertFalse(issubclass(RpcFailed, AgentError))

    def test_error_object(self) -> None:
        for kind in (AgentError, RpcFailed):
            error = kind(-32001, "client not connected", {"sent": False})
            self.assertEqual((error.code, error.message, error.data), (-32001, "client not connected", {"sent": False}))
            self.assertEqual(str(error), "-32001 client not connected")
            self.assertIsNone(kind(1, "one").data)

    def test_sent(self) -> None:
        self.assertEqual([kind.sent for kind in (NotConnected, ConnectionLost, CallTimedOut)], [False, True, True])
        not_sent = {"client": "x", "sent": False}
        self.assertFalse(RpcFailed(-32001, "m", not_sent, gateway=True).sent)
        self.assertTrue(RpcFailed(-32001, "m", not_sent).sent)
        for data in (None, {}, [], False, {"sent": True}, {"sent": 0}, {"sent": None}):
            self.assertTrue(RpcFailed(-32001, "m", data, gateway=True).sent, data)

    def test_stopped(self) -> None:
        self.assertEqual(Stopped(4001, "superseded"), Stopped(4001, "superseded"))
        self.assertNotEqual(Stopped(4001, "superseded"), Stopped(None, "superseded"))

    def test_all_are_exported(self) -> None:
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
