"""What the tests of parked connections stand on: real sockets, a reactor whose turns the test takes, and a keeper."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Any

from twisted.internet import tcp, unix
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from gateway.auth.authenticator import AuthenticatorChain
from gateway.clients.endpoint import ClientFactory
from gateway.clients.interface import IParkingOwner, Session, UnparkedSession
from gateway.clients.parked import ParkedSessions
from gateway.clients.sessions import ClientSessions
from gateway.clients.table import ParkingOptions
from gateway.metrics import Metrics
from gateway.util.cork import Cork
from gateway.util.rate_limit import TokenBucket
from tests.fakes.clients import FakeHandler, FakeRegistry, build_request, build_settings, parse_frames

#: what a blocked test fails after, in seconds
TEST_TIMEOUT = 30.0


class FakeFDReactor(Clock):
    """A clock that also knows which files are watched. Nothing happens but in :meth:`step`."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def addWriter(self, writer: Any) -> None:
        self.writers.add(writer)

    def removeWriter(self, writer: Any) -> None:
        self.writers.discard(writer)

    def step(self, times: int = 1) -> None:
        """Take turns of the reactor: the calls that are due, then what can be read, then what can be written."""
        for _ in range(times):
            self.advance(0)
            for watched, event, method in (
                (self.readers, select.POLLIN, "doRead"),
                (self.writers, select.POLLOUT, "doWrite"),
            ):
                for one in list(watched):
                    if one in watched and is_ready(one.fileno(), event):
                        self._disconnect(one, getattr(one, method)())

    def _disconnect(self, one: Any, why: Any) -> None:
        if why:
            self.removeReader(one)
            self.removeWriter(one)
            one.connectionLost(Failure(why))


def is_ready(fd: int, event: int, wait: float = 0.0) -> bool:
    """Whether a file can be read or written, or becomes so in time."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(wait * 1000))


def wait_readable(fd: int) -> None:
    """Wait until something can be read: what was sent over TCP takes its time."""
    assert is_ready(fd, select.POLLIN, TEST_TIMEOUT), "nothing arrived"


def tcp_pair(host: str = "127.0.0.1") -> tuple[socket.socket, socket.socket]:
    """A server's and a client's end of a TCP connection."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        there = socket.create_connection(listening.getsockname()[:2])
        here, _ = listening.accept()
    return here, there


def seqpacket_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends between which each write arrives on its own."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def small_buffer_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends between which few bytes may be under way."""
    here, there = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return here, there


def fill_send_buffer(here: int) -> int:
    """Write until the kernel takes no more; returns how many bytes it took."""
    size = 0
    for step in (1000, 1):
        try:
            while True:
                size += os.write(here, bytes(step))
        except BlockingIOError:
            pass
    return size


def read_available(there: socket.socket) -> bytes:
    """All that has come."""
    data = b""
    while is_ready(there.fileno(), select.POLLIN):
        some = there.recv(1 << 20)
        if not some:
            break
        data += some
    return data


def read_frames(there: socket.socket) -> list[tuple[int, bytes]]:
    """The frames that have come, each of them whole."""
    return parse_frames(read_available(there))


def read_close_code(there: socket.socket) -> int | None:
    """The code of the close frame that has come, or ``None``."""
    codes = [payload for opcode, payload in read_frames(there) if opcode == 8]
    assert len(codes) < 2, "two close frames"
    return struct.unpack("!H", codes[0][:2])[0] if codes else None


def connection_end(there: socket.socket) -> str:
    """How the connection ended, from the client's end: ``end``, ``reset``, or ``open`` when it did not."""
    there.setblocking(False)
    try:
        while there.recv(65536):
            pass
        return "end"
    except ConnectionResetError:
        return "reset"
    except BlockingIOError:
        return "open"


class FakeUnparkedProtocol:
    """What a keeper makes of a connection that has left the table."""

    def __init__(self, unparked: UnparkedSession) -> None:
        self.unread = unparked.unread

    def dataReceived(self, data: bytes) -> None:
        self.unread += data


@implementer(IParkingOwner)
class FakeParkingOwner:
    """Notes what it is told. A message ``bad`` is no JSON-RPC, a message ``boom`` raises."""

    parked: ParkedSessions

    def __init__(self) -> None:
        self.messages: list[tuple[str, int, bytes]] = []
        self.unparked: list[UnparkedSession] = []
        self.protocols: list[FakeUnparkedProtocol | None] = []
        self.lost_sessions: list[Session] = []
        self.closed: list[tuple[str, int, int, str]] = []
        self.paused: list[tuple[str, int]] = []
        self.on_message: Callable[[str, bytes], Any] = lambda client_id, payload: None
        #: whether those that are woken turn out to be lost
        self.fails_to_wake = False

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int:
        self.messages.append((client_id, generation, payload))
        if payload == b"boom":
            raise ZeroDivisionError("boom")
        handled = self.on_message(client_id, payload)
        return handled if isinstance(handled, int) else payload != b"bad"

    def wake(self, unparked: UnparkedSession) -> FakeUnparkedProtocol | None:
        self.unparked.append(unparked)
        self.protocols.append(None if self.fails_to_wake else FakeUnparkedProtocol(unparked))
        return self.protocols[-1]

    def connection_lost(self, session: Session) -> None:
        self.lost_sessions.append(session)

    def close_session(self, client_id: str, generation: int, code: int, reason: str) -> None:
        self.closed.append((client_id, generation, code, reason))
        self._wake(client_id)

    def pause_session(self, client_id: str, generation: int) -> None:
        self.paused.append((client_id, generation))
        self._wake(client_id)

    def _wake(self, client_id: str) -> None:
        if client_id in self.parked.fds:
            self.parked.wake(client_id)

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, _, payload in self.messages]


class ParkedSessionsFixture:
    """A table of parked connections on its own; the test holds their other ends."""

    def __init__(self, per_second: float = 0, max_message_size: int = 1048576) -> None:
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
        """Park a connection, and return its other end. ``fd`` is the number that its socket is to have."""
        here, there = pair or socket.socketpair()
        here.setblocking(False)
        there.setblocking(False)
        family = int(here.family)
        number = here.detach()
        if fd not in (-1, number):
            os.dup2(number, fd)
            os.close(number)
            number = fd
        values = {"address": "192.0.2.1:4711", "generation": 7, "connected_at": 1000.5, "claimed": True, **values}
        client = Session(client_id, **values)
        self.parked.park(client, number, family, self.now if heard_at is None else heard_at)
        self._peers.append(there)
        return there

    def fd(self, client_id: str = "a") -> int:
        return self.parked.fds[client_id]

    def step(self) -> None:
        """A turn of the reactor."""
        self.reactor.step()

    def close(self) -> None:
        """Close everything, those included that were woken."""
        self.parked.stop()
        for leaver in self.owner.unparked:
            os.close(leaver.fd)
        for peer in self._peers:
            peer.close()


class ParkedSessionsTestCase(SynchronousTestCase):
    """Stands on a table that is empty."""

    def setUp(self) -> None:
        self.use_fixture()

    def use_fixture(self, **options: Any) -> ParkedSessionsFixture:
        """Take another table."""
        self.fixture = ParkedSessionsFixture(**options)
        self.owner, self.parked = self.fixture.owner, self.fixture.parked
        self.addCleanup(self.fixture.close)
        return self.fixture

    def assert_woken(self, unread: bytes = b"", unsent: bytes = b"", index: int = -1) -> UnparkedSession:
        """A connection left with these bytes, and those that were read with it before it was known to leave."""
        leaver, woken = self.owner.unparked[index], self.owner.protocols[index]
        assert woken is not None
        self.assertEqual((woken.unread, leaver.unsent), (unread, unsent))
        self.assertNotIn(leaver.session.client_id, self.parked.fds)
        return leaver


class ParkingNode:
    """An edge that parks, and its factory, on real sockets."""

    def __init__(self, **options: Any) -> None:
        self.reactor = self.clock = FakeFDReactor()
        self.reactor.advance(1_000_000)
        self.metrics = Metrics()
        self.registry = FakeRegistry()
        self.handler = FakeHandler()
        self.settings = build_settings(**options)
        self.cork = Cork(self.reactor.seconds)
        #: the wall clock
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
        """Take as many turns of the reactor as a change takes to be over."""
        self.reactor.step(times)

    def advance(self, seconds: float, step: float = 0.25) -> None:
        """Let time pass, a turn at each step."""
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            self.reactor.step()

    def dial(
        self, pair: tuple[socket.socket, socket.socket] | None = None, wrap: Callable[[Any], Any] | None = None
    ) -> socket.socket:
        """A connection on which nothing was said yet: the client's end. ``wrap`` makes another factory of this one."""
        here, there = pair or socket.socketpair()
        there.setblocking(False)
        self._peers.append(there)
        peer = here.getpeername()
        protocol = (wrap(self.factory) if wrap else self.factory).buildProtocol(None)
        kind = unix.Server if here.family == socket.AF_UNIX else tcp.Server
        transport = kind(here, protocol, peer, None, 0, self.reactor)
        transport.repstr = "<a connection>"
        protocol.makeConnection(transport)
        return there

    def connect(self, client_id: str = "a", pair: tuple[socket.socket, socket.socket] | None = None) -> socket.socket:
        """A client that is open, and parked by now if it can be."""
        there = self.dial(pair)
        there.send(build_request(f"/v1/connect?client_id={client_id}"))
        if there.family != socket.AF_UNIX:
            wait_readable(self.transport_of(there).fileno())
        self.step()
        head = self.receive(there)
        assert head.startswith(b"HTTP/1.1 101 "), head
        assert head.endswith(b"\r\n\r\n"), head
        return there

    def transport_of(self, there: socket.socket) -> Any:
        """The transport of an awake connection, by its other end."""
        (found,) = [one for one in self.reactor.readers if hasattr(one, "getPeer") and _is_other_end(one.socket, there)]
        return found

    def receive(self, there: socket.socket) -> bytes:
        """What has come to a client; over TCP something is waited for."""
        if there.family != socket.AF_UNIX:
            wait_readable(there.fileno())
        return read_available(there)

    def send(self, there: socket.socket, data: bytes, client_id: str = "a") -> None:
        """Let a client send something, and the node handle it."""
        there.send(data)
        if there.family != socket.AF_UNIX:
            fd = self.parked.fds.get(client_id)
            wait_readable(self.protocol(client_id).transport.fileno() if fd is None else fd)
        self.step()

    def protocol(self, client_id: str = "a") -> Any:
        """The protocol of a client that is awake."""
        return self.table.awake[client_id].connection

    def close(self) -> None:
        """Close everything."""
        self.sessions.close_all(1001, "going away")
        self.sessions.stop()
        for peer in self._peers:
            peer.close()
        for reader in list(self.reactor.readers):
            reader.socket.close()


def _is_other_end(here: socket.socket, there: socket.socket) -> bool:
    return here.getpeername() == there.getsockname()
