"""Claims and releases, gathered into batches.

A claim or a release waits until a few milliseconds have passed or a batch is full, whichever comes first; then its
batch is written in one transaction. One batch is on its way at a time, and what is asked for meanwhile makes the next.

    claim, reclaim, release -> queue -> batch -> settle() inside the transaction -> one outcome for each

Within a batch the requests of one client take effect in the order in which they were made (:func:`settle`), so that a
batch is right whatever is in it. A release is asked for by the generation of its claim, and so never before its claim's
outcome is known. When a batch fails, its claims and those that wait behind it fail; releases stay queued (at most one
for each claim there ever was) and are tried again with growing pauses. What may be in the database although its batch
failed (the connection broke at the commit) is released, by its generation.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import attrs
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure

from gateway.registry.interface import (
    Claim,
    HeldElsewhere,
    LeaseLost,
    Location,
    RegistryUnavailable,
    Superseded,
)
from gateway.telemetry.metrics import Metrics

#: the most rows of a batch, if nobody says otherwise
BATCH = 200
#: seconds between tries while the database is away: the first pause, and the longest
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


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
    #: whom it took over from. It stays when the batch is tried again: the first try may be in, though nobody heard so.
    before: Location | None = None


@attrs.define(eq=False)
class Release:
    """A release, and who waits for it."""

    client_id: str
    generation: int
    waiting: list[Deferred[None]] = attrs.field(factory=list)


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
Outcome = Claim | None | Superseded | LeaseLost | HeldElsewhere


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
    #: where in the batch the claim stands that wins its client: those of the same client before it are superseded
    winners: dict[str, int] = attrs.field(factory=dict)

    def find_winners(self, batch: list[Request | Release]) -> None:
        for index, each in enumerate(batch):
            if isinstance(each, Release) or each.generation is not None:
                continue
            # One that is held off by what was there before the batch is no reason to turn an older one away.
            if self.holder(each, self.rows.get(each.client_id)) is None:
                self.winners[each.client_id] = index

    def holder(self, request: Request, row: Row | None) -> Owner | None:
        """The node that a client is not to be taken from."""
        if row is None or request.over is None or row.node == self.node or row.generation <= request.over:
            return None
        owner = self.owners.get(row.node)
        return None if owner is None or (request.judge and not owner.live) else owner


def settle(
    batch: list[Request | Release],
    rows: dict[str, Row],
    node: int,
    now: int,
    lease: bool,
    owners: dict[int, Owner] | None = None,
) -> Settled:
    """Work out what a batch comes to.

    ``rows`` are those of the batch's clients as the transaction found them, ``node`` is this node's number, ``now`` the
    database's clock in microseconds, and ``lease`` whether this node's lease holds: without it nothing is claimed.
    ``owners`` are the other nodes that have one of the rows, by number; a row of any other node is nobody's.
    """
    settled = Settled()
    #: what the batch has made of rows so far
    current: dict[str, Row | None] = {}
    found = _Found(rows, node, now, lease, owners or {})
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
    elif row.generation > each.generation or row.node != found.node:
        return None, row
    return Claim(row.generation, row.connected_at / 1e6), row


def _settle_claim(index: int, each: Request, row: Row | None, found: _Found) -> tuple[Outcome, Row | None]:
    if found.winners and found.winners.get(each.client_id, -1) > index:
        return Superseded(f"a newer connection of {each.client_id} came"), row
    now = found.now
    if row is not None:
        holder = found.holder(each, row)
        if holder is not None:
            return HeldElsewhere(holder.location(each.client_id, row)), row
        if row.node != found.node and row.node in found.owners:
            each.before = found.owners[row.node].location(each.client_id, row)
    row = Row(found.node, now if row is None else max(row.generation + 1, now), now, each.address)
    return Claim(row.generation, row.connected_at / 1e6, each.before), row


class Batches:
    """The queue of claims and releases of one node.

    ``submit`` is given a callable that makes the next batch when its turn has come, and fires with what the batch's
    work returned; the work is ``write(connection, batch, tried)``, carried out in a thread, where ``tried`` takes the
    client_id and generation of each claim that may have been written even if the work fails. Work that fails may be
    carried out again, with the same ``tried``. ``delay`` is in seconds; ``size`` is the most rows of a batch.
    """

    def __init__(
        self,
        clock: IReactorTime,
        submit: Callable[[Callable[[], Callable[[Any], list[Outcome]] | None]], Deferred[list[Outcome] | None]],
        write: Callable[[Any, list[Request | Release], list[tuple[str, int]]], list[Outcome]],
        metrics: Metrics,
        delay: float,
        size: int = BATCH,
    ) -> None:
        self._clock = clock
        self._submit = submit
        self._write = write
        self._metrics = metrics
        self._delay = delay
        self._size = size
        self._queue: dict[Request | Release, None] = {}
        self._releases: dict[tuple[str, int], Release] = {}
        self._batch: list[Request | Release] = []
        self._tried: list[tuple[str, int]] = []
        self._timer: IDelayedCall | None = None
        self._sent = False
        self._failures = 0
        self._closed: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._queue) + len(self._batch)

    def request(
        self,
        client_id: str,
        address: str,
        generation: int | None = None,
        over: int | None = None,
        judge: bool = False,
    ) -> Deferred[Any]:
        """Queue a claim, or a reclaim of ``generation``."""
        if self._closed is not None:
            return fail(RegistryUnavailable("the registry is closed"))

        def cancel(_: Deferred[Any]) -> None:
            if request in self._queue:
                del self._queue[request]
            else:
                request.abandoned = True

        request = Request(client_id, address, generation, Deferred(cancel), False, over, judge)
        self._queue[request] = None
        self._schedule(self._delay)
        return request.deferred

    def release(self, client_id: str, generation: int) -> Deferred[None]:
        """Queue a release; once for each generation of a client."""
        if self._closed is not None:
            return fail(RegistryUnavailable("the registry is closed"))
        away = bool(self._failures and self._queue)
        release = self._releases.get((client_id, generation))
        if release is None:
            release = self._releases[client_id, generation] = Release(client_id, generation)
            self._queue[release] = None
        if away:
            return fail(RegistryUnavailable("the registry is away; the release is queued"))
        deferred: Deferred[None] = Deferred(release.waiting.remove)
        release.waiting.append(deferred)
        self._schedule(self._delay)
        return deferred

    def back(self) -> None:
        """The database was heard of: try at once what is queued."""
        if self._failures:
            self._failures = 0
            self._schedule(0.0)

    def close(self) -> Deferred[None]:
        """Fail the claims that wait, and write the releases: until none is left, or until the first failure."""
        if self._closed is None:
            self._closed = Deferred()
            self._fail_requests([each for each in self._queue if isinstance(each, Request)], "the registry is closed")
            if not self._sent:
                self._send()
        return self._closed

    def _schedule(self, delay: float) -> None:
        if self._sent or not self._queue:
            return
        if len(self._queue) >= self._size and not self._failures:
            delay = 0.0
        if self._timer is None:
            self._timer = self._clock.callLater(delay, self._send)
        elif self._timer.getTime() > self._clock.seconds() + delay:
            self._timer.reset(delay)

    def _send(self) -> None:
        if self._timer is not None:
            if self._timer.active():
                self._timer.cancel()
            self._timer = None
        if self._queue:
            self._sent = True
            self._submit(self._compose).addCallbacks(self._took, self._failed)
        elif self._closed is not None and not self._closed.called:
            self._closed.callback(None)

    def _compose(self) -> Callable[[Any], list[Outcome]] | None:
        """Take the next batch off the queue, as work for a thread; ``None`` when all of it was cancelled."""
        batch = self._batch = list(islice(self._queue, self._size))
        tried = self._tried = []
        for each in batch:
            del self._queue[each]
            if isinstance(each, Release):
                del self._releases[each.client_id, each.generation]
        if not batch:
            return None
        return lambda connection: self._write(connection, batch, tried)

    def _took(self, outcomes: list[Outcome] | None) -> None:
        batch, self._batch = self._batch, []
        self._failures = 0
        self._metrics.registry_batches += bool(batch)
        for each, outcome in zip(batch, outcomes or (), strict=True):
            if isinstance(each, Release):
                self._metrics.releases += 1
                while each.waiting:
                    each.waiting.pop(0).callback(None)
            else:
                self._finish(each, outcome)
        self._sent = False
        self._send()

    def _finish(self, request: Request, outcome: Outcome) -> None:
        if isinstance(outcome, Claim):
            self._metrics.claims += 1
        if not request.abandoned:
            if isinstance(outcome, Exception):
                request.deferred.errback(outcome)
            else:
                request.deferred.callback(outcome)
        elif isinstance(outcome, Claim) and request.generation is None:
            self._requeue([Release(request.client_id, outcome.generation)])

    def _failed(self, failure: Failure) -> None:
        """The database did not take the batch: all claims fail, and releases stay queued."""
        batch, self._batch = self._batch, []
        self._failures += 1
        self._sent = False
        problem = failure.getErrorMessage()
        # What was perhaps written after all must not stay, since nobody will know of it.
        doubtful = [Release(client_id, generation) for client_id, generation in self._tried]
        releases = [each for each in batch if isinstance(each, Release)]
        self._requeue(releases + doubtful)
        self._fail_requests([each for each in [*batch, *self._queue] if isinstance(each, Request)], problem)
        for release in list(self._releases.values()):
            while release.waiting:
                release.waiting.pop(0).errback(RegistryUnavailable(f"{problem}; the release is queued"))
        if self._closed is None:
            self._schedule(min(FIRST_PAUSE * 2 ** min(self._failures - 1, 16), LONGEST_PAUSE))
        elif not self._sent and not self._closed.called:
            # Else it was closed just now, by who was told of the failure.
            self._closed.callback(None)

    def _requeue(self, releases: list[Release]) -> None:
        for each in releases:
            queued = self._releases.setdefault((each.client_id, each.generation), each)
            if queued is each:
                self._queue[each] = None
            else:
                queued.waiting += each.waiting

    def _fail_requests(self, requests: list[Request], problem: str) -> None:
        for each in requests:
            self._queue.pop(each, None)
        for each in requests:
            if not each.abandoned:
                each.deferred.errback(RegistryUnavailable(problem))
