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
from gateway.util.deferred import Waiters

#: what gives a token, each time another one maybe
TokenSource: TypeAlias = Callable[[], "str | Deferred[str] | Awaitable[str]"]
Token: TypeAlias = str | TokenSource | None

#: in seconds since 1970, the year 10000
_END_OF_TIME = 253402300800


def check_token(token: object) -> str:
    """The token. Raises ``ValueError``, without a word of it, for what is none."""
    # RFC 6750, section 2.1; also what keeps a line break out of the header.
    if not isinstance(token, str) or not token or not all("!" <= character <= "~" for character in token):
        raise ValueError("the token is not a text of visible ASCII characters without spaces")
    return token


def expiry_of(token: str) -> float | None:
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
    if isinstance(expires, bool) or not isinstance(expires, (int, float)) or not 0 < expires < _END_OF_TIME:
        return None
    return float(expires)


#: what is left of a token's life is used up by so much of it, and a random part of that much more
SHARE, SPREAD = 0.75, 0.1
#: seconds that are waited at least before the next time
LEAST = 1.0
#: seconds that one timer runs at most
_DAY = 86400.0


def make_renewal(token: Token, **more: Any) -> Renewal | None:
    """What renews the token of an agent; ``None`` where there is but one. ``more`` is for :class:`Renewal`.

    Raises ``ValueError`` for a token that is none.
    """
    if callable(token):
        return Renewal(token, **more)
    if token is not None:
        check_token(token)
    return None


class Renewal:
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
        now: Callable[[], float],
        jitter: Callable[[], float],
        backoff: tuple[float, float],
        timeout: float,
        name: str,
    ) -> None:
        self._source = source
        self._clock = clock
        self._now = now
        self._jitter = jitter
        self._backoff = Backoff(*backoff, jitter)
        self._timeout = timeout
        self._name = name
        #: by what a token is sent; ``None`` without a connection
        self._send: Callable[[str], object] | None = None
        #: what the gateway was shown last
        self._shown = ""
        #: whether it is done without being asked to
        self._automatic = False
        self._due = 0.0
        self._timer: IDelayedCall | None = None
        #: stands for the question that is open, if one is, whose answer is awaited here
        self._question: object | None = None
        self._answer: Deferred[Any] | None = None
        #: somebody asked for that
        self._wanted = False
        self._waiters: Waiters[None] = Waiters()

    def begin(self, token: str, send: Callable[[str], object]) -> None:
        """A connection is open that was opened with that token; ``send`` says another one over it, or raises."""
        self._send = send
        self._shown = token
        self._backoff.reset()
        self._plan(expiry_of(token))

    def end(self) -> None:
        """That connection is over."""
        self._send = None
        self._cancel_timer()
        answer = self._answer
        self._over()
        if answer is not None:
            answer.cancel()
        self._waiters.fail(NotConnected("the connection to the gateway ended"))

    def renew(self) -> Deferred[None]:
        """Do it now; fires when the token is sent. Fails with ``NotConnected``, or as the source does. Cancelling only
        stops the wait."""
        if self._send is None:
            return fail(NotConnected("not connected to the gateway"))
        waiter = self._waiters.wait()
        self._wanted = True
        self._ask()
        return waiter

    def _plan(self, expires: float | None) -> None:
        left = 0.0 if expires is None else expires - self._now()
        self._automatic = left > 0
        if self._automatic:
            self._wait(max(LEAST, left * (SHARE + SPREAD * self._jitter())))

    def _wait(self, seconds: float) -> None:
        self._cancel_timer()
        self._due = self._clock.seconds() + seconds
        self._tick()

    def _tick(self) -> None:
        left = self._due - self._clock.seconds()
        self._timer = (
            self._clock.callLater(_DAY, self._tick)
            if left > _DAY
            else self._clock.callLater(max(0.0, left), self._fire)
        )

    def _fire(self) -> None:
        self._timer = None
        self._ask()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ask(self) -> None:
        self._cancel_timer()
        if self._question is not None:
            # What comes of that plans the next time.
            return
        question = self._question = object()
        answer = self._answer = maybeDeferred(self._source)
        answer.addTimeout(self._timeout, self._clock)
        answer.addCallback(self._got, question).addErrback(self._failed, question)
        answer.addErrback(lambda failure: self._log.failure("agent {id}: error in renewal", failure, id=self._name))

    def _got(self, given: object, question: object) -> None:
        if question is not self._question or self._send is None:
            return
        token = check_token(given)
        expires = expiry_of(token)
        if not self._wanted and (token == self._shown or (expires is not None and expires <= self._now())):
            # The next one is not there yet.
            self._over()
            self._again()
            return
        self._send(token)
        self._shown = token
        self._backoff.reset()
        self._over()
        self._plan(expires)
        self._waiters.fire(None)

    def _failed(self, failure: Failure, question: object) -> None:
        if question is not self._question:
            return
        self._over()
        error: Any = failure.value
        why = f"{type(error).__name__}: {error}"[:500]
        self._log.warn("agent {id}: no new token: {why}", id=self._name, why=why)
        if self._automatic:
            self._again()
        self._waiters.fail(error)

    def _over(self) -> None:
        self._question = self._answer = None
        self._wanted = False

    def _again(self) -> None:
        self._wait(max(LEAST, self._backoff.next()))
