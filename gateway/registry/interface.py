"""Who is where: the registry as the rest of the node sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
from twisted.internet.defer import Deferred
from zope.interface import Interface


@attrs.frozen
class Assignment:
    """A node that a client was placed on: where it should be."""

    node_id: str
    name: str
    public_url: str
    peer_url: str


@attrs.frozen
class NodeInfo:
    """What a node says of itself when it joins."""

    #: UUID, new at every start
    node_id: str
    name: str
    public_url: str
    peer_url: str
    #: the most clients it takes
    capacity: int


@attrs.frozen
class NodeStatus:
    """A live node, as the registry shows it."""

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


@attrs.frozen
class Location:
    """Where a client is connected."""

    client_id: str
    node_id: str
    node_name: str
    peer_url: str
    generation: int
    #: seconds since 1970, UTC, by the database's clock
    connected_at: float
    address: str
    #: whether its node's lease holds. If not, the node may be dead, or its database away.
    live: bool = True
    #: of its node
    public_url: str = ""
    #: of its node: ``up`` or ``draining``
    state: str = "up"


@attrs.frozen
class Claim:
    """A claim that is in."""

    generation: int
    #: seconds since 1970, UTC, by the database's clock
    connected_at: float
    #: where the client was before, if that was another node: it is to be told
    previous_owner: Location | None = None


#: Called with a claim that was revoked, since its caller gave up on it, or since it was not known whether it had been
#: written, once there is certainly no row of it any more: the client, its generation, and where the client was before
#: if that was another node. An older connection of the client, here or there, is to be claimed again.
OnClaimRevoked = Callable[[str, int, "Location | None"], None]


def ignore_claim_revoked(client_id: str, generation: int, previous_owner: Location | None) -> None:
    """Do nothing, as an :data:`OnClaimRevoked`."""


class IRegistry(Interface):
    """The registry. Every method that returns a Deferred fails with :class:`RegistryUnavailable` when the database is
    away, unless it says otherwise. A row of a node counts only while its heartbeat is within the lease."""

    def open() -> Deferred[None]:
        """Connect and bring the schema up to date. Fails with ``gateway.settings.ConfigError`` when the registry
        cannot be used as it is configured."""

    def close() -> Deferred[None]:
        """Write what is queued if that is possible, then disconnect."""

    def join(node: NodeInfo) -> Deferred[None]:
        """Insert this node's row, in state ``up``: its first heartbeat. Must come before any claim."""

    def heartbeat(state: str, clients: int) -> Deferred[bool]:
        """Renew this node's lease, before anything that is queued. ``False`` when it had run out, or its row was gone
        and was inserted anew: then every client that is here must be claimed again."""

    def leave() -> Deferred[None]:
        """Remove this node's row, and every client's row that is still its own."""

    def claim(
        client_id: str,
        address: str,
        *,
        takeover_up_to: int | None = None,
        ignore_expired_owner: bool = False,
        honor_assignment: bool = False,
    ) -> Deferred[Claim]:
        """Make this node the owner of a client's connection.

        Without ``over``, whoever had it. With it, only over a claim of another node's with that generation or an older
        one (0: over none), else it fails with ``HeldElsewhere``; ``judge`` says that a claim of a node whose lease ran
        out counts for nothing. With ``placed``, a valid placement of the client wins: on this node, whoever had it; on
        another that is live, ``up``, and has room, it fails with ``PlacedElsewhere``, wherever the client is.

        Written in a batch with others. Fails with ``PlacedElsewhere``, ``HeldElsewhere``, ``Superseded``, ``LeaseLost``
        or ``RegistryUnavailable``. If it is cancelled before it was sent, nothing is written; if it was already on its
        way and succeeds, it is released.
        """

    def reclaim(client_id: str, generation: int, address: str) -> Deferred[Claim | None]:
        """Claim a client again after this node's rows may have been removed: ``None`` when somebody else claimed it
        with a newer generation meanwhile; else a claim with that same generation (its row there again). Fails with
        ``Superseded`` when the newer claim is this node's own."""

    def release(client_id: str, generation: int) -> Deferred[None]:
        """Remove a claim's row, if it is still that claim's. Written in a batch; if the registry is away the Deferred
        fails at once, and the release stays queued until it is back."""

    def find(client_id: str) -> Deferred[Location | None]:
        """Where a client is, or ``None``; also on a node whose lease has run out, which is for the caller to judge."""

    def assign(client_ids: Sequence[str], node_id: str, *, binding: bool = True) -> Deferred[list[str]]:
        """Place clients on another node, for two minutes from now: whoever of them arrives anywhere is sent there.

        Fires with those that are. Left out are all that were moved within the last 10 minutes, by whomever; and all of
        them, if that node is gone, is not ``up``, or has no room. If it fails, some may be placed all the same. Without
        ``binding`` they are sent nowhere, but count as moved.
        """

    def assignment(client_id: str) -> Deferred[Assignment | None]:
        """The node that a client is placed on, if that is so now and the node is live, ``up``, and has room."""

    def purge_assignments() -> Deferred[bool]:
        """Remove placements that are over, from one piece of the table. Fires with whether that was the last piece:
        the next time begins at the first again."""

    def clients(after: str, limit: int, node_id: str | None = None, prefix: str = "") -> Deferred[list[Location]]:
        """Clients of live nodes in the order of their ids (by code point), beginning behind ``after``."""

    def nodes() -> Deferred[list[NodeStatus]]:
        """The live nodes, in the order in which they joined."""

    def reap(limit: int) -> Deferred[int]:
        """Remove up to ``limit`` rows of clients whose nodes' leases ran out, and those nodes' rows once they hold no
        client. Fires with the number of rows removed."""
