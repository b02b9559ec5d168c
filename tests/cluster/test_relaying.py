"""Tests of gateway.cluster.relay_client: from a client that arrives at one node to the node that has it, on real sockets."""

from __future__ import annotations

import socket
from typing import Any

from gateway.clients.interface import ConnectRequest
from gateway.cluster import relay as pipe_module
from gateway.cluster.interface import PeerUnreachableError
from gateway.net.transport import unsent_bytes
from gateway.protocol.frames import encode
from tests.cluster.relay_nodes import (
    CONNECT_REQUEST,
    A,
    TwoNodesCase,
    client_request,
    reactor_turn,
    routed_by_relay,
    upgrade_response,
    wait_until,
)
from tests.edge.fakes import build_frame, close_frame, parse_frames, text_frame

BIG = b"x" * 1048576


class RelayedSessionTest(TwoNodesCase):
    """A client that is another node's."""

    async def check_echo(self, secure_client: bool, secure_peer: bool) -> None:
        await self.serve_a(secure_peer)
        client = await self.connect(secure_client)
        await wait_until(lambda: self.sessions.count())
        presence = self.sessions.get("robot")
        assert presence is not None
        self.assertEqual(presence.address, self.sessions_b.connect_requests[0].address)
        here = client.transport.getHost()
        self.assertEqual(presence.address, f"{here.host}:{here.port}")
        # Small, and of the largest size, both ways.
        client.transport.write(text_frame(b"[1]") + text_frame(BIG) + build_frame(9, b"ping"))
        self.assertEqual(await client.expect(6), encode(b"ping", 10))
        await wait_until(lambda: len(self.handler.messages) == 2)
        self.assertEqual(self.handler.messages, [b"[1]", BIG])
        self.sessions.send("robot", BIG)
        self.sessions.send("robot", b"[2]")
        expected = encode(BIG) + encode(b"[2]")
        self.assertEqual(await client.expect(len(expected)), expected)
        # It is parked there, and two rows here, where neither end has TLS.
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

    async def test_what_is_sent_early(self) -> None:
        """The client does not wait for the 101, and messages for it are right behind."""
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

    async def test_bytes_behind_the_answer(self) -> None:
        """They are the client's."""
        came = await self.serve_response(None)
        client = await self.dial()
        client.transport.write(client_request())
        await wait_until(lambda: came and b"\r\n\r\n" in came[0].received)
        came[0].transport.write(upgrade_response(came[0].received) + encode(b"behind"))
        await client.expect_head()
        self.assertEqual(await client.expect(8), encode(b"behind"))

    async def test_backpressure(self) -> None:
        """The node says more than the client reads: it is held up."""
        for secure in (False, True):
            await self._backpressure(secure)

    async def _backpressure(self, secure: bool) -> None:
        came = await self.serve_response(None)
        client = await self.dial(secure)
        client.transport.write(client_request())
        await wait_until(lambda: came and b"\r\n\r\n" in came[0].received)
        node = came[0].transport
        node.write(upgrade_response(came[0].received))
        await client.expect_head()
        client.transport.pauseProducing()
        said = b"z" * (32 << 20)
        node.write(said)
        await wait_until(self.unsent_bytes)
        for _ in range(30):
            await reactor_turn()
        self.assertGreater(unsent_bytes(node), 0)
        self.assertTrue(0 < self.unsent_bytes() < 400_000, self.unsent_bytes())
        client.transport.resumeProducing()
        await wait_until(lambda: len(client.received) == len(said))
        node.loseConnection()
        await wait_until(lambda: client.lost)

    def unsent_bytes(self) -> float:
        """How many bytes the relays keep."""
        pipes = sum(unsent_bytes(pipe.client.transport) for pipe in self.relays._buffered)
        return pipes + sum(map(len, self.relays._unsent.values()))

    async def test_node_vanishes_while_the_client_reads_nothing(self) -> None:
        """Twisted would not look."""
        self.patch(pipe_module, "LOSS_CHECK_INTERVAL", 0.25)
        self.patch(pipe_module, "CLOSE_TIMEOUT", 0.25)
        came = await self.serve_response(None)
        client = await self.dial(True)
        client.transport.write(client_request())
        await wait_until(lambda: came and b"\r\n\r\n" in came[0].received)
        came[0].transport.write(upgrade_response(came[0].received))
        await client.expect_head()
        client.transport.pauseProducing()
        came[0].transport.write(b"z" * (32 << 20))
        await wait_until(lambda: any(pipe.node._timer for pipe in self.relays._buffered))
        came[0].transport.abortConnection()
        await wait_until(lambda: not self.relays.count())

    async def test_node_ends_before_the_client_is_there(self) -> None:
        came = await self.serve_response(None)
        opening = self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        await wait_until(lambda: came and b"\r\n\r\n" in came[0].received)
        came[0].transport.write(upgrade_response(came[0].received) + b"last words")
        way: Any = await opening
        client = await self.dial()
        self.sessions_b.admit = lambda arrival: routed_by_relay(way)  # type: ignore[method-assign]
        # As if it had been noticed already.
        came[0].transport.loseConnection()
        way.transport.resumeProducing()
        await wait_until(lambda: way._is_lost)
        client.transport.write(client_request())
        await client.expect_head()
        self.assertEqual(await client.expect(10), b"last words")
        await wait_until(lambda: client.lost and not self.relays.count())

    async def test_much_comes_before_the_client_is_there(self) -> None:
        """It stays where it is: no more than one read of it is held."""
        came = await self.serve_response(None)
        opening = self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        await wait_until(lambda: came and b"\r\n\r\n" in came[0].received)
        came[0].transport.write(upgrade_response(came[0].received))
        way: Any = await opening
        came[0].transport.write(BIG)
        for _ in range(30):
            await reactor_turn()
        self.assertLess(len(way._buffer), 131072)
        client = await self.dial()
        self.sessions_b.admit = lambda arrival: routed_by_relay(way)  # type: ignore[method-assign]
        client.transport.write(client_request())
        await client.expect_head()
        self.assertEqual(await client.expect(len(BIG)), BIG)

    async def test_abandoned(self) -> None:
        await self.serve_a()
        way: Any = await self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        await wait_until(lambda: self.sessions.count())
        way.abandon()
        way.abandon()
        await wait_until(lambda: not self.sessions.count())
        self.assertEqual(self.relays.count(), 0)

    async def test_kernel_watches_over_it(self) -> None:
        await self.serve_a()
        way: Any = await self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        skt = way.transport.getHandle()
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT, socket.TCP_NODELAY)
        self.assertEqual([skt.getsockopt(socket.IPPROTO_TCP, option) for option in options], [5, 5, 15000, 1])
        self.assertEqual(skt.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1)
        way.abandon()
        await wait_until(lambda: not self.sessions.count())


class RelayRequestTest(TwoNodesCase):
    """What the other node is asked."""

    async def test_request(self) -> None:
        came = await self.serve_response(b"HTTP/1.1 404 Not Found\r\n\r\n")
        arrival = ConnectRequest(
            "a/b+c=",
            "[2001:db8::1]:4711",
            subprotocols=("wsgateway.jsonrpc.v1", "wsgateway.bearer.TOP.SECRET", "other"),
        )
        await self.assertFailure(self.relay_dialer.dial(arrival, A, self.peer_url + "/prefix", 5), PeerUnreachableError)
        first, *lines = came[0].received[:-4].decode("ascii").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        target = "/v1/relay?client_id=a%2Fb%2Bc%3D&address=%5B2001%3Adb8%3A%3A1%5D%3A4711&until=0"
        self.assertEqual(first, f"GET /prefix{target} HTTP/1.1")
        self.assertEqual(headers["Host"], self.peer_url.partition("//")[2])
        self.assertEqual(headers["Sec-WebSocket-Protocol"], "wsgateway.jsonrpc.v1, other")
        self.assertNotIn("SECRET", str(headers))
        # What is before the prefix takes it away.
        who = self.peer_auth.verify(headers["Authorization"], "GET", target, arrival.client_id, arrival.address)
        self.assertEqual(who, "node-b")
        again = self.relay_dialer._prepare(arrival, A, self.peer_url)[2]
        self.assertNotEqual(headers["Sec-WebSocket-Key"], again)

    async def test_ends(self) -> None:
        """When its token and its certificate do."""
        came = await self.serve_response(b"HTTP/1.1 404 Not Found\r\n\r\n")
        arrival = ConnectRequest("a", "unix", expires_at=1700000000.0, max_expires_at=1800000000.0)
        await self.assertFailure(self.relay_dialer.dial(arrival, A, self.peer_url, 5), PeerUnreachableError)
        target = b"/v1/relay?client_id=a&address=unix&until=1700000000&cap=1800000000 "
        self.assertTrue(came[0].received.startswith(b"GET " + target), came[0].received)

    async def test_no_subprotocols(self) -> None:
        came = await self.serve_response(b"HTTP/1.1 404 Not Found\r\n\r\n")
        arrival = ConnectRequest("a", "unix", subprotocols=("wsgateway.bearer.T",))
        await self.assertFailure(self.relay_dialer.dial(arrival, A, self.peer_url, 5), PeerUnreachableError)
        self.assertNotIn(b"protocol", came[0].received.lower())
