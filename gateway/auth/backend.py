"""``--backend-token-file``: the tokens of backends, one a line: as it is, or as ``sha256:`` and its SHA-256.

# the billing service
3q2-7wQm0aFh…
sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
"""

from __future__ import annotations

import hashlib
import hmac

from gateway.auth.files import numbered_lines, parse_digest
from gateway.settings import ConfigError

_OPTION = "backend-token-file"


class BackendTokens:
    """The tokens of one file; what is kept of them is their SHA-256."""

    def __init__(self, path: str) -> None:
        """Raises :class:`~gateway.settings.ConfigError`, which names the file and the line."""
        self._path = path
        self._digests: tuple[bytes, ...] = ()
        self.reload()

    def reload(self) -> None:
        """Read the file again; the old tokens stay if that fails, with ``ConfigError``."""
        digests = []
        for number, line in numbered_lines(_OPTION, self._path):
            where = f"{self._path} line {number}"
            if line.startswith("sha256:"):
                digest = parse_digest(line[7:])
                if digest is None:
                    raise ConfigError(_OPTION, f"{where}: after sha256: there are not 64 hexadecimal digits")
            elif not line.isascii() or not line.isprintable() or " " in line:
                raise ConfigError(_OPTION, f"{where}: a token is one word of ASCII characters, without blanks")
            else:
                digest = hashlib.sha256(line.encode()).digest()
            digests.append(digest)
        if not digests:
            raise ConfigError(_OPTION, f"{self._path} has no token; write one a line")
        self._digests = tuple(digests)

    def accepts(self, token: str) -> bool:
        """Whether it is a backend's token."""
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found
