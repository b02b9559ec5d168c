"""Register this node under the DNS name of its fleet, and remove the records of dead nodes.

    ready                        announce(this node)
    lease expired and renewed    announce(this node) again: other nodes may have withdrawn it
    drain                        withdraw(this node)
    other nodes down             withdraw(those nodes)            by the live node with the lowest node_id,
                                                                  30 s later by the next one
    every 5 minutes              announced(), then read the live nodes, then
                                 withdraw(nodes not live)         by the same two nodes
                                 announce(this node)              if its record is missing or wrong

A node joins the registry before it announces itself. So a node that was announced before the live nodes were read, and
is not among them, is dead.

Failed requests are retried with backoff for as long as the name service is unavailable. Nothing here fails.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import Interface

from gateway.cloud.errors import NameServiceError
from gateway.metrics import Metrics
from gateway.util.backoff import Backoff
from gateway.util.deferred import Observers


class INameService(Interface):
    """The records of one DNS name: one for each node that accepts clients.

    Each method tries once, within some seconds, in a thread if the request blocks. All operations are idempotent.
    Every Deferred fails only with :class:`NameServiceError`; the state of the records is then unknown. Records that
    were not made by a node are never changed.
    """

    def announce(node_id: str, address: str) -> Deferred[None]:
        """Add the record of a node. ``address`` is IPv4 or IPv6, and always the same for one node."""

    def withdraw(node_ids: frozenset[str]) -> Deferred[frozenset[str]]:
        """Remove the records of nodes, except an address that another announced node shares.

        Fires with the nodes that had a record.
        """

    def announced() -> Deferred[dict[str, str]]:
        """Return node_id -> address for all nodes with a record.

        The address is empty if the name does not resolve to it.
        """

    def close() -> Deferred[None]:
        """Wait for requests in flight, then release threads and connections. The service is not used afterwards."""


#: seconds; the backoff after a failure doubles from the first to the second
INITIAL_BACKOFF = 1.0
MAX_BACKOFF = 60.0
#: seconds; the same when the service throttles
INITIAL_THROTTLED_BACKOFF = 4.0
MAX_THROTTLED_BACKOFF = 300.0


class RetryingTask:
    """Run a coroutine when it is due, one run at a time, and retry it with backoff and jitter until it succeeds.

    ``work`` does everything that is due. ``description`` is for log lines; ``uniform`` is :func:`random.uniform`.
    """

    _log = Logger()

    def __init__(
        self,
        description: str,
        work: Callable[[], Coroutine[Deferred[Any], Any, None]],
        clock: IReactorTime,
        metrics: Metrics,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._description = description
        self._work = work
        self._clock = clock
        self._metrics = metrics
        self._uniform = uniform
        self._due_at = math.inf
        self._backoff_until = -math.inf
        self._timer: IDelayedCall | None = None
        #: observers of the end of the current run, if there is one, and of the next run
        self._running: Observers[None] | None = None
        self._waiters: Observers[None] = Observers()
        #: whether run_now() was called since the last run began
        self._run_requested = False
        self._backoff = Backoff(INITIAL_BACKOFF, MAX_BACKOFF)
        self._failing_since = 0.0
        self._problem = ""
        self._stopped = False

    def run_within(self, seconds: float) -> None:
        """Run within ``seconds``, but not before the backoff after a failure has passed."""
        self._due_at = min(self._due_at, self._clock.seconds() + seconds)
        self._schedule()

    def run_now(self) -> Deferred[None]:
        """Run now, even during a backoff, or as soon as the current run ends.

        Fires when that run has succeeded or failed; never fails.
        """
        if self._stopped:
            return succeed(None)
        waiter = self._waiters.observe()
        self._run_requested = True
        self._backoff_until = -math.inf
        self.run_within(0)
        return waiter

    def stop(self) -> Deferred[None]:
        """Start no more runs. Fires when the current run has ended."""
        self._stopped = True
        self._schedule()
        return succeed(None) if self._running is None else self._running.observe()

    def _schedule(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        if self._stopped:
            self._waiters.callback(None)
        elif self._running is None and self._due_at < math.inf:
            delay = max(self._due_at, self._backoff_until) - self._clock.seconds()
            self._timer = self._clock.callLater(max(0.0, delay), self._run)

    def _run(self) -> None:
        self._running, self._waiters = self._waiters, Observers()
        self._run_requested = False
        self._due_at = math.inf
        run = Deferred.fromCoroutine(self._work()).addCallbacks(self._succeeded, self._failed)
        run.addErrback(lambda failure: self._log.failure("error in a retrying task", failure))
        run.addCallback(self._run_finished)

    def _run_finished(self, _: object) -> None:
        running, self._running = self._running, None
        self._schedule()
        assert running is not None
        running.callback(None)

    def _succeeded(self, _: object) -> None:
        if self._backoff.failures:
            outage = self._clock.seconds() - self._failing_since
            self._log.info("{what} works again, after {outage:.0f} s", what=self._description, outage=outage)
        self._backoff.reset()
        self._problem = ""

    def _failed(self, failure: Failure) -> None:
        error = failure.value
        throttled = isinstance(error, NameServiceError) and error.throttled
        permanent = isinstance(error, NameServiceError) and error.permanent
        now = self._clock.seconds()
        if not self._backoff.failures:
            self._failing_since = now
        self._metrics.dns_failures += 1
        self._backoff.initial, self._backoff.maximum = (
            (INITIAL_THROTTLED_BACKOFF, MAX_THROTTLED_BACKOFF) if throttled else (INITIAL_BACKOFF, MAX_BACKOFF)
        )
        # Jitter, of the maximum too: the nodes of a fleet do not retry at the same moment.
        delay = self._backoff.next_delay(at_maximum=permanent) * self._uniform(0.5, 1.0)
        # A run_now() that came during this run is served at once, but only once.
        self._backoff_until = now + delay if not self._run_requested else -math.inf
        self._due_at = min(self._due_at, now + delay)
        problem = str(error) or type(error).__name__
        if problem != self._problem:
            self._problem = problem
            if not isinstance(error, NameServiceError):
                self._log.failure("error in {what}", failure, what=self._description)
            elif permanent:
                self._log.error("{what} fails: {problem}", what=self._description, problem=problem)
            else:
                self._log.warn("{what} fails, and is retried: {problem}", what=self._description, problem=problem)


#: seconds between two checks of the records, plus or minus a quarter
CHECK_INTERVAL = 300.0
#: live nodes, those with the lowest ids, that withdraw the records of dead nodes
CLEANERS = 2
#: seconds; nodes that die within this time are withdrawn together
CLEANUP_DELAY = 1.0
#: seconds by which each following cleaner waits longer
CLEANER_STAGGER = 30.0
#: dead nodes that are remembered; any others are found by the next check
MAX_DEAD_NODES = 1000
#: node ids in a log line
MAX_LOGGED_NODES = 10


class RecordState(enum.Enum):
    """What this node knows of its own DNS record.

    UNKNOWN holds from a request until its success, after a failure, and when the record may have been withdrawn by
    another node.
    """

    ABSENT = enum.auto()
    UNKNOWN = enum.auto()
    PRESENT = enum.auto()


class DnsRegistrar:
    """Keep the DNS record of this node, and remove the records of dead nodes.

    ``address()`` fires with the address of this node's record, always the same once known, or fails with
    ``NameServiceError``. ``live_nodes()`` returns the last known ids of the live nodes, this one included.
    ``refresh_live_nodes()`` reads them from the registry; it fires with ``None`` while this node may not declare others
    dead, and never fails. ``lease`` is in seconds. ``name`` is for log lines; ``uniform`` is :func:`random.uniform`.
    """

    _log = Logger()

    def __init__(
        self,
        service: INameService,
        node_id: str,
        clock: IReactorTime,
        *,
        name: str,
        address: Callable[[], Deferred[str]],
        live_nodes: Callable[[], list[str]],
        refresh_live_nodes: Callable[[], Deferred[list[str] | None]],
        lease: float,
        metrics: Metrics,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._service = service
        self._node_id = node_id
        self._clock = clock
        self._name = name
        self._find_address = address
        self._address = ""
        self._live_nodes = live_nodes
        self._refresh_live_nodes = refresh_live_nodes
        self._lease = lease
        self._uniform = uniform
        self._should_be_announced = False
        self._record = RecordState.ABSENT
        #: incremented when the record may have been withdrawn by another node
        self._doubt_count = 0
        #: node_id of a dead node -> when its death was noticed
        self._dead_since: dict[str, float] = {}
        self._next_check_at = 0.0
        self._own_task = RetryingTask(
            f"DNS: {name}: announcing or withdrawing this node", self._sync_own_record, clock, metrics, uniform
        )
        self._cleanup_task = RetryingTask(
            f"DNS: {name}: cleaning up the records of other nodes", self._maintain, clock, metrics, uniform
        )

    @property
    def name(self) -> str:
        """The DNS name of the fleet."""
        return self._name

    def start(self) -> None:
        """Announce this node, in the background."""
        self._should_be_announced = True
        self._schedule_check()
        self._own_task.run_within(0)

    def reannounce(self) -> None:
        """Announce this node again, if it was: its lease had expired, and other nodes may have withdrawn it."""
        if self._should_be_announced:
            self._doubt_announcement()
            self._schedule_check()

    def withdraw(self) -> Deferred[None]:
        """Withdraw this node.

        Fires after the first attempt, successful or not; never fails. A failed withdrawal is retried until
        :meth:`stop`.
        """
        self._should_be_announced = False
        if self._record is RecordState.ABSENT:
            return succeed(None)
        return self._own_task.run_now()

    def node_down(self, node_id: str) -> None:
        """Withdraw the record of another node, which left or whose lease expired."""
        if len(self._dead_since) < MAX_DEAD_NODES:
            self._dead_since[node_id] = self._clock.seconds()
            self._cleanup_task.run_within(CLEANUP_DELAY)
        if self._should_be_announced and self._rank(self._live_nodes()) < CLEANERS:
            # This node may have become a cleaner just now: the dead node would have done the next check.
            self._next_check_at = min(
                self._next_check_at, self._clock.seconds() + self._lease * self._uniform(1.1, 2.0)
            )

    def announced(self) -> bool:
        """Whether this node's record is known to be present."""
        return self._record is RecordState.PRESENT

    def stop(self) -> Deferred[None]:
        """Stop all background work. Fires when no request is in flight."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        own, cleanup = self._own_task.stop(), self._cleanup_task.stop()
        await own
        await cleanup
        await self._service.close()

    def _rank(self, live_nodes: list[str]) -> int:
        """Return how many live nodes have a lower id than this one."""
        return sum(node_id < self._node_id for node_id in live_nodes)

    def _doubt_announcement(self) -> None:
        self._record = RecordState.UNKNOWN
        self._doubt_count += 1
        self._own_task.run_within(0)

    def _wanted_record(self) -> RecordState:
        return RecordState.PRESENT if self._should_be_announced else RecordState.ABSENT

    async def _sync_own_record(self) -> None:
        """Announce or withdraw this node, until its record is as wanted; what is wanted may change during a request."""
        while self._record is not self._wanted_record():
            if self._should_be_announced:
                await self._announce()
            else:
                self._record = RecordState.UNKNOWN
                withdrawn = await self._service.withdraw(frozenset([self._node_id]))
                self._record = RecordState.ABSENT
                if withdrawn:
                    self._log.info("DNS: {name} no longer resolves to this node", name=self._name)

    async def _announce(self) -> None:
        if not self._address:
            self._address = await self._find_address()
            if not self._should_be_announced:
                return
        doubts = self._doubt_count
        self._record = RecordState.UNKNOWN
        await self._service.announce(self._node_id, self._address)
        if doubts == self._doubt_count:
            self._record = RecordState.PRESENT
            self._log.info("DNS: {name} resolves to this node, {address}", name=self._name, address=self._address)

    async def _maintain(self) -> None:
        """Remove dead nodes and check the records, if due; schedule the next run."""
        await self._remove_dead()
        if self._clock.seconds() >= self._next_check_at:
            await self._check_records()
        due = min([self._next_check_at, *(seen + self._cleanup_delay() for seen in self._dead_since.values())])
        self._cleanup_task.run_within(max(0.0, due - self._clock.seconds()))

    def _cleanup_delay(self) -> float:
        """Return the seconds from the death of a node to its removal by this node.

        Computed anew each time: the nodes ranked before this one may die as well.
        """
        rank = self._rank(self._live_nodes())
        return CLEANUP_DELAY + rank * CLEANER_STAGGER if rank < CLEANERS else CHECK_INTERVAL

    async def _remove_dead(self) -> None:
        """Withdraw dead nodes, or forget them if this node is not a cleaner."""
        soon, delay = self._clock.seconds() + CLEANUP_DELAY, self._cleanup_delay()
        due = {node_id for node_id, seen in self._dead_since.items() if seen + delay <= soon}
        if delay == CHECK_INTERVAL:
            self._dead_since = {node_id: seen for node_id, seen in self._dead_since.items() if node_id not in due}
            return
        # A node that is live again has announced itself again.
        revived = due.intersection(self._live_nodes())
        for node_id in revived:
            self._dead_since.pop(node_id, None)
        if due - revived:
            await self._withdraw_dead(due - revived)

    async def _withdraw_dead(self, node_ids: set[str]) -> None:
        withdrawn = await self._service.withdraw(frozenset(node_ids))
        for node_id in node_ids:
            self._dead_since.pop(node_id, None)
        if not withdrawn:
            return
        shown = ", ".join(sorted(withdrawn)[:MAX_LOGGED_NODES])
        if len(withdrawn) > MAX_LOGGED_NODES:
            shown += f" and {len(withdrawn) - MAX_LOGGED_NODES} more"
        self._log.info("DNS: {name} no longer resolves to dead nodes: {nodes}", name=self._name, nodes=shown)

    def _schedule_check(self) -> None:
        """Schedule a check for when this node may declare others dead, which takes a lease; later if not a cleaner."""
        delay = self._lease * self._uniform(1.1, 2.0)
        if self._rank(self._live_nodes()) >= CLEANERS:
            delay += self._uniform(0.0, CHECK_INTERVAL / 2)
        self._next_check_at = self._clock.seconds() + delay
        self._cleanup_task.run_within(delay)

    async def _check_records(self) -> None:
        """Announce this node again if its record is missing or wrong; withdraw announced nodes that are not live."""
        was_announced = self.announced()
        announced = await self._service.announced()
        live = await self._refresh_live_nodes()
        if live is None:
            self._schedule_check()
            return
        # The response lacks a record that was announced after the request.
        is_announced = was_announced and self.announced()
        if is_announced and self._node_id in live and announced.get(self._node_id) != self._address:
            self._log.warn("DNS: the record of this node at {name} is missing: announcing it again", name=self._name)
            self._doubt_announcement()
        dead = announced.keys() - {*live, self._node_id}
        if dead and self._rank(live) < CLEANERS:
            await self._withdraw_dead(dead)
        self._next_check_at = self._clock.seconds() + CHECK_INTERVAL * self._uniform(0.75, 1.25)
