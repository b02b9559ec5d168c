"""Base class for tests of relays: the test holds the remote ends, and runs the reactor's iterations."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet import tcp, unix
from twisted.internet.protocol import Protocol
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.relay import BufferedRelay, SocketRelays
from gateway.metrics import Metrics
from gateway.net.transport import set_protocol
from tests.builders.sockets import is_ready, read_available, tcp_pair, wait_readable
from tests.fakes.reactor import FakeFDReactor

SocketPair = tuple[socket.socket, socket.socket]


class SocketRelaysCase(SynchronousTestCase):
    """Base class without any relay at first."""

    def setUp(self) -> None:
        self.reactor = FakeFDReactor()
        self.reactor.advance(1_000_000)
        self.metrics = Metrics()
        self.relays = SocketRelays(self.reactor, self.metrics)
        self.relays.start()
        self.sockets: list[socket.socket] = []
        self.addCleanup(self.close)

    def close(self) -> None:
        self.relays.stop()
        self.step()
        for sock in self.sockets:
            sock.close()
        for reader in list(self.reactor.readers | self.reactor.writers):
            if hasattr(reader, "socket"):
                reader.socket.close()

    def transport(self, pair: SocketPair | None, wrap: Callable[[Any, Any], Any] | None) -> tuple[Any, socket.socket]:
        local, remote = pair or socket.socketpair()
        remote.setblocking(False)
        self.sockets.append(remote)
        peer = local.getpeername()
        kind: Any = unix.Server if local.family == socket.AF_UNIX else tcp.Server
        protocol = Protocol()
        transport = kind(local, protocol, peer, None, 0, self.reactor)
        transport.repstr = "<an end>"
        return wrap(transport, self.reactor) if wrap else transport, remote

    def start_buffered(
        self,
        client_id: str = "a",
        node_id: str = "N",
        client: SocketPair | None = None,
        node: SocketPair | None = None,
        to_client: bytes = b"",
        to_node: bytes = b"",
        wrap: Callable[[Any, Any], Any] | None = None,
    ) -> tuple[socket.socket, socket.socket, BufferedRelay]:
        """Start a relay, not spliced yet: the client's and the node's remote sockets, and the relay."""
        client_transport, client_there = self.transport(client, wrap)
        node_transport, node_there = self.transport(node, None)
        relay = self.relays.create(client_id, node_id)
        set_protocol(client_transport, relay.client)
        set_protocol(node_transport, relay.node)
        relay.start(to_client, to_node)
        return client_there, node_there, relay

    def start_spliced(self, *args: Any, **kwargs: Any) -> SocketPair:
        """Start a relay, and let it be spliced: the client's and the node's remote sockets."""
        client, node, _ = self.start_buffered(*args, **kwargs)
        self.reactor.advance(0)
        return client, node

    def step(self, times: int = 3) -> None:
        self.reactor.step(times)

    def advance(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.25)):
            self.reactor.advance(0.25)
            self.reactor.step()

    def fds(self) -> set[tuple[int, int]]:
        """Return the client's and the node's file descriptor of each relay."""
        buffered = {(relay.client.transport.fileno(), relay.node.transport.fileno()) for relay in self.relays._buffered}
        return buffered | set(self.spliced_fds())

    def spliced_fds(self) -> list[tuple[int, int]]:
        """Return the client's and the node's file descriptor of each spliced relay."""
        return [(fd, self.relays._partners[fd]) for fd in self.relays._client_fds()]

    def pump(self, sender: socket.socket, receiver: socket.socket, data: bytes, step: int = 1 << 20) -> bytes:
        """Send all of ``data``, and read as much at the other side, at most ``step`` bytes at a time."""
        received = bytearray()
        remaining = memoryview(data)
        for _ in range(100_000):
            if remaining:
                with contextlib.suppress(BlockingIOError):
                    remaining = remaining[sender.send(remaining) :]
            self.step(1)
            if is_ready(receiver.fileno(), select.POLLIN):
                received += receiver.recv(step)
            if len(received) >= len(data):
                return bytes(received)
        raise AssertionError(f"{len(received)} of {len(data)} bytes arrived")


__all__ = ["SocketPair", "SocketRelaysCase", "read_available", "tcp_pair", "wait_readable"]
