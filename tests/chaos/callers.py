"""Backends that call random clients through random nodes at a steady rate, and record the calls in the ledger.

There is one WebSocket to each node, which is given up when the node does not answer pings: a stopped node cannot close
its connections. A client that did not answer is called repeatedly, to find out when it is reachable again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import websockets
from websockets.asyncio.client import connect

from tests.chaos.ledger import CallLedger
from tests.integration.fleet import Node

#: seconds
CALL_TIMEOUT = 5.0
#: seconds after the timeout when a call without an outcome is lost
LOST_CALL_GRACE = 5.0
#: seconds without a pong after which a connection is given up
PING_TIMEOUT = 3.0
#: seconds between two probes of unreachable clients
PROBE_INTERVAL = 0.25
#: clients per probe
MAX_PROBES = 75
#: seconds; the longest response time of a slow call
MAX_SLOW_RESPONSE = 2.0
#: calls in flight of a sweep
SWEEP_CONCURRENCY = 20


class BackendConnection:
    """A connection to one node, which reconnects."""

    def __init__(self, node: Node, ledger: CallLedger) -> None:
        self.node = node
        self.name = str(node.client_port)
        self._ledger = ledger
        self._socket: Any = None
        #: the node has sent gateway.goaway: no new calls
        self._going_away = False
        self._pending: dict[int, asyncio.Future[bool]] = {}
        self._sending: set[asyncio.Future[None]] = set()
        self._task = asyncio.ensure_future(self._run())

    @property
    def is_open(self) -> bool:
        return self._socket is not None and not self._going_away

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def call(self, client: str, seconds: float = 0.0) -> asyncio.Future[bool]:
        """Call a client, which answers after ``seconds``. Resolves to whether there was a result."""
        number = self._ledger.made(client, self.name, time.monotonic())
        self._pending[number] = answered = asyncio.get_running_loop().create_future()
        params = {"client": client, "method": "whoami", "params": [number, seconds], "timeout": CALL_TIMEOUT}
        message = json.dumps({"jsonrpc": "2.0", "id": number, "method": "client.call", "params": params})
        sending = asyncio.ensure_future(self._send(self._socket, message))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)
        return answered

    async def _send(self, socket: Any, message: str) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            await socket.send(message)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError, websockets.InvalidHandshake, websockets.ConnectionClosed):
                async with connect(
                    self.node.backend_url,
                    additional_headers=self.node.headers,
                    compression=None,
                    open_timeout=2,
                    close_timeout=1,
                    ping_interval=PING_TIMEOUT / 3,
                    ping_timeout=PING_TIMEOUT * 2 / 3,
                    write_limit=2**22,
                ) as self._socket:
                    try:
                        async for text in self._socket:
                            self._message_received(json.loads(text))
                    finally:
                        self._connection_ended()
            await asyncio.sleep(0.2)

    def _message_received(self, message: Any) -> None:
        if message.get("method") == "gateway.goaway":
            self._going_away = True
            return
        number, error = message["id"], message.get("error")
        if error is None:
            self._ledger.answered(number, message["result"], time.monotonic())
        else:
            # Clients return no errors: each is the gateway's own.
            self._ledger.failed(number, error["code"], error["data"]["sent"] or message.get("gateway") is not True)
        waiting = self._pending.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(error is None)

    def _connection_ended(self) -> None:
        self._socket, self._going_away = None, False
        waiting, self._pending = self._pending, {}
        for number, answered in waiting.items():
            self._ledger.cut_off(number)
            if not answered.done():
                answered.set_result(False)


class CallGenerator:
    """Generate the load. ``rate`` is in calls per second."""

    def __init__(self, nodes: Sequence[Node], clients: Sequence[str], ledger: CallLedger, rate: float) -> None:
        self.ledger = ledger
        self.connections = {node: BackendConnection(node, ledger) for node in nodes}
        self._clients = list(clients)
        self._rate = rate
        #: the share of slow calls
        self.slow = 0.0
        #: seconds; the longest time that this process did not get the CPU
        self.held_up = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    async def connected(self) -> None:
        """Wait until there is a connection to each node."""
        while not all(connection.is_open for connection in self.connections.values()):
            await asyncio.sleep(0.02)

    def start(self) -> None:
        """Start the calls."""
        self._tasks = [asyncio.ensure_future(task) for task in (self._call_at_rate(), self._probe(), self._expire())]

    async def stop(self) -> None:
        """Stop the calls, and wait until each has an outcome or is lost."""
        for task in self._tasks[:2]:
            task.cancel()
        while self.ledger.in_flight:
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        closing = [connection.close() for connection in self.connections.values()]
        await asyncio.gather(*self._tasks, *closing, return_exceptions=True)

    async def replace(self, old: Node, new: Node) -> None:
        """Replace the connection to a node that was restarted."""
        await self.connections.pop(old).close()
        self.connections[new] = BackendConnection(new, self.ledger)

    def _random_connection(self) -> BackendConnection | None:
        open_connections = [connection for connection in self.connections.values() if connection.is_open]
        return random.choice(open_connections) if open_connections else None

    async def _call_at_rate(self) -> None:
        began, made = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - began) * self._rate)
            # Do not make up for more than a second without the CPU.
            made = max(made, due - int(self._rate))
            while made < due:
                made += 1
                if connection := self._random_connection():
                    seconds = random.uniform(0, MAX_SLOW_RESPONSE) if random.random() < self.slow else 0.0
                    connection.call(random.choice(self._clients), seconds)
            await asyncio.sleep(0.01)

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_INTERVAL)
            failing = self.ledger.unreachable()
            for client in random.sample(failing, min(MAX_PROBES, len(failing))):
                if connection := self._random_connection():
                    connection.call(client)

    async def _expire(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.5)
            now = time.monotonic()
            self.held_up = max(self.held_up, now - began - 0.5)
            self.ledger.expire(now - CALL_TIMEOUT - LOST_CALL_GRACE)

    async def sweep(self, node: Node, clients: Sequence[str]) -> list[str]:
        """Call clients through one node, once it is connected; return those that did not answer."""
        connection, semaphore, missed = self.connections[node], asyncio.Semaphore(SWEEP_CONCURRENCY), list[str]()

        async def call(client: str) -> None:
            async with semaphore:
                while not connection.is_open:
                    await asyncio.sleep(0.1)
                if not await connection.call(client):
                    missed.append(client)

        await asyncio.gather(*(call(client) for client in clients))
        return missed
