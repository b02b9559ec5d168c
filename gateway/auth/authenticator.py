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
from gateway.auth.errors import (
    ClientIdMissingError,
    IdentityMismatchError,
    KeysUnavailableError,
    TokenRefusedError,
    VerificationError,
)
from gateway.auth.interface import MAX_TOKEN_LENGTH, Credentials, IAuthenticator, Identity, ITokenVerifier
from gateway.auth.refusals import RefusalLog
from gateway.auth.token_file import TokenFile
from gateway.metrics import Metrics
from gateway.settings import ConfigError, parse_spec

_KINDS = "none, tokens:FILE, jwt:…, jwks:… or mtls"


class _Startable(Protocol):
    """A verifier that has something to do when the node starts."""

    def start(self) -> None: ...


class _Stoppable(Protocol):
    """A verifier that has something to give up when the node stops."""

    def stop(self) -> Deferred[None]: ...


@implementer(IAuthenticator)
class AuthenticatorChain:
    """All that was given by ``--auth``. ``now`` is the wall clock, in seconds since 1970."""

    def __init__(
        self,
        specs: Sequence[str],
        *,
        reactor: Any = None,
        metrics: Metrics | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for a spec that is not known, or a file that will not do.
        ``reactor`` is for ``jwks:`` alone."""
        self._reactor = reactor
        self._metrics = metrics or Metrics()
        self._wall_clock = wall_clock
        self._refusal_log = RefusalLog(self._metrics, wall_clock)
        self._verifiers: list[ITokenVerifier] = []
        self._startable: list[_Startable] = []
        self._stoppable: list[_Stoppable] = []
        self._allow_unauthenticated = not specs
        self._certificate_identity: Callable[[bytes], Identity] | None = None
        for spec in specs:
            self._add_spec(spec)
        wanted = (["a token"] if self._verifiers else []) + (
            ["a client certificate"] if self._certificate_identity else []
        )
        hint = ": send the header Authorization: Bearer TOKEN" if self._verifiers else ""
        #: what is said to who presents nothing
        self._credentials_required = f"{' or '.join(wanted)} is needed{hint}"
        self._client_id_required = "say who you are, by " + " or ".join(["the query parameter client_id", *wanted])

    def _add_spec(self, spec: str) -> None:
        kind, _, rest = spec.partition(":")
        if spec == "none":
            self._allow_unauthenticated = True
        elif spec == "mtls":
            # Not imported at the top: it takes memory that only such a node needs. The same for the two below.
            from gateway.auth.certificate import certificate_identity

            self._certificate_identity = certificate_identity
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
        allowed = algorithms.parse_algorithms("jwt", given["algorithms"])
        from gateway.auth.jwt import JwtVerifier

        verifier = JwtVerifier(
            given["key-file"],
            allowed,
            audience=given.get("audience"),
            issuer=given.get("issuer"),
            wall_clock=self._wall_clock,
        )
        self._verifiers.append(verifier)
        self._startable.append(verifier)

    def _add_jwks(self, spec: str) -> None:
        given = parse_spec("auth", spec, required=("url",), optional=("audience", "issuer", "algorithms"))
        allowed = algorithms.parse_algorithms("jwks", given.get("algorithms", ",".join(algorithms.DEFAULT_ALGORITHMS)))
        if not algorithms.HMAC_ALGORITHMS.keys().isdisjoint(allowed):
            raise ConfigError("auth", "jwks: keys that are published are no secrets; leave the algorithms HS… out")
        from gateway.auth.jwks import JwksVerifier

        verifier = JwksVerifier(
            given["url"],
            allowed,
            audience=given.get("audience"),
            issuer=given.get("issuer"),
            wall_clock=self._wall_clock,
            reactor=self._reactor,
            metrics=self._metrics,
        )
        self._verifiers.append(verifier)
        self._startable.append(verifier)
        self._stoppable.append(verifier)

    def start(self) -> None:
        """Begin to fetch keys, and warn of what the settings allow; nothing is waited for."""
        for verifier in self._startable:
            verifier.start()

    def stop(self) -> Deferred[Any]:
        """Fetch nothing more; fires when what is under way is given up."""
        return DeferredList([verifier.stop() for verifier in self._stoppable])

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

    def authenticate(self, credentials: Credentials) -> Identity | Deferred[Identity]:
        """Who it is; a token is ignored where nothing was given that has any."""
        certified = self._verify_certificate(credentials)
        if credentials.token is None or not self._verifiers:
            if certified is not None:
                return _merge_identities(credentials.client_id, None, certified)
            if not self._allow_unauthenticated:
                if self._certificate_identity is not None:
                    self._refusal_log.record(VerificationError("no_certificate", "--auth mtls"))
                raise TokenRefusedError(self._credentials_required)
            if credentials.client_id is None:
                raise ClientIdMissingError(self._client_id_required)
            return Identity(credentials.client_id)
        verified = self._verify_token(credentials.token)
        if isinstance(verified, Deferred):
            return verified.addCallback(lambda identity: _merge_identities(credentials.client_id, identity, certified))
        return _merge_identities(credentials.client_id, verified, certified)

    def renew(self, token: str, client_id: str) -> Identity | Deferred[Identity]:
        """See :meth:`IAuthenticator.renew`."""

        def theirs(identity: Identity) -> Identity:
            if identity.client_id != client_id:
                raise IdentityMismatchError("this token is for another client")
            return identity

        verified = self._verify_token(token)
        return verified.addCallback(theirs) if isinstance(verified, Deferred) else theirs(verified)

    def _verify_certificate(self, credentials: Credentials) -> Identity | None:
        """Whose certificate it has. Raises :class:`TokenRefused`."""
        certificate = credentials.certificate() if self._certificate_identity is not None else None
        if self._certificate_identity is None or certificate is None:
            return None
        try:
            identity = self._certificate_identity(certificate)
        except TokenRefusedError:
            self._refusal_log.record(VerificationError("certificate_name", "--auth mtls"))
            raise
        if identity.expires_at <= self._wall_clock():
            self._refusal_log.record(VerificationError("expired", "--auth mtls"))
            raise TokenRefusedError("this client certificate has expired")
        return identity

    def _verify_token(self, token: str) -> Identity | Deferred[Identity]:
        """Whose token it is: synchronously, unless keys must be fetched for that."""
        inquiry = _TokenCheck(self._wall_clock, self._refusal_log)
        if len(token) > MAX_TOKEN_LENGTH:
            return inquiry.result()
        rest = iter(self._verifiers)
        for verifier in rest:
            said = inquiry.verify_with(verifier, token)
            if isinstance(said, Deferred):
                return Deferred.fromCoroutine(self._verify_token_later(inquiry, said, rest, token))
            if inquiry.accept(said):
                break
        return inquiry.result()

    async def _verify_token_later(
        self,
        check: _TokenCheck,
        pending: Deferred[Identity | None],
        remaining: Iterator[ITokenVerifier],
        token: str,
    ) -> Identity:
        found = await check.await_result(pending)
        while not check.accept(found):
            verifier = next(remaining, None)
            if verifier is None:
                break
            said = check.verify_with(verifier, token)
            found = await check.await_result(said) if isinstance(said, Deferred) else said
        return check.result()


_TOKEN_EXPIRED = VerificationError("expired", text="this token has expired")


class _TokenCheck:
    """What was said of one token so far."""

    def __init__(self, wall_clock: Callable[[], float], refusal_log: RefusalLog) -> None:
        self._wall_clock = wall_clock
        self._refusal_log = refusal_log
        self._identity: Identity | None = None
        #: the most that was said against it
        self._verification_error: VerificationError | None = None
        self._keys_unavailable: KeysUnavailableError | None = None

    def verify_with(self, verifier: ITokenVerifier, token: str) -> Identity | Deferred[Identity | None] | None:
        """What a verifier says, for :meth:`heard`."""
        try:
            said: Identity | Deferred[Identity | None] | None = verifier.verify(token)
        except (KeysUnavailableError, VerificationError) as e:
            self._record_error(e)
            return None
        return said

    async def await_result(self, pending: Deferred[Identity | None]) -> Identity | None:
        """The same for one that takes its time."""
        try:
            return await pending
        except (KeysUnavailableError, VerificationError) as e:
            self._record_error(e)
            return None

    def _record_error(self, error: KeysUnavailableError | VerificationError) -> None:
        if isinstance(error, KeysUnavailableError):
            self._keys_unavailable = error
        elif error.is_more_specific_than(self._verification_error):
            self._verification_error = error

    def accept(self, identity: Identity | None) -> bool:
        """Take what was said to account; whether that is enough."""
        if identity is not None and 0 < identity.expires_at <= self._wall_clock():
            self._record_error(_TOKEN_EXPIRED)
        elif identity is not None:
            self._identity = identity
        return self._identity is not None

    def result(self) -> Identity:
        """Whose token it is. Raises :class:`Refused`."""
        if self._identity is not None:
            return self._identity
        if self._keys_unavailable is not None and self._verification_error is not _TOKEN_EXPIRED:
            raise self._keys_unavailable
        if self._verification_error is None:
            raise TokenRefusedError("this token is not known here")
        self._refusal_log.record(self._verification_error)
        raise TokenRefusedError(str(self._verification_error))


def _merge_identities(
    client_id: str | None, token_identity: Identity | None, certificate_identity: Identity | None
) -> Identity:
    """What was presented, as one. Raises :class:`IdentityRefused`."""
    shown = [identity for identity in (token_identity, certificate_identity) if identity is not None]
    if len({identity.client_id for identity in shown}) > 1:
        raise IdentityMismatchError("this token is for another client than the client certificate")
    if client_id is not None and client_id != shown[0].client_id:
        what = "token" if token_identity is not None else "client certificate"
        raise IdentityMismatchError(f"this {what} is for another client_id than the query says")
    until = min((identity.expires_at for identity in shown if identity.expires_at), default=0.0)
    return Identity(shown[0].client_id, until, 0.0 if certificate_identity is None else certificate_identity.expires_at)
