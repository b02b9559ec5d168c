"""``--auth jwks:url=U:audience=A:issuer=I``: who has a JSON Web Token that one of the keys has signed that its issuer
publishes, as a JSON Web Key Set (RFC 7517, section 5) at that url.

    {"keys":[{"kty":"EC","crv":"P-256","kid":"2026-10","x":"…","y":"…"}]}

The header of a token names its key by ``kid``. One without finds it among all that its algorithm goes with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from zope.interface import implementer

from gateway.auth.fetching import Document, without_query
from gateway.auth.interface import Identity, ITokenVerifier
from gateway.auth.issuer import Issuer
from gateway.auth.jwt import NotSigned, Rules, Unverified, warn_of_audience
from gateway.auth.keys import read_set
from gateway.settings import ConfigError
from gateway.telemetry.metrics import Metrics

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
