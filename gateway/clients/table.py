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

import attrs
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer

from gateway.clients.interface import IParkingOwner, Session, SessionInfo, UnparkedSession
from gateway.clients.keepalive import SweepParked
from gateway.clients.parked import ParkedSessions
from gateway.metrics import Metrics
from gateway.protocol.frames import CloseCode
from gateway.settings import Settings
from gateway.util.cork import Cork
from gateway.util.log import RateLimitedLogger
from gateway.util.rate_limit import TokenBucket

#: how often connections are looked at that were not quiet, in seconds
IDLE_CHECK_INTERVAL = 0.5
#: how many of them in one turn of the reactor
IDLE_CHECK_BATCH = 500
#: A connection that is woken so soon after it was heard of is parked only after as long a silence: to wake one and park
#: it again takes ten times as long as Autobahn takes for a message.
BUSY_WINDOW = 1.0


class IdleDetector:
    """Waits for awake connections to become quiet."""

    def __init__(self, clock: IReactorTime, park: Callable[[Session], bool]) -> None:
        """``park`` parks a connection that is quiet; ``False`` if it is not."""
        self._clock = clock
        self._park = park
        self._error_log = RateLimitedLogger(clock.seconds)
        self._new: dict[Session, None] = {}
        self._busy: dict[Session, None] = {}
        #: those of them that are still to be looked at this time
        self._recheck_queue: list[Session] = []
        self._new_timer: IDelayedCall | None = None
        self._recheck_timer: IDelayedCall | None = None

    def watch(self, session: Session) -> None:
        """Look at it in the next turn, and then until it could be parked."""
        self._busy.pop(session, None)
        self._new[session] = None
        if self._new_timer is None:
            self._new_timer = self._clock.callLater(0, self._check_new)

    def on_idle(self, session: Session) -> None:
        """It may just have become quiet."""
        if not session.idle_before_park and session in self._busy:
            self.watch(session)

    def discard(self, session: Session) -> None:
        """It is gone."""
        self._new.pop(session, None)
        self._busy.pop(session, None)

    def stop(self) -> None:
        """Stop the timers."""
        for timer in (self._new_timer, self._recheck_timer):
            if timer is not None:
                timer.cancel()
        self._new_timer = self._recheck_timer = None

    def _check_new(self) -> None:
        self._new_timer = None
        clients, self._new = self._new, {}
        for client in clients:
            if not self._try_park(client):
                self._busy[client] = None
        if self._busy and self._recheck_timer is None:
            self._recheck_timer = self._clock.callLater(IDLE_CHECK_INTERVAL, self._recheck_busy)

    def _recheck_busy(self) -> None:
        if not self._recheck_queue:
            self._recheck_queue = list(self._busy)
        some, self._recheck_queue = self._recheck_queue[-IDLE_CHECK_BATCH:], self._recheck_queue[:-IDLE_CHECK_BATCH]
        for client in some:
            if client in self._busy and self._try_park(client):
                self._busy.pop(client, None)
        again = 0 if self._recheck_queue else IDLE_CHECK_INTERVAL
        self._recheck_timer = self._clock.callLater(again, self._recheck_busy) if self._busy else None

    def _try_park(self, session: Session) -> bool:
        try:
            return self._park(session)
        except Exception:  # noqa: BLE001 (the others must not suffer)
            self._error_log.failure("an error in parking a connection")
            return False


#: when it is tried again to park a connection that the kernel could not watch, in seconds
PARK_RETRY_INTERVAL = 60.0


@attrs.frozen
class ParkingOptions:
    """How idle connections are parked: on ``reactor``, and written to through ``cork``. ``build_connection`` makes the
    protocol of a session that leaves the parked ones; it raises ``OSError`` if the socket is lost."""

    reactor: Any
    cork: Cork
    build_connection: Callable[[UnparkedSession], Any]


@implementer(IParkingOwner)
class SessionTable:
    """The clients of one node, by their ids."""

    def __init__(
        self,
        message_received: Callable[[str, int, bytes], int],
        on_closed: Callable[[Session, int], None],
        on_rate_exceeded: Callable[[Session], None],
        settings: Settings,
        metrics: Metrics,
        parking: ParkingOptions | None = None,
    ) -> None:
        """``message_received`` takes the messages of parked clients; ``ended`` is told that a connection is lost, with
        a close code, while it is still in the table; ``paused`` is to read no more from a client for a while."""
        self.message_received = message_received
        self._on_closed = on_closed
        self._on_rate_exceeded = on_rate_exceeded
        #: the records of those that are awake
        self.awake: dict[str, Session] = {}
        #: client_id, generation -> what no later token of theirs outlasts; of few
        self._max_expires_at: dict[tuple[str, int], float] = {}
        self._parked_fds: dict[str, int] = {}
        self._parked_sessions: ParkedSessions | None = None
        self._idle_detector: IdleDetector | None = None
        self._park_after = settings.park_after
        if parking is not None:
            self._enable_parking(parking, settings, metrics)

    def _enable_parking(self, options: ParkingOptions, settings: Settings, metrics: Metrics) -> None:
        per_second = settings.messages_per_client
        self._build_connection = options.build_connection
        self._clock = options.reactor.seconds
        self._idle_detector = IdleDetector(options.reactor, self._park)
        self._parked_sessions = parked = ParkedSessions(
            self,
            reactor=options.reactor,
            cork=options.cork,
            metrics=metrics,
            max_message_size=settings.max_message_size,
            rate_limit=TokenBucket(per_second) if per_second > 0 else None,
        )
        self._parked_fds = parked.fds
        self._parked_generations = parked.generations
        self._send_parked = parked.send

    @property
    def sweep_parked(self) -> SweepParked | None:
        """Checks a slice of the parked sessions; ``None`` where none are parked."""
        return None if self._parked_sessions is None else self._parked_sessions.sweep

    def start(self) -> None:
        """Begin to read from those that are parked."""
        if self._parked_sessions is not None:
            self._parked_sessions.start()

    def stop(self) -> None:
        """Stop the timers, and drop who is still parked."""
        if self._idle_detector is not None:
            self._idle_detector.stop()
        if self._parked_sessions is not None:
            self._parked_sessions.stop()

    # All of them.

    def __len__(self) -> int:
        return len(self.awake) + len(self._parked_fds)

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._parked_fds or client_id in self.awake

    def parked_count(self) -> int:
        """How many are parked."""
        return len(self._parked_fds)

    def client_ids(self) -> list[str]:
        """Their names, as a new list."""
        return [*self.awake, *self._parked_fds]

    def session_infos(self) -> Iterator[SessionInfo]:
        """All that are there when it is begun, as far as they are still there when it is their turn."""
        return filter(None, map(self.session_info, self.client_ids()))

    # One of them.

    def session_info(self, client_id: str) -> SessionInfo | None:
        """The connection of a client."""
        client = self.awake.get(client_id)
        if client is not None:
            return SessionInfo(client_id, client.generation, client.connected_at, client.address)
        return self._parked_sessions.session_info(client_id) if self._parked_sessions is not None else None

    def generation(self, client_id: str) -> int:
        """The generation of a client's connection, or 0."""
        fd = self._parked_fds.get(client_id)
        if fd is not None:
            return self._parked_generations[fd]
        client = self.awake.get(client_id)
        return 0 if client is None else client.generation

    def send(self, client_id: str, payload: bytes, generation: int = 0) -> int:
        """See :meth:`~gateway.clients.interface.IEdge.send`."""
        if client_id in self._parked_fds:
            return self._send_parked(client_id, payload, generation)
        client = self.awake.get(client_id)
        if client is None or client.connection is None or (generation and generation != client.generation):
            return 0
        return client.generation if client.connection.send_text(payload) else 0

    def renew(self, client_id: str, generation: int, expires_at: float) -> bool:
        """See :meth:`~gateway.clients.interface.IEdge.renew`."""
        if not generation or self.generation(client_id) != generation:
            return False
        cap = self._max_expires_at.get((client_id, generation), 0.0)
        expires_at = min(expires_at or cap, cap or expires_at)
        client = self.awake.get(client_id)
        if client is not None:
            client.expires_at = expires_at
        else:
            assert self._parked_sessions is not None
            self._parked_sessions.renew(client_id, expires_at)
        return True

    def get(self, client_id: str) -> Session | None:
        """The record of a client, which is awake, or is woken for that."""
        if client_id in self._parked_fds:
            assert self._parked_sessions is not None
            self._parked_sessions.wake(client_id)
        return self.awake.get(client_id)

    def add(self, session: Session) -> None:
        """A connection is open; it takes the place of an older one of the same client."""
        assert session.client_id not in self._parked_fds
        self.awake[session.client_id] = session
        if session.max_expires_at:
            self._max_expires_at[session.client_id, session.generation] = session.max_expires_at
        if self._idle_detector is not None and session.connection is not None and session.connection.parkable:
            session.idle_before_park = self._park_after
            self._idle_detector.watch(session)

    def remove(self, session: Session) -> bool:
        """A connection is gone, or can be used no more. ``False`` if it is not in the table, or no longer."""
        self._max_expires_at.pop((session.client_id, session.generation), None)
        if self._idle_detector is not None:
            self._idle_detector.discard(session)
        if self.awake.get(session.client_id) is not session:
            return False
        del self.awake[session.client_id]
        return True

    def on_idle(self, session: Session) -> None:
        """A connection that is awake may have become quiet."""
        if self._idle_detector is not None:
            self._idle_detector.on_idle(session)

    def _park(self, session: Session) -> bool:
        connection = session.connection
        if connection is None or self.awake.get(session.client_id) is not session or self._parked_sessions is None:
            return True
        heard_at = connection.last_received_at
        if self._clock() - heard_at < session.idle_before_park or session.paused:
            return False
        taken = connection.detach_idle()
        if taken is None:
            return False
        del self.awake[session.client_id]
        session.connection = None
        try:
            self._parked_sessions.park(session, *taken, heard_at)
        except OSError:
            # The kernel watches no more files. It stays awake, and is tried again when it has been silent for longer.
            self.wake(UnparkedSession(session, *taken, heard_at, heard_at, b"", b""))
            session.idle_before_park = self._clock() - heard_at + PARK_RETRY_INTERVAL
            raise
        return True

    # IKeeper.

    def wake(self, unparked: UnparkedSession) -> Any:
        """See :meth:`IKeeper.wake`."""
        client = unparked.session
        self.awake[client.client_id] = client
        try:
            connection = self._build_connection(unparked)
        except OSError:
            self._on_closed(client, CloseCode.ABNORMAL_CLOSURE)
            return None
        client.connection = connection
        client.idle_before_park = self._park_after
        if self._clock() - unparked.previously_received_at < BUSY_WINDOW:
            client.idle_before_park = max(BUSY_WINDOW, self._park_after)
        assert self._idle_detector is not None
        self._idle_detector.watch(client)
        if unparked.unsent:
            connection.sendData(unparked.unsent)
        if unparked.unread:
            connection.dataReceived(unparked.unread)
        return connection

    def connection_lost(self, session: Session) -> None:
        """See :meth:`IKeeper.lost`."""
        self.awake[session.client_id] = session
        self._on_closed(session, CloseCode.ABNORMAL_CLOSURE)

    def close_session(self, client_id: str, generation: int, code: int, reason: str) -> None:
        """See :meth:`IKeeper.end`."""
        client = self.get(client_id)
        if client is not None and client.generation == generation and client.connection is not None:
            client.connection.close_with(code, reason)

    def pause_session(self, client_id: str, generation: int) -> None:
        """See :meth:`IKeeper.pause`."""
        client = self.get(client_id)
        if client is not None and client.generation == generation:
            self._on_rate_exceeded(client)
