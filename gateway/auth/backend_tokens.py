"""Authorize backends by their tokens.

A token allows everything, or only some verbs, for all clients or only for those whose ids begin with a prefix:

    call         call a client
    notify       notify a client, or all clients with a prefix
    read         locations and events of clients, the nodes; without a prefix also the metrics
    disconnect   disconnect a client
    serve        answer calls of clients

``--backend-token-file`` has one token a line, in plain text or as ``sha256:`` and its SHA-256, followed by its limits:

    # the billing service
    3q2-7wQm0aFh…
    # the programs of acme
    sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08  prefix=acme/  verbs=call,notify,read
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import Final, TypeAlias
from weakref import WeakValueDictionary

import attrs

from gateway.auth.errors import ForbiddenError
from gateway.auth.files import UselessLines, numbered_lines, parse_sha256, warn_if_world_readable
from gateway.auth.interface import MAX_TOKEN_LENGTH
from gateway.protocol.client_id import is_client_id_part, is_client_id_prefix
from gateway.settings import ConfigError

VERBS: Final = ("call", "notify", "read", "disconnect", "serve")
#: error text for a backend whose token was removed from the file
REVOKED_MESSAGE: Final = "this token was withdrawn"
#: bytes
MAX_FILE_SIZE = 2**20


@attrs.define(eq=False, init=False)
class Grant:
    """What one token allows. A connection keeps the object, which changes when the file of tokens is reloaded."""

    #: prefix of the client_ids that it is for; empty for all
    prefix: str
    verbs: frozenset[str]
    #: whether anything is not allowed; while ``False``, no other check is needed
    is_limited: bool
    #: whether the token was removed
    is_revoked: bool

    def __init__(self, prefix: str = "", verbs: Iterable[str] | None = None) -> None:
        self.set_limits(prefix, verbs)

    def set_limits(self, prefix: str, verbs: Iterable[str] | None) -> None:
        """Change what it allows. Without a prefix, and with ``None`` as verbs, that is everything."""
        self.prefix = prefix
        self.verbs = frozenset(VERBS if verbs is None else verbs)
        self.is_limited = bool(prefix) or verbs is not None
        self.is_revoked = False

    def revoke(self) -> None:
        """Allow nothing from now on."""
        self.set_limits("", ())
        self.is_revoked = True

    def allows(self, verb: str, client_id: str) -> bool:
        """Whether the verb is allowed for a client. ``client_id`` may also be a prefix, for all clients with it; if it
        is empty, for all clients."""
        return verb in self.verbs and client_id.startswith(self.prefix)

    def check(self, verb: str, client_id: str | None = None) -> None:
        """Raise :class:`ForbiddenError` unless the verb is allowed, for ``client_id`` (or prefix) if it is given."""
        if self.is_revoked:
            raise ForbiddenError(REVOKED_MESSAGE)
        if verb not in self.verbs:
            allowed = ", ".join(each for each in VERBS if each in self.verbs) or "nothing"
            raise ForbiddenError(f"this token may not {verb}; it is for {allowed}")
        if client_id is not None and not client_id.startswith(self.prefix):
            raise ForbiddenError(f"this token is limited to client ids that begin with {self.prefix}")

    def check_unlimited(self) -> None:
        """Raise :class:`ForbiddenError` unless everything is allowed."""
        if self.is_revoked:
            raise ForbiddenError(REVOKED_MESSAGE)
        if self.is_limited:
            raise ForbiddenError("this needs a token without prefix= and verbs=")


#: of requests that need no token
UNLIMITED: Final = Grant()
#: of requests without a token, where some need none
NO_GRANT: Final = Grant(verbs=())

_OPTION = "backend-token-file"
_HASH_PREFIX = "sha256:"
_BLANKS = re.compile(r"[ \t]+")
_LIMIT_FIELD = re.compile(r"(prefix|verbs)=(.*)")

#: prefix, and verbs, or ``None`` if there is no ``verbs=``
Limits: TypeAlias = tuple[str, "frozenset[str] | None"]


class BackendTokens:
    """The tokens of one file, of which only the SHA-256 is kept in memory."""

    def __init__(self, path: str) -> None:
        """Raises :class:`~gateway.settings.ConfigError`, which names the file and the line."""
        self._path = path
        self._grants: dict[bytes, tuple[bytes, Grant]] = {}
        #: of tokens that were removed from the file, while a connection still uses them
        self._revoked: WeakValueDictionary[bytes, Grant] = WeakValueDictionary()
        self.reload()

    def reload(self) -> None:
        """Read the file again, and change the grants in use. Raises ``ConfigError``, and keeps the old tokens, if the
        file is not valid."""
        limits = self._read_file()
        before, self._grants = self._grants, {}
        for digest, (prefix, verbs) in limits.items():
            _, grant = before.pop(digest, (digest, None))
            if grant is None:
                grant = self._revoked.pop(digest, None) or Grant()
            grant.set_limits(prefix, verbs)
            self._grants[digest] = digest, grant
        for digest, grant in before.values():
            grant.revoke()
            self._revoked[digest] = grant

    def grant(self, token: str) -> Grant | None:
        """Return the grant of a token, or ``None`` if the file does not have it."""
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        known, grant = self._grants.get(digest, (b"", None))
        return grant if hmac.compare_digest(known, digest) else None

    def _read_file(self) -> dict[bytes, Limits]:
        found: dict[bytes, Limits] = {}
        numbers: dict[bytes, int] = {}
        plain = False
        useless = UselessLines(_OPTION, self._path)
        for number, line in numbered_lines(_OPTION, self._path, MAX_FILE_SIZE):
            place = f"{self._path} line {number}"
            token, *fields = _BLANKS.split(line)
            digest, limits = _parse_token(token, place), _parse_limits(fields, place)
            if found.setdefault(digest, limits) != limits:
                raise ConfigError(_OPTION, f"{place}: the token of line {numbers[digest]} has other limits here")
            numbers.setdefault(digest, number)
            if not is_client_id_prefix(limits[0]):
                useless.add(number, f"prefix={limits[0]}")
            plain = plain or not token.startswith(_HASH_PREFIX)
        if not found:
            raise ConfigError(_OPTION, f"{self._path} has no token; write one a line")
        if plain:
            warn_if_world_readable(_OPTION, self._path)
        useless.warn("no client_id begins so")
        return found


def _parse_token(token: str, place: str) -> bytes:
    if token.startswith(_HASH_PREFIX):
        digest = parse_sha256(token.removeprefix(_HASH_PREFIX))
        if digest is None:
            raise ConfigError(_OPTION, f"{place}: after sha256: there are not 64 hexadecimal digits")
        return digest
    if _LIMIT_FIELD.match(token):
        raise ConfigError(_OPTION, f"{place}: the line does not begin with a token; write TOKEN [prefix=P] [verbs=V,…]")
    if not token.isascii() or not token.isprintable():
        raise ConfigError(_OPTION, f"{place}: a token is one word of ASCII characters, without blanks")
    if len(token) > MAX_TOKEN_LENGTH:
        raise ConfigError(
            _OPTION, f"{place}: the token has more than {MAX_TOKEN_LENGTH} characters, and none is that long"
        )
    return hashlib.sha256(token.encode()).digest()


def _parse_limits(fields: list[str], place: str) -> Limits:
    # An invalid field may be a piece of a token, and is not shown.
    values: dict[str, str] = {}
    for field in fields:
        match = _LIMIT_FIELD.fullmatch(field)
        if match is None:
            raise ConfigError(
                _OPTION,
                f"{place}: write TOKEN [prefix=P] [verbs=V,…], without blanks inside a field and with nothing else",
            )
        if match[1] in values:
            raise ConfigError(_OPTION, f"{place}: {match[1]}= is given twice")
        values[match[1]] = match[2]
    prefix = values.get("prefix")
    # Not every prefix of a client_id is one: acme/ is none.
    if prefix is not None and not (prefix and is_client_id_part(prefix)):
        raise ConfigError(
            _OPTION, f"{place}: prefix= is how client ids begin: 1 to 128 of A-Z a-z 0-9 . _ : @ / + = -, such as acme/"
        )
    verbs = values.get("verbs")
    if verbs is None:
        return prefix or "", None
    if not set(verbs.split(",")) <= set(VERBS):
        raise ConfigError(_OPTION, f"{place}: verbs= is some of {','.join(VERBS)}, with commas and no blanks between")
    return prefix or "", frozenset(verbs.split(","))
