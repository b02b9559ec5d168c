"""Look-ups by client_id: those that wait for their turn go as one statement.

Claims and releases, gathered into batches.

A claim or a release waits until a few milliseconds have passed or a batch is full, whichever comes first; then its
batch is written in one transaction. On each connection one batch is on its way at a time, and what is asked for
meanwhile makes the next.

    claim, reclaim, release -> queue -> batch -> settle() inside the transaction -> one outcome for each

The requests of one client take effect in the order in which they were made: within a batch (see ``settling``), and
since no client is in two batches that are on their way. A release is asked for by the generation of its claim, and so
never before its claim's outcome is known. When a batch fails, its claims and those that wait behind it fail; releases
stay queued (at most one for each claim there ever was) and are tried again with growing pauses. What may be in the
database although its batch failed (the connection broke at the commit) is released, by its generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

import attrs
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure

from gateway.metrics import Metrics
from gateway.registry.claims import ClaimRequest, Outcome, ReleaseRequest
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Claim, OnClaimRevoked, ignore_claim_revoked

#: the most client_ids of one statement
MAX_LOOKUP_BATCH_SIZE = 200

T = TypeVar("T")


class LookupBatcher(Generic[T]):
    """``submit`` is given a callable that makes the next statement when its turn has come; ``find`` carries it out in
    a thread: what was found, by client_id."""

    def __init__(
        self,
        submit: Callable[[Callable[[], Callable[[Any], dict[str, T]]]], Deferred[dict[str, T] | None]],
        find: Callable[[Any, list[str]], dict[str, T]],
    ) -> None:
        self._submit = submit
        self._find = find
        self._waiters: dict[str, list[Deferred[T | None]]] = {}
        self._in_flight: dict[str, list[Deferred[T | None]]] = {}
        self._submitted = False

    def find(self, client_id: str) -> Deferred[T | None]:
        """What there is of a client, or ``None``."""
        waiting = self._waiters.setdefault(client_id, [])
        deferred: Deferred[T | None] = Deferred(waiting.remove)
        waiting.append(deferred)
        self._submit_next()
        return deferred

    def _submit_next(self) -> None:
        if self._waiters and not self._submitted:
            self._submitted = True
            self._submit(self._next_query).addCallbacks(self._succeeded, self._failed)

    def _next_query(self) -> Callable[[Any], dict[str, T]]:
        asked = list(islice(self._waiters, MAX_LOOKUP_BATCH_SIZE))
        self._in_flight = {client_id: self._waiters.pop(client_id) for client_id in asked}
        return lambda connection: self._find(connection, asked)

    def _succeeded(self, found: dict[str, T] | None) -> None:
        taken, self._in_flight = self._in_flight, {}
        self._submitted = False
        for client_id, waiting in taken.items():
            while waiting:
                waiting.pop(0).callback((found or {}).get(client_id))
        self._submit_next()

    def _failed(self, failure: Failure) -> None:
        # Whoever is behind them would wait as long for the same answer.
        waiting = [*self._in_flight.values(), *self._waiters.values()]
        self._in_flight, self._waiters = {}, {}
        self._submitted = False
        for each in waiting:
            while each:
                each.pop(0).errback(RegistryUnavailableError(failure.getErrorMessage()))


#: the most rows of a batch, if nobody says otherwise
MAX_BATCH_SIZE = 200
#: seconds between tries while the database is away: the first pause, and the longest
INITIAL_BACKOFF, MAX_BACKOFF = 0.1, 5.0


BatchWork = Callable[[Any], list[Outcome]]
#: carries out the work that it is given the maker of, when its turn has come
SubmitBatch = Callable[[Callable[[], BatchWork | None]], Deferred[list[Outcome] | None]]


@attrs.define(eq=False)
class _InFlight:
    """A batch that is on its way, or is made when its turn has come."""

    submit: SubmitBatch
    batch: list[ClaimRequest | ReleaseRequest] = attrs.field(factory=list)
    #: what may be in although it fails
    maybe_written: list[tuple[str, int]] = attrs.field(factory=list)


class WriteBatcher:
    """The queue of claims and releases of one node.

    ``submit`` is given a callable that makes the next batch when its turn has come, and fires with what the batch's
    work returned; the work is ``write(connection, batch, tried)``, carried out in a thread, where ``tried`` takes the
    client_id and generation of each claim that may have been written even if the work fails. Work that fails may be
    carried out again, with the same ``tried``. ``delay`` is in seconds; ``size`` is the most rows of a batch;
    ``others`` are as ``submit``, of further connections.
    """

    def __init__(
        self,
        clock: IReactorTime,
        submit: SubmitBatch,
        write: Callable[[Any, list[ClaimRequest | ReleaseRequest], list[tuple[str, int]]], list[Outcome]],
        metrics: Metrics,
        delay: float,
        max_batch_size: int = MAX_BATCH_SIZE,
        other_submits: Sequence[SubmitBatch] = (),
        on_claim_revoked: OnClaimRevoked = ignore_claim_revoked,
    ) -> None:
        self._clock = clock
        self._idle_submits = [submit, *other_submits]
        self._is_concurrent = bool(other_submits)
        self._write = write
        self._metrics = metrics
        self._delay = delay
        self._max_batch_size = max_batch_size
        self._on_claim_revoked = on_claim_revoked
        self._queue: dict[ClaimRequest | ReleaseRequest, None] = {}
        self._releases: dict[tuple[str, int], ReleaseRequest] = {}
        self._in_flight: list[_InFlight] = []
        #: the clients of the batches that are on their way, where there may be several
        self._clients_in_flight: set[str] = set()
        self._timer: IDelayedCall | None = None
        self._consecutive_failures = 0
        self._closed: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._queue) + sum(len(flight.batch) for flight in self._in_flight)

    def request(
        self,
        client_id: str,
        address: str,
        generation: int | None = None,
        takeover_up_to: int | None = None,
        ignore_expired_owner: bool = False,
        honor_assignment: bool = False,
    ) -> Deferred[Any]:
        """Queue a claim, or a reclaim of ``generation``."""
        if self._closed is not None:
            return fail(RegistryUnavailableError("the registry is closed"))

        def cancel(_: Deferred[Any]) -> None:
            if request in self._queue:
                del self._queue[request]
            else:
                request.abandoned = True

        request = ClaimRequest(
            client_id,
            address,
            generation,
            Deferred(cancel),
            False,
            takeover_up_to,
            ignore_expired_owner,
            honor_assignment,
        )
        self._queue[request] = None
        self._schedule(self._delay)
        return request.deferred

    def release(self, client_id: str, generation: int) -> Deferred[None]:
        """Queue a release; once for each generation of a client."""
        if self._closed is not None:
            return fail(RegistryUnavailableError("the registry is closed"))
        away = bool(self._consecutive_failures and self._queue)
        release = self._releases.get((client_id, generation))
        if release is None:
            release = self._releases[client_id, generation] = ReleaseRequest(client_id, generation)
            self._queue[release] = None
        if away:
            return fail(RegistryUnavailableError("the registry is away; the release is queued"))
        deferred: Deferred[None] = Deferred(release.waiters.remove)
        release.waiters.append(deferred)
        self._schedule(self._delay)
        return deferred

    def retry_now(self) -> None:
        """The database was heard of: try at once what is queued."""
        if self._consecutive_failures:
            self._consecutive_failures = 0
            self._schedule(0.0)

    def close(self) -> Deferred[None]:
        """Fail the claims that wait, and write the releases: until none is left, or until the first failure."""
        if self._closed is None:
            self._closed = Deferred()
            self._fail_requests(
                [each for each in self._queue if isinstance(each, ClaimRequest)], "the registry is closed"
            )
            if not self._in_flight:
                self._send()
        return self._closed

    def _schedule(self, delay: float) -> None:
        if not self._idle_submits or not self._queue:
            return
        if len(self._queue) >= self._max_batch_size and not self._consecutive_failures:
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
        failures = self._consecutive_failures
        # One that fails at once is tried again after a pause.
        while self._idle_submits and self._has_sendable() and self._consecutive_failures <= failures:
            flight = _InFlight(self._idle_submits.pop())
            self._in_flight.append(flight)
            sent = flight.submit(partial(self._take_batch, flight))
            sent.addCallbacks(self._batch_succeeded, self._batch_failed, callbackArgs=(flight,), errbackArgs=(flight,))
        if self._closed is not None and not self._in_flight and not self._closed.called:
            self._closed.callback(None)

    def _has_sendable(self) -> bool:
        if not self._clients_in_flight:
            return bool(self._queue)
        return any(each.client_id not in self._clients_in_flight for each in self._queue)

    def _take_batch(self, in_flight: _InFlight) -> BatchWork | None:
        """Take the next batch off the queue, as work for a thread; ``None`` when all of it was cancelled."""
        queue = (
            (each for each in self._queue if each.client_id not in self._clients_in_flight)
            if self._clients_in_flight
            else self._queue
        )
        batch = in_flight.batch = list(islice(queue, self._max_batch_size))
        for each in batch:
            del self._queue[each]
            if isinstance(each, ReleaseRequest):
                del self._releases[each.client_id, each.generation]
        if self._is_concurrent:
            self._clients_in_flight.update([each.client_id for each in batch])
        if not batch:
            return None
        return lambda connection: self._write(connection, batch, in_flight.maybe_written)

    def _remove_in_flight(self, in_flight: _InFlight) -> None:
        self._in_flight.remove(in_flight)
        self._idle_submits.append(in_flight.submit)
        if self._is_concurrent:
            self._clients_in_flight.difference_update([each.client_id for each in in_flight.batch])

    def _batch_succeeded(self, outcomes: list[Outcome] | None, in_flight: _InFlight) -> None:
        batch = in_flight.batch
        self._consecutive_failures = 0
        self._metrics.registry_batches += bool(batch)
        for each, outcome in zip(batch, outcomes or (), strict=True):
            if isinstance(each, ReleaseRequest):
                self._metrics.releases += 1
                while each.waiters:
                    each.waiters.pop(0).callback(None)
                if each.revokes_claim:
                    self._on_claim_revoked(each.client_id, each.generation, each.previous_owner)
            else:
                self._complete_request(each, outcome)
        self._remove_in_flight(in_flight)
        self._send()

    def _complete_request(self, request: ClaimRequest, outcome: Outcome) -> None:
        if isinstance(outcome, Claim):
            self._metrics.claims += 1
        if not request.abandoned:
            if isinstance(outcome, Exception):
                request.deferred.errback(outcome)
            else:
                request.deferred.callback(outcome)
        elif isinstance(outcome, Claim) and request.generation is None:
            release = ReleaseRequest(
                request.client_id, outcome.generation, revokes_claim=True, previous_owner=outcome.previous_owner
            )
            self._requeue([release])

    def _batch_failed(self, failure: Failure, in_flight: _InFlight) -> None:
        """The database did not take the batch: all claims fail, and releases stay queued."""
        batch = in_flight.batch
        self._remove_in_flight(in_flight)
        self._consecutive_failures += 1
        problem = failure.getErrorMessage()
        # What was perhaps written after all must not stay, since nobody will know of it.
        before = {
            each.client_id: each.previous_owner
            for each in batch
            if isinstance(each, ClaimRequest) and each.previous_owner
        }
        doubtful = [
            ReleaseRequest(client_id, generation, revokes_claim=True, previous_owner=before.get(client_id))
            for client_id, generation in in_flight.maybe_written
        ]
        releases = [each for each in batch if isinstance(each, ReleaseRequest)]
        self._requeue(releases + doubtful)
        self._fail_requests([each for each in [*batch, *self._queue] if isinstance(each, ClaimRequest)], problem)
        for release in list(self._releases.values()):
            while release.waiters:
                release.waiters.pop(0).errback(RegistryUnavailableError(f"{problem}; the release is queued"))
        if self._closed is None:
            self._schedule(min(INITIAL_BACKOFF * 2 ** min(self._consecutive_failures - 1, 16), MAX_BACKOFF))
        elif not self._in_flight and not self._closed.called:
            # Else it was closed just now, by who was told of the failure.
            self._closed.callback(None)

    def _requeue(self, releases: list[ReleaseRequest]) -> None:
        for each in releases:
            queued = self._releases.setdefault((each.client_id, each.generation), each)
            if queued is each:
                self._queue[each] = None
            else:
                queued.waiters += each.waiters
                queued.revokes_claim |= each.revokes_claim
                queued.previous_owner = queued.previous_owner or each.previous_owner

    def _fail_requests(self, requests: list[ClaimRequest], problem: str) -> None:
        for each in requests:
            self._queue.pop(each, None)
        for each in requests:
            if not each.abandoned:
                each.deferred.errback(RegistryUnavailableError(problem))
