"""Backends' tokens and nodes' credentials: neither is good for what the other is."""

from __future__ import annotations

from twisted.trial.unittest import TestCase

from gateway.auth.backend_tokens import BackendTokens
from gateway.cluster.auth import PeerAuth
from tests.api.fakes import NODE_ID, OTHER_ID, UPGRADE, EndpointConnection, EndpointHarness, request, responses
from tests.cluster.fakes import FakeRebalancer

BEARER = ("Authorization", "Bearer t0ken")
#: whatever a backend may ask, a limited one too, and what an operator may
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
        """The status and the word with which a request is answered."""
        connection = EndpointConnection(self.endpoint)
        upgrade = UPGRADE if target == "/v1/backend" else ()
        connection.send(request(method, target, b"" if method == "POST" else None, (*upgrade, *headers)))
        data = connection.transport.value()
        if data.startswith(b"HTTP/1.1 101 "):
            return 101, "link" if connection.protocol.is_peer else "backend"
        (response,) = responses(data, heads=method == "HEAD")
        return response.status, response.json["error"] if response.body else ""

    def test_each_is_good_for_its_own(self):
        self.assertEqual(self.request([BEARER]), (101, "backend"))
        self.assertEqual(self.request([("Authorization", self.sign())]), (101, "link"))
        self.assertEqual(self.request([("Authorization", "Bearer Wsgateway-Peer")]), (101, "backend"))

    def test_credentials_as_a_token(self):
        for method, target in TARGETS:
            credential = self.sign(method, target).partition(" ")[2]
            status, word = self.request([("Authorization", f"Bearer {credential}")], method, target)
            self.assertEqual((status, word or "token"), (401, "token"), target)
            status, word = self.request([("Authorization", f"Bearer {self.sign(method, target)}")], method, target)
            self.assertEqual((status, word or "token"), (401, "token"), target)

    def test_a_token_as_credentials(self):
        for scheme in ("Wsgateway-Peer", "wsgateway-peer", "WSGATEWAY-PEER"):
            for method, target in TARGETS:
                status, word = self.request([("Authorization", f"{scheme} t0ken")], method, target)
                self.assertEqual((status, word or "peer"), (401, "peer"), target)

    def test_credentials_for_what_a_backend_asks(self):
        """Signed by a node of the fleet for that very request."""
        for method, target in TARGETS[:-1]:
            good = self.sign(method, target)
            for credentials in (good, good.lower().partition(" ")[0] + " " + good.partition(" ")[2], good.upper()):
                status, word = self.request([("Authorization", credentials)], method, target)
                self.assertEqual((status, word or "peer"), (401, "peer"), target)
        self.assertEqual((self.endpoint.node.drain_count, self.endpoint.sessions.closed), (0, []))
        self.assertEqual((self.endpoint.dispatcher.calls, self.endpoint.dispatcher.prefix_notifications), ([], []))

    def test_both(self):
        for method, target in TARGETS:
            both = [BEARER, ("authorization", self.sign(method, target))]
            for headers in (both, both[::-1]):
                status, word = self.request(headers, method, target)
                expected = (400, "header") if target == "/v1/backend" else (401, "peer")
                self.assertEqual((status, word or expected[1]), expected, target)

    def test_both_in_one_header(self):
        for first, last in ((BEARER[1], self.sign()), (self.sign(), BEARER[1])):
            for separator in (", ", ",", "; ", " "):
                for method, target in TARGETS:
                    status, _ = self.request([("Authorization", f"{first}{separator}{last}")], method, target)
                    self.assertEqual(status, 401, target)

    def test_a_node_is_not_limited_by_what_tokens_are(self):
        """Its link has methods of its own, and none of those that hear of clients."""
        connection = EndpointConnection(self.endpoint)
        connection.send(request("GET", "/v1/backend", headers=(*UPGRADE, ("Authorization", self.sign()))))
        methods = connection.protocol._protocol._methods._table
        self.assertLessEqual({"client.call", "client.notify", "peer.drain"}, set(methods))
        self.assertEqual({"client.get", "events.subscribe", "upstream.serve"} & set(methods), set())
