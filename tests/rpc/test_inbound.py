"""Tests for :mod:`gateway.rpc.inbound`, through the dispatcher."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.rpc.inbound import encode_response
from gateway.rpc.pending import Reply
from tests.builders.dispatcher import MAX_MESSAGE_SIZE, DispatcherTestCase, result


def request(id: Any, method: str = "policy.get", **members: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, **members}


def notification(method: str, **members: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, **members}


def error(id: Any, code: int, message: str, *, sent: bool = False, client: str = "x", **more: str) -> dict[str, Any]:
    """Return the response with an error of the gateway itself."""
    body = {"code": code, "message": message, "data": {"client": client, "sent": sent, **more}}
    return {"jsonrpc": "2.0", "id": id, "error": body, "gateway": True}


class InboundTestCase(DispatcherTestCase):
    def make(self) -> None:
        super().make()
        self.connect("x")


class ConnectionEventTests(InboundTestCase):
    def test_upstream_is_notified(self) -> None:
        self.disconnect("x")
        self.connect("x", 2)
        self.assertEqual(self.upstream.events, [("connected", "x", 1), ("disconnected", "x", 1), ("connected", "x", 2)])

    def test_upstream_raises(self) -> None:
        """It is logged, and calls to the client that disconnects fail nevertheless."""
        _, call = self.start_call("x")

        def broken(*args: object) -> None:
            raise ZeroDivisionError

        self.upstream.connected = self.upstream.disconnected = self.upstream.message = broken  # type: ignore
        self.connect("y")
        self.assertTrue(self.receive("x", notification("m")))
        self.disconnect("x")
        self.assertEqual(self.error_of(call).kind, ErrorKind.CONNECTION_LOST)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 3)


class NotificationTests(InboundTestCase):
    def test_notification(self) -> None:
        self.assertTrue(self.receive("x", b'{"jsonrpc":"2.0","method":"job.done","params":{ "job" : 9.0 }}'))
        self.assertTrue(self.receive("x", notification("gateways")))
        self.assertEqual(
            self.upstream.events[1:],
            [("message", "x", "job.done", b'{ "job" : 9.0 }'), ("message", "x", "gateways", None)],
        )
        self.assertEqual(self.metrics.notifications, {"from_client": 2})
        self.assertEqual(self.sessions.sent, [])

    def test_gateway_methods_are_ignored(self) -> None:
        self.assertTrue(self.receive("x", notification("gateway.token")))
        self.assertEqual(self.upstream.events[1:], [])
        self.assertEqual(self.metrics.notifications, {"ignored": 1})
        self.assertEqual(self.sessions.sent, [])


class RequestTests(InboundTestCase):
    def test_result(self) -> None:
        """It is sent with the client's own id, whatever that is, unchanged."""
        for id in (b"1", b'"x"', b"null", b"1.50", b'"\\u0041"', b"-0", b"1" * 40):
            payload = b'{"jsonrpc":"2.0","id":%b,"method":"policy.get","params":[ 1.0 ]}' % id
            self.assertTrue(self.receive("x", payload))
            client_id, method, params, call = self.upstream.calls.pop()
            self.assertEqual((client_id, method, params), ("x", "policy.get", b"[ 1.0 ]"))
            call.callback(Reply(b'{ "a" : 1e0 }', None))
            self.assertEqual(
                self.sessions.sent.pop(), ("x", 1, b'{"jsonrpc":"2.0","id":%b,"result":{ "a" : 1e0 }}' % id)
            )
        self.assertEqual(self.metrics.upstream_calls, {"answered": 7})
        self.assert_nothing_left()

    def test_error_of_the_backend(self) -> None:
        self.receive("x", request(1))
        self.upstream.calls[0][3].callback(Reply(None, b'{"code":5 ,"message":"no"}'))
        self.assertEqual(self.sessions.sent, [("x", 1, b'{"jsonrpc":"2.0","id":1,"error":{"code":5 ,"message":"no"}}')])

    def test_error_of_the_backend_that_looks_like_the_gateways(self) -> None:
        forged = RpcError(ErrorKind.METHOD_NOT_FOUND, "x").to_json()
        self.receive("x", request(1))
        self.receive("x", [request(1)])
        for call in self.upstream.calls:
            call[3].callback(Reply(None, forged))
        response = b'{"jsonrpc":"2.0","id":1,"error":%b}' % forged
        self.assertEqual([sent for *_, sent in self.sessions.sent], [response, b"[%b]" % response])

    def test_error_of_the_gateway(self) -> None:
        for kind, code, sent in (
            (ErrorKind.METHOD_NOT_FOUND, -32601, False),
            (ErrorKind.CONNECTION_LOST, -32003, True),
            (ErrorKind.TIMEOUT, -32002, True),
        ):
            self.receive("x", request(1))
            self.upstream.calls.pop()[3].errback(RpcError(kind, "x"))
            self.assertEqual(self.sent("x"), [error(1, code, kind.value.message, sent=sent)])
        self.assertEqual(self.metrics.upstream_calls, {"-32601": 1, "-32003": 1, "-32002": 1})
        self.assert_nothing_left()

    def test_upstream_raises(self) -> None:
        self.receive("x", request(1))
        self.upstream.calls.pop()[3].errback(ZeroDivisionError())

        def broken(*args: object) -> Deferred[Reply]:
            raise ZeroDivisionError

        self.upstream.call = broken  # type: ignore[method-assign]
        self.assertTrue(self.receive("x", request(2)))
        self.assertEqual([response["error"]["code"] for response in self.sent("x")], [-32003, -32003])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)
        self.assert_nothing_left()

    def test_responses_in_any_order(self) -> None:
        for id in (1, 2, 1):
            self.receive("x", request(id))
        for n in (2, 0, 1):
            self.upstream.calls[n][3].callback(Reply(b"%d" % n, None))
        self.assertEqual(
            [(response["id"], response["result"]) for response in self.sent("x")], [(1, 2), (1, 0), (2, 1)]
        )

    def test_gateway_methods(self) -> None:
        self.assertTrue(self.receive("x", request(1, "gateway.goaway")))
        self.assertEqual(self.sent("x"), [error(1, -32601, "method not found")])
        self.assertEqual(self.upstream.calls, [])

    def test_too_many(self) -> None:
        """The limit applies to each connection; a response makes room."""
        self.connect("y")
        for id in range(5):
            self.assertTrue(self.receive("x", request(id)))
        self.receive("y", request(0))
        self.assertEqual(len(self.upstream.calls), 5)
        (refusal,) = self.sent("x")
        detail = refusal["error"]["data"].pop("detail")
        self.assertEqual(refusal, error(4, -32005, "too many calls in flight"))
        self.assertIn("--max-calls-per-client 4", detail)
        self.upstream.calls[0][3].callback(Reply(b"1", None))
        self.receive("x", request(6))
        self.assertEqual(len(self.upstream.calls), 6)
        self.assertEqual(self.dispatcher.calls_in_flight(), 5)

    def test_too_large(self) -> None:
        """The backend has received the request: hence ``sent``."""
        room = MAX_MESSAGE_SIZE - len(b'{"jsonrpc":"2.0","id":1,"result":""}')
        for length in (room, room + 1):
            self.receive("x", request(1))
            self.upstream.calls.pop()[3].callback(Reply(b'"%b"' % (b"x" * length), None))
        fits, too_large = self.sent("x")
        self.assertEqual(len(fits["result"]), room)
        self.assertEqual(too_large, error(1, -32006, "message too large", sent=True, detail="response too large"))

    def test_id_that_leaves_no_room(self) -> None:
        response = encode_response("x", b'"%b"' % (b"i" * 1000), Reply(b"1" * 100, None), MAX_MESSAGE_SIZE)
        self.assertEqual(
            json.loads(response), error(None, -32006, "message too large", sent=True, detail="response too large")
        )
        response = encode_response("x", b"1" * 1000, RpcError(ErrorKind.METHOD_NOT_FOUND, "x"), MAX_MESSAGE_SIZE)
        self.assertEqual(json.loads(response), error(None, -32601, "method not found"))

    def test_disconnect(self) -> None:
        """Its calls are cancelled, and not answered on its next connection."""
        self.connect("y")
        self.receive("x", request(1))
        self.receive("x", [request(2), request(3)])
        self.receive("y", request(1))
        self.disconnect("x")
        self.connect("x", 2)
        self.assertEqual(self.upstream.cancelled, 3)
        self.assertEqual(self.metrics.upstream_calls, {"cancelled": 3})
        self.assertEqual(self.sessions.sent, [])
        self.upstream.calls[3][3].callback(Reply(b"1", None))
        self.assertEqual(self.sent("y"), [result(1)])
        self.assert_nothing_left()

    def test_response_goes_only_to_the_calling_connection(self) -> None:
        self.receive("x", request(1))
        self.sessions.generations["x"] = 2
        self.upstream.calls[0][3].callback(Reply(b"1", None))
        self.assertEqual(self.sessions.sent, [])


class InvalidTests(InboundTestCase):
    def test_not_json(self) -> None:
        for payload in (b"", b"nope", b'{"jsonrpc":"2.0","id":1,"method":"m",}', b"\xff", b"[" * 600):
            self.assertFalse(self.receive("x", payload))
            (answer,) = self.sent("x")
            self.assertEqual((answer["id"], answer["error"]["code"]), (None, -32700))
            self.assertTrue(answer["error"]["data"].pop("detail"))
            self.assertEqual(answer["error"]["data"], {"client": "x", "sent": False})
        self.assertEqual(self.metrics.bad_messages, {"client": 5})

    def test_ids_that_cannot_be_parsed(self) -> None:
        for id in (b"1e999", b"-1e5000", b"9" * 5000):
            self.assertFalse(self.receive("x", b'{"jsonrpc":"2.0","id":%b}' % id))
            self.assertFalse(self.receive("x", b'{"jsonrpc":"2.0","id":%b,"result":1,"error":2}' % id))
            valid = b'{"jsonrpc":"2.0","method":"done"}'
            self.assertEqual(self.receive("x", b'[%b,{"jsonrpc":"2.0","id":%b}]' % (valid, id)), -2)
        self.assertEqual(sum(event[0] == "message" for event in self.upstream.events), 3)
        self.assertEqual(self.metrics.bad_messages, {"client": 9})

    def test_not_json_rpc(self) -> None:
        for message, id in (
            ([], None),
            (5, None),
            ({}, None),
            ({"jsonrpc": "2.0", "id": 7}, 7),
            (request("a", params=None), "a"),
            ({"jsonrpc": "2.0", "id": True, "method": "m"}, None),
        ):
            self.assertFalse(self.receive("x", message), message)
            (answer,) = self.sent("x")
            self.assertEqual((answer["id"], answer["error"]["code"]), (id, -32600))
        self.assertEqual(self.upstream.calls, [])


class BatchTests(InboundTestCase):
    """JSON-RPC 2.0, section 6."""

    def test_batch(self) -> None:
        uuid, call = self.start_call("x")
        batch = [request(1), notification("n"), result(uuid), request("b"), result("unknown")]
        self.assertTrue(self.receive("x", batch))
        self.successResultOf(call)
        self.assertEqual(self.upstream.events[1:], [("message", "x", "n", None)])
        self.assertEqual(self.metrics.late_responses, 1)
        self.upstream.calls[1][3].callback(Reply(b"2", None))
        self.assertEqual(self.sessions.sent, [])
        self.upstream.calls[0][3].errback(RpcError(ErrorKind.METHOD_NOT_FOUND, "x"))
        self.assertEqual(self.sent("x"), [[result("b", 2), error(1, -32601, "method not found")]])
        self.assert_nothing_left()

    def test_nothing_to_respond(self) -> None:
        self.assertEqual(self.receive("x", [notification("a"), result("unknown"), notification("gateway.b")]), 3)
        self.assertEqual(self.sessions.sent, [])

    def test_invalid_elements(self) -> None:
        self.assertEqual(self.receive("x", [1, request(2, "gateway.x"), {"id": 3}]), -3)
        (answers,) = self.sent("x")
        self.assertEqual(
            [(answer["id"], answer["error"]["code"]) for answer in answers],
            [(None, -32600), (2, -32601), (3, -32600)],
        )
        self.assertEqual(self.metrics.bad_messages, {"client": 1})

    def test_too_many(self) -> None:
        self.receive("x", [request(id) for id in range(6)])
        for _, _, _, call in self.upstream.calls:
            call.callback(Reply(b"1", None))
        (answers,) = self.sent("x")
        self.assertEqual([answer["id"] for answer in answers if "error" in answer], [4, 5])
        self.assertEqual([answer["id"] for answer in answers if "result" in answer], [0, 1, 2, 3])

    def test_too_large(self) -> None:
        """Responses that do not fit any more become errors; the array never exceeds the message limit."""
        self.receive("x", [request(id) for id in range(3)])
        for length, (_, _, _, call) in zip((500, 500, 100), self.upstream.calls, strict=True):
            call.callback(Reply(b'"%b"' % (b"x" * length), None))
        self.assertLessEqual(len(self.sessions.sent[0][2]), MAX_MESSAGE_SIZE)
        (answers,) = self.sent("x")
        self.assertEqual(len(answers[0]["result"]), 500)
        self.assertEqual(answers[1], error(1, -32006, "message too large", sent=True, detail="response too large"))
        self.assertEqual(len(answers[2]["result"]), 100)

    def test_limit_to_the_byte(self) -> None:
        around = len(b'[{"jsonrpc":"2.0","id":0,"result":1},{"jsonrpc":"2.0","id":1,"result":""}]')
        for more in (0, 1):
            self.receive("x", [request(0), request(1)])
            self.upstream.calls.pop(0)[3].callback(Reply(b"1", None))
            long = b'"%b"' % (b"x" * (MAX_MESSAGE_SIZE - around + more))
            self.upstream.calls.pop(0)[3].callback(Reply(long, None))
        self.assertEqual(len(self.sessions.sent[0][2]), MAX_MESSAGE_SIZE)
        fits, too_large = self.sent("x")
        self.assertIn("result", fits[1])
        self.assertEqual(too_large[1], error(1, -32006, "message too large", sent=True, detail="response too large"))

    def test_errors_too_large(self) -> None:
        self.assertEqual(self.receive("x", [1] * 50), -50)
        self.assertEqual(
            self.sent("x"), [error(None, -32006, "message too large", sent=True, detail="responses too large")]
        )


class ChargeTests(InboundTestCase):
    """The number of messages to charge"""

    def test_responses(self) -> None:
        self.connect("y")
        uuid, call = self.start_call("x")
        other, _ = self.start_call("y")
        # To no call, to that of another client, to one in flight, and late.
        received = [self.receive("x", result(id)) for id in ("5f0c", other, uuid, uuid)]
        self.assertEqual(received, [1, 1, None, 1])
        self.successResultOf(call)

    def test_large_responses(self) -> None:
        uuid, _ = self.start_call("x")
        payload = b'{"jsonrpc":"2.0","id":"%b","result":"%b"}' % (uuid.encode(), b"x" * 50000)
        self.assertIsNone(self.receive("x", payload))
        self.assertIsNotNone(self.receive("x", payload))

    def test_batch(self) -> None:
        uuids = [self.start_call("x")[0] for _ in range(2)]
        responses = [result(uuid) for uuid in uuids]
        late = result("5f0c")
        event = notification("m")
        self.assertEqual(self.receive("x", [responses[0], late, event, event]), 3)
        self.assertIsNone(self.receive("x", [responses[1]]))
        self.assertEqual(self.receive("x", [responses[1]]), 1)


class AnythingTests(InboundTestCase):
    """Whatever a client sends, nothing is raised, and no call of another client is affected."""

    @settings(deadline=None, max_examples=200)
    @given(st.data())
    def test_anything(self, data: st.DataObject) -> None:
        self.make()
        self.connect("y")
        uuid, call = self.start_call("y")
        own_uuid, own = self.start_call("x")
        own.addErrback(lambda _: None)
        members = st.fixed_dictionaries(
            {},
            optional={
                "jsonrpc": st.sampled_from(["2.0", "1.0", 2]),
                "id": st.sampled_from([uuid, own_uuid, 1, None, True, [uuid]]),
                "method": st.sampled_from(["m", "gateway.x", 5, None]),
                "params": st.sampled_from([[], {"id": uuid}, None, 1]),
                "result": st.sampled_from([uuid, None, {"id": uuid}]),
                "error": st.sampled_from([{"code": 1, "message": "m"}, {"id": uuid}, None]),
            },
        )
        message = st.one_of(members, st.lists(members | st.integers(), max_size=4)).map(json.dumps).map(str.encode)
        cut = st.tuples(message, st.integers(0, 60)).map(lambda t: t[0][: -t[1]] + b"\xff"[: t[1] % 2])
        for payload in data.draw(st.lists(message | cut | st.binary(max_size=30), max_size=6)):
            self.assertIsInstance(self.receive("x", payload), (int, type(None)))
        for _, _, payload in self.sessions.sent:
            json.loads(payload)
            self.assertLessEqual(len(payload), MAX_MESSAGE_SIZE)
        self.assertNoResult(call)
        self.disconnect("x")
        self.assertNoResult(call)
        self.assertIsNone(self.receive("y", result(uuid)))
        self.successResultOf(call)
        self.assert_nothing_left()
