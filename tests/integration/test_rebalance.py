"""Rebalancing when a node joins and on request, with node processes and a database."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from client_group import ClientGroup
from conftest import SHORT_TIMEOUT_OPTIONS
from fleet import Node, asynchronous, eventually

from tests.builders import mariadb

CLIENTS = 360
RATE, OFF = ("--rebalance-rate", "200"), ("--rebalance-rate", "0")


async def counts(nodes: list[Node]) -> list[float]:
    return [await node.metric("wsgateway_clients") for node in nodes]


def even(nodes: list[Node], clients: int) -> Callable[[], object]:
    """Return a check that all clients are connected, and the nodes' shares within 10 % of each other."""

    async def ask() -> bool:
        found = await counts(nodes)
        return sum(found) == clients and max(found) <= 1.1 * min(found)

    return ask


def counts_known(nodes: list[Node]) -> Callable[[], object]:
    """Return a check that each node has learned the present counts of the others, from their heartbeats."""
    since = time.monotonic()

    async def ask() -> bool:
        listed = (await nodes[0].request("GET", "/v1/nodes")).json["nodes"]
        elapsed = time.monotonic() - since
        # A node reads the others' rows at its own heartbeat, every 0.5 s.
        return all(elapsed - node["heartbeat_age"] > 0.6 for node in listed)

    return ask


async def all_answer(nodes: list[Node], group: ClientGroup) -> None:
    """Each client answers calls through every node."""
    for node in nodes:
        async with node.backend() as backend:
            answers = await asyncio.gather(*(backend.call(client_id, "who") for client_id in group.ids))
        assert [answer.get("result") for answer in answers] == group.ids


@asynchronous
async def test_clients_are_moved_to_a_joining_node(
    start: Callable[..., Node], fleet: Callable[..., list[Node]]
) -> None:
    nodes = fleet(3, *RATE)
    async with ClientGroup(nodes, CLIENTS, follow=True) as group:
        assert await counts(nodes) == [CLIENTS / 3] * 3
        nodes.append(start(*SHORT_TIMEOUT_OPTIONS, *RATE, registry=nodes[0].registry))
        await eventually(even(nodes, CLIENTS), "the shares are within 10 % of each other")
        moved = sum([await node.metric("wsgateway_rebalanced_total") for node in nodes])
        assert 0.9 * CLIENTS / 4 <= moved <= 1.1 * CLIENTS / 4
        assert await nodes[3].metric("wsgateway_rebalanced_total") == 0
        # No client was moved twice, refused or lost; only connections of moved clients were closed.
        counts_of_goaways = Counter({client_id: len(goaways) for client_id, goaways in group.goaways.items()})
        assert (set(counts_of_goaways.values()), len(counts_of_goaways), group.ended, group.refused) == (
            {1},
            moved,
            moved,
            0,
        )
        assert {goaway["reason"] for goaways in group.goaways.values() for goaway in goaways} == {"rebalance"}
        assert all(goaways[0]["url"].startswith(nodes[3].url) for goaways in group.goaways.values())
        await all_answer(nodes, group)
        # A request moves the few clients that are left, and no client twice.
        answer = await nodes[1].request("POST", "/v1/rebalance", {})
        assert answer.status == 202, answer.body
        assert set(answer.json) == {"nodes"}
        assert set(answer.json["nodes"]) == {node.node_id for node in nodes}
        left = sum(answer.json["nodes"].values())

        async def done() -> bool:
            return sum([await node.metric("wsgateway_rebalanced_total") for node in nodes]) >= moved + left

        await eventually(done, "the rest is moved")
        await eventually(even(nodes, CLIENTS), "the shares are within 10 % of each other")
        assert {len(goaways) for goaways in group.goaways.values()} == {1}
        assert group.refused == 0


@asynchronous
async def test_moved_clients_that_reconnect_to_the_old_node(fleet: Callable[..., list[Node]]) -> None:
    """Clients that ignore the url, as behind a load balancer, are relayed or redirected to the new node, and stay there."""
    nodes = fleet(2, *RATE)
    redirect = {"Wsgateway-Redirect": "1"}
    async with (
        ClientGroup(nodes[:1], 40) as plain,
        ClientGroup(nodes[:1], 40, name="f", additional_headers=redirect) as following,
    ):
        await eventually(counts_known(nodes), "the nodes know of all clients")
        answer = await nodes[1].request("POST", "/v1/rebalance", {})
        assert answer.json == {"nodes": {nodes[0].node_id: 40, nodes[1].node_id: 0}}
        await eventually(even(nodes, 80), "half of them are at the other node")
        for group in (plain, following):
            assert ({len(goaways) for goaways in group.goaways.values()}, group.refused) == ({1}, 0)
            await all_answer(nodes, group)
        assert await nodes[0].metric("wsgateway_relays") == len(plain.goaways)
        assert sorted(following.connected_to(nodes[1])) == sorted(following.goaways)
        assert (plain.connected_to(nodes[1]), len(plain.goaways) + len(following.goaways)) == ([], 40)


@asynchronous
async def test_rebalancing_disabled(start: Callable[..., Node]) -> None:
    url = mariadb.server().new_database()
    nodes = [start(*SHORT_TIMEOUT_OPTIONS, *rate, registry=url, ready=False) for rate in (OFF, OFF, RATE)]
    *off, on = [node.await_ready() for node in nodes]
    async with ClientGroup(off[:1], 20) as group:
        for node in off:
            answer = await node.request("POST", "/v1/rebalance", {})
            assert (answer.status, answer.json["error"]) == (409, "off")
        answer = await on.request("POST", "/v1/rebalance", {})
        assert answer.json["nodes"] == {on.node_id: 0}
        assert set(answer.json["failed"]) == {node.node_id for node in off}
        assert all("--rebalance-rate" in why for why in answer.json["failed"].values())
        assert (await counts(nodes), group.goaways) == ([20, 0, 0], {})
