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
    Arrival,
    Client,
    Elsewhere,
    IClientHandler,
    IConnection,
    IEdge,
    IPlacement,
    Leaver,
    Presence,
)
from gateway.clients.keepalive import Pauses, Sweep
from gateway.clients.table import Table
from gateway.metrics import Metrics
from gateway.protocol.frames import CLOSE_DISCONNECTED, CLOSE_POLICY, CLOSE_REPLACED
from gateway.registry.interface import Claim, IRegistry, RegistryUnavailable, Superseded
from gateway.settings import Settings
from gateway.util.cork import Turn
from gateway.util.log import Troubles
from gateway.util.rate_limit import MAX_BAD_MESSAGES

#: what a client is told that is closed with 4001
REPLACED = "a newer connection of this client replaced it"
#: when it is tried again to restore a row that a taken-back claim may have cost, in seconds
RESTORE_AGAIN = 2.0
#: how many connections are claimed again at a time
RECLAIM_SLICE = 500

#: The close codes that are counted each (RFC 6455, section 7.4.1, and the gateway's own); the others, of which a client
#: could send thousands, are counted as one.
COUNTED_CODES = frozenset((*range(1000, 1016), CLOSE_REPLACED, CLOSE_DISCONNECTED))

#: what a claim came to that failed: there may be a row
UNKNOWN = Claim(0, 0.0)


@implementer(IEdge)
class Edge:
    """The clients of this node."""

    def __init__(
        self,
        registry: IRegistry,
        clock: IReactorTime,
        settings: Settings,
        metrics: Metrics,
        handler: IClientHandler,
        available: Callable[[], str],
        today: Callable[[], float] = time.time,
    ) -> None:
        """``available`` gives the word why no clients are taken now (``starting``, ``draining``, ``registry``), or an
        empty text when they are. ``today`` is the wall clock, by which tokens expire, in seconds since 1970."""
        self._registry = registry
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._handler = handler
        self._troubles = Troubles(clock.seconds)
        self._pauses = Pauses(clock, settings.messages_per_client, metrics)
        self._table = Table(handler.message_received, self.ended, self._pauses.pause)
        self._admission = Admission(
            self._table,
            registry=registry,
            clock=clock,
            settings=settings,
            available=available,
            again=self.superseded,
        )
        # Of these of IEdge's two are asked for every message: there is no layer between.
        self.send = self._table.send
        self.generation = self._table.generation
        self.renew = self._table.renew
        #: those that are awake
        self._clients = self._table.awake
        self._sweep = Sweep(
            clock,
            metrics,
            everyone=lambda: list(self._clients.values()),
            interval=settings.ping_interval,
            timeout=settings.ping_timeout,
            today=today,
        )

    def place_by(self, placement: IPlacement) -> None:
        """Send clients to other nodes where that is better. Without it this node is alone."""
        self._admission.placement = placement

    def park_on(self, reactor: Any, adopt: Callable[[Leaver], Any], turn: Turn) -> None:
        """Park connections that are quiet, on ``reactor``. ``adopt`` makes a protocol of one that is woken
        (:meth:`~gateway.clients.endpoint.ClientFactory.wake`). Without it all stay awake."""
        self._sweep.parked = self._table.park_on(reactor, adopt, turn, self._settings, self._metrics).sweep

    def start(self) -> None:
        """Begin to look after connections that have gone silent, and those that are parked."""
        self._sweep.start()
        self._table.start()

    def stop(self) -> None:
        """Stop all timers."""
        self._sweep.stop()
        self._pauses.stop()
        self._table.stop()

    # IEdge.

    def get(self, client_id: str) -> Presence | None:
        """The open connection of a client."""
        return self._table.presence(client_id)

    def opening(self, client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        """Wait for a client that is just being connected."""
        return self._admission.opening(client_id, newer_than)

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
        return self._table.ids()

    def count(self) -> int:
        """How many are here."""
        return len(self._table)

    def parked(self) -> int:
        """How many of them are parked."""
        return self._table.parked()

    def unsent(self) -> int:
        """How many bytes wait for them; it looks at each."""
        return int(sum(client.connection.unsent for client in self._clients.values() if client.connection is not None))

    # All of them.

    def close_all(self, code: int, reason: str) -> Deferred[None]:
        """Close every connection, and open none any more; fires when their rows are gone, or could not be removed."""
        self._admission.close()
        closing = [self.close(client_id, code, reason) for client_id in self._table.ids()]
        return DeferredList(closing, consumeErrors=True).addCallback(lambda _: None)

    def reclaim_all(self) -> Deferred[None]:
        """Claim every connection again, after this node's rows may have been removed.

        Who was claimed elsewhere with a newer generation is closed with 4001. Fails with ``RegistryUnavailable`` when
        that happens to any of them: then it is to be done again.
        """
        return Deferred.fromCoroutine(self._reclaim_all())

    async def _reclaim_all(self) -> None:
        everyone = self._table.presences()
        while some := list(islice(everyone, RECLAIM_SLICE)):
            reclaims = [self._registry.reclaim(one.client_id, one.generation, one.address) for one in some]
            outcomes: list[tuple[bool, Any]] = await DeferredList(reclaims, consumeErrors=True)
            for one, (done, outcome) in zip(some, outcomes, strict=True):
                if not done and outcome.check(Superseded):
                    self._not_restored(outcome, one)
                else:
                    self._reclaimed(outcome if done else UNKNOWN, one)
            for done, outcome in outcomes:
                if not done and not outcome.check(Superseded):
                    outcome.raiseException()

    def _close_replaced(self, client_id: str) -> None:
        client = self._table.get(client_id)
        if client is not None:
            self._metrics.replaced += 1
            self._admission.replaced(client_id)
            self._close(client, CLOSE_REPLACED, REPLACED).addErrback(self._not_released)

    def _reclaimed(self, claim: Claim | None, one: Presence) -> None:
        if self._table.generation(one.client_id) == one.generation:
            if claim is None:
                self._close_replaced(one.client_id)
        elif claim is not None:
            # It ended meanwhile: its release may have come before the row was back.
            self._registry.release(one.client_id, one.generation).addErrback(self._not_released)

    def superseded(self, client_id: str, generation: int) -> None:
        """A newer connection of a client is open elsewhere."""
        self._handler.client_superseded(client_id, generation)
        here = self._table.generation(client_id)
        if 0 < here < generation and not self._handler.finishing(client_id, here):
            self._close_replaced(client_id)
        self._admission.superseded(client_id, generation)

    def restore(self, client_id: str, generation: int) -> None:
        """A newer claim of a client was taken back."""
        one = self._table.presence(client_id)
        if one is not None and one.generation < generation:
            self._restore(one)

    def _restore(self, one: Presence) -> None:
        if self._admission.closed or self._table.generation(one.client_id) != one.generation:
            return
        reclaiming = self._registry.reclaim(one.client_id, one.generation, one.address)
        reclaiming.addCallbacks(self._restored, self._not_restored, callbackArgs=(one,), errbackArgs=(one,))

    def _restored(self, claim: Claim | None, one: Presence) -> None:
        # Else somebody has a newer claim: whether that is opened, or taken back as well, will be told.
        if claim is not None:
            self._reclaimed(claim, one)

    def _not_restored(self, failure: Failure, one: Presence) -> None:
        # A newer claim that is this node's own is opened soon, or taken back.
        if not failure.check(Superseded):
            self._not_released(failure)
        self._clock.callLater(RESTORE_AGAIN, self._restore, one)

    # The life of one connection.

    def admit(self, arrival: Arrival) -> Deferred[Client | Elsewhere]:
        """Make room for a connection of a client, and claim it; or learn where it is to be instead.

        Fails with :class:`~gateway.protocol.handshake.Refusal`. When it has fired with a client, :meth:`opened` or :meth:`void`
        must follow in the same call. Cancelling it takes the claim back.
        """
        return Deferred.fromCoroutine(self._admission.admit(arrival))

    def opened(self, client: Client, connection: IConnection) -> None:
        """An admitted connection is open."""
        client.connection = connection
        self._tell_before(client)
        old = self._table.get(client.client_id)
        if not client.claimed or (old is not None and old.generation > client.generation):
            # Replaced before it was open. If it had a claim, its row is the newer one's by now.
            client.claimed = False
            self._admission.settled(client)
            self._replaced(client)
            return
        self._table.add(client)
        self._metrics.opened += 1
        if old is not None:
            old.claimed = False
            self._tell(self._handler.client_disconnected, old)
        self._tell(self._handler.client_connected, client)
        if old is not None:
            self._replaced(old)
        self._admission.settled(client)

    def void(self, client: Client) -> None:
        """An admitted connection could not be opened."""
        released = self._let_go(client)
        # Only then: whoever had the client, here or elsewhere, claims it again, since its row is gone with this one.
        released.addCallbacks(lambda _: self._voided(client), self._not_released)

    def _voided(self, client: Client) -> None:
        before, client.before = client.before, None
        if before is not None and self._admission.placement is not None:
            self._admission.placement.taken_back(client.client_id, client.generation, before)
        self.restore(client.client_id, client.generation)

    def message(self, client: Client, payload: bytes) -> None:
        """A client sent a text message."""
        handled = self._handler.message_received(client.client_id, client.generation, payload)
        if abs(handled) > 1:
            self._pauses.charge(client, abs(handled) - 1)
        if handled > 0:
            client.bad = 0
            return
        client.bad += 1
        if client.bad >= MAX_BAD_MESSAGES and client.connection is not None:
            client.connection.close_with(CLOSE_POLICY, f"{client.bad} messages in a row were no JSON-RPC 2.0")

    def rested(self, client: Client) -> None:
        """A client sent something that is handled by now."""
        self._table.rested(client)

    def metered(self, client: Client, message: bytes) -> None:
        """A client sent a frame that is counted against its rate, as is the message that is whole with it."""
        self._pauses.add(client, message)

    def ended(self, client: Client, code: int) -> None:
        """A connection can no longer be used, for whatever reason; ``code`` is its close code."""
        self._metrics.closed[str(code) if code in COUNTED_CODES else "other"] += 1
        # It refers to this client, too.
        client.connection = None
        self._let_go(client).addErrback(self._not_released)

    def _close(self, client: Client, code: int, reason: str) -> Deferred[None]:
        released = self._let_go(client)
        if client.connection is not None:
            client.connection.close_with(code, reason)
        return released

    def _replaced(self, client: Client) -> None:
        self._metrics.replaced += 1
        self._admission.replaced(client.client_id)
        if client.connection is not None:
            client.connection.close_with(CLOSE_REPLACED, REPLACED)

    def _let_go(self, client: Client) -> Deferred[None]:
        """Take a connection out of everything, once; fires when its row is gone too."""
        self._admission.settled(client)
        self._pauses.discard(client)
        if self._table.remove(client):
            self._tell(self._handler.client_disconnected, client)
        if not client.claimed:
            return succeed(None)
        client.claimed = False
        return self._registry.release(client.client_id, client.generation)

    def _tell_before(self, client: Client) -> None:
        """Let the node know that had the client before."""
        before, client.before = client.before, None
        if before is not None and self._admission.placement is not None:
            self._admission.placement.taken(client.client_id, client.generation, before)

    def _not_released(self, failure: Any) -> None:
        # The registry keeps a release that it could not write yet.
        if not failure.check(RegistryUnavailable):
            self._troubles.report("a client could not be released", failure)

    def _tell(self, what: Callable[[str, int], None], client: Client) -> None:
        try:
            what(client.client_id, client.generation)
        except Exception:  # noqa: BLE001 (the table must stay whole)
            self._troubles.report("an error in handling a client's coming or going")
