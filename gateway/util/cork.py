"""One turn: what was written while something is handled leaves together when that is over.

Whoever hands on many messages (those of one read of a backend's socket, those of all clients that just became readable)
begins a turn. Within it each connection gathers what it is to send; the end of the turn writes it, by one system call
for each connection. Outside of a turn everything is written at once.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.util.log import RateLimitedLogger


class Cork:
    """The turn that is on, if one is. There is one of these in a node."""

    __slots__ = ("_error_log", "_flush_callbacks", "is_corked")

    def __init__(self, clock: Callable[[], float]) -> None:
        """``seconds`` is the node's clock."""
        #: whether one is on: then :meth:`at_end` may be called
        self.is_corked = False
        self._flush_callbacks: list[Callable[[], None]] = []
        self._error_log = RateLimitedLogger(clock)

    def cork(self) -> bool:
        """Begin one. ``False``, and nothing is to be ended, where one is on already."""
        if self.is_corked:
            return False
        self.is_corked = True
        return True

    def on_flush(self, flush: Callable[[], None]) -> None:
        """Call that at the end of the turn. What it sets off in its turn may gather more."""
        self._flush_callbacks.append(flush)

    def uncork(self) -> None:
        """End it: write everything."""
        flushes = self._flush_callbacks
        try:
            while flushes:
                try:
                    flushes.pop(0)()
                except Exception:  # noqa: BLE001 (the others must not suffer)
                    self._error_log.failure("an error in writing to a connection")
        finally:
            self.is_corked = False
