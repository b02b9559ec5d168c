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

from gateway.clients.interface import IClientSessions
from gateway.cluster.drain import GracefulDisconnect
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import CallTracker, INode, IPeerClient, IRebalancer
from gateway.cluster.membership import NodeDirectory
from gateway.cluster.routing import connect_url
from gateway.metrics import Metrics
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, NodeStatus
from gateway.rpc.interface import IMembership
from gateway.settings import Settings

#: node_id of the one that moves them -> node_id of the one that they are moved to -> how many
MigrationPlans = dict[str, dict[str, int]]


def eligible_nodes(nodes: Iterable[NodeStatus]) -> list[NodeStatus]:
    """Those that count, the fullest first, in the same order wherever this is asked."""
    up = [node for node in nodes if node.state == "up" and node.capacity > 0]
    return sorted(up, key=lambda node: (-node.clients / node.capacity, node.node_id))


def is_unbalanced(nodes: Iterable[NodeStatus], max_ratio: float, min_ratio: float = 0.0) -> bool:
    """Whether the share of any node is more than ``most`` times the mean, or less than ``least`` times."""
    up = eligible_nodes(nodes)
    clients, capacity = sum(node.clients for node in up), sum(node.capacity for node in up)
    shares = [(node.clients * capacity, clients * node.capacity) for node in up]
    return any(share > max_ratio * mean or share < min_ratio * mean for share, mean in shares)


def target_counts(nodes: Iterable[NodeStatus]) -> dict[str, int]:
    """How many clients each node should have."""
    up = eligible_nodes(nodes)
    clients, capacity = sum(node.clients for node in up), sum(node.capacity for node in up)
    found = {node.node_id: clients * node.capacity // capacity for node in up}
    # What the rounding has left is for the fullest: they have it already.
    for node in up[: clients - sum(found.values())]:
        found[node.node_id] += 1
    return found


def plan_migrations(nodes: Sequence[NodeStatus]) -> MigrationPlans:
    """Who moves how many where; nobody to a node without a url, nor beyond a node's capacity."""
    up, wanted = eligible_nodes(nodes), target_counts(nodes)
    lacks = {node.node_id: max(0, min(wanted[node.node_id], node.capacity) - node.clients) for node in up}
    found: MigrationPlans = {}
    for source in up:
        there = [node.node_id for node in reversed(up) if lacks[node.node_id] and node.public_url]
        weights = [lacks[node_id] for node_id in there]
        excess = min(source.clients - wanted[source.node_id], sum(weights))
        if excess <= 0:
            continue
        found[source.node_id] = {}
        for node_id, number in zip(there, split_proportionally(excess, weights), strict=True):
            lacks[node_id] -= number
            if number:
                found[source.node_id][node_id] = number
    return found


def split_proportionally(count: int, weights: Sequence[int]) -> list[int]:
    """Split a number, at most the sum of the weights, in proportion to them; none gets more than its weight."""
    total = sum(weights)
    parts = [count * weight // total for weight in weights]
    most = sorted(range(len(weights)), key=lambda index: -(count * weights[index] % total))
    for index in most[: count - sum(parts)]:
        parts[index] += 1
    return parts


def intersect_plans(plan: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """What two plans of one node have in common."""
    return {node_id: min(number, other[node_id]) for node_id, number in plan.items() if node_id in other}


#: how often it is looked who is due, in seconds
MIGRATION_INTERVAL = 0.05
#: clients are placed for so many seconds ahead; when fewer were than should be, the next are no sooner than after this
ASSIGN_AHEAD, ASSIGN_RETRY_DELAY = 1.0, 0.25
#: nobody is told while the registry has not answered for so many seconds
REGISTRY_STALL_TIMEOUT = 0.25
#: the most clients that are placed by one statement
MAX_ASSIGN_BATCH = 500
#: how long a node may take to answer that it has room, in seconds
HAS_ROOM_TIMEOUT = 1.0
#: a plan is given up after so many seconds, since what it was made from is old
MIGRATION_TIMEOUT = 600.0


class Candidates:
    """The clients of this node that could be moved, in no order; those with calls in flight last."""

    def __init__(
        self, sessions: IClientSessions, graceful_disconnect: GracefulDisconnect, in_flight: Callable[[str, int], int]
    ) -> None:
        self._sessions = sessions
        self._graceful_disconnect = graceful_disconnect
        self._in_flight = in_flight
        self._idle = sessions.client_ids()
        self._busy: list[str] = []

    def pop(self, count: int) -> list[str]:
        """Some that are here; fewer when there are no more."""
        taken: list[str] = []
        while len(taken) < count and self._idle:
            client_id = _pop_random(self._idle)
            generation = self._sessions.generation(client_id)
            if not generation or self._graceful_disconnect.goaway_sent(client_id):
                continue
            if self._in_flight(client_id, generation):
                self._busy.append(client_id)
            else:
                taken.append(client_id)
        while len(taken) < count and self._busy:
            client_id = self._busy.pop()
            if self._sessions.generation(client_id) and not self._graceful_disconnect.goaway_sent(client_id):
                taken.append(client_id)
        return taken


def _pop_random(items: list[str]) -> str:
    """Take one out, whichever."""
    index = random.randrange(len(items))
    items[index], items[-1] = items[-1], items[index]
    return items.pop()


class Migration:
    """One plan of one node."""

    _log = Logger()

    def __init__(
        self,
        plan: dict[str, int],
        *,
        sessions: IClientSessions,
        registry: IRegistry,
        peer_client: IPeerClient,
        graceful_disconnect: GracefulDisconnect,
        clock: IReactorTime,
        metrics: Metrics,
        rate: float,
        in_flight: Callable[[str, int], int],
        public_url: str,
        target_node: Callable[[str], NodeStatus | None],
        has_excess: Callable[[], bool],
        on_finished: Callable[[bool], None],
    ) -> None:
        """``plan``: node_id -> how many clients are to be moved there; ``rate``: how many a second. ``public_url`` is
        this node's: whoever is moved to a node that has it as well is told no url, and comes by whatever is in front of
        them, which decides. ``takes`` gives the node of a node_id as long as clients are to be moved there, and
        ``goes_on`` tells whether any are to be moved at all. ``over`` is told of the end, once, and whether all was
        done that could be."""
        self._remaining = dict(plan)
        self.planned = sum(plan.values())
        self._registry = registry
        self._peer_client = peer_client
        self._graceful_disconnect = graceful_disconnect
        self._clock = clock
        self._metrics = metrics
        self._rate = rate
        self._public_url = public_url
        self._target_node = target_node
        self._has_excess = has_excess
        self._on_finished = on_finished
        self._candidates = Candidates(sessions, graceful_disconnect, in_flight)
        #: those that are placed, and where
        self._assigned: deque[tuple[str, str]] = deque()
        #: since when the registry is asked to place some, if it is
        self._assigning_since: float | None = None
        self._next_assign_at = 0.0
        #: how many could not be moved, since they were moved a short time ago
        self.cooling_down = 0
        self._started_at = self._last_tick = clock.seconds()
        self._tokens = 1.0
        self._complete = True
        self._stopped = False
        self.migrated = 0
        self._loop = LoopingCall(self._tick)
        self._loop.clock = clock

    @property
    def remaining(self) -> int:
        """How many are to go yet."""
        return sum(self._remaining.values()) + len(self._assigned)

    def start(self) -> None:
        """Begin."""
        self._loop.start(MIGRATION_INTERVAL).addErrback(
            lambda failure: self._log.failure("error in moving clients", failure)
        )

    def stop(self) -> None:
        """Move nobody any more, and tell nobody of that."""
        self._stopped = True
        if self._loop.running:
            self._loop.stop()

    def _tick(self) -> None:
        now = self._clock.seconds()
        if not self._has_excess():
            self._finish()
            return
        if now - self._started_at >= MIGRATION_TIMEOUT:
            self._complete = False
            self._finish()
            return
        # What could not be made use of is not made up for by many at once.
        most = 1.0 + 2 * MIGRATION_INTERVAL * self._rate
        self._tokens = min(most, self._tokens + (now - self._last_tick) * self._rate)
        self._last_tick = now
        # A registry that does not answer does not take the claims of those who are told, either.
        stuck = self._assigning_since is not None and now - self._assigning_since > REGISTRY_STALL_TIMEOUT
        while self._tokens >= 1.0 and self._assigned and not stuck:
            self._send_goaway(*self._assigned.popleft())
        if self._assigning_since is not None:
            return
        if self._needs_assignments():
            if now >= self._next_assign_at:
                self._assigning_since = now
                Deferred.fromCoroutine(self._assign_batch()).addErrback(self._failed)
        elif not self._assigned:
            self._finish()

    def _needs_assignments(self) -> bool:
        return any(self._remaining.values()) and len(self._assigned) < self._rate * ASSIGN_AHEAD / 2 + 1

    def _send_goaway(self, client_id: str, node_id: str) -> None:
        node = self._target_node(node_id)
        if node is None:
            self._drop_target(node_id)
        elif self._graceful_disconnect.send_goaway(client_id, "rebalance", self._connect_url(node, client_id)):
            self._tokens -= 1.0
            self.migrated += 1
            self._metrics.rebalanced += 1
        else:
            # It left by itself; another goes in its place.
            self._remaining[node_id] += 1

    def _connect_url(self, node: NodeStatus, client_id: str) -> str | None:
        return None if node.public_url == self._public_url else connect_url(node.public_url, client_id)

    def _drop_target(self, node_id: str) -> None:
        self._remaining[node_id] = 0
        self._complete = False

    async def _assign_batch(self) -> None:
        try:
            node_id = max(self._remaining, key=lambda node_id: self._remaining[node_id])
            node = self._target_node(node_id)
            if node is None or not await self._has_room(node):
                self._drop_target(node_id)
                return
            wanted = min(self._remaining[node_id], math.ceil(self._rate * ASSIGN_AHEAD), MAX_ASSIGN_BATCH)
            clients = [] if self._stopped else self._candidates.pop(wanted)
            if not clients:
                # There are no more.
                self._remaining = dict.fromkeys(self._remaining, 0)
                return
            binding = node.public_url != self._public_url
            placed = set(await self._registry.assign(clients, node_id, binding=binding))
            self.cooling_down += len(clients) - len(placed)
            self._assigned += [(client_id, node_id) for client_id in clients if client_id in placed]
            self._remaining[node_id] = max(0, self._remaining[node_id] - len(placed))
            if len(placed) < wanted:
                self._next_assign_at = self._clock.seconds() + ASSIGN_RETRY_DELAY
        except RegistryUnavailableError:
            self._remaining = dict.fromkeys(self._remaining, 0)
            self._complete = False
        finally:
            self._assigning_since = None

    async def _has_room(self, node: NodeStatus) -> bool:
        try:
            return await self._peer_client.has_room(node, HAS_ROOM_TIMEOUT)
        except PeerUnreachableError:
            return False

    def _failed(self, failure: Failure) -> None:
        self._log.failure("error in moving clients", failure)
        self._complete = False
        self._finish()

    def _finish(self) -> None:
        if not self._stopped:
            self.stop()
            self._on_finished(self._complete)


#: so many times the mean a node must have for clients to be moved, or less than so many times: when a node joins; when
#: that has been done; when somebody says so
JOIN_THRESHOLDS, FOLLOW_UP_THRESHOLDS, MANUAL_THRESHOLDS = (1.2, 0.0), (1.05, 0.95), (1.0, 1.0)
#: a node that has fewer is not worth a move, unless somebody says so: the first clients of a fleet are where they are
MIN_CLIENTS = 10
#: after a plan that was carried out, so many more are made if more than a little is left
MAX_FOLLOW_UPS = 2
#: seconds after which clients that had been moved a short time before can be moved again
CLIENT_COOLDOWN = 600.0
#: heartbeats between the two looks of a plan, and between the end of one and the first look of the next
OBSERVATION_HEARTBEATS, STABILIZATION_HEARTBEATS = 1.5, 2.0
#: how often placements that are over are looked for, in seconds
PURGE_INTERVAL = 60.0


@attrs.frozen
class _Snapshot:
    """The nodes, this one among them, at some moment."""

    at: float
    nodes: list[NodeStatus]


@implementer(IRebalancer)
class Rebalancer:
    """The balance of one node. :meth:`looked` is to be told of the other live nodes each time that they are read."""

    _log = Logger()

    def __init__(
        self,
        *,
        node: INode,
        membership: IMembership,
        sessions: IClientSessions,
        registry: IRegistry,
        node_directory: NodeDirectory,
        peer_client: IPeerClient,
        graceful_disconnect: GracefulDisconnect,
        clock: IReactorTime,
        metrics: Metrics,
        settings: Settings,
        calls: CallTracker,
    ) -> None:
        self.rate = settings.rebalance_rate
        self._heartbeat = settings.heartbeat
        self._capacity = settings.capacity
        self._node = node
        self._membership = membership
        self._sessions = sessions
        self._registry = registry
        self._node_directory = node_directory
        self._graceful_disconnect = graceful_disconnect
        self._clock = clock
        self._migration_options: dict[str, Any] = {
            "sessions": sessions,
            "registry": registry,
            "peer_client": peer_client,
            "graceful_disconnect": graceful_disconnect,
            "clock": clock,
            "metrics": metrics,
            "rate": self.rate,
            "in_flight": calls.calls_in_flight_on,
        }
        #: the other nodes that are up, by node_id; ``None`` before the first look
        self._up_node_ids: set[str] | None = None
        #: by how much the shares must differ for the plan that is to be made, if one is; and its first look
        self._thresholds: tuple[float, float] | None = None
        self._first_snapshot: _Snapshot | None = None
        self._follow_ups_left = 0
        #: when those can be moved that could not, since they had just been
        self._cooldown_ends_at: float | None = None
        #: looks before that do not show yet what was moved
        self._stabilizes_at = clock.seconds()
        self._migration: Migration | None = None
        self._peer_nodes: list[NodeStatus] = []
        #: how many clients each node should have, as of now
        self._targets: dict[str, int] = {}
        self._purge_at = clock.seconds() + PURGE_INTERVAL
        self._purging = False

    def stop(self) -> None:
        """Move nobody any more."""
        self._thresholds = None
        if self._migration is not None:
            self._migration.stop()
            self._migration = None

    # The looks.

    def nodes_changed(self, nodes: list[NodeStatus]) -> None:
        """The other live nodes were read anew."""
        self._peer_nodes = nodes
        look = self._snapshot(nodes)
        up = {node.node_id for node in nodes if node.state == "up"}
        if self._up_node_ids is not None and up - self._up_node_ids:
            if self._migration is not None:
                # With one node more, what it was made from is wrong.
                self._migration.stop()
                self._migration_finished(False)
            self._thresholds, self._first_snapshot, self._follow_ups_left = JOIN_THRESHOLDS, None, MAX_FOLLOW_UPS
        self._up_node_ids = up
        if self._cooldown_ends_at is not None and look.at >= self._cooldown_ends_at:
            self._cooldown_ends_at = None
            if self._thresholds is None and self._migration is None:
                self._thresholds, self._first_snapshot, self._follow_ups_left = (
                    FOLLOW_UP_THRESHOLDS,
                    None,
                    MAX_FOLLOW_UPS,
                )
        self._plan_if_due(look)
        self._purge_if_due()

    def _snapshot(self, peer_nodes: list[NodeStatus]) -> _Snapshot:
        node = self._node
        clients = max(0, self._sessions.count() - len(self._graceful_disconnect))
        own = NodeStatus(
            node.node_id, node.name, node.public_url, node.peer_url, clients, self._capacity, self._state(), 0.0
        )
        return _Snapshot(self._clock.seconds(), [own, *peer_nodes])

    def _state(self) -> str:
        return "draining" if self._node.unready_reason() else "up"

    def _plan_if_due(self, snapshot: _Snapshot) -> None:
        """Make a plan, if one is due and this is its second look."""
        if self._thresholds is None or self._migration is not None:
            return
        if (
            not self.rate
            or self._node.unready_reason()
            or not self._membership.is_stable()
            or snapshot.at < self._stabilizes_at
        ):
            self._first_snapshot = None
            return
        if self._first_snapshot is None:
            self._first_snapshot = snapshot
            return
        if snapshot.at - self._first_snapshot.at < OBSERVATION_HEARTBEATS * self._heartbeat:
            return
        few = self._thresholds is not MANUAL_THRESHOLDS and snapshot.nodes[0].clients < MIN_CLIENTS
        if few or not is_unbalanced(snapshot.nodes, *self._thresholds) or not (plan := self._plan(snapshot)):
            self._thresholds = self._first_snapshot = None
            return
        plan = intersect_plans(plan, self._plan(self._first_snapshot))
        if plan:
            self._start_migration(plan)
        else:
            # It has come about since; whether it stays so, the next look shows.
            self._first_snapshot = snapshot

    def _plan(self, snapshot: _Snapshot) -> dict[str, int]:
        return plan_migrations(snapshot.nodes).get(self._node.node_id, {})

    # What is being moved.

    def rebalance_now(self) -> Deferred[int]:
        """See :meth:`IBalance.now`."""
        return Deferred.fromCoroutine(self._rebalance_now())

    async def _rebalance_now(self) -> int:
        if not self.rate:
            return 0
        await self._node_directory.refresh()
        if self._migration is not None:
            return self._migration.remaining
        if self._node.unready_reason():
            return 0
        look = self._snapshot(self._node_directory.peer_nodes())
        self._follow_ups_left = MAX_FOLLOW_UPS
        if look.at < self._stabilizes_at:
            self._thresholds, self._first_snapshot = MANUAL_THRESHOLDS, None
            return 0
        plan = self._plan(look)
        if plan:
            self._start_migration(plan)
        return sum(plan.values())

    def _start_migration(self, plan: dict[str, int]) -> None:
        self._thresholds = self._first_snapshot = None
        self._log.info(
            "moving {n} of {all} clients to {nodes}, {rate:g} a second",
            n=sum(plan.values()),
            all=self._sessions.count(),
            nodes=", ".join(self._node_name(node_id) for node_id in plan),
            rate=self.rate,
        )
        self._migration = Migration(
            plan,
            # It is known only once the node listens.
            public_url=self._node.public_url,
            target_node=self._target_node,
            has_excess=self._has_excess,
            on_finished=self._migration_finished,
            **self._migration_options,
        )
        self._migration.start()

    def _node_name(self, node_id: str) -> str:
        node = self._node_directory.find(node_id)
        # The registry is not to be trusted with a log line.
        return node_id if node is None else ascii(node.name)[1:-1]

    def _target_node(self, node_id: str) -> NodeStatus | None:
        """Another node, as long as clients are to be moved there."""
        node = self._node_directory.find(node_id)
        if node is None or node.state != "up":
            return None
        return node if node.clients < min(node.capacity, self._targets.get(node_id, 0)) else None

    def _has_excess(self) -> bool:
        """Whether this node still has more than its share."""
        if self._node.unready_reason():
            return False
        nodes = self._snapshot(self._peer_nodes).nodes
        self._targets = target_counts(nodes)
        return nodes[0].clients > self._targets[self._node.node_id]

    def _migration_finished(self, complete: bool) -> None:
        moving, self._migration = self._migration, None
        assert moving is not None
        self._log.info("moved {n} clients", n=moving.migrated)
        if moving.cooling_down and moving.migrated < moving.planned:
            # Nobody else could be moved in their place.
            self._log.info("{n} were moved less than 10 minutes ago, and stay until then", n=moving.cooling_down)
            self._cooldown_ends_at = self._clock.seconds() + CLIENT_COOLDOWN
            complete, self._follow_ups_left = True, 0
        # A client that was told last is counted by the heartbeat after its arrival.
        self._stabilizes_at = self._clock.seconds() + STABILIZATION_HEARTBEATS * self._heartbeat
        if self._thresholds is None and (self._follow_ups_left or not complete):
            self._thresholds, self._first_snapshot = FOLLOW_UP_THRESHOLDS, None
            self._follow_ups_left -= complete

    # Placements that are over.

    def _purge_if_due(self) -> None:
        if self._purging or self._clock.seconds() < self._purge_at or not self._membership.has_lease():
            return
        self._purging = True
        Deferred.fromCoroutine(self._purge_assignments()).addErrback(self._purge_failed)

    async def _purge_assignments(self) -> None:
        try:
            # The next piece after the next heartbeat.
            if await self._registry.purge_assignments():
                self._purge_at = self._clock.seconds() + PURGE_INTERVAL
        finally:
            self._purging = False

    def _purge_failed(self, failure: Failure) -> None:
        if not failure.check(RegistryUnavailableError):
            self._log.failure("error in removing placements", failure)
