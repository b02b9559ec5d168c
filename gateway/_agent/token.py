"""What an agent shows to the gateway to prove who it is."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import msgspec
from twisted.internet.defer import Deferred

#: what gives a token, each time another one maybe
TokenSource: TypeAlias = Callable[[], "str | Deferred[str] | Awaitable[str]"]
Token: TypeAlias = str | TokenSource | None

#: in seconds since 1970, the year 10000
_END_OF_TIME = 253402300800


def check_token(token: object) -> str:
    """The token. Raises ``ValueError``, without a word of it, for what is none."""
    # RFC 6750, section 2.1; also what keeps a line break out of the header.
    if not isinstance(token, str) or not token or not all("!" <= character <= "~" for character in token):
        raise ValueError("the token is not a text of visible ASCII characters without spaces")
    return token


def expiry_of(token: str) -> float | None:
    """When a token expires, in seconds since 1970, as it says itself if it is a JSON Web Token (RFC 7519, section
    4.1.4); else ``None``. Nothing is verified."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = msgspec.json.decode(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return None
    expires = claims.get("exp") if isinstance(claims, dict) else None
    if isinstance(expires, bool) or not isinstance(expires, (int, float)) or not 0 < expires < _END_OF_TIME:
        return None
    return float(expires)
