"""What the targets share."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

from twisted.logger import formatEvent, globalLogPublisher

#: how large an input may be that is cut at every byte, in bytes
BYTE_BY_BYTE = 400


@contextlib.contextmanager
def nothing_is_logged() -> Iterator[None]:
    """Nothing that a stranger sends is worth a line in the log, and an exception that did not come out is one."""
    events: list[Any] = []
    globalLogPublisher.addObserver(events.append)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(events.append)
    assert not events, [event.get("log_failure") or formatEvent(event) for event in events]


def in_two(data: bytes) -> list[bytes]:
    """The same bytes in two pieces, cut at a place that depends on nothing else."""
    at = zlib.crc32(data) % (len(data) + 1)
    return [piece for piece in (data[:at], data[at:]) if piece]


def in_bytes(data: bytes) -> list[bytes]:
    """The same bytes one by one; where they are many, in larger pieces."""
    size = 1 if len(data) <= BYTE_BY_BYTE else 61
    return [data[at : at + size] for at in range(0, len(data), size)]
