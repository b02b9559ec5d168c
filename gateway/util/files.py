"""Read files that people write: of bounded size, with errors that name the file."""

from __future__ import annotations


class FileError(Exception):
    """A file cannot be used. The text begins with its path."""


class FileTooLargeError(FileError):
    """A file has more bytes than allowed."""


def read_bounded(path: str, max_size: int) -> bytes:
    """Return the content of a file of at most ``max_size`` bytes. No more than that is read, even of an endless file.

    Raises :class:`FileError`.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(max_size + 1)
    except (OSError, ValueError) as e:
        # ValueError: a path with a NUL
        shown = path if path.isprintable() else ascii(path)
        raise FileError(f"{shown} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if len(content) > max_size:
        raise FileTooLargeError(f"{path} has more than {max_size} bytes")
    return content
