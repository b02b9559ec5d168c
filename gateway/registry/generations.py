"""The highest generation that this node knows of, in the whole fleet.

The generation of a claim is the database's time, and so may be lower than those given before, once that clock is set
back. So each node remembers the highest generation that it has seen, and tells it to the others: in its row of
``nodes`` at each heartbeat, and by ``peer.floor``; each transaction reads what the other nodes have told. While the
clock is behind it, generations are counted upwards from there. While the clock is behind, or was set a short time ago,
each transaction also writes what it gives. What it counts upwards is told to the other nodes at once, too: a fail-over
may lose it.
"""

from __future__ import annotations

import threading

#: The clock counts as behind by more than this, in microseconds: concurrent transactions of one node may have read it
#: in another order than that in which they write.
TOLERANCE = 1_000_000


class GenerationFloor:
    """The highest generation known. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0
        self._is_ahead = False
        self._is_untold = False

    @property
    def value(self) -> int:
        """The highest generation known; 0 if there is none."""
        return self._value

    def is_ahead_of(self, now: int, tolerance: int = TOLERANCE) -> bool:
        """Whether the database's clock, at ``now``, has fallen behind what was given by more than the tolerance, and
        has not caught up since."""
        with self._lock:
            if self._value > now + tolerance:
                self._is_ahead = True
            elif self._value <= now:
                self._is_ahead = False
            return self._is_ahead

    def give(self, generation: int) -> None:
        """Take note of a generation that was counted upwards, which the other nodes are to be told."""
        self.raise_to(generation)
        self._is_untold = True

    def take_untold(self) -> bool:
        """Whether a generation was given since the last call."""
        is_untold, self._is_untold = self._is_untold, False
        return is_untold

    def raise_to(self, generation: int) -> None:
        """Take note of a generation."""
        with self._lock:
            if generation > self._value:
                self._value = generation
