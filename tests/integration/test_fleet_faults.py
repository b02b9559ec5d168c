"""Faults in a fleet, on a small scale; ``make chaos`` tests them on a large scale, under load."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import websockets
from client_group import ClientGroup
from fleet import Node, asynchronous, closed, eventually, serving_client

from tests.builders import mariadb
from tests.builders.ports import free_port
from tests.chaos.proxy import DelayProxy

LEASE = 2.0
CLIENTS = 30


@pytest.fixture
def database() -> Iterator[mariadb.MariaDBServer]:
    """A MariaDB server that a test may kill."""
    server = mariadb.MariaDBServer()
    yield server
    server.close()


async def all_answer(group: ClientGroup, nodes: list[Node], patience: float) -> None:
    """Wait until every client answers through every node."""
    for node in nodes:
        await eventually(lambda node=node: group.all_answer(node), "all answer through each node", patience)


async def ready(node: Node) -> bool:
    return (await node.request("GET", "/readyz")).status == 200


@asynchronous
async def test_killed_node_is_replaced_on_the_same_port(fleet: Callable[..., list[Node]]) -> None:
    nodes = fleet(3)
    async with ClientGroup(nodes, CLIENTS) as group:
        dead, *left = nodes
        await all_answer(group, nodes, 5)
        orphans = group.connected_to(dead)
        assert orphans
        dead.kill()
        answer = await left[0].call(orphans[0], "who", timeout=5)
        assert answer.json.get("error", {"code": 0})["code"] in (0, -32001, -32003, -32004)
        await all_answer(group, left, LEASE + 3)

        async def removed() -> bool:
            return len(left[0].rows("nodes")) == 2 and len(left[0].rows("clients")) == CLIENTS

        await eventually(removed, "no row of the dead node is left", 3 * LEASE + 3)
        (again,) = fleet(1, registry=dead.registry, ports=(dead.client_port, dead.backend_port))
        await all_answer(group, [again], 5)
        assert [len((await node.request("GET", "/v1/nodes")).json["nodes"]) for node in (again, *left)] == [3, 3, 3]


@asynchronous
async def test_killed_node_is_restarted_at_its_address(fleet: Callable[..., list[Node]]) -> None:
    """It takes the place of its predecessor at once, for the whole fleet, and nothing looks like an attack."""
    nodes = fleet(3, "--lease", "30", "--heartbeat", "1")
    killed, *others = nodes
    old_id = killed.node_id
    group = ClientGroup([killed], CLIENTS, [killed])
    async with killed.connect("gone"), group:
        for other in others:
            # They know where the clients are, and are connected to the node.
            await all_answer(group, [other], 5)
        killed.kill()
        await killed.ended()
        log_size = len(killed.log.read_text())
        (again,) = fleet(
            1,
            *("--lease", "30", "--heartbeat", "1"),
            registry=killed.registry,
            ports=(killed.client_port, killed.backend_port),
        )
        assert await again.metric("wsgateway_nodes") == 2
        assert len((await again.request("GET", "/v1/nodes")).json["nodes"]) == 3
        broken = [await other.metric("wsgateway_link_failures_total") for other in others]
        for node in (again, *others):
            error = (await node.call("gone", "who")).json["error"]
            assert (error["code"], error["data"]["sent"]) == (-32001, False)
            for method in ("GET", "DELETE"):
                assert (await node.request(method, "/v1/clients/gone")).status == 404
        # Its clients come back, and some are called before that.
        await all_answer(group, [again, *others], 10)
        await asyncio.sleep(2.5)
        assert [await node.metric("wsgateway_nodes") for node in (again, *others)] == [2, 2, 2]
        assert await again.metric("wsgateway_link_failures_total") == 0
        assert [await other.metric("wsgateway_link_failures_total") for other in others] == broken
        for node in (again, *others):
            assert b'wsgateway_refused_total{reason="peer"}' not in (await node.request("GET", "/metrics")).body
    log = again.log.read_text()[log_size:]
    assert old_id not in log
    assert "401" not in log


@asynchronous
async def test_node_stopped_for_three_leases_checks_its_claims(
    fleet: Callable[..., list[Node]],
) -> None:
    stopped, *others = fleet(3)
    older = await stopped.connect("both")
    kept = await stopped.connect("kept")
    assert (await others[0].call("both", "who", timeout=0.1)).json["error"]["data"]["sent"] is True
    await older.recv()
    stopped.kill(signal.SIGSTOP)
    try:
        until = time.monotonic() + 3 * LEASE
        async with serving_client(others[0], "both", lambda _: "newer"):
            assert (await others[0].call("both", "who")).json["result"] == "newer"

            async def over() -> bool:
                assert (await others[1].call("both", "who", timeout=3)).json["result"] == "newer"
                return time.monotonic() > until

            await eventually(over, "three leases")
            stopped.kill(signal.SIGCONT)
            answers = [await stopped.call("both", "who", timeout=3) for _ in range(5)]
            assert answers[-1].json["result"] == "newer"
            # Only the newer connection has answered, and the older one received no call.
            assert {answer.json.get("result", "newer") for answer in answers} == {"newer"}
            assert await closed(older) == 4001
            with pytest.raises(websockets.ConnectionClosed):
                raise AssertionError(f"the older connection was sent {await older.recv()}")
            await eventually(lambda: ready(stopped), "it takes clients again")
            # It still owns a client that was not claimed by another node.
            assert kept.state is websockets.State.OPEN
            calling = asyncio.ensure_future(others[1].call("kept", "who", timeout=5))
            number = (await kept.recv()).split('"id":"')[1].split('"')[0]
            await kept.send(f'{{"jsonrpc":"2.0","id":"{number}","result":"kept"}}')
            assert (await calling).json["result"] == "kept"
            await kept.close()
    finally:
        stopped.kill(signal.SIGCONT)


@asynchronous
async def test_database_outage_of_two_leases(fleet: Callable[..., list[Node]], database: mariadb.MariaDBServer) -> None:
    nodes = fleet(2, registry=database.url)
    async with ClientGroup(nodes, CLIENTS) as group:
        await all_answer(group, nodes, 5)
        here, there = group.connected_to(nodes[0]), group.connected_to(nodes[1])
        await asyncio.to_thread(database.kill)
        until = time.monotonic() + 2 * LEASE

        async def over() -> bool:
            # Clients of each node, and clients whose location is cached.
            assert await group.all_answer(nodes[0], here)
            assert await group.all_answer(nodes[1], there)
            assert await group.all_answer(nodes[0], there)
            return time.monotonic() > until and not await ready(nodes[0])

        await eventually(over, "two leases")
        unknown = await nodes[0].call("unknown", "who", timeout=5)
        assert (unknown.status, unknown.json["error"]["code"]) == (503, -32007)
        assert unknown.json["error"]["data"]["sent"] is False
        newcomer = await nodes[0].opening("/v1/connect?client_id=newcomer")
        assert newcomer.status == 503
        await asyncio.to_thread(database.start)
        for node in nodes:
            await eventually(lambda node=node: ready(node), "the nodes take clients again")
        await all_answer(group, nodes, LEASE + 3)
        assert group.ended == 0
        assert len(nodes[0].rows("clients")) == CLIENTS
        async with serving_client(nodes[1], "newcomer"):
            assert (await nodes[0].call("newcomer", "echo", [1])).json["result"] == [1]


@asynchronous
async def test_unreachable_node(fleet: Callable[..., list[Node]]) -> None:
    ports = free_port(), free_port()
    network = await DelayProxy(ports[1]).start()
    try:
        (apart,) = fleet(1, "--peer-url", f"ws://127.0.0.1:{network.port}", ports=ports)
        (other,) = fleet(1, registry=apart.registry)
        async with ClientGroup([apart, other], CLIENTS) as group:
            await all_answer(group, [apart, other], 5)
            network.cut()
            far, near = group.connected_to(apart), group.connected_to(other)
            answers = await asyncio.gather(*(other.call(client_id, "who", timeout=1.5) for client_id in far))
            for answer in answers:
                # -32003 for those in flight when the silent peer connection is closed.
                assert answer.json["error"]["code"] in (-32004, -32003)
                assert answer.json["error"]["data"]["sent"] in (True, False)
            assert await group.all_answer(apart, near)
            assert await group.all_answer(other, near)
            assert await group.all_answer(apart, far)
            # A client whose node is unreachable can connect to another node.
            async with serving_client(other, far[0]):
                assert (await other.call(far[0], "echo", [1])).json["result"] == [1]
            network.restore()
            await eventually(
                lambda: group.all_answer(other, far[1:]), "the peer connections are open again", LEASE + 10
            )
    finally:
        await network.close()


@asynchronous
async def test_slow_database(fleet: Callable[..., list[Node]], database: mariadb.MariaDBServer) -> None:
    direct = database.url
    slow = await DelayProxy(database.port).start()
    try:
        url = direct.replace(f":{database.port}/", f":{slow.port}/")
        # This thread is the proxy's.
        nodes = await asyncio.to_thread(lambda: fleet(2, registry=url))
        async with ClientGroup(nodes, CLIENTS) as group:
            await all_answer(group, nodes, 5)
            slow.delay = 0.05
            until = time.monotonic() + LEASE

            async def over() -> bool:
                assert all([await group.all_answer(node) for node in nodes])
                assert all([await ready(node) for node in nodes])
                return time.monotonic() > until

            await eventually(over, "one lease")
            async with contextlib.AsyncExitStack() as stack:
                newcomers = [serving_client(nodes[i % 2], f"new-{i}", lambda _, i=i: i) for i in range(10)]
                await asyncio.gather(*(stack.enter_async_context(one) for one in newcomers))
                for i in range(10):
                    assert (await nodes[0].call(f"new-{i}", "who")).json["result"] == i
            assert group.ended == 0
    finally:
        await slow.close()
