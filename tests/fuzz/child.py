"""Run one target under libFuzzer: ``python -m tests.fuzz.child TARGET ARGUMENT...``, used by ``python -m tests.fuzz``."""

from __future__ import annotations

import os
import shlex
import sys

import atheris

#: modules with coverage instrumentation
WATCHED = [
    "gateway.protocol",
    "gateway.websocket",
    "gateway.clients",
    "gateway.rpc",
    "gateway.api",
    "gateway.auth",
    "autobahn.websocket.protocol",
]


def main(name: str, arguments: list[str]) -> None:
    """Fuzz until libFuzzer exits."""
    os.nice(19)
    with atheris.instrument_imports(include=WATCHED):
        from tests.fuzz.targets import TARGETS
    # libFuzzer starts this command again, through a shell, to merge.
    command = shlex.join([sys.executable, "-m", "tests.fuzz.child", name])
    atheris.Setup([command, *arguments], TARGETS[name].run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
