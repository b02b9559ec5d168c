"""This build beside another one, in turns: CPU of a call, CPU of an opening handshake, bytes of an idle client.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.builds /tmp/before --runs 15

Both builds run with the same Python and the same libraries. Each round measures this build, the one before, and the one
before once more: the ratio of the last two, which are the same code, shows how much the machine varies. Every
figure is the median of the ratios of the rounds; the order within a round rotates.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import idle, measure, openings
from benchmarks.load import Load

THIS = "this build"
BEFORE = "the build before"
AGAIN = "the build before, again"
#: one measurement of a build; less is better
Measurement = Callable[[], float]


def rotate(rounds: int) -> Iterator[list[str]]:
    """Return the order of the builds in each round."""
    names = [THIS, BEFORE, AGAIN]
    for number in range(rounds):
        shift = number % len(names)
        yield names[shift:] + names[:shift]


def compare(measurements: dict[str, Measurement], rounds: int) -> dict[str, float]:
    """Measure all builds in turns; return the medians, and the median ratios to the build before."""
    values: dict[str, list[float]] = {name: [] for name in measurements}
    for order in rotate(rounds):
        for name in order:
            values[name].append(measurements[name]())
    return {
        THIS: measure.median(values[THIS]),
        BEFORE: measure.median(values[BEFORE]),
        "ratio": measure.median(this / before for this, before in zip(values[THIS], values[BEFORE], strict=True)),
        "noise": measure.median(again / before for again, before in zip(values[AGAIN], values[BEFORE], strict=True)),
    }


def checkouts(before: Path) -> dict[str, Path]:
    return {THIS: measure.CHECKOUT, BEFORE: before, AGAIN: before}


def compare_calls(before: Path, rounds: int, in_flight: int, seconds: float, clients: int) -> dict[str, float]:
    """Microseconds of the node's CPU for a call."""
    with contextlib.ExitStack() as stack:
        loads = {
            name: stack.enter_context(
                Load(stack.enter_context(measure.start(measure.NODE, checkout=checkout)), clients)
            )
            for name, checkout in checkouts(before).items()
        }
        for load in loads.values():
            load.calls(in_flight, seconds)
        return compare(
            {name: lambda load=load: load.calls(in_flight, seconds).cpu_each for name, load in loads.items()}, rounds
        )


def compare_openings(before: Path, rounds: int, clients: int) -> dict[str, float]:
    """Microseconds of the node's CPU for an opening handshake with its claim."""

    def measure_checkout(checkout: Path) -> float:
        found = openings.measure_one(measure.NODE, clients, 100, 1, checkout)
        return found[0]["cpu"] * 1e6

    return compare(
        {name: lambda checkout=checkout: measure_checkout(checkout) for name, checkout in checkouts(before).items()},
        rounds,
    )


def compare_idle(before: Path, rounds: int, clients: int) -> dict[str, float]:
    """Bytes of resident memory for an idle client."""

    def measure_checkout(checkout: Path) -> float:
        return float(idle.measure_one(measure.NODE, 1000, clients, idle.SHORT_CLIENT_ID, 0.0, checkout)["resident"])

    return compare(
        {name: lambda checkout=checkout: measure_checkout(checkout) for name, checkout in checkouts(before).items()},
        rounds,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.builds``"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path, help="a checkout of the build to compare with")
    parser.add_argument("--runs", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each load of calls (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=1000, help="that are called (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, default=64, help="calls at a time (default: %(default)s)")
    parser.add_argument("--only", choices=("calls", "openings", "idle"), action="append", help="what (default: all)")
    parser.add_argument("--json", type=Path, help="append what was measured to this file, as JSON lines")
    given = parser.parse_args(arguments)
    measure.pin()
    results = measure.Results("builds", given.json)
    programs: dict[str, tuple[str, Callable[[], dict[str, float]]]] = {
        "calls": (
            f"µs of CPU for a call, {given.in_flight} in flight",
            lambda: compare_calls(given.before, given.runs, given.in_flight, given.seconds, given.clients),
        ),
        "openings": ("µs of CPU for an opening", lambda: compare_openings(given.before, given.runs, 2000)),
        "idle": ("bytes for an idle client", lambda: compare_idle(given.before, max(3, given.runs // 5), 10000)),
    }
    rows = []
    for name, (title, program) in programs.items():
        if given.only and name not in given.only:
            continue
        found = program()
        results.add(measure.NODE, case=name, rounds=given.runs, **found)
        rows.append(
            (title, f"{found[THIS]:.1f}", f"{found[BEFORE]:.1f}", f"{found['ratio']:.3f}", f"{found['noise']:.3f}")
        )
    results.show(
        "This build beside the build before",
        ("what", "this", "before", "this / before", "before / before"),
        rows,
        f"Medians of {given.runs} rounds (idle: {max(3, given.runs // 5)}), in turns; below 1 is better.",
    )


if __name__ == "__main__":
    measure.main(main)
