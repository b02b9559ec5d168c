"""Authenticate clients, as configured by ``--auth SPEC``:

    none                     any client, with the client_id that it requests
    tokens:FILE              clients with a token of the file
    jwt:key-file=F:algorithms=RS256,ES256[:audience=A][:issuer=I]
                             clients with a JSON Web Token signed by a key of the file
    jwks:url=U[:audience=A][:issuer=I][:algorithms=…]
                             clients with a JSON Web Token signed by a key published at the URL
    mtls                     clients with a client certificate

The option may be repeated. Everything that a client presents must be accepted, and be for the same client: its token
(by any of the verifiers), its certificate, and the client_id that it requests. A client that presents neither token
nor certificate is accepted only with ``none``, which is also the default, or with a ticket of another node.
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
    TicketRefusedError,
    TokenRefusedError,
    VerificationError,
)
from gateway.auth.interface import (
    MAX_TOKEN_LENGTH,
    TICKET_METHODS,
    AuthMethod,
    Credentials,
    IAuthenticator,
    Identity,
    ITokenVerifier,
)
from gateway.auth.refusals import RefusalLog
from gateway.auth.tickets import Tickets
from gateway.auth.token_file import TokenFile
from gateway.metrics import Metrics
from gateway.settings import ConfigError, parse_spec

_KINDS = "none, tokens:FILE, jwt:…, jwks:… or mtls"


class _Startable(Protocol):
    """A verifier that must be started with the node."""

    def start(self) -> None: ...


class _Stoppable(Protocol):
    """A verifier that must be stopped with the node."""

    def stop(self) -> Deferred[None]: ...


@implementer(IAuthenticator)
class AuthenticatorChain:
    """The verifiers of all ``--auth`` options. ``wall_clock`` returns seconds since 1970."""

    def __init__(
        self,
        specs: Sequence[str],
        *,
        reactor: Any = None,
        metrics: Metrics | None = None,
        wall_clock: Callable[[], float] = time.time,
        tickets: Tickets | None = None,
    ) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for an invalid spec or file. ``reactor`` is only used by
        ``jwks:``. Without ``tickets`` none is accepted."""
        self._reactor = reactor
        self._metrics = metrics or Metrics()
        self._wall_clock = wall_clock
        self._refusal_log = RefusalLog(self._metrics, wall_clock)
        self._verifiers: list[ITokenVerifier] = []
        self._startable: list[_Startable] = []
        self._stoppable: list[_Stoppable] = []
        self._tickets = tickets
        #: the methods of the specs for which a ticket is accepted
        self._ticket_methods: set[AuthMethod] = set()
        self._allow_unauthenticated = not specs
        self._certificate_identity: Callable[[bytes], Identity] | None = None
        for spec in specs:
            self._add_spec(spec)
        accepted = (["a token"] if self._verifiers else []) + (
            ["a client certificate"] if self._certificate_identity else []
        )
        hint = ": send the header Authorization: Bearer TOKEN" if self._verifiers else ""
        #: error texts for a client without credentials
        self._credentials_required = f"{' or '.join(accepted)} is required{hint}"
        self._client_id_required = "identify the client by " + " or ".join(["the query parameter client_id", *accepted])

    def _add_spec(self, spec: str) -> None:
        kind, _, rest = spec.partition(":")
        self._ticket_methods.update(method for method in TICKET_METHODS if method.name.lower() == kind)
        if spec == "none":
            self._allow_unauthenticated = True
        elif spec == "mtls":
            # Imported here to save memory on nodes that do not use it, like the two modules below.
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
        options = parse_spec("auth", spec, required=("key-file", "algorithms"), optional=("audience", "issuer"))
        allowed = algorithms.parse_algorithms("jwt", options["algorithms"])
        from gateway.auth.jwt import JwtVerifier

        verifier = JwtVerifier(
            options["key-file"],
            allowed,
            audience=options.get("audience"),
            issuer=options.get("issuer"),
            wall_clock=self._wall_clock,
        )
        self._verifiers.append(verifier)
        self._startable.append(verifier)

    def _add_jwks(self, spec: str) -> None:
        options = parse_spec("auth", spec, required=("url",), optional=("audience", "issuer", "algorithms"))
        allowed = algorithms.parse_algorithms(
            "jwks", options.get("algorithms", ",".join(algorithms.DEFAULT_ALGORITHMS))
        )
        if not algorithms.HMAC_ALGORITHMS.keys().isdisjoint(allowed):
            raise ConfigError("auth", "jwks: published keys are not secret; leave the algorithms HS… out")
        from gateway.auth.jwks import JwksVerifier

        verifier = JwksVerifier(
            options["url"],
            allowed,
            audience=options.get("audience"),
            issuer=options.get("issuer"),
            wall_clock=self._wall_clock,
            reactor=self._reactor,
            metrics=self._metrics,
        )
        self._verifiers.append(verifier)
        self._startable.append(verifier)
        self._stoppable.append(verifier)

    def start(self) -> None:
        """Start to fetch keys in the background, and log warnings about the settings."""
        for verifier in self._startable:
            verifier.start()

    def stop(self) -> Deferred[Any]:
        """Stop fetching keys. Fires when a fetch in progress has been cancelled."""
        return DeferredList([verifier.stop() for verifier in self._stoppable])

    def reload(self) -> None:
        """Read the files again, and fetch keys again in the background. Raises
        :class:`~gateway.settings.ConfigError` for invalid files, whose old content stays in use."""
        problems = []
        for verifier in self._verifiers:
            try:
                verifier.reload()
            except ConfigError as e:
                problems.append(str(e).removeprefix("--auth: "))
        if problems:
            raise ConfigError("auth", "; ".join(problems))

    def authenticate(self, credentials: Credentials) -> Identity | Deferred[Identity]:
        """Authenticate a client. A token is ignored if no ``--auth`` accepts tokens."""
        certificate_identity = self._verify_certificate(credentials)
        if credentials.token is None or not self._verifiers:
            if certificate_identity is not None:
                return _merge_identities(credentials.client_id, None, certificate_identity)
            if not self._allow_unauthenticated and credentials.ticket is not None:
                return self._redeem_ticket(credentials.ticket, credentials.client_id)
            if not self._allow_unauthenticated:
                missing = ("no_token",) if self._certificate_identity is None else ("no_certificate", "--auth mtls")
                self._refusal_log.record(VerificationError(*missing))
                raise TokenRefusedError(self._credentials_required)
            if credentials.client_id is None:
                raise ClientIdMissingError(self._client_id_required)
            return Identity(credentials.client_id)
        verified = self._verify_token(credentials.token)
        if isinstance(verified, Deferred):
            return verified.addCallback(
                lambda identity: _merge_identities(credentials.client_id, identity, certificate_identity)
            )
        return _merge_identities(credentials.client_id, verified, certificate_identity)

    def restore_ticket(self, ticket: str) -> None:
        assert self._tickets is not None
        self._tickets.restore(ticket)

    def _redeem_ticket(self, ticket: str, client_id: str | None) -> Identity:
        """Return the identity of a client that another node has authenticated. Raises :class:`TicketRefusedError`."""
        if self._tickets is None:
            raise TicketRefusedError("no ticket is accepted here: connect to the first URL, with the token")
        try:
            return self._tickets.redeem(ticket, client_id, self._ticket_methods)
        except VerificationError as e:
            self._refusal_log.record(e)
            raise TicketRefusedError(f"{e}: connect to the first URL, with the token") from None

    def renew(self, token: str, client_id: str) -> Identity | Deferred[Identity]:
        """Verify a new token of a connected client."""

        def check_client_id(identity: Identity) -> Identity:
            if identity.client_id != client_id:
                raise IdentityMismatchError("this token is for another client")
            return identity

        verified = self._verify_token(token)
        return verified.addCallback(check_client_id) if isinstance(verified, Deferred) else check_client_id(verified)

    def _verify_certificate(self, credentials: Credentials) -> Identity | None:
        """Return the identity of the client certificate, if there is one. Raises :class:`TokenRefusedError`."""
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
        """Return the identity of a token, or a Deferred of it if keys must be fetched. Raises, or fails with,
        :class:`AuthenticationError`."""
        check = _TokenCheck(self._wall_clock, self._refusal_log)
        if len(token) > MAX_TOKEN_LENGTH:
            check.refuse(VerificationError("too_long"))
            return check.result()
        remaining = iter(self._verifiers)
        for verifier in remaining:
            identity = check.verify_with(verifier, token)
            if isinstance(identity, Deferred):
                return Deferred.fromCoroutine(self._verify_token_later(check, identity, remaining, token))
            if check.accept(identity):
                break
        return check.result()

    async def _verify_token_later(
        self,
        check: _TokenCheck,
        pending: Deferred[Identity | None],
        remaining: Iterator[ITokenVerifier],
        token: str,
    ) -> Identity:
        identity = await check.await_result(pending)
        while not check.accept(identity):
            verifier = next(remaining, None)
            if verifier is None:
                break
            result = check.verify_with(verifier, token)
            identity = await check.await_result(result) if isinstance(result, Deferred) else result
        return check.result()


_TOKEN_EXPIRED = VerificationError("expired", text="this token has expired")


class _TokenCheck:
    """The verification of one token by one verifier after the other."""

    def __init__(self, wall_clock: Callable[[], float], refusal_log: RefusalLog) -> None:
        self._wall_clock = wall_clock
        self._refusal_log = refusal_log
        self._identity: Identity | None = None
        #: the most specific error so far
        self._verification_error: VerificationError | None = None
        self._keys_unavailable: KeysUnavailableError | None = None

    def verify_with(self, verifier: ITokenVerifier, token: str) -> Identity | Deferred[Identity | None] | None:
        """Return the result of a verifier for :meth:`accept`, or a Deferred for :meth:`await_result`."""
        try:
            result: Identity | Deferred[Identity | None] | None = verifier.verify(token)
        except (KeysUnavailableError, VerificationError) as e:
            self.refuse(e)
            return None
        return result

    async def await_result(self, pending: Deferred[Identity | None]) -> Identity | None:
        """Wait for the result of a verifier, for :meth:`accept`."""
        try:
            return await pending
        except (KeysUnavailableError, VerificationError) as e:
            self.refuse(e)
            return None

    def refuse(self, error: KeysUnavailableError | VerificationError) -> None:
        """Record why a verifier does not accept the token."""
        if isinstance(error, KeysUnavailableError):
            self._keys_unavailable = error
        elif error.is_more_specific_than(self._verification_error):
            self._verification_error = error

    def accept(self, identity: Identity | None) -> bool:
        """Record the result of a verifier. Returns whether the token is accepted."""
        if identity is not None and 0 < identity.expires_at <= self._wall_clock():
            self.refuse(_TOKEN_EXPIRED)
        elif identity is not None:
            self._identity = identity
        return self._identity is not None

    def result(self) -> Identity:
        """Return the identity. Raises :class:`AuthenticationError` if no verifier has accepted the token."""
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
    """Merge what a client has presented. Raises :class:`IdentityMismatchError`."""
    identities = [identity for identity in (token_identity, certificate_identity) if identity is not None]
    if len({identity.client_id for identity in identities}) > 1:
        raise IdentityMismatchError("this token is for another client than the client certificate")
    if client_id is not None and client_id != identities[0].client_id:
        kind = "token" if token_identity is not None else "client certificate"
        raise IdentityMismatchError(f"this {kind} is for another client_id than the query says")
    expires_at = min((identity.expires_at for identity in identities if identity.expires_at), default=0.0)
    max_expires_at = 0.0 if certificate_identity is None else certificate_identity.expires_at
    # The certificate is the last one, if there is one: no ticket can stand for it.
    return Identity(identities[0].client_id, expires_at, max_expires_at, method=identities[-1].method)
