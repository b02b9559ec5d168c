"""Parked clients behave like awake ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
import websockets
from fleet import Node, asynchronous, closed, serving_client

from tests.builders.ports import free_port

HEAD = (
    "GET /v1/connect?client_id=%s HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
RESET = struct.pack("ii", 1, 0)
#: a client's close frame with code 1000, masked with zeros
CLOSE = b"\x88\x82\0\0\0\0\x03\xe8"
#: what two proxies say (the PROXY protocol, versions 1 and 2), and the address in it
PROXY_1 = (b"PROXY TCP6 2001:db8::7 2001:db8::1 5555 443\r\n", "[2001:db8::7]:5555")
PROXY_2 = (
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes((203, 0, 113, 7, 10, 0, 0, 1)) + struct.pack("!HH", 5555, 443),
    "203.0.113.7:5555",
)


async def until(node: Node, name: str, value: float) -> None:
    """Wait until a metric has that value."""
    while await node.metric(f"wsgateway_{name}") != value:
        pass


async def none_left(node: Node) -> None:
    """Wait until no client is there, parked or awake, and no row."""
    for gauge in ("clients", "parked"):
        await until(node, gauge, 0)
    while node.rows("clients"):
        pass


async def raw(node: Node, client_id: str) -> socket.socket:
    """A client that does nothing by itself; open."""

    def open_() -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", node.client_port))
        connection.sendall((HEAD % client_id).encode())
        received = b""
        while not received.endswith(b"\r\n\r\n"):
            # No more than the head: what follows is read by the test.
            received += connection.recv(1)
        assert b" 101 " in received
        return connection

    return await asyncio.to_thread(open_)


async def read_to_the_end(connection: socket.socket) -> tuple[bytes, bool]:
    """All that comes, and whether the connection was reset."""
    received = b""
    with connection:
        while True:
            try:
                chunk = await asyncio.to_thread(connection.recv, 1 << 20)
            except ConnectionResetError:
                return received, True
            if not chunk:
                return received, False
            received += chunk


@pytest.fixture
def process() -> Any:
    """Starts clients in processes of their own; `client_id` connects and answers pings, nothing else."""
    program = "import asyncio, sys, websockets\nasync def main():\n c = await websockets.connect(sys.argv[1], ping_interval=None)\n print('open', flush=True)\n await c.wait_closed()\nasyncio.run(main())"
    running: list[subprocess.Popen[bytes]] = []

    def start(node: Node, client_id: str) -> subprocess.Popen[bytes]:
        one = subprocess.Popen(
            [sys.executable, "-c", program, f"{node.url}?client_id={client_id}"], stdout=subprocess.PIPE
        )
        running.append(one)
        assert one.stdout is not None
        assert one.stdout.readline() == b"open\n"
        return one

    yield start
    for one in running:
        one.kill()
        one.wait()
        one.stdout.close()


# Over each kind of endpoint.


@contextlib.asynccontextmanager
async def client_through(endpoint: str, start: Callable[..., Node], folder: Path) -> AsyncIterator[Any]:
    """A node that listens so, a client of it, and its address."""
    port, url = free_port(), "ws://gateway.example/v1/connect?client_id=one"
    path = folder / "clients.sock"
    listen = {"tcp": f"tcp:{port}", "unix": f"unix:{path}"}.get(endpoint, f"haproxy:tcp:{port}")
    node = start("--auth", "none", listen=listen + ("" if endpoint == "unix" else ":interface=127.0.0.1:backlog=4096"))
    if endpoint == "unix":
        async with websockets.unix_connect(str(path), url, ping_interval=None) as client:
            yield node, client, "unix"
        return
    connection = socket.create_connection(("127.0.0.1", port))
    address = "{}:{}".format(*connection.getsockname())
    if endpoint != "tcp":
        said, address = PROXY_1 if endpoint == "proxy 1" else PROXY_2
        connection.sendall(said)
    async with websockets.connect(url, sock=connection, ping_interval=None) as client:
        yield node, client, address


@pytest.mark.parametrize("endpoint", ["tcp", "proxy 1", "proxy 2", "unix"])
def test_each_endpoint(endpoint: str, start: Callable[..., Node], tmp_path: Path) -> Any:
    async def test() -> None:
        async with client_through(endpoint, start, tmp_path) as (node, client, address):
            for woken in range(2):
                await until(node, "parked", 1)
                assert await node.metric("wsgateway_clients") == 1
                assert (await node.request("GET", "/v1/clients/one")).json["address"] == address
                calling = asyncio.ensure_future(node.call("one", "echo", [woken]))
                request = json.loads(await client.recv())
                response = json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": request["params"]})
                await client.send(response)
                assert (await calling).json["result"] == [woken]
                await (await client.ping(b"still there?"))
                assert await node.metric("wsgateway_woken_total") == woken
                calling = asyncio.ensure_future(node.call("one", "echo", [woken]))
                request = json.loads(await client.recv())
                # In fragments, as no parked connection is read.
                response = json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "pieces"})
                await client.send([response[:10], "", response[10:]])
                assert (await calling).json["result"] == "pieces"
            await until(node, "parked", 1)
            await client.close(3000)
            await none_left(node)

    return asynchronous(test)()


@asynchronous
async def test_tls_clients_stay_awake(start: Callable[..., Node], tmp_path: Path) -> None:
    authority = trustme.CA()
    key = tmp_path / "key.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(key)
    port = free_port()
    node = start("--auth", "none", listen=f"ssl:{port}:privateKey={key}:certKey={key}:interface=127.0.0.1")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with websockets.connect(f"wss://localhost:{port}/v1/connect?client_id=one", ssl=context) as client:
        for size in (10, 500_000):
            calling = asyncio.ensure_future(node.call("one", "echo"))
            request = json.loads(await client.recv())
            await client.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "x" * size}))
            assert len((await calling).json["result"]) == size
            await (await client.ping())
        assert await node.metric("wsgateway_clients") == 1
        assert await node.metric("wsgateway_parked") == 0
        assert await node.metric("wsgateway_woken_total") == 0
    await none_left(node)


# Calls.


@asynchronous
async def test_calls_wake_no_client(node: Node) -> None:
    ids = [f"c-{i}" for i in range(30)]
    async with contextlib.AsyncExitStack() as stack:
        for one in ids:
            await stack.enter_async_context(serving_client(node, one))
        await until(node, "parked", 30)
        backend = await stack.enter_async_context(node.backend())
        for i in range(5):
            answers = await asyncio.gather(*(backend.call(one, "echo", [one, i]) for one in ids))
            assert [answer["result"] for answer in answers] == [[one, i] for one in ids]
        assert (await node.call("c-7", "echo", ["http"])).json["result"] == ["http"]
        assert await node.metric("wsgateway_parked") == 30
        assert await node.metric("wsgateway_woken_total") == 0


@asynchronous
async def test_large_messages_wake_a_client_that_is_parked_again(node: Node) -> None:
    async with serving_client(node, "large", max_size=None), node.backend() as backend:
        for i, size in enumerate((100_000, 1_000_000, 10)):
            await until(node, "parked", 1)
            answers = await asyncio.gather(*(backend.call("large", "echo", [one, "x" * size]) for one in range(3)))
            assert [answer["result"] for answer in answers] == [[one, "x" * size] for one in range(3)]
            assert (await node.metric("wsgateway_woken_total")) > min(i, 1) or size == 10
        await until(node, "parked", 1)


@asynchronous
async def test_client_that_does_not_read_is_closed_with_1013(start: Callable[..., Node]) -> None:
    node = start("--auth", "none", "--send-buffer", "200000", "--max-message-size", "100000")
    connection = await raw(node, "slow")
    await until(node, "parked", 1)
    async with node.backend() as backend:
        sent = 0
        while await node.metric("wsgateway_slow_readers_total") == 0:
            for sent in range(sent + 1, sent + 21):  # noqa: B020 (it goes on counting)
                await backend.request(
                    "client.notify", {"client": "slow", "method": "m", "params": [sent, "x" * 90_000]}
                )
            assert sent < 2000
        received, _ = await read_to_the_end(connection)
    numbers = [int(part.partition(b",")[0]) for part in received.split(b'"params":[')[1:]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert received.endswith(b"\x03\xf5reads too slowly")
    await none_left(node)


# Keep-alive.


@asynchronous
async def test_silent_clients_are_pinged_and_dropped(start: Callable[..., Node], process: Any) -> None:
    node = start("--auth", "none", "--ping-interval", "0.5", "--ping-timeout", "0.5")
    async with node.connect("alive"):
        stopped = process(node, "stopped")
        dead = await raw(node, "dead")
        await until(node, "parked", 3)
        stopped.send_signal(signal.SIGSTOP)
        received, was_reset = await read_to_the_end(dead)
        assert received == b"\x89\x00"
        assert was_reset
        await until(node, "ping_timeouts_total", 2)
        assert (await node.request("GET", "/v1/clients/dead")).status == 404
        assert (await node.request("GET", "/v1/clients/stopped")).status == 404
        assert [row[0] for row in node.rows("clients")] == ["alive"]
        assert await node.metric("wsgateway_parked") == 1
        assert await node.metric("wsgateway_woken_total") == 0


@asynchronous
async def test_park_after(start: Callable[..., Node]) -> None:
    node = start("--auth", "none", "--park-after", "1")
    async with serving_client(node, "one"):
        begin = time.monotonic()
        assert (await node.call("one", "echo", [1])).json["result"] == [1]
        assert await node.metric("wsgateway_parked") == 0
        await until(node, "parked", 1)
        # The client was active after the start.
        assert time.monotonic() - begin >= 1


# Ends.


@asynchronous
async def test_sigterm(start: Callable[..., Node]) -> None:
    node = start("--auth", "none", "--drain-seconds", "0.5")
    clients = [await node.connect(f"c-{i}") for i in range(10)]
    await until(node, "parked", 10)
    node.kill(signal.SIGTERM)
    for client in clients:
        goaway = json.loads(await client.recv())
        assert goaway["method"] == "gateway.goaway"
        assert goaway["params"]["reason"] == "drain"
        assert await closed(client) == 1012
    assert await node.ended() == 0
    assert node.rows("clients") == []


@asynchronous
async def test_sigint(node: Node) -> None:
    clients = [await node.connect(f"c-{i}") for i in range(10)]
    await until(node, "parked", 10)
    node.kill(signal.SIGINT)
    assert [await closed(client) for client in clients] == [1001] * 10
    assert await node.ended() == 0
    assert node.rows("clients") == []


@asynchronous
async def test_replaced_and_disconnected(node: Node) -> None:
    first = await node.connect("one")
    await until(node, "parked", 1)
    generation = (await node.request("GET", "/v1/clients/one")).json["generation"]
    second = await node.connect("one")
    assert await closed(first) == 4001
    await until(node, "parked", 1)
    assert await node.metric("wsgateway_clients") == 1
    assert (await node.request("GET", "/v1/clients/one")).json["generation"] > generation
    assert (await node.request("DELETE", "/v1/clients/one")).status == 204
    assert (await node.call("one", "echo")).status == 404
    assert node.rows("clients") == []
    assert await closed(second) == 4003


@asynchronous
async def test_a_client_that_dies(node: Node, process: Any) -> None:
    killed = process(node, "killed")
    reset = await raw(node, "reset")
    gone = await raw(node, "gone")
    await until(node, "parked", 3)
    calling = [asyncio.ensure_future(node.call(one, "echo")) for one in ("killed", "reset", "gone")]
    await until(node, "calls_in_flight", 3)
    killed.kill()
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    reset.close()
    gone.shutdown(socket.SHUT_WR)
    for call in calling:
        assert (await call).json["error"]["code"] == -32003
    await none_left(node)
    gone.close()


@asynchronous
async def test_2000_cycles_leak_nothing(node: Node) -> None:
    async def wave(number: int, size: int) -> None:
        connections = await asyncio.gather(*(raw(node, f"cycle-{i}") for i in range(size)))
        await until(node, "parked", size)
        for i, connection in enumerate(connections):
            if (number + i) % 3 == 0:
                connection.sendall(CLOSE)
            elif (number + i) % 3 == 1:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.close()
        await none_left(node)

    await wave(0, 200)
    files, memory = node.open_files(), node.memory()
    for number in range(10):
        await wave(number, 200)
    while node.open_files() > files:
        await node.metric("wsgateway_clients")
    assert await node.metric("wsgateway_opened_total") == 2200
    assert node.memory() < memory + 2_000_000
