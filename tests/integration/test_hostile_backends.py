"""Hostile requests where backends and nodes connect: the node does about each what it is to do, and the well-behaved notice nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile import attacks
from tests.hostile.attack import Attack
from tests.hostile.node import MonitoredNode
from tests.hostile.suite import assert_withstands, monitored_node

ATTACKS = attacks.of("http", "peers")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredNode]:
    """One node, for all attacks."""
    with monitored_node(tmp_path_factory.mktemp("hostile")) as node:
        yield node


@pytest.mark.parametrize("attack", [one for one in ATTACKS if not one.is_slow], ids=lambda one: one.name)
def test_node_withstands(node: MonitoredNode, attack: Attack) -> None:
    assert_withstands(node, [attack])


def test_node_withstands_slow_attacks(node: MonitoredNode) -> None:
    assert_withstands(node, [one for one in ATTACKS if one.is_slow])
