"""What is asked of every node at once: who answered, and who could not be asked."""

from __future__ import annotations

from typing import Any, TypeVar

from twisted.internet.defer import Deferred, DeferredList

from gateway.cluster.interface import PeerUnreachable

T = TypeVar("T")


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
