"""The registry: which nodes are live, which node each client is connected to, and which one it is assigned to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import attrs
from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface


class SessionKey(NamedTuple):
    """Name one session: a client, and the generation of its claim. Equal, and hash-equal, to the plain tuple."""

    client_id: str
    generation: int


@attrs.frozen
class Assignment:
    """The node that a client was assigned to, where it should connect next."""

    node_id: str
    name: str
    public_url: str
    peer_url: str


@attrs.frozen
class NodeInfo:
    """The description that a node joins with."""

    #: UUID, new at every start
    node_id: str
    name: str
    public_url: str
    peer_url: str
    #: maximum number of clients
    capacity: int
    #: version of the program, up to 64 ASCII characters
    version: str = ""


@attrs.frozen
class NodeStatus:
    """A live node, as read from the registry."""

    node_id: str
    name: str
    public_url: str
    peer_url: str
    clients: int
    capacity: int
    #: ``up`` or ``draining``
    state: str
    #: seconds since its last heartbeat, by the database's clock
    heartbeat_age: float
    #: version of the program; empty if it does not tell
    version: str = ""


@attrs.frozen
class Location:
    """The node that a client is connected to."""

    client_id: str
    node_id: str
    node_name: str
    peer_url: str
    generation: int
    #: seconds since 1970, UTC, by the database's clock
    connected_at: float
    address: str
    #: whether the lease of its node is valid. If not, the node may be dead, or only cut off from the database.
    live: bool = True
    #: of its node
    public_url: str = ""
    #: of its node: ``up`` or ``draining``
    state: str = "up"


@attrs.frozen
class Claim:
    """A claim that was written."""

    generation: int
    #: seconds since 1970, UTC, by the database's clock
    connected_at: float
    #: where the client was before, if that was another node, which must be notified
    previous_owner: Location | None = None


@attrs.frozen
class ClaimPolicy:
    """When a claim may take a client from another node. By default it always may."""

    #: newest generation of another node's claim that may be taken over (0: none); ``None`` allows any
    takeover_up_to: int | None = None
    #: whether the claim of a node with an expired lease may always be taken over
    ignore_expired_owner: bool = False
    #: whether a valid assignment decides: if the client is assigned to this node, any claim is taken over; if to
    #: another node, the claim fails
    honor_assignment: bool = False


#: take over the claim of any node, and ignore assignments
ALWAYS_TAKE_OVER: Final = ClaimPolicy()

#: Called with the key and the previous owner of a claim that was abandoned, or that may or may not have been
#: written, once it certainly has no row any more. An older connection of the client, on this node or on the previous
#: owner, must be claimed again.
OnClaimRevoked = Callable[[SessionKey, "Location | None"], None]


def ignore_claim_revoked(key: SessionKey, previous_owner: Location | None) -> None:
    """Do nothing, as an :data:`OnClaimRevoked`."""


class IRegistry(Interface):
    """The registry.

    Each Deferred fails with :class:`~gateway.registry.errors.RegistryUnavailableError` when the database cannot be
    reached, unless the method documents otherwise; with its subclass ``RegistryRefusedError`` if the database refuses
    this request and perhaps no other. A node's row is valid only while its last heartbeat is within the
    lease, by the database's clock.
    """

    def open() -> Deferred[None]:
        """Connect and bring the schema up to date. Fails with ``gateway.settings.ConfigError`` if the registry cannot
        be used as configured."""

    def close() -> Deferred[None]:
        """Write what is queued if the database can be reached, then disconnect."""

    def join(node: NodeInfo) -> Deferred[None]:
        """Insert this node's row, in state ``up``. Counts as its first heartbeat; required before any claim.

        Ends the leases of all nodes that joined with the same peer URL, which this node must listen at already: it is
        restarted there, or replaces them.
        """

    def heartbeat(state: str, clients: int) -> Deferred[bool]:
        """Renew this node's lease, ahead of all queued work.

        Fires with ``False`` if the lease had expired, or if the row was gone and was inserted again: then every
        connected client must be reclaimed.
        """

    generation_floor: int = Attribute("The highest generation that this node knows of, in the whole fleet.")

    def raise_generation_floor(generation: int) -> None:
        """Take note of a generation that another node knows of: the generations of later claims are higher."""

    def clock_is_steady() -> bool:
        """Whether the database's clock has moved as this node's own for one lease, as of the last heartbeat. If not, no
        node can be considered dead."""

    def leave() -> Deferred[None]:
        """Remove this node's row, and the rows of all clients that it still owns."""

    def claim(client_id: str, address: str, policy: ClaimPolicy = ALWAYS_TAKE_OVER) -> Deferred[Claim]:
        """Make this node the owner of a client's connection.

        Written in a batch with others. Fails with :class:`~gateway.registry.errors.AssignedElsewhereError` if the
        policy honors assignments and the client is assigned to another node which is live, ``up`` and has room,
        regardless of the current owner; with :class:`~gateway.registry.errors.OwnedElsewhereError` if the policy does
        not allow the takeover; with ``ClaimSupersededError``, ``LeaseLostError`` or ``RegistryUnavailableError``.

        If the Deferred is cancelled before the claim was sent, nothing is written. If it was already sent and
        succeeds, it is released.
        """

    def reclaim(key: SessionKey, address: str) -> Deferred[Claim | None]:
        """Claim a client again after this node's rows may have been removed.

        Fires with a claim of the same generation, whose row is written again, or with ``None`` if another node has
        claimed the client with a newer generation. Fails with ``ClaimSupersededError`` if the newer claim is this
        node's own.
        """

    def release(key: SessionKey) -> Deferred[None]:
        """Remove the row of a claim, unless a newer claim has replaced it.

        Written in a batch. If the database cannot be reached, the Deferred fails at once, and the release stays queued
        until it can be.
        """

    def is_writing(key: SessionKey) -> bool:
        """Whether a release of this claim is queued, or a claim or release of its client is being written, so that its
        row may be removed or replaced before long. Claims that wait to be written do not count."""

    def find(client_id: str) -> Deferred[Location | None]:
        """Look up a client, or fire with ``None``. A location on a node with an expired lease is returned as well: the
        caller decides."""

    def assign(client_ids: Sequence[str], node_id: str, *, binding: bool = True) -> Deferred[list[str]]:
        """Assign clients to another node for the next two minutes: wherever they connect, they are routed there.

        Fires with the clients that were assigned. Those that any node has moved within the last 10 minutes are left
        out; all are, if that node is gone, is not ``up``, or has no room. If it fails, some may have been assigned.
        Without ``binding`` the clients are only marked as moved, and not routed.
        """

    def assignment(client_id: str) -> Deferred[Assignment | None]:
        """Look up a client's assignment. Fires with ``None`` unless it is valid and its node is live, ``up`` and has
        room."""

    def purge_assignments() -> Deferred[bool]:
        """Remove expired assignments from one segment of the table. Fires with ``True`` after the last segment; the
        next call starts again at the first."""

    def clients(after: str, limit: int, node_id: str | None = None, prefix: str = "") -> Deferred[list[Location]]:
        """List clients of live nodes in the order of their ids (by code point), starting behind ``after``."""

    def own_rows(first: str, limit: int) -> Deferred[tuple[list[SessionKey], str | None]]:
        """List this node's rows in one segment of the table: the ``limit`` rows of all nodes from the client_id
        ``first`` on. Fires with them, in no particular order, and the first client_id of the next segment, or ``None``
        at the end of the table."""

    def nodes() -> Deferred[list[NodeStatus]]:
        """List the live nodes, in the order in which they joined."""

    def reap(limit: int) -> Deferred[int]:
        """Remove up to ``limit`` client rows of nodes with expired leases, and those nodes' rows once they own no
        client. Fires with the number of client rows removed: fewer than ``limit`` if there are no more."""
