"""Calls and notifications through a real node, with a third-party WebSocket client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import websockets
from fleet import CHECKOUT, Node, asynchronous, closed, serving_client


@asynchronous
async def test_a_call_over_http_is_answered_by_the_client(node: Node) -> None:
    async with serving_client(node, "demo-1"):
        answer = await node.request(
            "POST",
            "/v1/clients/demo-1/rpc",
            b'{"jsonrpc":"2.0","id":"my own","method":"echo","params":{"b":1.50,"a":[1e2]}}',
        )
    assert answer.status == 200
    assert answer.json == {"jsonrpc": "2.0", "id": "my own", "result": {"b": 1.5, "a": [100.0]}}


@asynchronous
async def test_params_and_result_pass_byte_for_byte(node: Node) -> None:
    params = b'{ "z" : 1.500,  "a":"\\u00e9\xc3\xa9" , "n":123456789012345678901234567890 }'
    async with node.connect("exact") as client:
        calling = asyncio.ensure_future(
            node.request(
                "POST",
                "/v1/clients/exact/rpc",
                b'{"jsonrpc":"2.0","id":1,"method":"echo","params":' + params + b"}",
            )
        )
        text = await client.recv()
        assert params.decode() in text
        await client.send('{"jsonrpc":"2.0","id":"%s","result": %s }' % (json.loads(text)["id"], params.decode()))
        answer = await calling
    assert b'"result":' + params in answer.body


@asynchronous
async def test_an_error_of_the_client_is_passed_on_untouched(node: Node) -> None:
    error = {"code": 7, "message": "no", "data": {"why": None}}
    async with node.connect("demo-1") as client:
        calling = asyncio.ensure_future(node.call("demo-1", "fail"))
        request = json.loads(await client.recv())
        await client.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": error}))
        answer = await calling
    assert (answer.status, answer.json["error"]) == (200, error)


@asynchronous
async def test_a_client_that_is_not_connected(node: Node) -> None:
    answer = await node.call("nobody", "echo")
    assert answer.status == 404
    assert answer.json["id"] == 1
    assert answer.json["error"]["code"] == -32001
    assert answer.json["error"]["data"] == {"client": "nobody", "sent": False}


@asynchronous
async def test_a_slow_client_and_its_late_response(node: Node) -> None:
    async with node.connect("slow") as client:
        answer = await node.call("slow", "echo", timeout=0.2)
        assert answer.status == 504
        assert answer.json["error"]["code"] == -32002
        assert answer.json["error"]["data"] == {"client": "slow", "sent": True}
        late = json.loads(await client.recv())["id"]
        await client.send(json.dumps({"jsonrpc": "2.0", "id": late, "result": "late"}))
        calling = asyncio.ensure_future(node.call("slow", "echo"))
        request = json.loads(await client.recv())
        assert request["id"] != late
        await client.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "in time"}))
        assert (await calling).json["result"] == "in time"
    assert await node.metric("wsgateway_late_responses_total") == 1


@asynchronous
async def test_a_client_that_is_killed_in_the_middle_of_a_call(node: Node) -> None:
    program = (
        "import sys, websockets.sync.client as w; s = w.connect(sys.argv[1]); print('up', flush=True); s.recv(); "
        "print('asked', flush=True); sys.stdin.read()"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", program, f"{node.url}?client_id=victim"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert await asyncio.to_thread(client.stdout.readline) == b"up\n"
        calling = asyncio.ensure_future(node.call("victim", "echo"))
        assert await asyncio.to_thread(client.stdout.readline) == b"asked\n"
        client.kill()
        answer = await calling
    finally:
        client.kill()
        client.communicate()
    assert answer.status == 502
    assert answer.json["error"]["code"] == -32003
    assert answer.json["error"]["data"] == {"client": "victim", "sent": True}


@asynchronous
async def test_500_calls_in_flight_on_one_backend_websocket(node: Node) -> None:
    """All are in flight before the first is answered, and each gets its own answer."""
    clients = [await node.connect(f"many-{i}") for i in range(10)]
    try:
        async with node.backend() as backend:
            calls = [asyncio.ensure_future(backend.call(f"many-{i % 10}", "echo", [i])) for i in range(500)]
            requests = [[json.loads(await client.recv()) for _ in range(50)] for client in clients]
            assert await node.metric("wsgateway_calls_in_flight") == 500
            for client, asked in zip(clients, requests, strict=True):
                for request in reversed(asked):
                    await client.send(
                        json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": request["params"][0]})
                    )
            assert [(await call)["result"] for call in calls] == list(range(500))
    finally:
        for client in clients:
            await client.close()


@asynchronous
async def test_a_backend_that_goes_away_cancels_its_calls(node: Node) -> None:
    async with node.connect("demo-1") as client:
        async with node.backend() as backend:
            call = asyncio.ensure_future(backend.call("demo-1", "echo"))
            request = json.loads(await client.recv())
        call.cancel()
        # The gateway sees the close before it reads what the client sends after it.
        while await node.metric("wsgateway_calls_in_flight"):
            pass
        await client.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": None}))
        await (await client.ping())
        assert await node.metric("wsgateway_late_responses_total") == 1


@asynchronous
async def test_a_response_counts_only_from_the_client_that_was_asked(node: Node) -> None:
    async with node.connect("asked") as asked, node.connect("thief") as thief:
        calling = asyncio.ensure_future(node.call("asked", "echo"))
        request = json.loads(await asked.recv())
        await thief.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "stolen"}))
        await (await thief.ping())
        await asked.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "mine"}))
        assert (await calling).json["result"] == "mine"


@asynchronous
async def test_a_broken_response_fails_its_call_at_once(node: Node) -> None:
    async with node.connect("broken") as client:
        calling = asyncio.ensure_future(node.call("broken", "echo"))
        request = json.loads(await client.recv())
        await client.send('{"jsonrpc":"2.0","id":"%s","result":{"a":' % request["id"])
        answer = await calling
        assert answer.status == 502
        data = answer.json["error"]["data"]
        assert (data["client"], data["sent"]) == ("broken", True)
        assert "could not be read" in data["detail"]
        assert json.loads(await client.recv())["error"]["code"] == -32700


@asynchronous
async def test_notifications_both_ways(node: Node) -> None:
    async with node.connect("demo-1") as client, node.backend() as backend:
        await backend.request("events.subscribe", {"kinds": ["message", "disconnected"]})
        answer = await node.request(
            "POST", "/v1/clients/demo-1/rpc", {"jsonrpc": "2.0", "method": "policy.changed", "params": [3]}
        )
        assert (answer.status, answer.body) == (202, b"")
        assert json.loads(await client.recv()) == {"jsonrpc": "2.0", "method": "policy.changed", "params": [3]}
        await client.send('{"jsonrpc":"2.0","method":"job.done","params":{"job":9}}')
        event = await backend.received.get()
        assert event == {
            "jsonrpc": "2.0",
            "method": "events.message",
            "params": {"client": "demo-1", "method": "job.done", "params": {"job": 9}},
        }
        presence = (await node.request("GET", "/v1/clients/demo-1")).json
        await client.close()
        event = await backend.received.get()
        assert event["method"] == "events.disconnected"
        assert event["params"] == {
            "client": "demo-1",
            "node": presence["node"],
            "generation": presence["generation"],
        }


@asynchronous
async def test_calls_from_clients_go_to_the_backends_that_serve_in_turn(node: Node) -> None:
    async with node.connect("asker") as client:
        await client.send('{"jsonrpc":"2.0","id":1,"method":"policy.get"}')
        assert json.loads(await client.recv())["error"]["code"] == -32601
        async with node.backend() as first:
            await first.request("upstream.serve")
            async with node.backend() as second:
                await second.request("upstream.serve")
                for number in (2, 3):
                    await client.send('{"jsonrpc":"2.0","id":%d,"method":"policy.get","params":[1]}' % number)
                for backend in (first, second):
                    request = await backend.received.get()
                    assert request["method"] == "upstream.call"
                    assert request["params"] == {"client": "asker", "method": "policy.get", "params": [1]}
                    if backend is first:
                        await backend.socket.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "yes"}))
                        assert json.loads(await client.recv())["result"] == "yes"
            lost = json.loads(await client.recv())
            assert lost["id"] in (2, 3)
            assert (lost["error"]["code"], lost["gateway"]) == (-32003, True)
            # A backend's own error is not marked, whatever it contains and has beside it.
            await client.send('{"jsonrpc":"2.0","id":4,"method":"policy.get"}')
            request = await first.received.get()
            response = {"jsonrpc": "2.0", "id": request["id"], "error": lost["error"]}
            await first.socket.send(json.dumps({**response, "gateway": True}))
            assert json.loads(await client.recv()) == {**response, "id": 4}


@asynchronous
async def test_a_batch_over_http(node: Node) -> None:
    batch = [
        {"jsonrpc": "2.0", "id": 1, "method": "echo", "params": ["one"]},
        {"jsonrpc": "2.0", "method": "told"},
        {"jsonrpc": "2.0", "id": 2, "method": "echo", "params": ["two"]},
        {"no": "json-rpc"},
    ]
    async with serving_client(node, "demo-1"):
        answer = await node.request("POST", "/v1/clients/demo-1/rpc", batch)
    assert answer.status == 200
    by_id = {one["id"]: one for one in answer.json}
    assert by_id[1]["result"] == ["one"]
    assert by_id[2]["result"] == ["two"]
    assert by_id[None]["error"]["code"] == -32600


@asynchronous
async def test_a_notification_to_all_of_a_customers_clients(node: Node) -> None:
    clients = [await node.connect(f"{customer}/{i}") for customer in ("acme", "acme_", "other") for i in range(3)]
    try:
        answer = await node.request("POST", "/v1/clients?prefix=acme/", {"jsonrpc": "2.0", "method": "hello"})
        assert answer.status == 202
        assert list(answer.json["nodes"].values()) == [3]
        for client in clients[:3]:
            assert json.loads(await client.recv())["method"] == "hello"
    finally:
        for client in clients:
            await client.close()


@asynchronous
async def test_eight_bad_messages_in_a_row_close_the_connection(node: Node) -> None:
    async with node.connect("bad") as client:
        for _ in range(7):
            await client.send("no JSON")
        await client.send('{"jsonrpc":"2.0","method":"fine"}')
        for _ in range(8):
            await client.send('{"jsonrpc":"1.0"}')
        codes = []
        with contextlib.suppress(websockets.ConnectionClosed):
            async for text in client:
                codes.append(json.loads(text)["error"]["code"])
        assert codes[:7] == [-32700] * 7
        assert set(codes[7:]) == {-32600}
        assert await closed(client) == 1008


@asynchronous
async def test_messages_that_break_the_rules(node: Node) -> None:
    for what, message, code in (
        ("binary", b"\x00", 1003),
        ("large", "x" * 1048577, 1009),
    ):
        client = await node.connect(what)
        await client.send(message)
        assert await closed(client) == code, what
    async with serving_client(node, "well-behaved"):
        assert (await node.call("well-behaved", "echo", [1])).json["result"] == [1]


@asynchronous
async def test_too_many_calls_to_one_client(start: Callable[..., Node]) -> None:
    node = start("--max-calls-per-client", "2")
    async with node.connect("busy") as client:
        calls = [asyncio.ensure_future(node.call("busy", "echo", timeout=5)) for _ in range(2)]
        asked = [json.loads(await client.recv()) for _ in range(2)]
        refused = await node.call("busy", "echo")
        assert refused.status == 429
        detail = "too many calls to the client in flight (--max-calls-per-client 2)"
        assert refused.json["error"]["data"] == {"client": "busy", "sent": False, "detail": detail}
        for request in asked:
            await client.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": 1}))
        assert [(await call).status for call in calls] == [200, 200]


@asynchronous
async def test_the_demo_client_and_its_echo(node: Node) -> None:
    command = [sys.executable, "-m", "gateway.agent", "--url", f"ws://127.0.0.1:{node.client_port}"]
    agent = subprocess.Popen([*command, "--client-id", "demo-1"], stdout=subprocess.PIPE, cwd=CHECKOUT)
    try:
        assert (await asyncio.to_thread(agent.stdout.readline)).startswith(b"connected demo-1 ")
        assert (await node.call("demo-1", "echo", {"a": [1]})).json["result"] == {"a": [1]}
        started = time.monotonic()
        agent.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(agent.wait, 20) == 0
        assert time.monotonic() - started < 10
    finally:
        agent.kill()
        agent.communicate()
