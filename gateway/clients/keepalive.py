"""What is done for all connections by few timers: keep-alive, the end of those whose token has expired, and slowing
down those that send too much.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall

from gateway.clients.interface import Session
from gateway.metrics import Metrics
from gateway.protocol.frames import CloseCode
from gateway.util.log import RateLimitedLogger
from gateway.util.rate_limit import TokenBucket

#: the longest that the sweep rests between two slices, in seconds
MAX_SWEEP_INTERVAL = 0.5
#: the longest that a round takes: so late a connection may end whose token has expired
MAX_ROUND_TIME = 2.0
#: what a client is told then
EXPIRED_REASON = "the token, or the certificate, has expired"
#: the latest time of 32 bits, in seconds since 1970
MAX_TIMESTAMP = 0xFFFFFFFF
#: A sweep that comes so late was not run: the process was stopped, and the answers to its pings wait unread.
STALL_TIMEOUT = 2.0
#: how often paused clients are looked at, in seconds, and how often for whether they are still there
RESUME_INTERVAL, LOST_CHECK_INTERVAL = 0.05, 1.0
#: a message counts for one more than a small one for each so many bytes
BYTES_PER_UNIT = 16384

#: :meth:`~gateway.clients.parked.ParkedSessions.sweep`
SweepParked = Callable[[int, float, float, float, bool, float], None]


def message_units(message: bytes) -> int:
    """For how many small messages a message counts by its size."""
    return -(-len(message) // BYTES_PER_UNIT) or 1


def pack_expiry(expires_at: float) -> int:
    """When something expires as a number of 32 bits, 0 being never; what is later than that can say is never, too."""
    return math.ceil(expires_at) if expires_at <= MAX_TIMESTAMP else 0


class KeepAlive:
    """Pings connections that were silent for an interval, and drops those that stay silent for a timeout after it.
    Closes those whose token has expired.

    A slice of all connections is looked at at each tick; a round of all takes a tenth of the shorter of the two times,
    and not more than ``LONGEST_ROUND``.
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
        """``interval`` and ``timeout`` are in seconds; ``everyone`` gives a new list of those that are awake. ``today``
        is the wall clock, in seconds since 1970: the node's own may be monotonic."""
        self._clock = clock
        self._metrics = metrics
        self._awake_sessions = awake_sessions
        #: checks a slice of the parked sessions (:meth:`~gateway.clients.parked.ParkedSessions.sweep`)
        self.sweep_parked = sweep_parked
        self._wall_clock = wall_clock
        self._interval = interval
        self._timeout = timeout
        self._error_log = RateLimitedLogger(clock.seconds)
        a_round = min(MAX_ROUND_TIME, min(interval, timeout) / 10)
        self._slices = max(1, math.floor(a_round / MAX_SWEEP_INTERVAL))
        self._sweep_interval = min(MAX_SWEEP_INTERVAL, a_round)
        self._unswept: list[Session] = []
        self._slice_size = 0
        self._swept_at = math.inf
        self._forgive_until = 0.0
        self._loop = LoopingCall(self._sweep)
        self._loop.clock = clock

    def start(self) -> None:
        """Begin."""
        if not self._loop.running:
            self._loop.start(self._sweep_interval, now=False)

    def stop(self) -> None:
        """End."""
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
        today = self._wall_clock()
        if self.sweep_parked is not None:
            self.sweep_parked(self._slices, now, self._interval, self._timeout, now < self._forgive_until, today)
        some, self._unswept = self._unswept[-self._slice_size :], self._unswept[: -self._slice_size]
        for client in some:
            try:
                self._check_session(client, now, today)
            except Exception:  # noqa: BLE001 (the others must not suffer)
                self._error_log.failure("an error in keeping a connection alive")

    def _check_session(self, session: Session, now: float, wall_time: float) -> None:
        connection = session.connection
        if connection is None:
            return
        if 0 < session.expires_at <= wall_time:
            self._metrics.expired += 1
            connection.close_with(CloseCode.POLICY_VIOLATION, EXPIRED_REASON)
            return
        if session.paused:
            return
        heard_at = connection.last_received_at
        if now - heard_at < self._interval:
            return
        if session.pinged_at <= heard_at:
            session.pinged_at = now
            connection.ping()
        elif now - session.pinged_at >= self._timeout and now >= self._forgive_until:
            self._metrics.ping_timeouts += 1
            connection.abort()


class InboundThrottle:
    """Stops reading from clients that send more than their rate, until they have kept it again."""

    def __init__(self, clock: IReactorTime, per_second: float, metrics: Metrics) -> None:
        """``per_second`` 0 means no limit."""
        self._clock = clock
        self._rate_limit = TokenBucket(per_second) if per_second > 0 else None
        self._metrics = metrics
        self._paused: dict[Session, None] = {}
        self._timer: IDelayedCall | None = None
        self._lost_checked_at = -math.inf

    def charge_frame(self, session: Session, message: bytes) -> None:
        """Count one frame of a client, and the message that is whole with it, if there is one."""
        if self._rate_limit is None:
            return
        now = self._clock.seconds()
        over = self._rate_limit.wait_time(session.tat, now)
        session.tat = self._rate_limit.charge(session.tat, now, message_units(message))
        if over:
            self.pause(session)

    def pause(self, session: Session) -> None:
        """Read no more from a client until it has kept its rate again."""
        if not session.paused and session.connection is not None:
            self._metrics.paused_clients += 1
            session.paused = True
            self._paused[session] = None
            session.connection.pause_reading()
            if self._timer is None:
                self._timer = self._clock.callLater(RESUME_INTERVAL, self._resume)

    def charge(self, session: Session, units: int) -> None:
        """Count more for the message that was counted last: it was a batch of so many more."""
        if self._rate_limit is not None:
            session.tat = self._rate_limit.charge(session.tat, self._clock.seconds(), units)

    def discard(self, session: Session) -> None:
        """Forget a client that is gone."""
        session.paused = False
        self._paused.pop(session, None)

    def stop(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _resume(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        rate = self._rate_limit
        due = [one for one in self._paused if rate is None or not rate.wait_time(one.tat, now)]
        for client in due:
            self.discard(client)
            if client.connection is not None:
                client.connection.resume_reading()
        if self._paused and now - self._lost_checked_at >= LOST_CHECK_INTERVAL:
            self._lost_checked_at = now
            self._drop_lost()
        if self._paused and self._timer is None:
            self._timer = self._clock.callLater(RESUME_INTERVAL, self._resume)

    def _drop_lost(self) -> None:
        """End those whose connection was reset. Nobody else finds that: the reactor watches no socket that is neither
        read from nor written to, and what a client had sent may take a minute to be read."""
        by_fd = {client.connection.fd: client for client in self._paused if client.connection is not None}
        poll = select.poll()
        for fd in by_fd:
            if fd >= 0:
                # Errors are told of without being asked for.
                poll.register(fd, 0)
        for fd, event in poll.poll(0):
            connection = by_fd[fd].connection
            if event & select.POLLERR and connection is not None:
                connection.abort()
