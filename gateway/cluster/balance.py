"""When clients of this node are moved to others, and how many.

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

from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.cluster import shares
from gateway.cluster.farewells import Farewells
from gateway.cluster.fleet import Fleet
from gateway.cluster.interface import IBalance, INode, IPeers
from gateway.cluster.moving import Moving
from gateway.edge.interface import IEdge
from gateway.registry.interface import IRegistry, NodeStatus, RegistryUnavailable
from gateway.settings import Settings
from gateway.telemetry.metrics import Metrics

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
        if few or not shares.uneven(look.nodes, *self._due) or not (plan := self._plan(look)):
            self._due = self._first = None
            return
        plan = shares.lesser(plan, self._plan(self._first))
        if plan:
            self._move(plan)
        else:
            # It has come about since; whether it stays so, the next look shows.
            self._first = look

    def _plan(self, look: _Look) -> dict[str, int]:
        return shares.moves(look.nodes).get(self._node.node_id, {})

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
        self._targets = shares.targets(nodes)
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
