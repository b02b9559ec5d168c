"""gateway.cluster.peer_pool"""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.peer_pool import NO_RESPONSE, PeerRequest, PendingRequests
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.rpc.interface import NotDelivered, NotDeliveredError
from gateway.rpc.pending import Call


class PendingRequestsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.pending = PendingRequests(self.clock, max_calls=9, max_per_owner=9)

    def start_request(self, owner: str = "link", timeout: float = 5.0) -> PeerRequest:
        question = PeerRequest(self.pending.discard)
        self.pending.start(question, owner, "x", timeout)
        self.pending.mark_sent(question)
        return question

    def error_of(self, request: PeerRequest) -> tuple[ErrorKind, bool, str | None]:
        error = self.failureResultOf(request, RpcError).value
        self.assertEqual(error.client_id, "x")
        return error.kind, error.sent, error.detail

    def test_deadline(self) -> None:
        question = self.start_request()
        self.clock.advance(5.1)
        self.assertEqual(self.error_of(question), (ErrorKind.NODE_UNREACHABLE, True, NO_RESPONSE))

    def test_time_out_at_the_node(self) -> None:
        """That is the client's silence, not the node's."""
        question = self.start_request()
        self.assertIs(self.pending.pop("link", question.id), question)
        self.pending.complete_with_error(question, RpcError(ErrorKind.TIMEOUT, "x"))
        self.assertEqual(self.error_of(question), (ErrorKind.TIMEOUT, True, None))

    def test_take(self) -> None:
        question = self.start_request()
        self.assertIsNone(self.pending.pop("another link", question.id))
        self.assertIsNone(self.pending.pop("link", b'"unknown"'))
        self.assertIs(self.pending.pop("link", question.id), question)
        self.assertIsNone(self.pending.pop("link", question.id))
        self.clock.advance(9)
        self.assertNoResult(question)
        question.not_delivered(NotDelivered.LEASE_LOST)
        self.assertIs(self.failureResultOf(question, NotDeliveredError).value.reason, NotDelivered.LEASE_LOST)

    def test_unsent(self) -> None:
        questions = [self.start_request() for _ in range(3)]
        self.pending.fail_unsent("link", [questions[0].id, b'"unknown"'])
        self.pending.fail_owner("link", lambda client_id: RpcError(ErrorKind.CONNECTION_LOST, client_id))
        kinds = [self.error_of(question)[:2] for question in questions]
        self.assertEqual(kinds, [(ErrorKind.NODE_UNREACHABLE, False)] + [(ErrorKind.CONNECTION_LOST, True)] * 2)

    def test_owner(self) -> None:
        question, never = self.start_request(), Call()
        self.assertEqual(self.pending.owner_of(question), "link")
        self.assertIsNone(self.pending.owner_of(never))
        never.id = question.id
        self.assertIsNone(self.pending.owner_of(never))
        self.pending.discard(question)
        self.assertIsNone(self.pending.owner_of(question))
