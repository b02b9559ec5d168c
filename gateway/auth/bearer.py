"""Tokens in the subprotocols that a browser offers, since it cannot set the header ``Authorization``.

    wsgateway.bearer.T          the token as it is
    wsgateway.bearer64.B        the token in base64url (RFC 4648, section 5), without padding

A subprotocol is a token of HTTP (RFC 9110, section 5.6.2): browsers throw a SyntaxError for one with a ``/`` or ``=``,
which tokens in base64 have. Any token can be written in the second form.
"""

from __future__ import annotations

import base64
import re

PREFIX = "wsgateway.bearer."
BASE64_PREFIX = "wsgateway.bearer64."

_ALPHABET = re.compile(r"[A-Za-z0-9_-]*")
#: the visible characters of ASCII, which a header can carry as well
_VISIBLE = re.compile(rb"[!-~]*")


def is_bearer(subprotocol: str) -> bool:
    """Whether a subprotocol carries a token: it is neither selected, nor passed on to other nodes, nor logged."""
    return subprotocol.startswith((PREFIX, BASE64_PREFIX))


def decode_bearer64(encoded: str) -> str:
    """Return the token in the base64url behind :data:`BASE64_PREFIX`.

    Raises ``ValueError`` if it is not the one encoding of a token of visible ASCII characters. The text is for the
    client, and has nothing of the token.
    """
    # Python's decoder skips foreign characters, and ignores the bits that a shorter last group leaves over.
    if not _ALPHABET.fullmatch(encoded) or len(encoded) % 4 == 1:
        raise ValueError("must be base64url, with - and _ instead of + and /, and without = at its end")
    token = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    if base64.urlsafe_b64encode(token).rstrip(b"=") != encoded.encode("ascii"):
        raise ValueError("is not canonical base64url: the unused bits of its last character must be 0")
    if not _VISIBLE.fullmatch(token):
        raise ValueError("has a character other than the visible ones of ASCII")
    return token.decode("ascii")
