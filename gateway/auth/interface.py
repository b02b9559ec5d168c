"""Who a client is: what the edge asks, and how it is told no."""

from __future__ import annotations

import re

from zope.interface import Interface

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


def is_client_id(text: str) -> bool:
    """Whether a text can name a client: 1 to 128 of ``A-Z a-z 0-9 . _ : @ / + = -``, and neither ``.`` nor ``..``
    (which would not survive in the path of a url)."""
    return _CLIENT_ID.fullmatch(text) is not None and text not in (".", "..")


class Refused(Exception):
    """A client that may not connect. Its text says why, to the client; it never shows a token."""


class ClientIdMissing(Refused):
    """Nothing says who the client is."""


class TokenRefused(Refused):
    """The token is missing or not accepted."""


class IdentityRefused(Refused):
    """The token is good, but another client's."""


class IAuthenticator(Interface):
    """Tells who a client is."""

    def authenticate(token: str | None, client_id: str | None) -> str:
        """Return the id of the client that presents a token, or says who it is by a (valid) ``client_id``, or both.

        Raises :class:`Refused`.
        """


class ITokenVerifier(Interface):
    """One way to accept tokens."""

    def subject(token: str) -> str | None:
        """The id of the client whose token it is, or ``None`` if it is not accepted."""

    def reload() -> None:
        """Read again what it was made of. Raises :class:`~gateway.settings.ConfigError`, and then stays as it was."""
