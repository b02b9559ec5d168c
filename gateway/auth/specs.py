"""``--auth SPEC``: who may connect as a client.

    none            anybody, under the client_id that it asks for
    tokens:FILE     who has a token of the file

Several may be given: a token that is presented must be one that any of them accepts; without one, ``none`` must be
among them. Without any ``--auth`` it is as with ``none``.
"""

from __future__ import annotations

from collections.abc import Sequence

from zope.interface import implementer

from gateway.auth.interface import (
    ClientIdMissing,
    IAuthenticator,
    Identity,
    IdentityRefused,
    ITokenVerifier,
    Presented,
    TokenRefused,
)
from gateway.auth.tokens import TokenFile
from gateway.settings import ConfigError


@implementer(IAuthenticator)
class Authenticators:
    """All that was given by ``--auth``."""

    def __init__(self, specs: Sequence[str]) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for a spec that is not known, or a file that will not do."""
        self._verifiers: list[ITokenVerifier] = []
        self._anybody = not specs
        for spec in specs:
            kind, _, rest = spec.partition(":")
            if spec == "none":
                self._anybody = True
            elif kind == "tokens" and rest:
                self._verifiers.append(TokenFile(rest))
            elif kind == "tokens":
                raise ConfigError("auth", f"{spec!a} names no file; write tokens:FILE")
            else:
                raise ConfigError("auth", f"{spec!a} is not known; this version knows none and tokens:FILE")

    def reload(self) -> None:
        """Read the files again. Raises :class:`~gateway.settings.ConfigError` for the first of those that will not
        do; they stay as they were."""
        problems = []
        for verifier in self._verifiers:
            try:
                verifier.reload()
            except ConfigError as e:
                problems.append(e)
        if problems:
            raise problems[0]

    def authenticate(self, presented: Presented) -> Identity:
        """Who it is; a token is ignored where only ``none`` was given."""
        token, client_id = presented.token, presented.client_id
        if token is None or not self._verifiers:
            if not self._anybody:
                raise TokenRefused("a token is needed: send the header Authorization: Bearer TOKEN")
            if client_id is None:
                raise ClientIdMissing("say who you are, by the query parameter client_id")
            return Identity(client_id)
        identity = self._verified(token)
        if client_id is not None and client_id != identity.client_id:
            raise IdentityRefused("this token is for another client_id than the query says")
        return identity

    def renew(self, token: str, client_id: str) -> Identity:
        """See :meth:`IAuthenticator.renew`."""
        identity = self._verified(token)
        if identity.client_id != client_id:
            raise IdentityRefused("this token is for another client")
        return identity

    def _verified(self, token: str) -> Identity:
        for verifier in self._verifiers:
            identity = verifier.verify(token)
            if isinstance(identity, Identity):
                return identity
        raise TokenRefused("this token is not known here")
