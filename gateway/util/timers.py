"""Many timers that are nearly always cancelled, such as that of every opening handshake, on few of the reactor's."""

from __future__ import annotations

import math
from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

#: So many of those that are due are called in one turn of the reactor: each may end a connection, and thousands that
#: came together end together.
SLICE = 16


class _Tick:
    """The timers that fire at one tick, on one of the reactor's."""

    __slots__ = ("calls", "delayed", "number", "ticks")

    def __init__(self, ticks: dict[int, _Tick], number: int, delayed: IDelayedCall) -> None:
        self.ticks = ticks
        self.number = number
        self.delayed = delayed
        self.calls: dict[Timer, Callable[[], None]] = {}
        ticks[number] = self

    def discard(self, timer: Timer) -> None:
        self.calls.pop(timer, None)
        if not self.calls and self.ticks.get(self.number) is self:
            del self.ticks[self.number]
            if self.delayed.active():
                self.delayed.cancel()


class Timer:
    """One timer of :class:`Timers`."""

    __slots__ = ("_tick",)

    def __init__(self, tick: _Tick) -> None:
        self._tick = tick

    def cancel(self) -> None:
        """Forget it; nothing happens if it is over."""
        self._tick.discard(self)


class Timers:
    """Timers that fire up to one tick late and never early. Autobahn's own (txaio) fire up to a second early."""

    _log = Logger()

    def __init__(self, clock: IReactorTime, tick: float = 0.25) -> None:
        """``tick`` is in seconds."""
        self._clock = clock
        self._length = tick
        self._ticks: dict[int, _Tick] = {}

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        """Call after so many seconds; named as Autobahn calls it."""
        now = self._clock.seconds()
        number = math.ceil((now + delay) / self._length)
        tick = self._ticks.get(number)
        if tick is None:
            delayed = self._clock.callLater(max(0.0, number * self._length - now), self._fire, number)
            tick = _Tick(self._ticks, number, delayed)
        timer = Timer(tick)
        tick.calls[timer] = call
        return timer

    def _fire(self, number: int) -> None:
        tick = self._ticks[number]
        for _ in range(SLICE):
            if not tick.calls:
                break
            call = tick.calls.pop(next(iter(tick.calls)))
            try:
                call()
            except Exception:  # noqa: BLE001 (the others must not suffer)
                self._log.failure("a timer failed")
        if tick.calls:
            tick.delayed = self._clock.callLater(0, self._fire, number)
        elif self._ticks.get(number) is tick:
            del self._ticks[number]
