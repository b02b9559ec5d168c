"""Real nodes in processes of their own, and the ways in which tests talk to them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pymysql
import websockets.asyncio.client
from twisted.internet.defer import Deferred

from tests.builders.ports import free_port

CHECKOUT = Path(__file__).parents[2]
TWISTD = (sys.executable, "-c", "from twisted.scripts.twistd import run; run()")
TIMEOUT = 20
#: of an opening handshake; the key is that of RFC 6455, section 1.3
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., Deferred[None]]:
    """Run an asyncio coroutine function as a test, on the reactor that pytest-twisted runs."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Deferred[None]:
        return Deferred.fromFuture(asyncio.ensure_future(asyncio.wait_for(test(*args, **kwargs), 120)))

    return run


def environment() -> dict[str, str]:
    """Return the environment of this process without the ``WSGATEWAY_`` variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WSGATEWAY_")}


class HTTPResponse:
    """An HTTP response."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Node:
    """One `twistd wsgateway` process.

    ``registry`` is a SQLite file in the folder unless it is the url of a database; then the node has urls, and shares
    a secret with all that are started in that folder. ``host`` is the address that it listens on, ``before`` stands
    before its command, and ``inherited`` are open files that it gets.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        listen: str = "",
        backend: str = "",
        daemon: bool = False,
        registry: str = "",
        host: str = "127.0.0.1",
        ports: tuple[int, int] | None = None,
        before: Sequence[str] = (),
        inherited: Sequence[int] = (),
    ) -> None:
        self.folder, self.host = folder, host
        self.client_port, self.backend_port = ports or (free_port(), free_port())
        self.database = folder / "registry.sqlite"
        self.registry = registry
        self.log = folder / f"node-{self.client_port}.log"
        self.headers: dict[str, str] = {}
        self.command = [
            *before,
            *TWISTD,
            *(() if daemon else ("--nodaemon", "--pidfile=")),
            *(f"--logfile={self.log}", "wsgateway"),
            *("--listen", listen or f"tcp:{self.client_port}:interface={host}:backlog=4096"),
            *("--backend", backend or f"tcp:{self.backend_port}:interface={host}:backlog=4096"),
            *("--registry", registry or f"sqlite:{self.database}"),
            *(self._cluster_options(options) if registry else ()),
            *options,
        ]
        self.process = subprocess.Popen(
            self.command,
            cwd=folder,
            stderr=subprocess.PIPE,
            pass_fds=inherited,
            env={**environment(), "PYTHONPATH": str(CHECKOUT)},
        )

    def _cluster_options(self, options: Sequence[str]) -> tuple[str, ...]:
        secret = self.folder / "cluster-secret"
        if not secret.exists():
            secret.touch(0o600)
            secret.write_text("what only the nodes of these tests know\n")
        return (
            *("--cluster-secret-file", str(secret)),
            *("--public-url", f"ws://{self.host}:{self.client_port}"),
            *(() if "--peer-url" in options else ("--peer-url", f"ws://{self.host}:{self.backend_port}")),
        )

    @property
    def url(self) -> str:
        return f"ws://{self.host}:{self.client_port}/v1/connect"

    @property
    def backend_url(self) -> str:
        return f"ws://{self.host}:{self.backend_port}/v1/backend"

    @functools.cached_property
    def node_id(self) -> str:
        """Its UUID, as the node itself tells it."""
        nodes = self._request("GET", "/v1/nodes").json["nodes"]
        return next(str(node["node_id"]) for node in nodes if node["name"].endswith(f"-{self.process.pid}"))

    def await_ready(self) -> Node:
        end = time.monotonic() + TIMEOUT
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
    ) -> HTTPResponse:
        request = urllib.request.Request(
            f"http://{self.host}:{self.backend_port}{path}", body, {**self.headers, **(headers or {})}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return HTTPResponse(response.status, response.headers, response.read())
        except urllib.error.HTTPError as e:
            return HTTPResponse(e.code, e.headers, e.read())

    async def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> HTTPResponse:
        """An HTTP request to the backend endpoint; a body that is no bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {} if data is None else {"Content-Type": "application/json"}
        return await asyncio.to_thread(self._request, method, path, data, {**given, **(headers or {})})

    async def call(self, client_id: str, method: str, params: Any = None, timeout: float | None = None) -> HTTPResponse:
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
            kwargs.pop("url", url),
            subprotocols=["wsgateway.jsonrpc.v1"],
            compression=None,
            ping_interval=None,
            **kwargs,
        )

    def backend(self, **kwargs: Any) -> BackendConnection:
        return BackendConnection(self.backend_url, **kwargs)

    async def opening(self, target: str, headers: dict[str, str] | None = None, *, peer: bool = False) -> HTTPResponse:
        """The answer to an opening handshake with that request target, at the endpoint of clients, or of peers."""

        def ask() -> HTTPResponse:
            port = self.backend_port if peer else self.client_port
            with contextlib.closing(http.client.HTTPConnection(self.host, port, timeout=TIMEOUT)) as connection:
                connection.request("GET", target, headers={**HANDSHAKE, **(headers or {})})
                response = connection.getresponse()
                return HTTPResponse(
                    response.status, response.headers, b"" if response.status == 101 else response.read()
                )

        return await asyncio.to_thread(ask)

    def rows(self, table: str) -> list[tuple[Any, ...]]:
        """What is in the registry, read past the node."""
        if self.registry:
            url = urlsplit(self.registry)
            where = {"host": url.hostname, "port": url.port, "user": url.username, "database": url.path[1:]}
            with contextlib.closing(pymysql.connect(**where)) as mysql, mysql.cursor() as cursor:
                cursor.execute(f"SELECT * FROM {table}")
                return list(cursor.fetchall())
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


class BackendConnection:
    """A backend on the WebSocket: many calls in flight, responses matched by id."""

    def __init__(self, url: str, **kwargs: Any) -> None:
        self._connecting = websockets.asyncio.client.connect(url, compression=None, max_size=None, **kwargs)
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        #: what came that was no response
        self.received: asyncio.Queue[Any] = asyncio.Queue()

    async def __aenter__(self) -> BackendConnection:
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

    async def request(self, method: str, params: Any = None) -> Any:
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
        return await self.request("client.call", given)


@contextlib.asynccontextmanager
async def serving_client(
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


async def eventually(condition: Callable[[], Awaitable[object]], what: str, timeout: float = TIMEOUT) -> None:
    """Ask until the answer is yes; fail with ``what`` when it is not within some seconds."""
    end = time.monotonic() + timeout
    while not await condition():
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        await asyncio.sleep(0.02)


async def closed(socket_: Any) -> int:
    """Wait for the close of a connection; its code."""
    await asyncio.wait_for(socket_.wait_closed(), TIMEOUT)
    return int(socket_.close_code)
