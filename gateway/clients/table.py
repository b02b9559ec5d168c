"""When an awake connection is parked: as soon as it is quiet, or some time after.

One that was just opened, or is just whole again after what woke it, is looked at in the next turn of the reactor. One
that could not be parked then, or that was busy when it was woken, is looked at every half second.

The table of the clients that are connected here: some are awake, each an object with a transport and a protocol; all
others are parked.

Who wants to say something to a client, or to know about it, need not know which. Who wants to do anything else to its
connection gets the record of one that is awake, and is woken for that if need be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer

from gateway.clients.interface import Client, IKeeper, Leaver, Presence
from gateway.clients.parked import Parking
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.util.cork import Turn
from gateway.util.log import Troubles
from gateway.util.rate_limit import Rate

#: how often connections are looked at that were not quiet, in seconds
LOOK_AGAIN = 0.5
#: how many of them in one turn of the reactor
SLICE = 500
#: A connection that is woken so soon after it was heard of is parked only after as long a silence: to wake one and park
#: it again takes ten times as long as Autobahn takes for a message.
BUSY = 1.0


class QuietWatch:
    """Waits for awake connections to become quiet."""

    def __init__(self, clock: IReactorTime, park: Callable[[Client], bool]) -> None:
        """``park`` parks a connection that is quiet; ``False`` if it is not."""
        self._clock = clock
        self._park = park
        self._troubles = Troubles(clock.seconds)
        self._soon: dict[Client, None] = {}
        self._later: dict[Client, None] = {}
        #: those of them that are still to be looked at this time
        self._round: list[Client] = []
        self._soon_timer: IDelayedCall | None = None
        self._later_timer: IDelayedCall | None = None

    def watch(self, client: Client) -> None:
        """Look at it in the next turn, and then until it could be parked."""
        self._later.pop(client, None)
        self._soon[client] = None
        if self._soon_timer is None:
            self._soon_timer = self._clock.callLater(0, self._look_soon)

    def rested(self, client: Client) -> None:
        """It may just have become quiet."""
        if not client.linger and client in self._later:
            self.watch(client)

    def discard(self, client: Client) -> None:
        """It is gone."""
        self._soon.pop(client, None)
        self._later.pop(client, None)

    def stop(self) -> None:
        """Stop the timers."""
        for timer in (self._soon_timer, self._later_timer):
            if timer is not None:
                timer.cancel()
        self._soon_timer = self._later_timer = None

    def _look_soon(self) -> None:
        self._soon_timer = None
        clients, self._soon = self._soon, {}
        for client in clients:
            if not self._parked(client):
                self._later[client] = None
        if self._later and self._later_timer is None:
            self._later_timer = self._clock.callLater(LOOK_AGAIN, self._look_later)

    def _look_later(self) -> None:
        if not self._round:
            self._round = list(self._later)
        some, self._round = self._round[-SLICE:], self._round[:-SLICE]
        for client in some:
            if client in self._later and self._parked(client):
                self._later.pop(client, None)
        again = 0 if self._round else LOOK_AGAIN
        self._later_timer = self._clock.callLater(again, self._look_later) if self._later else None

    def _parked(self, client: Client) -> bool:
        try:
            return self._park(client)
        except Exception:  # noqa: BLE001 (the others must not suffer)
            self._troubles.report("an error in parking a connection")
            return False


CLOSE_ABNORMAL = 1006
#: when it is tried again to park a connection that the kernel could not watch, in seconds
PARK_AGAIN = 60.0


@implementer(IKeeper)
class Table:
    """The clients of one node, by their ids."""

    def __init__(
        self,
        message_received: Callable[[str, int, bytes], int],
        ended: Callable[[Client, int], None],
        paused: Callable[[Client], None],
    ) -> None:
        """``message_received`` takes the messages of parked clients; ``ended`` is told that a connection is lost, with
        a close code, while it is still in the table; ``paused`` is to read no more from a client for a while."""
        self.message_received = message_received
        self._ended = ended
        self._pause = paused
        #: the records of those that are awake
        self.awake: dict[str, Client] = {}
        #: client_id, generation -> what no later token of theirs outlasts; of few
        self._caps: dict[tuple[str, int], float] = {}
        self._parked: dict[str, int] = {}
        self._parking: Parking | None = None
        self._quiet: QuietWatch | None = None
        self._park_after = 0.0

    def park_on(
        self,
        reactor: Any,
        adopt: Callable[[Leaver], Any],
        turn: Turn,
        settings: Settings,
        metrics: Metrics,
    ) -> Parking:
        """Park from now on whoever is quiet. ``adopt`` makes a connection of one that leaves, or raises ``OSError``."""
        per_second = settings.messages_per_client
        self._adopt = adopt
        self._seconds = reactor.seconds
        self._park_after = settings.park_after
        self._quiet = QuietWatch(reactor, self._park)
        self._parking = parking = Parking(
            self,
            reactor=reactor,
            turn=turn,
            metrics=metrics,
            max_message_size=settings.max_message_size,
            rate=Rate(per_second) if per_second > 0 else None,
        )
        self._parked = parking.fds
        self._generations = parking.generations
        self._send_parked = parking.send
        return parking

    def start(self) -> None:
        """Begin to read from those that are parked."""
        if self._parking is not None:
            self._parking.start()

    def stop(self) -> None:
        """Stop the timers, and drop who is still parked."""
        if self._quiet is not None:
            self._quiet.stop()
        if self._parking is not None:
            self._parking.stop()

    # All of them.

    def __len__(self) -> int:
        return len(self.awake) + len(self._parked)

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._parked or client_id in self.awake

    def parked(self) -> int:
        """How many are parked."""
        return len(self._parked)

    def ids(self) -> list[str]:
        """Their names, as a new list."""
        return [*self.awake, *self._parked]

    def presences(self) -> Iterator[Presence]:
        """All that are there when it is begun, as far as they are still there when it is their turn."""
        return filter(None, map(self.presence, self.ids()))

    # One of them.

    def presence(self, client_id: str) -> Presence | None:
        """The connection of a client."""
        client = self.awake.get(client_id)
        if client is not None:
            return Presence(client_id, client.generation, client.connected_at, client.address)
        return self._parking.presence(client_id) if self._parking is not None else None

    def generation(self, client_id: str) -> int:
        """The generation of a client's connection, or 0."""
        fd = self._parked.get(client_id)
        if fd is not None:
            return self._generations[fd]
        client = self.awake.get(client_id)
        return 0 if client is None else client.generation

    def send(self, client_id: str, payload: bytes, generation: int = 0) -> int:
        """See :meth:`~gateway.clients.interface.IEdge.send`."""
        if client_id in self._parked:
            return self._send_parked(client_id, payload, generation)
        client = self.awake.get(client_id)
        if client is None or client.connection is None or (generation and generation != client.generation):
            return 0
        return client.generation if client.connection.send_text(payload) else 0

    def renew(self, client_id: str, generation: int, until: float) -> bool:
        """See :meth:`~gateway.clients.interface.IEdge.renew`."""
        if not generation or self.generation(client_id) != generation:
            return False
        cap = self._caps.get((client_id, generation), 0.0)
        until = min(until or cap, cap or until)
        client = self.awake.get(client_id)
        if client is not None:
            client.until = until
        else:
            assert self._parking is not None
            self._parking.renew(client_id, until)
        return True

    def get(self, client_id: str) -> Client | None:
        """The record of a client, which is awake, or is woken for that."""
        if client_id in self._parked:
            assert self._parking is not None
            self._parking.wake(client_id)
        return self.awake.get(client_id)

    def add(self, client: Client) -> None:
        """A connection is open; it takes the place of an older one of the same client."""
        assert client.client_id not in self._parked
        self.awake[client.client_id] = client
        if client.cap:
            self._caps[client.client_id, client.generation] = client.cap
        if self._quiet is not None and client.connection is not None and client.connection.parkable:
            client.linger = self._park_after
            self._quiet.watch(client)

    def remove(self, client: Client) -> bool:
        """A connection is gone, or can be used no more. ``False`` if it is not in the table, or no longer."""
        self._caps.pop((client.client_id, client.generation), None)
        if self._quiet is not None:
            self._quiet.discard(client)
        if self.awake.get(client.client_id) is not client:
            return False
        del self.awake[client.client_id]
        return True

    def rested(self, client: Client) -> None:
        """A connection that is awake may have become quiet."""
        if self._quiet is not None:
            self._quiet.rested(client)

    def _park(self, client: Client) -> bool:
        connection = client.connection
        if connection is None or self.awake.get(client.client_id) is not client or self._parking is None:
            return True
        heard_at = connection.heard_at
        if self._seconds() - heard_at < client.linger or client.paused:
            return False
        taken = connection.detach()
        if taken is None:
            return False
        del self.awake[client.client_id]
        client.connection = None
        try:
            self._parking.park(client, *taken, heard_at)
        except OSError:
            # The kernel watches no more files. It stays awake, and is tried again when it has been silent for longer.
            self.wake(Leaver(client, *taken, heard_at, heard_at, b"", b""))
            client.linger = self._seconds() - heard_at + PARK_AGAIN
            raise
        return True

    # IKeeper.

    def wake(self, leaver: Leaver) -> Any:
        """See :meth:`IKeeper.wake`."""
        client = leaver.client
        self.awake[client.client_id] = client
        try:
            connection = self._adopt(leaver)
        except OSError:
            self._ended(client, CLOSE_ABNORMAL)
            return None
        client.connection = connection
        client.linger = self._park_after
        if self._seconds() - leaver.heard_before < BUSY:
            client.linger = max(BUSY, self._park_after)
        assert self._quiet is not None
        self._quiet.watch(client)
        if leaver.unsent:
            connection.sendData(leaver.unsent)
        if leaver.unread:
            connection.dataReceived(leaver.unread)
        return connection

    def lost(self, client: Client) -> None:
        """See :meth:`IKeeper.lost`."""
        self.awake[client.client_id] = client
        self._ended(client, CLOSE_ABNORMAL)

    def end(self, client_id: str, generation: int, code: int, reason: str) -> None:
        """See :meth:`IKeeper.end`."""
        client = self.get(client_id)
        if client is not None and client.generation == generation and client.connection is not None:
            client.connection.close_with(code, reason)

    def pause(self, client_id: str, generation: int) -> None:
        """See :meth:`IKeeper.pause`."""
        client = self.get(client_id)
        if client is not None and client.generation == generation:
            self._pause(client)
