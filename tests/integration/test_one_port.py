"""Four nodes behind one client port: all cores of one machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable

import pytest
from conftest import SHORT_TIMEOUT_OPTIONS
from fleet import Node, asynchronous, eventually, serving_client

from tests.builders.ports import free_port

CLIENTS = 48


def start_four(start: Callable[..., Node], how: str, registry: str) -> list[Node]:
    """Four nodes on one port, each with a socket of its own or all with one that they inherit."""
    ports = [(free_port(), free_port()) for _ in range(4)]
    with contextlib.ExitStack() as stack:
        options: dict[str, object] = {"registry": registry}
        listen = f"tcp:{ports[0][0]}:interface=127.0.0.1:backlog=4096:reuseport=yes"
        if how == "fd":
            # As a supervisor of several nodes does: listen, pass the socket on, close it.
            inherited = stack.enter_context(socket.create_server(("127.0.0.1", ports[0][0]), backlog=4096))
            listen = f"fd:{inherited.fileno()}"
            options["inherited"] = [inherited.fileno()]
        nodes = [
            start(*SHORT_TIMEOUT_OPTIONS, ready=False, listen=listen, ports=(ports[0][0], backend), **options)
            for _, backend in ports
        ]
    return [node.await_ready() for node in nodes]


@pytest.mark.parametrize(("how", "registry"), [("reuseport", "mysql"), ("fd", "sqlite")], indirect=["registry"])
@asynchronous
async def test_clients_are_spread_and_can_be_called_through_any(
    start: Callable[..., Node], registry: str, how: str
) -> None:
    nodes = start_four(start, how, registry)
    async with contextlib.AsyncExitStack() as stack:
        for i in range(CLIENTS):
            await stack.enter_async_context(serving_client(nodes[0], f"c-{i}", lambda _, i=i: f"c-{i}"))
        held = [await node.metric("wsgateway_clients") for node in nodes]
        assert sum(held) == CLIENTS
        assert sum(count > 0 for count in held) >= (4 if how == "reuseport" else 1), held
        for node in nodes:
            async with node.backend() as backend:
                answers = await asyncio.gather(*(backend.call(f"c-{i}", "who") for i in range(CLIENTS)))
            assert [answer.get("result") for answer in answers] == [f"c-{i}" for i in range(CLIENTS)]


@pytest.mark.parametrize("how", ["reuseport", "fd"])
@asynchronous
async def test_the_others_go_on_when_one_ends(start: Callable[..., Node], how: str) -> None:
    nodes = start_four(start, how, "")
    os.kill(nodes[0].process.pid, signal.SIGINT)
    assert await nodes[0].ended() == 0
    for i in range(12):
        async with serving_client(nodes[1], f"c-{i}"):
            assert (await nodes[1].call(f"c-{i}", "echo", [i])).json["result"] == [i]

    async def empty() -> bool:
        return not nodes[1].rows("clients")

    await eventually(empty, "no row is left")
