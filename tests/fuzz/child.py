"""One target under libFuzzer: ``python -m tests.fuzz.child TARGET ARGUMENT...``, as ``python -m tests.fuzz`` runs it."""

from __future__ import annotations

import os
import shlex
import sys

import atheris

#: the modules of which it counts what is reached
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
    """Fuzz until libFuzzer ends the process."""
    os.nice(19)
    with atheris.instrument_imports(include=WATCHED):
        from tests.fuzz.targets import TARGETS
    # By this libFuzzer starts itself again, through a shell, to merge.
    command = shlex.join([sys.executable, "-m", "tests.fuzz.child", name])
    atheris.Setup([command, *arguments], TARGETS[name].run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
