"""Opening handshakes: how many are in progress, in all and from one network, and how many a network begins a second.

What a node holds of messages that are not whole yet: bounded for all connections together.

Each connection may have one message of the largest size under way, for as long as it likes: its link may be slow. Many
that begin such messages and never end them would be memory without a bound; so when there are too many, those are
closed that have added nothing to theirs for longest.

When a reader is too slow: what was written to a transport and waits behind a full buffer.

An amount alone says nothing. A transport writes nothing before the reactor's turn is over, and a link may stall for a
second or two, so that large messages pile up for a reader that is well. It is too slow when its buffer has not been
empty for a while and more than ``send_buffer`` waits even so; or when so much waits that memory is at stake.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from gateway.metrics import Metrics
from gateway.net.transport import unsent_bytes
from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.frames import CloseCode
from gateway.protocol.handshake import retry_after_header
from gateway.util.rate_limit import KeyedRateLimiter, network_key
from gateway.util.timers import Timer, TimerWheel

#: One network may have in progress what it may begin in so many seconds, the time that an opening may take: honest
#: clients never come to that, and connections that say nothing cannot take every place.
HANDSHAKE_TIMEOUT = 5.0
MIN_PER_NETWORK = 64
#: So many refusals a second are told to each network, and to all together while too many openings are in progress; the
#: others are dropped without a word, since to tell each of them takes as long as to let it in.
MAX_REFUSALS_PER_SECOND = 50.0


class HandshakeLimiter:
    """Counts the opening handshakes of one node. Each of them: begin, locate, heard, end."""

    def __init__(self, clock: Callable[[], float], max_handshakes: float, per_address: float) -> None:
        """``most`` may be in progress at a time; ``per_address`` may begin a second from one network, where 0 means
        that networks are not told apart."""
        #: in progress
        self.in_progress = 0
        self._max_handshakes = max_handshakes
        self._max_per_network = max(MIN_PER_NETWORK, per_address * HANDSHAKE_TIMEOUT) if per_address else math.inf
        self._rate_limiter = KeyedRateLimiter(per_address, clock)
        self._per_network: dict[str, int] = {}
        self._refusal_limiter = KeyedRateLimiter(MAX_REFUSALS_PER_SECOND, clock)

    def should_drop(self, host: str) -> bool:
        """Whether a connection from that address is to be dropped before it begins: it would be refused, and enough of
        them have been told so."""
        network = ""
        if self.in_progress < self._max_handshakes:
            network = network_key(host) if self._max_per_network < math.inf else ""
            if not network:
                return False
            if self._per_network.get(network, 0) < self._max_per_network and not self._rate_limiter.is_limited(network):
                return False
        return self._refusal_limiter.acquire(network) > 0

    def started(self) -> None:
        """A connection was accepted. Raises :class:`~gateway.protocol.handshake.Refusal`; it is to be ended all the same."""
        self.in_progress += 1
        if self.in_progress > self._max_handshakes:
            raise RequestRefusedError(
                503, "openings", "too many clients are just being connected; try later", [retry_after_header(1)]
            )

    def identified(self, host: str) -> str:
        """It comes from that address: the key of its network, or an empty text where that is not limited.

        Raises :class:`~gateway.protocol.handshake.Refusal`; then it is not counted for its network.
        """
        network = network_key(host) if self._max_per_network < math.inf else ""
        if not network:
            return ""
        count = self._per_network.get(network, 0)
        if count >= self._max_per_network:
            raise RequestRefusedError(
                429,
                "rate",
                "too many clients are just being connected from your address; try later",
                [retry_after_header(1)],
            )
        self._per_network[network] = count + 1
        return network

    def charged(self, network: str) -> None:
        """Its first bytes came. Raises :class:`~gateway.protocol.handshake.Refusal`."""
        wait = self._rate_limiter.acquire(network) if network else 0.0
        if wait:
            raise RequestRefusedError(
                429, "rate", "too many connections from your address; try later", [retry_after_header(wait)]
            )

    def finished(self, network: str) -> None:
        """It is open, refused or lost; ``network`` is what :meth:`locate` gave, if that was called."""
        self.in_progress -= 1
        if network:
            self._per_network[network] -= 1
            if not self._per_network[network]:
                del self._per_network[network]


#: so many of the largest messages may be under way at a time
MAX_INCOMPLETE_MESSAGES = 256


class _ClosableConnection(Protocol):
    def close_with(self, code: int, reason: str = "") -> None:
        """Begin to close with that code."""


class ReassemblyBudget:
    """The messages that are under way, of one node."""

    def __init__(self, max_message_size: int, metrics: Metrics) -> None:
        """``max_message_size`` is in bytes."""
        #: bytes, of all of them
        self.total_bytes = 0
        self._max_bytes = MAX_INCOMPLETE_MESSAGES * max_message_size
        self._metrics = metrics
        #: those that have added nothing for longest come first
        self._held: dict[_ClosableConnection, int] = {}

    def charge(self, connection: _ClosableConnection, size: int) -> None:
        """So many bytes more are held of a connection's message."""
        self._held[connection] = self._held.pop(connection, 0) + size
        self.total_bytes += size
        while self.total_bytes > self._max_bytes:
            slowest = next(iter(self._held))
            self.release(slowest)
            self._metrics.slow_senders += 1
            slowest.close_with(CloseCode.TRY_AGAIN_LATER, "its message is not whole, and this node holds too many such")

    def release(self, connection: _ClosableConnection) -> None:
        """Nothing is held of its message any more."""
        self.total_bytes -= self._held.pop(connection, 0)


#: how long a buffer may stay full of more than ``send_buffer``, in seconds: longer than a lost packet stalls a link
SLOW_CONSUMER_TIMEOUT = 3


class SlowConsumerDetector:
    """What waits for one reader, from the moment its buffer is full until it is empty again."""

    __slots__ = (
        "_burst_limit",
        "_is_done",
        "_limit",
        "_on_slow",
        "_seconds_left",
        "_timer",
        "_timers",
        "_transport",
        "_written",
    )

    def __init__(
        self, transport: Any, timers: TimerWheel, send_buffer: int, burst: int, on_slow: Callable[[], None]
    ) -> None:
        """More than ``send_buffer`` bytes are too many after ``SLOW_AFTER`` seconds, more than these and ``burst`` at
        once. ``too_slow`` is called once at most."""
        self._transport = transport
        self._timers = timers
        self._limit = send_buffer
        self._burst_limit = send_buffer + burst
        self._on_slow = on_slow
        self._written = 0
        self._is_done = False
        self._seconds_left = SLOW_CONSUMER_TIMEOUT
        self._timer: Timer | None = timers.call_later(1.0, self._tick)

    def add_written(self, size: int) -> None:
        """So many bytes more were written."""
        self._written += size
        if not self._is_done and self._queued_bytes() > (self._burst_limit if self._seconds_left else self._limit):
            # What is written to close the connection is added, too.
            self._is_done = True
            self._on_slow()

    def stop(self) -> None:
        """The buffer is empty, or nobody waits for that any more."""
        self._is_done = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _queued_bytes(self) -> float:
        # What filled the buffer is not counted: one message, be it as large as may be, can always be sent.
        return min(self._written, unsent_bytes(self._transport))

    def _tick(self) -> None:
        # Second by second, since timers come first after the process was stopped: what it could not write then is not
        # the reader's fault.
        self._timer = None
        self._seconds_left -= 1
        if self._seconds_left:
            self._timer = self._timers.call_later(1.0, self._tick)
        else:
            self.add_written(0)
