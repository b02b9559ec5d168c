"""Registries in an SQLite file, with a test's clock; optionally with a database that the test runs step by step."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.metrics import Metrics
from gateway.registry.memory import EPOCH, InlinePool
from gateway.registry.sqlite import SQLiteRegistry
from tests.builders.registry_contract import LEASE, node_info


class ManualPool(InlinePool):
    """A pool that runs one job at each call of ``run_next``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pending: list[Any] = []

    def runWithConnection(self, work: Any) -> Deferred[Any]:
        deferred: Deferred[Any] = Deferred()
        self.pending.append(lambda: super(ManualPool, self).runWithConnection(work).chainDeferred(deferred))
        return deferred

    def run_next(self) -> None:
        if self.pending:
            self.pending.pop(0)()


def make_sqlite_registry(
    path: str, clock: Clock, pool: Any = InlinePool, metrics: Metrics | None = None
) -> SQLiteRegistry:
    return SQLiteRegistry(
        path,
        lease=LEASE,
        reactor=clock,
        metrics=metrics or Metrics(),
        clock=clock.seconds,
        database_clock=lambda: EPOCH + round(clock.seconds() * 1e6),
        make_pool=pool,
    )


class ManualPoolTestCase(SynchronousTestCase):
    """One node, whose database jobs are run by ``step``."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.pools: list[ManualPool] = []
        self.registry = make_sqlite_registry(self.mktemp(), self.clock, self.make_pool, self.metrics)
        opened = self.registry.open()
        self.step()
        self.successResultOf(opened)
        joined = self.registry.join(node_info("a"))
        self.step()
        self.successResultOf(joined)
        self.addCleanup(self.close_registry)

    def make_pool(self, *args: Any, **kwargs: Any) -> ManualPool:
        self.pools.append(ManualPool(*args, **kwargs))
        return self.pools[-1]

    def close_registry(self) -> None:
        closed = self.registry.close()
        while self.pools[-1].pending:
            self.step()
        self.successResultOf(closed)

    def step(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.pools[-1].run_next()

    def execute(self, text: str) -> None:
        connection = self.pools[-1]._connection
        assert connection is not None
        connection.execute(text).fetchall()
