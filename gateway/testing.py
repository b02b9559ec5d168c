"""TCP connections in memory, for :mod:`gateway.testing`.

An in-memory gateway, to test programs that use :mod:`gateway.agent` without sockets, and without waiting.

A real :class:`~gateway.agent.Agent` runs its real protocol against a real WebSocket server; bytes move when
:meth:`MemoryGateway.flush` is called, and time passes when :meth:`MemoryGateway.advance` is.

    gateway = MemoryGateway()
    agent = gateway.agent("demo-1", methods={"echo": lambda params: params})
    agent.start()
    gateway.flush()
    assert gateway.clients == ["demo-1"]
    assert self.successResultOf(gateway.call("demo-1", "echo", [1])) == [1]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlsplit

import attrs
import msgspec
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from autobahn.websocket.protocol import parseHttpHeader
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionRefusedError
from twisted.internet.error import ConnectionLost as TransportLost
from twisted.internet.interfaces import (
    IConsumer,
    IProducer,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
    ITransport,
)
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.agent import Agent
from gateway.agent.errors import CallTimedOut, ConnectionLost, RpcFailed
from gateway.agent.session import Session
from gateway.protocol.errors import Kind, RpcError
from gateway.protocol.uri import PATH
from gateway.websocket.client import SUBPROTOCOL, Silent

#: bytes that may wait at one end before a producer there is paused, as with Twisted's own transports
BUFFER = 65536


@implementer(ITransport, IConsumer)
class End:
    """One end of a connection: what is written waits here until the wire moves it."""

    def __init__(self, address: IPv4Address, peer: IPv4Address) -> None:
        self._address = address
        self._peer = peer
        self._written: list[bytes] = []
        self._producer: Any = None
        self._paused = False
        self.disconnecting = False
        self.aborted = False

    def write(self, data: bytes) -> None:
        if self.disconnecting:
            return
        self._written.append(data)
        if self._producer is not None and not self._paused and sum(map(len, self._written)) > BUFFER:
            self._paused = True
            self._producer.pauseProducing()

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.write(b"".join(data))

    def take(self) -> bytes:
        """What was written since; the producer has room again."""
        data, self._written = b"".join(self._written), []
        if self._paused:
            self._paused = False
            self._producer.resumeProducing()
        return data

    def loseConnection(self) -> None:
        self.disconnecting = True

    def abortConnection(self) -> None:
        self._written = []
        self.disconnecting = self.aborted = True

    def registerProducer(self, producer: IProducer, streaming: bool) -> None:
        self._producer = producer

    def unregisterProducer(self) -> None:
        self._producer, self._paused = None, False

    def getHost(self) -> IPv4Address:
        return self._address

    def getPeer(self) -> IPv4Address:
        return self._peer


class Wire:
    """A connection between two protocols; the first is told last that it is made, as the one that connects."""

    def __init__(self, near: IProtocol, far: IProtocol) -> None:
        here, there = IPv4Address("TCP", "192.0.2.1", 50000), IPv4Address("TCP", "192.0.2.2", 80)
        self._near, self._far = End(here, there), End(there, here)
        self._ends = ((near, self._near), (far, self._far))
        #: no byte passes, and the end of one side is not noticed by the other
        self.frozen = False
        self.gone = False
        far.makeConnection(self._far)
        near.makeConnection(self._near)

    def has(self, transport: object) -> bool:
        """Whether this is one of its ends."""
        return transport is self._near or transport is self._far

    def move(self) -> bool:
        """Deliver what was written, both ways; part the ends once one of them wants to and nothing is left to deliver.

        ``False`` when there was nothing to do.
        """
        if self.gone:
            return False
        if self.frozen:
            return self._near.aborted and self._part()
        sent, answered = self._near.take(), self._far.take()
        (near, _), (far, _) = self._ends
        if sent and not self._far.aborted:
            far.dataReceived(sent)
        if answered and not self._near.aborted:
            near.dataReceived(answered)
        if sent or answered:
            return True
        return (self._near.disconnecting or self._far.disconnecting) and self._part()

    def _part(self) -> bool:
        self.gone = True
        for (protocol, mine), (_, other) in zip(self._ends, reversed(self._ends), strict=True):
            reason: Exception = ConnectionDone()
            if mine.aborted:
                reason = ConnectionAborted()
            elif other.aborted:
                reason = TransportLost()
            mine.disconnecting = True
            protocol.connectionLost(Failure(reason))
        return True


#: seconds between the gateway's pings
PING_INTERVAL = 50.0

__all__ = ["MemoryGateway", "Opening", "Received"]


@attrs.frozen
class Received:
    """A notification of an agent, as it arrived."""

    client_id: str
    method: str
    params: Any


@attrs.frozen
class Opening:
    """An opening handshake that reached the gateway, whatever became of it. Header names are in lower case."""

    url: str
    headers: Mapping[str, str]


@attrs.frozen
class _Refusal:
    status: int
    headers: Mapping[str, str]
    word: str


class MemoryGateway:
    """A gateway in memory. ``tokens``: whom each token is for; with them, an agent must have one.

    It answers at any url, so that redirects and moves can be tested too.
    """

    #: what :meth:`agent` connects to
    url = "ws://gateway.test"

    def __init__(self, clock: Clock | None = None, *, tokens: Mapping[str, str] | None = None) -> None:
        self.clock = clock or Clock()
        #: notifications of agents, in the order of their arrival
        self.received: list[Received] = []
        #: opening handshakes, in the order of their arrival
        self.openings: list[Opening] = []
        #: while this is ``False``, TCP connections are refused
        self.listening = True
        self._tokens = tokens
        self._refusals: list[_Refusal] = []
        self._methods: dict[str, Callable[[str, Any], Any]] = {}
        self._connections: dict[str, _ServerConnection] = {}
        self._wires: list[Wire] = []
        self._flushing = False

    # Agents

    def agent(self, client_id: str, **options: Any) -> Agent:
        """Make an agent that connects to this gateway; ``options`` are those of ``Agent``. It is not started yet.

        Its waits are random no more: each is half of its maximum.
        """
        return Agent(
            options.pop("url", self.url),
            client_id=client_id,
            **{"reactor": self.clock, "connect": self.endpoint, "jitter": lambda: 0.5, **options},
        )

    def endpoint(self, url: str) -> IStreamClientEndpoint:
        """What ``Agent(…, connect=gateway.endpoint, reactor=gateway.clock)`` connects by."""
        return _Endpoint(self, url)

    @property
    def clients(self) -> list[str]:
        """Who is connected, in order of their client_id."""
        return sorted(self._connections)

    # Time, and bytes

    def flush(self) -> None:
        """Deliver bytes both ways, and run what is due, until all is quiet."""
        if self._flushing:  # by a handler, in the middle of a delivery
            return
        self._flushing = True
        try:
            self._flush()
        finally:
            self._flushing = False

    def _flush(self) -> None:
        for _ in range(1000):
            self.clock.advance(0)
            moved = [wire.move() for wire in list(self._wires)]
            self._wires = [wire for wire in self._wires if not wire.gone]
            if not any(moved) and not any(c.getTime() <= self.clock.seconds() for c in self.clock.getDelayedCalls()):
                return
        raise RuntimeError("gateway and agents do not come to rest: do they answer each other for ever?")

    def advance(self, seconds: float) -> None:
        """Let time pass, as it does outside of tests: what becomes due on the way is run in its time."""
        end = self.clock.seconds() + seconds
        self.flush()
        while due := [call.getTime() for call in self.clock.getDelayedCalls() if call.getTime() <= end]:
            self.clock.advance(max(0.0, min(due) - self.clock.seconds()))
            self.flush()
        self.clock.advance(max(0.0, end - self.clock.seconds()))

    # Backends

    def call(self, client_id: str, method: str, params: object = None, timeout: float = 30.0) -> Deferred[Any]:
        """Call an agent as a backend does, and flush; fires with the decoded result.

        Fails with :class:`~gateway.agent.RpcFailed`: with what the agent answered, or with the gateway's own errors
        (-32001, -32002 and -32003, which have ``data`` with ``client`` and ``sent``).
        """
        connection = self._connections.get(client_id)
        if connection is None:
            return fail(_failed(Kind.NOT_CONNECTED, client_id))
        connection.calls += 1
        answer = connection.session.call(method, params, timeout)
        answer.addBoth(connection.answered)
        answer.addErrback(_as_the_backend_sees_it, client_id)
        self.flush()
        return answer

    def notify(self, client_id: str, method: str, params: object = None) -> None:
        """Notify an agent as a backend does, and flush. Raises ``RpcFailed`` if it is not connected."""
        self._find(client_id).session.notify(method, params)
        self.flush()

    def serve(self, method: str, handler: Callable[[str, Any], Any]) -> None:
        """Answer agents' calls of a method: ``handler(client_id, params)`` returns a value, a Deferred or a coroutine,
        or raises :class:`~gateway.agent.AgentError`."""
        self._methods[method] = handler

    # What happens to connections

    def goaway(self, client_id: str, url: str | None = None, after: float | None = None, *, close: bool = True) -> None:
        """Ask an agent to move to ``url`` after so many seconds, and close its connection with 1012; flush.

        With ``close=False`` the connection stays, as one does on which calls are in flight: until they are over and a
        newer connection is open, or the test closes it.
        """
        params: dict[str, object] = {"reason": "drain"}
        if url is not None:
            params["url"] = url
        if after is not None:
            params["after"] = after
        connection = self._find(client_id)
        connection.told_to_go = True
        connection.session.notify("gateway.goaway", params)
        if close:
            connection.end(1012, "drain")
        self.flush()

    def disconnect(self, client_id: str, code: int = 1000, reason: str = "") -> None:
        """Close an agent's connection with that close code, and flush."""
        self._find(client_id).end(code, reason)
        self.flush()

    def drop(self, client_id: str) -> None:
        """Let an agent's connection break, without any close frame, and flush."""
        self._find(client_id).transport.abortConnection()
        self.flush()

    def freeze(self, client_id: str) -> None:
        """Let an agent's connection hang: no byte passes any more, either way, until the agent gives it up."""
        transport = self._find(client_id).transport
        for wire in self._wires:
            wire.frozen = wire.frozen or wire.has(transport)

    def refuse(
        self, status: int, headers: Mapping[str, str] | None = None, *, word: str = "refused", times: int = 1
    ) -> None:
        """Answer the next opening handshakes with that HTTP status."""
        self._refusals += [_Refusal(status, headers or {}, word)] * times

    def _find(self, client_id: str) -> _ServerConnection:
        connection = self._connections.get(client_id)
        if connection is None:
            raise _failed(Kind.NOT_CONNECTED, client_id)
        return connection

    # What its connections tell it

    def _admit(self, opening: Opening) -> str | _Refusal:
        """The client that an opening handshake is for, or why it may not come in."""
        self.openings.append(opening)
        if self._refusals:
            return self._refusals.pop(0)
        parts = urlsplit(opening.url)
        if not parts.path.endswith(PATH):
            return _Refusal(404, {}, "not_found")
        named = parse_qs(parts.query).get("client_id", [""])[0]
        if self._tokens is None:
            return named or _Refusal(400, {}, "client_id")
        scheme, _, token = opening.headers.get("authorization", "").partition(" ")
        owner = self._tokens.get(token) if scheme == "Bearer" else None
        if owner is None:
            return _Refusal(401, {"WWW-Authenticate": "Bearer"}, "token")
        return owner if named in ("", owner) else _Refusal(403, {}, "client_id")

    def _opened(self, connection: _ServerConnection) -> None:
        older = self._connections.get(connection.client_id)
        if older is not None:
            older.replaced()
        self._connections[connection.client_id] = connection

    def _closed(self, connection: _ServerConnection) -> None:
        if self._connections.get(connection.client_id) is connection:
            del self._connections[connection.client_id]

    def _handler(self, client_id: str, method: str) -> Callable[[Any], Any] | None:
        handler = self._methods.get(method)
        return None if handler is None else partial(handler, client_id)


def _failed(kind: Kind, client_id: str) -> RpcFailed:
    error = msgspec.json.decode(RpcError(kind, client_id).to_json())
    return RpcFailed(error["code"], error["message"], error["data"])


def _as_the_backend_sees_it(failure: Failure, client_id: str) -> Failure:
    if isinstance(failure.value, CallTimedOut):
        raise _failed(Kind.TIMEOUT, client_id)
    if isinstance(failure.value, ConnectionLost):
        raise _failed(Kind.CONNECTION_LOST, client_id)
    return failure


class _ServerConnection(WebSocketServerProtocol):  # type: ignore[misc]
    """The gateway's end of one connection."""

    log = Silent()
    client_id = ""
    told_to_go = False
    #: how many calls to the agent are in flight
    calls = 0
    _replaced = False

    def __init__(self, gateway: MemoryGateway, url: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._url = url
        self.session: Session

    def processHandshake(self) -> None:
        end = self.data.find(b"\r\n\r\n")
        if end < 0:
            return
        line, headers, _ = parseHttpHeader(self.data[: end + 4])
        parts = urlsplit(self._url)
        admitted = self._gateway._admit(Opening(f"{parts.scheme}://{parts.netloc}{line.split()[1]}", headers))
        if isinstance(admitted, _Refusal):
            self._refuse(admitted)
            return
        self.client_id = admitted
        super().processHandshake()

    def _refuse(self, refusal: _Refusal) -> None:
        body = msgspec.json.encode({"error": refusal.word, "message": "a test said so"})
        lines = [f"HTTP/1.1 {refusal.status} Refused", *(f"{k}: {v}" for k, v in refusal.headers.items())]
        lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
        self.sendData("\r\n".join(lines).encode() + body)
        self.dropConnection()

    def onConnect(self, request: Any) -> str | None:
        return SUBPROTOCOL if SUBPROTOCOL in request.protocols else None

    def onOpen(self) -> None:
        self.session = Session(
            self._gateway.clock,
            self._send,
            handler_for=partial(self._gateway._handler, self.client_id),
            notified=self._notified,
            max_message_size=self.maxMessagePayloadSize,
        )
        self._gateway._opened(self)
        self._next_ping = self._gateway.clock.callLater(PING_INTERVAL, self._ping)

    def _ping(self) -> None:
        self._next_ping = self._gateway.clock.callLater(PING_INTERVAL, self._ping)
        self.sendPing()

    def _send(self, payload: bytes) -> bool:
        if self.state != self.STATE_OPEN:
            return False
        self.sendMessage(payload)
        return True

    def _notified(self, method: str, params: Any) -> None:
        self._gateway.received.append(Received(self.client_id, method, params))

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.session.message_received(payload)

    def replaced(self) -> None:
        """There is a newer connection."""
        self._replaced = True
        if not self.told_to_go:
            self.end(4001, "replaced")
        elif not self.calls:
            self.end(1012, "moved")

    def answered(self, answer: Any) -> Any:
        """A call to the agent is over."""
        self.calls -= 1
        if self._replaced and not self.calls and self.state == self.STATE_OPEN:
            self.end(1012, "moved")
        return answer

    def end(self, code: int, reason: str) -> None:
        """Close with any code; from now on this is nobody's connection."""
        self.sendCloseFrame(code=code, reasonUtf8=reason.encode(), isReply=False)
        self._over()

    def onClose(self, wasClean: bool, code: int, reason: str) -> None:
        if hasattr(self, "session"):
            self._over()

    def _over(self) -> None:
        self._gateway._closed(self)
        self.session.close("the connection ended")
        if self._next_ping.active():
            self._next_ping.cancel()


class _ServerFactory(WebSocketServerFactory):  # type: ignore[misc]
    noisy = False
    log = Silent()

    def __init__(self, gateway: MemoryGateway) -> None:
        super().__init__(reactor=gateway.clock)
        # No timers: Autobahn would have them on the global reactor.
        self.setProtocolOptions(
            webStatus=False,
            failByDrop=False,
            openHandshakeTimeout=0,
            closeHandshakeTimeout=0,
            maxMessagePayloadSize=1048576,
        )


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(self, gateway: MemoryGateway, url: str) -> None:
        self._gateway = gateway
        self._url = url

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        if not self._gateway.listening:
            return fail(ConnectionRefusedError())
        agent = protocolFactory.buildProtocol(None)  # type: ignore[arg-type]
        server = _ServerConnection(self._gateway, self._url)
        server.factory = _ServerFactory(self._gateway)
        assert agent is not None
        self._gateway._wires.append(Wire(agent, server))
        return succeed(agent)
