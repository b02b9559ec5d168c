"""Registries on a private MariaDB, with a test's clock, or with threads and the server's clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.task import Clock
from twisted.python.reflect import namedModule

from gateway.metrics import Metrics
from gateway.registry.memory import EPOCH, InlinePool
from gateway.registry.mysql import MySQLRegistry, parse_url
from tests.builders.registry_contract import LEASE, node_info


def make_pool_class(clock: Clock) -> Callable[..., InlinePool]:
    """Make a pool class that runs jobs synchronously, in sessions with the time of the clock."""

    class ClockPool(InlinePool):
        def runWithConnection(self, work: Any) -> Any:
            def timed(connection: Any) -> Any:
                now = EPOCH + round(clock.seconds() * 1e6)
                with connection.cursor() as cursor:
                    cursor.execute(f"SET timestamp = {now // 1000000}.{now % 1000000:06}")
                return work(connection)

            return super().runWithConnection(timed)

    return ClockPool


def make_mysql_registry(url: str, clock: Clock) -> MySQLRegistry:
    """Make a registry with a test's clock, without threads."""
    return MySQLRegistry(
        parse_url(url),
        lease=LEASE,
        reactor=clock,
        metrics=Metrics(),
        clock=clock.seconds,
        make_pool=make_pool_class(clock),
    )


class ThreadedRegistryMixin:
    """Make registries with the real reactor and adbapi's own pools."""

    #: of the database
    url: str

    def make_registry(self, url: str = "", **options: Any) -> MySQLRegistry:
        """Make a registry that is not open yet."""
        self.metrics = Metrics()
        options = {"lease": LEASE, "reactor": reactor, "metrics": self.metrics, **options}
        return MySQLRegistry(parse_url(url or self.url), **options)

    async def start_node(self, name: str, url: str = "", **options: Any) -> MySQLRegistry:
        """Make a registry that has joined. It is closed at the end of the test."""
        registry = self.make_registry(url, **options)
        await registry.open()
        self.addCleanup(registry.close)  # type: ignore[attr-defined]
        await registry.join(node_info(name))
        return registry


def mysql_driver_module() -> Any:
    return namedModule("gateway.registry.mysql_driver")
