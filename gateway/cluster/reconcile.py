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

from gateway.clients.interface import IEdge
from gateway.registry.interface import IRegistry, RegistryUnavailable

#: so many clients are looked up so often, in seconds: it is one statement
SLICE, EVERY = 200, 1.0
#: for so long a newer claim must have been there, in seconds
SETTLED = 10.0


class Audit:
    """Looks after the rows of one node's clients; ``alone`` tells whether there are no other nodes."""

    _log = Logger()

    def __init__(self, *, edge: IEdge, registry: IRegistry, clock: IReactorTime, alone: Callable[[], bool]) -> None:
        self._edge = edge
        self._registry = registry
        self._alone = alone
        #: those that are still to be looked at this time
        self._round: list[str] = []
        #: client_id -> its generation here, and when a newer claim was first seen
        self._suspects: dict[str, tuple[int, float]] = {}
        self._seconds = clock.seconds
        self._loop = LoopingCall(self._turn)
        self._loop.clock = clock

    def start(self) -> None:
        """Begin."""
        self._loop.start(EVERY, now=False).addErrback(lambda failure: self._log.failure("the audit ended", failure))

    def stop(self) -> None:
        """End."""
        if self._loop.running:
            self._loop.stop()

    def _turn(self) -> Deferred[None] | None:
        """Look at the next few. A turn that takes longer than the pause makes the next one wait."""
        if self._alone():
            self._round = []
            return None
        if not self._round:
            self._round = self._edge.client_ids()
            here = self._edge.generation
            self._suspects = {name: suspect for name, suspect in self._suspects.items() if here(name) == suspect[0]}
        some, self._round = self._round[-SLICE:], self._round[:-SLICE]
        return Deferred.fromCoroutine(self._look_at(some)).addErrback(self._failed)

    async def _look_at(self, some: list[str]) -> None:
        believed = [(client_id, self._edge.generation(client_id)) for client_id in some]
        found = await gatherResults([self._registry.find(client_id) for client_id in some], consumeErrors=True)
        for (client_id, generation), location in zip(believed, found, strict=True):
            # One that came or went meanwhile is looked at another time.
            if not generation or generation != self._edge.generation(client_id):
                continue
            if location is None:
                self._edge.restore(client_id, generation + 1)
            elif location.generation <= generation:
                self._suspects.pop(client_id, None)
            elif self._seconds() - self._suspects.setdefault(client_id, (generation, self._seconds()))[1] >= SETTLED:
                self._edge.superseded(client_id, location.generation)

    def _failed(self, failure: Failure) -> None:
        if isinstance(failure.value, FirstError):
            failure = failure.value.subFailure
        if not failure.check(RegistryUnavailable):
            self._log.failure("error in the audit", failure)
