"""Tests of gateway.agent.session."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.agent.errors import AgentError, CallTimedOut, ConnectionLost, RpcFailed
from gateway.agent.session import MAX_RUNNING_HANDLERS, RPCSession, encode_params


class RPCSessionTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.sent: list[bytes] = []
        self.notifications: list[tuple[str, Any]] = []
        self.methods: dict[str, Any] = {}
        self.accepts = True
        self.session = RPCSession(
            self.clock,
            self._send,
            handler_for=self.methods.get,
            on_notification=self._on_notification,
            max_message_size=1000,
        )

    def _send(self, payload: bytes) -> bool:
        if self.accepts:
            self.sent.append(payload)
        return self.accepts

    def _on_notification(self, method: str, params: Any) -> Any:
        self.notifications.append((method, params))
        handler = self.methods.get(method)
        return None if handler is None else handler(params)

    def receive(self, payload: bytes) -> list[bytes]:
        """Receive a message; return the messages sent in response."""
        self.sent.clear()
        self.session.message_received(payload)
        return list(self.sent)


class HandlerTests(RPCSessionTestCase):
    def call(self, handler: Any, params: bytes = b"") -> bytes:
        self.methods["m"] = handler
        (answer,) = self.receive(b'{"jsonrpc":"2.0","id":7,"method":"m"%b}' % params)
        return answer

    def test_value(self) -> None:
        self.assertEqual(self.call(lambda params: {"free": 12}), b'{"jsonrpc":"2.0","id":7,"result":{"free":12}}')

    def test_decoded_params(self) -> None:
        for params, decoded in [
            (b"", None),
            (b',"params":[]', []),
            (b',"params":[1,"a"]', [1, "a"]),
            (b',"params":{"path":"/"}', {"path": "/"}),
        ]:
            got: list[Any] = []
            self.call(got.append, params)
            self.assertEqual(got, [decoded])

    def test_deferred(self) -> None:
        waiting: Deferred[Any] = Deferred()
        self.methods["m"] = lambda params: waiting
        self.assertEqual(self.receive(b'{"jsonrpc":"2.0","id":"a","method":"m"}'), [])
        waiting.callback(None)
        self.assertEqual(self.sent, [b'{"jsonrpc":"2.0","id":"a","result":null}'])

    def test_coroutine(self) -> None:
        async def handler(params: Any) -> Any:
            return [await succeed(params)]

        self.assertEqual(self.call(handler, b',"params":[1]'), b'{"jsonrpc":"2.0","id":7,"result":[[1]]}')

    def test_id_is_returned_unchanged(self) -> None:
        self.methods["m"] = lambda params: 1
        for id in [b"123456789012345678901234567890", b"1.50", rb'"\u00e9/\/"', b"null", b"-0"]:
            self.assertEqual(
                self.receive(b'{"jsonrpc":"2.0","id":%b,"method":"m"}' % id),
                [b'{"jsonrpc":"2.0","id":%b,"result":1}' % id],
            )

    def test_duplicate_id(self) -> None:
        waiting: list[Deferred[int]] = []

        def handler(params: Any) -> Deferred[int]:
            waiting.append(Deferred())
            return waiting[-1]

        self.methods["m"] = handler
        self.receive(b'{"jsonrpc":"2.0","id":1,"method":"m"}')
        self.receive(b'{"jsonrpc":"2.0","id":1,"method":"m"}')
        waiting[1].callback(2)
        waiting[0].callback(1)
        self.assertEqual(self.sent, [b'{"jsonrpc":"2.0","id":1,"result":%d}' % n for n in (2, 1)])

    def test_agent_error(self) -> None:
        def handler(params: Any) -> None:
            raise AgentError(-32602, "no path", {"got": params})

        self.assertEqual(
            self.call(handler),
            b'{"jsonrpc":"2.0","id":7,"error":{"code":-32602,"message":"no path","data":{"got":null}}}',
        )

    def test_agent_error_without_data(self) -> None:
        async def handler(params: Any) -> None:
            raise AgentError(5, "five")

        self.assertEqual(self.call(handler), b'{"jsonrpc":"2.0","id":7,"error":{"code":5,"message":"five"}}')

    INTERNAL = b'{"jsonrpc":"2.0","id":7,"error":{"code":-32603,"message":"internal error"}}'

    def test_other_exceptions_are_logged_and_not_sent(self) -> None:
        def handler(params: Any) -> None:
            raise KeyError("secret")

        self.assertEqual(self.call(handler), self.INTERNAL)
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)

    def test_result_cannot_be_encoded(self) -> None:
        for result in [object(), "\ud800", {(1, 2): 3, 4: object()}]:
            self.assertEqual(self.call(lambda params, result=result: result), self.INTERNAL)
            self.assertEqual(len(self.flushLoggedErrors()), 1)

    def test_error_data_cannot_be_encoded(self) -> None:
        def handler(params: Any) -> None:
            raise AgentError(5, "five", object())

        self.assertEqual(self.call(handler), self.INTERNAL)
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)

    def test_unknown_method(self) -> None:
        self.assertEqual(
            self.receive(b'{"jsonrpc":"2.0","id":7,"method":"x"}'),
            [b'{"jsonrpc":"2.0","id":7,"error":{"code":-32601,"message":"method not found"}}'],
        )

    def test_response_too_large(self) -> None:
        answer = msgspec.json.decode(self.call(lambda params: "x" * 1000))
        self.assertEqual((answer["id"], answer["error"]["code"]), (7, -32006))

    def test_running_handlers_are_limited(self) -> None:
        waiting: list[Deferred[int]] = []

        def handler(params: Any) -> Deferred[int]:
            waiting.append(Deferred())
            return waiting[-1]

        self.methods["m"] = handler
        for _ in range(MAX_RUNNING_HANDLERS):
            self.assertEqual(self.receive(b'{"jsonrpc":"2.0","id":7,"method":"m"}'), [])
        (answer,) = self.receive(b'{"jsonrpc":"2.0","id":7,"method":"m"}')
        self.assertEqual(msgspec.json.decode(answer)["error"]["code"], -32005)
        waiting[0].callback(0)
        self.assertEqual(self.receive(b'{"jsonrpc":"2.0","id":7,"method":"m"}'), [])
        self.assertEqual(len(waiting), MAX_RUNNING_HANDLERS + 1)

    def test_response_after_close_is_dropped(self) -> None:
        waiting: Deferred[int] = Deferred()
        self.methods["m"] = lambda params: waiting
        self.receive(b'{"jsonrpc":"2.0","id":7,"method":"m"}')
        self.session.close("gone")
        waiting.callback(1)
        self.assertEqual(self.sent, [])

    def test_invalid_messages(self) -> None:
        for payload, code in [(b"{", -32700), (b"1", -32600), (b"[]", -32600), (b"\xff", -32700)]:
            (answer,) = map(msgspec.json.decode, self.receive(payload))
            self.assertEqual((answer["id"], answer["error"]["code"]), (None, code))


class BatchTests(RPCSessionTestCase):
    def test_one_array_of_responses(self) -> None:
        waiting: Deferred[int] = Deferred()
        self.methods.update(slow=lambda params: waiting, fast=lambda params: 1)
        sent = self.receive(
            b'[{"jsonrpc":"2.0","id":1,"method":"slow"},{"jsonrpc":"2.0","id":2,"method":"fast"},'
            b'{"jsonrpc":"2.0","method":"n"},{"jsonrpc":"2.0","id":3,"method":"x"},7]'
        )
        self.assertEqual(sent, [])
        self.assertEqual(self.notifications, [("n", None)])
        waiting.callback(0)
        (batch,) = map(msgspec.json.decode, self.sent)
        self.assertEqual([answer["id"] for answer in batch], [1, 2, 3, None])
        self.assertEqual([answer.get("result") for answer in batch[:2]], [0, 1])
        self.assertEqual([answer["error"]["code"] for answer in batch[2:]], [-32601, -32600])

    def test_no_response_to_notifications_and_responses(self) -> None:
        self.assertEqual(self.receive(b'[{"jsonrpc":"2.0","method":"n"},{"jsonrpc":"2.0","id":9,"result":1}]'), [])

    def test_responses_in_a_batch(self) -> None:
        answer = self.session.call("m", None, 5)
        self.receive(b'[{"jsonrpc":"2.0","id":1,"result":8}]')
        self.assertEqual(self.successResultOf(answer), 8)

    def test_batch_response_too_large(self) -> None:
        self.methods["m"] = lambda params: "x" * 600
        sent = self.receive(b'[{"jsonrpc":"2.0","id":1,"method":"m"},{"jsonrpc":"2.0","id":2,"method":"m"}]')
        self.assertEqual([msgspec.json.decode(answer)["id"] for answer in sent], [1, 2])


class NotificationTests(RPCSessionTestCase):
    def test_received(self) -> None:
        self.assertEqual(self.receive(b'{"jsonrpc":"2.0","method":"n","params":[3]}'), [])
        self.assertEqual(self.notifications, [("n", [3])])

    def test_handler_error_is_logged(self) -> None:
        async def later(params: Any) -> None:
            raise KeyError("later")

        def now(params: Any) -> None:
            raise KeyError("now")

        self.methods.update(now=now, later=later)
        for name in (b"now", b"later"):
            self.assertEqual(self.receive(b'{"jsonrpc":"2.0","method":"%b"}' % name), [])
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 2)

    def test_sent(self) -> None:
        self.session.notify("n", {"a": 1})
        self.session.notify("n", None)
        self.assertEqual(
            self.sent,
            [b'{"jsonrpc":"2.0","method":"n","params":{"a":1}}', b'{"jsonrpc":"2.0","method":"n"}'],
        )

    def test_notification_cannot_be_sent(self) -> None:
        self.assertRaises(TypeError, self.session.notify, "n", 7)
        self.assertRaises(ValueError, self.session.notify, "n", ["x" * 1000])
        self.accepts = False
        self.assertRaises(ConnectionLost, self.session.notify, "n", None)
        self.accepts = True
        self.session.close("gone")
        self.assertRaises(ConnectionLost, self.session.notify, "n", None)
        self.assertEqual(self.sent, [])


class CallTests(RPCSessionTestCase):
    def test_result(self) -> None:
        answer = self.session.call("m", {"a": 1}, 5)
        self.assertEqual(self.sent, [b'{"jsonrpc":"2.0","id":1,"method":"m","params":{"a":1}}'])
        self.receive(b'{"jsonrpc":"2.0","id":1,"result":{"b":[2]}}')
        self.assertEqual(self.successResultOf(answer), {"b": [2]})
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_null_result(self) -> None:
        answer = self.session.call("m", None, 5)
        self.receive(b'{"jsonrpc":"2.0","id":1,"result":null}')
        self.assertIsNone(self.successResultOf(answer))

    def test_error(self) -> None:
        answer = self.session.call("m", None, 5)
        self.receive(b'{"jsonrpc":"2.0","id":1,"error":{"code":-32001,"message":"no","data":{"sent":false}}}')
        error = self.failureResultOf(answer, RpcFailed).value
        self.assertEqual((error.code, error.message, error.data), (-32001, "no", {"sent": False}))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_sent_counts_only_in_an_error_of_the_gateway(self) -> None:
        for data, mark, sent in (
            (b'{"sent":false}', b',"gateway":true', False),
            (b'{"sent":true}', b',"gateway":true', True),
            # A backend's own error, or a node of a release without the mark.
            (b'{"sent":false}', b"", True),
            (b'{"sent":false,"gateway":true}', b"", True),
            (b'{"sent":false}', b',"gateway":1', True),
        ):
            for batch in (False, True):
                answer = self.session.call("m", None, 5)
                id = next(iter(self.session._calls))
                error = b'{"code":-32004,"message":"no","data":%b}' % data
                response = b'{"jsonrpc":"2.0","id":%b,"error":%b%b}' % (id, error, mark)
                self.receive(b'[7,{"jsonrpc":"2.0","id":9,"result":1},%b]' % response if batch else response)
                failed = self.failureResultOf(answer, RpcFailed).value
                self.assertEqual((failed.gateway, failed.sent), (mark == b',"gateway":true', sent), response)

    def test_responses_are_matched_by_id(self) -> None:
        answers = [self.session.call("m", [n], 5) for n in range(3)]
        for n in (2, 0, 1):
            self.receive(b'{"jsonrpc":"2.0","id":%d,"result":%d}' % (n + 1, n))
        self.assertEqual([self.successResultOf(answer) for answer in answers], [0, 1, 2])

    def test_unknown_and_late_responses_are_ignored(self) -> None:
        answer = self.session.call("m", None, 5)
        for id in [b"2", b'"1"', b"null", b"1.0"]:
            self.assertEqual(self.receive(b'{"jsonrpc":"2.0","id":%b,"result":0}' % id), [])
        self.assertNoResult(answer)
        self.clock.advance(5)
        self.failureResultOf(answer, CallTimedOut)
        self.assertEqual(self.receive(b'{"jsonrpc":"2.0","id":1,"result":0}'), [])

    def test_timeout(self) -> None:
        answer = self.session.call("m", None, 5)
        self.clock.advance(4.9)
        self.assertNoResult(answer)
        self.clock.advance(0.1)
        error = self.failureResultOf(answer, CallTimedOut).value
        self.assertEqual(str(error), "no response to m within 5 s")

    def test_cancel(self) -> None:
        answer = self.session.call("m", None, 5)
        answer.cancel()
        self.failureResultOf(answer, CancelledError)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.receive(b'{"jsonrpc":"2.0","id":1,"result":0}')

    def test_connection_lost(self) -> None:
        answers = [self.session.call("m", None, 5) for _ in range(2)]
        self.session.close("it broke")
        for answer in answers:
            self.assertEqual(str(self.failureResultOf(answer, ConnectionLost).value), "it broke")
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.failureResultOf(self.session.call("m", None, 5), ConnectionLost)

    def test_send_fails(self) -> None:
        self.accepts = False
        self.failureResultOf(self.session.call("m", None, 5), ConnectionLost)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_invalid_params(self) -> None:
        for params, timeout, error in [
            (7, 5, TypeError),
            ("text", 5, TypeError),
            (object(), 5, TypeError),
            (["\ud800"], 5, TypeError),
            (["x" * 1000], 5, ValueError),
            (None, 0, ValueError),
            (None, -1, ValueError),
        ]:
            self.failureResultOf(self.session.call("m", params, timeout), error)
        self.assertEqual((self.sent, self.clock.getDelayedCalls()), ([], []))

    def test_params_that_encode_as_array_or_object(self) -> None:
        class Path(msgspec.Struct):
            path: str

        self.assertEqual(encode_params((1, 2)), b"[1,2]")
        self.assertEqual(encode_params(Path("/")), b'{"path":"/"}')


class GeneratedInputTests(SynchronousTestCase):
    JSON = st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5) | st.just("2.0"),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["jsonrpc", "id", "method", "params", "result", "error", "code", "message"]), inner
            )
        ),
        max_leaves=12,
    )

    @settings(deadline=None, max_examples=200)
    @given(st.binary(max_size=60) | JSON.map(msgspec.json.encode))
    def test_any_payload(self, payload: bytes) -> None:
        """Nothing is raised, and responses are JSON."""
        sent: list[bytes] = []

        def send(payload: bytes) -> bool:
            sent.append(payload)
            return True

        session = RPCSession(
            Clock(), send, handler_for=lambda _: lambda p: p, on_notification=lambda *_: None, max_message_size=1000
        )
        answer = session.call("m", None, 5)
        answer.addErrback(lambda failure: failure.trap(RpcFailed))
        session.message_received(payload)
        for message in sent:
            msgspec.json.decode(message)
