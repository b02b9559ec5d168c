"""A proxy that shares its connections to a node among its clients, and checks the port that it forwards to."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import websockets.asyncio.client
from fleet import Node, asynchronous, eventually, serving_client

from tests.builders.ports import free_port

CONFIGURATION = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout tunnel 60s

frontend backends
    bind 127.0.0.1:{front}
    default_backend node

backend node
    # All requests, of all clients, on as few connections as possible.
    http-reuse always
    server node 127.0.0.1:{backend} pool-max-conn 1

backend clients
    # Many proxies can only check the port that they forward to, and say what they like in Host.
    option httpchk GET /readyz
    http-check send hdr Host 203.0.113.9
    server node 127.0.0.1:{clients} check inter 100ms fall 1 rise 1

listen statistics
    bind 127.0.0.1:{statistics}
    stats enable
    stats uri /
"""


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Callable[[Node], tuple[int, int]]]:
    """Starts haproxy in front of a node. Returns its port, and that of its statistics."""
    processes = []

    def start(node: Node) -> tuple[int, int]:
        front, statistics = free_port(), free_port()
        path = tmp_path / "haproxy.cfg"
        path.write_text(
            CONFIGURATION.format(
                front=front, statistics=statistics, backend=node.backend_port, clients=node.client_port
            )
        )
        program = shutil.which("haproxy") or "/usr/sbin/haproxy"
        processes.append(subprocess.Popen([program, "-db", "-f", path], stderr=subprocess.DEVNULL))
        return front, statistics

    yield start
    for process in processes:
        process.terminate()
        process.wait()


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def is_up(port: int) -> Callable[[], Awaitable[bool]]:
    async def ask() -> bool:
        try:
            return get(port, "/healthz")[0] == 200
        except OSError:
            return False

    return ask


@asynchronous
async def test_websocket_after_requests_of_others(
    start: Callable[..., Node], proxy: Callable[[Node], tuple[int, int]]
) -> None:
    node = start("--auth", "none")
    front, _ = proxy(node)
    await eventually(is_up(front), "the proxy runs")
    async with serving_client(node, "robot-7"):
        for _ in range(3):
            # The proxy uses the connection of this request for the next one.
            assert get(front, "/v1/nodes")[0] == 200
            url = f"ws://127.0.0.1:{front}/v1/backend"
            async with websockets.asyncio.client.connect(url) as backend:
                request = {"jsonrpc": "2.0", "id": 1, "method": "client.get", "params": {"client": "robot-7"}}
                await backend.send(json.dumps(request))
                assert json.loads(await backend.recv())["result"]["client_id"] == "robot-7"


@asynchronous
async def test_health_check_of_the_client_port(
    start: Callable[..., Node], proxy: Callable[[Node], tuple[int, int]]
) -> None:
    node = start("--auth", "none", "--drain-seconds", "5")
    _, statistics = proxy(node)

    async def state(expected: str) -> bool:
        try:
            rows = get(statistics, "/;csv")[1].decode().splitlines()
        except OSError:
            return False
        names = rows[0].split(",")
        row = next(row.split(",") for row in rows if row.startswith("clients,node,"))
        return row[names.index("status")].startswith(expected)

    await eventually(lambda: state("UP"), "the node takes clients")
    async with serving_client(node, "robot-7"):
        node.process.terminate()
        await eventually(lambda: state("DOWN"), "the node drains")


@asynchronous
async def test_health_checks_while_openings_are_at_their_limit(start: Callable[..., Node]) -> None:
    """The proxy does not send the PROXY protocol: all that it forwards has its address, as its checks have."""
    node = start("--auth", "none", "--openings-per-address", "0", "--max-openings", "20")

    async def stay_silent() -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", node.client_port)
                await reader.read()
                writer.close()
            # 400 openings per second in all.
            await asyncio.sleep(0.25)

    statuses = [await asyncio.to_thread(get, node.client_port, "/readyz")]
    silent = [asyncio.create_task(stay_silent()) for _ in range(20 + 256 + 100)]
    try:
        await asyncio.sleep(0.5)
        for _ in range(20):
            with contextlib.suppress(OSError, http.client.HTTPException):
                statuses.append(await asyncio.to_thread(get, node.client_port, "/readyz"))
            await asyncio.sleep(0.05)
    finally:
        for task in silent:
            task.cancel()
    assert statuses == [(200, b'{"ready":true}')] * 21


def test_encoded_body(start: Callable[..., Node]) -> None:
    node = start("--auth", "none")
    body = gzip.compress(b'{"jsonrpc":"2.0","id":1,"method":"m"}')
    connection = http.client.HTTPConnection("127.0.0.1", node.backend_port, timeout=5)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    connection.request("POST", "/v1/clients/x/rpc", body, headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert (response.status, answer["error"], response.headers["Accept-Encoding"]) == (415, "encoding", "identity")
    assert response.headers["Cache-Control"] == "no-store"
    connection.close()
