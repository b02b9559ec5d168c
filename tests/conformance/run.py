"""Runs the fuzzing client of the Autobahn test suite against nodes that echo, and judges what it found.

    python -m tests.conformance.run [--cases 6.*] WSTEST FOLDER

WSTEST is the program of that name (tools/make_venv27.sh makes an environment that has it); FOLDER gets the suite's
report, as JSON and as HTML. Two nodes go through the same cases as stock Autobahn does: one as it is, and one that parks
hastily. A case must come out no worse for either than for Autobahn; then the exit status is 0.

The cases 12.* and 13.* are about compression, which a node does not negotiate; 8.* and 11.* do not exist.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

CASES = ("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.*", "10.*")
CHECKOUT = Path(__file__).parents[2]

#: echo.py's servers, by which name they have in the report as well
NODE_SERVERS = ("node", "hasty")
REFERENCE_SERVER = "autobahn"

#: how long the suite may take for each server, in seconds: several times what it does
SUITE_TIMEOUT = 200.0
#: how long a server may take to begin, and to end, in seconds
SERVER_TIMEOUT = 20.0

#: what the suite says of a case's messages (``behavior``) and of its end (``behaviorClose``), from good to bad; whatever
#: else it may say is as bad as the last
RANKS = {
    "OK": 0,
    "INFORMATIONAL": 1,
    "NON-STRICT": 1,
    "FAILED BY CLIENT": 2,
    "WRONG CODE": 2,
    "UNCLEAN": 2,
    "FAILED": 3,
}
ASPECTS = ("behavior", "behaviorClose")
MISSING = "MISSING"

#: case -> aspect -> what the suite says
Outcomes = dict[str, dict[str, str]]


class SuiteError(Exception):
    """The suite could not be run."""


@attrs.frozen
class Difference:
    """An aspect of a case that came out differently for a node."""

    server: str
    case: str
    aspect: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return (
            f"{self.server}: case {self.case}: {self.aspect} is {self.ours}, and {self.theirs} with {REFERENCE_SERVER}"
        )

    @property
    def worse(self) -> bool:
        """Whether it came out worse than with Autobahn."""
        return rank(self.ours) > rank(self.theirs)


# What the suite found.


def rank(outcome: str) -> int:
    """How bad an outcome is."""
    return RANKS.get(outcome, max(RANKS.values()) + (outcome == MISSING))


def case_key(case: str) -> tuple[int, ...]:
    """By which cases are put in order: 9.2.1 comes before 10.1.1."""
    return tuple(int(part) for part in case.split("."))


def read_index(text: str) -> dict[str, Outcomes]:
    """The outcomes by server, of the text of the suite's ``index.json``.

    Raises :class:`Unable` for a text that is none.
    """
    try:
        index = {
            server: {case: {aspect: found[aspect] for aspect in ASPECTS} for case, found in cases.items()}
            for server, cases in json.loads(text).items()
        }
        for cases in index.values():
            sorted(cases, key=case_key)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SuiteError(f"the suite's index.json cannot be read: {type(e).__name__}: {e}") from None
    return index


def differences(index: dict[str, Outcomes], server: str) -> list[Difference]:
    """What came out differently for a node, in the order of the cases; a case that is not in the index is missing."""
    found = []
    none = dict.fromkeys(ASPECTS, MISSING)
    ours, theirs = index.get(server, {}), index.get(REFERENCE_SERVER, {})
    for case in sorted({*ours, *theirs}, key=case_key):
        for aspect in ASPECTS:
            one, other = ours.get(case, none)[aspect], theirs.get(case, none)[aspect]
            if one != other:
                found.append(Difference(server, case, aspect, one, other))
    return found


def failures(index: dict[str, Outcomes], counted: dict[str, dict[str, Any]]) -> list[str]:
    """Why the nodes are not conformant, a line each; empty if they are. ``counted`` is by server, too."""
    theirs = index.get(REFERENCE_SERVER)
    if not theirs:
        return [f"no case was run with {REFERENCE_SERVER}: there is nothing to compare with"]
    failed = []
    for server in NODE_SERVERS:
        missing = len(index.get(server, {}).keys() - theirs.keys())
        if missing:
            failed.append(
                f"{server}: {missing} cases were not run with {REFERENCE_SERVER}: there is nothing to compare with"
            )
        failed += [str(one) for one in differences(index, server) if one.worse]
        failed += [
            f"{server}: {name} is 0: what is to be tested did not happen"
            for name in ("texts_while_parked", "woken")
            if not counted[server].get(name)
        ]
    return failed


def table(index: dict[str, Outcomes]) -> str:
    """How many cases came out in which way, by server."""
    lines = [f"{'':12} {'cases':>6}  messages; end"]
    for server, cases in index.items():
        counts = []
        for aspect in ASPECTS:
            tally = Counter(outcomes[aspect] for outcomes in cases.values())
            counts.append(", ".join(f"{tally[name]} {name}" for name in sorted(tally, key=lambda n: (rank(n), n))))
        lines.append(f"{server:12} {len(cases):6}  {'; '.join(counts)}")
    return "\n".join(lines)


# Running it.


@attrs.define
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    #: what it counted, once it has ended
    counted: dict[str, Any] = attrs.field(factory=dict)


@contextlib.contextmanager
def serving(kind: str) -> Iterator[Server]:
    """Run one of echo.py's servers."""
    command = [sys.executable, "-m", "tests.conformance.echo", kind]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        begun, _, _ = select.select([process.stdout], [], [], SERVER_TIMEOUT)
        line = process.stdout.readline() if begun else ""
        if not line.strip().isdigit():
            raise SuiteError(f"the server {kind} did not start; what it says is above")
        server = Server(process, int(line))
        yield server
        process.terminate()
        try:
            said, _ = process.communicate(timeout=SERVER_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise SuiteError(f"the server {kind} did not end within {SERVER_TIMEOUT:g} s") from None
        if process.returncode:
            raise SuiteError(f"the server {kind} ended with {process.returncode}; what it says is above")
        server.counted = json.loads(said)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def fuzz(wstest: Path, folder: Path, ports: dict[str, int], cases: list[str]) -> None:
    """Run the fuzzing client against what listens at some ports, by name. Its report is in the folder afterwards."""
    specification = folder / "specification.json"
    specification.write_text(
        json.dumps(
            {
                "outdir": str(folder),
                "servers": [
                    {"agent": name, "url": f"ws://127.0.0.1:{port}/v1/connect"} for name, port in ports.items()
                ],
                "cases": cases,
                "exclude-cases": [],
                "exclude-agent-cases": {},
            }
        )
    )
    # No web server (-u 0); the report is what counts, the exit status says nothing.
    command = [str(wstest), "-m", "fuzzingclient", "-s", str(specification), "-u", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    log = folder / "suite.log"
    patience = SUITE_TIMEOUT * len(ports)
    try:
        with log.open("wb") as output:
            subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=patience,
            )
    except subprocess.TimeoutExpired:
        raise SuiteError(f"the suite did not end within {patience:g} s: see {log}") from None
    except OSError as e:
        raise SuiteError(f"{wstest}: {e.strerror}") from None


def run(wstest: Path, folder: Path, cases: list[str]) -> tuple[dict[str, Outcomes], dict[str, dict[str, Any]]]:
    """Run the suite against all servers. What it found, and what they counted, by server.

    Raises :class:`Unable`.
    """
    if not os.access(wstest, os.X_OK):
        raise SuiteError(f"there is no program {wstest}: tools/make_venv27.sh makes an environment that has it")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        servers = {kind: stack.enter_context(serving(kind)) for kind in (*NODE_SERVERS, REFERENCE_SERVER)}
        fuzz(wstest, folder, {kind: server.port for kind, server in servers.items()}, cases)
    index = folder / "index.json"
    if not index.exists():
        raise SuiteError(f"the suite made no report: see {folder / 'suite.log'}")
    return read_index(index.read_text()), {kind: server.counted for kind, server in servers.items()}


def main() -> int:
    """Run it, and tell what came of it. The exit status: 0 conformant, 1 not, 2 not run."""
    parser = argparse.ArgumentParser(description="The Autobahn test suite against nodes that echo.")
    parser.add_argument("wstest", type=Path, help="the program wstest of autobahntestsuite")
    parser.add_argument("folder", type=Path, help="where the report goes; it is emptied first")
    parser.add_argument("--cases", action="append", help="which cases, such as 6.* (all but those of compression)")
    options = parser.parse_args()
    # Whatever ends this ends the processes that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    try:
        index, counted = run(options.wstest.absolute(), options.folder.absolute(), options.cases or list(CASES))
    except SuiteError as e:
        sys.stderr.write(f"conformance: {e}\n")
        return 2
    lines = [table(index), *(f"{kind} counted {json.dumps(counts)}" for kind, counts in counted.items()), ""]
    lines += [str(one) for kind in NODE_SERVERS for one in differences(index, kind) if not one.worse]
    failed = failures(index, counted)
    lines += failed
    lines.append(f"in {time.monotonic() - began:.0f} s; the report: {options.folder / 'index.html'}")
    lines.append("FAILED: a node does worse than Autobahn" if failed else "OK: the nodes do no worse than Autobahn")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
