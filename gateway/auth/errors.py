"""Errors of authentication and authorization."""

from __future__ import annotations


class AuthenticationError(Exception):
    """A client that may not connect. Its text says why, to the client; it never shows a token."""


class ClientIdMissingError(AuthenticationError):
    """Nothing says who the client is."""


class TokenRefusedError(AuthenticationError):
    """The token is missing or not accepted."""


class IdentityMismatchError(AuthenticationError):
    """The token is good, but another client's."""


class KeysUnavailableError(AuthenticationError):
    """The token cannot be checked now: the keys of who issues such tokens cannot be had."""


#: reason -> in words; a token that several have looked at is refused for the last of theirs in this order
REASONS = {
    "no_certificate": "no client certificate was shown",
    "certificate_name": "its SubjectAlternativeName has no client_id",
    "malformed": "it is no JSON Web Token, or one that cannot be read",
    "algorithm": "its algorithm is not among those that are allowed",
    "issuer": "its issuer (iss) is another, or is missing",
    "unknown_key": "its key is not known",
    "signature": "no key that is known has signed it",
    "audience": "its audience (aud) is another, or is missing",
    "not_yet": "it is not valid yet (nbf, iat)",
    "subject": "its subject (sub) is no client_id, or is missing",
    "expired": "it has expired",
    "other": "it has what is not known here",
}
_RANKS = {reason: rank for rank, reason in enumerate(REASONS)}


class VerificationError(TokenRefusedError):
    """One way to accept tokens does not accept this one. The text is for who has sent it; ``reason`` and ``where``, the
    ``--auth`` that looked at it, are for the log."""

    def __init__(self, reason: str, source: str = "", text: str = "this token is not known here") -> None:
        super().__init__(text)
        self.reason = reason
        self.source = source

    def is_more_specific_than(self, other: VerificationError | None) -> bool:
        """Whether it came further than in another."""
        return other is None or _RANKS[self.reason] > _RANKS[other.reason]


class ForbiddenError(Exception):
    """What a token is not for. The text says what it is for, and never shows it."""


class SignatureError(Exception):
    """None of the keys has signed it."""
