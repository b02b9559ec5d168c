"""Exponential backoff."""

from __future__ import annotations

import random
from collections.abc import Callable

#: 2 to this power exceeds any useful delay, and does not overflow a float
_MAX_EXPONENT = 64


def half_jitter() -> float:
    """Return a random factor from 0.5 to 1.0."""
    return random.uniform(0.5, 1.0)


class Backoff:
    """Delays that double with each failure: ``jitter() * min(maximum, initial * 2 ** failures)`` seconds.

    Without ``jitter`` the delays are exact.
    """

    __slots__ = ("_jitter", "failures", "initial", "maximum")

    def __init__(self, initial: float, maximum: float, jitter: Callable[[], float] | None = None) -> None:
        self.initial = initial
        self.maximum = maximum
        self._jitter = jitter
        #: failures since the last :meth:`reset`
        self.failures = 0

    def next_delay(self, *, at_maximum: bool = False) -> float:
        """Count a failure, and return the delay after it, in seconds; ``maximum`` itself if ``at_maximum``."""
        delay = self.peek_delay()
        self.failures += 1
        return self.maximum if at_maximum else delay

    def peek_delay(self) -> float:
        """Return the delay after one more failure, in seconds, without counting it."""
        delay = min(self.maximum, self.initial * 2.0 ** min(self.failures, _MAX_EXPONENT))
        return delay if self._jitter is None else self._jitter() * delay

    def reset(self) -> None:
        """Forget the failures."""
        self.failures = 0
