"""Every row of the table of what can be asked over HTTP."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail
from twisted.trial.unittest import TestCase

from gateway.registry.interface import NodeStatus, RegistryUnavailable
from gateway.rpc.errors import Kind
from gateway.rpc.interface import Reply
from tests.api.fakes import NODE_ID, OTHER_ID, Endpoint, request, rpc_error

CALL = b'{"jsonrpc":"2.0","id":1,"method":"disk.usage","params":{"path":"/"}}'
NOTE = b'{"jsonrpc":"2.0","method":"policy.changed","params":[3]}'


class CallTests(TestCase):
    """POST /v1/clients/{client_id}/rpc."""

    def setUp(self):
        self.endpoint = Endpoint()
        self.hub = self.endpoint.hub

    def post(self, body, target="/v1/clients/x/rpc", headers=()):
        return self.endpoint.ask("POST", target, body, headers)

    def test_result(self):
        self.hub.answers.append(Reply(b'{"free": 12.50}', None))
        response = self.post(CALL)
        self.assertEqual(response.status, 200)
        self.assertEqual(response.body, b'{"jsonrpc":"2.0","id":1,"result":{"free": 12.50}}')
        self.assertEqual(response.headers["content-type"], "application/json")
        self.assertEqual(response.headers["server"], "wsgateway")
        self.assertEqual(response.headers["date"], "Tue, 14 Nov 2023 22:13:20 GMT")
        self.assertEqual(self.hub.calls, [("x", "disk.usage", b'{"path":"/"}', None)])
        self.assertEqual(self.endpoint.metrics.api_requests, {"200": 1})

    def test_the_callers_id_is_raw(self):
        for id in (b'"\\u00e9"', b"1.50", b"12345678901234567890123", b"null"):
            self.hub.answers.append(Reply(b"1", None))
            response = self.post(b'{"jsonrpc":"2.0", "id": %b ,"method":"m"}' % id)
            self.assertEqual(response.body, b'{"jsonrpc":"2.0","id":%b,"result":1}' % id)

    def test_the_clients_own_error_is_passed_on_with_200(self):
        error = b'{"code": -32001, "message": "mine", "data": 1e2}'
        self.hub.answers.append(Reply(None, error))
        response = self.post(CALL)
        self.assertEqual(response.status, 200)
        self.assertEqual(response.body, b'{"jsonrpc":"2.0","id":1,"error":%b}' % error)

    def test_the_error_table(self):
        for kind, status, code, sent in (
            (Kind.NOT_CONNECTED, 404, -32001, False),
            (Kind.TIMEOUT, 504, -32002, True),
            (Kind.CONNECTION_LOST, 502, -32003, True),
            (Kind.TOO_MANY_CALLS, 429, -32005, False),
            (Kind.TOO_LARGE, 413, -32006, False),
            (Kind.REGISTRY_UNAVAILABLE, 503, -32007, False),
            (Kind.INVALID_REQUEST, 400, -32600, False),
        ):
            self.hub.answers.append(rpc_error(kind))
            response = self.post(CALL)
            self.assertEqual(response.status, status)
            self.assertEqual(response.json["id"], 1)
            self.assertEqual(response.json["error"]["code"], code)
            self.assertEqual(response.json["error"]["data"], {"client": "x", "sent": sent})
        self.hub.answers.append(rpc_error(Kind.NODE_UNREACHABLE, sent=True))
        response = self.post(CALL)
        self.assertEqual((response.status, response.json["error"]["data"]["sent"]), (503, True))

    def test_notification(self):
        response = self.post(NOTE)
        self.assertEqual((response.status, response.body), (202, b""))
        self.assertEqual(response.headers["content-length"], "0")
        self.assertNotIn("content-type", response.headers)
        self.assertEqual(self.hub.notifications, [("x", "policy.changed", b"[3]")])

    def test_failed_notification(self):
        self.hub.notify_outcomes.append(rpc_error(Kind.NOT_CONNECTED))
        response = self.post(NOTE)
        self.assertEqual((response.status, response.json["id"]), (404, None))
        self.assertEqual(response.json["error"]["code"], -32001)

    def test_an_unexpected_failure_is_logged_and_says_nothing(self):
        self.hub.answers.append(ZeroDivisionError("secret"))
        response = self.post(CALL)
        self.assertEqual((response.status, response.json["error"]), (500, "internal"))
        self.assertNotIn(b"secret", response.body)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_timeout(self):
        for target, headers, seconds in (
            ("?timeout=5", (), 5.0),
            ("?timeout=0.25", (), 0.25),
            ("?other=1&timeout=%35", (), 5.0),
            ("", (("Request-Timeout", "7"),), 7.0),
            ("", (("Request-Timeout", ".5"),), 0.5),
            ("?timeout=3", (("Request-Timeout", "7"),), 3.0),
            ("?timeout=3", (("Request-Timeout", "soon"),), 3.0),
            ("?timeout=999999", (), 999999.0),
        ):
            self.hub.answers.append(Reply(b"1", None))
            self.assertEqual(self.post(CALL, "/v1/clients/x/rpc" + target, headers).status, 200)
            self.assertEqual(self.hub.calls[-1][3], seconds)

    def test_bad_timeout(self):
        for bad in ("0", "-1", "nan", "inf", "1e3", "", "five", "0.0", "%", "%ff", "9" * 400, "1&timeout=1"):
            response = self.post(CALL, f"/v1/clients/x/rpc?timeout={bad}")
            self.assertEqual((response.status, response.json["error"]["code"]), (400, -32600), bad)
            data = response.json["error"]["data"]
            self.assertIn("timeout", data.pop("detail"))
            self.assertEqual(data, {"client": "x", "sent": False})
            self.assertEqual(response.json["id"], 1)
        for headers in ((("Request-Timeout", "0"),), (("Request-Timeout", "1"), ("Request-Timeout", "1"))):
            response = self.post(CALL, headers=headers)
            self.assertEqual(response.status, 400)
            self.assertIn("Request-Timeout", response.json["error"]["data"]["detail"])
        self.assertEqual(self.hub.calls, [])

    def test_client_ids(self):
        for raw, client_id in (
            ("x", "x"),
            ("acme/robot", "acme/robot"),
            ("acme%2Frobot", "acme/robot"),
            ("acme%2Frpc", "acme/rpc"),
            ("acme/rpc", "acme/rpc"),
            ("%2Frpc", "/rpc"),
            ("a+b=c@d:e", "a+b=c@d:e"),
            ("...", "..."),
            ("%61" * 128, "a" * 128),
        ):
            self.hub.answers.append(Reply(b"1", None))
            self.assertEqual(self.post(CALL, f"/v1/clients/{raw}/rpc").status, 200, raw)
            self.assertEqual(self.hub.calls[-1][0], client_id)

    def test_bad_client_ids(self):
        for raw in ("", ".", "..", "%2E%2e", "a" * 129, "a b".replace(" ", "%20"), "%", "%zz", "%ff", "a%00", "%252F"):
            response = self.post(CALL, f"/v1/clients/{raw}/rpc")
            self.assertEqual((response.status, response.json["error"]["code"]), (400, -32600), raw)
            self.assertIn("client_id", response.json["error"]["data"]["detail"])
            self.assertEqual(response.json["error"]["data"]["client"], None)
            self.assertEqual(response.json["id"], 1)
        self.assertEqual(self.hub.calls, [])

    def test_bad_bodies(self):
        for body, code, id in (
            (b"", -32700, None),
            (b"{", -32700, None),
            (b"\xff", -32700, None),
            (b'{"jsonrpc":"2.0","id":1,"method":"a\\ud800"}', -32700, None),
            (b"[" * 600 + b"]" * 600, -32700, None),
            (b"1", -32600, None),
            (b"[]", -32600, None),
            (b'{"jsonrpc":"1.0","id":5,"method":"m"}', -32600, 5),
            (b'{"jsonrpc":"2.0","id":5,"method":3}', -32600, 5),
            (b'{"jsonrpc":"2.0","id":5,"result":3}', -32600, 5),
        ):
            response = self.post(body)
            self.assertEqual((response.status, response.json["error"]["code"]), (400, code), body)
            self.assertEqual(response.json["id"], id)
            data = response.json["error"]["data"]
            self.assertTrue(data.pop("detail"))
            self.assertEqual(data, {"client": "x", "sent": False})
        self.assertEqual(self.endpoint.metrics.bad_messages["backend"], 10)

    def test_batch_in_the_order_of_the_requests(self):
        connection = self.endpoint.connect()
        note = b'{"jsonrpc":"2.0","method":"n"}'
        body = b'[{"jsonrpc":"2.0","id":1,"method":"a"},%b,7,{"jsonrpc":"2.0","id":"2","method":"b"}]' % note
        connection.send(request("POST", "/v1/clients/x/rpc?timeout=4", body))
        self.assertEqual(connection.responses(), [])
        self.assertEqual(self.hub.calls, [("x", "a", None, 4.0), ("x", "b", None, 4.0)])
        self.assertEqual(self.hub.notifications, [("x", "n", None)])
        self.hub.waiting[1].callback(Reply(b"2.0", None))
        self.hub.waiting[0].errback(rpc_error(Kind.TIMEOUT))
        (response,) = connection.responses()
        self.assertEqual(response.status, 200)
        first, invalid, second = response.json
        self.assertEqual((first["id"], first["error"]["code"]), (1, -32002))
        self.assertEqual((invalid["id"], invalid["error"]["code"]), (None, -32600))
        self.assertEqual(second, {"jsonrpc": "2.0", "id": "2", "result": 2.0})

    def test_an_unexpected_failure_in_a_batch_is_that_messages_alone(self):
        self.hub.answers.extend([ZeroDivisionError("secret"), Reply(b"1", None)])
        response = self.post(b"[%b,%b]" % (CALL, CALL))
        self.assertEqual(response.status, 200)
        self.assertEqual(response.json[0]["error"]["code"], -32603)
        self.assertEqual(response.json[0]["error"]["data"], {"client": "x", "sent": True})
        self.assertEqual(response.json[1]["result"], 1)
        self.assertNotIn(b"secret", response.body)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_batch_of_notifications(self):
        response = self.post(b"[%b,%b]" % (NOTE, NOTE))
        self.assertEqual((response.status, response.body), (202, b""))
        self.assertEqual(len(self.hub.notifications), 2)

    def test_batch_of_notifications_that_failed(self):
        self.hub.notify_outcomes.extend([None, rpc_error(Kind.NOT_CONNECTED)])
        response = self.post(b"[%b,%b]" % (NOTE, NOTE))
        self.assertEqual((response.status, response.json["error"]["code"]), (404, -32001))

    def test_batch_that_is_too_long(self):
        response = self.post(b"[" + b",".join([NOTE] * 1001) + b"]")
        self.assertEqual((response.status, response.json["error"]["code"]), (400, -32600))
        self.assertEqual(self.hub.notifications, [])

    def test_a_backend_that_goes_away_cancels_its_call(self):
        connection = self.endpoint.connect()
        connection.send(request("POST", "/v1/clients/x/rpc", CALL))
        connection.lose()
        self.assertEqual(self.hub.cancelled, 1)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_a_backend_that_goes_away_cancels_its_batch(self):
        connection = self.endpoint.connect()
        connection.send(request("POST", "/v1/clients/x/rpc", b"[%b,%b]" % (CALL, CALL)))
        connection.lose()
        self.assertEqual(self.hub.cancelled, 2)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_content_type_may_have_parameters(self):
        self.hub.answers.append(Reply(b"1", None))
        response = self.post(CALL, headers=(("Content-Type", "Application/JSON; charset=utf-8"),))
        self.assertEqual(response.status, 200)


class ClientTests(TestCase):
    """GET and DELETE /v1/clients/{client_id}."""

    def setUp(self):
        self.endpoint = Endpoint()

    def test_get_here(self):
        self.endpoint.edge.add("a/b")
        response = self.endpoint.ask("GET", "/v1/clients/a%2Fb")
        self.assertEqual(response.status, 200)
        self.assertEqual(
            response.json,
            {
                "client_id": "a/b",
                "node": NODE_ID,
                "node_name": "here",
                "generation": 7,
                "connected_at": "2023-11-14T22:13:20.250Z",
                "address": "192.0.2.7:4711",
            },
        )
        self.assertEqual(self.endpoint.registry.asked, [])

    def test_get_elsewhere(self):
        self.endpoint.registry.add("x")
        response = self.endpoint.ask("GET", "/v1/clients/x")
        self.assertEqual(response.json["node"], OTHER_ID)
        self.assertEqual(response.json["node_name"], "other")
        self.assertEqual(response.json["generation"], 9)
        self.assertEqual(response.json["connected_at"], "2023-11-14T22:13:21.000Z")
        self.assertEqual(response.json["address"], "[2001:db8::1]:80")

    def test_one_whose_node_has_not_been_heard_of(self):
        """Who has just come cannot tell whether it is dead; later it can."""
        self.endpoint.registry.add("x", live=False)
        self.endpoint.node.judges = False
        for method in ("GET", "DELETE"):
            response = self.endpoint.ask(method, "/v1/clients/x")
            self.assertEqual((response.status, response.json["error"]), (503, "registry"))
        self.endpoint.node.judges = True
        for method in ("GET", "DELETE"):
            self.assertEqual(self.endpoint.ask(method, "/v1/clients/x").status, 404)

    def test_get_nowhere(self):
        response = self.endpoint.ask("GET", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (404, "not_connected"))

    def test_a_row_of_this_node_is_no_connection(self):
        self.endpoint.registry.add("x", NODE_ID)
        self.assertEqual(self.endpoint.ask("GET", "/v1/clients/x").status, 404)

    def test_an_id_may_end_in_rpc(self):
        self.endpoint.edge.add("a/rpc")
        self.assertEqual(self.endpoint.ask("GET", "/v1/clients/a/rpc").json["client_id"], "a/rpc")

    def test_head(self):
        self.endpoint.edge.add("x")
        head = self.endpoint.ask("HEAD", "/v1/clients/x")
        whole = self.endpoint.ask("GET", "/v1/clients/x")
        self.assertEqual((head.status, head.body), (200, b""))
        self.assertEqual(head.headers, whole.headers)

    def test_bad_ids(self):
        for method in ("GET", "DELETE"):
            for raw in ("", "%", "..", "a%20b", "a" * 129):
                response = self.endpoint.ask(method, f"/v1/clients/{raw}")
                self.assertEqual((response.status, response.json["error"]), (400, "client_id"))

    def test_registry_away(self):
        self.endpoint.registry.away = True
        for method, target in (
            ("GET", "/v1/clients/x"),
            ("DELETE", "/v1/clients/x"),
            ("GET", "/v1/clients"),
            ("GET", "/v1/nodes"),
            ("POST", f"/v1/nodes/{OTHER_ID}/drain"),
        ):
            response = self.endpoint.ask(method, target)
            self.assertEqual((response.status, response.json["error"]), (503, "registry"), target)

    def test_delete(self):
        self.endpoint.edge.add("x")
        response = self.endpoint.ask("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.body), (204, b""))
        self.assertNotIn("content-length", response.headers)
        self.assertEqual(self.endpoint.edge.closed, [("x", 4003, "disconnected by an operator")])

    def test_delete_answers_when_the_row_is_gone(self):
        self.endpoint.edge.closing = Deferred()
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        self.assertEqual(connection.responses(), [])
        self.endpoint.edge.closing.callback(True)
        self.assertEqual(connection.responses()[0].status, 204)

    def test_delete_whose_row_cannot_be_removed(self):
        self.endpoint.edge.closing = fail(RegistryUnavailable("away"))
        response = self.endpoint.ask("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (503, "registry"))

    def test_delete_waits_for_a_connection_that_opens(self):
        opening = self.endpoint.edge.openings["x"] = Deferred()
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        self.assertEqual(self.endpoint.edge.closed, [])
        self.endpoint.edge.add("x")
        opening.callback(None)
        self.assertEqual(connection.responses()[0].status, 204)

    def test_delete_nowhere(self):
        self.assertEqual(self.endpoint.ask("DELETE", "/v1/clients/x").status, 404)

    def test_delete_elsewhere(self):
        self.endpoint.registry.add("x")
        response = self.endpoint.ask("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (503, "node"))
        self.assertIn("other", response.json["message"])


class ManyTests(TestCase):
    """GET and POST /v1/clients."""

    def setUp(self):
        self.endpoint = Endpoint()

    def test_page(self):
        for client_id in ("a", "b", "c"):
            self.endpoint.registry.add(client_id)
        first = self.endpoint.ask("GET", "/v1/clients?limit=2").json
        self.assertEqual([client["client_id"] for client in first["clients"]], ["a", "b"])
        self.assertEqual(
            set(first["clients"][0]), {"client_id", "node", "node_name", "generation", "connected_at", "address"}
        )
        self.assertEqual(first["next"], "b")
        second = self.endpoint.ask("GET", "/v1/clients?limit=2&after=b").json
        self.assertEqual([client["client_id"] for client in second["clients"]], ["c"])
        self.assertIsNone(second["next"])

    def test_a_full_last_page_has_no_next(self):
        for client_id in ("a", "b"):
            self.endpoint.registry.add(client_id)
        self.assertIsNone(self.endpoint.ask("GET", "/v1/clients?limit=2").json["next"])

    def test_what_is_asked_of_the_registry(self):
        self.endpoint.ask("GET", f"/v1/clients?after=a%2Fb&limit=5&node={NODE_ID}&prefix=a+")
        self.assertEqual(self.endpoint.registry.asked, [("clients", "a/b", 6, NODE_ID, "a+")])
        self.endpoint.ask("GET", "/v1/clients")
        self.assertEqual(self.endpoint.registry.asked[-1], ("clients", "", 101, None, ""))

    def test_bad_parameters(self):
        for query, word in (
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("limit=x", "limit"),
            ("limit=", "limit"),
            ("limit=1&limit=1", "limit"),
            ("limit=" + "9" * 5000, "limit"),
            ("after=%20", "after"),
            ("after=" + "a" * 129, "after"),
            ("prefix=%zz", "prefix"),
            ("prefix=%ff", "prefix"),
            ("node=", "node"),
            ("node=%27", "node"),
        ):
            response = self.endpoint.ask("GET", f"/v1/clients?{query}")
            self.assertEqual((response.status, response.json["error"]), (400, word), query)
            self.assertIn(word, response.json["message"])

    def test_notify(self):
        response = self.endpoint.ask("POST", "/v1/clients?prefix=acme/", NOTE)
        self.assertEqual((response.status, response.json), (202, {"nodes": {NODE_ID: 3}}))
        self.assertEqual(self.endpoint.hub.prefixes, [("acme/", "policy.changed", b"[3]")])

    def test_notify_everybody(self):
        self.assertEqual(self.endpoint.ask("POST", "/v1/clients?prefix=", NOTE).status, 202)
        self.assertEqual(self.endpoint.hub.prefixes[0][0], "")

    def test_notify_without_a_prefix(self):
        response = self.endpoint.ask("POST", "/v1/clients", NOTE)
        self.assertEqual((response.status, response.json["error"]), (400, "prefix"))

    def test_notify_takes_one_notification_alone(self):
        for body, code, id in ((CALL, -32600, 1), (b"[%b]" % NOTE, -32600, None), (b"{", -32700, None)):
            response = self.endpoint.ask("POST", "/v1/clients?prefix=", body)
            self.assertEqual((response.status, response.json["error"]["code"]), (400, code))
            self.assertEqual(response.json["id"], id)
        self.assertEqual(self.endpoint.hub.prefixes, [])

    def test_notify_refused_by_the_hub(self):
        self.endpoint.hub.prefix_outcome = rpc_error(
            Kind.INVALID_REQUEST, None, detail="gateway.* is the gateway's own"
        )
        response = self.endpoint.ask("POST", "/v1/clients?prefix=", NOTE)
        self.assertEqual((response.status, response.json["error"]["code"]), (400, -32600))


class NodeTests(TestCase):
    """/v1/nodes, health and metrics."""

    def setUp(self):
        self.endpoint = Endpoint()

    def test_nodes(self):
        status = NodeStatus(NODE_ID, "here", "ws://a", "ws://b", 3, 100, "up", 1.5)
        self.endpoint.registry.statuses = [status]
        response = self.endpoint.ask("GET", "/v1/nodes")
        self.assertEqual(
            response.json,
            {
                "nodes": [
                    {
                        "node_id": NODE_ID,
                        "name": "here",
                        "public_url": "ws://a",
                        "peer_url": "ws://b",
                        "clients": 3,
                        "capacity": 100,
                        "state": "up",
                        "heartbeat_age": 1.5,
                    }
                ]
            },
        )

    def test_drain(self):
        response = self.endpoint.ask("POST", f"/v1/nodes/{NODE_ID}/drain")
        self.assertEqual((response.status, response.json), (202, {"node_id": NODE_ID}))
        self.assertEqual(self.endpoint.node.drains, 1)

    def test_drain_another(self):
        self.endpoint.registry.statuses = [NodeStatus(OTHER_ID, "o", "ws://a", "ws://b", 3, 100, "up", 1.5)]
        response = self.endpoint.ask("POST", f"/v1/nodes/{OTHER_ID}/drain")
        self.assertEqual((response.status, response.json["error"]), (503, "node"))
        self.assertEqual(self.endpoint.node.drains, 0)

    def test_drain_nobody(self):
        for node_id in ("nobody", "", "%00", "a/b"):
            response = self.endpoint.ask("POST", f"/v1/nodes/{node_id}/drain")
            self.assertEqual((response.status, response.json["error"]), (404, "node"))

    def test_healthy(self):
        self.endpoint.node.why = "starting"
        response = self.endpoint.ask("GET", "/healthz")
        self.assertEqual((response.status, response.json), (200, {"healthy": True}))

    def test_ready(self):
        response = self.endpoint.ask("GET", "/readyz")
        self.assertEqual((response.status, response.json), (200, {"ready": True}))
        for why in ("starting", "draining", "registry", "lease"):
            self.endpoint.node.why = why
            response = self.endpoint.ask("GET", "/readyz")
            self.assertEqual((response.status, response.json["error"]), (503, why))

    def test_metrics(self):
        self.endpoint.ask("GET", "/healthz")
        response = self.endpoint.ask("GET", "/metrics")
        self.assertEqual(response.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8")
        self.assertIn(b'wsgateway_api_requests_total{status="200"} 1.0', response.body)


class TableTests(TestCase):
    """Paths and methods."""

    def setUp(self):
        self.endpoint = Endpoint()

    def test_unknown_paths(self):
        for path in (
            "/",
            "/v1",
            "/v1/",
            "/v2/clients",
            "/healthz/",
            "//healthz",
            "/v1/nodes/x",
            "*",
            "http://x/healthz",
        ):
            response = self.endpoint.ask("GET", path)
            self.assertEqual((response.status, response.json["error"]), (404, "path"), path)

    def test_wrong_methods(self):
        for method, path, allowed in (
            ("POST", "/healthz", {"GET", "HEAD"}),
            ("DELETE", "/v1/clients", {"GET", "HEAD", "POST"}),
            ("POST", "/v1/clients/x", {"GET", "HEAD", "DELETE"}),
            ("PUT", "/v1/clients/x/rpc", {"GET", "HEAD", "DELETE", "POST"}),
            ("GET", f"/v1/nodes/{NODE_ID}/drain", {"POST"}),
            ("OPTIONS", "/v1/nodes", {"GET", "HEAD"}),
            ("get", "/healthz", {"GET", "HEAD"}),
        ):
            response = self.endpoint.ask(method, path)
            self.assertEqual((response.status, response.json["error"]), (405, "method"))
            self.assertEqual(set(response.headers["allow"].split(", ")), allowed)

    def test_the_websockets_path_without_an_upgrade(self):
        response = self.endpoint.ask("GET", "/v1/backend")
        self.assertEqual((response.status, response.headers["upgrade"]), (426, "websocket"))
        self.assertEqual(response.phrase, "Upgrade Required")


_segment = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_message = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.sampled_from(["2.0", "1.0", 2]),
        "id": _json,
        "method": st.sampled_from(["m", "gateway.x", 1]) | st.text(max_size=5),
        "params": _json,
        "result": _json,
        "error": _json,
    },
)


class PropertyTests(TestCase):
    """Whatever is asked gets a clear answer."""

    @given(
        st.sampled_from(["GET", "POST", "DELETE", "HEAD", "PATCH"]),
        st.sampled_from(["/v1/clients/", "/v1/clients", "/v1/nodes/", "/v1/", "/"]) | _segment,
        _segment,
        st.sampled_from(["", "/rpc", "/drain", "/"]),
        st.sampled_from(["", "?", "?timeout=", "?limit=", "?after=", "?prefix=", "?node="]),
        _segment,
        st.binary(max_size=30)
        | _json.map(msgspec.json.encode)
        | st.lists(_message, max_size=3).map(msgspec.json.encode),
    )
    @settings(max_examples=300, deadline=None)
    def test_never_a_500(self, method, start, middle, end, query, value, body):
        endpoint = Endpoint()
        endpoint.hub.answers.extend([Reply(b"1", None)] * 5)
        target = (start + middle + end + query + value) or "/"
        response = endpoint.ask(method, target, body)
        self.assertNotEqual(response.status, 500)
        if method == "HEAD" or response.status in (202, 204):
            return
        if response.status >= 400:
            self.assertTrue(response.json["error"])

    @given(_segment)
    @settings(max_examples=300, deadline=None)
    def test_timeouts(self, text):
        endpoint = Endpoint()
        endpoint.hub.answers.append(Reply(b"1", None))
        response = endpoint.ask("POST", "/v1/clients/x/rpc?timeout=" + text, CALL)
        if response.status == 200:
            seconds = endpoint.hub.calls[0][3]
            self.assertTrue(seconds is None or 0 < seconds < float("inf"))
        else:
            self.assertEqual((response.status, response.json["error"]["code"]), (400, -32600))

    @given(st.lists(_message, min_size=1, max_size=4))
    @settings(max_examples=200, deadline=None)
    def test_batches(self, messages):
        endpoint = Endpoint()
        endpoint.hub.answers.extend([Reply(b"1", None)] * 4)
        response = endpoint.ask("POST", "/v1/clients/x/rpc", msgspec.json.encode(messages))
        self.assertIn(response.status, (200, 202))
        if response.status == 200:
            self.assertEqual(len(response.json), len(messages) - len(endpoint.hub.notifications))
