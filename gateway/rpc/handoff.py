"""Handoffs: clients of this node that were sent ``gateway.goaway``, until they are connected to another node.

start           goaway was sent
disconnected    the connection here has closed: the client has HANDOFF_TIMEOUT seconds to connect again
connected       the client is connected to another node, or to this one again: calls that wait look up where

Without this, a client would count as not connected between its two connections.
"""

from __future__ import annotations

from collections import deque

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from gateway.registry.interface import SessionKey
from gateway.util.deferred import Observers

#: how long a client may take from one connection to the next, and a call waits for it at most, in seconds
HANDOFF_TIMEOUT = 2.0


class HandoffTracker:
    """Handoffs of the clients of one node."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        #: client_id -> generation of the connection that was sent goaway
        self._generations: dict[str, int] = {}
        #: deadlines of the clients whose connection has closed, in order of time
        self._deadlines: deque[tuple[float, SessionKey]] = deque()
        self._waiters: dict[str, Observers[None]] = {}
        self._timer: IDelayedCall | None = None

    def __len__(self) -> int:
        return len(self._generations)

    def start(self, key: SessionKey) -> None:
        """Record that the client was sent goaway."""
        self._generations[key.client_id] = key.generation

    def disconnected(self, key: SessionKey) -> None:
        """Start the timeout of a handoff, if the closed connection was sent goaway."""
        if self._generations.get(key.client_id) != key.generation:
            return
        self._deadlines.append((self._clock.seconds() + HANDOFF_TIMEOUT, key))
        if self._timer is None:
            self._timer = self._clock.callLater(HANDOFF_TIMEOUT, self._expire)

    def connected(self, key: SessionKey) -> None:
        """Finish a handoff, if this connection, here or on another node, is newer than the one that was sent goaway."""
        if key.generation > self._generations.get(key.client_id, key.generation):
            self._finish(key.client_id)

    def is_in_handoff(self, client_id: str) -> bool:
        """Return whether the client is in handoff: the row of its closed connection is kept until that is over."""
        return client_id in self._generations

    def wait(self, client_id: str, timeout: float = HANDOFF_TIMEOUT) -> Deferred[None] | None:
        """Return a Deferred if the client is in handoff, else ``None``.

        It fires with ``None`` when the handoff finishes, or after ``timeout`` seconds. Cancelling it only stops the
        wait.
        """
        if timeout <= 0 or client_id not in self._generations:
            return None
        waiter = self._waiters.setdefault(client_id, Observers()).observe()
        return waiter.addTimeout(timeout, self._clock, lambda failure, timeout: None)

    def _finish(self, client_id: str) -> None:
        del self._generations[client_id]
        waiters = self._waiters.pop(client_id, None)
        if waiters is not None:
            waiters.callback(None)

    def _expire(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, key = self._deadlines.popleft()
            if self._generations.get(key.client_id) == key.generation:
                self._finish(key.client_id)
        if self._deadlines:
            self._timer = self._clock.callLater(self._deadlines[0][0] - now, self._expire)
