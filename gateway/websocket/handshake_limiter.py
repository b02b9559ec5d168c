"""Limit opening handshakes: in progress, in total and per network, and per second and network."""

from __future__ import annotations

import math
from collections.abc import Callable

from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import retry_after_header
from gateway.util.rate_limit import KeyedRateLimiter, network_key

#: seconds that an opening handshake may take. A network may have as many in progress as it may start in that time:
#: honest clients never reach it, and connections that send nothing cannot occupy every slot.
HANDSHAKE_TIMEOUT = 5.0
#: handshakes in progress that any network may have, however low its rate
MIN_PER_NETWORK = 64
#: refusals sent per second to one network, and to all together while too many handshakes are in progress. Connections
#: beyond are dropped without a response, since sending one takes as long as accepting the client.
MAX_REFUSALS_PER_SECOND = 50.0
#: handshakes beyond the limits that are refused only when their requests are known: they may be health checks. A port
#: accepts up to 64 connections before any of them is read; with fewer places a flood takes them all before that.
MAX_POSTPONED_REFUSALS = 256
#: connections per second of an address that has sent health checks that are not dropped. Behind a proxy without the
#: PROXY protocol, the clients have that address too, and their connections take their share.
HEALTH_CHECKS_PER_SECOND = 500.0
#: addresses whose health checks are remembered
MAX_HEALTH_CHECKERS = 64


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
        #: the functions that refuse the handshakes in question, the oldest first
        self._postponed: dict[Callable[[], None], None] = {}
        self._health_checkers: dict[str, None] = {}
        self._health_limiter = KeyedRateLimiter(HEALTH_CHECKS_PER_SECOND, clock)

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
        if network_key(host) in self._health_checkers and not self._health_limiter.acquire(network_key(host)):
            return False
        return self._refusal_limiter.acquire(network) > 0

    def health_checked(self, host: str) -> None:
        """Take note that an address has sent a health check: it gets places for more when all others are dropped."""
        network = network_key(host)
        self._health_checkers.pop(network, None)
        self._health_checkers[network] = None
        if len(self._health_checkers) > MAX_HEALTH_CHECKERS:
            del self._health_checkers[next(iter(self._health_checkers))]

    def postpone(self, refuse: Callable[[], None]) -> None:
        """Keep a place for a handshake that will be refused unless it turns out to be a health check. The oldest is
        refused if there are too many."""
        self._postponed[refuse] = None
        if len(self._postponed) > MAX_POSTPONED_REFUSALS:
            oldest = next(iter(self._postponed))
            del self._postponed[oldest]
            oldest()

    def discard_postponed(self, refuse: Callable[[], None]) -> None:
        """Forget a handshake that was refused, answered or lost."""
        self._postponed.pop(refuse, None)

    def started(self) -> HandshakeSlot:
        """Count an accepted connection, until its slot is finished.

        Raises :class:`~gateway.protocol.errors.RequestRefusedError`, and does not count it, if there are too many.
        """
        if self.in_progress >= self._max_handshakes:
            raise RequestRefusedError(
                503, "openings", "too many opening handshakes in progress; try later", [retry_after_header(1)]
            )
        self.in_progress += 1
        return HandshakeSlot(self)

    def _add_to_network(self, host: str) -> str:
        network = network_key(host) if self._max_per_network < math.inf else ""
        if not network:
            return ""
        count = self._per_network.get(network, 0)
        if count >= self._max_per_network:
            # Not 429: a reconnect storm behind one address is over soon, and clients stop for good at a 4xx.
            raise RequestRefusedError(
                503,
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
                503, "rate", "too many connections from your address; try later", [retry_after_header(wait)]
            )

    def _finish(self, network: str) -> None:
        self.in_progress -= 1
        if network:
            self._per_network[network] -= 1
            if not self._per_network[network]:
                del self._per_network[network]


class HandshakeSlot:
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
