"""Moving clients of this node to others, at an even pace: one plan, from its first client to its last.

    ask the node that they are moved to whether it has room      no, or no answer: nobody is moved there
    place some of them in the registry                           whoever arrives anywhere is sent there from then on
    <- gateway.goaway, and 1012 when its calls are over          one by one, so many a second

What the registry does not place, since it was moved a short time ago, another stands in for. Those without calls in
flight go first.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.cluster.farewells import Farewells
from gateway.cluster.interface import IPeers, PeerUnreachable
from gateway.cluster.placement import connect_url
from gateway.edge.interface import IEdge
from gateway.registry.interface import IRegistry, NodeStatus, RegistryUnavailable
from gateway.telemetry.metrics import Metrics

#: how often it is looked who is due, in seconds
TICK = 0.05
#: clients are placed for so many seconds ahead; when fewer were than should be, the next are no sooner than after this
AHEAD, PAUSE = 1.0, 0.25
#: nobody is told while the registry has not answered for so many seconds
STUCK = 0.25
#: the most clients that are placed by one statement
MOST = 500
#: how long a node may take to answer that it has room, in seconds
PATIENCE = 1.0
#: a plan is given up after so many seconds, since what it was made from is old
LONGEST = 600.0


class Pool:
    """The clients of this node that could be moved, in no order; those with calls in flight last."""

    def __init__(self, edge: IEdge, farewells: Farewells, in_flight: Callable[[str, int], int]) -> None:
        self._edge = edge
        self._farewells = farewells
        self._in_flight = in_flight
        self._idle = edge.client_ids()
        self._busy: list[str] = []

    def take(self, count: int) -> list[str]:
        """Some that are here; fewer when there are no more."""
        taken: list[str] = []
        while len(taken) < count and self._idle:
            client_id = _any(self._idle)
            generation = self._edge.generation(client_id)
            if not generation or self._farewells.told(client_id):
                continue
            if self._in_flight(client_id, generation):
                self._busy.append(client_id)
            else:
                taken.append(client_id)
        while len(taken) < count and self._busy:
            client_id = self._busy.pop()
            if self._edge.generation(client_id) and not self._farewells.told(client_id):
                taken.append(client_id)
        return taken


def _any(items: list[str]) -> str:
    """Take one out, whichever."""
    index = random.randrange(len(items))
    items[index], items[-1] = items[-1], items[index]
    return items.pop()


class Moving:
    """One plan of one node."""

    _log = Logger()

    def __init__(
        self,
        plan: dict[str, int],
        *,
        edge: IEdge,
        registry: IRegistry,
        peers: IPeers,
        farewells: Farewells,
        clock: IReactorTime,
        metrics: Metrics,
        rate: float,
        in_flight: Callable[[str, int], int],
        public_url: str,
        takes: Callable[[str], NodeStatus | None],
        goes_on: Callable[[], bool],
        over: Callable[[bool], None],
    ) -> None:
        """``plan``: node_id -> how many clients are to be moved there; ``rate``: how many a second. ``public_url`` is
        this node's: whoever is moved to a node that has it as well is told no url, and comes by whatever is in front of
        them, which decides. ``takes`` gives the node of a node_id as long as clients are to be moved there, and
        ``goes_on`` tells whether any are to be moved at all. ``over`` is told of the end, once, and whether all was
        done that could be."""
        self._left = dict(plan)
        self.planned = sum(plan.values())
        self._registry = registry
        self._peers = peers
        self._farewells = farewells
        self._clock = clock
        self._metrics = metrics
        self._rate = rate
        self._public_url = public_url
        self._takes = takes
        self._goes_on = goes_on
        self._over = over
        self._pool = Pool(edge, farewells, in_flight)
        #: those that are placed, and where
        self._placed: deque[tuple[str, str]] = deque()
        #: since when the registry is asked to place some, if it is
        self._placing: float | None = None
        self._place_at = 0.0
        #: how many could not be moved, since they were moved a short time ago
        self.resting = 0
        self._began = self._turned = clock.seconds()
        self._due = 1.0
        self._complete = True
        self._ended = False
        self.moved = 0
        self._loop = LoopingCall(self._turn)
        self._loop.clock = clock

    @property
    def left(self) -> int:
        """How many are to go yet."""
        return sum(self._left.values()) + len(self._placed)

    def start(self) -> None:
        """Begin."""
        self._loop.start(TICK).addErrback(lambda failure: self._log.failure("error in moving clients", failure))

    def stop(self) -> None:
        """Move nobody any more, and tell nobody of that."""
        self._ended = True
        if self._loop.running:
            self._loop.stop()

    def _turn(self) -> None:
        now = self._clock.seconds()
        if not self._goes_on():
            self._end()
            return
        if now - self._began >= LONGEST:
            self._complete = False
            self._end()
            return
        # What could not be made use of is not made up for by many at once.
        most = 1.0 + 2 * TICK * self._rate
        self._due = min(most, self._due + (now - self._turned) * self._rate)
        self._turned = now
        # A registry that does not answer does not take the claims of those who are told, either.
        stuck = self._placing is not None and now - self._placing > STUCK
        while self._due >= 1.0 and self._placed and not stuck:
            self._tell(*self._placed.popleft())
        if self._placing is not None:
            return
        if self._wanted():
            if now >= self._place_at:
                self._placing = now
                Deferred.fromCoroutine(self._place_some()).addErrback(self._failed)
        elif not self._placed:
            self._end()

    def _wanted(self) -> bool:
        return any(self._left.values()) and len(self._placed) < self._rate * AHEAD / 2 + 1

    def _tell(self, client_id: str, node_id: str) -> None:
        node = self._takes(node_id)
        if node is None:
            self._drop(node_id)
        elif self._farewells.say(client_id, "rebalance", self._url(node, client_id)):
            self._due -= 1.0
            self.moved += 1
            self._metrics.rebalanced += 1
        else:
            # It left by itself; another goes in its place.
            self._left[node_id] += 1

    def _url(self, node: NodeStatus, client_id: str) -> str | None:
        return None if node.public_url == self._public_url else connect_url(node.public_url, client_id)

    def _drop(self, node_id: str) -> None:
        self._left[node_id] = 0
        self._complete = False

    async def _place_some(self) -> None:
        try:
            node_id = max(self._left, key=lambda node_id: self._left[node_id])
            node = self._takes(node_id)
            if node is None or not await self._has_room(node):
                self._drop(node_id)
                return
            wanted = min(self._left[node_id], math.ceil(self._rate * AHEAD), MOST)
            clients = [] if self._ended else self._pool.take(wanted)
            if not clients:
                # There are no more.
                self._left = dict.fromkeys(self._left, 0)
                return
            binding = node.public_url != self._public_url
            placed = set(await self._registry.place(clients, node_id, binding=binding))
            self.resting += len(clients) - len(placed)
            self._placed += [(client_id, node_id) for client_id in clients if client_id in placed]
            self._left[node_id] = max(0, self._left[node_id] - len(placed))
            if len(placed) < wanted:
                self._place_at = self._clock.seconds() + PAUSE
        except RegistryUnavailable:
            self._left = dict.fromkeys(self._left, 0)
            self._complete = False
        finally:
            self._placing = None

    async def _has_room(self, node: NodeStatus) -> bool:
        try:
            return await self._peers.has_room(node, PATIENCE)
        except PeerUnreachable:
            return False

    def _failed(self, failure: Failure) -> None:
        self._log.failure("error in moving clients", failure)
        self._complete = False
        self._end()

    def _end(self) -> None:
        if not self._ended:
            self.stop()
            self._over(self._complete)
