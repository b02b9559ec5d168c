"""Calls that await their response: under UUIDs, with a deadline each.

Whoever sends a request asks here for an id; the response, if it comes from whom was asked, finds the call by that id.
A call is a Deferred, or a smaller object that is told of its outcome. Deadlines are kept on a wheel of coarse ticks:
one timer for all of them, and none while nothing is awaited.
"""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Callable, Hashable, Iterator
from math import ceil, floor
from os import urandom
from struct import Struct
from typing import Any, TypeAlias

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.rpc.errors import NotDelivered


# It is made in an eighth of the time of an attrs class, and is nothing for the garbage collector to look at.
class Reply(msgspec.Struct, frozen=True, gc=False):
    """What a client answered: the bytes of ``result`` or of ``error``, as they came; one of them is ``None``."""

    result: bytes | None
    error: bytes | None


#: of a tick: what float arithmetic may be wrong by without pushing a deadline into another tick
_TOLERANCE = 1e-6

#: random bytes -> those that carry a UUID's version, and its variant
_VERSION = bytes(0x40 | byte & 0x0F for byte in range(256))
_VARIANT = bytes(0x80 | byte & 0x3F for byte in range(256))
_GROUPS = Struct("8s4s4s4s12s")


def random_uuids() -> Iterator[str]:
    """UUIDs of version 4 (RFC 9562, section 5.4) without end, from the system's random bytes."""
    for id in _random_ids():
        yield id[1:-1].decode("ascii")


def _random_ids() -> Iterator[bytes]:
    """The same as raw JSON strings. As 256 are made at a time, one takes a fifth of the time of ``uuid.uuid4()``."""
    while True:
        random = bytearray(urandom(4096))
        random[6::16] = random[6::16].translate(_VERSION)
        random[8::16] = random[8::16].translate(_VARIANT)
        for groups in _GROUPS.iter_unpack(hexlify(random)):
            yield b'"%b-%b-%b-%b-%b"' % groups


class _NotSent:
    """Where a call keeps its outcome that is not to be told yet, since its request has not left."""


NOT_SENT = _NotSent()


class Call:
    """A call in flight, for those who need no Deferred: one with a callback, fired, takes ten times as long as this."""

    __slots__ = ("_owner_calls", "_slot", "_slot_calls", "client_id", "early_result", "id", "owner")

    #: its UUID as a raw JSON string
    id: bytes
    owner: Hashable
    client_id: str
    #: ``NOT_SENT``, or what it came to before its request had left
    early_result: _NotSent | Reply | RpcError | None
    #: the calls in flight of the same owner, and those that are over at the same tick, itself among them
    _owner_calls: _Calls
    _slot_calls: _Calls
    _slot: int

    def complete(self, result: Reply | RpcError) -> None:
        """It is over; said once, unless it is forgotten first. What this raises is logged."""
        raise NotImplementedError

    def not_delivered(self, reason: NotDelivered) -> None:
        """Handle that the node which was sent this call did not pass it on; it is no longer pending there."""
        raise NotImplementedError


class DeferredCall(Call, Deferred[Reply]):
    """A call in flight as a Deferred, which fails with ``RpcError``."""

    def complete(self, result: Reply | RpcError) -> None:
        """Fire it."""
        if isinstance(result, RpcError):
            self.errback(result)
        else:
            self.callback(result)


_Calls: TypeAlias = dict[bytes, Call]


class PendingCalls:
    """The calls in flight, each asked of an *owner* (a connection), for a client.

    ``max_calls`` is the most in all and ``max_per_owner`` the most per owner; ``tick`` is in seconds: a deadline is
    never early and at most so much late. ``failed`` is told of each error before the call is settled with it.
    """

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        *,
        max_calls: int,
        max_per_owner: int,
        tick: float = 0.05,
        on_failure: Callable[[RpcError], None] | None = None,
    ) -> None:
        self._clock = clock
        self._seconds = clock.seconds
        self._max_calls = max_calls
        self._max_per_owner = max_per_owner
        self._tick = tick
        self._on_failure = on_failure
        self._ids = _random_ids()
        self._calls: _Calls = {}
        self._owners: dict[Hashable, _Calls] = {}
        #: number of the tick at which they are over -> calls; no slot is ever empty
        self._slots: dict[int, _Calls] = {}
        self._timer: IDelayedCall | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def has_room(self) -> bool:
        """Whether one more call can be awaited."""
        return len(self._calls) < self._max_calls

    def reserve(self, count: int) -> None:
        """Count so many calls more (or fewer, if that is negative) that are awaited elsewhere among the most in all."""
        self._max_calls -= count

    def in_flight(self, owner: Hashable) -> int:
        """How many calls await a response from ``owner``."""
        return len(self._owners.get(owner, ()))

    def add(self, owner: Hashable, client_id: str, timeout: float) -> tuple[bytes, DeferredCall]:
        """The same as :meth:`start` and :meth:`sent`, with a Deferred, and its id. Cancelling it forgets the call."""
        call = DeferredCall(self.discard)
        id = self.start(call, owner, client_id, timeout)
        self.mark_sent(call)
        return id, call

    def start(self, call: Call, owner: Hashable, client_id: str, timeout: float) -> bytes:
        """Await a response from ``owner`` for ``timeout`` seconds, under the id that is returned: a UUID, as a raw
        JSON string.

        The call is settled with ``RpcError`` (``TIMEOUT``) at the deadline. Whatever it comes to is kept back until
        :meth:`sent`. Raises ``RpcError`` (``TOO_MANY_CALLS``).
        """
        if len(self._calls) >= self._max_calls:
            raise RpcError(ErrorKind.TOO_MANY_CALLS, client_id, detail="too many calls in flight on this node")
        siblings = self._owners.get(owner)
        if siblings is None:
            siblings = self._owners[owner] = {}
        elif len(siblings) >= self._max_per_owner:
            raise RpcError(ErrorKind.TOO_MANY_CALLS, client_id)
        slot = ceil((self._seconds() + timeout) / self._tick - _TOLERANCE)
        contemporaries = self._slots.get(slot)
        if contemporaries is None:
            contemporaries = self._slots[slot] = {}
        call.id = id = next(self._ids)
        call.owner = owner
        call.client_id = client_id
        call.early_result = NOT_SENT
        call._owner_calls = siblings
        call._slot_calls = contemporaries
        call._slot = slot
        self._calls[id] = siblings[id] = contemporaries[id] = call
        if self._timer is None:
            self._schedule_tick()
        return id

    def mark_sent(self, call: Call) -> None:
        """The request of a call has left. What it came to meanwhile is told now."""
        early, call.early_result = call.early_result, None
        if isinstance(early, Reply):
            self._complete(call, early)
        elif isinstance(early, RpcError):
            self._complete_with_error(call, early)

    def resolve(self, owner: Hashable, id: bytes, reply: Reply) -> bool:
        """Settle a call. ``False`` when it is unknown, over, or was asked of another owner."""
        call = self._calls.get(id)
        if call is None or call.owner != owner:
            return False
        self.discard(call)
        if call.early_result is not None:
            call.early_result = reply
            return True
        # _settle(), written out.
        try:
            call.complete(reply)
        except Exception:  # noqa: BLE001 - it is no concern of who answered
            self._log.failure("The outcome of a call could not be told")
        return True

    def fail(self, owner: Hashable, id: bytes, error: RpcError) -> bool:
        """The same with an error."""
        call = self._calls.get(id)
        if call is None or call.owner != owner:
            return False
        self.discard(call)
        if call.early_result is None:
            self._complete_with_error(call, error)
        else:
            call.early_result = error
        return True

    def fail_owner(self, owner: Hashable, error_for: Callable[[str], RpcError]) -> int:
        """Fail everything that awaits a response from ``owner``, each with the error made for its client's id.

        Returns how many there were.
        """
        calls = list(self._owners.get(owner, {}).values())
        return sum(self.fail(owner, call.id, error_for(call.client_id)) for call in calls)

    def discard(self, call: Any) -> None:
        """Await a call no longer, if it still is awaited. Also the canceller of those that are Deferreds."""
        id = call.id
        if self._calls.pop(id, None) is None:
            return
        siblings = call._owner_calls
        del siblings[id]
        if not siblings:
            del self._owners[call.owner]
        contemporaries = call._slot_calls
        del contemporaries[id]
        if not contemporaries:
            del self._slots[call._slot]
        if not self._calls and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _complete_with_error(self, call: Call, error: RpcError) -> None:
        if self._on_failure is not None:
            self._on_failure(error)
        self._complete(call, error)

    def _complete(self, call: Call, result: Reply | RpcError) -> None:
        try:
            call.complete(result)
        except Exception:  # noqa: BLE001 - it is no concern of who answered, or of the next call
            self._log.failure("The outcome of a call could not be told")

    def _schedule_tick(self) -> None:
        """Set the timer for the next tick."""
        now = self._clock.seconds()
        ticks = floor(now / self._tick + _TOLERANCE) + 1
        self._timer = self._clock.callLater(max(0.0, ticks * self._tick - now), self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = floor(self._clock.seconds() / self._tick + _TOLERANCE)
        for slot in [slot for slot in self._slots if slot <= now]:
            # What a failure sets off may end, or begin, other calls.
            for call in list(self._slots.get(slot, {}).values()):
                self.fail(call.owner, call.id, RpcError(ErrorKind.TIMEOUT, call.client_id))
        if self._calls and self._timer is None:
            self._schedule_tick()
