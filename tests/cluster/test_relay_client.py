"""Tests of gateway.cluster.relay_client, with two nodes on real sockets, and with generated responses."""

from __future__ import annotations

import socket
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from gateway.clients.interface import ConnectRequest
from gateway.cluster import relay as pipe_module
from gateway.cluster.auth import PeerTLS
from gateway.cluster.errors import PeerUnreachableError, RelayRefusedError
from gateway.cluster.relay_client import MAX_EARLY_DATA, HandshakeState, RelayHandshake
from gateway.net.transport import unsent_bytes
from gateway.protocol.errors import InvalidResponseError, RequestRefusedError
from gateway.protocol.frames import encode
from gateway.protocol.handshake import accept_key
from gateway.settings import ConfigError
from tests.builders.frames import WEBSOCKET_KEY, build_frame, close_frame, parse_frames, text_frame
from tests.builders.relay_nodes import (
    CONNECT_REQUEST,
    A,
    TwoNodesCase,
    ca,
    client_request,
    count_open_sockets,
    reactor_turn,
    routed_by_relay,
    upgrade_response,
    wait_until,
)

BIG = b"x" * 1048576


class RelayedSessionTest(TwoNodesCase):
    """A client whose session is on another node."""

    async def check_echo(self, secure_client: bool, secure_peer: bool) -> None:
        await self.serve_a(secure_peer)
        client = await self.connect(secure_client)
        await wait_until(lambda: self.sessions.count())
        presence = self.sessions.get("robot")
        assert presence is not None
        self.assertEqual(presence.address, self.sessions_b.connect_requests[0].address)
        here = client.transport.getHost()
        self.assertEqual(presence.address, f"{here.host}:{here.port}")
        # Small messages, and messages of the largest size, both handshakes.
        client.transport.write(text_frame(b"[1]") + text_frame(BIG) + build_frame(9, b"ping"))
        self.assertEqual(await client.expect(6), encode(b"ping", 10))
        await wait_until(lambda: len(self.handler.messages) == 2)
        self.assertEqual(self.handler.messages, [b"[1]", BIG])
        self.sessions.send("robot", BIG)
        self.sessions.send("robot", b"[2]")
        expected = encode(BIG) + encode(b"[2]")
        self.assertEqual(await client.expect(len(expected)), expected)
        # Without TLS the session is parked at its node, and the relay is spliced.
        await wait_until(lambda: self.sessions.parked_count() == (not secure_peer))
        self.assertEqual(len(self.relays._client_fds()), not (secure_client or secure_peer))
        self.assertEqual((self.relays.count(), self.relays.endpoints()), (1, [("robot", A)]))
        client.transport.write(close_frame(1000))
        self.assertEqual(parse_frames(await client.expect(4)), [(8, b"\x03\xe8")])
        await wait_until(lambda: client.lost and not self.relays.count() and not self.sessions.count())
        self.assertEqual((self.metrics_b.relayed, self.metrics_b.relay_failures), (1, 0))

    async def test_plain(self) -> None:
        await self.check_echo(False, False)

    async def test_client_has_tls(self) -> None:
        await self.check_echo(True, False)

    async def test_node_has_tls(self) -> None:
        await self.check_echo(False, True)

    async def test_both_have_tls(self) -> None:
        await self.check_echo(True, True)

    async def test_newer_connection_replaces_it(self) -> None:
        for secure in (False, True):
            await self._newer_connection_replaces_it(secure)

    async def _newer_connection_replaces_it(self, secure: bool) -> None:
        await self.serve_a(secure)
        older = await self.connect(secure)
        newer = await self.connect(secure)
        self.assertEqual((await older.expect(49))[:4], b"\x88\x2f\x0f\xa1")
        older.transport.write(close_frame(4001))
        await wait_until(lambda: older.lost)
        newer.transport.write(text_frame(b"still here"))
        await wait_until(lambda: b"still here" in self.handler.messages)
        self.assertEqual(self.relays.count(), 1)
        await self.sessions.close("robot", 4003, "bye")
        self.assertEqual(parse_frames(await newer.expect(7)), [(8, b"\x0f\xa3bye")])
        newer.transport.write(close_frame(4003))
        await wait_until(lambda: newer.lost and not self.relays.count())
        self.handler.events.clear()

    async def test_client_vanishes(self) -> None:
        for secure in (False, True):
            await self.serve_a(secure)
            client = await self.connect(secure)
            client.transport.abortConnection()
            await wait_until(lambda: not self.sessions.count() and not self.relays.count())

    async def test_early_data(self) -> None:
        """The client sends before the 101, and the node's messages follow it at once."""
        for secure in (False, True):
            await self._what_is_sent_early(secure)

    async def _what_is_sent_early(self, secure: bool) -> None:
        await self.serve_a()
        self.handler.on_message = lambda payload: self.sessions.send("robot", b"answer to " + payload)
        client = await self.dial(secure)
        self.registry.grants_at_once = False
        claims = len(self.registry.claims)
        client.transport.write(b"".join((client_request(), text_frame(b"early"), text_frame(b"y" * 40000)[:-5])))
        await wait_until(lambda: len(self.registry.claims) > claims)
        self.registry.grant()
        await client.expect_head()
        client.transport.write(text_frame(b"y" * 40000)[-5:])
        expected = encode(b"answer to early") + encode(b"answer to " + b"y" * 40000)
        self.assertEqual(await client.expect(len(expected)), expected)
        client.transport.abortConnection()
        await wait_until(lambda: not self.relays.count() and not self.sessions.count())

    async def test_data_right_after_the_response(self) -> None:
        """It is for the client."""
        connections = await self.serve_response(None)
        client = await self.dial()
        client.transport.write(client_request())
        await wait_until(lambda: connections and b"\r\n\r\n" in connections[0].received)
        connections[0].transport.write(upgrade_response(connections[0].received) + encode(b"behind"))
        await client.expect_head()
        self.assertEqual(await client.expect(8), encode(b"behind"))

    async def test_backpressure(self) -> None:
        """The node sends more than the client reads, and has to wait."""
        for secure in (False, True):
            await self._backpressure(secure)

    async def _backpressure(self, secure: bool) -> None:
        connections = await self.serve_response(None)
        client = await self.dial(secure)
        client.transport.write(client_request())
        await wait_until(lambda: connections and b"\r\n\r\n" in connections[0].received)
        node = connections[0].transport
        node.write(upgrade_response(connections[0].received))
        await client.expect_head()
        client.transport.pauseProducing()
        data = b"z" * (32 << 20)
        node.write(data)
        await wait_until(self.unsent_bytes)
        for _ in range(30):
            await reactor_turn()
        self.assertGreater(unsent_bytes(node), 0)
        self.assertTrue(0 < self.unsent_bytes() < 400_000, self.unsent_bytes())
        client.transport.resumeProducing()
        await wait_until(lambda: len(client.received) == len(data))
        node.loseConnection()
        await wait_until(lambda: client.lost)

    def unsent_bytes(self) -> float:
        """Return the number of bytes that the relays keep."""
        pipes = sum(unsent_bytes(pipe.client.transport) for pipe in self.relays._buffered)
        return pipes + sum(map(len, self.relays._unsent.values()))

    async def test_node_vanishes_while_the_client_reads_nothing(self) -> None:
        """Twisted would not notice."""
        self.patch(pipe_module, "LOSS_CHECK_INTERVAL", 0.25)
        self.patch(pipe_module, "CLOSE_TIMEOUT", 0.25)
        connections = await self.serve_response(None)
        client = await self.dial(True)
        client.transport.write(client_request())
        await wait_until(lambda: connections and b"\r\n\r\n" in connections[0].received)
        connections[0].transport.write(upgrade_response(connections[0].received))
        await client.expect_head()
        client.transport.pauseProducing()
        connections[0].transport.write(b"z" * (32 << 20))
        await wait_until(lambda: any(pipe.node._timer for pipe in self.relays._buffered))
        connections[0].transport.abortConnection()
        await wait_until(lambda: not self.relays.count())

    async def test_node_closes_before_attach(self) -> None:
        connections = await self.serve_response(None)
        opening = self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        await wait_until(lambda: connections and b"\r\n\r\n" in connections[0].received)
        connections[0].transport.write(upgrade_response(connections[0].received) + b"last words")
        handshake: Any = await opening
        client = await self.dial()
        self.sessions_b.admit = lambda request: routed_by_relay(handshake)  # type: ignore[method-assign]
        # As if the loss had been noticed already.
        connections[0].transport.loseConnection()
        handshake.transport.resumeProducing()
        await wait_until(lambda: handshake._state is HandshakeState.LOST)
        client.transport.write(client_request())
        await client.expect_head()
        self.assertEqual(await client.expect(10), b"last words")
        await wait_until(lambda: client.lost and not self.relays.count())

    async def test_early_data_is_bounded(self) -> None:
        """No more than one read of it is buffered."""
        connections = await self.serve_response(None)
        opening = self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        await wait_until(lambda: connections and b"\r\n\r\n" in connections[0].received)
        connections[0].transport.write(upgrade_response(connections[0].received))
        handshake: Any = await opening
        connections[0].transport.write(BIG)
        for _ in range(30):
            await reactor_turn()
        self.assertLess(len(handshake._buffer), 131072)
        client = await self.dial()
        self.sessions_b.admit = lambda request: routed_by_relay(handshake)  # type: ignore[method-assign]
        client.transport.write(client_request())
        await client.expect_head()
        self.assertEqual(await client.expect(len(BIG)), BIG)

    async def test_abandoned(self) -> None:
        await self.serve_a()
        handshake: Any = await self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        await wait_until(lambda: self.sessions.count())
        handshake.abandon()
        handshake.abandon()
        await wait_until(lambda: not self.sessions.count())
        self.assertEqual(self.relays.count(), 0)

    async def test_keepalive_of_the_kernel(self) -> None:
        await self.serve_a()
        handshake: Any = await self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        skt = handshake.transport.getHandle()
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT, socket.TCP_NODELAY)
        self.assertEqual([skt.getsockopt(socket.IPPROTO_TCP, option) for option in options], [5, 5, 15000, 1])
        self.assertEqual(skt.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1)
        handshake.abandon()
        await wait_until(lambda: not self.sessions.count())


class RelayRequestTest(TwoNodesCase):
    """The request to the other node."""

    async def test_request(self) -> None:
        connections = await self.serve_response(b"HTTP/1.1 404 Not Found\r\n\r\n")
        request = ConnectRequest(
            "a/b+c=",
            "[2001:db8::1]:4711",
            subprotocols=("wsgateway.jsonrpc.v1", "wsgateway.bearer.TOP.SECRET", "wsgateway.bearer64.SECRET", "other"),
        )
        await self.assertFailure(self.relay_dialer.dial(request, A, self.peer_url + "/prefix", 5), PeerUnreachableError)
        first, *lines = connections[0].received[:-4].decode("ascii").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        target = "/v1/relay?client_id=a%2Fb%2Bc%3D&address=%5B2001%3Adb8%3A%3A1%5D%3A4711&until=0"
        self.assertEqual(first, f"GET /prefix{target} HTTP/1.1")
        self.assertEqual(headers["Host"], self.peer_url.partition("//")[2])
        self.assertEqual(headers["Sec-WebSocket-Protocol"], "wsgateway.jsonrpc.v1, other")
        self.assertNotIn("SECRET", str(headers))
        # The reverse proxy removes the prefix.
        sender = self.peer_auth.verify(headers["Authorization"], "GET", target, request.client_id, request.address)
        self.assertEqual(sender, "node-b")
        again = self.relay_dialer._prepare(request, A, self.peer_url)[2]
        self.assertNotEqual(headers["Sec-WebSocket-Key"], again)

    async def test_expiry(self) -> None:
        """The session expires with its token and its certificate."""
        connections = await self.serve_response(b"HTTP/1.1 404 Not Found\r\n\r\n")
        request = ConnectRequest("a", "unix", expires_at=1700000000.0, max_expires_at=1800000000.0)
        await self.assertFailure(self.relay_dialer.dial(request, A, self.peer_url, 5), PeerUnreachableError)
        target = b"/v1/relay?client_id=a&address=unix&until=1700000000&cap=1800000000 "
        self.assertTrue(connections[0].received.startswith(b"GET " + target), connections[0].received)

    async def test_no_subprotocols(self) -> None:
        connections = await self.serve_response(b"HTTP/1.1 404 Not Found\r\n\r\n")
        request = ConnectRequest("a", "unix", subprotocols=("wsgateway.bearer.T",))
        await self.assertFailure(self.relay_dialer.dial(request, A, self.peer_url, 5), PeerUnreachableError)
        self.assertNotIn(b"protocol", connections[0].received.lower())


class RelayRefusedTest(TwoNodesCase):
    """Dials that fail: no file descriptor is left open, and the error is one of the interface."""

    async def assert_fails(self, timeout: float = 5, url: str = "") -> PeerUnreachableError:
        before = count_open_sockets()
        failures = self.metrics_b.relay_failures
        e = await self.assertFailure(
            self.relay_dialer.dial(CONNECT_REQUEST, A, url or self.peer_url, timeout), PeerUnreachableError
        )
        self.assertEqual(self.metrics_b.relay_failures, failures + 1)
        self.assertTrue(str(e).isprintable(), str(e))
        await wait_until(lambda: count_open_sockets() <= before)
        self.assertEqual(self.relays.count(), 0)
        unreachable: PeerUnreachableError = e
        return unreachable

    async def test_responses_that_are_not_passed_on(self) -> None:
        for status in (200, 301, 307, 400, 401, 403, 404, 500, 503, 599):
            await self.serve_response(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\n{}" % status)
            e = await self.assert_fails()
            self.assertIn(str(status), str(e))
            self.assertEqual((e.sent, e.refused), (True, False))

    async def test_refusals_that_are_passed_on(self) -> None:
        body = b'{"error":"replaced","message":"too often"}'
        head = b"HTTP/1.1 429 Too Many\r\nRetry-After: 17\r\nContent-Length: %d\r\n\r\n" % len(body)
        for answer in (head + body, head + body + b"more"):
            await self.serve_response(answer)
            refusal = await self.assertFailure(
                self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5), RequestRefusedError
            )
            self.assertEqual((refusal.status, refusal.reason, refusal.message), (429, "replaced", "too often"))
            self.assertEqual(refusal.headers, (("Retry-After", "17"),))
        self.assertEqual(self.metrics_b.relay_failures, 0)

    async def test_incomplete_refusal(self) -> None:
        connections = await self.serve_response(b'HTTP/1.1 429 X\r\nContent-Length: 99\r\n\r\n{"error":"rate"')
        opening = self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        await wait_until(lambda: connections and b"\r\n\r\n" in connections[0].received)
        connections[0].transport.loseConnection()
        refusal = await self.assertFailure(opening, RequestRefusedError)
        self.assertEqual((refusal.status, refusal.reason), (429, "replaced"))

    async def test_client_gets_the_refusal(self) -> None:
        """End to end."""
        await self.serve_a()
        head = b" 101 "
        for _ in range(9):
            client = await self.dial()
            client.transport.write(client_request())
            head = await client.expect_head()
            if b" 101 " not in head:
                break
        self.assertIn(b" 429 ", head)
        self.assertIn(b"Retry-After: ", head)

    async def test_no_response(self) -> None:
        await self.serve_response(None)
        e = await self.assert_fails(0.05)
        self.assertIn("within 0.05 s", str(e))
        self.assertEqual((e.sent, e.refused), (True, False))

    async def test_no_response_to_a_tls_handshake(self) -> None:
        await self.serve_response(None)
        e = await self.assert_fails(0.05, self.peer_url.replace("ws:", "wss:"))
        self.assertIn("within 0.05 s", str(e))

    async def test_invalid_responses(self) -> None:
        for answer in (
            b"\x16\x03\x01\r\n\r\n",
            b"HTTP/1.1 101 X\r\n\r\n",
            b"SSH-2.0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20000,
            b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: wrong\r\n\r\n",
        ):
            await self.serve_response(answer)
            self.assertTrue((await self.assert_fails()).sent)

    async def test_closed_without_a_response(self) -> None:
        connections = await self.serve_response(None)
        opening = self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        await wait_until(lambda: connections and b"\r\n\r\n" in connections[0].received)
        connections[0].transport.loseConnection()
        await self.assertFailure(opening, PeerUnreachableError)

    async def test_connection_refused(self) -> None:
        await self.serve_response(None)
        await self.ports.pop().stopListening()
        for url in (self.peer_url, self.peer_url.replace("127.0.0.1", "localhost")):
            e = await self.assert_fails(url=url)
            self.assertEqual((e.sent, e.refused), (False, True))

    async def test_bad_urls(self) -> None:
        for url in (
            "",
            "ws://",
            "http://127.0.0.1",
            "ws://127.0.0.1:x",
            "ws://127.0.0.1:1/\r\nX: y",
            "ws://[::1",
            "ws://é",
        ):
            e = await self.assert_fails(url=url or "-")
            self.assertFalse(e.sent)

    async def test_wrong_name(self) -> None:
        """A certificate for another name, or of an untrusted authority, is rejected."""
        own = ca.issue_cert("other.example.com").private_key_and_cert_chain_pem
        own.write_to_path(str(self.folder / "own"))
        await self.serve_a(True)
        for url in (self.peer_url, self.peer_url.replace("127.0.0.1", "localhost")):
            e = await self.assert_fails(url=url)
            self.assertIn("not for the host in this url", str(e))
            self.assertFalse(e.refused)
        ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(self.folder / "own"))
        await self.serve_a(True)
        self.relay_dialer._tls = PeerTLS()
        e = await self.assert_fails()
        self.assertIn("certificate", str(e))
        self.assertEqual(self.sessions.count(), 0)

    async def test_cannot_sign(self) -> None:
        def sign(*args: object) -> str:
            raise ConfigError("cluster-secret-file", "is gone")

        self.patch(self.relay_dialer._peer_auth, "sign", sign)
        await self.serve_response(None)
        self.assertIn("cluster-secret-file", str(await self.assert_fails()))

    async def test_lost_at_once(self) -> None:
        """The socket options can no longer be set."""

        def gone(transport: object) -> None:
            raise OSError(22, "Invalid argument")

        self.patch(self.relay_dialer, "_enable_keepalive", gone)
        await self.serve_response(None)
        self.assertIn("Invalid argument", str(await self.assert_fails()))

    async def test_cancelled(self) -> None:
        """At any time: the failure is not counted, and nothing is left open."""
        connections = await self.serve_response(None)
        before = count_open_sockets()
        for secure in (False, True):
            url = self.peer_url.replace("ws:", "wss:") if secure else self.peer_url
            for moment in ("at once", "connected"):
                connections.clear()
                opening = self.relay_dialer.dial(CONNECT_REQUEST, A, url, 5)
                if moment == "connected":
                    await wait_until(lambda: connections and connections[-1].received)
                opening.cancel()
                await self.assertFailure(opening, CancelledError)
                await wait_until(
                    lambda: all(protocol.lost for protocol in connections) and count_open_sockets() <= before
                )
        self.assertEqual(self.metrics_b.relay_failures, 0)

    async def test_client_disconnects_meanwhile(self) -> None:
        connections = await self.serve_response(None)
        client = await self.dial()
        client.transport.write(client_request())
        await wait_until(lambda: connections and connections[0].received)
        client.transport.abortConnection()
        await wait_until(lambda: connections[0].lost)


UPGRADE_RESPONSE = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    f"Sec-WebSocket-Accept: {accept_key(WEBSOCKET_KEY)}\r\n\r\n"
).encode()
REFUSAL_RESPONSE = b'HTTP/1.1 429 No\r\nContent-Length: 31\r\n\r\n{"error":"rate","message":"no"}\n'
responses = st.sampled_from(
    [
        UPGRADE_RESPONSE,
        UPGRADE_RESPONSE + b"\x81\x00",
        REFUSAL_RESPONSE,
        REFUSAL_RESPONSE[:-5],
        b"HTTP/1.1 503 No\r\n\r\n",
    ]
)


class FakeSocketRelays:
    """Relays nothing."""


@st.composite
def mutated_response(draw: st.DrawFn) -> bytes:
    """Return a response with some bytes changed, removed or inserted."""
    data = bytearray(draw(responses))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 6))] = draw(
            st.sampled_from([b"", b"\r\n", b"9" * 30, b":"]) | st.binary(max_size=4)
        )
    return bytes(data)


class GeneratedResponseTests(SynchronousTestCase):
    def handshake(self, pieces: list[bytes]) -> tuple[str, bytes]:
        """Return ``open`` or the error, and then the bytes buffered for the client."""
        handshake = RelayHandshake(FakeSocketRelays(), "x", "node", WEBSOCKET_KEY, ())  # type: ignore[arg-type]
        transport = StringTransport()
        transport.abortConnection = lambda: None  # type: ignore[method-assign]
        handshake.makeConnection(transport)
        results: list[object] = []
        handshake.send_request(b"GET").addBoth(results.append)
        for piece in pieces:
            handshake.dataReceived(piece)
        self.assertLessEqual(len(results), 1)
        if results == [None]:
            self.assertEqual(transport.producerState, "paused")
            return "open", handshake._buffer
        handshake.connectionLost(Failure(ConnectionDone()))
        (failure,) = results
        assert isinstance(failure, Failure)
        self.assertTrue(
            failure.check(RequestRefusedError, RelayRefusedError, InvalidResponseError, ConnectionDone), failure
        )
        return f"{failure.type.__name__} {failure.value}", b""

    @settings(deadline=None, max_examples=200)
    @given(mutated_response() | st.binary(max_size=40), st.integers(1, 30))
    @example(UPGRADE_RESPONSE + b"x" * (MAX_EARLY_DATA - 1), 65536)
    @example(REFUSAL_RESPONSE.replace(b"31", b"9" * 5000), 1000)
    def test_any_fragmentation(self, data: bytes, size: int) -> None:
        whole = self.handshake([data])
        self.assertEqual(self.handshake([data[at : at + size] for at in range(0, len(data), size)]), whole)

    def test_open_and_refused(self) -> None:
        self.assertEqual(self.handshake([UPGRADE_RESPONSE + b"\x81\x00"]), ("open", b"\x81\x00"))
        self.assertEqual(self.handshake([REFUSAL_RESPONSE])[0], "RequestRefusedError 429 rate: no")
