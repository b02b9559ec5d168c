"""The link of another node to this one: the WebSocket of backends, opened with a node's credentials instead of a token.

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

from typing import Any

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.api.guard import Guard
from gateway.api.methods import MethodTable
from gateway.api.peers import ILink, PeerMethods, Plain, read_plain
from gateway.api.upstream import Upstream
from gateway.api.websocket import SUBPROTOCOL, SWEEP, BackendProtocol, BackendSockets, PlainCall
from gateway.edge.handshake import Refusal, Request
from gateway.edge.limits import retry_after
from gateway.edge.turn import Turn
from gateway.rpc import jsonrpc
from gateway.rpc.errors import RpcError
from gateway.rpc.interface import Reply
from gateway.settings import Settings, reserved_files
from gateway.telemetry.metrics import Metrics

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
