"""The targets, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs

from tests.fuzz import frames, jsonrpc, opening

HERE = Path(__file__).parent
#: directories: inputs written by hand, inputs of earlier runs, inputs of bugs
KINDS = ("seeds", "corpus", "found")


@attrs.frozen
class Target:
    """A fuzz target: a function that takes any bytes."""

    name: str
    run: Callable[[bytes], None]
    #: bytes; the largest generated input
    largest: int

    @property
    def inputs(self) -> list[Path]:
        """Return the kept input files."""
        folders = [HERE / kind / self.name for kind in KINDS]
        return [path for folder in folders for path in sorted(folder.glob("[!.]*"))]


TARGETS = {
    target.name: target
    for target in (
        Target("frames", frames.target, 1400),
        Target("jsonrpc", jsonrpc.target, 1200),
        Target("opening", opening.target, 1200),
    )
}
