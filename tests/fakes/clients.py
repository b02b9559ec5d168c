"""What the tests of the edge stand on: a transport, a registry, a handler, and a client's side of the bytes."""

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
from gateway.clients.interface import IClientHandler
from gateway.clients.sessions import ClientSessions
from gateway.metrics import Metrics
from gateway.registry.interface import ALWAYS_TAKE_OVER, Claim, ClaimPolicy, IRegistry, Location
from gateway.settings import Settings, make_settings

WEBSOCKET_KEY = "dGhlIHNhbXBsZSBub25jZQ=="
#: the response of RFC 6455, section 1.3, to that key
WEBSOCKET_ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


class FakeTransport(StringTransport):
    """A TCP transport that writes nothing by itself: :meth:`choke` fills its buffer."""

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
        """From now on whatever is written stays in the buffer."""
        self.blocked = True

    def unblock(self) -> None:
        """The other side read all of it."""
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
        """What was written since the last time."""
        data = self.value()
        self.clear()
        return data


@implementer(IRegistry)
class FakeRegistry:
    """A registry whose claims and releases are decided by the test, or at once."""

    def __init__(self) -> None:
        self.grants_at_once = True
        self.generation = 0
        self.claims: list[tuple[str, str, Deferred[Claim]]] = []
        #: of each claim: over which others, and whether to judge them
        self.claim_policies: list[tuple[int | None, bool]] = []
        #: and whether a placement wins
        self.assignments_honored: list[bool] = []
        self.cancelled: list[str] = []
        self.released: list[tuple[str, int]] = []
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
        waiting: Deferred[Claim] = Deferred(lambda _: self.cancelled.append(client_id))
        self.claims.append((client_id, address, waiting))
        if self.grants_at_once:
            self.grant(len(self.claims) - 1)
        return waiting

    def grant(self, index: int = -1, generation: int | None = None, previous_owner: Location | None = None) -> None:
        self.generation = self.generation + 1 if generation is None else generation
        self.claims[index][2].callback(Claim(self.generation, 1000.0 + self.generation, previous_owner))

    def release(self, client_id: str, generation: int) -> Deferred[None]:
        self.released.append((client_id, generation))
        if self.release_error is not None:
            return fail(self.release_error)
        if self.pending_releases is not None:
            self.pending_releases.append(Deferred())
            return self.pending_releases[-1]
        return succeed(None)

    def reclaim(self, client_id: str, generation: int, address: str) -> Deferred[Claim | None]:
        self.reclaimed.append((client_id, generation, address))
        outcome = self.reclaim_results.get(client_id, Claim(generation, 1.0))
        if isinstance(outcome, Deferred):
            return outcome
        return fail(outcome) if isinstance(outcome, Exception) else succeed(outcome)

    def unused(self, *args: object) -> Any:
        raise AssertionError("the edge has no business with this")

    open = close = join = heartbeat = leave = find = clients = nodes = reap = assign = assignment = (
        purge_assignments
    ) = unused


@implementer(IClientHandler)
class FakeHandler:
    """Notes what it is told; a message ``bad`` is no JSON-RPC, a message ``boom`` raises."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.on_message: Any = None
        self.superseded: list[tuple[str, int]] = []
        #: those that were told to go, and have calls in flight
        self.finishing_calls: set[str] = set()
        #: how many messages the next ones are said to be
        self.message_count: int | None = None

    def client_connected(self, client_id: str, generation: int) -> None:
        self.events.append(("connected", client_id, generation))

    def client_disconnected(self, client_id: str, generation: int) -> None:
        self.events.append(("disconnected", client_id, generation))

    def client_superseded(self, client_id: str, generation: int) -> None:
        self.superseded.append((client_id, generation))

    def is_finishing_calls(self, client_id: str, generation: int) -> bool:
        return client_id in self.finishing_calls

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int:
        self.events.append(("message", client_id, generation, payload))
        if payload == b"boom":
            raise ZeroDivisionError("boom")
        if self.on_message is not None:
            self.on_message(payload)
        return payload != b"bad" if self.message_count is None else self.message_count

    @property
    def messages(self) -> list[bytes]:
        return [seen[3] for seen in self.events if seen[0] == "message"]

    @property
    def connection_events(self) -> list[tuple[Any, ...]]:
        return [seen for seen in self.events if seen[0] != "message"]


class FakeNode:
    """An edge and its factory on a clock, and the clients that the test connects."""

    def __init__(self, auth: tuple[str, ...] = (), **options: Any) -> None:
        self.clock = Clock()
        self.clock.advance(1_000_000)
        self.metrics = Metrics()
        self.registry = FakeRegistry()
        self.handler = FakeHandler()
        self.unready_reason = ""
        self.settings = build_settings(auth=auth, **options)
        #: the wall clock
        self.wall_time = 1_800_000_000.0
        self.sessions = ClientSessions(
            *(self.registry, self.clock, self.settings, self.metrics, self.handler, lambda: self.unready_reason),
            wall_clock=lambda: self.wall_time,
        )
        self.factory = ClientFactory(
            sessions=self.sessions,
            authenticator=AuthenticatorChain(auth),
            settings=self.settings,
            metrics=self.metrics,
            reactor=self.clock,
        )

    def advance(self, seconds: float, step: float = 0.25) -> None:
        """Let time pass as a reactor does, in small steps."""
        for _ in range(round(seconds / step)):
            self.clock.advance(step)

    def dial(self, host: str | IAddress = "192.0.2.1") -> FakeClient:
        """A connection on which nothing was said yet."""
        return FakeClient(self.factory, FakeTransport(host))

    def connect(self, client_id: str = "a") -> FakeClient:
        """A client whose opening handshake is sent; open if its claim is granted at once."""
        client = self.dial()
        client.send(build_request(f"/v1/connect?client_id={client_id}"))
        if self.registry.grants_at_once:
            client.expect_open()
        return client


class FakeClient:
    """A client's end of one connection."""

    def __init__(self, factory: Any, transport: FakeTransport) -> None:
        self.transport = transport
        self.protocol = factory.buildProtocol(transport.getPeer())
        self.protocol.makeConnection(transport)

    def send(self, data: bytes, step: int = 65536) -> None:
        for at in range(0, len(data), step):
            self.protocol.dataReceived(data[at : at + step])

    def expect_open(self) -> bytes:
        """The head of the 101; whatever follows it is left to be read."""
        head, _, rest = self.transport.pop_written().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        self.transport.write(rest)
        return head

    def refusal(self) -> tuple[int, str, dict[str, str]]:
        """The status, word and headers of a refusal, found to be whole."""
        head, _, body = self.transport.pop_written().partition(b"\r\n\r\n")
        status, *lines = head.decode("ascii").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        assert int(headers["Content-Length"]) == len(body)
        assert headers["Connection"] == "close"
        assert headers["Content-Type"] == "application/json"
        said = json.loads(body)
        assert set(said) == {"error", "message"}
        assert said["message"].isprintable()
        return int(status.split(" ")[1]), said["error"], headers

    def frames(self) -> list[tuple[int, bytes]]:
        """The frames that came from the server since the last time, by opcode."""
        return parse_frames(self.transport.pop_written())

    def close_code(self) -> int | None:
        """The code of the close frame that came, or ``None``."""
        codes = [payload for opcode, payload in self.frames() if opcode == 8]
        assert len(codes) < 2, "two close frames"
        return struct.unpack("!H", codes[0][:2])[0] if codes else None

    def lose(self, clean: bool = True) -> None:
        """The connection is gone."""
        producer, self.transport.producer = self.transport.producer, None
        if producer is not None:
            producer.stopProducing()
        self.protocol.connectionLost(Failure(ConnectionDone() if clean else ConnectionLost()))


def build_settings(**options: Any) -> Settings:
    """Settings, with a small capacity unless told otherwise."""
    options.setdefault("capacity", "100")
    return make_settings({name.replace("_", "-"): value for name, value in options.items()})


def build_request(
    target: str = "/v1/connect?client_id=a",
    *,
    method: str = "GET",
    version: str = "HTTP/1.1",
    without: tuple[str, ...] = (),
    extra: tuple[tuple[str, str], ...] = (),
    **changed: str,
) -> bytes:
    """An opening handshake (RFC 6455, section 1.3); ``sec_websocket_key="x"`` changes a header."""
    headers = {
        "Host": "gw.example.com",
        "Upgrade": "websocket",
        "Connection": "keep-alive, Upgrade",
        "Sec-WebSocket-Key": WEBSOCKET_KEY,
        "Sec-WebSocket-Version": "13",
    }
    lowered = {name.lower().replace("-", "_"): name for name in headers}
    for name, value in changed.items():
        headers[lowered[name]] = value
    lines = [f"{method} {target} {version}"]
    lines += [f"{name}: {value}" for name, value in headers.items() if name not in without]
    lines += [f"{name}: {value}" for name, value in extra]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def build_frame(opcode: int, payload: bytes, *, fin: bool = True, masked: bool = True, rsv: int = 0) -> bytes:
    """A client's frame (RFC 6455, section 5.2)."""
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    bit = 0x80 if masked else 0
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", first, bit | size)
    elif size < 65536:
        head = struct.pack("!BBH", first, bit | 126, size)
    else:
        head = struct.pack("!BBQ", first, bit | 127, size)
    if not masked:
        return head + payload
    mask = b"\x37\xfa\x21\x3d"
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


def text_frame(payload: bytes) -> bytes:
    """A client's text message in one frame."""
    return build_frame(1, payload)


def close_frame(code: int | None = None, reason: bytes = b"") -> bytes:
    """A client's close frame."""
    return build_frame(8, b"" if code is None else struct.pack("!H", code) + reason)


def parse_frames(data: bytes) -> list[tuple[int, bytes]]:
    """The frames that a server sent: final and unmasked, each of them whole."""
    frames = []
    while data:
        assert data[0] & 0xF0 == 0x80, data[:20]
        size, at = data[1], 2
        assert size < 128
        if size == 126:
            size, at = struct.unpack("!H", data[2:4])[0], 4
        elif size == 127:
            size, at = struct.unpack("!Q", data[2:10])[0], 10
        assert len(data) >= at + size
        frames.append((data[0] & 15, data[at : at + size]))
        data = data[at + size :]
    return frames
