"""Tests of gateway.api.endpoint: protocol detection, capacity, closing, and handing over relayed connections."""

from __future__ import annotations

import gc
import re
import socket
import ssl
import struct
import weakref

import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocolFactory, IProtocolNegotiationFactory
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import blockingCallFromThread, deferToThread
from twisted.protocols.policies import ProtocolWrapper
from twisted.trial.unittest import TestCase
from zope.interface.verify import verifyObject

from gateway.api.endpoint import CLOSE_TIMEOUT, HEAD_TIMEOUT, MAX_CONNECTIONS, MAX_EXCESS_CONNECTIONS
from gateway.api.http_server import LINGER_TIMEOUT, upgrade_path
from gateway.net.endpoints import listen, stop_listening
from gateway.net.transport import plain_transport
from gateway.rpc.pending import Reply
from gateway.settings import reserved_files
from tests.builders.endpoint import BackendWebSocket, EndpointConnection, EndpointHarness, peer_credentials
from tests.builders.http import UPGRADE, frame, frames, request
from tests.fakes.api import authenticate_peer

CALL = b'{"jsonrpc":"2.0","id":1,"method":"m"}'
SERVE = b'{"jsonrpc":"2.0","id":1,"method":"upstream.serve"}'


class DetectionTests(TestCase):
    def test_interface(self):
        factory = EndpointHarness().factory
        self.assertTrue(verifyObject(IProtocolFactory, factory))
        self.assertTrue(verifyObject(IProtocolNegotiationFactory, factory))
        self.assertEqual(factory.acceptableProtocols(), [b"http/1.1"])

    def test_upgrade_path(self):
        for head, expected in (
            (b"GET /v1/backend HTTP/1.1\r\nUpgrade: websocket", b"/v1/backend"),
            (b"GET /v1/backend?x=1 HTTP/1.1\r\nA: b\r\nuPGRADE:x", b"/v1/backend"),
            (b"POST /v1/backend HTTP/1.1\r\nUpgrade: websocket", b"/v1/backend"),
            (b"GET /v1/backend HTTP/1.1\r\nA: Upgrade", b""),
            (b"GET /v1/backends HTTP/1.1\r\nUpgrade: websocket", b"/v1/backends"),
            (b"GET /v1/relay?a=/v1/backend HTTP/1.1\r\nUpgrade: websocket", b"/v1/relay"),
            (b"", b""),
            (b"GET", b""),
        ):
            self.assertEqual(upgrade_path(head), expected, head)

    def test_upgrade_of_another_path_is_http(self):
        response = EndpointHarness().request("GET", "/healthz", headers=UPGRADE)
        self.assertEqual(response.status, 200)

    @given(st.integers(1, 220))
    @settings(max_examples=80, deadline=None)
    def test_split_anywhere(self, cut):
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        data = request("GET", "/v1/backend", headers=UPGRADE) + frame(SERVE)
        connection.send(data[:cut])
        connection.send(data[cut:])
        head, _, rest = connection.transport.value().partition(b"\r\n\r\n")
        self.assertTrue(head.startswith(b"HTTP/1.1 101 "))
        self.assertEqual(frames(rest), [(1, b'{"jsonrpc":"2.0","id":1,"result":null}')])

    def test_byte_by_byte(self):
        connection = EndpointHarness().connect()
        for byte in request("GET", "/v1/backend", headers=UPGRADE) + frame(SERVE):
            connection.send(bytes([byte]))
        self.assertIn(b"result", connection.transport.value())

    def assert_upgraded(self, connection: EndpointConnection, statuses: list[int]) -> None:
        """The responses to earlier requests come first, then those of the WebSocket."""
        connection.clock.pump([0.0] * 3)
        output = connection.transport.value()
        *responses, rest = re.split(rb"(?=HTTP/1\.1 101 )", output)
        self.assertEqual([int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", b"".join(responses))], statuses)
        head, _, rest = rest.partition(b"\r\n\r\n")
        self.assertTrue(head.startswith(b"HTTP/1.1 101 "), output)
        self.assertEqual(frames(rest), [(1, b'{"jsonrpc":"2.0","id":1,"result":null}')])

    def test_upgrade_in_a_later_request(self):
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        for _ in range(2):
            connection.send(request("GET", "/healthz"))
        connection.send(request("GET", "/v1/backend", headers=UPGRADE))
        connection.send(frame(SERVE))
        self.assert_upgraded(connection, [200, 200])
        # The timeout of an idle HTTP connection does not close it.
        endpoint.clock.pump([10.0] * 20)
        self.assertFalse(connection.transport.disconnecting or connection.transport.aborted)
        self.assertEqual(endpoint.metrics.api_requests["101"], 1)
        connection.disconnect()
        self.assertEqual(endpoint.factory.connections, {})
        self.assertEqual(endpoint.clock.getDelayedCalls(), [])

    def test_upgrade_after_pipelined_requests(self):
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        connection.send(
            request("POST", "/v1/clients/x/rpc", CALL)
            + request("GET", "/healthz")
            + request("GET", "/v1/backend", headers=UPGRADE)
            + frame(SERVE)
        )
        self.assertEqual(connection.transport.value(), b"")
        endpoint.dispatcher.pending[0].callback(Reply(b"1", None))
        self.assert_upgraded(connection, [200, 200])

    def test_upgrade_after_a_body_of_several_segments(self):
        """What follows the head of the request is split anywhere, even within one segment of the parser."""
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        endpoint.dispatcher.results.append(Reply(b"1", None))
        big = b'{"jsonrpc":"2.0","id":1,"method":"m","params":["' + b"x" * 9000 + b'"]}'
        connection.send(request("POST", "/v1/clients/x/rpc", big))
        ping = frame(
            b'{"jsonrpc":"2.0","method":"client.notify","params":{"client":"x","method":"' + b"m" * 9000 + b'"}}'
        )
        connection.send(request("GET", "/v1/backend", headers=UPGRADE) + ping + frame(SERVE))
        self.assert_upgraded(connection, [200])

    @given(st.integers(1, 300), st.integers(1, 300))
    @settings(max_examples=80, deadline=None)
    def test_later_upgrade_split_anywhere(self, first, second):
        connection = EndpointHarness().connect()
        data = (b"\r\n" + request("GET", "/healthz") + request("GET", "/v1/backend", headers=UPGRADE) + frame(SERVE))[
            2:
        ]
        for piece in (data[:first], data[first : first + second], data[first + second :]):
            connection.send(piece)
        self.assert_upgraded(connection, [200])

    def test_later_upgrade_after_an_empty_line(self):
        """Some clients end a body with one (RFC 9112, section 2.2)."""
        connection = EndpointHarness().connect()
        connection.send(request("GET", "/healthz"))
        connection.send(b"\r\n" + request("GET", "/v1/backend", headers=UPGRADE) + frame(SERVE))
        self.assert_upgraded(connection, [200])

    def test_later_upgrade_that_is_refused(self):
        endpoint = EndpointHarness(authenticate_backend=lambda token: None)
        for number, path in enumerate(("/v1/backend", "/v1/backend?x=1")):
            connection = endpoint.connect()
            connection.send(request("GET", "/healthz") + request("GET", path, headers=UPGRADE))
            self.assertEqual([response.status for response in connection.responses()], [200, 401], number)
            self.assertTrue(connection.transport.disconnecting)

    def test_later_upgrade_after_connection_close(self):
        connection = EndpointHarness().connect()
        closing = request("GET", "/healthz", headers=[("Connection", "close")])
        connection.send(closing + request("GET", "/v1/backend", headers=UPGRADE))
        self.assertEqual([response.status for response in connection.responses()], [200])
        self.assertTrue(connection.transport.disconnecting)

    def test_later_peer_connection(self):
        endpoint = EndpointHarness(authenticate_peer=authenticate_peer)
        connection = endpoint.connect()
        headers = [*UPGRADE, *peer_credentials()]
        connection.send(request("GET", "/healthz"))
        connection.send(request("GET", "/v1/backend", headers=headers))
        self.assertIn(b"HTTP/1.1 101 ", connection.transport.value())
        self.assertEqual(endpoint.factory.peer_factory.count(), 1)

    def test_silent_connection_is_aborted(self):
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        endpoint.clock.advance(HEAD_TIMEOUT)
        self.assertTrue(connection.transport.aborted)
        self.assertEqual(connection.transport.value(), b"")

    def test_slow_header_block(self):
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        connection.send(b"GET /healthz HTTP/1.1\r\n")
        endpoint.clock.advance(HEAD_TIMEOUT)
        (response,) = connection.responses()
        self.assertEqual((response.status, response.json["error"]), (408, "slow"))

    def test_timeout_covers_the_header_block_only(self):
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        connection.send(request("POST", "/v1/clients/x/rpc", None, [("Content-Length", str(len(CALL)))]))
        endpoint.clock.advance(HEAD_TIMEOUT)
        endpoint.dispatcher.results.append(Reply(b"1", None))
        connection.send(CALL)
        self.assertEqual(connection.responses()[0].status, 200)

    def test_connection_lost_before_detection(self):
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        connection.send(b"GET")
        connection.disconnect()
        self.assertEqual(endpoint.clock.getDelayedCalls(), [])
        self.assertEqual(endpoint.factory.connections, {})


class CapacityTests(TestCase):
    """The file descriptors reserved for backends suffice, whatever backends do."""

    def setUp(self):
        self.endpoint = EndpointHarness()

    def idle(self, count):
        """Open idle connections, each after one request."""
        connections = [self.endpoint.connect() for _ in range(count)]
        for connection in connections:
            connection.send(request("GET", "/healthz"))
            self.assertEqual(connection.responses()[0].status, 200)
        return connections

    def busy(self, count):
        """Open connections with a call in progress."""
        connections = [self.endpoint.connect() for _ in range(count)]
        for connection in connections:
            connection.send(request("POST", "/v1/clients/x/rpc", CALL))
        return connections

    def disconnecting(self, connections):
        return [connection for connection in connections if connection.transport.disconnecting]

    def assert_full(self, connection):
        (response,) = connection.responses()
        self.assertEqual((response.status, response.json["error"]), (503, "full"))
        self.assertEqual(response.headers["connection"], "close")
        self.assertGreaterEqual(int(response.headers["retry-after"]), 1)

    def test_health_checks_on_a_full_node(self):
        self.busy(MAX_CONNECTIONS)
        for path in ("/healthz", "/readyz"):
            probe = self.endpoint.connect()
            probe.send(request("GET", path))
            (response,) = probe.responses()
            self.assertEqual(response.status, 200)
            self.assertTrue(probe.transport.disconnecting)
        other = self.endpoint.connect()
        other.send(request("GET", "/v1/nodes"))
        self.assert_full(other)

    def test_other_files_are_left(self):
        self.assertLess(MAX_CONNECTIONS + MAX_EXCESS_CONNECTIONS, reserved_files())

    def test_longest_idle_connection_is_closed(self):
        connections = self.idle(MAX_CONNECTIONS)
        self.endpoint.clock.advance(1)
        for connection in connections[:3] + connections[4:]:
            connection.send(request("GET", "/healthz"))
            connection.responses()
        self.assertEqual(self.disconnecting(connections), [])
        (newest,) = self.idle(1)
        self.assertEqual(self.disconnecting([*connections, newest]), [connections[3]])
        self.idle(1)
        self.assertEqual(len(self.disconnecting(connections)), 2)

    def test_closed_connection_is_aborted_in_time(self):
        connections = self.idle(MAX_CONNECTIONS)
        self.idle(1)
        self.endpoint.clock.advance(LINGER_TIMEOUT)
        self.assertTrue(connections[0].transport.aborted)

    def test_closing_connection_makes_room(self):
        connections = self.idle(MAX_CONNECTIONS)
        connections[5].send(request("GET", "/healthz", headers=[("Connection", "close")]))
        self.idle(1)
        self.assertEqual(self.disconnecting(connections), [connections[5]])

    def test_no_idle_connection(self):
        self.busy(MAX_CONNECTIONS)
        connection = self.endpoint.connect()
        self.assertEqual(connection.transport.value(), b"")
        connection.send(request("GET", "/v1/nodes"))
        self.assert_full(connection)
        self.assertEqual(self.endpoint.metrics.api_requests["503"], 1)
        self.endpoint.clock.advance(LINGER_TIMEOUT)
        self.assertTrue(connection.transport.disconnecting)

    def test_refused_connections_do_not_count(self):
        busy = self.busy(MAX_CONNECTIONS)
        refused = self.endpoint.connect()
        refused.send(request("GET", "/v1/nodes"))
        self.assert_full(refused)
        busy[0].disconnect()
        self.idle(1)

    def test_connection_becomes_idle_before_the_request(self):
        busy = self.busy(MAX_CONNECTIONS)
        connection = self.endpoint.connect()
        self.endpoint.dispatcher.pending[7].callback(Reply(b"1", None))
        connection.send(request("GET", "/v1/nodes"))
        self.assertEqual([response.status for response in connection.responses()], [200])
        self.assertEqual(self.disconnecting(busy), [busy[7]])

    def test_connection_with_half_a_request_is_not_idle(self):
        connections = self.idle(MAX_CONNECTIONS)
        for connection in connections[:100]:
            connection.send(b"G")
        for connection in connections[100:]:
            connection.send(b"GET /healthz HTTP/1.1\r\n")
        connection = self.endpoint.connect()
        connection.send(request("GET", "/v1/nodes"))
        self.assert_full(connection)
        self.assertEqual(self.disconnecting(connections), [])

    def test_connection_with_an_unread_response_is_not_idle(self):
        connections = self.idle(MAX_CONNECTIONS)
        for connection in connections[:-1]:
            connection.transport.fill_buffer()
        self.idle(1)
        self.assertEqual(self.disconnecting(connections), connections[-1:])

    def test_websockets_count_but_are_not_closed(self):
        backends = [BackendWebSocket(self.endpoint) for _ in range(MAX_CONNECTIONS - 1)]
        idle = self.idle(1)
        backends.append(BackendWebSocket(self.endpoint))
        self.assertEqual(self.disconnecting([*backends, *idle]), idle)
        idle[0].disconnect()
        connection = self.endpoint.connect()
        connection.send(request("GET", "/v1/backend", headers=UPGRADE))
        self.assert_full(connection)
        self.assertEqual(self.disconnecting(backends), [])

    def test_refused_connections_are_limited(self):
        self.busy(MAX_CONNECTIONS)
        refused = [self.endpoint.connect() for _ in range(MAX_EXCESS_CONNECTIONS)]
        self.assertFalse(any(connection.transport.aborted for connection in refused))
        connection = self.endpoint.connect()
        self.assertEqual([each.transport.aborted for each in (*refused[:2], connection)], [True, False, False])
        self.assertEqual(refused[0].transport.value(), b"")
        refused[0].disconnect()
        connection.send(request("GET", "/v1/nodes"))
        self.assert_full(connection)

    def test_silent_connections_do_not_block_health_checks(self):
        silent = [self.endpoint.connect() for _ in range(MAX_CONNECTIONS + MAX_EXCESS_CONNECTIONS)]
        for number in range(3):
            connection = self.endpoint.connect()
            silent[number].disconnect()
            connection.send(request("GET", "/healthz"))
            self.assertEqual([response.status for response in connection.responses()], [200])
            connection.disconnect()
            silent.append(self.endpoint.connect())
        self.assertEqual(len(self.endpoint.factory.awaiting_head), MAX_CONNECTIONS + MAX_EXCESS_CONNECTIONS)


class ClosingTests(TestCase):
    def setUp(self):
        self.endpoint = EndpointHarness()
        self.factory = self.endpoint.factory

    def test_no_connections(self):
        self.assertIsNone(self.successResultOf(self.factory.close_all(1001, "going away")))
        self.assertEqual(self.endpoint.clock.getDelayedCalls(), [])

    def test_each_kind_of_connection(self):
        backend = BackendWebSocket(self.endpoint)
        idle = self.endpoint.connect()
        idle.send(request("GET", "/v1/nodes"))
        idle.responses()
        busy = self.endpoint.connect()
        busy.send(request("POST", "/v1/clients/x/rpc", CALL))
        fresh = self.endpoint.connect()
        closed = self.factory.close_all(1001, "going away")
        self.assertEqual(backend.frames(), [(8, struct.pack("!H", 1001) + b"going away")])
        self.assertTrue(idle.transport.disconnecting)
        self.assertTrue(fresh.transport.aborted)
        self.assertFalse(busy.transport.disconnecting)
        self.endpoint.dispatcher.pending[0].callback(Reply(b"1", None))
        self.assertEqual(busy.responses()[0].status, 200)
        self.assertTrue(busy.transport.disconnecting)
        for connection in (backend, idle, busy):
            self.assertNoResult(closed)
            connection.disconnect()
        fresh.disconnect()
        self.assertIsNone(self.successResultOf(closed))
        # The timer wheel of handshakes runs out by itself.
        self.endpoint.clock.advance(5.5)
        self.assertEqual(self.endpoint.clock.getDelayedCalls(), [])

    def test_half_a_body_is_in_progress(self):
        connection = self.endpoint.connect()
        data = request("POST", "/v1/clients/x/rpc", CALL)
        connection.send(data[:-5])
        self.factory.close_all(1001, "going away")
        self.endpoint.dispatcher.results.append(Reply(b"1", None))
        connection.send(data[-5:])
        (response,) = connection.responses()
        self.assertEqual(response.status, 200)
        self.assertTrue(connection.transport.disconnecting)

    def test_half_a_header_block_is_in_progress(self):
        connection = self.endpoint.connect()
        connection.send(request("GET", "/v1/nodes") + b"GET /healthz HTTP/1.1\r\n")
        self.assertEqual(len(connection.responses()), 1)
        self.factory.close_all(1001, "going away")
        connection.send(b"\r\n")
        self.assertEqual(connection.responses()[0].headers["connection"], "close")
        self.assertTrue(connection.transport.disconnecting)

    def test_rest_is_aborted_after_the_timeout(self):
        busy = self.endpoint.connect()
        busy.send(request("POST", "/v1/clients/x/rpc", CALL))
        closed = self.factory.close_all(1001, "going away")
        self.endpoint.clock.advance(CLOSE_TIMEOUT)
        self.assertTrue(busy.transport.aborted)
        busy.disconnect()
        self.assertIsNone(self.successResultOf(closed))
        self.assertEqual(self.endpoint.dispatcher.cancel_count, 1)

    def test_waiting_can_be_cancelled(self):
        BackendWebSocket(self.endpoint)
        closed = self.factory.close_all(1001, "going away")
        closed.addErrback(lambda failure: None)
        closed.cancel()
        self.successResultOf(closed)


RELAY = request(
    "GET", "/v1/relay?client_id=x&address=192.0.2.7%3A4711&until=0", headers=(*UPGRADE, *peer_credentials())
)
EARLY_BYTES = b"\x8a\x80\x01\x02\x03\x04"


class RelayedClient(Protocol):
    """Client protocol of a relayed connection; echoes its input."""

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

    def test_transport_and_data_are_handed_over(self):
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

    def test_relay_after_other_requests(self):
        """Nothing of the HTTP connection is left: the relayed connection may be parked."""
        connection = self.endpoint.connect()
        connection.send(request("GET", "/healthz"))
        connection.send(request("GET", "/healthz") + RELAY + EARLY_BYTES)
        self.endpoint.clock.pump([0.0] * 3)
        (relayed,) = self.relay_factory.made
        self.assertEqual(relayed.received, RELAY + EARLY_BYTES)
        self.assertIs(connection.transport.protocol, relayed)
        self.assertEqual((connection.transport.value().count(b" 200 OK"), self.endpoint.factory.connections), (2, {}))
        self.assertIsNone(connection.transport.producer)
        self.assertEqual(self.endpoint.clock.getDelayedCalls(), [])

    def test_close_all_leaves_relayed_connections(self):
        connection = self.endpoint.connect()
        connection.send(RELAY)
        self.successResultOf(self.endpoint.factory.close_all(1001, "going away"))
        self.assertFalse(connection.transport.aborted or connection.transport.disconnecting)

    def test_full_node_takes_relays(self):
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
    def test_arbitrary_head(self, parts):
        endpoint = EndpointHarness(authenticate_peer=authenticate_peer, relay_factory=RelayedClientFactory())
        connection = endpoint.connect()
        connection.send("".join(parts).encode() + b"\r\n\r\n")
        handed_over = connection.transport.protocol is not None
        self.assertEqual(handed_over, not endpoint.factory.connections)
        endpoint.clock.pump([1] * 10)
        self.assertTrue(handed_over or connection.transport.value().startswith(b"HTTP/1.1 "))

    def test_needs_path_and_upgrade(self):
        for target, headers in (("/v1/relay", ()), ("/v1/relays", UPGRADE), ("/v1/relay/", UPGRADE)):
            self.assertEqual(self.endpoint.request("GET", target, headers=headers).status, 404, target)
        self.assertEqual(self.relay_factory.made, [])

    def test_node_without_peers(self):
        response = EndpointHarness(authenticate_peer=authenticate_peer).request("GET", "/v1/relay", headers=UPGRADE)
        self.assertEqual((response.status, response.json["error"]), (404, "path"))


class SocketTests(TestCase):
    """Hand over real sockets of each kind of endpoint."""

    def setUp(self):
        self.relay_factory = RelayedClientFactory()
        self.factory = EndpointHarness(authenticate_peer=authenticate_peer, relay_factory=self.relay_factory).factory
        self.factory.reactor = reactor
        self.detectors = weakref.WeakSet()
        build = self.factory.buildProtocol

        def built(address):
            detector = build(address)
            self.detectors.add(detector)
            return detector

        self.factory.buildProtocol = built

    async def relay(self, description, talk):
        """Listen, run ``talk`` in a thread, check that it returns the echo, and return the client protocol."""
        ports = await listen("backend", [description], self.factory, reactor)
        self.addCleanup(stop_listening, ports)
        received = await deferToThread(talk, ports[0].getHost())
        self.assertEqual(received, RELAY + EARLY_BYTES)
        (relayed,) = self.relay_factory.made
        await relayed.lost
        gc.collect()
        self.assertEqual((self.factory.connections, list(self.detectors)), ({}, []))
        return relayed

    def talk(self, sock):
        """Request a relay, and return the echo."""
        with sock:
            sock.settimeout(10)
            sock.sendall(RELAY[:-9])
            sock.sendall(RELAY[-9:] + EARLY_BYTES)
            received = b""
            while len(received) < len(RELAY + EARLY_BYTES):
                received += sock.recv(65536)
            # While the connection is open.
            blockingCallFromThread(reactor, self.inspect_transport)
            return received

    def inspect_transport(self):
        (relayed,) = self.relay_factory.made
        transport = relayed.transport
        self.transport_kind = (plain_transport(transport) is not None, isinstance(transport, ProtocolWrapper))
        self.own = transport.wrappedProtocol if isinstance(transport, ProtocolWrapper) else transport.protocol

    async def test_tcp(self):
        relayed = await self.relay(
            "tcp:0:interface=127.0.0.1:backlog=4096",
            lambda host: self.talk(socket.create_connection((host.host, host.port))),
        )
        self.assertEqual((self.transport_kind, self.own), ((True, False), relayed))

    async def test_unix(self):
        def connect(host):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(host.name)
            return self.talk(sock)

        relayed = await self.relay(f"unix:{self.mktemp()}", connect)
        self.assertEqual((self.transport_kind, self.own), ((True, False), relayed))

    async def test_proxied(self):
        def connect(host):
            sock = socket.create_connection((host.host, host.port))
            sock.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
            return self.talk(sock)

        relayed = await self.relay("haproxy:tcp:0:interface=127.0.0.1:backlog=4096", connect)
        self.assertEqual((self.transport_kind, self.own), ((True, True), relayed))

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
        self.assertEqual((self.transport_kind, self.own), ((False, True), relayed))
