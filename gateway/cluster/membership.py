"""The live nodes, as this one last saw them in the registry.

It looks after every heartbeat of its own. Who is no longer listed is gone, but only to a node that is steady: to any
other all leases may look as if they had run out.

This node as a member of the fleet: it joins, heartbeats, and leaves; and it buries the dead.

    start            -> join
    every heartbeat  -> heartbeat        <- False: the lease had run out; every client here is claimed again
    steady           -> reap             the rows of nodes whose leases ran out
    stop             -> leave

A node is *steady* once it has heartbeaten without a gap for one full lease. Before that it judges nobody dead: after
the database was away, every lease looks as if it had run out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import attrs
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.metrics import Metrics
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, NodeInfo, NodeStatus
from gateway.rpc.interface import IMembership


class NodeDirectory:
    """The other nodes. ``on_node_down`` is called with the node_id of each node that is gone, ``on_nodes_changed`` with
    the list of the other nodes each time that it is read anew."""

    _log = Logger()

    def __init__(
        self,
        registry: IRegistry,
        node_id: str,
        membership: IMembership,
        *,
        on_node_down: Callable[[str], None] = lambda node_id: None,
        on_nodes_changed: Callable[[list[NodeStatus]], None] = lambda nodes: None,
    ) -> None:
        self._registry = registry
        self._node_id = node_id
        self._is_stable = membership.is_stable
        self._on_node_down = on_node_down
        self._on_nodes_changed = on_nodes_changed
        self._nodes: dict[str, NodeStatus] = {}
        self._refreshing: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._nodes)

    def is_single_node(self) -> bool:
        """Whether there is no other live node."""
        return not self._nodes

    def peer_nodes(self) -> list[NodeStatus]:
        """The other live nodes."""
        return list(self._nodes.values())

    def find(self, node_id: str) -> NodeStatus | None:
        """Another live node."""
        return self._nodes.get(node_id)

    def least_loaded(self) -> NodeStatus | None:
        """The other node that takes clients and has the most room, or ``None`` if none has any. Whoever is told of it
        sends one client there: that is counted until the list is read anew."""
        roomy = [node for node in self._nodes.values() if node.state == "up" and node.clients < node.capacity]
        if not roomy:
            return None
        node = max(roomy, key=lambda node: node.capacity - node.clients)
        self._nodes[node.node_id] = attrs.evolve(node, clients=node.clients + 1)
        return node

    def refresh(self) -> Deferred[None]:
        """Read the list anew; one reading at a time. Does not fail."""
        waiter: Deferred[None] = Deferred()
        looking = self._refreshing
        if looking is None:
            looking = self._refreshing = Deferred.fromCoroutine(self._refresh()).addErrback(self._failed)
            looking.addCallback(self._refreshed)
            if looking.called:
                self._refreshing = None
        looking.addCallback(lambda _: waiter.callback(None))
        return waiter

    def _refreshed(self, _: object) -> None:
        self._refreshing = None

    async def _refresh(self) -> None:
        seen = {node.node_id: node for node in await self._registry.nodes() if node.node_id != self._node_id}
        missing = self._nodes.keys() - seen.keys()
        if missing and not self._is_stable():
            seen.update((node_id, self._nodes[node_id]) for node_id in missing)
            missing = set()
        for node_id in seen.keys() - self._nodes.keys():
            node = seen[node_id]
            self._log.info("node {name} is there, at {url}", **_log_fields(node))
        gone = [self._nodes[node_id] for node_id in sorted(missing)]
        self._nodes = seen
        for node in gone:
            if node.state == "up":
                self._log.warn("node {name}, at {url}, is gone: it ended, or its lease ran out", **_log_fields(node))
            else:
                self._log.info("node {name}, at {url}, is gone, which it said beforehand", **_log_fields(node))
            self._on_node_down(node.node_id)
        self._on_nodes_changed(list(seen.values()))

    def _failed(self, failure: Failure) -> None:
        if not failure.check(RegistryUnavailableError):
            self._log.failure("error in looking at the other nodes", failure)


def _log_fields(node: NodeStatus) -> dict[str, str]:
    """What stands in a log line: the registry is not to be trusted with that."""
    return {"name": ascii(node.name)[1:-1], "url": ascii(node.peer_url)[1:-1]}


#: the most rows of dead nodes that are removed at a time
REAP_BATCH_SIZE = 500
#: so many heartbeats after one that failed it is not known any more that the registry is away
OUTAGE_HEARTBEATS = 3


class Membership:
    """Keeps this node's lease.

    ``lease`` and ``heartbeat`` are in seconds. ``load`` gives this node's state (``up`` or ``draining``) and its number
    of clients. ``reclaim`` claims again every client that is here; if it fails, it is asked again after a later
    heartbeat. ``beaten`` is called after each heartbeat that was written. ``monotonic`` is a clock that is never set (a
    reactor's may be).
    """

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
        #: by the monotonic clock, before the statement was sent: the last heartbeat, and the first without a gap since
        self._renewed_at: float | None = None
        self._stable_since = 0.0
        self._timer: IDelayedCall | None = None
        self._heartbeat_in_flight: Deferred[None] | None = None
        self._reclaim_due = False
        self._reclaiming = False
        self._reaping = False
        self._failed_since: float | None = None
        self._failed_at = -math.inf
        self._lease_lost = False
        self._stopped = False

    def start(self, info: NodeInfo) -> Deferred[None]:
        """Join, and heartbeat from then on. Fails with ``RegistryUnavailable``; then nothing was started."""
        self._info = info
        return Deferred.fromCoroutine(self._start(info))

    async def _start(self, info: NodeInfo) -> None:
        sent = self._monotonic()
        await self._registry.join(info)
        self._renewed_at = self._stable_since = sent
        if self._stopped:
            await self._leave()
        else:
            self._schedule_heartbeat(sent)

    def heartbeat(self) -> Deferred[None]:
        """Heartbeat now, so that the registry has this node's state as it is. Does not fail; a heartbeat that is under
        way is waited for first, since it may have the old state."""
        return Deferred.fromCoroutine(self._heartbeat_now())

    async def _heartbeat_now(self) -> None:
        if self._heartbeat_in_flight is not None:
            await self._heartbeat_in_flight
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
            self._send_heartbeat()
            assert self._heartbeat_in_flight is not None
            await self._heartbeat_in_flight

    def stop(self) -> Deferred[None]:
        """Stop heartbeating, and leave. Does not fail: rows that could not be removed count only for one more lease."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self._stopped = True
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        if self._heartbeat_in_flight is not None:
            await self._heartbeat_in_flight
        if self._renewed_at is not None:
            await self._leave()

    async def _leave(self) -> None:
        self._renewed_at = None
        try:
            await self._registry.leave()
        except RegistryUnavailableError as e:
            self._log.warn("could not leave the registry, which will forget this node by itself: {error}", error=e)

    def has_lease(self) -> bool:
        """Whether this node's lease holds, by its own clock."""
        return self._renewed_at is not None and self._monotonic() - self._renewed_at < self._lease

    def is_stable(self) -> bool:
        """Whether this node may judge others dead: it has heartbeaten without a gap for one full lease."""
        return self.has_lease() and self._failed_since is None and self._monotonic() - self._stable_since >= self._lease

    def ownership_uncertain(self) -> bool:
        """Whether clients that are here may be elsewhere by now, as after this process was stopped, or until all are
        claimed again; while the registry is known to be away, nobody can tell, and it is not."""
        if self.has_lease() and not self._reclaim_due and not self._reclaiming:
            return False
        # Before start() there are no clients here.
        return (
            self._info is not None
            and self._monotonic() - self._failed_at > OUTAGE_HEARTBEATS * self._heartbeat_interval
        )

    def _schedule_heartbeat(self, sent: float) -> None:
        """Heartbeat next when one interval has passed since the last one began."""
        if not self._stopped:
            pause = max(0.0, sent + self._heartbeat_interval - self._monotonic())
            self._timer = self._clock.callLater(min(pause, self._heartbeat_interval), self._send_heartbeat)

    def _send_heartbeat(self) -> None:
        sent = self._monotonic()
        beating: Deferred[bool] = maybeDeferred(lambda: self._registry.heartbeat(*self._status()))
        answered = beating.addCallbacks(self._on_renewed, self._on_failed, callbackArgs=(sent,))
        self._heartbeat_in_flight = answered.addCallback(lambda _: self._schedule_heartbeat(sent))

    def _on_renewed(self, held: bool, sent: float) -> None:
        if self._failed_since is not None:
            away = self._monotonic() - self._failed_since
            self._log.info("the registry answers again, after {away:.1f} s", away=away)
        assert self._renewed_at is not None
        if self._failed_since is not None or not held or sent - self._renewed_at >= self._lease:
            self._stable_since = sent
        self._failed_since = None
        self._failed_at = -math.inf
        self._lease_lost = False
        self._renewed_at = sent
        if self._stopped:
            return
        self._on_heartbeat()
        if not held:
            self._log.warn("this node's lease had run out: every client here is claimed again")
            self._reclaim_due = True
        if self._reclaim_due and not self._reclaiming:
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
        if self._failed_since is None:
            self._failed_since = self._failed_at
            self._log.warn("the registry does not answer: {problem}", problem=problem)
        if not self._lease_lost and not self.has_lease():
            self._lease_lost = True
            self._log.error("this node's lease ran out: it takes no clients until the registry answers")

    def _reclaim_all(self) -> None:
        self._reclaim_due = False
        self._reclaiming = True

        def failed(failure: Failure) -> None:
            self._reclaim_due = True
            if not isinstance(failure.value, RegistryUnavailableError):
                self._log_unexpected(failure, "claiming again")

        def done(_: object) -> None:
            self._reclaiming = False

        maybeDeferred(self._reclaim).addErrback(failed).addCallback(done)

    async def _reap(self) -> None:
        """Remove the rows of dead nodes, a few at a time."""
        try:
            while self.is_stable() and await self._registry.reap(REAP_BATCH_SIZE) == REAP_BATCH_SIZE:
                pass
        except RegistryUnavailableError:
            pass  # counted and logged by the registry; tried again after the next heartbeat
        finally:
            self._reaping = False

    def _log_unexpected(self, failure: Failure, what: str) -> None:
        self._log.failure("error in {what}", failure, what=what)
