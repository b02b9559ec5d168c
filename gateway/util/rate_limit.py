"""Rate limiters by key, such as a client or an address, with bounded memory."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class TokenBucket:
    """Token bucket that refills at ``per_second`` tokens, and holds one second's worth and at least one.

    Implemented as the generic cell rate algorithm (GCRA): its state is one number for each limited key, the theoretical
    arrival time (tat), when the bucket will be full again. 0 is the state of a new key.
    """

    __slots__ = ("_burst_duration", "emission_interval", "tolerance")

    def __init__(self, per_second: float) -> None:
        #: seconds per token
        self.emission_interval = 1 / per_second
        self._burst_duration = max(1.0, self.emission_interval)
        #: Seconds that the tat may be ahead of now before the next token has to wait. It is half a millionth of a token
        #: more than exact, so that sums of floats never cost a whole token.
        self.tolerance = self._burst_duration - self.emission_interval * (1 - 5e-7)

    def charge(self, tat: float, now: float, units: int = 1) -> float:
        """Return the new tat after taking that many tokens, whether allowed or not."""
        return max(tat, now) + self.emission_interval * units

    def wait_time(self, tat: float, now: float) -> float:
        """Return the seconds until the next token is available; 0 if it is now."""
        return tat + self.emission_interval - now - self._burst_duration if tat - now > self.tolerance else 0.0


class KeyedRateLimiter:
    """Token bucket for each key. Keys whose bucket is full again are forgotten."""

    def __init__(self, per_second: float, clock: Callable[[], float], max_keys: int = 65536) -> None:
        """``per_second`` 0 means no limit. Beyond ``max_keys``, the least recently used key is forgotten early."""
        self._bucket = TokenBucket(per_second) if per_second > 0 else None
        self._clock = clock
        self._max_keys = max_keys
        self._tats: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tats)

    def is_limited(self, key: str) -> bool:
        """Return whether no token is available for the key. Takes none."""
        if self._bucket is None or key not in self._tats:
            return False
        return self._bucket.wait_time(self._tats[key], self._clock()) > 0

    def acquire(self, key: str) -> float:
        """Take a token and return 0; if none is available, return the seconds to wait."""
        if self._bucket is None:
            return 0.0
        now = self._clock()
        tat = self._tats.get(key, 0.0)
        wait = self._bucket.wait_time(tat, now)
        if wait:
            return wait
        self._tats[key] = self._bucket.charge(tat, now)
        self._tats.move_to_end(key)
        _evict(self._tats, self._max_keys, lambda tat: tat <= now)
        return 0.0


def _evict(entries: OrderedDict[str, _T], max_entries: int, is_expired: Callable[[_T], bool]) -> None:
    """Delete the oldest entries, if they are expired or too many: at most two, so that the cost of a call is bounded
    and a long tail of expired entries still shrinks."""
    for _ in range(2):
        oldest = next(iter(entries))
        if not is_expired(entries[oldest]) and len(entries) <= max_entries:
            break
        del entries[oldest]


def network_key(host: str) -> str:
    """Return the key by which an address is rate-limited: an IPv4 address itself, the /64 of an IPv6 address (the least
    that a customer is assigned), or an empty string for anything else."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return f"{int(address) >> 64:x}/64"


class SlidingWindow:
    """Count of events for each key within the last ``window`` seconds."""

    def __init__(self, max_events: int, window: float, clock: Callable[[], float], max_keys: int = 65536) -> None:
        self._max_events = max_events
        self._window = window
        self._clock = clock
        self._max_keys = max_keys
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._times)

    def add(self, key: str) -> None:
        """Record one event."""
        now = self._clock()
        times = self._times.setdefault(key, deque(maxlen=self._max_events))
        times.append(now)
        self._times.move_to_end(key)
        _evict(self._times, self._max_keys, lambda times: times[-1] + self._window <= now)

    def wait_time(self, key: str, count: int = 1) -> float:
        """Return the seconds until ``count`` more events would not exceed ``max_events`` within the window; 0 if they
        would not now."""
        now = self._clock()
        times = [time for time in self._times.get(key, ()) if time + self._window > now]
        excess = len(times) + count - self._max_events
        if excess <= 0:
            return 0.0
        return times[excess - 1] + self._window - now if excess <= len(times) else self._window
