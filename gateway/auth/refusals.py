"""Count and log why tokens and certificates are refused, for the operator: the reason is not sent to clients.

wsgateway_token_refusals_total{reason="audience"}
    a counter for each reason
3 tokens or certificates were refused within 60 s; the last one: its audience (aud) is wrong or missing (--auth jwt:…)
    at most one log line a minute, with nothing of a token in it
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.logger import Logger

from gateway.auth.errors import REASONS, VerificationError
from gateway.metrics import Metrics

#: seconds between two lines in the log
LOG_INTERVAL = 60.0


class RefusalLog:
    """Count refusals, and log them, rate-limited. ``wall_clock`` returns seconds."""

    _log = Logger()

    def __init__(self, metrics: Metrics, wall_clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._last_logged_at: float | None = None
        #: refusals since the last log line
        self._unlogged = 0

    def record(self, error: VerificationError) -> None:
        """Count a refusal, and log it unless another was logged within :data:`LOG_INTERVAL`."""
        self._metrics.token_refusals[error.reason] += 1
        self._unlogged += 1
        now = self._wall_clock()
        elapsed = LOG_INTERVAL if self._last_logged_at is None else now - self._last_logged_at
        # Negative if the clock was set back.
        if 0 <= elapsed < LOG_INTERVAL:
            return
        what = "a token or certificate was" if self._unlogged == 1 else f"{self._unlogged} tokens or certificates were"
        period = "" if self._last_logged_at is None else f" within {elapsed:.0f} s"
        last = "" if self._unlogged == 1 else "; the last one"
        source = f" ({error.source})" if error.source else ""
        reason = f"{REASONS[error.reason]}{source}"
        self._log.warn("{what} refused{period}{last}: {reason}", what=what, period=period, last=last, reason=reason)
        self._last_logged_at, self._unlogged = now, 0
