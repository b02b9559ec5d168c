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
from gateway.registry.claims import Outcome, Release, Request
from gateway.registry.interface import Claim, Location, RegistryUnavailable

#: the most client_ids of one statement
MOST = 200

T = TypeVar("T")


class LookUps(Generic[T]):
    """``submit`` is given a callable that makes the next statement when its turn has come; ``find`` carries it out in
    a thread: what was found, by client_id."""

    def __init__(
        self,
        submit: Callable[[Callable[[], Callable[[Any], dict[str, T]]]], Deferred[dict[str, T] | None]],
        find: Callable[[Any, list[str]], dict[str, T]],
    ) -> None:
        self._submit = submit
        self._find = find
        self._waiting: dict[str, list[Deferred[T | None]]] = {}
        self._taken: dict[str, list[Deferred[T | None]]] = {}
        self._submitted = False

    def find(self, client_id: str) -> Deferred[T | None]:
        """What there is of a client, or ``None``."""
        waiting = self._waiting.setdefault(client_id, [])
        deferred: Deferred[T | None] = Deferred(waiting.remove)
        waiting.append(deferred)
        self._next()
        return deferred

    def _next(self) -> None:
        if self._waiting and not self._submitted:
            self._submitted = True
            self._submit(self._compose).addCallbacks(self._found, self._failed)

    def _compose(self) -> Callable[[Any], dict[str, T]]:
        asked = list(islice(self._waiting, MOST))
        self._taken = {client_id: self._waiting.pop(client_id) for client_id in asked}
        return lambda connection: self._find(connection, asked)

    def _found(self, found: dict[str, T] | None) -> None:
        taken, self._taken = self._taken, {}
        self._submitted = False
        for client_id, waiting in taken.items():
            while waiting:
                waiting.pop(0).callback((found or {}).get(client_id))
        self._next()

    def _failed(self, failure: Failure) -> None:
        # Whoever is behind them would wait as long for the same answer.
        waiting = [*self._taken.values(), *self._waiting.values()]
        self._taken, self._waiting = {}, {}
        self._submitted = False
        for each in waiting:
            while each:
                each.pop(0).errback(RegistryUnavailable(failure.getErrorMessage()))


#: the most rows of a batch, if nobody says otherwise
BATCH = 200
#: seconds between tries while the database is away: the first pause, and the longest
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


Work = Callable[[Any], list[Outcome]]
#: carries out the work that it is given the maker of, when its turn has come
Submit = Callable[[Callable[[], Work | None]], Deferred[list[Outcome] | None]]


@attrs.define(eq=False)
class _Flight:
    """A batch that is on its way, or is made when its turn has come."""

    submit: Submit
    batch: list[Request | Release] = attrs.field(factory=list)
    #: what may be in although it fails
    tried: list[tuple[str, int]] = attrs.field(factory=list)


class Batches:
    """The queue of claims and releases of one node.

    ``submit`` is given a callable that makes the next batch when its turn has come, and fires with what the batch's
    work returned; the work is ``write(connection, batch, tried)``, carried out in a thread, where ``tried`` takes the
    client_id and generation of each claim that may have been written even if the work fails. Work that fails may be
    carried out again, with the same ``tried``. ``delay`` is in seconds; ``size`` is the most rows of a batch;
    ``others`` are as ``submit``, of further connections.
    """

    #: Told of a claim that nobody waited for, or of which it was not known whether it is in, once there is certainly no
    #: row of it any more: the client, its generation, and whom it was made over. An older connection of the client,
    #: here or there, is to be claimed again.
    taken_back: Callable[[str, int, Location | None], None] = staticmethod(lambda client_id, generation, before: None)

    def __init__(
        self,
        clock: IReactorTime,
        submit: Submit,
        write: Callable[[Any, list[Request | Release], list[tuple[str, int]]], list[Outcome]],
        metrics: Metrics,
        delay: float,
        size: int = BATCH,
        others: Sequence[Submit] = (),
    ) -> None:
        self._clock = clock
        self._free = [submit, *others]
        self._several = bool(others)
        self._write = write
        self._metrics = metrics
        self._delay = delay
        self._size = size
        self._queue: dict[Request | Release, None] = {}
        self._releases: dict[tuple[str, int], Release] = {}
        self._flights: list[_Flight] = []
        #: the clients of the batches that are on their way, where there may be several
        self._busy: set[str] = set()
        self._timer: IDelayedCall | None = None
        self._failures = 0
        self._closed: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._queue) + sum(len(flight.batch) for flight in self._flights)

    def request(
        self,
        client_id: str,
        address: str,
        generation: int | None = None,
        over: int | None = None,
        judge: bool = False,
        placed: bool = False,
    ) -> Deferred[Any]:
        """Queue a claim, or a reclaim of ``generation``."""
        if self._closed is not None:
            return fail(RegistryUnavailable("the registry is closed"))

        def cancel(_: Deferred[Any]) -> None:
            if request in self._queue:
                del self._queue[request]
            else:
                request.abandoned = True

        request = Request(client_id, address, generation, Deferred(cancel), False, over, judge, placed)
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
            if not self._flights:
                self._send()
        return self._closed

    def _schedule(self, delay: float) -> None:
        if not self._free or not self._queue:
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
        failures = self._failures
        # One that fails at once is tried again after a pause.
        while self._free and self._has_ready() and self._failures <= failures:
            flight = _Flight(self._free.pop())
            self._flights.append(flight)
            sent = flight.submit(partial(self._compose, flight))
            sent.addCallbacks(self._took, self._failed, callbackArgs=(flight,), errbackArgs=(flight,))
        if self._closed is not None and not self._flights and not self._closed.called:
            self._closed.callback(None)

    def _has_ready(self) -> bool:
        if not self._busy:
            return bool(self._queue)
        return any(each.client_id not in self._busy for each in self._queue)

    def _compose(self, flight: _Flight) -> Work | None:
        """Take the next batch off the queue, as work for a thread; ``None`` when all of it was cancelled."""
        queue = (each for each in self._queue if each.client_id not in self._busy) if self._busy else self._queue
        batch = flight.batch = list(islice(queue, self._size))
        for each in batch:
            del self._queue[each]
            if isinstance(each, Release):
                del self._releases[each.client_id, each.generation]
        if self._several:
            self._busy.update([each.client_id for each in batch])
        if not batch:
            return None
        return lambda connection: self._write(connection, batch, flight.tried)

    def _land(self, flight: _Flight) -> None:
        self._flights.remove(flight)
        self._free.append(flight.submit)
        if self._several:
            self._busy.difference_update([each.client_id for each in flight.batch])

    def _took(self, outcomes: list[Outcome] | None, flight: _Flight) -> None:
        batch = flight.batch
        self._failures = 0
        self._metrics.registry_batches += bool(batch)
        for each, outcome in zip(batch, outcomes or (), strict=True):
            if isinstance(each, Release):
                self._metrics.releases += 1
                while each.waiting:
                    each.waiting.pop(0).callback(None)
                if each.taken_back:
                    self.taken_back(each.client_id, each.generation, each.before)
            else:
                self._finish(each, outcome)
        self._land(flight)
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
            release = Release(request.client_id, outcome.generation, taken_back=True, before=outcome.before)
            self._requeue([release])

    def _failed(self, failure: Failure, flight: _Flight) -> None:
        """The database did not take the batch: all claims fail, and releases stay queued."""
        batch = flight.batch
        self._land(flight)
        self._failures += 1
        problem = failure.getErrorMessage()
        # What was perhaps written after all must not stay, since nobody will know of it.
        before = {each.client_id: each.before for each in batch if isinstance(each, Request) and each.before}
        doubtful = [
            Release(client_id, generation, taken_back=True, before=before.get(client_id))
            for client_id, generation in flight.tried
        ]
        releases = [each for each in batch if isinstance(each, Release)]
        self._requeue(releases + doubtful)
        self._fail_requests([each for each in [*batch, *self._queue] if isinstance(each, Request)], problem)
        for release in list(self._releases.values()):
            while release.waiting:
                release.waiting.pop(0).errback(RegistryUnavailable(f"{problem}; the release is queued"))
        if self._closed is None:
            self._schedule(min(FIRST_PAUSE * 2 ** min(self._failures - 1, 16), LONGEST_PAUSE))
        elif not self._flights and not self._closed.called:
            # Else it was closed just now, by who was told of the failure.
            self._closed.callback(None)

    def _requeue(self, releases: list[Release]) -> None:
        for each in releases:
            queued = self._releases.setdefault((each.client_id, each.generation), each)
            if queued is each:
                self._queue[each] = None
            else:
                queued.waiting += each.waiting
                queued.taken_back |= each.taken_back
                queued.before = queued.before or each.before

    def _fail_requests(self, requests: list[Request], problem: str) -> None:
        for each in requests:
            self._queue.pop(each, None)
        for each in requests:
            if not each.abandoned:
                each.deferred.errback(RegistryUnavailable(problem))
