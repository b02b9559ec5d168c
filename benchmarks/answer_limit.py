"""Calls per second to one client, one after the other, with the limit of messages per client and without it, in turns.

    python -m benchmarks.answer_limit

Responses to calls in flight do not count towards ``--messages-per-client``, so that the two are alike.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from benchmarks import measure
from benchmarks.load import Load

LIMITS = {"at the default": "200", "without a limit": "0"}


def compare(rounds: int, seconds: float) -> dict[str, float]:
    """Return the median calls per second of each, and the median of their ratios."""
    rates: dict[str, list[float]] = {name: [] for name in LIMITS}
    with contextlib.ExitStack() as stack:
        loads = {
            name: stack.enter_context(
                Load(stack.enter_context(measure.start(measure.NODE, "--messages-per-client", limit)), 1)
            )
            for name, limit in LIMITS.items()
        }
        for load in loads.values():
            load.calls(1, seconds)
        for number in range(rounds):
            for name in sorted(loads, reverse=bool(number % 2)):
                rates[name].append(loads[name].calls(1, seconds).per_second)
    limited, unlimited = rates["at the default"], rates["without a limit"]
    return {
        "at the default": measure.median(limited),
        "without a limit": measure.median(unlimited),
        "ratio": measure.median(one / other for one, other in zip(limited, unlimited, strict=True)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.answer_limit``"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each load of calls (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="append what was measured to this file, as JSON lines")
    given = parser.parse_args(arguments)
    measure.pin()
    results = measure.Results("answer_limit", given.json)
    found = compare(given.runs, given.seconds)
    results.add(measure.NODE, rounds=given.runs, **found)
    row = (f"{found['at the default']:,.0f}", f"{found['without a limit']:,.0f}", f"{found['ratio']:.3f}")
    results.show(
        "Calls per second to one client",
        ("--messages-per-client 200", "--messages-per-client 0", "ratio"),
        [row],
        f"Medians of {given.runs} rounds, in turns, one call in flight.",
    )


if __name__ == "__main__":
    measure.main(main)
