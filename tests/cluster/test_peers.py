"""gateway.cluster.peer_client: calls and notifications to clients of another node."""

from __future__ import annotations

import json

from twisted.internet.defer import CancelledError
from zope.interface.verify import verifyObject

from gateway.cluster.auth import PeerAuth
from gateway.cluster.interface import IPeerClient
from gateway.cluster.peer_client import TIMEOUT_GRACE
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.frames import encode
from gateway.rpc.interface import IRemoteNodes, NotDelivered, NotDeliveredError
from gateway.rpc.pending import Reply
from tests.cluster.far import B, C, location
from tests.cluster.peers_case import SECRET, PeerClientCase, RecordingCall


class ConnectTests(PeerClientCase):
    def test_interfaces(self) -> None:
        verifyObject(IRemoteNodes, self.peer_client)
        verifyObject(IPeerClient, self.peer_client)

    def test_connect(self) -> None:
        waiting = [self.peer_client.connect(location()) for _ in range(2)]
        self.assertEqual(self.net.attempts(), 1)
        far = self.net.accept()
        self.assertEqual(self.peer_client.count(), 0)
        far.open()
        self.assertEqual([self.successResultOf(each) for each in waiting], [None, None])
        self.successResultOf(self.peer_client.connect(location("y", 8)))
        self.assertEqual((self.net.attempts(), self.peer_client.count()), (1, 1))

    def test_credentials(self) -> None:
        self.peer_client.connect(location(url="ws://b.example:8081/prefix"))
        far = self.net.accept()
        self.assertTrue(far.http_request.startswith(b"GET /prefix/v1/backend HTTP/1.1\r\n"))
        other = PeerAuth(B, lambda: SECRET, lambda: 1000.0)
        self.assertEqual(other.verify(far.authorization, "GET", "/v1/backend"), self.node_id)

    def test_cannot_connect(self) -> None:
        waiting = self.peer_client.connect(location())
        self.net.refuse()
        error = self.failureResultOf(waiting, RpcError).value
        self.assertEqual((error.kind, error.sent, error.client_id), (ErrorKind.NODE_UNREACHABLE, False, "x"))
        self.assertIn("connection refused", error.detail)
        # For the next one that costs nothing.
        self.failureResultOf(self.peer_client.connect(location("y")), RpcError)
        self.assertEqual(self.net.attempts(), 1)

    def test_bad_url(self) -> None:
        error = self.failureResultOf(self.peer_client.connect(location(url="b:8081")), RpcError).value
        self.assertIn("write ws://host", error.detail)

    def test_a_link_for_each_node(self) -> None:
        self.connected_peer()
        self.peer_client.connect(location(node_id=C))
        far = self.net.open()
        self.assertEqual(self.peer_client.count(), 2)
        self.assertTrue(self.start_call(location("z", 9, C)).asked)
        self.assertEqual(far.requests()[0]["params"]["client"], "z")


class CallTests(PeerClientCase):
    def test_no_link(self) -> None:
        self.assertFalse(self.start_call().asked)
        self.assertEqual(self.net.attempts(), 0)

    def test_call(self) -> None:
        far = self.connected_peer()
        call = self.start_call(params=b'{"a": 1.0}', timeout=4.5)
        self.assertTrue(call.asked)
        (payload,) = far.payloads()
        id = payload[22:60]
        self.assertEqual(
            payload,
            b'{"jsonrpc":"2.0","id":%b,"method":"client.call","params":{"client":"x","generation":7,"method":"m",'
            b'"params":{"a": 1.0},"timeout":4.5}}' % id,
        )
        self.assertEqual(self.peer_client.requests_in_flight(), 1)
        far.send_messages(b'{"jsonrpc":"2.0","id":%b,"result":[ 1.0 ]}' % id)
        self.assertEqual(call.results, [Reply(b"[ 1.0 ]", None)])
        self.assertEqual((self.peer_client.requests_in_flight(), self.metrics.peer_calls), (0, 1))

    def test_stale(self) -> None:
        far = self.connected_peer()
        self.start_call(stale=True)
        self.assertEqual(far.requests()[0]["params"]["stale"], True)

    def test_many_in_one_write(self) -> None:
        far = self.connected_peer()
        self.cork.cork()
        calls = [self.start_call() for _ in range(5)]
        self.cork.uncork()
        self.assertEqual(len(far.transport._unsent), 1)
        answers = [encode(b'{"jsonrpc":"2.0","id":"%b","result":%d}' % (asked["id"].encode(), n))
                   for n, asked in enumerate(far.requests())]  # fmt: skip
        far.send(b"".join(reversed(answers)))
        self.assertEqual([call.results[0].result for call in calls], [b"0", b"1", b"2", b"3", b"4"])

    def test_error_of_the_client(self) -> None:
        far, call = self.start_connected_call()
        far.respond_error(far.last, -32001, b',"from":"client"')
        self.assertEqual(json.loads(call.results[0].error), {"code": -32001, "message": "m"})

    def test_missed(self) -> None:
        for code, miss in ((-32001, NotDelivered.NOT_HERE), (-32007, NotDelivered.LEASE_LOST)):
            far, call = self.start_connected_call()
            far.respond_error(far.last, code, data={"client": "x", "sent": False})
            self.assertEqual(self.not_delivered.pop(), (call, miss))
            self.assertEqual(call.results, [])
            self.assertEqual(self.peer_client.requests_in_flight(), 0)

    def test_missed_handler_that_fails(self) -> None:
        far, _ = self.start_connected_call()
        self.peer_client.on_not_delivered = lambda call, miss: 1 / 0
        far.respond_error(far.last, -32001)
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
            far, call = self.start_connected_call()
            far.respond_error(far.last, code, data=data)
            self.assert_failed(call, *expected)

    def test_unreadable_answer(self) -> None:
        far, call = self.start_connected_call()
        far.send_messages(b'{"jsonrpc":"2.0","id":"%b","result":}' % far.last["id"].encode())
        self.assert_failed(call, ErrorKind.CONNECTION_LOST, True, "what the client's node answered cannot be read")
        self.assertEqual((self.metrics.bad_messages["peer"], self.peer_client.count()), (1, 1))

    def test_unreadable_answer_to_who_knows_what(self) -> None:
        for payload in (b"what", b'{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"m"}}', b"[]"):
            far, call = self.start_connected_call()
            far.send_messages(payload)
            self.assert_failed(call, ErrorKind.CONNECTION_LOST, True, None)
            self.assertEqual(far.frames()[-1][1][:2], b"\x03\xea")
            self.net.advance(3)

    def test_what_is_no_answer(self) -> None:
        far, call = self.start_connected_call()
        far.send_messages(b'{"jsonrpc":"2.0","method":"events.connected","params":{}}')
        far.send_messages(b'{"jsonrpc":"2.0","id":"5f0c1d2e-0000-4000-8000-000000000001","result":1}')
        self.assertEqual((call.results, self.peer_client.count()), ([], 1))
        self.assertEqual((self.metrics.bad_messages["peer"], self.metrics.late_responses), (1, 1))

    def test_silence_until_the_deadline(self) -> None:
        _, call = self.start_connected_call(timeout=2.0)
        self.net.advance(2.0 + TIMEOUT_GRACE - 0.05)
        self.assertEqual(call.results, [])
        self.net.advance(0.2)
        self.assert_failed(call, ErrorKind.NODE_UNREACHABLE, True, "the node was silent until the deadline")

    def test_answered_by_another_link(self) -> None:
        far, call = self.start_connected_call()
        self.peer_client.connect(location(node_id=C))
        self.net.open().respond(far.last, b"1")
        self.assertEqual(call.results, [])

    def test_link_breaks(self) -> None:
        far, call = self.start_connected_call()
        far.disconnect()
        self.assert_failed(call, ErrorKind.CONNECTION_LOST, True, None)
        self.assertFalse(self.start_call().asked)

    def test_link_breaks_before_anything_left(self) -> None:
        far, left = self.start_connected_call()
        self.cork.cork()
        call = self.start_call()
        far.disconnect()
        self.cork.uncork()
        self.assert_failed(
            call, ErrorKind.NODE_UNREACHABLE, False, "the link to the node broke before anything was sent"
        )
        self.assert_failed(left, ErrorKind.CONNECTION_LOST, True, None)

    def test_node_that_does_not_read(self) -> None:
        far = self.connected_peer()
        self.cork.cork()
        while far.transport._producer is None or len(far.transport.dataBuffer) <= self.max_unsent:
            self.assertTrue(self.start_call(params=b'"%b"' % (b"x" * 9000)).asked)
        with self.assertRaises(RpcError) as caught:
            self.start_call()
        self.cork.uncork()
        error = caught.exception
        self.assertEqual((error.kind, error.sent), (ErrorKind.NODE_UNREACHABLE, False))
        in_flight = self.peer_client.requests_in_flight()
        far.transport.take_unsent()
        self.assertTrue(self.start_call().asked)
        self.assertEqual(self.peer_client.requests_in_flight(), in_flight + 1)

    def test_too_large(self) -> None:
        far = self.connected_peer()
        with self.assertRaises(RpcError) as caught:
            self.start_call(params=b'"%b"' % (b"x" * self.max_message_size))
        self.assertEqual((caught.exception.kind, caught.exception.sent), (ErrorKind.TOO_LARGE, False))
        self.assertEqual((far.requests(), self.peer_client.requests_in_flight()), ([], 0))

    def test_too_many(self) -> None:
        self.connected_peer()
        for _ in range(self.max_calls):
            self.start_call()
        with self.assertRaises(RpcError) as caught:
            self.start_call()
        self.assertEqual(caught.exception.kind, ErrorKind.TOO_MANY_CALLS)

    def test_forget(self) -> None:
        far, call = self.start_connected_call()
        self.peer_client.cancel(call)
        asked = {"jsonrpc": "2.0", "method": "peer.cancel", "params": {"id": far.last["id"]}}
        self.assertEqual(far.requests(), [asked])
        far.respond(far.last)
        self.assertEqual((call.results, self.peer_client.requests_in_flight()), ([], 0))
        self.peer_client.cancel(call)
        self.peer_client.cancel(RecordingCall())
        self.assertEqual(far.requests(), [])


class NotifyTests(PeerClientCase):
    def test_notify(self) -> None:
        far = self.connected_peer()
        telling = self.peer_client.notify(location(), "m", b"[1]", 5.0)
        (asked,) = far.requests()
        params = {"client": "x", "generation": 7, "method": "m", "params": [1]}
        self.assertEqual((asked["method"], asked["params"]), ("client.notify", params))
        self.assertNoResult(telling)
        far.respond(asked)
        self.assertIsNone(self.successResultOf(telling))

    def test_without_a_link(self) -> None:
        telling = self.peer_client.notify(location(), "m", None, 5.0, stale=True)
        far = self.net.open()
        (asked,) = far.requests()
        self.assertEqual(asked["params"], {"client": "x", "generation": 7, "method": "m", "stale": True})
        far.respond(asked)
        self.assertIsNone(self.successResultOf(telling))

    def test_no_link_in_time(self) -> None:
        telling = self.peer_client.notify(location(), "m", None, 1.0)
        self.net.advance(1.0)
        error = self.failureResultOf(telling, RpcError).value
        self.assertEqual((error.kind, error.sent, error.client_id), (ErrorKind.NODE_UNREACHABLE, False, "x"))

    def test_missed(self) -> None:
        far = self.connected_peer()
        telling = self.peer_client.notify(location(), "m", None, 5.0)
        far.respond_error(far.requests()[0], -32007)
        self.assertIs(self.failureResultOf(telling, NotDeliveredError).value.reason, NotDelivered.LEASE_LOST)
        self.assertEqual(self.not_delivered, [])

    def test_errors(self) -> None:
        far = self.connected_peer()
        telling = [self.peer_client.notify(location(), "m", None, 5.0) for _ in range(3)]
        far.respond_error(far.requests()[0], -32602, data={"detail": "d"})
        self.assertEqual(self.failureResultOf(telling[0], RpcError).value.kind, ErrorKind.INVALID_PARAMS)
        self.net.advance(5.1)
        self.assertEqual(self.failureResultOf(telling[1], RpcError).value.kind, ErrorKind.NODE_UNREACHABLE)
        self.failureResultOf(telling[2], RpcError)
        too_large = self.peer_client.notify(location(), "m", b'"%b"' % (b"x" * self.max_message_size), 5.0)
        self.assertEqual(self.failureResultOf(too_large, RpcError).value.kind, ErrorKind.TOO_LARGE)

    def test_cancelled(self) -> None:
        self.connected_peer()
        telling = self.peer_client.notify(location(), "m", None, 5.0)
        telling.cancel()
        self.failureResultOf(telling, CancelledError)
        self.assertEqual(self.peer_client.requests_in_flight(), 0)
