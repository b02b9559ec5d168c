"""A node and its open files: what it may open, and what becomes of connections when it may open no more."""

import asyncio
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import fleet
import pytest
from fleet import Node, asynchronous, serving_client

#: what the processes of these tests may open, and what comes of it
FILES = 256
CAPACITY = 192


@pytest.fixture
def start_small(start: Callable[..., Node]) -> Callable[..., Node]:
    """Starts nodes that may open few files, and fewer before they raise their limit."""
    few = f'ulimit -Sn {FILES // 2} && ulimit -Hn {FILES} && exec "$@"'

    def start_small(*options: str, **more: Any) -> Node:
        with mock.patch.object(fleet, "TWISTD", ("sh", "-c", few, "sh", *fleet.TWISTD)):
            return start("--auth", "none", "--openings-per-address", "0", *options, **more)

    return start_small


def open_connections(port: int, count: int) -> list[socket.socket]:
    """Begin so many connections, and say nothing."""
    sockets = [socket.socket() for _ in range(count)]
    for socket_ in sockets:
        socket_.setblocking(False)
        socket_.connect_ex(("127.0.0.1", port))
    return sockets


async def accept_errors(node: Node, reason: str) -> float:
    """How often the node accepted nothing for that reason."""
    text = (await node.request("GET", "/metrics")).body.decode()
    found = re.search(rf'^wsgateway_accept_errors_total{{reason="{reason}"}} (\S+)', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@asynchronous
async def test_a_node_raises_its_limit(start_small: Callable[..., Node]) -> None:
    node = start_small()
    limits = Path(f"/proc/{node.process.pid}/limits").read_text()
    assert re.search(r"Max open files +(\d+) +(\d+)", limits).groups() == (str(FILES), str(FILES))
    assert await node.metric("wsgateway_capacity") == CAPACITY


@asynchronous
async def test_a_capacity_above_the_limit_ends_it(start_small: Callable[..., Node]) -> None:
    node = start_small("--capacity", str(CAPACITY + 1), ready=False)
    assert await node.ended() == 1
    said = node.process.stderr.read().decode().splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"wsgateway: --capacity: {CAPACITY + 1} is more than this process may open: {CAPACITY}")


@asynchronous
async def test_open_files_run_out(start_small: Callable[..., Node]) -> None:
    node = start_small()
    begun = time.monotonic()
    async with serving_client(node, "here-before"):
        at_rest = node.open_files()
        # More than all files, and hundreds of them wait.
        clients = open_connections(node.client_port, 2 * FILES)
        await until(lambda: node.open_files() >= FILES - FILES // 16)

        # Clients leave some files to backends: health checks and calls go on.
        for _ in range(50):
            assert (await node.request("GET", "/healthz")).status == 200
        assert (await node.call("here-before", "echo", [1])).json["result"] == [1]
        assert await accept_errors(node, "reserve") >= 1
        assert await accept_errors(node, "EMFILE") == 0

        # Backends take them, too: there is not a single file.
        backends = open_connections(node.backend_port, FILES // 8)
        await until(lambda: node.open_files() == FILES)
        waiting = asyncio.ensure_future(node.request("GET", "/healthz"))
        newcomer = asyncio.ensure_future(node.connect("newcomer").__aenter__())
        await asyncio.sleep(1)

        # All of them go, and those who waited get in.
        for socket_ in clients + backends:
            socket_.close()
        assert (await waiting).status == 200
        await (await newcomer).close()
        assert (await node.call("here-before", "echo", [2])).json["result"] == [2]
        assert await accept_errors(node, "EMFILE") >= 1
        await until(lambda: node.open_files() <= at_rest)

        # A reactor that spins counts thousands, and Twisted writes three lines for each.
        elapsed = time.monotonic() - begun
        tries = await accept_errors(node, "EMFILE") + await accept_errors(node, "reserve")
        assert tries <= 2 * (4 * elapsed + 1)
        lines = node.log.read_text().splitlines()
        logged = [line for line in lines if "EMFILE" in line or "reserve" in line]
        assert 1 <= len(logged) <= 1 + elapsed / 10
        assert "LimitNOFILE" in logged[0]
        assert str(FILES) in logged[0]
