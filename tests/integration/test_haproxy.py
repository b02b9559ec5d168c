"""The load balancer of deploy/haproxy, as it stands there, in front of two nodes of one machine of deploy/systemd."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import websockets.asyncio.client
from fleet import CHECKOUT, Node, asynchronous, closed, eventually, serving_client

from tests.builders.ports import free_port
from tests.deploy.case import port_of
from tests.deploy.test_systemd import arguments

CLIENT_ADDRESS = "127.0.0.7"
#: what stands after the @ of their units; and the machine's address in haproxy.cfg
INSTANCES = ("8081", "8082")
MACHINE = "10.0.0.11"
OPTIONS = ("--auth", "none", "--public-url", "wss://localhost")
_SERVER = re.compile(r"^ +server (\S+) ([0-9.]+):(\d+) check port (\d+)\n", re.MULTILINE)


def started_at(instance: str, option: str) -> str:
    """The endpoint that the unit starts a node with."""
    given = arguments(instance)
    return given[given.index(option) + 1]


class Machine:
    """Two nodes on one address, at those of their ports that are free here."""

    def __init__(self, start: Callable[..., Node], *options: str) -> None:
        self._options = (*OPTIONS, *(options or ("--drain-seconds", "0")))
        #: a port in deploy/ -> the one in its place here
        self.ports: dict[int, int] = {}
        self.nodes = [self._start(start, instance) for instance in INSTANCES]
        for node in self.nodes:
            node.await_ready()

    def _start(self, start: Callable[..., Node], instance: str) -> Node:
        endpoints = [started_at(instance, option) for option in ("--listen", "--backend")]
        there = [port_of(endpoint) for endpoint in endpoints]
        here = [self.ports.setdefault(port, free_port()) for port in there]
        listen, backend = (
            endpoint.replace(f"tcp:{old}", f"tcp:{new}:interface=127.0.0.1")
            for endpoint, old, new in zip(endpoints, there, here, strict=True)
        )
        return start(*self._options, ready=False, listen=listen, backend=backend, ports=(here[0], here[1]))

    def server(self, found: re.Match[str]) -> str:
        """A server line of haproxy.cfg, with the ports here; none if it is of a node that was not started."""
        name, host, port, check = found[1], found[2], int(found[3]), int(found[4])
        if host != MACHINE or check not in self.ports:
            return ""
        return f"    server {name} 127.0.0.1:{self.ports[port]} check port {self.ports[check]}\n"


class HAProxy:
    """haproxy with the configuration of deploy/haproxy, but for addresses, and for times that a test does not wait."""

    def __init__(self, folder: Path, machine: Machine, *, as_shipped: bool = False) -> None:
        """``as_shipped``: with its check intervals and timeouts, too."""
        self.port, self._control = free_port(), folder / "control"
        authority = trustme.CA()
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(folder / "cert.pem"))
        self._context = ssl.create_default_context()
        authority.configure_trust(self._context)
        text = (CHECKOUT / "deploy/haproxy/haproxy.cfg").read_text()
        changes = [
            ("hard-stop-after 12h", f"hard-stop-after 12h\n    stats socket {self._control}"),
            ("bind :443 ssl crt /etc/haproxy/certs", f"bind 127.0.0.1:{self.port} ssl crt {folder / 'cert.pem'}"),
        ]
        if not as_shipped:
            changes += [
                ("timeout client 10s", "timeout client 500ms"),
                ("timeout server 10s", "timeout server 500ms"),
                (" inter 2s", " inter 50ms"),
            ]
        if os.geteuid() != 0:
            # Only root can give up privileges.
            changes += [
                ("    user haproxy\n", ""),
                ("    group haproxy\n", ""),
                ("    chroot /var/lib/haproxy\n", ""),
            ]
        for there, here in changes:
            assert text.count(there) == 1, there
            text = text.replace(there, here)
        (folder / "haproxy.cfg").write_text(_SERVER.sub(machine.server, text))
        program = shutil.which("haproxy") or "/usr/sbin/haproxy"
        self.process = subprocess.Popen(
            [program, "-db", "-f", folder / "haproxy.cfg"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    async def states(self) -> list[str]:
        """What it thinks of each node: ``UP``, ``DOWN``, or something between."""

        def ask() -> list[str]:
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(str(self._control))
                control.sendall(b"show stat nodes 4 -1\n")
                rows = csv.DictReader(control.makefile())
                return [row["status"] for row in rows]

        try:
            return await asyncio.to_thread(ask)
        except OSError:
            return []

    def connect(self, client_id: str, **kwargs: Any) -> websockets.asyncio.client.connect:
        """Connect a client."""
        return websockets.asyncio.client.connect(
            f"wss://localhost:{self.port}/v1/connect?client_id={client_id}",
            ssl=self._context,
            local_addr=(CLIENT_ADDRESS, 0),
            compression=None,
            ping_interval=None,
            **kwargs,
        )


@pytest.fixture
def haproxy(tmp_path: Path) -> Iterator[Callable[..., HAProxy]]:
    """Starts haproxy in front of the nodes of a machine."""
    with contextlib.ExitStack() as stack:

        def start(machine: Machine, **options: Any) -> HAProxy:
            started = HAProxy(tmp_path, machine, **options)
            stack.callback(started.process.wait)
            stack.callback(started.process.kill)
            return started

        yield start


@asynchronous
async def test_clients_keep_their_address_and_a_node_that_drains_gets_no_more(
    start: Callable[..., Node], haproxy: Callable[..., HAProxy]
) -> None:
    machine = Machine(start)
    nodes, front = machine.nodes, haproxy(machine)

    async def states(*wanted: str) -> bool:
        return await front.states() == list(wanted)

    await eventually(lambda: states("UP", "UP"), "both nodes take clients")
    call_ids: asyncio.Queue[str] = asyncio.Queue()

    def answer(request: Any) -> Any:
        return call_ids.put_nowait(request["id"]) if request["method"] == "later" else request["params"]

    async with contextlib.AsyncExitStack() as stack:
        clients = {f"c-{i}": await stack.enter_async_context(serving_client(front, f"c-{i}", answer)) for i in range(4)}
        held = {node: [] for node in nodes}
        for client_id in clients:
            row = (await nodes[0].request("GET", f"/v1/clients/{client_id}")).json
            assert row["address"].startswith(f"{CLIENT_ADDRESS}:"), row
            held[next(node for node in nodes if node.node_id == row["node"])].append(client_id)
        assert [len(ids) for ids in held.values()] == [2, 2]

        # It is for the node to say who was silent for too long.
        await asyncio.sleep(1)
        for client_id in clients:
            assert (await nodes[1].call(client_id, "echo", [client_id])).json["result"] == [client_id]

        client_id = held[nodes[1]][0]
        calling = asyncio.ensure_future(nodes[0].call(client_id, "later"))
        call_id = await call_ids.get()
        nodes[1].kill(signal.SIGTERM)
        await eventually(lambda: states("UP", "DOWN"), "the node that drains is left out")
        for i in range(4, 8):
            await stack.enter_async_context(serving_client(front, f"c-{i}"))
        assert await nodes[0].metric("wsgateway_clients") == 6
        # Who was connected stays until it is through.
        await clients[client_id].send(json.dumps({"jsonrpc": "2.0", "id": call_id, "result": "at last"}))
        assert (await calling).json["result"] == "at last"
        assert await closed(clients[client_id]) == 1012
        assert await nodes[1].ended() == 0


@asynchronous
async def test_a_machine_takes_clients_while_one_of_its_nodes_is_away(
    start: Callable[..., Node], haproxy: Callable[..., HAProxy]
) -> None:
    machine = Machine(start)
    (gone, left), front = machine.nodes, haproxy(machine)

    async def states() -> set[str]:
        return set(await front.states())

    async def all_up() -> bool:
        return await states() == {"UP"}

    async def one_down() -> bool:
        return "DOWN" in await states()

    await eventually(all_up, "haproxy has found the nodes")
    # The unit does not start a node again that was drained so.
    assert (await left.request("POST", f"/v1/nodes/{gone.node_id}/drain", {})).status == 202
    assert await gone.ended() == 0
    await eventually(one_down, "the node is left out")
    async with contextlib.AsyncExitStack() as stack:
        for i in range(4):
            await stack.enter_async_context(serving_client(front, f"c-{i}"))
            assert (await left.call(f"c-{i}", "echo", [i])).json["result"] == [i]


class Agent:
    """An agent behind haproxy: it follows goaway, and comes back at once when its connection is lost."""

    def __init__(self, front: HAProxy, client_id: str) -> None:
        self._front, self._client_id = front, client_id
        self.refusals: list[str] = []
        self.connected = asyncio.Event()
        self._serving: set[asyncio.Future[None]] = set()

    async def run(self) -> None:
        try:
            while True:
                try:
                    socket_ = await self._front.connect(self._client_id)
                except Exception as e:  # noqa: BLE001 (any of them counts)
                    self.refusals.append(repr(e))
                    await asyncio.sleep(0.1)
                    continue
                self.connected.set()
                leaving = asyncio.Event()
                self._serving.add(serving := asyncio.ensure_future(self._serve(socket_, leaving)))
                serving.add_done_callback(self._serving.discard)
                await leaving.wait()
        finally:
            for serving in self._serving:
                serving.cancel()

    async def _serve(self, socket_: Any, leaving: asyncio.Event) -> None:
        """Answer calls until the connection is closed: after a goaway, on the old connection as well."""
        with contextlib.suppress(websockets.ConnectionClosed):
            async for text in socket_:
                message = json.loads(text)
                if "id" in message:
                    await socket_.send(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": message["params"]}))
                elif message["method"] == "gateway.goaway":
                    asyncio.get_running_loop().call_later(message["params"]["after"], leaving.set)
        leaving.set()


@asynchronous
async def test_drain_with_the_shipped_checks_fails_no_call_and_refuses_no_client(
    start: Callable[..., Node], haproxy: Callable[..., HAProxy]
) -> None:
    """A drain of 30 s, with the delay of deploy/systemd/tap.cfg, under calls through the other node."""
    config = (CHECKOUT / "deploy/systemd/tap.cfg").read_text()
    (delay,) = re.findall(r"(?m)^drain-delay = (\d+)$", config)
    machine = Machine(start, "--drain-seconds", "30", "--drain-delay", delay)
    (gone, left), front = machine.nodes, haproxy(machine, as_shipped=True)

    async def both_up() -> bool:
        return await front.states() == ["UP", "UP"]

    await eventually(both_up, "both nodes take clients")
    agents = [Agent(front, f"c-{i}") for i in range(60)]
    running = [asyncio.ensure_future(agent.run()) for agent in agents]
    try:
        await asyncio.wait_for(asyncio.gather(*(agent.connected.wait() for agent in agents)), 20)
        assert await gone.metric("wsgateway_clients") > 0
        calls, failed = 0, []
        gone.kill(signal.SIGTERM)
        end = asyncio.ensure_future(gone.ended())
        started_at = time.monotonic()
        async with left.backend() as backend:
            while not end.done():
                client_id = f"c-{random.randrange(60)}"
                answers = await asyncio.gather(*(backend.call(client_id, "echo", [calls + n]) for n in range(4)))
                calls += len(answers)
                failed += [answer for answer in answers if "error" in answer]
                await asyncio.sleep(0.02)
        assert end.result() == 0
        assert time.monotonic() - started_at > 25 + int(delay)
        assert (failed, [agent.refusals for agent in agents if agent.refusals]) == ([], []), calls
        assert calls > 1000
        assert await left.metric("wsgateway_clients") == 60
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
