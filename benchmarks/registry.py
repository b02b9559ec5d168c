"""Measure claims, lookups and releases per second of a registry with MariaDB, compared with the bare SQL.

    registry.claim() … -> batches -> one connection -> mariadbd      4,000 in progress, as in a reconnect storm
    find(), one at a time, meanwhile                                 whether lookups wait for claims

The registry has one core, as in a node that does nothing else, and the database another. Every commit is written to
disk (innodb_flush_log_at_trx_commit=1), in a table with a million other clients. The bare SQL executes the same
statements for the same rows on one connection; the difference is the cost of the node.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred

from benchmarks import measure
from gateway.metrics import Metrics
from gateway.registry import mysql_driver
from gateway.registry.interface import ClaimPolicy, NodeInfo, SessionKey
from gateway.registry.job_queue import Priority
from gateway.registry.mysql import MySQL, MySQLRegistry, parse_url
from tests.builders import mariadb

#: number of requests in progress
IN_PROGRESS = 4000
#: lease in seconds; long, since there are no heartbeats here
LEASE = 3600.0
ADDRESS = "203.0.113.77:50123"
#: number of connections -> priorities of the jobs of each connection
POOLS = {
    1: (tuple(Priority),),
    4: ((Priority.HEARTBEAT,), (Priority.WRITES,), (Priority.READS,), (Priority.MAINTENANCE,)),
    5: MySQL.queue_priorities,
}


class RunTimer:
    """Measure duration and CPU of a run."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._started = time.perf_counter(), time.process_time(), measure.cpu_of(pid)

    def of(self, count: int) -> dict[str, float]:
        """Return the rate per second, and the CPU of node and database per operation, in seconds."""
        started_at, own, database = self._started
        return {
            "rate": count / (time.perf_counter() - started_at),
            "cpu": (time.process_time() - own) / count,
            "database_cpu": (measure.cpu_of(self._pid) - database) / count,
        }


async def storm(
    server: mariadb.MariaDBServer, names: Sequence[str], request: Callable[[str], Deferred[Any]]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Send a request for every name, many in progress at a time; return the results and the statistics."""
    results: dict[str, Any] = {}
    latencies: list[float] = []
    done: Deferred[None] = Deferred()
    remaining: Iterator[str] = iter(names)

    def completed(result: Any, name: str, sent_at: float) -> None:
        latencies.append(time.perf_counter() - sent_at)
        results[name] = result
        if len(results) == len(names):
            done.callback(None)
        else:
            send_next()

    def send_next() -> None:
        name = next(remaining, None)
        if name is not None:
            sent_at = time.perf_counter()
            request(name).addCallbacks(completed, done.errback, callbackArgs=(name, sent_at))

    # As a node does before it accepts clients.
    gc.collect()
    gc.freeze()
    timer = RunTimer(server.pid)
    for _ in range(IN_PROGRESS):
        send_next()
    await done
    costs = timer.of(len(names))
    percentiles = {"p50": measure.percentile(latencies, 0.5), "p99": measure.percentile(latencies, 0.99)}
    return results, {**costs, **percentiles}


async def time_lookups_during(registry: MySQLRegistry, name: str, work: Deferred[Any]) -> tuple[Any, float]:
    """Look one client up repeatedly until ``work`` is done; return its result and the 99th percentile of latency."""
    latencies: list[float] = []
    outcome: list[Any] = []
    work.addBoth(outcome.append)
    while not outcome:
        sent_at = time.perf_counter()
        await registry.find(name)
        latencies.append(time.perf_counter() - sent_at)
    if not isinstance(outcome[0], tuple):
        outcome[0].raiseException()
    return outcome[0], measure.percentile(latencies, 0.99)


def raw_inserts(server: mariadb.MariaDBServer, url: str, names: Sequence[str], size: int) -> dict[str, float]:
    """Claim clients with the bare SQL statements on one connection."""
    mysql = MySQL(parse_url(url), bytes, LEASE)
    connection = mysql_driver.connect(mysql.make_connection)
    mysql.prepare(connection)
    timer = RunTimer(server.pid)
    with connection.cursor() as cursor:
        for index in range(0, len(names), size):
            batch = sorted(names[index : index + size])
            cursor.execute(mysql.begin_statement)
            mysql.lock_clients(cursor, [(name, ADDRESS) for name in batch])
            cursor.execute("SELECT UTC_TIMESTAMP(6), COUNT(*) FROM nodes WHERE id = 1")
            ((now, _),) = cursor.fetchall()
            mysql.fill_clients(cursor, batch, 1, now)
            connection.commit()
    costs = timer.of(len(names))
    connection.close()
    return costs


class RegistryBenchmark:
    """A database server, and the registries of two nodes."""

    def __init__(self, server: mariadb.MariaDBServer, rows: int, clients: int) -> None:
        self.server = server
        self.url = server.new_database()
        MySQL(parse_url(self.url), bytes, LEASE).check()
        server.execute(
            f"INSERT INTO clients SELECT CONCAT('other-', seq), 999, 1, UTC_TIMESTAMP(6), '{ADDRESS}'"
            f" FROM seq_1_to_{rows}",
            database=self.url.rpartition("/")[2],
        )
        self.names = [f"agent-{number:08}" for number in range(clients)]
        Random(1).shuffle(self.names)
        self.round = 0

    def new_names(self) -> list[str]:
        """Return names that were not used before."""
        self.round += 1
        return [f"{self.round}-{name}" for name in self.names]

    async def start(self, size: int, connections: int) -> MySQLRegistry:
        registry = MySQLRegistry(parse_url(self.url), lease=LEASE, reactor=reactor, metrics=Metrics())
        registry._database.max_batch_size, registry._database.queue_priorities = size, POOLS[connections]
        await registry.open()
        self.round += 1
        await registry.join(NodeInfo(f"{self.round:036}", "bench", "ws://bench", "ws://bench", 1))
        return registry

    async def run(self, size: int, connections: int) -> dict[str, dict[str, float]]:
        """Measure everything once."""
        names, results = self.new_names(), {}
        a, b = await self.start(size, connections), await self.start(size, connections)
        (_, results["new clients"]) = await storm(
            self.server,
            names,
            lambda name: a.claim(name, ADDRESS, ClaimPolicy(takeover_up_to=0, honor_assignment=True)),
        )
        (_, results["lookups"]) = await storm(self.server, names, b.find)
        claims, results["another node's clients"] = await storm(
            self.server,
            names,
            lambda name: b.claim(name, ADDRESS, ClaimPolicy(takeover_up_to=2**62, honor_assignment=True)),
        )
        (_, results["releases"]) = await storm(
            self.server, names, lambda name: b.release(SessionKey(name, claims[name].generation))
        )
        results["lookups, one at a time"] = await self.one_at_a_time(a, names[:500])
        others = self.new_names()[: len(names) // 4]
        claiming = storm(
            self.server,
            others,
            lambda name: a.claim(name, ADDRESS, ClaimPolicy(takeover_up_to=0, honor_assignment=True)),
        )
        (_, costs), p99 = await time_lookups_during(a, names[0], Deferred.fromCoroutine(claiming))
        results["new clients, with lookups"] = {**costs, "look_up_p99": p99}
        for registry in (a, b):
            await registry.close()
        return results

    async def one_at_a_time(self, registry: MySQLRegistry, names: Sequence[str]) -> dict[str, float]:
        timer, latencies = RunTimer(self.server.pid), []
        for name in names:
            sent_at = time.perf_counter()
            await registry.find(name)
            latencies.append(time.perf_counter() - sent_at)
        costs = timer.of(len(names))
        return {**costs, "p50": measure.percentile(latencies, 0.5), "p99": measure.percentile(latencies, 0.99)}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: measure.median(run[key] for run in runs) for key in runs[0]}


def show(
    results: measure.Results, found: dict[tuple[int, int], dict[str, dict[str, float]]], notes: Sequence[str]
) -> None:
    rows = []
    for (size, connections), kinds in found.items():
        for kind, value in kinds.items():
            results.add(measure.NODE, kind=kind, batch=size, connections=connections, **value)
            rows.append(
                (
                    kind,
                    size,
                    connections or "",
                    f"{value['rate']:,.0f}",
                    f"{value['cpu'] * 1e6:.1f}",
                    f"{value['database_cpu'] * 1e6:.1f}",
                    f"{value['p50'] * 1e3:.1f}" if "p50" in value else "",
                    f"{value['p99'] * 1e3:.1f}" if "p99" in value else "",
                    f"{value['look_up_p99'] * 1e3:.1f}" if "look_up_p99" in value else "",
                )
            )
    headings = ("", "batch", "connections", "a second", "µs node", "µs database", "p50 ms", "p99 ms", "lookup p99 ms")
    results.show("Registry with MariaDB", headings, rows, *notes)


async def run(
    results: measure.Results,
    server: mariadb.MariaDBServer,
    runs: int = 3,
    rows: int = 1_000_000,
    clients: int = 50_000,
    sizes: Sequence[int] = (100, 200, 500, 1000),
    pools: Sequence[int] = (1, 4, 5),
) -> list[dict[str, Any]]:
    """Measure each batch size with each number of connections, and the bare SQL, in turn."""
    bench = RegistryBenchmark(server, rows, clients)
    found: dict[tuple[int, int], dict[str, list[dict[str, float]]]] = {}
    for _ in range(runs):
        for size in sizes:
            for connections in pools:
                for kind, value in (await bench.run(size, connections)).items():
                    found.setdefault((size, connections), {}).setdefault(kind, []).append(value)
            costs = raw_inserts(server, bench.url, bench.new_names(), size)
            found.setdefault((size, 0), {}).setdefault("new clients, bare SQL", []).append(costs)
    show(
        results,
        {case: {kind: medians(values) for kind, values in kinds.items()} for case, kinds in found.items()},
        [
            f"{clients:,} clients, {IN_PROGRESS:,} requests in progress, {rows:,} other clients; median of {runs}.",
            "µs: CPU of node and database per operation; lookup p99: of single lookups meanwhile.",
        ],
    )
    return results.lines


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.registry``"""
    parser = measure.parser(__doc__, peers=())
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of other clients (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=50_000, help="clients per measurement (default: %(default)s)")
    parser.add_argument("--batches", default="100,200,500,1000", help="batch sizes (default: %(default)s)")
    parser.add_argument(
        "--connections", default="1,4,5", help="numbers of connections: 1, 4 or 5 (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="wsgateway-bench-"))
    failed: list[Any] = []
    try:
        server = mariadb.MariaDBServer(
            *("--innodb-flush-log-at-trx-commit=1", "--innodb-buffer-pool-size=1G", "--innodb-log-file-size=512M"),
            core=measure.LOAD_CORE,
            folder=folder,
        )
        measure.pin(measure.SERVER_CORE)

        def start() -> None:
            benchmark = run(
                measure.Results("registry", options.json),
                server,
                options.runs,
                options.rows,
                options.clients,
                [int(size) for size in options.batches.split(",")],
                [int(size) for size in options.connections.split(",")],
            )
            Deferred.fromCoroutine(benchmark).addErrback(failed.append).addBoth(lambda _: reactor.stop())

        reactor.callWhenRunning(start)
        reactor.run()
        server.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if failed:
        failed[0].raiseException()


if __name__ == "__main__":
    measure.main(main)
