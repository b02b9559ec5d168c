"""One simulated process that runs a node: the real node and all its components, on the simulated reactor."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

from twisted.internet.defer import Deferred

from gateway import node as node_module
from gateway.cluster.interface import NodeState
from gateway.node import Node
from gateway.registry.interface import OnClaimRevoked, SessionKey
from gateway.registry.sql import CollectFloors, SQLRegistry
from gateway.settings import Settings
from tests.simulation.database import NodeDatabase, SimulatedDatabase
from tests.simulation.network import Network, SocketEnd
from tests.simulation.reactor import SimulatedReactor
from tests.simulation.scheduler import Scheduler

CLIENT_PORT, BACKEND_PORT = 8080, 8081


class SimulatedNode(Node):
    """The node, listening on the simulated network, without signals."""

    async def _bind(self) -> None:
        listen, components = self._reactor.listenTCP, self.components
        self._backend_ports = [listen(BACKEND_PORT, components.backend_endpoint)]
        self._client_ports = [listen(CLIENT_PORT, components.client_factory)]

    def start(self) -> Deferred[None]:
        """Bind, join, be ready."""
        return Deferred.fromCoroutine(self._start())


class NodeProcess:
    """A process at an address. After it has ended, another may be started there."""

    def __init__(
        self,
        number: int,
        *,
        scheduler: Scheduler,
        network: Network,
        database: SimulatedDatabase,
        secret_file: str,
        settings: dict[str, Any],
        on_session: Callable[[NodeProcess, SessionKey], None],
    ) -> None:
        """``settings`` are those of :class:`~gateway.settings.Settings`. ``on_session`` is called with each session
        that opens."""
        self.number = number
        self.name = f"node-{number}"
        self.host = f"10.0.0.{number}"
        self._scheduler = scheduler
        self._network = network
        self._database = database
        self._on_session = on_session
        self.public_url = f"ws://{self.host}:{CLIENT_PORT}"
        self.peer_url = f"ws://{self.host}:{BACKEND_PORT}"
        self._settings = Settings(
            auth=("none",),
            cluster_secret_file=secret_file,
            public_url=self.public_url,
            peer_url=self.peer_url,
            node_name=self.name,
            **settings,
        )
        self.starts = 0
        self.reactor: SimulatedReactor = None  # type: ignore[assignment]
        self.node: SimulatedNode = None  # type: ignore[assignment]
        #: when it was last stopped, killed, cut off, or started
        self.disturbed_at = 0.0
        #: whether it was told to drain
        self.is_leaving = False

    @property
    def is_running(self) -> bool:
        """Whether the process exists, even if it is stopped."""
        return self.reactor is not None and self.reactor.is_running

    @property
    def is_ready(self) -> bool:
        """Whether it accepts clients, as a load balancer sees it."""
        return self.is_running and not self.reactor.is_paused and not self.node.unready_reason()

    @property
    def is_up(self) -> bool:
        """Whether it runs and has started."""
        return self.is_running and self.node.state is NodeState.UP

    def start(self) -> None:
        """Start the process."""
        assert not self.is_running
        self.starts += 1
        self.is_leaving = False
        self.disturbed_at = self._scheduler.now
        self._scheduler.trace(f"{self.name} starts")
        self.reactor = SimulatedReactor(
            self._scheduler, self._network, self.host, epoch=1000.0 * self.number + 7.0 * self.starts
        )
        self._network.on_touch[self.host] = self._touched
        self.reactor.on_stop = self._stop_requested
        self.reactor.run(self._make_node)

    def _make_node(self) -> None:
        self.node = SimulatedNode(
            self._settings,
            self.reactor,
            monotonic=self.reactor.seconds,
            registry_factory=self._make_registry,
        )
        components = self.node.components
        # The signatures of nodes are of the wall clock; all processes have the same.
        components._peer_auth._wall_clock = self._wall_clock
        dispatcher = components.dispatcher
        connected = dispatcher.client_connected

        def client_connected(key: SessionKey) -> None:
            self._on_session(self, key)
            connected(key)

        dispatcher.client_connected = client_connected  # type: ignore[method-assign]
        reactor = self.reactor
        self.node.start().addErrback(lambda failure: self._start_failed(failure, reactor))

    def _start_failed(self, failure: Any, reactor: SimulatedReactor) -> None:
        if reactor.is_running:
            self._scheduler.trace(f"{self.name} cannot start: {failure.getErrorMessage()}")
            # A supervisor starts it again.
            self.kill()
            self._scheduler.after(1.0, lambda: None if self.is_running else self.start())

    def _wall_clock(self) -> float:
        return 1_700_000_000.0 + self._scheduler.now

    def _make_registry(
        self,
        settings: Settings,
        *,
        reactor: Any,
        metrics: Any,
        on_claim_revoked: OnClaimRevoked,
        clock: Any,
        collect_floors: CollectFloors,
    ) -> SQLRegistry:
        return SQLRegistry(
            NodeDatabase(self._database, reactor),
            lease=settings.lease,
            reactor=reactor,
            metrics=metrics,
            clock=clock,
            on_claim_revoked=on_claim_revoked,
            heartbeat=settings.heartbeat,
            collect_floors=collect_floors,
        )

    def _touched(self) -> None:
        if self.reactor is not None:
            self.reactor.is_dirty = True

    # The end.

    def drain(self) -> None:
        """Send SIGTERM."""
        self.is_leaving = True
        self._scheduler.trace(f"{self.name} drains")
        self.reactor.run(lambda: self.node.drain() and None)

    def _stop_requested(self) -> None:
        reactor = self.reactor
        stopped = self.node.stopService()
        stopped.addBoth(lambda _: self._exited(reactor))

    def _exited(self, reactor: SimulatedReactor) -> None:
        if self.reactor is reactor and reactor.is_running:
            self._scheduler.trace(f"{self.name} has ended")
            # Not at once: the process is still in the call that ends it.
            self._scheduler.after(0, lambda: self.kill() if self.reactor is reactor and reactor.is_running else None)

    def kill(self, *, notice: bool = True) -> None:
        """Send SIGKILL: the kernel closes all sockets. Without ``notice`` the machine is gone, and nothing is sent."""
        if not self.is_running:
            return
        self.disturbed_at = self._scheduler.now
        self.is_leaving = False
        self._network.close_ports(self.host)
        self.reactor.kill()
        for connection in self._network.connections_of(self.host):
            if not notice:
                connection.vanish()
            for direction in connection.directions:
                end = direction.source
                if end.host == self.host and isinstance(end, SocketEnd):
                    end.die()
        self._close_files()

    def _close_files(self) -> None:
        """Close the sockets that are in no Python object; the garbage collector closes the others."""
        components = self.node.components
        table = components.sessions._table
        parked = table._parked_sessions
        if parked is not None:
            for fd in parked.fds.values():
                os.close(fd)
            parked._epoll.close()
            parked.fds.clear()
        relays = components.relays
        for fd, partner in enumerate(relays._partners):
            if partner >= 0:
                os.close(fd)
        relays._epoll.close()
        # The garbage collector runs the "finally" of suspended coroutines, which a killed process does not. The
        # descriptors may belong to another node by then.
        relays._by_client.clear()
        relays._buffered.clear()
        relays._spliced = 0

    def pause(self) -> None:
        """Send SIGSTOP."""
        self.disturbed_at = self._scheduler.now
        self.reactor.pause()

    def resume(self) -> None:
        """Send SIGCONT."""
        self.disturbed_at = self._scheduler.now
        if self.is_running:
            self.reactor.resume()


class Randomness:
    """Make the program's own randomness depend on the seed while a run lasts."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._random = scheduler.make_random("program")
        self._patches = [
            mock.patch("os.urandom", self._random.randbytes),
            mock.patch("gateway.rpc.pending.urandom", self._random.randbytes),
            mock.patch("gateway.cluster.peer_connection.urandom", self._random.randbytes),
            # Autobahn seeds the generator of the whole program each time that it makes a factory.
            mock.patch("random.seed"),
            mock.patch.object(node_module, "gc", mock.Mock()),
        ]
        self._state: Any = None

    def __enter__(self) -> Randomness:
        self._state = random.getstate()
        random.seed(self._random.random())
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()
        random.setstate(self._state)
