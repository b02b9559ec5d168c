"""Tests of gateway.api.client_handlers."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from gateway.cluster.errors import PeerUnreachableError
from gateway.protocol.errors import ErrorKind
from gateway.rpc.pending import Reply
from tests.builders.api_case import FORGED_ERROR, any_message, segment
from tests.builders.endpoint import EndpointHarness, rpc_error
from tests.builders.http import request
from tests.fakes.api import NODE_ID, OTHER_ID, FakePeerClient

CALL = b'{"jsonrpc":"2.0","id":1,"method":"disk.usage","params":{"path":"/"}}'
NOTIFICATION = b'{"jsonrpc":"2.0","method":"policy.changed","params":[3]}'


class CallTests(TestCase):
    """POST /v1/clients/{client_id}/rpc."""

    def setUp(self):
        self.endpoint = EndpointHarness()
        self.dispatcher = self.endpoint.dispatcher

    def post(self, body, target="/v1/clients/x/rpc", headers=()):
        return self.endpoint.request("POST", target, body, headers)

    def test_result(self):
        self.dispatcher.results.append(Reply(b'{"free": 12.50}', None))
        response = self.post(CALL)
        self.assertEqual(response.status, 200)
        self.assertEqual(response.body, b'{"jsonrpc":"2.0","id":1,"result":{"free": 12.50}}')
        self.assertEqual(response.headers["content-type"], "application/json")
        self.assertEqual(response.headers["server"], "wsgateway")
        self.assertEqual(response.headers["date"], "Tue, 14 Nov 2023 22:13:20 GMT")
        self.assertEqual(self.dispatcher.calls, [("x", "disk.usage", b'{"path":"/"}', None)])
        self.assertEqual(self.endpoint.metrics.api_requests, {"200": 1})

    def test_the_callers_id_is_raw(self):
        for id in (b'"\\u00e9"', b"1.50", b"12345678901234567890123", b"null"):
            self.dispatcher.results.append(Reply(b"1", None))
            response = self.post(b'{"jsonrpc":"2.0", "id": %b ,"method":"m"}' % id)
            self.assertEqual(response.body, b'{"jsonrpc":"2.0","id":%b,"result":1}' % id)

    def test_the_clients_own_error_is_passed_on_with_200(self):
        error = b'{"code": -32001, "message": "mine", "data": 1e2}'
        self.dispatcher.results.append(Reply(None, error))
        response = self.post(CALL)
        self.assertEqual(response.status, 200)
        self.assertEqual(response.body, b'{"jsonrpc":"2.0","id":1,"error":%b}' % error)

    def test_the_clients_own_error_is_not_marked(self):
        """Even if it is equal to one of the gateway; also in a batch."""
        self.dispatcher.results.extend([Reply(None, FORGED_ERROR)] * 2 + [rpc_error(ErrorKind.NOT_CONNECTED)])
        forged = b'{"jsonrpc":"2.0","id":1,"error":%b}' % FORGED_ERROR
        self.assertEqual(self.post(CALL).body, forged)
        response = self.post(b"[%b,%b,7]" % (CALL, CALL))
        self.assertTrue(response.body.startswith(b"[%b," % forged), response.body)
        self.assertEqual([each.get("gateway") for each in response.json], [None, True, True])

    def test_the_error_table(self):
        for kind, status, code, sent in (
            (ErrorKind.NOT_CONNECTED, 404, -32001, False),
            (ErrorKind.TIMEOUT, 504, -32002, True),
            (ErrorKind.CONNECTION_LOST, 502, -32003, True),
            (ErrorKind.TOO_MANY_CALLS, 429, -32005, False),
            (ErrorKind.TOO_LARGE, 413, -32006, False),
            (ErrorKind.REGISTRY_UNAVAILABLE, 503, -32007, False),
            (ErrorKind.INVALID_REQUEST, 400, -32600, False),
        ):
            self.dispatcher.results.append(rpc_error(kind))
            response = self.post(CALL)
            self.assertEqual(response.status, status)
            self.assertEqual(response.json["id"], 1)
            self.assertEqual(response.json["error"]["code"], code)
            self.assertEqual(response.json["error"]["data"], {"client": "x", "sent": sent})
            self.assertIs(response.json["gateway"], True)
        self.dispatcher.results.append(rpc_error(ErrorKind.NODE_UNREACHABLE, sent=True))
        response = self.post(CALL)
        self.assertEqual((response.status, response.json["error"]["data"]["sent"]), (503, True))

    def test_notification(self):
        response = self.post(NOTIFICATION)
        self.assertEqual((response.status, response.body), (202, b""))
        self.assertEqual(response.headers["content-length"], "0")
        self.assertNotIn("content-type", response.headers)
        self.assertEqual(self.dispatcher.notifications, [("x", "policy.changed", b"[3]")])

    def test_failed_notification(self):
        self.dispatcher.notify_results.append(rpc_error(ErrorKind.NOT_CONNECTED))
        response = self.post(NOTIFICATION)
        self.assertEqual((response.status, response.json["id"]), (404, None))
        self.assertEqual(response.json["error"]["code"], -32001)

    def test_unexpected_failure_is_logged_and_not_revealed(self):
        self.dispatcher.results.append(ZeroDivisionError("secret"))
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
            self.dispatcher.results.append(Reply(b"1", None))
            self.assertEqual(self.post(CALL, "/v1/clients/x/rpc" + target, headers).status, 200)
            self.assertEqual(self.dispatcher.calls[-1][3], seconds)

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
        self.assertEqual(self.dispatcher.calls, [])

    def test_client_ids(self):
        for raw, client_id in (
            ("x", "x"),
            ("acme/robot", "acme/robot"),
            ("acme%2Frobot", "acme/robot"),
            ("acme%2Frpc", "acme/rpc"),
            ("acme/rpc", "acme/rpc"),
            ("spiffe:%2F%2Facme%2Frobot", "spiffe://acme/robot"),
            ("spiffe://acme/robot", "spiffe://acme/robot"),
            ("a+b=c@d:e", "a+b=c@d:e"),
            ("...", "..."),
            ("%61" * 128, "a" * 128),
        ):
            self.dispatcher.results.append(Reply(b"1", None))
            self.assertEqual(self.post(CALL, f"/v1/clients/{raw}/rpc").status, 200, raw)
            self.assertEqual(self.dispatcher.calls[-1][0], client_id)

    def test_bad_client_ids(self):
        for raw in (
            *("", ".", "..", "%2E%2e", "a" * 129, "a%20b", "%", "%zz", "%ff", "a%00", "%252F"),
            *("%2Frpc", "a%2F%2Fb", "a//b", "a/../b", "a/%2e%2E/b", "./a", "a%2F", "/a", "spiffe:/a", "spiffe:%2Fa"),
        ):
            response = self.post(CALL, f"/v1/clients/{raw}/rpc")
            self.assertEqual((response.status, response.json["error"]["code"]), (400, -32600), raw)
            self.assertIn("client_id", response.json["error"]["data"]["detail"])
            self.assertEqual(response.json["error"]["data"]["client"], None)
            self.assertEqual(response.json["id"], 1)
        self.assertEqual(self.dispatcher.calls, [])

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
        self.assertEqual(self.dispatcher.calls, [("x", "a", None, 4.0), ("x", "b", None, 4.0)])
        self.assertEqual(self.dispatcher.notifications, [("x", "n", None)])
        self.dispatcher.pending[1].callback(Reply(b"2.0", None))
        self.dispatcher.pending[0].errback(rpc_error(ErrorKind.TIMEOUT))
        (response,) = connection.responses()
        self.assertEqual(response.status, 200)
        first, invalid, second = response.json
        self.assertEqual((first["id"], first["error"]["code"]), (1, -32002))
        self.assertEqual((invalid["id"], invalid["error"]["code"]), (None, -32600))
        self.assertEqual(second, {"jsonrpc": "2.0", "id": "2", "result": 2.0})

    def test_unexpected_failure_in_a_batch_affects_one_message(self):
        self.dispatcher.results.extend([ZeroDivisionError("secret"), Reply(b"1", None)])
        response = self.post(b"[%b,%b]" % (CALL, CALL))
        self.assertEqual(response.status, 200)
        self.assertEqual(response.json[0]["error"]["code"], -32603)
        self.assertEqual(response.json[0]["error"]["data"], {"client": "x", "sent": True})
        self.assertEqual(response.json[1]["result"], 1)
        self.assertNotIn(b"secret", response.body)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_batch_of_notifications(self):
        response = self.post(b"[%b,%b]" % (NOTIFICATION, NOTIFICATION))
        self.assertEqual((response.status, response.body), (202, b""))
        self.assertEqual(len(self.dispatcher.notifications), 2)

    def test_batch_of_notifications_that_failed(self):
        self.dispatcher.notify_results.extend([None, rpc_error(ErrorKind.NOT_CONNECTED)])
        response = self.post(b"[%b,%b]" % (NOTIFICATION, NOTIFICATION))
        self.assertEqual((response.status, response.json["error"]["code"]), (404, -32001))
        self.assertIs(response.json["gateway"], True)

    def test_batch_that_is_too_long(self):
        response = self.post(b"[" + b",".join([NOTIFICATION] * 1001) + b"]")
        self.assertEqual((response.status, response.json["error"]["code"]), (400, -32600))
        self.assertEqual(self.dispatcher.notifications, [])

    def test_disconnecting_cancels_the_call(self):
        connection = self.endpoint.connect()
        connection.send(request("POST", "/v1/clients/x/rpc", CALL))
        connection.disconnect()
        self.assertEqual(self.dispatcher.cancel_count, 1)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_disconnecting_cancels_the_batch(self):
        connection = self.endpoint.connect()
        connection.send(request("POST", "/v1/clients/x/rpc", b"[%b,%b]" % (CALL, CALL)))
        connection.disconnect()
        self.assertEqual(self.dispatcher.cancel_count, 2)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_content_type_may_have_parameters(self):
        self.dispatcher.results.append(Reply(b"1", None))
        response = self.post(CALL, headers=(("Content-Type", "Application/JSON; charset=utf-8"),))
        self.assertEqual(response.status, 200)


class ListTests(TestCase):
    """GET and POST /v1/clients."""

    def setUp(self):
        self.endpoint = EndpointHarness()

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
            response = self.endpoint.request("GET", f"/v1/clients?{query}")
            self.assertEqual((response.status, response.json["error"]), (400, word), query)
            self.assertIn(word, response.json["message"])

    def test_notify(self):
        response = self.endpoint.request("POST", "/v1/clients?prefix=acme/", NOTIFICATION)
        self.assertEqual((response.status, response.json), (202, {"nodes": {NODE_ID: 3}}))
        self.assertEqual(self.endpoint.dispatcher.prefix_notifications, [("acme/", "policy.changed", b"[3]")])

    def test_notify_all_clients(self):
        self.assertEqual(self.endpoint.request("POST", "/v1/clients?prefix=", NOTIFICATION).status, 202)
        self.assertEqual(self.endpoint.dispatcher.prefix_notifications[0][0], "")

    def test_notify_without_a_prefix(self):
        response = self.endpoint.request("POST", "/v1/clients", NOTIFICATION)
        self.assertEqual((response.status, response.json["error"]), (400, "prefix"))

    def test_notify_rejects_other_messages(self):
        for body, code, id in ((CALL, -32600, 1), (b"[%b]" % NOTIFICATION, -32600, None), (b"{", -32700, None)):
            response = self.endpoint.request("POST", "/v1/clients?prefix=", body)
            self.assertEqual((response.status, response.json["error"]["code"]), (400, code))
            self.assertEqual(response.json["id"], id)
        self.assertEqual(self.endpoint.dispatcher.prefix_notifications, [])

    def test_notify_refused_by_the_dispatcher(self):
        self.endpoint.dispatcher.prefix_result = rpc_error(
            ErrorKind.INVALID_REQUEST, None, detail="gateway.* is the gateway's own"
        )
        response = self.endpoint.request("POST", "/v1/clients?prefix=", NOTIFICATION)
        self.assertEqual((response.status, response.json["error"]["code"]), (400, -32600))


class SingleClientTests(TestCase):
    """GET and DELETE /v1/clients/{client_id}."""

    def setUp(self):
        self.endpoint = EndpointHarness()

    def test_bad_ids(self):
        for method in ("GET", "DELETE"):
            for raw in ("", "%", "..", "a%20b", "a" * 129, "a//b", "a/./b", "a%2F", "spiffe:/a"):
                response = self.endpoint.request(method, f"/v1/clients/{raw}")
                self.assertEqual((response.status, response.json["error"]), (400, "client_id"))


class QueryFormTests(TestCase):
    """POST /v1/rpc?client_id=, GET and DELETE /v1/client?client_id=."""

    def setUp(self):
        self.endpoint = EndpointHarness(max_message_size=1024)
        self.dispatcher = self.endpoint.dispatcher

    def both(self, method, query, *args):
        """Send a request in the form with a path, and in the form with a query; return the response that both get."""
        (path_id, *parameters), (path, at) = (
            query.split("&"),
            {
                "POST": ("/v1/clients/{}/rpc", "/v1/rpc"),
                "GET": ("/v1/clients/{}", "/v1/client"),
                "DELETE": ("/v1/clients/{}", "/v1/client"),
            }[method],
        )
        more = "&".join(parameters)
        received = []
        for target in (path.format(path_id) + f"?{more}", f"{at}?{more}&client_id={path_id}"):
            received.append(self.endpoint.request(method, target, *args))
        with_path, with_query = received
        self.assertEqual((with_path.status, with_path.body), (with_query.status, with_query.body))
        self.assertEqual(with_path.headers, with_query.headers)
        return with_query

    def test_calls(self):
        self.dispatcher.results.extend([Reply(b"1", None)] * 2)
        self.assertEqual(self.both("POST", "acme%2Fa+b&timeout=4", CALL).json["result"], 1)
        self.assertEqual(self.dispatcher.calls, [("acme/a+b", "disk.usage", b'{"path":"/"}', 4.0)] * 2)
        for kind in (ErrorKind.NOT_CONNECTED, ErrorKind.TOO_MANY_CALLS):
            self.dispatcher.results.extend([rpc_error(kind)] * 2)
            self.assertEqual(self.both("POST", "x", CALL).json["error"]["code"], kind.value.code)

    def test_timeout_header(self):
        self.dispatcher.results.extend([Reply(b"1", None)] * 2)
        self.both("POST", "x", CALL, (("Request-Timeout", "7"),))
        self.assertEqual([each[3] for each in self.dispatcher.calls], [7.0, 7.0])
        self.assertIn("timeout", self.both("POST", "x&timeout=0", CALL).json["error"]["data"]["detail"])

    def test_notifications_and_batches(self):
        self.assertEqual(self.both("POST", "x", NOTIFICATION).status, 202)
        self.assertEqual(self.both("POST", "x", b"[%b,%b]" % (NOTIFICATION, NOTIFICATION)).status, 202)
        self.assertEqual(self.dispatcher.notifications, [("x", "policy.changed", b"[3]")] * 6)
        self.dispatcher.results.extend([Reply(b"1", None)] * 2)
        response = self.both("POST", "x", b"[%b,7,%b]" % (CALL, NOTIFICATION))
        self.assertEqual([each.get("result") for each in response.json], [1, None])

    def test_refused_bodies(self):
        for body, headers, status in (
            (b"{", (), 400),
            (b"\xff", (), 400),
            (CALL, (("Content-Type", "text/plain"),), 415),
            (CALL, (("Origin", "http://127.0.0.1"),), 403),
            (b"x" * 8192, (), 413),
        ):
            self.assertEqual(self.both("POST", "x", body, headers).status, status)
        self.assertEqual(self.both("POST", "x", b"x" * 8192).json["error"]["data"]["client"], "x")

    def test_one_client(self):
        self.endpoint.sessions.add("spiffe://acme/a+b")
        response = self.both("GET", "spiffe:%2f%2Facme%2Fa+b")
        self.assertEqual((response.status, response.json["client_id"]), (200, "spiffe://acme/a+b"))
        self.assertEqual(self.both("GET", "y").json["error"], "not_connected")
        self.assertEqual(self.both("DELETE", "y").json["error"], "not_connected")
        head = self.endpoint.request("HEAD", "/v1/client?client_id=spiffe://acme/a+b")
        self.assertEqual((head.status, head.body), (200, b""))
        self.assertEqual(self.endpoint.request("DELETE", "/v1/client?client_id=spiffe://acme/a%2Bb").status, 204)
        self.assertEqual(self.endpoint.sessions.clients, {})

    def test_invalid_queries(self):
        for query in (
            *("", "?", "?client_id", "?client_id=", "?id=x", "?client_id=x&client_id=x", "?client_id=x&client%5Fid=y"),
            *("?client_id=%", "?client_id=%ff", "?client_id=a%20b", "?client_id=a%252Fb", "?client_id=" + "a" * 129),
            *("?client_id=.", "?client_id=%2E."),
        ):
            for method in ("GET", "DELETE"):
                response = self.endpoint.request(method, "/v1/client" + query)
                self.assertEqual((response.status, response.json["error"]), (400, "client_id"), query)
            response = self.endpoint.request("POST", "/v1/rpc" + query, CALL)
            self.assertEqual((response.status, response.json["error"]["code"], response.json["id"]), (400, -32600, 1))
            self.assertIn("client_id", response.json["error"]["data"]["detail"])
        self.assertEqual(self.dispatcher.calls, [])

    def test_former_client_ids_are_not_called(self):
        for raw in ("a//b", "a/../b", "/a", "a/", "spiffe:/a"):
            self.assertEqual(self.endpoint.request("GET", f"/v1/client?client_id={raw}").status, 400)
            self.assertEqual(self.endpoint.request("POST", f"/v1/rpc?client_id={raw}", CALL).status, 400)
        self.assertEqual(self.dispatcher.calls, [])


class PropertyTests(TestCase):
    """Every request gets a well-formed response."""

    @given(segment)
    @settings(max_examples=300, deadline=None)
    def test_timeouts(self, text):
        endpoint = EndpointHarness()
        endpoint.dispatcher.results.append(Reply(b"1", None))
        response = endpoint.request("POST", "/v1/clients/x/rpc?timeout=" + text, CALL)
        if response.status == 200:
            seconds = endpoint.dispatcher.calls[0][3]
            self.assertTrue(seconds is None or 0 < seconds < float("inf"))
        else:
            self.assertEqual((response.status, response.json["error"]["code"]), (400, -32600))

    @given(st.lists(any_message, min_size=1, max_size=4))
    @settings(max_examples=200, deadline=None)
    def test_batches(self, messages):
        endpoint = EndpointHarness()
        endpoint.dispatcher.results.extend([Reply(b"1", None)] * 4)
        response = endpoint.request("POST", "/v1/clients/x/rpc", msgspec.json.encode(messages))
        self.assertIn(response.status, (200, 202))
        if response.status == 200:
            self.assertEqual(len(response.json), len(messages) - len(endpoint.dispatcher.notifications))


PREFIX_NOTIFICATION = b'{"jsonrpc":"2.0","method":"m","params":[3]}'
TARGET = "/v1/clients?prefix=acme/"


class NotifyPrefixTests(TestCase):
    def setUp(self):
        self.peers = FakePeerClient()
        self.endpoint = EndpointHarness(peers=self.peers)
        for node_id in (NODE_ID, OTHER_ID, "third"):
            self.endpoint.registry.add_node(node_id)

    def notify(self):
        response = self.endpoint.request("POST", TARGET, PREFIX_NOTIFICATION)
        return response.status, response.json

    def test_all_nodes_concurrently(self):
        other, third = Deferred(), Deferred()
        self.peers.results += [other, third]
        connection = self.endpoint.connect()
        connection.send(request("POST", TARGET, PREFIX_NOTIFICATION))
        notification = ("acme/", "m", b"[3]")
        self.assertEqual(
            self.peers.requests, [("notify_prefix", node_id, *notification) for node_id in (OTHER_ID, "third")]
        )
        self.assertEqual(self.endpoint.dispatcher.prefix_notifications, [notification])
        third.callback(5)
        self.assertEqual(connection.responses(), [])
        other.callback(0)
        (response,) = connection.responses()
        self.assertEqual((response.status, response.json), (202, {"nodes": {NODE_ID: 3, OTHER_ID: 0, "third": 5}}))

    def test_unreachable_node(self):
        self.peers.results += [
            PeerUnreachableError("connection refused"),
            PeerUnreachableError("peer.notify_prefix: silent", sent=True),
        ]
        status, body = self.notify()
        self.assertEqual((status, body["nodes"], set(body)), (202, {NODE_ID: 3}, {"nodes", "failed"}))
        self.assertEqual(body["failed"][OTHER_ID], "connection refused")
        self.assertEqual(body["failed"]["third"], "silent; some of its clients may have been notified")

    def test_this_node_is_included_without_a_row(self):
        del self.endpoint.registry.statuses[:2]
        self.peers.results.append(1)
        self.assertEqual(self.notify(), (202, {"nodes": {NODE_ID: 3, "third": 1}}))

    def test_nothing_is_sent_if_the_nodes_are_unknown(self):
        self.endpoint.registry.unavailable = True
        status, body = self.notify()
        self.assertEqual((status, body["error"]), (503, "registry"))
        self.assertEqual((self.endpoint.dispatcher.prefix_notifications, self.peers.requests), ([], []))

    def test_message_that_no_node_delivers(self):
        self.peers.results += [PeerUnreachableError("refused")] * 2
        self.endpoint.dispatcher.prefix_result = rpc_error(ErrorKind.INVALID_REQUEST, None)
        status, body = self.notify()
        self.assertEqual((status, body["error"]["code"]), (400, -32600))

    def test_backend_disconnects(self):
        cancelled = []
        self.peers.results += [Deferred(cancelled.append), Deferred(cancelled.append)]
        connection = self.endpoint.connect()
        connection.send(request("POST", TARGET, PREFIX_NOTIFICATION))
        connection.disconnect()
        self.assertEqual(len(cancelled), 2)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_unexpected_failure(self):
        self.peers.results += [ZeroDivisionError("secret"), 1]
        status, body = self.notify()
        self.assertEqual((status, body["error"]), (500, "internal"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
