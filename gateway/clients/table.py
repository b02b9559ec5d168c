"""Table of client sessions, awake and parked, by client_id; and the detector of idle sessions to park.

An awake session is an object with a transport and a protocol; a parked one is a row (:mod:`gateway.clients.parked`).
Callers that send to a client, or query it, need not know which. All other callers get the :class:`Session`, and a
parked one is woken for it.

A session is parked as soon as it is idle, or some time later. One that has just opened, or has just handled what woke
it, is checked in the next reactor iteration. One that could not be parked then, or that was busy when it was woken, is
checked every half second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer

from gateway.auth.interface import Identity
from gateway.clients.interface import IParkingOwner, Session, SessionInfo, UnparkedSession
from gateway.clients.keepalive import SweepParked
from gateway.clients.parked import ParkedSessions
from gateway.metrics import Metrics
from gateway.protocol.frames import CloseCode
from gateway.registry.interface import SessionKey
from gateway.settings import Settings
from gateway.util.cork import Cork
from gateway.util.log import RateLimitedLogger
from gateway.util.rate_limit import TokenBucket

#: how often busy sessions are checked, in seconds
IDLE_CHECK_INTERVAL = 0.5
#: busy sessions checked per reactor iteration
IDLE_CHECK_BATCH = 500
#: A session that is woken within so many seconds of its last input is parked only after as long a silence: waking and
#: parking it takes ten times as long as handling a message in Autobahn.
BUSY_WINDOW = 1.0
#: delay of the next attempt to park a session whose socket the kernel could not watch, in seconds
PARK_RETRY_INTERVAL = 60.0


class IdleDetector:
    """Park awake sessions when they become idle."""

    def __init__(self, clock: IReactorTime, park: Callable[[Session], bool]) -> None:
        """``park`` parks a session, or returns ``False`` if it is not idle."""
        self._clock = clock
        self._park = park
        self._error_log = RateLimitedLogger(clock.seconds)
        self._new: dict[Session, None] = {}
        self._busy: dict[Session, None] = {}
        #: busy sessions that are still to be checked in this round
        self._recheck_queue: list[Session] = []
        self._new_timer: IDelayedCall | None = None
        self._recheck_timer: IDelayedCall | None = None

    def watch(self, session: Session) -> None:
        """Check a session in the next reactor iteration, and then until it is parked."""
        self._busy.pop(session, None)
        self._new[session] = None
        if self._new_timer is None:
            self._new_timer = self._clock.callLater(0, self._check_new)

    def on_idle(self, session: Session) -> None:
        """Check a session soon that may have become idle."""
        if not session.idle_before_park and session in self._busy:
            self.watch(session)

    def discard(self, session: Session) -> None:
        """Forget a session that is closed."""
        self._new.pop(session, None)
        self._busy.pop(session, None)

    def stop(self) -> None:
        for timer in (self._new_timer, self._recheck_timer):
            if timer is not None:
                timer.cancel()
        self._new_timer = self._recheck_timer = None

    def _check_new(self) -> None:
        self._new_timer = None
        sessions, self._new = self._new, {}
        for session in sessions:
            if not self._try_park(session):
                self._busy[session] = None
        if self._busy and self._recheck_timer is None:
            self._recheck_timer = self._clock.callLater(IDLE_CHECK_INTERVAL, self._recheck_busy)

    def _recheck_busy(self) -> None:
        if not self._recheck_queue:
            self._recheck_queue = list(self._busy)
        batch, self._recheck_queue = self._recheck_queue[-IDLE_CHECK_BATCH:], self._recheck_queue[:-IDLE_CHECK_BATCH]
        for session in batch:
            if session in self._busy and self._try_park(session):
                self._busy.pop(session, None)
        delay = 0 if self._recheck_queue else IDLE_CHECK_INTERVAL
        self._recheck_timer = self._clock.callLater(delay, self._recheck_busy) if self._busy else None

    def _try_park(self, session: Session) -> bool:
        try:
            return self._park(session)
        except Exception:  # noqa: BLE001 (the other sessions must still be checked)
            self._error_log.failure("error in parking a connection")
            return False


@attrs.frozen
class ParkingOptions:
    """How idle sessions are parked: on ``reactor``, with writes coalesced by ``cork``.

    ``build_connection`` builds the connection of a session that is woken; it raises ``OSError`` if the socket is lost.
    """

    reactor: Any
    cork: Cork
    build_connection: Callable[[UnparkedSession], Any]


@implementer(IParkingOwner)
class SessionTable:
    """Client sessions of one node, by client_id."""

    def __init__(
        self,
        message_received: Callable[[str, int, bytes], int | None],
        on_closed: Callable[[Session, int], None],
        on_rate_exceeded: Callable[[Session], None],
        settings: Settings,
        metrics: Metrics,
        parking: ParkingOptions | None = None,
    ) -> None:
        """``message_received`` handles messages of parked clients. ``on_closed`` is called with the close code of a
        lost connection while it is still in the table. ``on_rate_exceeded`` pauses reading from a client."""
        self.message_received = message_received
        self._on_closed = on_closed
        self._on_rate_exceeded = on_rate_exceeded
        self.awake: dict[str, Session] = {}
        #: upper limit of later tokens; only sessions that have one
        self._max_expires_at: dict[SessionKey, float] = {}
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
        """Start reading from parked sessions."""
        if self._parked_sessions is not None:
            self._parked_sessions.start()

    def stop(self) -> None:
        """Stop the timers, and drop all sessions that are still parked."""
        if self._idle_detector is not None:
            self._idle_detector.stop()
        if self._parked_sessions is not None:
            self._parked_sessions.stop()

    # All sessions.

    def __len__(self) -> int:
        return len(self.awake) + len(self._parked_fds)

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._parked_fds or client_id in self.awake

    def parked_count(self) -> int:
        return len(self._parked_fds)

    def client_ids(self) -> list[str]:
        """Return the client_ids as a new list."""
        return [*self.awake, *self._parked_fds]

    def session_infos(self) -> Iterator[SessionInfo]:
        """Iterate over the sessions that are in the table when iteration starts, skipping those that are gone when they
        are reached."""
        return filter(None, map(self.session_info, self.client_ids()))

    # One session.

    def session_info(self, client_id: str) -> SessionInfo | None:
        """Return the session of a client, or ``None``."""
        session = self.awake.get(client_id)
        if session is not None:
            return SessionInfo(client_id, session.generation, session.connected_at, session.address)
        return self._parked_sessions.session_info(client_id) if self._parked_sessions is not None else None

    def generation(self, client_id: str) -> int:
        """Return the generation of a client's connection, or 0."""
        fd = self._parked_fds.get(client_id)
        if fd is not None:
            return self._parked_generations[fd]
        session = self.awake.get(client_id)
        return 0 if session is None else session.generation

    def send(self, client_id: str, payload: bytes, generation: int = 0) -> int:
        """Send one text message, as :meth:`IClientSessions.send` does."""
        if client_id in self._parked_fds:
            return self._send_parked(client_id, payload, generation)
        session = self.awake.get(client_id)
        if session is None or session.connection is None or (generation and generation != session.generation):
            return 0
        return session.generation if session.connection.send_text(payload) else 0

    def renew(self, key: SessionKey, expires_at: float) -> bool:
        """Set when a session expires, as :meth:`IClientSessions.renew` does, but at the latest with its certificate."""
        client_id, generation = key
        if not generation or self.generation(client_id) != generation:
            return False
        limit = self._max_expires_at.get(key, 0.0)
        expires_at = min(expires_at or limit, limit or expires_at)
        session = self.awake.get(client_id)
        if session is not None:
            session.expires_at = expires_at
        else:
            assert self._parked_sessions is not None
            self._parked_sessions.renew(client_id, expires_at)
        return True

    def ticket_identity(self, client_id: str, generation: int) -> Identity | None:
        """Return what a client has proved, as :meth:`IClientSessions.ticket_identity` does."""
        if not generation or self.generation(client_id) != generation:
            return None
        session = self.awake.get(client_id)
        if session is None:
            assert self._parked_sessions is not None
            return self._parked_sessions.ticket_identity(client_id)
        method = session.ticket_method
        return Identity(client_id, session.expires_at, method=method) if method else None

    def get(self, client_id: str) -> Session | None:
        """Return the session of a client, woken if it was parked; ``None`` if it is not connected."""
        if client_id in self._parked_fds:
            assert self._parked_sessions is not None
            self._parked_sessions.wake(client_id)
        return self.awake.get(client_id)

    def add(self, session: Session) -> None:
        """Add an open connection; it replaces an older one of the same client."""
        assert session.client_id not in self._parked_fds
        self.awake[session.client_id] = session
        if session.max_expires_at:
            self._max_expires_at[session.key] = session.max_expires_at
        if self._idle_detector is not None and session.connection is not None and session.connection.parkable:
            session.idle_before_park = self._park_after
            self._idle_detector.watch(session)

    def remove(self, session: Session) -> bool:
        """Remove a closed session. Returns ``False`` if it is not in the table, or no longer."""
        self._max_expires_at.pop(session.key, None)
        if self._idle_detector is not None:
            self._idle_detector.discard(session)
        if self.awake.get(session.client_id) is not session:
            return False
        del self.awake[session.client_id]
        return True

    def on_idle(self, session: Session) -> None:
        """Check an awake session that may have become idle."""
        if self._idle_detector is not None:
            self._idle_detector.on_idle(session)

    def _park(self, session: Session) -> bool:
        connection = session.connection
        if connection is None or self.awake.get(session.client_id) is not session or self._parked_sessions is None:
            return True
        last_received_at = connection.last_received_at
        if self._clock() - last_received_at < session.idle_before_park or session.paused:
            return False
        socket = connection.detach_idle()
        if socket is None:
            return False
        del self.awake[session.client_id]
        session.connection = None
        try:
            self._parked_sessions.park(session, *socket, last_received_at)
        except OSError:
            # The kernel watches no more files. Keep the session awake, and retry after a longer silence.
            self.wake(UnparkedSession(session, *socket, last_received_at, last_received_at, b"", b""))
            session.idle_before_park = self._clock() - last_received_at + PARK_RETRY_INTERVAL
            raise
        return True

    # IParkingOwner.

    def wake(self, unparked: UnparkedSession) -> Any:
        session = unparked.session
        self.awake[session.client_id] = session
        try:
            connection = self._build_connection(unparked)
        except OSError:
            self._on_closed(session, CloseCode.ABNORMAL_CLOSURE)
            return None
        session.connection = connection
        session.idle_before_park = self._park_after
        if self._clock() - unparked.previously_received_at < BUSY_WINDOW:
            session.idle_before_park = max(BUSY_WINDOW, self._park_after)
        assert self._idle_detector is not None
        self._idle_detector.watch(session)
        if unparked.unsent:
            connection.sendData(unparked.unsent)
        if unparked.unread:
            connection.dataReceived(unparked.unread)
        return connection

    def connection_lost(self, session: Session) -> None:
        self.awake[session.client_id] = session
        self._on_closed(session, CloseCode.ABNORMAL_CLOSURE)

    def close_session(self, key: SessionKey, code: int, reason: str) -> None:
        session = self.get(key.client_id)
        if session is not None and session.generation == key.generation and session.connection is not None:
            session.connection.close_with(code, reason)

    def pause_session(self, key: SessionKey) -> None:
        session = self.get(key.client_id)
        if session is not None and session.generation == key.generation:
            self._on_rate_exceeded(session)
