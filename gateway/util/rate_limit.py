"""What keeps one client, one address or one error from taking everything: rates, all with bounded memory."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Callable

#: so many messages in a row that are no JSON-RPC 2.0 end a connection
MAX_BAD_MESSAGES = 8


class Rate:
    """A token bucket of so many a second, which holds one second's worth and at least one.

    Its state is one number for each who is limited: the time at which the bucket will be full again (the generic cell
    rate algorithm). 0 is the state of somebody new.
    """

    __slots__ = ("_slack", "each", "margin")

    def __init__(self, per_second: float) -> None:
        #: seconds for one
        self.each = 1 / per_second
        self._slack = max(1.0, self.each)
        #: By so many seconds its state may be ahead of now, until one more has to wait. It is half a millionth of a
        #: token more than exact: sums of floats must not cost anybody a whole one.
        self.margin = self._slack - self.each * (1 - 5e-7)

    def take(self, full_at: float, now: float, units: int = 1) -> float:
        """The new state after so many more, allowed or not."""
        return max(full_at, now) + self.each * units

    def wait(self, full_at: float, now: float) -> float:
        """How many seconds it takes until one more is allowed; 0 when it is now."""
        return full_at + self.each - now - self._slack if full_at - now > self.margin else 0.0


class RateByKey:
    """A rate for each key. Who was idle long enough to have a full bucket is forgotten."""

    def __init__(self, per_second: float, seconds: Callable[[], float], most_keys: int = 65536) -> None:
        """``per_second`` 0 means no limit. Beyond ``most_keys`` the longest idle one is forgotten early."""
        self._rate = Rate(per_second) if per_second > 0 else None
        self._seconds = seconds
        self._most_keys = most_keys
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def is_over(self, key: str) -> bool:
        """Whether one more would be too many."""
        if self._rate is None or key not in self._full_at:
            return False
        return self._rate.wait(self._full_at[key], self._seconds()) > 0

    def wait(self, key: str) -> float:
        """Take one, and return 0; or, where that is too many, take none and return the seconds to wait."""
        if self._rate is None:
            return 0.0
        now = self._seconds()
        full_at = self._full_at.get(key, 0.0)
        wait = self._rate.wait(full_at, now)
        if wait:
            return wait
        self._full_at[key] = self._rate.take(full_at, now)
        self._full_at.move_to_end(key)
        # Two at a time, so that a long tail of idle ones shrinks.
        for _ in range(2):
            oldest = next(iter(self._full_at))
            if self._full_at[oldest] > now and len(self._full_at) <= self._most_keys:
                break
            del self._full_at[oldest]
        return 0.0


def network_of(host: str) -> str:
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


class Recent:
    """How often something happened to each key within the last so many seconds."""

    def __init__(self, most: int, within: float, seconds: Callable[[], float], most_keys: int = 65536) -> None:
        self._most = most
        self._within = within
        self._seconds = seconds
        self._most_keys = most_keys
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._times)

    def add(self, key: str) -> None:
        """It happened once more."""
        now = self._seconds()
        times = self._times.setdefault(key, deque(maxlen=self._most))
        times.append(now)
        self._times.move_to_end(key)
        for _ in range(2):
            oldest = next(iter(self._times))
            if self._times[oldest][-1] + self._within > now and len(self._times) <= self._most_keys:
                break
            del self._times[oldest]

    def wait(self, key: str, coming: int = 1) -> float:
        """0 while it may happen so many times more without exceeding ``most`` within the window, else the seconds
        until it may."""
        now = self._seconds()
        times = [time for time in self._times.get(key, ()) if time + self._within > now]
        over = len(times) + coming - self._most
        if over <= 0:
            return 0.0
        return times[over - 1] + self._within - now if over <= len(times) else self._within
