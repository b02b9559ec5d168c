"""gateway.cluster.peer_client: what other nodes are asked on behalf of this one."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred

from gateway.cluster.interface import PeerUnreachable
from gateway.cluster.peer_client import PREFIX_TIMEOUT, TIMEOUT
from gateway.cluster.peer_pool import ABSENCES
from gateway.registry.interface import Place
from tests.cluster.far import A, B, location, status
from tests.cluster.peers_case import PeersCase


class QuestionTests(PeersCase):
    def questions(self) -> list[tuple[Deferred[Any], str, dict[str, Any], bytes, Any]]:
        """Each question, what is sent for it, an answer and what that comes to."""
        peers, where, node = self.peers, location("x", 7), status()
        has = {"client": "x", "generation": 7}
        close = {**has, "code": 4003, "reason": "r"}
        prefix = {"prefix": "acme/", "method": "m"}
        return [
            (peers.has(where, 1.0), "peer.has", has, b"true", True),
            (peers.has(where, 1.0), "peer.has", has, b"false", False),
            (peers.close(where, 4003, "r"), "peer.close", close, b"true", True),
            (peers.notify_prefix(node, "acme/", "m", None), "peer.notify_prefix", prefix, b'{"reached":12}', 12),
            (
                peers.notify_prefix(node, "acme/", "m", b"[1.0]"),
                "peer.notify_prefix",
                {**prefix, "params": [1.0]},
                b'{"reached":0,"more":1}',
                0,
            ),
            (peers.drain(node), "peer.drain", {}, b"null", None),
            (peers.has_room(node, 1.0), "peer.has_room", {}, b"true", True),
            (peers.has_room(Place(B, "b", "", "ws://b.example:8081"), 1.0), "peer.has_room", {}, b"false", False),
            (peers.rebalance(node), "peer.rebalance", {}, b'{"moving":250,"more":1}', 250),
        ]

    def test_each(self) -> None:
        far = self.link()
        questions = self.questions()
        for asked, (answer, method, params, result, value) in zip(far.asked(), questions, strict=True):
            self.assertEqual((asked["method"], asked["params"]), (method, params))
            self.assertNoResult(answer)
            far.answer(asked, result)
            self.assertEqual(self.successResultOf(answer), value)

    def test_without_a_link(self) -> None:
        questions = self.questions()
        self.assertEqual(self.net.attempts(), 1)
        self.assertEqual(len(self.net.open().asked()), len(questions))

    def problem(self, answer: Deferred[Any]) -> PeerUnreachable:
        return self.failureResultOf(answer, PeerUnreachable).value

    def test_cannot_be_linked(self) -> None:
        questions = self.questions()
        self.net.refuse()
        for answer, *_ in questions:
            problem = self.problem(answer)
            self.assertEqual((problem.sent, problem.refused), (False, True))
        # Who asks next is told at once.
        problem = self.problem(self.peers.has(location(), 1.0))
        self.assertEqual(str(problem), f"node {B} at ws://b.example:8081: nothing listens there (connection refused)")

    def test_no_link_in_time(self) -> None:
        answer = self.peers.has(location(), 1.0)
        self.net.advance(0.99)
        self.assertNoResult(answer)
        self.net.advance(0.01)
        problem = self.problem(answer)
        self.assertEqual((problem.sent, problem.refused), (False, False))
        self.assertIn("no link to it within 1 s", str(problem))
        # It opens for the next one.
        self.net.open()
        self.assertEqual(self.peers.count(), 1)

    def test_silent(self) -> None:
        """The time that it took to connect counts."""
        answer = self.peers.has(location(), 1.0)
        self.net.advance(0.6)
        self.net.open()
        self.net.advance(0.35)
        self.assertNoResult(answer)
        self.net.advance(0.15)
        self.assertTrue(self.problem(answer).sent)

    def test_how_long(self) -> None:
        self.link()
        close, prefix = self.peers.close(location(), 4003, "r"), self.peers.notify_prefix(status(), "a", "m", None)
        self.net.advance(TIMEOUT + 0.1)
        self.problem(close)
        self.assertNoResult(prefix)
        for _ in range(12):
            self.net.fars[-1].say(b'{"jsonrpc":"2.0","method":"x"}')
            self.net.advance((PREFIX_TIMEOUT - TIMEOUT) / 12)
        self.problem(prefix)

    def test_errors(self) -> None:
        far = self.link()
        for code, data, sent, text in (
            (-32001, {"sent": False}, False, "peer.has: not here"),
            (-32007, {"sent": True, "detail": "the row stays"}, True, "peer.has: the row stays"),
            (-32601, {"sent": False}, False, "peer.has: method not found"),
            (-32603, None, True, "peer.has: the client's node answered -32603: m"),
        ):
            answer = self.peers.has(location(), 1.0)
            far.fail(far.asked()[0], code, data=data)
            problem = self.problem(answer)
            self.assertEqual((problem.sent, str(problem)), (sent, text))

    def test_what_cannot_be_read(self) -> None:
        far = self.link()
        for ask, result in (
            (lambda: self.peers.has(location(), 1.0), b"1"),
            (lambda: self.peers.close(location(), 4003, "r"), b"null"),
            (lambda: self.peers.notify_prefix(status(), "a", "m", None), b'{"reached":"1"}'),
            (lambda: self.peers.has_room(status(), 1.0), b"{}"),
            (lambda: self.peers.rebalance(status()), b"250"),
        ):
            answer = ask()
            far.answer(far.asked()[0], result)
            self.assertTrue(self.problem(answer).sent)

    def test_link_breaks(self) -> None:
        far = self.link()
        answer = self.peers.has(location(), 1.0)
        far.lose()
        self.assertTrue(self.problem(answer).sent)

    def test_cancelled(self) -> None:
        far = self.link()
        answer = self.peers.has(location(), 1.0)
        answer.cancel()
        self.failureResultOf(answer, CancelledError)
        far.answer(far.asked()[0], b"true")
        self.assertEqual(self.metrics.late_responses, 1)


class MovedTests(PeersCase):
    def test_told(self) -> None:
        self.peers.moved(location("x"), 8)
        self.peers.moved(location("y"), 9)
        self.net.advance(0)
        far = self.net.open()
        self.assertEqual(len(far.transport._written), 1)
        asked = far.asked()
        self.assertEqual(
            [(each["method"], each["params"]) for each in asked],
            [
                ("peer.moved", {"client": "x", "generation": 8, "node": A}),
                ("peer.moved", {"client": "y", "generation": 9, "node": A}),
            ],
        )
        for each in asked:
            far.answer(each)
        self.assertEqual((self.peers._moves, self.peers.calls_in_flight()), ({}, 0))
        self.net.advance(4)
        self.assertEqual(far.asked(), [])

    def test_told_of_claims_that_were_taken_back(self) -> None:
        self.peers.taken_back(location("x"), 8)
        self.peers.moved(location("x"), 7)
        self.net.advance(0)
        far = self.net.open()
        asked = far.asked()
        self.assertEqual(
            sorted((each["method"], each["params"]["generation"]) for each in asked),
            [("peer.moved", 7), ("peer.taken_back", 8)],
        )
        for each in asked:
            far.answer(each)
        self.assertEqual(self.peers._moves, {})

    def test_told_again(self) -> None:
        self.peers.moved(location(), 8)
        self.net.advance(0)
        self.net.refuse()
        self.net.advance(0.25)
        self.net.open().lose()
        self.net.advance(0.5)
        far = self.net.open()
        (asked,) = far.asked()
        # Not answered.
        self.net.advance(TIMEOUT + 0.1)
        self.net.advance(2)
        (asked,) = far.asked()
        far.fail(asked, -32005)
        self.net.advance(2)
        (asked,) = far.asked()
        far.answer(asked)
        self.assertEqual(self.peers._moves, {})

    def test_not_told_again(self) -> None:
        for code in (-32001, -32601, -32602):
            far = self.link()
            self.peers.moved(location(), 8)
            self.net.advance(0)
            far.fail(far.asked()[0], code)
            self.assertEqual(self.peers._moves, {}, code)

    def test_node_is_gone(self) -> None:
        self.peers.moved(location(), 8)
        self.net.advance(0)
        self.net.refuse()
        for _ in range(ABSENCES):
            self.peers.nodes_changed([])
        self.assertEqual(self.peers._moves, {})
        self.net.advance(60)
        self.assertEqual(self.net.attempts(), 1)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_node_is_gone_while_it_is_told(self) -> None:
        far = self.link()
        self.peers.moved(location(), 8)
        self.net.advance(0)
        for _ in range(ABSENCES):
            self.peers.nodes_changed([])
        self.assertEqual((self.peers._moves, self.peers.calls_in_flight()), ({}, 0))
        self.assertEqual(len(far.asked()), 1)

    def test_not_to_itself(self) -> None:
        self.peers.moved(location(node_id=A), 8)
        self.net.advance(60)
        self.assertEqual(self.net.attempts(), 0)

    def test_many_at_a_node_that_takes_few(self) -> None:
        far = self.link()
        for n in range(3 * self.max_calls):
            self.peers.moved(location(f"c{n}"), 8)
        told: list[str] = []
        for _ in range(12):
            self.net.advance(0.25)
            for asked in far.asked():
                told.append(asked["params"]["client"])
                far.answer(asked)
        self.assertEqual(sorted(told), sorted(f"c{n}" for n in range(3 * self.max_calls)))
        self.assertEqual(self.peers._moves, {})

    def test_stop(self) -> None:
        self.link()
        self.peers.moved(location(), 8)
        self.net.advance(0)
        self.peers.stop()
        self.assertEqual(self.peers._moves, {})
