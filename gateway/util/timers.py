"""Many timers that are nearly always cancelled, such as that of every opening handshake, on few of the reactor's."""

from __future__ import annotations

import math
from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

#: So many of those that are due are called in one turn of the reactor: each may end a connection, and thousands that
#: came together end together.
MAX_CALLS_PER_ITERATION = 16


class _Bucket:
    """The timers that fire at one tick, on one of the reactor's."""

    __slots__ = ("buckets", "calls", "delayed_call", "index")

    def __init__(self, buckets: dict[int, _Bucket], index: int, delayed_call: IDelayedCall) -> None:
        self.buckets = buckets
        self.index = index
        self.delayed_call = delayed_call
        self.calls: dict[Timer, Callable[[], None]] = {}
        buckets[index] = self

    def discard(self, timer: Timer) -> None:
        self.calls.pop(timer, None)
        if not self.calls and self.buckets.get(self.index) is self:
            del self.buckets[self.index]
            if self.delayed_call.active():
                self.delayed_call.cancel()


class Timer:
    """One timer of :class:`Timers`."""

    __slots__ = ("_bucket",)

    def __init__(self, bucket: _Bucket) -> None:
        self._bucket = bucket

    def cancel(self) -> None:
        """Forget it; nothing happens if it is over."""
        self._bucket.discard(self)


class TimerWheel:
    """Timers that fire up to one tick late and never early. Autobahn's own (txaio) fire up to a second early."""

    _log = Logger()

    def __init__(self, clock: IReactorTime, tick_length: float = 0.25) -> None:
        """``tick`` is in seconds."""
        self._clock = clock
        self._tick_length = tick_length
        self._buckets: dict[int, _Bucket] = {}

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        """Call after so many seconds; named as Autobahn calls it."""
        now = self._clock.seconds()
        number = math.ceil((now + delay) / self._tick_length)
        tick = self._buckets.get(number)
        if tick is None:
            delayed = self._clock.callLater(max(0.0, number * self._tick_length - now), self._fire, number)
            tick = _Bucket(self._buckets, number, delayed)
        timer = Timer(tick)
        tick.calls[timer] = call
        return timer

    def _fire(self, index: int) -> None:
        tick = self._buckets[index]
        for _ in range(MAX_CALLS_PER_ITERATION):
            if not tick.calls:
                break
            call = tick.calls.pop(next(iter(tick.calls)))
            try:
                call()
            except Exception:  # noqa: BLE001 (the others must not suffer)
                self._log.failure("a timer failed")
        if tick.calls:
            tick.delayed_call = self._clock.callLater(0, self._fire, index)
        elif self._buckets.get(index) is tick:
            del self._buckets[index]
