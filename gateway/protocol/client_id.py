"""Client ids: which texts are one. The same rule for clients, tokens, certificates, backends and peers.

A client id is a part of URLs, and proxies normalize the path of a URL (RFC 3986, section 6.2.2.3): they merge slashes,
and remove dot segments. An id that this would change into the id of another client is therefore none:

    acme/robot-7                 valid
    acme//robot-7                none: a proxy may make acme/robot-7 of it
    acme/../robot-7, ./robot-7   none
    /robot-7, robot-7/           none
    spiffe://acme/robot-7        valid: the ``//`` directly behind a scheme at the start, as certificates have it
    spiffe:/acme/robot-7         none, so that the merged form of the id above is no client's
"""

from __future__ import annotations

import re
from typing import Final

#: characters of a client id, at most
MAX_CLIENT_ID_LENGTH: Final = 128
#: what a client id is, for messages
CLIENT_ID_RULE: Final = (
    f"1 to {MAX_CLIENT_ID_LENGTH} characters of A-Z a-z 0-9 . _ : @ / + = -, of which no segment between slashes is "
    "empty, . or .. (behind a scheme at the start there is //, not /, as in spiffe://a/b)"
)

_PART = re.compile(r"[A-Za-z0-9._:@/+=-]*")
#: RFC 3986, section 3.1
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*:"
_SEGMENT = r"(?!\.\.?(?:/|\Z))[A-Za-z0-9._:@+=-]+"
_SEGMENTS = re.compile(rf"(?:{_SCHEME}//|(?!{_SCHEME}/)){_SEGMENT}(?:/{_SEGMENT})*")


def is_client_id(text: str) -> bool:
    """Whether a text is a client id."""
    return len(text) <= MAX_CLIENT_ID_LENGTH and _SEGMENTS.fullmatch(text) is not None


def is_former_client_id(text: str) -> bool:
    """Whether a text was a client id in releases that did not check its segments, and is none any more."""
    return text not in ("", ".", "..") and is_client_id_part(text) and not is_client_id(text)


def is_client_id_part(text: str) -> bool:
    """Whether a text, possibly empty, has the characters and at most the length of a client id."""
    return len(text) <= MAX_CLIENT_ID_LENGTH and _PART.fullmatch(text) is not None


def is_client_id_prefix(text: str) -> bool:
    """Whether a client id may begin with a text."""
    return any(is_client_id(text + rest) for rest in ("", "x", "/x"))
