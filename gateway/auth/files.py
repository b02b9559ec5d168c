"""Files of tokens, line by line; and of keys, whole."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator

from twisted.logger import Logger

from gateway.settings import ConfigError

_log = Logger()

_COMMENT = re.compile(r"(^|\s)#.*")
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")


def parse_sha256(text: str) -> bytes | None:
    """The 32 bytes of a SHA-256 in hexadecimal, or ``None`` if it is none."""
    return bytes.fromhex(text) if _DIGEST.fullmatch(text) else None


def numbered_lines(option: str, path: str, max_size: int) -> Iterator[tuple[int, str]]:
    """The lines of a file of at most ``most`` bytes that say something, with their numbers from 1; ``#`` begins a
    comment at the beginning of a line and behind a blank.

    Raises :class:`~gateway.settings.ConfigError`, which names ``option`` and the file.
    """
    try:
        text = read_bytes(option, path, max_size).decode("utf-8-sig")
    except ValueError:
        raise ConfigError(option, f"{path} is not a text file in UTF-8") from None
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        said = _COMMENT.sub("", line).strip()
        if said:
            yield number, said


def read_bytes(option: str, path: str, max_size: int) -> bytes:
    """The bytes of a file, of which there are at most ``most``.

    Raises :class:`~gateway.settings.ConfigError`, which names ``option`` and the file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(max_size + 1)
    except (OSError, ValueError) as e:
        # The latter for a path that none can be.
        shown = path if path.isprintable() else ascii(path)
        raise ConfigError(option, f"{shown} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if len(content) > max_size:
        raise ConfigError(option, f"{path} has more than {max_size} bytes")
    return content


def warn_if_world_readable(option: str, path: str) -> None:
    """Say so if everybody on this machine can read a file that has secrets in it."""
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode) and mode & stat.S_IROTH:
            _log.warn(
                "--{option}: {path} can be read by anybody on this machine; chmod o-r it", option=option, path=path
            )
