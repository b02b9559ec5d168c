"""Errors of authentication and authorization.

AuthenticationError                     the client may not connect
├── ClientIdMissingError                no client_id
├── TokenRefusedError                   the token or certificate is missing or not accepted
│   └── VerificationError               one verifier does not accept it, with the reason for the log
├── TicketRefusedError                  the ticket of the URL is not accepted, and there is no token
├── IdentityMismatchError               it is valid, but for another client
└── KeysUnavailableError                it cannot be verified now
ForbiddenError                          the token of a backend does not allow this
SignatureError                          no key matches the signature; internal to the verifiers
"""

from __future__ import annotations


class AuthenticationError(Exception):
    """The client may not connect. The text tells the client why, and never shows a token."""


class ClientIdMissingError(AuthenticationError):
    """The client did not identify itself."""


class TokenRefusedError(AuthenticationError):
    """The token or client certificate is missing or not accepted."""


class TicketRefusedError(AuthenticationError):
    """The ticket of the URL is not accepted; the client may connect with its token."""


class IdentityMismatchError(AuthenticationError):
    """The token or client certificate is valid, but for another client."""


class KeysUnavailableError(AuthenticationError):
    """The token cannot be verified now, since the keys of its issuer cannot be fetched."""


#: reason -> description for the log. Of a token that several verifiers refuse, the last reason in this order is logged.
REASONS = {
    "no_token": "no token was presented",
    "no_certificate": "no client certificate was presented",
    "certificate_name": "its SubjectAlternativeName has no client_id",
    "too_long": "it is longer than a token may be",
    "malformed": "it is not a JSON Web Token, or cannot be decoded",
    "unknown_token": "no line of the file has this token",
    "algorithm": "its algorithm is not allowed",
    "issuer": "its issuer (iss) is wrong or missing",
    "unknown_key": "its key is unknown",
    "signature": "its signature matches no known key",
    "audience": "its audience (aud) is wrong or missing",
    "not_yet": "it is not valid yet (nbf, iat)",
    "subject": "its subject (sub) is not a client_id, or is missing",
    "expired": "it has expired",
    "other": "it has a critical header parameter (crit)",
    "ticket_malformed": "it is a ticket that cannot be parsed, or without wsgateway_hop=1 or client_id in the URL",
    "ticket_signature": "it is a ticket for another client or node, or not of this fleet",
    "ticket_method": "it is a ticket for a client that proved itself by an --auth which this node does not have",
    "ticket_expired": "it is a ticket that has expired, or is for a token that has",
    "ticket_early": "it is a ticket that ends too late: the clocks of the nodes must agree to some seconds",
    "ticket_spent": "it is a ticket that was used before",
    "ticket_full": "it is a ticket, and too many were used in the last seconds to remember one more",
}
_RANKS = {reason: rank for rank, reason in enumerate(REASONS)}


class VerificationError(TokenRefusedError):
    """A verifier does not accept the token.

    The text is for the client. ``reason``, a key of :data:`REASONS`, and ``source``, the ``--auth`` of the verifier,
    are for the log.
    """

    def __init__(self, reason: str, source: str = "", text: str = "this token is not known here") -> None:
        super().__init__(text)
        self.reason = reason
        self.source = source

    def is_more_specific_than(self, other: VerificationError | None) -> bool:
        """Whether the token passed more checks here than with the verifier that raised ``other``."""
        return other is None or _RANKS[self.reason] > _RANKS[other.reason]


class ForbiddenError(Exception):
    """The token of a backend does not allow this. The text says what it allows, and never shows the token."""


class SignatureError(Exception):
    """None of the keys matches the signature."""
