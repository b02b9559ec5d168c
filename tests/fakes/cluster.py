"""Fake collaborators of the cluster's classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from gateway.clients.interface import ConnectRequest, IRelay
from gateway.cluster.interface import INode, IPeerClient, IRebalancer, IRelayDialer
from gateway.registry.interface import Assignment, Location, NodeStatus, SessionKey


def node_status(name: str, *, clients: int = 0, capacity: int = 100, state: str = "up") -> NodeStatus:
    return NodeStatus(name, name, f"ws://{name}", f"ws://{name}:81", clients, capacity, state, 0.5)


def location(name: str = "b", generation: int = 7, *, live: bool = True, state: str = "up") -> Location:
    return Location("a", name, name, f"ws://{name}:81", generation, 0.0, "198.51.100.7:1", live, f"ws://{name}", state)


@implementer(INode)
class FakeNode:
    """Node a, ready and stable."""

    node_id = name = "a"
    public_url = "ws://a"
    peer_url = "ws://a:81"

    def unready_reason(self) -> str:
        return ""

    def send_goaway(self, key: SessionKey, reason: str) -> bool:
        raise AssertionError("unexpected goaway")

    def drain(self) -> Deferred[None]:
        raise AssertionError("unexpected drain")


class FakeCallTracker:
    """Counts calls as the test says: ``in_flight`` is called with the key of a session."""

    def __init__(self, in_flight: Callable[[SessionKey], int] = lambda key: 0) -> None:
        self.calls_in_flight_on = in_flight
        self.goaways_begun: list[tuple[str, int, bool]] = []

    def begin_goaway(self, key: SessionKey, handoff: bool = False) -> None:
        self.goaways_begun.append((*key, handoff))


class FakeNodeDirectory:
    """Lists no nodes."""

    single = True

    def is_single_node(self) -> bool:
        return self.single


def _as_deferred(value: Any) -> Deferred[Any]:
    if isinstance(value, Deferred):
        return value
    return fail(value) if isinstance(value, Exception) else succeed(value)


@implementer(IPeerClient)
class FakePeerClient:
    """Responds as the test says."""

    def __init__(self) -> None:
        self.result: Any = True
        #: node_id -> result; the default is that it has room
        self.has_room_results: dict[str, Any] = {}
        self.has_room_requests: list[tuple[str, float]] = []
        self.has_client_requests: list[tuple[Location, float]] = []
        self.notices: list[tuple[Location, int]] = []
        self.closed: list[tuple[Location, int, str]] = []

    def has_client(self, location: Location, timeout: float) -> Deferred[bool]:
        self.has_client_requests.append((location, timeout))
        return _as_deferred(self.result)

    def notify_takeover(self, location: Location, generation: int) -> None:
        self.notices.append((location, generation))

    def notify_claim_revoked(self, location: Location, generation: int) -> None:
        self.notices.append((location, -generation))

    def close_session(self, location: Location, code: int, reason: str) -> Deferred[bool]:
        self.closed.append((location, code, reason))
        return _as_deferred(self.result)

    def notify_prefix(self, node: NodeStatus, prefix: str, method: str, params: bytes | None) -> Deferred[int]:
        raise AssertionError("unexpected request")

    def drain(self, node: NodeStatus) -> Deferred[None]:
        raise AssertionError("unexpected request")

    def has_room(self, node: Assignment | NodeStatus, timeout: float) -> Deferred[bool]:
        self.has_room_requests.append((node.node_id, timeout))
        return _as_deferred(self.has_room_results.get(node.node_id, True))

    def rebalance(self, node: NodeStatus) -> Deferred[int]:
        raise AssertionError("unexpected request")


@implementer(IRelayDialer)
class FakeRelayDialer:
    """Opens the relay that the test says."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.dials: list[tuple[ConnectRequest, str, str, float]] = []

    def dial(self, request: ConnectRequest, node_id: str, peer_url: str, timeout: float) -> Deferred[IRelay]:
        self.dials.append((request, node_id, peer_url, timeout))
        return _as_deferred(self.result)


@implementer(IRebalancer)
class FakeRebalancer:
    """Moves as many clients as the test says."""

    def __init__(self, rate: float = 50.0, moving: int = 0) -> None:
        self.rate = rate
        self.moving = moving
        self.runs = 0

    def rebalance_now(self) -> Deferred[int]:
        self.runs += 1
        return succeed(self.moving)

    def stop(self) -> None:
        pass
