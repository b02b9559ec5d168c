"""Clients are moved to a node that joins, and to the emptiest when somebody says so: processes, a database, a herd."""

from __future__ import annotations

import asyncio
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
    """Asks whether all clients are there, and the shares within 10 % of each other."""

    async def ask() -> bool:
        found = await counts(nodes)
        return sum(found) == clients and max(found) <= 1.1 * min(found)

    return ask


async def all_answer(nodes: list[Node], herd: ClientGroup) -> None:
    """Each client answers for itself, whichever node is asked."""
    for node in nodes:
        async with node.backend() as backend:
            answers = await asyncio.gather(*(backend.call(client_id, "who") for client_id in herd.ids))
        assert [answer.get("result") for answer in answers] == herd.ids


@asynchronous
async def test_a_fourth_joins_three(start: Callable[..., Node], fleet: Callable[..., list[Node]]) -> None:
    nodes = fleet(3, *RATE)
    async with ClientGroup(nodes, CLIENTS, follow=True) as herd:
        assert await counts(nodes) == [CLIENTS / 3] * 3
        nodes.append(start(*SHORT_TIMEOUT_OPTIONS, *RATE, registry=nodes[0].registry))
        await eventually(even(nodes, CLIENTS), "the shares are within 10 % of each other")
        moved = sum([await node.metric("wsgateway_rebalanced_total") for node in nodes])
        assert 0.9 * CLIENTS / 4 <= moved <= 1.1 * CLIENTS / 4
        assert await nodes[3].metric("wsgateway_rebalanced_total") == 0
        # Nobody twice, nobody refused, nobody lost, and nobody closed but those who were told to move.
        told = Counter({client_id: len(goaways) for client_id, goaways in herd.goaways.items()})
        assert (set(told.values()), len(told), herd.ended, herd.refused) == ({1}, moved, moved, 0)
        assert {goaway["reason"] for goaways in herd.goaways.values() for goaway in goaways} == {"rebalance"}
        assert all(goaways[0]["url"].startswith(nodes[3].url) for goaways in herd.goaways.values())
        await all_answer(nodes, herd)
        # Whoever says so now gets what little is left moved, and still nobody twice.
        answer = await nodes[1].request("POST", "/v1/rebalance", {})
        assert answer.status == 202, answer.body
        assert set(answer.json) == {"nodes"}
        assert set(answer.json["nodes"]) == {node.node_id for node in nodes}
        left = sum(answer.json["nodes"].values())

        async def done() -> bool:
            return sum([await node.metric("wsgateway_rebalanced_total") for node in nodes]) >= moved + left

        await eventually(done, "the rest is moved")
        await eventually(even(nodes, CLIENTS), "the shares are within 10 % of each other")
        assert {len(goaways) for goaways in herd.goaways.values()} == {1}
        assert herd.refused == 0


@asynchronous
async def test_those_that_come_back_to_where_they_were(fleet: Callable[..., list[Node]]) -> None:
    """They do not look at the url, as behind a load balancer: they get to their node all the same, and stay there."""
    nodes = fleet(2, *RATE)
    redirect = {"Wsgateway-Redirect": "1"}
    async with (
        ClientGroup(nodes[:1], 40) as plain,
        ClientGroup(nodes[:1], 40, name="f", additional_headers=redirect) as following,
    ):
        answer = await nodes[1].request("POST", "/v1/rebalance", {})
        assert answer.json == {"nodes": {nodes[0].node_id: 40, nodes[1].node_id: 0}}
        await eventually(even(nodes, 80), "half of them are at the other node")
        for herd in (plain, following):
            assert ({len(told) for told in herd.goaways.values()}, herd.refused) == ({1}, 0)
            await all_answer(nodes, herd)
        assert await nodes[0].metric("wsgateway_relays") == len(plain.goaways)
        assert sorted(following.connected_to(nodes[1])) == sorted(following.goaways)
        assert (plain.connected_to(nodes[1]), len(plain.goaways) + len(following.goaways)) == ([], 40)


@asynchronous
async def test_off(start: Callable[..., Node]) -> None:
    url = mariadb.server().new_database()
    nodes = [start(*SHORT_TIMEOUT_OPTIONS, *rate, registry=url, ready=False) for rate in (OFF, OFF, RATE)]
    *off, on = [node.await_ready() for node in nodes]
    async with ClientGroup(off[:1], 20) as herd:
        for node in off:
            answer = await node.request("POST", "/v1/rebalance", {})
            assert (answer.status, answer.json["error"]) == (409, "off")
        answer = await on.request("POST", "/v1/rebalance", {})
        assert answer.json["nodes"] == {on.node_id: 0}
        assert set(answer.json["failed"]) == {node.node_id for node in off}
        assert all("--rebalance-rate" in why for why in answer.json["failed"].values())
        assert (await counts(nodes), herd.goaways) == ([20, 0, 0], {})
