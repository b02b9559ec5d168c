"""Tests of gateway.clients.endpoint: clients whose bytes another node passes on."""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import quote

from hypothesis import example, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.interface import is_client_id
from gateway.clients.endpoint import MAX_ADDRESS, RelayedClientFactory, parse_relay_query
from gateway.protocol.handshake import RequestRefusedError
from tests.edge.fakes import FakeClient, FakeNode, FakeTransport, build_request, text_frame
from tests.edge.parked import ParkingNode, read_available

GOOD = "client_id=a%2Fb&address=192.0.2.7%3A4711&until=0"


class NotAPeerError(Exception):
    pass


class FakePeerAuth:
    """Accepts one header, and notes what is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def verify(self, *asked: str) -> str:
        self.asked.append(asked)
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
    """fields_of()"""

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

    @given(st.from_regex(r"[A-Za-z0-9._:@/+=-]{3,128}", fullmatch=True), st.from_regex(r"[!-~]{1,128}", fullmatch=True))
    def test_round_trip(self, client_id: str, address: str) -> None:
        query = f"client_id={quote(client_id, safe='')}&address={quote(address, safe='')}&until=0"
        self.assertEqual(parse_relay_query(query), (client_id, address, 0, 0))


class RelayedClientTest(SynchronousTestCase):
    """RelayedFactory, RelayedProtocol"""

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
        presence = self.node.sessions.get("a/b")
        assert presence is not None
        # Its own address, not the other node's.
        self.assertEqual(presence.address, "192.0.2.7:4711")
        self.assertEqual(client.protocol.address, "192.0.2.7:4711")
        self.assertEqual(self.node.registry.claims[0][:2], ("a/b", "192.0.2.7:4711"))
        self.assertEqual(
            self.peers.asked, [("Wsgateway-Peer good", "GET", f"/v1/relay?{GOOD}", "a/b", "192.0.2.7:4711")]
        )
        client.send(text_frame(b"{}"))
        self.node.sessions.send("a/b", b"[]")
        self.assertEqual((self.node.handler.messages, client.frames()), ([b"{}"], [(1, b"[]")]))

    def test_is_never_sent_on(self) -> None:
        arrivals: list[Any] = []
        admit = self.node.sessions.admit
        self.patch(self.node.sessions, "admit", lambda arrival: arrivals.append(arrival) or admit(arrival))
        self.connect(GOOD, "Wsgateway-Peer good", ("Wsgateway-Redirect", "1"), ("Wsgateway-Hop", "0"))
        self.assertEqual([(one.redirected_here, one.accepts_redirect) for one in arrivals], [(True, False)])

    def test_nothing_else_counts(self) -> None:
        """No Origin, no token, and nothing that is not signed."""
        self.connect(
            GOOD, "Wsgateway-Peer good", ("Origin", "https://evil.example.com"), ("Wsgateway-Client", "somebody-else")
        )
        self.assertEqual(self.node.sessions.client_ids(), ["a/b"])

    def test_subprotocol(self) -> None:
        for offered, chosen in (("wsgateway.jsonrpc.v1, other", b"wsgateway.jsonrpc.v1"), ("other", None)):
            client = self.dial()
            client.send(relay_request(GOOD, "Wsgateway-Peer good", ("Sec-WebSocket-Protocol", offered)))
            found = [line for line in client.expect_open().split(b"\r\n") if b"Protocol:" in line]
            self.assertEqual(found, [b"Sec-WebSocket-Protocol: " + chosen] if chosen else [])

    def test_no_peer(self) -> None:
        for header in ("", "Wsgateway-Peer bad", "Bearer T"):
            self.assertEqual(self.refused(GOOD, header), (401, "peer"))
        self.assertEqual((self.node.registry.claims, self.node.metrics.refused), ([], {"peer": 3}))

    def test_fields_first(self) -> None:
        self.assertEqual(self.refused("client_id=a"), (400, "request"))
        self.assertEqual(self.refused(GOOD.replace("a%2Fb", "..")), (400, "client_id"))
        self.assertEqual(self.peers.asked, [])

    def test_error_in_checking(self) -> None:
        self.patch(self.factory, "_authenticate_peer", lambda *asked: 1 / 0)
        self.assertEqual(self.refused(), (500, "internal"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_other_paths(self) -> None:
        for target in ("/v1/connect?client_id=a", "/v1/relay/?x", "/"):
            client = self.dial()
            client.send(build_request(target))
            self.assertEqual(client.refusal()[:2], (404, "path"))

    def test_node_takes_nobody(self) -> None:
        self.node.unready_reason = "draining"
        self.assertEqual(self.refused(), (503, "draining"))

    def test_openings_are_limited_not_addresses(self) -> None:
        self.use(max_openings="200", openings_per_address="1")
        clients = [self.dial() for _ in range(201)]
        self.assertEqual(clients[-1].refusal()[:2], (503, "openings"))
        for number, client in enumerate(clients[:90]):
            client.send(relay_request(GOOD.replace("a%2Fb", f"robot-{number}")))
            client.expect_open()
        self.assertEqual((self.node.sessions.count(), self.node.metrics.refused), (90, {"openings": 1}))


class RelayedClientParkedTest(SynchronousTestCase):
    """On a real socket."""

    def test_is_parked_and_woken_as_any_other(self) -> None:
        node = ParkingNode()
        self.addCleanup(node.close)
        factory = build_factory(node, FakePeerAuth())
        here, there = socket.socketpair()
        node.dial((here, there), wrap=lambda _: factory)
        there.send(relay_request())
        node.step()
        self.assertIn(b" 101 ", read_available(there))
        self.assertEqual((node.sessions.parked_count(), factory.countConnections), (1, 0))
        presence = node.sessions.get("a/b")
        assert presence is not None
        self.assertEqual(presence.address, "192.0.2.7:4711")
        # One frame in two pieces wakes it.
        there.send(text_frame(b"{}")[:3])
        node.step()
        there.send(text_frame(b"{}")[3:])
        node.step()
        self.assertEqual(node.handler.messages, [b"{}"])
        self.assertEqual(node.sessions.get("a/b"), presence)
