"""All benchmarks but the million, in under ten minutes: one text with every table, and one picture of the ratios.

    python -m benchmarks.all                        writes benchmarks/results.txt and benchmarks/results.png
    python -m benchmarks.all --output /tmp/here     writes there
    python -m benchmarks.all --only calls,idle --peers nats,picows

A benchmark that fails, or for which no time is left, is named at the end of the text, and the status is 1; the others
stand. Those that matter most come first.
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

#: seconds for all of them together
TIME_LIMIT = 590
#: columns of the text that is not a table
WIDTH = 110
#: what is run, and how; the peers are added to those that compare with any of them
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
#: handshakes are compared with bare ones alone
WITH_AUTOBAHN = ("openings",)


def run_one(name: str, peers: Sequence[str], kept: Path, end: float) -> str | None:
    """Run a benchmark as a program of its own; why it failed, or nothing."""
    if not (measure.CHECKOUT / "benchmarks" / f"{name}.py").exists():
        return "there is no such program"
    left = end - time.monotonic()
    if left < 20:
        return "no time was left"
    chosen = peers if name in COMPARE_WITH_PEERS else ["autobahn"] if name in WITH_AUTOBAHN else None
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(kept), *PROGRAMS[name]]
    if chosen is not None:
        command += ["--peers", ",".join(chosen)]
    process = measure.spawn(command, core=None)
    try:
        status = process.wait(left)
    except subprocess.TimeoutExpired:
        return f"it was stopped when {TIME_LIMIT} s were over"
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
    return f"it ended with {status}" if status else None


def text_of(lines: Sequence[dict[str, Any]], failures: dict[str, str], seconds: dict[str, float]) -> str:
    """Every table, below what they were measured on; ``seconds`` is how long each program took."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    parts = [
        f"wsgateway beside its peers, {today}, {sum(seconds.values()) / 60:.1f} minutes",
        "",
        *textwrap.wrap(measure.machine() + ".", WIDTH),
        *textwrap.wrap(
            f"The server had core {measure.SERVER_CORE}, the load core {measure.LOAD_CORE}. The node ran with "
            f"{' '.join(measure.NODE_OPTIONS)}, and with every other setting as it is by default.",
            WIDTH,
        ),
        "",
        *(line["text"] for line in lines if "text" in line),
        *(f"{name} is missing: {why}." for name, why in failures.items()),
        f"Seconds: {', '.join(f'{name} {took:.0f}' for name, took in seconds.items())}.",
    ]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--only", default=",".join(PROGRAMS), help="which benchmarks (default: %(default)s)")
    options.add_argument(
        "--output", type=Path, default=measure.CHECKOUT / "benchmarks", help="a folder (default: %(default)s)"
    )
    given = options.parse_args()
    peers, names = measure.peers_of(given), given.only.split(",")
    if unknown := set(names) - set(PROGRAMS):
        sys.exit(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(PROGRAMS)}")
    given.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    failures: dict[str, str] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="wsgateway-bench-") as folder:
        kept = Path(folder) / "results.json"
        kept.touch()
        for name in names:
            started = time.monotonic()
            if why := run_one(name, peers, kept, began + TIME_LIMIT):
                failures[name] = why
                print(f"{name} is missing: {why}", file=sys.stderr, flush=True)
            seconds[name] = time.monotonic() - started
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
    if given.json:
        given.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = given.output / "results.txt"
    text.write_text(text_of(lines, failures, seconds))
    print(f"written: {text}")
    picture = given.output / "results.png"
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
