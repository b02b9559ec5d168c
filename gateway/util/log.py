"""Logging with bounds: how often a line may be repeated, and how much of an untrusted text it may hold."""

from __future__ import annotations

import math
from collections.abc import Callable

from twisted.logger import Logger
from twisted.python.failure import Failure

#: the maximum number of characters that :func:`one_line` returns, less the ellipsis
_MAX_LINE_LENGTH = 300


class LogLimiter:
    """Allow at most one log line per ``interval`` seconds of ``clock``, and count the suppressed ones.

    The clock may be the wall clock: when it is set back, the next line is allowed.
    """

    __slots__ = ("_clock", "_interval", "_last_allowed_at", "_suppressed")

    def __init__(self, clock: Callable[[], float], interval: float) -> None:
        self._clock = clock
        self._interval = interval
        self._last_allowed_at = -math.inf
        self._suppressed = 0

    def allow(self) -> int | None:
        """Return how many lines were suppressed since the last one, or ``None`` to suppress this one as well."""
        now = self._clock()
        if 0 <= now - self._last_allowed_at < self._interval:
            self._suppressed += 1
            return None
        suppressed, self._suppressed = self._suppressed, 0
        self._last_allowed_at = now
        return suppressed


class RateLimitedLogger:
    """Log internal errors and what limits do, each message at most once per ``interval`` seconds of ``clock``."""

    _log = Logger()

    def __init__(self, clock: Callable[[], float], interval: float = 10.0) -> None:
        self._clock = clock
        self._interval = interval
        self._limiters: dict[str, LogLimiter] = {}

    def failure(self, message: str, failure: Failure | None = None) -> None:
        """Log a failure; by default the exception that is being handled.

        ``message`` is one of a few fixed texts: there is one limit for each.
        """
        suppressed = self._allow(message)
        if suppressed is not None:
            self._log.failure(
                "{what} ({suppressed} more since the last report)", failure, what=message, suppressed=suppressed
            )

    def warn(self, message: str, **fields: object) -> None:
        """Log a warning. ``message`` is one of a few fixed formats of ``fields``: there is one limit for each."""
        suppressed = self._allow(message)
        if suppressed is not None:
            more = f" ({suppressed} more since the last report)" if suppressed else ""
            self._log.warn(message + more, **fields)

    def _allow(self, message: str) -> int | None:
        limiter = self._limiters.get(message)
        if limiter is None:
            limiter = self._limiters[message] = LogLimiter(self._clock, self._interval)
        return limiter.allow()


def one_line(text: object) -> str:
    """Make an untrusted text fit for a log line: printable ASCII, one line, at most 300 characters."""
    shown = " ".join(str(text).split())
    shown = ascii(shown)[1:-1].replace("\\'", "'")
    return shown if len(shown) <= _MAX_LINE_LENGTH else f"{shown[:_MAX_LINE_LENGTH]}…"
