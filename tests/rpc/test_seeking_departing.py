"""Calls to clients of this node that were told to go to another one."""

from __future__ import annotations

from gateway.protocol.errors import Kind
from gateway.rpc.handoff import HOLD
from gateway.rpc.pending import Reply
from tests.rpc.fakes import SeekingTestCase, result

REPLY = Reply(b"1", None)


class DepartingTests(SeekingTestCase):
    def test_a_client_that_was_told_to_go_to_another_node(self) -> None:
        """It is called there as soon as it is there."""
        self.connect("x", 5)
        self.hub.let_go("x", 5, True)
        first = self.hub.call("x", "m", None)
        self.disconnect("x")
        second = self.hub.call("x", "m", None)
        self.assertEqual((self.elsewhere.asked, self.sent("x")), ([], []))
        self.hub.client_superseded("x", 6)
        self.assertEqual(len(self.elsewhere.calls), 2)
        self.elsewhere.answers(REPLY)
        self.elsewhere.answers(REPLY)
        self.assertEqual((self.successResultOf(first), self.successResultOf(second)), (REPLY, REPLY))
        self.clock.advance(HOLD)
        self.assert_nothing_left()

    def test_one_that_was_told_to_go_and_does_not_arrive(self) -> None:
        self.registry.outcome = None
        self.connect("x", 5)
        self.hub.let_go("x", 5, True)
        self.disconnect("x")
        call, impatient = self.hub.call("x", "m", None), self.hub.call("x", "m", None, 1.0)
        self.clock.advance(1.1)
        self.assertNoResult(call)
        for asked, after in ((impatient, 0.0), (call, HOLD)):
            self.clock.advance(after)
            error = self.error_of(asked)
            self.assertEqual((error.kind, error.sent), (Kind.NOT_CONNECTED, False))
        self.assert_nothing_left()

    def test_one_that_was_told_to_go_and_comes_back(self) -> None:
        self.connect("x", 5)
        self.hub.let_go("x", 5, True)
        self.disconnect("x")
        call = self.hub.call("x", "m", None)
        self.connect("x", 6)
        (request,) = self.sent("x")
        self.receive("x", result(request["id"]), 6)
        self.assertEqual(self.successResultOf(call), REPLY)

    def test_a_call_that_waits_for_one_that_was_told_to_go_is_cancelled(self) -> None:
        self.connect("x", 5)
        self.hub.let_go("x", 5, True)
        self.disconnect("x")
        call = self.hub.call("x", "m", None)
        call.cancel()
        self.failureResultOf(call)
        self.hub.client_superseded("x", 6)
        self.assertEqual(self.elsewhere.asked, [])
        self.clock.advance(HOLD)
        self.assert_nothing_left()
