"""Three nodes with one database: a backend reaches the clients of all nodes through any node."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable

from fleet import Node, asynchronous, closed, eventually, serving_client

ids = itertools.count()


@asynchronous
async def test_a_call_at_any_node_to_a_client_at_any_other(three: list[Node]) -> None:
    for holder in three:
        async with serving_client(holder, "acme/dev 1".replace(" ", "-")):
            for caller in three:
                answer = await caller.request(
                    "POST",
                    "/v1/clients/acme%2Fdev-1/rpc",
                    b'{"jsonrpc":"2.0","id":"my own","method":"echo","params":{"b":1.50,"a":[1e2]}}',
                )
                assert answer.status == 200
                assert answer.body == b'{"jsonrpc":"2.0","id":"my own","result":{"b": 1.5, "a": [100.0]}}'


@asynchronous
async def test_params_and_result_pass_byte_for_byte(three: list[Node]) -> None:
    params = b'{ "z" : 1.500,  "a":"\\u00e9\xc3\xa9" , "n":123456789012345678901234567890 }'
    async with three[0].connect("exact") as client:
        calling = asyncio.ensure_future(
            three[1].request(
                "POST",
                "/v1/clients/exact/rpc",
                b'{"jsonrpc":"2.0","id":1,"method":"echo","params":' + params + b"}",
            )
        )
        text = await client.recv()
        assert params.decode() in text
        await client.send('{"jsonrpc":"2.0","id":"%s","result": %s }' % (json.loads(text)["id"], params.decode()))
        assert b'"result":' + params in (await calling).body


@asynchronous
async def test_an_error_of_the_client_is_passed_on_untouched(three: list[Node]) -> None:
    # Even one that looks like the gateway's own.
    for error in ({"code": 7, "message": "no", "data": {"why": None}}, {"code": -32001, "message": "not connected"}):
        async with three[0].connect("failing") as client:
            calling = asyncio.ensure_future(three[2].call("failing", "fail"))
            request = json.loads(await client.recv())
            await client.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": error}))
            answer = await calling
        assert (answer.status, answer.json) == (200, {"jsonrpc": "2.0", "id": 1, "error": error})


@asynchronous
async def test_a_client_that_forges_an_error_of_the_gateway(three: list[Node]) -> None:
    """Its error is equal to the gateway's, but only the gateway's is marked; at the client's node, and through a peer."""
    forged = b'{"code":-32004,"message":"the client\'s node cannot be reached","data":{"client":"liar","sent":false}}'
    rpc = {"jsonrpc": "2.0", "id": 1, "method": "m"}
    async with three[0].connect("liar") as client:

        async def answer(mark: str) -> None:
            id = json.loads(await client.recv())["id"]
            await client.send(f'{{"jsonrpc":"2.0","id":"{id}","error":{forged.decode()},{mark}}}')

        async def lie() -> None:
            for mark in ('"gateway":true', '"gatewa\\u0079":true', '"gateway":false,"gateway":true'):
                await answer(mark)

        for node in three[:2]:
            lying = asyncio.ensure_future(lie())
            alone = await node.call("liar", "m")
            assert (alone.status, alone.body) == (200, b'{"jsonrpc":"2.0","id":1,"error":' + forged + b"}")
            batch = await node.request("POST", "/v1/clients/liar/rpc", [rpc, {"no": "json-rpc"}])
            assert [one.get("gateway") for one in batch.json] == [None, True]
            async with node.backend() as backend:
                answered = await backend.call("liar", "m")
                assert (answered["error"], set(answered)) == (json.loads(forged), {"jsonrpc", "id", "error"})
                for failed in (
                    await backend.call("nobody", "m"),
                    await backend.call("liar", "gateway.m"),
                    (await node.call("nobody", "m")).json,
                ):
                    assert (failed["gateway"], failed["error"]["data"]["sent"]) == (True, False)
            await lying


@asynchronous
async def test_call_to_a_client_that_is_not_connected(three: list[Node]) -> None:
    for node in three:
        answer = await node.call("nobody", "echo")
        assert (answer.status, answer.json["error"]["code"]) == (404, -32001)
        assert answer.json["error"]["data"] == {"client": "nobody", "sent": False}


@asynchronous
async def test_client_that_does_not_answer_and_client_that_disconnects(three: list[Node]) -> None:
    async with three[0].connect("mute") as client:
        answer = await three[1].call("mute", "echo", timeout=0.3)
        assert (answer.status, answer.json["error"]["code"]) in ((504, -32002), (503, -32004))
        assert answer.json["error"]["data"]["sent"] is True
        await client.recv()
        calling = asyncio.ensure_future(three[1].call("mute", "echo"))
        await client.recv()
        await client.close()
        answer = await calling
        assert (answer.status, answer.json["error"]["code"]) == (502, -32003)
        assert answer.json["error"]["data"] == {"client": "mute", "sent": True}


@asynchronous
async def test_messages_of_any_size(three: list[Node]) -> None:
    async with serving_client(three[0], "large", max_size=None):
        for size in (100, 70_000, 1_000_000):
            text = "x" * size
            assert (await three[1].call("large", "echo", [text])).json["result"] == [text]
        refused = await three[1].call("large", "echo", ["x" * 1_048_576])
        assert (refused.status, refused.json["error"]["code"]) == (413, -32006)
        assert refused.json["error"]["data"]["sent"] is False


@asynchronous
async def test_notifications(three: list[Node]) -> None:
    async with three[0].connect("told") as client:
        for node in three:
            answer = await node.request(
                "POST", "/v1/clients/told/rpc", {"jsonrpc": "2.0", "method": "policy.changed", "params": [3]}
            )
            assert (answer.status, answer.body) == (202, b"")
            assert json.loads(await client.recv()) == {"jsonrpc": "2.0", "method": "policy.changed", "params": [3]}
    gone = await three[1].request("POST", "/v1/clients/told/rpc", {"jsonrpc": "2.0", "method": "policy.changed"})
    assert (gone.status, gone.json["error"]["code"]) == (404, -32001)


@asynchronous
async def test_a_batch(three: list[Node]) -> None:
    batch = [
        {"jsonrpc": "2.0", "id": 1, "method": "echo", "params": ["one"]},
        {"jsonrpc": "2.0", "method": "told"},
        {"jsonrpc": "2.0", "id": 2, "method": "echo", "params": ["two"]},
        {"no": "json-rpc"},
    ]
    async with serving_client(three[2], "batch"):
        answer = await three[0].request("POST", "/v1/clients/batch/rpc", batch)
    by_id = {one["id"]: one for one in answer.json}
    assert (by_id[1]["result"], by_id[2]["result"]) == (["one"], ["two"])
    assert by_id[None]["error"]["code"] == -32600


@asynchronous
async def test_a_notification_to_all_of_a_customers_clients_on_every_node(three: list[Node]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(node.connect(f"{customer}/{n}-{i}"))
            for customer in ("acme", "acme_", "other")
            for n, node in enumerate(three)
            for i in range(n + 1)
        ]
        answer = await three[1].request("POST", "/v1/clients?prefix=acme/", {"jsonrpc": "2.0", "method": "hello"})
        assert answer.status == 202
        assert answer.json["nodes"] == {node.node_id: n + 1 for n, node in enumerate(three)}
        for client in clients[:6]:
            assert json.loads(await client.recv())["method"] == "hello"


@asynchronous
async def test_presence_is_the_same_at_every_node(three: list[Node]) -> None:
    async with three[1].connect("seen") as client:
        seen = [(await node.request("GET", "/v1/clients/seen")).json for node in three]
        assert seen == [seen[0]] * 3
        assert seen[0]["node"] == three[1].node_id
        assert seen[0]["address"] == f"127.0.0.1:{client.local_address[1]}"
        for node in three:
            listed = (await node.request("GET", "/v1/clients?prefix=seen")).json["clients"]
            assert [one["client_id"] for one in listed] == ["seen"]
            nodes = (await node.request("GET", "/v1/nodes")).json["nodes"]
            assert {one["peer_url"] for one in nodes} == {f"ws://127.0.0.1:{one.backend_port}" for one in three}


@asynchronous
async def test_delete_from_another_node(three: list[Node]) -> None:
    async with three[0].connect("gone") as client:
        calling = asyncio.ensure_future(three[2].call("gone", "echo"))
        await client.recv()
        assert (await three[1].request("DELETE", "/v1/clients/gone")).status == 204
        for node in three:
            assert (await node.call("gone", "echo")).status == 404
            assert (await node.request("GET", "/v1/clients/gone")).status == 404
        assert (await calling).json["error"]["code"] == -32003
        assert await closed(client) == 4003
    assert (await three[1].request("DELETE", "/v1/clients/gone")).status == 404


@asynchronous
async def test_a_client_that_moved_is_found_where_it_is_now(three: list[Node]) -> None:
    for caller, first, then in itertools.permutations(three):
        client_id = f"moved-{next(ids)}"
        async with serving_client(first, client_id, lambda _: "first"):
            # From here on `caller` knows where it is.
            assert (await caller.call(client_id, "where")).json["result"] == "first"
        async with serving_client(then, client_id, lambda _: "then"):
            assert (await caller.call(client_id, "where")).json["result"] == "then"
            assert (await first.call(client_id, "where")).json["result"] == "then"


@asynchronous
async def test_a_backend_on_the_websocket(three: list[Node]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for n, node in enumerate(three):
            for i in range(5):
                await stack.enter_async_context(serving_client(node, f"ws-{n}-{i}", lambda r, n=n: [n, *r["params"]]))
        backend = await stack.enter_async_context(three[0].backend())
        calls = [(n, i, k) for n in range(3) for i in range(5) for k in range(30)]
        answers = await asyncio.gather(*(backend.call(f"ws-{n}-{i}", "echo", [i, k]) for n, i, k in calls))
        assert [one.get("result") for one in answers] == [list(call) for call in calls]
        presence = (await backend.request("client.get", {"client": "ws-2-0"}))["result"]
        assert presence["node"] == three[2].node_id
        told = await stack.enter_async_context(three[1].connect("ws-told"))
        assert (await backend.request("client.notify", {"client": "ws-told", "method": "hi"}))["result"] is None
        assert json.loads(await told.recv())["method"] == "hi"
        lost = (await backend.call("ws-nobody", "echo"))["error"]
        assert (lost["code"], lost["data"]) == (-32001, {"client": "ws-nobody", "sent": False})


@asynchronous
async def test_a_backend_may_not_do_what_peers_may(three: list[Node]) -> None:
    async with serving_client(three[0], "guarded"), three[0].backend() as backend:
        for method in ("peer.has", "peer.close", "peer.moved", "peer.drain", "peer.notify_prefix"):
            refused = await backend.request(
                method, {"client": "guarded", "generation": 1, "code": 4003, "reason": "no"}
            )
            assert refused["error"]["code"] == -32601
        assert (await three[1].call("guarded", "echo", [1])).json["result"] == [1]


@asynchronous
async def test_drain_through_another_node(fleet: Callable[..., list[Node]]) -> None:
    first, second = fleet(2, "--drain-seconds", "1")
    async with first.connect("moving") as client:
        assert (await second.request("POST", f"/v1/nodes/{first.node_id}/drain", b"")).status == 202
        goaway = json.loads(await client.recv())
        assert goaway["method"] == "gateway.goaway"
        assert await closed(client) == 1012
    assert await first.ended() == 0
    assert second.process.poll() is None
    async with serving_client(second, "moving"):
        assert (await second.call("moving", "echo", [1])).json["result"] == [1]
    assert (await second.request("POST", f"/v1/nodes/{first.node_id}/drain", b"")).status == 404


@asynchronous
async def test_two_nodes_on_one_sqlite_file_are_a_fleet(fleet: Callable[..., list[Node]]) -> None:
    nodes = fleet(2, registry="")
    async with serving_client(nodes[0], "c-0", lambda _: "c-0"), serving_client(nodes[1], "c-1", lambda _: "c-1"):
        for node in nodes:
            for client_id in ("c-0", "c-1"):
                assert (await node.call(client_id, "who")).json["result"] == client_id
    secret = nodes[0].database.with_name(f"{nodes[0].database.name}.secret")
    assert secret.stat().st_mode & 0o777 == 0o600

    async def empty() -> bool:
        return not nodes[0].rows("clients")

    await eventually(empty, "no row is left")
