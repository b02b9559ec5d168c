"""Stand-ins for what the parts of a cluster are given."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from gateway.clients.interface import Arrival, IRelay
from gateway.cluster.interface import IBalance, INode, IPeers, IRelaying
from gateway.registry.interface import Location, NodeStatus, Place


def status(name: str, *, clients: int = 0, capacity: int = 100, state: str = "up") -> NodeStatus:
    return NodeStatus(name, name, f"ws://{name}", f"ws://{name}:81", clients, capacity, state, 0.5)


def location(name: str = "b", generation: int = 7, *, live: bool = True, state: str = "up") -> Location:
    return Location("a", name, name, f"ws://{name}:81", generation, 0.0, "198.51.100.7:1", live, f"ws://{name}", state)


@implementer(INode)
class FakeNode:
    """Node a."""

    node_id = name = "a"
    public_url = "ws://a"
    peer_url = "ws://a:81"
    is_steady = True

    def unready(self) -> str:
        return ""

    def has_lease(self) -> bool:
        return True

    def doubtful(self) -> bool:
        return False

    def steady(self) -> bool:
        return self.is_steady

    def send_away(self, client_id: str, generation: int, reason: str) -> bool:
        raise AssertionError("nobody should be sent away")

    def drain(self) -> Deferred[None]:
        raise AssertionError("nobody should drain it")


def _outcome(value: Any) -> Deferred[Any]:
    if isinstance(value, Deferred):
        return value
    return fail(value) if isinstance(value, Exception) else succeed(value)


@implementer(IPeers)
class FakePeers:
    """Answers as the test says."""

    def __init__(self) -> None:
        self.here: Any = True
        #: by node_id; where nothing is said, it has room
        self.room: dict[str, Any] = {}
        self.asked_for_room: list[tuple[str, float]] = []
        self.asked: list[tuple[Location, float]] = []
        self.told: list[tuple[Location, int]] = []
        self.closed: list[tuple[Location, int, str]] = []

    def has(self, location: Location, timeout: float) -> Deferred[bool]:
        self.asked.append((location, timeout))
        return _outcome(self.here)

    def moved(self, location: Location, generation: int) -> None:
        self.told.append((location, generation))

    def taken_back(self, location: Location, generation: int) -> None:
        self.told.append((location, -generation))

    def close(self, location: Location, code: int, reason: str) -> Deferred[bool]:
        self.closed.append((location, code, reason))
        return _outcome(self.here)

    def notify_prefix(self, node: NodeStatus, prefix: str, method: str, params: bytes | None) -> Deferred[int]:
        raise AssertionError("nobody should ask")

    def drain(self, node: NodeStatus) -> Deferred[None]:
        raise AssertionError("nobody should ask")

    def has_room(self, place: Place | NodeStatus, timeout: float) -> Deferred[bool]:
        self.asked_for_room.append((place.node_id, timeout))
        return _outcome(self.room.get(place.node_id, True))

    def rebalance(self, node: NodeStatus) -> Deferred[int]:
        raise AssertionError("nobody should ask")


@implementer(IRelaying)
class FakeRelaying:
    """Opens what the test says."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.asked: list[tuple[Arrival, str, str, float]] = []

    def open(self, arrival: Arrival, node_id: str, peer_url: str, timeout: float) -> Deferred[IRelay]:
        self.asked.append((arrival, node_id, peer_url, timeout))
        return _outcome(self.outcome)


@implementer(IBalance)
class FakeBalance:
    """Moves as many as the test says."""

    def __init__(self, rate: float = 50.0, moving: int = 0) -> None:
        self.rate = rate
        self.moving = moving
        self.begun = 0

    def now(self) -> Deferred[int]:
        self.begun += 1
        return succeed(self.moving)
