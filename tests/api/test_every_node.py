"""What every node is asked at once."""

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase

from gateway.api.directory import gather_nodes, peer_error_text
from gateway.cluster.interface import PeerUnreachableError


class GatherNodesTests(SynchronousTestCase):
    def test_who_answered_and_who_could_not_be_asked(self) -> None:
        away = PeerUnreachableError("away")
        waiting: Deferred[int] = Deferred()
        found = Deferred.fromCoroutine(gather_nodes({"a": succeed(1), "b": fail(away), "c": waiting}))
        self.assertNoResult(found)
        waiting.callback(3)
        self.assertEqual(self.successResultOf(found), ({"a": 1, "c": 3}, {"b": away}))

    def test_what_else_goes_wrong_is_not_hidden(self) -> None:
        found = Deferred.fromCoroutine(gather_nodes({"a": fail(ZeroDivisionError()), "b": succeed(1)}))
        self.failureResultOf(found, ZeroDivisionError)


class PeerErrorTextTests(SynchronousTestCase):
    def test_what_nodes_call_it_is_no_concern_of_backends(self) -> None:
        for problem, told in (
            ("peer.notify_prefix: it was silent", "it was silent"),
            ("peer.has: peer.has: twice", "peer.has: twice"),
            ("node n at ws://peer.example: no link", "node n at ws://peer.example: no link"),
            ("the method peer.drain: not found", "the method peer.drain: not found"),
        ):
            self.assertEqual(peer_error_text(PeerUnreachableError(problem)), told)
