"""Paths, queries and times of the backend's HTTP requests, from raw bytes. No I/O.

    /v1/clients/acme%2Frobot/rpc?timeout=2.5     the client acme/robot, and 2.5 seconds
    /v1/clients/acme/robot/rpc                   the same client: an id may contain a slash, written either way

A path is split before it is percent-decoded, and decoded once. In a query a ``+`` is a plus sign, since ids have
those and never a space; what is in it is given once, however its name is written.
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

#: how the path of a client begins, and how that for calls to it ends
CLIENTS_PATH: Final = b"/v1/clients/"
RPC_SUFFIX: Final = b"/rpc"

CLIENT_ID_RULE = "a client_id is 1 to 128 characters of A-Z a-z 0-9 . _ : @ / + = - and neither . nor .."


def percent_decode(raw: bytes) -> str:
    """Decode ``%XX`` once, as UTF-8 (RFC 3986, section 2.1). Raises ``ValueError``."""
    if b"%" in raw:
        if _BAD_ESCAPE.search(raw):
            raise ValueError("a % without two hexadecimal digits")
        raw = _ESCAPE.sub(lambda found: bytes.fromhex(found[1].decode("ascii")), raw)
    return raw.decode("utf-8")


def parse_client_id(raw: bytes) -> str:
    """The client's id that a piece of a path is. Raises :class:`BadInput`."""
    try:
        text = percent_decode(raw)
    except ValueError:
        raise BadRequestError("client_id", "the client_id in the path is not percent-encoded UTF-8") from None
    if not is_client_id(text):
        raise BadRequestError("client_id", f"the path names no client: {CLIENT_ID_RULE}")
    return text


def rpc_client_id(path: bytes) -> str | None:
    """The id of the client that a path for calls names; ``None`` if it names none."""
    if not (path.startswith(CLIENTS_PATH) and path.endswith(RPC_SUFFIX)):
        return None
    try:
        return parse_client_id(path[len(CLIENTS_PATH) : -len(RPC_SUFFIX)])
    except BadRequestError:
        return None


class Query:
    """The parameters of a query; those that nobody asks for are ignored."""

    def __init__(self, raw: bytes) -> None:
        self._values: dict[str, list[bytes]] = {}
        for part in raw.split(b"&"):
            key, _, value = part.partition(b"=")
            # Nobody asks for one whose name cannot be decoded.
            with contextlib.suppress(ValueError):
                self._values.setdefault(percent_decode(key), []).append(value)

    def get(self, name: str) -> str | None:
        """The text of a parameter, or ``None`` without it. Raises :class:`BadInput`."""
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
        """A client's id, or how some begin; may be empty. Raises :class:`BadInput`."""
        text = self.get(name)
        if text is not None and not _CLIENT_ID_PART.fullmatch(text):
            raise BadRequestError(name, f"{name} is up to 128 characters of A-Z a-z 0-9 . _ : @ / + = -")
        return text

    def get_node_id(self, name: str) -> str | None:
        """A node's id. Raises :class:`BadInput`."""
        text = self.get(name)
        if text is not None and not _NODE_ID.fullmatch(text):
            raise BadRequestError(name, f"{name} is a node_id, as in GET /v1/nodes")
        return text

    def get_int(self, name: str, default: int, minimum: int, maximum: int) -> int:
        """A whole number within bounds. Raises :class:`BadInput`."""
        text = self.get(name)
        if text is None:
            return default
        if not _INTEGER.fullmatch(text) or not minimum <= int(text) <= maximum:
            raise BadRequestError(name, f"{name} is a whole number from {minimum} to {maximum}")
        return int(text)


def parse_seconds(name: str, text: str) -> float:
    """A positive number of seconds, with decimals if wanted. Raises :class:`BadInput`."""
    if not _SECONDS.fullmatch(text) or float(text) <= 0:
        raise BadRequestError("timeout", f"{name} is not a positive number of seconds, such as 5 or 0.5")
    return float(text)
