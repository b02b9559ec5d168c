"""Interfaces of authentication, and the identity of a client."""

from __future__ import annotations

import enum
from collections.abc import Callable

import attrs
from twisted.internet.defer import Deferred
from zope.interface import Interface

#: characters of a token; a longer one is refused without being decoded
MAX_TOKEN_LENGTH = 2**13


class AuthMethod(enum.IntEnum):
    """The kind of ``--auth`` that accepted a client."""

    NONE = 0
    TOKENS = 1
    JWT = 2
    JWKS = 3
    #: a client certificate, alone or with a token
    MTLS = 4


#: the methods for which a node that sends a client to another one issues a ticket
TICKET_METHODS = frozenset({AuthMethod.TOKENS, AuthMethod.JWT, AuthMethod.JWKS})


@attrs.frozen
class Identity:
    """The authenticated identity of a client. Times are in seconds since 1970; 0: never."""

    client_id: str
    #: when the token or certificate expires
    expires_at: float = 0.0
    #: when the client certificate expires, which also limits tokens that renew this identity
    max_expires_at: float = 0.0
    #: how it was proved, which is no part of who the client is
    method: AuthMethod = attrs.field(default=AuthMethod.NONE, eq=False)
    #: the ticket that was redeemed for it, if it was proved by one
    ticket: str = attrs.field(default="", eq=False, repr=False)


def no_certificate() -> bytes | None:
    """Return the certificate of a connection without one."""
    return None


@attrs.frozen
class Credentials:
    """What a client presents to authenticate itself."""

    token: str | None = attrs.field(default=None, repr=False)
    #: as requested by the client, and syntactically valid
    client_id: str | None = None
    #: returns the client certificate (DER) that TLS has verified, or ``None``
    certificate: Callable[[], bytes | None] = no_certificate
    #: the ticket of the URL (:mod:`gateway.auth.tickets`), if there is no token; it may have any characters
    ticket: str | None = attrs.field(default=None, repr=False)


class IAuthenticator(Interface):
    """Authenticates clients."""

    def authenticate(credentials: Credentials) -> Identity | Deferred[Identity]:
        """Authenticate a client. Raises, or fails with,
        :class:`~gateway.auth.errors.AuthenticationError`. Cancelling the Deferred only stops the wait."""

    def renew(token: str, client_id: str) -> Identity | Deferred[Identity]:
        """Verify a token with which a connected client replaces the one it connected with. It must be for the same
        client. Raises, or fails with, :class:`~gateway.auth.errors.AuthenticationError`."""

    def restore_ticket(ticket: str) -> None:
        """Make a ticket valid again that was redeemed for a connection which could not be opened."""


class ITokenVerifier(Interface):
    """Verifies one kind of token."""

    def verify(token: str) -> Identity | Deferred[Identity | None] | None:
        """Return the identity of a token, or a Deferred of it. ``None`` if it is not accepted.

        The identity of an expired token has an ``expires_at`` in the past, which the caller must check. Raises, or
        fails with, :class:`~gateway.auth.errors.KeysUnavailableError`, or
        :class:`~gateway.auth.errors.VerificationError` if the reason is known.
        """

    def reload() -> None:
        """Read files, or fetch keys, again. Raises :class:`~gateway.settings.ConfigError`, and keeps the old ones, if a
        file is not valid."""
