"""The way of a call or a notification to the client that it is for.

    client <- {"jsonrpc":"2.0","id":"<UUID4>","method":...,"params":...}     call(): asked under an id of the hub's own
    client -> {"jsonrpc":"2.0","id":"<UUID4>","result":...}                  or "error": settles the call of that id
    client <- {"jsonrpc":"2.0","method":...,"params":...}                    notify(), notify_prefix()

A client whose connection is here is sent to at once. One that is about to be (its claim is under way) is waited for;
for any other the registry is asked which node has it. A response counts only if it comes from the very connection that
was asked: a call's owner is the client's id together with the generation of its claim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from twisted.internet.defer import CancelledError, Deferred, TimeoutError, fail, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from gateway.edge.interface import IClientHandler, IEdge
from gateway.registry.interface import IRegistry, Location, RegistryUnavailable
from gateway.rpc.errors import Kind, RpcError
from gateway.rpc.inbound import Connection, Inbound
from gateway.rpc.interface import IHub, IUpstream, Reply
from gateway.rpc.jsonrpc import encode_notification, encode_request
from gateway.rpc.pending import NOT_SENT, Call, DeferredCall, Pending
from gateway.telemetry.metrics import Metrics

T = TypeVar("T")

#: seconds that a look-up in the registry may take
LOOK_UP_TIMEOUT = 5.0
#: what notify_prefix() does in one turn of the reactor: the clients that it looks at, and the bytes that it sends
SLICE, SLICE_BYTES = 256, 1048576
#: and how many bytes a second: half of what a core can send, so that calls keep their latency
PACE = 104857600
#: While more bytes than these wait for slow readers on this node, it sends nothing; how often it looks, in seconds, and
#: how long it waits at most before it sends so many more: by then readers that are too slow are closed, and those that
#: are left, with a message each perhaps, are not to stop it.
MAX_UNSENT, LOOK_AGAIN, LONGEST_WAIT, LEAST_ROOM = 67108864, 0.05, 3.0, 16777216
#: an id as long as any that the hub gives
_ANY_ID = b'"00000000-0000-4000-8000-000000000000"'
#: what a request is longer than its method and params, more than enough
_ENVELOPE = 128

#: How another node is asked: by its location, method, params, and the seconds left. Without those it is a notification,
#: and fires with ``None`` when it was handed over. Fails with ``RpcError``.
Elsewhere = Callable[[Location, str, "bytes | None", "float | None"], "Deferred[Reply | None]"]


@implementer(IHub, IClientHandler)
class Hub:
    """The hub of one node. Times are in seconds, sizes in bytes; ``node_id`` is this node's own.
    ``steady`` tells whether this node may call another dead whose lease has run out.

    :meth:`connect` comes before anything else. ``elsewhere`` may be set for clients that other nodes hold; without it
    they cannot be reached.
    """

    _log = Logger()

    elsewhere: Elsewhere | None = None

    def __init__(
        self,
        *,
        registry: IRegistry,
        clock: IReactorTime,
        metrics: Metrics,
        call_timeout: float,
        max_call_timeout: float,
        max_message_size: int,
        max_calls: int,
        max_calls_per_client: int,
        node_id: str,
        steady: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._metrics = metrics
        self._call_timeout = call_timeout
        self._max_call_timeout = max_call_timeout
        self._max_message_size = max_message_size
        #: a method, at its longest, and params that have not more bytes together make no message that is too large
        self._fits = max_message_size - _ENVELOPE
        self._max_calls_per_client = max_calls_per_client
        self._node_id = node_id
        self._steady = steady
        #: the connections of clients that were told to go
        self._leaving: set[Connection] = set()
        #: what may be sent to prefixes, by all who do so together, before it is looked at again what is unsent
        self._room = 0
        self._pending = Pending(
            clock, max_calls=max_calls, max_per_owner=max_calls_per_client, failed=self._count_failure
        )

    def connect(self, edge: IEdge, upstream: IUpstream) -> None:
        """Set the hub's two sides, which are made after it since they need it."""
        self._edge = edge
        self._inbound = Inbound(
            edge,
            upstream,
            self._pending,
            self._metrics,
            leaving=self._leaving,
            max_message_size=self._max_message_size,
            max_calls_per_client=self._max_calls_per_client,
        )

    def calls_in_flight(self) -> int:
        """How many calls await a response, those to clients of this node and those from them."""
        return len(self._pending) + self._inbound.calls_in_flight()

    def let_go(self, client_id: str) -> None:
        """Begin no call to a client of this node, and none from it, any more on the connection that it has: it was
        told to go, and goes when those in flight are over."""
        generation = self._edge.generation(client_id)
        if generation:
            self._leaving.add((client_id, generation))

    def calls_in_flight_with(self, client_id: str) -> int:
        """How many calls to one client of this node, and from it, await a response."""
        generation = self._edge.generation(client_id)
        if not generation:
            return 0
        connection = (client_id, generation)
        return self._pending.in_flight(connection) + self._inbound.calls_in_flight_from(connection)

    # IHub

    def call(self, client_id: str, method: str, params: bytes | None, timeout: float | None = None) -> Deferred[Reply]:
        """See :meth:`IHub.call`."""
        call = DeferredCall(self._pending.forget)
        try:
            if self.ask(call, client_id, method, params, timeout):
                return call
        except RpcError as e:
            return fail(e)
        self._metrics.calls += 1
        timeout = self._call_timeout if timeout is None else min(timeout, self._max_call_timeout)
        return Deferred.fromCoroutine(self._call_there(client_id, method, params, timeout))

    def ask(self, call: Call, client_id: str, method: str, params: bytes | None, timeout: float | None = None) -> bool:
        """See :meth:`IHub.ask`."""
        generation = self._edge.generation(client_id)
        if not generation:
            return False
        if timeout is None:
            timeout = self._call_timeout
        elif timeout > self._max_call_timeout:
            timeout = self._max_call_timeout
        try:
            if 6 * len(method) + (len(params) if params else 0) > self._fits or method.startswith("gateway."):
                self._check(client_id, method, params, _ANY_ID)
            asked = self._ask(call, (client_id, generation), method, params, timeout)
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            self._metrics.calls += 1
            raise self._call_failed(e, client_id) from None
        if asked:
            self._metrics.calls += 1
        return asked

    def forget(self, call: Call) -> None:
        """See :meth:`IHub.forget`."""
        self._pending.forget(call)

    def notify(self, client_id: str, method: str, params: bytes | None) -> Deferred[None]:
        """See :meth:`IHub.notify`."""
        try:
            if self.notify_here(client_id, method, params):
                return succeed(None)
        except RpcError as e:
            return fail(e)
        return Deferred.fromCoroutine(self._notify_there(client_id, method, params))

    def notify_here(self, client_id: str, method: str, params: bytes | None) -> bool:
        """See :meth:`IHub.notify_here`."""
        generation = self._edge.generation(client_id)
        if not generation:
            return False
        try:
            self._check(client_id, method, params)
            return self._notify_connection(client_id, encode_notification(method, params))
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            raise self._rpc_error(e, client_id) from None

    def notify_prefix(self, prefix: str, method: str, params: bytes | None) -> Deferred[int]:
        """See :meth:`IHub.notify_prefix`. Fails with ``RpcError`` alone."""
        return Deferred.fromCoroutine(self._notify_all(prefix, method, params))

    def _check(self, client_id: str | None, method: str, params: bytes | None, id: bytes | None = None) -> None:
        """Refuse what may be sent to no client; ``id`` is any that is as long as that of a request."""
        if method.startswith("gateway."):
            detail = "methods that begin with gateway. are the gateway's own"
            raise RpcError(Kind.INVALID_REQUEST, client_id, detail=detail)
        # No character of a method takes more than 6 bytes; only what may be too large is encoded to see.
        if 6 * len(method) + (len(params) if params else 0) <= self._fits:
            return
        message = encode_notification(method, params) if id is None else encode_request(id, method, params)
        if len(message) > self._max_message_size:
            raise RpcError(Kind.TOO_LARGE, client_id)

    def _ask(self, call: Call, connection: Connection, method: str, params: bytes | None, timeout: float) -> bool:
        """Call a client on a connection that is open here; or leave nothing behind, if it turns out that it is not."""
        client_id, generation = connection
        if connection in self._leaving:
            raise RpcError(Kind.NOT_CONNECTED, client_id, detail="the client was told to connect to another node")
        pending = self._pending
        id = pending.start(call, connection, client_id, timeout)
        sent = 0
        try:
            sent = self._edge.send(client_id, encode_request(id, method, params), generation)
        finally:
            if not sent:
                # It may have failed already, if this is when the connection turned out to be dead.
                pending.forget(call)
        if not sent:
            return False
        if call.early is NOT_SENT:
            call.early = None
        else:
            pending.sent(call)
        return True

    async def _call_there(self, client_id: str, method: str, params: bytes | None, timeout: float) -> Reply:
        deadline = self._clock.seconds() + timeout

        def here() -> Deferred[Reply] | None:
            generation = self._edge.generation(client_id)
            if not generation:
                return None
            call = DeferredCall(self._pending.forget)
            left = deadline - self._clock.seconds()
            return call if self._ask(call, (client_id, generation), method, params, left) else None

        try:
            self._check(client_id, method, params, _ANY_ID)
            found = await self._find(client_id, deadline, here)
            if not isinstance(found, Deferred):
                left = max(0.0, deadline - self._clock.seconds())
                reply = await self._elsewhere(client_id)(found, method, params, left)
                assert reply is not None
                self._metrics.calls_answered += 1
                return reply
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            raise self._call_failed(e, client_id) from None
        return await found

    def _notify_connection(self, client_id: str, payload: bytes) -> bool:
        if not self._edge.send(client_id, payload):
            return False
        self._metrics.notifications["to_client"] += 1
        return True

    async def _notify_there(self, client_id: str, method: str, params: bytes | None) -> None:
        try:
            self._check(client_id, method, params)
            payload = encode_notification(method, params)

            def here() -> Deferred[None] | None:
                return succeed(None) if self._notify_connection(client_id, payload) else None

            found = await self._find(client_id, self._clock.seconds() + self._call_timeout, here)
            await (found if isinstance(found, Deferred) else self._elsewhere(client_id)(found, method, params, None))
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            raise self._rpc_error(e, client_id) from None

    async def _notify_all(self, prefix: str, method: str, params: bytes | None) -> int:
        try:
            self._check(None, method, params)
            return await self._notify_in_slices(prefix, encode_notification(method, params))
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            raise self._rpc_error(e, None) from None

    async def _notify_in_slices(self, prefix: str, payload: bytes) -> int:
        reached = clients = size = self._room = 0
        for client_id in self._edge.client_ids():
            if clients == SLICE or size >= SLICE_BYTES:
                await deferLater(self._clock, size / PACE)
                self._room -= size
                if size and self._room <= 0:
                    await self._await_room()
                clients = size = 0
            clients += 1
            # Clients that have left since the list was made take nothing.
            if client_id.startswith(prefix) and self._notify_connection(client_id, payload):
                reached += 1
                size += len(payload)
        return reached

    async def _await_room(self) -> None:
        """Wait while too much waits for slow readers."""
        ends = self._clock.seconds() + LONGEST_WAIT
        while (room := MAX_UNSENT - self._edge.unsent()) <= 0 and self._clock.seconds() < ends:
            await deferLater(self._clock, LOOK_AGAIN)
        self._room = room if room > 0 else LEAST_ROOM

    def _elsewhere(self, client_id: str) -> Elsewhere:
        if self.elsewhere is None:
            raise RpcError(Kind.NODE_UNREACHABLE, client_id, sent=False)
        return self.elsewhere

    async def _find(
        self, client_id: str, deadline: float, here: Callable[[], Deferred[T] | None]
    ) -> Deferred[T] | Location:
        """Reach a client by ``here`` if that is possible, or learn which other node has it.

        Raises ``RpcError`` when nobody has it, or nobody can tell before the deadline.
        """
        reached = await self._await_opening(client_id, deadline, here)
        if reached is None:
            location = await self._look_up(client_id, deadline)
            # Meanwhile it may have come here.
            reached = here() or await self._await_opening(client_id, deadline, here)
            if reached is None:
                if location is None or location.node_id == self._node_id:
                    raise RpcError(Kind.NOT_CONNECTED, client_id)
                if not location.live:
                    # Its node is dead, or the database was away from it: who has just come cannot tell.
                    raise RpcError(Kind.NOT_CONNECTED if self._steady() else Kind.REGISTRY_UNAVAILABLE, client_id)
                return location
        return reached

    async def _await_opening(
        self, client_id: str, deadline: float, here: Callable[[], Deferred[T] | None]
    ) -> Deferred[T] | None:
        """Wait for the claim of a client that is about to be here, and reach it by ``here``."""
        while (opening := self._edge.opening(client_id)) is not None:
            try:
                await opening.addTimeout(max(0.0, deadline - self._clock.seconds()), self._clock)
            except TimeoutError:
                raise RpcError(Kind.NOT_CONNECTED, client_id) from None
            if (reached := here()) is not None:
                return reached
        return None

    async def _look_up(self, client_id: str, deadline: float) -> Location | None:
        seconds = min(LOOK_UP_TIMEOUT, max(0.0, deadline - self._clock.seconds()))
        try:
            return await self._registry.find(client_id).addTimeout(seconds, self._clock)
        except CancelledError:
            raise
        except (RegistryUnavailable, TimeoutError):
            pass
        except Exception:  # noqa: BLE001 - it is logged
            self._log.failure("The registry failed to look up a client")
        raise RpcError(Kind.REGISTRY_UNAVAILABLE, client_id)

    def _call_failed(self, error: Exception, client_id: str) -> RpcError:
        """The error that a call fails with, which is counted."""
        failed = self._rpc_error(error, client_id)
        self._count_failure(failed)
        return failed

    def _count_failure(self, error: RpcError) -> None:
        self._metrics.calls_failed[str(error.code)] += 1

    def _rpc_error(self, error: Exception, client_id: str | None) -> RpcError:
        """The error that a message fails with because of one that is being handled."""
        if isinstance(error, RpcError):
            return error
        self._log.failure("A message to a client failed in a way that it should not")
        # What went wrong is unknown, so that it may have been sent.
        return RpcError(Kind.NODE_UNREACHABLE, client_id, sent=True, detail="internal error of the node")

    # IClientHandler

    def client_connected(self, client_id: str, generation: int) -> None:
        """See :meth:`IClientHandler.client_connected`."""
        self._inbound.connected((client_id, generation))

    def client_disconnected(self, client_id: str, generation: int) -> None:
        """See :meth:`IClientHandler.client_disconnected`."""
        connection = (client_id, generation)
        self._leaving.discard(connection)
        self._pending.fail_owner(connection, _connection_lost)
        self._inbound.disconnected(connection)

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int:
        """See :meth:`IClientHandler.message_received`. No payload makes it raise."""
        return self._inbound.received((client_id, generation), payload)


def _connection_lost(client_id: str) -> RpcError:
    return RpcError(Kind.CONNECTION_LOST, client_id)
