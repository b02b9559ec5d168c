"""The WebSocket of backends."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import TestCase
from zope.interface.verify import verifyObject

from gateway.api.responses import ENVELOPE
from gateway.api.upstream import IBackend
from gateway.protocol.errors import Kind
from gateway.rpc.pending import Reply
from tests.api.case import BackendTestCase, call, note
from tests.api.fakes import UPGRADE, Backend, Endpoint, frame, request, rpc_error


class OpeningTests(TestCase):
    def test_open(self):
        endpoint = Endpoint()
        backend = Backend(endpoint)
        self.assertNotIn(b"Sec-WebSocket-Protocol", backend.opening)
        self.assertTrue(verifyObject(IBackend, backend.protocol._inner))
        self.assertEqual(endpoint.metrics.api_requests, {"101": 1})

    def test_subprotocol(self):
        backend = Backend(Endpoint(), [("Sec-WebSocket-Protocol", "chat, wsgateway.jsonrpc.v1")])
        self.assertIn(b"Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1\r\n", backend.opening)
        self.assertNotIn(b"Sec-WebSocket-Protocol", Backend(Endpoint(), [("Sec-WebSocket-Protocol", "chat")]).opening)

    def test_no_handshake(self):
        endpoint = Endpoint()
        connection = endpoint.connect()
        connection.send(request("GET", "/v1/backend", headers=UPGRADE[:1]))
        (response,) = connection.responses()
        self.assertEqual((response.status, response.json["error"]), (400, "upgrade"))
        self.assertEqual(endpoint.metrics.api_requests, {"400": 1})


class CallTests(BackendTestCase):
    def test_as_they_come(self):
        for i in range(3):
            self.backend.tell(call(i, "client.call", {"client": "x", "method": "m", "timeout": 5}))
        self.assertEqual(self.hub.calls, [("x", "m", None, 5.0)] * 3)
        for i in (2, 0, 1):
            self.hub.waiting[i].callback(Reply(b"%d" % i, None))
        self.assertEqual([(each["id"], each["result"]) for each in self.backend.heard()], [(2, 2), (0, 0), (1, 1)])

    def test_an_unexpected_failure(self):
        self.hub.answers.append(ZeroDivisionError("secret"))
        response = self.asked("client.call", {"client": "x", "method": "m"})
        self.error(response, -32603, None, True)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_as_a_notification(self):
        self.hub.answers.append(Reply(b"1", None))
        self.backend.tell(note("client.call", {"client": "x", "method": "m"}))
        self.backend.tell(note("client.call", {"client": "x", "method": "m"}))
        self.hub.waiting[0].errback(rpc_error(Kind.TIMEOUT))
        self.assertEqual((self.backend.heard(), len(self.hub.calls)), ([], 2))

    def test_more_at_once_than_the_node_may_have(self):
        endpoint = Endpoint(max_calls=2)
        backend = Backend(endpoint)
        for i in range(3):
            backend.tell(call(i, "client.call", {"client": "x", "method": "m"}))
        (response,) = backend.heard()
        self.assertEqual((response["id"], response["error"]["code"]), (2, -32005))
        endpoint.hub.waiting[0].callback(Reply(b"1", None))
        backend.tell(call(3, "client.call", {"client": "x", "method": "m"}))
        self.assertEqual(len(endpoint.hub.calls), 3)

    def test_gone(self):
        for i in range(2):
            self.backend.tell(call(i, "client.call", {"client": "x", "method": "m"}))
        self.backend.lose()
        self.assertEqual(self.hub.cancelled, 2)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_closed_by_itself(self):
        self.backend.tell(call(1, "client.call", {"client": "x", "method": "m"}))
        self.backend.send(frame(b"\x03\xe8", opcode=8))
        self.assertEqual(self.hub.cancelled, 1)
        self.assertEqual(self.backend.close_code(), 1000)


class ResponseTests(BackendTestCase):
    def test_broken_responses(self):
        self.backend.tell(note("upstream.serve"))
        for broken in (b'{"jsonrpc":"2.0","id":"%b","result":', b'{"jsonrpc":"2.0","id":"%b","result":1,"error":2}'):
            answer = self.endpoint.upstream.call("x", "m", None)
            (asked,) = self.backend.heard()
            self.backend.tell(broken % asked["id"].encode())
            self.assertEqual(self.failureResultOf(answer).value.kind, Kind.CONNECTION_LOST)
            self.backend.heard()

    def test_a_broken_response_in_a_batch(self):
        self.backend.tell(note("upstream.serve"))
        answer = self.endpoint.upstream.call("x", "m", None)
        (asked,) = self.backend.heard()
        self.backend.tell([{"jsonrpc": "2.0", "id": asked["id"]}])
        self.assertEqual(self.failureResultOf(answer).value.kind, Kind.CONNECTION_LOST)

    def test_responses_to_nothing(self):
        self.backend.tell({"jsonrpc": "2.0", "id": 1, "result": 1})
        self.backend.tell({"jsonrpc": "2.0", "id": None, "error": {"code": 1, "message": ""}})
        self.assertEqual((self.backend.heard(), self.metrics.late_responses), ([], 2))


class BatchTests(BackendTestCase):
    def test_one_array_when_all_are_done(self):
        one = {"client": "x", "method": "m"}
        self.backend.tell(
            [
                call(1, "client.call", one),
                note("client.notify", one),
                7,
                call(2, "client.call", one),
                call(3, "nothing"),
                {"jsonrpc": "2.0", "id": 4, "result": 1},
            ]
        )
        self.hub.waiting[1].callback(Reply(b"2", None))
        self.assertEqual(self.backend.heard(), [])
        self.hub.waiting[0].errback(rpc_error(Kind.TIMEOUT))
        ((first, invalid, second, unknown),) = self.backend.heard()
        self.assertEqual((first["id"], first["error"]["code"]), (1, -32002))
        self.assertEqual((invalid["id"], invalid["error"]["code"]), (None, -32600))
        self.assertEqual((second["id"], second["result"]), (2, 2))
        self.assertEqual((unknown["id"], unknown["error"]["code"]), (3, -32601))

    def test_all_done_at_once(self):
        self.hub.answers.append(Reply(b"1", None))
        self.backend.tell([call(1, "client.call", {"client": "x", "method": "m"}), call(2, "upstream.serve")])
        self.assertEqual([each["id"] for each in self.backend.heard()[0]], [1, 2])

    def test_notifications_alone(self):
        self.backend.tell([note("client.notify", {"client": "x", "method": "m"})] * 2)
        self.assertEqual((self.backend.heard(), len(self.hub.notifications)), ([], 2))

    def test_gone(self):
        self.backend.tell([call(i, "client.call", {"client": "x", "method": "m"}) for i in range(2)])
        self.backend.lose()
        self.assertEqual(self.hub.cancelled, 2)
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
            self.backend.tell(payload)
            (response,) = self.backend.heard()
            self.assertEqual(response["id"], id)
            self.error(response, code)
        self.assertEqual(self.metrics.bad_messages["backend"], 7)

    def test_eight_in_a_row(self):
        for _ in range(7):
            self.backend.tell(b"{")
        self.backend.tell(note("upstream.serve"))
        for _ in range(7):
            self.backend.tell(b"{")
        self.backend.heard()
        self.backend.tell(b"{")
        self.assertEqual(self.backend.close_code(), 1008)
        self.backend.tell(call(1, "client.call", {"client": "x", "method": "m"}))
        self.assertEqual(self.hub.calls, [])

    def test_eight_in_a_batch(self):
        self.backend.tell([7] * 8 + [call(1, "client.call", {"client": "x", "method": "m"})])
        self.assertEqual(self.backend.close_code(), 1008)
        self.assertEqual(self.hub.calls, [])

    def test_binary(self):
        self.backend.send(frame(b"x", opcode=2))
        self.assertEqual(self.backend.close_code(), 1003)

    def test_not_utf8(self):
        self.backend.send(frame(b'"\xff"'))
        self.assertEqual(self.backend.close_code(), 1007)

    def test_the_largest_message(self):
        self.backend.tell(b'{"jsonrpc":"2.0","id":1,"method":"x"}'.ljust(65536 + ENVELOPE))
        self.assertEqual(len(self.backend.heard()), 1)
        self.backend.tell(b"x" * (65536 + ENVELOPE + 1))
        self.assertEqual(self.backend.close_code(), 1009)

    def test_pings_are_answered(self):
        self.backend.send(frame(b"hi", opcode=9))
        self.assertEqual(self.backend.frames(), [(10, b"hi")])

    @given(st.binary(max_size=40) | st.recursive(st.none() | st.text(max_size=5), st.lists).map(msgspec.json.encode))
    @settings(max_examples=150, deadline=None)
    def test_any_text(self, payload):
        backend = Backend(Endpoint())
        backend.tell(payload)
        ((opcode, answer),) = backend.frames()
        if opcode == 8:
            # Bad UTF-8, or a batch of many bad messages.
            self.assertIn(int.from_bytes(answer[:2], "big"), (1007, 1008))
        else:
            self.assertIn(b'"error"', answer)
