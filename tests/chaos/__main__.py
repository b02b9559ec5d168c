"""``python -m tests.chaos``: run all scenarios one after the other, or the named ones; then print a table.

The exit status is 1 if there was any problem.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import resource
import sys
import time

from tests.chaos.fleet import Size
from tests.chaos.run import Result, run
from tests.chaos.scenarios import SCENARIOS

COLUMNS = (
    "scenario",
    "calls",
    "answered",
    "failed honestly",
    "lost",
    "wrong",
    "unreachable",
    "rows left",
    "memory",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--clients", type=int, default=Size.clients, help="number of clients")
    parser.add_argument("--rate", type=float, default=Size.rate, help="calls per second")
    parser.add_argument("--outage", type=float, default=Size.outage, help="seconds of the database outage")
    parser.add_argument(
        "--latency", type=float, default=Size.latency, help="seconds of delay to and from a slow database"
    )
    given = parser.parse_args()
    for name in given.scenarios:
        if name not in SCENARIOS:
            parser.error(f"{name} is not one of {', '.join(SCENARIOS)}")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    size = Size(clients=given.clients, rate=given.rate, outage=given.outage, latency=given.latency)
    results = [one(name, size) for name in given.scenarios or SCENARIOS]
    wrong = [f"{result.name}: {problem}" for result in results for problem in result.problems]
    sys.stdout.write("\n".join([table(results), *wrong]) + "\n")
    return 1 if any(result.problems for result in results) else 0


def one(name: str, size: Size) -> Result:
    """Run one scenario and print its progress."""
    began = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"{name} {time.monotonic() - began:5.1f} s  {text}\n")
        sys.stdout.flush()

    scenario = dataclasses.replace(SCENARIOS[name])
    result = asyncio.run(run(scenario, size, say))
    say(f"{'WRONG' if result.problems else 'right'}; unreachable at most {result.bound:g} s: {scenario.made_of}")
    return result


def table(results: list[Result]) -> str:
    """Format the results, one line each."""
    lines = [COLUMNS, *(_line(result) for result in results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _line(result: Result) -> tuple[str, ...]:
    totals = result.totals
    failed = ", ".join(f"{count} {code}" for code, count in sorted(totals.failed.items()))
    megabytes = [f"{sum(sizes) / max(1, len(sizes)) / 1e6:.0f}" for sizes in (result.before, result.after)]
    return (
        result.name,
        str(totals.made),
        str(totals.answered),
        failed or "0",
        str(totals.lost),
        str(len(totals.wrong)),
        f"{totals.longest:.1f} s (of {result.bound:g})",
        str(result.rows_left),
        f"{megabytes[0]} -> {megabytes[1]} MB",
    )


if __name__ == "__main__":
    sys.exit(main())
