"""Requests that a backend sends without waiting for answers (RFC 9112, section 9.3.2): one in each turn of the reactor.

    -> GET /healthz, GET /healthz, GET /healthz, …       a thousand in one segment
    <- 200, and in the next turn 200, and so on          meanwhile nothing is read from this connection

Twisted answers all of them at once, as far as their answers are there at once; nobody else is heard meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import connectionDone
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure
from twisted.web import http


class OneInATurn(http.HTTPChannel):
    """The way of one HTTP connection through its requests."""

    transport: Any
    callLater: Callable[..., IDelayedCall]
    _buffer: bytes
    _resting: IDelayedCall | None = None
    #: the backend does not read its answers
    _full = False

    @property
    def paused(self) -> bool:  # type: ignore[override]
        """Whether what was read is not to be parsed now."""
        return self._full or self._resting is not None

    def requestDone(self, request: Any) -> None:
        """A request was answered."""
        # Set before what follows is handed back to the parser.
        self._resting = self.callLater(0, self._go_on)
        super().requestDone(request)  # type: ignore[no-untyped-call]
        if self._buffer:
            self.transport.pauseProducing()
        else:
            self._stop_resting()

    def _go_on(self) -> None:
        self._resting = None
        if not self._full:
            self.transport.resumeProducing()
            LineReceiver.dataReceived(self, b"")

    def _stop_resting(self) -> None:
        resting, self._resting = self._resting, None
        if resting is not None:
            resting.cancel()

    def pauseProducing(self) -> None:
        """The backend does not read its answers: read nothing from it, and go on with nothing that was read."""
        super().pauseProducing()  # type: ignore[no-untyped-call]
        self._full = True
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """It has read them."""
        self._full = False
        super().resumeProducing()  # type: ignore[no-untyped-call]
        if self._resting is None:
            self.transport.resumeProducing()
            LineReceiver.dataReceived(self, b"")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self._stop_resting()
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
