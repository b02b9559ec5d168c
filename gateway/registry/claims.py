"""Resolve a batch of claims and releases against the rows that its transaction read. No I/O.

The requests of one client take effect in the order in which they were made, so any batch has a correct result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import attrs
from twisted.internet.defer import Deferred

from gateway.registry.errors import AssignedElsewhereError, ClaimSupersededError, LeaseLostError, OwnedElsewhereError
from gateway.registry.interface import ALWAYS_TAKE_OVER, Assignment, Claim, ClaimPolicy, Location, SessionKey


@attrs.define(eq=False)
class ClaimRequest:
    """A queued claim, or, with a ``generation``, a reclaim."""

    client_id: str
    address: str
    generation: int | None
    deferred: Deferred[Any]
    policy: ClaimPolicy = ALWAYS_TAKE_OVER
    #: whether it was cancelled after it was sent
    abandoned: bool = False
    #: the owner that it took over from. Kept when the batch is retried, since the first try may have been committed.
    previous_owner: Location | None = None


@attrs.define(eq=False)
class ReleaseRequest:
    """A queued release."""

    key: SessionKey
    waiters: list[Deferred[None]] = attrs.field(factory=list)
    #: whether its claim was abandoned, or may not have been written at all
    revokes_claim: bool = False
    #: the owner that such a claim took over from
    previous_owner: Location | None = None

    @property
    def client_id(self) -> str:
        return self.key.client_id


class Row(NamedTuple):
    """A row of the table ``clients``, without its key. Times are in microseconds since 1970."""

    node: int
    generation: int
    connected_at: int
    address: str


@attrs.frozen
class Owner:
    """Another node, as read by the transaction. A node that has left is not represented."""

    node_id: str
    name: str
    peer_url: str
    public_url: str
    state: str
    #: whether its lease is valid
    live: bool
    #: whether it was below its capacity at its last heartbeat
    has_room: bool = True
    #: microseconds since 1970
    heartbeat_at: int = 0

    @property
    def accepts_clients(self) -> bool:
        """Whether new clients may be sent there."""
        return self.live and self.has_room and self.state == "up"

    def assignment(self) -> Assignment:
        """Make the assignment of a client to this node."""
        return Assignment(self.node_id, self.name, self.public_url, self.peer_url)

    def location(self, client_id: str, row: Row) -> Location:
        """Make the location of a client that this node owns."""
        return Location(
            client_id,
            self.node_id,
            self.name,
            self.peer_url,
            row.generation,
            row.connected_at / 1e6,
            row.address,
            self.live,
            self.public_url,
            self.state,
        )


#: the result of one request: an exception fails that request alone; ``None`` for a release, or a reclaim that lost
Outcome = Claim | None | ClaimSupersededError | LeaseLostError | OwnedElsewhereError | AssignedElsewhereError


@attrs.define
class Resolution:
    """The outcome of each request of a batch, in order, and the rows to write and to remove."""

    outcomes: list[Outcome] = attrs.field(factory=list)
    #: client_id -> its new row
    written: dict[str, Row] = attrs.field(factory=dict)
    #: client_id -> its old row
    removed: dict[str, Row] = attrs.field(factory=dict)


@attrs.define
class _Snapshot:
    """The arguments of :func:`resolve`, as read by the transaction."""

    rows: dict[str, Row]
    node: int
    now: int
    lease_valid: bool
    owners: dict[int, Owner]
    assignments: dict[str, int]
    floor: int = 0
    #: client_id -> index of its winning claim in the batch: earlier claims of that client are superseded
    winners: dict[str, int] = attrs.field(factory=dict)

    def find_winners(self, batch: list[ClaimRequest | ReleaseRequest]) -> None:
        for index, request in enumerate(batch):
            if isinstance(request, ReleaseRequest) or request.generation is not None:
                continue
            # A claim that conflicts with the rows from before the batch does not supersede an older one.
            if self.conflict(request, self.rows.get(request.client_id)) is None:
                self.winners[request.client_id] = index

    def conflict(self, request: ClaimRequest, row: Row | None) -> AssignedElsewhereError | OwnedElsewhereError | None:
        """Return the error that the policy of a claim requires, or ``None`` if the claim may be written."""
        policy = request.policy
        assigned = self.assignments.get(request.client_id, 0) if policy.honor_assignment else 0
        if assigned == self.node:
            return None
        if assigned in self.owners and self.owners[assigned].accepts_clients:
            return AssignedElsewhereError(request.client_id, self.owners[assigned].assignment())
        if (
            row is None
            or policy.takeover_up_to is None
            or row.node == self.node
            or row.generation <= policy.takeover_up_to
        ):
            return None
        owner = self.owners.get(row.node)
        if owner is None or (policy.ignore_expired_owner and not owner.live):
            return None
        return OwnedElsewhereError(owner.location(request.client_id, row))


def resolve(
    batch: list[ClaimRequest | ReleaseRequest],
    rows: dict[str, Row],
    node: int,
    now: int,
    lease_valid: bool,
    owners: dict[int, Owner] | None = None,
    assignments: dict[str, int] | None = None,
    floor: int = 0,
) -> Resolution:
    """Resolve a batch.

    ``rows`` are the clients' rows before the batch, ``node`` is this node's number, ``now`` the database's clock in
    microseconds. Without ``lease_valid``, the state of this node's lease, nothing is claimed. ``owners`` has the other
    nodes of these rows and assignments, by number; a row of a node that is not among them has no owner.
    ``assignments`` maps clients to the numbers of the nodes that they are assigned to. New generations are higher than
    ``floor``.
    """
    resolution = Resolution()
    #: client_id -> its row after the requests so far, where they changed it
    current: dict[str, Row | None] = {}
    snapshot = _Snapshot(rows, node, now, lease_valid, owners or {}, assignments or {}, floor)
    if len({request.client_id for request in batch}) < len(batch):
        snapshot.find_winners(batch)
    for index, request in enumerate(batch):
        client_id = request.client_id
        row = current[client_id] if client_id in current else rows.get(client_id)
        outcome, after = _resolve_one(index, request, row, snapshot)
        resolution.outcomes.append(outcome)
        if after is not row:
            current[client_id] = after
    for client_id in sorted(current):
        before, after = rows.get(client_id), current[client_id]
        if after is not None and after != before:
            resolution.written[client_id] = after
        elif before is not None and after is None:
            resolution.removed[client_id] = before
    return resolution


def _resolve_one(
    index: int, request: ClaimRequest | ReleaseRequest, row: Row | None, snapshot: _Snapshot
) -> tuple[Outcome, Row | None]:
    """Return the outcome of one request, and its client's row after it."""
    if isinstance(request, ReleaseRequest):
        own = row is not None and row.node == snapshot.node and row.generation == request.key.generation
        return None, (None if own else row)
    if not snapshot.lease_valid:
        return LeaseLostError("the lease of this node has expired"), row
    if request.generation is None:
        return _resolve_claim(index, request, row, snapshot)
    if row is None or row.generation < request.generation:
        # The generation of a claim is its time, unless the clock was behind the generation of an older claim.
        row = Row(snapshot.node, request.generation, min(request.generation, snapshot.now), request.address)
    elif row.node != snapshot.node:
        return None, row
    elif row.generation > request.generation:
        return ClaimSupersededError(f"this node has claimed a newer connection of {request.client_id}"), row
    return Claim(row.generation, row.connected_at / 1e6), row


def _resolve_claim(
    index: int, request: ClaimRequest, row: Row | None, snapshot: _Snapshot
) -> tuple[Outcome, Row | None]:
    if snapshot.winners and snapshot.winners.get(request.client_id, -1) > index:
        return ClaimSupersededError(f"there is a newer connection of {request.client_id}"), row
    now = snapshot.now
    conflict = snapshot.conflict(request, row)
    if conflict is not None:
        return conflict, row
    if row is not None and row.node != snapshot.node and row.node in snapshot.owners:
        request.previous_owner = snapshot.owners[row.node].location(request.client_id, row)
    generation = max(now, snapshot.floor + 1) if row is None else max(row.generation + 1, now, snapshot.floor + 1)
    row = Row(snapshot.node, generation, now, request.address)
    return Claim(row.generation, row.connected_at / 1e6, request.previous_owner), row
