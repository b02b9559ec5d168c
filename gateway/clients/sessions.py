"""The table of the clients that are connected here, and of those whose claim is awaited.

One connection of a client: admit (room, claim) -> opened (it replaces an older one) -> messages -> ended (released).
A connection is fenced by the generation of its claim: one never touches what belongs to a newer one.
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
from gateway.clients.keepalive import InboundThrottle, KeepAlive
from gateway.clients.table import ParkingOptions, SessionTable
from gateway.metrics import Metrics
from gateway.protocol.frames import CloseCode
from gateway.registry.errors import ClaimSupersededError, RegistryUnavailableError
from gateway.registry.interface import Claim, IRegistry
from gateway.settings import Settings
from gateway.util.log import RateLimitedLogger
from gateway.util.rate_limit import MAX_BAD_MESSAGES

#: what a client is told that is closed with 4001
REPLACED_REASON = "a newer connection of this client replaced it"
#: when it is tried again to restore a row that a taken-back claim may have cost, in seconds
RECLAIM_RETRY_INTERVAL = 2.0
#: how many connections are claimed again at a time
RECLAIM_BATCH_SIZE = 500

#: The close codes that are counted each (RFC 6455, section 7.4.1, and the gateway's own); the others, of which a client
#: could send thousands, are counted as one.
COUNTED_CLOSE_CODES = frozenset((*range(1000, 1016), CloseCode.REPLACED, CloseCode.DISCONNECTED))

#: what a claim came to that failed: there may be a row
UNKNOWN_CLAIM = Claim(0, 0.0)


@implementer(IClientSessions)
class ClientSessions:
    """The clients of this node."""

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
        """``make_handler`` makes the handler of these sessions, given the sessions: each needs the other. Without
        ``router`` this node is alone; without ``parking`` all connections stay awake.

        ``available`` gives the word why no clients are taken now (``starting``, ``draining``, ``registry``), or an
        empty text when they are. ``today`` is the wall clock, by which tokens expire, in seconds since 1970."""
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
        # Of these of IEdge's two are asked for every message: there is no layer between.
        self.send = self._table.send
        self.generation = self._table.generation
        self.renew = self._table.renew
        #: those that are awake
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
        """Begin to look after connections that have gone silent, and those that are parked."""
        self._keepalive.start()
        self._table.start()

    def stop(self) -> None:
        """Stop all timers."""
        self._keepalive.stop()
        self._throttle.stop()
        self._table.stop()

    # IEdge.

    def get(self, client_id: str) -> SessionInfo | None:
        """The open connection of a client."""
        return self._table.session_info(client_id)

    def claim_in_progress(self, client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        """Wait for a client that is just being connected."""
        return self._admission.claim_in_progress(client_id, newer_than)

    def close(
        self, client_id: str, code: int, reason: str, generation: int = 0, *, keep_row: bool = False
    ) -> Deferred[bool]:
        """Close a client's connection."""
        if generation and generation != self._table.generation(client_id):
            return succeed(False)
        client = self._table.get(client_id)
        if client is None:
            return succeed(False)
        if keep_row:
            client.claimed = False
        return self._close(client, code, reason).addCallback(lambda _: True)

    def client_ids(self) -> list[str]:
        """Who is here."""
        return self._table.client_ids()

    def count(self) -> int:
        """How many are here."""
        return len(self._table)

    def parked_count(self) -> int:
        """How many of them are parked."""
        return self._table.parked_count()

    def unsent_bytes(self) -> int:
        """How many bytes wait for them; it looks at each."""
        return int(
            sum(client.connection.unsent_bytes for client in self._awake.values() if client.connection is not None)
        )

    # All of them.

    def close_all(self, code: int, reason: str) -> Deferred[None]:
        """Close every connection, and open none any more; fires when their rows are gone, or could not be removed."""
        self._admission.close()
        closing = [self.close(client_id, code, reason) for client_id in self._table.client_ids()]
        return DeferredList(closing, consumeErrors=True).addCallback(lambda _: None)

    def reclaim_all(self) -> Deferred[None]:
        """Claim every connection again, after this node's rows may have been removed.

        Who was claimed elsewhere with a newer generation is closed with 4001. Fails with ``RegistryUnavailable`` when
        that happens to any of them: then it is to be done again.
        """
        return Deferred.fromCoroutine(self._reclaim_all())

    async def _reclaim_all(self) -> None:
        everyone = self._table.session_infos()
        while some := list(islice(everyone, RECLAIM_BATCH_SIZE)):
            reclaims = [self._registry.reclaim(one.client_id, one.generation, one.address) for one in some]
            outcomes: list[tuple[bool, Any]] = await DeferredList(reclaims, consumeErrors=True)
            for one, (done, outcome) in zip(some, outcomes, strict=True):
                if not done and outcome.check(ClaimSupersededError):
                    self._on_reclaim_failed(outcome, one)
                else:
                    self._on_reclaimed(outcome if done else UNKNOWN_CLAIM, one)
            for done, outcome in outcomes:
                if not done and not outcome.check(ClaimSupersededError):
                    outcome.raiseException()

    def _close_replaced(self, client_id: str) -> None:
        client = self._table.get(client_id)
        if client is not None:
            self._metrics.replaced += 1
            self._admission.record_replacement(client_id)
            self._close(client, CloseCode.REPLACED, REPLACED_REASON).addErrback(self._on_release_failed)

    def _on_reclaimed(self, claim: Claim | None, info: SessionInfo) -> None:
        if self._table.generation(info.client_id) == info.generation:
            if claim is None:
                self._close_replaced(info.client_id)
        elif claim is not None:
            # It ended meanwhile: its release may have come before the row was back.
            self._registry.release(info.client_id, info.generation).addErrback(self._on_release_failed)

    def close_superseded(self, client_id: str, generation: int) -> None:
        """A newer connection of a client is open elsewhere."""
        self._handler.client_superseded(client_id, generation)
        here = self._table.generation(client_id)
        if 0 < here < generation and not self._handler.is_finishing_calls(client_id, here):
            self._close_replaced(client_id)
        self._admission.note_superseded(client_id, generation)

    def restore_claim(self, client_id: str, generation: int) -> None:
        """A newer claim of a client was taken back."""
        one = self._table.session_info(client_id)
        if one is not None and one.generation < generation:
            self._reclaim(one)

    def _reclaim(self, info: SessionInfo) -> None:
        if self._admission.closed or self._table.generation(info.client_id) != info.generation:
            return
        reclaiming = self._registry.reclaim(info.client_id, info.generation, info.address)
        reclaiming.addCallbacks(self._on_restored, self._on_reclaim_failed, callbackArgs=(info,), errbackArgs=(info,))

    def _on_restored(self, claim: Claim | None, info: SessionInfo) -> None:
        # Else somebody has a newer claim: whether that is opened, or taken back as well, will be told.
        if claim is not None:
            self._on_reclaimed(claim, info)

    def _on_reclaim_failed(self, failure: Failure, info: SessionInfo) -> None:
        # A newer claim that is this node's own is opened soon, or taken back.
        if not failure.check(ClaimSupersededError):
            self._on_release_failed(failure)
        self._clock.callLater(RECLAIM_RETRY_INTERVAL, self._reclaim, info)

    # The life of one connection.

    def admit(self, request: ConnectRequest) -> Deferred[Session | RouteDecision]:
        """Make room for a connection of a client, and claim it; or learn where it is to be instead.

        Fails with :class:`~gateway.protocol.handshake.Refusal`. When it has fired with a client, :meth:`opened` or :meth:`void`
        must follow in the same call. Cancelling it takes the claim back.
        """
        return Deferred.fromCoroutine(self._admission.admit(request))

    def opened(self, session: Session, connection: IConnection) -> None:
        """An admitted connection is open."""
        session.connection = connection
        self._notify_takeover(session)
        old = self._table.get(session.client_id)
        if not session.claimed or (old is not None and old.generation > session.generation):
            # Replaced before it was open. If it had a claim, its row is the newer one's by now.
            session.claimed = False
            self._admission.claim_finished(session)
            self._close_as_replaced(session)
            return
        self._table.add(session)
        self._metrics.opened += 1
        if old is not None:
            old.claimed = False
            self._notify_handler(self._handler.client_disconnected, old)
        self._notify_handler(self._handler.client_connected, session)
        if old is not None:
            self._close_as_replaced(old)
        self._admission.claim_finished(session)

    def abandon(self, session: Session) -> None:
        """An admitted connection could not be opened."""
        released = self._deregister(session)
        # Only then: whoever had the client, here or elsewhere, claims it again, since its row is gone with this one.
        released.addCallbacks(lambda _: self._on_abandoned(session), self._on_release_failed)

    def _on_abandoned(self, session: Session) -> None:
        before, session.previous_owner = session.previous_owner, None
        if before is not None and self._admission.router is not None:
            self._admission.router.notify_claim_revoked(session.client_id, session.generation, before)
        self.restore_claim(session.client_id, session.generation)

    def handle_message(self, session: Session, payload: bytes) -> None:
        """A client sent a text message."""
        handled = self._handler.message_received(session.client_id, session.generation, payload)
        if abs(handled) > 1:
            self._throttle.charge(session, abs(handled) - 1)
        if handled > 0:
            session.consecutive_bad = 0
            return
        session.consecutive_bad += 1
        if session.consecutive_bad >= MAX_BAD_MESSAGES and session.connection is not None:
            session.connection.close_with(
                CloseCode.POLICY_VIOLATION, f"{session.consecutive_bad} messages in a row were no JSON-RPC 2.0"
            )

    def on_idle(self, session: Session) -> None:
        """A client sent something that is handled by now."""
        self._table.on_idle(session)

    def frame_received(self, session: Session, message: bytes) -> None:
        """A client sent a frame that is counted against its rate, as is the message that is whole with it."""
        self._throttle.charge_frame(session, message)

    def closed(self, session: Session, code: int) -> None:
        """A connection can no longer be used, for whatever reason; ``code`` is its close code."""
        self._metrics.closed[str(code) if code in COUNTED_CLOSE_CODES else "other"] += 1
        # It refers to this client, too.
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
        """Take a connection out of everything, once; fires when its row is gone too."""
        self._admission.claim_finished(session)
        self._throttle.discard(session)
        if self._table.remove(session):
            self._notify_handler(self._handler.client_disconnected, session)
        if not session.claimed:
            return succeed(None)
        session.claimed = False
        return self._registry.release(session.client_id, session.generation)

    def _notify_takeover(self, session: Session) -> None:
        """Let the node know that had the client before."""
        before, session.previous_owner = session.previous_owner, None
        if before is not None and self._admission.router is not None:
            self._admission.router.notify_takeover(session.client_id, session.generation, before)

    def _on_release_failed(self, failure: Any) -> None:
        # The registry keeps a release that it could not write yet.
        if not failure.check(RegistryUnavailableError):
            self._error_log.failure("a client could not be released", failure)

    def _notify_handler(self, callback: Callable[[str, int], None], session: Session) -> None:
        try:
            callback(session.client_id, session.generation)
        except Exception:  # noqa: BLE001 (the table must stay whole)
            self._error_log.failure("an error in handling a client's coming or going")
