"""What a batch of claims and releases comes to.

Within a batch the requests of one client take effect in the order in which they were made, so that a batch is right
whatever is in it. Nothing here asks a database: :func:`settle` is told what the transaction found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import attrs
from twisted.internet.defer import Deferred

from gateway.registry.errors import AssignedElsewhereError, ClaimSupersededError, LeaseLostError, OwnedElsewhereError
from gateway.registry.interface import Assignment, Claim, Location


@attrs.define(eq=False)
class ClaimRequest:
    """A claim; or, with a ``generation``, a reclaim of that claim."""

    client_id: str
    address: str
    generation: int | None
    deferred: Deferred[Any]
    #: cancelled after it was sent
    abandoned: bool = False
    #: the newest generation of another node's claim that it may take over, and whether leases count there
    takeover_up_to: int | None = None
    ignore_expired_owner: bool = False
    #: whether a placement of the client wins
    honor_assignment: bool = False
    #: whom it took over from. It stays when the batch is tried again: the first try may be in, though nobody heard so.
    previous_owner: Location | None = None


@attrs.define(eq=False)
class ReleaseRequest:
    """A release, and who waits for it."""

    client_id: str
    generation: int
    waiters: list[Deferred[None]] = attrs.field(factory=list)
    #: it is of a claim that nobody waited for, or that may not be in at all; and whom that was made over
    revokes_claim: bool = False
    previous_owner: Location | None = None


class Row(NamedTuple):
    """A row of the table ``clients``, less its key. Times are in microseconds since 1970."""

    node: int
    generation: int
    connected_at: int
    address: str


@attrs.frozen
class Owner:
    """Another node, as the transaction found it; one that has left is none."""

    node_id: str
    name: str
    peer_url: str
    public_url: str
    state: str
    #: whether its lease holds
    live: bool
    #: whether it had fewer clients than it takes, by its last heartbeat
    has_room: bool = True

    @property
    def accepts_clients(self) -> bool:
        """Whether it takes clients."""
        return self.live and self.has_room and self.state == "up"

    def assignment(self) -> Assignment:
        """This node, as one that a client is placed on."""
        return Assignment(self.node_id, self.name, self.public_url, self.peer_url)

    def location(self, client_id: str, row: Row) -> Location:
        """Where a client is that this node has."""
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


#: what came of a request or release: an exception is for the request alone; a release has ``None``
Outcome = Claim | None | ClaimSupersededError | LeaseLostError | OwnedElsewhereError | AssignedElsewhereError


@attrs.define
class Resolution:
    """What a batch comes to: the outcome of each request or release, in order, and the rows to write."""

    outcomes: list[Outcome] = attrs.field(factory=list)
    #: client_id -> its new row
    written: dict[str, Row] = attrs.field(factory=dict)
    #: client_id -> the row that is to be removed
    removed: dict[str, Row] = attrs.field(factory=dict)


@attrs.define
class _Snapshot:
    """What a transaction found: see :func:`settle`."""

    rows: dict[str, Row]
    node: int
    now: int
    lease_valid: bool
    owners: dict[int, Owner]
    assignments: dict[str, int]
    #: where in the batch the claim stands that wins its client: those of the same client before it are superseded
    winners: dict[str, int] = attrs.field(factory=dict)

    def find_winners(self, batch: list[ClaimRequest | ReleaseRequest]) -> None:
        for index, each in enumerate(batch):
            if isinstance(each, ReleaseRequest) or each.generation is not None:
                continue
            # One that is held off by what was there before the batch is no reason to turn an older one away.
            if self.conflict(each, self.rows.get(each.client_id)) is None:
                self.winners[each.client_id] = index

    def conflict(self, request: ClaimRequest, row: Row | None) -> AssignedElsewhereError | OwnedElsewhereError | None:
        """Why a client is not to be claimed, if so."""
        place = self.assignments.get(request.client_id, 0) if request.honor_assignment else 0
        if place == self.node:
            return None
        if place in self.owners and self.owners[place].accepts_clients:
            return AssignedElsewhereError(request.client_id, self.owners[place].assignment())
        if (
            row is None
            or request.takeover_up_to is None
            or row.node == self.node
            or row.generation <= request.takeover_up_to
        ):
            return None
        owner = self.owners.get(row.node)
        if owner is None or (request.ignore_expired_owner and not owner.live):
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
) -> Resolution:
    """Work out what a batch comes to.

    ``rows`` are those of the batch's clients as the transaction found them, ``node`` is this node's number, ``now`` the
    database's clock in microseconds, and ``lease`` whether this node's lease holds: without it nothing is claimed.
    ``owners`` are the other nodes that have one of the rows, by number; a row of any other node is nobody's.
    ``placements`` are the numbers of the nodes that clients are placed on, by client; among ``owners``, unless they
    are gone.
    """
    settled = Resolution()
    #: what the batch has made of rows so far
    current: dict[str, Row | None] = {}
    found = _Snapshot(rows, node, now, lease_valid, owners or {}, assignments or {})
    if len({each.client_id for each in batch}) < len(batch):
        found.find_winners(batch)
    for index, each in enumerate(batch):
        client_id = each.client_id
        row = current[client_id] if client_id in current else rows.get(client_id)
        outcome, after = _resolve_one(index, each, row, found)
        settled.outcomes.append(outcome)
        if after is not row:
            current[client_id] = after
    for client_id in sorted(current):
        before, after = rows.get(client_id), current[client_id]
        if after is not None and after != before:
            settled.written[client_id] = after
        elif before is not None and after is None:
            settled.removed[client_id] = before
    return settled


def _resolve_one(
    index: int, request: ClaimRequest | ReleaseRequest, row: Row | None, snapshot: _Snapshot
) -> tuple[Outcome, Row | None]:
    """Return the outcome of one, and its client's row after it."""
    if isinstance(request, ReleaseRequest):
        own = row is not None and row.node == snapshot.node and row.generation == request.generation
        return None, (None if own else row)
    if not snapshot.lease_valid:
        return LeaseLostError("this node's lease ran out"), row
    if request.generation is None:
        return _resolve_claim(index, request, row, snapshot)
    if row is None or row.generation < request.generation:
        # The generation of a claim is its time, unless the clock stood behind that of an older claim.
        row = Row(snapshot.node, request.generation, min(request.generation, snapshot.now), request.address)
    elif row.node != snapshot.node:
        return None, row
    elif row.generation > request.generation:
        return ClaimSupersededError(f"a newer connection of {request.client_id} is claimed by this node"), row
    return Claim(row.generation, row.connected_at / 1e6), row


def _resolve_claim(
    index: int, request: ClaimRequest, row: Row | None, snapshot: _Snapshot
) -> tuple[Outcome, Row | None]:
    if snapshot.winners and snapshot.winners.get(request.client_id, -1) > index:
        return ClaimSupersededError(f"a newer connection of {request.client_id} came"), row
    now = snapshot.now
    off = snapshot.conflict(request, row)
    if off is not None:
        return off, row
    if row is not None and row.node != snapshot.node and row.node in snapshot.owners:
        request.previous_owner = snapshot.owners[row.node].location(request.client_id, row)
    row = Row(snapshot.node, now if row is None else max(row.generation + 1, now), now, request.address)
    return Claim(row.generation, row.connected_at / 1e6, request.previous_owner), row
