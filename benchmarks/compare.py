"""Run loads on several servers in turn, and show tables of the results.

A round runs every server once, so that a temporary disturbance of the machine affects several servers. Results are
medians of the rounds. A ratio is the median of the ratios of each round.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import measure
from benchmarks.connections import LoadError
from benchmarks.load import Load, Measured

#: share of time: if server and load both worked less, something else used the processor
MIN_BUSY_SHARE = 0.8


def disturbed(line: dict[str, Any]) -> bool:
    """Return whether neither the server nor the load was busy, so that something else used the processor."""
    return "server_busy" in line and max(line["server_busy"], line["load_busy"]) < MIN_BUSY_SHARE


@dataclass
class Comparison:
    """Results of every server in every case, one per round, and the failures of servers."""

    rounds: dict[tuple[str, str], list[Measured]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def of(self, name: str, case: str) -> list[Measured]:
        return self.rounds.get((name, case), [])

    def median(self, name: str, case: str, value: Callable[[Measured], float]) -> float:
        return measure.median(map(value, self.of(name, case)))

    def ratio(self, name: str, case: str, value: Callable[[Measured], float], *, node_first: bool) -> float | None:
        """Return the value of the node divided by that of the other server, or the inverse."""
        pairs = list(zip(self.of(measure.NODE, case), self.of(name, case), strict=False))
        if not pairs:
            return None
        ratio = measure.median(value(node) / value(peer) for node, peer in pairs)
        return ratio if node_first else 1 / ratio


def run(
    peers: Iterable[str], runs: int, clients: int, cases: Sequence[tuple[str, Callable[[Load], Measured]]]
) -> Comparison:
    """Run every case with the node and every peer, ``runs`` times."""
    measure.pin()
    comparison = Comparison()
    names = [measure.NODE, *peers]
    for _ in range(runs):
        for name in names:
            if name in comparison.failures:
                continue
            try:
                with measure.start(name) as server, Load(server, clients) as load:
                    for case, program in cases:
                        comparison.rounds.setdefault((name, case), []).append(program(load))
            except (measure.UnavailableError, LoadError, OSError, KeyError) as e:
                comparison.failures[name] = f"no such id: {e}" if isinstance(e, KeyError) else str(e)
                print(f"{name} is left out: {e}", file=sys.stderr, flush=True)
    return comparison


def show_comparison(
    results: measure.Results,
    comparison: Comparison,
    peers: Iterable[str],
    case: str,
    title: str,
    what: str,
    filled: bool = True,
) -> None:
    """Print and store the table of one case. ``filled`` is set if the case saturates the server."""
    rows, disturbed_names = [], []
    for name in [measure.NODE, *peers]:
        if not comparison.of(name, case):
            rows.append([measure.label_of(name), "failed"])
            continue

        def median(value: Callable[[Measured], float], name: str = name) -> float:
            return comparison.median(name, case, value)

        speed = comparison.ratio(name, case, lambda m: m.per_second, node_first=True)
        cpu = comparison.ratio(name, case, lambda m: m.cpu_each, node_first=False)
        values = {
            "per_second": median(lambda m: m.per_second),
            "cpu_us": median(lambda m: m.cpu_each),
            "p50_ms": median(lambda m: m.p50 * 1e3),
            "p99_ms": median(lambda m: m.p99 * 1e3),
            "server_busy": median(lambda m: m.server_busy),
            "load_busy": median(lambda m: m.busy),
            "load_us": median(lambda m: m.load_each),
        }
        results.add(name, case=case, rounds=len(comparison.of(name, case)), speed_ratio=speed, cpu_ratio=cpu, **values)
        if disturbed(values):
            disturbed_names.append(name)
        rows.append(
            [
                measure.label_of(name),
                f"{values['per_second']:,.0f}",
                f"{values['cpu_us']:.1f}",
                f"{values['p50_ms']:.2f}",
                f"{values['p99_ms']:.2f}",
                "-" if speed is None else f"{speed:.2f} x",
                "-" if cpu is None else f"{cpu:.2f} x",
                f"{values['server_busy']:.0%}",
                f"{values['load_busy']:.0%}",
            ]
        )
    headings = (
        "server",
        f"{what}/s",
        "µs of CPU",
        "p50 ms",
        "p99 ms",
        "node faster",
        "node cheaper",
        "busy",
        "load busy",
    )
    notes = [f"{name} failed: {reason}" for name, reason in comparison.failures.items()]
    if disturbed_names and filled:
        notes.append(f"The processor was busy with something else, so these were slower: {', '.join(disturbed_names)}.")
    results.show(title, headings, rows, *notes)
