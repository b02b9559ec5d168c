"""Opening handshakes: how many are in progress, in all and from one network, and how many a network begins a second."""

from __future__ import annotations

import math
from collections.abc import Callable

from gateway.edge.head import Refusal
from gateway.edge.limits import RateByKey, network_of, retry_after

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
        """A connection was accepted. Raises :class:`~gateway.edge.head.Refusal`; it is to be ended all the same."""
        self.total += 1
        if self.total > self._most:
            raise Refusal(503, "openings", "too many clients are just being connected; try later", [retry_after(1)])

    def locate(self, host: str) -> str:
        """It comes from that address: the key of its network, or an empty text where that is not limited.

        Raises :class:`~gateway.edge.head.Refusal`; then it is not counted for its network.
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
        """Its first bytes came. Raises :class:`~gateway.edge.head.Refusal`."""
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
