"""Hostile frames and messages: a node does about each what it is to do, and the well-behaved notice nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.websocket.limits import MOST_MESSAGES
from tests.hostile import attacks
from tests.hostile.attack import Attack
from tests.hostile.attacks.frames import unfinished
from tests.hostile.node import MIB, Watched
from tests.hostile.suite import watched, withstands

#: the largest message of a node that holds no more than 4 MiB of those that are not whole
LIMIT = 16384
ATTACKS = attacks.of("frames", "messages", "responses", "reading")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One node, for all attacks."""
    with watched(tmp_path_factory.mktemp("hostile")) as node:
        yield node


@pytest.mark.parametrize("attack", [one for one in ATTACKS if not one.patient], ids=lambda one: one.name)
def test_the_node_withstands(node: Watched, attack: Attack) -> None:
    withstands(node, [attack])


def test_it_withstands_what_takes_seconds(node: Watched) -> None:
    withstands(node, [one for one in ATTACKS if one.patient])


def test_messages_that_are_never_whole_take_so_much_memory_and_no_more(tmp_path: Path) -> None:
    with watched(tmp_path, "open", "--max-message-size", str(LIMIT)) as node:
        many = MOST_MESSAGES + 40
        with node.watched() as reports:
            seen = unfinished(node.target, many, LIMIT)
        assert seen == {"nothing": MOST_MESSAGES, "closed 1013": many - MOST_MESSAGES}
        assert not reports[0].problems(4 * MOST_MESSAGES * LIMIT // MIB)
