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
from gateway.registry.batching import Batches, LookUps, Submit
from gateway.registry.dialect import Dialect
from gateway.registry.interface import (
    Claim,
    IRegistry,
    LeaseLost,
    Location,
    NodeInfo,
    NodeStatus,
    Place,
    RegistryUnavailable,
)
from gateway.registry.job_queue import Lane, Pool, Turn, Work, piece
from gateway.registry.statements import LONGEST, TOP, Me, Statements
from gateway.settings import ConfigError


@attrs.define
class _Walk:
    """A walk through the table of clients, in search of those of dead nodes."""

    dead: dict[int, int]
    first: str = ""


class Chores:
    """The walks of one node; ``do`` carries out a named piece of work when its turn has come."""

    def __init__(self, do: Callable[[str, Work[Any]], Deferred[Any]], statements: Statements, metrics: Metrics) -> None:
        self._do = do
        self._statements = statements
        self._metrics = metrics
        self._walk: _Walk | None = None
        #: where the walk through the placements goes on
        self._first = ""

    async def reap(self, me: Me | None, limit: int) -> int:
        """Remove up to ``limit`` rows of dead nodes. Returns how many: fewer than ``limit`` when there are no more."""
        removed = 0
        walk = self._walk
        if walk is None:
            dead = await self._do("reap", lambda connection: self._statements.dead(connection, me))
            if not dead:
                return 0
            walk = self._walk = _Walk(dead)
        while removed < limit:
            dead, first, left = walk.dead, walk.first, limit - removed
            count, following = await self._do("reap", piece(self._statements.reap, dead, first, left))
            removed += count
            self._metrics.reaped += count
            if following is None:
                self._walk = None
                break
            walk.first = following
        return removed

    async def tidy(self) -> bool:
        """Remove placements that are over, from one piece of the table. Returns whether that was the last one."""
        following: str | None = await self._do("tidy", piece(self._statements.tidy, self._first))
        self._first = following or ""
        return following is None


T = TypeVar("T")

#: seconds for which claims and releases are gathered
GATHER = 0.003


class Database(Dialect, Protocol):
    """A database: how it is reached, what is said to it, and what its errors mean."""

    #: the turns of each lane
    lanes: tuple[tuple[Turn, ...], ...]
    #: the most claims and releases of a batch
    batch: int
    #: seconds for which what failed for a passing reason is tried again; ``None`` for as long as a lane does by itself
    patience: float | None

    def pool(self, make: Callable[..., Any], reactor: Any) -> Any:
        """Make a pool of one connection, by ``adbapi.ConnectionPool`` or what is called like it."""

    def retryable(self, error: BaseException | None) -> bool:
        """Whether an error may be gone at the next try."""

    def explain(self, error: BaseException | None) -> str:
        """One line for a log, or an empty text for an error that is no database's."""

    def unusable(self, error: BaseException) -> ConfigError:
        """What to tell of an error that came when the database was opened."""

    def check(self) -> None:
        """Open the database in this thread, bring its schema up to date, and close it. Raises ``ConfigError``."""


@implementer(IRegistry)
class SQLRegistry:
    """See :class:`~gateway.registry.interface.IRegistry`.

    ``lease`` and ``gather`` are in seconds; ``monotonic`` is a clock that is never set (a reactor's may be);
    ``make_pool`` is ``adbapi.ConnectionPool`` or what is called like it.
    """

    lane_factory: Callable[..., Lane] = Lane

    #: Told of a claim that was taken back, once there is certainly no row of it any more: the client, its generation,
    #: and where the client was before, if that was another node. An older connection is to be claimed again. To be set
    #: before :meth:`open`.
    taken_back: Callable[[str, int, Location | None], None] = staticmethod(lambda client_id, generation, before: None)

    def __init__(
        self,
        database: Database,
        *,
        lease: float,
        reactor: Any,
        metrics: Metrics,
        monotonic: Callable[[], float] = time.monotonic,
        make_pool: Callable[..., Any] = adbapi.ConnectionPool,
        gather: float = GATHER,
    ) -> None:
        self._database = database
        self._lease = lease
        self._reactor = reactor
        self._metrics = metrics
        self._monotonic = monotonic
        self._make_pool = make_pool
        self._gather = gather
        self._statements = Statements(database, lease)
        self._pools: list[Pool] = []
        #: by turn; there may be several for writes
        self._lanes: dict[Turn, Lane] = {}
        self._writers: list[Lane] = []
        self._batches: Batches | None = None
        self._lookups: LookUps[Location] | None = None
        self._placed: LookUps[Place] | None = None
        self._me: Me | None = None
        self._left = False
        self._lost: list[bool] = []
        self._renewed: float | None = None
        self._chores = Chores(partial(self._do, Turn.CHORES), self._statements, metrics)

    def open(self) -> Deferred[None]:
        """Connect and bring the schema up to date. Fails with ``ConfigError``."""
        return Deferred.fromCoroutine(self._open())

    async def _open(self) -> None:
        clock = cast(IReactorTime, self._reactor)
        for turns in self._database.lanes:
            pool = Pool(self._database, self._database.pool(self._make_pool, self._reactor))
            self._pools.append(pool)
            lane = self.lane_factory(clock, pool, self._metrics, self._database.patience)
            self._lanes.update(dict.fromkeys(turns, lane))
            if Turn.WRITES in turns:
                self._writers.append(lane)
        reads = self._lanes[Turn.READS]
        first, *others = [_submitter(lane) for lane in self._writers]
        self._batches = Batches(
            clock,
            first,
            lambda connection, batch, tried: self._statements.write(connection, self._joined(), batch, tried),
            self._metrics,
            self._gather,
            self._database.batch,
            others,
        )
        self._batches.taken_back = self.taken_back
        self._lookups = LookUps(lambda make: reads.submit(Turn.READS, "find", make), self._statements.find)
        self._placed = LookUps(lambda make: reads.submit(Turn.READS, "placed", make), self._statements.placed)
        try:
            await self._lanes[Turn.HEARTBEAT].submit(
                Turn.HEARTBEAT, "open", lambda: lambda connection: None, quiet=True
            )
        except RegistryUnavailable as e:
            await self._close()
            raise (self._database.unusable(e.__cause__) if e.__cause__ else e) from None

    def check(self) -> None:
        """Find out, before a reactor runs, whether the database can be used. Raises ``ConfigError`` if not."""
        self._database.check()

    def close(self) -> Deferred[None]:
        """Write what is queued if that is possible, then disconnect."""
        return Deferred.fromCoroutine(self._close())

    async def _close(self) -> None:
        if self._batches is None:
            return
        await self._batches.close()
        for lane in [*self._lanes.values(), *self._writers]:
            await lane.close()
        pools, self._pools = self._pools, []
        self._lanes, self._writers = {}, []
        self._batches = self._lookups = self._placed = None
        for pool in pools:
            pool.close()
        self._renewed = None

    def _do(self, turn: Turn, operation: str, work: Work[T]) -> Deferred[T]:
        if turn not in self._lanes:
            return fail(RegistryUnavailable("the registry is not open"))
        return cast("Deferred[T]", self._lanes[turn].submit(turn, operation, lambda: work))

    def _joined(self) -> Me:
        if self._me is None:
            raise RegistryUnavailable("this node has not joined")
        return self._me

    def join(self, node: NodeInfo) -> Deferred[None]:
        """Insert this node's row, in state ``up``: its first heartbeat."""
        info = attrs.evolve(node, name=_storable(node.name))
        return self._renew("join", lambda connection: (True, self._statements.join(connection, info))).addCallback(
            _none
        )

    def heartbeat(self, state: str, clients: int) -> Deferred[bool]:
        """Renew this node's lease, before anything that is queued.

        ``False`` when the lease had run out, or the row was gone and was inserted anew: others may have taken this
        node's clients, or removed their rows, so that every client that is here must be claimed again.
        """
        if self._me is None or self._left:
            return fail(RegistryUnavailable("this node has not joined, or has left"))
        return self._renew(
            "heartbeat",
            lambda connection: self._statements.heartbeat(connection, self._joined(), state, clients, self._lost),
        )

    def _renew(self, operation: str, work: Work[tuple[bool, Me]]) -> Deferred[bool]:
        if Turn.HEARTBEAT not in self._lanes:
            return fail(RegistryUnavailable("the registry is not open"))
        sent = 0.0

        def make() -> Work[tuple[bool, Me]]:
            nonlocal sent
            sent = self._monotonic()
            return work

        def renewed(result: tuple[bool, Me] | None) -> bool:
            assert result is not None
            held, self._me = result
            self._renewed = sent
            # Whoever is told now knows of it; until then it counts, though the heartbeat that found it out failed.
            self._lost.clear()
            if self._batches is not None:
                self._batches.back()
            return held

        return self._lanes[Turn.HEARTBEAT].submit(Turn.HEARTBEAT, operation, make).addCallback(renewed)

    def lease_ok(self) -> bool:
        """Whether this node's lease holds by its own clock, counted from before its last heartbeat was sent."""
        return self._renewed is not None and not self._left and self._monotonic() - self._renewed < self._lease

    def leave(self) -> Deferred[None]:
        """Remove this node's row, and every client's row that is still its own. It does not claim any more."""
        return Deferred.fromCoroutine(self._leave())

    async def _leave(self) -> None:
        self._left = True
        me = self._me
        if me is None:
            return
        await self._do(Turn.HEARTBEAT, "leave", lambda connection: self._statements.retire(connection, me))
        first: str | None = ""
        while first is not None:
            first = await self._do(Turn.CHORES, "leave", piece(self._statements.empty, me, first))

    def claim(
        self, client_id: str, address: str, *, over: int | None = None, judge: bool = False, placed: bool = False
    ) -> Deferred[Claim]:
        """Make this node the owner of a client's connection: whoever had it, or else over what is said."""
        return self._request(client_id, address, None, over, judge, placed)

    def reclaim(self, client_id: str, generation: int, address: str) -> Deferred[Claim | None]:
        """Claim a client again, with the generation that it had; ``None`` when somebody has a newer one."""
        return self._request(client_id, address, generation)

    def _request(self, client_id: str, address: str, generation: int | None, *how: Any) -> Deferred[Any]:
        if not _possible(client_id, generation or 0):
            return fail(ValueError(f"{client_id!r} with generation {generation!r} cannot be claimed"))
        if self._batches is None:
            return fail(RegistryUnavailable("the registry is not open"))
        if not self.lease_ok():
            return fail(LeaseLost("this node's lease ran out"))
        return self._batches.request(client_id, _storable(address)[:255], generation, *how)

    def release(self, client_id: str, generation: int) -> Deferred[None]:
        """Remove a claim's row, if it is still that claim's."""
        if self._batches is None:
            return fail(RegistryUnavailable("the registry is not open"))
        if self._me is None or not _possible(client_id, generation):
            return succeed(None)
        return self._batches.release(client_id, generation)

    def find(self, client_id: str) -> Deferred[Location | None]:
        """Where a client is, or ``None``."""
        if not _possible(client_id):
            return succeed(None)
        if self._lookups is None:
            return fail(RegistryUnavailable("the registry is not open"))
        return self._lookups.find(client_id)

    def place(self, client_ids: Sequence[str], node_id: str, *, binding: bool = True) -> Deferred[list[str]]:
        """Place clients on another node, but for those that were moved a short time ago. Fires with those that are."""
        possible = sorted({client_id for client_id in client_ids if _possible(client_id)})
        if not possible:
            return succeed([])
        return self._do(Turn.CHORES, "place", piece(self._statements.place, possible, node_id, binding))

    def placed(self, client_id: str) -> Deferred[Place | None]:
        """The node that a client is placed on."""
        if not _possible(client_id):
            return succeed(None)
        if self._placed is None:
            return fail(RegistryUnavailable("the registry is not open"))
        return self._placed.find(client_id)

    def tidy(self) -> Deferred[bool]:
        """Remove placements that are over, from one piece of the table. Fires with whether that was the last one."""
        return Deferred.fromCoroutine(self._chores.tidy())

    def clients(self, after: str, limit: int, node_id: str | None = None, prefix: str = "") -> Deferred[list[Location]]:
        """Clients of live nodes in the order of their ids (by code point), beginning behind ``after``."""
        return Deferred.fromCoroutine(self._clients(after, limit, node_id, prefix))

    async def _clients(self, after: str, limit: int, node_id: str | None, prefix: str) -> list[Location]:
        found: list[Location] = []
        if not prefix.isascii() or "\x7f" in prefix or not (node_id or "").isascii():
            return found
        # The least text behind another is that text with a NUL; those that begin with a text end before the same text
        # with its last character raised by one.
        first: str | None = max(_ascii(after) + "\0", prefix)
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else TOP
        while first is not None and len(found) < limit:
            some, first = await self._do(
                Turn.READS, "clients", piece(self._statements.clients, first, end, limit - len(found), node_id)
            )
            found += some
        return found

    def nodes(self) -> Deferred[list[NodeStatus]]:
        """The live nodes, in the order in which they joined."""
        return self._do(Turn.READS, "nodes", self._statements.nodes)

    def reap(self, limit: int) -> Deferred[int]:
        """Remove up to ``limit`` rows of clients whose nodes' leases ran out, and those nodes' rows once they hold no
        client. Fires with the number of clients' rows removed: fewer than ``limit`` when there are no more."""
        return Deferred.fromCoroutine(self._chores.reap(self._me, limit))


def _submitter(lane: Lane) -> Submit:
    return lambda make: lane.submit(Turn.WRITES, "batch", make)


def _possible(client_id: str, generation: int = 0) -> bool:
    """Whether a row could be so; a database driver would fail a whole batch for what cannot."""
    return client_id.isascii() and len(client_id) <= LONGEST and 0 <= generation < 2**63


def _ascii(text: str) -> str:
    """Cut a text at its first character beyond ASCII, which sorts behind all that could be in its place."""
    beyond = next((index for index, character in enumerate(text) if not character.isascii()), None)
    return text if beyond is None else text[:beyond] + "\x7f"


def _storable(text: str) -> str:
    """Replace what UTF-8 cannot say (lone surrogates)."""
    return text.encode("utf-8", "replace").decode()


def _none(_: object) -> None:
    return None
