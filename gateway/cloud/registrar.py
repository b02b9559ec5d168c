"""The seam between a node and the cloud that it runs in.

Work for a name service that is done again until it succeeds, with pauses that grow.

This node under the DNS name of its fleet, and the records of nodes that are gone.

    ready                        announce(this node)
    the lease had run out        announce(this node) again: others may have withdrawn it meanwhile
    drain                        withdraw(this node)
    another node is gone         withdraw(all that went at that moment)      by the live node with the lowest node_id,
                                                                             and a while later by the next one
    every few minutes            announced(); then the live nodes are read anew; then
                                 withdraw(who is not live)                   by the same two
                                 announce(this node), if it is not there

A node joins the registry before it announces itself: who was announced before the live nodes were read, and is not one
of them, is gone.

DNS may be away for as long as it likes: what is to be done is done when it is back. Nothing here fails.
"""

from __future__ import annotations

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


class INameService(Interface):
    """The records of one DNS name, one for each node that takes clients.

    Each method does its whole work once, in a thread where it would block, within some seconds, and without trying
    again; every Deferred fails with :class:`NameServiceError` alone, and then nothing is known of what was done. Doing
    again what is done already is no error. Records that no node has made are left alone.
    """

    def announce(node_id: str, address: str) -> Deferred[None]:
        """Have the name lead to a node as well, at that IPv4 or IPv6 address: always the same for one node."""

    def withdraw(node_ids: frozenset[str]) -> Deferred[frozenset[str]]:
        """Have the name not lead to these nodes any more. An address that another announced node has, too, stays. Fires
        with those of them that had a record."""

    def announced() -> Deferred[dict[str, str]]:
        """The nodes of which there is a record: node_id -> address, or an empty text for one whose address the name
        does not lead to."""

    def close() -> Deferred[None]:
        """Wait for what is under way, and let go of threads and connections. Nothing is asked of it after that."""


#: seconds: the first pause after a failure, and the longest; each is twice the one before
INITIAL_BACKOFF, MAX_BACKOFF = 1.0, 60.0
#: the same for a service that asks to be asked less often
INITIAL_THROTTLED_BACKOFF, MAX_THROTTLED_BACKOFF = 4.0, 300.0


class RetryingTask:
    """One kind of work, of which one piece is under way at a time.

    ``work`` does all that is due; ``what`` says in log lines what fails. ``uniform`` is that of :mod:`random`.
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
        #: not before this, after a failure
        self._backoff_until = -math.inf
        self._timer: IDelayedCall | None = None
        self._running: Deferred[None] | None = None
        #: of those who wait for the end of the next piece of work
        self._waiters: list[Deferred[None]] = []
        self._failures = 0
        self._failing_since = 0.0
        self._problem = ""
        self._stopped = False

    def run_within(self, seconds: float) -> None:
        """Have it done in so many seconds, or before; but not before the pause after a failure is over."""
        self._due_at = min(self._due_at, self._clock.seconds() + seconds)
        self._schedule()

    def run_now(self) -> Deferred[None]:
        """Have it done at once, even in a pause, or as soon as what is under way is over; fires when it is done or has
        failed, and does not fail."""
        waiter: Deferred[None] = Deferred()
        if self._stopped:
            waiter.callback(None)
            return waiter
        self._waiters.append(waiter)
        self._backoff_until = -math.inf
        self.run_within(0)
        return waiter

    def stop(self) -> Deferred[None]:
        """Begin nothing more; fires when what is under way is over."""
        self._stopped = True
        self._schedule()
        over: Deferred[None] = Deferred()
        if self._running is None:
            over.callback(None)
        else:
            self._running.addCallback(lambda _: over.callback(None))
        return over

    def _schedule(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        if self._stopped:
            self._fire_waiters(self._waiters)
        elif self._running is None and self._due_at < math.inf:
            pause = max(self._due_at, self._backoff_until) - self._clock.seconds()
            self._timer = self._clock.callLater(max(0.0, pause), self._run)

    def _run(self) -> None:
        waiters, self._waiters = self._waiters, []
        self._due_at = math.inf
        self._running = Deferred()
        working = Deferred.fromCoroutine(self._work()).addCallbacks(self._succeeded, self._failed)
        working.addErrback(lambda failure: self._log.failure("error in a chore", failure))
        working.addCallback(self._run_finished, waiters)

    def _run_finished(self, _: object, waiters: list[Deferred[None]]) -> None:
        running, self._running = self._running, None
        self._schedule()
        self._fire_waiters(waiters)
        assert running is not None
        running.callback(None)

    def _fire_waiters(self, waiters: list[Deferred[None]]) -> None:
        while waiters:
            waiters.pop().callback(None)

    def _succeeded(self, _: object) -> None:
        if self._failures:
            away = self._clock.seconds() - self._failing_since
            self._log.info("{what} works again, after {away:.0f} s", what=self._description, away=away)
        self._failures = 0
        self._problem = ""

    def _failed(self, failure: Failure) -> None:
        error = failure.value
        throttled = isinstance(error, NameServiceError) and error.throttled
        hopeless = isinstance(error, NameServiceError) and error.permanent
        now = self._clock.seconds()
        if not self._failures:
            self._failing_since = now
        self._metrics.dns_failures += 1
        self._failures += 1
        first, longest = (
            (INITIAL_THROTTLED_BACKOFF, MAX_THROTTLED_BACKOFF) if throttled else (INITIAL_BACKOFF, MAX_BACKOFF)
        )
        pause = longest if hopeless else min(longest, first * 2.0 ** min(self._failures - 1, 16))
        # Not all nodes of a fleet at the same moment.
        pause *= self._uniform(0.5, 1.0)
        # Whoever wants it now gets one try at once, and not each.
        self._backoff_until = now + pause if not self._waiters else -math.inf
        self._due_at = min(self._due_at, now + pause)
        problem = str(error) or type(error).__name__
        if problem != self._problem:
            self._problem = problem
            if not isinstance(error, NameServiceError):
                self._log.failure("error in {what}", failure, what=self._description)
            elif hopeless:
                self._log.error("{what} fails: {problem}", what=self._description, problem=problem)
            else:
                self._log.warn("{what} fails, and is tried again: {problem}", what=self._description, problem=problem)


#: seconds between two looks at who is announced, give or take a quarter
CHECK_INTERVAL = 300.0
#: so many live nodes, those with the lowest ids, withdraw the records of others
CLEANERS = 2
#: seconds: nodes that go within this time are withdrawn together; and how much later each next judge does it
CLEANUP_DELAY, CLEANER_STAGGER = 1.0, 30.0
#: the most nodes that are known to be gone; the others are found by the next look
MAX_DEAD_NODES = 1000
#: so many of them stand in a log line
MAX_LOGGED_NODES = 10


class DnsRegistrar:
    """What a node does about DNS.

    ``address`` gives where the name is to lead to for this node, always the same once it is known, and fails with
    ``NameServiceError``. ``live`` gives the ids of the live nodes as they were last seen, this one among them; ``look``
    reads them anew from the registry, and fires with ``None`` while this node may not judge others dead; neither fails.
    ``lease`` is in seconds. ``name`` is for log lines, ``uniform`` that of :mod:`random`.
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
        #: whether this node is to be announced, and whether it is: ``None`` where nobody knows
        self._should_be_announced = False
        self._is_announced: bool | None = False
        #: how often it was doubted that this node is still announced
        self._doubt_count = 0
        #: node_id of each that is gone -> when that was seen
        self._dead_since: dict[str, float] = {}
        self._next_check_at = 0.0
        self._own_task = RetryingTask(
            f"DNS: {name}, announcing this node or withdrawing it,", self._sync_own_record, clock, metrics, uniform
        )
        self._cleanup_task = RetryingTask(
            f"DNS: {name}, looking after the others' records,", self._maintain, clock, metrics, uniform
        )

    def start(self) -> None:
        """Announce this node, in the background."""
        self._should_be_announced = True
        self._schedule_check()
        self._own_task.run_within(0)

    def reannounce(self) -> None:
        """Announce this node once more, if it was: its lease had run out, and others may have withdrawn it."""
        if self._should_be_announced:
            self._doubt_announcement()
            self._schedule_check()

    def withdraw(self) -> Deferred[None]:
        """Withdraw this node. Fires when that is done, or has failed once, and does not fail; until :meth:`stop` it is
        tried again then."""
        self._should_be_announced = False
        if self._is_announced is False:
            return succeed(None)
        return self._own_task.run_now()

    def node_down(self, node_id: str) -> None:
        """Another node ended, or its lease ran out: have its record withdrawn."""
        if len(self._dead_since) < MAX_DEAD_NODES:
            self._dead_since[node_id] = self._clock.seconds()
            self._cleanup_task.run_within(CLEANUP_DELAY)
        if self._should_be_announced and self._rank(self._live_nodes()) < CLEANERS:
            # It may judge only since that one is gone, which would have looked before.
            self._next_check_at = min(
                self._next_check_at, self._clock.seconds() + self._lease * self._uniform(1.1, 2.0)
            )

    def announced(self) -> bool:
        """Whether this node's record is known to be there."""
        return self._is_announced is True

    def stop(self) -> Deferred[None]:
        """End what is tried in the background; fires when nothing is under way any more."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        own, others = self._own_task.stop(), self._cleanup_task.stop()
        await own
        await others
        await self._service.close()

    def _rank(self, live_nodes: list[str]) -> int:
        """How many live nodes come before this one."""
        return sum(node_id < self._node_id for node_id in live_nodes)

    def _doubt_announcement(self) -> None:
        self._is_announced = None
        self._doubt_count += 1
        self._own_task.run_within(0)

    async def _sync_own_record(self) -> None:
        """Make this node's record what it should be: also what it should be by the time that the service answers."""
        while self._is_announced is not self._should_be_announced:
            if self._should_be_announced:
                await self._announce()
            else:
                self._is_announced = None
                withdrawn = await self._service.withdraw(frozenset([self._node_id]))
                self._is_announced = False
                if withdrawn:
                    self._log.info("DNS: {name} leads no more to this node", name=self._name)

    async def _announce(self) -> None:
        if not self._address:
            self._address = await self._find_address()
            if not self._should_be_announced:
                return
        doubts = self._doubt_count
        self._is_announced = None
        await self._service.announce(self._node_id, self._address)
        if doubts == self._doubt_count:
            self._is_announced = True
            self._log.info("DNS: {name} leads to this node, at {address}", name=self._name, address=self._address)

    async def _maintain(self) -> None:
        """Do what is due about the records of others."""
        await self._remove_dead()
        if self._clock.seconds() >= self._next_check_at:
            await self._check_records()
        due = min([self._next_check_at, *(seen + self._cleanup_delay() for seen in self._dead_since.values())])
        self._cleanup_task.run_within(max(0.0, due - self._clock.seconds()))

    def _cleanup_delay(self) -> float:
        """How long after a node was seen to be gone this one does something about it. Judged anew each time: whoever
        would have been before this one may be gone next."""
        rank = self._rank(self._live_nodes())
        return CLEANUP_DELAY + rank * CLEANER_STAGGER if rank < CLEANERS else CHECK_INTERVAL

    async def _remove_dead(self) -> None:
        """Withdraw the nodes that are gone, or forget them, where others have done that long ago."""
        soon, patience = self._clock.seconds() + CLEANUP_DELAY, self._cleanup_delay()
        due = {node_id for node_id, seen in self._dead_since.items() if seen + patience <= soon}
        if patience == CHECK_INTERVAL:
            self._dead_since = {node_id: seen for node_id, seen in self._dead_since.items() if node_id not in due}
            return
        # Who has come back meanwhile has announced itself again.
        back = due.intersection(self._live_nodes())
        for node_id in back:
            self._dead_since.pop(node_id, None)
        if due - back:
            await self._withdraw_dead(due - back)

    async def _withdraw_dead(self, node_ids: set[str]) -> None:
        withdrawn = await self._service.withdraw(frozenset(node_ids))
        for node_id in node_ids:
            self._dead_since.pop(node_id, None)
        if not withdrawn:
            return
        shown = ", ".join(sorted(withdrawn)[:MAX_LOGGED_NODES])
        if len(withdrawn) > MAX_LOGGED_NODES:
            shown += f" and {len(withdrawn) - MAX_LOGGED_NODES} more"
        self._log.info("DNS: {name} leads no more to nodes that are gone: {nodes}", name=self._name, nodes=shown)

    def _schedule_check(self) -> None:
        """Look as soon as this node may judge others, which takes it a lease; who will judge nobody, a while later."""
        pause = self._lease * self._uniform(1.1, 2.0)
        if self._rank(self._live_nodes()) >= CLEANERS:
            pause += self._uniform(0.0, CHECK_INTERVAL / 2)
        self._next_check_at = self._clock.seconds() + pause
        self._cleanup_task.run_within(pause)

    async def _check_records(self) -> None:
        """Look whether this node is announced still, and whether somebody is who is not live."""
        was_there = self._is_announced
        announced = await self._service.announced()
        live = await self._refresh_live_nodes()
        if live is None:
            self._schedule_check()
            return
        # Who has announced itself since it was asked is not in its answer.
        if was_there and self._is_announced and self._node_id in live and announced.get(self._node_id) != self._address:
            self._log.warn("DNS: {name} should lead to this node, and does not: it is announced again", name=self._name)
            self._doubt_announcement()
        dead = announced.keys() - {*live, self._node_id}
        if dead and self._rank(live) < CLEANERS:
            await self._withdraw_dead(dead)
        self._next_check_at = self._clock.seconds() + CHECK_INTERVAL * self._uniform(0.75, 1.25)
