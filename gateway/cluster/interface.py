"""Interfaces between :mod:`gateway.cluster` and the rest of the node."""

from __future__ import annotations

import enum
from typing import Protocol

from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface

from gateway.clients.interface import ConnectRequest, IRelay
from gateway.registry.interface import Assignment, Location, NodeStatus, SessionKey


class INode(Interface):
    """This node, for its API and for the parts that decide by its state."""

    node_id: str = Attribute("A UUID, new at every start.")
    name: str = Attribute("The name for operators.")
    public_url: str = Attribute("The URL for clients, without /v1/connect.")
    peer_url: str = Attribute("The URL for other nodes and for backends.")

    def unready_reason() -> str:
        """Return why this node accepts no clients (``starting``, ``draining``, ``registry``), or an empty string if it
        does."""

    def send_goaway(key: SessionKey, reason: str) -> bool:
        """Send a goaway to a client that is relayed to this node, telling it to connect to this node directly, and
        close its connection when its calls in flight have finished. Returns ``False`` if that session is not open
        here."""

    def drain() -> Deferred[None]:
        """Send every client away, spread over ``--drain-seconds``, and accept no new ones; fires when no session is
        left. Called again, it returns a Deferred for the drain in progress. The process exits after the drain."""


class NodeState(str, enum.Enum):
    """State of this node; the values are on the wire and in the registry."""

    STARTING = "starting"
    UP = "up"
    #: about to drain (``--drain-delay``): announced as draining, but still accepting clients
    DRAIN_PENDING = "drain_pending"
    DRAINING = "draining"
    STOPPED = "stopped"


class INodeService(INode):
    """This node, as its components and its drain see it."""

    state: NodeState = Attribute("Its state; a drain sets it to DRAIN_PENDING and DRAINING.")

    def refusal_reason() -> str:
        """Why this node refuses clients that connect to it, as an error word; empty if it does not."""

    def connect_url(client_id: str) -> str | None:
        """The complete URL at which a client reaches this node; ``None`` if this node can only guess it."""

    def close_shared_ports() -> Deferred[None]:
        """Stop listening on the client ports that other processes listen on, too; fires when they are closed."""


class CallTracker(Protocol):
    """Knows the calls to and from the clients connected to this node."""

    def begin_goaway(self, key: SessionKey, handoff: bool = False) -> None:
        """Begin no new calls on a connection. ``handoff``: the client connects to another node."""

    def calls_in_flight_on(self, key: SessionKey) -> int:
        """Number of calls in flight on a connection."""
        ...


class IRelayDialer(Interface):
    """Opens relays to other nodes."""

    def dial(request: ConnectRequest, node_id: str, peer_url: str, timeout: float) -> Deferred[IRelay]:
        """Connect a client to another node through this one. Fails with
        :class:`~gateway.cluster.errors.PeerUnreachableError`, or with
        :class:`~gateway.protocol.errors.RequestRefusedError` if the node refused the client for a reason that holds on
        this node too."""


class IPeerClient(Interface):
    """Requests to other nodes. Every Deferred fails with :class:`~gateway.cluster.errors.PeerUnreachableError` only,
    within ``timeout`` seconds (5 by default)."""

    def has_client(location: Location, timeout: float) -> Deferred[bool]:
        """Whether the node of that location accepts clients and still has the session of that generation."""

    def close_session(location: Location, code: int, reason: str) -> Deferred[bool]:
        """Close a session if it still has that generation; fires when its row has been removed. With code 1012 the
        client is sent a goaway, and the connection closes when its calls in flight have finished; fires when the goaway
        has been sent."""

    def notify_takeover(location: Location, generation: int) -> None:
        """Notify the previous owner of a client that a newer connection, of that generation, is open: it closes its own
        with 4001. The notice is repeated until the node acknowledges it, or its lease expires."""

    def notify_claim_revoked(location: Location, generation: int) -> None:
        """Notify the previous owner of a client that a newer claim, of that generation, was revoked: it claims its own
        connection again. Repeated like :meth:`notify_takeover`."""

    def notify_prefix(node: NodeStatus, prefix: str, method: str, params: bytes | None) -> Deferred[int]:
        """Send a notification to the clients of a node whose ids begin with ``prefix``; fires with their number."""

    def drain(node: NodeStatus) -> Deferred[None]:
        """Start the drain of a node; fires when it has started."""

    def has_room(node: Assignment | NodeStatus, timeout: float) -> Deferred[bool]:
        """Whether a node accepts clients, and has room for one more."""

    def rebalance(node: NodeStatus) -> Deferred[int]:
        """Have a node move its clients above its share to other nodes; fires with the number of clients that it is
        going to move."""


class IRebalancer(Interface):
    """Moves clients of this node to other nodes when it has more than its share."""

    rate: float = Attribute("The most clients it moves per second; 0 disables rebalancing.")

    def rebalance_now() -> Deferred[int]:
        """Start to move every client above this node's share, however few; fires with their number, or with the number
        left if a migration is in progress. Does not fail."""

    def stop() -> None:
        """Move no more clients."""
