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

A batch that the database refuses is divided (see :mod:`division <gateway.registry.division>`): a claim that is refused
alone fails alone; a release is set aside, and retried apart from the others. Meanwhile the batch stays in flight, so
the requests of one client keep their order.

Lookups that wait for the connection are sent as one statement.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

import attrs
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.metrics import Metrics
from gateway.registry.claims import ClaimRequest, Outcome, ReleaseRequest
from gateway.registry.division import BatchLimit, Division
from gateway.registry.errors import RegistryRefusedError, RegistryUnavailableError
from gateway.registry.interface import (
    ALWAYS_TAKE_OVER,
    Claim,
    ClaimPolicy,
    OnClaimRevoked,
    SessionKey,
    ignore_claim_revoked,
)
from gateway.util.backoff import Backoff
from gateway.util.log import LogLimiter

#: client_ids in one statement
MAX_LOOKUP_BATCH_SIZE = 200
#: default maximum of requests in one batch; MySQL sets its own in mysql.py
MAX_BATCH_SIZE = 200
#: seconds before the first retry while the database cannot be reached
INITIAL_BACKOFF = 0.1
#: seconds between retries, at most
MAX_BACKOFF = 5.0
#: seconds before the first retry of releases that were refused, and between retries, at most
INITIAL_REFUSED_BACKOFF = 1.0
MAX_REFUSED_BACKOFF = 60.0
#: releases that were refused; beyond that, the oldest is given up
MAX_REFUSED_RELEASES = 20_000
#: seconds between two log lines
LOG_INTERVAL = 10.0

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
        #: what was taken from ``_waiters``, in one or more parts
        self._in_flight: dict[str, list[Deferred[T | None]]] = {}
        self._part: list[str] = []
        self._division: Division[str] = Division()
        self._limit = BatchLimit(MAX_LOOKUP_BATCH_SIZE)
        self._submitted = False

    def find(self, client_id: str) -> Deferred[T | None]:
        """Look up a client; fires with ``None`` if there is nothing. Fails with ``RegistryUnavailableError``."""
        waiters = self._waiters.setdefault(client_id, [])
        deferred: Deferred[T | None] = Deferred(waiters.remove)
        waiters.append(deferred)
        self._submit_next()
        return deferred

    def _submit_next(self) -> None:
        if not self._submitted and (self._in_flight or self._waiters):
            self._submitted = True
            self._submit(self._next_query).addCallbacks(self._succeeded, self._failed)

    def _next_query(self) -> Callable[[Any], dict[str, T]]:
        part = self._division.next_part()
        if part is None:
            part = list(islice(self._waiters, self._limit.value))
            self._in_flight = {client_id: self._waiters.pop(client_id) for client_id in part}
        self._part = client_ids = part
        return lambda connection: self._find(connection, client_ids)

    def _take_part(self) -> list[list[Deferred[T | None]]]:
        """Take the lookups of the part that was tried."""
        self._submitted = False
        part, self._part = self._part, []
        return [self._in_flight.pop(client_id) for client_id in part]

    def _succeeded(self, found: dict[str, T] | None) -> None:
        self._limit.accepted()
        self._division.accepted()
        for client_id, waiters in zip(self._part, self._take_part(), strict=True):
            while waiters:
                waiters.pop(0).callback((found or {}).get(client_id))
        self._submit_next()

    def _failed(self, failure: Failure) -> None:
        part = self._part
        if part and failure.check(RegistryRefusedError):
            self._limit.refused(len(part))
            if self._division.refused(part):
                if len(part) > 1:
                    self._submitted, self._part = False, []
                else:
                    _fail_lookups(self._take_part(), RegistryRefusedError, failure.getErrorMessage())
                self._submit_next()
                return
        # The queued lookups fail too: they would wait as long, for the same error.
        failed = [*self._in_flight.values(), *self._waiters.values()]
        self._in_flight, self._waiters, self._part, self._division = {}, {}, [], Division()
        self._submitted = False
        _fail_lookups(failed, RegistryUnavailableError, failure.getErrorMessage())


def _fail_lookups(lookups: list[list[Deferred[T | None]]], error_class: type[Exception], problem: str) -> None:
    for waiters in lookups:
        while waiters:
            waiters.pop(0).errback(error_class(problem))


#: writes a batch with a DB-API connection; run in a thread
BatchWork = Callable[[Any], list[Outcome]]
#: ``submit(make_work)`` queues a job; ``make_work()`` is called when the job starts, and returns the function to run in
#: the thread, or ``None`` if there is nothing to do
SubmitBatch = Callable[[Callable[[], BatchWork | None]], Deferred[list[Outcome] | None]]


Request = ClaimRequest | ReleaseRequest


@attrs.define(eq=False)
class _InFlight:
    """A batch in flight. Its requests are taken from the queue when its job is started.

    If it is refused, it goes on in parts, on the same connection, and all of its clients stay in flight.
    """

    submit: SubmitBatch
    #: the requests that are written now: at first all of them
    part: list[Request] = attrs.field(factory=list)
    division: Division[Request] = attrs.field(factory=Division)
    client_ids: list[str] = attrs.field(factory=list)
    #: claims that may have been written even if the batch fails
    maybe_written: list[SessionKey] = attrs.field(factory=list)
    #: whether it consists of releases that were refused before
    retries_refused: bool = False


class _RefusedReleases:
    """Releases that the database has refused. ``retry`` is called when they are due."""

    _log = Logger()

    def __init__(self, clock: IReactorTime, retry: Callable[[], None]) -> None:
        self._clock = clock
        self._retry = retry
        self._releases: dict[SessionKey, ReleaseRequest] = {}
        self._backoff = Backoff(INITIAL_REFUSED_BACKOFF, MAX_REFUSED_BACKOFF)
        self._timer: IDelayedCall | None = None
        self._log_limiter = LogLimiter(clock.seconds, LOG_INTERVAL)
        self._is_due = False

    def __len__(self) -> int:
        return len(self._releases)

    def __contains__(self, key: SessionKey) -> bool:
        return key in self._releases

    @property
    def is_due(self) -> bool:
        """Whether it is time to try them again."""
        return self._is_due and bool(self._releases)

    def add(self, release: ReleaseRequest) -> None:
        """Keep a release for a later try."""
        self._releases[release.key] = release
        if len(self._releases) > MAX_REFUSED_RELEASES:
            self._give_up(next(iter(self._releases)))
        self.schedule()

    def _give_up(self, key: SessionKey) -> None:
        del self._releases[key]
        count = self._log_limiter.allow()
        if count is not None:
            more = f" ({count} more since the last such line)" if count else ""
            self._log.error(
                "registry: more than {maximum} releases are refused: the row of {client_id!r} stays{more}",
                maximum=MAX_REFUSED_RELEASES,
                client_id=key.client_id,
                more=more,
            )

    def schedule(self) -> None:
        """Try again later, if there is anything to try."""
        if self._releases and self._timer is None and not self._is_due:
            self._timer = self._clock.callLater(self._backoff.next_delay(), self._on_due)

    def _on_due(self) -> None:
        self._timer = None
        self._is_due = True
        self._retry()

    def succeeded(self) -> None:
        """Note that some were accepted."""
        self._backoff.reset()

    def pop(self, key: SessionKey) -> ReleaseRequest | None:
        """Take one, if it is here."""
        return self._releases.pop(key, None)

    def take(self, limit: int, busy: Collection[str]) -> list[ReleaseRequest]:
        """Take up to ``limit`` releases of clients that are not busy."""
        self._is_due = False
        releases = list(islice((each for each in self._releases.values() if each.client_id not in busy), limit))
        for release in releases:
            del self._releases[release.key]
        return releases

    def close(self) -> list[ReleaseRequest]:
        """Take them all, for the last try."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return self.take(len(self._releases), ())


class WriteBatcher:
    """Queue the claims and releases of this node, and write them in batches.

    ``submit`` and ``other_submits`` queue a job on one connection each, and fire with the result of its function, which
    calls ``write(connection, batch, maybe_written)`` in a thread. ``write`` appends to ``maybe_written`` the key of
    each claim that may have been written even if it raises; it may be run again with the same list. ``delay`` is in
    seconds, ``max_batch_size`` in requests.
    """

    _log = Logger()

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
        self._write = write
        self._metrics = metrics
        self._delay = delay
        self._limit = BatchLimit(max_batch_size)
        self._on_claim_revoked = on_claim_revoked
        self._queue: dict[ClaimRequest | ReleaseRequest, None] = {}
        self._releases: dict[SessionKey, ReleaseRequest] = {}
        self._refused = _RefusedReleases(clock, self._send)
        self._in_flight: list[_InFlight] = []
        #: clients of the batches in flight
        self._clients_in_flight: set[str] = set()
        self._timer: IDelayedCall | None = None
        self._backoff = Backoff(INITIAL_BACKOFF, MAX_BACKOFF)
        self._closed: Deferred[None] | None = None
        self._log_limiter = LogLimiter(clock.seconds, LOG_INTERVAL)

    def __len__(self) -> int:
        in_flight = sum(len(each.part) + len(list(each.division)) for each in self._in_flight)
        return len(self._queue) + len(self._refused) + in_flight

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
        queued; with ``RegistryRefusedError`` if the database refuses this release."""
        if self._closed is not None:
            return fail(RegistryUnavailableError("the registry is closed"))
        unavailable = bool(self._backoff.failures and self._queue)
        release = self._releases.get(key)
        if release is None:
            release = self._releases[key] = self._refused.pop(key) or ReleaseRequest(key)
            self._queue[release] = None
        if unavailable:
            return fail(RegistryUnavailableError("the registry cannot be reached; the release is queued"))
        deferred: Deferred[None] = Deferred(release.waiters.remove)
        release.waiters.append(deferred)
        self._schedule(self._delay)
        return deferred

    def is_writing(self, key: SessionKey) -> bool:
        """Whether a release of this claim is queued, or any request of its client is in flight. Claims that are queued
        do not count."""
        return key in self._releases or key.client_id in self._clients_in_flight or key in self._refused

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
            self._requeue(self._refused.close())
            if not self._in_flight:
                self._send()
        return self._closed

    def _schedule(self, delay: float) -> None:
        if not self._idle_submits or not self._queue:
            return
        if len(self._queue) >= self._limit.value and not self._backoff.failures:
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
            self._submit(in_flight, self._take_batch)
        if self._closed is not None and not self._in_flight and not self._closed.called:
            self._closed.callback(None)

    def _submit(self, in_flight: _InFlight, make_work: Callable[[_InFlight], BatchWork | None]) -> None:
        in_flight.submit(partial(make_work, in_flight)).addCallbacks(
            self._part_succeeded, self._part_failed, callbackArgs=(in_flight,), errbackArgs=(in_flight,)
        )

    def _has_sendable(self) -> bool:
        if self._refused.is_due:
            return True
        if not self._clients_in_flight:
            return bool(self._queue)
        return any(request.client_id not in self._clients_in_flight for request in self._queue)

    def _take_batch(self, in_flight: _InFlight) -> BatchWork | None:
        """Take the next batch off the queue, as work for a thread; ``None`` if all of it was cancelled."""
        if self._refused.is_due:
            in_flight.retries_refused = True
            in_flight.part = [*self._refused.take(self._limit.value, self._clients_in_flight)]
        else:
            in_flight.part = self._take_queued()
        in_flight.client_ids = [request.client_id for request in in_flight.part]
        self._clients_in_flight.update(in_flight.client_ids)
        return self._make_work(in_flight) if in_flight.part else None

    def _take_queued(self) -> list[Request]:
        queue = (
            (request for request in self._queue if request.client_id not in self._clients_in_flight)
            if self._clients_in_flight
            else self._queue
        )
        batch = list(islice(queue, self._limit.value))
        for request in batch:
            del self._queue[request]
            if isinstance(request, ReleaseRequest):
                del self._releases[request.key]
        return batch

    def _make_work(self, in_flight: _InFlight) -> BatchWork:
        part, maybe_written = in_flight.part, in_flight.maybe_written
        return lambda connection: self._write(connection, part, maybe_written)

    def _remove_in_flight(self, in_flight: _InFlight) -> None:
        self._in_flight.remove(in_flight)
        self._idle_submits.append(in_flight.submit)
        self._clients_in_flight.difference_update(in_flight.client_ids)
        self._refused.schedule()

    def _part_succeeded(self, outcomes: list[Outcome] | None, in_flight: _InFlight) -> None:
        part = in_flight.part
        self._backoff.reset()
        self._limit.accepted()
        in_flight.division.accepted()
        if in_flight.retries_refused and part:
            self._refused.succeeded()
        self._metrics.registry_batches += bool(part)
        if in_flight.maybe_written and in_flight.division:
            written = {request.client_id for request in part}
            in_flight.maybe_written = [key for key in in_flight.maybe_written if key.client_id not in written]
        for request, outcome in zip(part, outcomes or (), strict=True):
            if isinstance(request, ReleaseRequest):
                self._metrics.releases += 1
                while request.waiters:
                    request.waiters.pop(0).callback(None)
                if request.revokes_claim:
                    self._on_claim_revoked(request.key, request.previous_owner)
            else:
                self._complete_claim(request, outcome)
        self._submit_next_part(in_flight)

    def _submit_next_part(self, in_flight: _InFlight) -> None:
        """Write the next part of the batch, or, if it is complete, the next batch."""
        in_flight.part = in_flight.division.next_part() or []
        if in_flight.part:
            self._submit(in_flight, self._make_work)
        else:
            self._remove_in_flight(in_flight)
            self._send()

    def _part_failed(self, failure: Failure, in_flight: _InFlight) -> None:
        part = in_flight.part
        if not part or not failure.check(RegistryRefusedError):
            self._batch_failed(failure, in_flight)
            return
        self._limit.refused(len(part))
        if not in_flight.division.refused(part):
            self._batch_failed(failure, in_flight)
            return
        if len(part) == 1:
            self._refuse(part[0], in_flight, failure.getErrorMessage())
        self._submit_next_part(in_flight)

    def _refuse(self, request: Request, in_flight: _InFlight, problem: str) -> None:
        """Fail a request that was refused alone, and set it aside if it is a release."""
        client_id = request.client_id
        self._log_refusal(request, problem)
        if all(other.client_id != client_id for other in in_flight.division):
            # Otherwise a later part settles them.
            keys = [key for key in in_flight.maybe_written if key.client_id == client_id]
            in_flight.maybe_written = [key for key in in_flight.maybe_written if key.client_id != client_id]
            self._requeue(_make_revocations(keys, [request]))
        if isinstance(request, ClaimRequest):
            if not request.abandoned:
                request.deferred.errback(RegistryRefusedError(problem))
        else:
            waiters, request.waiters = request.waiters, []
            self._set_aside(request)
            while waiters:
                waiters.pop(0).errback(RegistryRefusedError(f"{problem}; the release is queued"))

    def _set_aside(self, release: ReleaseRequest) -> None:
        # Closing waits for no more tries.
        if self._closed is None:
            self._refused.add(release)

    def _log_refusal(self, request: Request, problem: str) -> None:
        count = self._log_limiter.allow()
        if count is not None:
            self._log.warn(
                "registry: the {what} of client {client_id!r} was refused: {problem}{more}",
                what="claim" if isinstance(request, ClaimRequest) else "release",
                client_id=request.client_id,
                problem=problem,
                more=f" ({count} more since the last such line)" if count else "",
            )

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
        batch = [*in_flight.part, *in_flight.division.take_all()]
        problem = failure.getErrorMessage()
        if in_flight.retries_refused:
            for request in batch:
                if isinstance(request, ReleaseRequest):
                    self._set_aside(request)
            if failure.check(RegistryRefusedError):
                # That says nothing about other requests.
                self._remove_in_flight(in_flight)
                self._send()
                return
            batch = []
        self._remove_in_flight(in_flight)
        delay = self._backoff.next_delay()
        # Claims that were written after all must not stay: they have failed, so no connection would release them.
        revocations = _make_revocations(in_flight.maybe_written, batch)
        self._requeue([request for request in batch if isinstance(request, ReleaseRequest)] + revocations)
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


def _make_revocations(keys: list[SessionKey], batch: list[Request]) -> list[ReleaseRequest]:
    """Make the releases of claims of a batch that may have been written."""
    previous_owners = {
        request.client_id: request.previous_owner
        for request in batch
        if isinstance(request, ClaimRequest) and request.previous_owner
    }
    return [ReleaseRequest(key, revokes_claim=True, previous_owner=previous_owners.get(key.client_id)) for key in keys]
