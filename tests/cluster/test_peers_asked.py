"""gateway.cluster.peer_client: what other nodes are asked on behalf of this one."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred

from gateway.cluster.interface import PeerUnreachableError
from gateway.cluster.peer_client import NOTIFY_PREFIX_TIMEOUT, REQUEST_TIMEOUT
from gateway.cluster.peer_pool import MIN_ABSENCES
from gateway.registry.interface import Assignment
from tests.cluster.far import A, B, location, node_status
from tests.cluster.peers_case import PeerClientCase


class RequestTests(PeerClientCase):
    def requests(self) -> list[tuple[Deferred[Any], str, dict[str, Any], bytes, Any]]:
        """Each question, what is sent for it, an answer and what that comes to."""
        peers, where, node = self.peer_client, location("x", 7), node_status()
        has = {"client": "x", "generation": 7}
        close = {**has, "code": 4003, "reason": "r"}
        prefix = {"prefix": "acme/", "method": "m"}
        return [
            (peers.has_client(where, 1.0), "peer.has", has, b"true", True),
            (peers.has_client(where, 1.0), "peer.has", has, b"false", False),
            (peers.close_session(where, 4003, "r"), "peer.close", close, b"true", True),
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
            (peers.has_room(Assignment(B, "b", "", "ws://b.example:8081"), 1.0), "peer.has_room", {}, b"false", False),
            (peers.rebalance(node), "peer.rebalance", {}, b'{"moving":250,"more":1}', 250),
        ]

    def test_each(self) -> None:
        far = self.connected_peer()
        questions = self.requests()
        for asked, (answer, method, params, result, value) in zip(far.requests(), questions, strict=True):
            self.assertEqual((asked["method"], asked["params"]), (method, params))
            self.assertNoResult(answer)
            far.respond(asked, result)
            self.assertEqual(self.successResultOf(answer), value)

    def test_without_a_link(self) -> None:
        questions = self.requests()
        self.assertEqual(self.net.attempts(), 1)
        self.assertEqual(len(self.net.open().requests()), len(questions))

    def error_of(self, result: Deferred[Any]) -> PeerUnreachableError:
        return self.failureResultOf(result, PeerUnreachableError).value

    def test_cannot_be_linked(self) -> None:
        questions = self.requests()
        self.net.refuse()
        for answer, *_ in questions:
            problem = self.error_of(answer)
            self.assertEqual((problem.sent, problem.refused), (False, True))
        # Who asks next is told at once.
        problem = self.error_of(self.peer_client.has_client(location(), 1.0))
        self.assertEqual(str(problem), f"node {B} at ws://b.example:8081: nothing listens there (connection refused)")

    def test_no_link_in_time(self) -> None:
        answer = self.peer_client.has_client(location(), 1.0)
        self.net.advance(0.99)
        self.assertNoResult(answer)
        self.net.advance(0.01)
        problem = self.error_of(answer)
        self.assertEqual((problem.sent, problem.refused), (False, False))
        self.assertIn("no link to it within 1 s", str(problem))
        # It opens for the next one.
        self.net.open()
        self.assertEqual(self.peer_client.count(), 1)

    def test_silent(self) -> None:
        """The time that it took to connect counts."""
        answer = self.peer_client.has_client(location(), 1.0)
        self.net.advance(0.6)
        self.net.open()
        self.net.advance(0.35)
        self.assertNoResult(answer)
        self.net.advance(0.15)
        self.assertTrue(self.error_of(answer).sent)

    def test_how_long(self) -> None:
        self.connected_peer()
        close, prefix = (
            self.peer_client.close_session(location(), 4003, "r"),
            self.peer_client.notify_prefix(node_status(), "a", "m", None),
        )
        self.net.advance(REQUEST_TIMEOUT + 0.1)
        self.error_of(close)
        self.assertNoResult(prefix)
        for _ in range(12):
            self.net.peers[-1].send_messages(b'{"jsonrpc":"2.0","method":"x"}')
            self.net.advance((NOTIFY_PREFIX_TIMEOUT - REQUEST_TIMEOUT) / 12)
        self.error_of(prefix)

    def test_errors(self) -> None:
        far = self.connected_peer()
        for code, data, sent, text in (
            (-32001, {"sent": False}, False, "peer.has: not here"),
            (-32007, {"sent": True, "detail": "the row stays"}, True, "peer.has: the row stays"),
            (-32601, {"sent": False}, False, "peer.has: method not found"),
            (-32603, None, True, "peer.has: the client's node answered -32603: m"),
        ):
            answer = self.peer_client.has_client(location(), 1.0)
            far.respond_error(far.requests()[0], code, data=data)
            problem = self.error_of(answer)
            self.assertEqual((problem.sent, str(problem)), (sent, text))

    def test_what_cannot_be_read(self) -> None:
        far = self.connected_peer()
        for ask, result in (
            (lambda: self.peer_client.has_client(location(), 1.0), b"1"),
            (lambda: self.peer_client.close_session(location(), 4003, "r"), b"null"),
            (lambda: self.peer_client.notify_prefix(node_status(), "a", "m", None), b'{"reached":"1"}'),
            (lambda: self.peer_client.has_room(node_status(), 1.0), b"{}"),
            (lambda: self.peer_client.rebalance(node_status()), b"250"),
        ):
            answer = ask()
            far.respond(far.requests()[0], result)
            self.assertTrue(self.error_of(answer).sent)

    def test_link_breaks(self) -> None:
        far = self.connected_peer()
        answer = self.peer_client.has_client(location(), 1.0)
        far.disconnect()
        self.assertTrue(self.error_of(answer).sent)

    def test_cancelled(self) -> None:
        far = self.connected_peer()
        answer = self.peer_client.has_client(location(), 1.0)
        answer.cancel()
        self.failureResultOf(answer, CancelledError)
        far.respond(far.requests()[0], b"true")
        self.assertEqual(self.metrics.late_responses, 1)


class OwnershipNoticeTests(PeerClientCase):
    def test_told(self) -> None:
        self.peer_client.notify_takeover(location("x"), 8)
        self.peer_client.notify_takeover(location("y"), 9)
        self.net.advance(0)
        far = self.net.open()
        self.assertEqual(len(far.transport._unsent), 1)
        asked = far.requests()
        self.assertEqual(
            [(each["method"], each["params"]) for each in asked],
            [
                ("peer.moved", {"client": "x", "generation": 8, "node": A}),
                ("peer.moved", {"client": "y", "generation": 9, "node": A}),
            ],
        )
        for each in asked:
            far.respond(each)
        self.assertEqual((self.peer_client._outboxes, self.peer_client.requests_in_flight()), ({}, 0))
        self.net.advance(4)
        self.assertEqual(far.requests(), [])

    def test_told_of_claims_that_were_taken_back(self) -> None:
        self.peer_client.notify_claim_revoked(location("x"), 8)
        self.peer_client.notify_takeover(location("x"), 7)
        self.net.advance(0)
        far = self.net.open()
        asked = far.requests()
        self.assertEqual(
            sorted((each["method"], each["params"]["generation"]) for each in asked),
            [("peer.moved", 7), ("peer.taken_back", 8)],
        )
        for each in asked:
            far.respond(each)
        self.assertEqual(self.peer_client._outboxes, {})

    def test_told_again(self) -> None:
        self.peer_client.notify_takeover(location(), 8)
        self.net.advance(0)
        self.net.refuse()
        self.net.advance(0.25)
        self.net.open().disconnect()
        self.net.advance(0.5)
        far = self.net.open()
        (asked,) = far.requests()
        # Not answered.
        self.net.advance(REQUEST_TIMEOUT + 0.1)
        self.net.advance(2)
        (asked,) = far.requests()
        far.respond_error(asked, -32005)
        self.net.advance(2)
        (asked,) = far.requests()
        far.respond(asked)
        self.assertEqual(self.peer_client._outboxes, {})

    def test_not_told_again(self) -> None:
        for code in (-32001, -32601, -32602):
            far = self.connected_peer()
            self.peer_client.notify_takeover(location(), 8)
            self.net.advance(0)
            far.respond_error(far.requests()[0], code)
            self.assertEqual(self.peer_client._outboxes, {}, code)

    def test_node_is_gone(self) -> None:
        self.peer_client.notify_takeover(location(), 8)
        self.net.advance(0)
        self.net.refuse()
        for _ in range(MIN_ABSENCES):
            self.peer_client.nodes_changed([])
        self.assertEqual(self.peer_client._outboxes, {})
        self.net.advance(60)
        self.assertEqual(self.net.attempts(), 1)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_node_is_gone_while_it_is_told(self) -> None:
        far = self.connected_peer()
        self.peer_client.notify_takeover(location(), 8)
        self.net.advance(0)
        for _ in range(MIN_ABSENCES):
            self.peer_client.nodes_changed([])
        self.assertEqual((self.peer_client._outboxes, self.peer_client.requests_in_flight()), ({}, 0))
        self.assertEqual(len(far.requests()), 1)

    def test_not_to_itself(self) -> None:
        self.peer_client.notify_takeover(location(node_id=A), 8)
        self.net.advance(60)
        self.assertEqual(self.net.attempts(), 0)

    def test_many_at_a_node_that_takes_few(self) -> None:
        far = self.connected_peer()
        for n in range(3 * self.max_calls):
            self.peer_client.notify_takeover(location(f"c{n}"), 8)
        told: list[str] = []
        for _ in range(12):
            self.net.advance(0.25)
            for asked in far.requests():
                told.append(asked["params"]["client"])
                far.respond(asked)
        self.assertEqual(sorted(told), sorted(f"c{n}" for n in range(3 * self.max_calls)))
        self.assertEqual(self.peer_client._outboxes, {})

    def test_stop(self) -> None:
        self.connected_peer()
        self.peer_client.notify_takeover(location(), 8)
        self.net.advance(0)
        self.peer_client.stop()
        self.assertEqual(self.peer_client._outboxes, {})
