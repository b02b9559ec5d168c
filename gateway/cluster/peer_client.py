"""Client of the peers: calls and notifications to their clients, requests to the nodes themselves, and ownership
notices.

dispatcher    try_send(), fence()                      client.call, client.notify, peer.fence (messages.py)
router        has_client(), has_room()                 peer.has, peer.has_room
              notify_takeover()                        peer.moved
              notify_claim_revoked()                   peer.taken_back
rebalancer    has_room()                               peer.has_room
registry      exchange_floors()                        peer.floor
API           close_session(), notify_prefix()         peer.close, peer.notify_prefix
              drain(), rebalance()                     peer.drain, peer.rebalance

An ownership notice tells the previous owner of a client about a newer claim, or that such a claim was revoked. It is
repeated until the node acknowledges it, or is gone:

-> peer.moved {"client","generation","node"}           <- null
-> peer.taken_back {"client","generation","node"}      <- null
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

import msgspec
from twisted.internet.defer import CancelledError, Deferred, DeferredList, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.cluster.auth import PeerAuth, PeerTLS
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.features import Feature
from gateway.cluster.interface import IPeerClient
from gateway.cluster.messages import (
    encode_call,
    encode_cancel,
    encode_message_params,
    encode_notify,
    encode_params,
)
from gateway.cluster.peer_connection import PeerConnection
from gateway.cluster.peer_pool import MAX_UNSENT, PeerPool
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.interface import Assignment, Location, NodeStatus, SessionKey
from gateway.rpc.errors import NotDeliveredError
from gateway.rpc.interface import IRemoteNodes
from gateway.rpc.pending import Call
from gateway.util.backoff import Backoff
from gateway.util.cork import Cork

#: notices that are sent at once
NOTICE_BATCH_SIZE = 256
#: the most notices that wait; then the oldest is dropped: the superseded connection, if still open, gets no calls
MAX_NOTICES = 2**16
#: delay before notices are repeated for the first time, in seconds
INITIAL_BACKOFF = 0.25
#: the longest delay before notices are repeated, in seconds
MAX_BACKOFF = 2.0


class OwnershipOutbox:
    """The notices of one kind for one node, repeated until they are delivered."""

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        send: Callable[[list[SessionKey]], Deferred[list[SessionKey]]],
        on_empty: Callable[[], None],
    ) -> None:
        """``send`` sends notices, each the key of the newer claim, and fires with those that are done with; it may fail
        with :class:`~gateway.cluster.errors.PeerUnreachableError`. ``on_empty`` is called whenever no notice is
        left."""
        self._clock = clock
        self._send = send
        self._on_empty = on_empty
        #: client_id -> the generation of its newer claim
        self._notices: dict[str, int] = {}
        self._sending: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._notices)

    def add(self, key: SessionKey) -> None:
        """Queue the notice of a newer claim; it replaces an older one of the same client."""
        client_id, generation = key
        notices = self._notices
        notices[client_id] = max(generation, notices.pop(client_id, 0))
        if len(notices) > MAX_NOTICES:
            del notices[next(iter(notices))]
        if self._sending is None:
            self._sending = Deferred.fromCoroutine(self._send_all())
            self._sending.addErrback(self._failed).addCallback(self._finished)

    def stop(self) -> None:
        """Drop all notices."""
        self._notices.clear()
        if self._sending is not None:
            self._sending.cancel()

    async def _send_all(self) -> None:
        # Send the notices of one reactor iteration together.
        await deferLater(self._clock, 0)
        backoff = Backoff(INITIAL_BACKOFF, MAX_BACKOFF)
        while self._notices:
            batch = [SessionKey(*notice) for notice in islice(self._notices.items(), NOTICE_BATCH_SIZE)]
            try:
                delivered = await self._send(batch)
            except PeerUnreachableError:
                delivered = []
            for client_id, generation in delivered:
                # A newer notice may have replaced it.
                if self._notices.get(client_id) == generation:
                    del self._notices[client_id]
            if delivered:
                backoff.reset()
            elif self._notices:
                await deferLater(self._clock, backoff.next_delay())

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._log.failure("error in sending ownership notices", failure)

    def _finished(self, _: object) -> None:
        self._sending = None
        self._on_empty()


#: how much longer than its timeout a call is kept, so that the peer's timeout error arrives, in seconds
TIMEOUT_GRACE = 0.2
#: timeout of peer.fence, in seconds: beyond it the connection has long been found dead
FENCE_TIMEOUT = 60.0
#: delay before a peer.fence that could not be sent, or failed, is repeated, in seconds
FENCE_RETRY_INTERVAL = 0.1
#: timeout of peer.floor: less than a client waits for its claim, in seconds
FLOOR_TIMEOUT = 2.0
#: default timeout of requests to a node itself, in seconds
REQUEST_TIMEOUT = 5.0
#: timeout of peer.notify_prefix, which is paced to about 10,000 clients per second, in seconds
NOTIFY_PREFIX_TIMEOUT = 300.0

#: errors of a peer that make it useless to repeat a notice
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


class _FloorResult(msgspec.Struct):
    generation: int


_decode_floor = msgspec.json.Decoder(_FloorResult).decode
_decode_notify_prefix = msgspec.json.Decoder(_NotifyPrefixResult).decode
_decode_rebalance = msgspec.json.Decoder(_RebalanceResult).decode


@implementer(IRemoteNodes, IPeerClient)
class PeerClient:
    """The peers of this node."""

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
        own_url: Callable[[], str] = lambda: "",
    ) -> None:
        """``node_id`` is this node's own; ``heartbeat`` and ``lease`` are in seconds. ``max_message_size`` (in both
        directions, envelope included) and ``max_unsent`` (bytes that a peer has not read yet) are in bytes. ``tls`` is
        for wss URLs. ``own_url`` returns this node's own peer URL: no other node listens there."""
        self._node_id = node_id
        self._reactor = reactor
        self._cork = cork
        self._metrics = metrics
        self._own_url = own_url
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
            own_url=own_url,
        )
        self._connections = self._pool.connections
        self._pending = self._pool.pending
        #: (node_id, method) -> the notices that wait
        self._outboxes: dict[tuple[str, str], OwnershipOutbox] = {}
        self._fences: set[Deferred[None]] = set()
        self._stopped = False

    def count(self) -> int:
        """Return the number of open connections."""
        return len(self._connections)

    def requests_in_flight(self) -> int:
        """Return the number of requests without a response so far."""
        return len(self._pending)

    def nodes_changed(self, nodes: Sequence[NodeStatus]) -> None:
        """Take note of the live peers. Notices for the others are dropped; connections to them close once no request is
        in flight."""
        live = {node.node_id for node in nodes}
        gone = self._pool.nodes_changed(live)
        for outbox in [outbox for (node_id, _), outbox in self._outboxes.items() if node_id in gone]:
            outbox.stop()

    def stop(self) -> Deferred[None]:
        """Close all connections with 1001, and open no more; fires when their transports are closed. Does not fail."""
        self._stopped = True
        for outbox in list(self._outboxes.values()):
            outbox.stop()
        for fence in list(self._fences):
            fence.cancel()
        return self._pool.stop()

    # IRemoteNodes

    def connect(self, location: Location) -> Deferred[None]:
        connected = self._pool.connect(location.node_id, location.peer_url)
        return connected.addErrback(_convert_unreachable, location.client_id)

    def try_send(
        self,
        call: Call,
        location: Location,
        method: str,
        params: bytes | None,
        timeout: float,
        *,
        is_call: bool = True,
        stale: bool = False,
    ) -> bool:
        """Call or notify a client over an open connection to its node; ``False`` if there is none, and nothing was
        done.

        Besides the errors of the interface, raises ``RpcError`` if the message is too large, or if the node does not
        read its requests (``NODE_UNREACHABLE``, not sent).
        """
        connection = self._connections.get(location.node_id)
        if connection is None:
            return False
        client_id = location.client_id
        message = encode_message_params(client_id, location.generation, method, params, stale)
        self._pool.check_sendable(connection, client_id, len(message))
        pending = self._pending
        # A node has its own, shorter timeout of a call.
        id = pending.start(call, connection, client_id, timeout + TIMEOUT_GRACE if is_call else timeout)
        try:
            sent = connection.send(encode_call(id, message, timeout) if is_call else encode_notify(id, message))
        except BaseException:
            pending.discard(call)
            raise
        if not sent:
            pending.discard(call)
            return False
        if is_call:
            self._metrics.peer_calls += 1
        pending.mark_sent(call)
        return True

    def fence(self, location: Location) -> Deferred[None]:
        connection = self._connections.get(location.node_id)
        if connection is None or Feature.FENCE not in connection.features:
            return succeed(None)
        fence = Deferred.fromCoroutine(self._fence(connection, location))
        self._fences.add(fence)

        def finished(result: Failure | None) -> None:
            self._fences.discard(fence)
            if result is not None:
                result.trap(CancelledError)

        return fence.addBoth(finished)

    async def _fence(self, connection: PeerConnection, location: Location) -> None:
        params = encode_params(client=location.client_id)
        # Only a response or the loss of the connection settles the messages before it: not that too many requests are
        # in flight, or that the node does not read.
        while self._connections.get(location.node_id) is connection:
            try:
                await self._pool.request(location.node_id, location.peer_url, "peer.fence", params, FENCE_TIMEOUT)
                return
            except (RpcError, NotDeliveredError, PeerUnreachableError):
                if self._connections.get(location.node_id) is connection:
                    await deferLater(self._reactor, FENCE_RETRY_INTERVAL)

    def cancel(self, call: Call) -> None:
        connection = self._pending.owner_of(call)
        if isinstance(connection, PeerConnection):
            self._pending.discard(call)
            self._pool.send(connection, encode_cancel(call.id))

    # IPeerClient

    def has_client(self, location: Location, timeout: float) -> Deferred[bool]:
        params = encode_params(client=location.client_id, generation=location.generation)
        return self._request(location, "peer.has", params, _decode_bool, timeout)

    def close_session(self, location: Location, code: int, reason: str) -> Deferred[bool]:
        params = encode_params(client=location.client_id, generation=location.generation, code=code, reason=reason)
        return self._request(location, "peer.close", params, _decode_bool)

    def notify_prefix(self, node: NodeStatus, prefix: str, method: str, params: bytes | None) -> Deferred[int]:
        request: dict[str, Any] = {"prefix": prefix, "method": method}
        if params is not None:
            request["params"] = msgspec.Raw(params)
        return self._request(
            node, "peer.notify_prefix", encode_params(**request), _reached_count, NOTIFY_PREFIX_TIMEOUT
        )

    def drain(self, node: NodeStatus) -> Deferred[None]:
        return self._request(node, "peer.drain", b"{}", lambda result: None)

    def has_room(self, node: Assignment | NodeStatus, timeout: float) -> Deferred[bool]:
        return self._request(node, "peer.has_room", b"{}", _decode_bool, timeout)

    def rebalance(self, node: NodeStatus) -> Deferred[int]:
        return self._request(node, "peer.rebalance", b"{}", _moving_count)

    def _request(
        self,
        node: Location | NodeStatus | Assignment,
        method: str,
        params: bytes,
        decode: Callable[[bytes], _T],
        timeout: float = REQUEST_TIMEOUT,
    ) -> Deferred[_T]:
        return Deferred.fromCoroutine(self._send_request(node, method, params, decode, timeout))

    async def _send_request(
        self,
        node: Location | NodeStatus | Assignment,
        method: str,
        params: bytes,
        decode: Callable[[bytes], _T],
        timeout: float,
    ) -> _T:
        try:
            reply = await self._pool.request(node.node_id, node.peer_url, method, params, timeout)
            if reply.result is not None:
                return decode(reply.result)
        except RpcError as e:
            raise PeerUnreachableError(f"{method}: {e.detail or e.kind.value.message}", sent=e.sent) from None
        except NotDeliveredError as e:
            raise PeerUnreachableError(f"{method}: {e}") from None
        except msgspec.DecodeError:
            pass
        raise PeerUnreachableError(f"{method}: the node's response cannot be read", sent=True)

    def exchange_floors(self, generation: int) -> Deferred[list[int]]:
        """Tell all connected nodes the highest generation that this one knows of; fires with those that they know of,
        after :data:`FLOOR_TIMEOUT` at the latest. Does not fail."""
        requests = [
            self._pool.request(node_id, "", "peer.floor", encode_params(generation=generation), FLOOR_TIMEOUT)
            for node_id, connection in self._connections.items()
            if Feature.FLOOR in connection.features
        ]
        return DeferredList(requests, consumeErrors=True).addCallback(_decode_floors)

    def learn_floors(self, nodes: Sequence[NodeStatus], generation: int) -> Deferred[list[int]]:
        """Like :meth:`exchange_floors`, with nodes to which there need be no connection yet: for a node that joins."""
        connecting = [
            self._pool.connect_within(FLOOR_TIMEOUT, node.node_id, node.peer_url) for node in nodes if node.peer_url
        ]
        connected = DeferredList(connecting, consumeErrors=True)
        return connected.addCallback(lambda _: self.exchange_floors(generation))

    # Ownership notices.

    def notify_takeover(self, location: Location, generation: int) -> None:
        self._enqueue_notice("peer.moved", location, generation)

    def notify_claim_revoked(self, location: Location, generation: int) -> None:
        self._enqueue_notice("peer.taken_back", location, generation)

    def _enqueue_notice(self, method: str, location: Location, generation: int) -> None:
        node_id, url = location.node_id, location.peer_url
        if self._stopped or node_id == self._node_id or url == self._own_url():
            return
        outbox = self._outboxes.get((node_id, method))
        if outbox is None:

            def send(notices: list[SessionKey]) -> Deferred[list[SessionKey]]:
                return Deferred.fromCoroutine(self._send_notices(node_id, url, method, notices))

            def on_empty() -> None:
                self._outboxes.pop((node_id, method), None)

            outbox = self._outboxes[node_id, method] = OwnershipOutbox(self._reactor, send, on_empty)
        outbox.add(SessionKey(location.client_id, generation))

    async def _send_notices(self, node_id: str, url: str, method: str, notices: list[SessionKey]) -> list[SessionKey]:
        """Send notices in one write; returns those that need not be repeated."""
        await self._pool.connect_within(REQUEST_TIMEOUT, node_id, url)
        delivered: list[SessionKey] = []
        corked = self._cork.cork()
        try:
            requests = [self._send_notice(node_id, url, method, notice, delivered) for notice in notices]
        finally:
            if corked:
                self._cork.uncork()
        await DeferredList(requests)
        return delivered

    def _send_notice(
        self, node_id: str, url: str, method: str, notice: SessionKey, delivered: list[SessionKey]
    ) -> Deferred[None]:
        client_id, generation = notice
        params = encode_params(client=client_id, generation=generation, node=self._node_id)

        def failed(failure: Failure) -> None:
            error = failure.value
            if isinstance(error, RpcError) and error.kind in _PERMANENT_ERRORS:
                self._log.warn("node {node} does not accept an ownership notice: {error}", node=node_id, error=error)
            elif not isinstance(error, NotDeliveredError):
                return
            delivered.append(notice)

        request = self._pool.request(node_id, url, method, params, REQUEST_TIMEOUT, client_id=client_id)
        return request.addCallbacks(lambda _: delivered.append(notice), failed)


def _convert_unreachable(failure: Failure, client_id: str) -> Failure:
    """Convert ``PeerUnreachableError`` to ``RpcError``; other errors pass."""
    if not failure.check(PeerUnreachableError):
        return failure
    return Failure(RpcError(ErrorKind.NODE_UNREACHABLE, client_id, sent=False, detail=failure.getErrorMessage()))


def _decode_floors(outcomes: list[tuple[bool, Any]]) -> list[int]:
    """Return the generations in the responses that can be read."""
    floors = []
    for succeeded, reply in outcomes:
        if succeeded and reply.result is not None:
            with contextlib.suppress(msgspec.DecodeError):
                floors.append(_decode_floor(reply.result).generation)
    return floors


def _decode_bool(result: bytes) -> bool:
    return msgspec.json.decode(result, type=bool)


def _reached_count(result: bytes) -> int:
    return _decode_notify_prefix(result).reached


def _moving_count(result: bytes) -> int:
    return _decode_rebalance(result).moving
