"""What one other node is still to be told: clients that it had, and that a newer claim has since.

-> peer.moved {"client","generation","node"}           <- null
-> peer.taken_back {"client","generation","node"}      <- null     or that such a claim is no more

It is told again until it has answered, or is gone.

The other nodes, as this one asks them: each over one link of its own, which is opened on demand (links.py, peer.py).

hub       -> ask(), notify()                    client.call, client.notify (messages.py)
placement -> has(), has_room(), moved()         peer.has, peer.has_room, peer.moved
balance   -> has_room()                         peer.has_room
API       -> close(), notify_prefix(), drain()  peer.close, peer.notify_prefix, peer.drain
             rebalance()                        peer.rebalance
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from twisted.internet.defer import CancelledError, Deferred, DeferredList, fail
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.cluster.auth import PeerAuth, PeerTLS
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import IPeerClient
from gateway.cluster.messages import encode_call, encode_cancel, encode_message_params, encode_params
from gateway.cluster.peer_connection import PeerConnection
from gateway.cluster.peer_pool import MAX_UNSENT, PeerPool, PeerRequest
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.interface import Assignment, Location, NodeStatus
from gateway.rpc.errors import NotDeliveredError
from gateway.rpc.interface import IRemoteNodes
from gateway.rpc.pending import Call, Reply
from gateway.util.cork import Cork

#: so many are told at once, and so many wait at most; then the oldest is forgotten: its old connection, if there still
#: is one, is called by nobody
NOTICE_BATCH_SIZE, MAX_NOTICES = 256, 65536
#: how long it is until a node is told again that could not be, in seconds: at first, and at most
INITIAL_BACKOFF, MAX_BACKOFF = 0.25, 2.0

#: a client's id, and the generation of its newer claim
OwnershipNotice = tuple[str, int]


class OwnershipOutbox:
    """The moves that one node is to be told of."""

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        send: Callable[[list[OwnershipNotice]], Deferred[list[OwnershipNotice]]],
        on_empty: Callable[[], None],
    ) -> None:
        """``tell`` tells the node, and fires with those that need not be told again; it may fail with
        ``PeerUnreachable``. ``done`` is called whenever none is left."""
        self._clock = clock
        self._send = send
        self._on_empty = on_empty
        self._notices: dict[str, int] = {}
        self._sending: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._notices)

    def add(self, client_id: str, generation: int) -> None:
        """The node is to be told that a client has a claim of that generation."""
        waiting = self._notices
        waiting[client_id] = max(generation, waiting.pop(client_id, 0))
        if len(waiting) > MAX_NOTICES:
            del waiting[next(iter(waiting))]
        if self._sending is None:
            self._sending = Deferred.fromCoroutine(self._send_all())
            self._sending.addErrback(self._failed).addCallback(self._finished)

    def stop(self) -> None:
        """Tell no more."""
        self._notices.clear()
        if self._sending is not None:
            self._sending.cancel()

    async def _send_all(self) -> None:
        # Those of one turn go together.
        await deferLater(self._clock, 0)
        wait = INITIAL_BACKOFF
        while self._notices:
            some = list(self._notices.items())[:NOTICE_BATCH_SIZE]
            try:
                told = await self._send(some)
            except PeerUnreachableError:
                told = []
            for client_id, generation in told:
                # Meanwhile there may be a newer one.
                if self._notices.get(client_id) == generation:
                    del self._notices[client_id]
            if told:
                wait = INITIAL_BACKOFF
            elif self._notices:
                await deferLater(self._clock, wait)
                wait = min(2 * wait, MAX_BACKOFF)

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._log.failure("error in telling another node of clients that moved", failure)

    def _finished(self, _: object) -> None:
        self._sending = None
        self._on_empty()


#: a node's own time-out error is waited for so much longer than the time-out, in seconds
TIMEOUT_GRACE = 0.2
#: how long a question of this node's own may take, in seconds; and telling all clients of a prefix, which is paced:
#: some ten thousand a second
REQUEST_TIMEOUT, NOTIFY_PREFIX_TIMEOUT = 5.0, 300.0

#: errors by which a node says that it will never do what it was told
_PERMANENT_ERRORS = (
    ErrorKind.METHOD_NOT_FOUND,
    ErrorKind.INVALID_PARAMS,
    ErrorKind.INVALID_REQUEST,
    ErrorKind.PARSE_ERROR,
)

_T = TypeVar("_T")


class _NotifyPrefixResult(msgspec.Struct):
    reached: int


class _RebalanceResult(msgspec.Struct):
    moving: int


_decode_notify_prefix = msgspec.json.Decoder(_NotifyPrefixResult).decode
_decode_rebalance = msgspec.json.Decoder(_RebalanceResult).decode


@implementer(IRemoteNodes, IPeerClient)
class PeerClient:
    """The other nodes."""

    _log = Logger()

    def __init__(
        self,
        *,
        node_id: str,
        peer_auth: PeerAuth,
        reactor: Any,
        cork: Cork,
        metrics: Metrics,
        heartbeat: float,
        lease: float,
        max_message_size: int,
        max_calls: int,
        max_unsent: int = MAX_UNSENT,
        tls: PeerTLS | None = None,
    ) -> None:
        """``node_id`` is this node's own; ``heartbeat`` and ``lease`` are in seconds, ``max_message_size`` (either way,
        the envelope included) and ``max_waiting`` (what a node may leave unread) in bytes. ``tls`` is for wss urls."""
        self._node_id = node_id
        self._reactor = reactor
        self._cork = cork
        self._metrics = metrics
        self._pool = PeerPool(
            peer_auth=peer_auth,
            reactor=reactor,
            cork=cork,
            metrics=metrics,
            heartbeat=heartbeat,
            lease=lease,
            max_message_size=max_message_size,
            max_calls=max_calls,
            max_unsent=max_unsent,
            tls=tls or PeerTLS(),
        )
        self._connections = self._pool.connections
        self._pending = self._pool.pending
        #: by node_id
        self._outboxes: dict[tuple[str, str], OwnershipOutbox] = {}
        self._stopped = False

    def count(self) -> int:
        """How many links are open."""
        return len(self._connections)

    def requests_in_flight(self) -> int:
        """How many questions to other nodes are not answered yet."""
        return len(self._pending)

    def nodes_changed(self, nodes: Sequence[NodeStatus]) -> None:
        """These other nodes are live. What there is of another one is given up, once nothing is in flight to it."""
        live = {node.node_id for node in nodes}
        gone = self._pool.nodes_changed(live)
        for moves in [moves for (node_id, _), moves in self._outboxes.items() if node_id in gone]:
            moves.stop()

    def stop(self) -> Deferred[None]:
        """Close all links with 1001, and open no more; fires when they are gone. Does not fail."""
        self._stopped = True
        for moves in list(self._outboxes.values()):
            moves.stop()
        return self._pool.stop()

    # IElsewhere

    def connect(self, location: Location) -> Deferred[None]:
        """See :meth:`IElsewhere.connect`."""
        linked = self._pool.connect(location.node_id, location.peer_url)
        return linked.addErrback(_raise_unreachable, location.client_id)

    def try_call(
        self, call: Call, location: Location, method: str, params: bytes | None, timeout: float, *, stale: bool = False
    ) -> bool:
        """See :meth:`IElsewhere.ask`. Raises ``RpcError`` also where the message is too large, and where the node does
        not read what it is asked (``NODE_UNREACHABLE``, not sent)."""
        link = self._connections.get(location.node_id)
        if link is None:
            return False
        client_id = location.client_id
        message = encode_message_params(client_id, location.generation, method, params, stale)
        self._pool.check_sendable(link, client_id, len(message))
        asked = self._pending
        id = asked.start(call, link, client_id, timeout + TIMEOUT_GRACE)
        try:
            sent = link.send(encode_call(id, message, timeout))
        except BaseException:
            asked.discard(call)
            raise
        if not sent:
            asked.discard(call)
            return False
        self._metrics.peer_calls += 1
        asked.mark_sent(call)
        return True

    def cancel(self, call: Call) -> None:
        """See :meth:`IElsewhere.forget`."""
        link = self._pending.owner_of(call)
        if isinstance(link, PeerConnection):
            self._pending.discard(call)
            self._pool.send(link, encode_cancel(call.id))

    def notify(
        self, location: Location, method: str, params: bytes | None, timeout: float, *, stale: bool = False
    ) -> Deferred[None]:
        """See :meth:`IElsewhere.notify`."""
        client_id = location.client_id
        message = encode_message_params(client_id, location.generation, method, params, stale) + b"}"
        if location.node_id not in self._connections:
            return Deferred.fromCoroutine(self._notify(location, message, timeout))
        try:
            return self._pool.request(location.node_id, client_id, "client.notify", message, timeout).addCallback(
                _check_notified
            )
        except RpcError as e:
            return fail(e)

    async def _notify(self, location: Location, message: bytes, timeout: float) -> None:
        node_id, client_id = location.node_id, location.client_id
        deadline = self._reactor.seconds() + timeout
        try:
            await self._pool.connect_within(timeout, node_id, location.peer_url)
        except PeerUnreachableError as e:
            raise RpcError(ErrorKind.NODE_UNREACHABLE, client_id, sent=False, detail=str(e)) from None
        left = max(0.0, deadline - self._reactor.seconds())
        _check_notified(await self._pool.request(node_id, client_id, "client.notify", message, left))

    # IPeers

    def has_client(self, location: Location, timeout: float) -> Deferred[bool]:
        """See :meth:`IPeers.has`."""
        params = encode_params(client=location.client_id, generation=location.generation)
        return self._request(location, "peer.has", params, _decode_bool, timeout)

    def close_session(self, location: Location, code: int, reason: str) -> Deferred[bool]:
        """See :meth:`IPeers.close`."""
        params = encode_params(client=location.client_id, generation=location.generation, code=code, reason=reason)
        return self._request(location, "peer.close", params, _decode_bool)

    def notify_prefix(self, node: NodeStatus, prefix: str, method: str, params: bytes | None) -> Deferred[int]:
        """See :meth:`IPeers.notify_prefix`; it may take ``PREFIX_TIMEOUT``."""
        asked: dict[str, Any] = {"prefix": prefix, "method": method}
        if params is not None:
            asked["params"] = msgspec.Raw(params)
        return self._request(node, "peer.notify_prefix", encode_params(**asked), _reached_count, NOTIFY_PREFIX_TIMEOUT)

    def drain(self, node: NodeStatus) -> Deferred[None]:
        """See :meth:`IPeers.drain`."""
        return self._request(node, "peer.drain", b"{}", lambda result: None)

    def has_room(self, node: Assignment | NodeStatus, timeout: float) -> Deferred[bool]:
        """See :meth:`IPeers.has_room`."""
        return self._request(node, "peer.has_room", b"{}", _decode_bool, timeout)

    def rebalance(self, node: NodeStatus) -> Deferred[int]:
        """See :meth:`IPeers.rebalance`."""
        return self._request(node, "peer.rebalance", b"{}", _moving_count)

    def _request(
        self,
        node: Location | NodeStatus | Assignment,
        method: str,
        params: bytes,
        decode: Callable[[bytes], _T],
        timeout: float = REQUEST_TIMEOUT,
    ) -> Deferred[_T]:
        return Deferred.fromCoroutine(self._send_request(node.node_id, node.peer_url, method, params, decode, timeout))

    async def _send_request(
        self, node_id: str, url: str, method: str, params: bytes, decode: Callable[[bytes], _T], timeout: float
    ) -> _T:
        deadline = self._reactor.seconds() + timeout
        await self._pool.connect_within(timeout, node_id, url)
        try:
            left = max(0.0, deadline - self._reactor.seconds())
            reply: Reply = await self._pool.request(node_id, "", method, params, left)
            if reply.result is not None:
                return decode(reply.result)
        except RpcError as e:
            raise PeerUnreachableError(f"{method}: {e.detail or e.kind.value.message}", sent=e.sent) from None
        except NotDeliveredError as e:
            raise PeerUnreachableError(f"{method}: {e}") from None
        except msgspec.DecodeError:
            pass
        raise PeerUnreachableError(f"{method}: the node's answer cannot be read", sent=True)

    # The clients that moved.

    def notify_takeover(self, location: Location, generation: int) -> None:
        """See :meth:`IPeers.moved`."""
        self._enqueue_notice("peer.moved", location, generation)

    def notify_claim_revoked(self, location: Location, generation: int) -> None:
        """See :meth:`IPeers.taken_back`."""
        self._enqueue_notice("peer.taken_back", location, generation)

    def _enqueue_notice(self, method: str, location: Location, generation: int) -> None:
        node_id, url = location.node_id, location.peer_url
        if self._stopped or node_id == self._node_id:
            return
        moves = self._outboxes.get((node_id, method))
        if moves is None:

            def send(notices: list[OwnershipNotice]) -> Deferred[list[OwnershipNotice]]:
                return Deferred.fromCoroutine(self._send_notices(node_id, url, method, notices))

            def on_empty() -> None:
                self._outboxes.pop((node_id, method), None)

            moves = self._outboxes[node_id, method] = OwnershipOutbox(self._reactor, send, on_empty)
        moves.add(location.client_id, generation)

    async def _send_notices(
        self, node_id: str, url: str, method: str, notices: list[OwnershipNotice]
    ) -> list[OwnershipNotice]:
        """Tell a node of clients that it has no more; returns those of which it need not be told again."""
        await self._pool.connect_within(REQUEST_TIMEOUT, node_id, url)
        told: list[OwnershipNotice] = []
        begun = self._cork.cork()
        try:
            telling = [self._send_notice(node_id, method, move, told) for move in notices]
        finally:
            if begun:
                self._cork.uncork()
        await DeferredList(telling)
        return told

    def _send_notice(
        self, node_id: str, method: str, notice: OwnershipNotice, delivered: list[OwnershipNotice]
    ) -> Deferred[None]:
        client_id, generation = notice
        params = encode_params(client=client_id, generation=generation, node=self._node_id)

        def failed(failure: Failure) -> None:
            error = failure.value
            if isinstance(error, RpcError) and error.kind in _PERMANENT_ERRORS:
                self._log.warn("node {node} cannot be told that a client moved: {error}", node=node_id, error=error)
            elif not isinstance(error, NotDeliveredError):
                return
            delivered.append(notice)

        try:
            question: PeerRequest = self._pool.request(node_id, client_id, method, params, REQUEST_TIMEOUT)
        except RpcError:
            question = PeerRequest()
            question.errback(Failure())
        return question.addCallbacks(lambda _: delivered.append(notice), failed)


def _raise_unreachable(failure: Failure, client_id: str) -> None:
    failure.trap(PeerUnreachableError)
    raise RpcError(ErrorKind.NODE_UNREACHABLE, client_id, sent=False, detail=failure.getErrorMessage()) from None


def _check_notified(reply: Reply) -> None:
    """A client was told, unless the node says otherwise in a way that only an answer to a call can have."""
    if reply.result is None:
        raise RpcError(
            ErrorKind.NODE_UNREACHABLE, sent=True, detail="the client's node answered with an error of a client"
        )


def _decode_bool(result: bytes) -> bool:
    return msgspec.json.decode(result, type=bool)


def _reached_count(result: bytes) -> int:
    return _decode_notify_prefix(result).reached


def _moving_count(result: bytes) -> int:
    return _decode_rebalance(result).moving
