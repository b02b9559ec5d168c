"""Tests of gateway.api.peer_server: admission, capacity and lifecycle of peer connections."""

from __future__ import annotations

import json
from unittest import mock

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from gateway.api import peer_server
from gateway.api.endpoint import MAX_CONNECTIONS, MAX_EXCESS_CONNECTIONS
from gateway.api.peer_server import MAX_PEER_CONNECTIONS
from gateway.auth.backend_tokens import UNLIMITED
from gateway.cluster.auth import WRONG_NODE, PeerAuth
from gateway.cluster.errors import PeerAuthenticationError
from gateway.cluster.features import ALL_FEATURES, FEATURES_HEADER, Feature, encode_features
from gateway.protocol.errors import ErrorKind
from gateway.rpc.pending import Reply
from gateway.settings import reserved_files
from tests.builders.api_case import FORGED_ERROR, PeerConnectionTestCase
from tests.builders.endpoint import (
    BackendWebSocket,
    EndpointConnection,
    EndpointHarness,
    PeerWebSocket,
    peer_credentials,
    rpc_error,
)
from tests.builders.http import UPGRADE, frame, request, responses
from tests.fakes.api import NODE_ID, OTHER_ID, authenticate_peer

CALL = b'{"jsonrpc":"2.0","id":1,"method":"m"}'


class CredentialTests(TestCase):
    """Admission of peers."""

    def open_handshake(self, endpoint, headers, target="/v1/backend", upgrade=UPGRADE):
        """Return the status and the body of the response."""
        connection = EndpointConnection(endpoint)
        connection.send(request("GET", target, headers=(*upgrade, *headers)))
        data = connection.transport.value()
        if data.startswith(b"HTTP/1.1 101 "):
            return 101, None
        (response,) = responses(data)
        return response.status, response.json

    def refused(self, *args, **kwargs):
        status, body = self.open_handshake(*args, **kwargs)
        return status, body["error"]

    def test_valid_credentials(self):
        endpoint = EndpointHarness(authenticate_peer=authenticate_peer)
        peer = PeerWebSocket(endpoint)
        self.assertEqual(peer.protocol._protocol.node_id, OTHER_ID)
        self.assertEqual(endpoint.metrics.api_requests, {"101": 1})

    def test_scheme_in_any_case(self):
        for scheme in ("WSGATEWAY-PEER", "wsgateway-peer", "Wsgateway-Peer"):
            status, _ = self.open_handshake(
                EndpointHarness(authenticate_peer=authenticate_peer), [("authorization", f"{scheme} n")]
            )
            self.assertEqual(status, 101)

    def test_invalid_credentials(self):
        def reject(*args):
            raise PeerAuthenticationError("the clocks differ")

        endpoint = EndpointHarness(authenticate_peer=reject)
        status, body = self.open_handshake(endpoint, peer_credentials())
        self.assertEqual((status, body["error"]), (401, "peer"))
        self.assertIn("the clocks differ", body["message"])
        self.assertEqual((endpoint.metrics.api_requests, endpoint.metrics.refused), ({"401": 1}, {"peer": 1}))
        self.assertEqual(endpoint.factory.peer_factory.count(), 0)

    def test_empty_or_repeated_credentials(self):
        for headers in ([("Authorization", "Wsgateway-Peer")], [("Authorization", "Wsgateway-Peer ")]):
            self.assertEqual(self.refused(EndpointHarness(authenticate_peer=authenticate_peer), headers), (401, "peer"))
        twice = [*peer_credentials(), ("Authorization", "Bearer t")]
        endpoint = EndpointHarness(authenticate_peer=authenticate_peer, authenticate_backend=lambda token: UNLIMITED)
        self.assertEqual(self.refused(endpoint, twice), (400, "header"))
        self.assertEqual(self.refused(endpoint, list(reversed(twice))), (400, "header"))

    def test_node_without_peers(self):
        self.assertEqual(self.refused(EndpointHarness(), peer_credentials()), (401, "peer"))
        self.assertEqual(
            self.refused(EndpointHarness(authenticate_backend=lambda token: UNLIMITED), peer_credentials()),
            (401, "peer"),
        )

    def test_origin(self):
        origin = ("Origin", "null")
        self.assertEqual(
            self.refused(EndpointHarness(authenticate_peer=authenticate_peer), [*peer_credentials(), origin]),
            (403, "origin"),
        )

    def test_any_host(self):
        headers = [*peer_credentials(), ("Host", "node-7.example")]
        self.assertEqual(self.open_handshake(EndpointHarness(authenticate_peer=authenticate_peer), headers)[0], 101)
        self.assertEqual(self.refused(EndpointHarness(authenticate_peer=authenticate_peer), headers[1:]), (403, "host"))

    def test_credentials_are_valid_for_nothing_else(self):
        for endpoint in (
            EndpointHarness(authenticate_peer=authenticate_peer),
            EndpointHarness(authenticate_peer=authenticate_peer, authenticate_backend=lambda token: UNLIMITED),
        ):
            for target in ("/v1/nodes", "/metrics", "/v1/backend", "/v1/relay", "/nothing"):
                refused = self.refused(endpoint, peer_credentials(), target, upgrade=())
                self.assertEqual(refused, (401, "peer"), target)
            self.assertEqual(self.open_handshake(endpoint, peer_credentials(), "/healthz", upgrade=())[0], 200)
            self.assertEqual(self.open_handshake(endpoint, peer_credentials(), "/readyz", upgrade=())[0], 200)

    def test_token_opens_a_backend_connection(self):
        """Not a peer connection."""
        endpoint = EndpointHarness(authenticate_peer=authenticate_peer, authenticate_backend={"t": UNLIMITED}.get)
        backend = BackendWebSocket(endpoint, [("Authorization", "Bearer t")])
        self.assertFalse(backend.protocol.is_peer)
        self.assertEqual(self.refused(endpoint, [("Authorization", "Wsgateway-Peer2 t")]), (401, "token"))

    def test_signed_credentials(self):
        here = PeerAuth(NODE_ID, lambda: b"secret" * 4)
        there = PeerAuth(OTHER_ID, lambda: b"secret" * 4)
        stranger = PeerAuth(OTHER_ID, lambda: b"another" * 4)
        endpoint = EndpointHarness(authenticate_peer=here.verify)
        good = [("Authorization", there.sign(NODE_ID, "GET", "/v1/backend"))]
        self.assertEqual(self.open_handshake(endpoint, good)[0], 101)
        self.assertEqual(self.refused(endpoint, good), (401, "peer"))
        for value, why in (
            (stranger.sign(NODE_ID, "GET", "/v1/backend"), "signature"),
            (there.sign(NODE_ID, "GET", "/v1/relay"), "signature"),
            (there.sign(NODE_ID, "POST", "/v1/backend"), "signature"),
            (there.sign(NODE_ID, "GET", "/v1/backend", "x"), "signature"),
            (stranger.sign("another-node", "GET", "/v1/backend"), "signature"),
        ):
            status, body = self.open_handshake(endpoint, [("Authorization", value)])
            self.assertEqual((status, body["error"]), (401, "peer"))
            self.assertIn(why, body["message"])
        # The peer that this request is for is gone, and may count as dead: that is not counted as an attack.
        status, body = self.open_handshake(
            endpoint, [("Authorization", there.sign("another-node", "GET", "/v1/backend"))]
        )
        self.assertEqual((status, body["error"], endpoint.metrics.refused["wrong_node"]), (401, "wrong_node", 1))
        self.assertIn(WRONG_NODE, body["message"])
        queried = [("Authorization", there.sign(NODE_ID, "GET", "/v1/backend?a=b"))]
        self.assertEqual(self.refused(endpoint, queried), (401, "peer"))
        queried = [("Authorization", there.sign(NODE_ID, "GET", "/v1/backend?a=b"))]
        self.assertEqual(self.open_handshake(endpoint, queried, "/v1/backend?a=b")[0], 101)

    def test_unexpected_failure(self):
        def broken(*args):
            raise ZeroDivisionError("secret")

        self.assertEqual(self.refused(EndpointHarness(authenticate_peer=broken), peer_credentials()), (500, "internal"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    @given(st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_categories=["Cc"]), max_size=40))
    @settings(deadline=None)
    def test_arbitrary_credentials(self, text):
        here = PeerAuth(NODE_ID, lambda: b"secret" * 4)
        status, word = self.refused(
            EndpointHarness(authenticate_peer=here.verify), [("Authorization", "Wsgateway-Peer " + text)]
        )
        self.assertEqual((status, word), (401, "peer"))


class CapacityTests(TestCase):
    """Peers and backends have separate limits."""

    def setUp(self):
        self.endpoint = EndpointHarness(authenticate_peer=authenticate_peer)
        self.factory = self.endpoint.factory

    def test_other_files_are_left(self):
        self.assertLess(MAX_CONNECTIONS + MAX_EXCESS_CONNECTIONS + MAX_PEER_CONNECTIONS, reserved_files())

    def test_peers_connect_to_a_full_node(self):
        busy = [self.endpoint.connect() for _ in range(MAX_CONNECTIONS)]
        for connection in busy:
            connection.send(request("POST", "/v1/clients/x/rpc", CALL))
        peers = [PeerWebSocket(self.endpoint, f"n{n}") for n in range(3)]
        other = self.endpoint.connect()
        other.send(request("GET", "/v1/nodes"))
        self.assertEqual(other.responses()[0].status, 503)
        self.assertEqual(
            (self.factory.peer_factory.count(), len(self.endpoint.dispatcher.pending)), (3, MAX_CONNECTIONS)
        )
        for peer in peers:
            self.assertFalse(peer.transport.disconnecting)

    def test_peers_do_not_count_as_backends(self):
        for n in range(3):
            PeerWebSocket(self.endpoint, f"n{n}")
        idle = [self.endpoint.connect() for _ in range(MAX_CONNECTIONS)]
        for connection in idle:
            connection.send(request("GET", "/healthz"))
        self.assertFalse(any(connection.transport.disconnecting for connection in idle))
        self.endpoint.connect()
        self.assertEqual(sum(connection.transport.disconnecting for connection in idle), 1)

    def test_refused_peer_counts_as_a_backend(self):
        """Until its connection is closed."""
        before = self.factory.count()
        connection = self.endpoint.connect()
        connection.send(request("GET", "/v1/backend", headers=(*UPGRADE, ("Authorization", "Wsgateway-Peer"))))
        self.assertEqual(self.factory.count(), before + 1)
        self.assertFalse(connection.protocol.is_peer)

    def test_too_many_peers(self):
        peers = [PeerWebSocket(self.endpoint, f"n{n}") for n in range(MAX_PEER_CONNECTIONS)]
        connection = self.endpoint.connect()
        connection.send(request("GET", "/v1/backend", headers=(*UPGRADE, *peer_credentials("one-more"))))
        (response,) = connection.responses()
        self.assertEqual((response.status, response.json["error"]), (503, "full"))
        # A peer that connects again replaces its own connection.
        PeerWebSocket(self.endpoint, "n5")
        self.assertEqual(peers[5].close_code(), 1000)
        self.assertEqual(self.factory.peer_factory.count(), MAX_PEER_CONNECTIONS)

    def test_newer_connection_of_the_same_peer(self):
        older, another = PeerWebSocket(self.endpoint, "a"), PeerWebSocket(self.endpoint, "b")
        PeerWebSocket(self.endpoint, "a")
        self.assertEqual(older.close_code(), 1000)
        self.assertEqual((another.frames(), self.factory.peer_factory.count()), ([], 2))

    def test_close_all(self):
        peer = PeerWebSocket(self.endpoint)
        closed = self.factory.close_all(1001, "going away")
        self.assertEqual(peer.close_code(), 1001)
        peer.disconnect()
        self.successResultOf(closed)


class FeaturesTests(TestCase):
    def open(self, *headers):
        endpoint = EndpointHarness(authenticate_peer=authenticate_peer)
        connection = BackendWebSocket(endpoint, (*peer_credentials(), *headers))
        (protocol,) = endpoint.factory.peer_factory._connections
        return connection.opening, protocol

    def test_features_are_offered_and_agreed_on(self):
        opening, protocol = self.open((FEATURES_HEADER, "fence, later"))
        self.assertIn(b"\r\n%b: %b\r\n" % (FEATURES_HEADER.encode(), encode_features().encode()), opening)
        self.assertEqual(protocol.features, {Feature.FENCE})

    def test_older_peer_has_none(self):
        self.assertEqual(self.open()[1].features, frozenset())

    def test_marked_errors(self):
        """An error of the gateway is marked if the peer knows the mark. That of a client has ``from`` in any case."""
        for features, mark in ((ALL_FEATURES, b',"gateway":true'), (frozenset(), b"")):
            endpoint = EndpointHarness(authenticate_peer=authenticate_peer)
            endpoint.dispatcher.accepts_session_calls = True
            endpoint.sessions.add("x", 7)
            peer = PeerWebSocket(endpoint, features=features)
            call = (
                b'{"jsonrpc":"2.0","id":"u","method":"client.call","params":{"client":"x","generation":7,"method":"m"}}'
            )
            for payload, result in (
                (call, Reply(None, FORGED_ERROR)),
                (call, rpc_error(ErrorKind.TIMEOUT)),
                (call.replace(b'"x"', b'"nobody"'), None),
                (b"{}", None),
            ):
                peer.send_message(payload)
                if result is not None:
                    endpoint.dispatcher.session_calls[-1][0].complete(result)
            client, *own = [payload for _, payload in peer.frames()]
            self.assertEqual(client, b'{"jsonrpc":"2.0","id":"u","error":%b,"from":"client"}' % FORGED_ERROR)
            self.assertEqual([json.loads(payload)["error"]["code"] for payload in own], [-32002, -32001, -32600])
            self.assertEqual([payload.endswith(b"}" + mark + b"}") for payload in own], [True] * 3)
            self.assertEqual([b"gateway" in payload for payload in own], [bool(mark)] * 3)

    def test_backends_see_no_features(self):
        endpoint = EndpointHarness()
        self.assertNotIn(FEATURES_HEADER.encode(), BackendWebSocket(endpoint).opening)


class LifecycleTests(PeerConnectionTestCase):
    def test_disconnecting_cancels_requests(self):
        self.call("u")
        self.sessions.claims["y"] = Deferred()
        self.call("v", client="y")
        self.assertEqual(len(self.sessions.waiters), 1)
        self.peer.disconnect()
        self.assertEqual(self.dispatcher.cancelled_calls, [self.dispatcher.session_calls[0][0]])
        self.assertEqual((self.sessions.waiters, self.endpoint.factory.peer_factory.count()), ([], 0))
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_result_after_disconnecting(self):
        self.call("u")
        self.peer.send(frame(b"\x03\xe8", opcode=8))
        self.peer.frames()
        self.dispatcher.session_calls[0][0].complete(Reply(b"1", None))
        self.assertEqual(self.peer.frames(), [])

    def test_too_many_requests_in_progress(self):
        endpoint = EndpointHarness(authenticate_peer=authenticate_peer, max_calls=2)
        endpoint.dispatcher.accepts_session_calls = True
        endpoint.sessions.add("x")
        self.peer = self.backend = PeerWebSocket(endpoint)
        for id in ("u", "v", "w"):
            self.call(id)
        self.assert_failed(-32005, None, id="w")
        endpoint.dispatcher.session_calls[0][0].complete(Reply(b"1", None))
        self.call("w")
        self.assertEqual(len(endpoint.dispatcher.session_calls), 3)

    def test_silent_peer_is_pinged_then_dropped(self):
        """Pinged after a heartbeat (5 s), dropped after a lease (15 s)."""
        self.clock.pump([1] * 4)
        self.assertEqual(self.peer.frames(), [])
        self.clock.pump([1] * 2)
        self.assertEqual(self.peer.frames(), [(9, b"")])
        self.clock.pump([1] * 8)
        self.assertFalse(self.peer.transport.aborted)
        self.clock.pump([1] * 2)
        self.assertTrue(self.peer.transport.aborted)

    def test_any_frame_is_a_sign_of_life(self):
        for _ in range(10):
            self.clock.pump([1] * 4)
            self.peer.send(frame(b"", opcode=9))
        self.assertEqual(self.peer.frames(), [(10, b"")] * 10)
        self.assertFalse(self.peer.transport.aborted)

    def test_reading_pauses_while_the_peer_does_not_read(self):
        self.peer.transport.fill_buffer()
        self.assertEqual(self.peer.transport.producerState, "paused")
        self.peer.transport.drain_buffer()
        self.assertEqual(self.peer.transport.producerState, "producing")

    def test_eight_bad_messages(self):
        for _ in range(8):
            self.peer.send_message(b"{")
        self.assertEqual(self.peer.close_code(), 1008)

    def test_unexpected_failure_closes_with_1011(self):
        def broken(payload):
            raise ZeroDivisionError

        with mock.patch.object(peer_server, "decode_fast", broken):
            self.call()
        self.assertEqual(self.peer.close_code(), 1011)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_batches(self):
        """Peers do not send batches, but JSON-RPC allows them."""
        request_message = {"jsonrpc": "2.0", "method": "peer.has", "params": {"client": "x", "generation": 7}}
        self.peer.send_message(msgspec.json.encode([{**request_message, "id": n} for n in range(2)]))
        self.assertEqual([response["result"] for response in self.peer.messages()[0]], [True, True])
