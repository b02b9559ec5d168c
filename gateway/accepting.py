"""Accepting connections: few in each turn of the reactor, and what is done when the files run out.

Twisted accepts all that wait at once, a hundred and more. What is said on connections that are open would wait behind
all of them, and then behind their opening handshakes: in a storm of connections for half a second.

A connection that cannot be accepted stays in the listening socket's queue, which makes that socket readable for ever:
a reactor that only tries again does nothing else. Twisted keeps one file in reserve, by which it accepts those who wait
and closes them at once, with three lines in the log each time; they come back as fast as they can.

Here an endpoint that finds no file stops listening to its queue for a moment, and those in it wait. That is better for
clients: files are short while many arrive at once, and an opening handshake that leads to nothing is over in seconds,
so that those who wait get in; who is closed instead has to come again from the start, and brings the rush back. Where
it takes longer, the queue fills up, the kernel no longer answers new connections, and their own time-outs send them
elsewhere.

The clients' endpoints leave the last files to backends, health checks and the registry.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IListeningPort
from twisted.logger import Logger

from gateway.newcomers import Newcomers
from gateway.settings import open_file_limit
from gateway.telemetry.metrics import Metrics

#: how long an endpoint that found no file accepts nothing, in seconds
PAUSE = 0.25
#: so many are accepted in one turn while there are no calls; else one
BURST = 64
#: the log tells of it once in so many seconds
TELL_EVERY = 10.0

#: the word by which it is counted when the files that are left are not for this endpoint
RESERVE = "reserve"

_OF_PROCESS = "raise LimitNOFILE or `ulimit -n` (it is {limit}), or lower --capacity"
_OF_MEMORY = "the system is short of memory: lower --capacity, or start nodes elsewhere"
#: what accept() says when there is no file for one more connection -> what to do about it
_REMEDIES = {
    RESERVE: _OF_PROCESS,
    "EMFILE": _OF_PROCESS,
    "ENFILE": "raise the system's limit, fs.file-max, or lower --capacity",
    "ENOBUFS": _OF_MEMORY,
    "ENOMEM": _OF_MEMORY,
}
_SHORT_OF: dict[int | None, str] = {getattr(errno, name): name for name in _REMEDIES if name != RESERVE}


class Accepting:
    """How all endpoints of a node do without files."""

    _log = Logger()

    def __init__(self, clock: Any, metrics: Metrics, newcomers: Newcomers | None = None) -> None:
        """``newcomers`` take the ports of :meth:`guard` that leave files to others: those of clients."""
        self._newcomers = newcomers
        self.clock = clock
        self._metrics = metrics
        self._told_at = -math.inf
        self._untold = 0

    def guard(self, ports: Iterable[IListeningPort], leave: int = 0) -> None:
        """Let ports wait where they find no file, or only the last ``leave`` of those that the process may open.

        A port that has no socket of its own, of whatever kind of endpoint that is, stays as it is.
        """
        # What is known here of Twisted's ports: they call port.socket.accept() until that raises EAGAIN.
        for port in ports:
            if hasattr(port, "socket") and hasattr(port, "stopReading"):
                port.socket = _Listener(self, port, leave)
                if leave and self._newcomers is not None:
                    self._newcomers.take(port)

    def at_leisure(self) -> bool:
        """Whether nobody has to wait for what comes."""
        return self._newcomers is not None and self._newcomers.at_leisure()

    def short(self, reason: str) -> None:
        """Count one failure, and log the first of them in a while. ``reason`` is the name of an errno, or RESERVE."""
        self._metrics.accept_errors[reason] += 1
        now = self.clock.seconds()
        if now - self._told_at < TELL_EVERY:
            self._untold += 1
            return
        self._told_at, untold, self._untold = now, self._untold, 0
        self._log.warn(
            "no file for one more connection ({reason}; {untold} times more since this was last said), so new ones "
            "wait: {remedy}",
            reason=reason,
            untold=untold,
            remedy=_REMEDIES[reason].format(limit=open_file_limit()),
        )


class _Listener:
    """Stands where a port has its listening socket, and is it but for :meth:`accept` and :meth:`close`."""

    def __init__(self, accepting: Accepting, port: Any, leave: int) -> None:
        self._accepting = accepting
        self._port = port
        self._socket = port.socket
        # A new file has the lowest number that is free.
        self._highest = open_file_limit() - leave if leave else math.inf
        self._waiting: IDelayedCall | None = None
        self._accepted = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def accept(self) -> Any:
        """Accept one connection; raise EAGAIN, as if there were none, after a few, and when there is no file for it."""
        if self._accepted >= (BURST if self._accepting.at_leisure() else 1):
            # The port asks until it hears this; the others are still there in the next turn.
            self._accepted = 0
            raise _none()
        try:
            if self._next_file() < self._highest:
                accepted = self._socket.accept()
                self._accepted += 1
                return accepted
            reason = RESERVE
        except OSError as e:
            if e.errno not in _SHORT_OF:
                raise
            reason = _SHORT_OF[e.errno]
        self._wait()
        self._accepting.short(reason)
        raise _none()

    def _next_file(self) -> float:
        if self._highest == math.inf:
            return 0
        number = os.dup(self._socket.fileno())
        os.close(number)
        return number

    def _wait(self) -> None:
        self._port.stopReading()
        if self._waiting is None:
            self._waiting = self._accepting.clock.callLater(PAUSE, self._go_on)

    def _go_on(self) -> None:
        self._waiting = None
        # A port that was told to stop closes in a later turn of the reactor.
        if not self._port.disconnecting:
            self._port.startReading()

    def close(self) -> None:
        """Close the socket."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        self._socket.close()


def _none() -> BlockingIOError:
    """What says that no connection waits."""
    return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
