"""Sending every client away, spread over a time, so that the node can end and nobody is met by a stampede.

<- {"jsonrpc":"2.0","method":"gateway.goaway","params":{"reason":"drain","url":"wss://…","after":1.5}}
<- close 1012

A client with calls in flight is told to go at its turn too, but is closed only when they have ended.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.edge.interface import CLOSE_RESTART, IEdge
from gateway.rpc.jsonrpc import encode_notification

#: how often the drain looks what is due, in seconds
TICK = 0.05
#: the longest that a client is asked to wait before it connects again, in seconds
LONGEST_WAIT = 2.0


class Drain:
    """One drain of one node."""

    _log = Logger()

    def __init__(
        self,
        edge: IEdge,
        clock: IReactorTime,
        seconds: float,
        *,
        longest_call: float,
        let_go: Callable[[str], None],
        in_flight: Callable[[str], int],
        url_for: Callable[[str], str | None],
        relayed: Callable[[], list[str]] = list,
        end_relay: Callable[[str], object] = lambda client_id: None,
    ) -> None:
        """``let_go`` is told of each client that was told to go: no call to it or from it may begin from then on.
        ``in_flight`` gives how many of those that had begun are not over, and ``longest_call`` the longest that they
        may take, in seconds. ``url_for`` gives the complete url that a client is to connect to, or ``None``.
        ``relayed`` lists the clients of other nodes whose bytes go through this one, and ``end_relay`` has one closed.
        """
        self._edge = edge
        self._clock = clock
        self._seconds = seconds
        self._longest_call = longest_call
        self._let_go = let_go
        self._in_flight = in_flight
        self._url_for = url_for
        self._relayed = relayed
        self._end_relay = end_relay
        #: who is to be told yet, and how
        self._waiting: list[tuple[Callable[[str], object], str]] = []
        self._told: set[str] = set()
        self._started = 0.0
        self._total = 0
        self._loop = LoopingCall(self._turn)

    def start(self) -> Deferred[None]:
        """Begin; the Deferred fires when no client is left."""
        self._list()
        random.shuffle(self._waiting)
        self._started = self._clock.seconds()
        self._log.info("draining {n} clients over {seconds:g} s", n=self._total, seconds=self._seconds)
        self._loop.clock = self._clock
        return self._loop.start(TICK).addCallback(lambda _: None)

    def _list(self) -> None:
        self._waiting = [(self._tell, client_id) for client_id in self._edge.client_ids()]
        self._waiting += [(self._end_relay, client_id) for client_id in self._relayed()]
        self._total = len(self._waiting)

    def _turn(self) -> None:
        elapsed = self._clock.seconds() - self._started
        # Client i of n goes at i/n of the window: the first at once, so that a node with few clients ends early.
        share = elapsed / self._seconds if self._seconds else 1.0
        due = min(self._total, int(share * self._total) + 1)
        while self._waiting and self._total - len(self._waiting) < due:
            tell, client_id = self._waiting.pop()
            tell(client_id)
        over = elapsed >= self._seconds + self._longest_call
        for client_id in [one for one in self._told if over or not self._in_flight(one)]:
            self._told.discard(client_id)
            self._edge.close(client_id, CLOSE_RESTART, "drain").addErrback(self._close_failed)
        if not self._waiting and not self._told:
            # Whoever was still opening its connection when the drain began.
            self._list()
            if not self._waiting:
                self._loop.stop()

    def _tell(self, client_id: str) -> None:
        params: dict[str, object] = {"reason": "drain"}
        if (url := self._url_for(client_id)) is not None:
            params["url"] = url
        params["after"] = round(random.uniform(0, LONGEST_WAIT), 2)
        if self._edge.send(client_id, encode_notification("gateway.goaway", msgspec.json.encode(params))):
            self._let_go(client_id)
            self._told.add(client_id)

    def _close_failed(self, failure: Failure) -> None:
        # The connection is closed all the same; its row goes with the node's.
        self._log.debug("a drained client's row stays for now: {reason}", reason=failure.getErrorMessage())
