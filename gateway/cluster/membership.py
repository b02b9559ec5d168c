"""Membership of this node in the fleet, and the directory of the other live nodes.

    start            -> join
    every heartbeat  -> heartbeat        <- False: the lease had expired; every session is claimed again
                     -> nodes            the directory is refreshed after each heartbeat
    stable           -> reap             the rows of nodes whose leases have expired
    stop             -> leave

A node is *stable* once it has sent heartbeats without a gap for one full lease, while the database's clock moved as its
own (registry/clock.py). Before that it declares no other node dead: after an outage of the database, or a step of its
clock, every lease looks expired.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from enum import Enum, auto

import attrs
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.metrics import Metrics
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, NodeInfo, NodeStatus
from gateway.rpc.interface import IMembership
from gateway.util.deferred import detached


class NodeDirectory:
    """The other live nodes, as of the last heartbeat."""

    _log = Logger()

    def __init__(
        self,
        registry: IRegistry,
        node_id: str,
        membership: IMembership,
        *,
        on_node_down: Callable[[str], None] = lambda node_id: None,
        on_nodes_changed: Callable[[list[NodeStatus]], None] = lambda nodes: None,
        peer_url: Callable[[], str] = lambda: "",
    ) -> None:
        """``on_nodes_changed`` is called with the other live nodes after each refresh, and before that ``on_node_down``
        with the node_id of each node that is gone. ``membership`` tells whether this node may declare another one
        dead. ``peer_url`` returns this node's own; a node with the same one is ignored."""
        self._registry = registry
        self._node_id = node_id
        self._is_stable = membership.is_stable
        self._on_node_down = on_node_down
        self._on_nodes_changed = on_nodes_changed
        self._peer_url = peer_url
        #: the ids of the nodes that were reported to have this node's own peer URL
        self._same_url: set[str] = set()
        self._nodes: dict[str, NodeStatus] = {}
        self._refreshing: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._nodes)

    def is_single_node(self) -> bool:
        """Whether there is no other live node."""
        return not self._nodes

    def peer_nodes(self) -> list[NodeStatus]:
        """Return the other live nodes."""
        return list(self._nodes.values())

    def find(self, node_id: str) -> NodeStatus | None:
        """Return another live node, or ``None``."""
        return self._nodes.get(node_id)

    def has_own_url(self, node_id: str, public_url: str) -> bool:
        """Whether no other node has the public URL of a node, so that a client which connects there reaches that
        node."""
        return bool(public_url) and not any(
            node.public_url == public_url and node.node_id != node_id for node in self._nodes.values()
        )

    def least_loaded(self) -> NodeStatus | None:
        """Return the other node that accepts clients and has the most room, or ``None`` if none has any.

        The caller sends one client there, which is counted as that node's until the next refresh.
        """
        roomy = [node for node in self._nodes.values() if node.state == "up" and node.clients < node.capacity]
        if not roomy:
            return None
        node = max(roomy, key=lambda node: node.capacity - node.clients)
        self._nodes[node.node_id] = attrs.evolve(node, clients=node.clients + 1)
        return node

    def refresh(self) -> Deferred[None]:
        """Read the nodes from the registry; callers meanwhile wait for the same read. Does not fail."""
        refreshing = self._refreshing
        if refreshing is None:
            refreshing = self._refreshing = Deferred.fromCoroutine(self._refresh()).addErrback(self._failed)
            refreshing.addCallback(self._refreshed)
            if refreshing.called:
                self._refreshing = None
        return detached(refreshing)

    def _refreshed(self, _: object) -> None:
        self._refreshing = None

    async def _refresh(self) -> None:
        nodes = [node for node in await self._registry.nodes() if node.node_id != self._node_id]
        peer_url = self._peer_url()
        self._report_same_url([node for node in nodes if node.peer_url == peer_url])
        live = {node.node_id: node for node in nodes if node.peer_url != peer_url}
        missing = self._nodes.keys() - live.keys()
        if missing and not self._is_stable():
            # Except those whose address another node has now: its start has ended their leases.
            urls = {node.peer_url for node in nodes}
            kept = {node_id for node_id in missing if self._nodes[node_id].peer_url not in urls}
            live.update((node_id, self._nodes[node_id]) for node_id in kept)
            missing -= kept
        for node_id in live.keys() - self._nodes.keys():
            node = live[node_id]
            self._log.info("discovered node {name} at {url}", **_log_fields(node))
        gone = [self._nodes[node_id] for node_id in sorted(missing)]
        self._nodes = live
        for node in gone:
            if node.state == "up":
                self._log.warn("node {name} at {url} left: it stopped, or its lease expired", **_log_fields(node))
            else:
                self._log.info("node {name} at {url} left after a drain", **_log_fields(node))
            self._on_node_down(node.node_id)
        self._on_nodes_changed(list(live.values()))

    def _report_same_url(self, nodes: list[NodeStatus]) -> None:
        """Report nodes that live at this node's own peer URL, each once. Joining has ended the leases of those that
        were there before."""
        for node in nodes:
            if node.node_id not in self._same_url:
                self._log.error(
                    "node {name} has the same --peer-url as this node, {url}: give each node its own; until then the "
                    "nodes do not use each other",
                    **_log_fields(node),
                )
        self._same_url = {node.node_id for node in nodes}

    def _failed(self, failure: Failure) -> None:
        if not failure.check(RegistryUnavailableError):
            self._log.failure("error in reading the other nodes", failure)


def _log_fields(node: NodeStatus) -> dict[str, str]:
    """Return what a log line needs, escaped: the registry is not trusted."""
    return {"name": ascii(node.name)[1:-1], "url": ascii(node.peer_url)[1:-1]}


#: the most rows of dead nodes removed by one statement
REAP_BATCH_SIZE = 500
#: how long after a failed heartbeat the registry counts as unavailable, in heartbeats
OUTAGE_HEARTBEATS = 3


class LeaseState(Enum):
    """What is known of this node's lease. Whether it is valid is computed from the clock, since no event tells a
    process that was suspended.

        NOT_JOINED -joined-> HELD -heartbeat failed-> FAILING -failed again, lease expired-> EXPIRED
                             HELD <-heartbeat written- FAILING, EXPIRED
        any -left-> LEFT
    """

    NOT_JOINED = auto()
    #: the last heartbeat was written
    HELD = auto()
    #: the last heartbeat failed
    FAILING = auto()
    #: the last heartbeat failed after the lease had expired
    EXPIRED = auto()
    LEFT = auto()


class ReclaimState(Enum):
    """Whether the sessions of this node must be claimed again.

    NONE -lease had expired-> DUE -heartbeat-> RUNNING -done-> NONE
    RUNNING -failed, or lease had expired again-> RERUN -done-> DUE
    """

    NONE = auto()
    #: at the next heartbeat
    DUE = auto()
    RUNNING = auto()
    #: running, and due again
    RERUN = auto()


class Membership:
    """Keeps this node's lease."""

    _log = Logger()

    def __init__(
        self,
        registry: IRegistry,
        clock: IReactorTime,
        *,
        lease: float,
        heartbeat: float,
        metrics: Metrics,
        status: Callable[[], tuple[str, int]],
        reclaim: Callable[[], Deferred[None]],
        on_heartbeat: Callable[[], object] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``lease`` and ``heartbeat`` are in seconds. ``status`` returns this node's state (``up`` or ``draining``) and
        its number of clients. ``reclaim`` claims every session again; if it fails, it is called again after a later
        heartbeat. ``on_heartbeat`` is called after each heartbeat that was written. ``monotonic`` is a clock that is
        never set (a reactor's may be)."""
        self._registry = registry
        #: set by start()
        self._info: NodeInfo | None = None
        self._clock = clock
        self._lease = lease
        self._heartbeat_interval = heartbeat
        self._metrics = metrics
        self._status = status
        self._reclaim = reclaim
        self._on_heartbeat = on_heartbeat
        self._monotonic = monotonic
        self._lease_state = LeaseState.NOT_JOINED
        # Times are of the monotonic clock, taken before the statement was sent.
        #: the last heartbeat that was written
        self._renewed_at = -math.inf
        #: when the current unbroken series of heartbeats began
        self._stable_since = 0.0
        self._timer: IDelayedCall | None = None
        self._heartbeat_in_flight: Deferred[None] | None = None
        self._reclaim_state = ReclaimState.NONE
        self._reaping = False
        #: first and last failed heartbeat of the current outage
        self._failed_since = 0.0
        self._failed_at = -math.inf
        self._stopping = False

    def start(self, info: NodeInfo) -> Deferred[None]:
        """Join the fleet, and start to send heartbeats. Fails with
        :class:`~gateway.registry.errors.RegistryUnavailableError`; then nothing was started."""
        self._info = info
        return Deferred.fromCoroutine(self._start(info))

    async def _start(self, info: NodeInfo) -> None:
        sent = self._monotonic()
        await self._registry.join(info)
        self._lease_state = LeaseState.HELD
        self._renewed_at = self._stable_since = sent
        if self._stopping:
            await self._leave()
        else:
            self._schedule_heartbeat(sent)

    def heartbeat(self) -> Deferred[None]:
        """Send a heartbeat now, so that the registry has this node's current state. Does not fail; waits for a
        heartbeat in flight first, since that may have the old state."""
        return Deferred.fromCoroutine(self._heartbeat_now())

    async def _heartbeat_now(self) -> None:
        if self._heartbeat_in_flight is not None:
            await detached(self._heartbeat_in_flight)
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
            self._send_heartbeat()
            assert self._heartbeat_in_flight is not None
            await detached(self._heartbeat_in_flight)

    def stop(self) -> Deferred[None]:
        """Stop the heartbeats, and leave the fleet. Does not fail: rows that could not be removed are valid for one
        more lease."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self._stopping = True
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        if self._heartbeat_in_flight is not None:
            await detached(self._heartbeat_in_flight)
        if self._lease_state not in (LeaseState.NOT_JOINED, LeaseState.LEFT):
            await self._leave()

    async def _leave(self) -> None:
        self._lease_state = LeaseState.LEFT
        self._renewed_at = -math.inf
        try:
            await self._registry.leave()
        except RegistryUnavailableError as e:
            self._log.warn("could not leave the registry; this node's lease will expire there: {error}", error=e)

    def has_lease(self) -> bool:
        """Whether this node's lease is valid, by its own clock."""
        return self._monotonic() - self._renewed_at < self._lease

    def is_stable(self) -> bool:
        """Whether this node may declare others dead: it has sent heartbeats without a gap for one full lease."""
        return (
            self._lease_state is LeaseState.HELD
            and self.has_lease()
            and self._monotonic() - self._stable_since >= self._lease
        )

    def ownership_uncertain(self) -> bool:
        """Whether other nodes may own sessions of this node by now: after the lease has expired, as while this process
        was suspended, and until every session is claimed again. ``False`` while the registry is unavailable: then no
        node can tell."""
        if self._reclaim_state is ReclaimState.NONE and self.has_lease():
            return False
        # Before start() there are no clients here.
        return (
            self._info is not None
            and self._monotonic() - self._failed_at > OUTAGE_HEARTBEATS * self._heartbeat_interval
        )

    def _schedule_heartbeat(self, sent: float) -> None:
        """Schedule the next heartbeat one interval after the last one began."""
        if not self._stopping:
            delay = max(0.0, sent + self._heartbeat_interval - self._monotonic())
            self._timer = self._clock.callLater(min(delay, self._heartbeat_interval), self._send_heartbeat)

    def _send_heartbeat(self) -> None:
        sent = self._monotonic()
        renewing: Deferred[bool] = maybeDeferred(lambda: self._registry.heartbeat(*self._status()))
        handled = renewing.addCallbacks(self._on_renewed, self._on_failed, callbackArgs=(sent,))
        self._heartbeat_in_flight = handled.addCallback(lambda _: self._schedule_heartbeat(sent))

    def _on_renewed(self, held: bool, sent: float) -> None:
        was_failing = self._lease_state is not LeaseState.HELD
        if was_failing:
            away = self._monotonic() - self._failed_since
            self._log.info("the registry answers again, after {away:.1f} s", away=away)
        if was_failing or not held or sent - self._renewed_at >= self._lease or not self._registry.clock_is_steady():
            self._stable_since = sent
        self._lease_state = LeaseState.HELD
        self._failed_at = -math.inf
        self._renewed_at = sent
        if self._stopping:
            return
        self._on_heartbeat()
        if not held:
            self._log.warn("this node's lease had run out: every client here is claimed again")
            is_running = self._reclaim_state in (ReclaimState.RUNNING, ReclaimState.RERUN)
            self._reclaim_state = ReclaimState.RERUN if is_running else ReclaimState.DUE
        if self._reclaim_state is ReclaimState.DUE:
            self._reclaim_all()
        if self.is_stable() and not self._reaping:
            self._reaping = True
            Deferred.fromCoroutine(self._reap()).addErrback(self._log_unexpected, "reaping")

    def _on_failed(self, failure: Failure) -> None:
        self._metrics.heartbeat_failures += 1
        problem = failure.getErrorMessage()
        if not isinstance(failure.value, RegistryUnavailableError):
            self._log_unexpected(failure, "a heartbeat")
        self._failed_at = self._monotonic()
        if self._lease_state is LeaseState.HELD:
            self._lease_state = LeaseState.FAILING
            self._failed_since = self._failed_at
            self._log.warn("the registry does not answer: {problem}", problem=problem)
        if self._lease_state is LeaseState.FAILING and not self.has_lease():
            self._lease_state = LeaseState.EXPIRED
            self._log.error("this node's lease ran out: it takes no clients until the registry answers")

    def _reclaim_all(self) -> None:
        self._reclaim_state = ReclaimState.RUNNING

        def failed(failure: Failure) -> None:
            self._reclaim_state = ReclaimState.RERUN
            if not isinstance(failure.value, RegistryUnavailableError):
                self._log_unexpected(failure, "claiming again")

        def done(_: object) -> None:
            is_due = self._reclaim_state is ReclaimState.RERUN
            self._reclaim_state = ReclaimState.DUE if is_due else ReclaimState.NONE

        maybeDeferred(self._reclaim).addErrback(failed).addCallback(done)

    async def _reap(self) -> None:
        """Remove the rows of dead nodes, in batches."""
        try:
            while self.is_stable() and await self._registry.reap(REAP_BATCH_SIZE) == REAP_BATCH_SIZE:
                pass
        except RegistryUnavailableError:
            pass  # counted and logged by the registry; repeated after the next heartbeat
        finally:
            self._reaping = False

    def _log_unexpected(self, failure: Failure, activity: str) -> None:
        self._log.failure("error in {activity}", failure, activity=activity)
