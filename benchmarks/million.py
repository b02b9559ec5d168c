"""Open a million clients on one machine, and call random ones meanwhile.

    this program -> nodes            /v1/backend, one WebSocket to each: client.call
    holders      -> nodes            opening handshakes, a thousand at a time, evenly on all nodes; then calls answered

A process may open some 20,000 files, which requires about 56 nodes, each with its own SQLite registry, and as many
holders. All connections use loopback. A call goes to the node that holds the client, which this program knows. If
memory or another limit runs out, it stops early and shows the results up to then.

    python -m benchmarks.million              a million clients
    python -m benchmarks.million 100000       fewer
"""

from __future__ import annotations

import argparse
import contextlib
import math
import select
import sys
import textwrap
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import measure, nodes
from benchmarks.holders import SOURCES, HolderError
from benchmarks.idle import anonymous, measured
from benchmarks.limits import MIB, Limits, each_or_disturbed, kernel
from benchmarks.pairs import NodePair, RandomCalls

#: clients opened by one command to a holder; limits are checked between commands
BATCH_SIZE = 1000
#: maximum number of nodes that start at the same time
MAX_NODES_STARTING = 4
#: maximum number of holders that open clients at the same time
MAX_HOLDERS_OPENING = 4
#: calls per second while clients are opened
CALL_RATE = 200
#: maximum number of calls in flight meanwhile
MAX_IN_FLIGHT = 256
#: time without progress after which the benchmark stops, in seconds
STEP_TIMEOUT = 60.0
#: idle time before memory is read, in seconds
SETTLE_SECONDS = 5.0
#: --ping-timeout of the nodes, in seconds; long, since responses are slow while clients are opened at full speed
PING_TIMEOUT = 60.0


class ClientRamp:
    """Open clients until all are open or a resource runs out."""

    def __init__(self, pairs: list[NodePair], clients: int, limits: Limits) -> None:
        self.pairs = pairs
        self.calls = RandomCalls(pairs)
        self.stopped = ""
        self._clients = clients
        self._limits = limits
        self._files: dict[int, NodePair] = {}
        self._epoll = select.epoll()
        self._opening: set[NodePair] = set()
        self._reported = 0
        self._progress_at = 0.0
        for pair in pairs:
            for end in (pair.backend, pair.holder):
                self._files[end.fileno()] = pair
                self._epoll.register(end.fileno(), select.EPOLLIN)

    @property
    def opened(self) -> int:
        return sum(pair.opened for pair in self.pairs)

    def _poll_once(self, timeout: float) -> None:
        for fd, _ in self._epoll.poll(max(0.0, timeout)):
            pair = self._files[fd]
            if fd == pair.backend.fileno():
                pair.backend.poll_once()
            else:
                for report in pair.holder.read_reports():
                    self._report_received(pair, report)

    def _report_received(self, pair: NodePair, report: dict[str, Any]) -> None:
        self._opening.discard(pair)
        self._progress_at = time.monotonic()
        pair.opened = pair.requested = report["open"]
        if not pair.first.resident:
            pair.first = pair.server.memory()
        if report["failed"] or report["lost"]:
            self.stopped = self.stopped or (
                f"{report['failed']} clients could not be opened, {report['lost']} were lost: {report['problem']}"
            )

    def _open_more(self) -> None:
        if len(self._opening) >= MAX_HOLDERS_OPENING:
            return
        requested = sum(pair.requested for pair in self.pairs)
        waiting = sorted((pair for pair in self.pairs if pair not in self._opening), key=lambda pair: pair.requested)
        for pair in waiting[: MAX_HOLDERS_OPENING - len(self._opening)]:
            step = min(BATCH_SIZE, self._clients - requested)
            if step <= 0:
                break
            requested += step
            pair.requested += step
            pair.holder.send_command(f"open {step}")
            self._opening.add(pair)

    def open(self) -> None:
        """Open all clients, and call random ones meanwhile."""
        started_at = checked_at = called = self._progress_at = time.monotonic()
        while self._opening or (not self.stopped and self.opened < self._clients):
            now = time.monotonic()
            if now - checked_at > 0.25:
                checked_at = now
                self.stopped = self.stopped or self._limits.short() or self._ended()
                self._print_progress(now - started_at)
                if now - self._progress_at > STEP_TIMEOUT:
                    self.stopped = self.stopped or f"no {BATCH_SIZE:,} clients could be opened in {STEP_TIMEOUT:g} s"
                    return
            if not self.stopped:
                self._open_more()
            while called < now:
                called += 1 / CALL_RATE
                if self.calls.in_flight < MAX_IN_FLIGHT:
                    self.calls.call()
            self.calls.give_up()
            self._poll_once(min(called, now + 0.1) - now)

    def _ended(self) -> str:
        for pair in self.pairs:
            if pair.server.process.poll() is not None:
                return f"a node exited: {pair.server.log().strip()[-300:]}"
        return ""

    def _print_progress(self, seconds: float) -> None:
        if self.opened - self._reported >= max(10000, self._clients // 20):
            self._reported = self.opened
            p50 = measure.percentile(self.calls.latencies, 0.5)
            print(
                f"{seconds:6.0f} s: {self.opened:,} clients, {self._limits.available() / 2**30:.1f} GiB left, "
                f"{len(self.calls.latencies):,} calls (median {p50 * 1e3:.1f} ms)",
                flush=True,
            )

    def load(self, seconds: float, in_flight: int) -> None:
        """Keep a number of calls to random clients in flight."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(in_flight - self.calls.in_flight):
                self.calls.call()
            self._poll_once(0.1)
            self.calls.give_up()
        while self.calls.in_flight:
            self._poll_once(0.1)
            self.calls.give_up()

    def rest(self, seconds: float) -> None:
        """Send nothing, and only handle incoming messages."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._poll_once(end - time.monotonic())

    def count(self, metric: str) -> int:
        """Return the sum of a metric over all nodes."""
        return sum(measured(pair.server.http("GET", "/metrics")[1].decode(), metric) for pair in self.pairs)


def pairs_for(servers: list[measure.Server], stack: contextlib.ExitStack) -> list[NodePair]:
    """Make a holder and a backend connection for each node. ``stack`` stops the holders."""
    pairs = []
    for number, server in enumerate(servers):
        pair = NodePair(number, server)
        stack.callback(pair.holder.stop)
        pairs.append(pair)
    return pairs


def memories(million: ClientRamp) -> dict[str, int]:
    """Return the current resident and anonymous memory of nodes and holders, and that of the kernel, in bytes."""
    nodes_pids = [pair.server.pid for pair in million.pairs]
    holders_pids = [pair.holder.pid for pair in million.pairs]
    return {
        "nodes": sum(measure.memory_of(pid).resident for pid in nodes_pids),
        "nodes_own": sum(map(anonymous, nodes_pids)),
        "holders": sum(measure.memory_of(pid).resident for pid in holders_pids),
        "holders_own": sum(map(anonymous, holders_pids)),
        "kernel": kernel(),
    }


def cpus(pairs: list[NodePair]) -> dict[str, float]:
    """Return the CPU time used so far, in seconds."""
    return {
        "nodes": sum(pair.server.cpu() for pair in pairs),
        "holders": sum(measure.cpu_of(pair.holder.pid) for pair in pairs),
        "this program": time.process_time(),
    }


def grown_after_first(pairs: list[NodePair]) -> float | None:
    """Return the growth in bytes per client after the first batch of each node, which warms it up."""
    grown_pairs = [pair for pair in pairs if pair.opened > BATCH_SIZE]
    growth = sum(pair.server.memory().resident - pair.first.resident for pair in grown_pairs)
    return growth / sum(pair.opened - BATCH_SIZE for pair in grown_pairs) if grown_pairs else None


def measure_all(million: ClientRamp, seconds: float, in_flight: int) -> dict[str, Any]:
    """Open all clients, wait, run the load; return the results."""
    million.rest(SETTLE_SECONDS)
    before, started_at = memories(million), time.monotonic()
    million.open()
    duration, opening = time.monotonic() - started_at, million.calls.take_latencies()
    million.rest(SETTLE_SECONDS)
    clients, after, grown_later = million.opened, memories(million), grown_after_first(million.pairs)
    started_at, cpu = time.monotonic(), cpus(million.pairs)
    million.load(seconds, in_flight)
    load_duration, cpu_after = time.monotonic() - started_at, cpus(million.pairs)
    load = million.calls.take_latencies()
    return {
        "clients": clients,
        "held": million.count("wsgateway_clients"),
        "parked": million.count("wsgateway_parked"),
        "woken": million.count("wsgateway_woken_total"),
        "nodes": len(million.pairs),
        "seconds": duration,
        "grown": after["nodes"] - before["nodes"],
        "grown_each": (after["nodes"] - before["nodes"]) / max(1, clients),
        "grown_later": grown_later,
        "base": before["nodes_own"],
        "holders_base": before["holders_own"],
        "holders_grown": after["holders"] - before["holders"],
        "kernel": after["kernel"] - before["kernel"],
        "opening": opening,
        "load": {**load, "rate": load["calls"] / load_duration, "in_flight": in_flight},
        "busy": {name: (cpu_after[name] - cpu[name]) / load_duration for name in cpu},
        "stopped": million.stopped,
        "problem": million.calls.problem,
    }


def show(results: measure.Results, wanted: int, value: dict[str, Any], ping_interval: float) -> None:
    """Print the results."""
    clients, count = value["clients"], value["nodes"]

    def describe_calls(calls: dict[str, float]) -> str:
        return (
            f"{calls['calls']:,} calls, {calls['errors']:,} failed, p50 {calls['p50'] * 1e3:.1f} ms, "
            f"p99 {calls['p99'] * 1e3:.1f} ms"
        )

    def each(size: float) -> str:
        return f"{size / MIB:,.0f} MiB, {size / max(1, clients):,.0f} bytes a client"

    load, nodes_text, holders_text = value["load"], plural(count, "node"), plural(count, "holder")
    kernel_text = each_or_disturbed(value["kernel"] / max(1, clients))
    if kernel_text != "disturbed":
        kernel_text = each(value["kernel"])
    results.show(
        f"{clients:,} live {'client' if clients == 1 else 'clients'}, {datetime.now(timezone.utc).date()}",
        ("measurement", "value"),
        [
            ("clients that the nodes hold", f"{value['held']:,}, of them {value['parked']:,} parked"),
            ("opened in", f"{value['seconds']:,.0f} s, {clients / max(0.001, value['seconds']):,.0f} a second"),
            ("growth of all nodes", each(value["grown"])),
            (
                f"growth after the first {BATCH_SIZE:,} of each",
                "-" if value["grown_later"] is None else f"{value['grown_later']:,.0f} bytes a client",
            ),
            (f"kernel, both ends (and {holders_text})", kernel_text),
            (
                f"the {nodes_text} without clients",
                f"{value['base'] / MIB:,.0f} MiB, {value['base'] / count / MIB:.1f} each",
            ),
            (
                f"the {holders_text}",
                f"{value['holders_base'] / MIB:,.0f} MiB, and {value['holders_grown'] / MIB:,.0f} of growth",
            ),
            (f"{CALL_RATE} calls a second meanwhile", describe_calls(value["opening"])),
            (f"{load['in_flight']} calls in flight after it", f"{load['rate']:,.0f} a second; {describe_calls(load)}"),
            (
                f"CPU then, of the {len(measure.CORES)} cores",
                ", ".join(f"{name} {share / len(measure.CORES):.0%}" for name, share in value["busy"].items()),
            ),
        ],
        f"Stopped before {wanted:,}: {value['stopped']}." if value["stopped"] else f"{nodes_text}, each with SQLite.",
        *([f"The first call that failed: {value['problem']}"] if value["problem"] else []),
        f"--openings-per-address 0 --messages-per-client 0 --ping-interval {ping_interval:g}",
        *textwrap.wrap(measure.machine() + ".", 110),
    )


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def positive(text: str) -> int:
    """Parse a positive integer of the command line. Raises ``argparse.ArgumentTypeError`` if it is not one."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return number


def run(
    results: measure.Results,
    clients: int = 1_000_000,
    *,
    per_node: int = 18000,
    keep_free: int = 1536 * MIB,
    seconds: float = 20.0,
    in_flight: int = 64,
    ping_interval: float = 300.0,
) -> list[dict[str, Any]]:
    """Open clients and call them.

    Raises :class:`UnavailableError` if the nodes cannot be started, and :class:`HolderError` if a holder fails.
    """
    limits = Limits(keep_free)
    per_node = min(per_node, limits.per_process(), SOURCES * limits.ports())
    count = math.ceil(clients / per_node)
    for problem in limits.ahead(clients):
        print(f"It will stop early: {problem}", flush=True)
    each = math.ceil(clients / count)
    print(f"Starting {plural(count, 'node')} and {plural(count, 'holder')}, {plural(each, 'client')} each.", flush=True)
    options = ("--ping-interval", str(ping_interval), "--ping-timeout", str(PING_TIMEOUT))
    with nodes.running(count, *options, at_a_time=MAX_NODES_STARTING) as servers, contextlib.ExitStack() as stack:
        million = ClientRamp(pairs_for(servers, stack), clients, limits)
        value = measure_all(million, seconds, in_flight)
        results.add(measure.NODE, wanted=clients, **value)
        show(results, clients, value, ping_interval)
    return results.lines


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.million``"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "clients", type=positive, nargs="?", default=1_000_000, help="number of clients (default: %(default)s)"
    )
    parser.add_argument(
        "--per-node", type=positive, default=18000, help="maximum number of clients per process (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-free", type=int, default=1536, help="memory that must stay available, in MiB (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="duration of the load at the end (default: %(default)s)"
    )
    parser.add_argument(
        "--in-flight", type=positive, default=64, help="calls in flight during the load (default: %(default)s)"
    )
    parser.add_argument(
        "--ping-interval",
        type=float,
        default=300.0,
        help="option of the nodes; with 40 s a million clients cause 25,000 pings a second (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="append the results to this file, as a JSON line")
    options = parser.parse_args(arguments)
    try:
        run(
            measure.Results("million", options.json),
            options.clients,
            per_node=options.per_node,
            keep_free=options.keep_free * MIB,
            seconds=options.seconds,
            in_flight=options.in_flight,
            ping_interval=options.ping_interval,
        )
    except (measure.UnavailableError, HolderError) as e:
        sys.exit(f"million: {e}")


if __name__ == "__main__":
    measure.main(main)
