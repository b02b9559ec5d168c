"""How many clients each node should have, and who moves how many where. No I/O, no state.

A node's share is its clients by its capacity; the mean is that of all together. Each node has a target, a whole number
of clients next to the mean, and all targets together are all clients:

    above its target  -> moves what is above, to those below theirs, to each in proportion to what it lacks
    below             <- never more than that

So every node that works this out from the same counts comes to the same moves, of which it makes its own, and together
they fill nobody beyond the mean. Only nodes that are ``up`` count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.registry.interface import NodeStatus

#: node_id of the one that moves them -> node_id of the one that they are moved to -> how many
Moves = dict[str, dict[str, int]]


def counted(nodes: Iterable[NodeStatus]) -> list[NodeStatus]:
    """Those that count, the fullest first, in the same order wherever this is asked."""
    up = [node for node in nodes if node.state == "up" and node.capacity > 0]
    return sorted(up, key=lambda node: (-node.clients / node.capacity, node.node_id))


def uneven(nodes: Iterable[NodeStatus], most: float, least: float = 0.0) -> bool:
    """Whether the share of any node is more than ``most`` times the mean, or less than ``least`` times."""
    up = counted(nodes)
    clients, capacity = sum(node.clients for node in up), sum(node.capacity for node in up)
    shares = [(node.clients * capacity, clients * node.capacity) for node in up]
    return any(share > most * mean or share < least * mean for share, mean in shares)


def targets(nodes: Iterable[NodeStatus]) -> dict[str, int]:
    """How many clients each node should have."""
    up = counted(nodes)
    clients, capacity = sum(node.clients for node in up), sum(node.capacity for node in up)
    found = {node.node_id: clients * node.capacity // capacity for node in up}
    # What the rounding has left is for the fullest: they have it already.
    for node in up[: clients - sum(found.values())]:
        found[node.node_id] += 1
    return found


def moves(nodes: Sequence[NodeStatus]) -> Moves:
    """Who moves how many where; nobody to a node without a url, nor beyond a node's capacity."""
    up, wanted = counted(nodes), targets(nodes)
    lacks = {node.node_id: max(0, min(wanted[node.node_id], node.capacity) - node.clients) for node in up}
    found: Moves = {}
    for source in up:
        there = [node.node_id for node in reversed(up) if lacks[node.node_id] and node.public_url]
        weights = [lacks[node_id] for node_id in there]
        excess = min(source.clients - wanted[source.node_id], sum(weights))
        if excess <= 0:
            continue
        found[source.node_id] = {}
        for node_id, number in zip(there, split(excess, weights), strict=True):
            lacks[node_id] -= number
            if number:
                found[source.node_id][node_id] = number
    return found


def split(number: int, weights: Sequence[int]) -> list[int]:
    """Split a number, at most the sum of the weights, in proportion to them; none gets more than its weight."""
    total = sum(weights)
    parts = [number * weight // total for weight in weights]
    most = sorted(range(len(weights)), key=lambda index: -(number * weights[index] % total))
    for index in most[: number - sum(parts)]:
        parts[index] += 1
    return parts


def lesser(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """What two plans of one node have in common."""
    return {node_id: min(number, other[node_id]) for node_id, number in one.items() if node_id in other}
