"""Threads for libraries that block: apart from the reactor's, which look up names and ask the registry.

They end with the process. A service that does not answer keeps neither a look-up nor the end of the node waiting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

T = TypeVar("T")


class DaemonThreadPool:
    """At most ``count`` threads, started when they are needed first."""

    def __init__(self, reactor: Any, name: str, max_threads: int) -> None:
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=0, maxthreads=max_threads, name=name)
        # The interpreter waits at its end for any other kind.
        self._pool.threadFactory = functools.partial(Thread, daemon=True)  # type: ignore[assignment]
        self._running: set[Deferred[Any]] = set()

    def run(self, work: Callable[[], T]) -> Deferred[T]:
        """Do work in a thread; the Deferred has its outcome."""
        if not self._pool.started:
            self._pool.start()
        outcome: Deferred[T] = Deferred()
        running = deferToThreadPool(self._reactor, self._pool, work)
        self._running.add(running)

        def done(result: Any) -> None:
            self._running.discard(running)
            # Whoever waits may have given up: a Deferred that was cancelled takes no notice.
            outcome.callback(result)

        running.addBoth(done)
        return outcome

    def close(self) -> Deferred[None]:
        """Wait for what is under way, then end the threads. Cancelling only stops the wait: to end a thread that works
        means to stand still until it is done."""
        closed: Deferred[None] = Deferred()
        over = DeferredList([_completion_of(running) for running in self._running]).addCallback(
            lambda _: self._stop_pool()
        )
        over.addCallback(closed.callback)
        return closed

    def _stop_pool(self) -> None:
        if self._pool.started:
            self._pool.stop()


def _completion_of(running: Deferred[Any]) -> Deferred[None]:
    over: Deferred[None] = Deferred()
    running.addCallback(lambda _: over.callback(None))
    return over
