"""Release orphaned rows: rows of this node in the registry that no session of this node belongs to.

A database that lost its last changes, by a failover or because a backup was restored, may have the row of a client that
has left. Its release was written once, and its lease does not expire while this node lives: without this the client
would stay listed, and calls to it would fail.

A row is checked when another node asks about a session that is not here, when a look-up or the audit (reconcile.py)
finds it. It is looked up, and released unless

    a session of that generation, or a newer one, is open here        the audit restores the row of a newer one
    a claim of the client is in progress here                         its row may be written already
    the registry is writing a claim or release of the client          its outcome may not be known here yet
    the client is in handoff                                          the row of its closed connection is kept

before and after the look-up: then what is in progress decides, and a later check finds what is left. A release names
the generation, so it never removes the row of a newer claim.
"""

from __future__ import annotations

from typing import Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.clients.interface import IClientSessions
from gateway.metrics import Metrics
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, SessionKey
from gateway.rpc.handoff import HandoffTracker
from gateway.rpc.interface import IOrphanedRows
from gateway.util.deferred import Observers
from gateway.util.log import LogLimiter

#: rows that are checked at once; others are left to the audit
MAX_IN_PROGRESS = 256
#: callers that wait for one row; others are not told about the release
MAX_WAITING = 256
#: the shortest time between two log lines, in seconds
LOG_INTERVAL = 30.0

#: newer than every session: a claim in progress counts even if another session of the client is open
_ANY_GENERATION: Final = 2**63


@implementer(IOrphanedRows)
class OrphanedRows:
    """Releases the orphaned rows of one node. ``node_id`` is its own."""

    _log = Logger()

    def __init__(
        self,
        *,
        node_id: str,
        sessions: IClientSessions,
        registry: IRegistry,
        handoffs: HandoffTracker,
        clock: IReactorTime,
        metrics: Metrics,
    ) -> None:
        self._node_id = node_id
        self._sessions = sessions
        self._registry = registry
        self._handoffs = handoffs
        self._metrics = metrics
        self._log_limiter = LogLimiter(clock.seconds, LOG_INTERVAL)
        #: the rows that are checked -> what waits for the result
        self._in_progress: dict[SessionKey, Observers[bool]] = {}

    def __len__(self) -> int:
        return len(self._in_progress)

    def check(self, key: SessionKey) -> Deferred[bool]:
        waiting = self._in_progress.get(key)
        if waiting is not None:
            return waiting.observe() if len(waiting) < MAX_WAITING else succeed(False)
        if self._is_unsettled(key) or len(self._in_progress) >= MAX_IN_PROGRESS:
            return succeed(False)
        waiting = self._in_progress[key] = Observers()
        result = waiting.observe()
        checked = Deferred.fromCoroutine(self._check(key)).addErrback(self._failed)
        checked.addCallback(lambda released: self._in_progress.pop(key).callback(released))
        return result

    def _is_unsettled(self, key: SessionKey) -> bool:
        """Whether a session, or what is in progress, decides about the row."""
        client_id = key.client_id
        if self._sessions.generation(client_id) >= key.generation or self._registry.is_writing(key):
            return True
        if self._handoffs.is_in_handoff(client_id):
            return True
        claim = self._sessions.claim_in_progress(client_id, _ANY_GENERATION)
        if claim is None:
            return False
        claim.addErrback(lambda _: None).cancel()
        return True

    async def _check(self, key: SessionKey) -> bool:
        location = await self._registry.find(key.client_id)
        if location is None or (location.node_id, location.generation) != (self._node_id, key.generation):
            return False
        if self._is_unsettled(key):
            return False
        await self._registry.release(key)
        self._metrics.orphaned_rows += 1
        if (more := self._log_limiter.allow()) is not None:
            self._log.warn(
                "removed the row of client {client_id!r}, which is not connected to this node{more}: has the database"
                " lost its last changes?",
                client_id=key.client_id,
                more=f" ({more} more since the last such line)" if more else "",
            )
        # The row may have taken the place of that of an older connection, which is open.
        self._sessions.restore_claim(key)
        return True

    def _failed(self, failure: Failure) -> bool:
        if not failure.check(RegistryUnavailableError):
            self._log.failure("error in releasing an orphaned row", failure)
        return False
