"""A call through another node, beside one to a client of the node that the backend asks.

    python -m benchmarks.fleet --runs 5 --seconds 3

    backend -> node -> client                   here
    backend -> node -> node -> client           there: the CPU of both nodes is counted

All nodes run on one core, so that they share it in the second case; the load has another. The registry is one SQLite
file for both; where a client is was looked up before.
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

#: what the design allows: the CPU of a call through another node over that of one here
BUDGET = 2.2


@dataclass
class RemoteServer(measure.Server):
    """A node that is asked, and behind it the one that has the clients."""

    holder: measure.Server | None = None

    def cpu(self) -> float:
        assert self.holder is not None
        return super().cpu() + self.holder.cpu()


@contextlib.contextmanager
def local_node() -> Iterator[measure.Server]:
    """One node."""
    with measure.start(measure.NODE) as server:
        yield server


@contextlib.contextmanager
def remote_node() -> Iterator[measure.Server]:
    """Two nodes, one for the clients and one for the backend."""
    with tempfile.TemporaryDirectory(prefix="wsgateway-bench-") as folder:
        registry = ("--registry", f"sqlite:{Path(folder) / 'registry.sqlite'}")
        with measure.start(measure.NODE, *registry) as holder, measure.start(measure.NODE, *registry) as asked:
            yield RemoteServer(
                asked.name, asked.label, asked.process, holder.port, asked.backend_port, asked.folder, holder=holder
            )


ROUTES = {"here": local_node, "through another node": remote_node}


def measured(route: str, clients: int, in_flight: int, seconds: float) -> Measured:
    """One measurement."""
    with ROUTES[route]() as server, Load(server, clients) as load:
        # The first call of each client looks up where it is.
        load.calls(clients, seconds / 4)
        return load.calls(in_flight, seconds)


def main() -> None:
    options = measure.parser(__doc__, peers=())
    options.add_argument("--clients", type=int, default=1000, help="(default: %(default)s)")
    options.add_argument("--in-flight", type=int, default=64, help="calls at a time (default: %(default)s)")
    options.add_argument("--seconds", type=float, default=3, help="of each measurement (default: %(default)s)")
    given = options.parse_args()
    measure.pin()
    rounds: dict[str, list[Measured]] = {way: [] for way in ROUTES}
    for _ in range(given.runs):
        for way, found in rounds.items():
            found.append(measured(way, given.clients, min(given.in_flight, given.clients), given.seconds))
    results = measure.Results("fleet", given.json)
    rows = []
    for way, found in rounds.items():
        ratio = measure.median(
            each.cpu_each / local.cpu_each for each, local in zip(found, rounds["here"], strict=True)
        )
        values = {
            "per_second": measure.median(each.per_second for each in found),
            "cpu_us": measure.median(each.cpu_each for each in found),
            "p50_ms": measure.median(each.p50 * 1e3 for each in found),
            "p99_ms": measure.median(each.p99 * 1e3 for each in found),
        }
        results.add(measure.NODE, case=way, rounds=len(found), cpu_ratio=ratio, **values)
        rows.append(
            [
                way,
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
        f"µs of CPU: of all nodes that a call goes through. At most {BUDGET:g} x is what is wanted.",
    )
    if not rounds["here"]:
        sys.exit(1)


if __name__ == "__main__":
    measure.main(main)
