"""Verify tokens against a file of client_ids and SHA-256 digests, one a line: ``--auth tokens:FILE``.

    # printf %s "$TOKEN" | sha256sum
    robot-7  9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    robot-8, 60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752

A client may have several lines, so that a token can be replaced while both are valid.
"""

from __future__ import annotations

import hashlib
import hmac
import re

from twisted.logger import Logger
from zope.interface import implementer

from gateway.auth.errors import VerificationError
from gateway.auth.files import UselessLines, numbered_lines, parse_sha256
from gateway.auth.interface import AuthMethod, Identity, ITokenVerifier
from gateway.protocol.client_id import CLIENT_ID_RULE, is_client_id, is_former_client_id
from gateway.settings import ConfigError

#: bytes
MAX_FILE_SIZE = 2**26

_SEPARATOR = re.compile(r"\s*,\s*|\s+")


@implementer(ITokenVerifier)
class TokenFile:
    """The tokens of one file."""

    _log = Logger()

    def __init__(self, path: str) -> None:
        """Raises :class:`~gateway.settings.ConfigError`, which names the file and the line."""
        self._path = path
        #: for the log
        self._source = f"--auth tokens:{path}"
        #: digest -> the same digest, for a comparison in constant time, and the client_id
        self._client_ids: dict[bytes, tuple[bytes, str]] = {}
        self.reload()
        if not self._client_ids:
            self._log.warn("--auth: tokens:{path} has no token: it accepts no client before a SIGHUP", path=path)

    def __len__(self) -> int:
        return len(self._client_ids)

    def reload(self) -> None:
        """Read the file again. Raises ``ConfigError``, and keeps the old tokens, if it is not valid, or has no token,
        since it may be in the middle of being rewritten.

        Lines whose client_id is none any more are left out, and named in the log: the file of an earlier release must
        not keep a node from starting.
        """
        clients: dict[bytes, tuple[bytes, str]] = {}
        former = UselessLines("auth", f"tokens:{self._path}")
        for number, line in numbered_lines("auth", self._path, MAX_FILE_SIZE):
            place = f"tokens:{self._path} line {number}"
            fields = _SEPARATOR.split(line)
            if len(fields) != 2:
                raise ConfigError("auth", f"{place}: write a client_id and the SHA-256 of its token, nothing else")
            client_id, digest = fields[0], parse_sha256(fields[1])
            if not is_client_id(client_id) and not is_former_client_id(client_id):
                raise ConfigError("auth", f"{place}: {client_id!a} is no client_id: {CLIENT_ID_RULE}")
            if digest is None:
                raise ConfigError("auth", f"{place}: the SHA-256 of the token is not 64 hexadecimal digits")
            if is_former_client_id(client_id):
                former.add(number, client_id)
                continue
            if clients.setdefault(digest, (digest, client_id))[1] != client_id:
                other = clients[digest][1]
                raise ConfigError("auth", f"{place}: {client_id} has the same token as {other}; give it its own")
        if self._client_ids and not clients:
            problem = f"tokens:{self._path} has no token; to revoke all, leave a line whose token no client has"
            raise ConfigError("auth", problem)
        self._client_ids = clients
        former.warn(f"these are no client_ids any more, and their tokens are refused; a client_id is {CLIENT_ID_RULE}")

    def verify(self, token: str) -> Identity:
        """Return the identity of a token, which never expires. Raises :class:`VerificationError` if no line has it."""
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        stored, client_id = self._client_ids.get(digest, (b"", ""))
        if not hmac.compare_digest(stored, digest):
            raise VerificationError("unknown_token", self._source)
        return Identity(client_id, method=AuthMethod.TOKENS)
