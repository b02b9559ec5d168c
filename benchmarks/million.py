"""A million live clients on one machine, and calls to random ones of them going on meanwhile.

    this program -> nodes            /v1/backend, one WebSocket to each: client.call
    holders      -> nodes            opening handshakes, a thousand at a time, on every node alike; then calls answered

A process may open some 20,000 files, hence about 56 nodes, each with a registry (SQLite) of its own, and as many
holders; all of it talks over loopback. A call goes to the node that holds the client: this program knows which. It ends
early, and tells what there was until then, when memory or another limit runs short.

    python -m benchmarks.million              a million
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

#: clients opened with one command to a holder; between two the limits are looked at
BATCH_SIZE = 1000
#: how many nodes start at a time, and how many holders open at a time
MAX_NODES_STARTING, MAX_HOLDERS_OPENING = 4, 4
#: calls a second while clients are being opened
CALL_RATE = 200
#: no more calls than that wait meanwhile
MAX_IN_FLIGHT = 256
#: a step that is not done after so many seconds ends it all
STEP_TIMEOUT = 60.0
#: how long all rests before memory is looked at, in seconds
SETTLE_SECONDS = 5.0
#: the nodes' own, in seconds; on a machine that opens clients as fast as it can, an answer takes its time
PING_TIMEOUT = 60.0


class ClientRamp:
    """Opens clients for as long as nothing runs short."""

    def __init__(self, pairs: list[NodePair], clients: int, limits: Limits) -> None:
        self.pairs = pairs
        self.calls = RandomCalls(pairs)
        self.stopped = ""
        self._clients = clients
        self._limits = limits
        self._files: dict[int, NodePair] = {}
        self._epoll = select.epoll()
        self._opening: set[NodePair] = set()
        self._told = 0
        self._progress_at = 0.0
        for pair in pairs:
            for end in (pair.backend, pair.holder):
                self._files[end.fileno()] = pair
                self._epoll.register(end.fileno(), select.EPOLLIN)

    @property
    def opened(self) -> int:
        return sum(pair.opened for pair in self.pairs)

    def _turn(self, timeout: float) -> None:
        for fd, _ in self._epoll.poll(max(0.0, timeout)):
            pair = self._files[fd]
            if fd == pair.backend.fileno():
                pair.backend.poll_once()
            else:
                for answer in pair.holder.read_reports():
                    self._answered(pair, answer)

    def _answered(self, pair: NodePair, answer: dict[str, Any]) -> None:
        self._opening.discard(pair)
        self._progress_at = time.monotonic()
        pair.opened = pair.asked = answer["open"]
        if not pair.first.resident:
            pair.first = pair.server.memory()
        if answer["failed"] or answer["lost"]:
            self.stopped = self.stopped or (
                f"{answer['failed']} clients could not be opened, {answer['lost']} were lost: {answer['problem']}"
            )

    def _open_more(self) -> None:
        if len(self._opening) >= MAX_HOLDERS_OPENING:
            return
        asked = sum(pair.asked for pair in self.pairs)
        waiting = sorted((pair for pair in self.pairs if pair not in self._opening), key=lambda pair: pair.asked)
        for pair in waiting[: MAX_HOLDERS_OPENING - len(self._opening)]:
            step = min(BATCH_SIZE, self._clients - asked)
            if step <= 0:
                break
            asked += step
            pair.asked += step
            pair.holder.send_command(f"open {step}")
            self._opening.add(pair)

    def open(self) -> None:
        """Open all of them, with calls going on."""
        began = looked = called = self._progress_at = time.monotonic()
        while self._opening or (not self.stopped and self.opened < self._clients):
            now = time.monotonic()
            if now - looked > 0.25:
                looked = now
                self.stopped = self.stopped or self._limits.short() or self._ended()
                self._print_progress(now - began)
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
            self._turn(min(called, now + 0.1) - now)

    def _ended(self) -> str:
        for pair in self.pairs:
            if pair.server.process.poll() is not None:
                return f"a node ended: {pair.server.log().strip()[-300:]}"
        return ""

    def _print_progress(self, seconds: float) -> None:
        if self.opened - self._told >= max(10000, self._clients // 20):
            self._told = self.opened
            took = measure.percentile(self.calls.latencies, 0.5)
            print(
                f"{seconds:6.0f} s: {self.opened:,} clients, {self._limits.available() / 2**30:.1f} GiB left, "
                f"{len(self.calls.latencies):,} calls (median {took * 1e3:.1f} ms)",
                flush=True,
            )

    def load(self, seconds: float, in_flight: int) -> None:
        """Keep so many calls to random clients in flight."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(in_flight - self.calls.in_flight):
                self.calls.call()
            self._turn(0.1)
            self.calls.give_up()
        while self.calls.in_flight:
            self._turn(0.1)
            self.calls.give_up()

    def rest(self, seconds: float) -> None:
        """Do nothing but handle what comes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._turn(end - time.monotonic())

    def count(self, metric: str) -> int:
        """The sum of a metric over all nodes."""
        return sum(measured(pair.server.http("GET", "/metrics")[1].decode(), metric) for pair in self.pairs)


def pairs_for(servers: list[measure.Server], stack: contextlib.ExitStack) -> list[NodePair]:
    """A holder and a backend's connection for each node; their holders end with the stack."""
    pairs = []
    for number, server in enumerate(servers):
        pair = NodePair(number, server)
        stack.callback(pair.holder.stop)
        pairs.append(pair)
    return pairs


def memories(million: ClientRamp) -> dict[str, int]:
    """Bytes now: resident of all nodes and of all holders, and of those what is no part of a file."""
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
    """Seconds of CPU until now."""
    return {
        "nodes": sum(pair.server.cpu() for pair in pairs),
        "holders": sum(measure.cpu_of(pair.holder.pid) for pair in pairs),
        "this program": time.process_time(),
    }


def grown_after_first(pairs: list[NodePair]) -> float | None:
    """Bytes for each client after the first ones of each node, which warm it up."""
    more = [pair for pair in pairs if pair.opened > BATCH_SIZE]
    grown = sum(pair.server.memory().resident - pair.first.resident for pair in more)
    return grown / sum(pair.opened - BATCH_SIZE for pair in more) if more else None


def measure_all(million: ClientRamp, seconds: float, in_flight: int) -> dict[str, Any]:
    """Open, rest, load; what it came to."""
    million.rest(SETTLE_SECONDS)
    before, began = memories(million), time.monotonic()
    million.open()
    took, opening = time.monotonic() - began, million.calls.take_latencies()
    million.rest(SETTLE_SECONDS)
    clients, after, grown_later = million.opened, memories(million), grown_after_first(million.pairs)
    began, cpu = time.monotonic(), cpus(million.pairs)
    million.load(seconds, in_flight)
    loaded, cpu_after = time.monotonic() - began, cpus(million.pairs)
    load = million.calls.take_latencies()
    return {
        "clients": clients,
        "held": million.count("wsgateway_clients"),
        "parked": million.count("wsgateway_parked"),
        "woken": million.count("wsgateway_woken_total"),
        "nodes": len(million.pairs),
        "seconds": took,
        "grown": after["nodes"] - before["nodes"],
        "grown_each": (after["nodes"] - before["nodes"]) / max(1, clients),
        "grown_later": grown_later,
        "base": before["nodes_own"],
        "holders_base": before["holders_own"],
        "holders_grown": after["holders"] - before["holders"],
        "kernel": after["kernel"] - before["kernel"],
        "opening": opening,
        "load": {**load, "rate": load["calls"] / loaded, "in_flight": in_flight},
        "busy": {who: (cpu_after[who] - cpu[who]) / loaded for who in cpu},
        "stopped": million.stopped,
        "problem": million.calls.problem,
    }


def show(results: measure.Results, wanted: int, value: dict[str, Any], ping_interval: float) -> None:
    """Print what it came to."""
    clients, count = value["clients"], value["nodes"]

    def told(calls: dict[str, float]) -> str:
        return (
            f"{calls['calls']:,} calls, {calls['errors']:,} failed, p50 {calls['p50'] * 1e3:.1f} ms, "
            f"p99 {calls['p99'] * 1e3:.1f} ms"
        )

    def each(size: float) -> str:
        return f"{size / MIB:,.0f} MiB, {size / max(1, clients):,.0f} bytes a client"

    load, nodes_told, holders_told = value["load"], plural(count, "node"), plural(count, "holder")
    kernel_told = each_or_disturbed(value["kernel"] / max(1, clients))
    if kernel_told != "disturbed":
        kernel_told = each(value["kernel"])
    results.show(
        f"{clients:,} live {'client' if clients == 1 else 'clients'}, {datetime.now(timezone.utc).date()}",
        ("what", "how much"),
        [
            ("clients that the nodes hold", f"{value['held']:,}, of them {value['parked']:,} parked"),
            ("opened in", f"{value['seconds']:,.0f} s, {clients / max(0.001, value['seconds']):,.0f} a second"),
            ("growth of all nodes", each(value["grown"])),
            (
                f"growth after the first {BATCH_SIZE:,} of each",
                "-" if value["grown_later"] is None else f"{value['grown_later']:,.0f} bytes a client",
            ),
            (f"kernel, both ends (and {holders_told})", kernel_told),
            (
                f"the {nodes_told} without clients",
                f"{value['base'] / MIB:,.0f} MiB, {value['base'] / count / MIB:.1f} each",
            ),
            (
                f"the {holders_told}",
                f"{value['holders_base'] / MIB:,.0f} MiB, and {value['holders_grown'] / MIB:,.0f} of growth",
            ),
            (f"{CALL_RATE} calls a second meanwhile", told(value["opening"])),
            (f"{load['in_flight']} calls in flight after it", f"{load['rate']:,.0f} a second; {told(load)}"),
            (
                f"CPU then, of the {len(measure.CORES)} cores",
                ", ".join(f"{who} {share / len(measure.CORES):.0%}" for who, share in value["busy"].items()),
            ),
        ],
        f"Stopped before {wanted:,}: {value['stopped']}." if value["stopped"] else f"{nodes_told}, each with SQLite.",
        *([f"The first call that failed: {value['problem']}"] if value["problem"] else []),
        f"--openings-per-address 0 --messages-per-client 0 --ping-interval {ping_interval:g}",
        *textwrap.wrap(measure.machine() + ".", 110),
    )


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def positive(text: str) -> int:
    """A command line's number of something.

    :raises argparse.ArgumentTypeError: it is no whole number, or less than 1.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
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
    """Hold so many clients and call them.

    :raises UnavailableError: the nodes cannot be started.
    :raises HolderError: the holders cannot go on.
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
    parser.add_argument("clients", type=positive, nargs="?", default=1_000_000, help="how many (default: %(default)s)")
    parser.add_argument(
        "--per-node", type=positive, default=18000, help="the most for one process (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-free", type=int, default=1536, help="MiB of memory that stay available (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of calls when all are there (default: %(default)s)"
    )
    parser.add_argument("--in-flight", type=positive, default=64, help="calls at a time then (default: %(default)s)")
    parser.add_argument(
        "--ping-interval",
        type=float,
        default=300.0,
        help="the nodes' own: at 50 s, a million clients are 20,000 pings a second (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="append what was measured to this file, as a JSON line")
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
