"""Tests of gateway.api.router."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import TestCase

from gateway.rpc.pending import Reply
from tests.builders.api_case import any_json, any_message, segment
from tests.builders.endpoint import EndpointHarness
from tests.fakes.api import NODE_ID, OTHER_ID


class RoutingTableTests(TestCase):
    """Paths and methods."""

    def setUp(self):
        self.endpoint = EndpointHarness()

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
            response = self.endpoint.request("GET", path)
            self.assertEqual((response.status, response.json["error"]), (404, "path"), path)

    def test_wrong_methods(self):
        for method, path, allowed in (
            ("POST", "/healthz", {"GET", "HEAD"}),
            ("DELETE", "/v1/clients", {"GET", "HEAD", "POST"}),
            ("POST", "/v1/clients/x", {"GET", "HEAD", "DELETE"}),
            ("PUT", "/v1/clients/x/rpc", {"GET", "HEAD", "DELETE", "POST"}),
            ("POST", "/v1/client?client_id=x", {"GET", "HEAD", "DELETE"}),
            ("GET", "/v1/rpc?client_id=x", {"POST"}),
            ("DELETE", "/v1/rpc?client_id=x", {"POST"}),
            ("GET", f"/v1/nodes/{NODE_ID}/drain", {"POST"}),
            ("OPTIONS", "/v1/nodes", {"GET", "HEAD"}),
            ("get", "/healthz", {"GET", "HEAD"}),
        ):
            response = self.endpoint.request(method, path)
            self.assertEqual((response.status, response.json["error"]), (405, "method"))
            self.assertEqual(set(response.headers["allow"].split(", ")), allowed)

    def test_websocket_path_without_an_upgrade(self):
        response = self.endpoint.request("GET", "/v1/backend")
        self.assertEqual((response.status, response.headers["upgrade"]), (426, "websocket"))
        self.assertEqual(response.phrase, "Upgrade Required")

    def test_client_id_ends_in_rpc(self):
        self.endpoint.sessions.add("a/rpc")
        self.assertEqual(self.endpoint.request("GET", "/v1/clients/a/rpc").json["client_id"], "a/rpc")
        self.assertEqual(self.endpoint.request("DELETE", "/v1/clients/a/rpc").status, 204)

    def test_path_for_calls_is_not_the_client(self):
        """A client that is connected is not "not connected"."""
        for client_id in ("agent-7", "a" * 128):
            self.endpoint.sessions.add(client_id)
            for method in ("GET", "HEAD", "DELETE"):
                response = self.endpoint.request(method, f"/v1/clients/{client_id}/rpc")
                self.assertEqual((response.status, response.headers["allow"]), (405, "POST"), method)
                if method != "HEAD":
                    self.assertEqual(response.json["error"], "method")
                    self.assertIn(f"the client itself is at '/v1/clients/{client_id[:40]}", response.json["message"])
        self.assertEqual(len(self.endpoint.sessions.clients), 2)

    def test_slash_at_the_end(self):
        self.endpoint.sessions.add("agent-7")
        for method, path, right in (
            ("GET", "/v1/clients/agent-7/", "/v1/clients/agent-7"),
            ("DELETE", "/v1/clients/agent-7//", "/v1/clients/agent-7"),
            ("POST", "/v1/clients/agent-7/rpc/", "/v1/clients/agent-7/rpc"),
        ):
            response = self.endpoint.request(method, path)
            self.assertEqual((response.status, response.json["error"]), (404, "path"), path)
            self.assertEqual(response.json["message"], f"a path does not end in /; use '{right}'")
        self.assertEqual(list(self.endpoint.sessions.clients), ["agent-7"])

    def test_head(self):
        self.endpoint.sessions.add("x")
        head = self.endpoint.request("HEAD", "/v1/clients/x")
        whole = self.endpoint.request("GET", "/v1/clients/x")
        self.assertEqual((head.status, head.body), (200, b""))
        self.assertEqual(head.headers, whole.headers)

    def test_registry_unavailable(self):
        self.endpoint.registry.unavailable = True
        for method, target in (
            ("GET", "/v1/clients/x"),
            ("DELETE", "/v1/clients/x"),
            ("GET", "/v1/clients"),
            ("GET", "/v1/nodes"),
            ("POST", f"/v1/nodes/{OTHER_ID}/drain"),
        ):
            response = self.endpoint.request(method, target)
            self.assertEqual((response.status, response.json["error"]), (503, "registry"), target)


class PropertyTests(TestCase):
    """Every request gets a well-formed response."""

    @given(
        st.sampled_from(["GET", "POST", "DELETE", "HEAD", "PATCH"]),
        st.sampled_from(["/v1/clients/", "/v1/clients", "/v1/rpc", "/v1/client", "/v1/nodes/", "/v1/", "/"]) | segment,
        segment,
        st.sampled_from(["", "/rpc", "/drain", "/"]),
        st.sampled_from(["", "?", "?timeout=", "?limit=", "?after=", "?prefix=", "?node=", "?client_id="]),
        segment,
        st.binary(max_size=30)
        | any_json.map(msgspec.json.encode)
        | st.lists(any_message, max_size=3).map(msgspec.json.encode),
    )
    @settings(max_examples=300, deadline=None)
    def test_never_a_500(self, method, start, middle, end, query, value, body):
        endpoint = EndpointHarness()
        endpoint.dispatcher.results.extend([Reply(b"1", None)] * 5)
        target = (start + middle + end + query + value) or "/"
        response = endpoint.request(method, target, body)
        self.assertNotEqual(response.status, 500)
        if method == "HEAD" or response.status in (202, 204):
            return
        if response.status >= 400:
            self.assertTrue(response.json["error"])
