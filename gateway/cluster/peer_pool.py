"""Connections of this node to its peers, one each, and the requests in flight on them.

A connection is opened on demand, kept open, and opened again with backoff:

IDLE          connect() starts an attempt; callers meanwhile wait for the same one
CONNECTING    if the attempt fails, its callers get the error
BACKOFF       connect() fails at once with the last error
CONNECTED     until the connection is lost, or the node has left

Every ``heartbeat`` a connection without input is sent a ping; it is aborted after ``lease`` without input. When a
connection is lost, its requests fail: with CONNECTION_LOST, or with NODE_UNREACHABLE (not sent) if they had certainly
not left this node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from enum import Enum, auto
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList, fail, succeed
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.cluster.auth import WRONG_NODE, PeerAuth, PeerTLS
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.messages import decode_response, encode_request, message_id, to_rpc_error
from gateway.cluster.peer_connection import BACKEND_PATH, PeerConnection, make_connection, open_connection, peer_target
from gateway.metrics import Metrics
from gateway.protocol import jsonrpc
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.frames import CloseCode
from gateway.rpc.errors import NotDelivered, NotDeliveredError
from gateway.rpc.pending import Call, DeferredCall, PendingCalls, Reply
from gateway.util.backoff import Backoff
from gateway.util.cork import Cork
from gateway.util.deferred import Observers
from gateway.util.log import LogLimiter
from gateway.websocket.client import CloseEvent
from gateway.websocket.errors import HandshakeRefusedError

#: detail of the error of a request that was not answered
NO_RESPONSE = "the node was silent until the deadline"


class PeerRequest(DeferredCall):
    """A request as a Deferred, which fails with ``RpcError``, or with ``NotDeliveredError``."""

    def not_delivered(self, reason: NotDelivered) -> None:
        """Fail: the peer did not deliver the message to the client."""
        self.errback(NotDeliveredError(reason))


class PendingRequests(PendingCalls):
    """The requests in flight, with connections as owners. At its deadline a request fails with ``NODE_UNREACHABLE``
    instead of ``TIMEOUT``: the peer did not respond, not the client."""

    def fail(self, owner: Hashable, id: bytes, error: RpcError) -> bool:
        """Fail a request with an error of this node."""
        if error.kind is ErrorKind.TIMEOUT:
            error = RpcError(ErrorKind.NODE_UNREACHABLE, error.client_id, sent=True, detail=NO_RESPONSE)
        return super().fail(owner, id, error)

    def fail_unsent(self, owner: Hashable, ids: Iterable[bytes]) -> None:
        """Fail requests that have certainly not left this node."""
        for id in ids:
            call = self._calls.get(id)
            if call is not None:
                detail = "the connection to the node was lost before anything was sent"
                super().fail(owner, id, RpcError(ErrorKind.NODE_UNREACHABLE, call.client_id, sent=False, detail=detail))

    def pop(self, owner: Hashable, id: bytes) -> Call | None:
        """Remove a request from those in flight, and return it; ``None`` if ``owner`` has no request of that id."""
        call = self._calls.get(id)
        if call is None or call.owner != owner:
            return None
        self.discard(call)
        return call

    def complete_with_error(self, call: Call, error: RpcError) -> None:
        """Fail a request that was removed by :meth:`pop`."""
        self._complete_with_error(call, error)

    def owner_of(self, call: Any) -> Hashable:
        """Return the connection of a request, or ``None`` if it is not in flight."""
        # A call that was never started has no id.
        pending = self._calls.get(getattr(call, "id", b""))
        return None if pending is None or pending is not call else pending.owner


#: delay before the next attempt after a first failure, in seconds
INITIAL_BACKOFF = 0.1
#: the longest delay between attempts, in seconds
MAX_BACKOFF = 2.0
#: a connection that is lost sooner counts as a failed attempt, in seconds
MIN_UPTIME = 2.0
#: the shortest time between two log lines about an unreachable node, in seconds
LOG_INTERVAL = 30.0

_NORMAL_CLOSE_CODES = (CloseCode.NORMAL_CLOSURE, CloseCode.GOING_AWAY)
_SECRET_HINT = "; have both nodes the same --cluster-secret-file, and clocks that agree?"


class ConnectorState(Enum):
    """State of the connection to one peer.

    IDLE -connect()-> CONNECTING -opened-> CONNECTED -closed with 1000 or 1001, or after MIN_UPTIME-> IDLE
                      CONNECTING -failed-> BACKOFF        CONNECTED -otherwise-> BACKOFF
                      CONNECTING -cancelled-> IDLE        BACKOFF -connect(), after the delay-> CONNECTING
    """

    IDLE = auto()
    CONNECTING = auto()
    CONNECTED = auto()
    #: until ``_retry_at``, which :meth:`PeerConnector.connect` compares with the clock
    BACKOFF = auto()


class PeerConnector:
    """Connects to one peer on demand, and reconnects with backoff."""

    _log = Logger()

    def __init__(
        self,
        node_id: str,
        *,
        clock: IReactorTime,
        metrics: Metrics,
        open_connection: Callable[[str, str], tuple[PeerConnection, Deferred[None]]],
        on_open: Callable[[str, PeerConnection], None],
        on_close: Callable[[str, PeerConnection], None],
    ) -> None:
        """``open_connection`` makes and opens a connection to a node_id and URL. ``on_open`` and ``on_close`` are
        called for each connection that was open."""
        self.node_id = node_id
        #: successive times that the node was not listed as live
        self.absences = 0
        self.connection: PeerConnection | None = None
        self._clock = clock
        self._metrics = metrics
        self._open_connection = open_connection
        self._on_open = on_open
        self._on_close = on_close
        self._url = ""
        self._state = ConnectorState.IDLE
        self._attempt: Deferred[None] | None = None
        self._observers: Observers[None] = Observers()
        self._opened_at = 0.0
        self._backoff = Backoff(INITIAL_BACKOFF, MAX_BACKOFF)
        self._last_error: PeerUnreachableError | None = None
        self._retry_at = -math.inf
        self._log_limiter = LogLimiter(clock.seconds, LOG_INTERVAL)
        #: whether another node was found at the address
        self._was_replaced = False

    @property
    def is_idle(self) -> bool:
        """Whether there is neither a connection nor an attempt."""
        return self._state in (ConnectorState.IDLE, ConnectorState.BACKOFF)

    def connect(self, url: str) -> Deferred[None]:
        """Connect to the peer at that URL, unless there is a connection. Fails with
        :class:`~gateway.cluster.errors.PeerUnreachableError` (not sent), and at once while backing off. Cancelling it
        does not cancel the attempt."""
        if self._state is ConnectorState.CONNECTED:
            return succeed(None)
        if self._state is ConnectorState.BACKOFF and self._clock.seconds() < self._retry_at:
            return fail(self._last_error)
        waiter = self._observers.observe()
        if self._state is not ConnectorState.CONNECTING:
            self._start_attempt(url)
        return waiter

    def _start_attempt(self, url: str) -> None:
        self._url = url
        try:
            connection, attempt = self._open_connection(self.node_id, url)
        except Exception:  # noqa: BLE001 (an invalid URL or secret)
            self._attempt_failed(Failure())
            return
        self._state = ConnectorState.CONNECTING
        self._attempt = attempt
        attempt.addCallbacks(self._connection_opened, self._attempt_failed, callbackArgs=(connection,))
        attempt.addErrback(lambda failure: self._log.failure("error in connecting to a node", failure))

    def _connection_opened(self, _: None, connection: PeerConnection) -> None:
        self._attempt = None
        self._state = ConnectorState.CONNECTED
        self.connection = connection
        self._opened_at = self._clock.seconds()
        if self._last_error is not None:
            self._log.info("node {node} at {url} is connected again", node=self.node_id, url=self._url)
        connection.closed.addCallback(self._connection_closed, connection)
        self._on_open(self.node_id, connection)
        self._observers.callback(None)

    def _attempt_failed(self, failure: Failure) -> None:
        self._attempt = None
        self._state = ConnectorState.IDLE
        problem = describe_failure(failure)
        if WRONG_NODE in problem:
            self._record_replaced(problem)
        elif not failure.check(CancelledError):
            self._record_failure(problem, failure.check(ConnectionRefusedError) is not None)
        self._observers.errback(self._last_error or PeerUnreachableError(problem))

    def _connection_closed(self, event: CloseEvent, connection: PeerConnection) -> None:
        self.connection = None
        self._state = ConnectorState.IDLE
        if event.code not in _NORMAL_CLOSE_CODES:
            self._record_failure(f"the connection was lost: {event.code} {ascii(event.reason)[1:-1]}", False)
        if self._clock.seconds() - self._opened_at >= MIN_UPTIME:
            self._backoff.reset()
            self._state = ConnectorState.IDLE
        self._on_close(self.node_id, connection)

    def _record_failure(self, problem: str, refused: bool) -> None:
        self._metrics.link_failures += 1
        self._back_off(problem, refused)
        if self._log_limiter.allow() is not None:
            url = ascii(self._url)[1:-1]
            self._log.warn(
                "node {node} at {url} cannot be reached: {problem}", node=self.node_id, url=url, problem=problem
            )

    def _record_replaced(self, problem: str) -> None:
        """Take note that another node listens at the address: that is no failure, since its start has ended the lease
        of this one."""
        self._back_off(problem, True)
        if not self._was_replaced:
            self._was_replaced = True
            url = ascii(self._url)[1:-1]
            self._log.info("node {node} is gone: another node runs at {url} now", node=self.node_id, url=url)

    def _back_off(self, problem: str, refused: bool) -> None:
        self._state = ConnectorState.BACKOFF
        self._last_error = PeerUnreachableError(f"node {self.node_id} at {self._url}: {problem}", refused=refused)
        self._retry_at = self._clock.seconds() + self._backoff.next_delay()

    def stop(self) -> PeerConnection | None:
        """Close the connection with 1001, or cancel the attempt; returns the connection that is closing."""
        connection = self.connection
        if self._attempt is not None:
            self._attempt.cancel()
        elif connection is not None:
            connection.close_with(CloseCode.GOING_AWAY, "going away")
        return connection


def describe_failure(failure: Failure) -> str:
    """Return the reason of a failed attempt, in one line."""
    problem = failure.value
    if isinstance(problem, ConnectionRefusedError):
        return "nothing listens there (connection refused)"
    if isinstance(problem, HandshakeRefusedError):
        is_secret = problem.status in (401, 403) and WRONG_NODE not in f"{problem}"
        return f"{problem}{_SECRET_HINT if is_secret else ''}"
    text = f"{problem}" or type(problem).__name__
    return text.replace("\n", " ")


#: no request is sent to a node while more bytes wait for it to read them
MAX_UNSENT = 2**24
#: the most that a message is longer than its params, in bytes
MAX_ENVELOPE = 256
#: successive times that a node must not be listed to count as gone: a node that has just joined may not be listed yet
MIN_ABSENCES = 2

_UNREADABLE_RESPONSE = "the response of the client's node cannot be read"


class PeerPool:
    """The connections to peers, by node_id, and the requests in flight."""

    _log = Logger()

    def __init__(
        self,
        *,
        peer_auth: PeerAuth,
        reactor: Any,
        cork: Cork,
        metrics: Metrics,
        heartbeat: float,
        lease: float,
        max_message_size: int,
        max_calls: int,
        max_unsent: int,
        tls: PeerTLS,
        own_url: Callable[[], str] = lambda: "",
    ) -> None:
        """Parameters as for :class:`~gateway.cluster.peer_client.PeerClient`."""
        #: node_id -> its open connection
        self.connections: dict[str, PeerConnection] = {}
        self.pending = PendingRequests(reactor, max_calls=max_calls, max_per_owner=max_calls)
        self._peer_auth = peer_auth
        self._reactor = reactor
        self._cork = cork
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._lease = lease
        self._max_message_size = max_message_size
        self._max_params_size = max_message_size - MAX_ENVELOPE
        self._max_unsent = max_unsent
        self._tls = tls
        self._own_url = own_url
        self._connectors: dict[str, PeerConnector] = {}
        #: connections that were open, until their transports are closed
        self._open_transports: set[PeerConnection] = set()
        self._sweep_timer: IDelayedCall | None = None
        self._last_sweep = 0.0
        self._stopped = False

    # Requests.

    def connect(self, node_id: str, url: str) -> Deferred[None]:
        """Connect to a node, unless there is a connection. Fails with
        :class:`~gateway.cluster.errors.PeerUnreachableError`; see :meth:`PeerConnector.connect`."""
        if self._stopped:
            return fail(PeerUnreachableError("this node is stopping"))
        if url == self._own_url():
            return fail(PeerUnreachableError(f"node {node_id}: this node listens at its address now", refused=True))
        connector = self._connectors.get(node_id)
        if connector is None:
            connector = PeerConnector(
                node_id,
                clock=self._reactor,
                metrics=self._metrics,
                open_connection=self._open_connection,
                on_open=self._connection_opened,
                on_close=self._connection_closed,
            )
            self._connectors[node_id] = connector
        return connector.connect(url)

    def connect_within(self, timeout: float, node_id: str, url: str) -> Deferred[None]:
        """Like :meth:`connect`, but fail after ``timeout`` seconds."""

        def timed_out(result: object, timeout: float) -> Failure:
            return Failure(PeerUnreachableError(f"node {node_id} at {url}: no connection to it within {timeout:g} s"))

        return self.connect(node_id, url).addTimeout(timeout, self._reactor, timed_out)

    def check_sendable(self, connection: PeerConnection, client_id: str, size: int) -> None:
        """Raise ``RpcError`` if params of ``size`` bytes are too large, or the peer does not read from this
        connection."""
        if size > self._max_params_size:
            raise RpcError(ErrorKind.TOO_LARGE, client_id)
        if connection.is_congested(self._max_unsent):
            detail = "the client's node does not read its requests"
            raise RpcError(ErrorKind.NODE_UNREACHABLE, client_id, sent=False, detail=detail)

    def request(
        self, node_id: str, url: str, method: str, params: bytes, timeout: float, *, client_id: str = ""
    ) -> Deferred[Reply]:
        """Send a request to a node, and connect to it first if need be; fires with the response.

        Fails within ``timeout`` seconds: with :class:`~gateway.cluster.errors.PeerUnreachableError` if there is no
        connection, with ``RpcError``, which names ``client_id``, or with ``NotDeliveredError``. Cancelling it discards
        the request.
        """
        if node_id not in self.connections:
            return Deferred.fromCoroutine(self._connect_and_send(node_id, url, method, params, timeout, client_id))
        try:
            return self._send_request(node_id, method, params, timeout, client_id)
        except RpcError as e:
            return fail(e)

    async def _connect_and_send(
        self, node_id: str, url: str, method: str, params: bytes, timeout: float, client_id: str
    ) -> Reply:
        deadline = self._reactor.seconds() + timeout
        await self.connect_within(timeout, node_id, url)
        remaining = max(0.0, deadline - self._reactor.seconds())
        return await self._send_request(node_id, method, params, remaining, client_id)

    def _send_request(self, node_id: str, method: str, params: bytes, timeout: float, client_id: str) -> PeerRequest:
        """Send a request over the open connection; raises ``RpcError``."""
        connection = self.connections.get(node_id)
        if connection is None:
            raise _connection_closed_error(client_id)
        self.check_sendable(connection, client_id, len(params))
        request = PeerRequest(self.pending.discard)
        id = self.pending.start(request, connection, client_id, timeout)
        if not connection.send(encode_request(id, method, params)):
            self.pending.discard(request)
            raise _connection_closed_error(client_id)
        self.pending.mark_sent(request)
        return request

    def send(self, connection: PeerConnection, payload: bytes) -> None:
        """Send a message without a response; it is dropped if the peer does not read."""
        if not connection.is_congested(self._max_unsent):
            connection.send(payload)

    # Responses.

    def _message_received(self, connection: PeerConnection, payload: bytes) -> None:
        id, response = decode_response(payload)
        if isinstance(response, Reply):
            if not self.pending.resolve(connection, id, response):
                self._unmatched_response(connection, id, payload)
            return
        call = self.pending.pop(connection, id)
        if call is None:
            self._unmatched_response(connection, id, payload)
        elif response is None:
            self._metrics.bad_messages["peer"] += 1
            self.pending.complete_with_error(
                call, RpcError(ErrorKind.CONNECTION_LOST, call.client_id, detail=_UNREADABLE_RESPONSE)
            )
        elif isinstance(response, tuple):
            self.pending.complete_with_error(call, to_rpc_error(response, call.client_id))
        else:
            try:
                call.not_delivered(response)
            except Exception:  # noqa: BLE001 (must not affect the next response)
                self._log.failure("error in handling a call that was not delivered")

    def _unmatched_response(self, connection: PeerConnection, id: bytes, payload: bytes) -> None:
        """Handle a message that is not the response to a request in flight."""
        if id not in (b"", b"null"):
            self._metrics.late_responses += 1
            return
        self._metrics.bad_messages["peer"] += 1
        if not isinstance(jsonrpc.decode(payload), (jsonrpc.Notification, jsonrpc.Request)):
            # It may be the response to any request: let none of them wait for it until its deadline.
            connection.close_with(CloseCode.PROTOCOL_ERROR, "a response and its id cannot be read")

    # Connections.

    def _open_connection(self, node_id: str, url: str) -> tuple[PeerConnection, Deferred[None]]:
        target = peer_target(url)
        connection = make_connection(
            target,
            # Without the path of the peer URL: that is for a reverse proxy, which removes it.
            self._peer_auth.sign(node_id, "GET", BACKEND_PATH),
            clock=self._reactor,
            cork=self._cork,
            max_message_size=self._max_message_size,
            message_received=self._message_received,
        )
        return connection, open_connection(connection, target, self._reactor, self._tls)

    def _connection_opened(self, node_id: str, connection: PeerConnection) -> None:
        self.connections[node_id] = connection
        self._open_transports.add(connection)
        connection.disconnected.addCallback(lambda _: self._open_transports.discard(connection))
        if self._sweep_timer is None:
            self._last_sweep = self._reactor.seconds()
            self._sweep_timer = self._reactor.callLater(self._heartbeat, self._sweep)

    def _connection_closed(self, node_id: str, connection: PeerConnection) -> None:
        del self.connections[node_id]
        self.pending.fail_unsent(connection, map(message_id, connection.take_unsent()))
        self.pending.fail_owner(connection, lambda client_id: RpcError(ErrorKind.CONNECTION_LOST, client_id))

    def _sweep(self) -> None:
        self._sweep_timer = None
        now = self._reactor.seconds()
        # Time is counted in sweeps, and not while this process was suspended: it could not read its input.
        suspended = now - self._last_sweep > 2 * self._heartbeat
        self._last_sweep = now
        for connection in list(self.connections.values()):
            if suspended:
                connection.reset_idle()
            if connection.check_idle(self._heartbeat) >= self._lease:
                connection.abort(f"nothing was received for {self._lease:g} s")
        if self.connections:
            self._sweep_timer = self._reactor.callLater(self._heartbeat, self._sweep)

    def nodes_changed(self, node_ids: Iterable[str]) -> set[str]:
        """Take note of the live nodes. Returns the others among the known ones that count as gone; their connections
        are closed once no request is in flight on them."""
        live = set(node_ids)
        gone = set()
        for node_id, connector in list(self._connectors.items()):
            connector.absences = 0 if node_id in live else connector.absences + 1
            if connector.absences < MIN_ABSENCES:
                continue
            gone.add(node_id)
            if connector.connection is None or not self.pending.in_flight(connector.connection):
                del self._connectors[node_id]
                connector.stop()
        return gone

    def stop(self) -> Deferred[None]:
        """Close all connections with 1001; fires when their transports are closed. Does not fail."""
        self._stopped = True
        for connector in list(self._connectors.values()):
            connector.stop()
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        closing = DeferredList([connection.disconnected for connection in self._open_transports])
        return closing.addCallback(lambda _: None)


def _connection_closed_error(client_id: str) -> RpcError:
    return RpcError(ErrorKind.NODE_UNREACHABLE, client_id, sent=False, detail="the connection to the node is closed")
