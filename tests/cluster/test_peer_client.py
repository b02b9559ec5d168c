"""Tests of gateway.cluster.peer_client: calls, notifications, requests and ownership notices."""

from __future__ import annotations

import json
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.cluster import peer_client
from gateway.cluster.auth import PeerAuth
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import IPeerClient
from gateway.cluster.peer_client import (
    INITIAL_BACKOFF,
    MAX_BACKOFF,
    NOTICE_BATCH_SIZE,
    NOTIFY_PREFIX_TIMEOUT,
    REQUEST_TIMEOUT,
    TIMEOUT_GRACE,
    OwnershipOutbox,
)
from gateway.cluster.peer_pool import MIN_ABSENCES, NO_RESPONSE
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.frames import encode
from gateway.registry.interface import Assignment, SessionKey
from gateway.rpc.errors import NotDelivered
from gateway.rpc.interface import IRemoteNodes
from gateway.rpc.pending import Reply
from tests.builders.peer_client import SECRET, PeerClientCase, RecordingCall
from tests.fakes.peer import A, B, C, RemotePeer, location, node_status


class FailingCall(RecordingCall):
    """A call whose callback raises."""

    __slots__ = ()

    def not_delivered(self, reason: NotDelivered) -> None:
        raise ZeroDivisionError


class ConnectTests(PeerClientCase):
    def test_interfaces(self) -> None:
        verifyObject(IRemoteNodes, self.peer_client)
        verifyObject(IPeerClient, self.peer_client)

    def test_connect(self) -> None:
        waiting = [self.peer_client.connect(location()) for _ in range(2)]
        self.assertEqual(self.net.attempts(), 1)
        peer = self.net.accept()
        self.assertEqual(self.peer_client.count(), 0)
        peer.open()
        self.assertEqual([self.successResultOf(each) for each in waiting], [None, None])
        self.successResultOf(self.peer_client.connect(location("y", 8)))
        self.assertEqual((self.net.attempts(), self.peer_client.count()), (1, 1))

    def test_authorization(self) -> None:
        self.peer_client.connect(location(url="ws://b.example:8081/prefix"))
        peer = self.net.accept()
        self.assertTrue(peer.http_request.startswith(b"GET /prefix/v1/backend HTTP/1.1\r\n"))
        other = PeerAuth(B, lambda: SECRET, lambda: 1000.0)
        self.assertEqual(other.verify(peer.authorization, "GET", "/v1/backend"), self.node_id)

    def test_cannot_connect(self) -> None:
        waiting = self.peer_client.connect(location())
        self.net.refuse()
        error = self.failureResultOf(waiting, RpcError).value
        self.assertEqual((error.kind, error.sent, error.client_id), (ErrorKind.NODE_UNREACHABLE, False, "x"))
        self.assertIn("connection refused", error.detail)
        # The next caller gets the error without an attempt.
        self.failureResultOf(self.peer_client.connect(location("y")), RpcError)
        self.assertEqual(self.net.attempts(), 1)

    def test_bad_url(self) -> None:
        error = self.failureResultOf(self.peer_client.connect(location(url="b:8081")), RpcError).value
        self.assertIn("write ws://host", error.detail)

    def test_one_connection_for_each_node(self) -> None:
        self.connected_peer()
        self.peer_client.connect(location(node_id=C))
        peer = self.net.open()
        self.assertEqual(self.peer_client.count(), 2)
        self.assertTrue(self.start_call(location("z", 9, C)).started)
        self.assertEqual(peer.requests()[0]["params"]["client"], "z")


class CallTests(PeerClientCase):
    def test_no_connection(self) -> None:
        self.assertFalse(self.start_call().started)
        self.assertEqual(self.net.attempts(), 0)

    def test_call(self) -> None:
        peer = self.connected_peer()
        call = self.start_call(params=b'{"a": 1.0}', timeout=4.5)
        self.assertTrue(call.started)
        (payload,) = peer.payloads()
        id = payload[22:60]
        self.assertEqual(
            payload,
            b'{"jsonrpc":"2.0","id":%b,"method":"client.call","params":{"client":"x","generation":7,"method":"m",'
            b'"params":{"a": 1.0},"timeout":4.5}}' % id,
        )
        self.assertEqual(self.peer_client.requests_in_flight(), 1)
        peer.send_messages(b'{"jsonrpc":"2.0","id":%b,"result":[ 1.0 ]}' % id)
        self.assertEqual(call.results, [Reply(b"[ 1.0 ]", None)])
        self.assertEqual((self.peer_client.requests_in_flight(), self.metrics.peer_calls), (0, 1))

    def test_stale(self) -> None:
        peer = self.connected_peer()
        self.start_call(stale=True)
        self.assertEqual(peer.requests()[0]["params"]["stale"], True)

    def test_many_in_one_write(self) -> None:
        peer = self.connected_peer()
        self.cork.cork()
        calls = [self.start_call() for _ in range(5)]
        self.cork.uncork()
        self.assertEqual(len(peer.transport._unsent), 1)
        answers = [encode(b'{"jsonrpc":"2.0","id":"%b","result":%d}' % (request["id"].encode(), n))
                   for n, request in enumerate(peer.requests())]  # fmt: skip
        peer.send(b"".join(reversed(answers)))
        self.assertEqual([call.results[0].result for call in calls], [b"0", b"1", b"2", b"3", b"4"])

    def test_error_of_the_client(self) -> None:
        peer, call = self.start_connected_call()
        peer.respond_error(peer.last, -32001, b',"from":"client"')
        self.assertEqual(json.loads(call.results[0].error), {"code": -32001, "message": "m"})

    def test_not_delivered(self) -> None:
        for code, reason in ((-32001, NotDelivered.NOT_HERE), (-32007, NotDelivered.LEASE_LOST)):
            peer, call = self.start_connected_call()
            peer.respond_error(peer.last, code, data={"client": "x", "sent": False})
            self.assertEqual((call.not_delivered_reasons, call.results), ([reason], []))
            self.assertEqual(self.peer_client.requests_in_flight(), 0)

    def test_not_delivered_handler_that_fails(self) -> None:
        peer = self.connected_peer()
        self.assertTrue(self.peer_client.try_send(FailingCall(), location(), "m", None, 30.0))
        peer.last = peer.requests()[-1]
        peer.respond_error(peer.last, -32001)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(self.peer_client.count(), 1)

    def test_errors_of_the_gateway(self) -> None:
        for code, data, expected in (
            (-32002, {"client": "y", "sent": True}, (ErrorKind.TIMEOUT, True, None)),
            (-32003, None, (ErrorKind.CONNECTION_LOST, True, None)),
            (-32004, {"sent": False, "detail": "d"}, (ErrorKind.NODE_UNREACHABLE, False, "d")),
            (-32005, {"sent": False}, (ErrorKind.TOO_MANY_CALLS, False, None)),
            (-32603, {"sent": False}, (ErrorKind.NODE_UNREACHABLE, True, "the client's node answered -32603: m")),
        ):
            peer, call = self.start_connected_call()
            peer.respond_error(peer.last, code, data=data)
            self.assert_failed(call, *expected)

    def test_unreadable_response(self) -> None:
        peer, call = self.start_connected_call()
        peer.send_messages(b'{"jsonrpc":"2.0","id":"%b","result":}' % peer.last["id"].encode())
        self.assert_failed(call, ErrorKind.CONNECTION_LOST, True, "the response of the client's node cannot be read")
        self.assertEqual((self.metrics.bad_messages["peer"], self.peer_client.count()), (1, 1))

    def test_unreadable_response_without_a_known_id(self) -> None:
        for payload in (b"what", b'{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"m"}}', b"[]"):
            peer, call = self.start_connected_call()
            peer.send_messages(payload)
            self.assert_failed(call, ErrorKind.CONNECTION_LOST, True, None)
            self.assertEqual(peer.frames()[-1][1][:2], b"\x03\xea")
            self.net.advance(3)

    def test_not_a_response(self) -> None:
        peer, call = self.start_connected_call()
        peer.send_messages(b'{"jsonrpc":"2.0","method":"events.connected","params":{}}')
        peer.send_messages(b'{"jsonrpc":"2.0","id":"5f0c1d2e-0000-4000-8000-000000000001","result":1}')
        self.assertEqual((call.results, self.peer_client.count()), ([], 1))
        self.assertEqual((self.metrics.bad_messages["peer"], self.metrics.late_responses), (1, 1))

    def test_no_response_until_the_deadline(self) -> None:
        _, call = self.start_connected_call(timeout=2.0)
        self.net.advance(2.0 + TIMEOUT_GRACE - 0.05)
        self.assertEqual(call.results, [])
        self.net.advance(0.2)
        self.assert_failed(call, ErrorKind.NODE_UNREACHABLE, True, "the node was silent until the deadline")

    def test_response_of_another_connection(self) -> None:
        peer, call = self.start_connected_call()
        self.peer_client.connect(location(node_id=C))
        self.net.open().respond(peer.last, b"1")
        self.assertEqual(call.results, [])

    def test_connection_lost(self) -> None:
        peer, call = self.start_connected_call()
        peer.disconnect()
        self.assert_failed(call, ErrorKind.CONNECTION_LOST, True, None)
        self.assertFalse(self.start_call().started)

    def test_connection_lost_before_anything_was_sent(self) -> None:
        peer, left = self.start_connected_call()
        self.cork.cork()
        call = self.start_call()
        peer.disconnect()
        self.cork.uncork()
        self.assert_failed(
            call, ErrorKind.NODE_UNREACHABLE, False, "the connection to the node was lost before anything was sent"
        )
        self.assert_failed(left, ErrorKind.CONNECTION_LOST, True, None)

    def test_node_that_does_not_read(self) -> None:
        peer = self.connected_peer()
        self.cork.cork()
        while peer.transport._producer is None or len(peer.transport.dataBuffer) <= self.max_unsent:
            self.assertTrue(self.start_call(params=b'"%b"' % (b"x" * 9000)).started)
        with self.assertRaises(RpcError) as caught:
            self.start_call()
        self.cork.uncork()
        error = caught.exception
        self.assertEqual((error.kind, error.sent), (ErrorKind.NODE_UNREACHABLE, False))
        in_flight = self.peer_client.requests_in_flight()
        peer.transport.take_unsent()
        self.assertTrue(self.start_call().started)
        self.assertEqual(self.peer_client.requests_in_flight(), in_flight + 1)

    def test_too_large(self) -> None:
        peer = self.connected_peer()
        with self.assertRaises(RpcError) as caught:
            self.start_call(params=b'"%b"' % (b"x" * self.max_message_size))
        self.assertEqual((caught.exception.kind, caught.exception.sent), (ErrorKind.TOO_LARGE, False))
        self.assertEqual((peer.requests(), self.peer_client.requests_in_flight()), ([], 0))

    def test_too_many(self) -> None:
        self.connected_peer()
        for _ in range(self.max_calls):
            self.start_call()
        with self.assertRaises(RpcError) as caught:
            self.start_call()
        self.assertEqual(caught.exception.kind, ErrorKind.TOO_MANY_CALLS)

    def test_cancel(self) -> None:
        peer, call = self.start_connected_call()
        self.peer_client.cancel(call)
        request = {"jsonrpc": "2.0", "method": "peer.cancel", "params": {"id": peer.last["id"]}}
        self.assertEqual(peer.requests(), [request])
        peer.respond(peer.last)
        self.assertEqual((call.results, self.peer_client.requests_in_flight()), ([], 0))
        self.peer_client.cancel(call)
        self.peer_client.cancel(RecordingCall())
        self.assertEqual(peer.requests(), [])


class NotifyTests(PeerClientCase):
    def notify(self, params: bytes | None = None, **options: Any) -> RecordingCall:
        return self.start_call(params=params, timeout=5.0, is_call=False, **options)

    def test_notify(self) -> None:
        peer = self.connected_peer()
        notification = self.notify(b"[1]", stale=True)
        (request,) = peer.requests()
        params = {"client": "x", "generation": 7, "method": "m", "params": [1], "stale": True}
        self.assertEqual((request["method"], request["params"]), ("client.notify", params))
        self.assertEqual(notification.results, [])
        peer.respond(request)
        self.assertEqual(notification.results, [Reply(b"null", None)])

    def test_without_a_connection(self) -> None:
        self.assertFalse(self.notify().started)

    def test_not_delivered(self) -> None:
        peer = self.connected_peer()
        notification = self.notify()
        peer.respond_error(peer.requests()[0], -32007)
        self.assertEqual(notification.not_delivered_reasons, [NotDelivered.LEASE_LOST])

    def test_errors(self) -> None:
        peer = self.connected_peer()
        first, second = self.notify(), self.notify()
        peer.respond_error(peer.requests()[0], -32602, data={"detail": "d"})
        self.assert_failed(first, ErrorKind.INVALID_PARAMS, False, "d")
        self.net.advance(5.1)
        self.assert_failed(second, ErrorKind.NODE_UNREACHABLE, True, NO_RESPONSE)
        with self.assertRaises(RpcError) as caught:
            self.notify(b'"%b"' % (b"x" * self.max_message_size))
        self.assertEqual(caught.exception.kind, ErrorKind.TOO_LARGE)

    def test_cancelled(self) -> None:
        peer = self.connected_peer()
        notification = self.notify()
        peer.requests()
        self.peer_client.cancel(notification)
        self.assertEqual([request["method"] for request in peer.requests()], ["peer.cancel"])
        self.assertEqual(self.peer_client.requests_in_flight(), 0)


class FenceTests(PeerClientCase):
    def fence(self, headers: bytes = b"Wsgateway-Features: fence\r\n") -> tuple[RemotePeer, Deferred[None]]:
        self.peer_client.connect(location())
        return self.net.accept().open(headers), self.peer_client.fence(location())

    def test_fence(self) -> None:
        peer, fence = self.fence()
        (request,) = peer.requests()
        self.assertEqual((request["method"], request["params"]), ("peer.fence", {"client": "x"}))
        self.assertNoResult(fence)
        peer.respond(request)
        self.successResultOf(fence)

    def test_older_node(self) -> None:
        peer, fence = self.fence(b"")
        self.successResultOf(fence)
        self.assertEqual(peer.requests(), [])

    def test_without_a_connection(self) -> None:
        self.successResultOf(self.peer_client.fence(location()))

    def test_connection_lost(self) -> None:
        peer, fence = self.fence()
        peer.disconnect()
        self.successResultOf(fence)

    def test_any_error_is_repeated(self) -> None:
        peer, fence = self.fence()
        peer.respond_error(peer.requests()[0], -32603)
        self.assertNoResult(fence)
        self.net.advance(0.2)
        peer.respond(peer.requests()[0])
        self.successResultOf(fence)

    def test_too_many_requests_in_flight(self) -> None:
        self.peer_client.connect(location())
        peer = self.net.accept().open(b"Wsgateway-Features: fence\r\n")
        calls = [self.start_call() for _ in range(self.max_calls)]
        request = peer.requests()[0]
        fence = self.peer_client.fence(location())
        # What was sent before it is not settled.
        self.net.advance(1)
        self.assertNoResult(fence)
        self.assertEqual(peer.requests(), [])
        peer.respond(request)
        self.assertEqual(len(calls[0].results), 1)
        self.net.advance(0.2)
        self.assertNoResult(fence)
        peer.respond(peer.requests()[0])
        self.successResultOf(fence)

    def test_connection_lost_before_it_is_repeated(self) -> None:
        peer, fence = self.fence()
        peer.respond_error(peer.requests()[0], -32603)
        peer.disconnect()
        self.net.advance(0.2)
        self.successResultOf(fence)

    def test_stop_before_it_is_repeated(self) -> None:
        peer, fence = self.fence()
        peer.respond_error(peer.requests()[0], -32603)
        self.peer_client.stop()
        self.successResultOf(fence)


class FloorTests(PeerClientCase):
    def connect_with(self, headers: bytes) -> RemotePeer:
        self.peer_client.connect(location())
        return self.net.accept().open(headers)

    def test_exchange(self) -> None:
        peer = self.connect_with(b"Wsgateway-Features: floor\r\n")
        floors = self.peer_client.exchange_floors(7)
        (request,) = peer.requests()
        self.assertEqual((request["method"], request["params"]), ("peer.floor", {"generation": 7}))
        self.assertNoResult(floors)
        peer.respond(request, b'{"generation":9}')
        self.assertEqual(self.successResultOf(floors), [9])

    def test_older_node(self) -> None:
        peer = self.connect_with(b"")
        self.assertEqual(self.successResultOf(self.peer_client.exchange_floors(7)), [])
        self.assertEqual(peer.requests(), [])

    def test_node_that_joins(self) -> None:
        """It is not connected to the others yet; some of them cannot be reached."""
        floors = self.peer_client.learn_floors([node_status(), node_status(C, "")], 7)
        peer = self.net.accept().open(b"Wsgateway-Features: floor\r\n")
        (request,) = peer.requests()
        self.assertEqual((request["method"], request["params"]), ("peer.floor", {"generation": 7}))
        peer.respond(request, b'{"generation":9}')
        self.assertEqual(self.successResultOf(floors), [9])

    def test_nodes_that_cannot_be_reached_in_time(self) -> None:
        floors = self.peer_client.learn_floors([node_status()], 7)
        self.net.advance(1.9)
        self.assertNoResult(floors)
        self.net.advance(0.2)
        self.assertEqual(self.successResultOf(floors), [])

    def test_node_that_does_not_answer(self) -> None:
        self.connect_with(b"Wsgateway-Features: floor\r\n")
        floors = self.peer_client.exchange_floors(7)
        self.net.advance(2.1)
        self.assertEqual(self.successResultOf(floors), [])

    def test_unreadable_response(self) -> None:
        peer = self.connect_with(b"Wsgateway-Features: floor\r\n")
        floors = self.peer_client.exchange_floors(7)
        peer.respond(peer.requests()[0], b'"9"')
        self.assertEqual(self.successResultOf(floors), [])


class RequestTests(PeerClientCase):
    def requests(self) -> list[tuple[Deferred[Any], str, dict[str, Any], bytes, Any]]:
        """Each request: its result, the method and params that are sent, a response, and the value of the result."""
        peers, owner, node = self.peer_client, location("x", 7), node_status()
        has = {"client": "x", "generation": 7}
        close = {**has, "code": 4003, "reason": "r"}
        prefix = {"prefix": "acme/", "method": "m"}
        return [
            (peers.has_client(owner, 1.0), "peer.has", has, b"true", True),
            (peers.has_client(owner, 1.0), "peer.has", has, b"false", False),
            (peers.close_session(owner, 4003, "r"), "peer.close", close, b"true", True),
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

    def test_each_request(self) -> None:
        peer = self.connected_peer()
        requests = self.requests()
        for request, (answer, method, params, result, value) in zip(peer.requests(), requests, strict=True):
            self.assertEqual((request["method"], request["params"]), (method, params))
            self.assertNoResult(answer)
            peer.respond(request, result)
            self.assertEqual(self.successResultOf(answer), value)

    def test_without_a_connection(self) -> None:
        requests = self.requests()
        self.assertEqual(self.net.attempts(), 1)
        self.assertEqual(len(self.net.open().requests()), len(requests))

    def error_of(self, result: Deferred[Any]) -> PeerUnreachableError:
        return self.failureResultOf(result, PeerUnreachableError).value

    def test_cannot_connect(self) -> None:
        requests = self.requests()
        self.net.refuse()
        for answer, *_ in requests:
            problem = self.error_of(answer)
            self.assertEqual((problem.sent, problem.refused), (False, True))
        # The next caller gets the error at once.
        problem = self.error_of(self.peer_client.has_client(location(), 1.0))
        self.assertEqual(str(problem), f"node {B} at ws://b.example:8081: nothing listens there (connection refused)")

    def test_no_connection_in_time(self) -> None:
        answer = self.peer_client.has_client(location(), 1.0)
        self.net.advance(0.99)
        self.assertNoResult(answer)
        self.net.advance(0.01)
        problem = self.error_of(answer)
        self.assertEqual((problem.sent, problem.refused), (False, False))
        self.assertIn("no connection to it within 1 s", str(problem))
        # The attempt goes on, for the next request.
        self.net.open()
        self.assertEqual(self.peer_client.count(), 1)

    def test_no_response(self) -> None:
        """The time to connect counts."""
        answer = self.peer_client.has_client(location(), 1.0)
        self.net.advance(0.6)
        self.net.open()
        self.net.advance(0.35)
        self.assertNoResult(answer)
        self.net.advance(0.15)
        self.assertTrue(self.error_of(answer).sent)

    def test_timeouts(self) -> None:
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
        peer = self.connected_peer()
        for code, data, sent, text in (
            (-32001, {"sent": False}, False, "peer.has: not here"),
            (-32007, {"sent": True, "detail": "the row stays"}, True, "peer.has: the row stays"),
            (-32601, {"sent": False}, False, "peer.has: method not found"),
            (-32603, None, True, "peer.has: the client's node answered -32603: m"),
        ):
            answer = self.peer_client.has_client(location(), 1.0)
            peer.respond_error(peer.requests()[0], code, data=data)
            problem = self.error_of(answer)
            self.assertEqual((problem.sent, str(problem)), (sent, text))

    def test_unreadable_results(self) -> None:
        peer = self.connected_peer()
        for ask, result in (
            (lambda: self.peer_client.has_client(location(), 1.0), b"1"),
            (lambda: self.peer_client.close_session(location(), 4003, "r"), b"null"),
            (lambda: self.peer_client.notify_prefix(node_status(), "a", "m", None), b'{"reached":"1"}'),
            (lambda: self.peer_client.has_room(node_status(), 1.0), b"{}"),
            (lambda: self.peer_client.rebalance(node_status()), b"250"),
        ):
            answer = ask()
            peer.respond(peer.requests()[0], result)
            self.assertTrue(self.error_of(answer).sent)

    def test_connection_lost(self) -> None:
        peer = self.connected_peer()
        answer = self.peer_client.has_client(location(), 1.0)
        peer.disconnect()
        self.assertTrue(self.error_of(answer).sent)

    def test_cancelled(self) -> None:
        peer = self.connected_peer()
        answer = self.peer_client.has_client(location(), 1.0)
        answer.cancel()
        self.failureResultOf(answer, CancelledError)
        peer.respond(peer.requests()[0], b"true")
        self.assertEqual(self.metrics.late_responses, 1)


class OwnershipNoticeTests(PeerClientCase):
    def test_delivered(self) -> None:
        self.peer_client.notify_takeover(location("x"), 8)
        self.peer_client.notify_takeover(location("y"), 9)
        self.net.advance(0)
        peer = self.net.open()
        self.assertEqual(len(peer.transport._unsent), 1)
        request = peer.requests()
        self.assertEqual(
            [(each["method"], each["params"]) for each in request],
            [
                ("peer.moved", {"client": "x", "generation": 8, "node": A}),
                ("peer.moved", {"client": "y", "generation": 9, "node": A}),
            ],
        )
        for each in request:
            peer.respond(each)
        self.assertEqual((self.peer_client._outboxes, self.peer_client.requests_in_flight()), ({}, 0))
        self.net.advance(4)
        self.assertEqual(peer.requests(), [])

    def test_revoked_claims(self) -> None:
        self.peer_client.notify_claim_revoked(location("x"), 8)
        self.peer_client.notify_takeover(location("x"), 7)
        self.net.advance(0)
        peer = self.net.open()
        request = peer.requests()
        self.assertEqual(
            sorted((each["method"], each["params"]["generation"]) for each in request),
            [("peer.moved", 7), ("peer.taken_back", 8)],
        )
        for each in request:
            peer.respond(each)
        self.assertEqual(self.peer_client._outboxes, {})

    def test_repeated(self) -> None:
        self.peer_client.notify_takeover(location(), 8)
        self.net.advance(0)
        self.net.refuse()
        self.net.advance(0.25)
        self.net.open().disconnect()
        self.net.advance(0.5)
        peer = self.net.open()
        (request,) = peer.requests()
        # No response.
        self.net.advance(REQUEST_TIMEOUT + 0.1)
        self.net.advance(2)
        (request,) = peer.requests()
        peer.respond_error(request, -32005)
        self.net.advance(2)
        (request,) = peer.requests()
        peer.respond(request)
        self.assertEqual(self.peer_client._outboxes, {})

    def test_not_repeated(self) -> None:
        for code in (-32001, -32601, -32602):
            peer = self.connected_peer()
            self.peer_client.notify_takeover(location(), 8)
            self.net.advance(0)
            peer.respond_error(peer.requests()[0], code)
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

    def test_node_is_gone_while_sending(self) -> None:
        peer = self.connected_peer()
        self.peer_client.notify_takeover(location(), 8)
        self.net.advance(0)
        for _ in range(MIN_ABSENCES):
            self.peer_client.nodes_changed([])
        self.assertEqual((self.peer_client._outboxes, self.peer_client.requests_in_flight()), ({}, 0))
        self.assertEqual(len(peer.requests()), 1)

    def test_not_sent_to_this_node(self) -> None:
        self.peer_client.notify_takeover(location(node_id=A), 8)
        self.net.advance(60)
        self.assertEqual(self.net.attempts(), 0)

    def test_more_notices_than_calls_in_flight(self) -> None:
        peer = self.connected_peer()
        for n in range(3 * self.max_calls):
            self.peer_client.notify_takeover(location(f"c{n}"), 8)
        delivered: list[str] = []
        for _ in range(12):
            self.net.advance(0.25)
            for request in peer.requests():
                delivered.append(request["params"]["client"])
                peer.respond(request)
        self.assertEqual(sorted(delivered), sorted(f"c{n}" for n in range(3 * self.max_calls)))
        self.assertEqual(self.peer_client._outboxes, {})

    def test_stop(self) -> None:
        self.connected_peer()
        self.peer_client.notify_takeover(location(), 8)
        self.net.advance(0)
        self.peer_client.stop()
        self.assertEqual(self.peer_client._outboxes, {})


class OwnershipOutboxTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.batches: list[list[SessionKey]] = []
        self.respond = lambda batch: succeed(batch)
        self.times_empty = 0
        self.outbox = OwnershipOutbox(self.clock, self.send, self.on_empty)

    def send(self, notices: list[SessionKey]) -> Deferred[list[SessionKey]]:
        self.batches.append(notices)
        return self.respond(notices)

    def on_empty(self) -> None:
        self.times_empty += 1

    def test_sent_together(self) -> None:
        self.outbox.add(SessionKey("x", 1))
        self.outbox.add(SessionKey("y", 2))
        self.outbox.add(SessionKey("x", 3))
        self.outbox.add(SessionKey("x", 2))
        self.assertEqual(self.batches, [])
        self.clock.advance(0)
        self.assertEqual(self.batches, [[("y", 2), ("x", 3)]])
        self.assertEqual((len(self.outbox), self.times_empty), (0, 1))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_batches(self) -> None:
        for n in range(NOTICE_BATCH_SIZE + 1):
            self.outbox.add(SessionKey(f"c{n}", 1))
        self.clock.advance(0)
        self.assertEqual([len(batch) for batch in self.batches], [NOTICE_BATCH_SIZE, 1])

    def test_repeated_until_delivered(self) -> None:
        self.respond = lambda batch: fail(PeerUnreachableError("away"))
        self.outbox.add(SessionKey("x", 1))
        self.clock.advance(0)
        wait = INITIAL_BACKOFF
        for n in range(2, 8):
            self.clock.advance(wait - 0.01)
            self.assertEqual(len(self.batches), n - 1)
            self.clock.advance(0.01)
            self.assertEqual(len(self.batches), n)
            wait = min(2 * wait, MAX_BACKOFF)
        self.respond = succeed
        self.clock.advance(MAX_BACKOFF)
        self.assertEqual((len(self.batches), len(self.outbox), self.times_empty), (8, 0, 1))

    def test_partly_delivered(self) -> None:
        self.respond = lambda batch: succeed(batch[:1])
        self.outbox.add(SessionKey("x", 1))
        self.outbox.add(SessionKey("y", 1))
        self.clock.advance(0)
        self.assertEqual(self.batches, [[("x", 1), ("y", 1)], [("y", 1)]])

    def test_newer_notice_meanwhile(self) -> None:
        waiting: Deferred[list[SessionKey]] = Deferred()
        self.respond = lambda batch: waiting
        self.outbox.add(SessionKey("x", 1))
        self.clock.advance(0)
        self.outbox.add(SessionKey("x", 2))
        self.respond = succeed
        waiting.callback([SessionKey("x", 1)])
        self.assertEqual(self.batches, [[("x", 1)], [("x", 2)]])

    def test_bounded(self) -> None:
        self.patch(peer_client, "MAX_NOTICES", 3)
        for n in range(5):
            self.outbox.add(SessionKey(f"c{n}", 1))
        self.clock.advance(0)
        self.assertEqual(self.batches, [[("c2", 1), ("c3", 1), ("c4", 1)]])

    def test_stopped(self) -> None:
        cancelled = []
        self.respond = lambda batch: Deferred(cancelled.append)
        self.outbox.add(SessionKey("x", 1))
        self.clock.advance(0)
        self.outbox.stop()
        self.assertEqual((len(cancelled), len(self.outbox), self.times_empty), (1, 0, 1))
        self.clock.advance(60)
        self.assertEqual(len(self.batches), 1)
        self.outbox.stop()

    def test_stopped_before_it_sends(self) -> None:
        self.outbox.add(SessionKey("x", 1))
        self.outbox.stop()
        self.clock.advance(60)
        self.assertEqual((self.batches, self.times_empty), ([], 1))

    def test_unexpected_error(self) -> None:
        self.respond = lambda batch: fail(ZeroDivisionError())
        self.outbox.add(SessionKey("x", 1))
        self.clock.advance(0)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        # It is sent again with the next notice.
        self.respond = succeed
        self.outbox.add(SessionKey("y", 1))
        self.clock.advance(0)
        self.assertEqual(self.batches[-1], [("x", 1), ("y", 1)])


class OwnAddressTests(PeerClientCase):
    """A node that was at this node's address is gone."""

    own_url = location().peer_url

    def test_is_not_connected(self) -> None:
        error = self.failureResultOf(self.peer_client.has_client(location(), 1.0), PeerUnreachableError).value
        self.assertFalse(error.sent)
        self.assertEqual(self.failureResultOf(self.peer_client.connect(location()), RpcError).value.sent, False)
        self.assertEqual((self.net.attempts(), self.metrics.link_failures), (0, 0))

    def test_gets_no_notices(self) -> None:
        self.peer_client.notify_takeover(location(), 8)
        self.peer_client.notify_claim_revoked(location(), 8)
        self.assertEqual(self.peer_client._outboxes, {})
