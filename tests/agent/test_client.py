"""Tests of the agent with an in-memory gateway, and on real sockets."""

from __future__ import annotations

import time
from typing import Any

import trustme
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.application.service import MultiService
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.ssl import Certificate, CertificateOptions, PrivateCertificate, optionsForClientTLS
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import capturedLogs, globalLogPublisher
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python import runtime
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.agent import (
    Agent,
    AgentError,
    CallTimedOut,
    ConnectionLost,
    NotConnected,
    RpcFailed,
    Stopped,
)
from gateway.testing import MemoryGateway, Received
from tests.agent.test_token import jwt
from tests.builders.agent import AgentTestCase


class ConstructorTests(SynchronousTestCase):
    def make(self, url: str = "ws://gw", **options: Any) -> Agent:
        return Agent(url, reactor=MemoryReactorClock(), **options)

    def test_invalid_parameters(self) -> None:
        for options, message in [
            ({"url": "http://gw"}, "'http://gw' is not a valid URL"),
            ({"client_id": "a b"}, "client_id 'a b' is not"),
            ({"token": ""}, "the token is not"),
            ({"token": "a\r\nX: y"}, "the token is not"),
            ({"backoff": (0, 1)}, "backoff"),
            ({"methods": {"gateway.x": len}}, "'gateway.x' cannot have a handler"),
            ({"notifications": {"gateway.goaway": len}}, "'gateway.goaway' cannot have a handler"),
        ]:
            with self.assertRaisesRegex(ValueError, message) as caught:
                self.make(**options)
            self.assertNotIn("X: y", str(caught.exception))

    def test_nothing_happens_before_start(self) -> None:
        agent = self.make(client_id="x")
        self.assertFalse(agent.connected)
        self.assertNoResult(agent.whenConnected())
        self.assertNoResult(agent.whenStopped())
        self.successResultOf(agent.stop())
        self.failureResultOf(agent.call("m"), NotConnected)
        self.failureResultOf(agent.notify("m"), NotConnected)

    def test_clock_that_may_be_set_back(self) -> None:
        """Twisted's reactors follow the wall clock."""
        for seconds, warnings in ((runtime.seconds, 1), (time.monotonic, 0)):
            reactor = MemoryReactorClock()
            reactor.seconds = seconds  # type: ignore[method-assign]
            agent = Agent("ws://gw", reactor=reactor, client_id="x")
            with capturedLogs() as logs:
                agent.start()
            found = [event for event in logs if "reactor.seconds = time.monotonic" in str(event.get("log_format"))]
            self.assertEqual(len(found), warnings)
            agent.stop()

    def test_tls(self) -> None:
        """``tls`` is called with the host of each url."""
        hosts: list[str] = []

        def tls(host: str) -> Any:
            hosts.append(host)
            raise LookupError("no such certificate")

        agent = self.make("wss://192.0.2.1", tls=tls)
        agent.start()
        self.assertEqual(hosts, ["192.0.2.1"])
        self.successResultOf(agent.stop())


class ConnectTests(AgentTestCase):
    def test_connected(self) -> None:
        agent = self.gateway.agent("demo-1")
        waiting = agent.whenConnected()
        agent.start()
        agent.start()
        self.assertFalse(agent.connected)
        self.assertNoResult(waiting)
        self.gateway.flush()
        self.assertTrue(agent.connected)
        self.assertIs(self.successResultOf(waiting), agent)
        self.assertIs(self.successResultOf(agent.whenConnected()), agent)
        self.assertEqual(agent.connected_url, "ws://gateway.test:80/v1/connect?client_id=demo-1")
        self.assertEqual(self.gateway.clients, ["demo-1"])
        (opening,) = self.gateway.openings
        self.assertEqual(opening.headers["wsgateway-redirect"], "1")
        self.assertEqual(opening.headers["sec-websocket-protocol"], "wsgateway.jsonrpc.v1")
        self.assertNotIn("authorization", opening.headers)

    def test_stop(self) -> None:
        agent = self.start_agent()
        waiting = agent.whenStopped()
        stopped = agent.stop()
        self.assertNoResult(stopped)
        self.assertFalse(agent.connected)
        self.gateway.flush()
        self.assertIsNone(self.successResultOf(stopped))
        self.assertEqual(self.successResultOf(waiting), Stopped(None, "stop() was called"))
        self.assert_stopped(agent, None, "stop() was called")
        self.assertEqual(self.gateway.clients, [])

    def test_stop_twice(self) -> None:
        agent = self.start_agent()
        stops = [agent.stop(), agent.stop()]
        self.gateway.flush()
        for stopped in stops:
            self.successResultOf(stopped)
        self.successResultOf(agent.stop())

    def test_stop_while_opening(self) -> None:
        agent = self.gateway.agent("demo-1")
        agent.start()
        waiting = agent.whenConnected()
        stopped = agent.stop()
        self.gateway.flush()
        self.successResultOf(stopped)
        self.failureResultOf(waiting, NotConnected)
        self.assert_stopped(agent, None, "stop() was called")
        self.assertEqual(self.gateway.clients, [])

    def test_stop_while_waiting(self) -> None:
        self.gateway.listening = False
        agent = self.start_agent()
        self.successResultOf(agent.stop())
        self.assert_stopped(agent, None, "stop() was called")

    def test_stop_while_the_gateway_closes(self) -> None:
        agent = self.start_agent()
        agent.call("m").addErrback(lambda _: agent.stop())
        self.gateway.disconnect("demo-1", 1001)
        self.assert_stopped(agent, None, "stop() was called")

    def test_start_again(self) -> None:
        agent = self.start_agent()
        agent.stop()
        self.gateway.flush()
        agent.start()
        self.gateway.flush()
        self.assertTrue(agent.connected)
        self.assertNoResult(agent.whenStopped())

    def test_service(self) -> None:
        agent = self.gateway.agent("demo-1")
        parent = MultiService()
        agent.setServiceParent(parent)  # type: ignore[no-untyped-call]
        parent.startService()
        self.gateway.flush()
        self.assertEqual(self.gateway.clients, ["demo-1"])
        stopped = parent.stopService()
        self.gateway.flush()
        self.successResultOf(stopped)
        self.assertEqual(self.gateway.clients, [])

    def test_on_connected_for_each_connection(self) -> None:
        seen: list[Agent] = []
        agent = self.start_agent(on_connected=seen.append)
        self.gateway.drop("demo-1")
        self.gateway.advance(10)
        self.assertEqual(seen, [agent, agent])

    def test_on_connected_that_raises(self) -> None:
        async def broken(agent: Agent) -> None:
            raise KeyError("bug")

        agent = self.start_agent(on_connected=broken)
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)
        self.assertTrue(agent.connected)

    def test_open_timeout(self) -> None:
        agent = self.start_agent(open_timeout=30.0, connect=lambda url: self.Hanging())
        self.gateway.advance(30)
        self.assertEqual(len(self.Hanging.cancelled), 1)
        self.successResultOf(agent.stop())

    class Hanging:
        """An endpoint that never connects."""

        cancelled: list[object] = []

        def connect(self, factory: object) -> Deferred[object]:
            return Deferred(self.cancelled.append)

    def test_open_timeout_without_response(self) -> None:
        """TCP connects, but there is no response to the opening handshake."""
        agent = self.gateway.agent("demo-1", open_timeout=5.0)
        agent.start()
        for wire in self.gateway._memory_connections:
            wire.is_frozen = True
        self.gateway.advance(5)
        self.assertEqual(self.attempts(), 0)
        self.assert_next_attempt_after(0.5)
        self.assertTrue(agent.connected)


class TokenTests(AgentTestCase):
    def setUp(self) -> None:
        self.gateway = MemoryGateway(tokens={"T1": "demo-1", "T2": "demo-1", "T3": "other"})

    def test_token_is_only_in_the_header(self) -> None:
        agent = self.start_agent(token="T1")
        self.assertTrue(agent.connected)
        self.assertEqual(self.gateway.openings[0].headers["authorization"], "Bearer T1")
        self.assertNotIn("T1", self.gateway.openings[0].url)

    def test_invalid_static_token(self) -> None:
        for token, status, word in [("X", 401, "(token: "), (None, 401, "(token: "), ("T3", 403, "(identity: ")]:
            agent = self.start_agent(token=token)
            self.assert_stopped(agent, status, f"the gateway answered {status} {word}")

    def test_callable_is_called_for_each_attempt(self) -> None:
        tokens = iter(["X", "T1", "T2"])
        agent = self.start_agent(token=lambda: next(tokens))
        self.assertFalse(agent.connected)
        self.assert_next_attempt_after(0.5)
        self.assertTrue(agent.connected)
        self.gateway.disconnect("demo-1", 1008, "token expired")
        self.assert_next_attempt_after(1.0)
        self.assertEqual(self.gateway.openings[-1].headers["authorization"], "Bearer T2")

    def test_deferred_and_coroutine(self) -> None:
        async def token() -> str:
            return await succeed("T1")

        self.assertTrue(self.start_agent(token=token).connected)
        self.assertTrue(self.start_agent(token=lambda: succeed("T2")).connected)

    def test_token_fails(self) -> None:
        tokens: list[Any] = ["bad\r\ntoken", 7, LookupError("the vault is shut")]

        def token() -> Any:
            value = tokens.pop(0) if tokens else "T1"
            if isinstance(value, Exception):
                raise value
            return value

        agent = self.start_agent(token=token)
        for delay in (0.5, 1.0, 2.0):
            self.assertFalse(agent.connected)
            self.gateway.advance(delay)
        self.assertTrue(agent.connected)

    def test_token_times_out(self) -> None:
        agent = self.start_agent(token=Deferred, open_timeout=5.0)
        stopped = agent.stop()
        self.successResultOf(stopped)
        self.assertEqual(self.gateway.clock.getDelayedCalls(), [])

    def test_token_is_never_logged(self) -> None:
        events: list[dict[str, Any]] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        tokens = iter(["WRONG-SECRET", "BAD SECRET"])
        agent = self.start_agent(token=lambda: next(tokens, "T1"))
        self.gateway.advance(1)
        self.gateway.advance(1)
        self.assertTrue(agent.connected)
        self.assertNotIn("SECRET", repr(events))
        self.assertNotEqual(events, [])

    def test_1008_with_a_static_token(self) -> None:
        agent = self.start_agent(token="T1")
        self.gateway.disconnect("demo-1", 1008, "token expired")
        self.assert_stopped(agent, 1008, "with 1008 'token expired'")


class HandlerTests(AgentTestCase):
    def test_call(self) -> None:
        self.start_agent(methods={"echo": lambda params: params})
        self.assertEqual(self.successResultOf(self.gateway.call("demo-1", "echo", {"a": [1]})), {"a": [1]})

    def test_errors(self) -> None:
        def refuse(params: Any) -> None:
            raise AgentError(1, "one", {"x": 2})

        def fail(params: Any) -> None:
            raise KeyError("secret")

        self.start_agent(methods={"refuse": refuse, "fail": fail})
        for method, code, message, data in [
            ("refuse", 1, "one", {"x": 2}),
            ("fail", -32603, "internal error", None),
            ("nothing", -32601, "method not found", None),
            ("gateway.goaway", -32601, "method not found", None),
        ]:
            error = self.failureResultOf(self.gateway.call("demo-1", method), RpcFailed).value
            self.assertEqual((error.code, error.message, error.data), (code, message, data))
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)

    def test_response_is_sent_on_the_connection_of_the_call(self) -> None:
        waiting: list[Deferred[str]] = []

        def slow(params: Any) -> Deferred[str]:
            waiting.append(Deferred())
            return waiting[-1]

        self.start_agent(methods={"slow": slow})
        lost = self.gateway.call("demo-1", "slow")
        self.gateway.drop("demo-1")
        self.failureResultOf(lost, RpcFailed)
        self.gateway.advance(1)
        answer = self.gateway.call("demo-1", "slow")
        waiting[0].callback("the old one")
        self.gateway.flush()
        self.assertNoResult(answer)
        waiting[1].callback("the new one")
        self.gateway.flush()
        self.assertEqual(self.successResultOf(answer), "the new one")

    def test_notifications(self) -> None:
        known: list[Any] = []
        others: list[Any] = []
        self.start_agent(
            notifications={"policy.changed": known.append},
            on_notification=lambda method, params: others.append((method, params)),
        )
        self.gateway.notify("demo-1", "policy.changed", [3])
        self.gateway.notify("demo-1", "else", {"x": 1})
        self.gateway.notify("demo-1", "gateway.anything", [1])
        self.assertEqual((known, others), ([[3]], [("else", {"x": 1})]))

    def test_notifications_without_handler(self) -> None:
        agent = self.start_agent()
        self.gateway.notify("demo-1", "policy.changed", [3])
        self.assertTrue(agent.connected)


class CallTests(AgentTestCase):
    def test_call(self) -> None:
        self.gateway.serve("policy.get", lambda client_id, params: [client_id, params])
        agent = self.start_agent()
        answer = agent.call("policy.get", {"name": "x"})
        self.gateway.flush()
        self.assertEqual(self.successResultOf(answer), ["demo-1", {"name": "x"}])

    def test_error(self) -> None:
        agent = self.start_agent()
        answer = agent.call("policy.get")
        self.gateway.flush()
        self.assertEqual(self.failureResultOf(answer, RpcFailed).value.code, -32601)

    def test_deadlines(self) -> None:
        self.gateway.serve("never", lambda client_id, params: Deferred())
        agent = self.start_agent(call_timeout=7.0)
        usual, short = agent.call("never"), agent.call("never", timeout=2.0)
        self.gateway.advance(2)
        self.failureResultOf(short, CallTimedOut)
        self.gateway.advance(4.9)
        self.assertNoResult(usual)
        self.gateway.advance(0.1)
        self.failureResultOf(usual, CallTimedOut)

    def test_cancel(self) -> None:
        self.gateway.serve("never", lambda client_id, params: Deferred())
        answer = self.start_agent().call("never")
        answer.cancel()
        self.failureResultOf(answer, CancelledError)

    def test_connection_lost(self) -> None:
        self.gateway.serve("never", lambda client_id, params: Deferred())
        agent = self.start_agent()
        answer = agent.call("never")
        self.gateway.disconnect("demo-1", 1001)
        self.failureResultOf(answer, ConnectionLost)
        self.failureResultOf(agent.call("never"), NotConnected)

    def test_stop_fails_calls_in_flight(self) -> None:
        agent = self.start_agent()
        answer = agent.call("m")
        agent.stop()
        self.failureResultOf(answer, ConnectionLost)

    def test_notify(self) -> None:
        agent = self.start_agent()
        self.successResultOf(agent.notify("job.done", {"job": 9}))
        self.gateway.flush()
        self.assertEqual(self.gateway.received, [Received("demo-1", "job.done", {"job": 9})])

    def test_notify_waits_for_room(self) -> None:
        agent = self.start_agent()
        sent = agent.notify("log", ["x" * 100000])
        self.assertNoResult(sent)
        self.gateway.flush()
        self.successResultOf(sent)

    def test_notify_fails_if_the_connection_is_lost(self) -> None:
        agent = self.start_agent()
        self.gateway.freeze("demo-1")
        sent = agent.notify("log", ["x" * 100000])
        self.assertNoResult(sent)
        agent.stop()
        self.gateway.advance(10)
        self.failureResultOf(sent, ConnectionLost)

    def test_notify_invalid_params(self) -> None:
        agent = self.start_agent(max_message_size=1000)
        self.failureResultOf(agent.notify("log", 7), TypeError)
        self.failureResultOf(agent.notify("log", ["x" * 1000]), ValueError)
        self.assertTrue(agent.connected)


EPOCH = 1_800_000_000.0


class TokenRenewalTests(AgentTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.made = 0

    def now(self) -> float:
        return EPOCH + self.gateway.clock.seconds()

    def token(self) -> str:
        """Return a new token that is valid for 100 s."""
        self.made += 1
        return jwt({"exp": self.now() + 100, "n": self.made})

    def start_with_token(self, **options: Any) -> Agent:
        return self.start_agent(**{"token": self.token, "now": self.now, **options})

    def sent_tokens(self) -> list[Any]:
        """Return the params of ``gateway.token`` since the last call."""
        said = [received.params for received in self.gateway.received if received.method == "gateway.token"]
        self.gateway.received.clear()
        return said

    def test_renewed_before_expiry(self) -> None:
        self.start_with_token()
        self.assertEqual(
            self.gateway.openings[0].headers["authorization"], f"Bearer {jwt({'exp': EPOCH + 100, 'n': 1})}"
        )
        self.gateway.advance(79.9)
        self.assertEqual(self.sent_tokens(), [])
        self.gateway.advance(0.1)
        self.assertEqual(self.sent_tokens(), [{"token": jwt({"exp": EPOCH + 180, "n": 2})}])
        self.gateway.advance(80)
        self.assertEqual(self.sent_tokens(), [{"token": jwt({"exp": EPOCH + 260, "n": 3})}])
        self.assertEqual(self.attempts(), 1)

    def test_renew(self) -> None:
        tokens = ["one", "two"]
        agent = self.start_with_token(token=lambda: tokens.pop(0))
        self.gateway.advance(1000)
        self.assertEqual(self.sent_tokens(), [])
        self.successResultOf(agent.renew())
        self.gateway.flush()
        self.assertEqual(self.gateway.received, [Received("demo-1", "gateway.token", {"token": "two"})])

    def test_renew_in_on_connected(self) -> None:
        self.start_with_token(on_connected=lambda agent: agent.renew())
        self.assertEqual(self.sent_tokens(), [{"token": jwt({"exp": EPOCH + 100, "n": 2})}])

    def test_renew_fails(self) -> None:
        agent = self.start_agent(token="opaque")
        self.assertIn("not a callable", str(self.failureResultOf(agent.renew(), ValueError).value))
        self.failureResultOf(self.gateway.agent("x").renew(), ValueError)
        self.failureResultOf(self.gateway.agent("x", token=self.token).renew(), NotConnected)

    def test_static_token_is_not_renewed(self) -> None:

        self.start_with_token(token=self.token())
        self.gateway.advance(200)
        self.assertEqual(self.sent_tokens(), [])

    def test_renew_without_token(self) -> None:
        agent = self.start_with_token(token=lambda: None)
        self.assertTrue(agent.connected)
        self.failureResultOf(agent.renew(), ValueError)

    def test_each_connection_has_its_own_expiry(self) -> None:
        self.start_with_token()
        self.gateway.advance(40)
        self.gateway.drop("demo-1")
        self.gateway.advance(0.5)
        self.assertEqual((self.attempts(), self.made), (2, 2))
        self.gateway.advance(79.9)
        self.assertEqual(self.sent_tokens(), [])
        self.gateway.advance(0.2)
        self.assertEqual(len(self.sent_tokens()), 1)

    def test_renewal_uses_only_the_newer_connection(self) -> None:
        """The older connection is handed off; its close does not affect the renewal."""
        serving: Deferred[None] = Deferred()
        agent = self.start_with_token(methods={"slow": lambda params: serving})
        self.gateway.call("demo-1", "slow").addErrback(lambda _: None)
        self.gateway.goaway("demo-1", "ws://other.test/v1/connect?client_id=demo-1", 2.0, close=False)
        self.gateway.advance(2)
        self.assertEqual(self.attempts(), 2)
        self.gateway.advance(80)
        self.assertEqual(len(self.sent_tokens()), 1)
        agent.stop()
        self.gateway.flush()
        self.assert_stopped(agent, None, "stop() was called")

    def test_stop_during_renewal(self) -> None:
        coming: list[Any] = [self.token(), Deferred()]
        agent = self.start_with_token(token=lambda: coming.pop(0))
        waiting = agent.renew()
        agent.stop()
        self.gateway.flush()
        self.failureResultOf(waiting, NotConnected)
        self.assert_stopped(agent, None, "stop() was called")

    def test_token_expires(self) -> None:
        """The gateway closes with 1008 if it receives no new token in time."""
        tokens: list[Any] = [self.token(), *[LookupError("shut")] * 4]

        def token() -> str:
            result = tokens.pop(0) if tokens else self.token()
            if isinstance(result, Exception):
                raise result
            return result

        agent = self.start_with_token(token=token)
        self.gateway.advance(81)
        self.gateway.disconnect("demo-1", 1008, "token expired")
        self.gateway.advance(10)
        self.assertTrue(agent.connected)
        self.assertEqual(self.sent_tokens(), [])

    def test_token_is_never_logged(self) -> None:
        tokens = ["SECRET-1", "SECRET 2", "SECRET-3"]
        with capturedLogs() as logs:
            agent = self.start_with_token(token=lambda: tokens.pop(0))
            self.failureResultOf(agent.renew(), ValueError)
            self.successResultOf(agent.renew())
        self.assertNotIn("SECRET", repr(logs))
        self.assertEqual(len([event for event in logs if "cannot be renewed" in event["log_format"]]), 1)


class InvalidNotificationTests(AgentTestCase):
    def test_invalid_goaway_params(self) -> None:
        """It is ignored, and logged once."""
        agent = self.start_agent()
        session = self.gateway._connections["demo-1"].session
        with capturedLogs() as logs:
            for _ in range(10):
                session._send(b'{"jsonrpc":"2.0","method":"gateway.goaway","params":{"after":1e400}}')
            self.gateway.flush()
        self.assertEqual(
            [event["log_format"] for event in logs], ["notification {method!a}: its params could not be read"]
        )
        self.assertNotIn("log_failure", logs[0])
        self.assertTrue(agent.connected)
        self.assertEqual(self.attempts(), 1)


class _ServerProtocol(WebSocketServerProtocol):  # type: ignore[misc]
    """Calls ``echo`` of the client once."""

    def onConnect(self, request: Any) -> Any:
        return request.protocols[0]

    def onOpen(self) -> None:
        self.sendMessage(b'{"jsonrpc":"2.0","id":"a","method":"echo","params":[1]}')

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.factory.answered.callback(payload)

    def onClose(self, wasClean: bool, code: int, reason: str) -> None:
        self.factory.closed.callback((wasClean, code))


class SocketTests(TestCase):
    """Tests on real sockets, with an independent WebSocket server."""

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

    async def test_tls_certificate_of_another_host(self) -> None:
        """Nothing is sent to a server whose certificate is not for the host of the url."""
        authority = trustme.CA()
        factory, port = await self.listen(server_options(authority, "other.example"))
        roots = Certificate.loadPEM(authority.cert_pem.bytes())
        reason: Deferred[str] = Deferred()

        def observe(event: dict[str, Any]) -> None:
            if "could not connect" in event.get("reason", "") and not reason.called:
                reason.callback(event["reason"])

        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)
        agent = self.agent(f"wss://localhost:{port}", tls=lambda host: optionsForClientTLS(host, trustRoot=roots))
        self.assertIn("VerificationError", await reason)
        self.assertFalse(factory.answered.called)
        await agent.stop()


def server_options(authority: trustme.CA, host: str) -> CertificateOptions:
    issued = authority.issue_cert(host)
    pem = issued.private_key_and_cert_chain_pem.bytes()
    return PrivateCertificate.loadPEM(pem).options()
