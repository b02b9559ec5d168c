"""Threads for blocking libraries, apart from the reactor's thread pool, which resolves names and queries the registry.

The threads are daemons: a service that does not answer delays neither a DNS lookup nor the exit of the process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

from gateway.util.deferred import detached

T = TypeVar("T")


class DaemonThreadPool:
    """A pool of at most ``max_threads`` daemon threads. They start with the first call of :meth:`run`."""

    def __init__(self, reactor: Any, name: str, max_threads: int) -> None:
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=0, maxthreads=max_threads, name=name)
        # The interpreter joins all other threads when it exits.
        self._pool.threadFactory = functools.partial(Thread, daemon=True)  # type: ignore[assignment]
        self._running: set[Deferred[Any]] = set()

    def run(self, function: Callable[[], T]) -> Deferred[T]:
        """Run a function in a thread. The Deferred fires with its result, or fails with its exception.

        Cancelling the Deferred does not stop the function.
        """
        if not self._pool.started:
            self._pool.start()
        result: Deferred[T] = Deferred()
        running = deferToThreadPool(self._reactor, self._pool, function)
        self._running.add(running)

        def finished(outcome: Any) -> None:
            self._running.discard(running)
            # Firing a cancelled Deferred once has no effect.
            result.callback(outcome)

        running.addBoth(finished)
        return result

    def close(self) -> Deferred[None]:
        """Wait for the running functions, then stop the threads.

        Cancelling the Deferred stops the wait only: to join a thread that is busy would block the reactor.
        """
        finished = DeferredList([detached(running) for running in self._running])
        return detached(finished.addCallback(lambda _: self._stop_pool()))

    def _stop_pool(self) -> None:
        if self._pool.started:
            self._pool.stop()
