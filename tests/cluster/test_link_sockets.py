"""Links on real sockets, to a server that knows nothing of this project."""

from __future__ import annotations

import json
from typing import Any

import trustme
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.ssl import Certificate, CertificateOptions, PrivateCertificate
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import TestCase

from gateway.cluster.auth import PeerAuth, PeerTLS
from gateway.cluster.interface import PeerUnreachableError
from gateway.cluster.peer_client import PeerClient
from gateway.metrics import Metrics
from gateway.rpc.pending import DeferredCall, Reply
from gateway.util.cork import Cork
from tests.cluster.far import A, location

SECRET = b"the secret of these nodes"


class _Echo(WebSocketServerProtocol):  # type: ignore[misc]
    """Answers each call with its params."""

    def onConnect(self, request: Any) -> Any:
        self.factory.requests.append((request.path, request.headers.get("authorization")))
        return request.protocols[0]

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        asked = json.loads(payload)
        result = asked["params"].get("params", True)
        answer = {"jsonrpc": "2.0", "id": asked["id"], "result": result}
        self.sendMessage(json.dumps(answer, separators=(",", ":")).encode())

    def onClose(self, wasClean: bool, code: int, reason: str) -> None:
        if not self.factory.closed.called:
            self.factory.closed.callback((wasClean, code))


class SocketTests(TestCase):
    async def listen(self, tls: Any = None) -> tuple[Any, int]:
        from twisted.internet import reactor

        factory = WebSocketServerFactory(reactor=reactor)
        factory.protocol = _Echo
        factory.requests, factory.closed = [], Deferred()
        server = factory if tls is None else TLSMemoryBIOFactory(tls, False, factory)
        port = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(server)
        self.addCleanup(port.stopListening)
        return factory, port.getHost().port

    def make_peer_client(self, **options: Any) -> PeerClient:
        from twisted.internet import reactor

        self.cork = Cork(reactor.seconds)
        peers = PeerClient(
            node_id=A,
            peer_auth=PeerAuth(A, lambda: SECRET),
            reactor=reactor,
            cork=self.cork,
            metrics=Metrics(),
            heartbeat=5.0,
            lease=15.0,
            max_message_size=2000000,
            max_calls=100,
            **options,
        )
        self.addCleanup(peers.stop)
        return peers

    async def assert_calls(self, factory: Any, peer_client: PeerClient, url: str) -> None:
        where = location(url=url)
        await peer_client.connect(where)
        # Small ones, those in several reads, one that is more than a transport holds, many in one write.
        for size in (1, 200, 70000, 1500000):
            params = b'["%b"]' % (b"x" * size)
            self.assertEqual(await self.call(peer_client, where, params), Reply(params, None))
        self.cork.cork()
        calls = [self.call(peer_client, where, b"[%d]" % n) for n in range(50)]
        self.cork.uncork()
        self.assertEqual([await call for call in calls], [Reply(b"[%d]" % n, None) for n in range(50)])
        self.assertTrue(await peer_client.has_client(where, 1.0))
        await peer_client.stop()
        self.assertEqual(await factory.closed, (True, 1001))
        ((path, authorization),) = factory.requests
        self.assertEqual(path, "/v1/backend")
        verified = PeerAuth(where.node_id, lambda: SECRET).verify(authorization, "GET", path)
        self.assertEqual(verified, A)

    def call(self, peer_client: PeerClient, target: Any, params: bytes) -> DeferredCall:
        call = DeferredCall(peer_client.cancel)
        self.assertTrue(peer_client.try_call(call, target, "m", params, 30.0))
        return call

    async def test_tcp(self) -> None:
        factory, port = await self.listen()
        await self.assert_calls(factory, self.make_peer_client(), f"ws://127.0.0.1:{port}")

    async def test_tls(self) -> None:
        authority = trustme.CA()
        factory, port = await self.listen(_certificate(authority, "localhost"))
        roots = Certificate.loadPEM(authority.cert_pem.bytes())
        await self.assert_calls(factory, self.make_peer_client(tls=PeerTLS(roots)), f"wss://localhost:{port}")

    async def test_tls_of_an_address(self) -> None:
        authority = trustme.CA()
        factory, port = await self.listen(_certificate(authority, "127.0.0.1"))
        roots = Certificate.loadPEM(authority.cert_pem.bytes())
        await self.assert_calls(factory, self.make_peer_client(tls=PeerTLS(roots)), f"wss://127.0.0.1:{port}")

    async def assert_not_verified(self, host: str, why: str, trusted: bool = True) -> None:
        authority = trustme.CA()
        factory, port = await self.listen(_certificate(authority, host))
        root = Certificate.loadPEM((authority if trusted else trustme.CA()).cert_pem.bytes())
        for peers in (self.make_peer_client(tls=PeerTLS(root)), self.make_peer_client()):
            with self.assertRaises(PeerUnreachableError) as caught:
                await peers.has_client(location(url=f"wss://localhost:{port}"), 5.0)
            self.assertFalse(caught.exception.sent)
            if peers._pool._tls._trust_root is not None:
                self.assertIn(why, str(caught.exception))
        self.assertEqual(factory.requests, [])

    async def test_tls_of_another_host(self) -> None:
        """Nothing is said to it; neither to one whose certificate is not of the platform's authorities."""
        await self.assert_not_verified("other.example", "not for the host in this url")

    async def test_tls_of_another_authority(self) -> None:
        await self.assert_not_verified("localhost", "certificate verify failed", trusted=False)

    async def test_nobody_listens(self) -> None:
        from twisted.internet import reactor

        listening = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(WebSocketServerFactory())
        port = listening.getHost().port
        await listening.stopListening()
        with self.assertRaises(PeerUnreachableError) as caught:
            await self.make_peer_client().has_client(location(url=f"ws://127.0.0.1:{port}"), 1.0)
        self.assertTrue(caught.exception.refused)


def _certificate(authority: trustme.CA, host: str) -> CertificateOptions:
    pem = authority.issue_cert(host).private_key_and_cert_chain_pem.bytes()
    return PrivateCertificate.loadPEM(pem).options()
