"""Tests of tokens limited to verbs or to a prefix, over HTTP: what they allow, and what they do not reveal."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from gateway.auth.backend_tokens import VERBS, Grant
from gateway.rpc.pending import Reply
from tests.builders.endpoint import EndpointHarness
from tests.builders.http import request
from tests.fakes.api import NODE_ID, OTHER_ID, FakePeerClient
from tests.fakes.cluster import FakeRebalancer

CALL = b'{"jsonrpc":"2.0","id":1,"method":"m"}'
NOTIFICATION = b'{"jsonrpc":"2.0","method":"m"}'
ONLY_ACME = "this token is limited to client ids that begin with acme/"

#: verb -> valid requests that need it: method, target and body
REQUESTS_BY_VERB = {
    "call": [("POST", "/v1/clients/acme/r/rpc", CALL), ("POST", "/v1/rpc?client_id=acme/r", CALL)],
    "notify": [
        ("POST", "/v1/clients/acme/r/rpc", NOTIFICATION),
        ("POST", "/v1/rpc?client_id=acme/r", NOTIFICATION),
        ("POST", "/v1/clients?prefix=acme/", NOTIFICATION),
    ],
    "read": [
        ("GET", "/v1/clients", None),
        ("GET", "/v1/clients/acme/r", None),
        ("HEAD", "/v1/clients/acme/r", None),
        ("GET", "/v1/client?client_id=acme/r", None),
        ("GET", "/v1/nodes", None),
        ("GET", "/metrics", None),
    ],
    "disconnect": [("DELETE", "/v1/clients/acme/r", None)],
    "serve": [],
}
ALL_REQUESTS = [request for requests in REQUESTS_BY_VERB.values() for request in requests]
UNLIMITED_REQUESTS = [("POST", f"/v1/nodes/{NODE_ID}/drain", b""), ("POST", "/v1/rebalance", b"")]


def bearer(token="t"):
    return (("Authorization", f"Bearer {token}"),)


class GrantTestCase(TestCase):
    """A backend with a limited token, a client that it allows, and one that it does not."""

    def limit(self, prefix="acme/", verbs=None):
        self.grant = Grant(prefix, verbs)
        self.endpoint = EndpointHarness(
            authenticate_backend={"t": self.grant}.get,
            peers=FakePeerClient(),
            rebalancer=FakeRebalancer(),
            max_message_size=262144,
        )
        self.dispatcher, self.sessions, self.registry = (
            self.endpoint.dispatcher,
            self.endpoint.sessions,
            self.endpoint.registry,
        )
        self.dispatcher.results.extend([Reply(b"1", None)] * 9)
        for client_id in ("acme/r", "beta/r"):
            self.sessions.add(client_id)
            self.registry.add(client_id, NODE_ID)

    def request(self, method, target, body=None, headers=()):
        return self.endpoint.request(method, target, body, (*bearer(), *headers))

    def assert_forbidden(self, response):
        """Return the detail, and the client_id if there is one."""
        self.assertEqual(response.status, 403, response)
        if response.json.get("error") == "forbidden":
            return response.json["message"], None
        error = response.json["error"]
        self.assertEqual((error["code"], error["message"]), (-32008, "not allowed with this token"))
        self.assertIs(error["data"]["sent"], False)
        return error["data"]["detail"], error["data"]["client"]

    def assert_nothing_done(self):
        dispatcher = self.dispatcher
        self.assertEqual(
            (dispatcher.calls, dispatcher.notifications, dispatcher.prefix_notifications, self.sessions.closed),
            ([], [], [], []),
        )
        self.assertEqual((self.registry.queries, self.endpoint.node.drain_count), ([], 0))


class VerbTests(GrantTestCase):
    def test_each_verb_allows_its_own_requests_only(self):
        for verb in VERBS:
            self.limit("", [verb])
            for needed, requests in REQUESTS_BY_VERB.items():
                for each in requests:
                    response = self.request(*each)
                    if needed == verb:
                        self.assertLess(response.status, 300, (verb, each))
                    elif each[0] == "HEAD":
                        self.assertEqual((response.status, response.body), (403, b""))
                    else:
                        detail, _ = self.assert_forbidden(response)
                        self.assertEqual(detail, f"this token may not {needed}; it is for {verb}")
            for each in UNLIMITED_REQUESTS:
                self.assertIn("without prefix= and verbs=", self.assert_forbidden(self.request(*each))[0])
            self.assertEqual(self.endpoint.node.drain_count, 0)

    def test_all_verbs_are_still_a_limit(self):
        self.limit("", VERBS)
        for each in UNLIMITED_REQUESTS:
            self.assert_forbidden(self.request(*each))
        self.assert_nothing_done()

    def test_unlimited(self):
        self.limit("")
        for each in (*ALL_REQUESTS, *UNLIMITED_REQUESTS):
            self.assertLess(self.request(*each).status, 300, each)

    def test_without_tokens_everything_is_allowed(self):
        endpoint = EndpointHarness(rebalancer=FakeRebalancer())
        endpoint.sessions.add("acme/r")
        endpoint.dispatcher.results.extend([Reply(b"1", None)] * 2)
        for each in (*ALL_REQUESTS, *UNLIMITED_REQUESTS):
            self.assertLess(endpoint.request(*each).status, 300, each)

    def test_prefix_and_verbs(self):
        self.limit("acme/", ["read"])
        self.assertEqual(self.request("GET", "/v1/clients/acme/r").status, 200)
        self.assertEqual(self.assert_forbidden(self.request("GET", "/v1/clients/beta/r"))[0], ONLY_ACME)
        self.assertIn("may not disconnect", self.assert_forbidden(self.request("DELETE", "/v1/clients/acme/r"))[0])
        self.assertEqual(len(self.sessions.clients), 2)

    def test_each_message_of_a_batch_is_checked(self):
        self.limit("", ["notify"])
        response = self.request("POST", "/v1/clients/acme/r/rpc", b"[%b,%b,7,%b]" % (NOTIFICATION, CALL, NOTIFICATION))
        self.assertEqual(response.status, 200)
        self.assertEqual([each["error"]["code"] for each in response.json], [-32008, -32600])
        self.assertEqual((len(self.dispatcher.notifications), self.dispatcher.calls), (2, []))


class PrefixTests(GrantTestCase):
    def setUp(self):
        self.limit()

    def test_one_client(self):
        for method in ("GET", "DELETE"):
            self.assertEqual(self.assert_forbidden(self.request(method, "/v1/clients/beta/r")), (ONLY_ACME, None))
        for body, id in ((CALL, 1), (NOTIFICATION, None)):
            response = self.request("POST", "/v1/clients/beta/r/rpc", body)
            self.assertEqual(self.assert_forbidden(response), (ONLY_ACME, "beta/r"))
            self.assertEqual(response.json["id"], id)
        self.assert_nothing_done()

    def test_does_not_reveal_whether_a_client_exists(self):
        """The responses are the same, byte for byte, also while the registry fails or does not answer."""
        for state in ("here", "nowhere", "away", "silent"):
            self.limit()
            if state != "here":
                self.sessions.clients.clear()
                self.registry.rows.clear()
            self.registry.unavailable = state == "away"
            if state == "silent":
                self.registry.find = self.registry.nodes = self.registry.clients = lambda *args: Deferred()
            received = [
                self.request(*each)
                for each in (
                    ("GET", "/v1/clients/beta/r"),
                    ("HEAD", "/v1/clients/beta/r"),
                    ("DELETE", "/v1/clients/beta/r"),
                    ("POST", "/v1/clients/beta/r/rpc", CALL),
                    ("POST", "/v1/clients/beta/r/rpc", b"[%b,%b]" % (NOTIFICATION, CALL)),
                    ("GET", "/v1/clients?prefix=beta/"),
                    ("POST", "/v1/clients?prefix=beta/", NOTIFICATION),
                    ("POST", f"/v1/nodes/{OTHER_ID}/drain"),
                    ("POST", f"/v1/nodes/{NODE_ID}/drain"),
                )
            ]
            responses = [(response.status, response.headers, response.body) for response in received]
            if state == "here":
                expected = responses
            self.assertEqual(responses, expected, state)
            self.assert_nothing_done()

    def test_list(self):
        page = self.request("GET", "/v1/clients").json
        self.assertEqual([each["client_id"] for each in page["clients"]], ["acme/r"])
        self.assertEqual(self.registry.queries, [("clients", "", 101, None, "acme/")])
        for query, count in (
            ("prefix=acme/", 1),
            ("prefix=acme%2Fr", 1),
            ("prefix=acme/x", 0),
            ("after=a", 1),
            ("after=beta/", 0),
            (f"node={OTHER_ID}", 0),
        ):
            page = self.request("GET", f"/v1/clients?{query}").json
            self.assertEqual((len(page["clients"]), page["next"]), (count, None), query)
        for query in ("prefix=", "prefix", "prefix=acme", "prefix=beta/", "prefix=Acme/", "%70refix=beta/"):
            self.assertEqual(self.assert_forbidden(self.request("GET", f"/v1/clients?{query}"))[0], ONLY_ACME, query)

    def test_notify_prefix(self):
        for query in ("prefix=acme/", "prefix=acme%2f", "prefix=acme/r"):
            self.assertEqual(self.request("POST", f"/v1/clients?{query}", NOTIFICATION).status, 202)
        self.assertEqual([each[0] for each in self.dispatcher.prefix_notifications], ["acme/", "acme/", "acme/r"])
        for query in ("prefix=", "prefix=acme", "prefix=beta/", "prefix=a", "%70refix="):
            for body in (NOTIFICATION, CALL, b"{"):
                self.assertEqual(
                    self.assert_forbidden(self.request("POST", f"/v1/clients?{query}", body))[0], ONLY_ACME, query
                )
        self.assertEqual(len(self.dispatcher.prefix_notifications), 3)

    def test_repeated_prefix(self):
        for query in ("prefix=acme/&prefix=", "prefix=acme/&%70refix=", "prefi%78=acme/&prefix=acme/"):
            for method, body in (("GET", None), ("POST", NOTIFICATION)):
                response = self.request(method, f"/v1/clients?{query}", body)
                self.assertEqual((response.status, response.json["error"]), (400, "prefix"), query)
        self.assert_nothing_done()

    def test_invalid_percent_encoding(self):
        for query in ("prefix=acme/%", "prefix=acme/%2", "prefix=acme%252F", "prefix=acme/%00"):
            for method, body in (("GET", None), ("POST", NOTIFICATION)):
                self.assertEqual(self.request(method, f"/v1/clients?{query}", body).status, 400, query)
        self.assert_nothing_done()

    def test_requests_about_all_clients(self):
        self.assertEqual(self.assert_forbidden(self.request("GET", "/metrics"))[0], ONLY_ACME)
        self.assertEqual(self.request("GET", "/v1/nodes").status, 200)
        for each in UNLIMITED_REQUESTS:
            self.assert_forbidden(self.request(*each))
        self.assertEqual(self.endpoint.node.drain_count, 0)

    def test_health_checks_are_public(self):
        for path in ("/healthz", "/readyz"):
            self.assertEqual((self.request("GET", path).status, self.endpoint.request("GET", path).status), (200, 200))

    # Attempts to reach other clients.

    def test_similar_paths(self):
        for raw in (
            "beta%2Fr",
            "beta%2fr",
            "%62eta/r",
            "beta/acme/r",
            "acme",
            "ACME/r",
            "acme%3Ar",
        ):
            for method in ("GET", "DELETE"):
                self.assertEqual(self.assert_forbidden(self.request(method, f"/v1/clients/{raw}"))[0], ONLY_ACME, raw)
            self.assertEqual(
                self.assert_forbidden(self.request("POST", f"/v1/clients/{raw}/rpc", CALL))[0], ONLY_ACME, raw
            )
        for target in ("//v1/clients/beta/r", "/v1//clients/beta/r", "/v1/./clients/beta/r", "/V1/clients/beta/r"):
            self.assertEqual(self.request("GET", target).status, 404, target)
        self.assert_nothing_done()

    def test_dot_segments_are_not_resolved(self):
        for raw in (
            *("acme/../beta/r", "acme/%2e%2e/beta/r", "acme//beta/r", "acme/./r", "/acme/r", "//acme/r", "%2Facme/r"),
            *("./acme/r", "../v1/clients/acme/r", "beta/../acme/r"),
        ):
            self.assertEqual(self.request("GET", f"/v1/clients/{raw}").status, 400, raw)
            self.assertEqual(self.request("DELETE", f"/v1/clients/{raw}").status, 400, raw)
            self.assertEqual(self.request("POST", f"/v1/clients/{raw}/rpc", CALL).status, 400, raw)
        self.assert_nothing_done()

    def test_client_id_in_the_query(self):
        for target in ("?client_id=beta/r", "?client_id=beta%2Fr", "?client_id=beta//r"):
            if "//" not in target:
                self.assert_forbidden(self.request("GET", "/v1/client" + target))
                self.assert_forbidden(self.request("POST", "/v1/rpc" + target, CALL))
            self.assert_forbidden(self.request("DELETE", "/v1/client" + target))
        self.assert_nothing_done()
        self.assertEqual(self.request("DELETE", "/v1/client?client_id=acme/r").status, 204)
        self.limit("acme/", ("call", "read"))
        self.assert_forbidden(self.request("DELETE", "/v1/client?client_id=acme/r"))
        self.assert_nothing_done()

    def test_invalid_ids(self):
        for raw in ("acme%252Fr", "acme/%", "acme/%00", "acme/r%0d%0a", "acme/%ff", "acme/\xe9", ".."):
            self.assertEqual(self.request("GET", f"/v1/clients/{raw}").status, 400, raw)
            self.assertEqual(self.request("POST", f"/v1/clients/{raw}/rpc", CALL).status, 400, raw)
        self.assert_nothing_done()

    def test_headers_do_not_change_the_request(self):
        headers = (
            ("X-HTTP-Method-Override", "DELETE"),
            ("X-Method-Override", "DELETE"),
            ("X-Original-URL", "/v1/clients/acme/r"),
            ("X-Rewrite-URL", "/v1/clients/acme/r"),
            ("X-Forwarded-Prefix", "acme/"),
            ("Wsgateway-Client", "acme/r"),
        )
        self.assertEqual(self.assert_forbidden(self.request("GET", "/v1/clients/beta/r", None, headers))[0], ONLY_ACME)
        self.assertEqual(self.request("GET", "/v1/clients/acme/r", None, headers).status, 200)
        self.assertEqual(self.request("POST", "/v1/clients/acme/r", b"_method=DELETE", headers).status, 405)
        self.assertEqual(self.sessions.closed, [])

    def test_body_does_not_choose_the_client(self):
        body = b'{"jsonrpc":"2.0","id":1,"method":"client.call","client":"beta/r","params":{"client":"beta/r"}}'
        self.request("POST", "/v1/clients/acme/r/rpc?client=beta/r", body)
        self.assertEqual([each[0] for each in self.dispatcher.calls], ["acme/r"])

    def test_ids_of_every_type(self):
        for id in (b"null", b"1", b"1.5e3", b'""', b'"acme/"', b"true", b"[1]", b'{"a":1}'):
            response = self.request("POST", "/v1/clients/beta/r/rpc", b'{"jsonrpc":"2.0","id":%b,"method":"m"}' % id)
            self.assertIn(response.json["error"]["code"], (-32008, -32600), id)
        self.assert_nothing_done()

    def test_batch_of_a_thousand_messages(self):
        body = (
            b"["
            + b",".join(
                [CALL, NOTIFICATION, *[CALL, b'{"jsonrpc":"2.0","id":1,"result":2}', NOTIFICATION] * 331, *[b"7"] * 5]
            )
            + b"]"
        )
        response = self.request("POST", "/v1/clients/beta/r/rpc", body)
        codes = [each["error"]["code"] for each in response.json]
        self.assertEqual((codes.count(-32008), codes.count(-32600), len(codes)), (332, 336, 668))
        response = self.request("POST", "/v1/clients/beta/r/rpc", b"[" + b",".join([NOTIFICATION] * 1000) + b"]")
        self.assertEqual(self.assert_forbidden(response), (ONLY_ACME, "beta/r"))
        self.assert_nothing_done()

    def test_too_large(self):
        response = self.request("POST", "/v1/clients/beta/r/rpc", None, [("Content-Length", "9999999")])
        self.assertEqual((response.status, response.json["error"]["data"]["client"]), (413, "beta/r"))
        self.assert_nothing_done()

    @given(st.text("acmebt/.%2F5e?&=#prix;+", max_size=24), st.sampled_from(["GET", "HEAD", "DELETE", "POST"]))
    @settings(max_examples=400, deadline=None)
    def test_nothing_reaches_another_client(self, text, method):
        self.limit()
        for target in (f"/v1/clients/{text}", f"/v1/clients/{text}/rpc", f"/v1/clients?prefix={text}"):
            self.request(method, target, NOTIFICATION if method == "POST" else None)
        touched = [
            each[0]
            for each in (*self.dispatcher.notifications, *self.dispatcher.prefix_notifications, *self.sessions.closed)
        ]
        touched += [each[-1] for each in self.registry.queries]
        for client_id in touched:
            self.assertTrue(client_id.startswith("acme/"), (client_id, text))


class LiveTests(GrantTestCase):
    """A token that is limited or revoked while a connection is kept alive."""

    def setUp(self):
        self.limit("")
        self.connection = self.endpoint.connect()

    def get(self, client_id="beta/r"):
        self.connection.send(request("GET", f"/v1/clients/{client_id}", headers=bearer()))
        (response,) = self.connection.responses()
        return response

    def test_next_request_is_limited(self):
        self.assertEqual(self.get().status, 200)
        self.grant.set_limits("acme/", None)
        self.assertEqual(self.assert_forbidden(self.get())[0], ONLY_ACME)
        self.assertEqual(self.get("acme/r").status, 200)

    def test_request_in_progress_is_limited(self):
        data = request("POST", "/v1/clients/beta/r/rpc", CALL, bearer())
        self.connection.send(data[:-1])
        self.grant.revoke()
        self.connection.send(data[-1:])
        (response,) = self.connection.responses()
        self.assertEqual(self.assert_forbidden(response), ("this token was withdrawn", "beta/r"))
        self.assert_nothing_done()

    def test_each_request_is_limited(self):
        for each in (*ALL_REQUESTS, *UNLIMITED_REQUESTS):
            data = request(*each, bearer())
            connection = self.endpoint.connect()
            self.grant.set_limits("", None)
            connection.send(data)
            heads = each[0] == "HEAD"
            self.assertLess(connection.responses(heads=heads)[0].status, 300, each)
            self.grant.revoke()
            connection.send(data)
            self.assertEqual(connection.responses(heads=heads)[0].status, 403, each)
            self.sessions.add("acme/r")

    def test_call_in_flight_is_completed(self):
        self.dispatcher.results.clear()
        self.connection.send(request("POST", "/v1/clients/beta/r/rpc", CALL, bearer()))
        self.grant.revoke()
        self.dispatcher.pending[0].callback(Reply(b"[2]", None))
        (response,) = self.connection.responses()
        self.assertEqual(msgspec.json.decode(response.body)["result"], [2])
