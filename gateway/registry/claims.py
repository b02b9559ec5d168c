"""What a batch of claims and releases comes to.

Within a batch the requests of one client take effect in the order in which they were made, so that a batch is right
whatever is in it. Nothing here asks a database: :func:`settle` is told what the transaction found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import attrs
from twisted.internet.defer import Deferred

from gateway.registry.interface import (
    Claim,
    HeldElsewhere,
    LeaseLost,
    Location,
    Place,
    PlacedElsewhere,
    Superseded,
)


@attrs.define(eq=False)
class Request:
    """A claim; or, with a ``generation``, a reclaim of that claim."""

    client_id: str
    address: str
    generation: int | None
    deferred: Deferred[Any]
    #: cancelled after it was sent
    abandoned: bool = False
    #: the newest generation of another node's claim that it may take over, and whether leases count there
    over: int | None = None
    judge: bool = False
    #: whether a placement of the client wins
    placed: bool = False
    #: whom it took over from. It stays when the batch is tried again: the first try may be in, though nobody heard so.
    before: Location | None = None


@attrs.define(eq=False)
class Release:
    """A release, and who waits for it."""

    client_id: str
    generation: int
    waiting: list[Deferred[None]] = attrs.field(factory=list)
    #: it is of a claim that nobody waited for, or that may not be in at all; and whom that was made over
    taken_back: bool = False
    before: Location | None = None


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
    room: bool = True

    @property
    def takes(self) -> bool:
        """Whether it takes clients."""
        return self.live and self.room and self.state == "up"

    def place(self) -> Place:
        """This node, as one that a client is placed on."""
        return Place(self.node_id, self.name, self.public_url, self.peer_url)

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
Outcome = Claim | None | Superseded | LeaseLost | HeldElsewhere | PlacedElsewhere


@attrs.define
class Settled:
    """What a batch comes to: the outcome of each request or release, in order, and the rows to write."""

    outcomes: list[Outcome] = attrs.field(factory=list)
    #: client_id -> its new row
    written: dict[str, Row] = attrs.field(factory=dict)
    #: client_id -> the row that is to be removed
    removed: dict[str, Row] = attrs.field(factory=dict)


@attrs.define
class _Found:
    """What a transaction found: see :func:`settle`."""

    rows: dict[str, Row]
    node: int
    now: int
    lease: bool
    owners: dict[int, Owner]
    placements: dict[str, int]
    #: where in the batch the claim stands that wins its client: those of the same client before it are superseded
    winners: dict[str, int] = attrs.field(factory=dict)

    def find_winners(self, batch: list[Request | Release]) -> None:
        for index, each in enumerate(batch):
            if isinstance(each, Release) or each.generation is not None:
                continue
            # One that is held off by what was there before the batch is no reason to turn an older one away.
            if self.off(each, self.rows.get(each.client_id)) is None:
                self.winners[each.client_id] = index

    def off(self, request: Request, row: Row | None) -> PlacedElsewhere | HeldElsewhere | None:
        """Why a client is not to be claimed, if so."""
        place = self.placements.get(request.client_id, 0) if request.placed else 0
        if place == self.node:
            return None
        if place in self.owners and self.owners[place].takes:
            return PlacedElsewhere(request.client_id, self.owners[place].place())
        if row is None or request.over is None or row.node == self.node or row.generation <= request.over:
            return None
        owner = self.owners.get(row.node)
        if owner is None or (request.judge and not owner.live):
            return None
        return HeldElsewhere(owner.location(request.client_id, row))


def settle(
    batch: list[Request | Release],
    rows: dict[str, Row],
    node: int,
    now: int,
    lease: bool,
    owners: dict[int, Owner] | None = None,
    placements: dict[str, int] | None = None,
) -> Settled:
    """Work out what a batch comes to.

    ``rows`` are those of the batch's clients as the transaction found them, ``node`` is this node's number, ``now`` the
    database's clock in microseconds, and ``lease`` whether this node's lease holds: without it nothing is claimed.
    ``owners`` are the other nodes that have one of the rows, by number; a row of any other node is nobody's.
    ``placements`` are the numbers of the nodes that clients are placed on, by client; among ``owners``, unless they
    are gone.
    """
    settled = Settled()
    #: what the batch has made of rows so far
    current: dict[str, Row | None] = {}
    found = _Found(rows, node, now, lease, owners or {}, placements or {})
    if len({each.client_id for each in batch}) < len(batch):
        found.find_winners(batch)
    for index, each in enumerate(batch):
        client_id = each.client_id
        row = current[client_id] if client_id in current else rows.get(client_id)
        outcome, after = _settle_one(index, each, row, found)
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


def _settle_one(index: int, each: Request | Release, row: Row | None, found: _Found) -> tuple[Outcome, Row | None]:
    """Return the outcome of one, and its client's row after it."""
    if isinstance(each, Release):
        own = row is not None and row.node == found.node and row.generation == each.generation
        return None, (None if own else row)
    if not found.lease:
        return LeaseLost("this node's lease ran out"), row
    if each.generation is None:
        return _settle_claim(index, each, row, found)
    if row is None or row.generation < each.generation:
        # The generation of a claim is its time, unless the clock stood behind that of an older claim.
        row = Row(found.node, each.generation, min(each.generation, found.now), each.address)
    elif row.node != found.node:
        return None, row
    elif row.generation > each.generation:
        return Superseded(f"a newer connection of {each.client_id} is claimed by this node"), row
    return Claim(row.generation, row.connected_at / 1e6), row


def _settle_claim(index: int, each: Request, row: Row | None, found: _Found) -> tuple[Outcome, Row | None]:
    if found.winners and found.winners.get(each.client_id, -1) > index:
        return Superseded(f"a newer connection of {each.client_id} came"), row
    now = found.now
    off = found.off(each, row)
    if off is not None:
        return off, row
    if row is not None and row.node != found.node and row.node in found.owners:
        each.before = found.owners[row.node].location(each.client_id, row)
    row = Row(found.node, now if row is None else max(row.generation + 1, now), now, each.address)
    return Claim(row.generation, row.connected_at / 1e6, each.before), row
