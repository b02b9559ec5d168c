"""Why tokens and certificates are refused: for who runs the node, not for who shows them.

wsgateway_token_refusals_total{reason="audience"}      a counter for each reason
3 tokens or certificates were refused within 60 s; the last one: its audience (aud) is another (--auth jwt:…)
                                                       a line a minute at most, with nothing of a token in it
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.logger import Logger

from gateway.auth.interface import TokenRefusedError
from gateway.metrics import Metrics

#: seconds between two lines in the log
LOG_INTERVAL = 60.0

#: reason -> in words; a token that several have looked at is refused for the last of theirs in this order
REASONS = {
    "no_certificate": "no client certificate was shown",
    "certificate_name": "its SubjectAlternativeName has no client_id",
    "malformed": "it is no JSON Web Token, or one that cannot be read",
    "algorithm": "its algorithm is not among those that are allowed",
    "issuer": "its issuer (iss) is another, or is missing",
    "unknown_key": "its key is not known",
    "signature": "no key that is known has signed it",
    "audience": "its audience (aud) is another, or is missing",
    "not_yet": "it is not valid yet (nbf, iat)",
    "subject": "its subject (sub) is no client_id, or is missing",
    "expired": "it has expired",
    "other": "it has what is not known here",
}

_RANKS = {reason: rank for rank, reason in enumerate(REASONS)}


class VerificationError(TokenRefusedError):
    """One way to accept tokens does not accept this one. The text is for who has sent it; ``reason`` and ``where``, the
    ``--auth`` that looked at it, are for the log."""

    def __init__(self, reason: str, source: str = "", text: str = "this token is not known here") -> None:
        super().__init__(text)
        self.reason = reason
        self.source = source

    def is_more_specific_than(self, other: VerificationError | None) -> bool:
        """Whether it came further than in another."""
        return other is None or _RANKS[self.reason] > _RANKS[other.reason]


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
