"""What keeps one client, one address or one error from taking everything: rates, all with bounded memory."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Callable


class TokenBucket:
    """A token bucket of so many a second, which holds one second's worth and at least one.

    Its state is one number for each who is limited: the time at which the bucket will be full again (the generic cell
    rate algorithm). 0 is the state of somebody new.
    """

    __slots__ = ("_burst_duration", "emission_interval", "tolerance")

    def __init__(self, per_second: float) -> None:
        #: seconds for one
        self.emission_interval = 1 / per_second
        self._burst_duration = max(1.0, self.emission_interval)
        #: By so many seconds its state may be ahead of now, until one more has to wait. It is half a millionth of a
        #: token more than exact: sums of floats must not cost anybody a whole one.
        self.tolerance = self._burst_duration - self.emission_interval * (1 - 5e-7)

    def charge(self, tat: float, now: float, units: int = 1) -> float:
        """The new state after so many more, allowed or not."""
        return max(tat, now) + self.emission_interval * units

    def wait_time(self, tat: float, now: float) -> float:
        """How many seconds it takes until one more is allowed; 0 when it is now."""
        return tat + self.emission_interval - now - self._burst_duration if tat - now > self.tolerance else 0.0


class KeyedRateLimiter:
    """A rate for each key. Who was idle long enough to have a full bucket is forgotten."""

    def __init__(self, per_second: float, clock: Callable[[], float], max_keys: int = 65536) -> None:
        """``per_second`` 0 means no limit. Beyond ``most_keys`` the longest idle one is forgotten early."""
        self._bucket = TokenBucket(per_second) if per_second > 0 else None
        self._clock = clock
        self._max_keys = max_keys
        self._tats: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tats)

    def is_limited(self, key: str) -> bool:
        """Whether one more would be too many."""
        if self._bucket is None or key not in self._tats:
            return False
        return self._bucket.wait_time(self._tats[key], self._clock()) > 0

    def acquire(self, key: str) -> float:
        """Take one, and return 0; or, where that is too many, take none and return the seconds to wait."""
        if self._bucket is None:
            return 0.0
        now = self._clock()
        full_at = self._tats.get(key, 0.0)
        wait = self._bucket.wait_time(full_at, now)
        if wait:
            return wait
        self._tats[key] = self._bucket.charge(full_at, now)
        self._tats.move_to_end(key)
        # Two at a time, so that a long tail of idle ones shrinks.
        for _ in range(2):
            oldest = next(iter(self._tats))
            if self._tats[oldest] > now and len(self._tats) <= self._max_keys:
                break
            del self._tats[oldest]
        return 0.0


def network_key(host: str) -> str:
    """The key under which an address is limited: an IPv4 address itself, an IPv6 address's /64 (a customer has one
    at least), an empty text for what is neither."""
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
    """How often something happened to each key within the last so many seconds."""

    def __init__(self, max_events: int, window: float, clock: Callable[[], float], max_keys: int = 65536) -> None:
        self._max_events = max_events
        self._window = window
        self._clock = clock
        self._max_keys = max_keys
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._times)

    def add(self, key: str) -> None:
        """It happened once more."""
        now = self._clock()
        times = self._times.setdefault(key, deque(maxlen=self._max_events))
        times.append(now)
        self._times.move_to_end(key)
        for _ in range(2):
            oldest = next(iter(self._times))
            if self._times[oldest][-1] + self._window > now and len(self._times) <= self._max_keys:
                break
            del self._times[oldest]

    def wait_time(self, key: str, count: int = 1) -> float:
        """0 while it may happen so many times more without exceeding ``most`` within the window, else the seconds
        until it may."""
        now = self._clock()
        times = [time for time in self._times.get(key, ()) if time + self._window > now]
        over = len(times) + count - self._max_events
        if over <= 0:
            return 0.0
        return times[over - 1] + self._window - now if over <= len(times) else self._window
