"""Sending every client away, spread over a time, so that the node can end and nobody is met by a stampede.

Client i of n is told to go when i/n of the time is over, and is closed when its calls are (farewells.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from gateway.cluster.farewells import LONGEST_WAIT, LONGEST_WAIT_AT_ONCE, Farewells
from gateway.edge.interface import IEdge

#: how often the drain looks what is due, in seconds
TICK = 0.05


class Drain:
    """One drain of one node."""

    _log = Logger()

    def __init__(
        self,
        edge: IEdge,
        clock: IReactorTime,
        seconds: float,
        *,
        farewells: Farewells,
        departing: Callable[[], int] = lambda: 0,
        alone: Callable[[], bool] = lambda: False,
        url_for: Callable[[str], str | None],
        relayed: Callable[[], list[str]] = list,
        end_relay: Callable[[str], object] = lambda client_id: None,
    ) -> None:
        """``departing`` tells how many clients are on their way to other nodes: calls to them wait here, and must be
        told when they have arrived. ``alone`` tells whether there is no other node. ``url_for`` gives the complete url
        that a client is to connect to, or ``None``. ``relayed`` lists the clients of other nodes whose bytes go through
        this one, and ``end_relay`` has one closed."""
        self._edge = edge
        self._clock = clock
        self._seconds = seconds
        self._farewells = farewells
        self._departing = departing
        self._alone = alone
        self._url_for = url_for
        self._relayed = relayed
        self._end_relay = end_relay
        #: who is to be told yet, and how
        self._waiting: list[tuple[Callable[[str], object], str]] = []
        self._started = 0.0
        self._total = 0
        self._loop = LoopingCall(self._turn)

    def start(self) -> Deferred[None]:
        """Begin; the Deferred fires when no client is left."""
        self._list()
        random.shuffle(self._waiting)
        self._started = self._clock.seconds()
        self._log.info("draining {n} clients over {seconds:g} s", n=self._total, seconds=self._seconds)
        self._loop.clock = self._clock
        return self._loop.start(TICK).addCallback(lambda _: None)

    def _list(self) -> None:
        told = self._farewells.told
        self._waiting = [(self._tell, client_id) for client_id in self._edge.client_ids() if not told(client_id)]
        self._waiting += [(self._end_relay, client_id) for client_id in self._relayed()]
        self._total = len(self._waiting)

    def _turn(self) -> None:
        elapsed = self._clock.seconds() - self._started
        # The first at once, so that a node with few clients ends early.
        share = elapsed / self._seconds if self._seconds else 1.0
        due = min(self._total, int(share * self._total) + 1)
        while self._waiting and self._total - len(self._waiting) < due:
            tell, client_id = self._waiting.pop()
            tell(client_id)
        if not self._waiting:
            # Whoever was still opening its connection when the drain began.
            self._list()
            if not self._waiting and not self._farewells and not self._departing():
                self._loop.stop()

    def _tell(self, client_id: str) -> None:
        longest = LONGEST_WAIT if self._seconds else LONGEST_WAIT_AT_ONCE
        least = 0.0
        if self._alone():
            # Whoever comes back to this very node does so in vain before it has ended.
            least = max(0.0, self._started + self._seconds - self._clock.seconds())
        self._farewells.say(client_id, "drain", self._url_for(client_id), least_wait=least, longest_wait=longest)
