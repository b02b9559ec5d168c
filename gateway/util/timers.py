"""Timer wheel for many timers that are nearly always cancelled, such as handshake timeouts, on few reactor timers."""

from __future__ import annotations

import math
from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

#: Due timers called per reactor iteration. Each may close a connection, and connections that came by the thousand time
#: out together.
MAX_CALLS_PER_ITERATION = 16


class _Bucket:
    """Timers that fire at one tick, and the reactor timer for it."""

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
    """One timer of a :class:`TimerWheel`."""

    __slots__ = ("_bucket",)

    def __init__(self, bucket: _Bucket) -> None:
        self._bucket = bucket

    def cancel(self) -> None:
        """Cancel the timer. Does nothing if it has fired or was cancelled."""
        self._bucket.discard(self)


class TimerWheel:
    """Timers that fire up to one tick late and never early. Autobahn's own (txaio) fire up to a second early."""

    _log = Logger()

    def __init__(self, clock: IReactorTime, tick_length: float = 0.25) -> None:
        """``tick_length`` is in seconds."""
        self._clock = clock
        self._tick_length = tick_length
        self._buckets: dict[int, _Bucket] = {}

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        """Call ``call`` after ``delay`` seconds. Autobahn requires this name."""
        now = self._clock.seconds()
        index = math.ceil((now + delay) / self._tick_length)
        bucket = self._buckets.get(index)
        if bucket is None:
            delayed_call = self._clock.callLater(max(0.0, index * self._tick_length - now), self._fire, index)
            bucket = _Bucket(self._buckets, index, delayed_call)
        timer = Timer(bucket)
        bucket.calls[timer] = call
        return timer

    def _fire(self, index: int) -> None:
        bucket = self._buckets[index]
        for _ in range(MAX_CALLS_PER_ITERATION):
            if not bucket.calls:
                break
            call = bucket.calls.pop(next(iter(bucket.calls)))
            try:
                call()
            except Exception:  # noqa: BLE001 (the other timers must still fire)
                self._log.failure("a timer failed")
        if bucket.calls:
            bucket.delayed_call = self._clock.callLater(0, self._fire, index)
        elif self._buckets.get(index) is bucket:
            del self._buckets[index]
