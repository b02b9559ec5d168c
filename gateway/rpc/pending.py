"""Calls that await their response: Deferreds under UUIDs, and their deadlines.

Whoever sends a request asks here for an id and a Deferred; the response, if it comes from whom was asked, finds the
Deferred by that id. Deadlines are kept on a wheel of coarse ticks: one timer for all of them, and none while nothing
is awaited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from os import urandom

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from gateway.rpc.errors import Kind, RpcError
from gateway.rpc.interface import Reply

#: of a tick: what float arithmetic may be wrong by without pushing a deadline into another tick
_TOLERANCE = 1e-6


#: hexadecimal digit -> the one that carries its two low bits in a UUID's variant field
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def random_uuids() -> Iterator[str]:
    """UUIDs of version 4 (RFC 9562, section 5.4) without end, from the system's random bytes; these are fetched for
    256 at a time, since the system call costs more than all the rest."""
    while True:
        digits = urandom(4096).hex()
        for at in range(0, len(digits), 32):
            d = digits[at : at + 32]
            yield f"{d[:8]}-{d[8:12]}-4{d[13:16]}-{_VARIANT[d[16]]}{d[17:20]}-{d[20:]}"


class _Call(Deferred[Reply]):
    """A call in flight."""

    uuid: str
    owner: Hashable
    client_id: str
    slot: int


class Pending:
    """The calls in flight, each asked of an *owner* (a connection), for a client.

    ``max_calls`` is the most in all and ``max_per_owner`` the most per owner; ``tick`` is in seconds: a deadline is
    never early and at most so much late.
    """

    def __init__(self, clock: IReactorTime, *, max_calls: int, max_per_owner: int, tick: float = 0.05) -> None:
        self._clock = clock
        self._max_calls = max_calls
        self._max_per_owner = max_per_owner
        self._tick = tick
        self._uuids = random_uuids()
        self._calls: dict[str, _Call] = {}
        self._owners: dict[Hashable, dict[str, _Call]] = {}
        #: number of the tick at which they are over -> calls; no slot is ever empty
        self._slots: dict[int, dict[str, _Call]] = {}
        self._timer: IDelayedCall | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def in_flight(self, owner: Hashable) -> int:
        """How many calls await a response from ``owner``."""
        return len(self._owners.get(owner, ()))

    def add(self, owner: Hashable, client_id: str, timeout: float) -> tuple[str, Deferred[Reply]]:
        """Await a response from ``owner`` for ``timeout`` seconds, under the UUID that is returned.

        The Deferred fails with ``RpcError`` (``TIMEOUT``) at the deadline. Cancelling it forgets the call. Raises
        ``RpcError`` (``TOO_MANY_CALLS``).
        """
        if len(self._calls) >= self._max_calls:
            raise RpcError(Kind.TOO_MANY_CALLS, client_id, detail="too many calls in flight on this node")
        of_owner = self._owners.get(owner)
        if of_owner is None:
            of_owner = self._owners[owner] = {}
        elif len(of_owner) >= self._max_per_owner:
            raise RpcError(Kind.TOO_MANY_CALLS, client_id)
        call = _Call(self._forget)
        call.uuid = uuid = next(self._uuids)
        call.owner = owner
        call.client_id = client_id
        deadline = (self._clock.seconds() + timeout) / self._tick
        call.slot = slot = math.ceil(deadline - _TOLERANCE)
        self._calls[uuid] = of_owner[uuid] = call
        in_slot = self._slots.get(slot)
        if in_slot is None:
            self._slots[slot] = {uuid: call}
        else:
            in_slot[uuid] = call
        if self._timer is None:
            self._wait()
        return uuid, call

    def resolve(self, owner: Hashable, uuid: str, reply: Reply) -> bool:
        """Fire a call's Deferred. ``False`` when it is unknown, over, or was asked of another owner."""
        call = self._calls.get(uuid)
        if call is None or call.owner != owner:
            return False
        self._forget(call)
        call.callback(reply)
        return True

    def fail(self, owner: Hashable, uuid: str, error: RpcError) -> bool:
        """Fail a call's Deferred. ``False`` when it is unknown, over, or was asked of another owner."""
        call = self._calls.get(uuid)
        if call is None or call.owner != owner:
            return False
        self._forget(call)
        call.errback(error)
        return True

    def fail_owner(self, owner: Hashable, error_for: Callable[[str], RpcError]) -> int:
        """Fail everything that awaits a response from ``owner``, each with the error made for its client's id.

        Returns how many there were.
        """
        calls = list(self._owners.get(owner, {}).values())
        return sum(self.fail(owner, call.uuid, error_for(call.client_id)) for call in calls)

    def _forget(self, call: Deferred[Reply]) -> None:
        # Also the canceller of its Deferreds: Twisted fails the Deferred itself then.
        assert isinstance(call, _Call)
        uuid = call.uuid
        del self._calls[uuid]
        of_owner = self._owners[call.owner]
        del of_owner[uuid]
        if not of_owner:
            del self._owners[call.owner]
        in_slot = self._slots[call.slot]
        del in_slot[uuid]
        if not in_slot:
            del self._slots[call.slot]
        if not self._calls and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        """Set the timer for the next tick."""
        now = self._clock.seconds()
        ticks = math.floor(now / self._tick + _TOLERANCE) + 1
        self._timer = self._clock.callLater(max(0.0, ticks * self._tick - now), self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = math.floor(self._clock.seconds() / self._tick + _TOLERANCE)
        for slot in [slot for slot in self._slots if slot <= now]:
            # What a failure sets off may end, or begin, other calls.
            for call in list(self._slots.get(slot, {}).values()):
                self.fail(call.owner, call.uuid, RpcError(Kind.TIMEOUT, call.client_id))
        if self._calls and self._timer is None:
            self._wait()
