"""The reactor of one simulated process: Twisted's interfaces over the scheduler and a real epoll."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.base import DelayedCall
from twisted.internet.error import ConnectionDone, ConnectionLost, ConnectionRefusedError
from twisted.internet.interfaces import (
    IHalfCloseableDescriptor,
    IReactorFDSet,
    IReactorPluggableNameResolver,
    IReactorTCP,
    IReactorTime,
)
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.unix import Server
from twisted.python import log
from twisted.python.failure import Failure
from zope.interface import implementer

from tests.simulation.network import Network, SimulatedSocket
from tests.simulation.scheduler import Event, Scheduler

_READ = select.EPOLLIN
_WRITE = select.EPOLLOUT
_HANG_UP = select.EPOLLHUP | select.EPOLLERR


class LiteralResolver:
    """Resolves an address to itself."""

    def resolveHostName(self, receiver: Any, host: str, portNumber: int = 0, *args: object, **kwargs: object) -> None:
        receiver.resolutionBegan(self)
        receiver.addressResolved(IPv4Address("TCP", host, portNumber))
        receiver.resolutionComplete()


class Transport(Server):
    """A connection of a node, at either end."""

    #: addresses (host, port) that the protocol sees
    own_address: IPv4Address
    peer_address: IPv4Address

    def getHost(self) -> Any:
        return self.own_address

    def getPeer(self) -> Any:
        return self.peer_address


class Connector:
    """An attempt to connect, as Twisted's endpoints see it."""

    def __init__(self, reactor: SimulatedReactor, host: str, port: int, factory: Any) -> None:
        self._reactor = reactor
        self._address = IPv4Address("TCP", host, port)
        self._factory = factory
        self._attempt: Any = None
        self._is_over = False

    def connect(self, timeout: float | None) -> None:
        self._factory.doStart()
        self._factory.startedConnecting(self)
        network = self._reactor.network
        self._attempt = network.connect(
            self._reactor.host, (self._address.host, self._address.port), self._connected, self._refused
        )
        if timeout:
            self._reactor.callLater(timeout, self._timed_out)

    def _connected(self, sock: SimulatedSocket) -> None:
        if self._is_over or not self._reactor.is_running:
            sock.close()
            return
        self._reactor.run(self._build, sock)

    def _build(self, sock: SimulatedSocket) -> None:
        if self._is_over:
            # It was given up when the process went on, before this.
            sock.close()
            return
        self._is_over = True
        protocol = self._factory.buildProtocol(self._address)
        self._reactor.make_transport(sock, protocol, IPv4Address("TCP", self._reactor.host, 0), self._address)

    def _refused(self) -> None:
        self._reactor.run(self._fail, ConnectionRefusedError())

    def _timed_out(self) -> None:
        self._fail(ConnectionLost())

    def _fail(self, error: Exception) -> None:
        if not self._is_over:
            self._is_over = True
            self._factory.clientConnectionFailed(self, Failure(error))
            self._factory.doStop()

    def stopConnecting(self) -> None:
        if not self._is_over:
            self._attempt.cancel()
            self._fail(ConnectionDone())

    disconnect = stopConnecting

    def getDestination(self) -> IPv4Address:
        return self._address


@implementer(IReactorTime, IReactorFDSet, IReactorTCP, IReactorPluggableNameResolver)
class SimulatedReactor:
    """The reactor of one process. Its clock is monotonic and starts at ``epoch`` seconds."""

    def __init__(self, scheduler: Scheduler, network: Network, host: str, epoch: float) -> None:
        self.network = network
        self.host = host
        self.nameResolver = LiteralResolver()
        #: whether the process exists
        self.is_running = True
        #: whether sockets may be ready
        self.is_dirty = False
        #: called by :meth:`stop`
        self.on_stop: Callable[[], object] = lambda: None
        self._scheduler = scheduler
        self._epoch = epoch
        self._paused = False
        #: what came due while the process was stopped
        self._deferred: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._epoll = select.epoll()
        self._selectables: dict[int, Any] = {}
        self._masks: dict[int, int] = {}
        self._fds: dict[Any, int] = {}
        scheduler.pollables.append(self)

    # The process.

    def run(self, callback: Callable[..., object], *arguments: Any) -> None:
        """Run code of this process: now, or when it goes on; never once it was killed."""
        if not self.is_running:
            return
        if self._paused:
            self._deferred.append((callback, arguments))
            return
        self.is_dirty = self.network.is_dirty = True
        callback(*arguments)

    def pause(self) -> None:
        """Stop the process, as SIGSTOP does."""
        self._paused = True

    def resume(self) -> None:
        """Let the process go on, as SIGCONT does."""
        self._paused = False
        self.is_dirty = True
        deferred, self._deferred = self._deferred, []
        for callback, arguments in deferred:
            self.run(callback, *arguments)

    @property
    def is_paused(self) -> bool:
        return self._paused

    def kill(self) -> None:
        """End the process: none of its code runs any more."""
        if self.is_running:
            self.is_running = False
            self._scheduler.pollables.remove(self)
            self._epoll.close()
            self._selectables.clear()
            self._masks.clear()
            self._fds.clear()
            self._deferred.clear()

    def stop(self) -> None:
        """End the reactor, as ``reactor.stop`` does."""
        self.on_stop()

    # Time.

    def seconds(self) -> float:
        return self._epoch + self._scheduler.now

    def callLater(self, delay: float, callback: Callable[..., object], *args: Any, **kwargs: Any) -> DelayedCall:
        assert delay >= 0, f"{delay} is not a delay"
        call = DelayedCall(
            self.seconds() + delay, callback, args, kwargs, self._cancelled, self._schedule, self.seconds
        )
        self._schedule(call)
        return call

    def _schedule(self, call: Any) -> None:
        call.event = self._scheduler.at(call.time - self._epoch, self._due, call)

    def _cancelled(self, call: Any) -> None:
        event: Event = call.event
        event.cancel()

    def _due(self, call: Any) -> None:
        self.run(self._fire, call)

    def _fire(self, call: Any) -> None:
        if call.cancelled or call.called:
            return
        if call.delayed_time:
            call.activate_delay()
            self._schedule(call)
            return
        if call.event.time > self._scheduler.now:
            # It was reset while the process was stopped.
            return
        call.called = 1
        call.func(*call.args, **call.kw)

    def getDelayedCalls(self) -> list[Any]:
        return []

    def callWhenRunning(self, callback: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        callback(*args, **kwargs)

    def callFromThread(self, callback: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        self.callLater(0, callback, *args, **kwargs)

    # Sockets.

    def _set(self, selectable: Any, mask: int) -> None:
        fd = self._fds.get(selectable)
        if fd is None:
            fd = selectable.fileno()
        old = self._masks.get(fd, 0)
        if mask == old:
            return
        self.is_dirty = True
        if not mask:
            del self._masks[fd], self._selectables[fd]
            del self._fds[selectable]
            if selectable.fileno() >= 0:
                self._epoll.unregister(fd)
        elif old:
            self._masks[fd] = mask
            self._epoll.modify(fd, mask)
        else:
            self._masks[fd] = mask
            self._selectables[fd] = selectable
            self._fds[selectable] = fd
            self._epoll.register(fd, mask)

    def _mask(self, selectable: Any) -> int:
        fd = self._fds.get(selectable)
        return 0 if fd is None else self._masks[fd]

    def addReader(self, selectable: Any) -> None:
        if self.is_running:
            self._set(selectable, self._mask(selectable) | _READ)

    def addWriter(self, selectable: Any) -> None:
        if self.is_running:
            self._set(selectable, self._mask(selectable) | _WRITE)

    def removeReader(self, selectable: Any) -> None:
        if selectable in self._fds:
            self._set(selectable, self._mask(selectable) & ~_READ)

    def removeWriter(self, selectable: Any) -> None:
        if selectable in self._fds:
            self._set(selectable, self._mask(selectable) & ~_WRITE)

    def removeAll(self) -> list[Any]:
        return []

    def getReaders(self) -> list[Any]:
        return [selectable for selectable in self._fds if self._mask(selectable) & _READ]

    def getWriters(self) -> list[Any]:
        return [selectable for selectable in self._fds if self._mask(selectable) & _WRITE]

    def poll(self) -> None:
        """Handle the sockets that are ready."""
        events = () if self._paused else self._epoll.poll(0, 256)
        if not events:
            self.is_dirty = False
            return
        self.network.is_dirty = True
        events.sort()
        for fd, event in events:
            selectable = self._selectables.get(fd)
            if selectable is not None:
                self._handle(fd, event, selectable)
                if not self.is_running:
                    break

    def _handle(self, fd: int, event: int, selectable: Any) -> None:
        """Do what Twisted's reactors do with one ready file descriptor (``PollLoop._doReadOrWrite``)."""
        reason: Any = None
        is_read = False
        try:
            if event & _HANG_UP and not event & _READ:
                reason = CONNECTION_LOST
            else:
                if event & _READ:
                    reason = selectable.doRead()
                    is_read = True
                if not reason and event & _WRITE and self._selectables.get(fd) is selectable:
                    reason = selectable.doWrite()
                    is_read = False
        except Exception as e:  # noqa: BLE001 - as Twisted does
            log.err()
            reason = e
        if reason and self.is_running:
            self._disconnect(selectable, reason, is_read)

    def _disconnect(self, selectable: Any, reason: Exception, is_read: bool) -> None:
        self.removeReader(selectable)
        if is_read and isinstance(reason, ConnectionDone) and IHalfCloseableDescriptor.providedBy(selectable):
            selectable.readConnectionLost(Failure(reason))
        else:
            self.removeWriter(selectable)
            selectable.connectionLost(Failure(reason))

    def make_transport(self, sock: SimulatedSocket, protocol: Any, own: IPv4Address, peer: IPv4Address) -> None:
        """Connect a protocol with a socket."""
        if protocol is None:
            sock.close()
            return
        transport = Transport(sock, protocol, "", None, 0, self)
        transport.own_address, transport.peer_address = own, peer
        protocol.makeConnection(transport)

    def connectTCP(self, host: str, port: int, factory: Any, timeout: float = 30, bindAddress: Any = None) -> Connector:
        connector = Connector(self, host, port, factory)
        connector.connect(timeout)
        return connector

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> Any:
        return self.network.listen(
            (self.host, port),
            lambda sock, client: self.run(self._accept, sock, factory, client, port),
        )

    def _accept(self, sock: SimulatedSocket, factory: Any, client: str, port: int) -> None:
        peer = IPv4Address("TCP", client, 1)
        self.make_transport(sock, factory.buildProtocol(peer), IPv4Address("TCP", self.host, port), peer)
