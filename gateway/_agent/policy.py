"""When and where to an agent comes back after a connection, or an attempt at one, has ended. No I/O.

What a gateway says with a close code or an HTTP status decides: come back after a random wait, come back late, or stop.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping

import attrs
import msgspec

#: the longest wait that a gateway can ask for, in seconds
LONGEST_WAIT = 3600.0
#: redirects that are followed on the way to one connection
MAX_HOPS = 3

_BUGS = frozenset({1002, 1003, 1007, 1009, 1010})
_REPLACED = 4001
_DISCONNECTED = 4003
_POLICY = 1008
_REDIRECTS = frozenset({301, 302, 307, 308})
_REFUSALS_BY_TOKEN = frozenset({401, 403})
_REFUSALS = frozenset({400, 404})
_BUSY = frozenset({429, 503})
_SECONDS = re.compile(r"[0-9]{1,9}")


class Then(enum.Enum):
    """What to do next."""

    STOP = "stop"
    #: after a random wait that grows with each failure
    AGAIN = "again"
    #: after the longest of those waits
    LATER = "later"


@attrs.frozen
class Ended:
    """How an open connection ended. ``ours``: by this side, for what the gateway did or did not send."""

    code: int
    reason: str
    ours: bool = False


class OpeningFailed(Exception):
    """There was no opening handshake, or none that could be understood."""


class _Body(msgspec.Struct):
    error: str = ""
    message: str = ""


class Refused(Exception):
    """The gateway answered the opening handshake with another status than 101 (RFC 6455, section 4.1).

    ``headers`` have names in lower case.
    """

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        try:
            said = msgspec.json.decode(body, type=_Body)
        except (msgspec.DecodeError, RecursionError):
            said = _Body()
        detail = ": ".join(ascii(text[:200])[1:-1] for text in (said.error, said.message) if text)
        super().__init__(f"the gateway answered {status}" + (f" ({detail})" if detail else ""))

    @property
    def location(self) -> str | None:
        """Where a redirect leads, if this is one."""
        return self.headers.get("location") or None if self.status in _REDIRECTS else None

    @property
    def retry_after(self) -> float:
        """The seconds that the gateway asked to wait, 0 if it did not (RFC 9110, section 10.2.3; no dates)."""
        found = _SECONDS.fullmatch(self.headers.get("retry-after", ""))
        return wait_asked_for(int(found[0])) if found and self.status in _BUSY else 0.0


def wait_asked_for(value: object) -> float:
    """Make a number of seconds, from 0 to ``LONGEST_WAIT``, of what came from outside."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return 0.0
    return float(min(max(value, 0), LONGEST_WAIT))


def after_end(ended: Ended, *, new_token: bool) -> Then:
    """What follows the end of an open connection. ``new_token``: there may be another one next time."""
    if ended.ours:
        # What this side complained of may be better at the next node; whole fleets must not stop for it.
        return Then.AGAIN if ended.code == 1006 else Then.LATER
    if ended.code == _REPLACED or ended.code in _BUGS:
        return Then.STOP
    if ended.code == _POLICY:
        return Then.AGAIN if new_token else Then.STOP
    return Then.LATER if ended.code == _DISCONNECTED else Then.AGAIN


def after_refusal(status: int, *, new_token: bool) -> Then:
    """What follows a refusal at the configured url."""
    if status in _REFUSALS_BY_TOKEN:
        return Then.AGAIN if new_token else Then.STOP
    if status in _REFUSALS:
        return Then.LATER if new_token else Then.STOP
    return Then.AGAIN


class Backoff:
    """Waits with full jitter: ``jitter() * min(maximum, initial * 2 ** n)`` seconds, for n failures in a row before.

    ``jitter`` returns a number from 0 to 1. Raises ``ValueError`` for waits that are none.
    """

    def __init__(self, initial: float, maximum: float, jitter: Callable[[], float]) -> None:
        if not 0 < initial <= maximum <= LONGEST_WAIT:
            raise ValueError(
                f"backoff {(initial, maximum)!r} is not (initial, maximum) seconds "
                f"with 0 < initial <= maximum <= {LONGEST_WAIT:g}"
            )
        self.initial = initial
        self.maximum = maximum
        self._jitter = jitter
        self._failures = 0

    def next(self, *, late: bool = False) -> float:
        """The wait after one more failure, in seconds; the longest one if it is to be ``late``."""
        wait = self.peek()
        self._failures += 1
        return self.maximum if late else wait

    def peek(self) -> float:
        """The wait after one more failure, in seconds, if there were one."""
        # A power beyond this one is more than LONGEST_WAIT for any initial wait above a nanosecond.
        return self._jitter() * min(self.maximum, self.initial * 2.0 ** min(self._failures, 64))

    @property
    def failing(self) -> bool:
        """Whether there was a failure since the last reset."""
        return self._failures > 0

    def reset(self) -> None:
        """Forget the failures."""
        self._failures = 0

    @property
    def settled_after(self) -> float:
        """A connection that stayed for so many seconds was no failure."""
        return min(self.maximum, 60.0)
