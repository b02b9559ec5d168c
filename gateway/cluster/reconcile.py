"""Whether the registry still says of each client here what this node believes.

A node is told when another takes a client of its, but two nodes that cannot reach each other cannot tell; and a claim
whose end nobody saw may have cost an older connection its row. So a node of a fleet reads the rows of its own clients
again and again, a few each second, by their keys:

    a newer claim of another node     -> if it is still there after a while, the connection is closed with 4001
    no row                            -> it is claimed again

After a while, since a newer claim that nobody waited for is taken back within seconds.
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
from gateway.registry.interface import IRegistry

#: so many clients are looked up so often, in seconds: it is one statement
BATCH_SIZE, CHECK_INTERVAL = 200, 1.0
#: for so long a newer claim must have been there, in seconds
CONFLICT_GRACE_PERIOD = 10.0


class Reconciler:
    """Looks after the rows of one node's clients; ``alone`` tells whether there are no other nodes."""

    _log = Logger()

    def __init__(
        self, *, sessions: IClientSessions, registry: IRegistry, clock: IReactorTime, is_single_node: Callable[[], bool]
    ) -> None:
        self._sessions = sessions
        self._registry = registry
        self._is_single_node = is_single_node
        #: those that are still to be looked at this time
        self._remaining: list[str] = []
        #: client_id -> its generation here, and when a newer claim was first seen
        self._conflicts: dict[str, tuple[int, float]] = {}
        self._clock = clock.seconds
        self._loop = LoopingCall(self._tick)
        self._loop.clock = clock

    def start(self) -> None:
        """Begin."""
        self._loop.start(CHECK_INTERVAL, now=False).addErrback(
            lambda failure: self._log.failure("the audit ended", failure)
        )

    def stop(self) -> None:
        """End."""
        if self._loop.running:
            self._loop.stop()

    def _tick(self) -> Deferred[None] | None:
        """Look at the next few. A turn that takes longer than the pause makes the next one wait."""
        if self._is_single_node():
            self._remaining = []
            return None
        if not self._remaining:
            self._remaining = self._sessions.client_ids()
            here = self._sessions.generation
            self._conflicts = {name: suspect for name, suspect in self._conflicts.items() if here(name) == suspect[0]}
        some, self._remaining = self._remaining[-BATCH_SIZE:], self._remaining[:-BATCH_SIZE]
        return Deferred.fromCoroutine(self._check(some)).addErrback(self._failed)

    async def _check(self, client_ids: list[str]) -> None:
        believed = [(client_id, self._sessions.generation(client_id)) for client_id in client_ids]
        found = await gatherResults([self._registry.find(client_id) for client_id in client_ids], consumeErrors=True)
        for (client_id, generation), location in zip(believed, found, strict=True):
            # One that came or went meanwhile is looked at another time.
            if not generation or generation != self._sessions.generation(client_id):
                continue
            if location is None:
                self._sessions.restore_claim(client_id, generation + 1)
            elif location.generation <= generation:
                self._conflicts.pop(client_id, None)
            elif (
                self._clock() - self._conflicts.setdefault(client_id, (generation, self._clock()))[1]
                >= CONFLICT_GRACE_PERIOD
            ):
                self._sessions.close_superseded(client_id, location.generation)

    def _failed(self, failure: Failure) -> None:
        if isinstance(failure.value, FirstError):
            failure = failure.value.subFailure
        if not failure.check(RegistryUnavailableError):
            self._log.failure("error in the audit", failure)
