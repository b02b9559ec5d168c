"""The keys that one issuer publishes: kept, and fetched anew when there may be others.

at the start            fetched; until that is done, whoever needs them waits for it
a key is not there      fetched, at most once a minute; who needs it waits for that
the same once more      fetched when that minute is over, so that it is there when that client comes back; nobody waits
older than 10 minutes   fetched in the background when they are used, so that withdrawn keys go
failed, or no key       fetched again after pauses that grow; the old ones stay
SIGHUP                  fetched

``--auth jwks:url=U:audience=A:issuer=I``: who has a JSON Web Token that one of the keys has signed that its issuer
publishes, as a JSON Web Key Set (RFC 7517, section 5) at that url.

    {"keys":[{"kty":"EC","crv":"P-256","kid":"2026-10","x":"…","y":"…"}]}

The header of a token names its key by ``kid``. One without finds it among all that its algorithm goes with.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.auth.errors import KeysUnavailableError, SignatureError
from gateway.auth.interface import Identity, ITokenVerifier
from gateway.auth.jwt import TokenValidator, UnverifiedToken, warn_without_audience
from gateway.auth.keys import KeySet, parse_jwks
from gateway.metrics import Metrics
from gateway.net.errors import FetchError
from gateway.net.http_client import BoundedGet, strip_query
from gateway.settings import ConfigError
from gateway.util.deferred import Observers

#: seconds between two fetches for the sake of a key that is not there
MISSING_KEY_INTERVAL = 60.0
#: seconds after which keys are looked at again when they are used
MAX_AGE = 600.0
#: seconds: the first pause after a failure, and the longest; each is twice the one before
INITIAL_BACKOFF, MAX_BACKOFF = 1.0, 30.0

_KEYS_UNAVAILABLE = "this token cannot be checked now: the keys of its issuer cannot be had; come back later"


class JwksCache:
    """Keeps the keys of one issuer.

    ``fetch`` gets what is published, and ``read`` makes keys of it, or raises ``ValueError``; ``name`` is what log
    lines call it. ``clock`` must not be set back. ``uniform`` is that of :mod:`random`.
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
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        #: what is known of its keys; ``None`` before they could first be fetched
        self.keys: KeySet | None = None
        self._name = name
        self._fetch = fetch
        self._parse = parse
        self._clock = clock
        self._metrics = metrics
        self._uniform = uniform
        self._running = False
        self._fetching: Deferred[Any] | None = None
        #: fires when that is over
        self._fetch_done: Deferred[None] | None = None
        #: what is being fetched is to be fetched once more after that
        self._fetch_again = False
        self._waiters: Observers[None] = Observers()
        self._retry_timer: IDelayedCall | None = None
        self._fetched_at = 0.0
        self._missing_key_fetch_at: float | None = None
        #: runs until the minute is over, where a key was not there that may not be fetched before
        self._missing_key_timer: IDelayedCall | None = None
        self._failures = 0
        self._failing_since = 0.0
        self._logged_left_out = ""

    def start(self) -> None:
        """Fetch them, and go on as long as that fails; nobody waits for it."""
        self._running = True
        self._start_fetch()

    def stop(self) -> Deferred[None]:
        """Fetch nothing more; fires when what is under way is given up."""
        self._running = self._fetch_again = False
        self._cancel_retry_timer()
        self._cancel_missing_key_timer()
        if self._fetching is None or self._fetch_done is None:
            return succeed(None)
        over = self._fetch_done
        self._fetching.cancel()
        return over

    def reload(self) -> None:
        """Fetch them now, in the background; if they are being fetched, once more after that."""
        if self._fetching is not None:
            self._fetch_again = True
        elif self._running:
            self._start_fetch()

    def touch(self) -> None:
        """The keys are looked at: see to it that they do not grow too old."""
        old = self._clock.seconds() - self._fetched_at >= MAX_AGE
        # While it fails the timer sees to it.
        if old and self._running and self._fetching is None and self._retry_timer is None:
            self._start_fetch()

    def refresh_for_missing_key(self) -> Deferred[None] | None:
        """A key is not there: fires when they have been fetched; ``None`` if they were just now, and it is not there:
        then they are fetched in the background as soon as they may be. Cancelling only stops the wait.

        Raises, or fails with, :class:`KeysUnavailable`.
        """
        if self._fetching is None:
            now = self._clock.seconds()
            recent = self._missing_key_fetch_at is not None and now - self._missing_key_fetch_at < MISSING_KEY_INTERVAL
            if not self._running or self.keys is None or (recent and self._failures):
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
        # While it fails the timer sees to it.
        if self._fetching is None and self._retry_timer is None:
            self._missing_key_fetch_at = self._clock.seconds()
            self._start_fetch()

    def _start_fetch(self) -> None:
        self._cancel_retry_timer()
        self._cancel_missing_key_timer()
        self._fetch_again = False
        self._fetch_done = Deferred()
        fetching = self._fetching = self._fetch()
        fetching.addCallback(self._parse_usable)
        fetching.addCallbacks(self._fetched, self._failed)
        fetching.addErrback(lambda failure: self._log.failure("error in keeping keys", failure))
        fetching.addCallback(self._fetch_finished)

    def _parse_usable(self, document: bytes) -> KeySet:
        keys = self._parse(document)
        if not keys.keys:
            # An issuer that is broken would have everybody's tokens refused, and agents do not come back from that.
            left_out = f" (left out: {keys.left_out})" if keys.left_out else ""
            raise ValueError(f"no key is published that could be used{left_out}")
        return keys

    def _fetched(self, keys: KeySet) -> None:
        now = self._clock.seconds()
        if self._failures:
            away = now - self._failing_since
            self._log.info("{name}: keys can be fetched again, after {away:.0f} s", name=self._name, away=away)
        self.keys, self._fetched_at, self._failures = keys, now, 0
        self._log_left_out(keys)

    def _log_left_out(self, keys: KeySet) -> None:
        """Tell what is odd about them, once."""
        if keys.left_out and keys.left_out != self._logged_left_out:
            self._log.warn("{name}: left out of its keys: {said}", name=self._name, said=keys.left_out)
        self._logged_left_out = keys.left_out

    def _failed(self, failure: Failure) -> None:
        if not self._running:
            return
        now = self._clock.seconds()
        self._metrics.key_failures += 1
        if not self._failures:
            self._failing_since = now
            kept = "no token is accepted before" if self.keys is None else "the old ones stay"
            problem = str(failure.value) or type(failure.value).__name__
            self._log.warn(
                "{name}: keys cannot be fetched: {problem}; it is tried again, and {kept}",
                name=self._name,
                problem=problem,
                kept=kept,
            )
            if not failure.check(FetchError, ValueError):
                self._log.failure("error in fetching keys", failure)
        self._failures += 1
        # Not all nodes of a fleet at the same moment.
        pause = min(MAX_BACKOFF, INITIAL_BACKOFF * 2.0 ** min(self._failures - 1, 16)) * self._uniform(0.5, 1.0)
        self._retry_timer = self._clock.callLater(pause, self._retry)

    def _retry(self) -> None:
        self._retry_timer = None
        self._start_fetch()

    def _fetch_finished(self, _: object) -> None:
        self._fetching = None
        over, self._fetch_done = self._fetch_done, None
        if self._failures or not self._running:
            self._waiters.errback(KeysUnavailableError(_KEYS_UNAVAILABLE))
        else:
            self._waiters.callback(None)
        # One of those may have begun it already.
        if self._fetch_again and self._fetching is None and self._running:
            self._start_fetch()
        if over is not None:
            over.callback(None)

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
    """The tokens that the keys at one url have signed."""

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
        """Raises :class:`~gateway.settings.ConfigError` for a url that will not do."""
        try:
            document = BoundedGet(reactor, url)
        except ValueError as e:
            raise ConfigError("auth", f"jwks:url={strip_query(url)!a} will not do: {e}") from None
        self._audience = audience
        self._name = f"jwks:url={strip_query(url)}"
        self._validator = TokenValidator(f"--auth {self._name}", algorithms, audience, issuer, wall_clock)
        self._cache = JwksCache(
            f"--auth {self._name}",
            document.fetch,
            partial(parse_jwks, algorithms=algorithms),
            clock=reactor,
            metrics=metrics,
        )

    def start(self) -> None:
        """Begin to fetch the keys, and warn of what the settings allow."""
        warn_without_audience(self._log, self._name, self._audience)
        self._cache.start()

    def stop(self) -> Deferred[None]:
        """Fetch nothing more; fires when what is under way is given up."""
        return self._cache.stop()

    def reload(self) -> None:
        """Fetch the keys anew, in the background."""
        self._cache.reload()

    def verify(self, token: str) -> Identity | Deferred[Identity | None]:
        """See :meth:`ITokenVerifier.verify`; raises, or fails with, :class:`NotAccepted`."""
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
        assert keys is not None  # or it had failed
        try:
            return self._validator.validate(token, keys.candidates(token.algorithm, token.kid))
        except SignatureError:
            raise self._validator.rejection("signature" if keys.has_kid(token.kid) else "unknown_key") from None
