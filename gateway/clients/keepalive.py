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

from gateway.clients.interface import Client
from gateway.metrics import Metrics
from gateway.protocol.frames import CLOSE_POLICY
from gateway.util.log import Troubles
from gateway.util.rate_limit import Rate

#: the longest that the sweep rests between two slices, in seconds
SWEEP_TICK = 0.5
#: the longest that a round takes: so late a connection may end whose token has expired
LONGEST_ROUND = 2.0
#: what a client is told then
EXPIRED = "the token, or the certificate, has expired"
#: the latest time of 32 bits, in seconds since 1970
LATEST = 0xFFFFFFFF
#: A sweep that comes so late was not run: the process was stopped, and the answers to its pings wait unread.
STOPPED = 2.0
#: how often paused clients are looked at, in seconds, and how often for whether they are still there
RESUME_TICK, LOST_TICK = 0.05, 1.0
#: a message counts for one more than a small one for each so many bytes
UNIT = 16384


def units_of(message: bytes) -> int:
    """For how many small messages a message counts by its size."""
    return -(-len(message) // UNIT) or 1


def whole_seconds(until: float) -> int:
    """When something expires as a number of 32 bits, 0 being never; what is later than that can say is never, too."""
    return math.ceil(until) if until <= LATEST else 0


class Sweep:
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
        everyone: Callable[[], list[Client]],
        interval: float,
        timeout: float,
        today: Callable[[], float] = time.time,
    ) -> None:
        """``interval`` and ``timeout`` are in seconds; ``everyone`` gives a new list of those that are awake. ``today``
        is the wall clock, in seconds since 1970: the node's own may be monotonic."""
        self._clock = clock
        self._metrics = metrics
        self._everyone = everyone
        #: looks at a slice of those that are parked (:meth:`~gateway.clients.parked.Parking.sweep`)
        self.parked: Callable[[int, float, float, float, bool, float], None] | None = None
        self._today = today
        self._interval = interval
        self._timeout = timeout
        self._troubles = Troubles(clock.seconds)
        a_round = min(LONGEST_ROUND, min(interval, timeout) / 10)
        self._slices = max(1, math.floor(a_round / SWEEP_TICK))
        self._tick = min(SWEEP_TICK, a_round)
        self._waiting: list[Client] = []
        self._slice = 0
        self._turned_at = math.inf
        self._spare_until = 0.0
        self._loop = LoopingCall(self._turn)
        self._loop.clock = clock

    def start(self) -> None:
        """Begin."""
        if not self._loop.running:
            self._loop.start(self._tick, now=False)

    def stop(self) -> None:
        """End."""
        if self._loop.running:
            self._loop.stop()

    def _turn(self) -> None:
        if not self._waiting:
            self._waiting = self._everyone()
            self._slice = math.ceil(len(self._waiting) / self._slices)
        now = self._clock.seconds()
        if now - self._turned_at > STOPPED:
            self._spare_until = now + self._timeout
        self._turned_at = now
        today = self._today()
        if self.parked is not None:
            self.parked(self._slices, now, self._interval, self._timeout, now < self._spare_until, today)
        some, self._waiting = self._waiting[-self._slice :], self._waiting[: -self._slice]
        for client in some:
            try:
                self._visit(client, now, today)
            except Exception:  # noqa: BLE001 (the others must not suffer)
                self._troubles.report("an error in keeping a connection alive")

    def _visit(self, client: Client, now: float, today: float) -> None:
        connection = client.connection
        if connection is None:
            return
        if 0 < client.until <= today:
            self._metrics.expired += 1
            connection.close_with(CLOSE_POLICY, EXPIRED)
            return
        if client.paused:
            return
        heard_at = connection.heard_at
        if now - heard_at < self._interval:
            return
        if client.pinged_at <= heard_at:
            client.pinged_at = now
            connection.ping()
        elif now - client.pinged_at >= self._timeout and now >= self._spare_until:
            self._metrics.ping_timeouts += 1
            connection.abort()


class Pauses:
    """Stops reading from clients that send more than their rate, until they have kept it again."""

    def __init__(self, clock: IReactorTime, per_second: float, metrics: Metrics) -> None:
        """``per_second`` 0 means no limit."""
        self._clock = clock
        self._rate = Rate(per_second) if per_second > 0 else None
        self._metrics = metrics
        self._paused: dict[Client, None] = {}
        self._timer: IDelayedCall | None = None
        self._looked_at = -math.inf

    def add(self, client: Client, message: bytes) -> None:
        """Count one frame of a client, and the message that is whole with it, if there is one."""
        if self._rate is None:
            return
        now = self._clock.seconds()
        over = self._rate.wait(client.full_at, now)
        client.full_at = self._rate.take(client.full_at, now, units_of(message))
        if over:
            self.pause(client)

    def pause(self, client: Client) -> None:
        """Read no more from a client until it has kept its rate again."""
        if not client.paused and client.connection is not None:
            self._metrics.paused_clients += 1
            client.paused = True
            self._paused[client] = None
            client.connection.pause_reading()
            if self._timer is None:
                self._timer = self._clock.callLater(RESUME_TICK, self._resume)

    def charge(self, client: Client, units: int) -> None:
        """Count more for the message that was counted last: it was a batch of so many more."""
        if self._rate is not None:
            client.full_at = self._rate.take(client.full_at, self._clock.seconds(), units)

    def discard(self, client: Client) -> None:
        """Forget a client that is gone."""
        client.paused = False
        self._paused.pop(client, None)

    def stop(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _resume(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        rate = self._rate
        due = [one for one in self._paused if rate is None or not rate.wait(one.full_at, now)]
        for client in due:
            self.discard(client)
            if client.connection is not None:
                client.connection.resume_reading()
        if self._paused and now - self._looked_at >= LOST_TICK:
            self._looked_at = now
            self._drop_lost()
        if self._paused and self._timer is None:
            self._timer = self._clock.callLater(RESUME_TICK, self._resume)

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
