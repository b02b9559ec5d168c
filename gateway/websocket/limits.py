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
from gateway.net.transport import unsent
from gateway.protocol.frames import CLOSE_TRY_AGAIN_LATER
from gateway.protocol.handshake import Refusal, retry_after
from gateway.util.rate_limit import RateByKey, network_of
from gateway.util.timers import Timer, Timers

#: One network may have in progress what it may begin in so many seconds, the time that an opening may take: honest
#: clients never come to that, and connections that say nothing cannot take every place.
OPENING_TIME = 5.0
LEAST_OF_ONE = 64
#: So many refusals a second are told to each network, and to all together while too many openings are in progress; the
#: others are dropped without a word, since to tell each of them takes as long as to let it in.
TOLD = 50.0


class Openings:
    """Counts the opening handshakes of one node. Each of them: begin, locate, heard, end."""

    def __init__(self, seconds: Callable[[], float], most: float, per_address: float) -> None:
        """``most`` may be in progress at a time; ``per_address`` may begin a second from one network, where 0 means
        that networks are not told apart."""
        #: in progress
        self.total = 0
        self._most = most
        self._most_of_one = max(LEAST_OF_ONE, per_address * OPENING_TIME) if per_address else math.inf
        self._rate = RateByKey(per_address, seconds)
        self._of_one: dict[str, int] = {}
        self._told = RateByKey(TOLD, seconds)

    def drops(self, host: str) -> bool:
        """Whether a connection from that address is to be dropped before it begins: it would be refused, and enough of
        them have been told so."""
        network = ""
        if self.total < self._most:
            network = network_of(host) if self._most_of_one < math.inf else ""
            if not network:
                return False
            if self._of_one.get(network, 0) < self._most_of_one and not self._rate.is_over(network):
                return False
        return self._told.wait(network) > 0

    def begin(self) -> None:
        """A connection was accepted. Raises :class:`~gateway.protocol.handshake.Refusal`; it is to be ended all the same."""
        self.total += 1
        if self.total > self._most:
            raise Refusal(503, "openings", "too many clients are just being connected; try later", [retry_after(1)])

    def locate(self, host: str) -> str:
        """It comes from that address: the key of its network, or an empty text where that is not limited.

        Raises :class:`~gateway.protocol.handshake.Refusal`; then it is not counted for its network.
        """
        network = network_of(host) if self._most_of_one < math.inf else ""
        if not network:
            return ""
        count = self._of_one.get(network, 0)
        if count >= self._most_of_one:
            raise Refusal(
                429, "rate", "too many clients are just being connected from your address; try later", [retry_after(1)]
            )
        self._of_one[network] = count + 1
        return network

    def heard(self, network: str) -> None:
        """Its first bytes came. Raises :class:`~gateway.protocol.handshake.Refusal`."""
        wait = self._rate.wait(network) if network else 0.0
        if wait:
            raise Refusal(429, "rate", "too many connections from your address; try later", [retry_after(wait)])

    def end(self, network: str) -> None:
        """It is open, refused or lost; ``network`` is what :meth:`locate` gave, if that was called."""
        self.total -= 1
        if network:
            self._of_one[network] -= 1
            if not self._of_one[network]:
                del self._of_one[network]


#: so many of the largest messages may be under way at a time
MOST_MESSAGES = 256


class _Connection(Protocol):
    def close_with(self, code: int, reason: str = "") -> None:
        """Begin to close with that code."""


class Unfinished:
    """The messages that are under way, of one node."""

    def __init__(self, max_message_size: int, metrics: Metrics) -> None:
        """``max_message_size`` is in bytes."""
        #: bytes, of all of them
        self.total = 0
        self._most = MOST_MESSAGES * max_message_size
        self._metrics = metrics
        #: those that have added nothing for longest come first
        self._held: dict[_Connection, int] = {}

    def add(self, connection: _Connection, size: int) -> None:
        """So many bytes more are held of a connection's message."""
        self._held[connection] = self._held.pop(connection, 0) + size
        self.total += size
        while self.total > self._most:
            slowest = next(iter(self._held))
            self.discard(slowest)
            self._metrics.slow_senders += 1
            slowest.close_with(CLOSE_TRY_AGAIN_LATER, "its message is not whole, and this node holds too many such")

    def discard(self, connection: _Connection) -> None:
        """Nothing is held of its message any more."""
        self.total -= self._held.pop(connection, 0)


#: how long a buffer may stay full of more than ``send_buffer``, in seconds: longer than a lost packet stalls a link
SLOW_AFTER = 3


class Backlog:
    """What waits for one reader, from the moment its buffer is full until it is empty again."""

    __slots__ = (
        "_burst",
        "_limit",
        "_over",
        "_seconds_left",
        "_timer",
        "_timers",
        "_too_slow",
        "_transport",
        "_written",
    )

    def __init__(
        self, transport: Any, timers: Timers, send_buffer: int, burst: int, too_slow: Callable[[], None]
    ) -> None:
        """More than ``send_buffer`` bytes are too many after ``SLOW_AFTER`` seconds, more than these and ``burst`` at
        once. ``too_slow`` is called once at most."""
        self._transport = transport
        self._timers = timers
        self._limit = send_buffer
        self._burst = send_buffer + burst
        self._too_slow = too_slow
        self._written = 0
        self._over = False
        self._seconds_left = SLOW_AFTER
        self._timer: Timer | None = timers.call_later(1.0, self._tick)

    def add(self, size: int) -> None:
        """So many bytes more were written."""
        self._written += size
        if not self._over and self._waiting() > (self._burst if self._seconds_left else self._limit):
            # What is written to close the connection is added, too.
            self._over = True
            self._too_slow()

    def end(self) -> None:
        """The buffer is empty, or nobody waits for that any more."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _waiting(self) -> float:
        # What filled the buffer is not counted: one message, be it as large as may be, can always be sent.
        return min(self._written, unsent(self._transport))

    def _tick(self) -> None:
        # Second by second, since timers come first after the process was stopped: what it could not write then is not
        # the reader's fault.
        self._timer = None
        self._seconds_left -= 1
        if self._seconds_left:
            self._timer = self._timers.call_later(1.0, self._tick)
        else:
            self.add(0)
