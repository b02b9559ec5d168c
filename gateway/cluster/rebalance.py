"""Rebalancing: move clients of this node to other nodes when it has more than its share.

    a node joins           -> two snapshots of all nodes, some heartbeats apart; if a node has more than 1.2 x the mean,
                              every node above its target moves the excess
    POST /v1/rebalance     -> the excess is moved at once, by one snapshot, and however small it is
    migration finished     -> when the counts are certain to show it, again if more than a little is left

The plan is a pure function of the nodes' counts. A node's share is its clients divided by its capacity; the mean is
that of all nodes together. Each node has a target, a whole number of clients next to the mean, and all targets add up
to all clients:

    above its target  -> moves the excess to the nodes below theirs, to each in proportion to what it lacks
    below             <- never more than that

So every node computes the same plan from the same counts, and carries out its own part of it; together they fill no
node beyond the mean. Only nodes that are ``up`` count.

The counts of the others are as old as their last heartbeats, while clients arrive everywhere. So all counts of a
snapshot, this node's too, are those of one time: that of the oldest last heartbeat, interpolated between the heartbeats
before and after it (:class:`CountHistory`). Other nodes move clients at the same time, too. So the plan
that is carried out is what the plans of two snapshots have in common: the first is older than any migration, since
every node sees a join within one heartbeat, and the second shows what has changed by itself meanwhile. Later changes
may only end a migration early.

A migration moves clients at an even pace:

    ask the target node whether it has room                   no, or no response: no client is moved there
    assign some clients to it in the registry                 every node routes them there from then on
    <- gateway.goaway, and 1012 when its calls have finished   one by one, at the configured rate

A client that the registry does not assign, since it was moved a short time ago, is replaced by another one. Clients
without calls in flight go first.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

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
from gateway.cluster.routing import Destination, destination_at
from gateway.metrics import Metrics
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, NodeStatus, SessionKey
from gateway.rpc.interface import IMembership
from gateway.settings import Settings

#: node_id of the source -> node_id of the target -> number of clients
MigrationPlans = dict[str, dict[str, int]]


def eligible_nodes(nodes: Iterable[NodeStatus]) -> list[NodeStatus]:
    """Return the nodes that count, the fullest first, in the same order on every node."""
    up = [node for node in nodes if node.state == "up" and node.capacity > 0]
    return sorted(up, key=lambda node: (-node.clients / node.capacity, node.node_id))


def is_unbalanced(nodes: Iterable[NodeStatus], max_ratio: float, min_ratio: float = 0.0) -> bool:
    """Whether the share of any node is more than ``max_ratio`` times the mean, or less than ``min_ratio`` times."""
    up = eligible_nodes(nodes)
    clients, capacity = sum(node.clients for node in up), sum(node.capacity for node in up)
    shares = [(node.clients * capacity, clients * node.capacity) for node in up]
    return any(share > max_ratio * mean or share < min_ratio * mean for share, mean in shares)


def target_counts(nodes: Iterable[NodeStatus]) -> dict[str, int]:
    """Return how many clients each node should have."""
    up = eligible_nodes(nodes)
    clients, capacity = sum(node.clients for node in up), sum(node.capacity for node in up)
    targets = {node.node_id: clients * node.capacity // capacity for node in up}
    # The remainder of the rounding goes to the fullest nodes, which have those clients already.
    for node in up[: clients - sum(targets.values())]:
        targets[node.node_id] += 1
    return targets


def plan_migrations(nodes: Sequence[NodeStatus]) -> MigrationPlans:
    """Return how many clients each node moves where: none to a node without a URL, nor beyond a node's capacity."""
    up, targets = eligible_nodes(nodes), target_counts(nodes)
    room = {node.node_id: max(0, min(targets[node.node_id], node.capacity) - node.clients) for node in up}
    plans: MigrationPlans = {}
    for source in up:
        receivers = [node.node_id for node in reversed(up) if room[node.node_id] and node.public_url]
        weights = [room[node_id] for node_id in receivers]
        excess = min(source.clients - targets[source.node_id], sum(weights))
        if excess <= 0:
            continue
        plans[source.node_id] = {}
        for node_id, number in zip(receivers, split_proportionally(excess, weights), strict=True):
            room[node_id] -= number
            if number:
                plans[source.node_id][node_id] = number
    return plans


def split_proportionally(count: int, weights: Sequence[int]) -> list[int]:
    """Split ``count``, at most the sum of the weights, in proportion to them; no part exceeds its weight."""
    total = sum(weights)
    parts = [count * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -(count * weights[index] % total))
    for index in by_remainder[: count - sum(parts)]:
        parts[index] += 1
    return parts


def intersect_plans(plan: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Return what two plans of one node have in common."""
    return {node_id: min(number, other[node_id]) for node_id, number in plan.items() if node_id in other}


#: the most times of one node that are kept
MAX_HISTORY = 8


class CountHistory:
    """The numbers of clients of all nodes at their last heartbeats, which are at different times."""

    def __init__(self) -> None:
        #: node_id -> (time, clients), the newest last
        self._counts: dict[str, deque[tuple[float, int]]] = {}

    def add(self, node_id: str, at: float, clients: int) -> None:
        """Add the count of a node at a time of the clock; nothing if that is known already."""
        counts = self._counts.setdefault(node_id, deque(maxlen=MAX_HISTORY))
        # The age of a heartbeat is known to some milliseconds only.
        if not counts or at - counts[-1][0] > MIN_HEARTBEAT_DISTANCE:
            counts.append((at, clients))

    def keep_only(self, node_ids: Iterable[str]) -> None:
        """Forget all other nodes."""
        self._counts = {node_id: self._counts[node_id] for node_id in node_ids if node_id in self._counts}

    def last_common_time(self) -> float:
        """Return the oldest time of the last counts of all nodes."""
        return min(counts[-1][0] for counts in self._counts.values())

    def count_at(self, node_id: str, at: float) -> int:
        """Return the count of a node at a time, interpolated."""
        counts = self._counts[node_id]
        later_at, later = counts[-1]
        for earlier_at, earlier in reversed(counts):
            if earlier_at <= at:
                if later_at == earlier_at:
                    return earlier
                return round(earlier + (later - earlier) * min(1.0, (at - earlier_at) / (later_at - earlier_at)))
            later_at, later = earlier_at, earlier
        return later


#: two heartbeats of one node are further apart, in seconds
MIN_HEARTBEAT_DISTANCE = 0.05
#: interval at which due clients are sent away, in seconds
MIGRATION_INTERVAL = 0.05
#: how far ahead of the goaways clients are assigned, in seconds
ASSIGN_AHEAD = 1.0
#: delay after a batch of which not all were assigned, in seconds
ASSIGN_RETRY_DELAY = 0.25
#: no client is sent away while a statement has been in progress for this long, in seconds
REGISTRY_STALL_TIMEOUT = 0.25
#: the most clients assigned by one statement
MAX_ASSIGN_BATCH = 500
#: timeout of peer.has_room, in seconds
HAS_ROOM_TIMEOUT = 1.0
#: a migration ends after this time, since its plan is outdated, in seconds
MIGRATION_TIMEOUT = 600.0


class Candidates:
    """The clients of this node that can be moved, in random order; those with calls in flight last."""

    def __init__(
        self, sessions: IClientSessions, graceful_disconnect: GracefulDisconnect, in_flight: Callable[[SessionKey], int]
    ) -> None:
        self._sessions = sessions
        self._graceful_disconnect = graceful_disconnect
        self._in_flight = in_flight
        self._idle = sessions.client_ids()
        self._busy: list[str] = []

    def pop(self, count: int) -> list[str]:
        """Take up to ``count`` clients that are still connected; fewer if there are no more."""
        client_ids: list[str] = []
        while len(client_ids) < count and self._idle:
            client_id = _pop_random(self._idle)
            generation = self._sessions.generation(client_id)
            if not generation or self._graceful_disconnect.goaway_sent(client_id):
                continue
            if self._in_flight(SessionKey(client_id, generation)):
                self._busy.append(client_id)
            else:
                client_ids.append(client_id)
        while len(client_ids) < count and self._busy:
            client_id = self._busy.pop()
            if self._sessions.generation(client_id) and not self._graceful_disconnect.goaway_sent(client_id):
                client_ids.append(client_id)
        return client_ids


def _pop_random(items: list[str]) -> str:
    """Remove and return a random item, in constant time."""
    index = random.randrange(len(items))
    items[index], items[-1] = items[-1], items[index]
    return items.pop()


class Migration:
    """Carries out the plan of this node."""

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
        in_flight: Callable[[SessionKey], int],
        public_url: str,
        target_node: Callable[[str], NodeStatus | None],
        destination_at: Callable[[NodeStatus, str], Destination],
        has_excess: Callable[[], bool],
        on_finished: Callable[[bool], None],
    ) -> None:
        """``plan`` maps node_ids to the number of clients to move there; ``rate`` is in clients per second.
        ``public_url`` is this node's: a client that is moved to a node with the same one gets no URL, and is routed by
        what is in front of both. ``target_node`` returns the node of a node_id as long as clients are to be moved
        there, ``destination_at`` the destination of a client at a node, and ``has_excess`` whether any are to be moved
        at all. ``on_finished`` is called once, unless :meth:`stop` is, with whether everything possible was moved."""
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
        self._destination_at = destination_at
        self._has_excess = has_excess
        self._on_finished = on_finished
        self._candidates = Candidates(sessions, graceful_disconnect, in_flight)
        #: (client_id, node_id) of the clients that are assigned, and not sent away yet
        self._assigned: deque[tuple[str, str]] = deque()
        #: when the batch in progress was started, if there is one
        self._assigning_since: float | None = None
        self._next_assign_at = 0.0
        #: number of clients that could not be moved, since they were moved a short time ago
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
        """The number of clients that are still to be moved."""
        return sum(self._remaining.values()) + len(self._assigned)

    def start(self) -> None:
        self._loop.start(MIGRATION_INTERVAL).addErrback(
            lambda failure: self._log.failure("error in moving clients", failure)
        )

    def stop(self) -> None:
        """Move no more clients, without a call of ``on_finished``."""
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
        # Unused tokens do not add up to a burst.
        max_tokens = 1.0 + 2 * MIGRATION_INTERVAL * self._rate
        self._tokens = min(max_tokens, self._tokens + (now - self._last_tick) * self._rate)
        self._last_tick = now
        # A registry that does not respond would not accept the claims of the clients at their new node, either.
        is_stalled = self._assigning_since is not None and now - self._assigning_since > REGISTRY_STALL_TIMEOUT
        while self._tokens >= 1.0 and self._assigned and not is_stalled:
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
        elif self._graceful_disconnect.send_goaway(client_id, "rebalance", self._destination(node, client_id)):
            self._tokens -= 1.0
            self.migrated += 1
            self._metrics.rebalanced += 1
        else:
            # The client has left by itself; another one goes in its place.
            self._remaining[node_id] += 1

    def _destination(self, node: NodeStatus, client_id: str) -> Destination | None:
        return None if node.public_url == self._public_url else self._destination_at(node, client_id)

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
            count = min(self._remaining[node_id], math.ceil(self._rate * ASSIGN_AHEAD), MAX_ASSIGN_BATCH)
            client_ids = [] if self._stopped else self._candidates.pop(count)
            if not client_ids:
                # No candidates are left.
                self._remaining = dict.fromkeys(self._remaining, 0)
                return
            binding = node.public_url != self._public_url
            assigned = set(await self._registry.assign(client_ids, node_id, binding=binding))
            self.cooling_down += len(client_ids) - len(assigned)
            self._assigned += [(client_id, node_id) for client_id in client_ids if client_id in assigned]
            self._remaining[node_id] = max(0, self._remaining[node_id] - len(assigned))
            if len(assigned) < count:
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


class Thresholds(NamedTuple):
    """How unbalanced the nodes must be for clients to be moved."""

    #: clients are moved if the share of a node is more than this many times the mean
    max_ratio: float
    #: or less than this many times
    min_ratio: float


#: when a node has joined
JOIN_THRESHOLDS = Thresholds(1.2, 0.0)
#: after a migration
FOLLOW_UP_THRESHOLDS = Thresholds(1.05, 0.95)
#: when an operator requests it
MANUAL_THRESHOLDS = Thresholds(1.0, 1.0)
#: a node with fewer clients moves none, unless an operator requests it: the first clients of a fleet stay
MIN_CLIENTS = 10
#: how often a finished migration is followed by another one, if more than a little is left
MAX_FOLLOW_UPS = 2
#: how long a client that was moved is not moved again, in seconds
CLIENT_COOLDOWN = 600.0
#: shortest time between the two snapshots of a plan, in heartbeats
OBSERVATION_HEARTBEATS = 1.5
#: time between the end of a migration and the next first snapshot, in heartbeats
STABILIZATION_HEARTBEATS = 2.0
#: interval at which ended assignments are purged, in seconds
PURGE_INTERVAL = 60.0


@attrs.frozen
class _Snapshot:
    """All nodes, this one first, at some time."""

    at: float
    nodes: list[NodeStatus]


@attrs.define
class _Observing:
    """A plan is due; it is made from two snapshots."""

    thresholds: Thresholds
    first_snapshot: _Snapshot | None = None


@implementer(IRebalancer)
class Rebalancer:
    """Decides when clients of this node are moved, and how many. :meth:`nodes_changed` must be called after each
    refresh of the node directory."""

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
        """``calls`` tracks the calls in flight of each session."""
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
        self._make_migration = partial(
            Migration,
            sessions=sessions,
            registry=registry,
            peer_client=peer_client,
            graceful_disconnect=graceful_disconnect,
            clock=clock,
            metrics=metrics,
            rate=self.rate,
            in_flight=calls.calls_in_flight_on,
            target_node=self._target_node,
            destination_at=partial(destination_at, node_directory),
            has_excess=self._has_excess,
            on_finished=self._migration_finished,
        )
        #: a plan is due, or is carried out; ``None``: neither
        self._state: _Observing | Migration | None = None
        #: node_ids of the other nodes that are up; ``None`` before the first refresh
        self._up_node_ids: set[str] | None = None
        self._follow_ups_left = 0
        #: when the clients can be moved that were moved a short time ago, if a migration needed them
        self._cooldown_ends_at: float | None = None
        #: snapshots before that do not show yet what was moved
        self._stabilizes_at = clock.seconds()
        self._peer_nodes: list[NodeStatus] = []
        self._history = CountHistory()
        #: how many clients each node should have now
        self._targets: dict[str, int] = {}
        self._purge_at = clock.seconds() + PURGE_INTERVAL
        self._purging = False

    def stop(self) -> None:
        """Move no more clients."""
        if isinstance(self._state, Migration):
            self._state.stop()
        self._state = None

    # Observation.

    def nodes_changed(self, nodes: list[NodeStatus]) -> None:
        """Handle a refresh of the node directory."""
        self._peer_nodes = nodes
        self._record_counts(nodes)
        snapshot = self._snapshot_of_one_time(nodes)
        up = {node.node_id for node in nodes if node.state == "up"}
        if self._up_node_ids is not None and up - self._up_node_ids:
            if isinstance(self._state, Migration):
                # Its plan is wrong with one more node.
                self._state.stop()
                self._migration_finished(False)
            self._state, self._follow_ups_left = _Observing(JOIN_THRESHOLDS), MAX_FOLLOW_UPS
        self._up_node_ids = up
        if self._cooldown_ends_at is not None and snapshot.at >= self._cooldown_ends_at:
            self._cooldown_ends_at = None
            if self._state is None:
                self._state, self._follow_ups_left = _Observing(FOLLOW_UP_THRESHOLDS), MAX_FOLLOW_UPS
        if isinstance(self._state, _Observing):
            self._observe(self._state, snapshot)
        self._purge_if_due()

    def _snapshot(self, peer_nodes: list[NodeStatus]) -> _Snapshot:
        node = self._node
        clients = max(0, self._sessions.count() - len(self._graceful_disconnect))
        own = NodeStatus(
            node.node_id, node.name, node.public_url, node.peer_url, clients, self._capacity, self._node_state(), 0.0
        )
        return _Snapshot(self._clock.seconds(), [own, *peer_nodes])

    def _record_counts(self, peer_nodes: list[NodeStatus]) -> None:
        now = self._clock.seconds()
        own = self._snapshot(peer_nodes).nodes[0]
        self._history.add(own.node_id, now, own.clients)
        for node in peer_nodes:
            self._history.add(node.node_id, now - node.heartbeat_age, node.clients)
        self._history.keep_only([own.node_id, *(node.node_id for node in peer_nodes)])

    def _snapshot_of_one_time(self, peer_nodes: list[NodeStatus]) -> _Snapshot:
        """Return all nodes with their counts at the last time for which all are known."""
        snapshot, at = self._snapshot(peer_nodes), self._history.last_common_time()
        nodes = [attrs.evolve(node, clients=self._history.count_at(node.node_id, at)) for node in snapshot.nodes]
        return _Snapshot(snapshot.at, nodes)

    def _node_state(self) -> str:
        return "draining" if self._node.unready_reason() else "up"

    def _observe(self, observing: _Observing, snapshot: _Snapshot) -> None:
        """Take the first snapshot, or make the plan if this is the second one."""
        if (
            not self.rate
            or self._node.unready_reason()
            or not self._membership.is_stable()
            or snapshot.at < self._stabilizes_at
        ):
            observing.first_snapshot = None
            return
        first = observing.first_snapshot
        if first is None:
            observing.first_snapshot = snapshot
            return
        if snapshot.at - first.at < OBSERVATION_HEARTBEATS * self._heartbeat:
            return
        has_few = observing.thresholds != MANUAL_THRESHOLDS and snapshot.nodes[0].clients < MIN_CLIENTS
        if has_few or not is_unbalanced(snapshot.nodes, *observing.thresholds) or not (plan := self._plan(snapshot)):
            self._state = None
            return
        plan = intersect_plans(plan, self._plan(first))
        if plan:
            self._start_migration(plan)
        else:
            # The excess is newer than the first snapshot; the next one shows whether it lasts.
            observing.first_snapshot = snapshot

    def _plan(self, snapshot: _Snapshot) -> dict[str, int]:
        return plan_migrations(snapshot.nodes).get(self._node.node_id, {})

    # Migrations.

    def rebalance_now(self) -> Deferred[int]:
        return Deferred.fromCoroutine(self._rebalance_now())

    async def _rebalance_now(self) -> int:
        if not self.rate:
            return 0
        await self._node_directory.refresh()
        if isinstance(self._state, Migration):
            return self._state.remaining
        if self._node.unready_reason():
            return 0
        self._record_counts(self._node_directory.peer_nodes())
        snapshot = self._snapshot_of_one_time(self._node_directory.peer_nodes())
        self._follow_ups_left = MAX_FOLLOW_UPS
        if snapshot.at < self._stabilizes_at:
            self._state = _Observing(MANUAL_THRESHOLDS)
            return 0
        plan = self._plan(snapshot)
        if plan:
            self._start_migration(plan)
        return sum(plan.values())

    def _start_migration(self, plan: dict[str, int]) -> None:
        self._log.info(
            "moving {n} of {all} clients to {nodes}, {rate:g} a second",
            n=sum(plan.values()),
            all=self._sessions.count(),
            nodes=", ".join(self._node_name(node_id) for node_id in plan),
            rate=self.rate,
        )
        # The public URL is known only once the node listens.
        self._state = migration = self._make_migration(plan, public_url=self._node.public_url)
        migration.start()

    def _node_name(self, node_id: str) -> str:
        node = self._node_directory.find(node_id)
        # Escaped for the log line: the registry is not trusted.
        return node_id if node is None else ascii(node.name)[1:-1]

    def _target_node(self, node_id: str) -> NodeStatus | None:
        """Return another node, as long as clients are to be moved there."""
        node = self._node_directory.find(node_id)
        if node is None or node.state != "up":
            return None
        return node if node.clients < min(node.capacity, self._targets.get(node_id, 0)) else None

    def _has_excess(self) -> bool:
        """Whether this node has more clients than its target."""
        if self._node.unready_reason():
            return False
        nodes = self._snapshot(self._peer_nodes).nodes
        self._targets = target_counts(nodes)
        return nodes[0].clients > self._targets[self._node.node_id]

    def _migration_finished(self, complete: bool) -> None:
        migration, self._state = self._state, None
        assert isinstance(migration, Migration)
        self._log.info("moved {n} clients", n=migration.migrated)
        if migration.cooling_down and migration.migrated < migration.planned:
            # There were no other clients to move in their place.
            self._log.info("{n} were moved less than 10 minutes ago, and stay until then", n=migration.cooling_down)
            self._cooldown_ends_at = self._clock.seconds() + CLIENT_COOLDOWN
            complete, self._follow_ups_left = True, 0
        # The client that was sent away last is counted by the heartbeat after its arrival.
        self._stabilizes_at = self._clock.seconds() + STABILIZATION_HEARTBEATS * self._heartbeat
        if self._follow_ups_left or not complete:
            self._state = _Observing(FOLLOW_UP_THRESHOLDS)
            self._follow_ups_left -= complete

    # Ended assignments.

    def _purge_if_due(self) -> None:
        if self._purging or self._clock.seconds() < self._purge_at or not self._membership.has_lease():
            return
        self._purging = True
        Deferred.fromCoroutine(self._purge_assignments()).addErrback(self._purge_failed)

    async def _purge_assignments(self) -> None:
        try:
            # False: more are left, for after the next heartbeat.
            if await self._registry.purge_assignments():
                self._purge_at = self._clock.seconds() + PURGE_INTERVAL
        finally:
            self._purging = False

    def _purge_failed(self, failure: Failure) -> None:
        if not failure.check(RegistryUnavailableError):
            self._log.failure("error in purging assignments", failure)
