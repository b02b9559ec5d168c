"""One client that connects at two nodes in the same moment: one of them has it in the end, and both know."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import websockets
from fleet import Node, asynchronous, eventually

ROUNDS, AT_ONCE = 260, 20


async def one_round(nodes: list[Node], client_id: str) -> Any:
    """Connect at both nodes at once; the connection that is left, when the other was closed as it should be."""
    sockets = await asyncio.gather(*(node.connect(client_id) for node in nodes))
    ends = [asyncio.ensure_future(socket.wait_closed()) for socket in sockets]
    done, pending = await asyncio.wait(ends, timeout=20, return_when="FIRST_COMPLETED")
    assert len(done) == 1, f"{client_id}: {len(done)} of 2 connections closed"
    pending.pop().cancel()
    older = ends[0] in done
    assert sockets[not older].close_code == 4001
    return sockets[older]


async def answers_through(node: Node, client_id: str, survivor: Any) -> None:
    calling = asyncio.ensure_future(node.call(client_id, "who", timeout=10))
    request = asyncio.ensure_future(survivor.recv())
    await asyncio.wait([calling, request], return_when="FIRST_COMPLETED")
    assert request.done(), (await calling).body
    number = (await request).split('"id":"')[1].split('"')[0]
    await survivor.send(f'{{"jsonrpc":"2.0","id":"{number}","result":"{client_id}"}}')
    assert (await calling).json["result"] == client_id


@pytest.mark.parametrize("on_elsewhere", ["route", "takeover"])
@asynchronous
async def test_one_connection_is_left(fleet: Callable[..., list[Node]], registry: str, on_elsewhere: str) -> None:
    nodes = fleet(2, "--on-elsewhere", on_elsewhere, registry=registry)
    survivors: dict[str, Any] = {}
    for begin in range(0, ROUNDS, AT_ONCE):
        ids = [f"twin-{begin + i}" for i in range(AT_ONCE)]
        survivors.update(zip(ids, await asyncio.gather(*(one_round(nodes, one) for one in ids)), strict=True))

    async def settled() -> bool:
        return len(nodes[0].rows("clients")) == ROUNDS

    await eventually(settled, "one row for each client")
    # The row is that of the survivor: any node finds it by that row.
    for node in nodes:
        for begin in range(0, ROUNDS, AT_ONCE):
            batch = list(survivors.items())[begin : begin + AT_ONCE]
            await asyncio.gather(*(answers_through(node, client_id, socket) for client_id, socket in batch))
    assert all(socket.state is websockets.State.OPEN for socket in survivors.values())
    await asyncio.gather(*(socket.close() for socket in survivors.values()))

    async def empty() -> bool:
        return not nodes[0].rows("clients")

    await eventually(empty, "no row is left of clients that are gone")
