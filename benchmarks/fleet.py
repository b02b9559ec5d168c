"""Measure calls forwarded to another node, compared with calls to local clients.

    python -m benchmarks.fleet --runs 5 --seconds 3

    backend -> node -> client                   local
    backend -> node -> node -> client           through another node: the CPU of both nodes is counted

Both nodes share one core, and the load uses another. Both use the same SQLite registry, and the location of each client
is cached before the measurement.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.load import Load, Measured

#: maximum ratio of the CPU of a forwarded call to that of a local call
BUDGET = 2.2


@dataclass
class RemoteServer(measure.Server):
    """The node that the backend calls, and the one that holds the clients."""

    holder: measure.Server | None = None

    def cpu(self) -> float:
        assert self.holder is not None
        return super().cpu() + self.holder.cpu()


@contextlib.contextmanager
def local_node() -> Iterator[measure.Server]:
    """Start one node."""
    with measure.start(measure.NODE) as server:
        yield server


@contextlib.contextmanager
def remote_node() -> Iterator[measure.Server]:
    """Start two nodes: one for the clients, one for the backend."""
    with tempfile.TemporaryDirectory(prefix="wsgateway-bench-") as folder:
        registry = ("--registry", f"sqlite:{Path(folder) / 'registry.sqlite'}")
        with measure.start(measure.NODE, *registry) as holder, measure.start(measure.NODE, *registry) as entry:
            yield RemoteServer(
                entry.name, entry.label, entry.process, holder.port, entry.backend_port, entry.folder, holder=holder
            )


ROUTES = {"here": local_node, "through another node": remote_node}


def measured(route: str, clients: int, in_flight: int, seconds: float) -> Measured:
    """Measure one route once."""
    with ROUTES[route]() as server, Load(server, clients) as load:
        # The first call of each client looks up its location.
        load.calls(clients, seconds / 4)
        return load.calls(in_flight, seconds)


def main() -> None:
    options = measure.parser(__doc__, peers=())
    options.add_argument("--clients", type=int, default=1000, help="(default: %(default)s)")
    options.add_argument("--in-flight", type=int, default=64, help="calls in flight (default: %(default)s)")
    options.add_argument("--seconds", type=float, default=3, help="duration of each measurement (default: %(default)s)")
    given = options.parse_args()
    measure.pin()
    rounds: dict[str, list[Measured]] = {route: [] for route in ROUTES}
    for _ in range(given.runs):
        for route, measurements in rounds.items():
            measurements.append(measured(route, given.clients, min(given.in_flight, given.clients), given.seconds))
    results = measure.Results("fleet", given.json)
    rows = []
    for route, measurements in rounds.items():
        ratio = measure.median(
            each.cpu_each / local.cpu_each for each, local in zip(measurements, rounds["here"], strict=True)
        )
        values = {
            "per_second": measure.median(each.per_second for each in measurements),
            "cpu_us": measure.median(each.cpu_each for each in measurements),
            "p50_ms": measure.median(each.p50 * 1e3 for each in measurements),
            "p99_ms": measure.median(each.p99 * 1e3 for each in measurements),
        }
        results.add(measure.NODE, case=route, rounds=len(measurements), cpu_ratio=ratio, **values)
        rows.append(
            [
                route,
                f"{values['per_second']:,.0f}",
                f"{values['cpu_us']:.1f}",
                f"{values['p50_ms']:.2f}",
                f"{values['p99_ms']:.2f}",
                f"{ratio:.2f} x",
            ]
        )
    results.show(
        f"Calls across nodes, {given.in_flight:,} in flight to {given.clients:,} clients, 100 bytes each way",
        ("calls", "calls/s", "µs of CPU", "p50 ms", "p99 ms", "CPU"),
        rows,
        f"µs of CPU: of both nodes. The budget is {BUDGET:g} x.",
    )
    if not rounds["here"]:
        sys.exit(1)


if __name__ == "__main__":
    measure.main(main)
