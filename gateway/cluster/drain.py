"""Sending clients away, one by one, without losing a call.

<- {"jsonrpc":"2.0","method":"gateway.goaway","params":{"reason":"drain","url":"wss://…","after":0.3}}
-> {"jsonrpc":"2.0","id":"5f0c…","result":{"free":12}}     the responses to the calls that it had before
<- close 1012                                              when there are no more

From the goaway on the client is called no more by that connection. Its row stays for a moment longer than that: whoever
looks for the client asks here, and is answered when it is at the next node.

Ending relays: a client of another node whose bytes go through this one is sent away by the node that it is a client
of, which alone knows where a frame ends, and which calls are in flight; what is left of the relay when these must be
over is cut.

-> peer.close {"client","generation","code":1012,"reason"}     the node tells it gateway.goaway with a url of its own

The end of a drain for backends: no client is left here, but calls to clients of other nodes may go through this one.

<- {"jsonrpc":"2.0","method":"gateway.goaway","params":{"reason":"drain"}}       to each backend's WebSocket
-> {"jsonrpc":"2.0","id":7,"method":"client.call","params":{…}}                  half a second later:
<- {"jsonrpc":"2.0","id":7,"error":{"code":-32004,…,"data":{…,"sent":false}}}    another node can be asked at once

Sending every client away, spread over a time, so that the node can end and nobody is met by a stampede.

Client i of n is told to go when i/n of the time is over, and is closed when its calls are (farewells.py).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.clients.interface import IEdge
from gateway.cluster.interface import IPeers, PeerUnreachable
from gateway.protocol.frames import CLOSE_RESTART
from gateway.protocol.jsonrpc import encode_notification
from gateway.registry.interface import IRegistry, RegistryUnavailable
from gateway.rpc.handoff import HOLD

#: seconds between two looks at calls in flight, and at what a drain has to do
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


#: how long a closing handshake through a relay may take, in seconds
CLOSING = 3.0


class Departures:
    """Sends away the clients that are relayed through this node; ``cut`` ends the relay of one at once."""

    _log = Logger()

    def __init__(
        self,
        *,
        registry: IRegistry,
        peers: IPeers,
        clock: IReactorTime,
        cut: Callable[[str], object],
        longest_call: float,
    ) -> None:
        """``longest_call`` is in seconds."""
        self._registry = registry
        self._peers = peers
        self._clock = clock
        self._cut = cut
        self._patience = longest_call + CLOSING
        self._leaving: set[str] = set()

    def end(self, client_id: str) -> None:
        """Send one away, unless that is under way."""
        if client_id not in self._leaving:
            self._leaving.add(client_id)
            Deferred.fromCoroutine(self._end(client_id)).addErrback(self._failed)

    async def _end(self, client_id: str) -> None:
        try:
            location = await self._registry.find(client_id)
            if location is not None and await self._peers.close(location, CLOSE_RESTART, "drain"):
                await deferLater(self._clock, self._patience)
        except (RegistryUnavailable, PeerUnreachable):
            pass  # then it is told nothing but the end of its connection
        finally:
            self._leaving.discard(client_id)
            self._cut(client_id)

    def _failed(self, failure: Failure) -> None:
        self._log.failure("error in ending a relay", failure)


#: how long backends that were told to go have for going, in seconds; and how long those who did not are refused, before
#: their connections are closed, with which nobody can tell what became of what they send just then
GRACE = 0.5

GOAWAY = encode_notification("gateway.goaway", b'{"reason":"drain"}')


class LastCalls:
    """Lets the calls end that backends have in flight through this node, and begins none."""

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        *,
        longest_call: float,
        refuse: Callable[[], None],
        in_flight: Callable[[], int],
        tell_backends: Callable[[bytes], int],
    ) -> None:
        """``refuse`` has every new call refused, ``in_flight`` counts those that are not over, ``longest_call`` is the
        most that they may take, in seconds. ``tell_backends`` sends a message to the WebSockets of backends, and
        returns how many there are."""
        self._clock = clock
        self._longest_call = longest_call
        self._refuse = refuse
        self._in_flight = in_flight
        self._tell_backends = tell_backends

    async def over(self) -> None:
        """Have backends go, then refuse new calls, and wait until those in flight are over."""
        told = self._tell_backends(GOAWAY)
        if told:
            await deferLater(self._clock, GRACE)
        self._refuse()
        began = self._clock.seconds()
        while (calls := self._in_flight()) and self._clock.seconds() - began < self._longest_call:
            await deferLater(self._clock, TICK)
        if calls:
            self._log.warn("{n} calls are still in flight, and end with this node", n=calls)
        if told:
            await deferLater(self._clock, GRACE)


class Drain:
    """One drain of one node."""

    _log = Logger()

    def __init__(
        self,
        edge: IEdge,
        clock: IReactorTime,
        seconds: float,
        *,
        farewells: Farewells,
        departing: Callable[[], int] = lambda: 0,
        alone: Callable[[], bool] = lambda: False,
        url_for: Callable[[str], str | None],
        relayed: Callable[[], list[str]] = list,
        end_relay: Callable[[str], object] = lambda client_id: None,
    ) -> None:
        """``departing`` tells how many clients are on their way to other nodes: calls to them wait here, and must be
        told when they have arrived. ``alone`` tells whether there is no other node. ``url_for`` gives the complete url
        that a client is to connect to, or ``None``. ``relayed`` lists the clients of other nodes whose bytes go through
        this one, and ``end_relay`` has one closed."""
        self._edge = edge
        self._clock = clock
        self._seconds = seconds
        self._farewells = farewells
        self._departing = departing
        self._alone = alone
        self._url_for = url_for
        self._relayed = relayed
        self._end_relay = end_relay
        #: who is to be told yet, and how
        self._waiting: list[tuple[Callable[[str], object], str]] = []
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
        told = self._farewells.told
        self._waiting = [(self._tell, client_id) for client_id in self._edge.client_ids() if not told(client_id)]
        self._waiting += [(self._end_relay, client_id) for client_id in self._relayed()]
        self._total = len(self._waiting)

    def _turn(self) -> None:
        elapsed = self._clock.seconds() - self._started
        # The first at once, so that a node with few clients ends early.
        share = elapsed / self._seconds if self._seconds else 1.0
        due = min(self._total, int(share * self._total) + 1)
        while self._waiting and self._total - len(self._waiting) < due:
            tell, client_id = self._waiting.pop()
            tell(client_id)
        if not self._waiting:
            # Whoever was still opening its connection when the drain began.
            self._list()
            if not self._waiting and not self._farewells and not self._departing():
                self._loop.stop()

    def _tell(self, client_id: str) -> None:
        longest = LONGEST_WAIT if self._seconds else LONGEST_WAIT_AT_ONCE
        least = 0.0
        if self._alone():
            # Whoever comes back to this very node does so in vain before it has ended.
            least = max(0.0, self._started + self._seconds - self._clock.seconds())
        self._farewells.say(client_id, "drain", self._url_for(client_id), least_wait=least, longest_wait=longest)
