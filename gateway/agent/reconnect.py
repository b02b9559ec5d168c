"""Reconnect policy: decide whether, where and when to connect next, by close code, HTTP status and goaway. No I/O.

    closed with 1006, 503 …                 -> the configured url, after a random delay that grows
    307 with Location                       -> that url, at once; at most three times in a row
    gateway.goaway, then closed with 1012   -> the goaway's url, after its delay
    gateway.goaway, still open by then      -> the goaway's url; calls in flight end on the old connection
    any failure at a url from the gateway,
    such as 401 for its ticket              -> the configured url, after a random delay
    closed with 4001, the gateway's 403 …   -> stop
    403, 404 … of a proxy                   -> as 503: it says nothing about the gateway

After a goaway the gateway closes the connection as soon as no calls are in flight on it. If that takes longer than the
delay of the goaway, the agent connects anyway: the old connection is handed off to the gateway, responses are still
sent over it, and new calls arrive over the new one.
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
from gateway.protocol.uri import WebSocketURI, without_ticket
from gateway.util.backoff import Backoff
from gateway.websocket.client import ClientConnection, CloseEvent
from gateway.websocket.errors import MAX_DELAY, HandshakeError, HandshakeRefusedError, parse_delay

#: consecutive redirects that are followed
MAX_REDIRECTS = 3
#: seconds after which a connection counts as a success, at most; less if the maximum delay is less
MAX_RESET_AFTER = 60.0
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
#: the gateway's error words, by status, of refusals that the same request would get again
_FINAL_WORDS = {
    400: frozenset({"client_id", "header", "method", "request", "upgrade"}),
    401: frozenset({"token"}),
    403: frozenset({"identity", "origin"}),
    404: frozenset({"path"}),
}


class Action(enum.Enum):
    """What to do after a connection was closed or refused."""

    STOP = "stop"
    #: after a random delay that grows with each failure
    RETRY = "again"
    #: after the maximum delay
    RETRY_AT_MAX_DELAY = "later"


def action_after_close(event: CloseEvent, *, token_may_change: bool) -> Action:
    """Return the action after an open connection was closed. ``token_may_change``: the next attempt may use another."""
    if event.initiated_locally:
        # What this side objected to may be right at the next node; it must not stop all clients of a fleet.
        return Action.RETRY if event.code == CloseCode.ABNORMAL_CLOSURE else Action.RETRY_AT_MAX_DELAY
    if event.code == CloseCode.REPLACED or event.code in _PROTOCOL_ERROR_CODES:
        return Action.STOP
    if event.code == CloseCode.POLICY_VIOLATION:
        return Action.RETRY if token_may_change else Action.STOP
    return Action.RETRY_AT_MAX_DELAY if event.code == CloseCode.DISCONNECTED else Action.RETRY


def action_after_refusal(status: int, word: str, *, token_may_change: bool) -> Action:
    """Return the action after a refused opening handshake at the configured url.

    ``word`` is the error word of the gateway. A refusal without one is that of a proxy, such as its 404 while the
    gateway is being deployed: it is never final.
    """
    if word not in _FINAL_WORDS.get(status, ()):
        return Action.RETRY
    if status in _AUTH_STATUSES:
        return Action.RETRY if token_may_change else Action.STOP
    return Action.RETRY_AT_MAX_DELAY if token_may_change else Action.STOP


def make_backoff(initial: float, maximum: float, jitter: Callable[[], float]) -> Backoff:
    """Return a backoff whose delays are multiplied by ``jitter()``, a random number from 0 to 1 (full jitter).

    Raises ``ValueError`` if the delays are invalid.
    """
    if not 0 < initial <= maximum <= MAX_DELAY:
        raise ValueError(
            f"backoff {(initial, maximum)!r} is not (initial, maximum) seconds "
            f"with 0 < initial <= maximum <= {MAX_DELAY:g}"
        )
    return Backoff(initial, maximum, jitter)


class ActiveConnection:
    """The current connection: until it is closed, or handed off after a goaway.

    ``token`` is that of the opening handshake.
    """

    #: the last goaway
    goaway: GoAway | None = None
    #: set when the connection is handed off
    next_attempt: Attempt | None = None

    def __init__(
        self, connection: ClientConnection, session: RPCSession, clock: IReactorTime, token: str | None = None
    ) -> None:
        self.connection = connection
        self.session = session
        self.token = token
        #: fires when the connection is closed or handed off
        self.finished: Deferred[None] = Deferred()
        self._clock = clock
        self.opened_at = clock.seconds()
        self._timer: IDelayedCall | None = None
        connection.closed.addCallback(self._on_close)

    def goaway_received(self, goaway: GoAway, next_attempt: Attempt | None) -> None:
        """Hand off the connection after the delay of ``next_attempt``; if ``None``, wait until it is closed."""
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
        """Wait until the connection is closed and its transport is disconnected."""
        event = await self.connection.closed
        self.session.close(f"the connection to the gateway ended ({event.code})")
        await self.connection.disconnected
        return event


@attrs.frozen
class GoAway:
    """The params of a ``gateway.goaway``. ``after`` is in seconds; what is missing is ``None``."""

    url: str | None = attrs.field(repr=False)  # it may have a ticket
    after: float | None

    @classmethod
    def from_params(cls, params: object) -> GoAway:
        """Parse params; ignore what is invalid."""
        members = params if isinstance(params, dict) else {}
        url, after = members.get("url"), members.get("after")
        return cls(url if isinstance(url, str) else None, None if after is None else parse_delay(after))


@attrs.frozen
class Attempt:
    """The next attempt, at ``target`` after ``delay`` seconds; or a ``stop``. ``reason`` is for the log."""

    target: WebSocketURI
    reason: str = ""
    delay: float = 0.0
    stop: Stopped | None = None


class ReconnectPolicy:
    """Decide the next attempt of one agent.

    ``token_may_change``: the next attempt may use another token. ``certificate_may_change``: the next attempt may use
    another client certificate, and the gateway may have closed the connection because the current one expired.
    """

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
        self._reset_after = min(backoff.maximum, MAX_RESET_AFTER)
        self._token_may_change = token_may_change
        self._certificate_may_change = certificate_may_change
        self._redirects = 0

    def first_attempt(self) -> Attempt:
        self._redirects = 0
        self._backoff.reset()
        return Attempt(self._configured)

    def after_close(
        self, target: WebSocketURI, event: CloseEvent, *, connected_for: float, goaway: GoAway | None
    ) -> Attempt:
        """Return the next attempt after an open connection to ``target`` was closed after ``connected_for`` seconds."""
        self._redirects = 0
        if connected_for >= self._reset_after:
            self._backoff.reset()
        # Without a close frame the reason is only Twisted's, which may contradict the code.
        is_lost = event.code == CloseCode.ABNORMAL_CLOSURE and not event.initiated_locally
        cause = f"{event.code}" if is_lost else f"{event.code} {event.reason[:200]!a}"
        action = action_after_close(event, token_may_change=self._token_may_change or self._certificate_may_change)
        if action is Action.STOP:
            return Attempt(target, stop=Stopped(event.code, f"the gateway closed the connection with {cause}"))
        if goaway is None or action is Action.RETRY_AT_MAX_DELAY:
            reason = f"connection lost ({cause})" if is_lost else f"the connection was closed with {cause}"
            return self._retry(reason, action)
        # The delay of the goaway is random already; add the backoff only for a client that is moved repeatedly.
        jittered = goaway.after is None or self._backoff.failures > 0
        attempt = self._retry(
            f"the gateway asked to reconnect ({cause})", action, min_delay=goaway.after or 0.0, jittered=jittered
        )
        return attempt if goaway.url is None else self._redirect(target, goaway.url, attempt)

    def after_goaway(self, target: WebSocketURI, goaway: GoAway, *, connected_for: float) -> Attempt | None:
        """Return the next attempt for a connection to ``target`` that is open for its calls in flight.

        ``connected_for`` is in seconds. Returns ``None`` if there is no usable url: then wait for the close. Call
        :meth:`record_handoff` when the connection is handed off.
        """
        if goaway.url is None:
            return None
        try:
            next_target = target.resolve_redirect(goaway.url)
        except ValueError:
            return None
        if connected_for >= self._reset_after:
            self._backoff.reset()
        extra = self._backoff.peek_delay() if goaway.after is None or self._backoff.failures else 0.0
        return Attempt(next_target, "the gateway asked to reconnect", (goaway.after or 0.0) + extra)

    def record_handoff(self) -> None:
        """Count a handoff as a failure, so that a client that is moved repeatedly slows down."""
        self._redirects = 0
        self._backoff.next_delay()

    def after_failure(self, target: WebSocketURI, error: Exception) -> Attempt:
        """Return the next attempt after one at ``target`` has failed."""
        cause = (
            str(error)
            if isinstance(error, (HandshakeRefusedError, HandshakeError))
            else f"{type(error).__name__}: {error}"
        )
        reason = f"could not connect to {target.loggable_url}: {cause[:500]}"
        if isinstance(error, HandshakeRefusedError) and error.location is not None and self._redirects < MAX_REDIRECTS:
            attempt = self._redirect(target, error.location, Attempt(target, reason))
            if attempt.reason is reason:
                self._redirects += 1
                return attempt
            reason = attempt.reason
        self._redirects = 0
        action, min_delay = Action.RETRY, 0.0
        if isinstance(error, HandshakeRefusedError):
            min_delay = error.retry_after
            if target == self._configured:  # a refusal at a url from the gateway is never final
                action = action_after_refusal(error.status, error.word, token_may_change=self._token_may_change)
            if action is Action.STOP:
                return Attempt(target, stop=Stopped(error.status, reason))
        return self._retry(reason, action, min_delay=min_delay)

    def _retry(self, reason: str, action: Action, *, min_delay: float = 0.0, jittered: bool = True) -> Attempt:
        """Return an attempt at the configured url, after ``min_delay`` seconds and, if ``jittered``, the backoff."""
        delay = self._backoff.next_delay(at_maximum=action is Action.RETRY_AT_MAX_DELAY)
        return Attempt(self._configured, reason, min_delay + delay if jittered else min_delay)

    def _redirect(self, target: WebSocketURI, url: str, attempt: Attempt) -> Attempt:
        """Change the target of an attempt to a url that the gateway gave at ``target``, if that is a valid target."""
        try:
            return attrs.evolve(attempt, target=target.resolve_redirect(url))
        except ValueError as e:
            return attrs.evolve(attempt, reason=f"{attempt.reason}; ignored the url {without_ticket(url)[:200]!a}: {e}")
