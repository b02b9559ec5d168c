"""Why tokens and certificates are refused: for who runs the node, not for who shows them.

wsgateway_token_refusals_total{reason="audience"}      a counter for each reason
3 tokens or certificates were refused within 60 s; the last one: its audience (aud) is another (--auth jwt:…)
                                                       a line a minute at most, with nothing of a token in it
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.logger import Logger

from gateway.auth.errors import REASONS, VerificationError
from gateway.metrics import Metrics

#: seconds between two lines in the log
LOG_INTERVAL = 60.0


class RefusalLog:
    """Counts them, and tells the log. ``now`` is in seconds."""

    _log = Logger()

    def __init__(self, metrics: Metrics, wall_clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._last_logged_at: float | None = None
        #: those that no line was about
        self._unlogged = 0

    def record(self, error: VerificationError) -> None:
        """One more."""
        self._metrics.token_refusals[error.reason] += 1
        self._unlogged += 1
        now = self._wall_clock()
        passed = LOG_INTERVAL if self._last_logged_at is None else now - self._last_logged_at
        # A clock may be set back.
        if 0 <= passed < LOG_INTERVAL:
            return
        what = "a token or certificate was" if self._unlogged == 1 else f"{self._unlogged} tokens or certificates were"
        ago = "" if self._last_logged_at is None else f" within {passed:.0f} s"
        last = "" if self._unlogged == 1 else "; the last one"
        where = f" ({error.source})" if error.source else ""
        why = f"{REASONS[error.reason]}{where}"
        self._log.warn("{what} refused{ago}{last}: {why}", what=what, ago=ago, last=last, why=why)
        self._last_logged_at, self._unlogged = now, 0
