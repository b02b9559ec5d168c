"""A cluster on one clock: nodes that see each other's counts as of the last heartbeats, and move clients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.membership import NodeDirectory
from gateway.cluster.rebalance import Rebalancer
from gateway.cluster.routing import Destination
from gateway.metrics import Metrics
from gateway.registry.interface import NodeStatus
from gateway.settings import Settings
from tests.fakes.cluster import FakeCallTracker, FakeNode, FakePeerClient
from tests.fakes.rebalance import FakeAssignmentRegistry, FakeGracefulDisconnect
from tests.fakes.rpc import FakeMembership
from tests.fakes.sessions import FakeClientSessions

HEARTBEAT = 5.0
STEP = 0.05
#: time between a goaway and the arrival at the next node, in seconds
RECONNECT_DELAY = 0.5


class SimulatedCluster:
    """What the nodes share: a clock, the rows of the nodes, and clients that follow the goaways."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.rows: dict[str, NodeStatus] = {}
        #: name -> time of the last heartbeat
        self.written_at: dict[str, float] = {}
        self.nodes: dict[str, SimulatedNode] = {}
        #: client_id -> number of goaways
        self.goaway_counts: Counter[str] = Counter()
        #: clients that any node has assigned
        self.recently_assigned: set[str] = set()

    def join(self, name: str, clients: int, **options: Any) -> SimulatedNode:
        member = self.nodes[name] = SimulatedNode(self, name, clients, **options)
        member.heartbeat()
        return member

    def arrive(self, client_id: str, url: str) -> None:
        """Connect a client to the node at that URL, or to another one if that is gone."""
        if url == "None":
            # The load balancer chooses the node with the fewest clients.
            min(self.nodes.values(), key=lambda member: member.sessions.count()).sessions.connected.add(client_id)
            return
        member = self.nodes.get(url.removeprefix("ws://").partition("/")[0])
        (member or next(iter(self.nodes.values()))).sessions.connected.add(client_id)

    def advance(self, seconds: float) -> None:
        self.clock.pump([STEP] * round(seconds / STEP))

    def counts(self) -> dict[str, int]:
        return {name: member.sessions.count() for name, member in self.nodes.items()}


class SimulatedGracefulDisconnect(FakeGracefulDisconnect):
    """Clients arrive at their next node a moment after the goaway."""

    cluster: SimulatedCluster

    def send_goaway(self, client_id: str, reason: str, destination: Destination | None) -> bool:
        if not super().send_goaway(client_id, reason, destination):
            return False
        _, _, url = self.goaways.pop(client_id)
        self.cluster.goaway_counts[client_id] += 1
        self.cluster.clock.callLater(RECONNECT_DELAY, self.cluster.arrive, client_id, str(url))
        return True


class SimulatedNode:
    """One node of the cluster."""

    def __init__(
        self,
        cluster: SimulatedCluster,
        name: str,
        clients: int,
        *,
        rate: float = 50.0,
        url: str = "",
        capacity: int = 10_000,
    ) -> None:
        self.cluster, self.clock, self.name = cluster, cluster.clock, name
        self.node = FakeNode()
        self.node.node_id = self.node.name = name
        self.node.public_url = url or f"ws://{name}"
        self.reason = ""
        self.node.unready_reason = lambda: self.reason  # type: ignore[method-assign]
        self.sessions = FakeClientSessions(self.clock, 0)
        self.sessions.connected = {f"{name}-{number}" for number in range(clients)}
        #: client_id -> its calls in flight
        self.calls: Counter[str] = Counter()
        self.graceful_disconnect = SimulatedGracefulDisconnect(self.clock, self.sessions, self.calls)
        self.graceful_disconnect.cluster = cluster
        self.registry = FakeAssignmentRegistry()
        self.registry.recently_assigned = cluster.recently_assigned
        self.registry.nodes = self.list_nodes  # type: ignore[attr-defined]
        self.peer_client = FakePeerClient()
        self.metrics = Metrics()
        self.membership = FakeMembership()
        self.node_directory = NodeDirectory(
            self.registry,  # type: ignore[arg-type]
            name,
            self.membership,
            on_nodes_changed=lambda nodes: self.rebalancer.nodes_changed(nodes),
        )
        self.settings = Settings(heartbeat=HEARTBEAT, rebalance_rate=rate, capacity=capacity)
        self.capacity = capacity
        self.rebalancer = Rebalancer(
            node=self.node,
            membership=self.membership,
            sessions=self.sessions,  # type: ignore[arg-type]
            registry=self.registry,  # type: ignore[arg-type]
            node_directory=self.node_directory,
            peer_client=self.peer_client,
            graceful_disconnect=self.graceful_disconnect,  # type: ignore[arg-type]
            clock=self.clock,
            metrics=self.metrics,
            settings=self.settings,
            calls=FakeCallTracker(lambda key: self.calls[key.client_id]),
        )

    def list_nodes(self) -> Deferred[list[NodeStatus]]:
        now = self.clock.seconds()
        rows = self.cluster.rows.values()
        return succeed([attrs.evolve(row, heartbeat_age=now - self.cluster.written_at[row.name]) for row in rows])

    def heartbeat(self) -> None:
        """Write this node's row, refresh its directory, and repeat after the interval."""
        node = self.node
        urls, state = (node.public_url, node.peer_url), "draining" if self.reason == "draining" else "up"
        self.cluster.rows[self.name] = NodeStatus(
            node.node_id, node.name, *urls, self.sessions.count(), self.capacity, state, 0.0
        )
        self.cluster.written_at[self.name] = self.clock.seconds()
        self.node_directory.refresh()
        self.timer = self.clock.callLater(HEARTBEAT, self.heartbeat)

    def die(self) -> None:
        self.timer.cancel()
        self.rebalancer.stop()
        del self.cluster.rows[self.name], self.cluster.nodes[self.name]
        for member in self.cluster.nodes.values():
            member.peer_client.has_room_results[self.name] = PeerUnreachableError("refused", refused=True)
