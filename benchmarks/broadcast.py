"""Measure the latency of calls during notifications to ten thousand other clients, and their duration.

    python -m benchmarks.broadcast --runs 3 --seconds 4

The notifications are ``POST /v1/clients?prefix=``. The process with the other clients runs on the core of the load,
with idle priority.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

from benchmarks import measure
from benchmarks.holders import HolderError, client_holder
from benchmarks.load import Load

#: case -> size of the notification's params in bytes; 0: no notification
CASES = {"none": 0, "100 bytes": 100, "10 KB": 10_000}
PREFIX = "acme/"


@dataclass
class BroadcastThread:
    """Send notifications repeatedly in a thread until the end of the ``with`` block."""

    server: measure.Server
    size: int
    clients: int
    #: duration of each notification, in seconds
    durations: list[float] = field(default_factory=list)
    problem: str = ""

    def __enter__(self) -> BroadcastThread:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        if self.size:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()
        if self.size:
            self._thread.join()

    def _run(self) -> None:
        body = {"jsonrpc": "2.0", "method": "m", "params": ["x" * self.size]}
        while not self._stopped.is_set():
            started = time.perf_counter()
            status, response = self.server.http("POST", f"/v1/clients?prefix={PREFIX}", body)
            self.durations.append(time.perf_counter() - started)
            if status != 202 or b":%d}" % self.clients not in response:
                self.problem = f"{status} {response[:200]!r}"
                return


def measure_one(given: argparse.Namespace, in_flight: int) -> dict[str, dict[str, float]]:
    """Measure all cases once, with one node."""
    values = {}
    with measure.start(measure.NODE) as server, client_holder(server, name=PREFIX + "{:06d}") as holder:
        os.sched_setscheduler(holder.pid, os.SCHED_IDLE, os.sched_param(0))
        holder.open(given.clients)
        with Load(server, 1000) as load:
            load.calls(in_flight, 1)
            for case, size in CASES.items():
                with BroadcastThread(server, size, given.clients) as broadcast:
                    measured = load.calls(in_flight, given.seconds)
                if broadcast.problem:
                    raise HolderError(f"the notification was answered with {broadcast.problem}")
                values[case] = {
                    "p50": measured.p50,
                    "p99": measured.p99,
                    "p999": measure.percentile(measured.latencies, 0.999),
                    "per_second": measured.per_second,
                    "took": measure.median(broadcast.durations) if broadcast.durations else 0.0,
                }
        stat = holder.run_command("stat")
        if stat["open"] != given.clients:
            raise HolderError(f"{given.clients - stat['open']} clients were lost: {stat['problem']}")
    return values


def run(given: argparse.Namespace, results: measure.Results) -> None:
    """Measure all cases and show the table."""
    for in_flight in map(int, given.in_flight.split(",")):
        each = [measure_one(given, in_flight) for _ in range(given.runs)]
        rows = []
        for case in CASES:
            value = {key: measure.median(one[case][key] for one in each) for key in each[0][case]}
            results.add(measure.NODE, case=case, in_flight=in_flight, clients=given.clients, **value)
            rows.append(
                (
                    case,
                    *(f"{value[key] * 1e3:.2f}" for key in ("p50", "p99", "p999")),
                    f"{value['per_second']:,.0f}",
                    f"{value['took']:.2f}" if value["took"] else "",
                )
            )
        results.show(
            f"Calls, {in_flight} in flight, while {given.clients:,} other clients are notified",
            ("notification", "p50, ms", "p99, ms", "p99.9, ms", "calls a second", "duration, s"),
            rows,
            f"Median of {given.runs}. Each notification starts when the previous one is done.",
        )


def main() -> None:
    options = measure.parser(__doc__, peers=())
    options.add_argument("--clients", type=int, default=10_000, help="clients that are notified (default: %(default)s)")
    options.add_argument("--in-flight", default="1,64", help="calls at a time (default: %(default)s)")
    options.add_argument("--seconds", type=float, default=4, help="duration of each measurement (default: %(default)s)")
    given = options.parse_args()
    run(given, measure.Results("broadcast", given.json))


if __name__ == "__main__":
    measure.main(main)
