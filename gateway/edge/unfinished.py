"""What a node holds of messages that are not whole yet: bounded for all connections together.

Each connection may have one message of the largest size under way, for as long as it likes: its link may be slow. Many
that begin such messages and never end them would be memory without a bound; so when there are too many, those are
closed that have added nothing to theirs for longest.
"""

from __future__ import annotations

from typing import Protocol

from gateway.edge.interface import CLOSE_TRY_AGAIN_LATER
from gateway.telemetry.metrics import Metrics

#: so many of the largest messages may be under way at a time
MOST_MESSAGES = 256


class _Connection(Protocol):
    def close_with(self, code: int, reason: str = "") -> None:
        """Begin to close with that code."""


class Unfinished:
    """The messages that are under way, of one node."""

    def __init__(self, max_message_size: int, metrics: Metrics) -> None:
        """``max_message_size`` is in bytes."""
        #: bytes, of all of them
        self.total = 0
        self._most = MOST_MESSAGES * max_message_size
        self._metrics = metrics
        #: those that have added nothing for longest come first
        self._held: dict[_Connection, int] = {}

    def add(self, connection: _Connection, size: int) -> None:
        """So many bytes more are held of a connection's message."""
        self._held[connection] = self._held.pop(connection, 0) + size
        self.total += size
        while self.total > self._most:
            slowest = next(iter(self._held))
            self.discard(slowest)
            self._metrics.slow_senders += 1
            slowest.close_with(CLOSE_TRY_AGAIN_LATER, "its message is not whole, and this node holds too many such")

    def discard(self, connection: _Connection) -> None:
        """Nothing is held of its message any more."""
        self.total -= self._held.pop(connection, 0)
