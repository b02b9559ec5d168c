"""Limit the memory of incomplete messages, of all connections together.

A connection may take any time to send a message of the largest size, since its link may be slow; many that start such
messages and never finish them would take unbounded memory. Over the limit, the connections that have gone longest
without adding to their message are closed.
"""

from __future__ import annotations

from typing import Protocol

from gateway.metrics import Metrics
from gateway.protocol.frames import CloseCode

#: incomplete messages of the largest size that a node may hold
MAX_INCOMPLETE_MESSAGES = 256


class _ClosableConnection(Protocol):
    def limit_exceeded(self, option: str) -> None: ...

    def close_with(self, code: int, reason: str = "") -> None: ...


class ReassemblyBudget:
    """Limit the memory of the incomplete messages of one node's clients."""

    def __init__(self, max_message_size: int, metrics: Metrics) -> None:
        """``max_message_size`` is in bytes."""
        #: bytes held, of all connections
        self.total_bytes = 0
        self._max_bytes = MAX_INCOMPLETE_MESSAGES * max_message_size
        self._metrics = metrics
        #: bytes held by connection, least recently charged first
        self._held: dict[_ClosableConnection, int] = {}

    def charge(self, connection: _ClosableConnection, size: int) -> None:
        """Add ``size`` bytes to a connection's incomplete message; close the slowest senders while over the limit."""
        self._held[connection] = self._held.pop(connection, 0) + size
        self.total_bytes += size
        while self.total_bytes > self._max_bytes:
            slowest = next(iter(self._held))
            self.release(slowest)
            self._metrics.slow_senders += 1
            slowest.limit_exceeded(
                f"{MAX_INCOMPLETE_MESSAGES} incomplete messages of --max-message-size on this node: its own is the "
                "longest without progress"
            )
            slowest.close_with(
                CloseCode.TRY_AGAIN_LATER, "its message is incomplete, and this node holds too many of those"
            )

    def release(self, connection: _ClosableConnection) -> None:
        """Return the bytes of a connection's message: it is complete or discarded."""
        self.total_bytes -= self._held.pop(connection, 0)
