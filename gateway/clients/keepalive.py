"""Keep-alive pings, token expiry and inbound throttling of all connections, on a few shared timers.

Awake sessions are checked here; parked sessions in :meth:`gateway.clients.parked.ParkedSessions.sweep`, on the same
timer.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall

from gateway.clients.expiry import EXPIRED_REASON, has_expired
from gateway.clients.interface import Session
from gateway.metrics import Metrics
from gateway.protocol.frames import CloseCode
from gateway.util.log import RateLimitedLogger
from gateway.util.rate_limit import TokenBucket

#: longest interval between two slices of a sweep, in seconds
MAX_SWEEP_INTERVAL = 0.5
#: longest time of a sweep over all connections, in seconds: with the interval between slices, a ping is no more than
#: 2 s late, and a connection outlives its token by no more
MAX_ROUND_TIME = 1.5
#: A slice that is this late, in seconds, means that the process was stopped: answers to its pings may wait unread.
STALL_TIMEOUT = 2.0
#: how often paused clients are checked for whether they keep their rate again, in seconds
RESUME_INTERVAL = 0.05
#: how often paused clients are checked for a lost connection, in seconds
LOST_CHECK_INTERVAL = 1.0
#: message size that is charged as one message, in bytes
BYTES_PER_UNIT = 2**14

#: :meth:`~gateway.clients.parked.ParkedSessions.sweep`
SweepParked = Callable[[int, float, float, float, bool, float], None]


def message_units(message: bytes) -> int:
    """Return the number of messages that one message is charged as, by its size."""
    return -(-len(message) // BYTES_PER_UNIT) or 1


class KeepAlive:
    """Ping connections that were silent for an interval, abort those that stay silent for a timeout after the ping, and
    close those whose token has expired.

    Each tick checks a slice of all connections. A round over all of them takes a tenth of the shorter of the two times,
    and at most ``MAX_ROUND_TIME``.
    """

    def __init__(
        self,
        clock: IReactorTime,
        metrics: Metrics,
        *,
        awake_sessions: Callable[[], list[Session]],
        interval: float,
        timeout: float,
        sweep_parked: SweepParked | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """``interval`` and ``timeout`` are in seconds. ``awake_sessions`` returns a new list of the awake sessions.
        ``wall_clock`` returns seconds since 1970, by which tokens expire; the node's clock may be monotonic."""
        self._clock = clock
        self._metrics = metrics
        self._awake_sessions = awake_sessions
        #: checks a slice of the parked sessions (:meth:`~gateway.clients.parked.ParkedSessions.sweep`)
        self.sweep_parked = sweep_parked
        self._wall_clock = wall_clock
        self._interval = interval
        self._timeout = timeout
        self._error_log = RateLimitedLogger(clock.seconds)
        round_time = min(MAX_ROUND_TIME, min(interval, timeout) / 10)
        self._slices = max(1, math.floor(round_time / MAX_SWEEP_INTERVAL))
        self._sweep_interval = min(MAX_SWEEP_INTERVAL, round_time)
        self._unswept: list[Session] = []
        self._slice_size = 0
        self._swept_at = math.inf
        self._forgive_until = 0.0
        self._loop = LoopingCall(self._sweep)
        self._loop.clock = clock

    def start(self) -> None:
        if not self._loop.running:
            self._loop.start(self._sweep_interval, now=False)

    def stop(self) -> None:
        if self._loop.running:
            self._loop.stop()

    def _sweep(self) -> None:
        if not self._unswept:
            self._unswept = self._awake_sessions()
            self._slice_size = math.ceil(len(self._unswept) / self._slices)
        now = self._clock.seconds()
        if now - self._swept_at > STALL_TIMEOUT:
            self._forgive_until = now + self._timeout
        self._swept_at = now
        wall_time = self._wall_clock()
        if self.sweep_parked is not None:
            self.sweep_parked(self._slices, now, self._interval, self._timeout, now < self._forgive_until, wall_time)
        batch, self._unswept = self._unswept[-self._slice_size :], self._unswept[: -self._slice_size]
        for session in batch:
            try:
                self._check_session(session, now, wall_time)
            except Exception:  # noqa: BLE001 (the other sessions must still be checked)
                self._error_log.failure("error in the keep-alive of a connection")

    def _check_session(self, session: Session, now: float, wall_time: float) -> None:
        connection = session.connection
        if connection is None:
            return
        if has_expired(session.expires_at, wall_time):
            self._metrics.expired += 1
            connection.close_with(CloseCode.POLICY_VIOLATION, EXPIRED_REASON)
            return
        if session.paused:
            return
        last_received_at = connection.last_received_at
        if now - last_received_at < self._interval:
            return
        # Bytes have come since the last ping: none is unanswered.
        if session.pinged_at <= last_received_at:
            session.pinged_at = now
            connection.ping()
        elif now - session.pinged_at >= self._timeout and now >= self._forgive_until:
            self._metrics.ping_timeouts += 1
            connection.abort()


class InboundThrottle:
    """Pause reading from clients that exceed their message rate, until they are within it again."""

    def __init__(self, clock: IReactorTime, per_second: float, metrics: Metrics) -> None:
        """``per_second`` is in messages; 0 means no limit."""
        self._clock = clock
        self._rate_limit = TokenBucket(per_second) if per_second > 0 else None
        self._per_second = per_second
        self._limit_log = RateLimitedLogger(clock.seconds)
        self._metrics = metrics
        self._paused: dict[Session, None] = {}
        self._timer: IDelayedCall | None = None
        self._lost_checked_at = -math.inf

    def charge(self, session: Session, units: int) -> None:
        """Charge a client for so many messages; pause it if it had exceeded its rate before."""
        if self._rate_limit is None:
            return
        now = self._clock.seconds()
        exceeded = self._rate_limit.wait_time(session.tat, now)
        session.tat = self._rate_limit.charge(session.tat, now, units)
        if exceeded:
            self.pause(session)

    def pause(self, session: Session) -> None:
        """Pause reading from a client until it is within its rate."""
        if not session.paused and session.connection is not None:
            self._metrics.paused_clients += 1
            self._limit_log.warn(
                "client {client_id} at {address} is slowed: --messages-per-client {limit:g}",
                client_id=session.client_id,
                address=session.address,
                limit=self._per_second,
            )
            session.paused = True
            self._paused[session] = None
            session.connection.pause_reading()
            if self._timer is None:
                self._timer = self._clock.callLater(RESUME_INTERVAL, self._resume)

    def discard(self, session: Session) -> None:
        """Forget a client whose connection is closed."""
        session.paused = False
        self._paused.pop(session, None)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _resume(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        rate = self._rate_limit
        due = [session for session in self._paused if rate is None or not rate.wait_time(session.tat, now)]
        for session in due:
            self.discard(session)
            if session.connection is not None:
                session.connection.resume_reading()
        if self._paused and now - self._lost_checked_at >= LOST_CHECK_INTERVAL:
            self._lost_checked_at = now
            self._drop_lost()
        if self._paused and self._timer is None:
            self._timer = self._clock.callLater(RESUME_INTERVAL, self._resume)

    def _drop_lost(self) -> None:
        """Abort paused connections that were reset.

        Only this check finds them: the reactor does not watch a socket that is neither read from nor written to, and
        what a paused client has sent may take a minute to be read.
        """
        by_fd = {session.connection.fd: session for session in self._paused if session.connection is not None}
        poll = select.poll()
        for fd in by_fd:
            if fd >= 0:
                # poll() reports errors without being asked to.
                poll.register(fd, 0)
        for fd, event in poll.poll(0):
            connection = by_fd[fd].connection
            if event & select.POLLERR and connection is not None:
                connection.abort()
