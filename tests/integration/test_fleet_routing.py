"""Clients that arrive at one node and belong to another: sent there by a redirect, relayed, or taken over."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from typing import Any

import pytest
import websockets
from fleet import Node, asynchronous, closed, eventually, serving_client

ACCEPTS_REDIRECT = {"Wsgateway-Redirect": "1"}


async def node_of(node: Node, client_id: str) -> str:
    """The node_id of the node that has a client."""
    return str((await node.request("GET", f"/v1/clients/{client_id}")).json.get("node", ""))


@asynchronous
async def test_a_client_that_follows_redirects_is_sent_to_its_node(three: list[Node]) -> None:
    first, second, _ = three
    older = await first.connect("follower")
    answer = await second.opening("/v1/connect?client_id=follower", ACCEPTS_REDIRECT)
    location = f"ws://127.0.0.1:{first.client_port}/v1/connect?client_id=follower&wsgateway_hop=1"
    assert (answer.status, answer.headers["Location"]) == (307, location)
    assert older.state is websockets.State.OPEN
    async with serving_client(second, "follower", additional_headers=ACCEPTS_REDIRECT) as newer:
        assert newer.remote_address[1] == first.client_port
        assert await closed(older) == 4001
        for node in three:
            assert await node_of(node, "follower") == first.node_id
            assert (await node.call("follower", "echo", [1])).json["result"] == [1]


@asynchronous
async def test_an_id_that_needs_quoting_is_redirected_as_it_is(three: list[Node]) -> None:
    async with three[0].connect("a/b+c=d:e@f"):
        answer = await three[1].opening("/v1/connect?client_id=a%2Fb%2Bc%3Dd%3Ae%40f", ACCEPTS_REDIRECT)
        assert answer.status == 307
        assert "client_id=a%2Fb%2Bc%3Dd%3Ae%40f&" in answer.headers["Location"]


@asynchronous
async def test_client_that_does_not_follow_redirects_is_relayed(three: list[Node]) -> None:
    first, second, third = three
    older = await first.connect("relayed")
    async with serving_client(second, "relayed", lambda r: r["params"], max_size=None) as newer:
        assert await closed(older) == 4001
        assert newer.remote_address[1] == second.client_port
        presence = (await third.request("GET", "/v1/clients/relayed")).json
        assert presence["node"] == first.node_id
        assert presence["address"] == f"127.0.0.1:{newer.local_address[1]}"
        for size in (0, 10, 70_000, 900_000):
            for node in three:
                assert (await node.call("relayed", "echo", ["x" * size])).json["result"] == ["x" * size]
        await (await newer.ping())
        # Quiet again, it is parked at its node, as any other.
        await eventually(lambda: is_parked(first), "it is parked")
        assert (await third.call("relayed", "echo", [1])).json["result"] == [1]


async def is_parked(node: Node) -> bool:
    return await node.metric("wsgateway_parked") == await node.metric("wsgateway_clients")


@asynchronous
async def test_messages_of_a_relayed_client(three: list[Node]) -> None:
    first, second, _ = three
    async with first.connect("speaker"), second.connect("speaker") as client, first.backend() as backend:
        await backend.request("events.subscribe", {"kinds": ["message"]})
        for size in (1, 100_000):
            await client.send(json.dumps({"jsonrpc": "2.0", "method": "said", "params": ["x" * size]}))
            event = await asyncio.wait_for(backend.received.get(), 20)
            assert event["params"] == {"client": "speaker", "method": "said", "params": ["x" * size]}
        # In fragments, with a ping between them.
        await client.send(['{"jsonrpc":"2.0",', '"method":"parts"', "}"])
        assert (await asyncio.wait_for(backend.received.get(), 20))["params"]["method"] == "parts"
        await client.send("no JSON")
        assert json.loads(await client.recv())["error"]["code"] == -32700


@asynchronous
async def test_closes_go_through_a_relay_in_either_direction(three: list[Node]) -> None:
    first, second, third = three

    async def gone() -> bool:
        return not await node_of(third, "closer")

    for close in ("client", "operator", "newer", "broken"):
        older = await first.connect("closer")
        client = await second.connect("closer")
        assert await closed(older) == 4001
        if close == "client":
            await client.close(1000, "enough")
            assert client.close_code == 1000
        elif close == "operator":
            assert (await third.request("DELETE", "/v1/clients/closer")).status == 204
            assert await closed(client) == 4003
        elif close == "newer":
            newer = await third.connect("closer")
            assert await closed(client) == 4001
            await newer.close()
        else:
            client.transport.abort()
        await eventually(gone, f"after the end by the {close} it is not called any more")


@asynchronous
async def test_a_relay_ends_with_either_node(fleet: Callable[..., list[Node]]) -> None:
    for killed in (0, 1):
        nodes = fleet(2)
        older = await nodes[0].connect("between")
        client = await nodes[1].connect("between")
        assert await closed(older) == 4001
        nodes[killed].kill()
        code = await closed(client)
        assert code in (1001, 1006, 1011, 1012), code
        left = nodes[1 - killed]

        async def gone(left: Node = left) -> bool:
            return (await left.call("between", "echo", timeout=1)).status == 404

        await eventually(gone, "the client is not there any more")
        async with serving_client(left, "between"):
            assert (await left.call("between", "echo", [1])).json["result"] == [1]


@asynchronous
async def test_takeover(fleet: Callable[..., list[Node]]) -> None:
    nodes = fleet(2, "--on-elsewhere", "takeover")
    older = await nodes[0].connect("taken")
    generation = (await nodes[0].request("GET", "/v1/clients/taken")).json["generation"]
    async with serving_client(nodes[1], "taken", additional_headers=ACCEPTS_REDIRECT) as newer:
        assert newer.remote_address[1] == nodes[1].client_port
        assert await closed(older) == 4001
        for node in nodes:
            assert await node_of(node, "taken") == nodes[1].node_id
            assert (await node.call("taken", "echo", [1])).json["result"] == [1]
        assert (await nodes[0].request("GET", "/v1/clients/taken")).json["generation"] > generation
        assert await nodes[0].metric("wsgateway_clients") == 0


@asynchronous
async def test_redirected_client_is_not_redirected_again(three: list[Node]) -> None:
    first, second, _ = three
    older = await first.connect("sent")
    url = f"{second.url}?client_id=sent&wsgateway_hop=1"
    async with websockets.connect(url, additional_headers=ACCEPTS_REDIRECT) as newer:
        assert await closed(older) == 4001
        assert newer.remote_address[1] == second.client_port
        assert await node_of(first, "sent") == second.node_id


@asynchronous
async def test_a_full_node_sends_new_clients_on(fleet: Callable[..., list[Node]]) -> None:
    (full,) = fleet(1, "--capacity", "2", registry="")
    (other,) = fleet(1, registry="")

    async def knows() -> bool:
        return len((await full.request("GET", "/v1/nodes")).json["nodes"]) == 2

    await eventually(knows, "the nodes know of each other")
    async with full.connect("a"), full.connect("b") as b:

        async def sent_on() -> bool:
            answer = await full.opening("/v1/connect?client_id=c", ACCEPTS_REDIRECT)
            return answer.status == 307 and f":{other.client_port}/" in answer.headers["Location"]

        await eventually(sent_on, "the full node sends clients to the other")
        async with serving_client(full, "d"):
            assert await node_of(full, "d") == other.node_id
            assert (await full.call("d", "echo", [1])).json["result"] == [1]
        refused = await full.opening("/v1/connect?client_id=c&wsgateway_hop=1", ACCEPTS_REDIRECT)
        assert refused.status == 503
        assert int(refused.headers["Retry-After"]) > 0
        # Who is here already may come back.
        async with full.connect("b"):
            assert await closed(b) == 4001


@pytest.mark.parametrize("on_elsewhere", ["route", "takeover"])
@asynchronous
async def test_two_programs_with_one_client_id_do_not_evict_each_other_for_ever(
    fleet: Callable[..., list[Node]], on_elsewhere: str
) -> None:
    nodes = fleet(2, "--on-elsewhere", on_elsewhere)
    holder: Any = await nodes[0].connect("pingpong")
    for attempt in range(1, 20):
        try:
            newer = await nodes[attempt % 2].connect("pingpong")
        except websockets.InvalidStatus as e:
            refusal = e.response
            break
        assert await closed(holder) == 4001
        holder = newer
    else:
        raise AssertionError("no connection was refused")
    assert attempt > 5
    assert refusal.status_code == 429
    assert 0 < int(refusal.headers["Retry-After"]) <= 60
    calling = asyncio.ensure_future(nodes[0].call("pingpong", "echo"))
    request = json.loads(await holder.recv())
    await holder.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "still here"}))
    assert (await calling).json["result"] == "still here"
    await holder.close()


@asynchronous
async def test_unauthenticated_relay_requests_are_refused(three: list[Node]) -> None:
    from gateway.cluster.auth import PeerAuth

    first, second, _ = three
    target = "/v1/relay?client_id=victim&address=192.0.2.1%3A5&until=0"
    secret = (first.folder / "cluster-secret").read_bytes().strip()
    peer, stranger = (PeerAuth(second.node_id, lambda s=s: s) for s in (secret, b"x" * 32))

    def signed(by: PeerAuth, to: Node = first, client_id: str = "victim", at: str = target) -> dict[str, str]:
        return {"Authorization": by.sign(to.node_id, "GET", at, client_id, "192.0.2.1:5")}

    async with serving_client(first, "victim"):
        good = signed(peer)
        assert (await first.opening(target, good, peer=True)).status == 101
        for what, headers in {
            "nobody": {},
            "a backend": {"Authorization": "Bearer x"},
            "a stranger": signed(stranger),
            "one that is used again": good,
            "another node's": signed(peer, to=second),
            "another client's": signed(peer, client_id="other"),
            "another path's": signed(peer, at="/v1/backend"),
        }.items():
            refused = await first.opening(target, headers, peer=True)
            assert refused.status in (401, 403), what
            assert "error" in refused.json, what
            assert secret.decode() not in refused.body.decode()
        # The clients' endpoint has no such path.
        assert (await first.opening(target, signed(peer))).status == 404


@asynchronous
async def test_node_stopped_for_a_moment_does_not_delay_clients(fleet: Callable[..., list[Node]]) -> None:
    first, second = fleet(2)
    older = await first.connect("patient")
    first.kill(signal.SIGSTOP)
    try:
        async with serving_client(second, "patient"):
            assert await node_of(second, "patient") == second.node_id
            assert (await second.call("patient", "echo", [1])).json["result"] == [1]
            first.kill(signal.SIGCONT)
            assert await closed(older) == 4001
            assert (await first.call("patient", "echo", [2])).json["result"] == [2]
    finally:
        first.kill(signal.SIGCONT)
