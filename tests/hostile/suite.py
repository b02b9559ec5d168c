"""Shared by the integration tests: a monitored node for a module, and the assertion that it withstands attacks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hostile.attack import Attack, Size
from tests.hostile.node import MonitoredNode

#: seconds that the node is monitored at least, even for a shorter attack
MIN_DURATION = 0.1


@contextlib.contextmanager
def monitored_node(folder: Path, kind: str = "open", *options: str) -> Iterator[MonitoredNode]:
    """A monitored node, stopped at the end."""
    node = MonitoredNode(folder, kind, *options)
    try:
        yield node
    finally:
        node.stop()


def assert_withstands(node: MonitoredNode, attacks: Sequence[Attack], size: Size = Size()) -> None:  # noqa: B008 (it is frozen)
    """Run attacks at the same time; assert that the outcomes are as expected, and that the node has no problems."""
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
