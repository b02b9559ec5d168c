"""Fakes for tests of client connections: transport, registry, handler, node and client."""

from __future__ import annotations

import json
import struct
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IAddress
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.auth.authenticator import AuthenticatorChain
from gateway.clients.endpoint import ClientFactory
from gateway.clients.interface import IClientHandler, IClientRouter
from gateway.clients.sessions import ClientSessions
from gateway.metrics import Metrics
from gateway.registry.interface import ALWAYS_TAKE_OVER, Claim, ClaimPolicy, IRegistry, Location, SessionKey
from gateway.settings import Settings, make_settings
from tests.builders.frames import build_request, parse_frames


class FakeTransport(StringTransport):
    """TCP transport whose writes are kept; :meth:`block` fills its buffer."""

    def __init__(self, host: str | IAddress = "192.0.2.1") -> None:
        super().__init__(peerAddress=IPv4Address("TCP", host, 4711) if isinstance(host, str) else host)
        self.aborted = False
        self.half_closed = False
        self.blocked = False

    def write(self, data: bytes) -> None:
        super().write(data)
        if self.blocked and self.producer is not None:
            self.producer.pauseProducing()

    def block(self) -> None:
        """Keep everything that is written from now on in the buffer."""
        self.blocked = True

    def unblock(self) -> None:
        """Let the peer read the whole buffer."""
        self.blocked = False
        if self.producer is not None:
            self.producer.resumeProducing()

    def abortConnection(self) -> None:
        self.aborted = True

    def loseWriteConnection(self) -> None:
        self.half_closed = True

    def setTcpNoDelay(self, enabled: bool) -> None:
        self.no_delay = enabled

    @property
    def paused(self) -> bool:
        return self.producerState == "paused"

    def pop_written(self) -> bytes:
        """Return the bytes written since the last call."""
        data = self.value()
        self.clear()
        return data


@implementer(IRegistry)
class FakeRegistry:
    """Registry whose claims and releases are decided by the test, or granted at once."""

    def __init__(self) -> None:
        self.grants_at_once = True
        self.generation = 0
        self.claims: list[tuple[str, str, Deferred[Claim]]] = []
        #: ``takeover_up_to`` and ``ignore_expired_owner`` of each claim
        self.claim_policies: list[tuple[int | None, bool]] = []
        #: ``honor_assignment`` of each claim
        self.assignments_honored: list[bool] = []
        self.cancelled: list[str] = []
        self.released: list[SessionKey] = []
        self.release_error: Exception | None = None
        self.pending_releases: list[Deferred[None]] | None = None
        self.reclaim_results: dict[str, Any] = {}
        self.reclaimed: list[tuple[str, int, str]] = []

    def claim(
        self,
        client_id: str,
        address: str,
        policy: ClaimPolicy = ALWAYS_TAKE_OVER,
    ) -> Deferred[Claim]:
        self.claim_policies.append((policy.takeover_up_to, policy.ignore_expired_owner))
        self.assignments_honored.append(policy.honor_assignment)
        claim: Deferred[Claim] = Deferred(lambda _: self.cancelled.append(client_id))
        self.claims.append((client_id, address, claim))
        if self.grants_at_once:
            self.grant(len(self.claims) - 1)
        return claim

    def grant(self, index: int = -1, generation: int | None = None, previous_owner: Location | None = None) -> None:
        self.generation = self.generation + 1 if generation is None else generation
        self.claims[index][2].callback(Claim(self.generation, 1000.0 + self.generation, previous_owner))

    def release(self, key: SessionKey) -> Deferred[None]:
        self.released.append(key)
        if self.release_error is not None:
            return fail(self.release_error)
        if self.pending_releases is not None:
            self.pending_releases.append(Deferred())
            return self.pending_releases[-1]
        return succeed(None)

    def reclaim(self, key: SessionKey, address: str) -> Deferred[Claim | None]:
        self.reclaimed.append((*key, address))
        result = self.reclaim_results.get(key.client_id, Claim(key.generation, 1.0))
        if isinstance(result, Deferred):
            return result
        return fail(result) if isinstance(result, Exception) else succeed(result)

    def unused(self, *args: object) -> Any:
        raise AssertionError("client sessions do not use this")

    open = close = join = heartbeat = leave = find = clients = nodes = reap = assign = assignment = (
        purge_assignments
    ) = unused


@implementer(IClientHandler)
class FakeHandler:
    """Records events. A message ``bad`` is not JSON-RPC, a message ``boom`` raises."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.on_message: Any = None
        self.superseded: list[SessionKey] = []
        #: clients that were sent goaway, and have calls in flight
        self.finishing_calls: set[str] = set()
        #: number of messages that the next payloads are counted as
        self.message_count: int | None = None

    def client_connected(self, key: SessionKey) -> None:
        self.events.append(("connected", *key))

    def client_disconnected(self, key: SessionKey) -> None:
        self.events.append(("disconnected", *key))

    def client_superseded(self, key: SessionKey) -> None:
        self.superseded.append(key)

    def is_finishing_calls(self, key: SessionKey) -> bool:
        return key.client_id in self.finishing_calls

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int | None:
        self.events.append(("message", client_id, generation, payload))
        if payload == b"boom":
            raise ZeroDivisionError("boom")
        if self.on_message is not None:
            self.on_message(payload)
        if payload.startswith(b"answer"):
            return None
        return payload != b"bad" if self.message_count is None else self.message_count

    @property
    def messages(self) -> list[bytes]:
        return [event[3] for event in self.events if event[0] == "message"]

    @property
    def connection_events(self) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] != "message"]


class FakeNode:
    """Client sessions and their factory on a fake clock, with fake clients."""

    def __init__(self, auth: tuple[str, ...] = (), router: IClientRouter | None = None, **options: Any) -> None:
        self.clock = Clock()
        self.clock.advance(1_000_000)
        self.metrics = Metrics()
        self.registry = FakeRegistry()
        self.handler = FakeHandler()
        self.unready_reason = ""
        self.settings = build_settings(auth=auth, **options)
        self.wall_time = 1_800_000_000.0
        self.sessions = ClientSessions(
            *(self.registry, self.clock, self.settings, self.metrics, lambda _: self.handler),
            lambda: self.unready_reason,
            wall_clock=lambda: self.wall_time,
            router=router,
        )
        self.factory = ClientFactory(
            sessions=self.sessions,
            authenticator=AuthenticatorChain(auth),
            settings=self.settings,
            metrics=self.metrics,
            reactor=self.clock,
            is_ready=lambda: not self.unready_reason,
        )

    def advance(self, seconds: float, step: float = 0.25) -> None:
        """Advance the clock in small steps, as a reactor does."""
        for _ in range(round(seconds / step)):
            self.clock.advance(step)

    def dial(self, host: str | IAddress = "192.0.2.1") -> FakeClient:
        """Open a connection, without a handshake."""
        return FakeClient(self.factory, FakeTransport(host))

    def connect(self, client_id: str = "a") -> FakeClient:
        """Open a connection and send the opening handshake. The connection is open if claims are granted at once."""
        client = self.dial()
        client.send(build_request(f"/v1/connect?client_id={client_id}"))
        if self.registry.grants_at_once:
            client.expect_open()
        return client


class FakeClient:
    """The client's end of one connection."""

    def __init__(self, factory: Any, transport: FakeTransport) -> None:
        self.transport = transport
        self.protocol = factory.buildProtocol(transport.getPeer())
        self.protocol.makeConnection(transport)

    def send(self, data: bytes, step: int = 65536) -> None:
        for at in range(0, len(data), step):
            self.protocol.dataReceived(data[at : at + step])

    def expect_open(self) -> bytes:
        """Return the head of the 101 response; the bytes that follow it remain to be read."""
        head, _, remaining = self.transport.pop_written().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        self.transport.write(remaining)
        return head

    def refusal(self) -> tuple[int, str, dict[str, str]]:
        """Return the status, error word and headers of a refusal, after checking its format. Its message is kept as
        :attr:`refusal_message`."""
        head, _, body = self.transport.pop_written().partition(b"\r\n\r\n")
        status, *lines = head.decode("ascii").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        assert int(headers["Content-Length"]) == len(body)
        assert headers["Connection"] == "close"
        assert headers["Content-Type"] == "application/json"
        error = json.loads(body)
        assert set(error) == {"error", "message"}
        self.refusal_message: str = error["message"]
        assert self.refusal_message.isprintable()
        return int(status.split(" ")[1]), error["error"], headers

    def frames(self) -> list[tuple[int, bytes]]:
        """Return the frames received since the last call, with their opcodes."""
        return parse_frames(self.transport.pop_written())

    def close_code(self) -> int | None:
        """Return the code of the close frame received, or ``None``."""
        codes = [payload for opcode, payload in self.frames() if opcode == 8]
        assert len(codes) < 2, "two close frames"
        return struct.unpack("!H", codes[0][:2])[0] if codes else None

    def lose(self, clean: bool = True) -> None:
        """Lose the connection."""
        producer, self.transport.producer = self.transport.producer, None
        if producer is not None:
            producer.stopProducing()
        self.protocol.connectionLost(Failure(ConnectionDone() if clean else ConnectionLost()))


def build_settings(**options: Any) -> Settings:
    """Build settings, with a small capacity unless given."""
    options.setdefault("capacity", "100")
    return make_settings({name.replace("_", "-"): value for name, value in options.items()})
