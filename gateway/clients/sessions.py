"""Client sessions of one node: admission, open connections, takeover, and close.

A connection: admit (capacity, claim) -> opened (replaces an older one) -> messages -> closed (claim released). The
generation of its claim fences it: it never changes anything of a connection with a newer claim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.clients.admission import Admission
from gateway.clients.interface import (
    ConnectRequest,
    IClientHandler,
    IClientRouter,
    IClientSessions,
    IConnection,
    RouteDecision,
    Session,
    SessionInfo,
)
from gateway.clients.keepalive import InboundThrottle, KeepAlive, message_units
from gateway.clients.table import ParkingOptions, SessionTable
from gateway.metrics import Metrics
from gateway.protocol.frames import CloseCode
from gateway.protocol.jsonrpc import MAX_BAD_MESSAGES
from gateway.registry.errors import ClaimSupersededError, RegistryRefusedError, RegistryUnavailableError
from gateway.registry.interface import Claim, IRegistry, SessionKey
from gateway.settings import Settings
from gateway.util.log import RateLimitedLogger

#: close reason with code 4001
REPLACED_REASON = "a newer connection of this client replaced it"
#: interval of attempts to restore a row that a revoked claim may have removed, in seconds
RECLAIM_RETRY_INTERVAL = 2.0
#: connections reclaimed concurrently
RECLAIM_BATCH_SIZE = 500

#: Close codes with a counter of their own (RFC 6455, section 7.4.1, and the gateway's own). All others, of which a
#: client could send thousands, share one.
COUNTED_CLOSE_CODES = frozenset((*range(1000, 1016), CloseCode.REPLACED, CloseCode.DISCONNECTED))

#: assumed after a failed reclaim: the row may have been written
UNKNOWN_CLAIM = Claim(0, 0.0)


@implementer(IClientSessions)
class ClientSessions:
    """Client sessions of this node."""

    def __init__(
        self,
        registry: IRegistry,
        clock: IReactorTime,
        settings: Settings,
        metrics: Metrics,
        make_handler: Callable[[IClientSessions], IClientHandler],
        unready_reason: Callable[[], str],
        wall_clock: Callable[[], float] = time.time,
        *,
        router: IClientRouter | None = None,
        parking: ParkingOptions | None = None,
    ) -> None:
        """Create the sessions and their handler: ``make_handler`` gets the sessions, since each needs the other.

        ``unready_reason`` returns why the node accepts no clients now (``starting``, ``draining``, ``registry``), or an
        empty string if it does. ``wall_clock`` returns seconds since 1970, by which tokens expire. Without ``router``
        the node serves all of its clients; without ``parking`` all sessions stay awake.
        """
        self._registry = registry
        self._clock = clock
        self._metrics = metrics
        self._handler = handler = make_handler(self)
        self._error_log = RateLimitedLogger(clock.seconds)
        self._throttle = InboundThrottle(clock, settings.messages_per_client, metrics)
        self._table = SessionTable(
            handler.message_received, self.closed, self._throttle.pause, settings, metrics, parking
        )
        self._admission = Admission(
            self._table,
            registry=registry,
            clock=clock,
            settings=settings,
            unready_reason=unready_reason,
            router=router,
            on_superseded=self.close_superseded,
        )
        # Two of these IClientSessions methods are called for every message: without a layer in between.
        self.send = self._table.send
        self.generation = self._table.generation
        self.renew = self._table.renew
        self.ticket_identity = self._table.ticket_identity
        self._awake = self._table.awake
        self._keepalive = KeepAlive(
            clock,
            metrics,
            awake_sessions=lambda: list(self._awake.values()),
            interval=settings.ping_interval,
            timeout=settings.ping_timeout,
            sweep_parked=self._table.sweep_parked,
            wall_clock=wall_clock,
        )

    def start(self) -> None:
        """Start keep-alive, and reading from parked sessions."""
        self._keepalive.start()
        self._table.start()

    def stop(self) -> None:
        """Stop all timers, and drop all parked sessions."""
        self._keepalive.stop()
        self._throttle.stop()
        self._table.stop()

    # IClientSessions.

    def get(self, client_id: str) -> SessionInfo | None:
        return self._table.session_info(client_id)

    def claim_in_progress(self, client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        return self._admission.claim_in_progress(client_id, newer_than)

    def close(
        self, client_id: str, code: int, reason: str, generation: int = 0, *, keep_row: bool = False
    ) -> Deferred[bool]:
        if generation and generation != self._table.generation(client_id):
            return succeed(False)
        session = self._table.get(client_id)
        if session is None:
            return succeed(False)
        if keep_row:
            session.claimed = False
        return self._close(session, code, reason).addCallback(lambda _: True)

    def client_ids(self) -> list[str]:
        return self._table.client_ids()

    def count(self) -> int:
        return len(self._table)

    def parked_count(self) -> int:
        """Return the number of parked clients."""
        return self._table.parked_count()

    def unsent_bytes(self) -> int:
        """Return the bytes sent to clients that wait in this process, in time linear in the number of awake
        sessions."""
        return int(
            sum(session.connection.unsent_bytes for session in self._awake.values() if session.connection is not None)
        )

    # All sessions.

    def close_all(self, code: int, reason: str) -> Deferred[None]:
        """Close all connections, and admit no new ones. Fires when their rows are removed, or could not be removed."""
        self._admission.close()
        closing = [self.close(client_id, code, reason) for client_id in self._table.client_ids()]
        return DeferredList(closing, consumeErrors=True).addCallback(lambda _: None)

    def reclaim_all(self) -> Deferred[None]:
        """Reclaim all connections, after this node's rows may have been removed.

        Closes clients with a newer claim on another node with 4001. A reclaim that the registry refuses is repeated
        alone. Fails with ``RegistryUnavailableError`` if another reclaim does; then it is to be called again.
        """
        return Deferred.fromCoroutine(self._reclaim_all())

    async def _reclaim_all(self) -> None:
        infos = self._table.session_infos()
        while batch := list(islice(infos, RECLAIM_BATCH_SIZE)):
            reclaims = [self._registry.reclaim(info.key, info.address) for info in batch]
            results: list[tuple[bool, Any]] = await DeferredList(reclaims, consumeErrors=True)
            for info, (succeeded, result) in zip(batch, results, strict=True):
                if not succeeded and result.check(ClaimSupersededError, RegistryRefusedError):
                    self._on_reclaim_failed(result, info)
                else:
                    self._on_reclaimed(result if succeeded else UNKNOWN_CLAIM, info)
            for succeeded, result in results:
                if not succeeded and not result.check(ClaimSupersededError, RegistryRefusedError):
                    result.raiseException()

    def _close_replaced(self, client_id: str) -> None:
        session = self._table.get(client_id)
        if session is not None:
            self._metrics.replaced += 1
            self._admission.record_replacement(client_id)
            self._close(session, CloseCode.REPLACED, REPLACED_REASON).addErrback(self._on_release_failed)

    def _on_reclaimed(self, claim: Claim | None, info: SessionInfo) -> None:
        if self._table.generation(info.client_id) == info.generation:
            if claim is None:
                self._close_replaced(info.client_id)
        elif claim is not None:
            # It has closed meanwhile: its release may have come before the row was restored.
            self._registry.release(info.key).addErrback(self._on_release_failed)

    def close_superseded(self, key: SessionKey) -> None:
        self._handler.client_superseded(key)
        current = SessionKey(key.client_id, self._table.generation(key.client_id))
        if 0 < current.generation < key.generation and not self._handler.is_finishing_calls(current):
            self._close_replaced(key.client_id)
        self._admission.note_superseded(key)

    def restore_claim(self, key: SessionKey) -> None:
        info = self._table.session_info(key.client_id)
        if info is not None and info.generation < key.generation:
            self._reclaim(info)

    def _reclaim(self, info: SessionInfo) -> None:
        if self._admission.closed or self._table.generation(info.client_id) != info.generation:
            return
        reclaiming = self._registry.reclaim(info.key, info.address)
        reclaiming.addCallbacks(self._on_restored, self._on_reclaim_failed, callbackArgs=(info,), errbackArgs=(info,))

    def _on_restored(self, claim: Claim | None, info: SessionInfo) -> None:
        # None: a newer claim exists; this node is notified when it opens or is revoked.
        if claim is not None:
            self._on_reclaimed(claim, info)

    def _on_reclaim_failed(self, failure: Failure, info: SessionInfo) -> None:
        # A newer claim of this node itself is about to be opened or revoked, or the registry refuses this one.
        if not failure.check(ClaimSupersededError):
            self._on_release_failed(failure)
        self._clock.callLater(RECLAIM_RETRY_INTERVAL, self._reclaim, info)

    # One session.

    def admit(self, request: ConnectRequest) -> Deferred[Session | RouteDecision]:
        """Claim a client's connection, or decide which other node serves it.

        Fails with :class:`~gateway.protocol.errors.RequestRefusedError`. When it has fired with a session,
        :meth:`opened` or :meth:`abandon` must be called synchronously. Cancelling it revokes the claim.
        """
        return Deferred.fromCoroutine(self._admission.admit(request))

    def opened(self, session: Session, connection: IConnection) -> None:
        """Register the open connection of an admitted session; it replaces an older one."""
        session.connection = connection
        self._notify_takeover(session)
        previous = self._table.get(session.client_id)
        if not session.claimed or (previous is not None and previous.generation > session.generation):
            # Replaced before it was open. If it had a claim, its row belongs to the newer one by now.
            session.claimed = False
            self._admission.claim_finished(session)
            self._close_as_replaced(session)
            return
        self._table.add(session)
        self._metrics.opened += 1
        if previous is not None:
            previous.claimed = False
            self._notify_handler(self._handler.client_disconnected, previous)
        self._notify_handler(self._handler.client_connected, session)
        if previous is not None:
            self._close_as_replaced(previous)
        self._admission.claim_finished(session)

    def abandon(self, session: Session) -> None:
        """Release an admitted session whose connection could not be opened."""
        released = self._deregister(session)
        # Notify the previous owner only after this row is removed. It then reclaims the client, since its own row was
        # replaced by this one.
        released.addCallbacks(lambda _: self._on_abandoned(session), self._on_release_failed)

    def _on_abandoned(self, session: Session) -> None:
        previous_owner, session.previous_owner = session.previous_owner, None
        if previous_owner is not None and self._admission.router is not None:
            self._admission.router.notify_claim_revoked(session.key, previous_owner)
        self.restore_claim(session.key)

    def handle_message(self, session: Session, payload: bytes) -> None:
        """Pass a text message to the handler. Closes the connection after too many invalid ones in a row."""
        handled = self._handler.message_received(session.client_id, session.generation, payload)
        if handled is not None:
            self._throttle.charge(session, message_units(payload) + max(0, abs(handled) - 1))
        if handled is None or handled > 0:
            session.consecutive_bad = 0
            return
        session.consecutive_bad += 1
        if session.consecutive_bad >= MAX_BAD_MESSAGES and session.connection is not None:
            session.connection.close_with(
                CloseCode.POLICY_VIOLATION, f"{session.consecutive_bad} messages in a row were no JSON-RPC 2.0"
            )

    def on_idle(self, session: Session) -> None:
        """Park the session soon, if it is idle now that its input is handled."""
        self._table.on_idle(session)

    def frame_received(self, session: Session) -> None:
        """Charge a client for a frame that completes no message."""
        self._throttle.charge(session, 1)

    def closed(self, session: Session, code: int) -> None:
        """Release a session whose connection can no longer be used, for any reason. ``code`` is the close code."""
        self._metrics.closed[str(code) if code in COUNTED_CLOSE_CODES else "other"] += 1
        # The connection refers to the session, too: break the cycle.
        session.connection = None
        self._deregister(session).addErrback(self._on_release_failed)

    def _close(self, session: Session, code: int, reason: str) -> Deferred[None]:
        released = self._deregister(session)
        if session.connection is not None:
            session.connection.close_with(code, reason)
        return released

    def _close_as_replaced(self, session: Session) -> None:
        self._metrics.replaced += 1
        self._admission.record_replacement(session.client_id)
        if session.connection is not None:
            session.connection.close_with(CloseCode.REPLACED, REPLACED_REASON)

    def _deregister(self, session: Session) -> Deferred[None]:
        """Remove a session from all tables, once. Fires when its row is removed too."""
        self._admission.claim_finished(session)
        self._throttle.discard(session)
        if self._table.remove(session):
            self._notify_handler(self._handler.client_disconnected, session)
        if not session.claimed:
            return succeed(None)
        session.claimed = False
        return self._registry.release(session.key)

    def _notify_takeover(self, session: Session) -> None:
        """Notify the node that the client was taken over from."""
        previous_owner, session.previous_owner = session.previous_owner, None
        if previous_owner is not None and self._admission.router is not None:
            self._admission.router.notify_takeover(session.key, previous_owner)

    def _on_release_failed(self, failure: Any) -> None:
        # The registry retries a release that it could not write.
        if not failure.check(RegistryUnavailableError):
            self._error_log.failure("could not release a client", failure)

    def _notify_handler(self, callback: Callable[[SessionKey], None], session: Session) -> None:
        try:
            callback(session.key)
        except Exception:  # noqa: BLE001 (the table must stay consistent)
            self._error_log.failure("error in handling a client's connect or disconnect")
