"""Limits of WebSocket connections: opening handshakes, incomplete messages, unread output.

``HandshakeLimiter`` limits the opening handshakes in progress, in total and per network, and those that a network may
start per second.

``ReassemblyBudget`` limits the memory of incomplete messages of all connections together. A connection may take any
time to send a message of the largest size, since its link may be slow; many that start such messages and never finish
them would take unbounded memory. Over the limit, the connections that have gone longest without adding to their message
are closed.

``SlowConsumerDetector`` watches what is written to a transport whose buffer is full. An amount alone is no criterion: a
transport writes nothing before the reactor iteration ends, and a link may stall for a second or two, so large messages
queue up for a healthy reader too. A reader is too slow when its buffer has not been empty for a while and more than
``send_buffer`` bytes are still queued, or when so much is queued that memory is at stake.
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

#: seconds that an opening handshake may take. A network may have as many in progress as it may start in that time:
#: honest clients never reach it, and connections that send nothing cannot occupy every slot.
HANDSHAKE_TIMEOUT = 5.0
#: handshakes in progress that any network may have, however low its rate
MIN_PER_NETWORK = 64
#: refusals sent per second to one network, and to all together while too many handshakes are in progress. Connections
#: beyond are dropped without a response, since sending one takes as long as accepting the client.
MAX_REFUSALS_PER_SECOND = 50.0


class HandshakeLimiter:
    """Limit opening handshakes, in total and per network."""

    def __init__(self, clock: Callable[[], float], max_handshakes: float, per_address: float) -> None:
        """Allow ``max_handshakes`` in progress, and ``per_address`` per second and network; 0 means no limit per
        network."""
        #: handshakes in progress
        self.in_progress = 0
        self._max_handshakes = max_handshakes
        self._max_per_network = max(MIN_PER_NETWORK, per_address * HANDSHAKE_TIMEOUT) if per_address else math.inf
        self._rate_limiter = KeyedRateLimiter(per_address, clock)
        self._per_network: dict[str, int] = {}
        self._refusal_limiter = KeyedRateLimiter(MAX_REFUSALS_PER_SECOND, clock)

    def should_drop(self, host: str) -> bool:
        """Return whether to drop a new connection of that address without a response.

        True if it would be refused and enough refusals have been sent in the last second.
        """
        network = ""
        if self.in_progress < self._max_handshakes:
            network = network_key(host) if self._max_per_network < math.inf else ""
            if not network:
                return False
            if self._per_network.get(network, 0) < self._max_per_network and not self._rate_limiter.is_limited(network):
                return False
        return self._refusal_limiter.acquire(network) > 0

    def started(self) -> HandshakeTicket:
        """Count an accepted connection, until its ticket is finished.

        Raises :class:`~gateway.protocol.errors.RequestRefusedError`, and does not count it, if there are too many.
        """
        if self.in_progress >= self._max_handshakes:
            raise RequestRefusedError(
                503, "openings", "too many opening handshakes in progress; try later", [retry_after_header(1)]
            )
        self.in_progress += 1
        return HandshakeTicket(self)

    def _add_to_network(self, host: str) -> str:
        network = network_key(host) if self._max_per_network < math.inf else ""
        if not network:
            return ""
        count = self._per_network.get(network, 0)
        if count >= self._max_per_network:
            raise RequestRefusedError(
                429,
                "rate",
                "too many opening handshakes in progress from your address; try later",
                [retry_after_header(1)],
            )
        self._per_network[network] = count + 1
        return network

    def _charge(self, network: str) -> None:
        wait = self._rate_limiter.acquire(network)
        if wait:
            raise RequestRefusedError(
                429, "rate", "too many connections from your address; try later", [retry_after_header(wait)]
            )

    def _finish(self, network: str) -> None:
        self.in_progress -= 1
        if network:
            self._per_network[network] -= 1
            if not self._per_network[network]:
                del self._per_network[network]


class HandshakeTicket:
    """One opening handshake in progress, as counted by a :class:`HandshakeLimiter`."""

    __slots__ = ("_is_charged", "_is_finished", "_limiter", "_network")

    def __init__(self, limiter: HandshakeLimiter) -> None:
        self._limiter = limiter
        #: key of its network; empty before :meth:`identified`, and where networks are not limited
        self._network = ""
        self._is_charged = False
        self._is_finished = False

    def identified(self, host: str) -> None:
        """Count the handshake for the network of its address.

        Raises :class:`~gateway.protocol.errors.RequestRefusedError`, and does not count it there, if that network has
        too many in progress.
        """
        self._network = self._limiter._add_to_network(host)

    def charged(self) -> None:
        """Charge the handshake to the rate of its network, once.

        Raises :class:`~gateway.protocol.errors.RequestRefusedError` if that network exceeds its rate.
        """
        if not self._is_charged:
            self._is_charged = True
            if self._network:
                self._limiter._charge(self._network)

    def finished(self) -> None:
        """Stop counting the handshake: the connection is open, refused or lost."""
        if not self._is_finished:
            self._is_finished = True
            self._limiter._finish(self._network)


#: incomplete messages of the largest size that a node may hold
MAX_INCOMPLETE_MESSAGES = 256


class _ClosableConnection(Protocol):
    def close_with(self, code: int, reason: str = "") -> None: ...


class ReassemblyBudget:
    """Limit the memory of the incomplete messages of one node's clients."""

    def __init__(self, max_message_size: int, metrics: Metrics) -> None:
        """``max_message_size`` is in bytes."""
        #: bytes held, of all connections
        self.total_bytes = 0
        self._max_bytes = MAX_INCOMPLETE_MESSAGES * max_message_size
        self._metrics = metrics
        #: bytes held by connection, least recently charged first
        self._held: dict[_ClosableConnection, int] = {}

    def charge(self, connection: _ClosableConnection, size: int) -> None:
        """Add ``size`` bytes to a connection's incomplete message; close the slowest senders while over the limit."""
        self._held[connection] = self._held.pop(connection, 0) + size
        self.total_bytes += size
        while self.total_bytes > self._max_bytes:
            slowest = next(iter(self._held))
            self.release(slowest)
            self._metrics.slow_senders += 1
            slowest.close_with(
                CloseCode.TRY_AGAIN_LATER, "its message is incomplete, and this node holds too many of those"
            )

    def release(self, connection: _ClosableConnection) -> None:
        """Return the bytes of a connection's message: it is complete or discarded."""
        self.total_bytes -= self._held.pop(connection, 0)


#: seconds for which more than ``send_buffer`` may stay queued; longer than a lost packet stalls a link
SLOW_CONSUMER_TIMEOUT = 3


class SlowConsumerDetector:
    """Track what is queued for one reader, from the moment its buffer is full until it is empty again."""

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
        """Call ``on_slow``, at most once, when more than ``send_buffer`` bytes are queued after
        ``SLOW_CONSUMER_TIMEOUT`` seconds, or more than ``send_buffer + burst`` at any time."""
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
        """Count ``size`` bytes written since the buffer filled up."""
        self._written += size
        if not self._is_done and self._queued_bytes() > (self._burst_limit if self._seconds_left else self._limit):
            # Set first: the close frame that on_slow() writes is counted, too.
            self._is_done = True
            self._on_slow()

    def stop(self) -> None:
        """Stop tracking: the buffer is empty, or the connection is lost."""
        self._is_done = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _queued_bytes(self) -> float:
        # What filled the buffer is not counted: one message, of whatever size, can always be sent.
        return min(self._written, unsent_bytes(self._transport))

    def _tick(self) -> None:
        # One second at a time: timers run first after the process was stopped, and what it could not write meanwhile is
        # not the reader's fault.
        self._timer = None
        self._seconds_left -= 1
        if self._seconds_left:
            self._timer = self._timers.call_later(1.0, self._tick)
        else:
            self.add_written(0)
