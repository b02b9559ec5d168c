"""Sending clients away, one by one, without losing a call.

<- {"jsonrpc":"2.0","method":"gateway.goaway","params":{"reason":"drain","url":"wss://…","after":0.3}}
-> {"jsonrpc":"2.0","id":"5f0c…","result":{"free":12}}     the responses to the calls that it had before
<- close 1012                                              when there are no more

From the goaway on the client is called no more by that connection. Its row stays for a moment longer than that: whoever
looks for the client asks here, and is answered when it is at the next node.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.edge.interface import CLOSE_RESTART, IEdge
from gateway.registry.interface import RegistryUnavailable
from gateway.rpc.departing import HOLD
from gateway.rpc.jsonrpc import encode_notification

#: how often it is looked whose calls are over, in seconds
TICK = 0.05
#: the longest that a client is asked to wait before it connects again, in seconds: short where whoever sends clients
#: away spreads them already, and long where all go at once
LONGEST_WAIT, LONGEST_WAIT_AT_ONCE = 0.2, 1.5


class Farewells:
    """The clients of one node that were told to go, and are not gone yet."""

    _log = Logger()

    def __init__(
        self,
        edge: IEdge,
        clock: IReactorTime,
        *,
        longest_call: float,
        let_go: Callable[[str, int, bool], None],
        in_flight: Callable[[str, int], int],
        release: Callable[[str, int], Deferred[None]],
        alone: Callable[[], bool],
    ) -> None:
        """``let_go`` is told of each connection (client_id and generation) whose client was told to go, and whether it
        goes to another node: no call to it or from it may begin from then on. ``in_flight`` gives how many of those
        that had begun are not over, and ``longest_call`` the longest that they may take, in seconds. ``release``
        removes the row of a connection, and ``alone`` tells whether there is no other node."""
        self._edge = edge
        self._clock = clock
        self._longest_call = longest_call
        self._let_go = let_go
        self._in_flight = in_flight
        #: client_id -> the generation of its connection, when that is closed at the latest, and why
        self._told: dict[str, tuple[int, float, str]] = {}
        self._release = release
        self._alone = alone
        #: when the rows of those are removed that were closed, the first first
        self._rows: deque[tuple[float, str, int]] = deque()
        self._loop = LoopingCall(self._look)
        self._loop.clock = clock

    def __len__(self) -> int:
        return len(self._told)

    def told(self, client_id: str) -> int:
        """The generation of a client's connection that it was told to leave, and has not left; else 0."""
        return self._told[client_id][0] if client_id in self._told else 0

    def say(
        self,
        client_id: str,
        reason: str,
        url: str | None,
        *,
        least_wait: float = 0.0,
        longest_wait: float = LONGEST_WAIT,
    ) -> bool:
        """Tell a client to go, to that complete url if there is one, after ``least_wait`` and a random wait of at most
        ``longest_wait`` seconds; it is closed when its calls are over. ``False`` if it is not here, or was told
        already."""
        generation = self._edge.generation(client_id)
        if not generation or self.told(client_id) == generation:
            return False
        params: dict[str, object] = {"reason": reason}
        if url is not None:
            params["url"] = url
        params["after"] = round(least_wait + random.uniform(0, longest_wait), 2)
        goaway = encode_notification("gateway.goaway", msgspec.json.encode(params))
        if not self._edge.send(client_id, goaway, generation):
            return False
        self._let_go(client_id, generation, not self._alone())
        self._told[client_id] = generation, self._clock.seconds() + self._longest_call, reason
        self._end(client_id)
        if (self._told or self._rows) and not self._loop.running:
            self._loop.start(TICK, now=False).addErrback(self._broken)
        return True

    def stop(self) -> None:
        """Close nobody any more."""
        if self._loop.running:
            self._loop.stop()

    def _look(self) -> None:
        for client_id in list(self._told):
            self._end(client_id)
        self._release_rows(self._clock.seconds())
        if not self._told and not self._rows:
            self._loop.stop()

    def _end(self, client_id: str) -> None:
        """Close a connection if it has no more calls, or has had the time for them."""
        generation, latest, reason = self._told[client_id]
        if self._in_flight(client_id, generation) and self._clock.seconds() < latest:
            return
        del self._told[client_id]
        if keeps := not self._alone():
            self._rows.append((self._clock.seconds() + HOLD, client_id, generation))
        closing = self._edge.close(client_id, CLOSE_RESTART, reason, generation, keep_row=keeps)
        closing.addErrback(self._close_failed)

    def _release_rows(self, now: float) -> None:
        while self._rows and self._rows[0][0] <= now:
            _, client_id, generation = self._rows.popleft()
            self._release(client_id, generation).addErrback(self._close_failed)

    def _close_failed(self, failure: Failure) -> None:
        # The connection is closed; the registry keeps what it could not write yet, and tells of its troubles itself.
        if not failure.check(RegistryUnavailable):
            self._log.failure("error in releasing a client that was told to go", failure)

    def _broken(self, failure: Failure) -> None:
        self._log.failure("error in sending clients away", failure)
