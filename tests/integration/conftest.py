"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Node


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts nodes, all on one registry; whatever still runs at the end of the test is killed."""
    nodes: list[Node] = []

    def start(*options: str, ready: bool = True, **more: Any) -> Node:
        node = Node(tmp_path, *options, **more)
        nodes.append(node)
        return node.await_ready() if ready else node

    yield start
    for node in nodes:
        if node.process.poll() is None:
            node.kill()
        node.process.wait()
        node.process.stderr.close()


@pytest.fixture
def node(start: Callable[..., Node]) -> Node:
    """A node that takes any client, without a limit of openings from one address."""
    return start("--auth", "none", "--openings-per-address", "0")
