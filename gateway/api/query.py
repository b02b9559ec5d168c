"""Parse paths, queries and durations of HTTP requests from raw bytes. No I/O.

    /v1/clients/acme%2Frobot/rpc?timeout=2.5     the client acme/robot, and 2.5 seconds
    /v1/clients/acme/robot/rpc                   the same client: a slash in a client_id may be encoded or not

A path is split before it is percent-decoded, and decoded once. In a query ``+`` is a plus sign: client_ids may contain
one, but never a space. A parameter may be given once, however its name is encoded.
"""

from __future__ import annotations

import contextlib
import re
from typing import Final

from gateway.api.errors import BadRequestError
from gateway.auth.interface import is_client_id

_CLIENT_ID_PART = re.compile(r"[A-Za-z0-9._:@/+=-]{0,128}")
_NODE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_SECONDS = re.compile(r"[0-9]{1,15}(\.[0-9]{0,15})?|\.[0-9]{1,15}")
_INTEGER = re.compile(r"[0-9]{1,9}")

#: prefix of the path of a client
CLIENTS_PATH: Final = b"/v1/clients/"
#: suffix of the path for calls to a client
RPC_SUFFIX: Final = b"/rpc"

CLIENT_ID_RULE = "a client_id is 1 to 128 characters of A-Z a-z 0-9 . _ : @ / + = - and neither . nor .."


def percent_decode(raw: bytes) -> str:
    """Decode ``%XX`` once, as UTF-8 (RFC 3986, section 2.1). Raises ``ValueError``."""
    if b"%" in raw:
        if _BAD_ESCAPE.search(raw):
            raise ValueError("a % without two hexadecimal digits")
        raw = _ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode("ascii")), raw)
    return raw.decode("utf-8")


def parse_client_id(raw: bytes) -> str:
    """Parse the percent-encoded client_id of a path. Raises ``BadRequestError``."""
    try:
        text = percent_decode(raw)
    except ValueError:
        raise BadRequestError("client_id", "the client_id in the path is not percent-encoded UTF-8") from None
    if not is_client_id(text):
        raise BadRequestError("client_id", f"the path has no valid client_id: {CLIENT_ID_RULE}")
    return text


def rpc_client_id(path: bytes) -> str | None:
    """Return the client_id of a path for calls; ``None`` for any other path."""
    if not (path.startswith(CLIENTS_PATH) and path.endswith(RPC_SUFFIX)):
        return None
    try:
        return parse_client_id(path[len(CLIENTS_PATH) : -len(RPC_SUFFIX)])
    except BadRequestError:
        return None


class Query:
    """Parsed query parameters. Unknown ones are ignored. The getters raise ``BadRequestError``."""

    def __init__(self, raw: bytes) -> None:
        self._values: dict[str, list[bytes]] = {}
        for part in raw.split(b"&"):
            key, _, value = part.partition(b"=")
            # A name that cannot be decoded is unknown.
            with contextlib.suppress(ValueError):
                self._values.setdefault(percent_decode(key), []).append(value)

    def get(self, name: str) -> str | None:
        """Return a decoded parameter, or ``None``."""
        values = self._values.get(name)
        if values is None:
            return None
        if len(values) > 1:
            raise BadRequestError(name, f"{name} is given more than once")
        try:
            return percent_decode(values[0])
        except ValueError:
            raise BadRequestError(name, f"{name} is not percent-encoded UTF-8") from None

    def get_client_id_part(self, name: str) -> str | None:
        """Return a client_id or a prefix of client_ids, possibly empty, or ``None``."""
        text = self.get(name)
        if text is not None and not _CLIENT_ID_PART.fullmatch(text):
            raise BadRequestError(name, f"{name} is up to 128 characters of A-Z a-z 0-9 . _ : @ / + = -")
        return text

    def get_node_id(self, name: str) -> str | None:
        """Return a node_id, or ``None``."""
        text = self.get(name)
        if text is not None and not _NODE_ID.fullmatch(text):
            raise BadRequestError(name, f"{name} is a node_id, as in GET /v1/nodes")
        return text

    def get_int(self, name: str, default: int, minimum: int, maximum: int) -> int:
        """Return an integer from ``minimum`` to ``maximum``, or ``default``."""
        text = self.get(name)
        if text is None:
            return default
        if not _INTEGER.fullmatch(text) or not minimum <= int(text) <= maximum:
            raise BadRequestError(name, f"{name} is an integer from {minimum} to {maximum}")
        return int(text)


def parse_seconds(name: str, text: str) -> float:
    """Parse a positive decimal number of seconds. Raises ``BadRequestError``."""
    if not _SECONDS.fullmatch(text) or float(text) <= 0:
        raise BadRequestError("timeout", f"{name} is not a positive number of seconds, such as 5 or 0.5")
    return float(text)
