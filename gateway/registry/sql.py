"""The registry in an SQL database, over ``twisted.enterprise.adbapi``.

    claim, reclaim, release -> WriteBatcher  -> JobQueue -> SingleConnectionPool -> adbapi -> Statements, in a thread
    find, assignment        -> LookupBatcher -> JobQueue -> …
    everything else                          -> JobQueue -> …

A database has one job queue for everything, or several, each with its own connection.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import attrs
from twisted.enterprise import adbapi
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.registry.batching import LookupBatcher, SubmitBatch, WriteBatcher
from gateway.registry.clock import DatabaseClock
from gateway.registry.dialect import Dialect
from gateway.registry.division import BatchLimit, run_divided
from gateway.registry.errors import LeaseLostError, RegistryRefusedError, RegistryUnavailableError
from gateway.registry.generations import GenerationFloor
from gateway.registry.interface import (
    ALWAYS_TAKE_OVER,
    Assignment,
    Claim,
    ClaimPolicy,
    IRegistry,
    Location,
    NodeInfo,
    NodeStatus,
    OnClaimRevoked,
    SessionKey,
    ignore_claim_revoked,
)
from gateway.registry.job_queue import ErrorClassifier, JobQueue, Priority, SingleConnectionPool, Work, bind
from gateway.registry.statements import (
    CLIENT_ID_UPPER_BOUND,
    MAX_CLIENT_ID_LENGTH,
    MAX_DEAD_NODES,
    MAX_REMOVED_ROWS,
    HeartbeatResult,
    LocalNode,
    Statements,
)
from gateway.settings import ConfigError
from gateway.util.deferred import Observers

T = TypeVar("T")

#: seconds for which claims and releases are collected into a batch
BATCH_DELAY = 0.003
#: characters of an address
MAX_ADDRESS_LENGTH = 255


@attrs.define
class _ReapScan:
    """A scan of the table ``clients`` for rows of dead nodes."""

    #: number -> heartbeat_at
    dead_nodes: dict[int, int]
    #: client_id at which the scan continues
    first: str = ""


class Reaper:
    """Remove rows of dead nodes and expired assignments, in segments, so that no statement takes long.

    Each call continues where the last one has ended. Statements that the database refuses are repeated with fewer rows.
    ``run`` queues a named job, and fires with its result.
    """

    def __init__(
        self, run: Callable[[str, Work[Any]], Deferred[Any]], statements: Statements, metrics: Metrics
    ) -> None:
        self._run = run
        self._statements = statements
        self._metrics = metrics
        self._scan: _ReapScan | None = None
        #: client_id at which the scan of the assignments continues
        self._purge_from = ""
        #: rows that one statement removes
        self._limit = BatchLimit(MAX_REMOVED_ROWS)

    async def _run_limited(self, operation: str, maximum: int, function: Callable[..., Any], *args: object) -> Any:
        """Run ``function(connection, *args, limit)``, with a limit of up to ``maximum`` that the database accepts."""
        while True:
            limit = min(maximum, self._limit.value)
            try:
                result = await self._run(operation, bind(function, *args, limit))
            except RegistryRefusedError:
                self._limit.refused(limit)
                if limit == 1:
                    raise
            else:
                self._limit.accepted()
                return result

    async def reap(self, local_node: LocalNode | None, limit: int) -> int:
        """Remove up to ``limit`` client rows of dead nodes. Returns how many: fewer than ``limit`` if there are no
        more."""
        removed = 0
        scan = self._scan
        if scan is None:
            dead_nodes = await self._run_limited("reap", MAX_DEAD_NODES, self._statements.dead_nodes, local_node)
            if not dead_nodes:
                return 0
            scan = self._scan = _ReapScan(dead_nodes)
        while removed < limit:
            count, following = await self._run_limited(
                "reap", limit - removed, self._statements.reap, scan.dead_nodes, scan.first
            )
            removed += count
            self._metrics.reaped += count
            if following is None:
                self._scan = None
                break
            scan.first = following
        return removed

    async def purge_assignments(self) -> bool:
        """Remove expired assignments from one segment of the table. Returns whether that was the last one."""
        following: str | None = await self._run_limited(
            "tidy", MAX_REMOVED_ROWS, self._statements.purge_assignments, self._purge_from
        )
        self._purge_from = following or ""
        return following is None

    async def remove_own_clients(self, local_node: LocalNode) -> None:
        """Remove all client rows of this node, and its own row."""
        first: str | None = ""
        while first is not None:
            first = await self._run_limited(
                "leave", MAX_REMOVED_ROWS, self._statements.remove_own_clients, local_node, first
            )


class Database(Dialect, ErrorClassifier, Protocol):
    """A database: its connections, its statements, and its errors."""

    #: the priorities of each job queue
    queue_priorities: tuple[tuple[Priority, ...], ...]
    #: claims and releases in one batch
    max_batch_size: int
    #: seconds for which retryable errors are retried; ``None`` for the default of :class:`JobQueue`
    retry_timeout: float | None

    def make_pool(self, pool_factory: Callable[..., Any], reactor: Any) -> Any:
        """Make a pool of one connection, with ``adbapi.ConnectionPool`` or another callable of the same signature."""

    def to_config_error(self, error: BaseException) -> ConfigError:
        """Describe an error that occurred while the database was opened."""

    def check(self) -> None:
        """Open the database in this thread, bring its schema up to date, and close it. Raises ``ConfigError``."""


class RegistryState(enum.Enum):
    """Whether this node is registered. Independent of whether the registry is open."""

    NOT_JOINED = enum.auto()
    JOINED = enum.auto()
    #: :meth:`SQLRegistry.leave` was called; final
    LEFT = enum.auto()


#: asks the other nodes for the highest generation that each knows of; does not fail, and fires within a few seconds
CollectFloors = Callable[[], "Deferred[list[int]]"]


def no_floors() -> Deferred[list[int]]:
    """There are no other nodes, as a :data:`CollectFloors`."""
    return succeed([])


@implementer(IRegistry)
class SQLRegistry:
    """A registry in an SQL database.

    ``lease`` and ``batch_delay`` are in seconds. ``clock`` is monotonic (a reactor's clock may be set). ``make_pool``
    is ``adbapi.ConnectionPool``, or another callable of the same signature.
    """

    _log = Logger()

    job_queue_factory: Callable[..., JobQueue] = JobQueue

    def __init__(
        self,
        database: Database,
        *,
        lease: float,
        reactor: Any,
        metrics: Metrics,
        heartbeat: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        make_pool: Callable[..., Any] = adbapi.ConnectionPool,
        batch_delay: float = BATCH_DELAY,
        on_claim_revoked: OnClaimRevoked = ignore_claim_revoked,
        collect_floors: CollectFloors = no_floors,
    ) -> None:
        """``heartbeat``, in seconds, is how far the database's clock may move from this node's; by default a third of
        the lease. ``collect_floors`` asks the other nodes for the highest generations that they know of."""
        self._database = database
        self._lease = lease
        self._reactor = reactor
        self._metrics = metrics
        self._clock = clock
        self._make_pool = make_pool
        self._batch_delay = batch_delay
        self._on_claim_revoked = on_claim_revoked
        self._collect_floors = collect_floors
        self._database_clock = DatabaseClock(
            clock, lease=lease, heartbeat=lease / 3 if heartbeat is None else heartbeat
        )
        self._floor = GenerationFloor()
        #: claims that wait for the floors of other nodes; ``None``: they need not
        self._floors_collected: Observers[None] | None = None
        self._is_telling_floor = False
        self._statements = Statements(database, lease, self._database_clock, self._floor)
        self._pools: list[SingleConnectionPool] = []
        #: by priority; writes may have more, see below
        self._queues: dict[Priority, JobQueue] = {}
        self._write_queues: list[JobQueue] = []
        self._batcher: WriteBatcher | None = None
        self._location_lookups: LookupBatcher[Location] | None = None
        self._assignment_lookups: LookupBatcher[Assignment] | None = None
        self._local_node: LocalNode | None = None
        self._state = RegistryState.NOT_JOINED
        #: not empty if the lease was lost, and no heartbeat has reported that yet
        self._lease_lost: list[bool] = []
        #: by ``clock``; ``-inf`` if there is no lease
        self._renewed_at = -math.inf
        self._reaper = Reaper(partial(self._run_job, Priority.MAINTENANCE, divisible=True), self._statements, metrics)

    def open(self) -> Deferred[None]:
        """Connect and bring the schema up to date. Fails with ``ConfigError``."""
        return Deferred.fromCoroutine(self._open())

    async def _open(self) -> None:
        clock = cast(IReactorTime, self._reactor)
        for priorities in self._database.queue_priorities:
            pool = SingleConnectionPool(self._database, self._database.make_pool(self._make_pool, self._reactor))
            self._pools.append(pool)
            queue = self.job_queue_factory(clock, pool, self._metrics, self._database.retry_timeout)
            self._queues.update(dict.fromkeys(priorities, queue))
            if Priority.WRITES in priorities:
                self._write_queues.append(queue)
        reads = self._queues[Priority.READS]
        first, *others = [_batch_submitter(queue) for queue in self._write_queues]
        self._batcher = WriteBatcher(
            clock,
            first,
            lambda connection, batch, maybe_written: self._statements.write_batch(
                connection, self._require_joined(), batch, maybe_written
            ),
            self._metrics,
            self._batch_delay,
            self._database.max_batch_size,
            others,
            self._on_claim_revoked,
        )
        self._location_lookups = LookupBatcher(
            lambda make_work: reads.submit(Priority.READS, "find", make_work, divisible=True), self._statements.find
        )
        self._assignment_lookups = LookupBatcher(
            lambda make_work: reads.submit(Priority.READS, "placed", make_work, divisible=True),
            self._statements.assignments,
        )
        try:
            await self._queues[Priority.HEARTBEAT].submit(
                Priority.HEARTBEAT, "open", lambda: lambda connection: None, quiet=True
            )
        except RegistryUnavailableError as e:
            await self._close()
            raise (self._database.to_config_error(e.__cause__) if e.__cause__ else e) from None

    def check(self) -> None:
        """Check that the database can be used, before the reactor runs. Blocks. Raises ``ConfigError``."""
        self._database.check()

    def close(self) -> Deferred[None]:
        """Write what is queued if the database can be reached, then disconnect."""
        return Deferred.fromCoroutine(self._close())

    async def _close(self) -> None:
        if self._batcher is None:
            return
        await self._batcher.close()
        for queue in [*self._queues.values(), *self._write_queues]:
            await queue.close()
        pools, self._pools = self._pools, []
        self._queues, self._write_queues = {}, []
        self._batcher = self._location_lookups = self._assignment_lookups = None
        for pool in pools:
            pool.close()
        self._renewed_at = -math.inf

    def _run_job(self, priority: Priority, operation: str, work: Work[T], *, divisible: bool = False) -> Deferred[T]:
        if priority not in self._queues:
            return fail(RegistryUnavailableError("the registry is not open"))
        return cast(
            "Deferred[T]", self._queues[priority].submit(priority, operation, lambda: work, divisible=divisible)
        )

    def _require_joined(self) -> LocalNode:
        if self._local_node is None:
            raise RegistryUnavailableError("this node has not joined")
        return self._local_node

    def join(self, node: NodeInfo) -> Deferred[None]:
        """Insert this node's row, in state ``up``. Counts as its first heartbeat."""
        info = attrs.evolve(node, name=_replace_surrogates(node.name))

        def work(connection: Any) -> tuple[HeartbeatResult, LocalNode]:
            local_node = self._statements.join(connection, info)
            return HeartbeatResult(True, False, local_node.heartbeat_at), local_node

        return self._renew_lease("join", work).addCallback(_discard_result)

    def heartbeat(self, state: str, clients: int) -> Deferred[bool]:
        """Renew this node's lease, ahead of all queued work.

        Fires with ``False`` if the lease had expired, or if the row was gone and was inserted again: other nodes may
        have claimed this node's clients, or removed their rows, so every connected client must be reclaimed.
        """
        if self._state is not RegistryState.JOINED:
            return fail(RegistryUnavailableError("this node has not joined, or has left"))
        return self._renew_lease(
            "heartbeat",
            lambda connection: self._statements.heartbeat(
                connection, self._require_joined(), state, clients, self._lease_lost
            ),
        )

    def _renew_lease(self, operation: str, work: Work[tuple[HeartbeatResult, LocalNode]]) -> Deferred[bool]:
        if Priority.HEARTBEAT not in self._queues:
            return fail(RegistryUnavailableError("the registry is not open"))
        sent_at = 0.0

        def make_work() -> Work[tuple[HeartbeatResult, LocalNode]]:
            nonlocal sent_at
            sent_at = self._clock()
            return work

        def renewed(result: tuple[HeartbeatResult, LocalNode] | None) -> bool:
            assert result is not None
            (lease_held, lost_commits, now), self._local_node = result
            self._observe_clock(now, sent_at)
            if lost_commits:
                self._wait_for_floors()
            self._renewed_at = sent_at
            if self._state is RegistryState.NOT_JOINED:
                self._state = RegistryState.JOINED
            # Reported now. Until then a lost lease is remembered, even if the heartbeat that found it out has failed.
            self._lease_lost.clear()
            if self._batcher is not None:
                self._batcher.retry_now()
            return lease_held

        return self._queues[Priority.HEARTBEAT].submit(Priority.HEARTBEAT, operation, make_work).addCallback(renewed)

    def _observe_clock(self, now: int, sent_at: float) -> None:
        step, horizon = self._database_clock.observe(now, sent_at)
        self._floor.raise_to(horizon)
        if step:
            text = "the database's clock was set by {step:+.1f} s: no node is considered dead for {lease:g} s"
            self._log.warn(text, step=step, lease=self._lease)

    def clock_is_steady(self) -> bool:
        """Whether the database's clock has moved as this node's own for one lease, as of the last heartbeat."""
        return self._database_clock.is_steady()

    @property
    def generation_floor(self) -> int:
        """The highest generation that this node knows of."""
        return self._floor.value

    def raise_generation_floor(self, generation: int) -> None:
        """Take note of a generation that another node knows of."""
        self._floor.raise_to(generation)

    def _wait_for_floors(self) -> None:
        """Claim nothing before the other nodes have told which generations they know of: the database, which has lost
        commits, may know less."""
        if self._floors_collected is not None:
            return
        self._floors_collected = Observers()
        self._collect_floors().addBoth(self._resume_claims)

    def _floors_received(self, floors: Iterable[int] | Failure) -> None:
        if isinstance(floors, Failure):
            self._log.failure("could not collect the generations of the other nodes", floors)
        else:
            for floor in floors:
                self._floor.raise_to(floor)

    def _resume_claims(self, floors: Iterable[int] | Failure) -> None:
        self._floors_received(floors)
        waiting, self._floors_collected = self._floors_collected, None
        if waiting is not None:
            waiting.callback(None)

    def has_lease(self) -> bool:
        """Whether this node's lease is valid by its own clock, counted from before its last heartbeat was sent."""
        return self._state is RegistryState.JOINED and self._clock() - self._renewed_at < self._lease

    def leave(self) -> Deferred[None]:
        """Remove this node's row, and the rows of all clients that it still owns. No claim is accepted from now on."""
        return Deferred.fromCoroutine(self._leave())

    async def _leave(self) -> None:
        self._state = RegistryState.LEFT
        local_node = self._local_node
        if local_node is None:
            return
        await self._run_job(Priority.HEARTBEAT, "leave", bind(self._statements.expire_lease, local_node))
        await self._reaper.remove_own_clients(local_node)

    def claim(self, client_id: str, address: str, policy: ClaimPolicy = ALWAYS_TAKE_OVER) -> Deferred[Claim]:
        """Make this node the owner of a client's connection, if the policy allows it."""
        return self._request(client_id, address, None, policy)

    def reclaim(self, key: SessionKey, address: str) -> Deferred[Claim | None]:
        """Claim a client again with the same generation. Fires with ``None`` if another node has a newer claim."""
        return self._request(key.client_id, address, key.generation, ALWAYS_TAKE_OVER)

    def _request(self, client_id: str, address: str, generation: int | None, policy: ClaimPolicy) -> Deferred[Any]:
        if not _is_valid_key(SessionKey(client_id, generation or 0)):
            return fail(ValueError(f"{client_id!r} with generation {generation!r} cannot be claimed"))
        if self._batcher is None:
            return fail(RegistryUnavailableError("the registry is not open"))
        if not self.has_lease():
            return fail(LeaseLostError("the lease of this node has expired"))
        if self._floors_collected is not None and generation is None:
            waiting = self._floors_collected.observe()
            return waiting.addCallback(lambda _: self._request(client_id, address, generation, policy))
        claim = self._batcher.request(client_id, _replace_surrogates(address)[:MAX_ADDRESS_LENGTH], generation, policy)
        return claim.addCallback(self._tell_floor)

    def _tell_floor(self, result: Any) -> Any:
        """Tell the other nodes which generations were counted upwards, while the database's clock is behind."""
        if not self._is_telling_floor and self._floor.take_untold():
            self._is_telling_floor = True
            self._collect_floors().addBoth(self._floor_told)
        return result

    def _floor_told(self, floors: Iterable[int] | Failure) -> None:
        self._is_telling_floor = False
        self._floors_received(floors)
        self._tell_floor(None)

    def release(self, key: SessionKey) -> Deferred[None]:
        """Remove the row of a claim, unless a newer claim has replaced it."""
        if self._batcher is None:
            return fail(RegistryUnavailableError("the registry is not open"))
        if self._local_node is None or not _is_valid_key(key):
            return succeed(None)
        return self._batcher.release(key)

    def is_writing(self, key: SessionKey) -> bool:
        """Whether a release of this claim is queued, or any request of its client is in flight."""
        return self._batcher is not None and self._batcher.is_writing(key)

    def find(self, client_id: str) -> Deferred[Location | None]:
        """Look up a client, or fire with ``None``."""
        if not _is_valid_client_id(client_id):
            return succeed(None)
        if self._location_lookups is None:
            return fail(RegistryUnavailableError("the registry is not open"))
        return self._location_lookups.find(client_id)

    def assign(self, client_ids: Sequence[str], node_id: str, *, binding: bool = True) -> Deferred[list[str]]:
        """Assign clients to another node, except those moved recently. Fires with those that were assigned."""
        valid = sorted({client_id for client_id in client_ids if _is_valid_client_id(client_id)})
        if not valid:
            return succeed([])

        def assign(part: list[str]) -> Deferred[list[str]]:
            return self._run_job(
                Priority.MAINTENANCE, "place", bind(self._statements.assign, part, node_id, binding), divisible=True
            )

        return Deferred.fromCoroutine(run_divided(valid, assign))

    def assignment(self, client_id: str) -> Deferred[Assignment | None]:
        """Look up a client's assignment, or fire with ``None``."""
        if not _is_valid_client_id(client_id):
            return succeed(None)
        if self._assignment_lookups is None:
            return fail(RegistryUnavailableError("the registry is not open"))
        return self._assignment_lookups.find(client_id)

    def purge_assignments(self) -> Deferred[bool]:
        """Remove expired assignments from one segment of the table. Fires with whether that was the last one."""
        return Deferred.fromCoroutine(self._reaper.purge_assignments())

    def clients(self, after: str, limit: int, node_id: str | None = None, prefix: str = "") -> Deferred[list[Location]]:
        """List clients of live nodes in the order of their ids (by code point), starting behind ``after``."""
        return Deferred.fromCoroutine(self._clients(after, limit, node_id, prefix))

    async def _clients(self, after: str, limit: int, node_id: str | None, prefix: str) -> list[Location]:
        found: list[Location] = []
        if not prefix.isascii() or "\x7f" in prefix or not (node_id or "").isascii():
            return found
        # The first text behind another is that text plus a NUL. All texts with a prefix sort before the prefix with its
        # last character incremented.
        first: str | None = max(_cut_at_non_ascii(after) + "\0", prefix)
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else CLIENT_ID_UPPER_BOUND
        while first is not None and len(found) < limit:
            work = bind(self._statements.clients, first, end, limit - len(found), node_id)
            locations, first = await self._run_job(Priority.READS, "clients", work)
            found += locations
        return found

    def own_rows(self, first: str, limit: int) -> Deferred[tuple[list[SessionKey], str | None]]:
        """List this node's rows in the segment of ``limit`` rows of all nodes that begins at ``first``."""
        local_node = self._local_node
        if local_node is None:
            return succeed(([], None))
        return self._run_job(Priority.MAINTENANCE, "audit", bind(self._statements.own_rows, local_node, first, limit))

    def nodes(self) -> Deferred[list[NodeStatus]]:
        """List the live nodes, in the order in which they joined."""
        return self._run_job(Priority.READS, "nodes", self._statements.nodes)

    def reap(self, limit: int) -> Deferred[int]:
        """Remove up to ``limit`` client rows of nodes with expired leases, and those nodes' rows once they own no
        client. Fires with the number of client rows removed: fewer than ``limit`` if there are no more."""
        return Deferred.fromCoroutine(self._reaper.reap(self._local_node, limit))


def _batch_submitter(queue: JobQueue) -> SubmitBatch:
    return lambda make_work: queue.submit(Priority.WRITES, "batch", make_work, divisible=True)


def _is_valid_client_id(client_id: str) -> bool:
    """Whether a row may have this client_id. With others, the database would fail the whole batch."""
    return client_id.isascii() and len(client_id) <= MAX_CLIENT_ID_LENGTH


def _is_valid_key(key: SessionKey) -> bool:
    """Whether a row may have these values. With others, the database would fail the whole batch."""
    return _is_valid_client_id(key.client_id) and 0 <= key.generation < 2**63


def _cut_at_non_ascii(text: str) -> str:
    """Replace everything from the first non-ASCII character with one that sorts behind all others of a client_id."""
    end = next((index for index, character in enumerate(text) if not character.isascii()), None)
    return text if end is None else text[:end] + "\x7f"


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def _discard_result(_: object) -> None:
    return None
