"""What a backend's token is for: everything, or some verbs alone, for all clients or for those of one customer.

call         ask a client
notify       tell a client, or all whose ids begin alike
read         where clients are, their events, the nodes; without a prefix the metrics, too
disconnect   disconnect a client
serve        answer what clients ask

``--backend-token-file``: the tokens of backends, one a line: as it is, or as ``sha256:`` and its SHA-256; and behind
it, if it is not for everything, how the ids of its clients begin, and what it is for.

# the billing service
3q2-7wQm0aFh…
# what acme's own programs come in with
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
from gateway.auth.files import numbered_lines, parse_sha256, warn_if_world_readable
from gateway.auth.interface import MAX_TOKEN_LENGTH, is_client_id
from gateway.settings import ConfigError

VERBS: Final = ("call", "notify", "read", "disconnect", "serve")
#: what who comes in by a token is told when it is none any more
REVOKED_MESSAGE: Final = "this token was withdrawn"


@attrs.define(eq=False, init=False)
class Grant:
    """What one token is for. Whoever came in by it keeps this very object: it changes when the file of tokens does."""

    #: how the ids of the clients begin that it is for
    prefix: str
    verbs: frozenset[str]
    #: whether there is anything that it is not for; while ``False``, nothing else need be asked
    is_limited: bool
    #: whether the token is no longer one
    is_revoked: bool

    def __init__(self, prefix: str = "", verbs: Iterable[str] | None = None) -> None:
        self.set_limits(prefix, verbs)

    def set_limits(self, prefix: str, verbs: Iterable[str] | None) -> None:
        """Let it be for this from now on; ``None`` are all verbs, and whatever else there is."""
        self.prefix = prefix
        self.verbs = frozenset(VERBS if verbs is None else verbs)
        self.is_limited = bool(prefix) or verbs is not None
        self.is_revoked = False

    def revoke(self) -> None:
        """Let it be for nothing from now on."""
        self.set_limits("", ())
        self.is_revoked = True

    def allows(self, verb: str, client_id: str) -> bool:
        """Whether it is for doing that to a client; or to all clients whose ids begin so, so that an empty text stands
        for everybody."""
        return verb in self.verbs and client_id.startswith(self.prefix)

    def check(self, verb: str, client_id: str | None = None) -> None:
        """Raise :class:`Forbidden` unless it is; without ``client_id`` it is for something that is about no client."""
        if self.is_revoked:
            raise ForbiddenError(REVOKED_MESSAGE)
        if verb not in self.verbs:
            given = ", ".join(each for each in VERBS if each in self.verbs) or "nothing"
            raise ForbiddenError(f"this token may not {verb}; it is for {given}")
        if client_id is not None and not client_id.startswith(self.prefix):
            raise ForbiddenError(f"this token is for clients whose id begins with {self.prefix} alone")

    def check_unlimited(self) -> None:
        """Raise :class:`Forbidden` unless it is for everything."""
        if self.is_revoked:
            raise ForbiddenError(REVOKED_MESSAGE)
        if self.is_limited:
            raise ForbiddenError("this is for tokens without a prefix and verbs alone")


#: of who is asked for no token, and of who has one without limits; nobody changes it
UNLIMITED: Final = Grant()
#: of who showed no token, where something may be asked without
NO_GRANT: Final = Grant(verbs=())


#: bytes of a file
MAX_FILE_SIZE = 1048576

_OPTION = "backend-token-file"
_HASH_PREFIX = "sha256:"
_BLANKS = re.compile(r"[ \t]+")
_LIMIT_FIELD = re.compile(r"(prefix|verbs)=(.*)")

#: how the ids of the clients begin, and the verbs; ``None`` where they are not named
Limits: TypeAlias = tuple[str, "frozenset[str] | None"]


class BackendTokens:
    """The tokens of one file; what is kept of them is their SHA-256."""

    def __init__(self, path: str) -> None:
        """Raises :class:`~gateway.settings.ConfigError`, which names the file and the line."""
        self._path = path
        self._grants: dict[bytes, tuple[bytes, Grant]] = {}
        #: of tokens that the file has no more, while somebody has come in by them
        self._revoked: WeakValueDictionary[bytes, Grant] = WeakValueDictionary()
        self.reload()

    def reload(self) -> None:
        """Read the file again; the old tokens stay if that fails, with ``ConfigError``. What was given out by
        :meth:`grant` changes with the file."""
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
        """What a token is for, from now on; ``None`` if it is not a backend's."""
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        known, grant = self._grants.get(digest, (b"", None))
        return grant if hmac.compare_digest(known, digest) else None

    def _read_file(self) -> dict[bytes, Limits]:
        found: dict[bytes, Limits] = {}
        numbers: dict[bytes, int] = {}
        plain = False
        for number, line in numbered_lines(_OPTION, self._path, MAX_FILE_SIZE):
            where = f"{self._path} line {number}"
            token, *words = _BLANKS.split(line)
            digest, limits = _parse_token(token, where), _parse_limits(words, where)
            if found.setdefault(digest, limits) != limits:
                raise ConfigError(_OPTION, f"{where}: the token of line {numbers[digest]} has other limits here")
            numbers.setdefault(digest, number)
            plain = plain or not token.startswith(_HASH_PREFIX)
        if not found:
            raise ConfigError(_OPTION, f"{self._path} has no token; write one a line")
        if plain:
            warn_if_world_readable(_OPTION, self._path)
        return found


def _parse_token(token: str, where: str) -> bytes:
    if token.startswith(_HASH_PREFIX):
        digest = parse_sha256(token.removeprefix(_HASH_PREFIX))
        if digest is None:
            raise ConfigError(_OPTION, f"{where}: after sha256: there are not 64 hexadecimal digits")
        return digest
    if _LIMIT_FIELD.match(token):
        raise ConfigError(_OPTION, f"{where}: a line begins with the token; prefix= and verbs= come behind it")
    if not token.isascii() or not token.isprintable():
        raise ConfigError(_OPTION, f"{where}: a token is one word of ASCII characters, without blanks")
    if len(token) > MAX_TOKEN_LENGTH:
        raise ConfigError(
            _OPTION, f"{where}: the token has more than {MAX_TOKEN_LENGTH} characters, and none is that long"
        )
    return hashlib.sha256(token.encode()).digest()


def _parse_limits(fields: list[str], where: str) -> Limits:
    # What cannot be read may be a piece of a token, and is not shown.
    given: dict[str, str] = {}
    for word in fields:
        found = _LIMIT_FIELD.fullmatch(word)
        if found is None:
            raise ConfigError(
                _OPTION,
                f"{where}: a token is one word of ASCII characters; behind it there may be prefix= and verbs=, with "
                "no blank within, and nothing else",
            )
        if found[1] in given:
            raise ConfigError(_OPTION, f"{where}: {found[1]}= is given twice")
        given[found[1]] = found[2]
    prefix = given.get("prefix")
    # An id may not be "." or "..", but may begin so.
    if prefix is not None and not is_client_id(prefix) and prefix not in (".", ".."):
        raise ConfigError(
            _OPTION, f"{where}: prefix= is how client ids begin: 1 to 128 of A-Z a-z 0-9 . _ : @ / + = -, such as acme/"
        )
    verbs = given.get("verbs")
    if verbs is None:
        return prefix or "", None
    if not set(verbs.split(",")) <= set(VERBS):
        raise ConfigError(_OPTION, f"{where}: verbs= is some of {','.join(VERBS)}, with commas and no blanks between")
    return prefix or "", frozenset(verbs.split(","))
