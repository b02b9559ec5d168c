"""What every node is asked at once."""

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase

from gateway.api.directory import answers, why
from gateway.cluster.interface import PeerUnreachable


class AnswersTests(SynchronousTestCase):
    def test_who_answered_and_who_could_not_be_asked(self) -> None:
        away = PeerUnreachable("away")
        waiting: Deferred[int] = Deferred()
        found = Deferred.fromCoroutine(answers({"a": succeed(1), "b": fail(away), "c": waiting}))
        self.assertNoResult(found)
        waiting.callback(3)
        self.assertEqual(self.successResultOf(found), ({"a": 1, "c": 3}, {"b": away}))

    def test_what_else_goes_wrong_is_not_hidden(self) -> None:
        found = Deferred.fromCoroutine(answers({"a": fail(ZeroDivisionError()), "b": succeed(1)}))
        self.failureResultOf(found, ZeroDivisionError)


class WhyTests(SynchronousTestCase):
    def test_what_nodes_call_it_is_no_concern_of_backends(self) -> None:
        for problem, told in (
            ("peer.notify_prefix: it was silent", "it was silent"),
            ("peer.has: peer.has: twice", "peer.has: twice"),
            ("node n at ws://peer.example: no link", "node n at ws://peer.example: no link"),
            ("the method peer.drain: not found", "the method peer.drain: not found"),
        ):
            self.assertEqual(why(PeerUnreachable(problem)), told)
