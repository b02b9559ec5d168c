"""Clients that a node sends to another one, and that leave their token out there: they get in by the ticket of the URL."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import websockets
from fleet import Node, asynchronous, closed, eventually, serving_client
from websockets.asyncio.client import connect

from tests.builders import mariadb
from tests.builders.tokens import EC, pem, sign

TOKEN = "token-of-these-tests"
SENT = {"Authorization": f"Bearer {TOKEN}", "Wsgateway-Redirect": "1"}
PARAMETER = "&wsgateway_ticket="


@pytest.fixture
def two(start: Callable[..., Node], tmp_path: Path) -> list[Node]:
    """Two nodes that require a token: that of the client ``robot``, or one that the key has signed."""
    tokens, keys = tmp_path / "tokens", tmp_path / "keys.pem"
    tokens.write_text(f"robot {hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    keys.write_bytes(pem(EC))
    options = (
        *("--auth", f"tokens:{tokens}", "--auth", f"jwt:key-file={keys}:algorithms=ES256"),
        *("--openings-per-address", "0", "--lease", "2", "--heartbeat", "0.5", "--rebalance-rate", "0"),
        *("--drain-seconds", "0"),
    )
    url = mariadb.server().new_database()
    nodes = [start(*options, ready=False, registry=url) for _ in range(2)]
    return [node.await_ready() for node in nodes]


def target_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"


async def assert_used_up(node: Node, url: str) -> None:
    """A ticket is accepted once, and the token opens the same URL nevertheless."""
    refused = await node.opening(target_of(url))
    assert (refused.status, refused.json["error"]) == (401, "ticket")
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert (await node.opening(target_of(url), {"Authorization": f"Bearer {TOKEN}"})).status == 101


def assert_not_logged(*nodes: Node) -> None:
    for node in nodes:
        log = node.log.read_text()
        assert "wsgateway_ticket" not in log
        assert "v1.tokens." not in log
        assert "Traceback" not in log


@asynchronous
async def test_a_redirect_is_followed_without_the_token(two: list[Node]) -> None:
    first, second = two
    async with first.connect("robot", additional_headers=SENT) as older:
        connector = second.connect("robot", additional_headers=SENT)
        async with connector as newer:
            # The library has left the token out at the other port.
            assert newer.remote_address[1] == first.client_port
            assert "Authorization" not in newer.request.headers
            assert await closed(older) == 4001
            calling = asyncio.ensure_future(second.call("robot", "echo"))
            request = json.loads(await newer.recv())
            await newer.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "here"}))
            assert (await calling).json["result"] == "here"
        await assert_used_up(first, connector.uri)
    assert_not_logged(first, second)


@asynchronous
async def test_goaway_of_a_drain_has_a_ticket(two: list[Node]) -> None:
    first, second = two

    async def knows() -> bool:
        return len((await first.request("GET", "/v1/nodes")).json["nodes"]) == 2

    await eventually(knows, "the nodes know of each other")
    async with first.connect("robot", additional_headers=SENT) as older:

        async def parked() -> bool:
            return await first.metric("wsgateway_parked") == 1

        await eventually(parked, "the client is parked")
        first.kill(signal.SIGTERM)
        goaway = json.loads(await older.recv())["params"]
        assert goaway["url"].startswith(f"{second.url}?client_id=robot&wsgateway_hop=1{PARAMETER}v1.tokens.")
        assert await closed(older) == 1012
    await asyncio.sleep(goaway["after"])
    async with serving_client(second, "robot", url=goaway["url"]):
        assert (await second.call("robot", "echo", [1])).json["result"] == [1]
    assert await first.ended() == 0
    await assert_used_up(second, goaway["url"])
    assert_not_logged(first, second)


@asynchronous
async def test_the_session_ends_when_the_token_would(two: list[Node]) -> None:
    first, second = two
    expires_at = int(time.time()) + 4
    headers = {"Authorization": f"Bearer {sign(EC, 'ES256', exp=expires_at)}", "Wsgateway-Redirect": "1"}
    async with first.connect("robot-7", additional_headers=headers) as older:
        # Sent on by its ticket alone, it would get another one.
        location = (await second.opening("/v1/connect?client_id=robot-7", headers)).headers["Location"]
        assert f"{PARAMETER}v1.jwt." in location
        async with connect(location, additional_headers={"Wsgateway-Redirect": "1"}) as newer:
            assert await closed(older) == 4001
            assert await closed(newer) == 1008
            assert time.time() >= expires_at


@asynchronous
async def test_who_gets_no_ticket(two: list[Node]) -> None:
    first, second = two
    bearer = {"Authorization": SENT["Authorization"]}
    # It does not follow redirects, so it is relayed, and leaves the token out nowhere.
    async with (
        first.connect("robot", additional_headers=bearer) as older,
        second.connect("robot", additional_headers=bearer) as newer,
    ):
        assert newer.remote_address[1] == second.client_port
        assert await closed(older) == 4001
        first.kill(signal.SIGTERM)
        goaway = json.loads(await newer.recv())
        assert goaway["method"] == "gateway.goaway"
        assert PARAMETER not in goaway["params"].get("url", "")


@asynchronous
async def test_client_that_reconnects_to_a_spent_url_goes_back_to_its_first(two: list[Node]) -> None:
    """The loop of docs/clients.rst: ``connect`` would stay with the URL of the redirect, and without the token."""
    first, second = two
    connections: list[Any] = []

    async def run() -> None:
        while True:
            try:
                async for connection in second.connect("robot", additional_headers=SENT):
                    connections.append(connection)
                    await connection.wait_closed()
            except websockets.InvalidStatus as e:
                if json.loads(e.response.body).get("error") != "ticket":
                    raise
                await asyncio.sleep(random.uniform(0, 0.1))

    async with first.connect("robot", additional_headers=SENT):
        running = asyncio.ensure_future(run())

        async def connected() -> bool:
            return len(connections) == 1

        await eventually(connected, "it is connected to the other node")
        assert connections[0].remote_address[1] == first.client_port
        connections[0].transport.abort()

        async def came_back() -> bool:
            assert not running.done(), running
            return len(connections) == 2

        await eventually(came_back, "it is back by its token")
        assert connections[1].remote_address[1] == second.client_port
    running.cancel()
