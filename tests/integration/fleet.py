"""Real nodes in processes of their own, and the ways in which tests talk to them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import websockets.asyncio.client
from twisted.internet.defer import Deferred

CHECKOUT = Path(__file__).parents[2]
TWISTD = (sys.executable, "-c", "from twisted.scripts.twistd import run; run()")
PATIENCE = 20


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., Deferred[None]]:
    """Run an asyncio coroutine function as a test, on the reactor that pytest-twisted runs."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Deferred[None]:
        return Deferred.fromFuture(asyncio.ensure_future(asyncio.wait_for(test(*args, **kwargs), 120)))

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Answer:
    """An HTTP response."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Node:
    """One `twistd wsgateway` process."""

    def __init__(self, folder: Path, *options: str, listen: str = "", backend: str = "", daemon: bool = False) -> None:
        self.folder = folder
        self.client_port, self.backend_port = free_port(), free_port()
        self.database = folder / "registry.sqlite"
        self.log = folder / f"node-{self.client_port}.log"
        self.command = [
            *TWISTD,
            *(() if daemon else ("--nodaemon", "--pidfile=")),
            *(f"--logfile={self.log}", "wsgateway"),
            *("--listen", listen or f"tcp:{self.client_port}:interface=127.0.0.1:backlog=4096"),
            *("--backend", backend or f"tcp:{self.backend_port}:interface=127.0.0.1:backlog=4096"),
            *("--registry", f"sqlite:{self.database}"),
            *options,
        ]
        self.process = subprocess.Popen(
            self.command, cwd=folder, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}
        )

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.client_port}/v1/connect"

    @property
    def backend_url(self) -> str:
        return f"ws://127.0.0.1:{self.backend_port}/v1/backend"

    def await_ready(self) -> Node:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll():
                raise AssertionError(f"the node ended with {self.process.returncode}: {self.process.stderr.read()}")
            with contextlib.suppress(OSError):
                if self._request("GET", "/readyz").status == 200:
                    return self
            time.sleep(0.02)
        raise AssertionError(f"the node is not ready: {self.log.read_text()}")

    def _request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.backend_port}{path}", body, headers or {}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answer(response.status, response.headers, response.read())
        except urllib.error.HTTPError as e:
            return Answer(e.code, e.headers, e.read())

    async def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """An HTTP request to the backend endpoint; a body that is no bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {} if data is None else {"Content-Type": "application/json"}
        return await asyncio.to_thread(self._request, method, path, data, {**given, **(headers or {})})

    async def call(self, client_id: str, method: str, params: Any = None, timeout: float | None = None) -> Answer:
        """Call a client over HTTP."""
        query = "" if timeout is None else f"?timeout={timeout}"
        body = {"jsonrpc": "2.0", "id": 1, "method": method}
        if params is not None:
            body["params"] = params
        return await self.request("POST", f"/v1/clients/{quote(client_id, safe='')}/rpc{query}", body)

    async def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        text = (await self.request("GET", "/metrics")).body.decode()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

    def connect(self, client_id: str, **kwargs: Any) -> websockets.asyncio.client.connect:
        """Connect a client made with the `websockets` library."""
        url = f"{self.url}?client_id={quote(client_id, safe='')}" if client_id else self.url
        return websockets.asyncio.client.connect(
            url, subprotocols=["wsgateway.jsonrpc.v1"], compression=None, ping_interval=None, **kwargs
        )

    def backend(self, **kwargs: Any) -> Backend:
        return Backend(self.backend_url, **kwargs)

    def rows(self, table: str) -> list[tuple[Any, ...]]:
        """What is in the registry, read past the node."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(f"SELECT * FROM {table}").fetchall()

    def memory(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def kill(self, signum: int = signal.SIGKILL) -> None:
        self.process.send_signal(signum)

    async def ended(self) -> int:
        """Wait for the end of the process; its exit status."""
        return await asyncio.to_thread(self.process.wait, 60)


class Backend:
    """A backend on the WebSocket: many calls in flight, responses matched by id."""

    def __init__(self, url: str, **kwargs: Any) -> None:
        self._connecting = websockets.asyncio.client.connect(url, compression=None, max_size=None, **kwargs)
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        #: what came that was no response
        self.received: asyncio.Queue[Any] = asyncio.Queue()

    async def __aenter__(self) -> Backend:
        self.socket = await self._connecting.__aenter__()
        self._reader = asyncio.ensure_future(self._read())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connecting.__aexit__(*exc)
        await self._reader

    async def _read(self) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            async for text in self.socket:
                message = json.loads(text)
                if "method" in message:
                    self.received.put_nowait(message)
                else:
                    self._waiting.pop(message["id"]).set_result(message)

    async def ask(self, method: str, params: Any = None) -> Any:
        """Send a request; the whole response."""
        number = next(self._ids)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        message = {"jsonrpc": "2.0", "id": number, "method": method}
        if params is not None:
            message["params"] = params
        await self.socket.send(json.dumps(message))
        return await self._waiting[number]

    async def call(self, client_id: str, method: str, params: Any = None, **more: Any) -> Any:
        given = {"client": client_id, "method": method, **more}
        if params is not None:
            given["params"] = params
        return await self.ask("client.call", given)


@contextlib.asynccontextmanager
async def answering(
    node: Node, client_id: str, answer: Callable[[Any], Any] = lambda request: request.get("params"), **kwargs: Any
) -> AsyncIterator[Any]:
    """A client that answers every call with what `answer` makes of the request; `None` is not answered."""
    async with node.connect(client_id, **kwargs) as socket_:

        async def serve() -> None:
            with contextlib.suppress(websockets.ConnectionClosed):
                async for text in socket_:
                    request = json.loads(text)
                    if "id" in request and (result := answer(request)) is not None:
                        await socket_.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}))

        server = asyncio.ensure_future(serve())
        try:
            yield socket_
        finally:
            server.cancel()


async def closed(socket_: Any) -> int:
    """Wait for the close of a connection; its code."""
    await asyncio.wait_for(socket_.wait_closed(), PATIENCE)
    return int(socket_.close_code)
