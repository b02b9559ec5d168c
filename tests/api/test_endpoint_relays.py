"""Relays at the backend endpoint: a connection is handed over whole, and nothing of the endpoint stays with it."""

from __future__ import annotations

import gc
import socket
import ssl
import weakref

import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import blockingCallFromThread, deferToThread
from twisted.protocols.policies import ProtocolWrapper
from twisted.trial.unittest import TestCase

from gateway.api.endpoint import HEAD_TIMEOUT, MAX_CONNECTIONS, MAX_EXCESS_CONNECTIONS
from gateway.net.endpoints import listen, stop_listening
from gateway.net.transport import plain_transport
from tests.api.fakes import EndpointHarness, authenticate_peer, peer_credentials
from tests.api.wire import UPGRADE, request

RELAY = request(
    "GET", "/v1/relay?client_id=x&address=192.0.2.7%3A4711&until=0", headers=(*UPGRADE, *peer_credentials())
)
EARLY_BYTES = b"\x8a\x80\x01\x02\x03\x04"


class RelayedClient(Protocol):
    """The connection of a client's, as its own protocol sees it."""

    def __init__(self):
        self.received = b""
        self.lost = Deferred()

    def connectionMade(self):
        self.factory.made.append(self)

    def dataReceived(self, data):
        self.received += data
        self.transport.write(data)

    def connectionLost(self, reason):
        self.lost.callback(None)


class RelayedClientFactory(Factory):
    noisy = False
    protocol = RelayedClient

    def __init__(self):
        self.made = []


class HandOverTests(TestCase):
    def setUp(self):
        self.relay_factory = RelayedClientFactory()
        self.endpoint = EndpointHarness(authenticate_peer=authenticate_peer, relay_factory=self.relay_factory)

    def test_all_of_it(self):
        connection = self.endpoint.connect()
        connection.send(RELAY[:40])
        connection.send(RELAY[40:] + EARLY_BYTES)
        (relayed,) = self.relay_factory.made
        self.assertEqual(relayed.received, RELAY + EARLY_BYTES)
        self.assertIs(relayed.transport, connection.transport)
        self.assertIs(connection.transport.protocol, relayed)
        self.assertEqual((self.endpoint.factory.connections, connection.transport.value()), ({}, RELAY + EARLY_BYTES))
        self.endpoint.clock.advance(HEAD_TIMEOUT)
        self.assertFalse(connection.transport.aborted)
        self.assertEqual(self.endpoint.clock.getDelayedCalls(), [])

    def test_the_end_of_the_endpoint_is_not_its_end(self):
        connection = self.endpoint.connect()
        connection.send(RELAY)
        self.successResultOf(self.endpoint.factory.close_all(1001, "going away"))
        self.assertFalse(connection.transport.aborted or connection.transport.disconnecting)

    def test_a_full_node_takes_them(self):
        for _ in range(MAX_CONNECTIONS):
            self.endpoint.connect().send(request("POST", "/v1/clients/x/rpc", b'{"jsonrpc":"2.0","id":1,"method":"m"}'))
        for _ in range(MAX_EXCESS_CONNECTIONS + 1):
            self.endpoint.connect().send(RELAY)
        self.assertEqual(len(self.relay_factory.made), MAX_EXCESS_CONNECTIONS + 1)

    @given(
        st.lists(
            st.sampled_from(["GET /v1/relay", "/v1/backend", " ", "?", "HTTP/1.1", "\r\n", "Upgrade: websocket"])
            | st.sampled_from(["Authorization:", "Wsgateway-Peer", "Origin: x"])
            | st.text(max_size=3),
            max_size=12,
        )
    )
    @settings(deadline=None)
    def test_no_head_is_too_strange(self, parts):
        endpoint = EndpointHarness(authenticate_peer=authenticate_peer, relay_factory=RelayedClientFactory())
        connection = endpoint.connect()
        connection.send("".join(parts).encode() + b"\r\n\r\n")
        handed_over = connection.transport.protocol is not None
        self.assertEqual(handed_over, not endpoint.factory.connections)
        endpoint.clock.pump([1] * 10)
        self.assertTrue(handed_over or connection.transport.value().startswith(b"HTTP/1.1 "))

    def test_only_by_path_and_upgrade(self):
        for target, headers in (("/v1/relay", ()), ("/v1/relays", UPGRADE), ("/v1/relay/", UPGRADE)):
            self.assertEqual(self.endpoint.request("GET", target, headers=headers).status, 404, target)
        self.assertEqual(self.relay_factory.made, [])

    def test_a_node_that_takes_none(self):
        response = EndpointHarness(authenticate_peer=authenticate_peer).request("GET", "/v1/relay", headers=UPGRADE)
        self.assertEqual((response.status, response.json["error"]), (404, "path"))


class SocketTests(TestCase):
    """Real ones, through each kind of endpoint."""

    def setUp(self):
        self.relay_factory = RelayedClientFactory()
        self.factory = EndpointHarness(authenticate_peer=authenticate_peer, relay_factory=self.relay_factory).factory
        self.factory.reactor = reactor
        self.detectors = weakref.WeakSet()
        build = self.factory.buildProtocol

        def built(address):
            front = build(address)
            self.detectors.add(front)
            return front

        self.factory.buildProtocol = built

    async def relay(self, description, talk):
        """Listen, and let a thread ``talk`` to the port; it returns what it was sent. Returns the relayed one."""
        ports = await listen("backend", [description], self.factory, reactor)
        self.addCleanup(stop_listening, ports)
        answer = await deferToThread(talk, ports[0].getHost())
        self.assertEqual(answer, RELAY + EARLY_BYTES)
        (relayed,) = self.relay_factory.made
        await relayed.lost
        gc.collect()
        self.assertEqual((self.factory.connections, list(self.detectors)), ({}, []))
        return relayed

    def talk(self, sock):
        """Ask for a relay, and read the echo."""
        with sock:
            sock.settimeout(10)
            sock.sendall(RELAY[:-9])
            sock.sendall(RELAY[-9:] + EARLY_BYTES)
            received = b""
            while len(received) < len(RELAY + EARLY_BYTES):
                received += sock.recv(65536)
            # While the connection is there.
            blockingCallFromThread(reactor, self.inspect_transport)
            return received

    def inspect_transport(self):
        (relayed,) = self.relay_factory.made
        transport = relayed.transport
        self.found = (plain_transport(transport) is not None, isinstance(transport, ProtocolWrapper))
        self.own = transport.wrappedProtocol if isinstance(transport, ProtocolWrapper) else transport.protocol

    async def test_tcp(self):
        relayed = await self.relay(
            "tcp:0:interface=127.0.0.1:backlog=4096",
            lambda host: self.talk(socket.create_connection((host.host, host.port))),
        )
        self.assertEqual((self.found, self.own), ((True, False), relayed))

    async def test_unix(self):
        def connect(host):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(host.name)
            return self.talk(sock)

        relayed = await self.relay(f"unix:{self.mktemp()}", connect)
        self.assertEqual((self.found, self.own), ((True, False), relayed))

    async def test_proxied(self):
        def connect(host):
            sock = socket.create_connection((host.host, host.port))
            sock.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
            return self.talk(sock)

        relayed = await self.relay("haproxy:tcp:0:interface=127.0.0.1:backlog=4096", connect)
        self.assertEqual((self.found, self.own), ((True, True), relayed))

    async def test_tls(self):
        ca = trustme.CA()
        leaf = ca.issue_cert("localhost")
        key, chain = self.mktemp(), self.mktemp()
        leaf.private_key_pem.write_to_path(key)
        for pem in leaf.cert_chain_pems:
            pem.write_to_path(chain, append=True)
        context = ssl.create_default_context()
        ca.configure_trust(context)

        def connect(host):
            sock = socket.create_connection((host.host, host.port))
            return self.talk(context.wrap_socket(sock, server_hostname="localhost"))

        description = f"ssl:0:interface=127.0.0.1:backlog=4096:privateKey={key}:certKey={chain}"
        relayed = await self.relay(description, connect)
        self.assertEqual((self.found, self.own), ((False, True), relayed))
