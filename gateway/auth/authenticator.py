"""``--auth SPEC``: who may connect as a client.

    none                     anybody, under the client_id that it asks for
    tokens:FILE              who has a token of the file
    jwt:key-file=F:algorithms=RS256,ES256[:audience=A][:issuer=I]
                             who has a JSON Web Token that a key of the file has signed
    jwks:url=U[:audience=A][:issuer=I][:algorithms=…]
                             who has one that a key at the url has signed
    mtls                     who has a client certificate

Several may be given. All that a client presents must be accepted, and be the same client's: its token by any of them,
its certificate, and the client_id that it asks for. Who presents neither token nor certificate needs ``none`` to be
among them. Without any ``--auth`` it is as with ``none``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from twisted.internet.defer import Deferred, DeferredList
from zope.interface import implementer

from gateway.auth import algorithms
from gateway.auth.interface import (
    MAX_TOKEN,
    ClientIdMissing,
    IAuthenticator,
    Identity,
    IdentityRefused,
    ITokenVerifier,
    KeysUnavailable,
    Presented,
    TokenRefused,
)
from gateway.auth.refusals import NotAccepted, Refusals
from gateway.auth.token_file import TokenFile
from gateway.metrics import Metrics
from gateway.settings import ConfigError, parse_spec

_KINDS = "none, tokens:FILE, jwt:…, jwks:… or mtls"


class _Starts(Protocol):
    """A verifier that has something to do when the node starts."""

    def start(self) -> None: ...


class _Stops(Protocol):
    """A verifier that has something to give up when the node stops."""

    def stop(self) -> Deferred[None]: ...


@implementer(IAuthenticator)
class Authenticators:
    """All that was given by ``--auth``. ``now`` is the wall clock, in seconds since 1970."""

    def __init__(
        self,
        specs: Sequence[str],
        *,
        reactor: Any = None,
        metrics: Metrics | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for a spec that is not known, or a file that will not do.
        ``reactor`` is for ``jwks:`` alone."""
        self._reactor = reactor
        self._metrics = metrics or Metrics()
        self._now = now
        self._refusals = Refusals(self._metrics, now)
        self._verifiers: list[ITokenVerifier] = []
        self._starting: list[_Starts] = []
        self._stopping: list[_Stops] = []
        self._anybody = not specs
        self._identity_of: Callable[[bytes], Identity] | None = None
        for spec in specs:
            self._add(spec)
        wanted = (["a token"] if self._verifiers else []) + (["a client certificate"] if self._identity_of else [])
        hint = ": send the header Authorization: Bearer TOKEN" if self._verifiers else ""
        #: what is said to who presents nothing
        self._needed = f"{' or '.join(wanted)} is needed{hint}"
        self._missing = "say who you are, by " + " or ".join(["the query parameter client_id", *wanted])

    def _add(self, spec: str) -> None:
        kind, _, rest = spec.partition(":")
        if spec == "none":
            self._anybody = True
        elif spec == "mtls":
            # Not imported at the top: it takes memory that only such a node needs. The same for the two below.
            from gateway.auth.certificate import identity_of

            self._identity_of = identity_of
        elif kind == "tokens" and rest:
            self._verifiers.append(TokenFile(rest))
        elif kind == "tokens":
            raise ConfigError("auth", f"{spec!a} names no file; write tokens:FILE")
        elif kind in ("jwt", "jwks"):
            try:
                add = self._add_jwt if kind == "jwt" else self._add_jwks
                add(spec)
            except ImportError:
                raise ConfigError("auth", f"{kind}: needs PyJWT: pip install 'wsgateway[jwt]'") from None
        else:
            raise ConfigError("auth", f"{spec!a} is not known; write {_KINDS}")

    def _add_jwt(self, spec: str) -> None:
        given = parse_spec("auth", spec, required=("key-file", "algorithms"), optional=("audience", "issuer"))
        allowed = algorithms.parse("jwt", given["algorithms"])
        from gateway.auth.jwt import JwtFile

        verifier = JwtFile(
            given["key-file"], allowed, audience=given.get("audience"), issuer=given.get("issuer"), now=self._now
        )
        self._verifiers.append(verifier)
        self._starting.append(verifier)

    def _add_jwks(self, spec: str) -> None:
        given = parse_spec("auth", spec, required=("url",), optional=("audience", "issuer", "algorithms"))
        allowed = algorithms.parse("jwks", given.get("algorithms", ",".join(algorithms.USUAL)))
        if not algorithms.OF_SECRETS.keys().isdisjoint(allowed):
            raise ConfigError("auth", "jwks: keys that are published are no secrets; leave the algorithms HS… out")
        from gateway.auth.jwks import Jwks

        verifier = Jwks(
            given["url"],
            allowed,
            audience=given.get("audience"),
            issuer=given.get("issuer"),
            now=self._now,
            reactor=self._reactor,
            metrics=self._metrics,
        )
        self._verifiers.append(verifier)
        self._starting.append(verifier)
        self._stopping.append(verifier)

    def start(self) -> None:
        """Begin to fetch keys, and warn of what the settings allow; nothing is waited for."""
        for verifier in self._starting:
            verifier.start()

    def stop(self) -> Deferred[Any]:
        """Fetch nothing more; fires when what is under way is given up."""
        return DeferredList([verifier.stop() for verifier in self._stopping])

    def reload(self) -> None:
        """Read the files again, and fetch keys anew in the background. Raises
        :class:`~gateway.settings.ConfigError` for the files that will not do; they stay as they were."""
        problems = []
        for verifier in self._verifiers:
            try:
                verifier.reload()
            except ConfigError as e:
                problems.append(str(e).removeprefix("--auth: "))
        if problems:
            raise ConfigError("auth", "; ".join(problems))

    def authenticate(self, presented: Presented) -> Identity | Deferred[Identity]:
        """Who it is; a token is ignored where nothing was given that has any."""
        certified = self._certified(presented)
        if presented.token is None or not self._verifiers:
            if certified is not None:
                return _together(presented.client_id, None, certified)
            if not self._anybody:
                if self._identity_of is not None:
                    self._refusals.count(NotAccepted("no_certificate", "--auth mtls"))
                raise TokenRefused(self._needed)
            if presented.client_id is None:
                raise ClientIdMissing(self._missing)
            return Identity(presented.client_id)
        verified = self._verified(presented.token)
        if isinstance(verified, Deferred):
            return verified.addCallback(lambda identity: _together(presented.client_id, identity, certified))
        return _together(presented.client_id, verified, certified)

    def renew(self, token: str, client_id: str) -> Identity | Deferred[Identity]:
        """See :meth:`IAuthenticator.renew`."""

        def theirs(identity: Identity) -> Identity:
            if identity.client_id != client_id:
                raise IdentityRefused("this token is for another client")
            return identity

        verified = self._verified(token)
        return verified.addCallback(theirs) if isinstance(verified, Deferred) else theirs(verified)

    def _certified(self, presented: Presented) -> Identity | None:
        """Whose certificate it has. Raises :class:`TokenRefused`."""
        certificate = presented.certificate() if self._identity_of is not None else None
        if self._identity_of is None or certificate is None:
            return None
        try:
            identity = self._identity_of(certificate)
        except TokenRefused:
            self._refusals.count(NotAccepted("certificate_name", "--auth mtls"))
            raise
        if identity.until <= self._now():
            self._refusals.count(NotAccepted("expired", "--auth mtls"))
            raise TokenRefused("this client certificate has expired")
        return identity

    def _verified(self, token: str) -> Identity | Deferred[Identity]:
        """Whose token it is: synchronously, unless keys must be fetched for that."""
        inquiry = _Inquiry(self._now, self._refusals)
        if len(token) > MAX_TOKEN:
            return inquiry.outcome()
        rest = iter(self._verifiers)
        for verifier in rest:
            said = inquiry.ask(verifier, token)
            if isinstance(said, Deferred):
                return Deferred.fromCoroutine(self._verified_later(inquiry, said, rest, token))
            if inquiry.heard(said):
                break
        return inquiry.outcome()

    async def _verified_later(
        self,
        inquiry: _Inquiry,
        waiting: Deferred[Identity | None],
        rest: Iterator[ITokenVerifier],
        token: str,
    ) -> Identity:
        found = await inquiry.wait(waiting)
        while not inquiry.heard(found):
            verifier = next(rest, None)
            if verifier is None:
                break
            said = inquiry.ask(verifier, token)
            found = await inquiry.wait(said) if isinstance(said, Deferred) else said
        return inquiry.outcome()


_EXPIRED = NotAccepted("expired", text="this token has expired")


class _Inquiry:
    """What was said of one token so far."""

    def __init__(self, now: Callable[[], float], refusals: Refusals) -> None:
        self._now = now
        self._refusals = refusals
        self._identity: Identity | None = None
        #: the most that was said against it
        self._refused: NotAccepted | None = None
        self._unavailable: KeysUnavailable | None = None

    def ask(self, verifier: ITokenVerifier, token: str) -> Identity | Deferred[Identity | None] | None:
        """What a verifier says, for :meth:`heard`."""
        try:
            said: Identity | Deferred[Identity | None] | None = verifier.verify(token)
        except (KeysUnavailable, NotAccepted) as e:
            self._against(e)
            return None
        return said

    async def wait(self, waiting: Deferred[Identity | None]) -> Identity | None:
        """The same for one that takes its time."""
        try:
            return await waiting
        except (KeysUnavailable, NotAccepted) as e:
            self._against(e)
            return None

    def _against(self, said: KeysUnavailable | NotAccepted) -> None:
        if isinstance(said, KeysUnavailable):
            self._unavailable = said
        elif said.says_more_than(self._refused):
            self._refused = said

    def heard(self, found: Identity | None) -> bool:
        """Take what was said to account; whether that is enough."""
        if found is not None and 0 < found.until <= self._now():
            self._against(_EXPIRED)
        elif found is not None:
            self._identity = found
        return self._identity is not None

    def outcome(self) -> Identity:
        """Whose token it is. Raises :class:`Refused`."""
        if self._identity is not None:
            return self._identity
        if self._unavailable is not None and self._refused is not _EXPIRED:
            raise self._unavailable
        if self._refused is None:
            raise TokenRefused("this token is not known here")
        self._refusals.count(self._refused)
        raise TokenRefused(str(self._refused))


def _together(client_id: str | None, by_token: Identity | None, certified: Identity | None) -> Identity:
    """What was presented, as one. Raises :class:`IdentityRefused`."""
    shown = [identity for identity in (by_token, certified) if identity is not None]
    if len({identity.client_id for identity in shown}) > 1:
        raise IdentityRefused("this token is for another client than the client certificate")
    if client_id is not None and client_id != shown[0].client_id:
        what = "token" if by_token is not None else "client certificate"
        raise IdentityRefused(f"this {what} is for another client_id than the query says")
    until = min((identity.until for identity in shown if identity.until), default=0.0)
    return Identity(shown[0].client_id, until, 0.0 if certified is None else certified.until)
