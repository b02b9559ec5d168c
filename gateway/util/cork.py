"""Write coalescing (corking): buffer writes while an event is handled, flush once per connection.

A caller that delivers many messages at once, such as those of one read of a backend's socket or those of all clients
that just became readable, corks the node. While corked, each connection buffers its output; uncorking writes it, with
one system call for each connection. Otherwise everything is written at once.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.util.log import RateLimitedLogger


class Cork:
    """The cork of a node, shared by its connections."""

    __slots__ = ("_error_log", "_flush_callbacks", "is_corked")

    def __init__(self, clock: Callable[[], float]) -> None:
        #: whether output is to be buffered; only then may on_flush() be called
        self.is_corked = False
        self._flush_callbacks: list[Callable[[], None]] = []
        self._error_log = RateLimitedLogger(clock)

    def cork(self) -> bool:
        """Start buffering. Returns ``False`` if already corked: then the caller must not uncork."""
        if self.is_corked:
            return False
        self.is_corked = True
        return True

    def on_flush(self, flush: Callable[[], None]) -> None:
        """Call ``flush`` on the next :meth:`uncork`. It may add further callbacks, which are called as well."""
        self._flush_callbacks.append(flush)

    def uncork(self) -> None:
        """Flush all connections and stop buffering. An error in one is logged and does not affect the others."""
        callbacks = self._flush_callbacks
        try:
            while callbacks:
                try:
                    callbacks.pop(0)()
                except Exception:  # noqa: BLE001
                    self._error_log.failure("an error in writing to a connection")
        finally:
            self.is_corked = False
