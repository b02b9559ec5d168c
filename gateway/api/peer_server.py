"""What another node can ask over its link to this one. Nothing of it is ever sent on to a third node.

client.call         {"client","generation","method","params"?,"timeout"?,"stale"?}   the client's own result or error
client.notify       {"client","generation","method","params"?,"stale"?}   null, once the client's transport has it
peer.cancel         {"id"}                                    null; the call of that id is forgotten
peer.has            {"client","generation"}                   whether this node takes clients, and has this one
peer.close          {"client","generation","code","reason"}   whether it was here; once its row is gone
peer.moved          {"client","generation","node"}            null; what is here of an older generation is closed
peer.taken_back     {"client","generation","node"}            null; what is here of an older generation is claimed again
peer.notify_prefix  {"prefix","method","params"?}             {"reached":12}
peer.drain          {}                                        null, when it has begun
peer.has_room       {}                                        whether this node takes clients, and has room for one more
peer.rebalance      {}                                        {"moving":250}, when it has begun

A client is asked only by the connection of that generation: where there is none, -32001 says that nothing was sent.
Without its lease this node may have lost the client to another one: unless ``stale`` is true it answers -32007.

The link of another node to this one: the WebSocket of backends, opened with a node's credentials instead of a token.

    -> GET /v1/backend HTTP/1.1, Upgrade: websocket, Authorization: Wsgateway-Peer v1.…
    -> {"jsonrpc":"2.0","id":"<UUID>","method":"client.call","params":{"client":"x","generation":7,"method":"m"}}
    <- {"jsonrpc":"2.0","id":"<UUID>","result":{"free":12}}                what the client answered, byte for byte
    <- {"jsonrpc":"2.0","id":"<UUID>","error":{…},"from":"client"}         its own error, byte for byte
    <- {"jsonrpc":"2.0","id":"<UUID>","error":{"code":-32001,…}}           the gateway's: the client is not here
    -> {"jsonrpc":"2.0","method":"peer.cancel","params":{"id":"<UUID>"}}   nobody awaits it any more

What can be asked is in peers.py, what a refused node is told in guard.py. Each node has one link to this one: a newer
one ends the older, which it has lost.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType
from twisted.internet.defer import CancelledError, Deferred, TimeoutError, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import Interface, implementer

from gateway.api.access import AccessPolicy
from gateway.api.backend import SUBPROTOCOL, SWEEP_INTERVAL, BackendCall, BackendFactory, BackendProtocol
from gateway.api.methods import NULL_REPLY, MethodResult, MethodTable, check_client_id, decode_params, raw_params
from gateway.api.upstream import BackendDispatcher
from gateway.clients.interface import IClientSessions
from gateway.cluster.interface import INode, IRebalancer
from gateway.metrics import Metrics
from gateway.protocol import jsonrpc
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.frames import CloseCode
from gateway.protocol.handshake import retry_after_header
from gateway.protocol.jsonrpc import BACKSLASH, ID_FIRST_BYTES, MAX_DEPTH, PARAMS_FIRST_BYTES, validate_payload
from gateway.registry.errors import RegistryUnavailableError
from gateway.rpc.interface import IDispatcher, IMembership
from gateway.rpc.pending import DeferredCall, Reply
from gateway.settings import Settings, reserved_files
from gateway.util.cork import Cork
from gateway.websocket.server import HandshakeRequest, RequestRefusedError

#: how long a claim may be under way, in seconds
CLAIM_TIMEOUT = 3.0

Generation: TypeAlias = Annotated[int, Meta(ge=1)]


class PeerCallParams(msgspec.Struct, gc=False):
    """What a client is to be asked, or told."""

    client: str
    generation: Generation
    method: str
    params: Raw | UnsetType = UNSET
    #: in seconds
    timeout: Annotated[float, Meta(gt=0)] | None = None
    stale: bool = False


class _FastMessage(msgspec.Struct, gc=False):
    """A whole request for one of the methods that make nearly all of the traffic."""

    jsonrpc: Literal["2.0"]
    method: Literal["client.call", "client.notify"]
    id: Raw
    params: PeerCallParams
    # These two must not be there.
    result: UnsetType = UNSET
    error: UnsetType = UNSET


class _CancelParams(msgspec.Struct, gc=False):
    id: Raw


class _SessionParams(msgspec.Struct, gc=False):
    client: str
    generation: Generation


class _CloseParams(msgspec.Struct, gc=False):
    client: str
    generation: Generation
    code: Literal[1000, 1001, 1008, 1011, 1012, 1013, 4001, 4003]
    reason: str


class _PrefixParams(msgspec.Struct, gc=False):
    prefix: str
    method: str
    params: Raw | UnsetType = UNSET


_decode_fast_message = msgspec.json.Decoder(_FastMessage).decode
_decode_call = msgspec.json.Decoder(PeerCallParams).decode
_decode_cancel = msgspec.json.Decoder(_CancelParams).decode
_decode_session = msgspec.json.Decoder(_SessionParams).decode
_decode_close = msgspec.json.Decoder(_CloseParams).decode
_decode_prefix = msgspec.json.Decoder(_PrefixParams).decode

#: whether it is a call; its raw id; what is asked, and the raw params of that
FastPeerRequest: TypeAlias = tuple[bool, bytes, PeerCallParams, "bytes | None"]


def decode_fast(payload: bytes) -> FastPeerRequest | None:
    """Read a ``client.call`` or a ``client.notify``, with an id, in which nothing is wrong but perhaps the client's id.

    ``None`` for everything else, to be read by :func:`~gateway.protocol.jsonrpc.decode` and carried out by
    :meth:`PeerMethods.start`, with the same outcome.
    """
    # Nearly all pass at a glance: flaw() would find nothing.
    if (not payload.isascii() or len(payload) > MAX_DEPTH or BACKSLASH in payload) and validate_payload(
        payload
    ) is not None:
        return None
    try:
        plain = _decode_fast_message(payload)
    except (msgspec.DecodeError, RecursionError):
        return None
    id = bytes(plain.id)
    if id[0] not in ID_FIRST_BYTES:
        return None
    asked = plain.params
    params = None
    if asked.params is not UNSET:
        params = bytes(asked.params)
        if params[0] not in PARAMS_FIRST_BYTES:
            return None
    return plain.method == "client.call", id, asked, params


class IPeerConnection(Interface):
    """Another node's link to this one, as what is asked on it sees it."""

    def cancel_request(id: bytes) -> None:
        """Carry on no longer with what was asked under that raw id, if it is under way: nothing is answered."""


class PeerMethods(MethodTable[IPeerConnection]):
    """The methods of one node, for all other nodes."""

    _log = Logger()

    def __init__(
        self,
        *,
        dispatcher: IDispatcher,
        sessions: IClientSessions,
        node: INode,
        membership: IMembership,
        clock: IReactorTime,
        settings: Settings,
        rebalancer: IRebalancer | None = None,
    ) -> None:
        """Without ``balance`` this node moves no clients."""
        table = {
            "client.call": self._client_call,
            "client.notify": self._client_notify,
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
        self._node = node
        self._membership = membership
        self._clock = clock
        self._call_timeout = settings.call_timeout
        self._max_call_timeout = settings.max_call_timeout
        self._capacity = settings.capacity
        self._rebalancer = rebalancer

    def may_deliver(self, request: PeerCallParams) -> bool:
        """Whether what is asked may be passed on, if the client is here."""
        return request.stale or self._membership.has_lease()

    # The clients.

    def _client_call(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        asked = decode_params(_decode_call, params)
        passed = raw_params(asked.params, check_client_id(asked.client))
        return Deferred.fromCoroutine(self._call(asked, passed))

    async def _call(self, request: PeerCallParams, params: bytes | None) -> Reply:
        timeout = self._call_timeout if request.timeout is None else min(request.timeout, self._max_call_timeout)
        deadline = self._clock.seconds() + timeout
        await self._check_deliverable(request, deadline)
        call = DeferredCall(self._cancel_call)
        left = max(0.0, deadline - self._clock.seconds())
        if not self.dispatcher.call_session(call, request.client, request.generation, request.method, params, left):
            raise RpcError(ErrorKind.NOT_CONNECTED, request.client)
        return await call

    def _cancel_call(self, call: Any) -> None:
        self.dispatcher.cancel(call)

    def _client_notify(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        asked = decode_params(_decode_call, params)
        passed = raw_params(asked.params, check_client_id(asked.client))
        return Deferred.fromCoroutine(self._notify(asked, passed))

    async def _notify(self, request: PeerCallParams, params: bytes | None) -> Reply:
        await self._check_deliverable(request, self._clock.seconds() + self._call_timeout)
        if not self.dispatcher.notify_session(request.client, request.generation, request.method, params):
            raise RpcError(ErrorKind.NOT_CONNECTED, request.client)
        return NULL_REPLY

    async def _check_deliverable(self, request: PeerCallParams, deadline: float) -> None:
        """Raise ``RpcError`` unless what is asked may be passed on to the client now."""
        arrival = self.dispatcher.wait_for_handoff(request.client)
        if arrival is not None:
            # Whoever asked looks then where it is.
            with contextlib.suppress(TimeoutError):
                await arrival.addTimeout(max(0.0, deadline - self._clock.seconds()), self._clock)
        if not await self._is_local(request.client, request.generation, deadline):
            raise RpcError(ErrorKind.NOT_CONNECTED, request.client)
        if not self.may_deliver(request):
            detail = "the lease of the client's node ran out: another node may have the client by now"
            raise RpcError(ErrorKind.REGISTRY_UNAVAILABLE, request.client, detail=detail)

    async def _is_local(self, client_id: str, generation: int, deadline: float) -> bool:
        """Whether a client is connected here by that generation; if its claim is under way, once that is known."""
        while (here := self._sessions.generation(client_id)) < generation:
            waiting = self._sessions.claim_in_progress(client_id, here)
            if waiting is None:
                return False
            try:
                await waiting.addTimeout(max(0.0, deadline - self._clock.seconds()), self._clock)
            except TimeoutError:
                return False
        return here == generation

    # The node.

    def _peer_cancel(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        connection.cancel_request(bytes(decode_params(_decode_cancel, params).id))
        return NULL_REPLY

    def _peer_has(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        asked = decode_params(_decode_session, params)
        return _bool_reply(
            not self._node.unready_reason() and self._sessions.generation(asked.client) == asked.generation
        )

    def _peer_close(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        asked = decode_params(_decode_close, params)
        check_client_id(asked.client)
        return Deferred.fromCoroutine(self._close(asked))

    async def _close(self, request: _CloseParams) -> Reply:
        if not await self._is_local(request.client, request.generation, self._clock.seconds() + CLAIM_TIMEOUT):
            return _bool_reply(False)
        if request.code == CloseCode.SERVICE_RESTART.value:
            # It is to come to this node by another way.
            return _bool_reply(self._node.send_goaway(request.client, request.generation, request.reason))
        try:
            return _bool_reply(
                await self._sessions.close(request.client, request.code, request.reason, request.generation)
            )
        except RegistryUnavailableError:
            detail = "the client is disconnected, but its row could not be removed yet"
            raise RpcError(ErrorKind.REGISTRY_UNAVAILABLE, request.client, sent=True, detail=detail) from None

    def _peer_moved(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        asked = decode_params(_decode_session, params)
        self._sessions.close_superseded(check_client_id(asked.client), asked.generation)
        return NULL_REPLY

    def _peer_taken_back(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        asked = decode_params(_decode_session, params)
        self._sessions.restore_claim(check_client_id(asked.client), asked.generation)
        return NULL_REPLY

    def _peer_notify_prefix(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        asked = decode_params(_decode_prefix, params)
        telling = self.dispatcher.notify_prefix(asked.prefix, asked.method, raw_params(asked.params, None))
        return telling.addCallback(_reached_reply)

    def _peer_drain(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        self._node.drain().addErrback(lambda failure: self._log.failure("the drain failed", failure=failure))
        return NULL_REPLY

    def _peer_has_room(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        return _bool_reply(not self._node.unready_reason() and self._sessions.count() < self._capacity)

    def _peer_rebalance(self, connection: IPeerConnection, params: bytes | None) -> MethodResult:
        if self._rebalancer is None or not self._rebalancer.rate:
            raise RpcError(ErrorKind.INVALID_REQUEST, detail="its --rebalance-rate is 0: it moves no clients")
        return self._rebalancer.rebalance_now().addCallback(_moving_reply)


def _bool_reply(value: Any) -> Reply:
    return Reply(b"true" if value else b"false", None)


def _reached_reply(clients: int) -> Reply:
    return Reply(b'{"reached":%d}' % clients, None)


def _moving_reply(clients: int) -> Reply:
    return Reply(b'{"moving":%d}' % clients, None)


#: so many other nodes may have links to this one, of the files that the capacity for clients leaves free
MAX_PEER_CONNECTIONS = reserved_files() // 8
_FULL = f"all {MAX_PEER_CONNECTIONS} links that this node has for other nodes are in use"


def encode_peer_reply(reply: Reply, id: bytes) -> bytes:
    """The response to what was asked under that raw id: the client's answer, byte for byte; its own error marked as
    such."""
    if reply.result is not None:
        return jsonrpc.encode_result(id, reply.result)
    assert reply.error is not None
    return b'{"jsonrpc":"2.0","id":%b,"error":%b,"from":"client"}' % (id, reply.error)


@implementer(IPeerConnection)
class PeerServerProtocol(BackendProtocol):
    """One node's link."""

    #: whose it is, once that is proved
    node_id = ""

    encode_reply = staticmethod(encode_peer_reply)
    _methods: PeerMethods

    def admit(self, request: HandshakeRequest) -> Deferred[str | None]:
        """Let a node in, or raise ``Refusal``."""
        headers = request.headers
        target = f"{request.path}?{request.query}" if request.query else request.path
        node_id = self.factory.access_policy.check_peer(
            target, lambda name: [headers[name.lower()]] if name.lower() in headers else []
        )
        self.factory.admit_peer(node_id)
        self.node_id = node_id
        return succeed(SUBPROTOCOL if SUBPROTOCOL in request.subprotocols else None)

    def opened(self) -> None:
        """The link is open."""
        #: the same as what is not answered yet, by raw id
        self._requests_by_id: dict[bytes, Deferred[Reply] | PeerCall] = {}
        super().opened()

    def closed(self, code: int) -> None:
        """It is gone, and with it what was asked."""
        super().closed(code)
        self._requests_by_id.clear()

    # ILink

    def cancel_request(self, id: bytes) -> None:
        """See :class:`ILink`."""
        work = self._requests_by_id.pop(id, None)
        if work is not None:
            self._in_progress.discard(work)
            work.cancel()

    # Messages.

    def text_received(self, payload: bytes) -> None:
        """One message or batch."""
        plain = decode_fast(payload)
        if plain is None or not self._dispatch_peer_fast(plain):
            self._dispatch_general(payload)

    message_complete = text_received

    def _dispatch_peer_fast(self, request: FastPeerRequest) -> bool:
        """The same as :meth:`_carry_out`, for a client that is here by that generation, of a node that has its lease.
        ``False`` if it is not so: nothing was done."""
        is_call, id, asked, params = request
        work = self._in_progress
        if not self._methods.may_deliver(asked) or len(work) >= self.factory.max_in_progress:
            return False
        try:
            if is_call:
                # It may be over before ask_here() returns.
                call = PeerCall(self, id)
                work.add(call)
                self._requests_by_id[id] = call
                if not self._dispatcher.call_session(
                    call, asked.client, asked.generation, asked.method, params, asked.timeout
                ):
                    call.discard()
                    return False
            elif self._dispatcher.notify_session(asked.client, asked.generation, asked.method, params):
                self.send_text(jsonrpc.encode_result(id, b"null"))
            else:
                return False
        except RpcError as e:
            if is_call:
                call.discard()
            self.send_text(jsonrpc.encode_error(id, e.to_json()))
        self._consecutive_bad = 0
        return True

    def _request_started(self, request: Deferred[Reply], id: bytes) -> None:
        super()._request_started(request, id)
        self._requests_by_id[id] = request

    def _request_finished(self, request: Deferred[Reply], id: bytes) -> None:
        super()._request_finished(request, id)
        self._requests_by_id.pop(id, None)

    def _send_result(self, result: Reply | Failure, request: Deferred[Reply], id: bytes, respond: Any) -> None:
        # Unlike a backend, a node may give up a call and stay.
        if isinstance(result, Failure) and result.check(CancelledError):
            self._request_finished(request, id)
        else:
            super()._send_result(result, request, id, respond)


class PeerCall(BackendCall):
    """A node's call to a client of this one."""

    __slots__ = ()

    _backend: PeerServerProtocol

    def discard(self) -> None:
        """It is in progress no longer."""
        self._backend._in_progress.discard(self)
        self._backend._requests_by_id.pop(self._raw_id, None)

    def complete(self, result: Reply | RpcError) -> None:
        """Answer it."""
        self._backend._requests_by_id.pop(self._raw_id, None)
        super().complete(result)


class PeerServerFactory(BackendFactory):
    """What the links of other nodes share. One that was silent for ``settings.heartbeat`` is pinged; it is dropped when
    it was silent for ``settings.lease``."""

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
        shared: MethodTable[Any] = methods
        super().__init__(
            access_policy=access_policy,
            methods=shared,
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
        """How many are open."""
        return len(self._connections)

    def admit_peer(self, node_id: str) -> None:
        """End the older link of a node that has come again. Raises ``Refusal`` when there are too many of others."""
        for link in list(self._connections):
            if isinstance(link, PeerServerProtocol) and link.node_id == node_id:
                link.close_with(CloseCode.NORMAL_CLOSURE, "this node has a newer link")
        if self.count() >= MAX_PEER_CONNECTIONS:
            raise RequestRefusedError(503, "full", _FULL, [retry_after_header(1)])
