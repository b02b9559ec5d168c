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
from gateway.agent.session import RPCSession
from gateway.protocol.frames import CloseCode
from gateway.protocol.uri import WebSocketURI
from gateway.websocket.client import ClientConnection, CloseEvent
from gateway.websocket.errors import MAX_DELAY, HandshakeError, HandshakeRefusedError, parse_delay

#: redirects that are followed on the way to one connection
MAX_REDIRECTS = 3
_PROTOCOL_ERROR_CODES = frozenset(
    {
        CloseCode.PROTOCOL_ERROR,
        CloseCode.UNSUPPORTED_DATA,
        CloseCode.INVALID_DATA,
        CloseCode.MESSAGE_TOO_BIG,
        CloseCode.MANDATORY_EXTENSION,
    }
)


_AUTH_STATUSES = frozenset({401, 403})
_FINAL_STATUSES = frozenset({400, 404})


class Action(enum.Enum):
    """What to do next."""

    STOP = "stop"
    #: after a random wait that grows with each failure
    RETRY = "again"
    #: after the longest of those waits
    RETRY_AT_MAX_DELAY = "later"


def action_after_close(event: CloseEvent, *, token_may_change: bool) -> Action:
    """What follows the end of an open connection. ``new_token``: there may be another one next time."""
    if event.initiated_locally:
        # What this side complained of may be better at the next node; whole fleets must not stop for it.
        return Action.RETRY if event.code == CloseCode.ABNORMAL_CLOSURE else Action.RETRY_AT_MAX_DELAY
    if event.code == CloseCode.REPLACED or event.code in _PROTOCOL_ERROR_CODES:
        return Action.STOP
    if event.code == CloseCode.POLICY_VIOLATION:
        return Action.RETRY if token_may_change else Action.STOP
    return Action.RETRY_AT_MAX_DELAY if event.code == CloseCode.DISCONNECTED else Action.RETRY


def action_after_refusal(status: int, *, token_may_change: bool) -> Action:
    """What follows a refusal at the configured url."""
    if status in _AUTH_STATUSES:
        return Action.RETRY if token_may_change else Action.STOP
    if status in _FINAL_STATUSES:
        return Action.RETRY_AT_MAX_DELAY if token_may_change else Action.STOP
    return Action.RETRY


class Backoff:
    """Waits with full jitter: ``jitter() * min(maximum, initial * 2 ** n)`` seconds, for n failures in a row before.

    ``jitter`` returns a number from 0 to 1. Raises ``ValueError`` for waits that are none.
    """

    def __init__(self, initial: float, maximum: float, jitter: Callable[[], float]) -> None:
        if not 0 < initial <= maximum <= MAX_DELAY:
            raise ValueError(
                f"backoff {(initial, maximum)!r} is not (initial, maximum) seconds "
                f"with 0 < initial <= maximum <= {MAX_DELAY:g}"
            )
        self.initial = initial
        self.maximum = maximum
        self._jitter = jitter
        self._failures = 0

    def next_delay(self, *, at_maximum: bool = False) -> float:
        """The wait after one more failure, in seconds; the longest one if it is to be ``late``."""
        wait = self.peek_delay()
        self._failures += 1
        return self.maximum if at_maximum else wait

    def peek_delay(self) -> float:
        """The wait after one more failure, in seconds, if there were one."""
        # A power beyond this one is more than LONGEST_WAIT for any initial wait above a nanosecond.
        return self._jitter() * min(self.maximum, self.initial * 2.0 ** min(self._failures, 64))

    @property
    def is_failing(self) -> bool:
        """Whether there was a failure since the last reset."""
        return self._failures > 0

    def reset(self) -> None:
        """Forget the failures."""
        self._failures = 0

    @property
    def reset_after(self) -> float:
        """A connection that stayed for so many seconds was no failure."""
        return min(self.maximum, 60.0)


class ActiveConnection:
    """One connection, from its opening on."""

    #: what the last goaway asked for
    goaway: GoAway | None = None
    #: where it is time to go while the connection stays open
    next_attempt: Attempt | None = None

    def __init__(
        self, connection: ClientConnection, session: RPCSession, clock: IReactorTime, token: str | None = None
    ) -> None:
        self.connection = connection
        self.session = session
        #: by what it was opened
        self.token = token
        #: fires when the connection has ended, or when there is an :attr:`onward`
        self.finished: Deferred[None] = Deferred()
        self._clock = clock
        #: when it was begun, by that clock
        self.opened_at = clock.seconds()
        self._timer: IDelayedCall | None = None
        connection.closed.addCallback(self._on_close)

    def goaway_received(self, goaway: GoAway, next_attempt: Attempt | None) -> None:
        """Go on by ``onward`` after its wait; without it, wait for the end."""
        self.goaway = goaway
        self._cancel_timer()
        if next_attempt is not None and not self.finished.called:
            self._timer = self._clock.callLater(
                next_attempt.delay, self._hand_off, attrs.evolve(next_attempt, delay=0.0)
            )

    def _hand_off(self, next_attempt: Attempt) -> None:
        self._timer = None
        self.next_attempt = next_attempt
        self.finished.callback(None)

    def _on_close(self, event: CloseEvent) -> CloseEvent:
        self._cancel_timer()
        if not self.finished.called:
            self.finished.callback(None)
        return event

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def wait_closed(self) -> CloseEvent:
        """Wait for the end of the connection, and for that of its transport."""
        ended = await self.connection.closed
        self.session.close(f"the connection to the gateway ended ({ended.code})")
        await self.connection.disconnected
        return ended


@attrs.frozen
class GoAway:
    """What a ``gateway.goaway`` asked for: its url, and the seconds to wait; ``None`` where it did not say."""

    url: str | None
    after: float | None

    @classmethod
    def from_params(cls, params: object) -> GoAway:
        """Take what is usable of the params."""
        named = params if isinstance(params, dict) else {}
        url, after = named.get("url"), named.get("after")
        return cls(url if isinstance(url, str) else None, None if after is None else parse_delay(after))


@attrs.frozen
class Attempt:
    """What comes next: an attempt at ``target`` after ``delay`` seconds, or a stop; and why."""

    target: WebSocketURI
    reason: str = ""
    delay: float = 0.0
    stop: Stopped | None = None


class ReconnectPolicy:
    """The way of one agent. ``new_token``: there may be another token at the next attempt; ``new_certificate``: another
    certificate, which may be what the end of a connection was about."""

    def __init__(
        self,
        configured: WebSocketURI,
        backoff: Backoff,
        *,
        token_may_change: bool,
        certificate_may_change: bool = False,
    ) -> None:
        self._configured = configured
        self._backoff = backoff
        self._token_may_change = token_may_change
        self._certificate_may_change = certificate_may_change
        self._redirects = 0

    def first_attempt(self) -> Attempt:
        """The first step."""
        self._redirects = 0
        self._backoff.reset()
        return Attempt(self._configured)

    def after_close(
        self, target: WebSocketURI, event: CloseEvent, *, connected_for: float, goaway: GoAway | None
    ) -> Attempt:
        """An open connection to ``target`` has ended after ``stayed`` seconds."""
        self._redirects = 0
        if connected_for >= self._backoff.reset_after:
            self._backoff.reset()
        why = f"{event.code} {event.reason[:200]!a}"
        then = action_after_close(event, token_may_change=self._token_may_change or self._certificate_may_change)
        if then is Action.STOP:
            return Attempt(target, stop=Stopped(event.code, f"the gateway closed the connection with {why}"))
        if goaway is None or then is Action.RETRY_AT_MAX_DELAY:
            return self._retry(f"the connection ended with {why}", then)
        # The wait that was asked for is random already; more only for one that is sent from pillar to post.
        more = goaway.after is None or self._backoff.is_failing
        step = self._retry(f"asked to move, then {why}", then, min_delay=goaway.after or 0.0, jittered=more)
        return step if goaway.url is None else self._redirect(target, goaway.url, step)

    def after_goaway(self, target: WebSocketURI, goaway: GoAway, *, connected_for: float) -> Attempt | None:
        """A connection to ``target`` that has been open for ``stayed`` seconds is to be left open, for its calls: where
        to go, and after what wait. ``None`` if there is no url that can be followed: then its end is to be waited for.

        :meth:`gone_on` must be told when it is done.
        """
        if goaway.url is None:
            return None
        try:
            onward = target.resolve_redirect(goaway.url)
        except ValueError:
            return None
        if connected_for >= self._backoff.reset_after:
            self._backoff.reset()
        more = self._backoff.peek_delay() if goaway.after is None or self._backoff.is_failing else 0.0
        return Attempt(onward, "asked to move", (goaway.after or 0.0) + more)

    def record_handoff(self) -> None:
        """A connection was left open: who is told that again and again goes on ever more slowly."""
        self._redirects = 0
        self._backoff.next_delay()

    def after_failure(self, target: WebSocketURI, error: Exception) -> Attempt:
        """An attempt at ``target`` has failed."""
        why = (
            str(error)
            if isinstance(error, (HandshakeRefusedError, HandshakeError))
            else f"{type(error).__name__}: {error}"
        )
        why = f"could not connect to {target.url}: {why[:500]}"
        if isinstance(error, HandshakeRefusedError) and error.location is not None and self._redirects < MAX_REDIRECTS:
            step = self._redirect(target, error.location, Attempt(target, why))
            if step.reason is why:
                self._redirects += 1
                return step
            why = step.reason
        self._redirects = 0
        then, at_least = Action.RETRY, 0.0
        if isinstance(error, HandshakeRefusedError):
            at_least = error.retry_after
            if target == self._configured:  # at a url that was handed out, no refusal is final
                then = action_after_refusal(error.status, token_may_change=self._token_may_change)
            if then is Action.STOP:
                return Attempt(target, stop=Stopped(error.status, why))
        return self._retry(why, then, min_delay=at_least)

    def _retry(self, reason: str, action: Action, *, min_delay: float = 0.0, jittered: bool = True) -> Attempt:
        """Come back to the configured url, after ``at_least`` seconds and a wait of the back-off."""
        delay = self._backoff.next_delay(at_maximum=action is Action.RETRY_AT_MAX_DELAY)
        return Attempt(self._configured, reason, min_delay + delay if jittered else min_delay)

    def _redirect(self, target: WebSocketURI, url: str, attempt: Attempt) -> Attempt:
        """The same step to a url that was handed out at ``target``, if it can be followed."""
        try:
            return attrs.evolve(attempt, target=target.resolve_redirect(url))
        except ValueError as e:
            return attrs.evolve(attempt, reason=f"{attempt.reason}; does not follow {url[:200]!a}: {e}")
