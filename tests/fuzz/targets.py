"""The targets, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs

from tests.fuzz import frames, jsonrpc, opening

HERE = Path(__file__).parent
#: folders: inputs that somebody thought of, those that runs came upon, those at which something was wrong once
KINDS = ("seeds", "corpus", "found")


@attrs.frozen
class Target:
    """Something to be called with any bytes."""

    name: str
    run: Callable[[bytes], None]
    #: the largest input that is made of others, in bytes
    largest: int

    @property
    def inputs(self) -> list[Path]:
        """The files that are kept of it."""
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
