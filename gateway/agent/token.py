"""What an agent shows to the gateway to prove who it is.

A new token on a connection that stays, before the one that it was opened with has expired.

    -> {"jsonrpc":"2.0","method":"gateway.token","params":{"token":"…"}}     nothing is answered

Who is not told when that will be, since the token does not say so, does it when asked to.
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
from gateway.agent.reconnect import Backoff
from gateway.util.deferred import Observers

#: what gives a token, each time another one maybe
TokenSource: TypeAlias = Callable[[], "str | Deferred[str] | Awaitable[str]"]
Token: TypeAlias = str | TokenSource | None

#: in seconds since 1970, the year 10000
_MAX_EXPIRY = 253402300800


def check_token(token: object) -> str:
    """The token. Raises ``ValueError``, without a word of it, for what is none."""
    # RFC 6750, section 2.1; also what keeps a line break out of the header.
    if not isinstance(token, str) or not token or not all("!" <= character <= "~" for character in token):
        raise ValueError("the token is not a text of visible ASCII characters without spaces")
    return token


def token_expiry(token: str) -> float | None:
    """When a token expires, in seconds since 1970, as it says itself if it is a JSON Web Token (RFC 7519, section
    4.1.4); else ``None``. Nothing is verified."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = msgspec.json.decode(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return None
    expires = claims.get("exp") if isinstance(claims, dict) else None
    if isinstance(expires, bool) or not isinstance(expires, (int, float)) or not 0 < expires < _MAX_EXPIRY:
        return None
    return float(expires)


#: what is left of a token's life is used up by so much of it, and a random part of that much more
RENEW_AT_SHARE, RENEW_JITTER_SHARE = 0.75, 0.1
#: seconds that are waited at least before the next time
MIN_DELAY = 1.0
#: seconds that one timer runs at most
_MAX_TIMER_DELAY = 86400.0


def make_token_renewer(token: Token, **options: Any) -> TokenRenewer | None:
    """What renews the token of an agent; ``None`` where there is but one. ``more`` is for :class:`Renewal`.

    Raises ``ValueError`` for a token that is none.
    """
    if callable(token):
        return TokenRenewer(token, **options)
    if token is not None:
        check_token(token)
    return None


class TokenRenewer:
    """Renews the token of one connection after the other.

    ``source`` gives tokens; it may take ``timeout`` seconds. ``now`` is the wall clock, in seconds since 1970;
    ``jitter`` returns a number from 0 to 1. ``backoff`` is the initial and the maximum wait before it is asked again,
    in seconds; ``name`` stands in log lines. Raises ``ValueError`` for waits that are none.
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
        self._backoff = Backoff(*backoff, jitter)
        self._timeout = timeout
        self._name = name
        #: by what a token is sent; ``None`` without a connection
        self._send: Callable[[str], object] | None = None
        #: what the gateway was shown last
        self._current_token = ""
        #: whether it is done without being asked to
        self._is_automatic = False
        self._due_at = 0.0
        self._timer: IDelayedCall | None = None
        #: stands for the question that is open, if one is, whose answer is awaited here
        self._request: object | None = None
        self._pending_token: Deferred[Any] | None = None
        #: somebody asked for that
        self._is_explicit = False
        self._observers: Observers[None] = Observers()

    def start(self, token: str, send: Callable[[str], object]) -> None:
        """A connection is open that was opened with that token; ``send`` says another one over it, or raises."""
        self._send = send
        self._current_token = token
        self._backoff.reset()
        self._schedule_renewal(token_expiry(token))

    def stop(self) -> None:
        """That connection is over."""
        self._send = None
        self._cancel_timer()
        answer = self._pending_token
        self._clear_request()
        if answer is not None:
            answer.cancel()
        self._observers.errback(NotConnected("the connection to the gateway ended"))

    def renew(self) -> Deferred[None]:
        """Do it now; fires when the token is sent. Fails with ``NotConnected``, or as the source does. Cancelling only
        stops the wait."""
        if self._send is None:
            return fail(NotConnected("not connected to the gateway"))
        waiter = self._observers.observe()
        self._is_explicit = True
        self._request_token()
        return waiter

    def _schedule_renewal(self, expires_at: float | None) -> None:
        left = 0.0 if expires_at is None else expires_at - self._wall_clock()
        self._is_automatic = left > 0
        if self._is_automatic:
            self._schedule(max(MIN_DELAY, left * (RENEW_AT_SHARE + RENEW_JITTER_SHARE * self._jitter())))

    def _schedule(self, delay: float) -> None:
        self._cancel_timer()
        self._due_at = self._clock.seconds() + delay
        self._arm_timer()

    def _arm_timer(self) -> None:
        left = self._due_at - self._clock.seconds()
        self._timer = (
            self._clock.callLater(_MAX_TIMER_DELAY, self._arm_timer)
            if left > _MAX_TIMER_DELAY
            else self._clock.callLater(max(0.0, left), self._timer_fired)
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
            # What comes of that plans the next time.
            return
        question = self._request = object()
        answer = self._pending_token = maybeDeferred(self._source)
        answer.addTimeout(self._timeout, self._clock)
        answer.addCallback(self._token_received, question).addErrback(self._request_failed, question)
        answer.addErrback(lambda failure: self._log.failure("agent {id}: error in renewal", failure, id=self._name))

    def _token_received(self, result: object, request: object) -> None:
        if request is not self._request or self._send is None:
            return
        token = check_token(result)
        expires = token_expiry(token)
        if not self._is_explicit and (
            token == self._current_token or (expires is not None and expires <= self._wall_clock())
        ):
            # The next one is not there yet.
            self._clear_request()
            self._retry()
            return
        self._send(token)
        self._current_token = token
        self._backoff.reset()
        self._clear_request()
        self._schedule_renewal(expires)
        self._observers.callback(None)

    def _request_failed(self, failure: Failure, request: object) -> None:
        if request is not self._request:
            return
        self._clear_request()
        error: Any = failure.value
        why = f"{type(error).__name__}: {error}"[:500]
        self._log.warn("agent {id}: no new token: {why}", id=self._name, why=why)
        if self._is_automatic:
            self._retry()
        self._observers.errback(error)

    def _clear_request(self) -> None:
        self._request = self._pending_token = None
        self._is_explicit = False

    def _retry(self) -> None:
        self._schedule(max(MIN_DELAY, self._backoff.next_delay()))
