"""Tests for :mod:`gateway.node`: a node as a service in this process, and its signal handlers."""

from __future__ import annotations

import atexit
import gc
import hashlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway import node
from gateway.auth.errors import TokenRefusedError
from gateway.auth.interface import Credentials, Identity
from gateway.cluster.routing import Destination
from gateway.node import Node
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location, SessionKey
from gateway.settings import ConfigError, make_settings

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ANY_PORT = ("tcp:0:interface=127.0.0.1:backlog=4096",)


HANDSHAKE_REQUEST = (
    b"GET /v1/connect?client_id=a HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class CollectingProtocol(Protocol):
    """A client that keeps what it receives, and sends nothing by itself."""

    received = b""

    def dataReceived(self, data: bytes) -> None:
        self.received += data


class UnstoppableReactor:
    """The reactor of the tests; ``stop()`` calls ``stop`` instead of stopping it."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.stop = stop

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)


class NodeTests(TestCase):
    timeout = 30

    def setUp(self) -> None:
        self.stops = 0
        for signum in SIGNALS:
            self.addCleanup(signal.signal, signum, signal.getsignal(signum))
        self.stopped: Deferred[None] = Deferred()
        self.reactor = UnstoppableReactor(self.count_stop)
        self.exits: list[int] = []
        self.patch(os, "_exit", self.exits.append)

    def count_stop(self) -> None:
        self.stops += 1
        if not self.stopped.called:
            self.stopped.callback(None)

    def make(self, **values: Any) -> Node:
        values = {"registry": f"sqlite:{self.mktemp()}", "listen": ANY_PORT, "backend": ANY_PORT, **values}
        return Node(make_settings({name.replace("_", "-"): value for name, value in values.items()}), self.reactor)

    async def start(self, node: Node) -> Node:
        node.privilegedStartService()
        node.startService()
        self.addCleanup(node.stopService)
        await self.wait_until(lambda: not node.unready_reason())
        return node

    async def wait_until(self, condition: Any) -> None:
        while not condition():
            await deferLater(reactor, 0.001)

    async def test_ready_from_join_to_stop(self) -> None:
        node = self.make(node_name="n")
        self.assertEqual(node.unready_reason(), "starting")
        await self.start(node)
        (status,) = await node.registry.nodes()
        self.assertEqual((status.node_id, status.name, status.state), (node.node_id, "n", "up"))
        self.assertEqual((status.public_url, status.peer_url), (node.public_url, node.peer_url))
        self.assertRegex(node.public_url, r"^ws://127\.0\.0\.1:[1-9]")
        await node.stopService()
        self.assertEqual(node.unready_reason(), "draining")
        await node.stopService()

    async def test_an_endpoint_that_fails_later_stops_the_node(self) -> None:
        """Some kinds of endpoint fail only once the reactor runs."""

        async def listen(option: str, *_: object, **__: object) -> None:
            await deferLater(reactor, 0)
            raise ConfigError(option, "failed later")

        self.patch(atexit, "register", mock.Mock())
        node = self.make()
        with mock.patch("gateway.net.endpoints.listen", listen), mock.patch("sys.__stderr__", io.StringIO()) as stderr:
            node.privilegedStartService()
            node.startService()
            self.addCleanup(node.stopService)
            await self.stopped
        self.assertEqual(stderr.getvalue(), "wsgateway: --backend: failed later\n")
        atexit.register.assert_called_once_with(os._exit, 1)  # type: ignore[attr-defined]

    async def test_an_unusable_registry_fails_before_the_reactor_runs(self) -> None:
        node = self.make(registry="sqlite:/no/such/folder/r.sqlite")
        self.patch(sys, "excepthook", sys.excepthook)
        with mock.patch("sys.__stderr__", io.StringIO()) as stderr, self.assertRaises(ConfigError):
            node.startService()
        self.addCleanup(node.stopService)
        self.assertRegex(stderr.getvalue(), r"^wsgateway: --registry: .*/no/such/folder.*\n$")

    async def test_nodes_with_the_same_registry_find_each_other(self) -> None:
        registry = f"sqlite:{self.mktemp()}"
        first = await self.start(self.make(registry=registry, node_name="first"))
        self.assertEqual(len(first.components.node_directory), 0)
        second = await self.start(self.make(registry=registry, node_name="second"))
        self.assertEqual([node.name for node in second.components.node_directory.peer_nodes()], ["first"])
        destination = second.components.drain.destination_for("a")
        assert destination is not None
        self.assertTrue(destination.url.startswith(f"{first.public_url}/v1/connect?"))
        self.assertEqual(destination.node_id, first.node_id)

    async def test_the_previous_owner_is_notified_of_a_revoked_claim(self) -> None:
        node = await self.start(self.make())
        previous_owner = Location("x", "n", "n", "ws://192.0.2.1:81", 7, 0.0, "192.0.2.9:1")
        notified: list[Any] = []
        self.patch(node.sessions, "restore_claim", lambda *claim: notified.append(claim))
        self.patch(node.components.peer_client, "notify_claim_revoked", lambda *claim: notified.append(claim))
        assert node.registry._batcher is not None
        node.registry._batcher._on_claim_revoked(SessionKey("x", 9), previous_owner)
        self.assertEqual(notified, [(("x", 9),), (previous_owner, 9)])

    async def test_the_reconciler_runs_until_the_stop(self) -> None:
        node = await self.start(self.make())
        self.assertTrue(node.components.reconciler._loop.running)
        await node.stopService()
        self.assertFalse(node.components.reconciler._loop.running)

    async def test_a_guessed_url_is_not_sent_to_clients(self) -> None:
        for listen, public_url, advertised in (
            (ANY_PORT, "", True),
            (("haproxy:tcp:0:interface=127.0.0.1",), "", False),
            (("haproxy:tcp:0:interface=127.0.0.1",), "wss://gateway.example", True),
        ):
            node = await self.start(self.make(listen=listen, public_url=public_url))
            url = f"{node.public_url}/v1/connect?client_id=a%2Fb&wsgateway_hop=1"
            expected = Destination(url) if advertised else None
            self.assertEqual(node.components.drain.destination_for("a/b"), expected)

    async def test_a_stop_waits_for_close_frames(self) -> None:
        node = await self.start(self.make())
        port = node._client_ports[0].getHost().port
        client = await TCP4ClientEndpoint(reactor, "127.0.0.1", port).connect(Factory.forProtocol(CollectingProtocol))
        client.transport.write(HANDSHAKE_REQUEST)
        await self.wait_until(lambda: b" 101 " in client.received)
        stopped = node.stopService()
        await self.wait_until(lambda: b"\x88" in client.received.partition(b"\r\n\r\n")[2])
        await self.wait_until(lambda: not node.registry._pools)
        for _ in range(5):
            await deferLater(reactor, 0)
        self.assertFalse(stopped.called)
        client.transport.write(b"\x88\x82\0\0\0\0\x03\xe9")
        await stopped

    async def test_idle_clients_are_parked(self) -> None:
        node = await self.start(self.make())
        gauge = node.metrics.gauges["parked"][1]
        self.assertEqual(gauge(), 0)
        port = node._client_ports[0].getHost().port
        client = await TCP4ClientEndpoint(reactor, "127.0.0.1", port).connect(Factory.forProtocol(CollectingProtocol))
        client.transport.write(HANDSHAKE_REQUEST)
        await self.wait_until(gauge)
        self.assertEqual((gauge(), node.sessions.count()), (1, 1))
        client.transport.loseConnection()
        await self.wait_until(lambda: not node.sessions.count())
        self.assertEqual(gauge(), 0)

    async def test_objects_of_the_start_are_frozen_for_the_garbage_collector(self) -> None:
        gc.unfreeze()
        await self.start(self.make())
        self.assertGreater(gc.get_freeze_count(), 0)

    async def test_configured_urls_are_kept(self) -> None:
        node = await self.start(self.make(public_url="wss://gateway.example", peer_url="ws://10.0.0.5:8081"))
        self.assertEqual((node.public_url, node.peer_url), ("wss://gateway.example", "ws://10.0.0.5:8081"))

    async def test_a_drain_stops_the_reactor_once(self) -> None:
        node = await self.start(self.make())
        await node.drain()
        await node.drain()
        await self.stopped
        self.assertEqual(self.stops, 1)
        self.assertEqual(node.unready_reason(), "draining")

    async def test_a_failed_drain_stops_the_node(self) -> None:
        node = await self.start(self.make())
        with mock.patch("gateway.cluster.drain.SessionDrain", side_effect=RuntimeError("broken")):
            await node.drain()
        await self.stopped
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)

    async def test_a_drain_before_the_start_stops_the_node(self) -> None:
        await self.make().drain()
        await self.stopped

    async def test_a_stop_does_not_wait_for_an_unavailable_registry(self) -> None:
        node = await self.start(self.make())
        with mock.patch.object(node.sessions, "close_all", side_effect=lambda *_: _failed()):
            await node.stopService()

    async def test_sigterm_drains_and_a_second_sigterm_exits(self) -> None:
        await self.start(self.make())
        os.kill(os.getpid(), signal.SIGTERM)
        await self.stopped
        self.assertEqual(self.exits, [])
        os.kill(os.getpid(), signal.SIGTERM)
        await self.wait_until(lambda: self.exits)
        self.assertEqual(self.exits, [1])

    async def test_drain_delay(self) -> None:
        node = await self.start(self.make(drain_delay=3600.0))
        os.kill(os.getpid(), signal.SIGTERM)
        await self.wait_until(lambda: node.unready_reason() == "draining")
        self.assertEqual(node.refusal_reason(), "")
        os.kill(os.getpid(), signal.SIGTERM)
        await self.stopped
        self.assertEqual((node.refusal_reason(), self.exits), ("draining", []))
        os.kill(os.getpid(), signal.SIGTERM)
        await self.wait_until(lambda: self.exits)
        self.assertEqual(self.exits, [1])

    async def test_sigint_in_the_drain_delay(self) -> None:
        node = await self.start(self.make(drain_delay=3600.0))
        drained = node.drain()
        os.kill(os.getpid(), signal.SIGINT)
        await self.stopped
        await node.stopService()
        await drained
        self.assertEqual(self.exits, [])

    async def test_sigint_stops_without_a_drain(self) -> None:
        node = await self.start(self.make())
        os.kill(os.getpid(), signal.SIGINT)
        await self.stopped
        self.assertEqual(node.unready_reason(), "")

    async def test_sighup_reloads_tokens_and_keeps_the_old_ones_if_the_file_is_invalid(self) -> None:
        path = Path(self.mktemp())
        path.write_text(f"a {hashlib.sha256(b'old').hexdigest()}\n")
        node = await self.start(self.make(auth=(f"tokens:{path}",)))
        path.write_text(f"a {hashlib.sha256(b'new').hexdigest()}\n")
        with capturedLogs() as logs:
            os.kill(os.getpid(), signal.SIGHUP)
            await self.wait_until(lambda: self.accepts(node, "new"))
        (reloaded,) = (event["reloaded"] for event in logs if "SIGHUP" in event.get("log_format", ""))
        self.assertEqual(reloaded.split(", ")[0], "--auth")
        self.assertFalse(self.accepts(node, "old"))
        path.write_text("nonsense\n")
        with capturedLogs() as logs:
            os.kill(os.getpid(), signal.SIGHUP)
            await self.wait_until(
                lambda: any("the previous content stays in effect" in event.get("log_format", "") for event in logs)
            )
        (reloaded,) = (event["reloaded"] for event in logs if "SIGHUP" in event.get("log_format", ""))
        self.assertNotIn("--auth", reloaded)
        self.assertTrue(self.accepts(node, "new"))

    def accepts(self, node: Node, token: str) -> bool:
        try:
            return node.components.authenticator.authenticate(Credentials(token)) == Identity("a")
        except TokenRefusedError:
            return False


async def _failed() -> None:
    raise RegistryUnavailableError("away")


HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class DeferringReactor:
    """Keeps the calls from threads until the test runs them."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def callFromThread(self, call: Callable[[], None]) -> None:
        self.calls.append(call)


class SignalHandlerTests(SynchronousTestCase):
    max_signals = 1

    def setUp(self) -> None:
        for signum in HANDLED_SIGNALS:
            self.addCleanup(signal.signal, signum, signal.getsignal(signum))
        self.exits: list[int] = []
        self.patch(os, "_exit", self.exits.append)
        self.reactor = DeferringReactor()
        self.handled: list[str] = []
        node.install_signal_handlers(
            self.reactor,
            {
                signal.SIGTERM: lambda: self.handled.append("term"),
                signal.SIGINT: lambda: self.handled.append("int"),
                signal.SIGHUP: lambda: self.handled.append("hup"),
            },
            max_signals=self.max_signals,
        )

    def run_pending(self) -> list[str]:
        while self.reactor.calls:
            self.reactor.calls.pop(0)()
        return self.handled

    def test_handlers_are_called_in_the_reactor(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        self.assertEqual(self.handled, [])
        self.assertEqual((self.run_pending(), self.exits), (["term"], []))

    def test_a_second_terminating_signal_exits_even_if_the_reactor_is_stuck(self) -> None:
        for first, second in ((signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGINT)):
            self.setUp()
            signal.raise_signal(first)
            signal.raise_signal(second)
            self.assertEqual(self.exits, [1])

    def test_second_sigterm_with_a_drain_delay(self) -> None:
        self.max_signals = 2
        self.setUp()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        self.assertEqual((self.run_pending(), self.exits), (["term", "term"], []))
        signal.raise_signal(signal.SIGTERM)
        self.assertEqual(self.exits, [1])

    def test_sighup_does_not_count_as_terminating(self) -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        self.assertEqual((self.run_pending(), self.exits), (["hup"] * 3 + ["term"], []))
