"""Where an agent goes next, and after what wait. No I/O.

closed with 1006, or 503 …              -> the configured url, after a random wait that grows
307 with a Location                     -> there, at once; at most three times in a row
gateway.goaway, then closed with 1012   -> its url, after the wait that it named
gateway.goaway, and still open then     -> its url, while the calls in flight end on the connection
anything at a url that was handed out   -> the configured url, after a random wait
closed with 4001, or 403 …              -> nowhere: stop
"""

from __future__ import annotations

import attrs

from gateway._agent.errors import Stopped
from gateway._agent.policy import (
    MAX_HOPS,
    Backoff,
    Ended,
    OpeningFailed,
    Refused,
    Then,
    after_end,
    after_refusal,
    wait_asked_for,
)
from gateway._agent.url import Target


@attrs.frozen
class GoAway:
    """What a ``gateway.goaway`` asked for: its url, and the seconds to wait; ``None`` where it did not say."""

    url: str | None
    after: float | None

    @classmethod
    def read(cls, params: object) -> GoAway:
        """Take what is usable of the params."""
        named = params if isinstance(params, dict) else {}
        url, after = named.get("url"), named.get("after")
        return cls(url if isinstance(url, str) else None, None if after is None else wait_asked_for(after))


@attrs.frozen
class Step:
    """What comes next: an attempt at ``target`` after ``delay`` seconds, or a stop; and why."""

    target: Target
    why: str = ""
    delay: float = 0.0
    stop: Stopped | None = None


class Itinerary:
    """The way of one agent. ``new_token``: there may be another token at the next attempt; ``new_certificate``: another
    certificate, which may be what the end of a connection was about."""

    def __init__(self, configured: Target, backoff: Backoff, *, new_token: bool, new_certificate: bool = False) -> None:
        self._configured = configured
        self._backoff = backoff
        self._new_token = new_token
        self._new_certificate = new_certificate
        self._hops = 0

    def begin(self) -> Step:
        """The first step."""
        self._hops = 0
        self._backoff.reset()
        return Step(self._configured)

    def after_end(self, target: Target, ended: Ended, *, stayed: float, goaway: GoAway | None) -> Step:
        """An open connection to ``target`` has ended after ``stayed`` seconds."""
        self._hops = 0
        if stayed >= self._backoff.settled_after:
            self._backoff.reset()
        why = f"{ended.code} {ended.reason[:200]!a}"
        then = after_end(ended, new_token=self._new_token or self._new_certificate)
        if then is Then.STOP:
            return Step(target, stop=Stopped(ended.code, f"the gateway closed the connection with {why}"))
        if goaway is None or then is Then.LATER:
            return self._back(f"the connection ended with {why}", then)
        # The wait that was asked for is random already; more only for one that is sent from pillar to post.
        more = goaway.after is None or self._backoff.failing
        step = self._back(f"asked to move, then {why}", then, at_least=goaway.after or 0.0, jittered=more)
        return step if goaway.url is None else self._onward(target, goaway.url, step)

    def after_goaway(self, target: Target, goaway: GoAway, *, stayed: float) -> Step | None:
        """A connection to ``target`` that has been open for ``stayed`` seconds is to be left open, for its calls: where
        to go, and after what wait. ``None`` if there is no url that can be followed: then its end is to be waited for.

        :meth:`gone_on` must be told when it is done.
        """
        if goaway.url is None:
            return None
        try:
            onward = target.follow(goaway.url)
        except ValueError:
            return None
        if stayed >= self._backoff.settled_after:
            self._backoff.reset()
        more = self._backoff.peek() if goaway.after is None or self._backoff.failing else 0.0
        return Step(onward, "asked to move", (goaway.after or 0.0) + more)

    def gone_on(self) -> None:
        """A connection was left open: who is told that again and again goes on ever more slowly."""
        self._hops = 0
        self._backoff.next()

    def after_failure(self, target: Target, error: Exception) -> Step:
        """An attempt at ``target`` has failed."""
        why = str(error) if isinstance(error, (Refused, OpeningFailed)) else f"{type(error).__name__}: {error}"
        why = f"could not connect to {target.url}: {why[:500]}"
        if isinstance(error, Refused) and error.location is not None and self._hops < MAX_HOPS:
            step = self._onward(target, error.location, Step(target, why))
            if step.why is why:
                self._hops += 1
                return step
            why = step.why
        self._hops = 0
        then, at_least = Then.AGAIN, 0.0
        if isinstance(error, Refused):
            at_least = error.retry_after
            if target == self._configured:  # at a url that was handed out, no refusal is final
                then = after_refusal(error.status, new_token=self._new_token)
            if then is Then.STOP:
                return Step(target, stop=Stopped(error.status, why))
        return self._back(why, then, at_least=at_least)

    def _back(self, why: str, then: Then, *, at_least: float = 0.0, jittered: bool = True) -> Step:
        """Come back to the configured url, after ``at_least`` seconds and a wait of the back-off."""
        delay = self._backoff.next(late=then is Then.LATER)
        return Step(self._configured, why, at_least + delay if jittered else at_least)

    def _onward(self, target: Target, url: str, step: Step) -> Step:
        """The same step to a url that was handed out at ``target``, if it can be followed."""
        try:
            return attrs.evolve(step, target=target.follow(url))
        except ValueError as e:
            return attrs.evolve(step, why=f"{step.why}; does not follow {url[:200]!a}: {e}")
