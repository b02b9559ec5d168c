"""Several that wait for one thing."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.util.deferred import KeyedLocks, Observers, detached


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


class KeyedLocksTests(SynchronousTestCase):
    def test_free(self) -> None:
        clock = Clock()
        locks = KeyedLocks(clock)
        self.successResultOf(locks.acquire("x"))
        self.successResultOf(locks.acquire("y"))
        locks.release("x")
        locks.release("y")
        self.assertEqual(locks.held, {})

    def test_first_come_first_served(self) -> None:
        clock = Clock()
        locks = KeyedLocks(clock)
        locks.acquire("x")
        second, third = locks.acquire("x"), locks.acquire("x")
        locks.release("x")
        self.assertNoResult(second)
        clock.advance(0)
        self.successResultOf(second)
        self.assertNoResult(third)
        locks.release("x")
        clock.advance(0)
        self.successResultOf(third)
        locks.release("x")
        self.assertEqual(locks.held, {})

    def test_cancel(self) -> None:
        clock = Clock()
        locks = KeyedLocks(clock)
        locks.acquire("x")
        second, third = locks.acquire("x"), locks.acquire("x")
        second.cancel()
        self.failureResultOf(second, CancelledError)
        locks.release("x")
        clock.advance(0)
        self.successResultOf(third)

    def test_cancel_after_the_release(self) -> None:
        clock = Clock()
        locks = KeyedLocks(clock)
        locks.acquire("x")
        second = locks.acquire("x")
        locks.release("x")
        second.cancel()
        self.failureResultOf(second, CancelledError)
        clock.advance(0)
        self.assertEqual(locks.held, {})
