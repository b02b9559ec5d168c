"""The WebSocket of backends."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import TestCase
from zope.interface.verify import verifyObject

from gateway.api.responses import MAX_ENVELOPE_SIZE
from gateway.api.upstream import IBackendConnection
from gateway.protocol.errors import ErrorKind
from gateway.rpc.pending import Reply
from tests.api.case import BackendTestCase, call, notification
from tests.api.fakes import UPGRADE, BackendWebSocket, EndpointHarness, frame, request, rpc_error


class OpeningTests(TestCase):
    def test_open(self):
        endpoint = EndpointHarness()
        backend = BackendWebSocket(endpoint)
        self.assertNotIn(b"Sec-WebSocket-Protocol", backend.opening)
        self.assertTrue(verifyObject(IBackendConnection, backend.protocol._protocol))
        self.assertEqual(endpoint.metrics.api_requests, {"101": 1})

    def test_subprotocol(self):
        backend = BackendWebSocket(EndpointHarness(), [("Sec-WebSocket-Protocol", "chat, wsgateway.jsonrpc.v1")])
        self.assertIn(b"Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1\r\n", backend.opening)
        self.assertNotIn(
            b"Sec-WebSocket-Protocol", BackendWebSocket(EndpointHarness(), [("Sec-WebSocket-Protocol", "chat")]).opening
        )

    def test_no_handshake(self):
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        connection.send(request("GET", "/v1/backend", headers=UPGRADE[:1]))
        (response,) = connection.responses()
        self.assertEqual((response.status, response.json["error"]), (400, "upgrade"))
        self.assertEqual(endpoint.metrics.api_requests, {"400": 1})


class CallTests(BackendTestCase):
    def test_as_they_come(self):
        for i in range(3):
            self.backend.send_message(call(i, "client.call", {"client": "x", "method": "m", "timeout": 5}))
        self.assertEqual(self.dispatcher.calls, [("x", "m", None, 5.0)] * 3)
        for i in (2, 0, 1):
            self.dispatcher.pending[i].callback(Reply(b"%d" % i, None))
        self.assertEqual([(each["id"], each["result"]) for each in self.backend.messages()], [(2, 2), (0, 0), (1, 1)])

    def test_an_unexpected_failure(self):
        self.dispatcher.results.append(ZeroDivisionError("secret"))
        response = self.request("client.call", {"client": "x", "method": "m"})
        self.assert_error(response, -32603, None, True)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_as_a_notification(self):
        self.dispatcher.results.append(Reply(b"1", None))
        self.backend.send_message(notification("client.call", {"client": "x", "method": "m"}))
        self.backend.send_message(notification("client.call", {"client": "x", "method": "m"}))
        self.dispatcher.pending[0].errback(rpc_error(ErrorKind.TIMEOUT))
        self.assertEqual((self.backend.messages(), len(self.dispatcher.calls)), ([], 2))

    def test_more_at_once_than_the_node_may_have(self):
        endpoint = EndpointHarness(max_calls=2)
        backend = BackendWebSocket(endpoint)
        for i in range(3):
            backend.send_message(call(i, "client.call", {"client": "x", "method": "m"}))
        (response,) = backend.messages()
        self.assertEqual((response["id"], response["error"]["code"]), (2, -32005))
        endpoint.dispatcher.pending[0].callback(Reply(b"1", None))
        backend.send_message(call(3, "client.call", {"client": "x", "method": "m"}))
        self.assertEqual(len(endpoint.dispatcher.calls), 3)

    def test_gone(self):
        for i in range(2):
            self.backend.send_message(call(i, "client.call", {"client": "x", "method": "m"}))
        self.backend.disconnect()
        self.assertEqual(self.dispatcher.cancel_count, 2)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_closed_by_itself(self):
        self.backend.send_message(call(1, "client.call", {"client": "x", "method": "m"}))
        self.backend.send(frame(b"\x03\xe8", opcode=8))
        self.assertEqual(self.dispatcher.cancel_count, 1)
        self.assertEqual(self.backend.close_code(), 1000)


class ResponseTests(BackendTestCase):
    def test_broken_responses(self):
        self.backend.send_message(notification("upstream.serve"))
        for broken in (b'{"jsonrpc":"2.0","id":"%b","result":', b'{"jsonrpc":"2.0","id":"%b","result":1,"error":2}'):
            answer = self.endpoint.upstream.call("x", "m", None)
            (asked,) = self.backend.messages()
            self.backend.send_message(broken % asked["id"].encode())
            self.assertEqual(self.failureResultOf(answer).value.kind, ErrorKind.CONNECTION_LOST)
            self.backend.messages()

    def test_a_broken_response_in_a_batch(self):
        self.backend.send_message(notification("upstream.serve"))
        answer = self.endpoint.upstream.call("x", "m", None)
        (asked,) = self.backend.messages()
        self.backend.send_message([{"jsonrpc": "2.0", "id": asked["id"]}])
        self.assertEqual(self.failureResultOf(answer).value.kind, ErrorKind.CONNECTION_LOST)

    def test_responses_to_nothing(self):
        self.backend.send_message({"jsonrpc": "2.0", "id": 1, "result": 1})
        self.backend.send_message({"jsonrpc": "2.0", "id": None, "error": {"code": 1, "message": ""}})
        self.assertEqual((self.backend.messages(), self.metrics.late_responses), ([], 2))


class BatchTests(BackendTestCase):
    def test_one_array_when_all_are_done(self):
        one = {"client": "x", "method": "m"}
        self.backend.send_message(
            [
                call(1, "client.call", one),
                notification("client.notify", one),
                7,
                call(2, "client.call", one),
                call(3, "nothing"),
                {"jsonrpc": "2.0", "id": 4, "result": 1},
            ]
        )
        self.dispatcher.pending[1].callback(Reply(b"2", None))
        self.assertEqual(self.backend.messages(), [])
        self.dispatcher.pending[0].errback(rpc_error(ErrorKind.TIMEOUT))
        ((first, invalid, second, unknown),) = self.backend.messages()
        self.assertEqual((first["id"], first["error"]["code"]), (1, -32002))
        self.assertEqual((invalid["id"], invalid["error"]["code"]), (None, -32600))
        self.assertEqual((second["id"], second["result"]), (2, 2))
        self.assertEqual((unknown["id"], unknown["error"]["code"]), (3, -32601))

    def test_all_done_at_once(self):
        self.dispatcher.results.append(Reply(b"1", None))
        self.backend.send_message([call(1, "client.call", {"client": "x", "method": "m"}), call(2, "upstream.serve")])
        self.assertEqual([each["id"] for each in self.backend.messages()[0]], [1, 2])

    def test_notifications_alone(self):
        self.backend.send_message([notification("client.notify", {"client": "x", "method": "m"})] * 2)
        self.assertEqual((self.backend.messages(), len(self.dispatcher.notifications)), ([], 2))

    def test_gone(self):
        self.backend.send_message([call(i, "client.call", {"client": "x", "method": "m"}) for i in range(2)])
        self.backend.disconnect()
        self.assertEqual(self.dispatcher.cancel_count, 2)
        self.assertEqual(self.flushLoggedErrors(), [])


class BadInputTests(BackendTestCase):
    def test_standard_errors(self):
        for payload, id, code in (
            (b"{", None, -32700),
            (b"", None, -32700),
            (b'"\\ud800"', None, -32700),
            (b"[" * 600 + b"]" * 600, None, -32700),
            (b"[]", None, -32600),
            (b"1", None, -32600),
            (b'{"jsonrpc":"2.0","id":4}', 4, -32600),
        ):
            self.backend.send_message(payload)
            (response,) = self.backend.messages()
            self.assertEqual(response["id"], id)
            self.assert_error(response, code)
        self.assertEqual(self.metrics.bad_messages["backend"], 7)

    def test_eight_in_a_row(self):
        for _ in range(7):
            self.backend.send_message(b"{")
        self.backend.send_message(notification("upstream.serve"))
        for _ in range(7):
            self.backend.send_message(b"{")
        self.backend.messages()
        self.backend.send_message(b"{")
        self.assertEqual(self.backend.close_code(), 1008)
        self.backend.send_message(call(1, "client.call", {"client": "x", "method": "m"}))
        self.assertEqual(self.dispatcher.calls, [])

    def test_eight_in_a_batch(self):
        self.backend.send_message([7] * 8 + [call(1, "client.call", {"client": "x", "method": "m"})])
        self.assertEqual(self.backend.close_code(), 1008)
        self.assertEqual(self.dispatcher.calls, [])

    def test_binary(self):
        self.backend.send(frame(b"x", opcode=2))
        self.assertEqual(self.backend.close_code(), 1003)

    def test_not_utf8(self):
        self.backend.send(frame(b'"\xff"'))
        self.assertEqual(self.backend.close_code(), 1007)

    def test_the_largest_message(self):
        self.backend.send_message(b'{"jsonrpc":"2.0","id":1,"method":"x"}'.ljust(65536 + MAX_ENVELOPE_SIZE))
        self.assertEqual(len(self.backend.messages()), 1)
        self.backend.send_message(b"x" * (65536 + MAX_ENVELOPE_SIZE + 1))
        self.assertEqual(self.backend.close_code(), 1009)

    def test_pings_are_answered(self):
        self.backend.send(frame(b"hi", opcode=9))
        self.assertEqual(self.backend.frames(), [(10, b"hi")])

    @given(st.binary(max_size=40) | st.recursive(st.none() | st.text(max_size=5), st.lists).map(msgspec.json.encode))
    @settings(max_examples=150, deadline=None)
    def test_any_text(self, payload):
        backend = BackendWebSocket(EndpointHarness())
        backend.send_message(payload)
        ((opcode, answer),) = backend.frames()
        if opcode == 8:
            # Bad UTF-8, or a batch of many bad messages.
            self.assertIn(int.from_bytes(answer[:2], "big"), (1007, 1008))
        else:
            self.assertIn(b'"error"', answer)
