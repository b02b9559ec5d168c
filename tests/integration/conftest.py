"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Node

from tests.builders import mariadb

#: short leases, and no rebalancing by default
SHORT_TIMEOUT_OPTIONS = (
    *("--auth", "none", "--openings-per-address", "0"),
    *("--lease", "2", "--heartbeat", "0.5", "--rebalance-rate", "0"),
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts nodes, all on one registry; whatever still runs at the end of the test is killed."""
    nodes: list[Node] = []

    def start(*options: str, ready: bool = True, **more: Any) -> Node:
        node = Node(tmp_path, *options, **more)
        nodes.append(node)
        return node.await_ready() if ready else node

    yield start
    end(nodes)


def end(nodes: list[Node]) -> None:
    for node in nodes:
        if node.process.poll() is None:
            node.kill()
        node.process.wait()
        node.process.stderr.close()


@pytest.fixture
def node(start: Callable[..., Node]) -> Node:
    """A node that takes any client, without a limit of openings from one address."""
    return start("--auth", "none", "--openings-per-address", "0")


@pytest.fixture(params=["mysql", "sqlite"])
def registry(request: pytest.FixtureRequest) -> str:
    """Each kind of registry, as ``Node`` takes it."""
    return mariadb.server().new_database() if request.param == "mysql" else ""


@pytest.fixture
def fleet(start: Callable[..., Node]) -> Callable[..., list[Node]]:
    """Starts some nodes at the same time, on a database of MariaDB unless another registry is given."""

    def fleet(count: int, *options: str, registry: str | None = None, **more: Any) -> list[Node]:
        url = mariadb.server().new_database() if registry is None else registry
        nodes = [start(*SHORT_TIMEOUT_OPTIONS, *options, ready=False, registry=url, **more) for _ in range(count)]
        return [node.await_ready() for node in nodes]

    return fleet


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """Three nodes and a MariaDB, for all tests of a module that leave them as they were."""
    folder, url = tmp_path_factory.mktemp("three"), mariadb.server().new_database()
    nodes = [Node(folder, *SHORT_TIMEOUT_OPTIONS, registry=url) for _ in range(3)]
    yield [node.await_ready() for node in nodes]
    end(nodes)
