"""Delivery of calls and notifications to clients of other nodes.

    -> IRemoteNodes.try_send(message, location, ...)    at once, if a location is cached and its node is connected
    -> IRemoteNodes.connect(location), .try_send()      else: after a claim in progress here, and a registry lookup
    <- message.complete(result)                         or not_delivered(reason): then the next attempt
    -> IRemoteNodes.fence(location)                     before messages go elsewhere than those before them

Node of the next attempt, by the reason of the last failure (:class:`RetryPolicy`):

    (first attempt)   a cached location: its node
                      none, or its node is not connected: the node that the registry names
    not here          the location is dropped and looked up again: the node that the registry names now
    lease lost        looked up again. Another node or claim: that one. Same claim: retried once, if its lease is valid
                      again, or if this node cannot judge leases (registry unavailable, or not stable)
    unreachable       looked up again. Another node or claim: that one. Same claim: none

Each of these may happen once for a message. While this node is not stable, an expired lease in the registry means
nothing: the node is tried nevertheless. All errors raised here promise that the client did not get the message.

All attempts share the one deadline of the message. It is completed once, and its caller is released with that; each
step checks whether that has happened.

The messages to one client are handed on in the order in which they were sent to this node (rpc/ordering.py), one after
the other. What an attempt finds out about a client that cannot be reached applies to all messages that waited when it
began.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable
from functools import partial
from itertools import count
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.jsonrpc import encode_notification
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location, SessionKey
from gateway.rpc.errors import NotDelivered
from gateway.rpc.handoff import HANDOFF_TIMEOUT, HandoffTracker
from gateway.rpc.interface import IMembership, IOrphanedRows, IRemoteNodes
from gateway.rpc.local import SAMPLE_ID, CallFailures, LocalDelivery
from gateway.rpc.location_cache import FALLBACK_TIMEOUT, LocationCache
from gateway.rpc.ordering import ClientQueue
from gateway.rpc.pending import Call, PendingCalls, Reply
from gateway.util.deferred import detached

#: result of a delivered notification
_NULL_REPLY = Reply(b"null", None)

#: why a client that still has a connection counts as not connected
GOAWAY_DETAIL = "the client was told to connect to another node"

#: errors after which a client may be connected to another node
_LOCATION_UNCERTAIN = (ErrorKind.CONNECTION_LOST, ErrorKind.NODE_UNREACHABLE)
#: errors, not sent, that are the same for all messages to a client
_CLIENT_UNREACHABLE = (ErrorKind.NOT_CONNECTED, ErrorKind.NODE_UNREACHABLE, ErrorKind.REGISTRY_UNAVAILABLE)

T = TypeVar("T")


class FailureReason(enum.Enum):
    """Why an attempt failed."""

    NOT_HERE = "not here"
    LEASE_LOST = "lease lost"
    UNREACHABLE = "unreachable"


class WaitFor(Protocol):
    """Wait for a Deferred until the deadline of a message, which then fails with an error of that kind."""

    def __call__(self, deferred: Deferred[T], error_kind: ErrorKind, /) -> Awaitable[T]: ...


class RetryPolicy:
    """Choose the node of the next attempt to deliver a message.

    ``membership`` tells whether this node may consider a node dead whose lease has expired, and whether its own lease
    is valid. ``orphaned_rows`` is told of the rows of this node that look-ups find.
    """

    def __init__(
        self,
        locations: LocationCache,
        clock: IReactorTime,
        *,
        node_id: str,
        membership: IMembership,
        orphaned_rows: IOrphanedRows,
    ) -> None:
        self._locations = locations
        self._clock = clock
        self._node_id = node_id
        self._is_stable = membership.is_stable
        self._has_lease = membership.has_lease
        self._orphaned_rows = orphaned_rows

    def attempt_failed(self, location: Location, reason: FailureReason, *, repeated: bool) -> None:
        """Update the location cache after a failed attempt. Raises ``RpcError`` if an attempt failed for the same
        reason before."""
        if reason is FailureReason.NOT_HERE:
            self._locations.invalidate(location)
        else:
            # Keep it as the fallback while the registry is unavailable.
            self._locations.expire(location)
        if not repeated:
            return
        if reason is FailureReason.UNREACHABLE:
            raise self._unreachable_error(location)
        if reason is FailureReason.LEASE_LOST:
            raise _lease_lost_error(location)
        raise RpcError(ErrorKind.NOT_CONNECTED, location.client_id)

    async def next_location(
        self,
        client_id: str,
        deadline: float,
        last_tried: Location | None,
        reason: FailureReason | None,
        wait_for: WaitFor,
    ) -> tuple[Location | None, bool]:
        """Return the location of the next attempt, and whether its node is to deliver the message even if its lease has
        expired.

        The location is ``None`` if the client is connected to no other node. ``last_tried`` is the location of the last
        attempt, and ``reason`` why it failed; ``deadline`` is a time of the clock. Raises ``RpcError``.
        """
        now = self._clock.seconds()
        fallback = None
        if reason is None:
            cached = self._locations.get(client_id, now)
            if cached is not None:
                return cached, self._locations.registry_unavailable(now)
            fallback = self._locations.get_expired(client_id)
        else:
            newer = self._newer_location(client_id, last_tried, now)
            if newer is not None:
                return newer, self._locations.registry_unavailable(now)
            if reason is FailureReason.LEASE_LOST:
                fallback = last_tried
        lookup = self._locations.find(client_id, fresh=reason is not None)
        if fallback is not None:
            lookup.addTimeout(min(FALLBACK_TIMEOUT, max(0.0, deadline - now) / 2), self._clock)
        error_kind = (
            ErrorKind.NODE_UNREACHABLE if reason is FailureReason.UNREACHABLE else ErrorKind.REGISTRY_UNAVAILABLE
        )
        try:
            location = await wait_for(lookup, error_kind)
        except (RegistryUnavailableError, TimeoutError):
            if fallback is not None:
                return fallback, True
            raise RpcError(error_kind, client_id, sent=False) from None
        if location is None:
            return None, False
        if location.node_id == self._node_id:
            self._orphaned_rows.check(SessionKey(client_id, location.generation))
            return None, False
        return self._choose(location, last_tried, reason)

    def _newer_location(self, client_id: str, last_tried: Location | None, now: float) -> Location | None:
        """Return a location that was found for another message since the last attempt of this one."""
        cached = self._locations.get(client_id, now)
        if cached is None or last_tried is None or cached.generation <= last_tried.generation:
            return None
        return cached

    def _choose(
        self, found: Location, last_tried: Location | None, reason: FailureReason | None
    ) -> tuple[Location | None, bool]:
        is_same = last_tried is not None and (found.node_id, found.generation) == (
            last_tried.node_id,
            last_tried.generation,
        )
        if is_same and reason is FailureReason.LEASE_LOST:
            # A registry that takes no heartbeats counts as unavailable.
            registry_unavailable = not self._has_lease()
            if not found.live and not registry_unavailable and self._is_stable():
                raise _lease_lost_error(found)
            # After an outage no lease is valid until its node has sent a heartbeat: what the registry says still holds.
            return found, registry_unavailable or not found.live
        if not found.live and self._is_stable():
            return None, False
        if is_same and reason is FailureReason.UNREACHABLE:
            raise self._unreachable_error(found)
        return found, False

    def _unreachable_error(self, location: Location) -> RpcError:
        if location.live:
            detail = f"node {location.node_name} cannot be reached"
            return RpcError(ErrorKind.NODE_UNREACHABLE, location.client_id, sent=False, detail=detail)
        if self._is_stable():
            return RpcError(ErrorKind.NOT_CONNECTED, location.client_id)
        detail = f"it is not known yet whether node {location.node_name}, which had the client, is still alive"
        return RpcError(ErrorKind.REGISTRY_UNAVAILABLE, location.client_id, detail=detail)


def _lease_lost_error(location: Location) -> RpcError:
    detail = f"node {location.node_name}, which had the client, could not renew its lease"
    return RpcError(ErrorKind.REGISTRY_UNAVAILABLE, location.client_id, detail=detail)


class RemoteCall(Call):
    """A call to a client of another node, with what is needed to make further attempts. ``origin`` is the caller's
    call.

    States, which are not stored but follow from the attributes, and the methods of :class:`RemoteDelivery` that enter
    them:

        WAITING     error_kind set     in the client's queue; this node keeps the deadline, at which it fails with that
        AT_NODE     error_kind None    the other node keeps the deadline
        DONE        origin None        completed, cancelled, or taken over by a local call

        new -> WAITING          _enqueue
        new -> AT_NODE          try_send
        WAITING -> AT_NODE      _send
        AT_NODE -> WAITING      _retry: the attempt has failed
        any -> DONE             _release
    """

    __slots__ = (
        "deadline",
        "delivery",
        "epoch",
        "error_kind",
        "failures",
        "location",
        "method",
        "number",
        "origin",
        "params",
        "queue",
        "reason",
        "started_at",
        "waiting_for",
    )

    is_call = True
    #: ``None`` once it is completed or cancelled
    origin: Call | None
    #: the location of the last attempt
    location: Location | None
    #: the error at the deadline while it waits; ``None`` while a node keeps the deadline
    error_kind: ErrorKind | None
    #: times of the clock
    started_at: float
    deadline: float
    #: its place in the order of all messages
    number: int
    #: the client's queue, once it waits or is at a node
    queue: ClientQueue[RemoteCall]
    #: the epoch of the queue in which it was sent to a node
    epoch: int
    #: why the last attempt failed
    reason: FailureReason | None
    #: the step in progress
    waiting_for: Deferred[Any] | None

    def __init__(
        self,
        delivery: RemoteDelivery,
        origin: Call,
        number: int,
        client_id: str,
        method: str,
        params: bytes | None,
        timeout: float,
    ) -> None:
        """``timeout`` is in seconds."""
        self.delivery = delivery
        self.number = number
        self.origin = origin
        self.client_id = client_id
        self.method = method
        self.params = params
        self.started_at = now = delivery._seconds()
        self.deadline = now + timeout
        self.location = self.error_kind = self.waiting_for = self.reason = None
        self.failures: tuple[FailureReason, ...] = ()
        origin.owner = self

    def complete(self, result: Reply | RpcError) -> None:
        self.delivery.call_completed(self, result)

    def not_delivered(self, reason: NotDelivered) -> None:
        """Make the next attempt."""
        self.delivery.call_not_delivered(self, reason)


class RemoteNotification(RemoteCall):
    """A notification to a client of another node, with the states of a call."""

    __slots__ = ()

    is_call = False


class DeferredNotification(Call, Deferred[None]):
    """Notification in progress as a Deferred, which fails with ``RpcError``."""

    def complete(self, result: Reply | RpcError) -> None:
        if isinstance(result, RpcError):
            self.errback(result)
        else:
            self.callback(None)


class _EndedError(Exception):
    """The message was completed or cancelled, or is not the first in its queue any more."""


class RemoteDelivery:
    """Delivery to clients of other nodes. Its calls count towards the ``max_calls`` of ``pending``."""

    _log = Logger()

    #: set when this node shuts down
    refusing_new_calls = False

    def __init__(
        self,
        *,
        local: LocalDelivery,
        locations: LocationCache,
        handoffs: HandoffTracker,
        retry_policy: RetryPolicy,
        pending: PendingCalls,
        failures: CallFailures,
        clock: IReactorTime,
        metrics: Metrics,
        max_calls: int,
        membership: IMembership,
        remote_nodes: IRemoteNodes | None,
    ) -> None:
        """``membership`` tells whether the registry is to be queried even for a client connected here."""
        self._ownership_uncertain = membership.ownership_uncertain
        self.remote_nodes = remote_nodes
        self._local = local
        self._locations = locations
        self._handoffs = handoffs
        self._retry_policy = retry_policy
        self._pending = pending
        self._failures = failures
        self._metrics = metrics
        self._clock = clock
        self._seconds = clock.seconds
        self._count = 0
        self._numbers = count(1)
        #: client_id -> its queue, while messages to it wait or are at a node
        self.queues: dict[str, ClientQueue[RemoteCall]] = {}
        #: deadlines of the messages that wait
        self._deadlines = PendingCalls(clock, max_calls=max_calls, max_per_owner=max_calls)

    def __len__(self) -> int:
        return self._count

    # Start and cancel.

    def try_call(self, call: Call, client_id: str, method: str, params: bytes | None, timeout: float) -> bool:
        """Call a client of another node, if its location is cached, its node is connected, and no earlier message to it
        waits. Returns ``False`` if not; then nothing has been done. Raises ``RpcError``."""
        now = self._seconds()
        location = self._location_to_follow(client_id, now)
        if location is None:
            return False
        try:
            self._local.validate(client_id, method, params, SAMPLE_ID)
            self._check_capacity(client_id)
            remote_call = RemoteCall(self, call, next(self._numbers), client_id, method, params, timeout)
            called = self._try_send(remote_call, location, now, timeout)
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            self._metrics.calls += 1
            raise self._failures.record_exception(e, client_id) from None
        if called:
            self._metrics.calls += 1
        return called

    def _location_to_follow(self, client_id: str, now: float) -> Location | None:
        """Return the cached location of a client to which a message may be sent at once, or ``None``."""
        if self.remote_nodes is None:
            return None
        location = self._locations.get(client_id, now)
        queue = self.queues.get(client_id)
        if location is not None and queue is not None and (queue.waiting or not queue.may_follow(location)):
            return None
        return location

    def _try_send(self, call: RemoteCall, location: Location, now: float, timeout: float) -> bool:
        """Send a new message to a node, if that is connected. Returns ``False``, and leaves nothing behind, if it is
        not. Raises ``RpcError``."""
        remote_nodes = self.remote_nodes
        assert remote_nodes is not None
        self._reserve(call)
        self._put_at_node(call, location)
        sent = False
        try:
            sent = _try_send(remote_nodes, call, location, timeout, self._locations.registry_unavailable(now))
        finally:
            if not sent and call.origin is not None:
                self._release(call)
        return sent

    def call(self, call: Call, client_id: str, method: str, params: bytes | None, timeout: float) -> None:
        """Call a client, wherever it is connected; ``call`` will be completed. Raises ``RpcError``."""
        self._metrics.calls += 1
        try:
            self._local.validate(client_id, method, params, SAMPLE_ID)
            self._check_capacity(client_id)
        except RpcError as e:
            self._failures.record(e)
            raise
        self._start(RemoteCall(self, call, next(self._numbers), client_id, method, params, timeout))

    def notify(self, client_id: str, method: str, params: bytes | None, timeout: float) -> Deferred[None]:
        """Notify a client, wherever it is connected. Fires when the message was written to its transport. Raises
        ``RpcError``, and fails only with that."""
        self._local.validate(client_id, method, params)
        self._check_capacity(client_id)
        notification = DeferredNotification(self._cancel_notification)
        now = self._seconds()
        number = next(self._numbers)
        message = RemoteNotification(self, notification, number, client_id, method, params, timeout)
        location = self._location_to_follow(client_id, now)
        if location is None or not self._try_send(message, location, now, timeout):
            message.origin = notification
            self._start(message)
        return notification

    def cancel(self, call: Any) -> bool:
        """Forget a call, here and at the node that has it. Returns ``False`` if it is not a call of this object."""
        remote_call = call.owner
        if not isinstance(remote_call, RemoteCall):
            return False
        if remote_call.origin is not None:
            is_at_node = remote_call.error_kind is None
            self._release(remote_call)
            if is_at_node and self.remote_nodes is not None:
                self.remote_nodes.cancel(remote_call)
        return True

    def _cancel_notification(self, notification: Any) -> None:
        self.cancel(notification)

    # Results.

    def call_completed(self, call: RemoteCall, result: Reply | RpcError) -> None:
        """Handle the result of an attempt, or the deadline."""
        if call.origin is None:
            return
        if isinstance(result, Reply) and (call.is_call or result.result is not None):
            if call.is_call:
                self._metrics.calls_answered += 1
            self._complete(self._release(call), result)
        elif isinstance(result, Reply):
            detail = "the client's node responded to a notification with an error of the client"
            self._fail(call, RpcError(ErrorKind.NODE_UNREACHABLE, call.client_id, sent=True, detail=detail))
        elif call.error_kind is not None:
            self._fail(call, RpcError(self._error_kind_of(call), call.client_id, sent=False))
        elif result.kind is ErrorKind.NODE_UNREACHABLE and not result.sent:
            self._retry(call, FailureReason.UNREACHABLE)
        else:
            self._fail(call, result)

    def _error_kind_of(self, call: RemoteCall) -> ErrorKind:
        """Return the error of a message whose deadline passes while it waits: that of what the first one waits for."""
        first = call.queue.waiting[0]
        return first.error_kind or ErrorKind.REGISTRY_UNAVAILABLE

    def call_not_delivered(self, call: RemoteCall, reason: NotDelivered) -> None:
        """Make the next attempt after a node did not deliver a message."""
        if call.origin is not None and call.error_kind is None:
            self._retry(call, FailureReason[reason.name])

    def _check_capacity(self, client_id: str) -> None:
        if self.refusing_new_calls:
            raise RpcError(
                ErrorKind.NODE_UNREACHABLE, client_id, sent=False, detail="this node is going away: ask another"
            )
        if not self._pending.has_room():
            raise RpcError(ErrorKind.TOO_MANY_CALLS, client_id, detail=self._pending.full_detail)

    def _reserve(self, call: RemoteCall) -> None:
        self._count += 1
        self._pending.reserve(1)

    def _release(self, call: RemoteCall) -> Call:
        """Remove everything that belongs to a call, and return its origin."""
        origin, call.origin = call.origin, None
        assert origin is not None
        self._count -= 1
        self._pending.reserve(-1)
        if call.error_kind is None:
            self._take_from_node(call)
        else:
            self._deadlines.discard(call)
            call.queue.remove(call)
        if call.waiting_for is not None:
            call.waiting_for.cancel()
        return origin

    def _put_at_node(self, call: RemoteCall, location: Location) -> None:
        """Record that a message is sent to a node now."""
        client_id = call.client_id
        queue = self.queues.get(client_id)
        if queue is None:
            queue = self.queues[client_id] = ClientQueue(client_id)
        call.queue = queue
        call.location = location
        queue.sent(call, location)

    def _take_from_node(self, call: RemoteCall) -> None:
        queue = call.queue
        queue.returned(call, missed=False)
        if queue.is_idle:
            self._drop(queue)

    def _drop(self, queue: ClientQueue[RemoteCall]) -> None:
        if self.queues.get(queue.client_id) is queue:
            del self.queues[queue.client_id]

    def _fail(self, call: RemoteCall, error: RpcError) -> None:
        origin = self._release(call)
        if error.kind in _LOCATION_UNCERTAIN and call.location is not None:
            self._locations.expire(call.location)
        if call.is_call:
            self._failures.record(error)
        self._complete(origin, error)

    def _complete(self, call: Call, result: Reply | RpcError) -> None:
        try:
            call.complete(result)
        except Exception:  # noqa: BLE001 - not an error of the responder
            self._log.failure("Error in completing a call")

    # Attempts.

    def _start(self, call: RemoteCall) -> None:
        self._reserve(call)
        self._enqueue(call)

    def _enqueue(self, call: RemoteCall) -> None:
        """Put a message into the client's queue, and keep its deadline here, since no node does."""
        client_id = call.client_id
        call.error_kind = ErrorKind.REGISTRY_UNAVAILABLE
        queue = self.queues.get(client_id)
        if queue is None:
            queue = self.queues[client_id] = ClientQueue(client_id)
        call.queue = queue
        previous = queue.waiting[0] if queue.waiting else None
        queue.add(call)
        self._deadlines.start(call, None, client_id, max(0.0, call.deadline - self._seconds()))
        self._deadlines.mark_sent(call)
        if previous is not None and queue.waiting[0] is call and previous.waiting_for is not None:
            # An older message was given back: it is the first to be handed on, which this may do at once.
            previous.waiting_for.cancel()
        if not queue.is_running:
            queue.is_running = True
            Deferred.fromCoroutine(self._run(queue))

    def _retry(self, call: RemoteCall, reason: FailureReason) -> None:
        """Put a message that a node did not deliver back into the queue, or fail it."""
        assert call.location is not None
        try:
            self._retry_policy.attempt_failed(call.location, reason, repeated=reason in call.failures)
        except RpcError as e:
            self._fail(call, e)
            return
        call.failures += (reason,)
        call.reason = reason
        queue = call.queue
        queue.returned(call, missed=True, by_lease=reason is FailureReason.LEASE_LOST)
        self._enqueue(call)

    async def _run(self, queue: ClientQueue[RemoteCall]) -> None:
        """Hand on the messages of a queue, one after the other. Never raises."""
        while queue.waiting:
            call = queue.waiting[0]
            last_number = queue.last_number
            try:
                await self._attempt(queue, call)
            except _EndedError:
                continue
            except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
                error = self._failures.to_rpc_error(e, call.client_id)
                if call.origin is not None:
                    self._fail(call, error)
                self._fail_others(queue, error, last_number)
        queue.is_running = False
        if queue.is_idle:
            self._drop(queue)

    def _fail_others(self, queue: ClientQueue[RemoteCall], error: RpcError, last_number: int) -> None:
        """Fail the messages that waited when the attempt began that found the client unreachable: each would find the
        same."""
        if error.sent or error.kind not in _CLIENT_UNREACHABLE:
            return
        for call in queue.remove_up_to(last_number):
            if call.origin is not None:
                self._fail(call, RpcError(error.kind, call.client_id, sent=False, detail=error.detail))

    async def _attempt(self, queue: ClientQueue[RemoteCall], call: RemoteCall) -> None:
        """Hand on the first message of a queue, or return to begin again, since what is first or known has changed.

        Raises ``RpcError`` if it cannot be delivered."""
        if queue.was_missed:
            await self._settle(queue, call)
            return
        if await self._try_local(call):
            return
        reason = call.reason
        # Counted from the start of each message, however long those before it have waited.
        patience = call.started_at + HANDOFF_TIMEOUT - self._seconds()
        if reason is None and (handoff := self._handoffs.wait(call.client_id, patience)) is not None:
            await self._wait_for(call, handoff, ErrorKind.NOT_CONNECTED)
        location, stale = await self._retry_policy.next_location(
            call.client_id, call.deadline, call.location, reason, partial(self._wait_for, call)
        )
        # The client may have connected here meanwhile.
        if await self._try_local(call):
            return
        if location is None:
            raise self._not_connected_error(call.client_id)
        if not queue.may_follow(location):
            await self._settle(queue, call)
            return
        call.location = location
        remote_nodes = self.remote_nodes
        try:
            if remote_nodes is None:
                raise RpcError(ErrorKind.NODE_UNREACHABLE, call.client_id, sent=False)
            await self._wait_for(call, remote_nodes.connect(location), ErrorKind.NODE_UNREACHABLE)
        except RpcError as e:
            self._attempt_failed(call, _reason_or_raise(e))
            return
        if queue.may_follow(location) and not self._send(queue, call, location, stale):
            # The connection was lost again, or is congested.
            self._attempt_failed(call, FailureReason.UNREACHABLE)

    def _attempt_failed(self, call: RemoteCall, reason: FailureReason) -> None:
        """Take note of a failed attempt to hand on a message that waits. Raises ``RpcError`` if there is no other."""
        assert call.location is not None
        self._retry_policy.attempt_failed(call.location, reason, repeated=reason in call.failures)
        call.failures += (reason,)
        call.reason = reason

    def _send(self, queue: ClientQueue[RemoteCall], call: RemoteCall, location: Location, stale: bool) -> bool:
        """Send the first message of a queue to a node. Returns ``False`` if it still waits. Raises ``RpcError``."""
        remote_nodes = self.remote_nodes
        assert remote_nodes is not None
        time_left = call.deadline - self._seconds()
        if time_left <= 0:
            self._fail(call, RpcError(ErrorKind.NODE_UNREACHABLE, call.client_id, sent=False))
            return True
        # The other node keeps the deadline from now on.
        self._deadlines.discard(call)
        queue.remove(call)
        call.error_kind = None
        self._put_at_node(call, location)
        if _try_send(remote_nodes, call, location, time_left, stale):
            return True
        queue.returned(call, missed=False)
        self._enqueue(call)
        return False

    async def _settle(self, queue: ClientQueue[RemoteCall], call: RemoteCall) -> None:
        """Wait until no message at a node can be given back any more."""
        if queue.fence is None:
            location = queue.location
            if location is None or self.remote_nodes is None:
                queue.settled()
                return
            epoch = queue.epoch

            def settled(_: object) -> None:
                if queue.epoch == epoch:
                    queue.settled()
                    if queue.is_idle:
                        self._drop(queue)

            queue.fence = fence = self.remote_nodes.fence(location)
            fence.addBoth(settled)
            if fence.called:
                return
        await self._wait_for(call, detached(queue.fence), ErrorKind.NODE_UNREACHABLE)

    async def _wait_for(self, call: RemoteCall, deferred: Deferred[T], error_kind: ErrorKind | None) -> T:
        """Wait for a Deferred; if the message's deadline comes first, it fails with ``error_kind``."""
        call.error_kind = error_kind
        call.waiting_for = deferred
        try:
            return await deferred
        finally:
            call.waiting_for = None
            if call.origin is None or call.queue.waiting[0] is not call:
                raise _EndedError

    async def _try_local(self, call: RemoteCall) -> bool:
        """Deliver the message here, if the client has connected to this node; waits for a claim in progress."""
        sessions, queue = self._local.sessions, call.queue
        while True:
            generation = sessions.generation(call.client_id)
            if generation and self._ownership_uncertain() and not await self._is_still_local(call, generation):
                return False
            if generation and (call.client_id, generation) not in self._local.goaway_sessions:
                if queue.unsettled:
                    await self._settle(queue, call)
                    continue
                if (self._call_local if call.is_call else self._notify_local)(call, generation):
                    return True
            claim = sessions.claim_in_progress(call.client_id)
            if claim is None:
                return False
            await self._wait_for(call, claim, ErrorKind.NOT_CONNECTED)

    async def _is_still_local(self, call: RemoteCall, generation: int) -> bool:
        """Return whether the registry has no newer claim of a client connected here, or is unavailable."""
        queue = call.queue
        if call.number <= queue.owner_checked_up_to:
            return True
        last_number = queue.last_number
        lookup = self._locations.find(call.client_id, fresh=True)
        time_left = max(0.0, call.deadline - self._seconds())
        lookup.addTimeout(min(FALLBACK_TIMEOUT, time_left / 2), self._clock)
        try:
            location = await self._wait_for(call, lookup, ErrorKind.REGISTRY_UNAVAILABLE)
        except (RegistryUnavailableError, TimeoutError):
            location = None
        if location is not None and location.generation > generation:
            return False
        queue.owner_checked_up_to = last_number
        return True

    def _not_connected_error(self, client_id: str) -> RpcError:
        was_sent_goaway = (client_id, self._local.sessions.generation(client_id)) in self._local.goaway_sessions
        return RpcError(ErrorKind.NOT_CONNECTED, client_id, detail=GOAWAY_DETAIL if was_sent_goaway else None)

    def _call_local(self, call: RemoteCall, generation: int) -> bool:
        origin = call.origin
        assert origin is not None
        time_left = max(0.0, call.deadline - self._seconds())
        # The local call takes a place of its own.
        self._pending.reserve(-1)
        called = False
        try:
            called = self._local.call(origin, (call.client_id, generation), call.method, call.params, time_left)
        finally:
            self._pending.reserve(1)
            if not called:
                origin.owner = call
        if called:
            self._release(call)
        return called

    def _notify_local(self, call: RemoteCall, generation: int) -> bool:
        payload = encode_notification(call.method, call.params)
        if not self._local.notify(call.client_id, payload, generation):
            return False
        self._complete(self._release(call), _NULL_REPLY)
        return True


def _try_send(remote_nodes: IRemoteNodes, call: RemoteCall, location: Location, timeout: float, stale: bool) -> bool:
    """Send a message to a node, if that is connected. Raises ``RpcError``."""
    try:
        return remote_nodes.try_send(
            call, location, call.method, call.params, timeout, is_call=call.is_call, stale=stale
        )
    except RpcError as e:
        _reason_or_raise(e)
        return False


def _reason_or_raise(error: RpcError) -> FailureReason:
    """Return ``UNREACHABLE`` for an error which says that the node received nothing; raise any other."""
    if error.kind is ErrorKind.NODE_UNREACHABLE and not error.sent:
        return FailureReason.UNREACHABLE
    raise error
