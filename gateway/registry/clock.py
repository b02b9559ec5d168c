"""The database's clock, as one node sees it by its own monotonic clock.

The database's clock alone decides whether a lease is valid, and it may be set, or be that of another server after a
fail-over. A node knows what that clock said at its last heartbeat, and how much time has passed since. If the two have
not moved alike, by more than one heartbeat, nothing can be said of the leases of other nodes: they are judged neither
expired nor in the future until every living node has had the time to send heartbeats again, one lease.

    observe(now)       at each heartbeat: has the clock moved as this node's own?
    is_live(...)       in each transaction, with the time that it has read
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

#: A clock that is adjusted gradually falls behind by less than this between two heartbeats, in seconds.
MAX_SLEW = 0.25

_MICROSECONDS = 1e6


class DatabaseClock:
    """What a node knows of the database's clock. Thread-safe. Times are in microseconds by the database's clock, and in
    seconds by ``monotonic``."""

    def __init__(self, monotonic: Callable[[], float], *, lease: float, heartbeat: float) -> None:
        """``lease`` and ``heartbeat``, the tolerance, are in seconds."""
        self._monotonic = monotonic
        self._lease = lease
        self._tolerance = heartbeat
        self._lock = threading.Lock()
        #: the time at the last heartbeat; 0 before the first
        self._observed = 0
        #: when that was read: not before, and not after
        self._not_before = self._not_after = 0.0
        #: from when on leases in the past, and in the future, are judged
        self._judges_past_from = -math.inf
        self._judges_future_from = -math.inf
        #: until when other nodes may not know that the clock was set
        self._was_set_until = -math.inf

    def observe(self, now: int, sent_at: float) -> tuple[float, int]:
        """Take note of the time that a heartbeat has read; it was sent at ``sent_at``.

        Returns by how many seconds the clock was set since the last one, 0 if by less than a heartbeat, and what the
        clock would say at most if it was set back, even if only a little, else 0.
        """
        read_at = self._monotonic()
        with self._lock:
            step = self._deviation(now, sent_at, read_at)
            horizon = self._extrapolate(read_at) if step < -MAX_SLEW else 0
            if not self._observed:
                # What lies in the future may be of a living node that is about to send its next heartbeat.
                self._judges_future_from = read_at + self._lease
            if abs(step) > MAX_SLEW:
                self._was_set_until = read_at + self._lease
            if abs(step) > self._tolerance:
                self._judges_past_from = self._judges_future_from = read_at + self._lease
            else:
                step = 0.0
            self._observed, self._not_before, self._not_after = now, sent_at, read_at
        return step, horizon

    def _extrapolate(self, read_at: float) -> int:
        """Return what the clock would say at most had it not been set since the last heartbeat."""
        return self._observed + round((read_at - self._not_before) * _MICROSECONDS)

    def _deviation(self, now: int, sent_at: float, read_at: float) -> float:
        """Return how much more the database's clock has moved than this node's own, in seconds."""
        if not self._observed:
            return 0.0
        elapsed = (now - self._observed) / _MICROSECONDS
        least, most = sent_at - self._not_after, read_at - self._not_before
        return elapsed - most if elapsed > most else min(0.0, elapsed - least)

    def seconds(self) -> float:
        """Return the time of this node's own clock."""
        return self._monotonic()

    def horizon(self, now: int, sent_at: float) -> int:
        """Return what the clock would say at most, in microseconds, had it not been set back since the last heartbeat;
        0 if it was not. ``now`` was read just before, by a statement sent at ``sent_at``."""
        with self._lock:
            read_at = self._monotonic()
            if now >= self._observed and self._deviation(now, sent_at, read_at) >= -MAX_SLEW:
                return 0
            return self._extrapolate(read_at)

    def was_set(self, now: int) -> bool:
        """Whether the clock was set ahead since the last heartbeat, or either way so recently that other nodes may not
        know. ``now`` was read just before."""
        with self._lock:
            read_at = self._monotonic()
            return read_at < self._was_set_until or self._deviation(now, self._not_after, read_at) > MAX_SLEW

    def is_steady(self) -> bool:
        """Whether the leases of other nodes can be judged, as of the last heartbeat."""
        return self._monotonic() >= self._judges_past_from

    def is_live(self, heartbeat_at: int, now: int) -> bool:
        """Whether the lease of another node is valid, or cannot be judged; ``now`` was read just before. The node must
        not have left."""
        with self._lock:
            read_at = self._monotonic()
            if abs(self._deviation(now, self._not_after, read_at)) > self._tolerance:
                return True
            if heartbeat_at <= now - self._lease * _MICROSECONDS:
                return read_at < self._judges_past_from
            if heartbeat_at > now + self._tolerance * _MICROSECONDS:
                return read_at < self._judges_future_from
            return True


class UnobservedClock(DatabaseClock):
    """A clock of which only the present is known."""

    def __init__(self, lease: float) -> None:
        """``lease`` is in seconds."""
        super().__init__(lambda: 0.0, lease=lease, heartbeat=math.inf)
