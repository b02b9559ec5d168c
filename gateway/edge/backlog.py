"""When a reader is too slow: what was written to a transport and waits behind a full buffer.

An amount alone says nothing. A transport writes nothing before the reactor's turn is over, and a link may stall for a
second or two, so that large messages pile up for a reader that is well. It is too slow when its buffer has not been
empty for a while and more than ``send_buffer`` waits even so; or when so much waits that memory is at stake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway.edge.timers import Timer, Timers
from gateway.edge.waking import unsent

#: how long a buffer may stay full of more than ``send_buffer``, in seconds: longer than a lost packet stalls a link
SLOW_AFTER = 3


class Backlog:
    """What waits for one reader, from the moment its buffer is full until it is empty again."""

    __slots__ = (
        "_burst",
        "_limit",
        "_over",
        "_seconds_left",
        "_timer",
        "_timers",
        "_too_slow",
        "_transport",
        "_written",
    )

    def __init__(
        self, transport: Any, timers: Timers, send_buffer: int, burst: int, too_slow: Callable[[], None]
    ) -> None:
        """More than ``send_buffer`` bytes are too many after ``SLOW_AFTER`` seconds, more than these and ``burst`` at
        once. ``too_slow`` is called once at most."""
        self._transport = transport
        self._timers = timers
        self._limit = send_buffer
        self._burst = send_buffer + burst
        self._too_slow = too_slow
        self._written = 0
        self._over = False
        self._seconds_left = SLOW_AFTER
        self._timer: Timer | None = timers.call_later(1.0, self._tick)

    def add(self, size: int) -> None:
        """So many bytes more were written."""
        self._written += size
        if not self._over and self._waiting() > (self._burst if self._seconds_left else self._limit):
            # What is written to close the connection is added, too.
            self._over = True
            self._too_slow()

    def end(self) -> None:
        """The buffer is empty, or nobody waits for that any more."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _waiting(self) -> float:
        # What filled the buffer is not counted: one message, be it as large as may be, can always be sent.
        return min(self._written, unsent(self._transport))

    def _tick(self) -> None:
        # Second by second, since timers come first after the process was stopped: what it could not write then is not
        # the reader's fault.
        self._timer = None
        self._seconds_left -= 1
        if self._seconds_left:
            self._timer = self._timers.call_later(1.0, self._tick)
        else:
            self.add(0)
