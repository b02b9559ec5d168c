"""Whether a client that arrives is let in, and where it is to be.

    arrival -> no room -> placement -> Elsewhere                    a url, or a relay to the node with the most room
            -> claim -> Client                                      it is to be opened here
            -> claim -> HeldElsewhere -> placement -> Elsewhere     or, if that node does not have it, a claim over it
            -> claim -> PlacedElsewhere -> placement -> Elsewhere   or, if that node does not take it, a claim as ever
            -> Refusal

A client that was sent here by a node is never sent on: it is claimed here, or refused.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime

from gateway.clients.interface import Arrival, Client, Elsewhere, IPlacement
from gateway.clients.table import Table
from gateway.protocol.handshake import Refusal, retry_after
from gateway.registry.interface import (
    Claim,
    HeldElsewhere,
    IRegistry,
    Location,
    PlacedElsewhere,
    RegistryUnavailable,
    Superseded,
)
from gateway.settings import Settings
from gateway.util.rate_limit import Recent

#: how long an opening handshake waits for its claims, in seconds
CLAIM_TIMEOUT = 3.0
#: so often within so many seconds a connection may be replaced by a newer one of the same client
MAX_REPLACEMENTS = 5
REPLACEMENTS_WITHIN = 60.0
#: so many times it is asked where a client is that moves meanwhile; then it is claimed, wherever it is
MAX_ROUNDS = 3

#: why no clients are taken -> what a client is told, and the seconds after which it may try again
_UNAVAILABLE = {
    "starting": ("this node is just starting", 1),
    "draining": ("this node is going away; another one will take you", 1),
    "registry": ("this node cannot reach its registry", 2),
}


class Admission:
    """The way in, of one node."""

    #: where clients may be sent; without it this node is alone
    placement: IPlacement | None = None

    def __init__(
        self,
        table: Table,
        *,
        registry: IRegistry,
        clock: IReactorTime,
        settings: Settings,
        available: Callable[[], str],
        again: Callable[[str, int], None] = lambda client_id, generation: None,
    ) -> None:
        """``available`` gives the word why no clients are taken now, or an empty text when they are. ``again`` is
        told what :meth:`superseded` was told, when the claims are settled that were under way."""
        self._table = table
        self._registry = registry
        self._clock = clock
        self._capacity = settings.capacity
        self._available = available
        self._again = again
        #: client_id -> the newest claim elsewhere that was heard of while claims were under way here
        self._superseded: dict[str, int] = {}
        #: those that await their claim, or are just being opened, by client_id
        self._claiming: dict[str, set[Client]] = {}
        self._claims = 0
        self._waiters: dict[str, list[Deferred[None]]] = {}
        self._closed = False
        self._replacements = Recent(MAX_REPLACEMENTS, REPLACEMENTS_WITHIN, clock.seconds)

    def close(self) -> None:
        """Let nobody in any more, nor those that await their claim."""
        self._closed = True
        for clients in list(self._claiming.values()):
            for client in list(clients):
                if client.claiming is not None:
                    client.claiming.cancel()

    @property
    def closed(self) -> bool:
        """Whether nobody is let in any more."""
        return self._closed

    def opening(self, client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        """See :meth:`~gateway.clients.interface.IEdge.opening`."""
        if client_id not in self._claiming or self._table.generation(client_id) > newer_than:
            return None
        waiter: Deferred[None] = Deferred()
        self._waiters.setdefault(client_id, []).append(waiter)
        return waiter

    def replaced(self, client_id: str) -> None:
        """A connection of a client was replaced by a newer one, here or elsewhere."""
        self._replacements.add(client_id)

    def settled(self, client: Client) -> None:
        """The outcome of a claim is known, and the table shows it."""
        clients = self._claiming.get(client.client_id)
        if clients is None or client not in clients:
            return
        clients.discard(client)
        self._claims -= 1
        if not clients:
            del self._claiming[client.client_id]
        if not clients or client.client_id in self._table:
            for waiter in self._waiters.pop(client.client_id, ()):
                waiter.callback(None)
        if not clients and (newer := self._superseded.pop(client.client_id, 0)):
            self._again(client.client_id, newer)

    def superseded(self, client_id: str, generation: int) -> None:
        """A claim of that generation was made elsewhere: one that is under way here may turn out to be older."""
        if client_id in self._claiming:
            self._superseded[client_id] = max(generation, self._superseded.get(client_id, 0))

    async def admit(self, arrival: Arrival) -> Client | Elsewhere:
        """Let a client in: its connection is to be opened, and then settled. Or learn where it is to be.

        Raises :class:`~gateway.protocol.handshake.Refusal`.
        """
        left = CLAIM_TIMEOUT
        over, placed = self._over(arrival), self._is_placed(arrival)
        for again in reversed(range(MAX_ROUNDS)):
            if not self._has_room(arrival.client_id):
                return await self._overflow(arrival)
            began = self._clock.seconds()
            try:
                return await self._claim(arrival, over, placed, max(0.0, left))
            except (HeldElsewhere, PlacedElsewhere) as e:
                off = e
            left -= self._clock.seconds() - began
            if isinstance(off, PlacedElsewhere):
                assert self.placement is not None
                elsewhere = await self.placement.send(arrival, off.place)
                # If it is not taken there, it is as if it were not placed.
                placed = False
            else:
                elsewhere = await self._route(arrival, off.location)
                over = off.location.generation if again > 1 else None
            if elsewhere is not None:
                return elsewhere
        raise self._unavailable("registry")

    def _over(self, arrival: Arrival) -> int | None:
        """Which claims of other nodes it may be claimed over."""
        if self.placement is None:
            return None
        routes = self.placement.routes and not arrival.sent_here
        return 0 if routes or self._replacements.wait(arrival.client_id) else None

    def _is_placed(self, arrival: Arrival) -> bool:
        """Whether a placement of the client, if there is one, is to be followed. Those of two programs with one
        client_id evict each other no more than any."""
        if self.placement is None or arrival.sent_here or not self.placement.places():
            return False
        return not self._replacements.wait(arrival.client_id)

    async def _route(self, arrival: Arrival, held: Location) -> Elsewhere | None:
        assert self.placement is not None
        if self.placement.routes and not arrival.sent_here:
            return await self.placement.route(arrival, held)
        if held.live and held.state == "up":
            self._check_replacements(arrival.client_id, 1)
        return None

    async def _overflow(self, arrival: Arrival) -> Elsewhere:
        elsewhere = None
        if self.placement is not None and not arrival.sent_here:
            elsewhere = await self.placement.overflow(arrival)
        if elsewhere is None:
            raise Refusal(503, "full", "this node has all the clients that it can take", [retry_after(1)])
        return elsewhere

    async def _claim(self, arrival: Arrival, over: int | None, placed: bool, timeout: float) -> Client:
        client_id, judge = arrival.client_id, self.placement is not None and self.placement.judges()
        client = Client(client_id, arrival.address, until=arrival.until, cap=arrival.cap)
        self._claiming.setdefault(client_id, set()).add(client)
        self._claims += 1
        try:
            client.claiming = self._registry.claim(client_id, arrival.address, over=over, judge=judge, placed=placed)
            claim: Claim = await client.claiming.addTimeout(timeout, self._clock)
        except Superseded:
            # It opens, to be told so.
            return client
        except Exception as e:
            self.settled(client)
            # It may be in after all: then the registry takes it back, and tells when it has.
            if isinstance(e, (RegistryUnavailable, TimeoutError)):
                raise self._unavailable("registry") from None
            if isinstance(e, CancelledError) and self._closed:
                raise self._unavailable("draining") from None
            raise
        finally:
            client.claiming = None
        client.claimed = True
        client.generation = claim.generation
        client.connected_at = claim.connected_at
        client.before = claim.before
        if claim.before is not None and claim.before.live and claim.before.state == "up":
            self.replaced(client_id)
        return client

    def _has_room(self, client_id: str) -> bool:
        """Whether there is room for a connection of a client. Raises :class:`Refusal` if it cannot be let in at all."""
        word = "draining" if self._closed else self._available()
        if word:
            raise self._unavailable(word)
        here = client_id in self._table
        # Those that await their claims will replace it, and each other.
        coming = here + len(self._claiming.get(client_id, ()))
        if coming:
            self._check_replacements(client_id, coming)
        return here or len(self._table) + self._claims < self._capacity

    def _check_replacements(self, client_id: str, coming: int) -> None:
        wait = self._replacements.wait(client_id, coming)
        if wait:
            raise Refusal(
                429,
                "replaced",
                f"this client was connected more than {MAX_REPLACEMENTS} times in {REPLACEMENTS_WITHIN:g} s: is it "
                "running twice?",
                [retry_after(wait)],
            )

    @staticmethod
    def _unavailable(word: str) -> Refusal:
        message, seconds = _UNAVAILABLE.get(word, ("this node takes no clients now", 1))
        return Refusal(503, word, message, [retry_after(seconds)])
