"""Hostile opening handshakes: a node does about each what it is to do, and the well-behaved notice nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile import attacks
from tests.hostile.attack import Attack
from tests.hostile.node import Watched
from tests.hostile.suite import watched, withstands

ATTACKS = attacks.of("heads", "storms", "tls")


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
