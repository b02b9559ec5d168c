from __future__ import annotations

import math
from collections.abc import Callable

from twisted.logger import Logger
from twisted.python.failure import Failure


class RateLimitedLogger:
    """Reports errors that are nobody's fault outside, at most one of a kind in so many seconds."""

    _log = Logger()

    def __init__(self, clock: Callable[[], float], interval: float = 10.0) -> None:
        self._clock = clock
        self._interval = interval
        #: what -> (when it was last logged, how many were not)
        self._last_logged: dict[str, tuple[float, int]] = {}

    def failure(self, message: str, failure: Failure | None = None) -> None:
        """Log a failure (by default the exception that is being handled). ``what`` is one of a few fixed texts."""
        now = self._clock()
        last, hidden = self._last_logged.get(message, (-math.inf, 0))
        if now - last < self._interval:
            self._last_logged[message] = (last, hidden + 1)
            return
        self._last_logged[message] = (now, 0)
        self._log.failure("{what} ({hidden} more since the last report)", failure, what=message, hidden=hidden)


def one_line(text: object) -> str:
    """What a log line may have of a text from outside."""
    shown = " ".join(str(text).split())
    shown = ascii(shown)[1:-1].replace("\\'", "'")
    return shown if len(shown) <= _MAX_LINE_LENGTH else f"{shown[:_MAX_LINE_LENGTH]}…"


#: the most characters of an error that stand in a log line
_MAX_LINE_LENGTH = 300
