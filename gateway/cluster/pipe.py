"""A relay between two transports of Twisted: one that has TLS at an end, or that has just begun.

What the kernel does not take at one end stops the reading at the other: the transport there is its producer. When one
end is lost, the other gets what is left for it, and the end; what still comes from it is swallowed meanwhile, since a
socket that is closed with bytes unread is reset, and what was sent to it is lost.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IFileDescriptorReceiver, IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.edge.timers import Timer
from gateway.edge.waking import bare, write

if TYPE_CHECKING:
    from gateway.cluster.relay import Relays

#: how long the second end may take after the first, in seconds
END_TIMEOUT = 3.0
#: how often it is looked whether an end is lost that is not read, in seconds
LOOK_EVERY = 5.0


class Pipe:
    """One relay."""

    def __init__(self, relays: Relays, client_id: str, node_id: str) -> None:
        self.client_id = client_id
        self.node_id = node_id
        #: the protocols of its two transports
        self.client = End(self)
        self.node = End(self)
        self.client.other, self.node.other = self.node, self.client
        self.relays = relays
        self._timer: Timer | None = None

    def go(self, to_client: bytes, to_node: bytes) -> None:
        """Both ends have their transports; ``to_client`` and ``to_node`` are what came before."""
        for end, other, data in ((self.client, self.node, to_client), (self.node, self.client, to_node)):
            if not end.lost:
                end.transport.registerProducer(other, True)
                end.transport.write(data)
        for end in (self.client, self.node):
            if end.lost:
                self._finish_other(end)
            else:
                end.transport.resumeProducing()
        # Not now: it may be called while one of them reads.
        self.relays.reactor.callLater(0, self._settle)

    def _settle(self) -> None:
        """Become two rows, if both ends are sockets."""
        whole = not any(end.lost or end.last for end in (self.client, self.node))
        try:
            if whole and self.relays.pair(self, self.client.transport, self.node.transport):
                self._dissolve()
        except Exception:  # noqa: BLE001
            self.relays.troubles.report("an error in beginning a relay")
            self.abort()

    def _dissolve(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for end in (self.client, self.node):
            end.let_go()

    def lost(self, end: End) -> None:
        """The transport of an end is gone."""
        if end.other is None:
            return
        if end.other.lost:
            self._dissolve()
            self.relays.lost(self)
        else:
            self._finish_other(end)

    def _finish_other(self, end: End) -> None:
        if end.other is not None:
            end.other.finish()
        self.ending()

    def ending(self) -> None:
        """From here on it has so many seconds."""
        if self._timer is None:
            self._timer = self.relays.timers.call_later(END_TIMEOUT, self._late)

    def _late(self) -> None:
        self.abort()

    def end(self) -> None:
        """What is under way arrives, then the end."""
        for end in (self.client, self.node):
            if not end.lost:
                end.finish()
        self.ending()

    def abort(self) -> None:
        """Drop both ends."""
        for end in (self.client, self.node):
            end.abort()
        if self.client.lost and self.node.lost:
            self._dissolve()
            self.relays.lost(self)


@implementer(IPushProducer, IFileDescriptorReceiver)
class End(Protocol):
    """One of the two transports; what comes from it is for the other."""

    #: there is one from before :meth:`Pipe.go`
    transport: Any = None
    #: it is gone
    lost = False
    #: nothing more is to be sent to it
    last = False

    def __init__(self, pipe: Pipe) -> None:
        self._pipe: Pipe | None = pipe
        self.other: End | None = None
        self._timer: Timer | None = None

    def dataReceived(self, data: bytes) -> None:
        """Bytes came."""
        other = self.other
        if other is not None and not other.last and not other.lost:
            write(other.transport, data)

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """A file came over a UNIX socket."""
        os.close(descriptor)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The transport is gone."""
        self.lost = True
        self._stop_looking()
        if self._pipe is not None:
            self._pipe.lost(self)

    def finish(self) -> None:
        """Send what is left, and then the end."""
        if self.last:
            return
        self.last = True
        self.transport.unregisterProducer()
        if bare(self.transport) is not None:
            self.transport.loseWriteConnection()
        else:
            self.transport.loseConnection()
        # Its own end is to be seen.
        self.resumeProducing()

    def abort(self) -> None:
        """Drop it at once."""
        if self.transport is None:
            self.lost = True
        elif not self.lost:
            self.transport.abortConnection()

    def let_go(self) -> None:
        """It has done its work."""
        self._stop_looking()
        self._pipe = self.other = self.transport = None

    # What the transport at the other end, whose producer it is, asks for.

    def pauseProducing(self) -> None:
        """Read no more."""
        if not self.last and not self.lost:
            self.transport.pauseProducing()
            if self._timer is None and self._pipe is not None:
                self._timer = self._pipe.relays.timers.call_later(LOOK_EVERY, self._look)

    def resumeProducing(self) -> None:
        """Go on."""
        self._stop_looking()
        if not self.lost:
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """The other end is gone."""

    def _stop_looking(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Twisted does not see the end of a transport that is not read; the other side may take nothing for ever."""
        self._timer = None
        poll = select.poll()
        poll.register(self.transport.fileno(), 0)
        if poll.poll(0):
            self.abort()
        elif self._pipe is not None:
            self._timer = self._pipe.relays.timers.call_later(LOOK_EVERY, self._look)
