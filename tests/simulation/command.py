"""The command line of the simulation.

python -m tests.simulation --seed 7 --nodes 3 --minutes 10
python -m tests.simulation --seed 7 --shrink
python -m tests.simulation --soak 10
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time

import attrs

from tests.simulation.faults import Fault
from tests.simulation.fleet import Options, Result, run
from tests.simulation.shrink import Shrinker
from tests.simulation.soak import soak


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description="Run a whole fleet under simulated time, and check what must never happen. Exits with 1 if it does.",
    )
    parser.add_argument("--seed", type=int, default=1, help="first seed (default: 1)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, each a run (default: 1)")
    parser.add_argument("--nodes", type=int, default=3, help="2 to 7 (default: 3)")
    parser.add_argument("--clients", type=int, default=60, help="default: 60")
    parser.add_argument("--minutes", type=float, default=2.0, help="simulated minutes with faults (default: 2)")
    parser.add_argument("--rate", type=float, default=100.0, help="messages per second of all backends (default: 100)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--calm", action="store_true", help="only what no call may suffer from: drains, moves, reconnects"
    )
    kind.add_argument("--stormy", action="store_true", help="all kinds of faults; by default the seed decides")
    parser.add_argument("--faults", metavar="FILE", help="take the faults from a file, as --shrink writes it")
    parser.add_argument("--go-on", action="store_true", help="do not end at the first violation")
    parser.add_argument(
        "--trace", metavar="FILE", nargs="?", const="-", help="write the trace; - or no FILE: to stdout"
    )
    parser.add_argument(
        "--only", metavar="TEXT", help="only lines of the trace with this word, such as client-7 or 4711"
    )
    parser.add_argument("--shrink", action="store_true", help="make the failing run as small as possible")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="run seeds on all cores for so long")
    parser.add_argument("--calls", type=int, default=0, help="with --soak: end after so many calls")
    return parser


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    if not 2 <= arguments.nodes <= 7:
        parser.error("--nodes: 2 to 7")
    options = Options(
        arguments.seed,
        nodes=arguments.nodes,
        clients=arguments.clients,
        minutes=arguments.minutes,
        rate=arguments.rate,
        is_calm=True if arguments.calm else False if arguments.stormy else None,
        plan=read_plan(arguments.faults) if arguments.faults else None,
        keep_trace=arguments.trace is not None,
        stop_at_violation=not arguments.go_on,
    )
    if arguments.soak:
        sys.exit(soak(options, minutes=arguments.soak, max_calls=arguments.calls, report=write))
    failed = False
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        started_at = time.process_time()
        result = run(attrs.evolve(options, seed=seed))
        write(describe(result, time.process_time() - started_at))
        failed = failed or bool(result.violations)
        if result.violations and arguments.shrink:
            result = shrink(result)
        if arguments.trace is not None:
            write_trace(result, arguments.trace, arguments.only)
    sys.exit(failed)


def write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def describe(result: Result, seconds: float) -> str:
    """Describe a run that has taken so many seconds of CPU time."""
    counts = result.counts
    lines = [
        f"seed {result.options.seed}: {counts['calls']} calls, {counts['notifications']} notifications, "
        f"{len(result.plan)} faults, {result.simulated_seconds / max(seconds, 1e-9):.1f} times as fast as the clock, "
        f"trace {result.trace_hash}"
    ]
    for letter in sorted({violation.letter for violation in result.violations}):
        of_letter = [violation for violation in result.violations if violation.letter == letter]
        lines.append(f"  {len(of_letter)} x {of_letter[0]}")
    return "\n".join(lines)


def shrink(result: Result) -> Result:
    """Make a failing run smaller, and tell how to repeat it."""
    shrinker = Shrinker(result, report=lambda line: write(f"  {line}"))
    options = shrinker.shrink()
    path = f"simulation-{options.seed}.json"
    with open(path, "w", encoding="utf-8") as file:
        json.dump([attrs.asdict(fault) for fault in options.plan or ()], file, indent=1)
    write("the smallest run that fails in this way has these faults:")
    for fault in options.plan or ():
        write(f"  {fault}")
    write(describe(shrinker.result, 1.0).partition("\n")[2])
    write(f"repeat it with:\n  {repeat_command(options, path)}")
    return run(attrs.evolve(options, keep_trace=result.options.keep_trace))


def repeat_command(options: Options, path: str) -> str:
    """Return the command that repeats a run with the faults of a file."""
    calm = {None: "", True: " --calm", False: " --stormy"}[options.is_calm]
    return (
        f"python -m tests.simulation --seed {options.seed} --nodes {options.nodes} --clients {options.clients}"
        f" --minutes {options.minutes!r} --rate {options.rate!r}{calm} --faults {path} --trace"
    )


def read_plan(path: str) -> tuple[Fault, ...]:
    """Read the faults that ``--shrink`` has written."""
    with open(path, encoding="utf-8") as file:
        return tuple(Fault(**fault) for fault in json.load(file))


def write_trace(result: Result, path: str, only: str | None) -> None:
    """Write the trace, or the lines of it that have a word; faults and violations in any case."""
    pattern = None if only is None else re.compile(rf"(?<![\w-]){re.escape(only)}(?![\w-])|FAULT|VIOLATION")
    lines = [line for line in result.lines or () if pattern is None or pattern.search(line)]
    if path == "-":
        write("\n".join(lines))
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join([*lines, ""]))
