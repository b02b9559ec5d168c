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
from functools import lru_cache

from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime

from gateway.clients.interface import ConnectRequest, IClientRouter, RouteDecision, Session
from gateway.clients.table import SessionTable
from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import retry_after_header
from gateway.registry.errors import (
    AssignedElsewhereError,
    ClaimSupersededError,
    OwnedElsewhereError,
    RegistryUnavailableError,
)
from gateway.registry.interface import Claim, ClaimPolicy, IRegistry, Location
from gateway.settings import Settings
from gateway.util.rate_limit import SlidingWindow

#: how long an opening handshake waits for its claims, in seconds
CLAIM_TIMEOUT = 3.0
#: so often within so many seconds a connection may be replaced by a newer one of the same client
MAX_REPLACEMENTS = 5
REPLACEMENT_WINDOW = 60.0
#: so many times it is asked where a client is that moves meanwhile; then it is claimed, wherever it is
MAX_CLAIM_ATTEMPTS = 3

#: why no clients are taken -> what a client is told, and the seconds after which it may try again
_UNREADY_MESSAGES = {
    "starting": ("this node is just starting", 1),
    "draining": ("this node is going away; another one will take you", 1),
    "registry": ("this node cannot reach its registry", 2),
}


#: makes one object for each distinct policy, since most claims have one of a few
_cached_policy = lru_cache(maxsize=16)(ClaimPolicy)


class Admission:
    """The way in, of one node."""

    #: where clients may be sent; without it this node is alone
    router: IClientRouter | None = None

    def __init__(
        self,
        table: SessionTable,
        *,
        registry: IRegistry,
        clock: IReactorTime,
        settings: Settings,
        unready_reason: Callable[[], str],
        on_superseded: Callable[[str, int], None] = lambda client_id, generation: None,
    ) -> None:
        """``available`` gives the word why no clients are taken now, or an empty text when they are. ``again`` is
        told what :meth:`superseded` was told, when the claims are settled that were under way."""
        self._table = table
        self._registry = registry
        self._clock = clock
        self._capacity = settings.capacity
        self._unready_reason = unready_reason
        self._on_superseded = on_superseded
        #: client_id -> the newest claim elsewhere that was heard of while claims were under way here
        self._newest_claim_elsewhere: dict[str, int] = {}
        #: those that await their claim, or are just being opened, by client_id
        self._claiming: dict[str, set[Session]] = {}
        self._claim_count = 0
        self._waiters: dict[str, list[Deferred[None]]] = {}
        self._closed = False
        self._replacements = SlidingWindow(MAX_REPLACEMENTS, REPLACEMENT_WINDOW, clock.seconds)

    def close(self) -> None:
        """Let nobody in any more, nor those that await their claim."""
        self._closed = True
        for clients in list(self._claiming.values()):
            for client in list(clients):
                if client.pending_claim is not None:
                    client.pending_claim.cancel()

    @property
    def closed(self) -> bool:
        """Whether nobody is let in any more."""
        return self._closed

    def claim_in_progress(self, client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        """See :meth:`~gateway.clients.interface.IEdge.opening`."""
        if client_id not in self._claiming or self._table.generation(client_id) > newer_than:
            return None
        waiter: Deferred[None] = Deferred()
        self._waiters.setdefault(client_id, []).append(waiter)
        return waiter

    def record_replacement(self, client_id: str) -> None:
        """A connection of a client was replaced by a newer one, here or elsewhere."""
        self._replacements.add(client_id)

    def claim_finished(self, session: Session) -> None:
        """The outcome of a claim is known, and the table shows it."""
        clients = self._claiming.get(session.client_id)
        if clients is None or session not in clients:
            return
        clients.discard(session)
        self._claim_count -= 1
        if not clients:
            del self._claiming[session.client_id]
        if not clients or session.client_id in self._table:
            for waiter in self._waiters.pop(session.client_id, ()):
                waiter.callback(None)
        if not clients and (newer := self._newest_claim_elsewhere.pop(session.client_id, 0)):
            self._on_superseded(session.client_id, newer)

    def note_superseded(self, client_id: str, generation: int) -> None:
        """A claim of that generation was made elsewhere: one that is under way here may turn out to be older."""
        if client_id in self._claiming:
            self._newest_claim_elsewhere[client_id] = max(generation, self._newest_claim_elsewhere.get(client_id, 0))

    async def admit(self, request: ConnectRequest) -> Session | RouteDecision:
        """Let a client in: its connection is to be opened, and then settled. Or learn where it is to be.

        Raises :class:`~gateway.protocol.handshake.Refusal`.
        """
        left = CLAIM_TIMEOUT
        over, placed = self._takeover_limit(request), self._honors_assignment(request)
        for again in reversed(range(MAX_CLAIM_ATTEMPTS)):
            if not self._has_room(request.client_id):
                return await self._route_overflow(request)
            began = self._clock.seconds()
            try:
                return await self._claim(request, over, placed, max(0.0, left))
            except (OwnedElsewhereError, AssignedElsewhereError) as e:
                off = e
            left -= self._clock.seconds() - began
            if isinstance(off, AssignedElsewhereError):
                assert self.router is not None
                elsewhere = await self.router.route_to(request, off.assignment)
                # If it is not taken there, it is as if it were not placed.
                placed = False
            else:
                elsewhere = await self._route_to_owner(request, off.location)
                over = off.location.generation if again > 1 else None
            if elsewhere is not None:
                return elsewhere
        raise self._unready_error("registry")

    def _takeover_limit(self, request: ConnectRequest) -> int | None:
        """Which claims of other nodes it may be claimed over."""
        if self.router is None:
            return None
        routes = self.router.routes_to_owner and not request.redirected_here
        return 0 if routes or self._replacements.wait_time(request.client_id) else None

    def _honors_assignment(self, request: ConnectRequest) -> bool:
        """Whether a placement of the client, if there is one, is to be followed. Those of two programs with one
        client_id evict each other no more than any."""
        if self.router is None or request.redirected_here or not self.router.has_peers():
            return False
        return not self._replacements.wait_time(request.client_id)

    async def _route_to_owner(self, request: ConnectRequest, owner: Location) -> RouteDecision | None:
        assert self.router is not None
        if self.router.routes_to_owner and not request.redirected_here:
            return await self.router.route_to_owner(request, owner)
        if owner.live and owner.state == "up":
            self._check_replacements(request.client_id, 1)
        return None

    async def _route_overflow(self, request: ConnectRequest) -> RouteDecision:
        elsewhere = None
        if self.router is not None and not request.redirected_here:
            elsewhere = await self.router.route_overflow(request)
        if elsewhere is None:
            raise RequestRefusedError(
                503, "full", "this node has all the clients that it can take", [retry_after_header(1)]
            )
        return elsewhere

    async def _claim(
        self, request: ConnectRequest, takeover_limit: int | None, honor_assignment: bool, timeout: float
    ) -> Session:
        client_id, judge = request.client_id, self.router is not None and self.router.may_evict_expired()
        client = Session(
            client_id, request.address, expires_at=request.expires_at, max_expires_at=request.max_expires_at
        )
        self._claiming.setdefault(client_id, set()).add(client)
        self._claim_count += 1
        try:
            client.pending_claim = self._registry.claim(
                client_id, request.address, _cached_policy(takeover_limit, judge, honor_assignment)
            )
            claim: Claim = await client.pending_claim.addTimeout(timeout, self._clock)
        except ClaimSupersededError:
            # It opens, to be told so.
            return client
        except Exception as e:
            self.claim_finished(client)
            # It may be in after all: then the registry takes it back, and tells when it has.
            if isinstance(e, (RegistryUnavailableError, TimeoutError)):
                raise self._unready_error("registry") from None
            if isinstance(e, CancelledError) and self._closed:
                raise self._unready_error("draining") from None
            raise
        finally:
            client.pending_claim = None
        client.claimed = True
        client.generation = claim.generation
        client.connected_at = claim.connected_at
        client.previous_owner = claim.previous_owner
        if claim.previous_owner is not None and claim.previous_owner.live and claim.previous_owner.state == "up":
            self.record_replacement(client_id)
        return client

    def _has_room(self, client_id: str) -> bool:
        """Whether there is room for a connection of a client. Raises :class:`Refusal` if it cannot be let in at all."""
        word = "draining" if self._closed else self._unready_reason()
        if word:
            raise self._unready_error(word)
        here = client_id in self._table
        # Those that await their claims will replace it, and each other.
        coming = here + len(self._claiming.get(client_id, ()))
        if coming:
            self._check_replacements(client_id, coming)
        return here or len(self._table) + self._claim_count < self._capacity

    def _check_replacements(self, client_id: str, count: int) -> None:
        wait = self._replacements.wait_time(client_id, count)
        if wait:
            raise RequestRefusedError(
                429,
                "replaced",
                f"this client was connected more than {MAX_REPLACEMENTS} times in {REPLACEMENT_WINDOW:g} s: is it "
                "running twice?",
                [retry_after_header(wait)],
            )

    @staticmethod
    def _unready_error(reason: str) -> RequestRefusedError:
        message, seconds = _UNREADY_MESSAGES.get(reason, ("this node takes no clients now", 1))
        return RequestRefusedError(503, reason, message, [retry_after_header(seconds)])
