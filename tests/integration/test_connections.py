"""Clients that come, are replaced, and go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
import websockets
from fleet import Node, asynchronous, closed, serving_client

from tests.builders.ports import free_port


@asynchronous
async def test_presence(node: Node) -> None:
    assert (await node.request("GET", "/v1/clients/acme%2Fdev-1")).status == 404
    async with node.connect("acme/dev-1") as client:
        assert client.subprotocol == "wsgateway.jsonrpc.v1"
        presence = (await node.request("GET", "/v1/clients/acme%2Fdev-1")).json
        nodes = (await node.request("GET", "/v1/nodes")).json["nodes"]
        assert presence["client_id"] == "acme/dev-1"
        assert presence["node"] == nodes[0]["node_id"]
        assert presence["node_name"] == nodes[0]["name"]
        assert presence["address"] == f"127.0.0.1:{client.local_address[1]}"
        assert set(presence) == {"client_id", "node", "node_name", "generation", "connected_at", "address"}
        assert nodes[0]["public_url"] == f"ws://127.0.0.1:{node.client_port}"
        assert nodes[0]["state"] == "up"


@asynchronous
async def test_the_list_of_clients_is_paged_in_order(node: Node) -> None:
    ids = sorted(["b", "a_1", "a%1".replace("%", "="), "a-1", "A", "a/1"])
    clients = [await node.connect(one) for one in ids]
    try:
        seen, after = [], ""
        while after is not None:
            page = (await node.request("GET", f"/v1/clients?limit=2&after={after}")).json
            seen += [one["client_id"] for one in page["clients"]]
            after = page["next"]
        assert seen == ids
        page = (await node.request("GET", "/v1/clients?prefix=a_")).json
        assert [one["client_id"] for one in page["clients"]] == ["a_1"]
    finally:
        for client in clients:
            await client.close()


@asynchronous
async def test_a_second_connection_replaces_the_first(node: Node) -> None:
    first = await node.connect("twin")
    generation = (await node.request("GET", "/v1/clients/twin")).json["generation"]
    async with serving_client(node, "twin"):
        assert await closed(first) == 4001
        presence = (await node.request("GET", "/v1/clients/twin")).json
        assert presence["generation"] > generation
        # The first one's disconnect is behind us, and has removed nothing.
        assert [row[0] for row in node.rows("clients")] == ["twin"]
        assert (await node.call("twin", "echo", [1])).json["result"] == [1]


@asynchronous
async def test_an_operator_disconnects_a_client(node: Node) -> None:
    async with node.connect("gone") as client:
        calling = asyncio.ensure_future(node.call("gone", "echo"))
        await client.recv()
        assert (await node.request("DELETE", "/v1/clients/gone")).status == 204
        assert (await node.request("GET", "/v1/clients/gone")).status == 404
        assert (await node.call("gone", "echo")).status == 404
        assert node.rows("clients") == []
        assert (await calling).json["error"]["code"] == -32003
        assert await closed(client) == 4003
    assert (await node.request("DELETE", "/v1/clients/gone")).status == 404


@asynchronous
async def test_refusals_of_the_opening_handshake(node: Node) -> None:
    for path, headers, status in (
        ("/v1/connect", {}, 400),
        ("/v1/connect?client_id=a&client_id=a", {}, 400),
        ("/v1/connect?client_id=a%20b", {}, 400),
        ("/v1/connect?client_id=..", {}, 400),
        ("/v1/connect?client_id=" + "x" * 129, {}, 400),
        ("/v1/elsewhere?client_id=a", {}, 404),
        ("/v1/connect?client_id=a", {"Origin": "https://evil.example"}, 403),
    ):
        with pytest.raises(websockets.InvalidStatus) as refusal:
            await websockets.connect(f"ws://127.0.0.1:{node.client_port}{path}", additional_headers=headers)
        response = refusal.value.response
        assert response.status_code == status, path
        assert response.headers["Content-Type"].startswith("application/json")
        assert set(json.loads(response.body)) == {"error", "message"}
    assert node.rows("clients") == []


@asynchronous
async def test_tokens(start: Callable[..., Node], tmp_path: Path) -> None:
    import hashlib

    tokens, backends = tmp_path / "tokens", tmp_path / "backends"
    tokens.write_text(f"# agents\nagent-1 {hashlib.sha256(b'secret').hexdigest()}\n")
    backends.write_text("backend-secret\n")
    node = start("--auth", f"tokens:{tokens}", "--backend-token-file", str(backends))

    async def refused(client_id: str, **kwargs: Any) -> int:
        with pytest.raises(websockets.InvalidStatus) as refusal:
            await node.connect(client_id, **kwargs)
        return int(refusal.value.response.status_code)

    def bearer(token: str) -> dict[str, Any]:
        return {"additional_headers": {"Authorization": f"Bearer {token}"}}

    assert await refused("agent-1") == 401
    assert await refused("agent-1", **bearer("wrong")) == 401
    assert await refused("agent-2", **bearer("secret")) == 403
    async with node.connect("", **bearer("secret")):
        assert (await node.call("agent-1", "echo")).status == 401
        mine = {"Authorization": "Bearer backend-secret"}
        assert (await node.request("GET", "/v1/clients/agent-1", headers=mine)).status == 200
        assert (await node.request("GET", "/healthz")).status == 200
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(node.backend_url)
        async with node.backend(additional_headers=mine) as backend:
            assert (await backend.request("client.get", {"client": "agent-1"}))["result"]["client_id"] == "agent-1"
    offered = ["wsgateway.jsonrpc.v1", "wsgateway.bearer.secret"]
    async with websockets.connect(node.url, subprotocols=offered) as browser:
        assert browser.subprotocol == "wsgateway.jsonrpc.v1"
    node.headers = mine
    assert await node.metric('wsgateway_token_refusals_total{reason="no_token"}') == 1
    assert await node.metric('wsgateway_token_refusals_total{reason="unknown_token"}') == 1
    log = node.log.read_text()
    assert "a token or certificate was refused: no token was presented" in log
    assert "secret" not in log.replace("backend-secret", "secret")


@asynchronous
async def test_tls_on_both_endpoints(start: Callable[..., Node], tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    certificate.private_key_pem.write_to_path(key)
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(chain, append=True)
    port = free_port()
    node = start("--auth", "none", listen=f"ssl:{port}:privateKey={key}:certKey={chain}:interface=127.0.0.1")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    url = f"wss://localhost:{port}/v1/connect"
    async with websockets.connect(f"{url}?client_id=secure", ssl=context) as client:
        calling = asyncio.ensure_future(node.call("secure", "echo"))
        request = json.loads(await client.recv())
        await client.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "x" * 500_000}))
        assert len((await calling).json["result"]) == 500_000
        assert (await node.request("GET", "/v1/nodes")).json["nodes"][0]["public_url"].startswith("wss://")
    with pytest.raises(websockets.InvalidStatus):
        await websockets.connect(url, ssl=context)
    # Most HTTP clients offer a protocol (RFC 7301), and browsers do.
    context.set_alpn_protocols(["http/1.1"])
    async with websockets.connect(f"{url}?client_id=offering", ssl=context):
        pass


@asynchronous
async def test_a_unix_socket(start: Callable[..., Node], tmp_path: Path) -> None:
    path = tmp_path / "clients.sock"
    node = start("--auth", "none", listen=f"unix:{path}")
    async with websockets.unix_connect(str(path), "ws://localhost/v1/connect?client_id=local"):
        assert (await node.request("GET", "/v1/clients/local")).json["address"] == "unix"


@asynchronous
async def test_behind_a_load_balancer_the_address_is_the_clients(start: Callable[..., Node]) -> None:
    port = free_port()
    node = start("--auth", "none", listen=f"haproxy:tcp:{port}:interface=127.0.0.1:backlog=4096")
    balancer = socket.create_connection(("127.0.0.1", port))
    balancer.sendall(b"PROXY TCP4 203.0.113.7 10.0.0.1 5555 443\r\n")
    async with websockets.connect("ws://gateway.example/v1/connect?client_id=far", sock=balancer):
        assert (await node.request("GET", "/v1/clients/far")).json["address"] == "203.0.113.7:5555"


@asynchronous
async def test_a_client_that_is_silent_is_pinged_and_then_dropped(start: Callable[..., Node]) -> None:
    node = start("--ping-interval", "0.5", "--ping-timeout", "0.5")
    async with node.connect("awake") as awake:
        dead = socket.create_connection(("127.0.0.1", node.client_port))
        dead.sendall(
            b"GET /v1/connect?client_id=dead HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := await asyncio.to_thread(dead.recv, 4096):
                received += chunk
        assert b"101 Switching Protocols" in received
        assert b"\x89" in received.partition(b"\r\n\r\n")[2]
        dead.close()
        assert (await node.request("GET", "/v1/clients/dead")).status == 404
        await (await awake.ping())
    assert await node.metric("wsgateway_ping_timeouts_total") == 1


@asynchronous
async def test_10000_connect_and_disconnect_cycles_leave_nothing_behind(node: Node) -> None:
    head = (
        "GET /v1/connect?client_id=cycle-%d HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    reset = struct.pack("ii", 1, 0)

    async def cycle(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", node.client_port)
        writer.write((head % (number % 500)).encode())
        if number % 3:
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        if number % 2:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        writer.close()

    async def cycles(total: int) -> None:
        for begin in range(0, total, 50):
            await asyncio.gather(*(cycle(begin + i) for i in range(50)))
        while await node.metric("wsgateway_clients") or node.rows("clients"):
            pass

    await cycles(1000)
    files, memory = node.open_files(), node.memory()
    await cycles(10000)
    assert node.open_files() <= files + 5
    assert node.memory() < memory + 4_000_000
