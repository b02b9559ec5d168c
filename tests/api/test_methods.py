"""Tests of gateway.api.methods, with unlimited and with limited tokens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred

from gateway.auth.backend_tokens import VERBS, Grant
from gateway.protocol.errors import ErrorKind
from gateway.registry.interface import SessionKey
from gateway.rpc.pending import Reply
from tests.builders.api_case import BackendTestCase, any_json, call, notification
from tests.builders.endpoint import BackendWebSocket, EndpointHarness, rpc_error
from tests.fakes.api import NODE_ID


class CallTests(BackendTestCase):
    def test_byte_for_byte(self):
        self.backend.send_message(
            b'{"jsonrpc":"2.0","id":"\\u00e9","method":"client.call",'
            b'"params":{"client":"a\\/b","method":"d\\u00e9","params":{"n": 1.500},"timeout":null}}'
        )
        self.assertEqual(self.dispatcher.calls, [("a/b", "dé", b'{"n": 1.500}', None)])
        self.dispatcher.pending[0].callback(Reply(b"[ 1.0e2 ]", None))
        self.assertEqual(self.backend.frames(), [(1, b'{"jsonrpc":"2.0","id":"\\u00e9","result":[ 1.0e2 ]}')])

    def test_error_of_the_client(self):
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

    def test_deepest_params(self):
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

    def test_backend_disconnects_during_get(self):
        self.endpoint.registry.find = lambda client_id: Deferred()
        self.backend.send_message(call(1, "client.get", {"client": "x"}))
        self.backend.disconnect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_subscribe(self):
        self.assertIsNone(self.request("events.subscribe", {"kinds": ["connected"]})["result"])
        self.assertIsNone(self.request("events.subscribe", {"kinds": ["message", "message"]})["result"])
        self.endpoint.upstream.connected(SessionKey("x", 7))
        self.endpoint.upstream.disconnected(SessionKey("x", 7))
        self.endpoint.upstream.message("x", "m", None)
        self.assertEqual(
            self.backend.messages(),
            [
                notification("events.connected", {"client": "x", "node": NODE_ID, "generation": 7}),
                notification("events.message", {"client": "x", "method": "m"}),
            ],
        )
        self.backend.disconnect()
        self.endpoint.upstream.connected(SessionKey("x", 7))
        self.assertEqual(self.backend.messages(), [])

    def test_bad_kinds(self):
        for params in (None, {}, {"kinds": []}, {"kinds": ["connected", "x"]}, {"kinds": "connected"}, {"kinds": [1]}):
            self.assertIn("kinds", self.assert_error(self.request("events.subscribe", params), -32602))
        self.endpoint.upstream.connected(SessionKey("x", 7))
        self.assertEqual(self.backend.messages(), [])

    def test_serve(self):
        self.assertIsNone(self.request("upstream.serve")["result"])
        result = self.endpoint.upstream.call("x", "policy.get", None)
        (upstream_call,) = self.backend.messages()
        self.assertEqual(
            upstream_call, call(upstream_call["id"], "upstream.call", {"client": "x", "method": "policy.get"})
        )
        self.backend.send_message(b'{"jsonrpc":"2.0","id":"%b","result":{"n": 1.0}}' % upstream_call["id"].encode())
        self.assertEqual(self.successResultOf(result), Reply(b'{"n": 1.0}', None))
        self.assertEqual(self.backend.messages(), [])

    def test_serve_as_a_notification(self):
        self.backend.send_message(notification("upstream.serve"))
        result = self.endpoint.upstream.call("x", "m", None)
        self.assertEqual(len(self.backend.messages()), 1)
        self.backend.disconnect()
        self.assertEqual(self.failureResultOf(result).value.kind, ErrorKind.CONNECTION_LOST)

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


ONLY_ACME = "this token is limited to client ids that begin with acme/"
#: verb -> a method and params that need it
REQUESTS_BY_VERB = {
    "call": ("client.call", {"client": "acme/r", "method": "m"}),
    "notify": ("client.notify", {"client": "acme/r", "method": "m"}),
    "read": ("client.get", {"client": "acme/r"}),
    "serve": ("upstream.serve", None),
}


class GrantTestCase(BackendTestCase):
    """A backend with a limited token, a client that it allows, and one that it does not."""

    accepts = False

    def setUp(self):
        self.limit("acme/")

    def limit(self, prefix="", verbs=None):
        self.grant = Grant(prefix, verbs)
        self.endpoint = EndpointHarness(authenticate_backend={"t": self.grant}.get, max_message_size=262144)
        self.dispatcher, self.upstream = self.endpoint.dispatcher, self.endpoint.upstream
        # Records the fast path.
        self.fast_requests = []
        self.dispatcher.try_call = lambda call, *request: self.fast_requests.append(request) or self.accepts
        self.dispatcher.try_notify = lambda *request: self.fast_requests.append(request) or self.accepts
        for client_id in ("acme/r", "beta/r"):
            self.endpoint.sessions.add(client_id)
        self.backend = BackendWebSocket(self.endpoint, [("Authorization", "Bearer t")])

    def assert_forbidden(self, method, params, client="beta/r"):
        """Assert that a request fails with -32008, and return the detail."""
        return self.assert_error(self.request(method, params), -32008, client)

    def assert_nothing_done(self):
        self.assertEqual((self.dispatcher.calls, self.dispatcher.notifications, self.fast_requests), ([], [], []))
        self.assertEqual(self.endpoint.registry.queries, [])


class VerbTests(GrantTestCase):
    accepts = True

    def test_each_verb_allows_its_own_methods_only(self):
        for verb in VERBS:
            self.limit("", [verb])
            for needed, (method, params) in REQUESTS_BY_VERB.items():
                if needed != verb:
                    client = None if params is None else "acme/r"
                    detail = self.assert_forbidden(method, params, client)
                    self.assertEqual(detail, f"this token may not {needed}; it is for {verb}")
            if verb != "read":
                self.assertIn("may not read", self.assert_forbidden("events.subscribe", {"kinds": ["message"]}, None))
            self.assert_nothing_done()
            if verb in REQUESTS_BY_VERB:
                method, params = REQUESTS_BY_VERB[verb]
                self.backend.send_message(call(2, method, params))
                self.assertNotIn("error", *self.backend.messages() or [{}])

    def test_allowed_calls_take_the_fast_path(self):
        self.limit("acme/", ["call", "notify"])
        self.backend.send_message(call(1, *REQUESTS_BY_VERB["call"]))
        self.backend.send_message(notification(*REQUESTS_BY_VERB["notify"]))
        self.assertEqual([each[0] for each in self.fast_requests], ["acme/r"] * 2)
        self.assertEqual((self.dispatcher.calls, self.dispatcher.notifications), ([], []))


class PrefixTests(GrantTestCase):
    def test_other_clients(self):
        for method, params in list(REQUESTS_BY_VERB.values())[:3]:
            self.assertEqual(self.assert_forbidden(method, {**params, "client": "beta/r"}), ONLY_ACME)
        self.backend.send_message(notification("client.notify", {"client": "beta/r", "method": "m"}))
        self.backend.send_message(notification("client.call", {"client": "beta/r", "method": "m"}))
        self.assertEqual(self.backend.messages(), [])
        self.assert_nothing_done()

    def test_does_not_reveal_whether_a_client_exists(self):
        received = []
        for state in ("here", "nowhere", "away", "silent"):
            self.limit("acme/")
            if state != "here":
                self.endpoint.sessions.clients.clear()
            self.endpoint.registry.unavailable = state == "away"
            if state == "silent":
                self.endpoint.registry.find = lambda client_id: Deferred()
            for method, params in list(REQUESTS_BY_VERB.values())[:3]:
                self.backend.send_message(call(1, method, {**params, "client": "beta/r"}))
            received.append(self.backend.frames())
            self.assert_nothing_done()
        self.assertEqual([len(frames) for frames in received], [3] * 4)
        self.assertEqual(received, [received[0]] * 4)

    def test_similar_ids(self):
        for client in ("acme", "Acme/r", "beta/acme/r", "a", "acme.r"):
            for method in ("client.call", "client.notify"):
                self.assertEqual(self.assert_forbidden(method, {"client": client, "method": "m"}, client), ONLY_ACME)
        for client in (
            "",
            "..",
            "acme/ ",
            "acme/\0",
            "acme%2Fr",
            "/acme/r",
            "beta/../acme/r",
            "acme//r",
            "acme/",
            "acme/\u00e9",
            ["acme/r"],
            {"acme/": 1},
            1,
            None,
            True,
        ):
            self.assert_error(self.request("client.call", {"client": client, "method": "m"}), -32602)
        # The fast path does not check ids: no client has an invalid one.
        self.assertTrue(all(each[0].startswith("acme/") for each in self.fast_requests))
        self.assertEqual((self.dispatcher.calls, self.dispatcher.notifications), ([], []))

    def test_params_in_an_array(self):
        for method in ("client.call", "client.notify", "client.get"):
            for params in (["beta/r", "m"], [{"client": "beta/r"}], [["client", "beta/r"]]):
                self.assert_error(self.request(method, params), -32602)
        self.assert_nothing_done()

    def test_duplicate_client_member(self):
        """The last one counts, for the call and for the check."""
        for first, last in (("acme/r", "beta/r"), ("beta/r", "acme/r")):
            self.backend.send_message(
                b'{"jsonrpc":"2.0","id":1,"method":"client.call","params":{"client":"%b","method":"m","client":"%b"}}'
                % (first.encode(), last.encode())
            )
        (refused,) = self.backend.messages()
        self.assertEqual(self.assert_error(refused, -32008, "beta/r"), ONLY_ACME)
        self.assertEqual(self.dispatcher.calls, [("acme/r", "m", None, None)])

    def test_ids_of_every_type(self):
        for id in (None, 1, 1.5, "", "acme/"):
            self.assert_error(self.request("client.call", {"client": "beta/r", "method": "m"}, id), -32008, "beta/r")
        for id in (True, [1], {"a": 1}):
            self.backend.send_message(call(id, "client.call", {"client": "beta/r", "method": "m"}))
            self.assertEqual(self.backend.messages()[0]["error"]["code"], -32600)
        self.assert_nothing_done()

    def test_batch_of_a_thousand_messages(self):
        own, other = ({"client": client, "method": "m"} for client in ("acme/r", "beta/r"))
        self.dispatcher.results.extend([Reply(b"1", None)] * 250)
        some = [call(1, "client.call", own), call(2, "client.call", other), notification("client.notify", other)]
        self.backend.send_message([*some, notification("client.notify", own)] * 250)
        (responses,) = self.backend.messages()
        codes = [each.get("error", {}).get("code") for each in responses]
        self.assertEqual(codes, [None, -32008] * 250)
        self.assertEqual({each[0] for each in (*self.dispatcher.calls, *self.dispatcher.notifications)}, {"acme/r"})
        self.assertEqual((len(self.dispatcher.calls), len(self.dispatcher.notifications)), (250, 250))

    def test_unknown_methods(self):
        for method in ("client.close", "client.notify_prefix", "peer.close", "peer.drain", "gateway.token"):
            self.assert_error(self.request(method, {"client": "acme/r"}), -32601)

    @given(
        st.sampled_from(["client.call", "client.notify", "client.get"]),
        any_json | st.fixed_dictionaries({"client": st.text("acmebt/.\0", max_size=9), "method": st.just("m")}),
    )
    @settings(max_examples=300, deadline=None)
    def test_nothing_reaches_another_client(self, method, params):
        self.limit("acme/")
        self.backend.send_message(call(1, method, params))
        touched = [each[0] for each in (*self.dispatcher.calls, *self.dispatcher.notifications, *self.fast_requests)]
        touched += [each[1] for each in self.endpoint.registry.queries]
        self.assertTrue(all(client_id.startswith("acme/") for client_id in touched), touched)


class EventTests(GrantTestCase):
    def publish_events(self, *clients):
        for client_id in clients:
            self.upstream.connected(SessionKey(client_id, 7))
            self.upstream.message(client_id, "m", None)
            self.upstream.disconnected(SessionKey(client_id, 7))

    def received_events(self):
        return [each["params"]["client"] for each in self.backend.messages()]

    def test_events(self):
        self.request("events.subscribe", {"kinds": ["connected", "disconnected", "message"]})
        self.publish_events("acme/r", "beta/r", "acme", "acme/s")
        self.assertEqual(self.received_events(), ["acme/r"] * 3 + ["acme/s"] * 3)

    def test_calls(self):
        self.request("upstream.serve")
        refused = self.upstream.call("beta/r", "m", None)
        error = self.failureResultOf(refused).value
        self.assertEqual((error.kind, error.client_id), (ErrorKind.METHOD_NOT_FOUND, "beta/r"))
        result = self.upstream.call("acme/r", "m", None)
        (upstream_call,) = self.backend.messages()
        self.backend.send_message({"jsonrpc": "2.0", "id": upstream_call["id"], "result": 1})
        self.assertEqual(self.successResultOf(result), Reply(b"1", None))

    def test_token_is_revoked(self):
        self.request("events.subscribe", {"kinds": ["connected", "disconnected", "message"]})
        self.request("upstream.serve")
        result = self.upstream.call("acme/r", "m", None)
        (upstream_call,) = self.backend.messages()
        self.grant.revoke()
        self.publish_events("acme/r", "beta/r")
        refused = self.upstream.call("acme/r", "m", None)
        self.assertEqual(self.failureResultOf(refused).value.kind, ErrorKind.METHOD_NOT_FOUND)
        self.backend.send_message({"jsonrpc": "2.0", "id": upstream_call["id"], "result": 1})
        error = self.failureResultOf(result).value
        self.assertEqual((error.kind, error.client_id, error.sent), (ErrorKind.CONNECTION_LOST, "acme/r", True))
        for method, params in (
            *REQUESTS_BY_VERB.values(),
            ("client.call", {"client": 1}),
            ("events.subscribe", {"kinds": ["message"]}),
            ("no.method", None),
        ):
            self.assertEqual(self.assert_forbidden(method, params, None), "this token was withdrawn")
        self.assert_nothing_done()
        self.assertFalse(self.backend.transport.disconnecting)

    def test_revoked_token_is_restored(self):
        self.request("events.subscribe", {"kinds": ["connected"]})
        self.request("upstream.serve")
        self.grant.revoke()
        self.publish_events("acme/r", "beta/r")
        self.grant.set_limits("beta/", ["read", "call"])
        self.publish_events("acme/r", "beta/r")
        self.assertEqual(self.received_events(), ["beta/r"])
        refused = self.upstream.call("beta/r", "m", None)
        self.assertEqual(self.failureResultOf(refused).value.kind, ErrorKind.METHOD_NOT_FOUND)
        self.assertEqual(
            self.assert_forbidden("client.call", {"client": "acme/r", "method": "m"}, "acme/r"),
            "this token is limited to client ids that begin with beta/",
        )

    def test_call_in_flight_is_completed(self):
        self.backend.send_message(call(1, *REQUESTS_BY_VERB["call"]))
        self.grant.revoke()
        self.dispatcher.pending[0].callback(Reply(b"2", None))
        self.assertEqual(self.backend.messages(), [{"jsonrpc": "2.0", "id": 1, "result": 2}])
