"""Pending calls: requests that await their response, by UUID, with a deadline each.

A request is sent under an id from here; a response finds the call by that id, if it comes from the owner that was
called. A call is a Deferred, or a smaller object with a method for its result. Deadlines are kept on a timer wheel of
coarse ticks: one reactor timer for all of them, and none while no call is pending.
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


# Takes an eighth of the time of an attrs class to create, and is not tracked by the garbage collector.
class Reply(msgspec.Struct, frozen=True, gc=False):
    """A client's response: the raw JSON of ``result`` or of ``error``; the other one is ``None``."""

    result: bytes | None
    error: bytes | None


#: in ticks: the float error that must not move a deadline to another tick
_TOLERANCE = 1e-6

#: translate a random byte into one with the version, or the variant, of a UUID
_VERSION = bytes(0x40 | byte & 0x0F for byte in range(256))
_VARIANT = bytes(0x80 | byte & 0x3F for byte in range(256))
_GROUPS = Struct("8s4s4s4s12s")


def random_uuids() -> Iterator[str]:
    """Generate UUIDs of version 4 (RFC 9562, section 5.4) from the system's random bytes."""
    for id in _random_ids():
        yield id[1:-1].decode("ascii")


def _random_ids() -> Iterator[bytes]:
    """Generate the same as raw JSON strings. 256 are made at a time, so that one takes a fifth of the time of
    ``uuid.uuid4()``."""
    while True:
        random = bytearray(urandom(4096))
        random[6::16] = random[6::16].translate(_VERSION)
        random[8::16] = random[8::16].translate(_VARIANT)
        for groups in _GROUPS.iter_unpack(hexlify(random)):
            yield b'"%b-%b-%b-%b-%b"' % groups


class _NotSent:
    """Type of ``NOT_SENT``, the early result of a call whose request has not been sent yet."""


NOT_SENT = _NotSent()


class Call:
    """Call in flight, for callers that need no Deferred: a Deferred with a callback takes ten times as long."""

    __slots__ = ("_owner_calls", "_slot", "_slot_calls", "client_id", "early_result", "id", "owner")

    #: its UUID as a raw JSON string
    id: bytes
    owner: Hashable
    client_id: str
    #: ``NOT_SENT``; the result received before the request was marked as sent; ``None`` after that
    early_result: _NotSent | Reply | RpcError | None
    #: calls in flight of the same owner, and calls with the same deadline tick, both including this one
    _owner_calls: _Calls
    _slot_calls: _Calls
    _slot: int

    def complete(self, result: Reply | RpcError) -> None:
        """Handle the result. Called once, unless the call is discarded first. Exceptions are logged."""
        raise NotImplementedError

    def not_delivered(self, reason: NotDelivered) -> None:
        """Handle that the node which was sent this call did not pass it on; it is no longer pending there."""
        raise NotImplementedError


class DeferredCall(Call, Deferred[Reply]):
    """Call in flight as a Deferred, which fails with ``RpcError``."""

    def complete(self, result: Reply | RpcError) -> None:
        if isinstance(result, RpcError):
            self.errback(result)
        else:
            self.callback(result)


_Calls: TypeAlias = dict[bytes, Call]


class PendingCalls:
    """Calls in flight, each to an *owner* (a connection) for a client.

    ``max_calls`` limits all calls and ``max_per_owner`` those of one owner. ``tick`` is in seconds: a deadline is never
    early and at most one tick late. ``on_failure`` is called with each error before the call is completed with it.
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
        owner_full_detail: str | None = None,
    ) -> None:
        #: the detail of the error if there are too many calls in all
        self.full_detail = f"too many calls in flight on this node (--max-calls {max_calls})"
        self._owner_full_detail = owner_full_detail
        self._clock = clock
        self._seconds = clock.seconds
        self._max_calls = max_calls
        self._max_per_owner = max_per_owner
        self._tick = tick
        self._on_failure = on_failure
        self._ids = _random_ids()
        self._calls: _Calls = {}
        self._owners: dict[Hashable, _Calls] = {}
        #: number of the deadline's tick -> calls; slots are never empty
        self._slots: dict[int, _Calls] = {}
        self._timer: IDelayedCall | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def has_room(self) -> bool:
        """Return whether one more call may start."""
        return len(self._calls) < self._max_calls

    def reserve(self, count: int) -> None:
        """Count this many calls pending in other objects towards ``max_calls``; fewer if negative."""
        self._max_calls -= count

    def in_flight(self, owner: Hashable) -> int:
        """Return the number of calls that await a response from ``owner``."""
        return len(self._owners.get(owner, ()))

    def add(self, owner: Hashable, client_id: str, timeout: float) -> tuple[bytes, DeferredCall]:
        """Start a call and mark it as sent; returns its id and a Deferred. Cancelling the Deferred discards the
        call."""
        call = DeferredCall(self.discard)
        id = self.start(call, owner, client_id, timeout)
        self.mark_sent(call)
        return id, call

    def start(self, call: Call, owner: Hashable, client_id: str, timeout: float) -> bytes:
        """Await a response from ``owner`` for ``timeout`` seconds. Returns the id to send: a UUID, as a raw JSON
        string.

        The call is completed with ``RpcError`` (``TIMEOUT``) at the deadline. Any result is held back until
        :meth:`mark_sent`. Raises ``RpcError`` (``TOO_MANY_CALLS``).
        """
        if len(self._calls) >= self._max_calls:
            raise RpcError(ErrorKind.TOO_MANY_CALLS, client_id, detail=self.full_detail)
        owner_calls = self._owners.get(owner)
        if owner_calls is None:
            owner_calls = self._owners[owner] = {}
        elif len(owner_calls) >= self._max_per_owner:
            raise RpcError(ErrorKind.TOO_MANY_CALLS, client_id, detail=self._owner_full_detail)
        slot = ceil((self._seconds() + timeout) / self._tick - _TOLERANCE)
        slot_calls = self._slots.get(slot)
        if slot_calls is None:
            slot_calls = self._slots[slot] = {}
        call.id = id = next(self._ids)
        call.owner = owner
        call.client_id = client_id
        call.early_result = NOT_SENT
        call._owner_calls = owner_calls
        call._slot_calls = slot_calls
        call._slot = slot
        self._calls[id] = owner_calls[id] = slot_calls[id] = call
        if self._timer is None:
            self._schedule_tick()
        return id

    def mark_sent(self, call: Call) -> None:
        """Record that the request was sent, and complete the call with a result that has arrived meanwhile."""
        result, call.early_result = call.early_result, None
        if isinstance(result, Reply):
            self._complete(call, result)
        elif isinstance(result, RpcError):
            self._complete_with_error(call, result)

    def resolve(self, owner: Hashable, id: bytes, reply: Reply) -> bool:
        """Complete a call with a response. Returns ``False`` if the call is unknown, has ended, or has another
        owner."""
        call = self._calls.get(id)
        if call is None or call.owner != owner:
            return False
        self.discard(call)
        if call.early_result is not None:
            call.early_result = reply
            return True
        # _complete(), inlined.
        try:
            call.complete(reply)
        except Exception:  # noqa: BLE001 - not an error of the responder
            self._log.failure("Error in completing a call")
        return True

    def fail(self, owner: Hashable, id: bytes, error: RpcError) -> bool:
        """Complete a call with an error. Returns ``False`` as :meth:`resolve` does."""
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
        """Fail all calls that await a response from ``owner``, each with ``error_for(client_id)``. Returns their
        number."""
        calls = list(self._owners.get(owner, {}).values())
        return sum(self.fail(owner, call.id, error_for(call.client_id)) for call in calls)

    def discard(self, call: Any) -> None:
        """Forget a call, if it is still pending. Also the canceller of calls that are Deferreds."""
        id = call.id
        if self._calls.pop(id, None) is None:
            return
        owner_calls = call._owner_calls
        del owner_calls[id]
        if not owner_calls:
            del self._owners[call.owner]
        slot_calls = call._slot_calls
        del slot_calls[id]
        if not slot_calls:
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
        except Exception:  # noqa: BLE001 - not an error of the responder, nor of the next call
            self._log.failure("Error in completing a call")

    def _schedule_tick(self) -> None:
        now = self._clock.seconds()
        ticks = floor(now / self._tick + _TOLERANCE) + 1
        self._timer = self._clock.callLater(max(0.0, ticks * self._tick - now), self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = floor(self._clock.seconds() / self._tick + _TOLERANCE)
        for slot in [slot for slot in self._slots if slot <= now]:
            # A failure may start or end other calls.
            for call in list(self._slots.get(slot, {}).values()):
                self.fail(call.owner, call.id, RpcError(ErrorKind.TIMEOUT, call.client_id))
        if self._calls and self._timer is None:
            self._schedule_tick()
