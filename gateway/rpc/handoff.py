"""Clients of this node that were told to go to another one: whoever calls them waits until they are there.

begin       the client was told to go
gone        its connection here has ended: it is given HOLD seconds more
arrived     it is open elsewhere, or here again: whoever waits looks where

Without that a client which moves would count as not connected between its two connections.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

#: how long a client may take from one connection to the next, in seconds; and how long a call waits for it at most
HANDOFF_TIMEOUT = 2.0


class HandoffTracker:
    """The clients of one node that are on their way to another."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        #: client_id -> the generation of the connection that it was told to leave
        self._generations: dict[str, int] = {}
        #: when each is given up whose connection has ended, the first first
        self._deadlines: deque[tuple[float, str, int]] = deque()
        self._waiters: dict[str, list[Deferred[None]]] = {}
        self._timer: IDelayedCall | None = None

    def __len__(self) -> int:
        return len(self._generations)

    def start(self, client_id: str, generation: int) -> None:
        """A client was told to go."""
        self._generations[client_id] = generation

    def disconnected(self, client_id: str, generation: int) -> None:
        """A connection has ended; it may be one that was to."""
        if self._generations.get(client_id) != generation:
            return
        self._deadlines.append((self._clock.seconds() + HANDOFF_TIMEOUT, client_id, generation))
        if self._timer is None:
            self._timer = self._clock.callLater(HANDOFF_TIMEOUT, self._expire)

    def connected(self, client_id: str, generation: int) -> None:
        """A connection of that generation is open, here or elsewhere."""
        if generation > self._generations.get(client_id, generation):
            self._finish(client_id)

    def wait(self, client_id: str) -> Deferred[None] | None:
        """``None`` unless the client is on its way; else a new Deferred that fires when more is known, after ``HOLD``
        at the latest. Cancelling it only stops the wait."""
        if client_id not in self._generations:
            return None
        waiters = self._waiters.setdefault(client_id, [])
        waiter: Deferred[None] = Deferred(waiters.remove)
        waiters.append(waiter)
        late = self._clock.callLater(HANDOFF_TIMEOUT, self._wait_timed_out, client_id, waiter)
        return waiter.addBoth(_cancel_timer, late)

    def _wait_timed_out(self, client_id: str, waiter: Deferred[None]) -> None:
        self._waiters[client_id].remove(waiter)
        waiter.callback(None)

    def _finish(self, client_id: str) -> None:
        del self._generations[client_id]
        for waiter in self._waiters.pop(client_id, ()):
            waiter.callback(None)

    def _expire(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, client_id, generation = self._deadlines.popleft()
            if self._generations.get(client_id) == generation:
                self._finish(client_id)
        if self._deadlines:
            self._timer = self._clock.callLater(self._deadlines[0][0] - now, self._expire)


def _cancel_timer(result: Any, timer: IDelayedCall) -> Any:
    if timer.active():
        timer.cancel()
    return result
