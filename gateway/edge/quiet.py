"""When an awake connection is parked: as soon as it is quiet, or some time after.

One that was just opened, or is just whole again after what woke it, is looked at in the next turn of the reactor. One
that could not be parked then, or that was busy when it was woken, is looked at every half second.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from gateway.edge.client import Client
from gateway.edge.limits import Troubles

#: how often connections are looked at that were not quiet, in seconds
LOOK_AGAIN = 0.5
#: how many of them in one turn of the reactor
SLICE = 500
#: A connection that is woken so soon after it was heard of is parked only after as long a silence: to wake one and park
#: it again takes ten times as long as Autobahn takes for a message.
BUSY = 1.0


class QuietWatch:
    """Waits for awake connections to become quiet."""

    def __init__(self, clock: IReactorTime, park: Callable[[Client], bool]) -> None:
        """``park`` parks a connection that is quiet; ``False`` if it is not."""
        self._clock = clock
        self._park = park
        self._troubles = Troubles(clock.seconds)
        self._soon: dict[Client, None] = {}
        self._later: dict[Client, None] = {}
        #: those of them that are still to be looked at this time
        self._round: list[Client] = []
        self._soon_timer: IDelayedCall | None = None
        self._later_timer: IDelayedCall | None = None

    def watch(self, client: Client) -> None:
        """Look at it in the next turn, and then until it could be parked."""
        self._later.pop(client, None)
        self._soon[client] = None
        if self._soon_timer is None:
            self._soon_timer = self._clock.callLater(0, self._look_soon)

    def rested(self, client: Client) -> None:
        """It may just have become quiet."""
        if not client.linger and client in self._later:
            self.watch(client)

    def discard(self, client: Client) -> None:
        """It is gone."""
        self._soon.pop(client, None)
        self._later.pop(client, None)

    def stop(self) -> None:
        """Stop the timers."""
        for timer in (self._soon_timer, self._later_timer):
            if timer is not None:
                timer.cancel()
        self._soon_timer = self._later_timer = None

    def _look_soon(self) -> None:
        self._soon_timer = None
        clients, self._soon = self._soon, {}
        for client in clients:
            if not self._parked(client):
                self._later[client] = None
        if self._later and self._later_timer is None:
            self._later_timer = self._clock.callLater(LOOK_AGAIN, self._look_later)

    def _look_later(self) -> None:
        if not self._round:
            self._round = list(self._later)
        some, self._round = self._round[-SLICE:], self._round[:-SLICE]
        for client in some:
            if client in self._later and self._parked(client):
                self._later.pop(client, None)
        again = 0 if self._round else LOOK_AGAIN
        self._later_timer = self._clock.callLater(again, self._look_later) if self._later else None

    def _parked(self, client: Client) -> bool:
        try:
            return self._park(client)
        except Exception:  # noqa: BLE001 (the others must not suffer)
            self._troubles.report("an error in parking a connection")
            return False
