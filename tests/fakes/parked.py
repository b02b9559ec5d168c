"""Fakes for tests of parked sessions: their owner, and a node on real sockets. The test runs the reactor."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet import tcp, unix
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from gateway.auth.authenticator import AuthenticatorChain
from gateway.clients.endpoint import ClientFactory
from gateway.clients.interface import IParkingOwner, Session, UnparkedSession
from gateway.clients.parked import ParkedSessions
from gateway.clients.sessions import ClientSessions
from gateway.clients.table import ParkingOptions
from gateway.metrics import Metrics
from gateway.registry.interface import SessionKey
from gateway.util.cork import Cork
from gateway.util.rate_limit import TokenBucket
from tests.builders.frames import build_request
from tests.builders.sockets import read_available, wait_readable
from tests.fakes.clients import FakeHandler, FakeRegistry, build_settings
from tests.fakes.reactor import FakeFDReactor


class FakeUnparkedProtocol:
    """Protocol of a session that has left the table."""

    def __init__(self, unparked: UnparkedSession) -> None:
        self.unread = unparked.unread

    def dataReceived(self, data: bytes) -> None:
        self.unread += data


@implementer(IParkingOwner)
class FakeParkingOwner:
    """Records events. A message ``bad`` is not JSON-RPC, a message ``boom`` raises."""

    parked: ParkedSessions

    def __init__(self) -> None:
        self.messages: list[tuple[str, int, bytes]] = []
        self.unparked: list[UnparkedSession] = []
        self.protocols: list[FakeUnparkedProtocol | None] = []
        self.lost_sessions: list[Session] = []
        self.closed: list[tuple[str, int, int, str]] = []
        self.paused: list[SessionKey] = []
        self.on_message: Callable[[str, bytes], Any] = lambda client_id, payload: None
        #: whether sessions that are woken turn out to be lost
        self.fails_to_wake = False

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int | None:
        self.messages.append((client_id, generation, payload))
        if payload == b"boom":
            raise ZeroDivisionError("boom")
        handled = self.on_message(client_id, payload)
        if payload.startswith(b"answer"):
            return None
        return handled if isinstance(handled, int) else payload != b"bad"

    def wake(self, unparked: UnparkedSession) -> FakeUnparkedProtocol | None:
        self.unparked.append(unparked)
        self.protocols.append(None if self.fails_to_wake else FakeUnparkedProtocol(unparked))
        return self.protocols[-1]

    def connection_lost(self, session: Session) -> None:
        self.lost_sessions.append(session)

    def close_session(self, key: SessionKey, code: int, reason: str) -> None:
        self.closed.append((*key, code, reason))
        self._wake(key.client_id)

    def pause_session(self, key: SessionKey) -> None:
        self.paused.append(key)
        self._wake(key.client_id)

    def _wake(self, client_id: str) -> None:
        if client_id in self.parked.fds:
            self.parked.wake(client_id)

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, _, payload in self.messages]


class ParkedSessionsFixture:
    """A table of parked sessions; the test holds the client ends of their sockets."""

    def __init__(self, per_second: float = 0, max_message_size: int = 2**20) -> None:
        self.reactor = FakeFDReactor()
        self.reactor.advance(1_000_000)
        self.cork = Cork(self.reactor.seconds)
        self.owner = FakeParkingOwner()
        self.metrics = Metrics()
        self.parked = self.owner.parked = ParkedSessions(
            self.owner,
            reactor=self.reactor,
            cork=self.cork,
            metrics=self.metrics,
            max_message_size=max_message_size,
            rate_limit=TokenBucket(per_second) if per_second else None,
        )
        self.parked.start()
        self._peers: list[socket.socket] = []

    @property
    def now(self) -> float:
        return self.reactor.seconds()

    def park(
        self,
        client_id: str = "a",
        pair: tuple[socket.socket, socket.socket] | None = None,
        heard_at: float | None = None,
        fd: int = -1,
        **values: Any,
    ) -> socket.socket:
        """Park a session, and return the client's socket. ``fd`` is the file descriptor that the server's socket is to
        have."""
        server_end, client_end = pair or socket.socketpair()
        server_end.setblocking(False)
        client_end.setblocking(False)
        family = int(server_end.family)
        number = server_end.detach()
        if fd not in (-1, number):
            os.dup2(number, fd)
            os.close(number)
            number = fd
        values = {"address": "192.0.2.1:4711", "generation": 7, "connected_at": 1000.5, "claimed": True, **values}
        session = Session(client_id, **values)
        self.parked.park(session, number, family, self.now if heard_at is None else heard_at)
        self._peers.append(client_end)
        return client_end

    def fd(self, client_id: str = "a") -> int:
        return self.parked.fds[client_id]

    def step(self) -> None:
        """Run one reactor iteration."""
        self.reactor.step()

    def close(self) -> None:
        """Close all sockets, including those of woken sessions."""
        self.parked.stop()
        for unparked in self.owner.unparked:
            os.close(unparked.fd)
        for peer in self._peers:
            peer.close()


class ParkedSessionsTestCase(SynchronousTestCase):
    """An empty table of parked sessions."""

    def setUp(self) -> None:
        self.use_fixture()

    def use_fixture(self, **options: Any) -> ParkedSessionsFixture:
        """Use another table."""
        self.fixture = ParkedSessionsFixture(**options)
        self.owner, self.parked = self.fixture.owner, self.fixture.parked
        self.addCleanup(self.fixture.close)
        return self.fixture

    def assert_woken(self, unread: bytes = b"", unsent: bytes = b"", index: int = -1) -> UnparkedSession:
        """Assert that a session was woken with these unread and unsent bytes; ``unread`` includes bytes that its
        protocol was given while it was woken. Returns it."""
        unparked, protocol = self.owner.unparked[index], self.owner.protocols[index]
        assert protocol is not None
        self.assertEqual((protocol.unread, unparked.unsent), (unread, unsent))
        self.assertNotIn(unparked.session.client_id, self.parked.fds)
        return unparked


class ParkingNode:
    """Client sessions that park, and their factory, on real sockets."""

    def __init__(self, **options: Any) -> None:
        self.reactor = self.clock = FakeFDReactor()
        self.reactor.advance(1_000_000)
        self.metrics = Metrics()
        self.registry = FakeRegistry()
        self.handler = FakeHandler()
        self.settings = build_settings(**options)
        self.cork = Cork(self.reactor.seconds)
        self.wall_time = 1_800_000_000.0
        self.sessions = ClientSessions(
            *(self.registry, self.reactor, self.settings, self.metrics, lambda _: self.handler, lambda: ""),
            wall_clock=lambda: self.wall_time,
            parking=ParkingOptions(self.reactor, self.cork, lambda unparked: self.factory.wake(unparked)),
        )
        self.factory = ClientFactory(
            sessions=self.sessions,
            authenticator=AuthenticatorChain(()),
            settings=self.settings,
            metrics=self.metrics,
            reactor=self.reactor,
            cork=self.cork,
        )
        self.sessions.start()
        self._peers: list[socket.socket] = []

    @property
    def table(self) -> Any:
        return self.sessions._table

    @property
    def parked(self) -> ParkedSessions:
        return self.table._parked_sessions

    def step(self, times: int = 3) -> None:
        """Run as many reactor iterations as any change needs to complete."""
        self.reactor.step(times)

    def advance(self, seconds: float, step: float = 0.25) -> None:
        """Advance the clock, with a reactor iteration at each step."""
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            self.reactor.step()

    def dial(
        self, pair: tuple[socket.socket, socket.socket] | None = None, wrap: Callable[[Any], Any] | None = None
    ) -> socket.socket:
        """Open a connection, without a handshake; returns the client's socket. ``wrap`` wraps the factory."""
        server_end, client_end = pair or socket.socketpair()
        client_end.setblocking(False)
        self._peers.append(client_end)
        peer = server_end.getpeername()
        protocol = (wrap(self.factory) if wrap else self.factory).buildProtocol(None)
        kind = unix.Server if server_end.family == socket.AF_UNIX else tcp.Server
        transport = kind(server_end, protocol, peer, None, 0, self.reactor)
        transport.repstr = "<a connection>"
        protocol.makeConnection(transport)
        return client_end

    def connect(self, client_id: str = "a", pair: tuple[socket.socket, socket.socket] | None = None) -> socket.socket:
        """Connect a client; its session is parked if it can be."""
        client_end = self.dial(pair)
        client_end.send(build_request(f"/v1/connect?client_id={client_id}"))
        if client_end.family != socket.AF_UNIX:
            wait_readable(self.transport_of(client_end).fileno())
        self.step()
        head = self.receive(client_end)
        assert head.startswith(b"HTTP/1.1 101 "), head
        assert head.endswith(b"\r\n\r\n"), head
        return client_end

    def transport_of(self, client_end: socket.socket) -> Any:
        """Return the transport of an awake session, by the client's socket."""
        (transport,) = [
            reader
            for reader in self.reactor.readers
            if hasattr(reader, "getPeer") and _is_other_end(reader.socket, client_end)
        ]
        return transport

    def receive(self, client_end: socket.socket) -> bytes:
        """Return the bytes that a client has received; waits for some over TCP."""
        if client_end.family != socket.AF_UNIX:
            wait_readable(client_end.fileno())
        return read_available(client_end)

    def send(self, client_end: socket.socket, data: bytes, client_id: str = "a") -> None:
        """Send bytes from a client, and let the node handle them."""
        client_end.send(data)
        if client_end.family != socket.AF_UNIX:
            fd = self.parked.fds.get(client_id)
            wait_readable(self.protocol(client_id).transport.fileno() if fd is None else fd)
        self.step()

    def protocol(self, client_id: str = "a") -> Any:
        """Return the protocol of a client that is awake."""
        return self.table.awake[client_id].connection

    def close(self) -> None:
        """Close all connections."""
        self.sessions.close_all(1001, "going away")
        self.sessions.stop()
        for peer in self._peers:
            peer.close()
        for reader in list(self.reactor.readers):
            reader.socket.close()


def _is_other_end(server_end: socket.socket, client_end: socket.socket) -> bool:
    return server_end.getpeername() == client_end.getsockname()
