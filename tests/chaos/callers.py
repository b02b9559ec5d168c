"""Backends that call random clients through random nodes, at a steady rate, and keep the ledger.

One WebSocket to each node, which is given up when the node is silent: a node that was stopped cannot say anything, and
whoever calls it has to notice. A client that did not answer is called again and again, so that it shows when it can be
reached again.
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

#: the deadline of a call, in seconds; and how long after it a call without an outcome is lost
CALL_TIMEOUT, LOST_CALL_GRACE = 5.0, 5.0
#: a node that does not answer a ping for so long is given up, in seconds
PING_TIMEOUT = 3.0
#: how often clients that do not answer are called again, in seconds, and how many of them at most
PROBE_INTERVAL, MAX_PROBES = 0.25, 75
#: the longest that a client takes for an answer where it is to be slow, in seconds
MAX_SLOW_RESPONSE = 2.0
#: how many calls of a sweep are in flight
SWEEP_CONCURRENCY = 20


class BackendConnection:
    """One connection to a node, made again when it has ended."""

    def __init__(self, node: Node, ledger: CallLedger) -> None:
        self.node = node
        self.name = str(node.client_port)
        self._ledger = ledger
        self._socket: Any = None
        #: the node said that it is going away: it is called no more
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
        """Call a client, while this is up, which is to answer after so long; whether it did."""
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
            self._ledger.failed(number, error["code"], error["data"]["sent"])
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
    """The load. ``rate`` is in calls a second."""

    def __init__(self, nodes: Sequence[Node], clients: Sequence[str], ledger: CallLedger, rate: float) -> None:
        self.ledger = ledger
        self.links = {node: BackendConnection(node, ledger) for node in nodes}
        self._clients = list(clients)
        self._rate = rate
        #: the share of calls that the client takes its time for
        self.slow = 0.0
        #: the longest time that this process itself could not go on, in seconds
        self.held_up = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    async def connected(self) -> None:
        """Wait until every node can be called."""
        while not all(link.is_open for link in self.links.values()):
            await asyncio.sleep(0.02)

    def start(self) -> None:
        """Begin to call."""
        self._tasks = [asyncio.ensure_future(task) for task in (self._call_at_rate(), self._probe(), self._expire())]

    async def stop(self) -> None:
        """Call no more, and wait until every call has an outcome, or is lost."""
        for task in self._tasks[:2]:
            task.cancel()
        while self.ledger.in_flight:
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *(link.close() for link in self.links.values()), return_exceptions=True)

    async def replace(self, old: Node, new: Node) -> None:
        """A node has been started in the place of another."""
        await self.links.pop(old).close()
        self.links[new] = BackendConnection(new, self.ledger)

    def _random_connection(self) -> BackendConnection | None:
        up = [link for link in self.links.values() if link.is_open]
        return random.choice(up) if up else None

    async def _call_at_rate(self) -> None:
        began, made = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - began) * self._rate)
            # Not all at once what could not be done while this process had no CPU.
            made = max(made, due - int(self._rate))
            while made < due:
                made += 1
                if link := self._random_connection():
                    seconds = random.uniform(0, MAX_SLOW_RESPONSE) if random.random() < self.slow else 0.0
                    link.call(random.choice(self._clients), seconds)
            await asyncio.sleep(0.01)

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_INTERVAL)
            failing = self.ledger.unreachable()
            for client in random.sample(failing, min(MAX_PROBES, len(failing))):
                if link := self._random_connection():
                    link.call(client)

    async def _expire(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.5)
            now = time.monotonic()
            self.held_up = max(self.held_up, now - began - 0.5)
            self.ledger.expire(now - CALL_TIMEOUT - LOST_CALL_GRACE)

    async def sweep(self, node: Node, clients: Sequence[str]) -> list[str]:
        """Call clients through one node, once it can be called; those that did not answer."""
        link, room, missed = self.links[node], asyncio.Semaphore(SWEEP_CONCURRENCY), list[str]()

        async def one(client: str) -> None:
            async with room:
                while not link.is_open:
                    await asyncio.sleep(0.1)
                if not await link.call(client):
                    missed.append(client)

        await asyncio.gather(*(one(client) for client in clients))
        return missed
