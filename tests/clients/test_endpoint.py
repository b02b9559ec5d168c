"""Tests of gateway.clients.endpoint: identity, limits, PROXY protocol and relayed clients."""

from __future__ import annotations

import base64
import hashlib
import socket
from typing import Any
from urllib.parse import quote

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.interfaces import ISSLTransport
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import directlyProvides, providedBy

from gateway.auth.authenticator import AuthenticatorChain
from gateway.auth.interface import TICKET_METHODS, AuthMethod, Identity
from gateway.auth.tickets import Tickets
from gateway.clients.endpoint import MAX_ADDRESS, RelayedClientFactory, parse_client_id, parse_relay_query, parse_ticket
from gateway.net.proxy_protocol import ProxyProtocolFactory
from gateway.protocol.client_id import is_client_id
from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import parse_request
from gateway.websocket.handshake_limiter import HEALTH_CHECKS_PER_SECOND, MAX_POSTPONED_REFUSALS
from tests.builders.client_ids import client_ids
from tests.builders.frames import build_request, text_frame
from tests.builders.sockets import read_available
from tests.fakes.clients import FakeClient, FakeNode, FakeTransport
from tests.fakes.parked import ParkingNode


class ClientIdTest(SynchronousTestCase):
    """parse_client_id()"""

    def test_given(self) -> None:
        for query, client_id in (
            ("client_id=a", "a"),
            ("x=1&client_id=a&y", "a"),
            ("client_id=A-z0.9_:@/+=-", "A-z0.9_:@/+=-"),
            ("client_id=a%2Fb%2b%3D", "a/b+="),
            ("client%5Fid=a", "a"),
            ("client_id=" + "x" * 128, "x" * 128),
            ("client_id=...", "..."),
            ("client_id=spiffe:%2F%2Facme%2Frobot%2F7", "spiffe://acme/robot/7"),
            ("other=%zz&client_id=a", "a"),
            ("client_id=a&token=t&access_token=t", "a"),
        ):
            self.assertEqual(parse_client_id(query), client_id)

    def test_not_given(self) -> None:
        for query in ("", "client_ids=a", "Client_id=a", "x=client_id", "client_id;=a", "&&"):
            self.assertIsNone(parse_client_id(query))

    def test_refused(self) -> None:
        for query in (
            "client_id",
            "client_id=",
            "client_id=.",
            "client_id=..",
            "client_id=%2e%2E",
            "client_id=a//b",
            "client_id=a%2F..%2Fb",
            "client_id=a/./b",
            "client_id=a/",
            "client_id=%2fa",
            "client_id=spiffe:/acme/robot/7",
            "client_id=" + "x" * 129,
            "client_id=a b",
            "client_id=a%20b",
            "client_id=a%",
            "client_id=a%4",
            "client_id=a%zz",
            "client_id=%C3%A9",
            "client_id=a%00",
            "client_id=a%0a",
            "client_id=a;b",
            "client_id=a&client_id=a",
            "client_id=a&client%5fid=b",
            "client_id=&client_id=a",
        ):
            refusal = self.assertRaises(RequestRefusedError, parse_client_id, query)
            self.assertEqual((refusal.status, refusal.reason), (400, "client_id"), query)
            self.assertTrue(refusal.message.isascii())

    @settings(deadline=None, max_examples=200)
    @given(st.text(max_size=20), st.sampled_from(["", "/", "/+:@=", "/+:@=._-"]))
    @example("a+b", "+")
    def test_percent_encoding(self, client_id: str, safe: str) -> None:
        """All encodings are decoded, a ``+`` as a plus; an invalid client_id is refused."""
        query = "client_id=" + quote(client_id, safe=safe)
        if is_client_id(client_id):
            self.assertEqual(parse_client_id(query), client_id)
        else:
            self.assertRaises(RequestRefusedError, parse_client_id, query)

    @settings(deadline=None, max_examples=200)
    @given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=30))
    def test_generated(self, tail: str) -> None:
        try:
            values = parse_client_id("client_id=" + tail)
        except RequestRefusedError as refusal:
            self.assertEqual(refusal.status, 400)
        else:
            assert values is not None
            self.assertTrue(is_client_id(values))


class EndpointTestCase(SynchronousTestCase):
    def token_file(self, *lines: str) -> str:
        path = self.mktemp()
        with open(path, "w") as file:
            file.write("\n".join(lines))
        return path

    def tokens(self, **clients: str) -> str:
        lines = [f"{name} {hashlib.sha256(token.encode()).hexdigest()}" for name, token in clients.items()]
        return "tokens:" + self.token_file(*lines)

    def connect(self, node: FakeNode, target: str = "/v1/connect?client_id=a", **headers: str) -> FakeClient:
        client = node.dial()
        client.send(
            build_request(target, extra=tuple((name.replace("_", "-"), value) for name, value in headers.items()))
        )
        return client

    def assert_refused(self, node: FakeNode, status: int, word: str, target: str, **headers: str) -> dict[str, str]:
        before = node.metrics.refused[word]
        got_status, got_word, got_headers = self.connect(node, target, **headers).refusal()
        self.assertEqual((got_status, got_word), (status, word))
        self.assertEqual(node.metrics.refused[word], before + 1)
        self.assertEqual(node.handler.events, [])
        return got_headers

    def assert_opens(self, node: FakeNode, client_id: str, target: str, **headers: str) -> bytes:
        head = self.connect(node, target, **headers).expect_open()
        self.assertEqual(node.handler.connection_events[-1][:2], ("connected", client_id))
        return head


class IdentityTest(EndpointTestCase):
    """Identity, token and Origin"""

    def test_none(self) -> None:
        node = FakeNode()
        self.assert_opens(node, "a", "/v1/connect?client_id=a")
        self.assertEqual(node.registry.claims[0][:2], ("a", "192.0.2.1:4711"))

    def test_none_without_client_id(self) -> None:
        node = FakeNode()
        self.assert_refused(node, 400, "client_id", "/v1/connect")
        self.assert_refused(node, 400, "client_id", "/v1/connect?client_id=a&client_id=a")
        self.assertEqual(node.registry.claims, [])

    def test_none_ignores_tokens(self) -> None:
        node = FakeNode(("none",))
        self.assert_opens(node, "a", "/v1/connect?client_id=a", Authorization="Bearer whatever")
        self.assert_opens(node, "b", "/v1/connect?client_id=b", Authorization="Basic whatever")

    def test_token_in_the_header(self) -> None:
        node = FakeNode((self.tokens(a="secret", b="other"),))
        for value in ("Bearer secret", "bearer   secret", "BEARER secret"):
            self.assert_opens(node, "a", "/v1/connect", Authorization=value)
        self.assert_opens(node, "a", "/v1/connect?client_id=a", Authorization="Bearer secret")

    def test_token_in_a_subprotocol(self) -> None:
        node = FakeNode((self.tokens(a="secret"),))
        offered = "wsgateway.jsonrpc.v1, wsgateway.bearer.secret"
        head = self.assert_opens(node, "a", "/v1/connect", Sec_WebSocket_Protocol=offered)
        self.assertIn(b"\r\nSec-WebSocket-Protocol: wsgateway.jsonrpc.v1\r\n", head)
        self.assertNotIn(b"bearer", head)

    def test_same_token_both_ways(self) -> None:
        node = FakeNode((self.tokens(a="secret"),))
        self.assert_opens(
            node, "a", "/v1/connect", Authorization="Bearer secret", Sec_WebSocket_Protocol="wsgateway.bearer.secret"
        )

    def test_token_in_base64url(self) -> None:
        """For tokens that browsers do not take as a subprotocol: ``a/b=`` is ``YS9iPQ``."""
        tokens = self.tokens(a="a/b=", b="x" * 8192, c="x" * 8193)
        node = FakeNode((tokens,))
        for offered in ("wsgateway.jsonrpc.v1, wsgateway.bearer64.YS9iPQ", "wsgateway.bearer64.YS9iPQ"):
            head = self.assert_opens(node, "a", "/v1/connect?client_id=a", Sec_WebSocket_Protocol=offered)
            self.assertNotIn(b"bearer", head)
        for length, client_id in ((8192, "b"), (8193, "")):
            offered = "wsgateway.bearer64." + base64.urlsafe_b64encode(b"x" * length).decode().rstrip("=")
            if client_id:
                self.assert_opens(node, client_id, "/v1/connect", Sec_WebSocket_Protocol=offered)
        self.assert_refused(FakeNode((tokens,)), 401, "token", "/v1/connect", Sec_WebSocket_Protocol=offered)

    def test_base64url_that_is_refused(self) -> None:
        node = FakeNode((self.tokens(a="a/b="), "none"))
        for encoded in ("YS9iPQ==", "YS9iPR", "YS9+PQ", "YS9i.PQ", "Y", "YSBi", "w6k"):
            for target in ("/v1/connect", "/v1/connect?client_id=a"):
                offered = f"wsgateway.jsonrpc.v1, wsgateway.bearer64.{encoded}"
                client = self.connect(node, target, Sec_WebSocket_Protocol=offered)
                self.assertEqual(client.refusal()[:2], (400, "header"))
                self.assertIn("the token behind wsgateway.bearer64. ", client.refusal_message)
                self.assertNotIn(f"bearer64.{encoded}", client.refusal_message)

    def test_base64url_is_the_only_credential(self) -> None:
        node = FakeNode((self.tokens(a="secret", b="other"),))
        mine = "wsgateway.bearer64.c2VjcmV0"
        for headers in (
            {"Sec_WebSocket_Protocol": mine, "Authorization": "Bearer secret"},
            {"Sec_WebSocket_Protocol": mine, "Authorization": "Bearer other"},
            {"Sec_WebSocket_Protocol": mine, "Authorization": "Basic c2VjcmV0"},
            {"Sec_WebSocket_Protocol": mine, "Authorization": ""},
            {"Sec_WebSocket_Protocol": f"{mine}, wsgateway.bearer.secret"},
            {"Sec_WebSocket_Protocol": f"wsgateway.bearer.other, {mine}"},
            {"Sec_WebSocket_Protocol": f"{mine}, wsgateway.bearer64.b3RoZXI"},
        ):
            self.assert_refused(node, 400, "header", "/v1/connect", **headers)
        self.assert_refused(node, 400, "upgrade", "/v1/connect", Sec_WebSocket_Protocol=f"{mine}, {mine}")

    def test_different_tokens(self) -> None:
        node = FakeNode((self.tokens(a="secret", b="other"),))
        for headers in (
            {"Authorization": "Bearer secret", "Sec_WebSocket_Protocol": "wsgateway.bearer.other"},
            {"Sec_WebSocket_Protocol": "wsgateway.bearer.secret, wsgateway.bearer.other"},
        ):
            self.assert_refused(node, 401, "token", "/v1/connect", **headers)

    def test_no_or_wrong_token(self) -> None:
        node = FakeNode((self.tokens(a="secret"),))
        for target, headers in (
            ("/v1/connect?client_id=a", {}),
            ("/v1/connect?client_id=a&token=secret&access_token=secret", {}),
            ("/v1/connect", {"Authorization": "Bearer wrong"}),
            ("/v1/connect", {"Authorization": "Bearer"}),
            ("/v1/connect", {"Authorization": "Bearer "}),
            ("/v1/connect", {"Authorization": "Bearer secret x"}),
            ("/v1/connect", {"Authorization": "Basic secret"}),
            ("/v1/connect", {"Authorization": "Bearersecret"}),
            ("/v1/connect", {"Authorization": "Bearer s\xe9cret"}),
            ("/v1/connect", {"Sec_WebSocket_Protocol": "wsgateway.bearer."}),
            ("/v1/connect", {"Sec_WebSocket_Protocol": "wsgateway.jsonrpc.v1"}),
        ):
            answer = self.assert_refused(node, 401, "token", target, **headers)
            self.assertEqual(answer["WWW-Authenticate"], "Bearer")

    def test_token_of_another_client(self) -> None:
        node = FakeNode((self.tokens(a="secret"),))
        self.assert_refused(node, 403, "identity", "/v1/connect?client_id=b", Authorization="Bearer secret")

    def test_tokens_or_none(self) -> None:
        node = FakeNode((self.tokens(a="secret"), "none"))
        self.assert_refused(node, 401, "token", "/v1/connect?client_id=b", Authorization="Bearer wrong")
        self.assert_opens(node, "b", "/v1/connect?client_id=b")
        self.assert_opens(node, "a", "/v1/connect", Authorization="Bearer secret")

    def test_origin(self) -> None:
        node = FakeNode(origin=("https://*.example.com",))
        for origin in ("https://evil.com", "null", "", "https://example.com"):
            self.assert_refused(node, 403, "origin", "/v1/connect?client_id=a", Origin=origin)
        self.assert_opens(node, "a", "/v1/connect?client_id=a", Origin="https://app.example.com")
        self.assert_opens(node, "a", "/v1/connect?client_id=a")

    def test_no_browser_without_a_pattern(self) -> None:
        self.assert_refused(FakeNode(), 403, "origin", "/v1/connect?client_id=a", Origin="http://192.0.2.1:8080")

    def test_own_origin(self) -> None:
        """Some libraries send it; the Host header does not make an origin the node's own."""
        node = FakeNode(public_url="wss://gw.example.com")
        node.factory.own_origins.add_dns_name("fleet.example.com")
        for origin in ("https://gw.example.com", "https://fleet.example.com:443"):
            self.assert_opens(node, "a", "/v1/connect?client_id=a", Origin=origin)
        # That of the Host header.
        self.assert_refused(FakeNode(), 403, "origin", "/v1/connect?client_id=b", Origin="http://gw.example.com")

    def test_own_origin_of_a_loopback_port(self) -> None:
        node = FakeNode()
        node.factory.own_origins.add_loopback_url("ws://127.0.0.1:8080")
        clients = []
        for local in ("127.0.0.1", "192.0.2.7"):
            transport = FakeTransport()
            transport.hostAddr = IPv4Address("TCP", local, 8080)
            clients.append(FakeClient(node.factory, transport))
            clients[-1].send(build_request(extra=(("Origin", "http://localhost:8080"),)))
        clients[0].expect_open()
        self.assertEqual(clients[1].refusal()[:2], (403, "origin"))

    def test_the_refusal_names_the_option(self) -> None:
        for origin, remedy in (
            ("https://App.example.com:443", "; --origin https://app.example.com would let them in"),
            ("null", "; --origin null would let them in"),
            ("https://*.com", ""),
            ("https://a.com/`reboot`", ""),
        ):
            client = self.connect(FakeNode(), Origin=origin)
            self.assertEqual(client.refusal()[:2], (403, "origin"))
            expected = f"pages of the origin {origin!r} may not connect here{remedy}"
            self.assertEqual(client.refusal_message, expected)

    def test_origin_comes_before_identity(self) -> None:
        node = FakeNode((self.tokens(a="secret"),))
        self.assert_refused(node, 403, "origin", "/v1/connect?client_id=..", Origin="https://evil.com")

    def test_subprotocol(self) -> None:
        node = FakeNode()
        for offered, chosen in (
            ("wsgateway.jsonrpc.v1", True),
            ("a, wsgateway.jsonrpc.v1", True),
            ("wsgateway.jsonrpc.v2, a", False),
        ):
            head = self.assert_opens(node, "a", "/v1/connect?client_id=a", Sec_WebSocket_Protocol=offered)
            self.assertEqual(b"Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1\r\n" in head, chosen)
            self.assertEqual(b"Sec-WebSocket-Protocol" in head, chosen)

    def test_gateway_headers_are_ignored(self) -> None:
        self.assert_opens(FakeNode(), "a", "/v1/connect?client_id=a", Wsgateway_Client="b", Wsgateway_Redirect="1")


class TicketTest(EndpointTestCase):
    """A client that another node has sent here, with a ticket"""

    def setUp(self) -> None:
        self.now = 1_800_000_000.0
        self.tickets = Tickets("b", lambda: b"secret", wall_clock=lambda: self.now)
        self.node = FakeNode()
        self.node.factory._authenticator = AuthenticatorChain(
            (self.tokens(a="secret", b="other"),), wall_clock=lambda: self.now, tickets=self.tickets
        )
        self.ticket = self.tickets.issue(Identity("a", self.now + 60, method=AuthMethod.TOKENS), "b")
        self.target = f"/v1/connect?client_id=a&wsgateway_hop=1&wsgateway_ticket={self.ticket}"

    def test_no_token_is_needed(self) -> None:
        self.assert_opens(self.node, "a", self.target)
        # The session ends when the token of the client would have ended it.
        self.assertEqual(self.node.sessions._table.get("a").expires_at, self.now + 60)
        answer = self.assert_refused_again(self.node, 401, "ticket")
        self.assertEqual(answer["WWW-Authenticate"], "Bearer")

    def assert_refused_again(self, node: FakeNode, status: int, word: str, **headers: str) -> dict[str, str]:
        got_status, got_word, got_headers = self.connect(node, self.target, **headers).refusal()
        self.assertEqual((got_status, got_word), (status, word))
        return got_headers

    def test_refused(self) -> None:
        for query in (
            f"client_id=b&wsgateway_hop=1&wsgateway_ticket={self.ticket}",
            f"wsgateway_hop=1&wsgateway_ticket={self.ticket}",
            f"client_id=a&wsgateway_ticket={self.ticket}",
            f"client_id=a&wsgateway_hop=0&wsgateway_ticket={self.ticket}",
            f"client_id=a&wsgateway_hop=1&wsgateway_ticket={self.ticket}&wsgateway_ticket={self.ticket}",
            "client_id=a&wsgateway_hop=1&wsgateway_ticket=",
            "client_id=a&wsgateway_hop=1&wsgateway_ticket",
            "client_id=a&wsgateway_hop=1&wsgateway_ticket=x",
            f"client_id=a&wsgateway_hop=1&wsgateway_ticket={self.ticket.replace('.', '%2E')}",
        ):
            self.assert_refused(self.node, 401, "ticket", f"/v1/connect?{query}")
        self.assert_opens(self.node, "a", self.target)

    def test_no_ticket(self) -> None:
        for query in (
            "client_id=a&wsgateway_hop=1",
            "client_id=a&x=wsgateway_ticket",
            "client_id=a&xwsgateway_ticket=x",
        ):
            self.assert_refused(self.node, 401, "token", f"/v1/connect?{query}")

    def test_a_token_wins(self) -> None:
        for headers in ({"Authorization": "Bearer secret"}, {"Sec_WebSocket_Protocol": "wsgateway.bearer.secret"}):
            self.assert_opens(self.node, "a", self.target, **headers)
        self.assert_opens(self.node, "a", self.target.replace(self.ticket, "x"), Authorization="Bearer secret")
        self.assertEqual(self.node.sessions._table.get("a").expires_at, 0)
        # All of these were without the ticket. So is one whose token is refused.
        for value, status, word in (("Bearer wrong", 401, "token"), ("Bearer other", 403, "identity")):
            self.assert_refused_again(self.node, status, word, Authorization=value)
        client = self.connect(self.node, self.target, Authorization="Basic eDp5")
        client.expect_open()

    def test_origin_is_checked(self) -> None:
        self.assert_refused(self.node, 403, "origin", self.target, Origin="https://evil.example")
        self.assert_opens(self.node, "a", self.target)

    def test_not_spent_by_a_handshake_that_is_refused(self) -> None:
        self.node.unready_reason = "draining"
        for _ in range(2):
            self.assert_refused(self.node, 503, "draining", self.target)
        self.node.unready_reason = ""
        self.assert_opens(self.node, "a", self.target)

    def test_not_spent_by_a_handshake_that_is_lost(self) -> None:
        self.node.registry.grants_at_once = False
        client = self.connect(self.node, self.target)
        # Not twice at the same time.
        self.assert_refused_again(self.node, 401, "ticket")
        client.lose()
        client = self.connect(self.node, self.target)
        self.node.registry.grant()
        client.expect_open()
        self.assert_refused_again(self.node, 401, "ticket")

    def test_not_spent_by_a_claim_for_a_connection_that_has_timed_out(self) -> None:
        self.node.registry.grants_at_once = False
        client = self.connect(self.node, self.target)
        self.node.advance(6)
        self.assertEqual(client.refusal()[0], 503)
        self.now += 6
        client = self.connect(self.node, self.target)
        self.node.registry.grant()
        client.expect_open()

    def test_not_at_other_endpoints(self) -> None:
        query = f"client_id=a&wsgateway_hop=1&wsgateway_ticket={self.ticket}"
        self.assert_refused(self.node, 404, "path", f"/v1/relay?{query}")

    def test_nothing_of_it_is_logged(self) -> None:
        with capturedLogs() as logs:
            self.assert_opens(self.node, "a", self.target)
            self.assert_refused_again(self.node, 401, "ticket")
        self.assertIn("a ticket that was used before", repr(logs))
        self.assertNotIn(self.ticket[:20], repr(logs))
        request = parse_request(build_request(self.target), "/v1/connect")
        self.assertIn(self.ticket, request.query)
        self.assertNotIn(self.ticket[:20], repr(request))

    def test_who_gets_tickets(self) -> None:
        """Clients that follow redirects, and whose credentials a ticket can stand for."""
        for headers, identity in (
            ({"Wsgateway_Redirect": "1"}, Identity("a", self.now + 60)),
            ({}, None),
            ({"Wsgateway_Redirect": "0"}, None),
        ):
            self.setUp()
            self.assert_opens(self.node, "a", self.target, **headers)
            generation = self.node.sessions.generation("a")
            self.assertEqual(self.node.sessions.ticket_identity("a", generation), identity)
        for method in AuthMethod:
            request = self.connect(self.node).protocol.connect_request(
                parse_request(build_request(extra=(("Wsgateway-Redirect", "1"),)), "/v1/connect"),
                Identity("a", method=method),
            )
            self.assertEqual(request.ticket_method, method if method in TICKET_METHODS else AuthMethod.NONE)

    @settings(deadline=None, max_examples=200)
    @given(st.lists(st.sampled_from(["wsgateway_hop=1", "wsgateway_ticket=x", "wsgateway_ticket", "client_id=a", ""])))
    def test_generated(self, parameters: list[str]) -> None:
        ticket = parse_ticket("&".join(parameters))
        count = sum(parameter.startswith("wsgateway_ticket") for parameter in parameters)
        if not count:
            self.assertIsNone(ticket)
        elif count > 1 or "wsgateway_hop=1" not in parameters:
            self.assertEqual(ticket, "")
        else:
            self.assertEqual(ticket, "x" if "wsgateway_ticket=x" in parameters else "")

    @settings(deadline=None, max_examples=200)
    @given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=60))
    def test_anything(self, query: str) -> None:
        ticket = parse_ticket(query)
        self.assertTrue(ticket is None or ticket in query)


class LimitTest(EndpointTestCase):
    """Rates, capacity and readiness"""

    def test_openings_per_address(self) -> None:
        node = FakeNode(openings_per_address=3)
        for name in "abc":
            self.assert_opens(node, name, f"/v1/connect?client_id={name}")
        status, word, headers = self.connect(node).refusal()
        self.assertEqual((status, word, headers["Retry-After"]), (503, "rate", "1"))
        other = node.dial("192.0.2.2")
        other.send(build_request())
        other.expect_open()
        node.advance(0.5)
        self.assert_opens(node, "d", "/v1/connect?client_id=d")

    def test_excess_connections_are_dropped(self) -> None:
        """Connections that would be refused are dropped once enough were refused, and no others."""
        node = FakeNode(openings_per_address=1)
        self.assert_opens(node, "a", "/v1/connect?client_id=a")
        for _ in range(50):
            self.assertEqual(self.connect(node).refusal()[:2], (503, "rate"))
        address = node.dial("192.0.2.2").transport.getPeer()
        self.assertIsNotNone(node.factory.buildProtocol(address))
        self.assertIsNone(node.factory.buildProtocol(FakeTransport().getPeer()))
        self.assertEqual(node.metrics.refused, {"rate": 50, "dropped": 1})
        # A woken session has no address.
        self.assertIsNotNone(node.factory.buildProtocol(None))

    def test_tls_handshakes_count(self) -> None:
        """They come before the first bytes, and are charged once."""
        node = FakeNode(openings_per_address=2)
        for name in ("a", "b", ""):
            transport = FakeTransport()
            directlyProvides(transport, ISSLTransport, providedBy(transport))
            client = FakeClient(node.factory, transport)
            if name:
                client.send(build_request(f"/v1/connect?client_id={name}"))
                client.expect_open()
        client.send(b"GET /v1")
        self.assertEqual(client.refusal()[:2], (503, "rate"))

    def test_guessing_tokens_is_limited(self) -> None:
        node = FakeNode((self.tokens(a="secret"),), openings_per_address=3)
        for _ in range(3):
            self.assert_refused(node, 401, "token", "/v1/connect", Authorization="Bearer wrong")
        self.assert_refused(node, 503, "rate", "/v1/connect", Authorization="Bearer secret")

    def test_a_slow_head_counts(self) -> None:
        """The first bytes count, whatever they are. A refusal is sent as soon as they cannot be a health check."""
        node = FakeNode(openings_per_address=3)
        for data in (b"G", b"\x16\x03\x01", build_request()):
            node.dial().send(data)
        client = node.dial()
        client.send(b"G")
        self.assertEqual(client.transport.pop_written(), b"")
        client.send(b"X")
        self.assertEqual(client.refusal()[:2], (503, "rate"))
        client.send(build_request())
        self.assertEqual(client.transport.pop_written(), b"")

    def test_a_head_in_pieces_counts_once(self) -> None:
        node = FakeNode(openings_per_address=1)
        client = node.dial()
        client.send(build_request(), step=1)
        client.expect_open()

    def test_silent_connections_of_one_address(self) -> None:
        node = FakeNode(max_openings=200, openings_per_address=20)
        silent = [node.dial() for _ in range(100)]
        client = node.dial()
        client.send(build_request())
        status, word, headers = client.refusal()
        self.assertEqual((status, word, headers["Retry-After"]), (503, "rate", "1"))
        self.assertEqual(node.factory.handshake_limiter.in_progress, 100)
        other = node.dial("192.0.2.2")
        other.send(build_request("/v1/connect?client_id=b"))
        other.expect_open()
        silent[0].lose()
        self.assert_opens(node, "c", "/v1/connect?client_id=c")
        node.advance(5.25)
        self.assertEqual(node.factory.handshake_limiter.in_progress, 0)
        self.assert_opens(node, "d", "/v1/connect?client_id=d")

    def test_no_limits_per_address(self) -> None:
        node = FakeNode(max_openings=200, openings_per_address=0)
        for _ in range(199):
            node.dial().send(b"G")
        self.assert_opens(node, "a", "/v1/connect?client_id=a")

    def test_unix_sockets_have_no_address_to_limit(self) -> None:
        node = FakeNode(openings_per_address=1)
        for name in "abc":
            client = node.dial(UNIXAddress(b"/run/proxy"))
            client.send(build_request(f"/v1/connect?client_id={name}"))
            client.expect_open()

    def test_max_openings(self) -> None:
        node = FakeNode(max_openings=2)
        node.registry.grants_at_once = False
        node.connect("a")
        node.dial()
        client = node.dial()
        client.send(build_request())
        self.assertEqual(client.refusal()[:2], (503, "openings"))
        node.registry.grant()
        self.assertEqual(node.dial().transport.pop_written(), b"")

    def test_refusals_that_are_postponed(self) -> None:
        """Connections beyond the limits get a few places, for health checks, and the oldest are refused first."""
        node = FakeNode(max_openings=2)
        # Of an address that has sent a health check, no connection is dropped.
        node.dial().send(build_request("/healthz"))
        silent = [node.dial() for _ in range(2)]
        excess = [node.dial() for _ in range(MAX_POSTPONED_REFUSALS)]
        self.assertEqual(b"".join(client.transport.pop_written() for client in excess), b"")
        newest = node.dial()
        self.assertEqual(excess[0].refusal()[:2], (503, "openings"))
        newest.send(build_request("/readyz"))
        self.assertIn(b'{"ready":true}', newest.transport.pop_written())
        excess[1].lose()
        node.advance(5.25)
        self.assertEqual({client.refusal()[:2] for client in excess[2:]}, {(503, "openings")})
        self.assertTrue(all(client.transport.aborted for client in silent))
        self.assertEqual(node.factory.handshake_limiter._postponed, {})

    def test_health_checks_are_not_dropped(self) -> None:
        node = FakeNode(openings_per_address=1)
        checker = FakeTransport("192.0.2.9")
        node.dial("192.0.2.9").send(b"GET /healthz HTTP/1.1\r\n\r\n")
        for host in ("192.0.2.1", "192.0.2.9"):
            self.assertIsNotNone(node.factory.buildProtocol(FakeTransport(host).getPeer()))
            node.dial(host).send(build_request())
            while node.factory.handshake_limiter._refusal_limiter.acquire(host) == 0:
                pass
        self.assertIsNone(node.factory.buildProtocol(FakeTransport().getPeer()))
        self.assertIsNotNone(node.factory.buildProtocol(checker.getPeer()))
        # At a rate that does no harm.
        count = int(HEALTH_CHECKS_PER_SECOND) + 10
        protocols = [node.factory.buildProtocol(checker.getPeer()) for _ in range(count)]
        self.assertIn(None, protocols)

    def test_node_is_not_ready(self) -> None:
        for word in ("starting", "draining", "registry"):
            node = FakeNode()
            node.unready_reason = word
            headers = self.assert_refused(node, 503, word, "/v1/connect?client_id=a")
            self.assertGreaterEqual(int(headers["Retry-After"]), 1)
            self.assertEqual(node.registry.claims, [])

    def test_identity_comes_before_capacity(self) -> None:
        node = FakeNode((self.tokens(a="secret"),))
        node.unready_reason = "draining"
        self.assert_refused(node, 401, "token", "/v1/connect")

    def test_requests_that_are_no_handshake(self) -> None:
        node = FakeNode()
        for data, status, word in (
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404, "path"),
            (b"GET /v1/connect HTTP/1.1\r\nHost: x\r\n\r\n", 400, "upgrade"),
            (b"POST /v1/connect HTTP/1.1\r\nHost: x\r\n\r\n", 400, "method"),
            (b"\x16\x03\x01\x02\x00\x01", 400, "header"),
            (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400, "request"),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "request"),
        ):
            client = node.dial()
            client.send(data)
            self.assertEqual(client.refusal()[:2], (status, word))

    def test_messages_reach_the_handler(self) -> None:
        node = FakeNode()
        client = node.connect("a")
        client.send(text_frame(b"{}"))
        self.assertEqual(node.handler.events[-1], ("message", "a", 1, b"{}"))


class ProxyTest(SynchronousTestCase):
    """Behind a load balancer that speaks the PROXY protocol"""

    def setUp(self) -> None:
        self.node = FakeNode(max_openings=200, openings_per_address=100)
        self.factory = ProxyProtocolFactory(self.node.factory.with_proxy_protocol())

    def dial(self, host: str = "") -> FakeClient:
        client = FakeClient(self.factory, FakeTransport("10.0.0.1"))
        if host:
            client.send(f"PROXY TCP4 {host} 10.0.0.1 5555 443\r\n".encode())
        return client

    def test_address(self) -> None:
        self.dial("192.0.2.7").send(build_request())
        self.assertEqual(self.node.registry.claims[0][:2], ("a", "192.0.2.7:5555"))

    def test_the_load_balancer_is_not_limited(self) -> None:
        silent = [self.dial() for _ in range(100)]
        self.assertEqual(b"".join(client.transport.pop_written() for client in silent), b"")

    def test_clients_are_limited(self) -> None:
        for _ in range(100):
            self.dial("192.0.2.7").send(b"G")
        client = self.dial("192.0.2.7")
        client.send(b"GET /v1")
        self.assertEqual(client.refusal()[:2], (503, "rate"))
        self.dial("192.0.2.8").send(build_request())
        self.assertEqual(self.node.sessions.count(), 1)

    def test_their_handshake_rate_is_limited(self) -> None:
        for number in range(101):
            client = self.dial("192.0.2.7")
            client.send(build_request(f"/v1/connect?client_id=c{number}"))
        self.assertEqual(client.refusal()[:2], (503, "rate"))
        self.assertEqual(self.node.sessions.count(), 100)

    def test_all_endpoints_share_the_limit(self) -> None:
        for _ in range(100):
            self.dial()
        for number in range(100):
            self.node.dial(f"192.0.2.{number}")
        for client in (self.node.dial("192.0.2.100"), self.dial("192.0.2.101")):
            client.send(build_request())
            self.assertEqual(client.refusal()[:2], (503, "openings"))


GOOD = "client_id=a%2Fb&address=192.0.2.7%3A4711&until=0"


class NotAPeerError(Exception):
    pass


class FakePeerAuth:
    """Accepts one header, and records its calls."""

    def __init__(self) -> None:
        self.verified: list[tuple[str, ...]] = []

    def verify(self, *asked: str) -> str:
        self.verified.append(asked)
        if asked[0] != "Wsgateway-Peer good":
            raise NotAPeerError("the signature is wrong")
        return "B"


def build_factory(node: Any, peers: FakePeerAuth, **options: Any) -> RelayedClientFactory:
    return RelayedClientFactory(
        sessions=node.sessions,
        authenticate_peer=peers.verify,
        authentication_error=NotAPeerError,
        settings=node.settings,
        metrics=node.metrics,
        reactor=node.clock,
        cork=node.factory.cork,
    )


def relay_request(
    query: str = GOOD, authorization: str = "Wsgateway-Peer good", *extra: tuple[str, str], **changed: Any
) -> bytes:
    headers = (("Authorization", authorization), *extra) if authorization else extra
    return build_request(f"/v1/relay?{query}", extra=headers, **changed)


class ParseRelayQueryTest(SynchronousTestCase):
    """parse_relay_query()"""

    def test_good(self) -> None:
        for query, fields in (
            (GOOD, ("a/b", "192.0.2.7:4711", 0, 0)),
            ("until=17&x=1&cap=23&address=unix&client_id=a+b&y", ("a+b", "unix", 17, 23)),
            ("client_id=a&address=%5B2001%3Adb8%3A%3A1%5D%3A1&until=0", ("a", "[2001:db8::1]:1", 0, 0)),
            ("client_id=a&until=0&address=" + "x" * MAX_ADDRESS, ("a", "x" * MAX_ADDRESS, 0, 0)),
        ):
            self.assertEqual(parse_relay_query(query), fields)

    def test_bad(self) -> None:
        for query in (
            "",
            "address=unix&until=0",
            "client_id=a&until=0",
            "client_id=a&address=unix",
            GOOD + "&client_id=a%2Fb",
            GOOD + "&address=unix",
            GOOD + "&until=0",
            GOOD.replace("a%2Fb", ""),
            GOOD.replace("a%2Fb", "a%20b"),
            GOOD.replace("a%2Fb", "x" * 129),
            GOOD.replace("192.0.2.7%3A4711", ""),
            GOOD.replace("192.0.2.7", "%0D%0A"),
            GOOD.replace("192.0.2.7", "%C3%A9"),
            GOOD.replace("192.0.2.7", "x" * MAX_ADDRESS),
            GOOD.replace("until=0", "until="),
            GOOD + "&cap=",
            GOOD + "&cap=1&cap=1",
            GOOD + "&cap=-1",
            GOOD.replace("until=0", "until=-1"),
            GOOD.replace("until=0", "until=1.5"),
            GOOD.replace("until=0", "until=%C2%B2"),
            GOOD.replace("until=0", "until=" + "9" * 13),
        ):
            refusal = self.assertRaises(RequestRefusedError, parse_relay_query, query)
            self.assertEqual(refusal.status, 400, query)

    @given(st.text(alphabet="client_id=address&until%0123456789", max_size=80), st.integers(0, 10**11))
    @example("", 0)
    def test_anything(self, text: str, until: int) -> None:
        for query in (text, f"{GOOD}&{text}", f"client_id={text}&address=unix&until={until}"):
            try:
                client_id, address, when, _ = parse_relay_query(query)
            except RequestRefusedError as refusal:
                self.assertEqual(refusal.status, 400)
                continue
            self.assertTrue(is_client_id(client_id))
            self.assertTrue(address.isprintable() and 0 < len(address) <= MAX_ADDRESS)
            self.assertGreaterEqual(when, 0)

    @given(client_ids, st.from_regex(r"[!-~]{1,128}", fullmatch=True))
    def test_round_trip(self, client_id: str, address: str) -> None:
        query = f"client_id={quote(client_id, safe='')}&address={quote(address, safe='')}&until=0"
        self.assertEqual(parse_relay_query(query), (client_id, address, 0, 0))


class RelayedClientTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.use()

    def use(self, **options: Any) -> None:
        self.peers = FakePeerAuth()
        self.node = FakeNode(**options)
        self.factory = build_factory(self.node, self.peers)

    def dial(self) -> FakeClient:
        return FakeClient(self.factory, FakeTransport("198.51.100.1"))

    def connect(self, *args: Any, **kwargs: Any) -> FakeClient:
        client = self.dial()
        client.send(relay_request(*args, **kwargs))
        client.expect_open()
        return client

    def refused(self, *args: Any, **kwargs: Any) -> tuple[int, str]:
        client = self.dial()
        client.send(relay_request(*args, **kwargs))
        status, word, _ = client.refusal()
        return status, word

    def test_is_a_client(self) -> None:
        client = self.connect()
        info = self.node.sessions.get("a/b")
        assert info is not None
        # The address of the client, not of the other node.
        self.assertEqual(info.address, "192.0.2.7:4711")
        self.assertEqual(client.protocol.address, "192.0.2.7:4711")
        self.assertEqual(self.node.registry.claims[0][:2], ("a/b", "192.0.2.7:4711"))
        self.assertEqual(
            self.peers.verified, [("Wsgateway-Peer good", "GET", f"/v1/relay?{GOOD}", "a/b", "192.0.2.7:4711")]
        )
        client.send(text_frame(b"{}"))
        self.node.sessions.send("a/b", b"[]")
        self.assertEqual((self.node.handler.messages, client.frames()), ([b"{}"], [(1, b"[]")]))

    def test_never_routed_again(self) -> None:
        requests: list[Any] = []
        admit = self.node.sessions.admit
        self.patch(self.node.sessions, "admit", lambda arrival: requests.append(arrival) or admit(arrival))
        self.connect(GOOD, "Wsgateway-Peer good", ("Wsgateway-Redirect", "1"), ("Wsgateway-Hop", "0"))
        self.assertEqual([(request.redirected_here, request.accepts_redirect) for request in requests], [(True, False)])

    def test_ignores_everything_unsigned(self) -> None:
        """Origin, tokens, and all else that is not signed."""
        self.connect(
            GOOD, "Wsgateway-Peer good", ("Origin", "https://evil.example.com"), ("Wsgateway-Client", "somebody-else")
        )
        self.assertEqual(self.node.sessions.client_ids(), ["a/b"])

    def test_subprotocol(self) -> None:
        for offered, chosen in (("wsgateway.jsonrpc.v1, other", b"wsgateway.jsonrpc.v1"), ("other", None)):
            client = self.dial()
            client.send(relay_request(GOOD, "Wsgateway-Peer good", ("Sec-WebSocket-Protocol", offered)))
            values = [line for line in client.expect_open().split(b"\r\n") if b"Protocol:" in line]
            self.assertEqual(values, [b"Sec-WebSocket-Protocol: " + chosen] if chosen else [])

    def test_no_peer(self) -> None:
        for header in ("", "Wsgateway-Peer bad", "Bearer T"):
            self.assertEqual(self.refused(GOOD, header), (401, "peer"))
        self.assertEqual((self.node.registry.claims, self.node.metrics.refused), ([], {"peer": 3}))

    def test_fields_first(self) -> None:
        self.assertEqual(self.refused("client_id=a"), (400, "request"))
        self.assertEqual(self.refused(GOOD.replace("a%2Fb", "..")), (400, "client_id"))
        self.assertEqual(self.peers.verified, [])

    def test_error_in_checking(self) -> None:
        self.patch(self.factory, "_authenticate_peer", lambda *asked: 1 / 0)
        self.assertEqual(self.refused(), (500, "internal"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_other_paths(self) -> None:
        for target in ("/v1/connect?client_id=a", "/v1/relay/?x", "/"):
            client = self.dial()
            client.send(build_request(target))
            self.assertEqual(client.refusal()[:2], (404, "path"))

    def test_node_is_not_ready(self) -> None:
        self.node.unready_reason = "draining"
        self.assertEqual(self.refused(), (503, "draining"))

    def test_handshakes_are_limited_but_not_by_address(self) -> None:
        self.use(max_openings="200", openings_per_address="1")
        clients = [self.dial() for _ in range(201)]
        self.assertEqual(clients[-1].refusal()[:2], (503, "openings"))
        for number, client in enumerate(clients[:90]):
            client.send(relay_request(GOOD.replace("a%2Fb", f"robot-{number}")))
            client.expect_open()
        self.assertEqual((self.node.sessions.count(), self.node.metrics.refused), (90, {"openings": 1}))


class RelayedClientParkedTest(SynchronousTestCase):
    """On a real socket."""

    def test_parked_and_woken(self) -> None:
        node = ParkingNode()
        self.addCleanup(node.close)
        factory = build_factory(node, FakePeerAuth())
        server_end, client_end = socket.socketpair()
        node.dial((server_end, client_end), wrap=lambda _: factory)
        client_end.send(relay_request())
        node.step()
        self.assertIn(b" 101 ", read_available(client_end))
        self.assertEqual((node.sessions.parked_count(), factory.countConnections), (1, 0))
        info = node.sessions.get("a/b")
        assert info is not None
        self.assertEqual(info.address, "192.0.2.7:4711")
        # One frame in two pieces wakes it.
        client_end.send(text_frame(b"{}")[:3])
        node.step()
        client_end.send(text_frame(b"{}")[3:])
        node.step()
        self.assertEqual(node.handler.messages, [b"{}"])
        self.assertEqual(node.sessions.get("a/b"), info)
