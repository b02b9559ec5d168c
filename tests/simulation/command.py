"""The command line of the simulation."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.fleet import Options, Result, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--clients", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trace", metavar="FILE")
    parser.add_argument("--go-on", action="store_true")
    arguments = parser.parse_args()
    failed = 0
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        options = Options(
            seed,
            nodes=arguments.nodes,
            clients=arguments.clients,
            minutes=arguments.minutes,
            rate=arguments.rate,
            keep_trace=bool(arguments.trace),
            stop_at_violation=not arguments.go_on,
        )
        started = time.perf_counter()
        result = run(options)
        report(result, time.perf_counter() - started)
        failed += bool(result.violations)
        if arguments.trace:
            with open(arguments.trace, "w") as file:
                file.write("\n".join(result.lines or []) + "\n")
    sys.exit(bool(failed))


def report(result: Result, seconds: float) -> None:
    counts = result.counts
    sys.stdout.write(
        f"seed {result.options.seed}: {counts['calls']} calls, {counts['notifications']} notifications, "
        f"{len(result.plan)} faults, {result.simulated_seconds / seconds:.1f} times as fast as the clock, "
        f"trace {result.trace_hash}\n"
    )
    for letter in sorted({violation.letter for violation in result.violations}):
        of_letter = [violation for violation in result.violations if violation.letter == letter]
        sys.stdout.write(f"  {len(of_letter)} x {of_letter[0]}\n")
    sys.stdout.flush()
