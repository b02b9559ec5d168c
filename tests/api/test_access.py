"""Tests of gateway.api.access, over HTTP and WebSocket: neither backends' tokens nor peers' credentials replace the other."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import TestCase

from gateway.api.access import AccessPolicy
from gateway.auth.backend_tokens import NO_GRANT, UNLIMITED, BackendTokens
from gateway.cluster.auth import PeerAuth
from gateway.protocol.errors import RequestRefusedError
from tests.builders.endpoint import EndpointConnection, EndpointHarness
from tests.builders.http import UPGRADE, request, responses
from tests.fakes.api import NODE_ID, OTHER_ID
from tests.fakes.cluster import FakeRebalancer

NOTIFICATION = b'{"jsonrpc":"2.0","method":"m"}'


def bearer(token):
    return (("Authorization", f"Bearer {token}"),)


class AccessPolicyTests(TestCase):
    def assert_refused(self, endpoint, method, target, body=None, headers=()):
        """Return the status and word of a refused request, or ``None``."""
        connection = endpoint.connect()
        connection.send(request(method, target, body, headers))
        data = connection.transport.value()
        if data.startswith(b"HTTP/1.1 101 "):
            return None
        (response,) = responses(data)
        if response.status < 400:
            return None
        return response.status, response.json["error"]

    def over_http_and_websocket(self, endpoint, headers=()):
        """Assert the same result over HTTP and WebSocket, and return it."""
        over_http = self.assert_refused(endpoint, "GET", "/v1/nodes", headers=headers)
        over_websocket = self.assert_refused(endpoint, "GET", "/v1/backend", headers=(*UPGRADE, *headers))
        self.assertEqual(over_http, over_websocket)
        return over_http

    def test_origin(self):
        for endpoint in (EndpointHarness(), EndpointHarness(authenticate_backend=lambda token: UNLIMITED)):
            for origin in ("https://evil.example", "null", "http://localhost:8081"):
                self.assertEqual(
                    self.over_http_and_websocket(endpoint, (("Origin", origin), *bearer("t"))), (403, "origin")
                )
            self.assertEqual(
                self.assert_refused(endpoint, "GET", "/healthz", headers=[("Origin", "null")]), (403, "origin")
            )

    def test_order_of_the_checks(self):
        endpoint = EndpointHarness()
        headers = (("Origin", "null"), ("Host", "evil.example"), ("Content-Type", "text/plain"))
        self.assertEqual(self.assert_refused(endpoint, "POST", "/x", NOTIFICATION, headers), (403, "origin"))
        self.assertEqual(self.assert_refused(endpoint, "POST", "/x", NOTIFICATION, headers[1:]), (403, "host"))
        self.assertEqual(self.assert_refused(endpoint, "POST", "/x", NOTIFICATION, headers[2:]), (415, "content_type"))
        self.assertEqual(self.assert_refused(endpoint, "POST", "/x", NOTIFICATION), (404, "path"))

    def test_own_hosts(self):
        endpoint = EndpointHarness(public_url="ws://gw.example:8080", peer_url="ws://[fd00::0:1]:8081/prefix")
        for host in (
            "localhost",
            "LocalHost:1",
            "localhost:",
            "127.0.0.1",
            "127.1.2.3:8081",
            "[::1]",
            "[0:0::1]:99",
            "gw.example",
            "GW.example:4",
            "[fd00::1]:5",
        ):
            self.assertIsNone(self.over_http_and_websocket(endpoint, (("Host", host),)), host)

    def test_other_hosts(self):
        endpoint = EndpointHarness(public_url="ws://gw.example:8080")
        for host in (
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "128.0.0.1",
            "127.1",
            "0.0.0.0",
            "[::]",
            "[::2]",
            "::1",
            "gw.example.evil",
            "localhost:x",
            "localhost:123456",
            "localhost@evil",
            "fd00::1",
        ):
            self.assertEqual(self.over_http_and_websocket(endpoint, (("Host", host),)), (403, "host"), host)
        self.assertEqual(self.assert_refused(endpoint, "GET", "/healthz", headers=[("Host", "evil")]), (403, "host"))

    def test_repeated_host(self):
        headers = (("Host", "localhost"), ("Host", "localhost"))
        self.assertEqual(self.assert_refused(EndpointHarness(), "GET", "/healthz", headers=headers), (403, "host"))

    def test_http_1_0_without_host(self):
        connection = EndpointHarness().connect()
        connection.send(b"GET /healthz HTTP/1.0\r\n\r\n")
        self.assertEqual(responses(connection.transport.value().replace(b"HTTP/1.0", b"HTTP/1.1"))[0].status, 200)

    def test_any_host_with_a_token(self):
        endpoint = EndpointHarness(authenticate_backend=lambda token: UNLIMITED)
        self.assertIsNone(self.over_http_and_websocket(endpoint, (("Host", "any.example"), *bearer("t"))))

    def test_tokens(self):
        tokens = []
        endpoint = EndpointHarness(
            authenticate_backend=lambda token: tokens.append(token) or {"good/+~=": UNLIMITED}.get(token)
        )
        self.assertIsNone(self.over_http_and_websocket(endpoint, bearer("good/+~=")))
        self.assertIsNone(self.over_http_and_websocket(endpoint, (("authorization", "bEARER  good/+~="),)))
        self.assertEqual(self.over_http_and_websocket(endpoint, bearer("bad")), (401, "token"))
        self.assertEqual(set(tokens), {"good/+~=", "bad"})
        for headers in (
            (),
            (("Authorization", "good"),),
            (("Authorization", "Basic good"),),
            (("Authorization", "Bearer"),),
            (("Authorization", "Bearer a b"),),
            (("Authorization", "Bearer \xe9"),),
        ):
            self.assertEqual(self.assert_refused(endpoint, "GET", "/v1/nodes", headers=headers), (401, "token"))
        self.assertEqual(
            self.assert_refused(endpoint, "GET", "/v1/nodes", headers=bearer("good") + bearer("good")), (401, "token")
        )

    def test_token_refusal_names_the_scheme(self):
        endpoint = EndpointHarness(authenticate_backend=lambda token: None)
        response = endpoint.request("GET", "/metrics")
        self.assertEqual(response.headers["www-authenticate"], "Bearer")
        self.assertIn("Authorization: Bearer", response.json["message"])
        connection = endpoint.connect()
        connection.send(request("GET", "/v1/backend", headers=UPGRADE))
        self.assertIn(b"\r\nWWW-Authenticate: Bearer\r\n", connection.transport.value())

    def test_health_needs_no_token(self):
        endpoint = EndpointHarness(authenticate_backend=lambda token: None)
        for target in ("/healthz", "/readyz", "/healthz?x=1"):
            self.assertEqual(endpoint.request("GET", target).status, 200)
        for target in ("/healthz/", "/metrics", "/%68ealthz", "/nothing"):
            self.assertEqual(endpoint.request("GET", target).status, 401)

    def test_public_paths_grant_nothing(self):
        guard = AccessPolicy.make(authenticate_backend={"t": UNLIMITED}.get, urls=[])
        for headers in ({}, {"Authorization": ["Bearer t"]}):
            self.assertIs(guard.check("GET", "/readyz", lambda name, of=headers: of.get(name, [])), NO_GRANT)
        self.assertIs(guard.check("GET", "/v1/nodes", lambda name: headers.get(name, [])), UNLIMITED)

    def test_content_types(self):
        endpoint = EndpointHarness()
        for given_type in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "application/jsonp",
            "",
            "application/json, x",
        ):
            refused = self.assert_refused(
                endpoint, "POST", "/v1/clients/x/rpc", NOTIFICATION, [("Content-Type", given_type)]
            )
            self.assertEqual(refused, (415, "content_type"))
        twice = [("Content-Type", "application/json"), ("Content-Type", "application/json")]
        self.assertEqual(
            self.assert_refused(endpoint, "POST", "/v1/clients/x/rpc", NOTIFICATION, twice), (415, "content_type")
        )
        for given_type in ("application/json", "application/json;charset=utf-8", " Application/JSON ; x"):
            refused = self.assert_refused(
                endpoint, "POST", "/v1/clients/x/rpc", NOTIFICATION, [("Content-Type", given_type)]
            )
            self.assertIsNone(refused)
        self.assertEqual(len(endpoint.dispatcher.notifications), 3)

    def test_refusals_are_counted(self):
        endpoint = EndpointHarness()
        self.over_http_and_websocket(endpoint, [("Origin", "null")])
        self.assertEqual(endpoint.metrics.api_requests, {"403": 2})

    @given(st.text(max_size=30) | st.sampled_from(["localhost", "127.0.0.1", "[::1]"]), st.text(max_size=5))
    @settings(max_examples=300, deadline=None)
    def test_arbitrary_host(self, host, rest):
        guard = AccessPolicy.make(authenticate_backend=None, urls=["ws://gw.example"])
        try:
            grant = guard.check("GET", "/", lambda name: [host + rest] if name == "Host" else [])
        except RequestRefusedError as refused:
            self.assertEqual(refused.status, 403)
        else:
            self.assertIs(grant, UNLIMITED)

    @given(st.text(max_size=30))
    @settings(deadline=None)
    def test_arbitrary_token(self, text):
        guard = AccessPolicy.make(authenticate_backend=lambda token: None, urls=[])
        with self.assertRaises(RequestRefusedError) as caught:
            guard.check("GET", "/", lambda name: [text] if name == "Authorization" else [])
        refused = caught.exception
        self.assertEqual(refused.status, 401)
        self.assertNotIn(text, [refused.message])
        msgspec.json.encode(refused.message)


BEARER = ("Authorization", "Bearer t0ken")
#: requests of backends and operators
TARGETS = (
    ("GET", "/v1/clients"),
    ("GET", "/v1/clients/x"),
    ("DELETE", "/v1/clients/x"),
    ("POST", "/v1/clients/x/rpc"),
    ("POST", "/v1/clients?prefix="),
    ("GET", "/v1/nodes"),
    ("POST", f"/v1/nodes/{NODE_ID}/drain"),
    ("POST", "/v1/rebalance"),
    ("GET", "/metrics"),
    ("HEAD", "/metrics"),
    ("GET", "/v1/backend"),
)


class CredentialTests(TestCase):
    def setUp(self):
        path = self.mktemp()
        with open(path, "w") as file:
            file.write("t0ken\nWsgateway-Peer\n")
        here = PeerAuth(NODE_ID, lambda: b"secret" * 4)
        self.other = PeerAuth(OTHER_ID, lambda: b"secret" * 4)
        self.endpoint = EndpointHarness(
            authenticate_backend=BackendTokens(path).grant, authenticate_peer=here.verify, rebalancer=FakeRebalancer()
        )
        self.endpoint.sessions.add("x")

    def sign(self, method="GET", target="/v1/backend"):
        return self.other.sign(NODE_ID, method, target)

    def request(self, headers, method="GET", target="/v1/backend"):
        """Return the status and word of the response."""
        connection = EndpointConnection(self.endpoint)
        upgrade = UPGRADE if target == "/v1/backend" else ()
        connection.send(request(method, target, b"" if method == "POST" else None, (*upgrade, *headers)))
        data = connection.transport.value()
        if data.startswith(b"HTTP/1.1 101 "):
            return 101, "peer" if connection.protocol.is_peer else "backend"
        (response,) = responses(data, heads=method == "HEAD")
        return response.status, response.json["error"] if response.body else ""

    def test_token_opens_a_backend_and_credentials_a_peer_connection(self):
        self.assertEqual(self.request([BEARER]), (101, "backend"))
        self.assertEqual(self.request([("Authorization", self.sign())]), (101, "peer"))
        self.assertEqual(self.request([("Authorization", "Bearer Wsgateway-Peer")]), (101, "backend"))

    def test_credentials_are_not_a_token(self):
        for method, target in TARGETS:
            credential = self.sign(method, target).partition(" ")[2]
            status, word = self.request([("Authorization", f"Bearer {credential}")], method, target)
            self.assertEqual((status, word or "token"), (401, "token"), target)
            status, word = self.request([("Authorization", f"Bearer {self.sign(method, target)}")], method, target)
            self.assertEqual((status, word or "token"), (401, "token"), target)

    def test_token_is_not_credentials(self):
        for scheme in ("Wsgateway-Peer", "wsgateway-peer", "WSGATEWAY-PEER"):
            for method, target in TARGETS:
                status, word = self.request([("Authorization", f"{scheme} t0ken")], method, target)
                self.assertEqual((status, word or "peer"), (401, "peer"), target)

    def test_credentials_do_not_authorize_backend_requests(self):
        """Even if a peer signed them for that very request."""
        for method, target in TARGETS[:-1]:
            good = self.sign(method, target)
            for credentials in (good, good.lower().partition(" ")[0] + " " + good.partition(" ")[2], good.upper()):
                status, word = self.request([("Authorization", credentials)], method, target)
                self.assertEqual((status, word or "peer"), (401, "peer"), target)
        self.assertEqual((self.endpoint.node.drain_count, self.endpoint.sessions.closed), (0, []))
        self.assertEqual((self.endpoint.dispatcher.calls, self.endpoint.dispatcher.prefix_notifications), ([], []))

    def test_token_and_credentials_in_two_headers(self):
        for method, target in TARGETS:
            both = [BEARER, ("authorization", self.sign(method, target))]
            for headers in (both, both[::-1]):
                status, word = self.request(headers, method, target)
                expected = (400, "header") if target == "/v1/backend" else (401, "peer")
                self.assertEqual((status, word or expected[1]), expected, target)

    def test_token_and_credentials_in_one_header(self):
        for first, last in ((BEARER[1], self.sign()), (self.sign(), BEARER[1])):
            for separator in (", ", ",", "; ", " "):
                for method, target in TARGETS:
                    status, _ = self.request([("Authorization", f"{first}{separator}{last}")], method, target)
                    self.assertEqual(status, 401, target)

    def test_peers_have_their_own_methods(self):
        """A peer connection has none of the methods that receive events and calls of clients."""
        connection = EndpointConnection(self.endpoint)
        connection.send(request("GET", "/v1/backend", headers=(*UPGRADE, ("Authorization", self.sign()))))
        methods = connection.protocol._protocol._methods._table
        self.assertLessEqual({"client.call", "client.notify", "peer.drain"}, set(methods))
        self.assertEqual({"client.get", "events.subscribe", "upstream.serve"} & set(methods), set())
