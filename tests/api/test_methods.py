"""What a backend can ask over its WebSocket."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred

from gateway.protocol.errors import ErrorKind
from gateway.rpc.pending import Reply
from tests.api.case import BackendTestCase, call, notification
from tests.api.fakes import NODE_ID, BackendWebSocket, EndpointHarness, rpc_error


class CallTests(BackendTestCase):
    def test_byte_for_byte(self):
        self.backend.send_message(
            b'{"jsonrpc":"2.0","id":"\\u00e9","method":"client.call",'
            b'"params":{"client":"a\\/b","method":"d\\u00e9","params":{"n": 1.500},"timeout":null}}'
        )
        self.assertEqual(self.dispatcher.calls, [("a/b", "dé", b'{"n": 1.500}', None)])
        self.dispatcher.pending[0].callback(Reply(b"[ 1.0e2 ]", None))
        self.assertEqual(self.backend.frames(), [(1, b'{"jsonrpc":"2.0","id":"\\u00e9","result":[ 1.0e2 ]}')])

    def test_the_clients_own_error(self):
        self.dispatcher.results.append(Reply(None, b'{"code": 1, "message": "no"}'))
        self.backend.send_message(call(1, "client.call", {"client": "x", "method": "m"}))
        self.assertEqual(self.backend.frames(), [(1, b'{"jsonrpc":"2.0","id":1,"error":{"code": 1, "message": "no"}}')])

    def test_errors_of_the_gateway(self):
        self.dispatcher.results.append(rpc_error(ErrorKind.CONNECTION_LOST))
        self.assert_error(self.request("client.call", {"client": "x", "method": "m"}), -32003, "x", True)

    def test_bad_params(self):
        good = {"client": "x", "method": "m"}
        for params, named, client in (
            (None, "client", None),
            ([], "object", None),
            ({"method": "m"}, "client", None),
            ({"client": "x"}, "method", None),
            ({"client": 1, "method": "m"}, "client", None),
            ({"client": "", "method": "m"}, "client", None),
            ({"client": "a b", "method": "m"}, "client", None),
            ({"client": "a" * 129, "method": "m"}, "client", None),
            ({"client": "..", "method": "m"}, "client", None),
            ({"client": "x", "method": 1}, "method", None),
            ({**good, "params": 1}, "params", "x"),
            ({**good, "params": None}, "params", "x"),
            ({**good, "timeout": 0}, "timeout", "x"),
            ({**good, "timeout": -1}, "timeout", "x"),
            ({**good, "timeout": "5"}, "timeout", None),
            ({**good, "timeout": True}, "timeout", None),
        ):
            response = self.request("client.call", params)
            self.assertIn(named, self.assert_error(response, -32602, client))
        self.backend.send_message(
            b'{"jsonrpc":"2.0","id":1,"method":"client.call","params":{"client":"x","method":"m","timeout":1e999}}'
        )
        self.assert_error(self.backend.messages()[0], -32602)
        self.assertEqual(self.dispatcher.calls, [])

    def test_as_deep_as_a_message_may_be(self):
        deep = b"[" * 509 + b"]" * 509
        payload = b'{"jsonrpc":"2.0","id":1,"method":"client.call","params":{"client":"x","method":"m","params":%b}}'
        self.backend.send_message(payload % deep)
        self.assertEqual(self.dispatcher.calls, [("x", "m", deep, None)])


class OtherMethodTests(BackendTestCase):
    def test_notify(self):
        response = self.request("client.notify", {"client": "x", "method": "m", "params": [3]})
        self.assertEqual(response, {"jsonrpc": "2.0", "id": 1, "result": None})
        self.assertEqual(self.dispatcher.notifications, [("x", "m", b"[3]")])
        self.dispatcher.notify_results.append(rpc_error(ErrorKind.NOT_CONNECTED))
        self.assert_error(self.request("client.notify", {"client": "x", "method": "m"}), -32001, "x")

    def test_notify_as_a_notification(self):
        self.dispatcher.notify_results.append(rpc_error(ErrorKind.NOT_CONNECTED))
        self.backend.send_message(notification("client.notify", {"client": "x", "method": "m"}))
        self.backend.send_message(notification("client.notify", {"client": "x"}))
        self.assertEqual((self.backend.messages(), len(self.dispatcher.notifications)), ([], 1))

    def test_get(self):
        self.endpoint.sessions.add("x")
        over_http = self.endpoint.request("GET", "/v1/clients/x").json
        self.assertEqual(self.request("client.get", {"client": "x"})["result"], over_http)
        self.assert_error(self.request("client.get", {"client": "y"}), -32001, "y")
        self.assert_error(self.request("client.get", {"client": "a b"}), -32602)
        self.endpoint.registry.unavailable = True
        self.assert_error(self.request("client.get", {"client": "y"}), -32007, "y")

    def test_get_of_a_backend_that_goes_away(self):
        self.endpoint.registry.find = lambda client_id: Deferred()
        self.backend.send_message(call(1, "client.get", {"client": "x"}))
        self.backend.disconnect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_subscribe(self):
        self.assertIsNone(self.request("events.subscribe", {"kinds": ["connected"]})["result"])
        self.assertIsNone(self.request("events.subscribe", {"kinds": ["message", "message"]})["result"])
        self.endpoint.upstream.connected("x", 7)
        self.endpoint.upstream.disconnected("x", 7)
        self.endpoint.upstream.message("x", "m", None)
        self.assertEqual(
            self.backend.messages(),
            [
                notification("events.connected", {"client": "x", "node": NODE_ID, "generation": 7}),
                notification("events.message", {"client": "x", "method": "m"}),
            ],
        )
        self.backend.disconnect()
        self.endpoint.upstream.connected("x", 7)
        self.assertEqual(self.backend.messages(), [])

    def test_bad_kinds(self):
        for params in (None, {}, {"kinds": []}, {"kinds": ["connected", "x"]}, {"kinds": "connected"}, {"kinds": [1]}):
            self.assertIn("kinds", self.assert_error(self.request("events.subscribe", params), -32602))
        self.endpoint.upstream.connected("x", 7)
        self.assertEqual(self.backend.messages(), [])

    def test_serve(self):
        self.assertIsNone(self.request("upstream.serve")["result"])
        answer = self.endpoint.upstream.call("x", "policy.get", None)
        (asked,) = self.backend.messages()
        self.assertEqual(asked, call(asked["id"], "upstream.call", {"client": "x", "method": "policy.get"}))
        self.backend.send_message(b'{"jsonrpc":"2.0","id":"%b","result":{"n": 1.0}}' % asked["id"].encode())
        self.assertEqual(self.successResultOf(answer), Reply(b'{"n": 1.0}', None))
        self.assertEqual(self.backend.messages(), [])

    def test_serve_as_a_notification(self):
        self.backend.send_message(notification("upstream.serve"))
        answer = self.endpoint.upstream.call("x", "m", None)
        self.assertEqual(len(self.backend.messages()), 1)
        self.backend.disconnect()
        self.assertEqual(self.failureResultOf(answer).value.kind, ErrorKind.CONNECTION_LOST)

    def test_unknown_methods(self):
        for method in ("", "client.close", "gateway.goaway", "events.connected"):
            self.assertIn("client.call", self.assert_error(self.request(method), -32601))
        self.backend.send_message(notification("gateway.token"))
        self.assertEqual(self.backend.messages(), [])


class PropertyTests(BackendTestCase):
    @given(
        st.sampled_from(["client.call", "client.notify", "client.get", "events.subscribe", "upstream.serve"]),
        st.fixed_dictionaries(
            {},
            optional={
                "client": st.text(max_size=3) | st.sampled_from(["x", "a/b"]),
                "method": st.text(max_size=3) | st.none(),
                "params": st.recursive(st.none() | st.integers(), st.lists),
                "timeout": st.floats(allow_nan=False) | st.none(),
                "kinds": st.lists(st.sampled_from(["connected", "message", "x"])) | st.integers(),
            },
        ),
    )
    @settings(max_examples=300, deadline=None)
    def test_any_params(self, method, params):
        endpoint = EndpointHarness()
        endpoint.dispatcher.results.append(Reply(b"1", None))
        backend = BackendWebSocket(endpoint)
        backend.send_message(call(1, method, params))
        (response,) = backend.messages()
        self.assertEqual(response["id"], 1)
        self.assertIn(response.get("error", {}).get("code"), (None, -32602, -32001))
