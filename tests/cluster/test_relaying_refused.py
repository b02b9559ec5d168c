"""Tests of gateway.cluster.relay_client: where no relay comes of it."""

from __future__ import annotations

from twisted.internet.defer import CancelledError

from gateway.cluster.auth import PeerTLS
from gateway.cluster.interface import PeerUnreachableError
from gateway.protocol.handshake import RequestRefusedError
from gateway.settings import ConfigError
from tests.cluster.relay_nodes import (
    CONNECT_REQUEST,
    A,
    TwoNodesCase,
    ca,
    client_request,
    count_open_sockets,
    wait_until,
)


class RelayRefusedTest(TwoNodesCase):
    """Where no relay comes of it: no file is left, and it is told in the terms of the caller."""

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

    async def test_refusals_that_say_nothing_of_this_node(self) -> None:
        for status in (200, 301, 307, 400, 401, 403, 404, 500, 503, 599):
            await self.serve_response(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\n{}" % status)
            e = await self.assert_fails()
            self.assertIn(str(status), str(e))
            self.assertEqual((e.sent, e.refused), (True, False))

    async def test_refusals_that_are_the_same_here(self) -> None:
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

    async def test_refusal_that_is_cut_short(self) -> None:
        came = await self.serve_response(b'HTTP/1.1 429 X\r\nContent-Length: 99\r\n\r\n{"error":"rate"')
        opening = self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        await wait_until(lambda: came and b"\r\n\r\n" in came[0].received)
        came[0].transport.loseConnection()
        refusal = await self.assertFailure(opening, RequestRefusedError)
        self.assertEqual((refusal.status, refusal.reason), (429, "replaced"))

    async def test_client_is_told(self) -> None:
        """From end to end."""
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

    async def test_no_answer(self) -> None:
        await self.serve_response(None)
        e = await self.assert_fails(0.05)
        self.assertIn("within 0.05 s", str(e))
        self.assertEqual((e.sent, e.refused), (True, False))

    async def test_no_answer_to_a_tls_handshake(self) -> None:
        await self.serve_response(None)
        e = await self.assert_fails(0.05, self.peer_url.replace("ws:", "wss:"))
        self.assertIn("within 0.05 s", str(e))

    async def test_answers_that_are_none(self) -> None:
        for answer in (
            b"\x16\x03\x01\r\n\r\n",
            b"HTTP/1.1 101 X\r\n\r\n",
            b"SSH-2.0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20000,
            b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: wrong\r\n\r\n",
        ):
            await self.serve_response(answer)
            self.assertTrue((await self.assert_fails()).sent)

    async def test_ends_without_an_answer(self) -> None:
        came = await self.serve_response(None)
        opening = self.relay_dialer.dial(CONNECT_REQUEST, A, self.peer_url, 5)
        await wait_until(lambda: came and b"\r\n\r\n" in came[0].received)
        came[0].transport.loseConnection()
        await self.assertFailure(opening, PeerUnreachableError)

    async def test_nobody_listens(self) -> None:
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
        """A certificate for another name, or of another authority, will not do."""
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
        """Its options can no longer be set."""

        def gone(transport: object) -> None:
            raise OSError(22, "Invalid argument")

        self.patch(self.relay_dialer, "_enable_keepalive", gone)
        await self.serve_response(None)
        self.assertIn("Invalid argument", str(await self.assert_fails()))

    async def test_cancelled(self) -> None:
        """Whenever that is: nobody is called unreachable, and nothing is left."""
        came = await self.serve_response(None)
        before = count_open_sockets()
        for secure in (False, True):
            url = self.peer_url.replace("ws:", "wss:") if secure else self.peer_url
            for moment in ("at once", "connected"):
                came.clear()
                opening = self.relay_dialer.dial(CONNECT_REQUEST, A, url, 5)
                if moment == "connected":
                    await wait_until(lambda: came and came[-1].received)
                opening.cancel()
                await self.assertFailure(opening, CancelledError)
                await wait_until(lambda: all(talker.lost for talker in came) and count_open_sockets() <= before)
        self.assertEqual(self.metrics_b.relay_failures, 0)

    async def test_client_goes_away_meanwhile(self) -> None:
        came = await self.serve_response(None)
        client = await self.dial()
        client.transport.write(client_request())
        await wait_until(lambda: came and came[0].received)
        client.transport.abortConnection()
        await wait_until(lambda: came[0].lost)
