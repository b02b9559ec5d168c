"""Reconcile the sessions of this node with their rows in the registry.

A node is notified when another one takes over a client, but not while the two cannot reach each other; and a claim
whose result was lost may have replaced the row of an older connection. So in a fleet of several nodes, each reads the
rows of its own sessions again and again, some each second, by primary key:

    a newer claim of another node     -> if it is still there after a while, the connection is closed with 4001
    no row                            -> the session is claimed again

After a while, since a newer claim whose connection never opened is revoked within seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred, FirstError, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.clients.interface import IClientSessions
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, SessionKey

#: sessions per check, which are looked up by one statement
BATCH_SIZE = 200
#: interval of the checks, in seconds
CHECK_INTERVAL = 1.0
#: how long a newer claim must exist before the session is closed, in seconds
CONFLICT_GRACE_PERIOD = 10.0


class Reconciler:
    """Checks the rows of this node's sessions."""

    _log = Logger()

    def __init__(
        self, *, sessions: IClientSessions, registry: IRegistry, clock: IReactorTime, is_single_node: Callable[[], bool]
    ) -> None:
        """``is_single_node`` tells whether there are no other nodes; then nothing is checked."""
        self._sessions = sessions
        self._registry = registry
        self._is_single_node = is_single_node
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

    def _tick(self) -> Deferred[None] | None:
        """Check the next batch. A check that takes longer than the interval delays the next one."""
        if self._is_single_node():
            self._remaining = []
            return None
        if not self._remaining:
            self._remaining = self._sessions.client_ids()
            generation = self._sessions.generation
            self._conflicts = {
                key: found_at
                for key, found_at in self._conflicts.items()
                if generation(key.client_id) == key.generation
            }
        batch, self._remaining = self._remaining[-BATCH_SIZE:], self._remaining[:-BATCH_SIZE]
        return Deferred.fromCoroutine(self._check(batch)).addErrback(self._failed)

    async def _check(self, client_ids: list[str]) -> None:
        keys = [SessionKey(client_id, self._sessions.generation(client_id)) for client_id in client_ids]
        locations = await gatherResults(
            [self._registry.find(client_id) for client_id in client_ids], consumeErrors=True
        )
        for key, location in zip(keys, locations, strict=True):
            client_id, generation = key
            # A session that was opened or closed meanwhile is checked in the next pass.
            if not generation or generation != self._sessions.generation(client_id):
                continue
            if location is None:
                self._sessions.restore_claim(SessionKey(client_id, generation + 1))
            elif location.generation <= generation:
                self._conflicts.pop(key, None)
            else:
                found_at = self._conflicts.setdefault(key, self._clock())
                if self._clock() - found_at >= CONFLICT_GRACE_PERIOD:
                    self._sessions.close_superseded(SessionKey(client_id, location.generation))

    def _failed(self, failure: Failure) -> None:
        if isinstance(failure.value, FirstError):
            failure = failure.value.subFailure
        if not failure.check(RegistryUnavailableError):
            self._log.failure("error in checking sessions", failure)
