"""The Origin header that websocket-client, which is not a browser, sends by default: that of the url."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
import websocket
from conftest import SHORT_TIMEOUT_OPTIONS
from fleet import TIMEOUT, Node, asynchronous

from tests.builders import bind, mariadb
from tests.builders.ports import free_port


async def connect(url: str, **options: Any) -> str:
    """Connect a client; return the message of a refusal, or an empty string."""

    def attempt() -> str:
        try:
            websocket.create_connection(f"{url}/v1/connect?client_id=a", timeout=TIMEOUT, **options).close()
        except websocket.WebSocketBadStatusException as e:
            refusal = {"status": e.status_code, **json.loads(e.resp_body)}
        else:
            return ""
        assert (refusal["status"], refusal["error"]) == (403, "origin")
        return str(refusal["message"])

    return await asyncio.to_thread(attempt)


@asynchronous
async def test_a_node_on_loopback(start: Callable[..., Node]) -> None:
    node = start("--auth", "none")
    for host in ("127.0.0.1", "localhost"):
        assert await connect(f"ws://{host}:{node.client_port}") == ""
    # The port is not this one's; a name that leads here is not this node's, whatever the Host header says.
    for origin in ("http://127.0.0.1:1", "http://localhost", "http://rebound.example:8080", "null"):
        refusal = await connect(f"ws://127.0.0.1:{node.client_port}", origin=origin, host=origin.partition("//")[2])
        assert refusal == f"pages of the origin {origin!r} may not connect here; --origin {origin} would let them in"


@asynchronous
async def test_a_node_on_ipv6_loopback(start: Callable[..., Node]) -> None:
    port = free_port()
    start("--auth", "none", listen=f"tcp6:{port}:interface=\\:\\:1:backlog=4096")
    assert await connect(f"ws://[::1]:{port}") == ""


@asynchronous
async def test_tls(start: Callable[..., Node], tmp_path: Path) -> None:
    authority, port = trustme.CA(), free_port()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
    start("--auth", "none", listen=f"ssl:{port}:privateKey={tmp_path / 'pem'}:interface=127.0.0.1:backlog=4096")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    assert await connect(f"wss://localhost:{port}", sslopt={"context": context}) == ""
    url = f"wss://localhost:{port}"
    refusal = await connect(url, sslopt={"context": context}, origin=f"http://localhost:{port}")
    assert f"--origin http://localhost:{port} would let them in" in refusal


@asynchronous
async def test_a_node_beyond_loopback(start: Callable[..., Node]) -> None:
    """Only the public url tells what its clients connect to."""
    port = free_port()
    listen = f"tcp:{port}:interface=0.0.0.0:backlog=4096"
    start("--auth", "none", "--public-url", f"ws://localhost:{port}", listen=listen)
    assert await connect(f"ws://localhost:{port}") == ""
    assert f"--origin http://127.0.0.1:{port} would" in await connect(f"ws://127.0.0.1:{port}")


@asynchronous
async def test_the_name_of_the_fleet(start: Callable[..., Node]) -> None:
    server, name = bind.server(), "origin.example.com"
    dns = ("--dns", f"{server.spec}:name={name}:address=127.0.0.1")
    node = start(*SHORT_TIMEOUT_OPTIONS, *dns, registry=mariadb.server().new_database())

    async def connect_by(host: str) -> str:
        # As a client would whose resolver leads the name here.
        connection = socket.create_connection(("127.0.0.1", node.client_port), TIMEOUT)
        return await connect(f"ws://{host}:{node.client_port}", socket=connection)

    assert await connect_by(name) == ""
    assert await connect_by("127.0.0.1") == ""
    assert "may not connect here" in await connect_by("other.example.com")


@asynchronous
async def test_backends_leave_it_out(start: Callable[..., Node]) -> None:
    node = start("--auth", "none")

    def attempt(**options: Any) -> None:
        websocket.create_connection(node.backend_url, timeout=TIMEOUT, **options).close()

    await asyncio.to_thread(attempt, suppress_origin=True)
    with pytest.raises(websocket.WebSocketBadStatusException) as refusal:
        await asyncio.to_thread(attempt)
    assert "suppress_origin=True" in json.loads(refusal.value.resp_body)["message"]
