"""What the integration tests share: a watched node for a module, and whether it withstands an attack."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hostile.attack import Attack, Size
from tests.hostile.node import MonitoredNode

#: for so long the well-behaved go on at least, in seconds, however short an attack is
MIN_DURATION = 0.1


@contextlib.contextmanager
def monitored_node(folder: Path, kind: str = "open", *options: str) -> Iterator[MonitoredNode]:
    """A node that is watched, and ended."""
    node = MonitoredNode(folder, kind, *options)
    try:
        yield node
    finally:
        node.stop()


def assert_withstands(node: MonitoredNode, attacks: Sequence[Attack], size: Size = Size()) -> None:  # noqa: B008 (it is frozen)
    """Let attacks happen, all at the same time, and see that the node does about each what it is to do, and that nobody
    and nothing else suffers."""
    with node.monitor() as reports:
        began = time.monotonic()
        with ThreadPoolExecutor(len(attacks)) as pool:
            seen = list(pool.map(lambda attack: attack.run(node.target, size), attacks))
        time.sleep(max(0.0, MIN_DURATION + began - time.monotonic()))
    problems = [
        f"{attack.name}: {problem}"
        for attack, of_it in zip(attacks, seen, strict=True)
        for problem in attack.unexpected(of_it)
    ]
    problems += reports[0].problems(sum(attack.memory for attack in attacks))
    assert not problems, "\n".join(problems)
