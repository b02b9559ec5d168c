"""What one other node is still to be told: clients that it had, and that a newer claim has since.

-> peer.moved {"client","generation","node"}           <- null
-> peer.taken_back {"client","generation","node"}      <- null     or that such a claim is no more

It is told again until it has answered, or is gone.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.cluster.interface import PeerUnreachable

#: so many are told at once, and so many wait at most; then the oldest is forgotten: its old connection, if there still
#: is one, is called by nobody
AT_ONCE, MOST = 256, 65536
#: how long it is until a node is told again that could not be, in seconds: at first, and at most
FIRST_WAIT, LONGEST_WAIT = 0.25, 2.0

#: a client's id, and the generation of its newer claim
Move = tuple[str, int]


class Moves:
    """The moves that one node is to be told of."""

    _log = Logger()

    def __init__(
        self, clock: IReactorTime, tell: Callable[[list[Move]], Deferred[list[Move]]], done: Callable[[], None]
    ) -> None:
        """``tell`` tells the node, and fires with those that need not be told again; it may fail with
        ``PeerUnreachable``. ``done`` is called whenever none is left."""
        self._clock = clock
        self._tell = tell
        self._done = done
        self._waiting: dict[str, int] = {}
        self._telling: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, client_id: str, generation: int) -> None:
        """The node is to be told that a client has a claim of that generation."""
        waiting = self._waiting
        waiting[client_id] = max(generation, waiting.pop(client_id, 0))
        if len(waiting) > MOST:
            del waiting[next(iter(waiting))]
        if self._telling is None:
            self._telling = Deferred.fromCoroutine(self._tell_all())
            self._telling.addErrback(self._failed).addCallback(self._told)

    def stop(self) -> None:
        """Tell no more."""
        self._waiting.clear()
        if self._telling is not None:
            self._telling.cancel()

    async def _tell_all(self) -> None:
        # Those of one turn go together.
        await deferLater(self._clock, 0)
        wait = FIRST_WAIT
        while self._waiting:
            some = list(self._waiting.items())[:AT_ONCE]
            try:
                told = await self._tell(some)
            except PeerUnreachable:
                told = []
            for client_id, generation in told:
                # Meanwhile there may be a newer one.
                if self._waiting.get(client_id) == generation:
                    del self._waiting[client_id]
            if told:
                wait = FIRST_WAIT
            elif self._waiting:
                await deferLater(self._clock, wait)
                wait = min(2 * wait, LONGEST_WAIT)

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._log.failure("error in telling another node of clients that moved", failure)

    def _told(self, _: object) -> None:
        self._telling = None
        self._done()
