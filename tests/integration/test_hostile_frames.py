"""Hostile frames and messages: a node does about each what it is to do, and the well-behaved notice nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.websocket.reassembly import MAX_INCOMPLETE_MESSAGES
from tests.hostile import attacks
from tests.hostile.attack import Attack
from tests.hostile.attacks.frames import unfinished
from tests.hostile.node import MIB, MonitoredNode
from tests.hostile.suite import assert_withstands, monitored_node

#: the largest message of a node that holds no more than 4 MiB of those that are not whole
LIMIT = 16384
ATTACKS = attacks.of("frames", "messages", "responses", "reading")


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


def test_memory_of_incomplete_messages_is_limited(tmp_path: Path) -> None:
    with monitored_node(tmp_path, "open", "--max-message-size", str(LIMIT)) as node:
        many = MAX_INCOMPLETE_MESSAGES + 40
        with node.monitor() as reports:
            seen = unfinished(node.target, many, LIMIT)
        assert seen == {"nothing": MAX_INCOMPLETE_MESSAGES, "closed 1013": many - MAX_INCOMPLETE_MESSAGES}
        assert not reports[0].problems(4 * MAX_INCOMPLETE_MESSAGES * LIMIT // MIB)
