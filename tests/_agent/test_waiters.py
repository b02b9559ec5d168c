"""Several that wait for one thing."""

from __future__ import annotations

from twisted.internet.defer import CancelledError
from twisted.trial.unittest import SynchronousTestCase

from gateway.util.deferred import Waiters


class WaitersTests(SynchronousTestCase):
    def test_all_fire_once(self) -> None:
        waiters: Waiters[int] = Waiters()
        first, second = waiters.wait(), waiters.wait()
        self.assertNoResult(first)
        waiters.fire(7)
        waiters.fire(8)
        self.assertEqual([self.successResultOf(first), self.successResultOf(second)], [7, 7])

    def test_all_fail(self) -> None:
        waiters: Waiters[int] = Waiters()
        first = waiters.wait()
        waiters.fail(KeyError("x"))
        self.failureResultOf(first, KeyError)

    def test_one_that_waits_again_waits_for_the_next(self) -> None:
        waiters: Waiters[int] = Waiters()
        again: list[object] = []
        waiters.wait().addCallback(lambda _: again.append(waiters.wait()))
        waiters.fire(1)
        self.assertNoResult(again[0])  # type: ignore[arg-type]

    def test_cancel(self) -> None:
        waiters: Waiters[int] = Waiters()
        first, second = waiters.wait(), waiters.wait()
        first.cancel()
        self.failureResultOf(first, CancelledError)
        waiters.fire(1)
        self.assertEqual(self.successResultOf(second), 1)

    def test_cancelled_by_another_that_fires(self) -> None:
        waiters: Waiters[int] = Waiters()
        first = waiters.wait()
        second = waiters.wait()
        first.addCallback(lambda _: second.cancel())
        waiters.fire(1)
        self.failureResultOf(second, CancelledError)
