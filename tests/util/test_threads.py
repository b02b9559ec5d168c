from __future__ import annotations

import threading
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.trial.unittest import TestCase

from gateway.util.threads import DaemonThreadPool


class DaemonThreadPoolTests(TestCase):
    def setUp(self) -> None:
        from twisted.internet import reactor

        self.pool = DaemonThreadPool(reactor, "tests", 2)
        self.addCleanup(self.pool.close)

    @inlineCallbacks
    def test_work_is_done_elsewhere(self) -> Any:
        thread = yield self.pool.run(threading.current_thread)
        self.assertIsNot(thread, threading.current_thread())
        # Nothing waits for it at the end of the process.
        self.assertTrue(thread.daemon)
        with self.assertRaises(ZeroDivisionError):
            yield self.pool.run(lambda: 1 // 0)

    @inlineCallbacks
    def test_close_waits_for_what_is_under_way_and_ends_the_threads(self) -> Any:
        may_end = threading.Event()
        self.addCleanup(may_end.set)
        started: Deferred[threading.Thread] = Deferred()
        thread = yield self.pool.run(threading.current_thread)
        running = self.pool.run(lambda: may_end.wait(60))
        running.chainDeferred(started)
        closed = self.pool.close()
        self.assertNoResult(closed)
        may_end.set()
        yield closed
        self.assertTrue(started.called)
        self.assertFalse(thread.is_alive())

    @inlineCallbacks
    def test_who_waits_may_give_up(self) -> Any:
        may_end = threading.Event()
        waiting = self.pool.run(lambda: may_end.wait(60))
        waiting.cancel()
        with self.assertRaises(CancelledError):
            yield waiting
        may_end.set()
        yield self.pool.close()

    @inlineCallbacks
    def test_who_waits_for_the_end_may_give_up_and_does_not_wait_then(self) -> Any:
        """To join a thread that works would stop everything."""
        may_end = threading.Event()
        self.addCleanup(may_end.set)
        running = self.pool.run(lambda: may_end.wait(60))
        closed = self.pool.close()
        closed.cancel()
        self.failureResultOf(closed, CancelledError)
        self.assertNoResult(running)
        may_end.set()
        yield running

    def test_closed_when_nothing_was_ever_done(self) -> None:
        self.successResultOf(self.pool.close())
