"""What other nodes were asked and have not answered yet: calls of :mod:`gateway.rpc.pending`, with links as owners.

One other node: the link to it, opened when somebody needs it, kept, and opened again.

nobody needs it               no link
somebody asks for it          an attempt; who asks meanwhile waits with him
the attempt failed            who waits is told why; who asks within a time that grows is told so at once
the link is open              until it breaks, or the node is gone

The links of this node to others (link.py), by node_id, and what is asked over them.

Every ``heartbeat`` a link on which nothing came is pinged; it is cut when nothing came for ``lease``. When a link ends,
what was asked over it fails: CONNECTION_LOST, or NODE_UNREACHABLE (not sent) for what had certainly not left this node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
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
from gateway.util.cork import Cork
from gateway.util.deferred import Observers
from gateway.websocket.client import CloseEvent
from gateway.websocket.errors import HandshakeRefusedError

NO_RESPONSE = "the node was silent until the deadline"


class PeerRequest(DeferredCall):
    """What is asked as a Deferred, which fails with ``RpcError``, or with ``Missed``."""

    def not_delivered(self, reason: NotDelivered) -> None:
        """The node did not pass it on."""
        self.errback(NotDeliveredError(reason))


class PendingRequests(PendingCalls):
    """The questions in flight. At its deadline one fails with ``NODE_UNREACHABLE``: the client did have a node, and it
    is that which was silent."""

    def fail(self, owner: Hashable, id: bytes, error: RpcError) -> bool:
        """Settle a question with an error of this node's; see :meth:`Pending.fail`."""
        if error.kind is ErrorKind.TIMEOUT:
            error = RpcError(ErrorKind.NODE_UNREACHABLE, error.client_id, sent=True, detail=NO_RESPONSE)
        return super().fail(owner, id, error)

    def fail_unsent(self, owner: Hashable, ids: Iterable[bytes]) -> None:
        """Fail those that have certainly not left this node."""
        for id in ids:
            call = self._calls.get(id)
            if call is not None:
                detail = "the link to the node broke before anything was sent"
                super().fail(owner, id, RpcError(ErrorKind.NODE_UNREACHABLE, call.client_id, sent=False, detail=detail))

    def pop(self, owner: Hashable, id: bytes) -> Call | None:
        """Await a question no longer that was asked of ``owner``; ``None`` when it is unknown, or over."""
        call = self._calls.get(id)
        if call is None or call.owner != owner:
            return None
        self.discard(call)
        return call

    def complete_with_error(self, call: Call, error: RpcError) -> None:
        """Settle one that was taken."""
        self._complete_with_error(call, error)

    def owner_of(self, call: Any) -> Hashable:
        """Who was asked this, or ``None`` if it is not in flight here."""
        # One that was never begun has no id.
        known = self._calls.get(getattr(call, "id", b""))
        return None if known is None or known is not call else known.owner


#: how long nothing is attempted after a failure, in seconds: at first, and at most
INITIAL_BACKOFF, MAX_BACKOFF = 0.1, 2.0
#: a link that broke sooner, in seconds, has failed like one that did not open
MIN_UPTIME = 2.0
#: how often at most it is logged that a node cannot be reached, in seconds
LOG_INTERVAL = 30.0

_NORMAL_CLOSE_CODES = (CloseCode.NORMAL_CLOSURE, CloseCode.GOING_AWAY)
_SECRET_HINT = "; have both nodes the same --cluster-secret-file, and clocks that agree?"


class PeerConnector:
    """The way to one node."""

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
        """``open`` makes a link to a node by its node_id and its url, and opens it. ``opened`` and ``ended`` are told
        of each link that was open."""
        self.node_id = node_id
        #: how often in succession it was not among the nodes that are live
        self.absences = 0
        self.connection: PeerConnection | None = None
        self._clock = clock
        self._metrics = metrics
        self._open_connection = open_connection
        self._on_open = on_open
        self._on_close = on_close
        self._url = ""
        self._attempt: Deferred[None] | None = None
        self._observers: Observers[None] = Observers()
        self._opened_at = 0.0
        self._failures = 0
        self._last_error: PeerUnreachableError | None = None
        self._retry_at = -math.inf
        self._logged_at = -math.inf

    @property
    def is_idle(self) -> bool:
        """Whether there is neither a link nor an attempt."""
        return self.connection is None and self._attempt is None

    def connect(self, url: str) -> Deferred[None]:
        """Have a link open to the node, which is reached by that url. Fails with ``PeerUnreachable``, not sent; at once
        for a while after a failure. Cancelling it only stops the wait."""
        if self.connection is not None:
            return succeed(None)
        if self._attempt is None and self._last_error is not None and self._clock.seconds() < self._retry_at:
            return fail(self._last_error)
        waiter = self._observers.observe()
        if self._attempt is None:
            self._start_attempt(url)
        return waiter

    def _start_attempt(self, url: str) -> None:
        self._url = url
        try:
            link, attempt = self._open_connection(self.node_id, url)
        except Exception:  # noqa: BLE001 (what is wrong with a url, or with the secret)
            self._attempt_failed(Failure())
            return
        self._attempt = attempt
        attempt.addCallbacks(self._connection_opened, self._attempt_failed, callbackArgs=(link,))
        attempt.addErrback(lambda failure: self._log.failure("error in opening a link", failure))

    def _connection_opened(self, _: None, connection: PeerConnection) -> None:
        self._attempt = None
        self.connection = connection
        self._opened_at = self._clock.seconds()
        if self._last_error is not None:
            self._log.info("node {node} at {url} is linked again", node=self.node_id, url=self._url)
        connection.closed.addCallback(self._connection_closed, connection)
        self._on_open(self.node_id, connection)
        self._observers.callback(None)

    def _attempt_failed(self, failure: Failure) -> None:
        self._attempt = None
        problem = describe_failure(failure)
        if not failure.check(CancelledError):
            self._record_failure(problem, failure.check(ConnectionRefusedError) is not None or WRONG_NODE in problem)
        self._observers.errback(self._last_error or PeerUnreachableError(problem))

    def _connection_closed(self, event: CloseEvent, connection: PeerConnection) -> None:
        self.connection = None
        if event.code not in _NORMAL_CLOSE_CODES:
            self._record_failure(f"the link broke: {event.code} {ascii(event.reason)[1:-1]}", False)
        if self._clock.seconds() - self._opened_at >= MIN_UPTIME:
            self._failures = 0
            self._retry_at = -math.inf
        self._on_close(self.node_id, connection)

    def _record_failure(self, problem: str, refused: bool) -> None:
        self._metrics.link_failures += 1
        self._last_error = PeerUnreachableError(f"node {self.node_id} at {self._url}: {problem}", refused=refused)
        now = self._clock.seconds()
        self._retry_at = now + min(INITIAL_BACKOFF * 2**self._failures, MAX_BACKOFF)
        self._failures = min(self._failures + 1, 16)
        if now - self._logged_at >= LOG_INTERVAL:
            self._logged_at = now
            url = ascii(self._url)[1:-1]
            text = "node {node} at {url} cannot be asked: {problem}"
            self._log.warn(text, node=self.node_id, url=url, problem=problem)

    def stop(self) -> PeerConnection | None:
        """Close the link with 1001, or give up the attempt; returns the link that is being closed."""
        link = self.connection
        if self._attempt is not None:
            self._attempt.cancel()
        elif link is not None:
            link.close_with(CloseCode.GOING_AWAY, "going away")
        return link


def describe_failure(failure: Failure) -> str:
    """Why a link could not be opened, in a line."""
    problem = failure.value
    if isinstance(problem, ConnectionRefusedError):
        return "nothing listens there (connection refused)"
    if isinstance(problem, HandshakeRefusedError):
        is_secret = problem.status in (401, 403) and WRONG_NODE not in f"{problem}"
        return f"{problem}{_SECRET_HINT if is_secret else ''}"
    text = f"{problem}" or type(problem).__name__
    return text.replace("\n", " ")


#: While more bytes than these wait for a node to read them, it is asked nothing more.
MAX_UNSENT = 16777216
#: what a message is longer than what it carries, more than enough
MAX_ENVELOPE = 256
#: so often in succession a node is not listed before it counts as gone: one that has just joined may not be listed yet
MIN_ABSENCES = 2

_UNREADABLE_RESPONSE = "what the client's node answered cannot be read"


class PeerPool:
    """The links, and the questions that are in flight on them."""

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
    ) -> None:
        """The same as for :class:`~gateway.cluster.peer_client.PeerClient`."""
        #: by node_id, those that are open
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
        self._connectors: dict[str, PeerConnector] = {}
        #: those that were open, until their transports are gone
        self._open_transports: set[PeerConnection] = set()
        self._sweep_timer: IDelayedCall | None = None
        self._last_sweep = 0.0
        self._stopped = False

    # What is asked.

    def connect(self, node_id: str, url: str) -> Deferred[None]:
        """Have a link open to a node. Fails with ``PeerUnreachable``; see :meth:`Peer.connect`."""
        if self._stopped:
            return fail(PeerUnreachableError("this node is stopping"))
        peer = self._connectors.get(node_id)
        if peer is None:
            peer = PeerConnector(
                node_id,
                clock=self._reactor,
                metrics=self._metrics,
                open_connection=self._open_connection,
                on_open=self._connection_opened,
                on_close=self._connection_closed,
            )
            self._connectors[node_id] = peer
        return peer.connect(url)

    def connect_within(self, timeout: float, node_id: str, url: str) -> Deferred[None]:
        """The same, which fails when so many seconds have passed."""

        def timed_out(result: object, timeout: float) -> Failure:
            return Failure(
                PeerUnreachableError(f"node {node_id} at {url}: there was no link to it within {timeout:g} s")
            )

        return self.connect(node_id, url).addTimeout(timeout, self._reactor, timed_out)

    def check_sendable(self, connection: PeerConnection, client_id: str, size: int) -> None:
        """Raise ``RpcError`` if a message with params of so many bytes is not to be sent over a link."""
        if size > self._max_params_size:
            raise RpcError(ErrorKind.TOO_LARGE, client_id)
        if connection.is_congested(self._max_unsent):
            detail = "the client's node does not read what it is asked"
            raise RpcError(ErrorKind.NODE_UNREACHABLE, client_id, sent=False, detail=detail)

    def request(self, node_id: str, client_id: str, method: str, params: bytes, timeout: float) -> PeerRequest:
        """Ask a node something by its open link. Fails with, and raises, ``RpcError``."""
        link = self.connections.get(node_id)
        if link is None:
            raise _connection_closed_error(client_id)
        self.check_sendable(link, client_id, len(params))
        question = PeerRequest(self.pending.discard)
        id = self.pending.start(question, link, client_id, timeout)
        if not link.send(encode_request(id, method, params)):
            self.pending.discard(question)
            raise _connection_closed_error(client_id)
        self.pending.mark_sent(question)
        return question

    def send(self, connection: PeerConnection, payload: bytes) -> None:
        """Send what is not to be answered; forget it if the node does not read."""
        if not connection.is_congested(self._max_unsent):
            connection.send(payload)

    # What is answered.

    def _message_received(self, connection: PeerConnection, payload: bytes) -> None:
        id, answer = decode_response(payload)
        if isinstance(answer, Reply):
            if not self.pending.resolve(connection, id, answer):
                self._unmatched_response(connection, id, payload)
            return
        call = self.pending.pop(connection, id)
        if call is None:
            self._unmatched_response(connection, id, payload)
        elif answer is None:
            self._metrics.bad_messages["peer"] += 1
            self.pending.complete_with_error(
                call, RpcError(ErrorKind.CONNECTION_LOST, call.client_id, detail=_UNREADABLE_RESPONSE)
            )
        elif isinstance(answer, tuple):
            self.pending.complete_with_error(call, to_rpc_error(answer, call.client_id))
        else:
            try:
                call.not_delivered(answer)
            except Exception:  # noqa: BLE001 (it is no concern of the next call)
                self._log.failure("it could not be told that a call was not passed on")

    def _unmatched_response(self, connection: PeerConnection, id: bytes, payload: bytes) -> None:
        """It answers nothing that is in flight."""
        if id not in (b"", b"null"):
            self._metrics.late_responses += 1
            return
        self._metrics.bad_messages["peer"] += 1
        if not isinstance(jsonrpc.decode(payload), (jsonrpc.Notification, jsonrpc.Request)):
            # It may be the answer to any of them: none is to wait for it in vain.
            connection.close_with(CloseCode.PROTOCOL_ERROR, "an answer cannot be read, nor what it answers")

    # The links.

    def _open_connection(self, node_id: str, url: str) -> tuple[PeerConnection, Deferred[None]]:
        target = peer_target(url)
        link = make_connection(
            target,
            # The prefix is a reverse proxy's: the node that is asked sees what follows it.
            self._peer_auth.sign(node_id, "GET", BACKEND_PATH),
            clock=self._reactor,
            cork=self._cork,
            max_message_size=self._max_message_size,
            message_received=self._message_received,
        )
        return link, open_connection(link, target, self._reactor, self._tls)

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
        # Time is counted in sweeps: while this process was stopped, nobody could be heard.
        stopped = now - self._last_sweep > 2 * self._heartbeat
        self._last_sweep = now
        for link in list(self.connections.values()):
            if stopped:
                link.reset_idle()
            if link.check_idle(self._heartbeat) >= self._lease:
                link.abort(f"nothing was heard for {self._lease:g} s")
        if self.connections:
            self._sweep_timer = self._reactor.callLater(self._heartbeat, self._sweep)

    def nodes_changed(self, node_ids: Iterable[str]) -> set[str]:
        """These nodes are live. Returns those of the others, as far as there was anything of them, that are gone: there
        are no links to them any more once nothing is in flight on them."""
        live = set(node_ids)
        gone = set()
        for node_id, peer in list(self._connectors.items()):
            peer.absences = 0 if node_id in live else peer.absences + 1
            if peer.absences < MIN_ABSENCES:
                continue
            gone.add(node_id)
            if peer.connection is None or not self.pending.in_flight(peer.connection):
                del self._connectors[node_id]
                peer.stop()
        return gone

    def stop(self) -> Deferred[None]:
        """Close all links with 1001; fires when they are gone."""
        self._stopped = True
        for peer in list(self._connectors.values()):
            peer.stop()
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        return DeferredList([link.disconnected for link in self._open_transports]).addCallback(lambda _: None)


def _connection_closed_error(client_id: str) -> RpcError:
    return RpcError(ErrorKind.NODE_UNREACHABLE, client_id, sent=False, detail="the link to the node is closed")
