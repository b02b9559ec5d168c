"""What the API needs to know of the node that it speaks for."""

from __future__ import annotations

import enum
from typing import Protocol

from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface

from gateway.clients.interface import ConnectRequest, IRelay
from gateway.registry.interface import Assignment, Location, NodeStatus


class INode(Interface):
    """This node."""

    node_id: str = Attribute("Its UUID, new at every start.")
    name: str = Attribute("What operators call it.")
    public_url: str = Attribute("How clients reach it, without /v1/connect.")
    peer_url: str = Attribute("How other nodes, and backends, reach it.")

    def unready_reason() -> str:
        """Why this node takes no clients (``starting``, ``draining``, ``registry``), or an empty text when it does."""

    def send_goaway(client_id: str, generation: int, reason: str) -> bool:
        """Tell a client that is here through another node to connect to this one itself, and close its connection when
        the calls on it are over. ``False`` if it is not here by that generation."""

    def drain() -> Deferred[None]:
        """Send every client away, spread over ``--drain-seconds``, and refuse new ones; fires when none is left.
        Asking again returns a Deferred for the drain that is under way. The process then ends."""


class NodeState(str, enum.Enum):
    """State of this node; the values are on the wire and in the registry."""

    STARTING = "starting"
    UP = "up"
    DRAINING = "draining"
    STOPPED = "stopped"


class INodeService(INode):
    """This node, as its components and its drain see it."""

    state: NodeState = Attribute("Its state; a drain sets it to DRAINING.")

    def connect_url(client_id: str) -> str | None:
        """The complete URL at which a client reaches this node; ``None`` if this node can only guess it."""

    def close_shared_ports() -> Deferred[None]:
        """Stop listening on the client ports that other processes listen on, too; fires when they are closed."""


class CallTracker(Protocol):
    """Knows the calls to and from the clients connected to this node."""

    def begin_goaway(self, client_id: str, generation: int, handoff: bool = False) -> None:
        """Begin no new calls on a connection. ``handoff``: the client connects to another node."""

    def calls_in_flight_on(self, client_id: str, generation: int) -> int:
        """Number of calls in flight on a connection."""
        ...


class IRelayDialer(Interface):
    """Opens ways for clients' bytes to other nodes."""

    def dial(request: ConnectRequest, node_id: str, peer_url: str, timeout: float) -> Deferred[IRelay]:
        """Have another node take a client, through this one. Fails with :class:`PeerUnreachable`, or with ``Refusal``
        where it refused the client in a way that would be the same here."""


class IPeerClient(Interface):
    """What other nodes can be asked. Every Deferred fails with :class:`PeerUnreachable` alone, within ``timeout``
    seconds (5 by default)."""

    def has_client(location: Location, timeout: float) -> Deferred[bool]:
        """Whether the node of that location takes clients and still has the client by that generation."""

    def close_session(location: Location, code: int, reason: str) -> Deferred[bool]:
        """Have a client's connection closed, if it still is of that generation; fires when its row is gone. With 1012
        it is told to go, and closed when the calls on it are over; fires when it has been told."""

    def notify_takeover(location: Location, generation: int) -> None:
        """Tell the node that had a client that a newer connection is open, by that generation: it closes its own with
        4001. It is told again until it has heard it, or its lease has run out."""

    def notify_claim_revoked(location: Location, generation: int) -> None:
        """Tell the node that had a client that a newer claim, of that generation, was taken back: it claims its own
        connection again. It is told again like :meth:`moved`."""

    def notify_prefix(node: NodeStatus, prefix: str, method: str, params: bytes | None) -> Deferred[int]:
        """Have the clients of a node told whose ids begin with ``prefix``; fires with how many were."""

    def drain(node: NodeStatus) -> Deferred[None]:
        """Have a node drained; fires when it has begun."""

    def has_room(node: Assignment | NodeStatus, timeout: float) -> Deferred[bool]:
        """Whether a node takes clients, and has room for one more."""

    def rebalance(node: NodeStatus) -> Deferred[int]:
        """Have a node move the clients that it has above its share; fires with how many it is going to move."""


class IRebalancer(Interface):
    """Moves clients of this node to others, when it has more than its share."""

    rate: float = Attribute("How many clients it moves a second at most; 0: none.")

    def rebalance_now() -> Deferred[int]:
        """Begin to move what is above this node's share, however little; fires with how many clients that are, or how
        many are still to go of those that are being moved. Does not fail."""

    def stop() -> None:
        """Move no clients any more."""
