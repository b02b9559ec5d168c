"""TCP connections in memory, for :mod:`gateway.testing`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IConsumer, IProducer, IProtocol, ITransport
from twisted.python.failure import Failure
from zope.interface import implementer

#: bytes that may wait at one end before a producer there is paused, as with Twisted's own transports
BUFFER = 65536


@implementer(ITransport, IConsumer)
class End:
    """One end of a connection: what is written waits here until the wire moves it."""

    def __init__(self, address: IPv4Address, peer: IPv4Address) -> None:
        self._address = address
        self._peer = peer
        self._written: list[bytes] = []
        self._producer: Any = None
        self._paused = False
        self.disconnecting = False
        self.aborted = False

    def write(self, data: bytes) -> None:
        if self.disconnecting:
            return
        self._written.append(data)
        if self._producer is not None and not self._paused and sum(map(len, self._written)) > BUFFER:
            self._paused = True
            self._producer.pauseProducing()

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.write(b"".join(data))

    def take(self) -> bytes:
        """What was written since; the producer has room again."""
        data, self._written = b"".join(self._written), []
        if self._paused:
            self._paused = False
            self._producer.resumeProducing()
        return data

    def loseConnection(self) -> None:
        self.disconnecting = True

    def abortConnection(self) -> None:
        self._written = []
        self.disconnecting = self.aborted = True

    def registerProducer(self, producer: IProducer, streaming: bool) -> None:
        self._producer = producer

    def unregisterProducer(self) -> None:
        self._producer, self._paused = None, False

    def getHost(self) -> IPv4Address:
        return self._address

    def getPeer(self) -> IPv4Address:
        return self._peer


class Wire:
    """A connection between two protocols; the first is told last that it is made, as the one that connects."""

    def __init__(self, near: IProtocol, far: IProtocol) -> None:
        here, there = IPv4Address("TCP", "192.0.2.1", 50000), IPv4Address("TCP", "192.0.2.2", 80)
        self._near, self._far = End(here, there), End(there, here)
        self._ends = ((near, self._near), (far, self._far))
        #: no byte passes, and the end of one side is not noticed by the other
        self.frozen = False
        self.gone = False
        far.makeConnection(self._far)
        near.makeConnection(self._near)

    def has(self, transport: object) -> bool:
        """Whether this is one of its ends."""
        return transport is self._near or transport is self._far

    def move(self) -> bool:
        """Deliver what was written, both ways; part the ends once one of them wants to and nothing is left to deliver.

        ``False`` when there was nothing to do.
        """
        if self.gone:
            return False
        if self.frozen:
            return self._near.aborted and self._part()
        sent, answered = self._near.take(), self._far.take()
        (near, _), (far, _) = self._ends
        if sent and not self._far.aborted:
            far.dataReceived(sent)
        if answered and not self._near.aborted:
            near.dataReceived(answered)
        if sent or answered:
            return True
        return (self._near.disconnecting or self._far.disconnecting) and self._part()

    def _part(self) -> bool:
        self.gone = True
        for (protocol, mine), (_, other) in zip(self._ends, reversed(self._ends), strict=True):
            reason: Exception = ConnectionDone()
            if mine.aborted:
                reason = ConnectionAborted()
            elif other.aborted:
                reason = ConnectionLost()
            mine.disconnecting = True
            protocol.connectionLost(Failure(reason))
        return True
