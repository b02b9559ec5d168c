"""Tokens of an agent, and their renewal on an open connection before they expire.

    -> {"jsonrpc":"2.0","method":"gateway.token","params":{"token":"…"}}     no response

A token with an expiry time, such as a JWT, is renewed automatically; any other by ``Agent.renew()`` only.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec
from twisted.internet.defer import Deferred, fail, maybeDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.agent.errors import NotConnected
from gateway.agent.reconnect import make_backoff
from gateway.util.deferred import Observers

#: returns a token; each call may return another one
TokenSource: TypeAlias = Callable[[], "str | Deferred[str] | Awaitable[str]"]
Token: TypeAlias = str | TokenSource | None

#: seconds since 1970: the year 10000
_MAX_EXPIRY = 253402300800


def check_token(token: object) -> str:
    """Return the token if it is valid, else raise ``ValueError``; its text does not contain the token."""
    # RFC 6750, section 2.1. Also keeps line breaks out of the header.
    if not isinstance(token, str) or not token or not all("!" <= character <= "~" for character in token):
        raise ValueError("the token is not a string of visible ASCII characters without spaces")
    return token


def token_expiry(token: str) -> float | None:
    """Return the ``exp`` claim of a JSON Web Token (RFC 7519, section 4.1.4), in seconds since 1970.

    Returns ``None`` for any other token. Verifies nothing.
    """
    segments = token.split(".")
    if len(segments) != 3:
        return None
    try:
        claims = msgspec.json.decode(base64.urlsafe_b64decode(segments[1] + "=" * (-len(segments[1]) % 4)))
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return None
    expires_at = claims.get("exp") if isinstance(claims, dict) else None
    if isinstance(expires_at, bool) or not isinstance(expires_at, (int, float)) or not 0 < expires_at < _MAX_EXPIRY:
        return None
    return float(expires_at)


#: the share of a token's remaining lifetime after which it is renewed
RENEW_AT_SHARE = 0.75
#: a random part of this share is added
RENEW_JITTER_SHARE = 0.1
#: seconds before the next renewal or retry, at least
MIN_DELAY = 1.0
#: seconds; longer delays take several timers
_MAX_TIMER_DELAY = 86400.0


def make_token_renewer(token: Token, **options: Any) -> TokenRenewer | None:
    """Make the renewer of a token that is a callable; return ``None`` for a fixed token.

    ``options`` are those of :class:`TokenRenewer`. Raises ``ValueError`` for an invalid fixed token.
    """
    if callable(token):
        return TokenRenewer(token, **options)
    if token is not None:
        check_token(token)
    return None


class TokenRenewer:
    """Renew the token of the current connection.

    ``source()`` returns a token within ``timeout`` seconds. ``wall_clock()`` returns seconds since 1970; ``jitter()``
    returns a number from 0 to 1. ``backoff`` is the (initial, maximum) delay after a failure, in seconds. ``name`` is
    that of the agent in log lines. Raises ``ValueError`` if the delays are invalid.
    """

    _log = Logger()

    def __init__(
        self,
        source: TokenSource,
        *,
        clock: IReactorTime,
        wall_clock: Callable[[], float],
        jitter: Callable[[], float],
        backoff: tuple[float, float],
        timeout: float,
        name: str,
    ) -> None:
        self._source = source
        self._clock = clock
        self._wall_clock = wall_clock
        self._jitter = jitter
        self._backoff = make_backoff(*backoff, jitter)
        self._timeout = timeout
        self._name = name
        #: sends a token; ``None`` without a connection
        self._send: Callable[[str], object] | None = None
        #: the token that the gateway received last
        self._current_token = ""
        #: whether the current token has an expiry time
        self._is_automatic = False
        self._due_at = 0.0
        self._timer: IDelayedCall | None = None
        #: identifies the pending call of the source
        self._request: object | None = None
        self._pending_token: Deferred[Any] | None = None
        #: whether renew() was called during the pending request
        self._is_explicit = False
        self._observers: Observers[None] = Observers()

    def start(self, token: str, send: Callable[[str], object]) -> None:
        """Begin with a connection that was opened with ``token``; ``send(token)`` sends another one or raises."""
        self._send = send
        self._current_token = token
        self._backoff.reset()
        self._schedule_renewal(token_expiry(token))

    def stop(self) -> None:
        """End with the connection. Pending :meth:`renew` calls fail with ``NotConnected``."""
        self._send = None
        self._cancel_timer()
        pending_token = self._pending_token
        self._clear_request()
        if pending_token is not None:
            pending_token.cancel()
        self._observers.errback(NotConnected("the connection to the gateway ended"))

    def renew(self) -> Deferred[None]:
        """Renew now. Fires when the token is sent.

        Fails with ``NotConnected``, or with the error of the source. Cancelling only stops the wait.
        """
        if self._send is None:
            return fail(NotConnected("not connected to the gateway"))
        waiter = self._observers.observe()
        self._is_explicit = True
        self._request_token()
        return waiter

    def _schedule_renewal(self, expires_at: float | None) -> None:
        lifetime = 0.0 if expires_at is None else expires_at - self._wall_clock()
        self._is_automatic = lifetime > 0
        if self._is_automatic:
            self._schedule(max(MIN_DELAY, lifetime * (RENEW_AT_SHARE + RENEW_JITTER_SHARE * self._jitter())))

    def _schedule(self, delay: float) -> None:
        self._cancel_timer()
        self._due_at = self._clock.seconds() + delay
        self._arm_timer()

    def _arm_timer(self) -> None:
        delay = self._due_at - self._clock.seconds()
        self._timer = (
            self._clock.callLater(_MAX_TIMER_DELAY, self._arm_timer)
            if delay > _MAX_TIMER_DELAY
            else self._clock.callLater(max(0.0, delay), self._timer_fired)
        )

    def _timer_fired(self) -> None:
        self._timer = None
        self._request_token()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _request_token(self) -> None:
        self._cancel_timer()
        if self._request is not None:
            # The outcome of the pending request schedules the next one.
            return
        request = self._request = object()
        token = self._pending_token = maybeDeferred(self._source)
        token.addTimeout(self._timeout, self._clock)
        token.addCallback(self._token_received, request).addErrback(self._request_failed, request)
        token.addErrback(lambda failure: self._log.failure("agent {id}: error in renewal", failure, id=self._name))

    def _token_received(self, result: object, request: object) -> None:
        if request is not self._request or self._send is None:
            return
        token = check_token(result)
        expires_at = token_expiry(token)
        if not self._is_explicit and (
            token == self._current_token or (expires_at is not None and expires_at <= self._wall_clock())
        ):
            # The source has no new token yet.
            self._clear_request()
            self._retry()
            return
        self._send(token)
        self._current_token = token
        self._backoff.reset()
        self._clear_request()
        self._schedule_renewal(expires_at)
        self._observers.callback(None)

    def _request_failed(self, failure: Failure, request: object) -> None:
        if request is not self._request:
            return
        self._clear_request()
        error: Any = failure.value
        problem = f"{type(error).__name__}: {error}"[:500]
        self._log.warn("agent {id}: the token cannot be renewed: {problem}", id=self._name, problem=problem)
        if self._is_automatic:
            self._retry()
        self._observers.errback(error)

    def _clear_request(self) -> None:
        self._request = self._pending_token = None
        self._is_explicit = False

    def _retry(self) -> None:
        self._schedule(max(MIN_DELAY, self._backoff.next_delay()))
