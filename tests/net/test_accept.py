"""Tests of gateway.net.accept, most of them with Twisted's own ports and transports."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import ssl
import stat
import struct
from typing import Any
from unittest import mock

import trustme
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import Clock, deferLater
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.metrics import Metrics
from gateway.net import accept, endpoints
from gateway.net.accept import (
    ACCEPT_PAUSE,
    IDLE_AFTER,
    LOG_INTERVAL,
    MAX_ACCEPTS_WHEN_IDLE,
    MAX_EVENTS,
    AcceptLimiter,
    HandshakePoller,
)
from gateway.settings import open_file_limit


class FakeSocket:
    """Listening socket whose accept() raises each of the given errnos once."""

    def __init__(self, *errnos: int) -> None:
        self.errnos = list(errnos)
        self.real = socket.socket()
        self.close_count = 0

    def fileno(self) -> int:
        return self.real.fileno()

    def accept(self) -> Any:
        if self.errnos:
            number = self.errnos.pop(0)
            raise OSError(number, os.strerror(number))
        return "connection", "address"

    def close(self) -> None:
        self.close_count += 1


class FakePort:
    disconnecting = False

    def __init__(self, *errnos: int) -> None:
        self.socket: Any = FakeSocket(*errnos)
        self.reading = True

    def stopReading(self) -> None:
        self.reading = False

    def startReading(self) -> None:
        self.reading = True


class AcceptLimiterTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.limiter = AcceptLimiter(self.clock, self.metrics)

    def port(self, *errnos: int, reserved_files: int = 0) -> FakePort:
        port = FakePort(*errnos)
        self.addCleanup(port.socket.real.close)
        self.limiter.throttle([port], reserved_files)
        return port

    def assert_paused(self, port: FakePort) -> None:
        with self.assertRaises(BlockingIOError) as caught:
            port.socket.accept()
        # Twisted checks this.
        self.assertEqual(caught.exception.args[0], errno.EAGAIN)
        self.assertFalse(port.reading)

    def test_accepts_a_connection(self) -> None:
        port = self.port()
        self.assertEqual(port.socket.accept(), ("connection", "address"))
        self.assertTrue(port.reading)
        self.assertFalse(self.metrics.accept_errors)

    def test_accepts_one_connection_per_iteration(self) -> None:
        """After each one the port gets EAGAIN. It continues reading, and accepts the next one in its next iteration."""
        port = self.port()
        for _ in range(3):
            self.assertEqual(port.socket.accept(), ("connection", "address"))
            with self.assertRaises(BlockingIOError) as caught:
                port.socket.accept()
            self.assertEqual(caught.exception.args[0], errno.EAGAIN)
            self.assertTrue(port.reading)
        self.assertFalse(self.metrics.accept_errors)

    def test_accepts_more_while_there_are_no_calls(self) -> None:
        poller = mock.Mock(is_idle=lambda: True)
        self.limiter = AcceptLimiter(self.clock, self.metrics, poller)
        port = self.port(reserved_files=1)
        poller.adopt_port.assert_called_once_with(port)
        for _ in range(MAX_ACCEPTS_WHEN_IDLE):
            self.assertEqual(port.socket.accept(), ("connection", "address"))
        self.assertRaises(BlockingIOError, port.socket.accept)
        self.assertEqual(port.socket.accept(), ("connection", "address"))

    def test_pauses_and_resumes_after_a_shortage(self) -> None:
        for name in ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"):
            port = self.port(getattr(errno, name))
            self.assert_paused(port)
            self.assertEqual(self.metrics.accept_errors[name], 1)
            self.clock.advance(ACCEPT_PAUSE - 0.01)
            self.assertFalse(port.reading)
            self.clock.advance(0.01)
            self.assertTrue(port.reading)
            self.assertEqual(port.socket.accept(), ("connection", "address"))
        self.assertEqual(self.metrics.accept_errors.total(), 4)

    def test_second_shortage_during_a_pause_starts_no_second_pause(self) -> None:
        port = self.port(errno.EMFILE, errno.EMFILE)
        self.assert_paused(port)
        self.assert_paused(port)
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)

    def test_other_errors_are_left_to_twisted(self) -> None:
        for number in (errno.EAGAIN, errno.ECONNABORTED, errno.EPERM, errno.EINVAL):
            port = self.port(number)
            with self.assertRaises(OSError) as caught:
                port.socket.accept()
            self.assertEqual(caught.exception.errno, number)
            self.assertTrue(port.reading)
        self.assertFalse(self.metrics.accept_errors)
        self.assertFalse(self.clock.getDelayedCalls())

    def test_reserved_files_are_left_to_others(self) -> None:
        port, other = FakePort(), self.port()
        self.addCleanup(port.socket.real.close)
        free = [os.dup(0) for _ in range(3)]
        for number in free:
            os.close(number)
        with mock.patch.object(accept, "open_file_limit", return_value=free[2] + 9):
            self.limiter.throttle([port], reserved_files=9)
        for _ in range(2):
            self.assertEqual(port.socket.accept(), ("connection", "address"))
            self.assertRaises(BlockingIOError, port.socket.accept)
            self.addCleanup(os.close, os.dup(0))
        self.assert_paused(port)
        self.assertEqual(self.metrics.accept_errors, {"reserve": 1})
        self.assertEqual(other.socket.accept(), ("connection", "address"))

    def test_check_for_reserved_files_leaves_no_file_open(self) -> None:
        port = self.port(reserved_files=1)
        before = os.listdir("/proc/self/fd")
        port.socket.accept()
        self.assertEqual(os.listdir("/proc/self/fd"), before)

    def test_stopped_port_does_not_resume(self) -> None:
        port = self.port(errno.EMFILE)
        self.assert_paused(port)
        port.disconnecting = True
        self.clock.advance(ACCEPT_PAUSE)
        self.assertFalse(port.reading)

    def test_closed_port_has_no_timer(self) -> None:
        port = self.port(errno.EMFILE)
        self.assert_paused(port)
        port.socket.close()
        self.assertFalse(self.clock.getDelayedCalls())
        self.assertEqual(port.socket.close_count, 1)

    def test_other_port_objects_are_left_unchanged(self) -> None:
        port = object()
        self.limiter.throttle([port])  # type: ignore[list-item]


class ShortageLogTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.limiter = AcceptLimiter(self.clock, Metrics())
        self.lines: list[str] = []

        def observe(event: Any) -> None:
            if event["log_namespace"] == "gateway.net.accept.AcceptLimiter":
                self.lines.append(event["log_format"].format(**event))

        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)

    def test_log_line_counts_suppressed_shortages(self) -> None:
        for _ in range(1000):
            self.limiter.record_shortage("EMFILE")
            self.clock.advance((LOG_INTERVAL - 1) / 1000)
        self.assertEqual(len(self.lines), 1)
        self.clock.advance(1.1)
        self.limiter.record_shortage("ENFILE")
        self.assertEqual(len(self.lines), 2)
        self.assertIn("ENFILE; 999 more times", self.lines[1])
        self.clock.advance(LOG_INTERVAL)
        self.limiter.record_shortage("ENFILE")
        self.assertIn("ENFILE; 0 more times", self.lines[2])

    def test_log_line_contains_a_remedy(self) -> None:
        limit = str(open_file_limit())
        for reason, remedies in [
            ("EMFILE", ("LimitNOFILE", limit, "--capacity")),
            ("reserve", ("LimitNOFILE", limit, "--capacity")),
            ("ENFILE", ("fs.file-max", "--capacity")),
            ("ENOBUFS", ("memory", "--capacity")),
            ("ENOMEM", ("memory", "--capacity")),
        ]:
            self.limiter.record_shortage(reason)
            self.clock.advance(LOG_INTERVAL)
            for remedy in remedies:
                self.assertIn(remedy, self.lines[-1])
        self.assertEqual(len(self.lines), 5)


class ExhaustedSocket:
    """Listening socket whose accept() fails with EMFILE a number of times."""

    def __init__(self, real: Any, times: int) -> None:
        self._real = real
        self.times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def accept(self) -> Any:
        if self.times:
            self.times -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._real.accept()


class GreetingProtocol(Protocol):
    def connectionMade(self) -> None:
        self.transport.write(b"welcome")


class TwistedPortTests(TestCase):
    """For each kind of endpoint: waiting connections are accepted after a shortage, and Twisted logs nothing."""

    async def port(self, description: str, times: int) -> Any:
        self.clock, self.metrics = Clock(), Metrics()
        (port,) = await endpoints.listen("listen", [description], Factory.forProtocol(GreetingProtocol), reactor)
        self.addCleanup(port.stopListening)
        port.socket = self.socket = ExhaustedSocket(port.socket, times)
        AcceptLimiter(self.clock, self.metrics).throttle([port])
        return port

    async def check(self, description: str, path: str = "", hello: bytes = b"", greeting: bytes = b"welcome") -> None:
        port = await self.port(description, times=2)
        lines: list[Any] = []
        globalLogPublisher.addObserver(lines.append)
        self.addCleanup(globalLogPublisher.removeObserver, lines.append)
        client = socket.socket(socket.AF_UNIX) if path else socket.socket()
        self.addCleanup(client.close)
        client.connect(path or ("127.0.0.1", port.getHost().port))
        client.send(hello)
        client.setblocking(False)
        for failures in (1, 2):
            while self.socket.times > 2 - failures:
                await deferLater(reactor, 0)
            self.assertEqual(self.metrics.accept_errors, {"EMFILE": failures})
            self.assertEqual(reactor.getReaders().count(port), 0)
            self.clock.advance(ACCEPT_PAUSE)
        self.assertEqual(await self.read(client, len(greeting)), greeting)
        self.assertEqual([line for line in lines if "EMFILE" in str(line.get("log_format"))], [])

    async def read(self, client: socket.socket, size: int) -> bytes:
        while True:
            try:
                return client.recv(size)
            except BlockingIOError:
                await deferLater(reactor, 0)

    async def test_tcp(self) -> None:
        await self.check("tcp:0:interface=127.0.0.1:backlog=1024")

    async def test_haproxy(self) -> None:
        await self.check(
            "haproxy:tcp:0:interface=127.0.0.1:backlog=1024", hello=b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n"
        )

    async def test_unix(self) -> None:
        path = self.mktemp()[-100:]
        await self.check(f"unix:{path}", path=path)
        self.assertTrue(stat.S_ISSOCK(os.stat(path).st_mode))

    async def test_ssl(self) -> None:
        pem = self.mktemp()
        trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
        hello = ssl.MemoryBIO()
        with self.assertRaises(ssl.SSLWantReadError):
            ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="node").do_handshake()
        await self.check(
            # The server responds with a handshake message, not an alert.
            *(f"ssl:0:interface=127.0.0.1:backlog=1024:privateKey={pem}", "", hello.read(), b"\x16\x03")
        )

    async def test_stop_listening_during_a_pause(self) -> None:
        port = await self.port("tcp:0:interface=127.0.0.1:backlog=1024", times=1)
        with socket.create_connection(("127.0.0.1", port.getHost().port)):
            while self.socket.times:
                await deferLater(reactor, 0)
            await port.stopListening()
        self.assertFalse(self.clock.getDelayedCalls())
        self.assertEqual(reactor.getReaders().count(port), 0)


class EchoProtocol(Protocol):
    """Echo everything; ``boom`` raises an error."""

    def connectionMade(self) -> None:
        self.factory.connections.append(self)

    def dataReceived(self, data: bytes) -> None:
        self.factory.received.append(data)
        if data == b"boom":
            raise ZeroDivisionError
        self.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.lost.append(reason.type.__name__)


class EchoFactory(Factory):
    protocol = EchoProtocol
    noisy = False

    def __init__(self) -> None:
        self.connections: list[Any] = []
        self.received: list[bytes] = []
        self.lost: list[str] = []


class HandshakePollerTests(TestCase):
    def setUp(self) -> None:
        self.calls = itertools.count()
        self.poller = HandshakePoller(reactor, lambda: next(self.calls))
        self.poller.start()
        self.factory = EchoFactory()
        self.port: Any = reactor.listenTCP(0, self.factory, interface="127.0.0.1", backlog=200)
        self.poller.adopt_port(self.port)

    async def tearDown(self) -> None:
        await self.port.stopListening()
        for protocol in self.factory.connections:
            protocol.transport.abortConnection()
        await self.next_iteration()
        self.assertEqual((self.poller._selectables, self.poller._event_masks), ({}, {}))
        self.poller.stop()
        self.assertNotIn(self.poller, reactor.getReaders())

    def dial(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port.getHost().port))
        client.setblocking(False)
        self.addCleanup(client.close)
        return client

    def next_iteration(self) -> Deferred[None]:
        return deferLater(reactor, 0)

    async def wait_until(self, condition: Any) -> None:
        while not condition():
            await self.next_iteration()

    async def receive(self, client: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                chunk = client.recv(65536)
            except BlockingIOError:
                await self.next_iteration()
                continue
            if not chunk:
                break
            data += chunk
        return data

    async def test_echo(self) -> None:
        client = self.dial()
        client.send(b"hello")
        self.assertEqual(await self.receive(client, 5), b"hello")
        transport = self.factory.connections[0].transport
        self.assertIs(transport.reactor, self.poller)
        self.assertNotIn(transport, reactor.getReaders())
        self.assertNotIn(self.port, reactor.getReaders())

    async def test_writes_more_than_the_socket_buffer(self) -> None:
        client = self.dial()
        await self.wait_until(lambda: self.factory.connections)
        self.factory.connections[0].transport.write(b"x" * 20_000_000)
        self.assertEqual(len(await self.receive(client, 20_000_000)), 20_000_000)

    async def test_end_by_the_client(self) -> None:
        for linger, name in ((None, "ConnectionDone"), (struct.pack("ii", 1, 0), "ConnectionLost")):
            client = self.dial()
            client.send(b"x")
            await self.receive(client, 1)
            if linger:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.close()
            await self.wait_until(lambda: self.factory.lost)
            self.assertEqual(self.factory.lost.pop(), name)

    async def test_end_by_the_protocol(self) -> None:
        client = self.dial()
        await self.wait_until(lambda: self.factory.connections)
        self.factory.connections[0].transport.write(b"bye")
        self.factory.connections[0].transport.loseConnection()
        self.assertEqual(await self.receive(client, 4), b"bye")
        await self.wait_until(lambda: self.factory.lost)

    async def test_an_error_closes_only_its_connection(self) -> None:
        one, two = self.dial(), self.dial()
        one.send(b"boom")
        await self.wait_until(lambda: self.factory.lost)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        two.send(b"x")
        self.assertEqual(await self.receive(two, 1), b"x")

    async def test_paused_transport_is_not_read(self) -> None:
        client = self.dial()
        await self.wait_until(lambda: self.factory.connections)
        transport = self.factory.connections[0].transport
        transport.pauseProducing()
        client.send(b"x")
        for _ in range(10):
            await self.next_iteration()
        self.assertEqual(self.factory.received, [])
        transport.resumeProducing()
        self.assertEqual(await self.receive(client, 1), b"x")

    async def test_events_per_iteration_are_limited(self) -> None:
        """The reactor handles other events in between, however many connections are ready."""
        clients = [self.dial() for _ in range(100)]
        await self.wait_until(lambda: len(self.factory.connections) == 100)
        for client in clients:
            client.send(b"x")
        self.poller._clock = lambda: 0.0
        counts = []
        while len(self.factory.received) < 100:
            before = len(self.factory.received)
            self.poller.doRead()
            counts.append(len(self.factory.received) - before)
        self.assertLessEqual(max(counts), MAX_EVENTS)
        del self.factory.received[:]
        for client in clients:
            client.send(b"x")
        times = iter(range(10_000))
        self.poller._clock = lambda: float(next(times))
        self.poller.doRead()
        self.assertEqual(len(self.factory.received), 1)
        self.poller._clock = reactor.seconds
        await self.wait_until(lambda: len(self.factory.received) == 100)

    async def test_more_events_while_there_are_no_calls(self) -> None:
        clients = [self.dial() for _ in range(100)]
        await self.wait_until(lambda: len(self.factory.connections) == 100)
        now = [1000.0, 5]
        self.poller._clock, self.poller._call_count = lambda: now[0], lambda: int(now[1])
        self.poller._last_call_count = 4
        counts = []
        for now[0], now[1] in (
            (1000.0, 5),
            (1000.0 + IDLE_AFTER / 2, 5),
            (1000.0 + IDLE_AFTER, 5),
            (1000.0 + IDLE_AFTER, 6),
        ):
            for client in clients:
                client.send(b"x")
            before = len(self.factory.received)
            self.poller.doRead()
            counts.append(len(self.factory.received) - before)
            while len(self.factory.received) < 100 * len(counts):
                self.poller.doRead()
        # The kernel may not have delivered all of them yet.
        self.assertEqual([number > MAX_EVENTS for number in counts], [False, False, True, False])
        self.poller._clock = reactor.seconds

    async def test_released_transport_is_watched_by_the_reactor(self) -> None:
        client = self.dial()
        await self.wait_until(lambda: self.factory.connections)
        transport = self.factory.connections[0].transport
        transport.write(b"x" * 10_000_000)
        self.poller.release(transport)
        self.poller.release(transport)
        self.assertIs(transport.reactor, reactor)
        self.assertIn(transport, reactor.getReaders())
        self.assertEqual(len(await self.receive(client, 10_000_000)), 10_000_000)
        client.send(b"y")
        self.assertEqual(await self.receive(client, 1), b"y")
        client.close()
        await self.wait_until(lambda: self.factory.lost)
        self.assertNotIn(transport, reactor.getReaders())

    async def test_released_while_paused(self) -> None:
        client = self.dial()
        await self.wait_until(lambda: self.factory.connections)
        transport = self.factory.connections[0].transport
        transport.pauseProducing()
        self.poller.release(transport)
        self.assertNotIn(transport, reactor.getReaders())
        transport.resumeProducing()
        client.send(b"x")
        self.assertEqual(await self.receive(client, 1), b"x")
