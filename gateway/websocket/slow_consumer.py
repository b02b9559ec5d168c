"""Detect connections that do not read what is sent to them.

The detector watches what is written to a transport whose buffer is full. An amount alone is no criterion: a transport
writes nothing before the reactor iteration ends, and a link may stall for a second or two, so large messages queue up
for a healthy reader too. A reader is too slow when its buffer has not been empty for a while and more than
``send_buffer`` bytes are still queued, or when so much is queued that memory is at stake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway.net.transport import unsent_bytes
from gateway.util.timers import Timer, TimerWheel

#: seconds for which more than ``send_buffer`` may stay queued; longer than a lost packet stalls a link
SLOW_CONSUMER_TIMEOUT = 3


class SlowConsumerDetector:
    """Track what is queued for one reader, from the moment its buffer is full until it is empty again."""

    __slots__ = (
        "_burst_limit",
        "_is_done",
        "_limit",
        "_on_slow",
        "_seconds_left",
        "_timer",
        "_timers",
        "_transport",
        "_written",
    )

    def __init__(
        self, transport: Any, timers: TimerWheel, send_buffer: int, burst: int, on_slow: Callable[[], None]
    ) -> None:
        """Call ``on_slow``, at most once, when more than ``send_buffer`` bytes are queued after
        ``SLOW_CONSUMER_TIMEOUT`` seconds, or more than ``send_buffer + burst`` at any time."""
        self._transport = transport
        self._timers = timers
        self._limit = send_buffer
        self._burst_limit = send_buffer + burst
        self._on_slow = on_slow
        self._written = 0
        self._is_done = False
        self._seconds_left = SLOW_CONSUMER_TIMEOUT
        self._timer: Timer | None = timers.call_later(1.0, self._tick)

    def add_written(self, size: int) -> None:
        """Count ``size`` bytes written since the buffer filled up."""
        self._written += size
        if not self._is_done and self._queued_bytes() > (self._burst_limit if self._seconds_left else self._limit):
            # Set first: the close frame that on_slow() writes is counted, too.
            self._is_done = True
            self._on_slow()

    def stop(self) -> None:
        """Stop tracking: the buffer is empty, or the connection is lost."""
        self._is_done = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _queued_bytes(self) -> float:
        # What filled the buffer is not counted: one message, of whatever size, can always be sent.
        return min(self._written, unsent_bytes(self._transport))

    def _tick(self) -> None:
        # One second at a time: timers run first after the process was stopped, and what it could not write meanwhile is
        # not the reader's fault.
        self._timer = None
        self._seconds_left -= 1
        if self._seconds_left:
            self._timer = self._timers.call_later(1.0, self._tick)
        else:
            self.add_written(0)
