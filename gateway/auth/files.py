"""Read files of tokens and keys."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator

from twisted.logger import Logger

from gateway.settings import ConfigError
from gateway.util.files import FileError, read_bounded

#: lines that one warning names
MAX_NAMED_LINES = 10

_log = Logger()

_COMMENT = re.compile(r"(^|\s)#.*")
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")


def parse_sha256(text: str) -> bytes | None:
    """Return the 32 bytes of a SHA-256 in hexadecimal, or ``None`` if it is invalid."""
    return bytes.fromhex(text) if _DIGEST.fullmatch(text) else None


def numbered_lines(option: str, path: str, max_size: int) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file of at most ``max_size`` bytes, with their numbers from 1, without empty lines and
    comments. A comment begins with ``#`` at the start of a line or behind a blank.

    Raises :class:`~gateway.settings.ConfigError`, which names ``option`` and the file.
    """
    try:
        text = read_bytes(option, path, max_size).decode("utf-8-sig")
    except ValueError:
        raise ConfigError(option, f"{path} is not a text file in UTF-8") from None
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        content = _COMMENT.sub("", line).strip()
        if content:
            yield number, content


def read_bytes(option: str, path: str, max_size: int) -> bytes:
    """Read a file of at most ``max_size`` bytes.

    Raises :class:`~gateway.settings.ConfigError`, which names ``option`` and the file.
    """
    try:
        return read_bounded(path, max_size)
    except FileError as e:
        raise ConfigError(option, str(e)) from None


class UselessLines:
    """Lines of a file that are valid, but have no effect. ``option`` and ``source`` are named in the log."""

    def __init__(self, option: str, source: str) -> None:
        self._option = option
        self._source = source
        self._named: list[str] = []
        self._count = 0

    def add(self, number: int, text: str) -> None:
        """Remember the number of a line, and the text that is to blame."""
        self._count += 1
        if self._count <= MAX_NAMED_LINES:
            self._named.append(f"{number} ({text})")

    def warn(self, reason: str) -> None:
        """Log one warning that names the lines, or the first ones, if there are any."""
        if not self._count:
            return
        more = self._count - len(self._named)
        _log.warn(
            "--{option}: {source}: {count} without effect: line {lines}{more}: {reason}",
            option=self._option,
            source=self._source,
            count="1 line is" if self._count == 1 else f"{self._count} lines are",
            lines=", ".join(self._named),
            more=f" and {more} more" if more else "",
            reason=reason,
        )


def warn_if_world_readable(option: str, path: str) -> None:
    """Log a warning if all users of this machine can read a file of secrets."""
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode) and mode & stat.S_IROTH:
            _log.warn(
                "--{option}: {path} can be read by all users of this machine; chmod o-r it", option=option, path=path
            )
