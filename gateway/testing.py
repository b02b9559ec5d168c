"""In-memory gateway, to test programs that use :mod:`gateway.agent` without sockets and without waiting.

A real :class:`~gateway.agent.Agent` speaks its real protocol with a real WebSocket server. Bytes are delivered by
:meth:`MemoryGateway.flush`, and time passes by :meth:`MemoryGateway.advance`.

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
from typing import Any, NoReturn
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
from gateway.agent.errors import AgentError, CallTimedOut, ConnectionLost, RpcFailed
from gateway.agent.session import RPCSession
from gateway.protocol import jsonrpc
from gateway.protocol.client_id import is_client_id
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.jsonrpc import SUBPROTOCOL
from gateway.protocol.uri import CONNECT_PATH
from gateway.websocket.slim_protocol import NullLogger

#: unsent bytes above which a producer is paused, as in Twisted's transports
HIGH_WATER_MARK = 2**16


@implementer(ITransport, IConsumer)
class MemoryTransport:
    """One end of a connection. Written data is kept until :class:`MemoryConnection` delivers it."""

    def __init__(self, address: IPv4Address, peer: IPv4Address) -> None:
        self._address = address
        self._peer = peer
        self._unsent: list[bytes] = []
        self._producer: Any = None
        self._producer_paused = False
        self.disconnecting = False
        self.is_aborted = False

    def write(self, data: bytes) -> None:
        if self.disconnecting:
            return
        self._unsent.append(data)
        if self._producer is not None and not self._producer_paused and sum(map(len, self._unsent)) > HIGH_WATER_MARK:
            self._producer_paused = True
            self._producer.pauseProducing()

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.write(b"".join(data))

    def take_unsent(self) -> bytes:
        """Return and clear the unsent data; resume a paused producer."""
        data, self._unsent = b"".join(self._unsent), []
        if self._producer_paused:
            self._producer_paused = False
            self._producer.resumeProducing()
        return data

    def loseConnection(self) -> None:
        self.disconnecting = True

    def abortConnection(self) -> None:
        self._unsent = []
        self.disconnecting = self.is_aborted = True

    def registerProducer(self, producer: IProducer, streaming: bool) -> None:
        self._producer = producer

    def unregisterProducer(self) -> None:
        self._producer, self._producer_paused = None, False

    def getHost(self) -> IPv4Address:
        return self._address

    def getPeer(self) -> IPv4Address:
        return self._peer


class MemoryConnection:
    """A connection between two protocols. The client's ``connectionMade`` is called last."""

    def __init__(self, client: IProtocol, server: IProtocol) -> None:
        client_address, server_address = IPv4Address("TCP", "192.0.2.1", 50000), IPv4Address("TCP", "192.0.2.2", 80)
        self._client_transport = MemoryTransport(client_address, server_address)
        self._server_transport = MemoryTransport(server_address, client_address)
        self._sides = ((client, self._client_transport), (server, self._server_transport))
        #: neither data nor the end of the connection is delivered
        self.is_frozen = False
        self.is_closed = False
        server.makeConnection(self._server_transport)
        client.makeConnection(self._client_transport)

    def has_transport(self, transport: object) -> bool:
        """Whether a transport is one of the two ends."""
        return transport is self._client_transport or transport is self._server_transport

    def deliver(self) -> bool:
        """Deliver unsent data in both directions; when there is none, disconnect if one side has closed.

        Returns ``False`` if there was nothing to do.
        """
        if self.is_closed:
            return False
        if self.is_frozen:
            return self._client_transport.is_aborted and self._disconnect()
        from_client, from_server = self._client_transport.take_unsent(), self._server_transport.take_unsent()
        (client, _), (server, _) = self._sides
        if from_client and not self._server_transport.is_aborted:
            server.dataReceived(from_client)
        if from_server and not self._client_transport.is_aborted:
            client.dataReceived(from_server)
        if from_client or from_server:
            return True
        return (self._client_transport.disconnecting or self._server_transport.disconnecting) and self._disconnect()

    def _disconnect(self) -> bool:
        self.is_closed = True
        for (protocol, transport), (_, peer) in zip(self._sides, reversed(self._sides), strict=True):
            reason: Exception = ConnectionDone()
            if transport.is_aborted:
                reason = ConnectionAborted()
            elif peer.is_aborted:
                reason = TransportLost()
            transport.disconnecting = True
            protocol.connectionLost(Failure(reason))
        return True


#: seconds between the gateway's pings
PING_INTERVAL = 50.0

__all__ = ["MemoryGateway", "Opening", "Received"]


@attrs.frozen
class Received:
    """A notification that an agent sent."""

    client_id: str
    method: str
    params: Any


@attrs.frozen
class Opening:
    """An opening handshake that reached the gateway, accepted or refused. Header names are in lower case."""

    url: str
    headers: Mapping[str, str]


#: the error words of refusals, by status
_DEFAULT_WORDS = {400: "request", 401: "token", 403: "identity", 404: "path", 429: "replaced", 503: "draining"}


@attrs.frozen
class _Refusal:
    status: int
    headers: Mapping[str, str]
    word: str


class MemoryGateway:
    """A gateway in memory, which accepts connections at any url, so that redirects and moves can be tested.

    ``clock`` is also the agents' reactor; a new ``Clock`` by default. ``tokens``: token -> client_id; if given, an
    agent needs the token of its client_id.
    """

    #: the url that :meth:`agent` connects to
    url = "ws://gateway.test"

    def __init__(self, clock: Clock | None = None, *, tokens: Mapping[str, str] | None = None) -> None:
        self.clock = clock or Clock()
        #: notifications of agents, in order of arrival
        self.received: list[Received] = []
        #: opening handshakes, in order of arrival
        self.openings: list[Opening] = []
        #: set to ``False`` to refuse TCP connections
        self.listening = True
        self._tokens = tokens
        self._refusals: list[_Refusal] = []
        self._methods: dict[str, Callable[[str, Any], Any]] = {}
        self._connections: dict[str, _ServerConnection] = {}
        self._memory_connections: list[MemoryConnection] = []
        self._is_flushing = False

    # Agents

    def agent(self, client_id: str, **options: Any) -> Agent:
        """Make an agent that connects to this gateway; ``options`` are those of ``Agent``. Start it with ``start()``.

        Its random delays are fixed: each is half of its maximum.
        """
        return Agent(
            options.pop("url", self.url),
            client_id=client_id,
            **{"reactor": self.clock, "connect": self.endpoint, "jitter": lambda: 0.5, **options},
        )

    def endpoint(self, url: str) -> IStreamClientEndpoint:
        """Make a client endpoint: use ``Agent(…, connect=gateway.endpoint, reactor=gateway.clock)``."""
        return _MemoryEndpoint(self, url)

    @property
    def clients(self) -> list[str]:
        """The client_ids of connected agents, sorted."""
        return sorted(self._connections)

    # Time and delivery

    def flush(self) -> None:
        """Deliver data in both directions and run delayed calls that are due, until there is nothing left to do.

        Raises ``RuntimeError`` if that does not end.
        """
        if self._is_flushing:  # called by a handler during a delivery
            return
        self._is_flushing = True
        try:
            self._flush()
        finally:
            self._is_flushing = False

    def _flush(self) -> None:
        for _ in range(1000):
            self.clock.advance(0)
            delivered = [connection.deliver() for connection in list(self._memory_connections)]
            self._memory_connections = [c for c in self._memory_connections if not c.is_closed]
            if not any(delivered) and not any(
                c.getTime() <= self.clock.seconds() for c in self.clock.getDelayedCalls()
            ):
                return
        raise RuntimeError("no end after 1000 deliveries: do the gateway and an agent answer each other forever?")

    def advance(self, seconds: float) -> None:
        """Advance the clock step by step: each delayed call runs at its time, followed by a flush."""
        end = self.clock.seconds() + seconds
        self.flush()
        while due := [call.getTime() for call in self.clock.getDelayedCalls() if call.getTime() <= end]:
            self.clock.advance(max(0.0, min(due) - self.clock.seconds()))
            self.flush()
        self.clock.advance(max(0.0, end - self.clock.seconds()))

    # Backends

    def call(self, client_id: str, method: str, params: object = None, timeout: float = 30.0) -> Deferred[Any]:
        """Call an agent as a backend does, and flush. Fires with the decoded result.

        Fails with :class:`~gateway.agent.RpcFailed`: the error of the agent's response, or one of the gateway (-32001,
        -32002 or -32003), whose ``gateway`` is true, with ``client`` and ``sent`` in ``data``.
        """
        connection = self._connections.get(client_id)
        if connection is None:
            return fail(_rpc_failed(ErrorKind.NOT_CONNECTED, client_id))
        connection.calls_in_flight += 1
        result = connection.session.call(method, params, timeout)
        result.addBoth(connection.on_call_finished)
        result.addErrback(_to_backend_error, client_id)
        self.flush()
        return result

    def notify(self, client_id: str, method: str, params: object = None) -> None:
        """Notify an agent as a backend does, and flush. Raises ``RpcFailed`` if it is not connected."""
        self._get_connection(client_id).session.notify(method, params)
        self.flush()

    def serve(self, method: str, handler: Callable[[str, Any], Any]) -> None:
        """Serve calls of agents.

        ``handler(client_id, params)`` returns a value, a Deferred or a coroutine, or raises
        :class:`~gateway.agent.AgentError`. Other methods get -32601: of the backend if it serves any method, else of
        the gateway.
        """
        self._methods[method] = handler

    # Events

    def goaway(self, client_id: str, url: str | None = None, after: float | None = None, *, close: bool = True) -> None:
        """Send ``gateway.goaway`` to an agent, close its connection with 1012, and flush.

        The agent is asked to connect to ``url`` after ``after`` seconds. With ``close=False`` the connection stays
        open, as with calls in flight: until there are none and a newer connection is open, or until the test closes it.
        """
        params: dict[str, object] = {"reason": "drain"}
        if url is not None:
            params["url"] = url
        if after is not None:
            params["after"] = after
        connection = self._get_connection(client_id)
        connection.goaway_sent = True
        connection.session.notify("gateway.goaway", params)
        if close:
            connection.close_with(1012, "drain")
        self.flush()

    def disconnect(self, client_id: str, code: int = 1000, reason: str = "") -> None:
        """Close the connection of an agent with a close code, and flush."""
        self._get_connection(client_id).close_with(code, reason)
        self.flush()

    def drop(self, client_id: str) -> None:
        """Abort the connection of an agent, without a close frame, and flush."""
        self._get_connection(client_id).transport.abortConnection()
        self.flush()

    def freeze(self, client_id: str) -> None:
        """Stop all delivery on the connection of an agent, in both directions, until the agent gives it up."""
        transport = self._get_connection(client_id).transport
        for connection in self._memory_connections:
            connection.is_frozen = connection.is_frozen or connection.has_transport(transport)

    def refuse(
        self, status: int, headers: Mapping[str, str] | None = None, *, word: str | None = None, times: int = 1
    ) -> None:
        """Answer the next ``times`` opening handshakes with an HTTP status.

        ``word`` is the ``error`` of the response body; by default one that the gateway sends with that status. An agent
        takes a refusal with any other word for that of a proxy, and never for final.
        """
        word = _DEFAULT_WORDS.get(status, "refused") if word is None else word
        self._refusals += [_Refusal(status, headers or {}, word)] * times

    def _get_connection(self, client_id: str) -> _ServerConnection:
        connection = self._connections.get(client_id)
        if connection is None:
            raise _rpc_failed(ErrorKind.NOT_CONNECTED, client_id)
        return connection

    # Called by the connections

    def _admit(self, opening: Opening) -> str | _Refusal:
        """Return the client_id of an opening handshake, or its refusal."""
        self.openings.append(opening)
        if self._refusals:
            return self._refusals.pop(0)
        url = urlsplit(opening.url)
        if not url.path.endswith(CONNECT_PATH):
            return _Refusal(404, {}, "not_found")
        client_id = parse_qs(url.query).get("client_id", [""])[0]
        if self._tokens is None:
            return client_id if is_client_id(client_id) else _Refusal(400, {}, "client_id")
        scheme, _, token = opening.headers.get("authorization", "").partition(" ")
        token_client_id = self._tokens.get(token) if scheme == "Bearer" else None
        if token_client_id is None:
            return _Refusal(401, {"WWW-Authenticate": "Bearer"}, "token")
        return token_client_id if client_id in ("", token_client_id) else _Refusal(403, {}, "identity")

    def _connection_opened(self, connection: _ServerConnection) -> None:
        older = self._connections.get(connection.client_id)
        if older is not None:
            older.on_replaced()
        self._connections[connection.client_id] = connection

    def _connection_closed(self, connection: _ServerConnection) -> None:
        if self._connections.get(connection.client_id) is connection:
            del self._connections[connection.client_id]

    def _handler_for(self, client_id: str, method: str) -> Callable[[Any], Any] | None:
        if not self._methods or method.startswith("gateway."):
            return None
        handler = self._methods.get(method)
        return _refuse_method if handler is None else partial(handler, client_id)


def _rpc_failed(kind: ErrorKind, client_id: str) -> RpcFailed:
    error = msgspec.json.decode(RpcError(kind, client_id).to_json())
    return RpcFailed(error["code"], error["message"], error["data"], gateway=True)


def _encode_refusal(client_id: str, id: bytes, kind: ErrorKind, detail: str) -> bytes:
    """Encode an error of the gateway itself as the response to a raw id."""
    # Of the responses, only that of a handler can be too large: it has the call.
    sent = True if kind is ErrorKind.TOO_LARGE else None
    return jsonrpc.encode_gateway_error(id, RpcError(kind, client_id, sent=sent, detail=detail or None).to_json())


def _refuse_method(params: Any) -> NoReturn:
    """Answer a call of a method that no handler serves, as a backend does."""
    raise AgentError(ErrorKind.METHOD_NOT_FOUND.value.code, ErrorKind.METHOD_NOT_FOUND.value.message)


def _to_backend_error(failure: Failure, client_id: str) -> Failure:
    if isinstance(failure.value, CallTimedOut):
        raise _rpc_failed(ErrorKind.TIMEOUT, client_id)
    if isinstance(failure.value, ConnectionLost):
        raise _rpc_failed(ErrorKind.CONNECTION_LOST, client_id)
    if isinstance(failure.value, RpcFailed):
        # The agent's own error, whatever it looks like.
        raise RpcFailed(failure.value.code, failure.value.message, failure.value.data)
    return failure


class _ServerConnection(WebSocketServerProtocol):  # type: ignore[misc]
    """The server side of one connection."""

    log = NullLogger()
    client_id = ""
    goaway_sent = False
    #: calls to the agent in flight
    calls_in_flight = 0
    _is_replaced = False

    def __init__(self, gateway: MemoryGateway, url: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._url = url
        self.session: RPCSession

    def processHandshake(self) -> None:
        end = self.data.find(b"\r\n\r\n")
        if end < 0:
            return
        line, headers, _ = parseHttpHeader(self.data[: end + 4])
        url = urlsplit(self._url)
        admitted = self._gateway._admit(Opening(f"{url.scheme}://{url.netloc}{line.split()[1]}", headers))
        if isinstance(admitted, _Refusal):
            self._refuse(admitted)
            return
        self.client_id = admitted
        super().processHandshake()

    def _refuse(self, refusal: _Refusal) -> None:
        body = msgspec.json.encode({"error": refusal.word, "message": "refused by the test"})
        lines = [f"HTTP/1.1 {refusal.status} Refused", *(f"{k}: {v}" for k, v in refusal.headers.items())]
        lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
        self.sendData("\r\n".join(lines).encode() + body)
        self.dropConnection()

    def onConnect(self, request: Any) -> str | None:
        return SUBPROTOCOL if SUBPROTOCOL in request.protocols else None

    def onOpen(self) -> None:
        self.session = RPCSession(
            self._gateway.clock,
            self._send,
            handler_for=partial(self._gateway._handler_for, self.client_id),
            on_notification=self._notification_received,
            max_message_size=self.maxMessagePayloadSize,
            encode_refusal=partial(_encode_refusal, self.client_id),
        )
        self._gateway._connection_opened(self)
        self._ping_timer = self._gateway.clock.callLater(PING_INTERVAL, self._ping)

    def _ping(self) -> None:
        self._ping_timer = self._gateway.clock.callLater(PING_INTERVAL, self._ping)
        self.sendPing()

    def _send(self, payload: bytes) -> bool:
        if self.state != self.STATE_OPEN:
            return False
        self.sendMessage(payload)
        return True

    def _notification_received(self, method: str, params: Any) -> None:
        self._gateway.received.append(Received(self.client_id, method, params))

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.session.message_received(payload)

    def on_replaced(self) -> None:
        """Close the connection, since there is a newer one; after a goaway, only when no calls are in flight."""
        self._is_replaced = True
        if not self.goaway_sent:
            self.close_with(4001, "replaced")
        elif not self.calls_in_flight:
            self.close_with(1012, "moved")

    def on_call_finished(self, result: Any) -> Any:
        self.calls_in_flight -= 1
        if self._is_replaced and not self.calls_in_flight and self.state == self.STATE_OPEN:
            self.close_with(1012, "moved")
        return result

    def close_with(self, code: int, reason: str) -> None:
        """Send a close frame with any code, and deregister the connection."""
        self.sendCloseFrame(code=code, reasonUtf8=reason.encode(), isReply=False)
        self._on_closed()

    def onClose(self, wasClean: bool, code: int, reason: str) -> None:
        if hasattr(self, "session"):
            self._on_closed()

    def _on_closed(self) -> None:
        self._gateway._connection_closed(self)
        self.session.close("the connection ended")
        if self._ping_timer.active():
            self._ping_timer.cancel()


class _ServerFactory(WebSocketServerFactory):  # type: ignore[misc]
    noisy = False
    log = NullLogger()

    def __init__(self, gateway: MemoryGateway) -> None:
        super().__init__(reactor=gateway.clock)
        # No timeouts: Autobahn would set timers on the global reactor.
        self.setProtocolOptions(
            webStatus=False,
            failByDrop=False,
            openHandshakeTimeout=0,
            closeHandshakeTimeout=0,
            maxMessagePayloadSize=2**20,
        )


@implementer(IStreamClientEndpoint)
class _MemoryEndpoint:
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
        self._gateway._memory_connections.append(MemoryConnection(agent, server))
        return succeed(agent)
