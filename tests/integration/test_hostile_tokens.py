"""Guessed, foreign and misplaced tokens and tickets: all are refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile import attacks
from tests.hostile.attack import Attack
from tests.hostile.node import BACKEND_TOKEN, TOKENS, MonitoredNode
from tests.hostile.suite import assert_withstands, monitored_node


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, MonitoredNode]]:
    """One node with tokens of a file, and one with those that a key has signed, for all attacks."""
    with (
        monitored_node(tmp_path_factory.mktemp("tokens"), "tokens") as tokens,
        monitored_node(tmp_path_factory.mktemp("jwt"), "jwt") as jwt,
    ):
        yield {"tokens": tokens, "jwt": jwt}


@pytest.mark.parametrize("attack", attacks.of("tokens", "jwts", "tickets"), ids=lambda one: one.name)
def test_node_withstands(nodes: dict[str, MonitoredNode], attack: Attack) -> None:
    node = nodes[attack.node]
    assert_withstands(node, [attack])
    log = node.node.log.read_text()
    # Those of the well-behaved and of the attackers; one that is signed, and a ticket, begin so.
    assert not [token for token in (*TOKENS.values(), BACKEND_TOKEN, "eyJ", "v1.tokens.") if token in log]
