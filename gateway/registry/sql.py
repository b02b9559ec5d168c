"""What is removed that counts no more: rows of dead nodes, and placements that are over. In pieces, so that no
statement takes long: each goes on where the last one ended.

The registry in an SQL database, over ``twisted.enterprise.adbapi``. What differs between databases is a dialect's.

    IRegistry -> Batches (claims and releases) -> Lane (one job at a time) -> adbapi -> Statements, in a thread

A dialect has one lane for everything, or several, each with a connection of its own. Look-ups that wait for their turn
are gathered as well, into one statement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import attrs
from twisted.enterprise import adbapi
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.registry.batching import LookupBatcher, SubmitBatch, WriteBatcher
from gateway.registry.dialect import Dialect
from gateway.registry.errors import LeaseLostError, RegistryUnavailableError
from gateway.registry.interface import (
    Assignment,
    Claim,
    IRegistry,
    Location,
    NodeInfo,
    NodeStatus,
    OnClaimRevoked,
    ignore_claim_revoked,
)
from gateway.registry.job_queue import JobQueue, Priority, SingleConnectionPool, Work, bind
from gateway.registry.statements import CLIENT_ID_UPPER_BOUND, MAX_CLIENT_ID_LENGTH, LocalNode, Statements
from gateway.settings import ConfigError


@attrs.define
class _ReapScan:
    """A walk through the table of clients, in search of those of dead nodes."""

    dead_nodes: dict[int, int]
    first: str = ""


class Reaper:
    """The walks of one node; ``do`` carries out a named piece of work when its turn has come."""

    def __init__(
        self, run: Callable[[str, Work[Any]], Deferred[Any]], statements: Statements, metrics: Metrics
    ) -> None:
        self._run = run
        self._statements = statements
        self._metrics = metrics
        self._scan: _ReapScan | None = None
        #: where the walk through the placements goes on
        self._purge_from = ""

    async def reap(self, local_node: LocalNode | None, limit: int) -> int:
        """Remove up to ``limit`` rows of dead nodes. Returns how many: fewer than ``limit`` when there are no more."""
        removed = 0
        walk = self._scan
        if walk is None:
            dead = await self._run("reap", lambda connection: self._statements.dead_nodes(connection, local_node))
            if not dead:
                return 0
            walk = self._scan = _ReapScan(dead)
        while removed < limit:
            dead, first, left = walk.dead_nodes, walk.first, limit - removed
            count, following = await self._run("reap", bind(self._statements.reap, dead, first, left))
            removed += count
            self._metrics.reaped += count
            if following is None:
                self._scan = None
                break
            walk.first = following
        return removed

    async def purge_assignments(self) -> bool:
        """Remove placements that are over, from one piece of the table. Returns whether that was the last one."""
        following: str | None = await self._run("tidy", bind(self._statements.purge_assignments, self._purge_from))
        self._purge_from = following or ""
        return following is None


T = TypeVar("T")

#: seconds for which claims and releases are gathered
BATCH_DELAY = 0.003


class Database(Dialect, Protocol):
    """A database: how it is reached, what is said to it, and what its errors mean."""

    #: the turns of each lane
    queue_priorities: tuple[tuple[Priority, ...], ...]
    #: the most claims and releases of a batch
    max_batch_size: int
    #: seconds for which what failed for a passing reason is tried again; ``None`` for as long as a lane does by itself
    retry_timeout: float | None

    def make_pool(self, pool_factory: Callable[..., Any], reactor: Any) -> Any:
        """Make a pool of one connection, by ``adbapi.ConnectionPool`` or what is called like it."""

    def retryable(self, error: BaseException | None) -> bool:
        """Whether an error may be gone at the next try."""

    def explain(self, error: BaseException | None) -> str:
        """One line for a log, or an empty text for an error that is no database's."""

    def to_config_error(self, error: BaseException) -> ConfigError:
        """What to tell of an error that came when the database was opened."""

    def check(self) -> None:
        """Open the database in this thread, bring its schema up to date, and close it. Raises ``ConfigError``."""


@implementer(IRegistry)
class SQLRegistry:
    """See :class:`~gateway.registry.interface.IRegistry`.

    ``lease`` and ``gather`` are in seconds; ``monotonic`` is a clock that is never set (a reactor's may be);
    ``make_pool`` is ``adbapi.ConnectionPool`` or what is called like it.
    """

    job_queue_factory: Callable[..., JobQueue] = JobQueue

    def __init__(
        self,
        database: Database,
        *,
        lease: float,
        reactor: Any,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        make_pool: Callable[..., Any] = adbapi.ConnectionPool,
        batch_delay: float = BATCH_DELAY,
        on_claim_revoked: OnClaimRevoked = ignore_claim_revoked,
    ) -> None:
        self._database = database
        self._lease = lease
        self._reactor = reactor
        self._metrics = metrics
        self._clock = clock
        self._make_pool = make_pool
        self._batch_delay = batch_delay
        self._on_claim_revoked = on_claim_revoked
        self._statements = Statements(database, lease)
        self._pools: list[SingleConnectionPool] = []
        #: by turn; there may be several for writes
        self._queues: dict[Priority, JobQueue] = {}
        self._write_queues: list[JobQueue] = []
        self._batcher: WriteBatcher | None = None
        self._location_lookups: LookupBatcher[Location] | None = None
        self._assignment_lookups: LookupBatcher[Assignment] | None = None
        self._local_node: LocalNode | None = None
        self._left = False
        self._lease_lost: list[bool] = []
        self._renewed_at: float | None = None
        self._reaper = Reaper(partial(self._run_job, Priority.MAINTENANCE), self._statements, metrics)

    def open(self) -> Deferred[None]:
        """Connect and bring the schema up to date. Fails with ``ConfigError``."""
        return Deferred.fromCoroutine(self._open())

    async def _open(self) -> None:
        clock = cast(IReactorTime, self._reactor)
        for turns in self._database.queue_priorities:
            pool = SingleConnectionPool(self._database, self._database.make_pool(self._make_pool, self._reactor))
            self._pools.append(pool)
            lane = self.job_queue_factory(clock, pool, self._metrics, self._database.retry_timeout)
            self._queues.update(dict.fromkeys(turns, lane))
            if Priority.WRITES in turns:
                self._write_queues.append(lane)
        reads = self._queues[Priority.READS]
        first, *others = [_batch_submitter(lane) for lane in self._write_queues]
        self._batcher = WriteBatcher(
            clock,
            first,
            lambda connection, batch, tried: self._statements.write_batch(
                connection, self._require_joined(), batch, tried
            ),
            self._metrics,
            self._batch_delay,
            self._database.max_batch_size,
            others,
            self._on_claim_revoked,
        )
        self._location_lookups = LookupBatcher(
            lambda make: reads.submit(Priority.READS, "find", make), self._statements.find
        )
        self._assignment_lookups = LookupBatcher(
            lambda make: reads.submit(Priority.READS, "placed", make), self._statements.assignments
        )
        try:
            await self._queues[Priority.HEARTBEAT].submit(
                Priority.HEARTBEAT, "open", lambda: lambda connection: None, quiet=True
            )
        except RegistryUnavailableError as e:
            await self._close()
            raise (self._database.to_config_error(e.__cause__) if e.__cause__ else e) from None

    def check(self) -> None:
        """Find out, before a reactor runs, whether the database can be used. Raises ``ConfigError`` if not."""
        self._database.check()

    def close(self) -> Deferred[None]:
        """Write what is queued if that is possible, then disconnect."""
        return Deferred.fromCoroutine(self._close())

    async def _close(self) -> None:
        if self._batcher is None:
            return
        await self._batcher.close()
        for lane in [*self._queues.values(), *self._write_queues]:
            await lane.close()
        pools, self._pools = self._pools, []
        self._queues, self._write_queues = {}, []
        self._batcher = self._location_lookups = self._assignment_lookups = None
        for pool in pools:
            pool.close()
        self._renewed_at = None

    def _run_job(self, priority: Priority, operation: str, work: Work[T]) -> Deferred[T]:
        if priority not in self._queues:
            return fail(RegistryUnavailableError("the registry is not open"))
        return cast("Deferred[T]", self._queues[priority].submit(priority, operation, lambda: work))

    def _require_joined(self) -> LocalNode:
        if self._local_node is None:
            raise RegistryUnavailableError("this node has not joined")
        return self._local_node

    def join(self, node: NodeInfo) -> Deferred[None]:
        """Insert this node's row, in state ``up``: its first heartbeat."""
        info = attrs.evolve(node, name=_replace_surrogates(node.name))
        return self._renew_lease(
            "join", lambda connection: (True, self._statements.join(connection, info))
        ).addCallback(_discard_result)

    def heartbeat(self, state: str, clients: int) -> Deferred[bool]:
        """Renew this node's lease, before anything that is queued.

        ``False`` when the lease had run out, or the row was gone and was inserted anew: others may have taken this
        node's clients, or removed their rows, so that every client that is here must be claimed again.
        """
        if self._local_node is None or self._left:
            return fail(RegistryUnavailableError("this node has not joined, or has left"))
        return self._renew_lease(
            "heartbeat",
            lambda connection: self._statements.heartbeat(
                connection, self._require_joined(), state, clients, self._lease_lost
            ),
        )

    def _renew_lease(self, operation: str, work: Work[tuple[bool, LocalNode]]) -> Deferred[bool]:
        if Priority.HEARTBEAT not in self._queues:
            return fail(RegistryUnavailableError("the registry is not open"))
        sent = 0.0

        def make() -> Work[tuple[bool, LocalNode]]:
            nonlocal sent
            sent = self._clock()
            return work

        def renewed(result: tuple[bool, LocalNode] | None) -> bool:
            assert result is not None
            held, self._local_node = result
            self._renewed_at = sent
            # Whoever is told now knows of it; until then it counts, though the heartbeat that found it out failed.
            self._lease_lost.clear()
            if self._batcher is not None:
                self._batcher.retry_now()
            return held

        return self._queues[Priority.HEARTBEAT].submit(Priority.HEARTBEAT, operation, make).addCallback(renewed)

    def has_lease(self) -> bool:
        """Whether this node's lease holds by its own clock, counted from before its last heartbeat was sent."""
        return self._renewed_at is not None and not self._left and self._clock() - self._renewed_at < self._lease

    def leave(self) -> Deferred[None]:
        """Remove this node's row, and every client's row that is still its own. It does not claim any more."""
        return Deferred.fromCoroutine(self._leave())

    async def _leave(self) -> None:
        self._left = True
        me = self._local_node
        if me is None:
            return
        await self._run_job(
            Priority.HEARTBEAT, "leave", lambda connection: self._statements.expire_lease(connection, me)
        )
        first: str | None = ""
        while first is not None:
            first = await self._run_job(
                Priority.MAINTENANCE, "leave", bind(self._statements.remove_own_clients, me, first)
            )

    def claim(
        self,
        client_id: str,
        address: str,
        *,
        takeover_up_to: int | None = None,
        ignore_expired_owner: bool = False,
        honor_assignment: bool = False,
    ) -> Deferred[Claim]:
        """Make this node the owner of a client's connection: whoever had it, or else over what is said."""
        return self._request(client_id, address, None, takeover_up_to, ignore_expired_owner, honor_assignment)

    def reclaim(self, client_id: str, generation: int, address: str) -> Deferred[Claim | None]:
        """Claim a client again, with the generation that it had; ``None`` when somebody has a newer one."""
        return self._request(client_id, address, generation)

    def _request(self, client_id: str, address: str, generation: int | None, *policy: Any) -> Deferred[Any]:
        if not _is_valid_key(client_id, generation or 0):
            return fail(ValueError(f"{client_id!r} with generation {generation!r} cannot be claimed"))
        if self._batcher is None:
            return fail(RegistryUnavailableError("the registry is not open"))
        if not self.has_lease():
            return fail(LeaseLostError("this node's lease ran out"))
        return self._batcher.request(client_id, _replace_surrogates(address)[:255], generation, *policy)

    def release(self, client_id: str, generation: int) -> Deferred[None]:
        """Remove a claim's row, if it is still that claim's."""
        if self._batcher is None:
            return fail(RegistryUnavailableError("the registry is not open"))
        if self._local_node is None or not _is_valid_key(client_id, generation):
            return succeed(None)
        return self._batcher.release(client_id, generation)

    def find(self, client_id: str) -> Deferred[Location | None]:
        """Where a client is, or ``None``."""
        if not _is_valid_key(client_id):
            return succeed(None)
        if self._location_lookups is None:
            return fail(RegistryUnavailableError("the registry is not open"))
        return self._location_lookups.find(client_id)

    def assign(self, client_ids: Sequence[str], node_id: str, *, binding: bool = True) -> Deferred[list[str]]:
        """Place clients on another node, but for those that were moved a short time ago. Fires with those that are."""
        possible = sorted({client_id for client_id in client_ids if _is_valid_key(client_id)})
        if not possible:
            return succeed([])
        return self._run_job(Priority.MAINTENANCE, "place", bind(self._statements.assign, possible, node_id, binding))

    def assignment(self, client_id: str) -> Deferred[Assignment | None]:
        """The node that a client is placed on."""
        if not _is_valid_key(client_id):
            return succeed(None)
        if self._assignment_lookups is None:
            return fail(RegistryUnavailableError("the registry is not open"))
        return self._assignment_lookups.find(client_id)

    def purge_assignments(self) -> Deferred[bool]:
        """Remove placements that are over, from one piece of the table. Fires with whether that was the last one."""
        return Deferred.fromCoroutine(self._reaper.purge_assignments())

    def clients(self, after: str, limit: int, node_id: str | None = None, prefix: str = "") -> Deferred[list[Location]]:
        """Clients of live nodes in the order of their ids (by code point), beginning behind ``after``."""
        return Deferred.fromCoroutine(self._clients(after, limit, node_id, prefix))

    async def _clients(self, after: str, limit: int, node_id: str | None, prefix: str) -> list[Location]:
        found: list[Location] = []
        if not prefix.isascii() or "\x7f" in prefix or not (node_id or "").isascii():
            return found
        # The least text behind another is that text with a NUL; those that begin with a text end before the same text
        # with its last character raised by one.
        first: str | None = max(_cut_at_non_ascii(after) + "\0", prefix)
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else CLIENT_ID_UPPER_BOUND
        while first is not None and len(found) < limit:
            some, first = await self._run_job(
                Priority.READS, "clients", bind(self._statements.clients, first, end, limit - len(found), node_id)
            )
            found += some
        return found

    def nodes(self) -> Deferred[list[NodeStatus]]:
        """The live nodes, in the order in which they joined."""
        return self._run_job(Priority.READS, "nodes", self._statements.nodes)

    def reap(self, limit: int) -> Deferred[int]:
        """Remove up to ``limit`` rows of clients whose nodes' leases ran out, and those nodes' rows once they hold no
        client. Fires with the number of clients' rows removed: fewer than ``limit`` when there are no more."""
        return Deferred.fromCoroutine(self._reaper.reap(self._local_node, limit))


def _batch_submitter(queue: JobQueue) -> SubmitBatch:
    return lambda make: queue.submit(Priority.WRITES, "batch", make)


def _is_valid_key(client_id: str, generation: int = 0) -> bool:
    """Whether a row could be so; a database driver would fail a whole batch for what cannot."""
    return client_id.isascii() and len(client_id) <= MAX_CLIENT_ID_LENGTH and 0 <= generation < 2**63


def _cut_at_non_ascii(text: str) -> str:
    """Cut a text at its first character beyond ASCII, which sorts behind all that could be in its place."""
    beyond = next((index for index, character in enumerate(text) if not character.isascii()), None)
    return text if beyond is None else text[:beyond] + "\x7f"


def _replace_surrogates(text: str) -> str:
    """Replace what UTF-8 cannot say (lone surrogates)."""
    return text.encode("utf-8", "replace").decode()


def _discard_result(_: object) -> None:
    return None
