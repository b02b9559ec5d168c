"""Reconcile the sessions of this node with their rows in the registry: the audit.

A node is notified when another one takes over a client, but not while the two cannot reach each other; a claim whose
result was lost may have replaced the row of an older connection; and a database may lose its last changes, by a
failover or because a backup was restored. So each node reads the rows of its own sessions again and again, some each
second, by primary key:

    a newer claim of another node     -> if it is still there after a while, the connection is closed with 4001
    a newer claim of this node        -> its row is released, unless the claim is in progress (rpc/orphans.py)
    no row, or one of an older claim  -> the session is claimed again

After a while, since a newer claim whose connection never opened is revoked within seconds.

It also walks over the table itself, in segments by primary key, for rows of this node:

    no session, or an older one       -> the row is released, unless a claim of the client is in progress
    a newer session                   -> that is claimed again

A round over 1,000,000 sessions of one node takes 1,000,000 / ``BATCH_SIZE`` seconds, and one over 1,000,000 rows of the
table 1,000,000 / ``ROWS_PER_CHECK`` seconds, if the database answers within ``CHECK_INTERVAL``.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred, FirstError, gatherResults, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.clients.interface import IClientSessions
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, SessionKey
from gateway.rpc.interface import IOrphanedRows

#: sessions per check, which are looked up by one statement
BATCH_SIZE = 200
#: rows of the table, of all nodes, that a check reads by one statement
ROWS_PER_CHECK = 1000
#: rows that are repaired at once
REPAIR_BATCH_SIZE = 100
#: interval of the checks, in seconds
CHECK_INTERVAL = 1.0
#: how long a newer claim must exist before the session is closed, in seconds
CONFLICT_GRACE_PERIOD = 10.0


class Reconciler:
    """Checks the sessions and the rows of this node."""

    _log = Logger()

    def __init__(
        self,
        *,
        node_id: str,
        sessions: IClientSessions,
        registry: IRegistry,
        orphaned_rows: IOrphanedRows,
        clock: IReactorTime,
    ) -> None:
        """``node_id`` is this node's own."""
        self._node_id = node_id
        self._sessions = sessions
        self._registry = registry
        self._orphaned_rows = orphaned_rows
        #: client_id at which the next segment of the table begins
        self._next_row = ""
        #: client_ids that are still to be checked in this pass
        self._remaining: list[str] = []
        #: session -> when a newer claim was first found
        self._conflicts: dict[SessionKey, float] = {}
        self._clock = clock.seconds
        self._loop = LoopingCall(self._tick)
        self._loop.clock = clock

    def start(self) -> None:
        self._loop.start(CHECK_INTERVAL, now=False).addErrback(
            lambda failure: self._log.failure("the checks of sessions have ended", failure)
        )

    def stop(self) -> None:
        if self._loop.running:
            self._loop.stop()

    def _tick(self) -> Deferred[None]:
        """Check the next sessions and rows. A check that takes longer than the interval delays the next one."""
        return Deferred.fromCoroutine(self._check()).addErrback(self._failed)

    async def _check(self) -> None:
        await self._check_sessions(self._next_sessions())
        await self._check_rows()

    def _next_sessions(self) -> list[str]:
        if not self._remaining:
            self._remaining = self._sessions.client_ids()
            generation = self._sessions.generation
            self._conflicts = {
                key: found_at
                for key, found_at in self._conflicts.items()
                if generation(key.client_id) == key.generation
            }
        batch, self._remaining = self._remaining[-BATCH_SIZE:], self._remaining[:-BATCH_SIZE]
        return batch

    async def _check_sessions(self, client_ids: list[str]) -> None:
        keys = [SessionKey(client_id, self._sessions.generation(client_id)) for client_id in client_ids]
        locations = await gatherResults(
            [self._registry.find(client_id) for client_id in client_ids], consumeErrors=True
        )
        for key, location in zip(keys, locations, strict=True):
            client_id, generation = key
            # A session that was opened or closed meanwhile is checked in the next pass.
            if not generation or generation != self._sessions.generation(client_id):
                continue
            if location is None or location.generation < generation:
                self._restore(key)
            elif location.generation == generation:
                self._conflicts.pop(key, None)
            elif location.node_id == self._node_id:
                self._orphaned_rows.check(SessionKey(client_id, location.generation))
            else:
                found_at = self._conflicts.setdefault(key, self._clock())
                if self._clock() - found_at >= CONFLICT_GRACE_PERIOD:
                    self._sessions.close_superseded(SessionKey(client_id, location.generation))

    def _restore(self, key: SessionKey) -> None:
        """Claim an open session again, whose row is lost."""
        self._conflicts.pop(key, None)
        self._sessions.restore_claim(SessionKey(key.client_id, key.generation + 1))

    async def _check_rows(self) -> None:
        rows, following = await self._registry.own_rows(self._next_row, ROWS_PER_CHECK)
        self._next_row = following or ""
        current = self._sessions.generation
        wrong = [row for row in rows if row.generation != current(row.client_id)]
        for start in range(0, len(wrong), REPAIR_BATCH_SIZE):
            await gatherResults([self._repair(row) for row in wrong[start : start + REPAIR_BATCH_SIZE]])

    def _repair(self, row: SessionKey) -> Deferred[bool]:
        """Repair a row of this node without a session of its generation. It may have been replaced or released since it
        was read: then nothing changes."""
        current = SessionKey(row.client_id, self._sessions.generation(row.client_id))
        if current.generation < row.generation:
            return self._orphaned_rows.check(row)
        if current.generation > row.generation:
            self._restore(current)
        return succeed(False)

    def _failed(self, failure: Failure) -> None:
        if isinstance(failure.value, FirstError):
            failure = failure.value.subFailure
        if not failure.check(RegistryUnavailableError):
            self._log.failure("error in checking sessions", failure)
