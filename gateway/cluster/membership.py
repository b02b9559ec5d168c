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
from gateway.registry.interface import IRegistry, NodeInfo, NodeStatus, RegistryUnavailable


class Fleet:
    """The other nodes. ``steady`` tells whether this node may call another dead."""

    _log = Logger()

    def __init__(self, registry: IRegistry, node_id: str, steady: Callable[[], bool]) -> None:
        self._registry = registry
        self._node_id = node_id
        self._steady = steady
        self._nodes: dict[str, NodeStatus] = {}
        #: told of the list of other nodes each time that it is read anew
        self.watchers: list[Callable[[list[NodeStatus]], None]] = []
        #: told of the node_id of each that is gone
        self.mourners: list[Callable[[str], None]] = []
        self._looking: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._nodes)

    def others(self) -> list[NodeStatus]:
        """The other live nodes."""
        return list(self._nodes.values())

    def find(self, node_id: str) -> NodeStatus | None:
        """Another live node."""
        return self._nodes.get(node_id)

    def emptiest(self) -> NodeStatus | None:
        """The other node that takes clients and has the most room, or ``None`` if none has any. Whoever is told of it
        sends one client there: that is counted until the list is read anew."""
        roomy = [node for node in self._nodes.values() if node.state == "up" and node.clients < node.capacity]
        if not roomy:
            return None
        node = max(roomy, key=lambda node: node.capacity - node.clients)
        self._nodes[node.node_id] = attrs.evolve(node, clients=node.clients + 1)
        return node

    def look(self) -> Deferred[None]:
        """Read the list anew; one reading at a time. Does not fail."""
        waiter: Deferred[None] = Deferred()
        looking = self._looking
        if looking is None:
            looking = self._looking = Deferred.fromCoroutine(self._look()).addErrback(self._failed)
            looking.addCallback(self._looked)
            if looking.called:
                self._looking = None
        looking.addCallback(lambda _: waiter.callback(None))
        return waiter

    def _looked(self, _: object) -> None:
        self._looking = None

    async def _look(self) -> None:
        seen = {node.node_id: node for node in await self._registry.nodes() if node.node_id != self._node_id}
        missing = self._nodes.keys() - seen.keys()
        if missing and not self._steady():
            seen.update((node_id, self._nodes[node_id]) for node_id in missing)
            missing = set()
        for node_id in seen.keys() - self._nodes.keys():
            node = seen[node_id]
            self._log.info("node {name} is there, at {url}", **_shown(node))
        gone = [self._nodes[node_id] for node_id in sorted(missing)]
        self._nodes = seen
        for node in gone:
            if node.state == "up":
                self._log.warn("node {name}, at {url}, is gone: it ended, or its lease ran out", **_shown(node))
            else:
                self._log.info("node {name}, at {url}, is gone, which it said beforehand", **_shown(node))
            for mourn in self.mourners:
                mourn(node.node_id)
        for watch in self.watchers:
            watch(list(seen.values()))

    def _failed(self, failure: Failure) -> None:
        if not failure.check(RegistryUnavailable):
            self._log.failure("error in looking at the other nodes", failure)


def _shown(node: NodeStatus) -> dict[str, str]:
    """What stands in a log line: the registry is not to be trusted with that."""
    return {"name": ascii(node.name)[1:-1], "url": ascii(node.peer_url)[1:-1]}


#: the most rows of dead nodes that are removed at a time
REAP = 500
#: so many heartbeats after one that failed it is not known any more that the registry is away
KNOWN_AWAY = 3


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
        info: NodeInfo,
        clock: IReactorTime,
        *,
        lease: float,
        heartbeat: float,
        metrics: Metrics,
        load: Callable[[], tuple[str, int]],
        reclaim: Callable[[], Deferred[None]],
        beaten: Callable[[], object] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._info = info
        self._clock = clock
        self._lease = lease
        self._heartbeat = heartbeat
        self._metrics = metrics
        self._load = load
        self._reclaim = reclaim
        self._told = beaten
        self._monotonic = monotonic
        #: by the monotonic clock, before the statement was sent: the last heartbeat, and the first without a gap since
        self._renewed: float | None = None
        self._steady_since = 0.0
        self._timer: IDelayedCall | None = None
        self._beating: Deferred[None] | None = None
        self._reclaim_due = False
        self._reclaiming = False
        self._reaping = False
        self._failed_since: float | None = None
        self._failed_at = -math.inf
        self._lost = False
        self._stopped = False

    def start(self) -> Deferred[None]:
        """Join, and heartbeat from then on. Fails with ``RegistryUnavailable``; then nothing was started."""
        return Deferred.fromCoroutine(self._start())

    async def _start(self) -> None:
        sent = self._monotonic()
        await self._registry.join(self._info)
        self._renewed = self._steady_since = sent
        if self._stopped:
            await self._leave()
        else:
            self._wait(sent)

    def beat(self) -> Deferred[None]:
        """Heartbeat now, so that the registry has this node's state as it is. Does not fail; a heartbeat that is under
        way is waited for first, since it may have the old state."""
        return Deferred.fromCoroutine(self._beat_now())

    async def _beat_now(self) -> None:
        if self._beating is not None:
            await self._beating
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
            self._beat()
            assert self._beating is not None
            await self._beating

    def stop(self) -> Deferred[None]:
        """Stop heartbeating, and leave. Does not fail: rows that could not be removed count only for one more lease."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self._stopped = True
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        if self._beating is not None:
            await self._beating
        if self._renewed is not None:
            await self._leave()

    async def _leave(self) -> None:
        self._renewed = None
        try:
            await self._registry.leave()
        except RegistryUnavailable as e:
            self._log.warn("could not leave the registry, which will forget this node by itself: {error}", error=e)

    def has_lease(self) -> bool:
        """Whether this node's lease holds, by its own clock."""
        return self._renewed is not None and self._monotonic() - self._renewed < self._lease

    def steady(self) -> bool:
        """Whether this node may judge others dead: it has heartbeaten without a gap for one full lease."""
        return self.has_lease() and self._failed_since is None and self._monotonic() - self._steady_since >= self._lease

    def doubtful(self) -> bool:
        """Whether clients that are here may be elsewhere by now, as after this process was stopped, or until all are
        claimed again; while the registry is known to be away, nobody can tell, and it is not."""
        if self.has_lease() and not self._reclaim_due and not self._reclaiming:
            return False
        return self._monotonic() - self._failed_at > KNOWN_AWAY * self._heartbeat

    def _wait(self, began: float) -> None:
        """Heartbeat next when one interval has passed since the last one began."""
        if not self._stopped:
            pause = max(0.0, began + self._heartbeat - self._monotonic())
            self._timer = self._clock.callLater(min(pause, self._heartbeat), self._beat)

    def _beat(self) -> None:
        sent = self._monotonic()
        beating: Deferred[bool] = maybeDeferred(lambda: self._registry.heartbeat(*self._load()))
        answered = beating.addCallbacks(self._beaten, self._missed, callbackArgs=(sent,))
        self._beating = answered.addCallback(lambda _: self._wait(sent))

    def _beaten(self, held: bool, sent: float) -> None:
        if self._failed_since is not None:
            away = self._monotonic() - self._failed_since
            self._log.info("the registry answers again, after {away:.1f} s", away=away)
        assert self._renewed is not None
        if self._failed_since is not None or not held or sent - self._renewed >= self._lease:
            self._steady_since = sent
        self._failed_since = None
        self._failed_at = -math.inf
        self._lost = False
        self._renewed = sent
        if self._stopped:
            return
        self._told()
        if not held:
            self._log.warn("this node's lease had run out: every client here is claimed again")
            self._reclaim_due = True
        if self._reclaim_due and not self._reclaiming:
            self._claim_again()
        if self.steady() and not self._reaping:
            self._reaping = True
            Deferred.fromCoroutine(self._reap()).addErrback(self._unexpected, "reaping")

    def _missed(self, failure: Failure) -> None:
        self._metrics.heartbeat_failures += 1
        problem = failure.getErrorMessage()
        if not isinstance(failure.value, RegistryUnavailable):
            self._unexpected(failure, "a heartbeat")
        self._failed_at = self._monotonic()
        if self._failed_since is None:
            self._failed_since = self._failed_at
            self._log.warn("the registry does not answer: {problem}", problem=problem)
        if not self._lost and not self.has_lease():
            self._lost = True
            self._log.error("this node's lease ran out: it takes no clients until the registry answers")

    def _claim_again(self) -> None:
        self._reclaim_due = False
        self._reclaiming = True

        def failed(failure: Failure) -> None:
            self._reclaim_due = True
            if not isinstance(failure.value, RegistryUnavailable):
                self._unexpected(failure, "claiming again")

        def done(_: object) -> None:
            self._reclaiming = False

        maybeDeferred(self._reclaim).addErrback(failed).addCallback(done)

    async def _reap(self) -> None:
        """Remove the rows of dead nodes, a few at a time."""
        try:
            while self.steady() and await self._registry.reap(REAP) == REAP:
                pass
        except RegistryUnavailable:
            pass  # counted and logged by the registry; tried again after the next heartbeat
        finally:
            self._reaping = False

    def _unexpected(self, failure: Failure, what: str) -> None:
        self._log.failure("error in {what}", failure, what=what)
