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

from gateway.auth.interface import Identity, ITokenVerifier, KeysUnavailable
from gateway.auth.jwt import NotSigned, Rules, Unverified, warn_of_audience
from gateway.auth.keys import KeySet, read_set
from gateway.metrics import Metrics
from gateway.net.http_client import Document, FetchFailed, without_query
from gateway.settings import ConfigError
from gateway.util.deferred import Waiters

#: seconds between two fetches for the sake of a key that is not there
ASKED_EVERY = 60.0
#: seconds after which keys are looked at again when they are used
OLD = 600.0
#: seconds: the first pause after a failure, and the longest; each is twice the one before
FIRST, LONGEST = 1.0, 30.0

_UNAVAILABLE = "this token cannot be checked now: the keys of its issuer cannot be had; come back later"


class Issuer:
    """Keeps the keys of one issuer.

    ``fetch`` gets what is published, and ``read`` makes keys of it, or raises ``ValueError``; ``name`` is what log
    lines call it. ``clock`` must not be set back. ``uniform`` is that of :mod:`random`.
    """

    _log = Logger()

    def __init__(
        self,
        name: str,
        fetch: Callable[[], Deferred[bytes]],
        read: Callable[[bytes], KeySet],
        *,
        clock: IReactorTime,
        metrics: Metrics,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        #: what is known of its keys; ``None`` before they could first be fetched
        self.keys: KeySet | None = None
        self._name = name
        self._fetch = fetch
        self._read = read
        self._clock = clock
        self._metrics = metrics
        self._uniform = uniform
        self._running = False
        self._fetching: Deferred[Any] | None = None
        #: fires when that is over
        self._over: Deferred[None] | None = None
        #: what is being fetched is to be fetched once more after that
        self._again = False
        self._waiters: Waiters[None] = Waiters()
        self._timer: IDelayedCall | None = None
        self._fetched_at = 0.0
        self._asked_at: float | None = None
        #: runs until the minute is over, where a key was not there that may not be fetched before
        self._minute: IDelayedCall | None = None
        self._failures = 0
        self._failing_since = 0.0
        self._said = ""

    def start(self) -> None:
        """Fetch them, and go on as long as that fails; nobody waits for it."""
        self._running = True
        self._begin()

    def stop(self) -> Deferred[None]:
        """Fetch nothing more; fires when what is under way is given up."""
        self._running = self._again = False
        self._cancel_timer()
        self._cancel_minute()
        if self._fetching is None or self._over is None:
            return succeed(None)
        over = self._over
        self._fetching.cancel()
        return over

    def reload(self) -> None:
        """Fetch them now, in the background; if they are being fetched, once more after that."""
        if self._fetching is not None:
            self._again = True
        elif self._running:
            self._begin()

    def used(self) -> None:
        """The keys are looked at: see to it that they do not grow too old."""
        old = self._clock.seconds() - self._fetched_at >= OLD
        # While it fails the timer sees to it.
        if old and self._running and self._fetching is None and self._timer is None:
            self._begin()

    def more(self) -> Deferred[None] | None:
        """A key is not there: fires when they have been fetched; ``None`` if they were just now, and it is not there:
        then they are fetched in the background as soon as they may be. Cancelling only stops the wait.

        Raises, or fails with, :class:`KeysUnavailable`.
        """
        if self._fetching is None:
            now = self._clock.seconds()
            recent = self._asked_at is not None and now - self._asked_at < ASKED_EVERY
            if not self._running or self.keys is None or (recent and self._failures):
                raise KeysUnavailable(_UNAVAILABLE)
            if recent and self._asked_at is not None:
                if self._minute is None:
                    self._minute = self._clock.callLater(self._asked_at + ASKED_EVERY - now, self._minute_over)
                return None
            self._asked_at = now
        waiter = self._waiters.wait()
        if self._fetching is None:
            self._begin()
        return waiter

    def _minute_over(self) -> None:
        self._minute = None
        # While it fails the timer sees to it.
        if self._fetching is None and self._timer is None:
            self._asked_at = self._clock.seconds()
            self._begin()

    def _begin(self) -> None:
        self._cancel_timer()
        self._cancel_minute()
        self._again = False
        self._over = Deferred()
        fetching = self._fetching = self._fetch()
        fetching.addCallback(self._read_usable)
        fetching.addCallbacks(self._fetched, self._failed)
        fetching.addErrback(lambda failure: self._log.failure("error in keeping keys", failure))
        fetching.addCallback(self._done)

    def _read_usable(self, document: bytes) -> KeySet:
        keys = self._read(document)
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
        self._say(keys)

    def _say(self, keys: KeySet) -> None:
        """Tell what is odd about them, once."""
        if keys.left_out and keys.left_out != self._said:
            self._log.warn("{name}: left out of its keys: {said}", name=self._name, said=keys.left_out)
        self._said = keys.left_out

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
            if not failure.check(FetchFailed, ValueError):
                self._log.failure("error in fetching keys", failure)
        self._failures += 1
        # Not all nodes of a fleet at the same moment.
        pause = min(LONGEST, FIRST * 2.0 ** min(self._failures - 1, 16)) * self._uniform(0.5, 1.0)
        self._timer = self._clock.callLater(pause, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._begin()

    def _done(self, _: object) -> None:
        self._fetching = None
        over, self._over = self._over, None
        if self._failures or not self._running:
            self._waiters.fail(KeysUnavailable(_UNAVAILABLE))
        else:
            self._waiters.fire(None)
        # One of those may have begun it already.
        if self._again and self._fetching is None and self._running:
            self._begin()
        if over is not None:
            over.callback(None)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cancel_minute(self) -> None:
        if self._minute is not None:
            self._minute.cancel()
            self._minute = None


_NOT_YET = "this token's key is not known here yet; try again in a minute"


@implementer(ITokenVerifier)
class Jwks:
    """The tokens that the keys at one url have signed."""

    _log = Logger()

    def __init__(
        self,
        url: str,
        algorithms: Sequence[str],
        *,
        audience: str | None,
        issuer: str | None,
        now: Callable[[], float],
        reactor: Any,
        metrics: Metrics,
    ) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for a url that will not do."""
        try:
            document = Document(reactor, url)
        except ValueError as e:
            raise ConfigError("auth", f"jwks:url={without_query(url)!a} will not do: {e}") from None
        self._audience = audience
        self._name = f"jwks:url={without_query(url)}"
        self._rules = Rules(f"--auth {self._name}", algorithms, audience, issuer, now)
        self._issuer = Issuer(
            f"--auth {self._name}",
            document.fetch,
            partial(read_set, algorithms=algorithms),
            clock=reactor,
            metrics=metrics,
        )

    def start(self) -> None:
        """Begin to fetch the keys, and warn of what the settings allow."""
        warn_of_audience(self._log, self._name, self._audience)
        self._issuer.start()

    def stop(self) -> Deferred[None]:
        """Fetch nothing more; fires when what is under way is given up."""
        return self._issuer.stop()

    def reload(self) -> None:
        """Fetch the keys anew, in the background."""
        self._issuer.reload()

    def verify(self, token: str) -> Identity | Deferred[Identity | None]:
        """See :meth:`ITokenVerifier.verify`; raises, or fails with, :class:`NotAccepted`."""
        unverified = self._rules.read(token)
        keys = self._issuer.keys
        if keys is not None:
            self._issuer.used()
            try:
                return self._rules.check(unverified, keys.fitting(unverified.algorithm, unverified.kid))
            except NotSigned:
                if keys.has(unverified.kid):
                    raise self._rules.refused("signature") from None
        fetched = self._issuer.more()
        if fetched is None:
            raise self._rules.refused("unknown_key", text=_NOT_YET)
        return Deferred.fromCoroutine(self._verify_by_others(unverified, fetched))

    async def _verify_by_others(self, token: Unverified, fetched: Deferred[None]) -> Identity | None:
        await fetched
        keys = self._issuer.keys
        assert keys is not None  # or it had failed
        try:
            return self._rules.check(token, keys.fitting(token.algorithm, token.kid))
        except NotSigned:
            raise self._rules.refused("signature" if keys.has(token.kid) else "unknown_key") from None
