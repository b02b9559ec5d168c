"""Who a client is: what the edge asks, and how it is told no."""

from __future__ import annotations

import re
from collections.abc import Callable

import attrs
from twisted.internet.defer import Deferred
from zope.interface import Interface

#: characters of the longest token; one that is longer is not even looked at
MAX_TOKEN_LENGTH = 8192

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


def is_client_id(text: str) -> bool:
    """Whether a text can name a client: 1 to 128 of ``A-Z a-z 0-9 . _ : @ / + = -``, and neither ``.`` nor ``..``
    (which would not survive in the path of a url)."""
    return _CLIENT_ID.fullmatch(text) is not None and text not in (".", "..")


@attrs.frozen
class Identity:
    """Who a client is, and for how long that is proved."""

    client_id: str
    #: when that ends, in seconds since 1970; 0: never
    expires_at: float = 0.0
    #: when its certificate ends, which no later token outlasts, in the same way
    max_expires_at: float = 0.0


def no_certificate() -> bytes | None:
    """What a connection without TLS, or without a client certificate, has of one."""
    return None


@attrs.frozen
class Credentials:
    """What a client shows of itself."""

    token: str | None = None
    #: a valid one, which it says is its own
    client_id: str | None = None
    #: gives its certificate (DER), which TLS has verified, or ``None``
    certificate: Callable[[], bytes | None] = no_certificate


class IAuthenticator(Interface):
    """Tells who a client is."""

    def authenticate(credentials: Credentials) -> Identity | Deferred[Identity]:
        """Who it is that presents these. Raises, or fails with, :class:`Refused`. Cancelling the Deferred only stops
        the wait."""

    def renew(token: str, client_id: str) -> Identity | Deferred[Identity]:
        """The same for a token that a connected client sends in place of that by which it came in: it must be that
        client's. Raises, or fails with, :class:`Refused`."""


class ITokenVerifier(Interface):
    """One way to accept tokens."""

    def verify(token: str) -> Identity | Deferred[Identity | None] | None:
        """Whose token it is; ``None``, also by the Deferred, if it is not accepted. One that only has expired is given
        with an ``until`` that is over: whoever asks looks. Raises, or fails with, :class:`KeysUnavailable`, and
        :class:`TokenRefused` where it can say why."""

    def reload() -> None:
        """Read again what it was made of. Raises :class:`~gateway.settings.ConfigError`, and then stays as it was."""
