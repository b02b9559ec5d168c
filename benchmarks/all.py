"""Run all benchmarks except rpc and million, in under ten minutes; write their tables and a chart of the ratios.

    python -m benchmarks.all                        write benchmarks/results.txt and benchmarks/results.png
    python -m benchmarks.all --output /tmp/here     write to this folder
    python -m benchmarks.all --only calls,idle --peers nats,picows

A benchmark that fails, or for which no time is left, is named at the end of the text, and the exit status is 1. The
results of the others are kept. The most important benchmarks run first.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure, plot

#: time for all benchmarks together, in seconds
TIME_LIMIT = 590
#: width of text outside tables, in characters
WIDTH = 110
#: programs and their arguments; --peers is added to those that compare with other servers
PROGRAMS: dict[str, tuple[str, ...]] = {
    "calls": ("--runs", "3", "--seconds", "1", "--in-flight", "64,1000"),
    "idle": ("--runs", "1"),
    "openings": ("--runs", "1"),
    "wake": ("--runs", "1"),
    "gc_pause": ("--runs", "1"),
    "notifications": ("--runs", "2", "--seconds", "1"),
    "tls": ("--runs", "1", "--first", "200", "--clients", "1200"),
}
COMPARE_WITH_PEERS = ("calls", "idle", "notifications")
#: compared only with Autobahn
WITH_AUTOBAHN = ("openings",)


def run_one(name: str, peers: Sequence[str], json_path: Path, end: float) -> str | None:
    """Run a benchmark in its own process. Returns why it failed, or ``None``."""
    if not (measure.CHECKOUT / "benchmarks" / f"{name}.py").exists():
        return "there is no such program"
    remaining = end - time.monotonic()
    if remaining < 20:
        return "no time was left"
    chosen = peers if name in COMPARE_WITH_PEERS else ["autobahn"] if name in WITH_AUTOBAHN else None
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(json_path), *PROGRAMS[name]]
    if chosen is not None:
        command += ["--peers", ",".join(chosen)]
    process = measure.spawn(command, core=None)
    try:
        status = process.wait(remaining)
    except subprocess.TimeoutExpired:
        return f"it was stopped after the time limit of {TIME_LIMIT} s"
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
    return f"it exited with {status}" if status else None


def text_of(lines: Sequence[dict[str, Any]], failures: dict[str, str], seconds: dict[str, float]) -> str:
    """Format all tables under a description of the machine. ``seconds`` is the duration of each program."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    text = [
        f"wsgateway beside its peers, {today}, {sum(seconds.values()) / 60:.1f} minutes",
        "",
        *textwrap.wrap(measure.machine() + ".", WIDTH),
        *textwrap.wrap(
            f"The server used core {measure.SERVER_CORE}, the load core {measure.LOAD_CORE}. The node ran with "
            f"{' '.join(measure.NODE_OPTIONS)}, and defaults for all other settings.",
            WIDTH,
        ),
        "",
        *(line["text"] for line in lines if "text" in line),
        *(f"{name} is missing: {reason}." for name, reason in failures.items()),
        f"Seconds: {', '.join(f'{name} {duration:.0f}' for name, duration in seconds.items())}.",
    ]
    return "\n".join(text).rstrip() + "\n"


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--only", default=",".join(PROGRAMS), help="which benchmarks (default: %(default)s)")
    options.add_argument(
        "--output", type=Path, default=measure.CHECKOUT / "benchmarks", help="a folder (default: %(default)s)"
    )
    arguments = options.parse_args()
    peers, names = measure.peers_of(arguments), arguments.only.split(",")
    if unknown := set(names) - set(PROGRAMS):
        sys.exit(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(PROGRAMS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    failures: dict[str, str] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="wsgateway-bench-") as folder:
        json_path = Path(folder) / "results.json"
        json_path.touch()
        for name in names:
            program_started = time.monotonic()
            if reason := run_one(name, peers, json_path, started + TIME_LIMIT):
                failures[name] = reason
                print(f"{name} is missing: {reason}", file=sys.stderr, flush=True)
            seconds[name] = time.monotonic() - program_started
        lines = [json.loads(line) for line in json_path.read_text().splitlines()]
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = arguments.output / "results.txt"
    text.write_text(text_of(lines, failures, seconds))
    print(f"written: {text}")
    picture = arguments.output / "results.png"
    try:
        plot.draw(lines, picture)
    except ImportError as e:
        print(f"no picture: {e}", file=sys.stderr)
    else:
        print(f"written: {picture}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    measure.main(main)
