"""Fuzz the parsers of untrusted input with atheris, which is libFuzzer for Python.

    python -m tests.fuzz                                 each target for ten minutes
    python -m tests.fuzz frames opening --seconds 60     some targets, each for a minute
    python -m tests.fuzz frames --again FILE             run one input again, without atheris
    python -m tests.fuzz --keep                          keep the new inputs of a run in tests/fuzz/corpus

Each target runs in a separate process, at the lowest priority, and starts with the kept inputs (targets.py); new inputs
are in ``build/fuzz/``. It ends at the first failure: an assertion, an exception, a minute for one input, or a
gigabyte of memory. The exit status is then 1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.fuzz.targets import HERE, TARGETS, Target

CHECKOUT = HERE.parents[1]
BUILD = CHECKOUT / "build" / "fuzz"
#: seconds for one input
INPUT_TIMEOUT = 60
MAX_MEMORY_MIB = 1024
#: limits of the corpus of one target
MAX_KEPT_FILES = 100
MAX_KEPT_BYTES = 100_000
MISSING = (
    "atheris, by which this fuzzes, is not installed: pip install -e '.[fuzz]' with CPython 3.11 to 3.13 on Linux or "
    "macOS, of which it has wheels; this is Python {version}. The suite runs the inputs that are kept without it."
)


def main() -> int:
    """Run the command line; return the exit status."""
    options = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("targets", nargs="*", metavar="TARGET", help=f"some of {', '.join(TARGETS)} (default: all)")
    options.add_argument("--seconds", type=int, default=600, help="for each target (default: %(default)s)")
    options.add_argument("--again", type=Path, metavar="FILE", help="run one target with this input, and nothing else")
    options.add_argument("--keep", action="store_true", help="then keep a small set of inputs that reaches as much")
    given = options.parse_args()
    unknown = [name for name in given.targets if name not in TARGETS]
    if unknown or (given.again and len(given.targets) != 1):
        options.error(f"no such target: {unknown[0]}" if unknown else "--again needs one target")
    chosen = [TARGETS[name] for name in given.targets or TARGETS]
    if given.again:
        chosen[0].run(given.again.read_bytes())
        print_line(f"{chosen[0].name}: passed")
        return 0
    try:
        import atheris  # noqa: F401
    except ImportError:
        print_error(MISSING.format(version=".".join(map(str, sys.version_info[:3]))))
        return 1
    finds = sum(not fuzz(target, given.seconds) for target in chosen)
    if given.keep and not finds:
        for target in chosen:
            save_inputs(target)
    return 1 if finds else 0


def fuzz(target: Target, seconds: int) -> bool:
    """Fuzz one target; return whether there was no failure."""
    folder = BUILD / target.name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for path in target.inputs:
        shutil.copy(path, corpus / path.name)
    log = folder / "log"
    print_line(f"{target.name}: {seconds} s, from {len(list(corpus.iterdir()))} inputs; the log is {shown(log)}")
    with open(log, "wb") as output:
        status = child(target, output, f"-max_total_time={seconds}", "-print_final_stats=1", str(corpus))
    output_text = log.read_text(errors="replace")
    print_line(f"{target.name}: {summary(output_text)}")
    if status == 0:
        return True
    print_error("".join(output_text[-4000:].partition("=== Uncaught Python exception: ===")[1:]))
    paths = re.findall(r"Test unit written to (\S+)", output_text)
    if not paths:
        print_error(f"{target.name}: it ended with {status}; see {shown(log)}")
        return False
    path = shown(Path(paths[-1]))
    print_error(f"{target.name}: failed. Run again: python -m tests.fuzz {target.name} --again {path}")
    print_error(f"Once it is fixed: cp {path} tests/fuzz/found/{target.name}/a-name-that-says-what-it-was")
    return False


def child(target: Target, output: object, *arguments: str) -> int:
    """Run libFuzzer with these and the common arguments; return its exit status."""
    command = [
        *(sys.executable, "-m", "tests.fuzz.child", target.name, f"-max_len={target.largest}"),
        *(f"-timeout={INPUT_TIMEOUT}", f"-rss_limit_mb={MAX_MEMORY_MIB}", f"-artifact_prefix={BUILD / target.name}/"),
        "-len_control=0",
    ]
    words = HERE / f"{target.name}.dict"
    if words.exists():
        command.append(f"-dict={words}")
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONHASHSEED": "0"}
    return subprocess.call(
        [*command, *arguments], cwd=CHECKOUT, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
    )  # fmt: skip


def save_inputs(target: Target) -> None:
    """Replace the corpus by a small set of inputs with the same coverage as the run."""
    kept = HERE / "corpus" / target.name
    # First the inputs that cover all lines; then, as far as there is room, those that cover other counts, small and large.
    inputs = merged(target, "-use_counters=0")
    more = [data for data in merged(target, "-use_counters=1") if data not in inputs]
    room = min(max(0, MAX_KEPT_FILES - len(inputs)), len(more))
    inputs += [more[number * len(more) // room] for number in range(room)]
    if not inputs:
        print_error(f"{target.name}: nothing is kept; see {shown(BUILD / target.name / 'merge.log')}")
        return
    kept.mkdir(parents=True, exist_ok=True)
    for path in kept.iterdir():
        path.unlink()
    size = number = 0
    for data in inputs[:MAX_KEPT_FILES]:
        if size + len(data) <= MAX_KEPT_BYTES:
            number, size = number + 1, size + len(data)
            (kept / hashlib.sha1(data).hexdigest()[:12]).write_bytes(data)
    print_line(f"{target.name}: {number} of {len(inputs)} inputs kept, {size} bytes")


def merged(target: Target, how: str) -> list[bytes]:
    """Return the smallest set of inputs with the coverage of the run, the smallest inputs first."""
    folder = BUILD / target.name
    smallest = folder / "merged"
    shutil.rmtree(smallest, ignore_errors=True)
    smallest.mkdir()
    with open(folder / "merge.log", "wb") as output:
        child(target, output, "-merge=1", how, str(smallest), str(folder / "corpus"))
    return sorted((path.read_bytes() for path in smallest.iterdir()), key=len)


def summary(log: str) -> str:
    """Summarize a run in one line."""
    runs = re.findall(r"^stat::number_of_executed_units: +(\d+)", log, re.MULTILINE)
    reached = re.findall(r"\bcov: (\d+) ft: (\d+) corp: (\d+)", log)
    if not reached:
        return "it did not get past the inputs that are kept"
    (before, *_), (after, features, inputs) = reached[0], reached[-1]
    executions = runs[-1] if runs else "some"
    return f"{executions} executions; {before} -> {after} lines of code, {features} features, {inputs} inputs"


def print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def print_error(text: str) -> None:
    """Print an error."""
    sys.stderr.write(f"{text}\n")


def shown(path: Path) -> str:
    """Return a path relative to the current directory."""
    return os.path.relpath(path, Path.cwd())


if __name__ == "__main__":
    sys.exit(main())
