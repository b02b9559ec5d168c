"""Nodes with clients on one clock: they see each other's counts as of their last heartbeats, and move clients."""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from gateway.cluster.interface import PeerUnreachable
from gateway.cluster.membership import Fleet
from gateway.cluster.rebalance import Balance
from gateway.metrics import Metrics
from gateway.registry.interface import NodeStatus
from gateway.settings import Settings
from tests.cluster.fake_edge import FakeEdge
from tests.cluster.fakes import FakeNode, FakePeers
from tests.cluster.movers import FakeFarewells, FakeRegistry

HEARTBEAT = 5.0
STEP = 0.05
#: seconds from being told to the arrival
FLIGHT = 0.5


class Network:
    """What the nodes have in common: a clock, the rows of the nodes, and clients that go where they are told."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.rows: dict[str, NodeStatus] = {}
        self.members: dict[str, Member] = {}
        #: client_id -> how often it was told to move
        self.moves: Counter[str] = Counter()
        #: those whom somebody has moved
        self.moved: set[str] = set()

    def join(self, name: str, clients: int, **options: Any) -> Member:
        member = self.members[name] = Member(self, name, clients, **options)
        member.beat()
        return member

    def arrive(self, client_id: str, url: str) -> None:
        """Who cannot connect to where it was told comes back to any other."""
        if url == "None":
            # What is in front of them gives it to the one with the fewest.
            min(self.members.values(), key=lambda member: member.edge.count()).edge.here.add(client_id)
            return
        member = self.members.get(url.removeprefix("ws://").partition("/")[0])
        (member or next(iter(self.members.values()))).edge.here.add(client_id)

    def advance(self, seconds: float) -> None:
        self.clock.pump([STEP] * round(seconds / STEP))

    def counts(self) -> dict[str, int]:
        return {name: member.edge.count() for name, member in self.members.items()}


class Farewells(FakeFarewells):
    """Whoever is told arrives a moment later."""

    network: Network

    def say(self, client_id: str, reason: str, url: str | None) -> bool:
        if not super().say(client_id, reason, url):
            return False
        del self.said[client_id]
        self.network.moves[client_id] += 1
        self.network.clock.callLater(FLIGHT, self.network.arrive, client_id, str(url))
        return True


class Member:
    """One node."""

    def __init__(
        self, network: Network, name: str, clients: int, *, rate: float = 50.0, url: str = "", capacity: int = 10_000
    ) -> None:
        self.network, self.clock, self.name = network, network.clock, name
        self.node = FakeNode()
        self.node.node_id = self.node.name = name
        self.node.public_url = url or f"ws://{name}"
        self.why = ""
        self.node.unready = lambda: self.why  # type: ignore[method-assign]
        self.edge = FakeEdge(self.clock, 0)
        self.edge.here = {f"{name}-{number}" for number in range(clients)}
        #: the calls in flight of each client
        self.calls: Counter[str] = Counter()
        self.farewells = Farewells(self.clock, self.edge, self.calls)
        self.farewells.network = network
        self.registry = FakeRegistry()
        self.registry.moved = network.moved
        self.registry.nodes = self.nodes  # type: ignore[attr-defined]
        self.peers = FakePeers()
        self.metrics = Metrics()
        self.fleet = Fleet(self.registry, name, self.node.steady)  # type: ignore[arg-type]
        self.settings = Settings(heartbeat=HEARTBEAT, rebalance_rate=rate, capacity=capacity)
        self.capacity = capacity
        self.balance = Balance(
            node=self.node,
            edge=self.edge,  # type: ignore[arg-type]
            registry=self.registry,  # type: ignore[arg-type]
            fleet=self.fleet,
            peers=self.peers,
            farewells=self.farewells,  # type: ignore[arg-type]
            clock=self.clock,
            metrics=self.metrics,
            settings=self.settings,
            in_flight=lambda client_id, generation: self.calls[client_id],
        )
        self.fleet.watchers.append(self.balance.looked)

    def nodes(self) -> Deferred[list[NodeStatus]]:
        return succeed(list(self.network.rows.values()))

    def beat(self) -> None:
        """A heartbeat, the look after it, and so on."""
        node = self.node
        urls, state = (node.public_url, node.peer_url), "draining" if self.why == "draining" else "up"
        self.network.rows[self.name] = NodeStatus(
            node.node_id, node.name, *urls, self.edge.count(), self.capacity, state, 0.0
        )
        self.fleet.look()
        self.timer = self.clock.callLater(HEARTBEAT, self.beat)

    def die(self) -> None:
        self.timer.cancel()
        self.balance.stop()
        del self.network.rows[self.name], self.network.members[self.name]
        for member in self.network.members.values():
            member.peers.room[self.name] = PeerUnreachable("refused", refused=True)
