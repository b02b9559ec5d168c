"""Which node is to be asked for a client, and which next if that one did not pass a message on.

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
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime

from gateway.registry.interface import Location, RegistryUnavailable
from gateway.rpc.errors import Kind, RpcError
from gateway.rpc.locations import PATIENCE, Locations

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
