"""Work for a name service that is done again until it succeeds, with pauses that grow."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.cloud.interface import NameServiceError
from gateway.telemetry.metrics import Metrics

#: seconds: the first pause after a failure, and the longest; each is twice the one before
FIRST, LONGEST = 1.0, 60.0
#: the same for a service that asks to be asked less often
FIRST_THROTTLED, LONGEST_THROTTLED = 4.0, 300.0


class Chore:
    """One kind of work, of which one piece is under way at a time.

    ``work`` does all that is due; ``what`` says in log lines what fails. ``uniform`` is that of :mod:`random`.
    """

    _log = Logger()

    def __init__(
        self,
        what: str,
        work: Callable[[], Coroutine[Deferred[Any], Any, None]],
        clock: IReactorTime,
        metrics: Metrics,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._what = what
        self._work = work
        self._clock = clock
        self._metrics = metrics
        self._uniform = uniform
        self._due = math.inf
        #: not before this, after a failure
        self._pause_ends = -math.inf
        self._timer: IDelayedCall | None = None
        self._running: Deferred[None] | None = None
        #: of those who wait for the end of the next piece of work
        self._waiters: list[Deferred[None]] = []
        self._failures = 0
        self._failing_since = 0.0
        self._problem = ""
        self._stopped = False

    def within(self, seconds: float) -> None:
        """Have it done in so many seconds, or before; but not before the pause after a failure is over."""
        self._due = min(self._due, self._clock.seconds() + seconds)
        self._schedule()

    def now(self) -> Deferred[None]:
        """Have it done at once, even in a pause, or as soon as what is under way is over; fires when it is done or has
        failed, and does not fail."""
        waiter: Deferred[None] = Deferred()
        if self._stopped:
            waiter.callback(None)
            return waiter
        self._waiters.append(waiter)
        self._pause_ends = -math.inf
        self.within(0)
        return waiter

    def stop(self) -> Deferred[None]:
        """Begin nothing more; fires when what is under way is over."""
        self._stopped = True
        self._schedule()
        over: Deferred[None] = Deferred()
        if self._running is None:
            over.callback(None)
        else:
            self._running.addCallback(lambda _: over.callback(None))
        return over

    def _schedule(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        if self._stopped:
            self._release(self._waiters)
        elif self._running is None and self._due < math.inf:
            pause = max(self._due, self._pause_ends) - self._clock.seconds()
            self._timer = self._clock.callLater(max(0.0, pause), self._run)

    def _run(self) -> None:
        waiters, self._waiters = self._waiters, []
        self._due = math.inf
        self._running = Deferred()
        working = Deferred.fromCoroutine(self._work()).addCallbacks(self._succeeded, self._failed)
        working.addErrback(lambda failure: self._log.failure("error in a chore", failure))
        working.addCallback(self._over, waiters)

    def _over(self, _: object, waiters: list[Deferred[None]]) -> None:
        running, self._running = self._running, None
        self._schedule()
        self._release(waiters)
        assert running is not None
        running.callback(None)

    def _release(self, waiters: list[Deferred[None]]) -> None:
        while waiters:
            waiters.pop().callback(None)

    def _succeeded(self, _: object) -> None:
        if self._failures:
            away = self._clock.seconds() - self._failing_since
            self._log.info("{what} works again, after {away:.0f} s", what=self._what, away=away)
        self._failures = 0
        self._problem = ""

    def _failed(self, failure: Failure) -> None:
        error = failure.value
        throttled = isinstance(error, NameServiceError) and error.throttled
        hopeless = isinstance(error, NameServiceError) and error.hopeless
        now = self._clock.seconds()
        if not self._failures:
            self._failing_since = now
        self._metrics.dns_failures += 1
        self._failures += 1
        first, longest = (FIRST_THROTTLED, LONGEST_THROTTLED) if throttled else (FIRST, LONGEST)
        pause = longest if hopeless else min(longest, first * 2.0 ** min(self._failures - 1, 16))
        # Not all nodes of a fleet at the same moment.
        pause *= self._uniform(0.5, 1.0)
        # Whoever wants it now gets one try at once, and not each.
        self._pause_ends = now + pause if not self._waiters else -math.inf
        self._due = min(self._due, now + pause)
        problem = str(error) or type(error).__name__
        if problem != self._problem:
            self._problem = problem
            if not isinstance(error, NameServiceError):
                self._log.failure("error in {what}", failure, what=self._what)
            elif hopeless:
                self._log.error("{what} fails: {problem}", what=self._what, problem=problem)
            else:
                self._log.warn("{what} fails, and is tried again: {problem}", what=self._what, problem=problem)
