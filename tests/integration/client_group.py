"""Clients that stay connected: they reconnect to any node after a random delay, as recommended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Sequence
from typing import Any

import websockets
from fleet import Node

#: longest delay before a reconnection, in seconds; short, since few clients reconnect at once in the tests
MAX_RECONNECT_DELAY = 0.5


class ClientGroup:
    """``count`` clients named ``c-0`` and so on; each answers calls with its own id.

    ``nodes``: where they reconnect. ``homes``: where they connect first, in turn. ``follow``: clients that receive a
    goaway connect to its url. ``options`` are for :meth:`Node.connect`.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        count: int,
        homes: Sequence[Node] = (),
        *,
        name: str = "c",
        follow: bool = False,
        **options: Any,
    ) -> None:
        self.nodes = list(nodes)
        self.ids = [f"{name}-{i}" for i in range(count)]
        self._homes = list(homes or nodes)
        self._tasks: list[asyncio.Task[None]] = []
        #: the open connections
        self.sockets: dict[str, Any] = {}
        self._follow = follow
        self._options = options
        #: how many connections have ended, and how many opening handshakes failed
        self.ended = self.refused = 0
        #: client_id -> params of the goaways that it received
        self.goaways: dict[str, list[dict[str, Any]]] = {}

    async def __aenter__(self) -> ClientGroup:
        for number, client_id in enumerate(self.ids):
            self._tasks.append(
                asyncio.ensure_future(self._stay_connected(client_id, self._homes[number % len(self._homes)]))
            )
        while len(self.sockets) < len(self.ids):
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(socket.close() for socket in self.sockets.values()))

    async def _stay_connected(self, client_id: str, home: Node) -> None:
        node, goaway = home, None
        while True:
            try:
                url = {} if goaway is None else {"url": goaway["url"]}
                connecting = node.connect(client_id, open_timeout=2, **url, **self._options)
                self.sockets[client_id] = socket = await connecting
            except (OSError, websockets.InvalidHandshake, asyncio.TimeoutError):
                self.refused += 1
                goaway = None
            else:
                goaway = await self._serve(client_id, socket)
                del self.sockets[client_id]
                self.ended += 1
                if socket.close_code == 4001:
                    return
            await asyncio.sleep(random.random() * MAX_RECONNECT_DELAY if goaway is None else goaway["after"])
            node = random.choice(self.nodes)

    async def _serve(self, client_id: str, socket: Any) -> dict[str, Any] | None:
        """Answer calls until the connection ends; return the goaway to follow, if any."""
        goaway = None
        with contextlib.suppress(websockets.ConnectionClosed):
            async for text in socket:
                request = json.loads(text)
                if "id" in request:
                    await socket.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": client_id}))
                elif request["method"] == "gateway.goaway":
                    self.goaways.setdefault(client_id, []).append(request["params"])
                    goaway = request["params"] if self._follow and "url" in request["params"] else None
        return goaway

    def connected_to(self, node: Node) -> list[str]:
        """Return the clients connected to a node."""
        return [client_id for client_id, socket in self.sockets.items() if socket.remote_address[1] == node.client_port]

    async def all_answer(self, node: Node, client_ids: Sequence[str] = (), timeout: float = 5) -> bool:
        """Whether all clients answer calls through a node. A response of another client is an error."""
        called = list(client_ids or self.ids)
        answers = await asyncio.gather(*(node.call(client_id, "who", timeout=timeout) for client_id in called))
        results = [answer.json.get("result") for answer in answers]
        for client_id, result in zip(called, results, strict=True):
            assert result in (None, client_id), f"{client_id} was called, and {result} answered"
        return results == called
