"""Ending relays: a client of another node whose bytes go through this one is sent away by the node that it is a client
of, which alone knows where a frame ends, and which calls are in flight; what is left of the relay when these must be
over is cut.

-> peer.close {"client","generation","code":1012,"reason"}     the node tells it gateway.goaway with a url of its own
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.cluster.interface import IPeers, PeerUnreachable
from gateway.edge.interface import CLOSE_RESTART
from gateway.registry.interface import IRegistry, RegistryUnavailable

#: how long a closing handshake through a relay may take, in seconds
CLOSING = 3.0


class Departures:
    """Sends away the clients that are relayed through this node; ``cut`` ends the relay of one at once."""

    _log = Logger()

    def __init__(
        self,
        *,
        registry: IRegistry,
        peers: IPeers,
        clock: IReactorTime,
        cut: Callable[[str], object],
        longest_call: float,
    ) -> None:
        """``longest_call`` is in seconds."""
        self._registry = registry
        self._peers = peers
        self._clock = clock
        self._cut = cut
        self._patience = longest_call + CLOSING
        self._leaving: set[str] = set()

    def end(self, client_id: str) -> None:
        """Send one away, unless that is under way."""
        if client_id not in self._leaving:
            self._leaving.add(client_id)
            Deferred.fromCoroutine(self._end(client_id)).addErrback(self._failed)

    async def _end(self, client_id: str) -> None:
        try:
            location = await self._registry.find(client_id)
            if location is not None and await self._peers.close(location, CLOSE_RESTART, "drain"):
                await deferLater(self._clock, self._patience)
        except (RegistryUnavailable, PeerUnreachable):
            pass  # then it is told nothing but the end of its connection
        finally:
            self._leaving.discard(client_id)
            self._cut(client_id)

    def _failed(self, failure: Failure) -> None:
        self._log.failure("error in ending a relay", failure)
