"""How many clients each node should have, and who moves how many where. No I/O, no state.

A node's share is its clients by its capacity; the mean is that of all together. Each node has a target, a whole number
of clients next to the mean, and all targets together are all clients:

    above its target  -> moves what is above, to those below theirs, to each in proportion to what it lacks
    below             <- never more than that

So every node that works this out from the same counts comes to the same moves, of which it makes its own, and together
they fill nobody beyond the mean. Only nodes that are ``up`` count.

Moving clients of this node to others, at an even pace: one plan, from its first client to its last.

    ask the node that they are moved to whether it has room      no, or no answer: nobody is moved there
    place some of them in the registry                           whoever arrives anywhere is sent there from then on
    <- gateway.goaway, and 1012 when its calls are over          one by one, so many a second

What the registry does not place, since it was moved a short time ago, another stands in for. Those without calls in
flight go first.

When clients of this node are moved to others, and how many.

    a node joins           -> two looks at all nodes, some heartbeats apart; if one has more than 1.2 x the mean then,
                              whoever is above its share moves what is above it (shares.py, moving.py)
    POST /v1/rebalance     -> the same, at once, and however little it is
    moved                  -> when the counts are known to show it, again, if more than a little is left

The counts of the others are as old as their last heartbeats, and others move clients at the same time. So a plan is
what two looks have in common: the first is from before anybody can have begun, since a join is seen by all within one
heartbeat, and the second shows what has changed by itself meanwhile. What is seen while it is carried out may only end
it early.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.clients.interface import IEdge
from gateway.cluster.drain import Farewells
from gateway.cluster.interface import IBalance, INode, IPeers, PeerUnreachable
from gateway.cluster.membership import Fleet
from gateway.cluster.routing import connect_url
from gateway.metrics import Metrics
from gateway.registry.interface import IRegistry, NodeStatus, RegistryUnavailable
from gateway.settings import Settings

#: node_id of the one that moves them -> node_id of the one that they are moved to -> how many
Moves = dict[str, dict[str, int]]


def counted(nodes: Iterable[NodeStatus]) -> list[NodeStatus]:
    """Those that count, the fullest first, in the same order wherever this is asked."""
    up = [node for node in nodes if node.state == "up" and node.capacity > 0]
    return sorted(up, key=lambda node: (-node.clients / node.capacity, node.node_id))


def uneven(nodes: Iterable[NodeStatus], most: float, least: float = 0.0) -> bool:
    """Whether the share of any node is more than ``most`` times the mean, or less than ``least`` times."""
    up = counted(nodes)
    clients, capacity = sum(node.clients for node in up), sum(node.capacity for node in up)
    shares = [(node.clients * capacity, clients * node.capacity) for node in up]
    return any(share > most * mean or share < least * mean for share, mean in shares)


def targets(nodes: Iterable[NodeStatus]) -> dict[str, int]:
    """How many clients each node should have."""
    up = counted(nodes)
    clients, capacity = sum(node.clients for node in up), sum(node.capacity for node in up)
    found = {node.node_id: clients * node.capacity // capacity for node in up}
    # What the rounding has left is for the fullest: they have it already.
    for node in up[: clients - sum(found.values())]:
        found[node.node_id] += 1
    return found


def moves(nodes: Sequence[NodeStatus]) -> Moves:
    """Who moves how many where; nobody to a node without a url, nor beyond a node's capacity."""
    up, wanted = counted(nodes), targets(nodes)
    lacks = {node.node_id: max(0, min(wanted[node.node_id], node.capacity) - node.clients) for node in up}
    found: Moves = {}
    for source in up:
        there = [node.node_id for node in reversed(up) if lacks[node.node_id] and node.public_url]
        weights = [lacks[node_id] for node_id in there]
        excess = min(source.clients - wanted[source.node_id], sum(weights))
        if excess <= 0:
            continue
        found[source.node_id] = {}
        for node_id, number in zip(there, split(excess, weights), strict=True):
            lacks[node_id] -= number
            if number:
                found[source.node_id][node_id] = number
    return found


def split(number: int, weights: Sequence[int]) -> list[int]:
    """Split a number, at most the sum of the weights, in proportion to them; none gets more than its weight."""
    total = sum(weights)
    parts = [number * weight // total for weight in weights]
    most = sorted(range(len(weights)), key=lambda index: -(number * weights[index] % total))
    for index in most[: number - sum(parts)]:
        parts[index] += 1
    return parts


def lesser(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """What two plans of one node have in common."""
    return {node_id: min(number, other[node_id]) for node_id, number in one.items() if node_id in other}


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


#: so many times the mean a node must have for clients to be moved, or less than so many times: when a node joins; when
#: that has been done; when somebody says so
JOINED, LEFT, NOW = (1.2, 0.0), (1.05, 0.95), (1.0, 1.0)
#: a node that has fewer is not worth a move, unless somebody says so: the first clients of a fleet are where they are
FEWEST = 10
#: after a plan that was carried out, so many more are made if more than a little is left
FOLLOW_UPS = 2
#: seconds after which clients that had been moved a short time before can be moved again
RESTED = 600.0
#: heartbeats between the two looks of a plan, and between the end of one and the first look of the next
BETWEEN, AFTERWARDS = 1.5, 2.0
#: how often placements that are over are looked for, in seconds
TIDY_EVERY = 60.0


@attrs.frozen
class _Look:
    """The nodes, this one among them, at some moment."""

    at: float
    nodes: list[NodeStatus]


@implementer(IBalance)
class Balance:
    """The balance of one node. :meth:`looked` is to be told of the other live nodes each time that they are read."""

    _log = Logger()

    def __init__(
        self,
        *,
        node: INode,
        edge: IEdge,
        registry: IRegistry,
        fleet: Fleet,
        peers: IPeers,
        farewells: Farewells,
        clock: IReactorTime,
        metrics: Metrics,
        settings: Settings,
        in_flight: Callable[[str, int], int],
    ) -> None:
        """``in_flight`` gives how many calls on a connection (client_id and generation) are not over."""
        self.rate = settings.rebalance_rate
        self._heartbeat = settings.heartbeat
        self._capacity = settings.capacity
        self._node = node
        self._edge = edge
        self._registry = registry
        self._fleet = fleet
        self._farewells = farewells
        self._clock = clock
        self._parts: dict[str, Any] = {
            "edge": edge,
            "registry": registry,
            "peers": peers,
            "farewells": farewells,
            "clock": clock,
            "metrics": metrics,
            "rate": self.rate,
            "in_flight": in_flight,
        }
        #: the other nodes that are up, by node_id; ``None`` before the first look
        self._up: set[str] | None = None
        #: by how much the shares must differ for the plan that is to be made, if one is; and its first look
        self._due: tuple[float, float] | None = None
        self._first: _Look | None = None
        self._follow_ups = 0
        #: when those can be moved that could not, since they had just been
        self._rested_at: float | None = None
        #: looks before that do not show yet what was moved
        self._blind_until = clock.seconds()
        self._moving: Moving | None = None
        self._others: list[NodeStatus] = []
        #: how many clients each node should have, as of now
        self._targets: dict[str, int] = {}
        self._tidy_at = clock.seconds() + TIDY_EVERY
        self._tidying = False

    def stop(self) -> None:
        """Move nobody any more."""
        self._due = None
        if self._moving is not None:
            self._moving.stop()
            self._moving = None

    # The looks.

    def looked(self, others: list[NodeStatus]) -> None:
        """The other live nodes were read anew."""
        self._others = others
        look = self._look(others)
        up = {node.node_id for node in others if node.state == "up"}
        if self._up is not None and up - self._up:
            if self._moving is not None:
                # With one node more, what it was made from is wrong.
                self._moving.stop()
                self._over(False)
            self._due, self._first, self._follow_ups = JOINED, None, FOLLOW_UPS
        self._up = up
        if self._rested_at is not None and look.at >= self._rested_at:
            self._rested_at = None
            if self._due is None and self._moving is None:
                self._due, self._first, self._follow_ups = LEFT, None, FOLLOW_UPS
        self._consider(look)
        self._tidy()

    def _look(self, others: list[NodeStatus]) -> _Look:
        node = self._node
        clients = max(0, self._edge.count() - len(self._farewells))
        own = NodeStatus(
            node.node_id, node.name, node.public_url, node.peer_url, clients, self._capacity, self._state(), 0.0
        )
        return _Look(self._clock.seconds(), [own, *others])

    def _state(self) -> str:
        return "draining" if self._node.unready() else "up"

    def _consider(self, look: _Look) -> None:
        """Make a plan, if one is due and this is its second look."""
        if self._due is None or self._moving is not None:
            return
        if not self.rate or self._node.unready() or not self._node.steady() or look.at < self._blind_until:
            self._first = None
            return
        if self._first is None:
            self._first = look
            return
        if look.at - self._first.at < BETWEEN * self._heartbeat:
            return
        few = self._due is not NOW and look.nodes[0].clients < FEWEST
        if few or not uneven(look.nodes, *self._due) or not (plan := self._plan(look)):
            self._due = self._first = None
            return
        plan = lesser(plan, self._plan(self._first))
        if plan:
            self._move(plan)
        else:
            # It has come about since; whether it stays so, the next look shows.
            self._first = look

    def _plan(self, look: _Look) -> dict[str, int]:
        return moves(look.nodes).get(self._node.node_id, {})

    # What is being moved.

    def now(self) -> Deferred[int]:
        """See :meth:`IBalance.now`."""
        return Deferred.fromCoroutine(self._now())

    async def _now(self) -> int:
        if not self.rate:
            return 0
        await self._fleet.look()
        if self._moving is not None:
            return self._moving.left
        if self._node.unready():
            return 0
        look = self._look(self._fleet.others())
        self._follow_ups = FOLLOW_UPS
        if look.at < self._blind_until:
            self._due, self._first = NOW, None
            return 0
        plan = self._plan(look)
        if plan:
            self._move(plan)
        return sum(plan.values())

    def _move(self, plan: dict[str, int]) -> None:
        self._due = self._first = None
        self._log.info(
            "moving {n} of {all} clients to {nodes}, {rate:g} a second",
            n=sum(plan.values()),
            all=self._edge.count(),
            nodes=", ".join(self._name_of(node_id) for node_id in plan),
            rate=self.rate,
        )
        self._moving = Moving(
            plan,
            # It is known only once the node listens.
            public_url=self._node.public_url,
            takes=self._takes,
            goes_on=self._goes_on,
            over=self._over,
            **self._parts,
        )
        self._moving.start()

    def _name_of(self, node_id: str) -> str:
        node = self._fleet.find(node_id)
        # The registry is not to be trusted with a log line.
        return node_id if node is None else ascii(node.name)[1:-1]

    def _takes(self, node_id: str) -> NodeStatus | None:
        """Another node, as long as clients are to be moved there."""
        node = self._fleet.find(node_id)
        if node is None or node.state != "up":
            return None
        return node if node.clients < min(node.capacity, self._targets.get(node_id, 0)) else None

    def _goes_on(self) -> bool:
        """Whether this node still has more than its share."""
        if self._node.unready():
            return False
        nodes = self._look(self._others).nodes
        self._targets = targets(nodes)
        return nodes[0].clients > self._targets[self._node.node_id]

    def _over(self, complete: bool) -> None:
        moving, self._moving = self._moving, None
        assert moving is not None
        self._log.info("moved {n} clients", n=moving.moved)
        if moving.resting and moving.moved < moving.planned:
            # Nobody else could be moved in their place.
            self._log.info("{n} were moved less than 10 minutes ago, and stay until then", n=moving.resting)
            self._rested_at = self._clock.seconds() + RESTED
            complete, self._follow_ups = True, 0
        # A client that was told last is counted by the heartbeat after its arrival.
        self._blind_until = self._clock.seconds() + AFTERWARDS * self._heartbeat
        if self._due is None and (self._follow_ups or not complete):
            self._due, self._first = LEFT, None
            self._follow_ups -= complete

    # Placements that are over.

    def _tidy(self) -> None:
        if self._tidying or self._clock.seconds() < self._tidy_at or not self._node.has_lease():
            return
        self._tidying = True
        Deferred.fromCoroutine(self._tidy_some()).addErrback(self._not_tidied)

    async def _tidy_some(self) -> None:
        try:
            # The next piece after the next heartbeat.
            if await self._registry.tidy():
                self._tidy_at = self._clock.seconds() + TIDY_EVERY
        finally:
            self._tidying = False

    def _not_tidied(self, failure: Failure) -> None:
        if not failure.check(RegistryUnavailable):
            self._log.failure("error in removing placements", failure)
