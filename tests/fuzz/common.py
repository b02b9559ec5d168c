"""Helpers of the targets."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

from twisted.logger import formatEvent, globalLogPublisher

#: bytes; larger inputs are not split at every byte
BYTE_BY_BYTE = 400


@contextlib.contextmanager
def nothing_is_logged() -> Iterator[None]:
    """Assert that nothing is logged: neither about invalid input, nor a caught exception; but which limit a client has
    exceeded may be."""
    events: list[Any] = []
    globalLogPublisher.addObserver(events.append)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(events.append)
    events = [event for event in events if " is disconnected: {option}" not in event.get("log_format", "")]
    assert not events, [event.get("log_failure") or formatEvent(event) for event in events]


def in_two(data: bytes) -> list[bytes]:
    """Split the bytes in two, at a position that depends only on them."""
    at = zlib.crc32(data) % (len(data) + 1)
    return [piece for piece in (data[:at], data[at:]) if piece]


def in_bytes(data: bytes) -> list[bytes]:
    """Split into single bytes; large inputs into larger pieces."""
    size = 1 if len(data) <= BYTE_BY_BYTE else 61
    return [data[at : at + size] for at in range(0, len(data), size)]
