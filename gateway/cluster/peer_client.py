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

from gateway.cluster.auth import Credentials, PeerTLS
from gateway.cluster.interface import IPeers, PeerUnreachable
from gateway.cluster.messages import encode_call, encode_cancel, encode_message, encode_params
from gateway.cluster.peer_connection import Link
from gateway.cluster.peer_pool import MAX_WAITING, Links, Question
from gateway.metrics import Metrics
from gateway.protocol.errors import Kind, RpcError
from gateway.registry.interface import Location, NodeStatus, Place
from gateway.rpc.interface import IElsewhere, Miss, Missed
from gateway.rpc.pending import Call, Reply
from gateway.util.cork import Turn

#: so many are told at once, and so many wait at most; then the oldest is forgotten: its old connection, if there still
#: is one, is called by nobody
AT_ONCE, MOST = 256, 65536
#: how long it is until a node is told again that could not be, in seconds: at first, and at most
FIRST_WAIT, LONGEST_WAIT = 0.25, 2.0

#: a client's id, and the generation of its newer claim
Move = tuple[str, int]


class Moves:
    """The moves that one node is to be told of."""

    _log = Logger()

    def __init__(
        self, clock: IReactorTime, tell: Callable[[list[Move]], Deferred[list[Move]]], done: Callable[[], None]
    ) -> None:
        """``tell`` tells the node, and fires with those that need not be told again; it may fail with
        ``PeerUnreachable``. ``done`` is called whenever none is left."""
        self._clock = clock
        self._tell = tell
        self._done = done
        self._waiting: dict[str, int] = {}
        self._telling: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, client_id: str, generation: int) -> None:
        """The node is to be told that a client has a claim of that generation."""
        waiting = self._waiting
        waiting[client_id] = max(generation, waiting.pop(client_id, 0))
        if len(waiting) > MOST:
            del waiting[next(iter(waiting))]
        if self._telling is None:
            self._telling = Deferred.fromCoroutine(self._tell_all())
            self._telling.addErrback(self._failed).addCallback(self._told)

    def stop(self) -> None:
        """Tell no more."""
        self._waiting.clear()
        if self._telling is not None:
            self._telling.cancel()

    async def _tell_all(self) -> None:
        # Those of one turn go together.
        await deferLater(self._clock, 0)
        wait = FIRST_WAIT
        while self._waiting:
            some = list(self._waiting.items())[:AT_ONCE]
            try:
                told = await self._tell(some)
            except PeerUnreachable:
                told = []
            for client_id, generation in told:
                # Meanwhile there may be a newer one.
                if self._waiting.get(client_id) == generation:
                    del self._waiting[client_id]
            if told:
                wait = FIRST_WAIT
            elif self._waiting:
                await deferLater(self._clock, wait)
                wait = min(2 * wait, LONGEST_WAIT)

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._log.failure("error in telling another node of clients that moved", failure)

    def _told(self, _: object) -> None:
        self._telling = None
        self._done()


#: a node's own time-out error is waited for so much longer than the time-out, in seconds
GRACE = 0.2
#: how long a question of this node's own may take, in seconds; and telling all clients of a prefix, which is paced:
#: some ten thousand a second
TIMEOUT, PREFIX_TIMEOUT = 5.0, 300.0

#: errors by which a node says that it will never do what it was told
_NEVER = (Kind.METHOD_NOT_FOUND, Kind.INVALID_PARAMS, Kind.INVALID_REQUEST, Kind.PARSE_ERROR)

_T = TypeVar("_T")


class _Reached(msgspec.Struct):
    reached: int


class _Moving(msgspec.Struct):
    moving: int


_decode_reached = msgspec.json.Decoder(_Reached).decode
_decode_moving = msgspec.json.Decoder(_Moving).decode


@implementer(IElsewhere, IPeers)
class Peers:
    """The other nodes."""

    _log = Logger()

    #: see :class:`IElsewhere`; the hub sets it
    missed: Callable[[Call, Miss], None]

    def __init__(
        self,
        *,
        node_id: str,
        credentials: Credentials,
        reactor: Any,
        turn: Turn,
        metrics: Metrics,
        heartbeat: float,
        lease: float,
        max_message_size: int,
        max_calls: int,
        max_waiting: int = MAX_WAITING,
        tls: PeerTLS | None = None,
    ) -> None:
        """``node_id`` is this node's own; ``heartbeat`` and ``lease`` are in seconds, ``max_message_size`` (either way,
        the envelope included) and ``max_waiting`` (what a node may leave unread) in bytes. ``tls`` is for wss urls."""
        self._node_id = node_id
        self._reactor = reactor
        self._turn = turn
        self._metrics = metrics
        self._links = Links(
            credentials=credentials,
            reactor=reactor,
            turn=turn,
            metrics=metrics,
            heartbeat=heartbeat,
            lease=lease,
            max_message_size=max_message_size,
            max_calls=max_calls,
            max_waiting=max_waiting,
            tls=tls or PeerTLS(),
            missed=lambda call, miss: self.missed(call, miss),
        )
        self._open = self._links.open
        self._asked = self._links.asked
        #: by node_id
        self._moves: dict[tuple[str, str], Moves] = {}
        self._stopped = False

    def count(self) -> int:
        """How many links are open."""
        return len(self._open)

    def calls_in_flight(self) -> int:
        """How many questions to other nodes are not answered yet."""
        return len(self._asked)

    def nodes_changed(self, nodes: Sequence[NodeStatus]) -> None:
        """These other nodes are live. What there is of another one is given up, once nothing is in flight to it."""
        live = {node.node_id for node in nodes}
        gone = self._links.nodes_changed(live)
        for moves in [moves for (node_id, _), moves in self._moves.items() if node_id in gone]:
            moves.stop()

    def stop(self) -> Deferred[None]:
        """Close all links with 1001, and open no more; fires when they are gone. Does not fail."""
        self._stopped = True
        for moves in list(self._moves.values()):
            moves.stop()
        return self._links.stop()

    # IElsewhere

    def connect(self, location: Location) -> Deferred[None]:
        """See :meth:`IElsewhere.connect`."""
        linked = self._links.connect(location.node_id, location.peer_url)
        return linked.addErrback(_not_linked, location.client_id)

    def ask(
        self, call: Call, location: Location, method: str, params: bytes | None, timeout: float, *, stale: bool = False
    ) -> bool:
        """See :meth:`IElsewhere.ask`. Raises ``RpcError`` also where the message is too large, and where the node does
        not read what it is asked (``NODE_UNREACHABLE``, not sent)."""
        link = self._open.get(location.node_id)
        if link is None:
            return False
        client_id = location.client_id
        message = encode_message(client_id, location.generation, method, params, stale)
        self._links.check(link, client_id, len(message))
        asked = self._asked
        id = asked.start(call, link, client_id, timeout + GRACE)
        try:
            sent = link.send(encode_call(id, message, timeout))
        except BaseException:
            asked.forget(call)
            raise
        if not sent:
            asked.forget(call)
            return False
        self._metrics.peer_calls += 1
        asked.sent(call)
        return True

    def forget(self, call: Call) -> None:
        """See :meth:`IElsewhere.forget`."""
        link = self._asked.owner_of(call)
        if isinstance(link, Link):
            self._asked.forget(call)
            self._links.send(link, encode_cancel(call.id))

    def notify(
        self, location: Location, method: str, params: bytes | None, timeout: float, *, stale: bool = False
    ) -> Deferred[None]:
        """See :meth:`IElsewhere.notify`."""
        client_id = location.client_id
        message = encode_message(client_id, location.generation, method, params, stale) + b"}"
        if location.node_id not in self._open:
            return Deferred.fromCoroutine(self._notify(location, message, timeout))
        try:
            return self._links.ask(location.node_id, client_id, "client.notify", message, timeout).addCallback(_told)
        except RpcError as e:
            return fail(e)

    async def _notify(self, location: Location, message: bytes, timeout: float) -> None:
        node_id, client_id = location.node_id, location.client_id
        deadline = self._reactor.seconds() + timeout
        try:
            await self._links.connect_within(timeout, node_id, location.peer_url)
        except PeerUnreachable as e:
            raise RpcError(Kind.NODE_UNREACHABLE, client_id, sent=False, detail=str(e)) from None
        left = max(0.0, deadline - self._reactor.seconds())
        _told(await self._links.ask(node_id, client_id, "client.notify", message, left))

    # IPeers

    def has(self, location: Location, timeout: float) -> Deferred[bool]:
        """See :meth:`IPeers.has`."""
        params = encode_params(client=location.client_id, generation=location.generation)
        return self._ask_of(location, "peer.has", params, _is_true, timeout)

    def close(self, location: Location, code: int, reason: str) -> Deferred[bool]:
        """See :meth:`IPeers.close`."""
        params = encode_params(client=location.client_id, generation=location.generation, code=code, reason=reason)
        return self._ask_of(location, "peer.close", params, _is_true)

    def notify_prefix(self, node: NodeStatus, prefix: str, method: str, params: bytes | None) -> Deferred[int]:
        """See :meth:`IPeers.notify_prefix`; it may take ``PREFIX_TIMEOUT``."""
        asked: dict[str, Any] = {"prefix": prefix, "method": method}
        if params is not None:
            asked["params"] = msgspec.Raw(params)
        return self._ask_of(node, "peer.notify_prefix", encode_params(**asked), _reached, PREFIX_TIMEOUT)

    def drain(self, node: NodeStatus) -> Deferred[None]:
        """See :meth:`IPeers.drain`."""
        return self._ask_of(node, "peer.drain", b"{}", lambda result: None)

    def has_room(self, place: Place | NodeStatus, timeout: float) -> Deferred[bool]:
        """See :meth:`IPeers.has_room`."""
        return self._ask_of(place, "peer.has_room", b"{}", _is_true, timeout)

    def rebalance(self, node: NodeStatus) -> Deferred[int]:
        """See :meth:`IPeers.rebalance`."""
        return self._ask_of(node, "peer.rebalance", b"{}", _moving)

    def _ask_of(
        self,
        node: Location | NodeStatus | Place,
        method: str,
        params: bytes,
        read: Callable[[bytes], _T],
        timeout: float = TIMEOUT,
    ) -> Deferred[_T]:
        return Deferred.fromCoroutine(self._answer_of(node.node_id, node.peer_url, method, params, read, timeout))

    async def _answer_of(
        self, node_id: str, url: str, method: str, params: bytes, read: Callable[[bytes], _T], timeout: float
    ) -> _T:
        deadline = self._reactor.seconds() + timeout
        await self._links.connect_within(timeout, node_id, url)
        try:
            left = max(0.0, deadline - self._reactor.seconds())
            reply: Reply = await self._links.ask(node_id, "", method, params, left)
            if reply.result is not None:
                return read(reply.result)
        except RpcError as e:
            raise PeerUnreachable(f"{method}: {e.detail or e.kind.value.message}", sent=e.sent) from None
        except Missed as e:
            raise PeerUnreachable(f"{method}: {e}") from None
        except msgspec.DecodeError:
            pass
        raise PeerUnreachable(f"{method}: the node's answer cannot be read", sent=True)

    # The clients that moved.

    def moved(self, location: Location, generation: int) -> None:
        """See :meth:`IPeers.moved`."""
        self._tell_of("peer.moved", location, generation)

    def taken_back(self, location: Location, generation: int) -> None:
        """See :meth:`IPeers.taken_back`."""
        self._tell_of("peer.taken_back", location, generation)

    def _tell_of(self, method: str, location: Location, generation: int) -> None:
        node_id, url = location.node_id, location.peer_url
        if self._stopped or node_id == self._node_id:
            return
        moves = self._moves.get((node_id, method))
        if moves is None:

            def tell(some: list[Move]) -> Deferred[list[Move]]:
                return Deferred.fromCoroutine(self._tell(node_id, url, method, some))

            def done() -> None:
                self._moves.pop((node_id, method), None)

            moves = self._moves[node_id, method] = Moves(self._reactor, tell, done)
        moves.add(location.client_id, generation)

    async def _tell(self, node_id: str, url: str, method: str, some: list[Move]) -> list[Move]:
        """Tell a node of clients that it has no more; returns those of which it need not be told again."""
        await self._links.connect_within(TIMEOUT, node_id, url)
        told: list[Move] = []
        begun = self._turn.begin()
        try:
            telling = [self._tell_one(node_id, method, move, told) for move in some]
        finally:
            if begun:
                self._turn.end()
        await DeferredList(telling)
        return told

    def _tell_one(self, node_id: str, method: str, move: Move, told: list[Move]) -> Deferred[None]:
        client_id, generation = move
        params = encode_params(client=client_id, generation=generation, node=self._node_id)

        def failed(failure: Failure) -> None:
            error = failure.value
            if isinstance(error, RpcError) and error.kind in _NEVER:
                self._log.warn("node {node} cannot be told that a client moved: {error}", node=node_id, error=error)
            elif not isinstance(error, Missed):
                return
            told.append(move)

        try:
            question: Question = self._links.ask(node_id, client_id, method, params, TIMEOUT)
        except RpcError:
            question = Question()
            question.errback(Failure())
        return question.addCallbacks(lambda _: told.append(move), failed)


def _not_linked(failure: Failure, client_id: str) -> None:
    failure.trap(PeerUnreachable)
    raise RpcError(Kind.NODE_UNREACHABLE, client_id, sent=False, detail=failure.getErrorMessage()) from None


def _told(reply: Reply) -> None:
    """A client was told, unless the node says otherwise in a way that only an answer to a call can have."""
    if reply.result is None:
        raise RpcError(Kind.NODE_UNREACHABLE, sent=True, detail="the client's node answered with an error of a client")


def _is_true(result: bytes) -> bool:
    return msgspec.json.decode(result, type=bool)


def _reached(result: bytes) -> int:
    return _decode_reached(result).reached


def _moving(result: bytes) -> int:
    return _decode_moving(result).moving
