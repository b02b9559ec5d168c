"""Verify JSON Web Tokens with the keys that their issuer publishes: ``--auth jwks:url=U:audience=A:issuer=I``.

The URL has a JSON Web Key Set (RFC 7517, section 5):

    {"keys":[{"kty":"EC","crv":"P-256","kid":"2026-10","x":"…","y":"…"}]}

The header of a token names its key by ``kid``. For one without, all keys for its algorithm are tried.

The keys are cached, and fetched again in these cases:

    at start                  verification waits for the first fetch
    unknown kid               at most once a minute; verification waits for it
    unknown kid, once more    when the minute is over, for the client's next try; verification does not wait
    older than 10 minutes     in the background, when they are used, so that removed keys are dropped
    failure, or no key        with exponential backoff; the old keys stay in use
    SIGHUP                    in the background
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.auth.errors import KeysUnavailableError, SignatureError
from gateway.auth.interface import AuthMethod, Identity, ITokenVerifier
from gateway.auth.jwt import TokenValidator, UnverifiedToken, warn_without_audience
from gateway.auth.keys import KeySet, parse_jwks
from gateway.metrics import Metrics
from gateway.net.errors import FetchError
from gateway.net.http_client import BoundedGet, strip_query
from gateway.settings import ConfigError
from gateway.util.backoff import Backoff, half_jitter
from gateway.util.deferred import Observers

#: seconds between two fetches because of an unknown key
MISSING_KEY_INTERVAL = 60.0
#: seconds after which keys in use are fetched again
MAX_AGE = 600.0
#: seconds before the first retry; doubled after each failure
INITIAL_BACKOFF = 1.0
#: seconds between retries, at most
MAX_BACKOFF = 30.0

_KEYS_UNAVAILABLE = "this token cannot be verified now: the keys of its issuer are not available; try again later"


class FetchState(enum.Enum):
    """The state of a :class:`JwksCache`."""

    #: before ``start`` and after ``stop``; a fetch may still be in progress, until its cancellation is done
    STOPPED = enum.auto()
    IDLE = enum.auto()
    FETCHING = enum.auto()
    #: fetching, and to be fetched once more after that
    FETCHING_AGAIN = enum.auto()
    #: after a failure, until the retry timer fires
    WAITING_TO_RETRY = enum.auto()


class JwksCache:
    """Cache the keys of one issuer.

    ``fetch`` gets the document, and ``parse`` makes keys of it, or raises ``ValueError``. ``name`` is for log messages.
    ``clock`` must be monotonic. ``jitter()`` returns a random factor for the delay of a retry, so that the nodes of a
    cluster do not retry at the same time.
    """

    _log = Logger()

    def __init__(
        self,
        name: str,
        fetch: Callable[[], Deferred[bytes]],
        parse: Callable[[bytes], KeySet],
        *,
        clock: IReactorTime,
        metrics: Metrics,
        jitter: Callable[[], float] = half_jitter,
    ) -> None:
        #: ``None`` before the first successful fetch
        self.keys: KeySet | None = None
        self._name = name
        self._fetch = fetch
        self._parse = parse
        self._clock = clock
        self._metrics = metrics
        self._state = FetchState.STOPPED
        #: the fetch in progress, and what fires after it
        self._fetching: Deferred[Any] | None = None
        self._fetch_done: Deferred[None] | None = None
        self._waiters: Observers[None] = Observers()
        self._retry_timer: IDelayedCall | None = None
        self._fetched_at = 0.0
        self._missing_key_fetch_at: float | None = None
        #: runs until the next fetch because of an unknown key is allowed, if there is one to be made
        self._missing_key_timer: IDelayedCall | None = None
        self._backoff = Backoff(INITIAL_BACKOFF, MAX_BACKOFF, jitter)
        self._failing_since = 0.0
        self._logged_left_out = ""

    def start(self) -> None:
        """Start the first fetch, in the background. It is retried until it succeeds."""
        self._state = FetchState.IDLE
        self._start_fetch()

    def stop(self) -> Deferred[None]:
        """Stop fetching. Fires when a fetch in progress has been cancelled."""
        self._state = FetchState.STOPPED
        self._cancel_retry_timer()
        self._cancel_missing_key_timer()
        if self._fetching is None or self._fetch_done is None:
            return succeed(None)
        done = self._fetch_done
        self._fetching.cancel()
        return done

    def reload(self) -> None:
        """Fetch the keys now, in the background; if a fetch is in progress, once more after it."""
        if self._state is FetchState.STOPPED:
            return
        if self._fetching is not None:
            self._state = FetchState.FETCHING_AGAIN
        else:
            self._start_fetch()

    def touch(self) -> None:
        """Note a use of the keys; fetch them again in the background if they are older than :data:`MAX_AGE`."""
        if self._clock.seconds() - self._fetched_at >= MAX_AGE and self._state is FetchState.IDLE:
            self._start_fetch()

    def refresh_for_missing_key(self) -> Deferred[None] | None:
        """Fetch the keys because one is missing. Fires when they have been fetched; cancelling only stops the wait.

        Returns ``None`` if this was done within :data:`MISSING_KEY_INTERVAL`. Then they are fetched in the background
        when that is over. Raises, or fails with, :class:`KeysUnavailableError`.
        """
        if self._fetching is None:
            now = self._clock.seconds()
            recent = self._missing_key_fetch_at is not None and now - self._missing_key_fetch_at < MISSING_KEY_INTERVAL
            if self._state is FetchState.STOPPED or self.keys is None or (recent and self._backoff.failures):
                raise KeysUnavailableError(_KEYS_UNAVAILABLE)
            if recent and self._missing_key_fetch_at is not None:
                if self._missing_key_timer is None:
                    self._missing_key_timer = self._clock.callLater(
                        self._missing_key_fetch_at + MISSING_KEY_INTERVAL - now, self._missing_key_interval_over
                    )
                return None
            self._missing_key_fetch_at = now
        waiter = self._waiters.observe()
        if self._fetching is None:
            self._start_fetch()
        return waiter

    def _missing_key_interval_over(self) -> None:
        self._missing_key_timer = None
        if self._state is FetchState.IDLE:
            self._missing_key_fetch_at = self._clock.seconds()
            self._start_fetch()

    def _start_fetch(self) -> None:
        self._cancel_retry_timer()
        self._cancel_missing_key_timer()
        self._state = FetchState.FETCHING
        self._fetch_done = Deferred()
        fetching = self._fetching = self._fetch()
        fetching.addCallback(self._parse_usable)
        fetching.addCallbacks(self._fetched, self._failed)
        fetching.addErrback(lambda failure: self._log.failure("error in caching keys", failure))
        fetching.addCallback(self._fetch_finished)

    def _parse_usable(self, document: bytes) -> KeySet:
        keys = self._parse(document)
        if not keys.keys:
            # Otherwise a broken issuer would have all tokens refused, and clients do not reconnect after that.
            left_out = f" (left out: {keys.left_out})" if keys.left_out else ""
            raise ValueError(f"no usable key is published{left_out}")
        return keys

    def _fetched(self, keys: KeySet) -> None:
        now = self._clock.seconds()
        if self._backoff.failures:
            outage = now - self._failing_since
            self._log.info("{name}: keys can be fetched again, after {outage:.0f} s", name=self._name, outage=outage)
        self._backoff.reset()
        self.keys, self._fetched_at = keys, now
        self._log_left_out(keys)

    def _log_left_out(self, keys: KeySet) -> None:
        """Log which keys cannot be used, if that has changed."""
        if keys.left_out and keys.left_out != self._logged_left_out:
            self._log.warn("{name}: left out of its keys: {left_out}", name=self._name, left_out=keys.left_out)
        self._logged_left_out = keys.left_out

    def _failed(self, failure: Failure) -> None:
        if self._state is FetchState.STOPPED:
            return
        now = self._clock.seconds()
        self._metrics.key_failures += 1
        if not self._backoff.failures:
            self._failing_since = now
            meanwhile = "no token is accepted before that" if self.keys is None else "the old keys stay in use"
            problem = str(failure.value) or type(failure.value).__name__
            self._log.warn(
                "{name}: keys cannot be fetched: {problem}; this is retried, and {meanwhile}",
                name=self._name,
                problem=problem,
                meanwhile=meanwhile,
            )
            if not failure.check(FetchError, ValueError):
                self._log.failure("error in fetching keys", failure)
        # With jitter, so that the nodes of a fleet do not retry at the same time.
        self._retry_timer = self._clock.callLater(self._backoff.next_delay(), self._retry)

    def _retry(self) -> None:
        self._retry_timer = None
        self._start_fetch()

    def _fetch_finished(self, _: object) -> None:
        self._fetching = None
        done, self._fetch_done = self._fetch_done, None
        if self._state is FetchState.FETCHING:
            self._state = FetchState.IDLE if self._retry_timer is None else FetchState.WAITING_TO_RETRY
        if self._backoff.failures or self._state is FetchState.STOPPED:
            self._waiters.errback(KeysUnavailableError(_KEYS_UNAVAILABLE))
        else:
            self._waiters.callback(None)
        # Unless a waiter has started a fetch.
        if self._state is FetchState.FETCHING_AGAIN and self._fetching is None:
            self._start_fetch()
        if done is not None:
            done.callback(None)

    def _cancel_retry_timer(self) -> None:
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None

    def _cancel_missing_key_timer(self) -> None:
        if self._missing_key_timer is not None:
            self._missing_key_timer.cancel()
            self._missing_key_timer = None


_KEY_NOT_YET_KNOWN = "this token's key is not known here yet; try again in a minute"


@implementer(ITokenVerifier)
class JwksVerifier:
    """Verify tokens with the keys that are published at one URL."""

    _log = Logger()

    def __init__(
        self,
        url: str,
        algorithms: Sequence[str],
        *,
        audience: str | None,
        issuer: str | None,
        wall_clock: Callable[[], float],
        reactor: Any,
        metrics: Metrics,
    ) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for an invalid URL."""
        try:
            document = BoundedGet(reactor, url)
        except ValueError as e:
            raise ConfigError("auth", f"jwks:url={strip_query(url)!a} is not valid: {e}") from None
        self._audience = audience
        self._name = f"jwks:url={strip_query(url)}"
        source = f"--auth {self._name}"
        self._validator = TokenValidator(source, algorithms, audience, issuer, wall_clock, AuthMethod.JWKS)
        self._cache = JwksCache(
            f"--auth {self._name}",
            document.fetch,
            partial(parse_jwks, algorithms=algorithms),
            clock=reactor,
            metrics=metrics,
        )

    def start(self) -> None:
        """Start to fetch the keys, and log warnings about the settings."""
        warn_without_audience(self._log, self._name, self._audience)
        self._cache.start()

    def stop(self) -> Deferred[None]:
        """Stop fetching keys. Fires when a fetch in progress has been cancelled."""
        return self._cache.stop()

    def reload(self) -> None:
        """Fetch the keys again, in the background."""
        self._cache.reload()

    def verify(self, token: str) -> Identity | Deferred[Identity | None]:
        """Verify a token. Raises, or fails with, :class:`VerificationError` or :class:`KeysUnavailableError`."""
        unverified = self._validator.parse(token)
        keys = self._cache.keys
        if keys is not None:
            self._cache.touch()
            try:
                return self._validator.validate(unverified, keys.candidates(unverified.algorithm, unverified.kid))
            except SignatureError:
                if keys.has_kid(unverified.kid):
                    raise self._validator.rejection("signature") from None
        fetched = self._cache.refresh_for_missing_key()
        if fetched is None:
            raise self._validator.rejection("unknown_key", text=_KEY_NOT_YET_KNOWN)
        return Deferred.fromCoroutine(self._verify_after_refresh(unverified, fetched))

    async def _verify_after_refresh(self, token: UnverifiedToken, fetched: Deferred[None]) -> Identity | None:
        await fetched
        keys = self._cache.keys
        assert keys is not None  # otherwise ``fetched`` fails
        try:
            return self._validator.validate(token, keys.candidates(token.algorithm, token.kid))
        except SignatureError:
            raise self._validator.rejection("signature" if keys.has_kid(token.kid) else "unknown_key") from None
