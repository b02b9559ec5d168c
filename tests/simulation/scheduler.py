"""Simulated time: one seeded scheduler for everything that happens in a run.

All that happens is an event at a time: a timer of a node, bytes that arrive, a result of the database, a fault. Between
two events no time passes, and idle time is skipped. After each event the sockets are polled until none is ready.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from typing import Any, Protocol

#: events polled without any progress in time that count as an endless loop
MAX_EVENTS_AT_ONCE = 200_000


class Pollable(Protocol):
    """Something with sockets that may be ready."""

    #: whether it is to be polled
    is_dirty: bool

    def poll(self) -> None:
        """Handle the sockets that are ready; clears ``is_dirty`` if there are none."""
        ...


class Event:
    """One event; :meth:`cancel` drops it."""

    __slots__ = ("arguments", "callback", "time")

    def __init__(self, time: float, callback: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self.time = time
        self.callback: Callable[..., object] | None = callback
        self.arguments = arguments

    def cancel(self) -> None:
        self.callback = None
        self.arguments = ()


class Scheduler:
    """The events of one run, in order of time; ``now`` is in seconds since its start."""

    def __init__(self, seed: int, *, keep_trace: bool = False) -> None:
        self.now = 0.0
        self.seed = seed
        #: randomness of the run itself; each part derives its own with :meth:`make_random`
        self.random = random.Random(seed)
        self.pollables: list[Pollable] = []
        #: number of events that were handled
        self.handled = 0
        #: the lines of the trace, if they are kept
        self.lines: list[str] | None = [] if keep_trace else None
        self._events: list[tuple[float, int, Event]] = []
        self._sequence = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._stopped = False

    def make_random(self, name: str) -> random.Random:
        """Return a generator that depends on the seed and the name only, not on what else draws numbers."""
        return random.Random(f"{self.seed} {name}")

    def at(self, time: float, callback: Callable[..., object], *arguments: Any) -> Event:
        """Call back at a time; not before now."""
        event = Event(max(time, self.now), callback, arguments)
        self._sequence += 1
        heapq.heappush(self._events, (event.time, self._sequence, event))
        return event

    def after(self, delay: float, callback: Callable[..., object], *arguments: Any) -> Event:
        """Call back after a delay, in seconds."""
        return self.at(self.now + delay, callback, *arguments)

    def trace(self, text: str) -> None:
        """Add a line to the trace, and to its hash."""
        line = f"{self.now:11.6f} {text}"
        self._hash.update(line.encode())
        if self.lines is not None:
            self.lines.append(line)

    def trace_hash(self) -> str:
        """Return the hash of the trace so far, in hexadecimal."""
        return self._hash.hexdigest()

    def stop(self) -> None:
        """End :meth:`run` after the current event."""
        self._stopped = True

    def run(self, until: float) -> None:
        """Handle all events up to a time."""
        self._stopped = False
        events = self._events
        at_once = 0
        settle = self.settle
        settle()
        while events and events[0][0] <= until and not self._stopped:
            time, _, event = heapq.heappop(events)
            callback, arguments = event.callback, event.arguments
            if callback is None:
                continue
            if time > self.now:
                self.now, at_once = time, 0
            at_once += 1
            if at_once > MAX_EVENTS_AT_ONCE:
                raise RuntimeError(f"{callback} and others go on without end at {self.now}")
            self.handled += 1
            callback(*arguments)
            settle()
        if not self._stopped:
            self.now = max(self.now, until)

    def settle(self) -> None:
        """Poll until no socket is ready."""
        busy = True
        while busy:
            busy = False
            for pollable in self.pollables:
                if pollable.is_dirty:
                    pollable.poll()
                    busy = True
