"""The agent on real sockets."""

from __future__ import annotations

from typing import Any

import trustme
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.ssl import Certificate, CertificateOptions, PrivateCertificate, optionsForClientTLS
from twisted.logger import globalLogPublisher
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import TestCase

from gateway.agent import Agent


class _ServerProtocol(WebSocketServerProtocol):  # type: ignore[misc]
    """Asks the client for one echo."""

    def onConnect(self, request: Any) -> Any:
        return request.protocols[0]

    def onOpen(self) -> None:
        self.sendMessage(b'{"jsonrpc":"2.0","id":"a","method":"echo","params":[1]}')

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.factory.answered.callback(payload)

    def onClose(self, wasClean: bool, code: int, reason: str) -> None:
        self.factory.closed.callback((wasClean, code))


class SocketTests(TestCase):
    """Real sockets, and a server that knows nothing of this project."""

    async def listen(self, tls: Any = None) -> tuple[Any, int]:
        from twisted.internet import reactor

        factory = WebSocketServerFactory(reactor=reactor)
        factory.protocol = _ServerProtocol
        factory.answered, factory.closed = Deferred(), Deferred()
        server = factory if tls is None else TLSMemoryBIOFactory(tls, False, factory)
        port = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(server)
        self.addCleanup(port.stopListening)
        return factory, port.getHost().port

    def agent(self, url: str, **options: Any) -> Agent:
        from twisted.internet import reactor

        methods = {"echo": lambda params: params}
        agent = Agent(url, reactor=reactor, client_id="demo-1", methods=methods, **options)
        self.addCleanup(agent.stop)
        agent.start()
        return agent

    async def assert_serves(self, agent: Agent, factory: Any) -> None:
        self.assertEqual(await factory.answered, b'{"jsonrpc":"2.0","id":"a","result":[1]}')
        await agent.stop()
        self.assertEqual(await factory.closed, (True, 1000))

    async def test_tcp(self) -> None:
        factory, port = await self.listen()
        await self.assert_serves(self.agent(f"ws://localhost:{port}"), factory)

    async def test_tls(self) -> None:
        authority = trustme.CA()
        factory, port = await self.listen(server_options(authority, "localhost"))
        roots = Certificate.loadPEM(authority.cert_pem.bytes())
        agent = self.agent(f"wss://localhost:{port}", tls=lambda host: optionsForClientTLS(host, trustRoot=roots))
        await self.assert_serves(agent, factory)

    async def test_tls_of_another_host(self) -> None:
        """Nothing is said to a server whose certificate is not for the host of the url."""
        authority = trustme.CA()
        factory, port = await self.listen(server_options(authority, "other.example"))
        roots = Certificate.loadPEM(authority.cert_pem.bytes())
        steps: Deferred[str] = Deferred()

        def observe(event: dict[str, Any]) -> None:
            if "could not connect" in event.get("why", "") and not steps.called:
                steps.callback(event["why"])

        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)
        agent = self.agent(f"wss://localhost:{port}", tls=lambda host: optionsForClientTLS(host, trustRoot=roots))
        self.assertIn("VerificationError", await steps)
        self.assertFalse(factory.answered.called)
        await agent.stop()


def server_options(authority: trustme.CA, host: str) -> CertificateOptions:
    issued = authority.issue_cert(host)
    pem = issued.private_key_and_cert_chain_pem.bytes()
    return PrivateCertificate.loadPEM(pem).options()
