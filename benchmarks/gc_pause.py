"""Measure pauses by the garbage collector in a server with 18,000 idle clients.

The server process times its own collections (``gc.callbacks``), and responds to signals on its standard output:

    -> SIGUSR1     run a full collection: {"full": 0.0021}
    -> SIGUSR2     report and reset: {"objects": 90210, "pauses": [[number, longest], …]}: tracked objects, and
                   automatic collections by generation

All times are CPU time of the thread, so other processes on the machine have no influence.

A full collection visits every object that is not frozen, which shows the cost of clients for the collector. Automatic
collections are those that ran while the clients connected.

    python -m benchmarks.gc_pause
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.holders import HolderError, client_holder
from benchmarks.idle import stable_memory

#: timeout of a response, in seconds; a collection with 18,000 clients can take half a second
TIMEOUT = 30.0
#: number of full collections, of which the median is used
COLLECTIONS = 5
#: case -> server, and whether it may freeze the objects that exist at its start (gc.freeze), as a node does
CASES = {
    "wsgateway": (measure.NODE, True),
    "wsgateway, nothing frozen": (measure.NODE, False),
    "autobahn": ("autobahn", False),
}


class PauseTimer:
    """Time the collections of this process."""

    def __init__(self) -> None:
        self._started_at = 0.0
        self._pauses = [[0, 0.0] for _ in range(3)]

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        """Handle a callback of ``gc.callbacks``."""
        if phase == "start":
            self._started_at = time.thread_time()
            return
        pause = self._pauses[info["generation"]]
        pause[0] += 1
        pause[1] = max(pause[1], time.thread_time() - self._started_at)

    def collect(self, *_: object) -> None:
        """Handle SIGUSR1: time a full collection, without counting it as automatic."""
        before = [list(pause) for pause in self._pauses]
        started_at = time.thread_time()
        gc.collect(2)
        _print_json(full=time.thread_time() - started_at)
        self._pauses = before

    def report(self, *_: object) -> None:
        """Handle SIGUSR2: report automatic collections."""
        pauses, self._pauses = self._pauses, [[0, 0.0] for _ in range(3)]
        _print_json(objects=len(gc.get_objects()), pauses=pauses)


def _print_json(**facts: Any) -> None:
    # Write to the file descriptor: twistd replaces sys.stdout by its log.
    os.write(1, json.dumps(facts).encode() + b"\n")


def run_server(name: str, freezing: bool, arguments: list[str]) -> None:
    """Run a server in this process, with its collections timed."""
    timer = PauseTimer()
    gc.callbacks.append(timer)
    signal.signal(signal.SIGUSR1, timer.collect)
    signal.signal(signal.SIGUSR2, timer.report)
    if not freezing:
        gc.freeze = lambda: None
    sys.argv = [name, *arguments]
    if name == measure.NODE:
        from twisted.scripts.twistd import run as run_twistd

        run_twistd()
    else:
        runpy.run_module(f"benchmarks.peers.{name}", run_name="__main__")


class MonitoredServer:
    """A server process that times its collections."""

    def __init__(self, server: measure.Server) -> None:
        self.server = server
        assert server.process.stdout is not None
        self._stdout = server.process.stdout

    def ask(self, signum: int) -> dict[str, Any]:
        """Send a signal and wait for the response. Raises :class:`HolderError` if there is none."""
        self.server.process.send_signal(signum)
        if not select.select([self._stdout], [], [], TIMEOUT)[0]:
            raise HolderError(f"no response to {signal.Signals(signum).name} in {TIMEOUT:g} s")
        response: dict[str, Any] = json.loads(self._stdout.readline())
        return response

    def full(self) -> float:
        """Return the duration of a full collection, in seconds: the median of several."""
        return measure.median(self.ask(signal.SIGUSR1)["full"] for _ in range(COLLECTIONS))


@contextlib.contextmanager
def start(name: str, freezing: bool) -> Iterator[MonitoredServer]:
    """Run a server that times its collections until the end of the ``with`` block."""
    with tempfile.TemporaryDirectory(prefix="wsgateway-bench-") as folder:
        port, backend_port = measure.free_port(), measure.free_port()
        arguments = [str(port)]
        if name == measure.NODE:
            arguments = [
                *("--nodaemon", "--pidfile=", f"--logfile={folder}/node.log", measure.NODE),
                *("--listen", f"tcp:{port}:interface=127.0.0.1:backlog=4096"),
                *("--backend", f"tcp:{backend_port}:interface=127.0.0.1:backlog=4096"),
                *("--registry", f"sqlite:{folder}/registry.sqlite", *measure.NODE_OPTIONS),
            ]
        command = [sys.executable, "-m", "benchmarks.gc_pause", "inside", name, str(int(freezing)), *arguments]
        with open(f"{folder}/output.log", "wb") as output:
            process = measure.spawn(command, stdout=-1, stderr=output, bufsize=0)
        peers_port = backend_port if name == measure.NODE else port
        server = measure.Server(name, measure.label_of(name), process, port, peers_port, Path(folder))
        try:
            server.await_ready()
            yield MonitoredServer(server)
        finally:
            process.kill()
            process.wait()


def measure_one(case: str, clients: int) -> dict[str, float]:
    """Measure one server once."""
    name, freezing = CASES[case]
    with start(name, freezing) as monitored:
        idle = monitored.full()
        monitored.ask(signal.SIGUSR2)
        with client_holder(monitored.server) as holder:
            holder.open(clients)
            stable_memory(monitored.server)
            report, full = monitored.ask(signal.SIGUSR2), monitored.full()
            stat = holder.run_command("stat")
            if stat["open"] != clients:
                raise HolderError(f"{clients - stat['open']} clients were lost: {stat['problem']}")
    young, middle, old = report["pauses"]
    return {
        "idle": idle,
        "full": full,
        "objects": report["objects"],
        "own": young[0] + middle[0] + old[0],
        "longest": max(young[1], middle[1], old[1]),
        "own_full": old[0],
    }


def run(
    results: measure.Results, peers: Sequence[str] = ("autobahn",), runs: int = 3, clients: int = 18000
) -> list[dict[str, Any]]:
    """Measure the node, with and without gc.freeze() at its start, and Autobahn, in turn."""
    cases = [case for case, (name, _) in CASES.items() if name == measure.NODE or name in peers]
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(runs):
        for case in cases:
            try:
                found.setdefault(case, []).append(measure_one(case, clients))
            except (measure.UnavailableError, HolderError) as e:
                print(f"{case} is left out of this run: {e}", flush=True)
    rows = []
    for case, each in found.items():
        if not each:
            continue
        value = {key: measure.median(one[key] for one in each) for key in each[0]}
        name, freezing = CASES[case]
        results.add(name, case=case, frozen=freezing, clients=clients, **value)
        rows.append(
            (
                case if name == measure.NODE else measure.label_of(name),
                f"{value['idle'] * 1e3:.2f}",
                f"{value['full'] * 1e3:.2f}",
                f"{value['objects']:,.0f}",
                f"{value['longest'] * 1e3:.2f}",
                f"{value['own']:,.0f}",
                f"{value['own_full']:,.0f}",
            )
        )
    results.show(
        f"Garbage collection with {clients:,} idle clients",
        (
            "server",
            "full, no clients, ms",
            "full, ms",
            "objects",
            "longest automatic, ms",
            "automatic",
            "of them full",
        ),
        rows,
        f"Median of {runs}; CPU time. Objects: tracked by the collector, without the frozen ones.",
        f"Automatic: collections while the {clients:,} clients connected.",
    )
    return results.lines


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.gc_pause``"""
    parser = measure.parser(__doc__, peers=("autobahn",))
    parser.add_argument("--clients", type=int, default=18000, help="number of clients (default: %(default)s)")
    parser.set_defaults(runs=1)
    options = parser.parse_args(arguments)
    peers = measure.peers_of(options)
    run(measure.Results("gc_pause", options.json), peers, options.runs, options.clients)


if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        run_server(sys.argv[2], sys.argv[3] == "1", sys.argv[4:])
    else:
        measure.main(main)
