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
from gateway.util.log import LogLimiter

#: seconds between two lines in the log
LOG_INTERVAL = 60.0


class RefusalLog:
    """Count refusals, and log them, rate-limited. ``wall_clock`` returns seconds."""

    _log = Logger()

    def __init__(self, metrics: Metrics, wall_clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._log_limiter = LogLimiter(wall_clock, LOG_INTERVAL)
        self._last_logged_at: float | None = None

    def record(self, error: VerificationError) -> None:
        """Count a refusal, and log it unless another was logged within :data:`LOG_INTERVAL`."""
        self._metrics.token_refusals[error.reason] += 1
        suppressed = self._log_limiter.allow()
        if suppressed is None:
            return
        now = self._wall_clock()
        what = f"{suppressed + 1} tokens or certificates were" if suppressed else "a token or certificate was"
        period = "" if self._last_logged_at is None else f" within {now - self._last_logged_at:.0f} s"
        last = "; the last one" if suppressed else ""
        source = f" ({error.source})" if error.source else ""
        reason = f"{REASONS[error.reason]}{source}"
        self._log.warn("{what} refused{period}{last}: {reason}", what=what, period=period, last=last, reason=reason)
        self._last_logged_at = now
