"""The simulated network: hosts, connections with latency, partitions, and connections that are lost.

A node's end of a connection is one end of a real socket pair, so that Twisted's transports, parking and relays do what
they do on any socket; the network has the other end. A client or backend is an object with callbacks. In between bytes
wait for their latency, in order, as TCP delivers them:

    node's socket -> wire -> Direction -> wire -> node's socket, or actor
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any, Protocol

from tests.simulation.scheduler import Event, Scheduler

#: bytes read from a node's socket at once
READ_SIZE = 2**16
#: bytes in flight in one direction; then the sender's socket fills
WINDOW = 2**13
#: a read of more bytes than this may have made room in a small send buffer
MAX_PLAIN_READ = 1024
#: size of a small send buffer, in bytes; the kernel doubles it
SMALL_BUFFER = 4096
#: one connection in this many has a small send buffer, so that writes are accepted in part
SMALL_BUFFER_SHARE = 5

Address = tuple[str, int]


class SimulatedSocket(socket.socket):
    """A node's end of a connection: a UNIX socket that ignores the options of TCP."""

    def setsockopt(self, level: int, *arguments: Any) -> None:  # type: ignore[override]
        if level != socket.IPPROTO_TCP:
            super().setsockopt(level, *arguments)


class Actor(Protocol):
    """The program at an end of a connection that is not a node."""

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self) -> None: ...


class Direction:
    """The bytes on their way from one end of a connection to the other."""

    def __init__(self, connection: Connection, source: End, target: End) -> None:
        self.connection = connection
        self.source = source
        self.target = target
        self.in_flight = 0
        #: (time of arrival, bytes); the end of the stream is ``None``
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._event: Event | None = None
        self._last = 0.0
        self._blocked = connection.network.blocked
        self._scheduler = connection.network.scheduler

    def send(self, data: bytes | None) -> None:
        """Send bytes, or the end of the stream."""
        connection = self.connection
        if connection.is_vanished:
            return
        scheduler = self._scheduler
        arrival = scheduler.now + connection.draw_latency()
        if arrival < self._last:
            arrival = self._last
        self._last = arrival
        self._queue.append((arrival, data))
        if data:
            self.in_flight += len(data)
        if self._event is None and not self._is_held():
            self._event = scheduler.at(self._queue[0][0], self._arrive)

    def _schedule(self) -> None:
        if self._event is None and self._queue and not self._is_held():
            self._event = self.connection.network.scheduler.at(self._queue[0][0], self._arrive)

    def _is_held(self) -> bool:
        blocked = self._blocked
        return self.target.is_full or (bool(blocked) and (self.source.host, self.target.host) in blocked)

    def go_on(self) -> None:
        """Deliver what has waited: for the end of a partition, or for the target to read."""
        self._schedule()

    def drop(self) -> None:
        """Lose everything on the way."""
        self._queue.clear()
        self.in_flight = 0
        if self._event is not None:
            self._event.cancel()
            self._event = None

    def _arrive(self) -> None:
        self._event = None
        if self._is_held():
            return
        scheduler, queue, target = self._scheduler, self._queue, self.target
        now, arrived = scheduler.now, 0
        while queue and queue[0][0] <= now:
            data = queue.popleft()[1]
            if data is None:
                self.drop()
                target.receive_end()
                return
            arrived += len(data)
            target.receive(data)
            if target.is_full:
                break
        was_full = self.in_flight >= WINDOW
        self.in_flight -= arrived
        if was_full:
            self.source.window_changed()
        if queue and self._event is None and not target.is_full:
            self._event = scheduler.at(queue[0][0], self._arrive)


class End:
    """One end of a connection."""

    #: the way to the other end; set by :class:`Connection`
    output: Direction
    #: whether it takes no more bytes for now
    is_full = False

    def __init__(self, host: str) -> None:
        self.host = host

    def receive(self, data: bytes) -> None:
        raise NotImplementedError

    def receive_end(self) -> None:
        raise NotImplementedError

    def window_changed(self) -> None:
        """Bytes that were sent have arrived."""

    def reset(self) -> None:
        """The connection is lost."""
        raise NotImplementedError


class ActorEnd(End):
    """The end of a client or backend."""

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self.actor: Actor | None = None
        self.is_open = True

    def now(self) -> float:
        """Return the simulated time."""
        return self.output.connection.network.scheduler.now

    @property
    def is_vanished(self) -> bool:
        """Whether the connection is lost without notice."""
        return self.output.connection.is_vanished

    def send(self, data: bytes) -> None:
        if self.is_open:
            self.output.send(data)

    def close(self) -> None:
        """Close the connection; nothing is received any more."""
        if self.is_open:
            self.is_open = False
            self.output.send(None)

    def set_reading(self, is_reading: bool) -> None:
        """Read, or let what arrives wait in the network."""
        self.is_full = not is_reading
        if is_reading:
            self.output.connection.opposite(self.output).go_on()

    def receive(self, data: bytes) -> None:
        if self.is_open and self.actor is not None:
            self.actor.data_received(data)

    def receive_end(self) -> None:
        if self.is_open:
            self.close()
            if self.actor is not None:
                self.actor.connection_lost()

    def reset(self) -> None:
        if self.is_open:
            self.is_open = False
            if self.actor is not None:
                self.actor.connection_lost()


class SocketEnd(End):
    """The end of a node: the network's side of its socket."""

    def __init__(self, network: Network, host: str, wire: socket.socket) -> None:
        super().__init__(host)
        self._network = network
        self._wire: socket.socket | None = wire
        self._fd = wire.fileno()
        self._unsent = b""
        self._end_is_due = False
        self._sent_end = False
        self._mask = 0
        network.watch(self)

    def fileno(self) -> int:
        return self._fd

    def update_interest(self) -> None:
        if self._wire is None:
            return
        mask = select.EPOLLIN if self.output.in_flight < WINDOW and not self._sent_end else 0
        if self._unsent:
            mask |= select.EPOLLOUT
        if mask != self._mask:
            self._mask = mask
            self._network.epoll.modify(self._fd, mask)

    def window_changed(self) -> None:
        self._network.is_dirty = True
        self.update_interest()

    def ready(self, event: int) -> None:
        """Handle an event of the wire."""
        if event & select.EPOLLOUT:
            self._flush()
        if self._wire is None:
            return
        if event & select.EPOLLIN:
            try:
                data = self._wire.recv(READ_SIZE)
            except ConnectionResetError:
                data = b""
            if len(data) > MAX_PLAIN_READ:
                # The socket may have been full.
                self._network.touch(self.host)
            if data:
                output = self.output
                output.send(data)
                if output.in_flight < WINDOW:
                    return
            else:
                self._node_has_closed()
        elif event & (select.EPOLLHUP | select.EPOLLERR):
            self._node_has_closed()
        self.update_interest()

    def _node_has_closed(self) -> None:
        if not self._sent_end:
            self._sent_end = True
            self.output.send(None)
        # The node may only have shut down its sending side: then its socket still takes what arrives.
        if self._wire is not None and self._is_hung_up():
            self._close_wire()

    def _is_hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, 0)
        return any(event & select.POLLHUP for _, event in poll.poll(0))

    def receive(self, data: bytes) -> None:
        wire = self._wire
        if wire is None:
            self._refuse()
            return
        if not self._unsent:
            try:
                data = data[wire.send(data) :]
            except OSError:
                # Full, or closed: _flush() finds out.
                pass
            else:
                self._network.touch(self.host)
                if not data:
                    return
        self._unsent += data
        self._flush()

    def receive_end(self) -> None:
        if self._wire is None:
            return
        self._end_is_due = True
        self._flush()

    def _flush(self) -> None:
        wire = self._wire
        if wire is None:
            return
        try:
            while self._unsent:
                self._unsent = self._unsent[wire.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            # The node has closed its socket: the kernel answers with a reset.
            self._unsent = b""
            self._close_wire()
            self._refuse()
            return
        self._network.touch(self.host)
        was_full, self.is_full = self.is_full, bool(self._unsent)
        if self._end_is_due and not self._unsent:
            if self._sent_end:
                self._close_wire()
            else:
                wire.shutdown(socket.SHUT_WR)
            self._end_is_due = False
        self.update_interest()
        if was_full and not self.is_full:
            self.output.connection.opposite(self.output).go_on()

    def _refuse(self) -> None:
        if not self._sent_end:
            self._sent_end = True
            self.output.send(None)

    def _close_wire(self) -> None:
        if self._wire is not None:
            self._network.unwatch(self)
            self._wire.close()
            self._wire = None
            self._network.touch(self.host)

    def reset(self) -> None:
        self._sent_end = True
        self._close_wire()

    def die(self) -> None:
        """The node was killed: the kernel closes its sockets."""
        if not self._sent_end:
            self.output.send(None)
        self.reset()


class Connection:
    """One connection, with a latency of its own."""

    def __init__(self, network: Network, latency: tuple[float, float]) -> None:
        self.network = network
        self._latency = latency[0], latency[1] - latency[0]
        self._random = network.random.random
        #: lost without notice: both ends stay, and nothing arrives
        self.is_vanished = False
        self.directions: list[Direction] = []

    def join(self, first: End, second: End) -> None:
        self.directions = [Direction(self, first, second), Direction(self, second, first)]
        first.output, second.output = self.directions

    def draw_latency(self) -> float:
        """Return the time that the next bytes take, in seconds."""
        low, spread = self._latency
        return low + spread * self._random()

    def opposite(self, direction: Direction) -> Direction:
        return self.directions[1 - self.directions.index(direction)]

    def hosts(self) -> set[str]:
        return {direction.source.host for direction in self.directions}

    def cut(self) -> None:
        """Lose the connection, with notice at both ends."""
        self.vanish()
        for direction in self.directions:
            direction.source.reset()

    def vanish(self) -> None:
        """Lose the connection without notice: the ends become half-open."""
        self.is_vanished = True
        for direction in self.directions:
            direction.drop()


class Attempt:
    """A connection that is being opened."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Port:
    """A listening port."""

    def __init__(self, network: Network, address: Address, accept: Callable[[SimulatedSocket, str], None]) -> None:
        self._network = network
        self._address = address
        self.accept = accept

    def stopListening(self) -> None:
        if self._network.ports.get(self._address) is self:
            del self._network.ports[self._address]


class Network:
    """All hosts and connections of a run."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.random: Random = scheduler.make_random("network")
        self.ports: dict[Address, Port] = {}
        self.connections: dict[Connection, None] = {}
        #: host -> called when sockets of that host may be ready
        self.on_touch: dict[str, Callable[[], None]] = {}
        self.epoll = select.epoll()
        #: whether a node may have written
        self.is_dirty = False
        #: (from, to): nothing passes
        self.blocked: set[tuple[str, str]] = set()
        self._ends: dict[int, SocketEnd] = {}
        #: what waits for the end of a partition
        self._waiting: list[tuple[str, str, Callable[[], None]]] = []
        scheduler.pollables.append(self)

    def close(self) -> None:
        for end in list(self._ends.values()):
            end.reset()
        self.epoll.close()

    # Sockets.

    def watch(self, end: SocketEnd) -> None:
        self._ends[end.fileno()] = end
        self.epoll.register(end.fileno(), 0)

    def unwatch(self, end: SocketEnd) -> None:
        del self._ends[end.fileno()]
        self.epoll.unregister(end.fileno())

    def touch(self, host: str) -> None:
        """Tell a process that its sockets may be ready."""
        self.is_dirty = True
        callback = self.on_touch.get(host)
        if callback is not None:
            callback()

    def poll(self) -> None:
        """Read what nodes have written."""
        events = self.epoll.poll(0, 256)
        if not events:
            self.is_dirty = False
            return
        events.sort()
        for fd, event in events:
            end = self._ends.get(fd)
            if end is not None:
                end.ready(event)

    # Partitions.

    def is_blocked(self, source: str, target: str) -> bool:
        return (source, target) in self.blocked

    def block(self, source: str, target: str) -> None:
        """Let nothing pass from one host to another."""
        self.blocked.add((source, target))

    def unblock(self, source: str, target: str) -> None:
        """Let everything pass again, and deliver what has waited: TCP sends it again."""
        self.blocked.discard((source, target))
        for connection in list(self.connections):
            for direction in connection.directions:
                direction.go_on()
        waiting, self._waiting = self._waiting, []
        for source, target, callback in waiting:
            self.send(source, target, callback)

    def send(self, source: str, target: str, callback: Callable[[], None]) -> None:
        """Call back when a packet has arrived, which may be after a partition."""
        if self.is_blocked(source, target):
            self._waiting.append((source, target, callback))
        else:
            low, high = self._latency(source, target)
            self.scheduler.after(self.random.uniform(low, high), callback)

    # Connections.

    def listen(self, address: Address, accept: Callable[[SimulatedSocket, str], None]) -> Port:
        port = self.ports[address] = Port(self, address, accept)
        return port

    def close_ports(self, host: str) -> None:
        """Close all ports of a host."""
        for address in [address for address in self.ports if address[0] == host]:
            del self.ports[address]

    def connections_of(self, host: str) -> list[Connection]:
        """Return the connections with an end at a host."""
        return [connection for connection in self.connections if host in connection.hosts()]

    def connect(
        self, source: str, address: Address, connected: Callable[[Any], None], refused: Callable[[], None]
    ) -> Attempt:
        """Open a connection from a node; ``connected`` gets its socket."""
        return self._connect(source, address, connected, refused, from_node=True)

    def connect_actor(
        self, source: str, address: Address, connected: Callable[[ActorEnd], None], refused: Callable[[], None]
    ) -> Attempt:
        """Open a connection from a client or backend; ``connected`` gets its end."""
        return self._connect(source, address, connected, refused, from_node=False)

    def _connect(
        self,
        source: str,
        address: Address,
        connected: Callable[[Any], None],
        refused: Callable[[], None],
        *,
        from_node: bool,
    ) -> Attempt:
        attempt = Attempt()
        target = address[0]

        def arrived() -> None:
            port = self.ports.get(address)
            if port is None:
                self.send(target, source, lambda: None if attempt.is_cancelled else refused())
                return
            connection = Connection(self, self._latency(source, target))
            self.connections[connection] = None
            sock, far = self._make_socket(target)
            near: End
            if from_node:
                near_socket, near = self._make_socket(source)
            else:
                near = ActorEnd(source)
            connection.join(near, far)
            far.update_interest()
            if isinstance(near, SocketEnd):
                near.update_interest()
            port.accept(sock, source)

            def acknowledged() -> None:
                if attempt.is_cancelled:
                    near.reset()
                    near.output.send(None)
                else:
                    connected(near_socket if from_node else near)

            self.send(target, source, acknowledged)

        self.send(source, target, arrived)
        return attempt

    def _make_socket(self, host: str) -> tuple[SimulatedSocket, SocketEnd]:
        own, wire = socket.socketpair()
        sock = SimulatedSocket(own.family, own.type, fileno=own.detach())
        sock.setblocking(False)
        wire.setblocking(False)
        if not self.random.randrange(SMALL_BUFFER_SHARE):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
        return sock, SocketEnd(self, host, wire)

    def _latency(self, source: str, target: str) -> tuple[float, float]:
        """Return the shortest and the longest latency between two hosts, in seconds."""
        if source.startswith("10.") and target.startswith("10."):
            return 0.0002, 0.002
        base = self.random.uniform(0.001, 0.04)
        return base, base * 1.5

    def forget_closed(self) -> None:
        """Drop the connections of which no end is left."""
        for connection in list(self.connections):
            if all(is_closed(direction.source) for direction in connection.directions):
                del self.connections[connection]


def is_closed(end: End) -> bool:
    """Whether an end is closed."""
    return not end.is_open if isinstance(end, ActorEnd) else isinstance(end, SocketEnd) and end._wire is None
