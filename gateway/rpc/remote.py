"""Messages to clients that are not here, while they are under way.

Which node is to be asked for a client, and which next if that one did not pass a message on.

    asked by      and then                           the next one
    -             a location that is remembered      its node
                  none, or its node has no link      the node that the registry names
    not here      it is forgotten, looked up afresh  the node that the registry names now
    lease lost    looked up afresh                   another node or claim: that; the same: once more, if its lease is
                                                     back; if the registry is away as well, or was until just now so
                                                     that this node is not steady, whatever its lease
    unreachable   looked up afresh                   another node or claim: that; the same: none

Each of these happens to a message once. A row of a node whose lease ran out says nothing while this node is not steady:
its node is tried. All errors of this module promise that the client did not get the message.

Messages to clients that are not here: finding them, and asking again where they were missed.

    -> IElsewhere.ask(call, location, ...)      at once, where a location is remembered and the link to its node open
    -> IElsewhere.connect(location), .ask()     else: once a claim under way here is known, and the registry has told
    <- call.settle(outcome), or missed(call)    then the next node is asked, as routing.py says, or the client here

All of that within the one deadline of the message. It is settled once, whatever happens: with that whoever asked is
forgotten, and every step looks whether that is so.
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


class RemoteCall(Call):
    """A call to a client that is not here, and what is needed to ask for it again; ``asker`` is whose call it is."""

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
    #: ``None`` once it is over
    origin: Call | None
    #: where it was asked last
    location: Location | None
    #: while it is sought: what it fails with at its deadline; ``None`` while a node has it
    error_kind: ErrorKind | None
    #: what it waits for meanwhile
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
        """See :meth:`Call.complete`."""
        self.delivery.call_completed(self, result)

    def not_delivered(self, reason: NotDelivered) -> None:
        """Try the next node."""
        self.delivery.call_not_delivered(self, reason)


class RemoteNotification(RemoteCall):
    """The same for a notification."""

    __slots__ = ()

    is_call = False


class DeferredNotification(Call, Deferred[None]):
    """A notification on its way, as a Deferred which fails with ``RpcError``."""

    def complete(self, result: Reply | RpcError) -> None:
        """Fire it."""
        if isinstance(result, RpcError):
            self.errback(result)
        else:
            self.callback(None)


T = TypeVar("T")


class FailureReason(enum.Enum):
    """Why a node did not pass a message on."""

    NOT_HERE = "not here"
    LEASE_LOST = "lease lost"
    UNREACHABLE = "unreachable"


class WaitFor(Protocol):
    """Waits for something until the deadline of a message, which fails with an error of that kind if it is late."""

    def __call__(self, deferred: Deferred[T], error_kind: ErrorKind, /) -> Awaitable[T]: ...


class RetryPolicy:
    """The ways of messages that begin at this node."""

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
        """A node did not pass a message on. Raises ``RpcError`` when that is so ``again``, for the same reason."""
        if reason is FailureReason.NOT_HERE:
            self._locations.invalidate(location)
        else:
            # While the registry is away there is nothing better.
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
        """The location to ask at, and whether that node is to pass the message on even if its lease ran out.

        ``None`` when the client is connected to no other node. ``tried`` is where it was asked before, in vain for
        that reason; ``deadline`` is a time of the clock. Raises ``RpcError``.
        """
        now = self._clock.seconds()
        otherwise = None
        if reason is None:
            known = self._locations.get(client_id, now)
            if known is not None:
                return known, self._locations.registry_unavailable(now)
            otherwise = self._locations.get_expired(client_id)
        elif reason is FailureReason.LEASE_LOST:
            otherwise = last_tried
        looking = self._locations.find(client_id, fresh=reason is not None)
        if otherwise is not None:
            looking.addTimeout(min(FALLBACK_TIMEOUT, max(0.0, deadline - now) / 2), self._clock)
        late = ErrorKind.NODE_UNREACHABLE if reason is FailureReason.UNREACHABLE else ErrorKind.REGISTRY_UNAVAILABLE
        try:
            found = await wait_for(looking, late)
        except (RegistryUnavailableError, TimeoutError):
            if otherwise is not None:
                return otherwise, True
            raise RpcError(late, client_id, sent=False) from None
        if found is None or found.node_id == self._node_id:
            return None, False
        return self._choose(found, last_tried, reason)

    def _choose(
        self, found: Location, last_tried: Location | None, reason: FailureReason | None
    ) -> tuple[Location | None, bool]:
        same = last_tried is not None and (found.node_id, found.generation) == (
            last_tried.node_id,
            last_tried.generation,
        )
        if same and reason is FailureReason.LEASE_LOST:
            # A registry that does not take heartbeats is as good as away.
            away = not self._has_lease()
            if not found.live and not away and self._is_stable():
                raise _lease_lost_error(found)
            # After an outage no lease holds until each node has heartbeaten: what the registry still says is so.
            return found, away or not found.live
        if not found.live and self._is_stable():
            return None, False
        if same and reason is FailureReason.UNREACHABLE:
            raise self._unreachable_error(found)
        return found, False

    def _unreachable_error(self, location: Location) -> RpcError:
        if location.live:
            detail = f"node {location.node_name} cannot be reached"
            return RpcError(ErrorKind.NODE_UNREACHABLE, location.client_id, sent=False, detail=detail)
        if self._is_stable():
            return RpcError(ErrorKind.NOT_CONNECTED, location.client_id)
        detail = f"it cannot be told yet whether node {location.node_name}, which had the client, is still there"
        return RpcError(ErrorKind.REGISTRY_UNAVAILABLE, location.client_id, detail=detail)


def _lease_lost_error(location: Location) -> RpcError:
    detail = f"node {location.node_name}, which had the client, could not renew its lease"
    return RpcError(ErrorKind.REGISTRY_UNAVAILABLE, location.client_id, detail=detail)


#: what a notification came to that was handed over
_NULL_REPLY = Reply(b"null", None)

#: why one is not connected that still has a connection
GOAWAY_DETAIL = "the client was told to connect to another node"

#: after these a client may be elsewhere
_LOCATION_UNCERTAIN = (ErrorKind.CONNECTION_LOST, ErrorKind.NODE_UNREACHABLE)


class _EndedError(Exception):
    """The message is settled, or forgotten."""


class RemoteDelivery:
    """The messages of one node to clients elsewhere. They count among the ``max_calls`` of ``pending``."""

    _log = Logger()

    #: nothing begins any more
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
        #: those that no node has at the moment, for their deadlines
        self._deadlines = PendingCalls(clock, max_calls=max_calls, max_per_owner=max_calls)

    def __len__(self) -> int:
        return self._count

    # What begins here.

    def try_call(self, call: Call, client_id: str, method: str, params: bytes | None, timeout: float) -> bool:
        """Ask a client elsewhere, if that is possible at once; ``False`` if not, and nothing was done. Raises
        ``RpcError``."""
        elsewhere = self.remote_nodes
        if elsewhere is None:
            return False
        now = self._seconds()
        location = self._locations.get(client_id, now)
        if location is None:
            return False
        try:
            self._local.validate(client_id, method, params, SAMPLE_ID)
            self._check_capacity(client_id)
            sought = RemoteCall(self, call, client_id, method, params, now + timeout)
            sought.location = location
            self._reserve(sought)
            asked = False
            try:
                asked = _try_call(elsewhere, sought, location, timeout, self._locations.registry_unavailable(now))
            finally:
                if not asked and sought.origin is not None:
                    self._release(sought)
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            self._metrics.calls += 1
            raise self._failures.record_exception(e, client_id) from None
        if asked:
            self._metrics.calls += 1
        return asked

    def call(self, call: Call, client_id: str, method: str, params: bytes | None, timeout: float) -> None:
        """Ask a client wherever it is; ``asker`` will be settled. Raises ``RpcError``."""
        self._metrics.calls += 1
        try:
            self._local.validate(client_id, method, params, SAMPLE_ID)
            self._check_capacity(client_id)
        except RpcError as e:
            self._failures.record(e)
            raise
        self._start(RemoteCall(self, call, client_id, method, params, self._seconds() + timeout))

    def notify(self, client_id: str, method: str, params: bytes | None, timeout: float) -> Deferred[None]:
        """Tell a client wherever it is; fires when its transport has the message. Raises ``RpcError``, and fails with
        it alone."""
        self._local.validate(client_id, method, params)
        self._check_capacity(client_id)
        asker = DeferredNotification(self._cancel_notification)
        self._start(RemoteNotification(self, asker, client_id, method, params, self._seconds() + timeout))
        return asker

    def cancel(self, call: Any) -> bool:
        """Give up what was asked, here and where it is; ``False`` if it is none of these."""
        sought = call.owner
        if not isinstance(sought, RemoteCall):
            return False
        if sought.origin is not None:
            at_a_node = sought.is_call and sought.error_kind is None
            self._release(sought)
            if at_a_node and self.remote_nodes is not None:
                self.remote_nodes.cancel(sought)
        return True

    def _cancel_notification(self, notification: Any) -> None:
        self.cancel(notification)

    # What comes of it.

    def call_completed(self, call: RemoteCall, result: Reply | RpcError) -> None:
        """A node has answered, or the deadline has come."""
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
        """A node did not pass a call on."""
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
        """It is over: leave nothing of it, and return whose it was."""
        asker, call.origin = call.origin, None
        assert asker is not None
        self._count -= 1
        self._pending.reserve(-1)
        if call.error_kind is not None:
            self._deadlines.discard(call)
        if call.waiting_for is not None:
            call.waiting_for.cancel()
        return asker

    def _fail(self, call: RemoteCall, error: RpcError) -> None:
        asker = self._release(call)
        if error.kind in _LOCATION_UNCERTAIN and call.location is not None:
            self._locations.expire(call.location)
        if call.is_call:
            self._failures.record(error)
        self._complete(asker, error)

    def _complete(self, call: Call, result: Reply | RpcError) -> None:
        try:
            call.complete(result)
        except Exception:  # noqa: BLE001 - it is no concern of who answered
            self._log.failure("The outcome of a call could not be told")

    # The search.

    def _start(self, call: RemoteCall) -> None:
        self._reserve(call)
        self._start_deadline(call)
        Deferred.fromCoroutine(self._deliver(call, None))

    def _retry(self, call: RemoteCall, reason: FailureReason) -> None:
        self._start_deadline(call)
        Deferred.fromCoroutine(self._deliver(call, reason))

    def _start_deadline(self, call: RemoteCall) -> None:
        """Look after the deadline, since no node does."""
        if call.origin is None:
            raise _EndedError
        call.error_kind = ErrorKind.REGISTRY_UNAVAILABLE
        self._deadlines.start(call, None, call.client_id, max(0.0, call.deadline - self._seconds()))
        self._deadlines.mark_sent(call)

    async def _deliver(self, call: RemoteCall, reason: FailureReason | None) -> None:
        """Until a node has it, or it is over; ``reason`` is why that failed where it was asked last. Does not fail."""
        try:
            while True:
                if reason is not None:
                    assert call.location is not None
                    self._retry_policy.attempt_failed(call.location, reason, repeated=reason in call.failures)
                    call.failures += (reason,)
                if await self._try_local(call):
                    return
                if reason is None and (arrival := self._handoffs.wait(call.client_id)) is not None:
                    await self._wait_for(call, arrival, ErrorKind.NOT_CONNECTED)
                location, stale = await self._retry_policy.next_location(
                    call.client_id, call.deadline, call.location, reason, partial(self._wait_for, call)
                )
                # Meanwhile it may have come here.
                if await self._try_local(call):
                    return
                if location is None:
                    raise self._not_connected_error(call.client_id)
                call.location = location
                reach = self._call_remote if call.is_call else self._notify_remote
                reason = await reach(call, location, stale)
                if reason is None:
                    return
        except _EndedError:
            return
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            error = self._failures.to_rpc_error(e, call.client_id)
            if call.origin is not None:
                self._fail(call, error)

    async def _wait_for(self, call: RemoteCall, deferred: Deferred[T], error_kind: ErrorKind | None) -> T:
        """Wait for something; ``late`` is what the message fails with if its deadline comes first."""
        call.error_kind = error_kind
        call.waiting_for = deferred
        try:
            return await deferred
        finally:
            call.waiting_for = None
            if call.origin is None:
                raise _EndedError

    async def _try_local(self, call: RemoteCall) -> bool:
        """Reach a client that has come here, or whose claim is under way, once that is known."""
        edge = self._local.sessions
        while True:
            generation = edge.generation(call.client_id)
            if generation and self._ownership_uncertain() and not await self._is_still_local(call, generation):
                return False
            if generation and (self._call_local if call.is_call else self._notify_local)(call, generation):
                return True
            opening = edge.claim_in_progress(call.client_id)
            if opening is None:
                return False
            await self._wait_for(call, opening, ErrorKind.NOT_CONNECTED)

    async def _is_still_local(self, call: RemoteCall, generation: int) -> bool:
        """Whether the registry knows of no newer claim of a client that is here, or cannot tell."""
        looking = self._locations.find(call.client_id, fresh=True)
        left = max(0.0, call.deadline - self._seconds())
        looking.addTimeout(min(FALLBACK_TIMEOUT, left / 2), self._clock)
        try:
            found = await self._wait_for(call, looking, ErrorKind.REGISTRY_UNAVAILABLE)
        except (RegistryUnavailableError, TimeoutError):
            return True
        return found is None or found.generation <= generation

    def _not_connected_error(self, client_id: str) -> RpcError:
        leaving = (client_id, self._local.sessions.generation(client_id)) in self._local.goaway_sessions
        return RpcError(ErrorKind.NOT_CONNECTED, client_id, detail=GOAWAY_DETAIL if leaving else None)

    def _call_local(self, call: RemoteCall, generation: int) -> bool:
        asker = call.origin
        assert asker is not None
        left = max(0.0, call.deadline - self._seconds())
        # It takes its own place.
        self._pending.reserve(-1)
        asked = False
        try:
            asked = self._local.call(asker, (call.client_id, generation), call.method, call.params, left)
        finally:
            self._pending.reserve(1)
            if not asked:
                asker.owner = call
        if asked:
            self._release(call)
        return asked

    def _notify_local(self, call: RemoteCall, generation: int) -> bool:
        payload = encode_notification(call.method, call.params)
        if not self._local.notify(call.client_id, payload, generation):
            return False
        self._complete(self._release(call), _NULL_REPLY)
        return True

    async def _call_remote(self, call: RemoteCall, location: Location, stale: bool) -> FailureReason | None:
        elsewhere = self.remote_nodes
        if elsewhere is None:
            return FailureReason.UNREACHABLE
        try:
            await self._wait_for(call, elsewhere.connect(location), ErrorKind.NODE_UNREACHABLE)
        except RpcError as e:
            return _reason_or_raise(e)
        left = self._hand_over_deadline(call)
        if _try_call(elsewhere, call, location, left, stale):
            return None
        # The link is gone again, or stuck.
        self._start_deadline(call)
        return FailureReason.UNREACHABLE

    async def _notify_remote(self, call: RemoteCall, location: Location, stale: bool) -> FailureReason | None:
        elsewhere = self.remote_nodes
        if elsewhere is None:
            return FailureReason.UNREACHABLE
        left = self._hand_over_deadline(call)
        telling = elsewhere.notify(location, call.method, call.params, left, stale=stale)
        try:
            await self._wait_for(call, telling, None)
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
        """From now on the node looks after the deadline; returns the seconds that are left."""
        left = call.deadline - self._seconds()
        if left <= 0:
            raise RpcError(ErrorKind.NODE_UNREACHABLE, call.client_id, sent=False)
        self._deadlines.discard(call)
        call.error_kind = None
        return left


def _try_call(remote_nodes: IRemoteNodes, call: RemoteCall, location: Location, timeout: float, stale: bool) -> bool:
    """Ask, if that is possible at the moment. Raises ``RpcError``."""
    try:
        return remote_nodes.try_call(call, location, call.method, call.params, timeout, stale=stale)
    except RpcError as e:
        _reason_or_raise(e)
        return False


def _reason_or_raise(error: RpcError) -> FailureReason:
    """Raise an error, unless it says that nothing reached the node."""
    if error.kind is ErrorKind.NODE_UNREACHABLE and not error.sent:
        return FailureReason.UNREACHABLE
    raise error
