"""When and where to an agent comes back after a connection, or an attempt at one, has ended. No I/O.

What a gateway says with a close code or an HTTP status decides: come back after a random wait, come back late, or stop.

How long an agent stays with an open connection: until it ends, or until the time that a ``gateway.goaway`` named.

The gateway closes a connection that it told to go as soon as the calls on it are over. Where that takes longer than the
agent was asked to wait, it goes on before: the connection is left to the gateway, responses still pass over it, and new
calls reach the agent by the next one.

Where an agent goes next, and after what wait. No I/O.

closed with 1006, or 503 …              -> the configured url, after a random wait that grows
307 with a Location                     -> there, at once; at most three times in a row
gateway.goaway, then closed with 1012   -> its url, after the wait that it named
gateway.goaway, and still open then     -> its url, while the calls in flight end on the connection
anything at a url that was handed out   -> the configured url, after a random wait
closed with 4001, or 403 …              -> nowhere: stop
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from gateway.agent.errors import Stopped
from gateway.agent.session import Session
from gateway.protocol.uri import Target
from gateway.websocket.client import LONGEST_WAIT, Connection, Ended, OpeningFailed, Refused, wait_asked_for

#: redirects that are followed on the way to one connection
MAX_HOPS = 3


_BUGS = frozenset({1002, 1003, 1007, 1009, 1010})


_REPLACED = 4001


_DISCONNECTED = 4003


_POLICY = 1008


_REFUSALS_BY_TOKEN = frozenset({401, 403})


_REFUSALS = frozenset({400, 404})


class Then(enum.Enum):
    """What to do next."""

    STOP = "stop"
    #: after a random wait that grows with each failure
    AGAIN = "again"
    #: after the longest of those waits
    LATER = "later"


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


class Stay:
    """One connection, from its opening on."""

    #: what the last goaway asked for
    goaway: GoAway | None = None
    #: where it is time to go while the connection stays open
    onward: Step | None = None

    def __init__(self, connection: Connection, session: Session, clock: IReactorTime, token: str | None = None) -> None:
        self.connection = connection
        self.session = session
        #: by what it was opened
        self.token = token
        #: fires when the connection has ended, or when there is an :attr:`onward`
        self.over: Deferred[None] = Deferred()
        self._clock = clock
        #: when it was begun, by that clock
        self.since = clock.seconds()
        self._timer: IDelayedCall | None = None
        connection.closing.addCallback(self._closing)

    def asked_to_go(self, goaway: GoAway, onward: Step | None) -> None:
        """Go on by ``onward`` after its wait; without it, wait for the end."""
        self.goaway = goaway
        self._cancel()
        if onward is not None and not self.over.called:
            self._timer = self._clock.callLater(onward.delay, self._go, attrs.evolve(onward, delay=0.0))

    def _go(self, onward: Step) -> None:
        self._timer = None
        self.onward = onward
        self.over.callback(None)

    def _closing(self, ended: Ended) -> Ended:
        self._cancel()
        if not self.over.called:
            self.over.callback(None)
        return ended

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def end(self) -> Ended:
        """Wait for the end of the connection, and for that of its transport."""
        ended = await self.connection.closing
        self.session.close(f"the connection to the gateway ended ({ended.code})")
        await self.connection.gone
        return ended


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
