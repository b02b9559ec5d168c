"""Server side of peer connections: the backend WebSocket, opened with a node's credentials instead of a token.

    -> GET /v1/backend HTTP/1.1, Upgrade: websocket, Authorization: Wsgateway-Peer v1.…
    -> {"jsonrpc":"2.0","id":"<UUID>","method":"client.call","params":{"client":"x","generation":7,"method":"m"}}
    <- {"jsonrpc":"2.0","id":"<UUID>","result":{"free":12}}                the client's result, byte for byte
    <- {"jsonrpc":"2.0","id":"<UUID>","error":{…},"from":"client"}         the client's own error, byte for byte
    <- {"jsonrpc":"2.0","id":"<UUID>","error":{"code":-32001,…},"gateway":true}   not here: the gateway's error, marked
                                                                           if the peer knows Feature.MARK
    -> {"jsonrpc":"2.0","method":"peer.cancel","params":{"id":"<UUID>"}}   the caller is gone

Methods, none of which is ever forwarded to a third node:

    client.call         {"client","generation","method","params"?,"timeout"?,"stale"?}   the client's result or error
    client.notify       {"client","generation","method","params"?,"stale"?}   null, once the client's transport has it
    peer.fence          {"client"}                                null, once nothing for that client waits any more
    peer.floor          {"generation"}                            {"generation"}, the highest that this node knows of
    peer.cancel         {"id"}                                    null; the call of that id is forgotten
    peer.has            {"client","generation"}                   whether this node takes clients, and has this session
    peer.close          {"client","generation","code","reason"}   whether it was here; sent once its row is gone
    peer.moved          {"client","generation","node"}            null; an older session here is closed
    peer.taken_back     {"client","generation","node"}            null; an older session here is claimed again
    peer.notify_prefix  {"prefix","method","params"?}             {"reached":12}
    peer.drain          {}                                        null, once the drain has begun
    peer.has_room       {}                                        whether this node takes clients, and has room for one
    peer.rebalance      {}                                        {"moving":250}, once the rebalance has begun

client.call and client.notify reach only the session of that generation: without it, -32001 says that nothing was sent.
A node that does not have a session releases its row, if there is one (rpc/orphans.py).
A node without its lease may have lost the client to another node: it answers -32007 unless ``stale`` is true.

The messages of one connection to one client are handled in the order in which they were received: while one waits for a
claim or a handoff, the later ones wait behind it. So does ``peer.fence``: its response says that all earlier ones were
written to the client, or have failed. Once a message was answered with -32007, so are the later ones to that client,
until a ``peer.fence`` shows that the peer knows: a lease that is renewed meanwhile must not let them overtake it.

Each node has one connection to this one: a newer connection closes the older. The responses to refused handshakes are
in access.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType
from twisted.internet.defer import CancelledError, Deferred, TimeoutError, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import Attribute, Interface, implementer

from gateway.api.access import AccessPolicy
from gateway.api.backend import (
    SWEEP_INTERVAL,
    BackendCall,
    BackendFactory,
    BackendProtocol,
    header_lookup,
    select_subprotocol,
)
from gateway.api.methods import (
    NULL_REPLY,
    FastMessage,
    FastRequest,
    MethodResult,
    MethodTable,
    check_client_id,
    decode_params,
    make_fast_decoder,
    raw_params,
)
from gateway.api.upstream import BackendDispatcher
from gateway.clients.interface import IClientSessions
from gateway.cluster.features import FEATURES_HEADER, Feature, decode_features, encode_features
from gateway.cluster.interface import INode, IRebalancer
from gateway.metrics import Metrics
from gateway.protocol import jsonrpc
from gateway.protocol.client_id import is_former_client_id
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.frames import CloseCode
from gateway.protocol.handshake import retry_after_header
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, SessionKey
from gateway.rpc.interface import IDispatcher, IMembership, IOrphanedRows
from gateway.rpc.pending import DeferredCall, Reply
from gateway.settings import Settings, reserved_files
from gateway.util.bounded import BoundedSet
from gateway.util.cork import Cork
from gateway.util.deferred import KeyedLocks
from gateway.websocket.server import HandshakeRequest, RequestRefusedError

#: how long peer.close waits for a claim in progress, in seconds
CLAIM_TIMEOUT = 3.0
#: how long the response about a session that is not here waits for the release of its row, in seconds
RELEASE_TIMEOUT = 0.25

Generation: TypeAlias = Annotated[int, Meta(ge=1)]


class PeerCallParams(msgspec.Struct, gc=False):
    """Params of client.call and client.notify."""

    client: str
    generation: Generation
    method: str
    params: Raw | UnsetType = UNSET
    #: in seconds
    timeout: Annotated[float, Meta(gt=0)] | None = None
    stale: bool = False

    @property
    def key(self) -> SessionKey:
        return SessionKey(self.client, self.generation)


class _FastPeerMessage(FastMessage, gc=False, kw_only=True):
    params: PeerCallParams
    id: Raw


class _CancelParams(msgspec.Struct, gc=False):
    id: Raw


class _FloorParams(msgspec.Struct, gc=False):
    generation: Annotated[int, Meta(ge=0, le=2**62)]


class _FenceParams(msgspec.Struct, gc=False):
    client: str


class _SessionParams(msgspec.Struct, gc=False):
    client: str
    generation: Generation

    @property
    def key(self) -> SessionKey:
        return SessionKey(self.client, self.generation)


class _CloseParams(_SessionParams, gc=False):
    code: Literal[1000, 1001, 1008, 1011, 1012, 1013, 4001, 4003]
    reason: str


class _PrefixParams(msgspec.Struct, gc=False):
    prefix: str
    method: str
    params: Raw | UnsetType = UNSET


_decode_call = msgspec.json.Decoder(PeerCallParams).decode
_decode_cancel = msgspec.json.Decoder(_CancelParams).decode
_decode_floor = msgspec.json.Decoder(_FloorParams).decode
_decode_fence = msgspec.json.Decoder(_FenceParams).decode
_decode_session = msgspec.json.Decoder(_SessionParams).decode
_decode_close = msgspec.json.Decoder(_CloseParams).decode
_decode_prefix = msgspec.json.Decoder(_PrefixParams).decode

#: decodes client.call and client.notify of a node, with an id
decode_fast: Callable[[bytes], FastRequest[PeerCallParams] | None] = make_fast_decoder(
    msgspec.json.Decoder(_FastPeerMessage).decode
)


class IPeerConnection(Interface):
    """A peer connection as the methods see it."""

    client_locks: KeyedLocks = Attribute("Held for a client while a message to it waits to be handed over.")
    refused_clients: BoundedSet = Attribute("The clients to which messages were answered with -32007 since a fence.")

    def cancel_request(id: bytes) -> None:
        """Cancel the request with that raw id, if it is in progress. It gets no response."""


class PeerMethods(MethodTable[IPeerConnection]):
    """The methods of peers."""

    _log = Logger()

    def __init__(
        self,
        *,
        dispatcher: IDispatcher,
        sessions: IClientSessions,
        registry: IRegistry,
        node: INode,
        membership: IMembership,
        clock: IReactorTime,
        settings: Settings,
        orphaned_rows: IOrphanedRows,
        rebalancer: IRebalancer | None = None,
    ) -> None:
        """Without a ``rebalancer``, peer.rebalance fails."""
        table = {
            "client.call": self._client_call,
            "client.notify": self._client_notify,
            "peer.fence": self._peer_fence,
            "peer.floor": self._peer_floor,
            "peer.cancel": self._peer_cancel,
            "peer.has": self._peer_has,
            "peer.close": self._peer_close,
            "peer.moved": self._peer_moved,
            "peer.taken_back": self._peer_taken_back,
            "peer.notify_prefix": self._peer_notify_prefix,
            "peer.drain": self._peer_drain,
            "peer.has_room": self._peer_has_room,
            "peer.rebalance": self._peer_rebalance,
        }
        super().__init__(dispatcher, table)
        self._sessions = sessions
        self._registry = registry
        self._node = node
        self._membership = membership
        self._clock = clock
        self._orphaned_rows = orphaned_rows
        self._call_timeout = settings.call_timeout
        self._max_call_timeout = settings.max_call_timeout
        self._capacity = settings.capacity
        self._rebalancer = rebalancer

    def may_deliver(self, request: PeerCallParams) -> bool:
        """Return whether the lease, or the request, permits delivery to a client of this node."""
        return request.stale or self._membership.has_lease()

    # Clients.

    def _client_call(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        request = decode_params(_decode_call, params)
        client_params = raw_params(request.params, check_client_id(request.client))
        return Deferred.fromCoroutine(self._call(connection, request, client_params))

    async def _call(self, connection: IPeerConnection, request: PeerCallParams, params: bytes | None) -> Reply:
        locks = connection.client_locks
        timeout = self._call_timeout if request.timeout is None else min(request.timeout, self._max_call_timeout)
        deadline = self._clock.seconds() + timeout
        await locks.acquire(request.client)
        try:
            await self._check_deliverable(connection, request, deadline)
            call = DeferredCall(self._cancel_call)
            remaining = max(0.0, deadline - self._clock.seconds())
            if not self.dispatcher.call_session(call, request.key, request.method, params, remaining):
                raise RpcError(ErrorKind.NOT_CONNECTED, request.client)
        finally:
            locks.release(request.client)
        return await call

    def _cancel_call(self, call: Any) -> None:
        self.dispatcher.cancel(call)

    def _client_notify(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        request = decode_params(_decode_call, params)
        client_params = raw_params(request.params, check_client_id(request.client))
        return Deferred.fromCoroutine(self._notify(connection, request, client_params))

    async def _notify(self, connection: IPeerConnection, request: PeerCallParams, params: bytes | None) -> Reply:
        locks = connection.client_locks
        deadline = self._clock.seconds() + self._call_timeout
        await locks.acquire(request.client)
        try:
            await self._check_deliverable(connection, request, deadline)
            if not self.dispatcher.notify_session(request.key, request.method, params):
                raise RpcError(ErrorKind.NOT_CONNECTED, request.client)
        finally:
            locks.release(request.client)
        return NULL_REPLY

    def _peer_fence(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        client_id = check_client_id(decode_params(_decode_fence, params).client)
        locks = connection.client_locks
        if client_id not in locks.held:
            connection.refused_clients.discard(client_id)
            return NULL_REPLY

        def passed(_: None) -> Reply:
            connection.refused_clients.discard(client_id)
            locks.release(client_id)
            return NULL_REPLY

        return locks.acquire(client_id).addCallback(passed)

    async def _check_deliverable(self, connection: IPeerConnection, request: PeerCallParams, deadline: float) -> None:
        """Wait for a handoff or claim in progress. Raises ``RpcError`` unless the request may be delivered now."""
        if self._clock.seconds() >= deadline:
            detail = "the deadline passed while earlier messages to the client waited"
            raise RpcError(ErrorKind.NODE_UNREACHABLE, request.client, sent=False, detail=detail)
        handoff = self.dispatcher.wait_for_handoff(request.client)
        if handoff is not None:
            # The client is at another node then: -32001 makes the caller look it up again.
            with contextlib.suppress(TimeoutError):
                await handoff.addTimeout(max(0.0, deadline - self._clock.seconds()), self._clock)
        if not await self._is_local(request.key, deadline):
            self._orphaned_rows.check(request.key)
            raise RpcError(ErrorKind.NOT_CONNECTED, request.client)
        if request.client in connection.refused_clients or not self.may_deliver(request):
            connection.refused_clients.add(request.client)
            detail = "the lease of the client's node has expired: another node may have the client now"
            raise RpcError(ErrorKind.REGISTRY_UNAVAILABLE, request.client, detail=detail)

    async def _is_local(self, key: SessionKey, deadline: float) -> bool:
        """Return whether that session is on this node. Waits, until ``deadline``, for a claim in progress."""
        client_id, generation = key
        while (current := self._sessions.generation(client_id)) < generation:
            claim = self._sessions.claim_in_progress(client_id, current)
            if claim is None:
                return False
            try:
                await claim.addTimeout(max(0.0, deadline - self._clock.seconds()), self._clock)
            except TimeoutError:
                return False
        return current == generation

    # This node.

    def _peer_floor(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        self._registry.raise_generation_floor(decode_params(_decode_floor, params).generation)
        return Reply(b'{"generation":%d}' % self._registry.generation_floor, None)

    def _peer_cancel(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        connection.cancel_request(bytes(decode_params(_decode_cancel, params).id))
        return NULL_REPLY

    def _peer_has(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        request = decode_params(_decode_session, params)
        if self._sessions.generation(request.client) == request.generation:
            return _bool_reply(not self._node.unready_reason())
        return self._not_here(request.key)

    def _not_here(self, key: SessionKey) -> Deferred[Reply]:
        """Reply that a session is not here, once its row, if it still has one, is released: the peer may look it up
        again."""
        checked = self._orphaned_rows.check(key)
        checked.addTimeout(RELEASE_TIMEOUT, self._clock, lambda result, timeout: False)
        return checked.addCallback(lambda _: _bool_reply(False))

    def _peer_close(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        request = decode_params(_decode_close, params)
        # An operator may remove the rows of clients whose ids are none any more.
        if not is_former_client_id(request.client):
            check_client_id(request.client)
        return Deferred.fromCoroutine(self._close(request))

    async def _close(self, request: _CloseParams) -> Reply:
        if not await self._is_local(request.key, self._clock.seconds() + CLAIM_TIMEOUT):
            return await self._not_here(request.key)
        if request.code == CloseCode.SERVICE_RESTART.value:
            # The peer relays this client: tell it to reconnect, and let its calls finish first.
            return _bool_reply(self._node.send_goaway(request.key, request.reason))
        try:
            return _bool_reply(
                await self._sessions.close(request.client, request.code, request.reason, request.generation)
            )
        except RegistryUnavailableError:
            detail = "the client is disconnected, but its registry row could not be removed yet"
            raise RpcError(ErrorKind.REGISTRY_UNAVAILABLE, request.client, sent=True, detail=detail) from None

    def _peer_moved(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        request = decode_params(_decode_session, params)
        check_client_id(request.client)
        self._sessions.close_superseded(request.key)
        return NULL_REPLY

    def _peer_taken_back(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        request = decode_params(_decode_session, params)
        check_client_id(request.client)
        self._sessions.restore_claim(request.key)
        return NULL_REPLY

    def _peer_notify_prefix(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        request = decode_params(_decode_prefix, params)
        notified = self.dispatcher.notify_prefix(request.prefix, request.method, raw_params(request.params, None))
        return notified.addCallback(_reached_reply)

    def _peer_drain(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        self._node.drain().addErrback(lambda failure: self._log.failure("the drain failed", failure=failure))
        return NULL_REPLY

    def _peer_has_room(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        return _bool_reply(not self._node.unready_reason() and self._sessions.count() < self._capacity)

    def _peer_rebalance(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        if self._rebalancer is None or not self._rebalancer.rate:
            raise RpcError(ErrorKind.INVALID_REQUEST, detail="its --rebalance-rate is 0: it does not move clients")
        return self._rebalancer.rebalance_now().addCallback(_moving_reply)


def _bool_reply(value: Any) -> Reply:
    return Reply(b"true" if value else b"false", None)


def _reached_reply(clients: int) -> Reply:
    return Reply(b'{"reached":%d}' % clients, None)


def _moving_reply(clients: int) -> Reply:
    return Reply(b'{"moving":%d}' % clients, None)


#: clients of one connection for which a refusal is remembered; beyond, the oldest is forgotten
MAX_REFUSED_CLIENTS = 2**16
#: share of the file descriptors that --capacity leaves free
MAX_PEER_CONNECTIONS = reserved_files() // 8
_FULL = f"all {MAX_PEER_CONNECTIONS} connections that this node has for other nodes are in use"


def encode_peer_reply(reply: Reply, id: bytes) -> bytes:
    """Encode a client's reply, byte for byte, as the response to a raw id. The client's own error is marked with
    ``from``."""
    if reply.result is not None:
        return jsonrpc.encode_result(id, reply.result)
    assert reply.error is not None
    return b'{"jsonrpc":"2.0","id":%b,"error":%b,"from":"client"}' % (id, reply.error)


@implementer(IPeerConnection)
class PeerServerProtocol(BackendProtocol):
    """WebSocket connection of one peer."""

    #: the authenticated peer; empty before
    node_id = ""
    #: what both nodes know
    features: frozenset[Feature] = frozenset()

    encode_reply = staticmethod(encode_peer_reply)
    _methods: PeerMethods

    def encode_gateway_error(self, id: bytes, error: bytes) -> bytes:
        """Encode an error of the gateway itself; with the mark if the peer knows it."""
        if Feature.MARK in self.features:
            return super().encode_gateway_error(id, error)
        return jsonrpc.encode_error(id, error)

    def admit(self, request: HandshakeRequest) -> Deferred[str | None]:
        """Authenticate the peer. Raises ``RequestRefusedError``."""
        target = f"{request.path}?{request.query}" if request.query else request.path
        node_id = self.factory.access_policy.check_peer(target, header_lookup(request))
        self.factory.admit_peer(node_id)
        self.node_id = node_id
        self.features = decode_features(",".join(header_lookup(request)(FEATURES_HEADER)))
        self.response_headers = {FEATURES_HEADER: encode_features()}
        return succeed(select_subprotocol(request))

    def opened(self) -> None:
        """Start handling requests."""
        #: the requests in ``_in_progress``, by raw id
        self._requests_by_id: dict[bytes, Deferred[Reply] | PeerCall] = {}
        #: held for a client while a message to it waits
        self.client_locks = KeyedLocks(self.factory.timers)
        self._locked_clients = self.client_locks.held
        #: Kept for peers that send fences only.
        self.refused_clients = BoundedSet(MAX_REFUSED_CLIENTS if Feature.FENCE in self.features else 0)
        super().opened()

    def closed(self, code: int) -> None:
        """Cancel the peer's requests."""
        super().closed(code)
        self._requests_by_id.clear()

    # IPeerConnection

    def cancel_request(self, id: bytes) -> None:
        """Cancel the request with that raw id, if it is in progress. It gets no response."""
        request = self._requests_by_id.pop(id, None)
        if request is not None:
            self._in_progress.pop(request, None)
            request.cancel()

    # Messages.

    def text_received(self, payload: bytes) -> None:
        """Handle one message or batch."""
        request = decode_fast(payload)
        if request is None or not self._dispatch_peer_fast(request):
            self._dispatch_general(payload)

    message_complete = text_received

    def _dispatch_peer_fast(self, request: FastRequest[PeerCallParams]) -> bool:
        """Do what :meth:`_dispatch_general` does, for a session of this node, while the node has its lease.

        Returns ``False``, having done nothing, if the session is not here, the lease is lost, or earlier messages to
        the client wait or were refused.
        """
        is_call, id, message, params = request
        assert id is not None
        in_progress = self._in_progress
        if self._locked_clients and message.client in self._locked_clients:
            return False
        if self.refused_clients and message.client in self.refused_clients:
            return False
        if not self._methods.may_deliver(message) or len(in_progress) >= self.factory.max_in_progress:
            return False
        try:
            session = (message.client, message.generation)
            if is_call:
                # call_session() may complete the call before it returns.
                call = PeerCall(self, id)
                in_progress[call] = None
                self._requests_by_id[id] = call
                if not self._dispatcher.call_session(call, session, message.method, params, message.timeout):
                    call.discard()
                    return False
            elif self._dispatcher.notify_session(session, message.method, params):
                self.send_text(jsonrpc.encode_result(id, b"null"))
            else:
                return False
        except RpcError as e:
            if is_call:
                call.discard()
            self.send_text(self.encode_gateway_error(id, e.to_json()))
        self._consecutive_bad = 0
        return True

    def _request_started(self, request: Deferred[Reply], id: bytes) -> None:
        super()._request_started(request, id)
        self._requests_by_id[id] = request

    def _request_finished(self, request: Deferred[Reply], id: bytes) -> None:
        super()._request_finished(request, id)
        self._requests_by_id.pop(id, None)

    def _send_result(self, result: Reply | Failure, request: Deferred[Reply], id: bytes, respond: Any) -> None:
        # Unlike a backend, a peer may cancel a request and stay connected.
        if isinstance(result, Failure) and result.check(CancelledError):
            self._request_finished(request, id)
        else:
            super()._send_result(result, request, id, respond)


class PeerCall(BackendCall):
    """Call of a peer on the fast path, without a Deferred."""

    __slots__ = ()

    _backend: PeerServerProtocol

    def discard(self) -> None:
        """Remove the call from the requests in progress."""
        self._backend._in_progress.pop(self, None)
        self._backend._requests_by_id.pop(self._raw_id, None)

    def complete(self, result: Reply | RpcError) -> None:
        """Send the response."""
        self._backend._requests_by_id.pop(self._raw_id, None)
        super().complete(result)


class PeerServerFactory(BackendFactory):
    """Make peer connections, and keep them alive.

    A connection is pinged after ``settings.heartbeat`` seconds of silence, and dropped after ``settings.lease``.
    """

    def __init__(
        self,
        *,
        access_policy: AccessPolicy,
        methods: PeerMethods,
        upstream: BackendDispatcher,
        metrics: Metrics,
        settings: Settings,
        reactor: Any,
        cork: Cork | None = None,
    ) -> None:
        super().__init__(
            access_policy=access_policy,
            methods=methods,
            upstream=upstream,
            metrics=metrics,
            settings=settings,
            reactor=reactor,
            cork=cork,
            protocol=PeerServerProtocol,
        )
        self._ping_interval = settings.heartbeat
        self._ping_timeout = max(SWEEP_INTERVAL, settings.lease - settings.heartbeat)

    def count(self) -> int:
        """Return the number of open connections."""
        return len(self._connections)

    def admit_peer(self, node_id: str) -> None:
        """Close the older connection of a peer that connects again.

        Raises ``RequestRefusedError`` if the connections of other peers leave no room.
        """
        for connection in list(self._connections):
            if isinstance(connection, PeerServerProtocol) and connection.node_id == node_id:
                connection.close_with(CloseCode.NORMAL_CLOSURE, "this node has a newer connection")
        if self.count() >= MAX_PEER_CONNECTIONS:
            raise RequestRefusedError(503, "full", _FULL, [retry_after_header(1)])
