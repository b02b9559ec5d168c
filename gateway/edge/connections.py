"""The table of the clients that are connected here, and of those whose claim is awaited.

One connection of a client: admit (room, claim) -> opened (it replaces an older one) -> messages -> ended (released).
A connection is fenced by the generation of its claim: one never touches what belongs to a newer one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList, TimeoutError, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.edge.client import Client, IConnection
from gateway.edge.head import Refusal
from gateway.edge.interface import (
    CLOSE_DISCONNECTED,
    CLOSE_POLICY,
    CLOSE_REPLACED,
    IClientHandler,
    IEdge,
    Presence,
)
from gateway.edge.keeper import Leaver
from gateway.edge.limits import MAX_BAD_MESSAGES, Recent, Troubles, retry_after
from gateway.edge.table import Table
from gateway.edge.turn import Turn
from gateway.edge.upkeep import Pauses, Sweep
from gateway.registry.interface import Claim, IRegistry, RegistryUnavailable, Superseded
from gateway.settings import Settings
from gateway.telemetry.metrics import Metrics

#: how long an opening handshake waits for its claim, in seconds
CLAIM_TIMEOUT = 3.0
#: so often within so many seconds a connection may be replaced by a newer one of the same client
MAX_REPLACEMENTS = 5
REPLACEMENTS_WITHIN = 60.0
#: when it is tried again to restore a row that a taken-back claim may have cost, in seconds
RESTORE_AGAIN = 2.0
#: how many connections are claimed again at a time
RECLAIM_SLICE = 500

#: The close codes that are counted each (RFC 6455, section 7.4.1, and the gateway's own); the others, of which a client
#: could send thousands, are counted as one.
COUNTED_CODES = frozenset((*range(1000, 1016), CLOSE_REPLACED, CLOSE_DISCONNECTED))

#: what a claim came to that failed: there may be a row
UNKNOWN = Claim(0, 0.0)

#: why no clients are taken -> what a client is told, and the seconds after which it may try again
_UNAVAILABLE = {
    "starting": ("this node is just starting", 1),
    "draining": ("this node is going away; another one will take you", 1),
    "registry": ("this node cannot reach its registry", 2),
}


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
    ) -> None:
        """``available`` gives the word why no clients are taken now (``starting``, ``draining``, ``registry``), or an
        empty text when they are."""
        self._registry = registry
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._handler = handler
        self._available = available
        #: those that await their claim, or are just being opened, by client_id
        self._claiming: dict[str, set[Client]] = {}
        self._claims = 0
        self._waiters: dict[str, list[Deferred[None]]] = {}
        self._closed = False
        self._replacements = Recent(MAX_REPLACEMENTS, REPLACEMENTS_WITHIN, clock.seconds)
        self._troubles = Troubles(clock.seconds)
        self._pauses = Pauses(clock, settings.messages_per_client, metrics)
        self._table = Table(handler.message_received, self.ended, self._pauses.pause)
        # These two of IEdge's are asked for every message: there is no layer between.
        self.send = self._table.send
        self.generation = self._table.generation
        #: those that are awake
        self._clients = self._table.awake
        self._sweep = Sweep(
            clock,
            metrics,
            everyone=lambda: list(self._clients.values()),
            interval=settings.ping_interval,
            timeout=settings.ping_timeout,
        )

    def park_on(self, reactor: Any, adopt: Callable[[Leaver], Any], turn: Turn) -> None:
        """Park connections that are quiet, on ``reactor``. ``adopt`` makes a protocol of one that is woken
        (:meth:`~gateway.edge.opening.ClientFactory.wake`). Without it all stay awake."""
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

    def opening(self, client_id: str) -> Deferred[None] | None:
        """Wait for a client that is just being connected."""
        if client_id in self._table or client_id not in self._claiming:
            return None
        waiter: Deferred[None] = Deferred()
        self._waiters.setdefault(client_id, []).append(waiter)
        return waiter

    def close(self, client_id: str, code: int, reason: str, generation: int = 0) -> Deferred[bool]:
        """Close a client's connection."""
        if generation and generation != self._table.generation(client_id):
            return succeed(False)
        client = self._table.get(client_id)
        if client is None:
            return succeed(False)
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
        self._closed = True
        for clients in list(self._claiming.values()):
            for client in list(clients):
                if client.claiming is not None:
                    client.claiming.cancel()
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
                self._reclaimed(outcome if done else UNKNOWN, one)
            for done, outcome in outcomes:
                if not done:
                    outcome.raiseException()

    def _reclaimed(self, claim: Claim | None, one: Presence) -> None:
        if self._table.generation(one.client_id) == one.generation:
            client = self._table.get(one.client_id) if claim is None else None
            if client is not None:
                self._close(client, CLOSE_REPLACED, "connected elsewhere").addErrback(self._not_released)
        elif claim is not None:
            # It ended meanwhile: its release may have come before the row was back.
            self._registry.release(one.client_id, one.generation).addErrback(self._not_released)

    def _restore(self, one: Presence | None) -> None:
        """Claim an open connection again after a newer claim of the same client was taken back: that may have been
        written, and its release then leaves no row."""
        if one is None or self._closed or self._table.generation(one.client_id) != one.generation:
            return
        reclaiming = self._registry.reclaim(one.client_id, one.generation, one.address)
        reclaiming.addCallbacks(self._reclaimed, self._not_restored, callbackArgs=(one,), errbackArgs=(one,))

    def _not_restored(self, failure: Failure, one: Presence) -> None:
        self._not_released(failure)
        self._clock.callLater(RESTORE_AGAIN, self._restore, one)

    # The life of one connection.

    def admit(self, client_id: str, address: str) -> Deferred[Client]:
        """Make room for a connection of a client, and claim it.

        Fails with :class:`~gateway.edge.head.Refusal`. When it has fired, :meth:`opened` or :meth:`void` must follow
        in the same call. Cancelling it takes the claim back.
        """
        return Deferred.fromCoroutine(self._admit(client_id, address))

    async def _admit(self, client_id: str, address: str) -> Client:
        self._check_room(client_id)
        client = Client(client_id, address)
        self._claiming.setdefault(client_id, set()).add(client)
        self._claims += 1
        try:
            client.claiming = self._registry.claim(client_id, address)
            claim = await client.claiming.addTimeout(CLAIM_TIMEOUT, self._clock)
        except Superseded:
            # It opens, to be told so.
            return client
        except Exception as e:
            self._settled(client)
            self._restore(self._table.presence(client_id))
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
        return client

    def _check_room(self, client_id: str) -> None:
        word = "draining" if self._closed else self._available()
        if word:
            raise self._unavailable(word)
        here = client_id in self._table
        # Those that await their claims will replace it, and each other.
        coming = here + len(self._claiming.get(client_id, ()))
        if coming:
            wait = self._replacements.wait(client_id, coming)
            if wait:
                raise Refusal(
                    429,
                    "replaced",
                    f"this client was connected more than {MAX_REPLACEMENTS} times in {REPLACEMENTS_WITHIN:g} s: is it "
                    "running twice?",
                    [retry_after(wait)],
                )
        if not here and len(self._table) + self._claims >= self._settings.capacity:
            raise Refusal(503, "full", "this node has all the clients that it can take", [retry_after(1)])

    @staticmethod
    def _unavailable(word: str) -> Refusal:
        message, seconds = _UNAVAILABLE.get(word, ("this node takes no clients now", 1))
        return Refusal(503, word, message, [retry_after(seconds)])

    def opened(self, client: Client, connection: IConnection) -> None:
        """An admitted connection is open."""
        client.connection = connection
        old = self._table.get(client.client_id)
        if not client.claimed or (old is not None and old.generation > client.generation):
            # Replaced before it was open. If it had a claim, its row is the newer one's by now.
            client.claimed = False
            self._settled(client)
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
        self._settled(client)

    def void(self, client: Client) -> None:
        """An admitted connection could not be opened."""
        self._let_go(client).addErrback(self._not_released)

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
        self._replacements.add(client.client_id)
        if client.connection is not None:
            client.connection.close_with(CLOSE_REPLACED, "a newer connection of this client replaced it")

    def _let_go(self, client: Client) -> Deferred[None]:
        """Take a connection out of everything, once; fires when its row is gone too."""
        self._settled(client)
        self._pauses.discard(client)
        if self._table.remove(client):
            self._tell(self._handler.client_disconnected, client)
        if not client.claimed:
            return succeed(None)
        client.claimed = False
        return self._registry.release(client.client_id, client.generation)

    def _settled(self, client: Client) -> None:
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

    def _not_released(self, failure: Any) -> None:
        # The registry keeps a release that it could not write yet.
        if not failure.check(RegistryUnavailable):
            self._troubles.report("a client could not be released", failure)

    def _tell(self, what: Callable[[str, int], None], client: Client) -> None:
        try:
            what(client.client_id, client.generation)
        except Exception:  # noqa: BLE001 (the table must stay whole)
            self._troubles.report("an error in handling a client's coming or going")
