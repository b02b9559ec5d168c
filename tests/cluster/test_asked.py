"""gateway.cluster.peer_pool"""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.peer_pool import SILENT, Asked, Question
from gateway.protocol.errors import Kind, RpcError
from gateway.rpc.interface import Miss, Missed
from gateway.rpc.pending import Call


class AskedTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.asked = Asked(self.clock, max_calls=9, max_per_owner=9)

    def ask(self, owner: str = "link", timeout: float = 5.0) -> Question:
        question = Question(self.asked.forget)
        self.asked.start(question, owner, "x", timeout)
        self.asked.sent(question)
        return question

    def error_of(self, question: Question) -> tuple[Kind, bool, str | None]:
        error = self.failureResultOf(question, RpcError).value
        self.assertEqual(error.client_id, "x")
        return error.kind, error.sent, error.detail

    def test_deadline(self) -> None:
        question = self.ask()
        self.clock.advance(5.1)
        self.assertEqual(self.error_of(question), (Kind.NODE_UNREACHABLE, True, SILENT))

    def test_time_out_at_the_node(self) -> None:
        """That is the client's silence, not the node's."""
        question = self.ask()
        self.assertIs(self.asked.take("link", question.id), question)
        self.asked.settle(question, RpcError(Kind.TIMEOUT, "x"))
        self.assertEqual(self.error_of(question), (Kind.TIMEOUT, True, None))

    def test_take(self) -> None:
        question = self.ask()
        self.assertIsNone(self.asked.take("another link", question.id))
        self.assertIsNone(self.asked.take("link", b'"unknown"'))
        self.assertIs(self.asked.take("link", question.id), question)
        self.assertIsNone(self.asked.take("link", question.id))
        self.clock.advance(9)
        self.assertNoResult(question)
        question.miss(Miss.LEASE_LOST)
        self.assertIs(self.failureResultOf(question, Missed).value.miss, Miss.LEASE_LOST)

    def test_unsent(self) -> None:
        questions = [self.ask() for _ in range(3)]
        self.asked.fail_unsent("link", [questions[0].id, b'"unknown"'])
        self.asked.fail_owner("link", lambda client_id: RpcError(Kind.CONNECTION_LOST, client_id))
        kinds = [self.error_of(question)[:2] for question in questions]
        self.assertEqual(kinds, [(Kind.NODE_UNREACHABLE, False)] + [(Kind.CONNECTION_LOST, True)] * 2)

    def test_owner(self) -> None:
        question, never = self.ask(), Call()
        self.assertEqual(self.asked.owner_of(question), "link")
        self.assertIsNone(self.asked.owner_of(never))
        never.id = question.id
        self.assertIsNone(self.asked.owner_of(never))
        self.asked.forget(question)
        self.assertIsNone(self.asked.owner_of(question))
