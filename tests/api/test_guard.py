"""Who may come in, over HTTP and over WebSocket."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import TestCase

from gateway.api.access import AccessPolicy
from gateway.auth.backend_tokens import NO_GRANT, UNLIMITED
from gateway.protocol.handshake import RequestRefusedError
from tests.api.fakes import UPGRADE, EndpointHarness, request, responses

NOTIFICATION = b'{"jsonrpc":"2.0","method":"m"}'


def bearer(token):
    return (("Authorization", f"Bearer {token}"),)


class AccessPolicyTests(TestCase):
    def assert_refused(self, endpoint, method, target, body=None, headers=()):
        """The status and word with which a request is refused, or ``None``."""
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
        """The same over HTTP and WebSocket."""
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

    def test_origin_comes_first(self):
        endpoint = EndpointHarness()
        headers = (("Origin", "null"), ("Host", "evil.example"), ("Content-Type", "text/plain"))
        self.assertEqual(self.assert_refused(endpoint, "POST", "/x", NOTIFICATION, headers), (403, "origin"))
        self.assertEqual(self.assert_refused(endpoint, "POST", "/x", NOTIFICATION, headers[1:]), (403, "host"))
        self.assertEqual(self.assert_refused(endpoint, "POST", "/x", NOTIFICATION, headers[2:]), (415, "content_type"))
        self.assertEqual(self.assert_refused(endpoint, "POST", "/x", NOTIFICATION), (404, "path"))

    def test_hosts_that_are_here(self):
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

    def test_hosts_that_are_elsewhere(self):
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

    def test_two_hosts(self):
        headers = (("Host", "localhost"), ("Host", "localhost"))
        self.assertEqual(self.assert_refused(EndpointHarness(), "GET", "/healthz", headers=headers), (403, "host"))

    def test_no_host_is_no_browser(self):
        connection = EndpointHarness().connect()
        connection.send(b"GET /healthz HTTP/1.0\r\n\r\n")
        self.assertEqual(responses(connection.transport.value().replace(b"HTTP/1.0", b"HTTP/1.1"))[0].status, 200)

    def test_the_host_does_not_matter_with_tokens(self):
        endpoint = EndpointHarness(authenticate_backend=lambda token: UNLIMITED)
        self.assertIsNone(self.over_http_and_websocket(endpoint, (("Host", "any.example"), *bearer("t"))))

    def test_tokens(self):
        asked = []
        endpoint = EndpointHarness(
            authenticate_backend=lambda token: asked.append(token) or {"good/+~=": UNLIMITED}.get(token)
        )
        self.assertIsNone(self.over_http_and_websocket(endpoint, bearer("good/+~=")))
        self.assertIsNone(self.over_http_and_websocket(endpoint, (("authorization", "bEARER  good/+~="),)))
        self.assertEqual(self.over_http_and_websocket(endpoint, bearer("bad")), (401, "token"))
        self.assertEqual(set(asked), {"good/+~=", "bad"})
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

    def test_a_refused_token_says_how(self):
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

    def test_what_needs_no_token_grants_nothing(self):
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
    def test_no_host_is_too_strange(self, host, rest):
        guard = AccessPolicy.make(authenticate_backend=None, urls=["ws://gw.example"])
        try:
            grant = guard.check("GET", "/", lambda name: [host + rest] if name == "Host" else [])
        except RequestRefusedError as refused:
            self.assertEqual(refused.status, 403)
        else:
            self.assertIs(grant, UNLIMITED)

    @given(st.text(max_size=30))
    @settings(deadline=None)
    def test_no_token_is_too_strange(self, text):
        guard = AccessPolicy.make(authenticate_backend=lambda token: None, urls=[])
        with self.assertRaises(RequestRefusedError) as caught:
            guard.check("GET", "/", lambda name: [text] if name == "Authorization" else [])
        refused = caught.exception
        self.assertEqual(refused.status, 401)
        self.assertNotIn(text, [refused.message])
        msgspec.json.encode(refused.message)
