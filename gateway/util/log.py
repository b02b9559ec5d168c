from __future__ import annotations

import math
from collections.abc import Callable

from twisted.logger import Logger
from twisted.python.failure import Failure


class Troubles:
    """Reports errors that are nobody's fault outside, at most one of a kind in so many seconds."""

    _log = Logger()

    def __init__(self, seconds: Callable[[], float], every: float = 10.0) -> None:
        self._seconds = seconds
        self._every = every
        #: what -> (when it was last logged, how many were not)
        self._kinds: dict[str, tuple[float, int]] = {}

    def report(self, what: str, failure: Failure | None = None) -> None:
        """Log a failure (by default the exception that is being handled). ``what`` is one of a few fixed texts."""
        now = self._seconds()
        last, hidden = self._kinds.get(what, (-math.inf, 0))
        if now - last < self._every:
            self._kinds[what] = (last, hidden + 1)
            return
        self._kinds[what] = (now, 0)
        self._log.failure("{what} ({hidden} more since the last report)", failure, what=what, hidden=hidden)


def one_line(text: object) -> str:
    """What a log line may have of a text from outside."""
    shown = " ".join(str(text).split())
    shown = ascii(shown)[1:-1].replace("\\'", "'")
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"


#: the most characters of an error that stand in a log line
_LONGEST = 300
