"""Delivery of calls and notifications to clients of other nodes.

    -> IRemoteNodes.try_call(call, location, ...)       at once, if a location is cached and its node is connected
    -> IRemoteNodes.connect(location), .try_call()      else: after a claim in progress here, and a registry lookup
    <- call.complete(result)                            or on_not_delivered(call): then the next attempt

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
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable
from functools import partial
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.jsonrpc import encode_notification
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location
from gateway.rpc.errors import NotDelivered, NotDeliveredError
from gateway.rpc.handoff import HandoffTracker
from gateway.rpc.interface import IMembership, IRemoteNodes
from gateway.rpc.local import SAMPLE_ID, CallFailures, LocalDelivery
from gateway.rpc.location_cache import FALLBACK_TIMEOUT, LocationCache
from gateway.rpc.pending import Call, PendingCalls, Reply

#: result of a delivered notification
_NULL_REPLY = Reply(b"null", None)

#: why a client that still has a connection counts as not connected
GOAWAY_DETAIL = "the client was told to connect to another node"

#: errors after which a client may be connected to another node
_LOCATION_UNCERTAIN = (ErrorKind.CONNECTION_LOST, ErrorKind.NODE_UNREACHABLE)

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
    is valid.
    """

    def __init__(
        self,
        locations: LocationCache,
        clock: IReactorTime,
        *,
        node_id: str,
        membership: IMembership,
    ) -> None:
        self._locations = locations
        self._clock = clock
        self._node_id = node_id
        self._is_stable = membership.is_stable
        self._has_lease = membership.has_lease

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
        elif reason is FailureReason.LEASE_LOST:
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
        if location is None or location.node_id == self._node_id:
            return None, False
        return self._choose(location, last_tried, reason)

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

        SEARCHING   error_kind set     this node keeps the deadline, at which the call fails with that error
        AT_NODE     error_kind None    the other node keeps the deadline
        DONE        origin None        completed, cancelled, or taken over by a local call

        new -> SEARCHING        _start
        new -> AT_NODE          try_call
        SEARCHING -> AT_NODE    _hand_over_deadline
        AT_NODE -> SEARCHING    _start_deadline: the attempt has failed
        any -> DONE             _release
    """

    __slots__ = (
        "deadline",
        "delivery",
        "error_kind",
        "failures",
        "location",
        "method",
        "origin",
        "params",
        "waiting_for",
    )

    is_call = True
    #: ``None`` once it is completed or cancelled
    origin: Call | None
    #: the location of the last attempt
    location: Location | None
    #: the error at the deadline while searching; ``None`` while a node keeps the deadline
    error_kind: ErrorKind | None
    #: the step in progress
    waiting_for: Deferred[Any] | None

    def __init__(
        self, delivery: RemoteDelivery, origin: Call, client_id: str, method: str, params: bytes | None, deadline: float
    ) -> None:
        self.delivery = delivery
        self.origin = origin
        self.client_id = client_id
        self.method = method
        self.params = params
        self.deadline = deadline
        self.location = self.error_kind = self.waiting_for = None
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
    """The message was completed or cancelled."""


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
        #: deadlines of the calls that are searching
        self._deadlines = PendingCalls(clock, max_calls=max_calls, max_per_owner=max_calls)

    def __len__(self) -> int:
        return self._count

    # Start and cancel.

    def try_call(self, call: Call, client_id: str, method: str, params: bytes | None, timeout: float) -> bool:
        """Call a client of another node, if its location is cached and its node is connected. Returns ``False`` if not;
        then nothing has been done. Raises ``RpcError``."""
        remote_nodes = self.remote_nodes
        if remote_nodes is None:
            return False
        now = self._seconds()
        location = self._locations.get(client_id, now)
        if location is None:
            return False
        try:
            self._local.validate(client_id, method, params, SAMPLE_ID)
            self._check_capacity(client_id)
            remote_call = RemoteCall(self, call, client_id, method, params, now + timeout)
            remote_call.location = location
            self._reserve(remote_call)
            called = False
            try:
                called = _try_call(
                    remote_nodes, remote_call, location, timeout, self._locations.registry_unavailable(now)
                )
            finally:
                if not called and remote_call.origin is not None:
                    self._release(remote_call)
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            self._metrics.calls += 1
            raise self._failures.record_exception(e, client_id) from None
        if called:
            self._metrics.calls += 1
        return called

    def call(self, call: Call, client_id: str, method: str, params: bytes | None, timeout: float) -> None:
        """Call a client, wherever it is connected; ``call`` will be completed. Raises ``RpcError``."""
        self._metrics.calls += 1
        try:
            self._local.validate(client_id, method, params, SAMPLE_ID)
            self._check_capacity(client_id)
        except RpcError as e:
            self._failures.record(e)
            raise
        self._start(RemoteCall(self, call, client_id, method, params, self._seconds() + timeout))

    def notify(self, client_id: str, method: str, params: bytes | None, timeout: float) -> Deferred[None]:
        """Notify a client, wherever it is connected. Fires when the message was written to its transport. Raises
        ``RpcError``, and fails only with that."""
        self._local.validate(client_id, method, params)
        self._check_capacity(client_id)
        notification = DeferredNotification(self._cancel_notification)
        self._start(RemoteNotification(self, notification, client_id, method, params, self._seconds() + timeout))
        return notification

    def cancel(self, call: Any) -> bool:
        """Forget a call, here and at the node that has it. Returns ``False`` if it is not a call of this object."""
        remote_call = call.owner
        if not isinstance(remote_call, RemoteCall):
            return False
        if remote_call.origin is not None:
            is_at_node = remote_call.is_call and remote_call.error_kind is None
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
        if isinstance(result, Reply):
            self._metrics.calls_answered += 1
            self._complete(self._release(call), result)
        elif call.error_kind is not None:
            self._fail(call, RpcError(call.error_kind, call.client_id, sent=False))
        elif result.kind is ErrorKind.NODE_UNREACHABLE and not result.sent:
            self._retry(call, FailureReason.UNREACHABLE)
        else:
            self._fail(call, result)

    def call_not_delivered(self, call: RemoteCall, reason: NotDelivered) -> None:
        """Make the next attempt after a node did not deliver a call."""
        if call.origin is not None and call.error_kind is None:
            self._retry(call, FailureReason[reason.name])

    def _check_capacity(self, client_id: str) -> None:
        if self.refusing_new_calls:
            raise RpcError(
                ErrorKind.NODE_UNREACHABLE, client_id, sent=False, detail="this node is going away: ask another"
            )
        if not self._pending.has_room():
            raise RpcError(ErrorKind.TOO_MANY_CALLS, client_id, detail="too many calls in flight on this node")

    def _reserve(self, call: RemoteCall) -> None:
        self._count += 1
        self._pending.reserve(1)

    def _release(self, call: RemoteCall) -> Call:
        """Remove everything that belongs to a call, and return its origin."""
        origin, call.origin = call.origin, None
        assert origin is not None
        self._count -= 1
        self._pending.reserve(-1)
        if call.error_kind is not None:
            self._deadlines.discard(call)
        if call.waiting_for is not None:
            call.waiting_for.cancel()
        return origin

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
        self._start_deadline(call)
        Deferred.fromCoroutine(self._deliver(call, None))

    def _retry(self, call: RemoteCall, reason: FailureReason) -> None:
        self._start_deadline(call)
        Deferred.fromCoroutine(self._deliver(call, reason))

    def _start_deadline(self, call: RemoteCall) -> None:
        """Keep the deadline here, since no node does."""
        if call.origin is None:
            raise _EndedError
        call.error_kind = ErrorKind.REGISTRY_UNAVAILABLE
        self._deadlines.start(call, None, call.client_id, max(0.0, call.deadline - self._seconds()))
        self._deadlines.mark_sent(call)

    async def _deliver(self, call: RemoteCall, reason: FailureReason | None) -> None:
        """Make attempts until a node has the message, or it is completed or cancelled. ``reason`` is why the last
        attempt failed. Never raises."""
        try:
            while True:
                if reason is not None:
                    assert call.location is not None
                    self._retry_policy.attempt_failed(call.location, reason, repeated=reason in call.failures)
                    call.failures += (reason,)
                if await self._try_local(call):
                    return
                if reason is None and (handoff := self._handoffs.wait(call.client_id)) is not None:
                    await self._wait_for(call, handoff, ErrorKind.NOT_CONNECTED)
                location, stale = await self._retry_policy.next_location(
                    call.client_id, call.deadline, call.location, reason, partial(self._wait_for, call)
                )
                # The client may have connected here meanwhile.
                if await self._try_local(call):
                    return
                if location is None:
                    raise self._not_connected_error(call.client_id)
                call.location = location
                attempt = self._call_remote if call.is_call else self._notify_remote
                reason = await attempt(call, location, stale)
                if reason is None:
                    return
        except _EndedError:
            return
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            error = self._failures.to_rpc_error(e, call.client_id)
            if call.origin is not None:
                self._fail(call, error)

    async def _wait_for(self, call: RemoteCall, deferred: Deferred[T], error_kind: ErrorKind | None) -> T:
        """Wait for a Deferred; if the message's deadline comes first, it fails with ``error_kind``."""
        call.error_kind = error_kind
        call.waiting_for = deferred
        try:
            return await deferred
        finally:
            call.waiting_for = None
            if call.origin is None:
                raise _EndedError

    async def _try_local(self, call: RemoteCall) -> bool:
        """Deliver the message here, if the client has connected to this node; waits for a claim in progress."""
        sessions = self._local.sessions
        while True:
            generation = sessions.generation(call.client_id)
            if generation and self._ownership_uncertain() and not await self._is_still_local(call, generation):
                return False
            if generation and (self._call_local if call.is_call else self._notify_local)(call, generation):
                return True
            claim = sessions.claim_in_progress(call.client_id)
            if claim is None:
                return False
            await self._wait_for(call, claim, ErrorKind.NOT_CONNECTED)

    async def _is_still_local(self, call: RemoteCall, generation: int) -> bool:
        """Return whether the registry has no newer claim of a client connected here, or is unavailable."""
        lookup = self._locations.find(call.client_id, fresh=True)
        time_left = max(0.0, call.deadline - self._seconds())
        lookup.addTimeout(min(FALLBACK_TIMEOUT, time_left / 2), self._clock)
        try:
            location = await self._wait_for(call, lookup, ErrorKind.REGISTRY_UNAVAILABLE)
        except (RegistryUnavailableError, TimeoutError):
            return True
        return location is None or location.generation <= generation

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

    async def _call_remote(self, call: RemoteCall, location: Location, stale: bool) -> FailureReason | None:
        remote_nodes = self.remote_nodes
        if remote_nodes is None:
            return FailureReason.UNREACHABLE
        try:
            await self._wait_for(call, remote_nodes.connect(location), ErrorKind.NODE_UNREACHABLE)
        except RpcError as e:
            return _reason_or_raise(e)
        time_left = self._hand_over_deadline(call)
        if _try_call(remote_nodes, call, location, time_left, stale):
            return None
        # The connection was lost again, or is congested.
        self._start_deadline(call)
        return FailureReason.UNREACHABLE

    async def _notify_remote(self, call: RemoteCall, location: Location, stale: bool) -> FailureReason | None:
        remote_nodes = self.remote_nodes
        if remote_nodes is None:
            return FailureReason.UNREACHABLE
        time_left = self._hand_over_deadline(call)
        notified = remote_nodes.notify(location, call.method, call.params, time_left, stale=stale)
        try:
            await self._wait_for(call, notified, None)
        except NotDeliveredError as e:
            reason = FailureReason[e.reason.name]
        except RpcError as e:
            reason = _reason_or_raise(e)
        else:
            self._complete(self._release(call), _NULL_REPLY)
            return None
        self._start_deadline(call)
        return reason

    def _hand_over_deadline(self, call: RemoteCall) -> float:
        """Leave the deadline to the other node. Returns the seconds that remain."""
        time_left = call.deadline - self._seconds()
        if time_left <= 0:
            raise RpcError(ErrorKind.NODE_UNREACHABLE, call.client_id, sent=False)
        self._deadlines.discard(call)
        call.error_kind = None
        return time_left


def _try_call(remote_nodes: IRemoteNodes, call: RemoteCall, location: Location, timeout: float, stale: bool) -> bool:
    """Call a client through a node, if that is connected. Raises ``RpcError``."""
    try:
        return remote_nodes.try_call(call, location, call.method, call.params, timeout, stale=stale)
    except RpcError as e:
        _reason_or_raise(e)
        return False


def _reason_or_raise(error: RpcError) -> FailureReason:
    """Return ``UNREACHABLE`` for an error which says that the node received nothing; raise any other."""
    if error.kind is ErrorKind.NODE_UNREACHABLE and not error.sent:
        return FailureReason.UNREACHABLE
    raise error
