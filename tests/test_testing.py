"""Tests of gateway.testing."""

from __future__ import annotations

import re
import unittest
from pathlib import Path
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IConsumer, ITransport
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.agent import Agent, AgentError, RpcFailed
from gateway.testing import HIGH_WATER_MARK, MemoryConnection, MemoryGateway, MemoryTransport, Received


class MemoryGatewayTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.gateway = MemoryGateway()

    def start(self, client_id: str = "demo-1", **options: Any) -> Agent:
        agent = self.gateway.agent(client_id, **options)
        agent.start()
        self.gateway.flush()
        return agent

    def refused(self, answer: Deferred[Any]) -> tuple[int, str, Any]:
        error = self.failureResultOf(answer, RpcFailed).value
        return error.code, error.message, error.data

    def test_agent_made_by_the_test(self) -> None:
        clock = Clock()
        gateway = MemoryGateway(clock)
        agent = Agent("wss://any.example/prefix", client_id="x", reactor=clock, connect=gateway.endpoint)
        agent.start()
        gateway.flush()
        self.assertEqual(gateway.clients, ["x"])
        self.assertEqual(gateway.openings[0].url, "wss://any.example:443/prefix/v1/connect?client_id=x")

    def test_invalid_client_id(self) -> None:
        url = "ws://gateway.test/v1/connect?client_id=a//b"
        agent = Agent(url, reactor=self.gateway.clock, connect=self.gateway.endpoint)
        agent.start()
        self.gateway.flush()
        self.assertEqual((agent.connected, self.gateway.clients), (False, []))
        self.flushLoggedErrors()
        self.assertRaises(ValueError, self.gateway.agent, "a//b")

    def test_call(self) -> None:
        self.start(methods={"echo": lambda params: params})
        self.start("demo-2", methods={"echo": lambda params: "two"})
        self.assertEqual(self.gateway.clients, ["demo-1", "demo-2"])
        self.assertEqual(self.successResultOf(self.gateway.call("demo-1", "echo", {"a": 1})), {"a": 1})
        self.assertEqual(self.successResultOf(self.gateway.call("demo-2", "echo")), "two")

    def test_marks(self) -> None:
        """``sent`` counts in errors of the gateway only, in both directions."""
        forged = {"client": "demo-1", "sent": False}

        def forge(*args: Any) -> None:
            raise AgentError(-32004, "the client's node cannot be reached", forged)

        def failure(answer: Deferred[Any]) -> tuple[int, bool, bool]:
            self.gateway.flush()
            error = self.failureResultOf(answer, RpcFailed).value
            return error.code, error.gateway, error.sent

        agent = self.start(methods={"forge": forge, "slow": lambda params: Deferred()})
        self.assertEqual(failure(self.gateway.call("nobody", "forge")), (-32001, True, False))
        self.assertEqual(failure(self.gateway.call("demo-1", "forge")), (-32004, False, True))
        self.assertEqual(failure(self.gateway.call("demo-1", "other")), (-32601, False, True))
        slow = self.gateway.call("demo-1", "slow", timeout=1)
        self.gateway.advance(1)
        self.assertEqual(failure(slow), (-32002, True, True))
        # No backend serves.
        answer = agent.call("forge")
        self.assertEqual(failure(answer), (-32601, True, False))
        self.gateway.serve("forge", forge)
        self.gateway.serve("large", lambda client_id, params: "x" * 2**20)
        self.assertEqual(failure(agent.call("forge")), (-32004, False, True))
        self.assertEqual(failure(agent.call("other")), (-32601, False, True))
        self.assertEqual(failure(agent.call("gateway.other")), (-32601, True, False))
        self.assertEqual(failure(agent.call("large")), (-32006, True, True))

    def test_errors_of_the_gateway(self) -> None:
        waiting: Deferred[Any] = Deferred()
        self.start(methods={"slow": lambda params: waiting})
        self.assertEqual(
            self.refused(self.gateway.call("nobody", "echo")),
            (-32001, "client not connected", {"client": "nobody", "sent": False}),
        )
        slow = self.gateway.call("demo-1", "slow", timeout=5)
        self.gateway.advance(5)
        self.assertEqual(self.refused(slow), (-32002, "no response in time", {"client": "demo-1", "sent": True}))
        lost = self.gateway.call("demo-1", "slow")
        self.gateway.drop("demo-1")
        self.assertEqual(
            self.refused(lost),
            (-32003, "connection lost before the response", {"client": "demo-1", "sent": True}),
        )

    def test_error_of_the_agent(self) -> None:
        def refuse(params: Any) -> None:
            raise AgentError(1, "one")

        self.start(methods={"refuse": refuse})
        self.assertEqual(self.refused(self.gateway.call("demo-1", "refuse")), (1, "one", None))

    def test_notify(self) -> None:
        got: list[Any] = []
        self.start(notifications={"n": got.append})
        self.gateway.notify("demo-1", "n", [1])
        self.assertEqual(got, [[1]])

    def test_unknown_client(self) -> None:
        for act in [
            lambda: self.gateway.notify("nobody", "n"),
            lambda: self.gateway.goaway("nobody"),
            lambda: self.gateway.disconnect("nobody"),
            lambda: self.gateway.drop("nobody"),
            lambda: self.gateway.freeze("nobody"),
        ]:
            self.assertRaises(RpcFailed, act)

    def test_received(self) -> None:
        agent = self.start()
        agent.notify("n", [1])
        agent.notify("n")
        self.assertEqual(self.gateway.received, [])
        self.gateway.flush()
        self.assertEqual(self.gateway.received, [Received("demo-1", "n", [1]), Received("demo-1", "n", None)])

    def test_serve(self) -> None:
        self.gateway.serve("who", lambda client_id, params: client_id)
        answers = [self.start(client_id).call("who") for client_id in ("a", "b")]
        self.gateway.flush()
        self.assertEqual([self.successResultOf(answer) for answer in answers], ["a", "b"])

    def test_refuse(self) -> None:
        self.gateway.refuse(503, {"Retry-After": "1"}, times=2)
        self.start()
        self.assertEqual((self.gateway.clients, len(self.gateway.openings)), ([], 1))
        self.gateway.advance(1.5)
        self.assertEqual((self.gateway.clients, len(self.gateway.openings)), ([], 2))
        self.gateway.advance(2)
        self.assertEqual((self.gateway.clients, len(self.gateway.openings)), (["demo-1"], 3))

    def test_not_listening(self) -> None:
        self.gateway.listening = False
        self.start()
        self.assertEqual((self.gateway.clients, self.gateway.openings), ([], []))

    def test_unknown_path(self) -> None:
        agent = self.gateway.agent("demo-1", url="ws://x/other?y=/v1/connect")
        self.assertEqual(agent.client_id, "demo-1")
        self.gateway.refuse(307, {"Location": "/nowhere"})
        agent.start()
        self.gateway.flush()
        self.assertEqual(self.gateway.openings[-1].url, "ws://x:80/nowhere")
        self.assertEqual(self.gateway.clients, [])

    def test_freeze_both_directions(self) -> None:
        self.start(methods={"echo": lambda params: params})
        self.gateway.freeze("demo-1")
        answer = self.gateway.call("demo-1", "echo", timeout=5)
        self.assertNoResult(answer)
        self.gateway.advance(5)
        self.assertEqual(self.refused(answer)[0], -32002)
        self.assertEqual(self.gateway.clients, ["demo-1"])

    def test_advance_runs_calls_in_order(self) -> None:
        times: list[float] = []
        clock = self.gateway.clock

        def again() -> None:
            times.append(clock.seconds())
            clock.callLater(1.0, again)

        clock.callLater(1.0, again)
        self.gateway.advance(3.5)
        self.assertEqual((times, clock.seconds()), ([1.0, 2.0, 3.0], 3.5))

    def test_endless_flush_raises(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "no end after 1000 deliveries"):
            self.start(jitter=lambda: 0.0, on_connected=lambda agent: self.gateway.disconnect("demo-1"))

    def test_calls_from_handlers(self) -> None:
        """A handler may use the gateway; its messages are delivered after it returns."""
        agent = self.start(methods={"back": lambda params: params})
        self.gateway.serve("there", lambda client_id, params: self.gateway.call(client_id, "back", params))
        answer = agent.call("there", [1])
        self.gateway.flush()
        self.assertEqual(self.successResultOf(answer), [1])

    def test_stopped_agent_leaves_no_delayed_calls(self) -> None:
        agent = self.start()
        stopped = agent.stop()
        self.gateway.flush()
        self.successResultOf(stopped)
        self.assertEqual((self.gateway.clients, self.gateway.clock.getDelayedCalls()), ([], []))


class DocumentationTests(SynchronousTestCase):
    """The example of docs/agent.rst passes."""

    def test_example(self) -> None:
        text = (Path(__file__).parent.parent / "docs" / "agent.rst").read_text(encoding="utf-8")
        blocks = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", text)
        for block in blocks:
            compile(re.sub("(?m)^    ", "", block), "docs/agent.rst", "exec")
        namespace: dict[str, Any] = {"__name__": "example"}
        exec(re.sub("(?m)^    ", "", blocks[-1]), namespace)
        suite = unittest.defaultTestLoader.loadTestsFromTestCase(namespace["ThermometerTests"])
        self.assertEqual(suite.countTestCases(), 3)
        result = unittest.TestResult()
        suite.run(result)
        self.assertEqual((result.testsRun, result.errors, result.failures), (3, [], []))


HERE, THERE = IPv4Address("TCP", "192.0.2.1", 1), IPv4Address("TCP", "192.0.2.2", 2)


class FakeProducer:
    def __init__(self) -> None:
        self.told: list[str] = []

    def pauseProducing(self) -> None:
        self.told.append("pause")

    def resumeProducing(self) -> None:
        self.told.append("resume")


class MemoryTransportTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.end = MemoryTransport(HERE, THERE)

    def test_interfaces(self) -> None:
        verifyObject(ITransport, self.end)
        verifyObject(IConsumer, self.end)

    def test_addresses(self) -> None:
        self.assertEqual((self.end.getHost(), self.end.getPeer()), (HERE, THERE))

    def test_take_unsent_clears(self) -> None:
        self.end.write(b"a")
        self.end.writeSequence([b"b", b"c"])
        self.assertEqual([self.end.take_unsent(), self.end.take_unsent()], [b"abc", b""])

    def test_lose_connection_delivers_earlier_writes_only(self) -> None:
        self.end.write(b"a")
        self.end.loseConnection()
        self.end.write(b"b")
        self.assertEqual(self.end.take_unsent(), b"a")
        self.assertFalse(self.end.is_aborted)

    def test_abort_drops_unsent_data(self) -> None:
        self.end.write(b"a")
        self.end.abortConnection()
        self.end.write(b"b")
        self.assertEqual(self.end.take_unsent(), b"")
        self.assertTrue(self.end.is_aborted)

    def test_producer_is_paused_and_resumed_once(self) -> None:
        producer = FakeProducer()
        self.end.registerProducer(producer, True)
        self.end.write(b"x" * HIGH_WATER_MARK)
        self.assertEqual(producer.told, [])
        self.end.write(b"x")
        self.end.write(b"x")
        self.assertEqual(producer.told, ["pause"])
        self.end.take_unsent()
        self.end.take_unsent()
        self.assertEqual(producer.told, ["pause", "resume"])

    def test_unregistered_producer_is_not_called(self) -> None:
        producer = FakeProducer()
        self.end.registerProducer(producer, True)
        self.end.write(b"x" * (HIGH_WATER_MARK + 1))
        self.end.unregisterProducer()
        self.end.write(b"x")
        self.end.take_unsent()
        self.assertEqual(producer.told, ["pause"])


class RecordingProtocol(Protocol):
    """Records its events in a list that both sides share."""

    def __init__(self, name: str, told: list[tuple[str, object]]) -> None:
        self.name = name
        self.events = told

    def connectionMade(self) -> None:
        self.events.append((self.name, "made"))

    def dataReceived(self, data: bytes) -> None:
        self.events.append((self.name, data))

    def connectionLost(self, reason: Failure) -> None:
        self.events.append((self.name, reason.type))


class MemoryConnectionTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.events: list[tuple[str, object]] = []
        self.client, self.server = RecordingProtocol("near", self.events), RecordingProtocol("far", self.events)
        self.connection = MemoryConnection(self.client, self.server)

    def take_events(self) -> list[tuple[str, object]]:
        told = self.events[:]
        self.events.clear()
        return told

    def deliver_all(self) -> list[tuple[str, object]]:
        self.take_events()
        moves = sum(1 for _ in range(10) if self.connection.deliver())
        self.assertLess(moves, 10, "it does not settle")
        return self.take_events()

    def test_client_connection_made_is_last(self) -> None:
        self.assertEqual(self.take_events(), [("far", "made"), ("near", "made")])
        self.assertFalse(self.connection.deliver())

    def test_addresses_match(self) -> None:
        near, far = self.client.transport, self.server.transport
        self.assertEqual((near.getHost(), near.getPeer()), (far.getPeer(), far.getHost()))
        self.assertNotEqual(near.getHost(), near.getPeer())

    def test_both_directions(self) -> None:
        self.client.transport.write(b"a")
        self.server.transport.write(b"b")
        self.assertEqual(self.deliver_all(), [("far", b"a"), ("near", b"b")])

    def test_has_transport(self) -> None:
        self.assertTrue(self.connection.has_transport(self.client.transport))
        self.assertTrue(self.connection.has_transport(self.server.transport))
        self.assertFalse(self.connection.has_transport(MemoryTransport(HERE, THERE)))

    def test_clean_close_comes_after_data(self) -> None:
        self.server.transport.write(b"bye")
        self.server.transport.loseConnection()
        self.assertEqual(self.deliver_all(), [("near", b"bye"), ("near", ConnectionDone), ("far", ConnectionDone)])
        self.assertTrue(self.connection.is_closed)

    def test_abort_reasons(self) -> None:
        self.server.transport.write(b"never")
        self.client.transport.abortConnection()
        self.assertEqual(self.deliver_all(), [("near", ConnectionAborted), ("far", ConnectionLost)])

    def test_closed_connection_delivers_nothing(self) -> None:
        self.client.transport.loseConnection()
        self.deliver_all()
        self.server.transport.write(b"x")
        self.assertEqual(self.deliver_all(), [])

    def test_frozen(self) -> None:
        """Neither data nor the end of the connection is delivered until it is unfrozen."""
        self.connection.is_frozen = True
        self.client.transport.write(b"a")
        self.server.transport.loseConnection()
        self.assertEqual(self.deliver_all(), [])
        self.connection.is_frozen = False
        self.assertEqual(self.deliver_all(), [("far", b"a"), ("near", ConnectionDone), ("far", ConnectionDone)])

    def test_abort_of_frozen_connection(self) -> None:
        self.connection.is_frozen = True
        self.client.transport.abortConnection()
        self.assertEqual(self.deliver_all(), [("near", ConnectionAborted), ("far", ConnectionLost)])
