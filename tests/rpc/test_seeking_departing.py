"""Calls to clients of this node that were told to go to another one."""

from __future__ import annotations

from gateway.protocol.errors import ErrorKind
from gateway.rpc.handoff import HANDOFF_TIMEOUT
from gateway.rpc.pending import Reply
from tests.rpc.fakes import RemoteDeliveryTestCase, result

REPLY = Reply(b"1", None)


class HandoffTests(RemoteDeliveryTestCase):
    def test_a_client_that_was_told_to_go_to_another_node(self) -> None:
        """It is called there as soon as it is there."""
        self.connect("x", 5)
        self.dispatcher.begin_goaway("x", 5, True)
        first = self.dispatcher.call("x", "m", None)
        self.disconnect("x")
        second = self.dispatcher.call("x", "m", None)
        self.assertEqual((self.remote_nodes.requests, self.sent("x")), ([], []))
        self.dispatcher.client_superseded("x", 6)
        self.assertEqual(len(self.remote_nodes.calls), 2)
        self.remote_nodes.reply(REPLY)
        self.remote_nodes.reply(REPLY)
        self.assertEqual((self.successResultOf(first), self.successResultOf(second)), (REPLY, REPLY))
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assert_nothing_left()

    def test_one_that_was_told_to_go_and_does_not_arrive(self) -> None:
        self.registry.result = None
        self.connect("x", 5)
        self.dispatcher.begin_goaway("x", 5, True)
        self.disconnect("x")
        call, impatient = self.dispatcher.call("x", "m", None), self.dispatcher.call("x", "m", None, 1.0)
        self.clock.advance(1.1)
        self.assertNoResult(call)
        for asked, after in ((impatient, 0.0), (call, HANDOFF_TIMEOUT)):
            self.clock.advance(after)
            error = self.error_of(asked)
            self.assertEqual((error.kind, error.sent), (ErrorKind.NOT_CONNECTED, False))
        self.assert_nothing_left()

    def test_one_that_was_told_to_go_and_comes_back(self) -> None:
        self.connect("x", 5)
        self.dispatcher.begin_goaway("x", 5, True)
        self.disconnect("x")
        call = self.dispatcher.call("x", "m", None)
        self.connect("x", 6)
        (request,) = self.sent("x")
        self.receive("x", result(request["id"]), 6)
        self.assertEqual(self.successResultOf(call), REPLY)

    def test_a_call_that_waits_for_one_that_was_told_to_go_is_cancelled(self) -> None:
        self.connect("x", 5)
        self.dispatcher.begin_goaway("x", 5, True)
        self.disconnect("x")
        call = self.dispatcher.call("x", "m", None)
        call.cancel()
        self.failureResultOf(call)
        self.dispatcher.client_superseded("x", 6)
        self.assertEqual(self.remote_nodes.requests, [])
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assert_nothing_left()
