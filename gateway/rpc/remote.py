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
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from gateway.metrics import Metrics
from gateway.protocol.errors import Kind, RpcError
from gateway.protocol.jsonrpc import encode_notification
from gateway.registry.interface import Location, RegistryUnavailable
from gateway.rpc.handoff import Departing
from gateway.rpc.interface import IElsewhere, Miss, Missed
from gateway.rpc.local import ANY_ID, Local, Outcomes
from gateway.rpc.location_cache import PATIENCE, Locations
from gateway.rpc.pending import Call, Pending, Reply


class Sought(Call):
    """A call to a client that is not here, and what is needed to ask for it again; ``asker`` is whose call it is."""

    __slots__ = ("asker", "deadline", "failed", "late", "location", "method", "params", "seeking", "waiting")

    is_call = True
    #: ``None`` once it is over
    asker: Call | None
    #: where it was asked last
    location: Location | None
    #: while it is sought: what it fails with at its deadline; ``None`` while a node has it
    late: Kind | None
    #: what it waits for meanwhile
    waiting: Deferred[Any] | None

    def __init__(
        self, seeking: Seeking, asker: Call, client_id: str, method: str, params: bytes | None, deadline: float
    ) -> None:
        self.seeking = seeking
        self.asker = asker
        self.client_id = client_id
        self.method = method
        self.params = params
        self.deadline = deadline
        self.location = self.late = self.waiting = None
        self.failed: tuple[Reason, ...] = ()
        asker.owner = self

    def settle(self, outcome: Reply | RpcError) -> None:
        """See :meth:`Call.settle`."""
        self.seeking.settled(self, outcome)


class SoughtNotification(Sought):
    """The same for a notification."""

    __slots__ = ()

    is_call = False


class DeferredNotification(Call, Deferred[None]):
    """A notification on its way, as a Deferred which fails with ``RpcError``."""

    def settle(self, outcome: Reply | RpcError) -> None:
        """Fire it."""
        if isinstance(outcome, RpcError):
            self.errback(outcome)
        else:
            self.callback(None)


T = TypeVar("T")


class Reason(enum.Enum):
    """Why a node did not pass a message on."""

    NOT_HERE = "not here"
    LEASE_LOST = "lease lost"
    UNREACHABLE = "unreachable"


class Wait(Protocol):
    """Waits for something until the deadline of a message, which fails with an error of that kind if it is late."""

    def __call__(self, deferred: Deferred[T], late: Kind, /) -> Awaitable[T]: ...


class Routing:
    """The ways of messages that begin at this node.

    ``steady`` tells whether this node may call another dead whose lease has run out, ``has_lease`` whether its own
    lease holds.
    """

    def __init__(
        self,
        locations: Locations,
        clock: IReactorTime,
        *,
        node_id: str,
        steady: Callable[[], bool],
        has_lease: Callable[[], bool],
    ) -> None:
        self._locations = locations
        self._clock = clock
        self._node_id = node_id
        self._steady = steady
        self._has_lease = has_lease

    def failed(self, location: Location, reason: Reason, *, again: bool) -> None:
        """A node did not pass a message on. Raises ``RpcError`` when that is so ``again``, for the same reason."""
        if reason is Reason.NOT_HERE:
            self._locations.missed(location)
        else:
            # While the registry is away there is nothing better.
            self._locations.doubt(location)
        if not again:
            return
        if reason is Reason.UNREACHABLE:
            raise self._unreachable(location)
        if reason is Reason.LEASE_LOST:
            raise _lease_lost(location)
        raise RpcError(Kind.NOT_CONNECTED, location.client_id)

    async def next(
        self, client_id: str, deadline: float, tried: Location | None, reason: Reason | None, wait: Wait
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
                return known, self._locations.away(now)
            otherwise = self._locations.older(client_id)
        elif reason is Reason.LEASE_LOST:
            otherwise = tried
        looking = self._locations.find(client_id, afresh=reason is not None)
        if otherwise is not None:
            looking.addTimeout(min(PATIENCE, max(0.0, deadline - now) / 2), self._clock)
        late = Kind.NODE_UNREACHABLE if reason is Reason.UNREACHABLE else Kind.REGISTRY_UNAVAILABLE
        try:
            found = await wait(looking, late)
        except (RegistryUnavailable, TimeoutError):
            if otherwise is not None:
                return otherwise, True
            raise RpcError(late, client_id, sent=False) from None
        if found is None or found.node_id == self._node_id:
            return None, False
        return self._judge(found, tried, reason)

    def _judge(self, found: Location, tried: Location | None, reason: Reason | None) -> tuple[Location | None, bool]:
        same = tried is not None and (found.node_id, found.generation) == (tried.node_id, tried.generation)
        if same and reason is Reason.LEASE_LOST:
            # A registry that does not take heartbeats is as good as away.
            away = not self._has_lease()
            if not found.live and not away and self._steady():
                raise _lease_lost(found)
            # After an outage no lease holds until each node has heartbeaten: what the registry still says is so.
            return found, away or not found.live
        if not found.live and self._steady():
            return None, False
        if same and reason is Reason.UNREACHABLE:
            raise self._unreachable(found)
        return found, False

    def _unreachable(self, location: Location) -> RpcError:
        if location.live:
            detail = f"node {location.node_name} cannot be reached"
            return RpcError(Kind.NODE_UNREACHABLE, location.client_id, sent=False, detail=detail)
        if self._steady():
            return RpcError(Kind.NOT_CONNECTED, location.client_id)
        detail = f"it cannot be told yet whether node {location.node_name}, which had the client, is still there"
        return RpcError(Kind.REGISTRY_UNAVAILABLE, location.client_id, detail=detail)


def _lease_lost(location: Location) -> RpcError:
    detail = f"node {location.node_name}, which had the client, could not renew its lease"
    return RpcError(Kind.REGISTRY_UNAVAILABLE, location.client_id, detail=detail)


#: what a notification came to that was handed over
_DONE = Reply(b"null", None)

#: why one is not connected that still has a connection
TOLD_TO_GO = "the client was told to connect to another node"

#: after these a client may be elsewhere
_DOUBTFUL = (Kind.CONNECTION_LOST, Kind.NODE_UNREACHABLE)


class _Over(Exception):
    """The message is settled, or forgotten."""


class Seeking:
    """The messages of one node to clients elsewhere. They count among the ``max_calls`` of ``pending``."""

    _log = Logger()

    elsewhere: IElsewhere | None = None
    #: nothing begins any more
    ending = False

    def __init__(
        self,
        *,
        local: Local,
        locations: Locations,
        departing: Departing,
        routing: Routing,
        pending: Pending,
        outcomes: Outcomes,
        clock: IReactorTime,
        metrics: Metrics,
        max_calls: int,
        doubtful: Callable[[], bool] = lambda: False,
    ) -> None:
        """``doubtful``: whether the registry is to be asked even for a client that is here."""
        self._doubtful = doubtful
        self._local = local
        self._locations = locations
        self._departing = departing
        self._routing = routing
        self._pending = pending
        self._outcomes = outcomes
        self._metrics = metrics
        self._clock = clock
        self._seconds = clock.seconds
        self._count = 0
        #: those that no node has at the moment, for their deadlines
        self._searches = Pending(clock, max_calls=max_calls, max_per_owner=max_calls)

    def __len__(self) -> int:
        return self._count

    # What begins here.

    def ask(self, asker: Call, client_id: str, method: str, params: bytes | None, timeout: float) -> bool:
        """Ask a client elsewhere, if that is possible at once; ``False`` if not, and nothing was done. Raises
        ``RpcError``."""
        elsewhere = self.elsewhere
        if elsewhere is None:
            return False
        now = self._seconds()
        location = self._locations.get(client_id, now)
        if location is None:
            return False
        try:
            self._local.check(client_id, method, params, ANY_ID)
            self._check_room(client_id)
            sought = Sought(self, asker, client_id, method, params, now + timeout)
            sought.location = location
            self._take(sought)
            asked = False
            try:
                asked = _ask(elsewhere, sought, location, timeout, self._locations.away(now))
            finally:
                if not asked and sought.asker is not None:
                    self._release(sought)
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            self._metrics.calls += 1
            raise self._outcomes.call_failed(e, client_id) from None
        if asked:
            self._metrics.calls += 1
        return asked

    def seek(self, asker: Call, client_id: str, method: str, params: bytes | None, timeout: float) -> None:
        """Ask a client wherever it is; ``asker`` will be settled. Raises ``RpcError``."""
        self._metrics.calls += 1
        try:
            self._local.check(client_id, method, params, ANY_ID)
            self._check_room(client_id)
        except RpcError as e:
            self._outcomes.failed(e)
            raise
        self._begin(Sought(self, asker, client_id, method, params, self._seconds() + timeout))

    def notify(self, client_id: str, method: str, params: bytes | None, timeout: float) -> Deferred[None]:
        """Tell a client wherever it is; fires when its transport has the message. Raises ``RpcError``, and fails with
        it alone."""
        self._local.check(client_id, method, params)
        self._check_room(client_id)
        asker = DeferredNotification(self._cancelled)
        self._begin(SoughtNotification(self, asker, client_id, method, params, self._seconds() + timeout))
        return asker

    def forget(self, asker: Any) -> bool:
        """Give up what was asked, here and where it is; ``False`` if it is none of these."""
        sought = asker.owner
        if not isinstance(sought, Sought):
            return False
        if sought.asker is not None:
            at_a_node = sought.is_call and sought.late is None
            self._release(sought)
            if at_a_node and self.elsewhere is not None:
                self.elsewhere.forget(sought)
        return True

    def _cancelled(self, asker: Any) -> None:
        self.forget(asker)

    # What comes of it.

    def settled(self, sought: Sought, outcome: Reply | RpcError) -> None:
        """A node has answered, or the deadline has come."""
        if sought.asker is None:
            return
        if isinstance(outcome, Reply):
            self._metrics.calls_answered += 1
            self._settle(self._release(sought), outcome)
        elif sought.late is not None:
            self._fail(sought, RpcError(sought.late, sought.client_id, sent=False))
        elif outcome.kind is Kind.NODE_UNREACHABLE and not outcome.sent:
            self._again(sought, Reason.UNREACHABLE)
        else:
            self._fail(sought, outcome)

    def missed(self, call: Call, miss: Miss) -> None:
        """A node did not pass a call on."""
        if isinstance(call, Sought) and call.asker is not None and call.late is None:
            self._again(call, Reason[miss.name])

    def _check_room(self, client_id: str) -> None:
        if self.ending:
            raise RpcError(Kind.NODE_UNREACHABLE, client_id, sent=False, detail="this node is going away: ask another")
        if not self._pending.has_room():
            raise RpcError(Kind.TOO_MANY_CALLS, client_id, detail="too many calls in flight on this node")

    def _take(self, sought: Sought) -> None:
        self._count += 1
        self._pending.set_aside(1)

    def _release(self, sought: Sought) -> Call:
        """It is over: leave nothing of it, and return whose it was."""
        asker, sought.asker = sought.asker, None
        assert asker is not None
        self._count -= 1
        self._pending.set_aside(-1)
        if sought.late is not None:
            self._searches.forget(sought)
        if sought.waiting is not None:
            sought.waiting.cancel()
        return asker

    def _fail(self, sought: Sought, error: RpcError) -> None:
        asker = self._release(sought)
        if error.kind in _DOUBTFUL and sought.location is not None:
            self._locations.doubt(sought.location)
        if sought.is_call:
            self._outcomes.failed(error)
        self._settle(asker, error)

    def _settle(self, asker: Call, outcome: Reply | RpcError) -> None:
        try:
            asker.settle(outcome)
        except Exception:  # noqa: BLE001 - it is no concern of who answered
            self._log.failure("The outcome of a call could not be told")

    # The search.

    def _begin(self, sought: Sought) -> None:
        self._take(sought)
        self._watch(sought)
        Deferred.fromCoroutine(self._search(sought, None))

    def _again(self, sought: Sought, reason: Reason) -> None:
        self._watch(sought)
        Deferred.fromCoroutine(self._search(sought, reason))

    def _watch(self, sought: Sought) -> None:
        """Look after the deadline, since no node does."""
        if sought.asker is None:
            raise _Over
        sought.late = Kind.REGISTRY_UNAVAILABLE
        self._searches.start(sought, None, sought.client_id, max(0.0, sought.deadline - self._seconds()))
        self._searches.sent(sought)

    async def _search(self, sought: Sought, reason: Reason | None) -> None:
        """Until a node has it, or it is over; ``reason`` is why that failed where it was asked last. Does not fail."""
        try:
            while True:
                if reason is not None:
                    assert sought.location is not None
                    self._routing.failed(sought.location, reason, again=reason in sought.failed)
                    sought.failed += (reason,)
                if await self._reach_here(sought):
                    return
                if reason is None and (arrival := self._departing.wait(sought.client_id)) is not None:
                    await self._wait(sought, arrival, Kind.NOT_CONNECTED)
                location, stale = await self._routing.next(
                    sought.client_id, sought.deadline, sought.location, reason, partial(self._wait, sought)
                )
                # Meanwhile it may have come here.
                if await self._reach_here(sought):
                    return
                if location is None:
                    raise self._nowhere(sought.client_id)
                sought.location = location
                reach = self._ask_there if sought.is_call else self._notify_there
                reason = await reach(sought, location, stale)
                if reason is None:
                    return
        except _Over:
            return
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            error = self._outcomes.error_of(e, sought.client_id)
            if sought.asker is not None:
                self._fail(sought, error)

    async def _wait(self, sought: Sought, deferred: Deferred[T], late: Kind | None) -> T:
        """Wait for something; ``late`` is what the message fails with if its deadline comes first."""
        sought.late = late
        sought.waiting = deferred
        try:
            return await deferred
        finally:
            sought.waiting = None
            if sought.asker is None:
                raise _Over

    async def _reach_here(self, sought: Sought) -> bool:
        """Reach a client that has come here, or whose claim is under way, once that is known."""
        edge = self._local.edge
        while True:
            generation = edge.generation(sought.client_id)
            if generation and self._doubtful() and not await self._is_still_here(sought, generation):
                return False
            if generation and (self._ask_here if sought.is_call else self._notify_here)(sought, generation):
                return True
            opening = edge.opening(sought.client_id)
            if opening is None:
                return False
            await self._wait(sought, opening, Kind.NOT_CONNECTED)

    async def _is_still_here(self, sought: Sought, generation: int) -> bool:
        """Whether the registry knows of no newer claim of a client that is here, or cannot tell."""
        looking = self._locations.find(sought.client_id, afresh=True)
        left = max(0.0, sought.deadline - self._seconds())
        looking.addTimeout(min(PATIENCE, left / 2), self._clock)
        try:
            found = await self._wait(sought, looking, Kind.REGISTRY_UNAVAILABLE)
        except (RegistryUnavailable, TimeoutError):
            return True
        return found is None or found.generation <= generation

    def _nowhere(self, client_id: str) -> RpcError:
        leaving = (client_id, self._local.edge.generation(client_id)) in self._local.leaving
        return RpcError(Kind.NOT_CONNECTED, client_id, detail=TOLD_TO_GO if leaving else None)

    def _ask_here(self, sought: Sought, generation: int) -> bool:
        asker = sought.asker
        assert asker is not None
        left = max(0.0, sought.deadline - self._seconds())
        # It takes its own place.
        self._pending.set_aside(-1)
        asked = False
        try:
            asked = self._local.ask(asker, (sought.client_id, generation), sought.method, sought.params, left)
        finally:
            self._pending.set_aside(1)
            if not asked:
                asker.owner = sought
        if asked:
            self._release(sought)
        return asked

    def _notify_here(self, sought: Sought, generation: int) -> bool:
        payload = encode_notification(sought.method, sought.params)
        if not self._local.notify(sought.client_id, payload, generation):
            return False
        self._settle(self._release(sought), _DONE)
        return True

    async def _ask_there(self, sought: Sought, location: Location, stale: bool) -> Reason | None:
        elsewhere = self.elsewhere
        if elsewhere is None:
            return Reason.UNREACHABLE
        try:
            await self._wait(sought, elsewhere.connect(location), Kind.NODE_UNREACHABLE)
        except RpcError as e:
            return _unreachable(e)
        left = self._leave_to_a_node(sought)
        if _ask(elsewhere, sought, location, left, stale):
            return None
        # The link is gone again, or stuck.
        self._watch(sought)
        return Reason.UNREACHABLE

    async def _notify_there(self, sought: Sought, location: Location, stale: bool) -> Reason | None:
        elsewhere = self.elsewhere
        if elsewhere is None:
            return Reason.UNREACHABLE
        left = self._leave_to_a_node(sought)
        telling = elsewhere.notify(location, sought.method, sought.params, left, stale=stale)
        try:
            await self._wait(sought, telling, None)
        except Missed as e:
            reason = Reason[e.miss.name]
        except RpcError as e:
            reason = _unreachable(e)
        else:
            self._settle(self._release(sought), _DONE)
            return None
        self._watch(sought)
        return reason

    def _leave_to_a_node(self, sought: Sought) -> float:
        """From now on the node looks after the deadline; returns the seconds that are left."""
        left = sought.deadline - self._seconds()
        if left <= 0:
            raise RpcError(Kind.NODE_UNREACHABLE, sought.client_id, sent=False)
        self._searches.forget(sought)
        sought.late = None
        return left


def _ask(elsewhere: IElsewhere, sought: Sought, location: Location, timeout: float, stale: bool) -> bool:
    """Ask, if that is possible at the moment. Raises ``RpcError``."""
    try:
        return elsewhere.ask(sought, location, sought.method, sought.params, timeout, stale=stale)
    except RpcError as e:
        _unreachable(e)
        return False


def _unreachable(error: RpcError) -> Reason:
    """Raise an error, unless it says that nothing reached the node."""
    if error.kind is Kind.NODE_UNREACHABLE and not error.sent:
        return Reason.UNREACHABLE
    raise error
