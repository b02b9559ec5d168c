"""Admission control: claim an arriving client, route it to another node, or refuse it.

    no room                             -> router -> RouteDecision    a URL, or a relay to the node with most capacity
    claim                               -> Session                    to be opened here
    claim -> OwnedElsewhereError        -> router -> RouteDecision    or claimed over, if that node does not have it
    claim -> AssignedElsewhereError     -> router -> RouteDecision    or claimed here, if that node does not accept it
    anything else                       -> RequestRefusedError

A client that was redirected or relayed here by another node is never routed again: it is claimed here, or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from gateway.clients.interface import ConnectRequest, IClientRouter, RouteDecision, Session
from gateway.clients.table import SessionTable
from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import retry_after_header
from gateway.registry.errors import (
    AssignedElsewhereError,
    ClaimSupersededError,
    OwnedElsewhereError,
    RegistryRefusedError,
    RegistryUnavailableError,
)
from gateway.registry.interface import Claim, ClaimPolicy, IRegistry, Location, SessionKey
from gateway.settings import Settings
from gateway.util.deferred import Observers
from gateway.util.rate_limit import SlidingWindow

#: how long an opening handshake waits for all its claims, in seconds
CLAIM_TIMEOUT = 3.0
#: how often connections of one client may be replaced by newer ones within the window
MAX_REPLACEMENTS = 5
#: seconds
REPLACEMENT_WINDOW = 60.0
#: claims of one request, if the client moves meanwhile; the last one ignores the owner
MAX_CLAIM_ATTEMPTS = 3
#: time in which the connection of a client that is replaced too often must answer a ping, in seconds
PROBE_TIMEOUT = 2.0
#: interval at which the answer is looked for, in seconds
PROBE_INTERVAL = 0.1

#: why the node is not ready -> message to the client, and the seconds of ``Retry-After``
_UNREADY_MESSAGES = {
    "starting": ("this node is just starting", 1),
    "draining": ("this node is going away; another one will take you", 1),
    "registry": ("this node cannot reach its registry", 2),
}
#: seconds
_REFUSED_RETRY_AFTER = 5


#: makes one object for each distinct policy, since most claims have one of a few
_cached_policy = lru_cache(maxsize=16)(ClaimPolicy)


class Admission:
    """Admission control of one node."""

    def __init__(
        self,
        table: SessionTable,
        *,
        registry: IRegistry,
        clock: IReactorTime,
        settings: Settings,
        unready_reason: Callable[[], str],
        router: IClientRouter | None = None,
        on_superseded: Callable[[SessionKey], None] = lambda key: None,
    ) -> None:
        """``unready_reason`` returns why the node accepts no clients now, or an empty string if it does.
        ``on_superseded`` is called with the argument of :meth:`note_superseded` when the claims that were in progress
        are finished."""
        self._table = table
        self._registry = registry
        self._clock = clock
        self._capacity = settings.capacity
        self._unready_reason = unready_reason
        #: where clients may be sent; ``None``: this node is alone
        self.router = router
        self._on_superseded = on_superseded
        #: client_id -> newest claim on another node reported while claims were in progress here
        self._newest_claim_elsewhere: dict[str, int] = {}
        #: client_id -> sessions that await their claim, or are being opened
        self._claiming: dict[str, set[Session]] = {}
        self._claim_count = 0
        self._waiters: dict[str, Observers[None]] = {}
        self._closed = False
        self._replacements = SlidingWindow(MAX_REPLACEMENTS, REPLACEMENT_WINDOW, clock.seconds)

    def close(self) -> None:
        """Refuse all clients from now on, including those that await their claim."""
        self._closed = True
        for sessions in list(self._claiming.values()):
            for session in list(sessions):
                if session.pending_claim is not None:
                    session.pending_claim.cancel()

    @property
    def closed(self) -> bool:
        """Whether all clients are refused."""
        return self._closed

    def claim_in_progress(self, client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        if client_id not in self._claiming or self._table.generation(client_id) > newer_than:
            return None
        return self._waiters.setdefault(client_id, Observers()).observe()

    def record_replacement(self, client_id: str) -> None:
        """Count a connection of a client that was replaced by a newer one, here or on another node."""
        self._replacements.add(client_id)

    def claim_finished(self, session: Session) -> None:
        """Remove a session whose claim has succeeded or failed; the session table shows the result already."""
        sessions = self._claiming.get(session.client_id)
        if sessions is None or session not in sessions:
            return
        sessions.discard(session)
        self._claim_count -= 1
        if not sessions:
            del self._claiming[session.client_id]
        if session.client_id in self._waiters and (not sessions or session.client_id in self._table):
            self._waiters.pop(session.client_id).callback(None)
        if not sessions and (newer := self._newest_claim_elsewhere.pop(session.client_id, 0)):
            self._on_superseded(SessionKey(session.client_id, newer))

    def note_superseded(self, key: SessionKey) -> None:
        """Remember a claim of another node: one in progress here may turn out to be older."""
        client_id, generation = key
        if client_id in self._claiming:
            self._newest_claim_elsewhere[client_id] = max(generation, self._newest_claim_elsewhere.get(client_id, 0))

    async def admit(self, request: ConnectRequest) -> Session | RouteDecision:
        """Claim a client, or decide where it is served.

        A returned session is to be opened and then passed to :meth:`claim_finished`. Raises
        :class:`~gateway.protocol.errors.RequestRefusedError`.
        """
        timeout = CLAIM_TIMEOUT
        if request.client_id in self._table and self._replacements.wait_time(request.client_id, 1):
            await self._drop_dead_connection(request.client_id)
        takeover_limit, honor_assignment = self._takeover_limit(request), self._honors_assignment(request)
        for attempts_left in reversed(range(MAX_CLAIM_ATTEMPTS)):
            if not self._has_room(request.client_id):
                return await self._route_overflow(request)
            started_at = self._clock.seconds()
            try:
                return await self._claim(request, takeover_limit, honor_assignment, max(0.0, timeout))
            except (OwnedElsewhereError, AssignedElsewhereError) as e:
                conflict = e
            timeout -= self._clock.seconds() - started_at
            if isinstance(conflict, AssignedElsewhereError):
                assert self.router is not None
                decision = await self.router.route_to(request, conflict.assignment)
                # That node does not accept it: claim it here, as if it were not assigned.
                honor_assignment = False
            else:
                decision = await self._route_to_owner(request, conflict.location)
                takeover_limit = conflict.location.generation if attempts_left > 1 else None
            if decision is not None:
                return decision
        raise self._unready_error("registry")

    async def _drop_dead_connection(self, client_id: str) -> None:
        """Abort the connection of a client that was replaced too often, unless it answers a ping: one program on a bad
        line must not be taken for two."""
        session = self._table.get(client_id)
        if session is None or session.connection is None:
            return
        connection, received_at = session.connection, session.connection.last_received_at
        deadline = self._clock.seconds() + PROBE_TIMEOUT
        connection.ping()
        while self._clock.seconds() < deadline:
            await deferLater(self._clock, PROBE_INTERVAL)
            # Nothing is read from a client that is slowed.
            if session.paused or session.connection is not connection or connection.last_received_at != received_at:
                return
        connection.abort()

    def _takeover_limit(self, request: ConnectRequest) -> int | None:
        """Return up to which generation another node's claim may be taken over: 0 for none, ``None`` for any."""
        if self.router is None:
            return None
        routes_to_owner = self.router.routes_to_owner and not request.redirected_here
        return 0 if routes_to_owner or self._replacements.wait_time(request.client_id) else None

    def _honors_assignment(self, request: ConnectRequest) -> bool:
        """Return whether an assignment of the client is followed. It is not once the client was replaced too often: two
        programs that share a client_id must not evict each other more often than without an assignment."""
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
        decision = None
        if self.router is not None and not request.redirected_here:
            decision = await self.router.route_overflow(request)
        if decision is None:
            raise RequestRefusedError(
                503, "full", "this node has all the clients that it can take", [retry_after_header(1)]
            )
        return decision

    async def _claim(
        self, request: ConnectRequest, takeover_limit: int | None, honor_assignment: bool, timeout: float
    ) -> Session:
        client_id = request.client_id
        may_evict_expired = self.router is not None and self.router.may_evict_expired()
        session = Session(
            client_id,
            request.address,
            expires_at=request.expires_at,
            max_expires_at=request.max_expires_at,
            ticket_method=request.ticket_method,
        )
        self._claiming.setdefault(client_id, set()).add(session)
        self._claim_count += 1
        try:
            session.pending_claim = self._registry.claim(
                client_id, request.address, _cached_policy(takeover_limit, may_evict_expired, honor_assignment)
            )
            claim: Claim = await session.pending_claim.addTimeout(timeout, self._clock)
        except ClaimSupersededError:
            # Open it, so that it can be closed with 4001.
            return session
        except Exception as e:
            self.claim_finished(session)
            # The claim may have been written after all: then the registry revokes it, and reports when it has.
            if isinstance(e, RegistryRefusedError):
                message = "the registry of this node refused this client; the log of the node says why"
                headers = [retry_after_header(_REFUSED_RETRY_AFTER)]
                raise RequestRefusedError(503, "registry", message, headers) from None
            if isinstance(e, (RegistryUnavailableError, TimeoutError)):
                raise self._unready_error("registry") from None
            if isinstance(e, CancelledError) and self._closed:
                raise self._unready_error("draining") from None
            raise
        finally:
            session.pending_claim = None
        session.claimed = True
        session.generation = claim.generation
        session.connected_at = claim.connected_at
        session.previous_owner = claim.previous_owner
        if claim.previous_owner is not None and claim.previous_owner.live and claim.previous_owner.state == "up":
            self.record_replacement(client_id)
        return session

    def _has_room(self, client_id: str) -> bool:
        """Return whether there is capacity for a connection of a client. Raises ``RequestRefusedError`` if it cannot be
        admitted at all."""
        reason = "draining" if self._closed else self._unready_reason()
        if reason:
            raise self._unready_error(reason)
        is_connected = client_id in self._table
        # Sessions that await their claims will replace the connected one, and each other.
        replaced = is_connected + len(self._claiming.get(client_id, ()))
        if replaced:
            self._check_replacements(client_id, replaced)
        return is_connected or len(self._table) + self._claim_count < self._capacity

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
