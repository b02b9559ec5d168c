"""What is asked of every node at once: who answered, and who could not be asked."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, DeferredList

from gateway.cluster.interface import PeerUnreachable

T = TypeVar("T")

#: what nodes call what one asks of another
_QUESTION = re.compile(r"\Apeer\.[a-z_]+: ")


def why(problem: PeerUnreachable) -> str:
    """Why a node could not be asked, for who knows nothing of what nodes say to each other."""
    return _QUESTION.sub("", str(problem))


async def answers(asked: dict[str, Deferred[T]]) -> tuple[dict[str, T], dict[str, PeerUnreachable]]:
    """Wait for what each node was asked, by node_id: what they answered, and why the others could not be asked. Raises
    what any of it fails with beside that."""
    outcomes: list[tuple[bool, Any]] = await DeferredList(list(asked.values()), consumeErrors=True)
    answered, unreachable = {}, {}
    for node_id, (done, outcome) in zip(asked, outcomes, strict=True):
        if done:
            answered[node_id] = outcome
        elif outcome.check(PeerUnreachable):
            unreachable[node_id] = outcome.value
        else:
            outcome.raiseException()
    return answered, unreachable
