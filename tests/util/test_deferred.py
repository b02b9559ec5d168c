"""Several that wait for one thing."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from gateway.util.deferred import Observers, detached


class DetachedTests(SynchronousTestCase):
    def test_result(self) -> None:
        source: Deferred[int] = Deferred()
        copies = [detached(source), detached(source)]
        self.assertNoResult(copies[0])
        source.callback(7)
        self.assertEqual([self.successResultOf(deferred) for deferred in (*copies, detached(source), source)], [7] * 4)

    def test_failure(self) -> None:
        source: Deferred[int] = Deferred()
        copy = detached(source)
        source.errback(KeyError("x"))
        self.failureResultOf(copy, KeyError)
        self.failureResultOf(source, KeyError)

    def test_cancelling_a_copy_only(self) -> None:
        source: Deferred[int] = Deferred(lambda _: self.fail("cancelled"))
        copy = detached(source)
        copy.cancel()
        self.failureResultOf(copy, CancelledError)
        source.callback(7)
        self.assertEqual(self.successResultOf(source), 7)


class ObserversTests(SynchronousTestCase):
    def test_all_fire_once(self) -> None:
        waiters: Observers[int] = Observers()
        first, second = waiters.observe(), waiters.observe()
        self.assertNoResult(first)
        waiters.callback(7)
        waiters.callback(8)
        self.assertEqual([self.successResultOf(first), self.successResultOf(second)], [7, 7])

    def test_all_fail(self) -> None:
        waiters: Observers[int] = Observers()
        first = waiters.observe()
        waiters.errback(KeyError("x"))
        self.failureResultOf(first, KeyError)

    def test_one_that_waits_again_waits_for_the_next(self) -> None:
        waiters: Observers[int] = Observers()
        again: list[object] = []
        waiters.observe().addCallback(lambda _: again.append(waiters.observe()))
        waiters.callback(1)
        self.assertNoResult(again[0])  # type: ignore[arg-type]

    def test_cancel(self) -> None:
        waiters: Observers[int] = Observers()
        first, second = waiters.observe(), waiters.observe()
        first.cancel()
        self.failureResultOf(first, CancelledError)
        waiters.callback(1)
        self.assertEqual(self.successResultOf(second), 1)

    def test_cancelled_by_another_that_fires(self) -> None:
        waiters: Observers[int] = Observers()
        first = waiters.observe()
        second = waiters.observe()
        first.addCallback(lambda _: second.cancel())
        waiters.callback(1)
        self.failureResultOf(second, CancelledError)
