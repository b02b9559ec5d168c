"""Drain of a node in a fleet: the outcome of each call is known."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable

import pytest
from fleet import Node, asynchronous, closed, eventually, serving_client

from tests.chaos.__main__ import table
from tests.chaos.fleet import Size, Timing
from tests.chaos.run import run
from tests.chaos.scenarios import SCENARIOS

CALL = {"jsonrpc": "2.0", "id": 1, "method": "echo"}


@asynchronous
async def test_closes_are_spread_over_the_time(start: Callable[..., Node]) -> None:
    node = start("--auth", "none", "--openings-per-address", "0", "--drain-seconds", "2")
    clients = [await node.connect(f"c-{i}") for i in range(200)]
    node.kill(signal.SIGTERM)
    began = time.monotonic()

    async def end(client: object) -> float:
        assert await closed(client) == 1012
        return time.monotonic() - began

    quarters = Counter(int(when / 0.5) for when in await asyncio.gather(*map(end, clients)))
    assert await node.ended() == 0
    # Coarse, since this process is not alone on its machine; test_drain.py of the unit tests has the fine histogram.
    assert max(quarters.values()) <= 100, quarters


@asynchronous
async def test_calls_through_an_ending_node_are_answered_or_refused(fleet: Callable[..., list[Node]]) -> None:
    ending, other = fleet(2, "--drain-seconds", "0")
    async with other.connect("far") as client, ending.backend() as backend:
        calling = asyncio.ensure_future(backend.call("far", "slow"))
        request = json.loads(await client.recv())
        ending.kill(signal.SIGTERM)
        assert (await backend.received.get())["method"] == "gateway.goaway"

        async def refused() -> bool:
            answer = (await ending.request("POST", "/v1/clients/nobody/rpc", CALL)).json
            return bool(answer["error"]["code"] == -32004)

        await eventually(refused, "new calls are refused")
        refusal = await backend.call("far", "echo")
        assert (refusal["error"]["code"], refusal["error"]["data"]["sent"]) == (-32004, False)
        answer = await ending.call("far", "echo")
        assert (answer.status, answer.json["error"]["data"]["sent"]) == (503, False)
        assert not calling.done()
        await client.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "in time"}))
        assert (await calling)["result"] == "in time"
        assert await closed(backend.socket) == 1001
    assert await ending.ended() == 0


@asynchronous
async def test_client_that_moves_before_its_call_is_answered(fleet: Callable[..., list[Node]]) -> None:
    """It can be called at the next node, and answers the call on the connection that it came by."""
    ending, other = fleet(2, "--drain-seconds", "0")
    async with ending.connect("moving") as old, other.backend() as backend:
        calling = asyncio.ensure_future(backend.call("moving", "slow"))
        request = json.loads(await old.recv())
        ending.kill(signal.SIGTERM)
        goaway = json.loads(await old.recv())
        assert goaway["params"]["url"].startswith(other.url)
        async with serving_client(other, "moving", lambda _: "new"):
            for node in (ending, other):
                assert (await node.call("moving", "who")).json["result"] == "new"
            await old.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "old"}))
            assert (await calling)["result"] == "old"
            assert await closed(old) == 1012
            assert await ending.ended() == 0
            assert (await other.call("moving", "who")).json["result"] == "new"


@asynchronous
async def test_a_rolling_restart_under_load(capsys: pytest.CaptureFixture[str]) -> None:
    """Three nodes, 200 clients that follow goaway, callers. ``make chaos SCENARIO=rolling-restart`` is the large one,
    which also looks at how long a client cannot be reached: here that depends on what else the machine has to do."""
    scenario = dataclasses.replace(
        SCENARIOS["rolling-restart"], bound=lambda fleet: fleet.timing.reconnect, timing=Timing(drain=1.0)
    )
    result = await run(scenario, Size(clients=200, rate=100.0, before=0.5), lambda text: None)
    with capsys.disabled():
        # Where tests run in several processes, this is what is shown.
        sys.stderr.write(f"\n{table([result])}\n")
    assert result.problems == []
    assert result.totals.answered > 0
