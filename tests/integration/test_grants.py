"""Two customers on two nodes, a token for each: neither reaches, or hears of, the clients of the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from conftest import SHORT_TIMEOUT_OPTIONS, end
from fleet import BackendConnection, Node, asynchronous, eventually, serving_client

from tests.builders import mariadb

TOKENS = "operator\nacme prefix=acme/\nbeta prefix=beta/\n"
NOTE = {"jsonrpc": "2.0", "method": "hello"}
ALL_KINDS = {"kinds": ["connected", "disconnected", "message"]}
#: when this has come, whatever was sent before it has
LAST = "last"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """Two nodes and a MariaDB, for all these tests."""
    folder, url = tmp_path_factory.mktemp("two"), mariadb.server().new_database()
    path = folder / "backends"
    path.write_text(TOKENS)
    nodes = [Node(folder, *SHORT_TIMEOUT_OPTIONS, "--backend-token-file", str(path), registry=url) for _ in range(2)]
    for node in nodes:
        node.headers = bearer("operator")
    yield [node.await_ready() for node in nodes]
    end(nodes)


def backend(node: Node, token: str) -> BackendConnection:
    return node.backend(additional_headers=bearer(token))


@contextlib.asynccontextmanager
async def clients(nodes: list[Node]) -> AsyncIterator[dict[str, Any]]:
    """Of each customer one on each node, which answer with their ids; by id."""
    async with contextlib.AsyncExitStack() as stack:
        yield {
            client_id: await stack.enter_async_context(serving_client(node, client_id, lambda _, id=client_id: id))
            for n, node in enumerate(nodes)
            for client_id in (f"acme/{n}", f"beta/{n}")
        }


@asynchronous
async def test_one_customer_over_http(two: list[Node]) -> None:
    async with clients(two):
        for n, node in enumerate(two):
            ask = lambda *arguments, node=node: node.request(*arguments, headers=bearer("acme"))  # noqa: E731
            page = await ask("GET", "/v1/clients")
            assert [each["client_id"] for each in page.json["clients"]] == ["acme/0", "acme/1"]
            response = await ask("POST", "/v1/clients?prefix=acme/", NOTE)
            assert (response.status, response.json["nodes"]) == (202, {each.node_id: 1 for each in two})
            for path in ("/v1/clients?prefix=beta/", "/v1/clients?prefix="):
                assert (await ask("GET", path)).status == 403
                assert (await ask("POST", path, NOTE)).status == 403
            for m in range(2):
                call = {"jsonrpc": "2.0", "id": n, "method": "who"}
                answer = await ask("POST", f"/v1/clients/acme%2F{m}/rpc", call)
                assert (answer.status, answer.json["result"]) == (200, f"acme/{m}")
                # Of another's client, one that is there and one that is not, here and there.
                for client_id in (f"beta%2F{m}", "beta%2Fnobody"):
                    answer = await ask("POST", f"/v1/clients/{client_id}/rpc", call)
                    assert (answer.status, answer.json["error"]["code"]) == (403, -32008)
                    for method in ("GET", "DELETE"):
                        assert (await ask(method, f"/v1/clients/{client_id}")).json["error"] == "forbidden"
            assert (await ask("GET", "/v1/nodes")).status == 200
            for arguments in (
                ("GET", "/metrics"),
                ("POST", "/v1/rebalance", b""),
                ("POST", f"/v1/nodes/{two[0].node_id}/drain", b""),
            ):
                assert (await ask(*arguments)).json["error"] == "forbidden"
        page = await two[0].request("GET", "/v1/clients")
        assert len(page.json["clients"]) == 4


@asynchronous
async def test_two_customers_over_the_websocket(two: list[Node]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        backends = {
            (customer, n): await stack.enter_async_context(backend(node, customer))
            for customer in ("acme", "beta")
            for n, node in enumerate(two)
        }
        for each in backends.values():
            assert (await each.request("events.subscribe", ALL_KINDS))["result"] is None
            assert (await each.request("upstream.serve"))["result"] is None
        sockets = await stack.enter_async_context(clients(two))
        for (customer, n), each in backends.items():
            other = "beta" if customer == "acme" else "acme"
            for m in range(2):
                assert (await each.call(f"{customer}/{m}", "who"))["result"] == f"{customer}/{m}"
                assert (await each.request("client.get", {"client": f"{customer}/{m}"}))["result"]["node_name"]
                for client_id in (f"{other}/{m}", f"{other}/nobody"):
                    for method in ("client.call", "client.notify", "client.get"):
                        refused = (await each.request(method, {"client": client_id, "method": "m"}))["error"]
                        assert (refused["code"], refused["data"]["client"]) == (-32008, client_id)
            await sockets[f"{customer}/{n}"].send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ask"}))
            await sockets[f"{customer}/{n}"].send(json.dumps({"jsonrpc": "2.0", "method": LAST}))
        for (customer, n), each in backends.items():
            messages = []
            while not messages or messages[-1]["params"].get("method") != LAST:
                messages.append(await asyncio.wait_for(each.received.get(), 20))
            assert [one["method"] for one in messages] == ["events.connected", "upstream.call", "events.message"]
            assert {one["params"]["client"] for one in messages} == {f"{customer}/{n}"}
            assert each.received.empty()


async def read_again(node: Node, text: str) -> None:
    """Have a node read other tokens."""
    read = node.log.read_text().count("SIGHUP")
    (node.folder / "backends").write_text(text)
    node.kill(signal.SIGHUP)

    async def done() -> bool:
        return node.log.read_text().count("SIGHUP") > read

    await eventually(done, "the file is read again")


@contextlib.asynccontextmanager
async def token_file(node: Node, text: str) -> AsyncIterator[None]:
    """Have a node read other tokens, and at the end those again that it had."""
    await read_again(node, text)
    try:
        yield
    finally:
        await read_again(node, TOKENS)


@asynchronous
async def test_a_file_with_a_mistake_changes_nothing(two: list[Node]) -> None:
    node = two[0]
    async with clients(two), backend(node, "acme") as acme:
        async with token_file(node, "beta-s3cret prefix=beta/\nacme-s3cret verbs=fly\n"):
            assert (await acme.call("acme/1", "who"))["result"] == "acme/1"
            assert (await node.request("GET", "/v1/clients", headers=bearer("beta-s3cret"))).status == 401
        log = node.log.read_text()
        assert "line 2: verbs= is some of call,notify,read,disconnect,serve" in log
        assert "s3cret" not in log


@asynchronous
async def test_a_token_that_is_withdrawn_and_one_that_is_limited(two: list[Node]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        node = two[0]
        gone, narrowed, stays = [
            await stack.enter_async_context(backend(node, token)) for token in ("acme", "operator", "beta")
        ]
        sockets = await stack.enter_async_context(clients(two))
        for each in (gone, narrowed, stays):
            await each.request("events.subscribe", ALL_KINDS)
            await each.request("upstream.serve")
        assert (await gone.call("acme/1", "who"))["result"] == "acme/1"

        await stack.enter_async_context(token_file(node, "operator prefix=beta/ verbs=call,read\nbeta prefix=beta/\n"))
        arguments = {"client": "acme/1", "method": "m"}
        for method, params in (("client.call", arguments), ("client.notify", arguments), ("upstream.serve", None)):
            error = (await gone.request(method, params))["error"]
            assert (error["code"], error["data"]["detail"]) == (-32008, "this token was withdrawn")
        assert (await narrowed.call("acme/1", "who"))["error"]["code"] == -32008
        assert (await narrowed.request("client.notify", {"client": "beta/1", "method": "m"}))["error"]["code"] == -32008
        for each in (narrowed, stays):
            assert (await each.call("beta/1", "who"))["result"] == "beta/1"
        for token, status in (("acme", 401), ("operator", 403), ("beta", 403)):
            assert (await node.request("GET", "/metrics", headers=bearer(token))).status == status

        # No backend receives events or calls of acme any more.
        for client_id in ("acme/0", "beta/0"):
            await sockets[client_id].send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ask"}))
            await sockets[client_id].send(json.dumps({"jsonrpc": "2.0", "method": LAST}))
        messages = [await asyncio.wait_for(each.received.get(), 20) for each in (narrowed, stays, stays)]
        assert {one["params"]["client"] for one in messages} == {"beta/0"}
        assert [one["method"] for one in messages] == ["events.message", "upstream.call", "events.message"]
        assert (await gone.request("no.method"))["error"]["code"] == -32008
        assert gone.received.empty()
        assert narrowed.received.empty()


@asynchronous
async def test_backend_token_does_not_open_peer_endpoints(two: list[Node]) -> None:
    node = two[0]
    before = await node.metric("wsgateway_peers")
    for value in ("Bearer operator", "Bearer acme", "Wsgateway-Peer operator", "wsgateway-peer acme"):
        headers = {"Authorization": value}
        relay = "/v1/relay?client_id=acme/0&address=192.0.2.7%3A4711&until=0"
        assert (await node.opening(relay, headers, peer=True)).status == 401
        expected = 101 if value.startswith("Bearer") else 401
        assert (await node.opening("/v1/backend", headers, peer=True)).status == expected
    assert await node.metric("wsgateway_peers") == before
    async with backend(node, "operator") as operator:
        for method in ("peer.drain", "peer.close", "peer.notify_prefix"):
            assert (await operator.request(method, {"prefix": "", "method": "m"}))["error"]["code"] == -32601
