"""Batch claims and releases into transactions, and lookups into statements.

A claim or a release waits for a few milliseconds or until a batch is full, whichever comes first. Then the batch is
written in one transaction. Each connection has one batch in flight at a time; requests made meanwhile form the next.

    claim, reclaim, release -> queue -> batch -> resolve() inside the transaction -> one outcome for each request

The requests of one client take effect in the order in which they were made: within a batch (see :mod:`claims
<gateway.registry.claims>`), and because no client is in two batches in flight. A release names the generation of its
claim, so it is never queued before the outcome of its claim is known.

When a batch fails, its claims and all queued claims fail. Releases stay queued (at most one for each claim) and are
retried with exponential backoff. A claim that may have been committed although its batch failed (the connection was
lost at the commit) is released by its generation.

Lookups that wait for the connection are sent as one statement.
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
from gateway.registry.interface import (
    ALWAYS_TAKE_OVER,
    Claim,
    ClaimPolicy,
    OnClaimRevoked,
    SessionKey,
    ignore_claim_revoked,
)
from gateway.util.backoff import Backoff

#: client_ids in one statement
MAX_LOOKUP_BATCH_SIZE = 200
#: default maximum of requests in one batch; MySQL sets its own in mysql.py
MAX_BATCH_SIZE = 200
#: seconds before the first retry while the database cannot be reached
INITIAL_BACKOFF = 0.1
#: seconds between retries, at most
MAX_BACKOFF = 5.0

T = TypeVar("T")


class LookupBatcher(Generic[T]):
    """Combine lookups by client_id.

    ``submit(make_work)`` queues a job; ``make_work()`` is called when the job starts, and returns the function to run
    in the thread. That function calls ``find(connection, client_ids)``, which returns the results by client_id.
    """

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
        """Look up a client; fires with ``None`` if there is nothing. Fails with ``RegistryUnavailableError``."""
        waiters = self._waiters.setdefault(client_id, [])
        deferred: Deferred[T | None] = Deferred(waiters.remove)
        waiters.append(deferred)
        self._submit_next()
        return deferred

    def _submit_next(self) -> None:
        if self._waiters and not self._submitted:
            self._submitted = True
            self._submit(self._next_query).addCallbacks(self._succeeded, self._failed)

    def _next_query(self) -> Callable[[Any], dict[str, T]]:
        client_ids = list(islice(self._waiters, MAX_LOOKUP_BATCH_SIZE))
        self._in_flight = {client_id: self._waiters.pop(client_id) for client_id in client_ids}
        return lambda connection: self._find(connection, client_ids)

    def _succeeded(self, found: dict[str, T] | None) -> None:
        done, self._in_flight = self._in_flight, {}
        self._submitted = False
        for client_id, waiters in done.items():
            while waiters:
                waiters.pop(0).callback((found or {}).get(client_id))
        self._submit_next()

    def _failed(self, failure: Failure) -> None:
        # The queued lookups fail too: they would wait as long, for the same error.
        failed = [*self._in_flight.values(), *self._waiters.values()]
        self._in_flight, self._waiters = {}, {}
        self._submitted = False
        for waiters in failed:
            while waiters:
                waiters.pop(0).errback(RegistryUnavailableError(failure.getErrorMessage()))


#: writes a batch with a DB-API connection; run in a thread
BatchWork = Callable[[Any], list[Outcome]]
#: ``submit(make_work)`` queues a job; ``make_work()`` is called when the job starts, and returns the function to run in
#: the thread, or ``None`` if there is nothing to do
SubmitBatch = Callable[[Callable[[], BatchWork | None]], Deferred[list[Outcome] | None]]


@attrs.define(eq=False)
class _InFlight:
    """A batch in flight. Its requests are taken from the queue when its job is started."""

    submit: SubmitBatch
    batch: list[ClaimRequest | ReleaseRequest] = attrs.field(factory=list)
    #: claims that may have been written even if the batch fails
    maybe_written: list[SessionKey] = attrs.field(factory=list)


class WriteBatcher:
    """Queue the claims and releases of this node, and write them in batches.

    ``submit`` and ``other_submits`` queue a job on one connection each, and fire with the result of its function, which
    calls ``write(connection, batch, maybe_written)`` in a thread. ``write`` appends to ``maybe_written`` the key of
    each claim that may have been written even if it raises; it may be run again with the same list. ``delay`` is in
    seconds, ``max_batch_size`` in requests.
    """

    def __init__(
        self,
        clock: IReactorTime,
        submit: SubmitBatch,
        write: Callable[[Any, list[ClaimRequest | ReleaseRequest], list[SessionKey]], list[Outcome]],
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
        self._releases: dict[SessionKey, ReleaseRequest] = {}
        self._in_flight: list[_InFlight] = []
        #: clients of the batches in flight; only kept if there may be several batches
        self._clients_in_flight: set[str] = set()
        self._timer: IDelayedCall | None = None
        self._backoff = Backoff(INITIAL_BACKOFF, MAX_BACKOFF)
        self._closed: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._queue) + sum(len(in_flight.batch) for in_flight in self._in_flight)

    def request(
        self,
        client_id: str,
        address: str,
        generation: int | None = None,
        policy: ClaimPolicy = ALWAYS_TAKE_OVER,
    ) -> Deferred[Any]:
        """Queue a claim, or a reclaim of ``generation``. Fails with the exceptions of
        :meth:`IRegistry.claim() <gateway.registry.interface.IRegistry.claim>`."""
        if self._closed is not None:
            return fail(RegistryUnavailableError("the registry is closed"))

        def cancel(_: Deferred[Any]) -> None:
            if request in self._queue:
                del self._queue[request]
            else:
                request.abandoned = True

        request = ClaimRequest(client_id, address, generation, Deferred(cancel), policy)
        self._queue[request] = None
        self._schedule(self._delay)
        return request.deferred

    def release(self, key: SessionKey) -> Deferred[None]:
        """Queue a release, once for each key. The Deferred fails when the next try fails, but the release stays
        queued."""
        if self._closed is not None:
            return fail(RegistryUnavailableError("the registry is closed"))
        unavailable = bool(self._backoff.failures and self._queue)
        release = self._releases.get(key)
        if release is None:
            release = self._releases[key] = ReleaseRequest(key)
            self._queue[release] = None
        if unavailable:
            return fail(RegistryUnavailableError("the registry cannot be reached; the release is queued"))
        deferred: Deferred[None] = Deferred(release.waiters.remove)
        release.waiters.append(deferred)
        self._schedule(self._delay)
        return deferred

    def retry_now(self) -> None:
        """Retry the queued requests at once, if the last batch failed. To be called when the database has answered."""
        if self._backoff.failures:
            self._backoff.reset()
            self._schedule(0.0)

    def close(self) -> Deferred[None]:
        """Fail the queued claims, and write the releases. Fires when none is left, or after the first failure."""
        if self._closed is None:
            self._closed = Deferred()
            claims = [request for request in self._queue if isinstance(request, ClaimRequest)]
            self._fail_requests(claims, "the registry is closed")
            if not self._in_flight:
                self._send()
        return self._closed

    def _schedule(self, delay: float) -> None:
        if not self._idle_submits or not self._queue:
            return
        if len(self._queue) >= self._max_batch_size and not self._backoff.failures:
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
        failures = self._backoff.failures
        # A batch that fails synchronously is retried after the backoff, not in this loop.
        while self._idle_submits and self._has_sendable() and self._backoff.failures <= failures:
            in_flight = _InFlight(self._idle_submits.pop())
            self._in_flight.append(in_flight)
            in_flight.submit(partial(self._take_batch, in_flight)).addCallbacks(
                self._batch_succeeded, self._batch_failed, callbackArgs=(in_flight,), errbackArgs=(in_flight,)
            )
        if self._closed is not None and not self._in_flight and not self._closed.called:
            self._closed.callback(None)

    def _has_sendable(self) -> bool:
        if not self._clients_in_flight:
            return bool(self._queue)
        return any(request.client_id not in self._clients_in_flight for request in self._queue)

    def _take_batch(self, in_flight: _InFlight) -> BatchWork | None:
        """Take the next batch off the queue, as work for a thread; ``None`` if all of it was cancelled."""
        queue = (
            (request for request in self._queue if request.client_id not in self._clients_in_flight)
            if self._clients_in_flight
            else self._queue
        )
        batch = in_flight.batch = list(islice(queue, self._max_batch_size))
        for request in batch:
            del self._queue[request]
            if isinstance(request, ReleaseRequest):
                del self._releases[request.key]
        if self._is_concurrent:
            self._clients_in_flight.update([request.client_id for request in batch])
        if not batch:
            return None
        return lambda connection: self._write(connection, batch, in_flight.maybe_written)

    def _remove_in_flight(self, in_flight: _InFlight) -> None:
        self._in_flight.remove(in_flight)
        self._idle_submits.append(in_flight.submit)
        if self._is_concurrent:
            self._clients_in_flight.difference_update([request.client_id for request in in_flight.batch])

    def _batch_succeeded(self, outcomes: list[Outcome] | None, in_flight: _InFlight) -> None:
        batch = in_flight.batch
        self._backoff.reset()
        self._metrics.registry_batches += bool(batch)
        for request, outcome in zip(batch, outcomes or (), strict=True):
            if isinstance(request, ReleaseRequest):
                self._metrics.releases += 1
                while request.waiters:
                    request.waiters.pop(0).callback(None)
                if request.revokes_claim:
                    self._on_claim_revoked(request.key, request.previous_owner)
            else:
                self._complete_claim(request, outcome)
        self._remove_in_flight(in_flight)
        self._send()

    def _complete_claim(self, request: ClaimRequest, outcome: Outcome) -> None:
        if isinstance(outcome, Claim):
            self._metrics.claims += 1
        if not request.abandoned:
            if isinstance(outcome, Exception):
                request.deferred.errback(outcome)
            else:
                request.deferred.callback(outcome)
        elif isinstance(outcome, Claim) and request.generation is None:
            key = SessionKey(request.client_id, outcome.generation)
            release = ReleaseRequest(key, revokes_claim=True, previous_owner=outcome.previous_owner)
            self._requeue([release])

    def _batch_failed(self, failure: Failure, in_flight: _InFlight) -> None:
        """Fail all claims; requeue the releases, and release the claims that may have been written."""
        batch = in_flight.batch
        self._remove_in_flight(in_flight)
        delay = self._backoff.next_delay()
        problem = failure.getErrorMessage()
        # Claims that were written after all must not stay: they have failed, so no connection would release them.
        previous_owners = {
            request.client_id: request.previous_owner
            for request in batch
            if isinstance(request, ClaimRequest) and request.previous_owner
        }
        maybe_written = [
            ReleaseRequest(key, revokes_claim=True, previous_owner=previous_owners.get(key.client_id))
            for key in in_flight.maybe_written
        ]
        releases = [request for request in batch if isinstance(request, ReleaseRequest)]
        self._requeue(releases + maybe_written)
        claims = [request for request in [*batch, *self._queue] if isinstance(request, ClaimRequest)]
        self._fail_requests(claims, problem)
        for release in list(self._releases.values()):
            while release.waiters:
                release.waiters.pop(0).errback(RegistryUnavailableError(f"{problem}; the release is queued"))
        if self._closed is None:
            self._schedule(delay)
        elif not self._in_flight and not self._closed.called:
            # If it has been called already, an errback above has called close().
            self._closed.callback(None)

    def _requeue(self, releases: list[ReleaseRequest]) -> None:
        for release in releases:
            queued = self._releases.setdefault(release.key, release)
            if queued is release:
                self._queue[release] = None
            else:
                queued.waiters += release.waiters
                queued.revokes_claim |= release.revokes_claim
                queued.previous_owner = queued.previous_owner or release.previous_owner

    def _fail_requests(self, requests: list[ClaimRequest], problem: str) -> None:
        for request in requests:
            self._queue.pop(request, None)
        for request in requests:
            if not request.abandoned:
                request.deferred.errback(RegistryUnavailableError(problem))
