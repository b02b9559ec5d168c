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

from gateway.api.access import Guard
from gateway.api.backend import SUBPROTOCOL, SWEEP, BackendProtocol, BackendSockets, PlainCall
from gateway.api.methods import NULL, MethodTable, Outcome, checked, decoded, passed_on
from gateway.api.upstream import Upstream
from gateway.clients.interface import IEdge
from gateway.cluster.interface import IBalance, INode
from gateway.metrics import Metrics
from gateway.protocol import jsonrpc
from gateway.protocol.errors import Kind, RpcError
from gateway.protocol.frames import CLOSE_RESTART
from gateway.protocol.handshake import retry_after
from gateway.protocol.jsonrpc import BACKSLASH, ID_STARTS, MAX_DEPTH, PARAMS_STARTS, flaw
from gateway.registry.interface import RegistryUnavailable
from gateway.rpc.interface import IHub
from gateway.rpc.pending import DeferredCall, Reply
from gateway.settings import Settings, reserved_files
from gateway.util.cork import Turn
from gateway.websocket.server import Refusal, Request

#: how long a claim may be under way, in seconds
CLAIM_WITHIN = 3.0

Generation: TypeAlias = Annotated[int, Meta(ge=1)]


class Asked(msgspec.Struct, gc=False):
    """What a client is to be asked, or told."""

    client: str
    generation: Generation
    method: str
    params: Raw | UnsetType = UNSET
    #: in seconds
    timeout: Annotated[float, Meta(gt=0)] | None = None
    stale: bool = False


class _Plain(msgspec.Struct, gc=False):
    """A whole request for one of the methods that make nearly all of the traffic."""

    jsonrpc: Literal["2.0"]
    method: Literal["client.call", "client.notify"]
    id: Raw
    params: Asked
    # These two must not be there.
    result: UnsetType = UNSET
    error: UnsetType = UNSET


class _Cancel(msgspec.Struct, gc=False):
    id: Raw


class _Has(msgspec.Struct, gc=False):
    client: str
    generation: Generation


class _Close(msgspec.Struct, gc=False):
    client: str
    generation: Generation
    code: Literal[1000, 1001, 1008, 1011, 1012, 1013, 4001, 4003]
    reason: str


class _Prefix(msgspec.Struct, gc=False):
    prefix: str
    method: str
    params: Raw | UnsetType = UNSET


_plain = msgspec.json.Decoder(_Plain).decode
_asked = msgspec.json.Decoder(Asked).decode
_cancel = msgspec.json.Decoder(_Cancel).decode
_has = msgspec.json.Decoder(_Has).decode
_close = msgspec.json.Decoder(_Close).decode
_prefix = msgspec.json.Decoder(_Prefix).decode

#: whether it is a call; its raw id; what is asked, and the raw params of that
Plain: TypeAlias = tuple[bool, bytes, Asked, "bytes | None"]


def read_plain(payload: bytes) -> Plain | None:
    """Read a ``client.call`` or a ``client.notify``, with an id, in which nothing is wrong but perhaps the client's id.

    ``None`` for everything else, to be read by :func:`~gateway.protocol.jsonrpc.decode` and carried out by
    :meth:`PeerMethods.start`, with the same outcome.
    """
    # Nearly all pass at a glance: flaw() would find nothing.
    if (not payload.isascii() or len(payload) > MAX_DEPTH or BACKSLASH in payload) and flaw(payload) is not None:
        return None
    try:
        plain = _plain(payload)
    except (msgspec.DecodeError, RecursionError):
        return None
    id = bytes(plain.id)
    if id[0] not in ID_STARTS:
        return None
    asked = plain.params
    params = None
    if asked.params is not UNSET:
        params = bytes(asked.params)
        if params[0] not in PARAMS_STARTS:
            return None
    return plain.method == "client.call", id, asked, params


class ILink(Interface):
    """Another node's link to this one, as what is asked on it sees it."""

    def forget(id: bytes) -> None:
        """Carry on no longer with what was asked under that raw id, if it is under way: nothing is answered."""


class PeerMethods(MethodTable[ILink]):
    """The methods of one node, for all other nodes."""

    _log = Logger()

    def __init__(
        self,
        *,
        hub: IHub,
        edge: IEdge,
        node: INode,
        clock: IReactorTime,
        settings: Settings,
        balance: IBalance | None = None,
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
        super().__init__(hub, table)
        self._edge = edge
        self._node = node
        self._clock = clock
        self._call_timeout = settings.call_timeout
        self._max_call_timeout = settings.max_call_timeout
        self._capacity = settings.capacity
        self._balance = balance

    def may_pass(self, asked: Asked) -> bool:
        """Whether what is asked may be passed on, if the client is here."""
        return asked.stale or self._node.has_lease()

    # The clients.

    def _client_call(self, link: ILink, params: bytes | None) -> Outcome:
        asked = decoded(_asked, params)
        passed = passed_on(asked.params, checked(asked.client))
        return Deferred.fromCoroutine(self._call(asked, passed))

    async def _call(self, asked: Asked, params: bytes | None) -> Reply:
        timeout = self._call_timeout if asked.timeout is None else min(asked.timeout, self._max_call_timeout)
        deadline = self._clock.seconds() + timeout
        await self._check(asked, deadline)
        call = DeferredCall(self._forget)
        left = max(0.0, deadline - self._clock.seconds())
        if not self.hub.ask_here(call, asked.client, asked.generation, asked.method, params, left):
            raise RpcError(Kind.NOT_CONNECTED, asked.client)
        return await call

    def _forget(self, call: Any) -> None:
        self.hub.forget(call)

    def _client_notify(self, link: ILink, params: bytes | None) -> Outcome:
        asked = decoded(_asked, params)
        passed = passed_on(asked.params, checked(asked.client))
        return Deferred.fromCoroutine(self._notify(asked, passed))

    async def _notify(self, asked: Asked, params: bytes | None) -> Reply:
        await self._check(asked, self._clock.seconds() + self._call_timeout)
        if not self.hub.notify_to(asked.client, asked.generation, asked.method, params):
            raise RpcError(Kind.NOT_CONNECTED, asked.client)
        return NULL

    async def _check(self, asked: Asked, deadline: float) -> None:
        """Raise ``RpcError`` unless what is asked may be passed on to the client now."""
        arrival = self.hub.arrival(asked.client)
        if arrival is not None:
            # Whoever asked looks then where it is.
            with contextlib.suppress(TimeoutError):
                await arrival.addTimeout(max(0.0, deadline - self._clock.seconds()), self._clock)
        if not await self._is_here(asked.client, asked.generation, deadline):
            raise RpcError(Kind.NOT_CONNECTED, asked.client)
        if not self.may_pass(asked):
            detail = "the lease of the client's node ran out: another node may have the client by now"
            raise RpcError(Kind.REGISTRY_UNAVAILABLE, asked.client, detail=detail)

    async def _is_here(self, client_id: str, generation: int, deadline: float) -> bool:
        """Whether a client is connected here by that generation; if its claim is under way, once that is known."""
        while (here := self._edge.generation(client_id)) < generation:
            waiting = self._edge.opening(client_id, here)
            if waiting is None:
                return False
            try:
                await waiting.addTimeout(max(0.0, deadline - self._clock.seconds()), self._clock)
            except TimeoutError:
                return False
        return here == generation

    # The node.

    def _peer_cancel(self, link: ILink, params: bytes | None) -> Outcome:
        link.forget(bytes(decoded(_cancel, params).id))
        return NULL

    def _peer_has(self, link: ILink, params: bytes | None) -> Outcome:
        asked = decoded(_has, params)
        return _truth(not self._node.unready() and self._edge.generation(asked.client) == asked.generation)

    def _peer_close(self, link: ILink, params: bytes | None) -> Outcome:
        asked = decoded(_close, params)
        checked(asked.client)
        return Deferred.fromCoroutine(self._close(asked))

    async def _close(self, asked: _Close) -> Reply:
        if not await self._is_here(asked.client, asked.generation, self._clock.seconds() + CLAIM_WITHIN):
            return _truth(False)
        if asked.code == CLOSE_RESTART:
            # It is to come to this node by another way.
            return _truth(self._node.send_away(asked.client, asked.generation, asked.reason))
        try:
            return _truth(await self._edge.close(asked.client, asked.code, asked.reason, asked.generation))
        except RegistryUnavailable:
            detail = "the client is disconnected, but its row could not be removed yet"
            raise RpcError(Kind.REGISTRY_UNAVAILABLE, asked.client, sent=True, detail=detail) from None

    def _peer_moved(self, link: ILink, params: bytes | None) -> Outcome:
        asked = decoded(_has, params)
        self._edge.superseded(checked(asked.client), asked.generation)
        return NULL

    def _peer_taken_back(self, link: ILink, params: bytes | None) -> Outcome:
        asked = decoded(_has, params)
        self._edge.restore(checked(asked.client), asked.generation)
        return NULL

    def _peer_notify_prefix(self, link: ILink, params: bytes | None) -> Outcome:
        asked = decoded(_prefix, params)
        telling = self.hub.notify_prefix(asked.prefix, asked.method, passed_on(asked.params, None))
        return telling.addCallback(_reached)

    def _peer_drain(self, link: ILink, params: bytes | None) -> Outcome:
        self._node.drain().addErrback(lambda failure: self._log.failure("the drain failed", failure=failure))
        return NULL

    def _peer_has_room(self, link: ILink, params: bytes | None) -> Outcome:
        return _truth(not self._node.unready() and self._edge.count() < self._capacity)

    def _peer_rebalance(self, link: ILink, params: bytes | None) -> Outcome:
        if self._balance is None or not self._balance.rate:
            raise RpcError(Kind.INVALID_REQUEST, detail="its --rebalance-rate is 0: it moves no clients")
        return self._balance.now().addCallback(_moving)


def _truth(value: Any) -> Reply:
    return Reply(b"true" if value else b"false", None)


def _reached(clients: int) -> Reply:
    return Reply(b'{"reached":%d}' % clients, None)


def _moving(clients: int) -> Reply:
    return Reply(b'{"moving":%d}' % clients, None)


#: so many other nodes may have links to this one, of the files that the capacity for clients leaves free
MAX_LINKS = reserved_files() // 8
CLOSE_NORMAL = 1000

_FULL = f"all {MAX_LINKS} links that this node has for other nodes are in use"


def response(reply: Reply, id: bytes) -> bytes:
    """The response to what was asked under that raw id: the client's answer, byte for byte; its own error marked as
    such."""
    if reply.result is not None:
        return jsonrpc.encode_result(id, reply.result)
    assert reply.error is not None
    return b'{"jsonrpc":"2.0","id":%b,"error":%b,"from":"client"}' % (id, reply.error)


@implementer(ILink)
class PeerProtocol(BackendProtocol):
    """One node's link."""

    #: whose it is, once that is proved
    node_id = ""

    response = staticmethod(response)
    _methods: PeerMethods

    def admit(self, request: Request) -> Deferred[str | None]:
        """Let a node in, or raise ``Refusal``."""
        headers = request.headers
        target = f"{request.path}?{request.query}" if request.query else request.path
        node_id = self.factory.guard.check_peer(
            target, lambda name: [headers[name.lower()]] if name.lower() in headers else []
        )
        self.factory.make_room(node_id)
        self.node_id = node_id
        return succeed(SUBPROTOCOL if SUBPROTOCOL in request.subprotocols else None)

    def opened(self) -> None:
        """The link is open."""
        #: the same as what is not answered yet, by raw id
        self._asked: dict[bytes, Deferred[Reply] | PeerCall] = {}
        super().opened()

    def ended(self, code: int) -> None:
        """It is gone, and with it what was asked."""
        super().ended(code)
        self._asked.clear()

    # ILink

    def forget(self, id: bytes) -> None:
        """See :class:`ILink`."""
        work = self._asked.pop(id, None)
        if work is not None:
            self._work.discard(work)
            work.cancel()

    # Messages.

    def text_received(self, payload: bytes) -> None:
        """One message or batch."""
        plain = read_plain(payload)
        if plain is None or not self._pass_on(plain):
            self._in_general(payload)

    message_whole = text_received

    def _pass_on(self, plain: Plain) -> bool:
        """The same as :meth:`_carry_out`, for a client that is here by that generation, of a node that has its lease.
        ``False`` if it is not so: nothing was done."""
        is_call, id, asked, params = plain
        work = self._work
        if not self._methods.may_pass(asked) or len(work) >= self.factory.max_work:
            return False
        try:
            if is_call:
                # It may be over before ask_here() returns.
                call = PeerCall(self, id)
                work.add(call)
                self._asked[id] = call
                if not self._hub.ask_here(call, asked.client, asked.generation, asked.method, params, asked.timeout):
                    call.drop()
                    return False
            elif self._hub.notify_to(asked.client, asked.generation, asked.method, params):
                self.send_text(jsonrpc.encode_result(id, b"null"))
            else:
                return False
        except RpcError as e:
            if is_call:
                call.drop()
            self.send_text(jsonrpc.encode_error(id, e.to_json()))
        self._bad = 0
        return True

    def _begun(self, work: Deferred[Reply], id: bytes) -> None:
        super()._begun(work, id)
        self._asked[id] = work

    def _over(self, work: Deferred[Reply], id: bytes) -> None:
        super()._over(work, id)
        self._asked.pop(id, None)

    def _done(self, result: Reply | Failure, work: Deferred[Reply], id: bytes, answer: Any) -> None:
        # Unlike a backend, a node may give up a call and stay.
        if isinstance(result, Failure) and result.check(CancelledError):
            self._over(work, id)
        else:
            super()._done(result, work, id, answer)


class PeerCall(PlainCall):
    """A node's call to a client of this one."""

    __slots__ = ()

    _backend: PeerProtocol

    def drop(self) -> None:
        """It is in progress no longer."""
        self._backend._work.discard(self)
        self._backend._asked.pop(self._raw_id, None)

    def settle(self, outcome: Reply | RpcError) -> None:
        """Answer it."""
        self._backend._asked.pop(self._raw_id, None)
        super().settle(outcome)


class PeerSockets(BackendSockets):
    """What the links of other nodes share. One that was silent for ``settings.heartbeat`` is pinged; it is dropped when
    it was silent for ``settings.lease``."""

    def __init__(
        self,
        *,
        guard: Guard,
        methods: PeerMethods,
        upstream: Upstream,
        metrics: Metrics,
        settings: Settings,
        reactor: Any,
        turn: Turn | None = None,
    ) -> None:
        shared: MethodTable[Any] = methods
        super().__init__(
            guard=guard,
            methods=shared,
            upstream=upstream,
            metrics=metrics,
            settings=settings,
            reactor=reactor,
            turn=turn,
            protocol=PeerProtocol,
        )
        self._ping_after = settings.heartbeat
        self._ping_timeout = max(SWEEP, settings.lease - settings.heartbeat)

    def count(self) -> int:
        """How many are open."""
        return len(self._open)

    def make_room(self, node_id: str) -> None:
        """End the older link of a node that has come again. Raises ``Refusal`` when there are too many of others."""
        for link in list(self._open):
            if isinstance(link, PeerProtocol) and link.node_id == node_id:
                link.close_with(CLOSE_NORMAL, "this node has a newer link")
        if self.count() >= MAX_LINKS:
            raise Refusal(503, "full", _FULL, [retry_after(1)])
