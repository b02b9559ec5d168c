"""A fleet under load: MariaDB, three nodes, clients in separate processes, and callers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.builders import mariadb
from tests.builders.ports import free_port
from tests.chaos.callers import CallGenerator
from tests.chaos.ledger import CallLedger
from tests.chaos.network import Network
from tests.chaos.proxy import ProxyProcess
from tests.integration.fleet import CHECKOUT, Node

NODES = 3
#: processes with clients
CLIENT_PROCESSES = 4
TOKEN = "chaos"
#: seconds; the default timeout
TIMEOUT = 60.0


@dataclass(frozen=True)
class Size:
    """The size of a run. ``rate`` is in calls per second, times are in seconds."""

    clients: int = 2000
    rate: float = 500.0
    #: time under load before the fault
    before: float = 3.0
    #: duration of the database outage
    outage: float = 30.0
    #: delay of a byte to a slow database, and back
    latency: float = 0.05


@dataclass(frozen=True)
class Timing:
    """The settings of nodes and clients, in seconds."""

    lease: float = 3.0
    heartbeat: float = 1.0
    #: ping interval of a node
    ping: float = 3.0
    #: idle timeout of a client
    idle: float = 8.0
    #: initial and maximum backoff of a client
    backoff: tuple[float, float] = (0.5, 4.0)
    #: drain time of a node
    drain: float = 5.0
    #: timeout of an attempt to connect
    opening: float = 3.0

    @property
    def reconnect(self) -> float:
        """The longest reconnection of a client: a failed attempt, the maximum backoff, and another attempt."""
        return self.opening + self.backoff[1] + self.opening


class ClientProcess:
    """A process with some of the clients."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, order: dict[str, Any]) -> ClientProcess:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.clients"),
            cwd=CHECKOUT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**28,
        )
        client_process = cls(process)
        client_process._send_line(json.dumps(order))
        return client_process

    def _send_line(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    async def stat(self) -> dict[str, Any]:
        self._send_line("stat")
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return answer

    async def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


class Fleet:
    """The fleet of one scenario.

    ``network``: each node runs in a network namespace. ``far_database``, ``far_peers``: the database, or the peer
    endpoints of the nodes, are behind proxies.
    """

    def __init__(
        self,
        size: Size,
        timing: Timing,
        say: Callable[[str], None],
        *,
        network: Network | None = None,
        far_database: bool = False,
        far_peers: bool = False,
    ) -> None:
        self.size, self.timing, self.say, self.network = size, timing, say, network
        self.clients = [f"client-{number:05d}" for number in range(size.clients)]
        self.ledger = CallLedger()
        self.nodes: list[Node] = []
        #: proxies in front of the database, and in front of the nodes
        self.to_database: ProxyProcess | None = None
        self.to_peers: list[ProxyProcess] = []
        self._far_database, self._far_peers = far_database or network is not None, far_peers
        self._ports = [(free_port(), free_port()) for _ in range(NODES)]
        self._client_processes: list[ClientProcess] = []
        self._everything: list[Node] = []
        self.folder = Path(tempfile.mkdtemp(prefix="wsgateway-chaos-"))
        self._ending = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Fleet:
        async with self._ending:
            await self._start()
            # Started: everything is stopped at the end of the scenario.
            self._ending = self._ending.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._ending.aclose()

    async def _start(self) -> None:
        ending = self._ending
        self.database = await asyncio.to_thread(mariadb.MariaDBServer)
        ending.callback(self.database.close)
        self._registry = await self._reach_database(await asyncio.to_thread(lambda: self.database.url))
        ending.callback(self._kill_nodes)
        (self.folder / "backend-token").write_text(f"{TOKEN}\n")
        for _, port in self._ports if self._far_peers else ():
            self.to_peers.append(await asyncio.to_thread(ProxyProcess, port))
            ending.callback(self.to_peers[-1].close)
        self.nodes = [self._start_node(number) for number in range(NODES)]
        await asyncio.gather(*(asyncio.to_thread(node.await_ready) for node in self.nodes))
        for number in range(CLIENT_PROCESSES):
            self._client_processes.append(await ClientProcess.start(self._order(number)))
            ending.push_async_callback(self._client_processes[-1].close)
        self.callers = CallGenerator(self.nodes, self.clients, self.ledger, self.size.rate)
        ending.push_async_callback(self.callers.close)
        await self.callers.connected()
        await wait_until(self.all_connected, "all clients are connected")

    async def _reach_database(self, url: str) -> str:
        if not self._far_database:
            return url
        host = self.network.host if self.network else "127.0.0.1"
        self.to_database = await asyncio.to_thread(ProxyProcess, self.database.port, host)
        self._ending.callback(self.to_database.close)
        return url.replace(f"127.0.0.1:{self.database.port}", f"{host}:{self.to_database.port}")

    def _order(self, number: int) -> dict[str, Any]:
        return {
            "clients": self.clients[number::CLIENT_PROCESSES],
            "nodes": [[node.host, node.client_port] for node in self.nodes],
            "backoff": self.timing.backoff,
            "idle": self.timing.idle,
        }

    def _start_node(self, number: int) -> Node:
        timing, network = self.timing, self.network
        node = Node(
            self.folder,
            *("--auth", "none", "--openings-per-address", "0", "--node-name", f"node-{number}"),
            *("--backend-token-file", str(self.folder / "backend-token")),
            *("--lease", str(timing.lease), "--heartbeat", str(timing.heartbeat)),
            *("--drain-seconds", str(timing.drain)),
            *("--ping-interval", str(timing.ping), "--ping-timeout", str(timing.idle)),
            *(("--peer-url", f"ws://127.0.0.1:{self.to_peers[number].port}") if self._far_peers else ()),
            registry=self._registry,
            host=network.hosts[number] if network else "127.0.0.1",
            before=network.before(number) if network else (),
            ports=self._ports[number],
        )
        node.headers = {"Authorization": f"Bearer {TOKEN}"}
        self._everything.append(node)
        return node

    def _kill_nodes(self) -> None:
        for node in self._everything:
            if node.process.poll() is None:
                node.kill()
            node.process.wait()
            if node.process.stderr is not None:
                node.process.stderr.close()

    async def restart(self, number: int) -> None:
        """Start a node again that has exited, and connect the callers to it."""
        old = self.nodes[number]
        self.nodes[number] = self._start_node(number)
        await self.callers.replace(old, self.nodes[number])
        await asyncio.to_thread(self.nodes[number].await_ready)

    # Status.

    async def stat(self) -> dict[str, int]:
        """Return the numbers of clients by status; record the calls that they received in the ledger."""
        sums = {"connected": 0, "ended": 0, "stopped": 0}
        for answer in await asyncio.gather(*(process.stat() for process in self._client_processes)):
            for number, client in answer["received"]:
                self.ledger.received(number, client)
            for name in sums:
                sums[name] += answer[name]
        return sums

    async def all_connected(self) -> bool:
        """Whether all clients report a connection."""
        return (await self.stat())["connected"] == len(self.clients)

    async def node_by_client(self) -> dict[str, Node]:
        """Return client_id -> node, from the registry."""
        rows = await asyncio.to_thread(
            self.database.execute,
            "SELECT CAST(c.client_id AS CHAR), n.name FROM clients c JOIN nodes n ON n.id = c.node",
            database="wsgateway",
        )
        return {client: self.nodes[int(name.rpartition("-")[2])] for client, name in rows}

    async def rows_left(self) -> int:
        """Return the number of rows in the registry that belong to no live node."""
        dead = f"n.heartbeat_at <= UTC_TIMESTAMP(6) - INTERVAL {int(self.timing.lease * 1e6)} MICROSECOND"
        counts = [
            f"SELECT COUNT(*) FROM clients c LEFT JOIN nodes n ON n.id = c.node WHERE n.id IS NULL OR {dead}",
            f"SELECT COUNT(*) FROM nodes n WHERE {dead}",
        ]
        return sum([await self._count(count) for count in counts])

    async def rows(self) -> int:
        """Return the number of rows of clients."""
        return await self._count("SELECT COUNT(*) FROM clients")

    async def _count(self, text: str) -> int:
        ((count,),) = await asyncio.to_thread(self.database.execute, text, database="wsgateway")
        return int(count)

    def alive(self) -> list[Node]:
        """Return the running nodes."""
        return [node for node in self.nodes if node.process.poll() is None]

    async def all_answer(self, patience: float) -> None:
        """Call every client through every node until it answers. Raises ``TimeoutError``."""

        async def through(node: Node) -> None:
            missed = self.clients
            while missed := await self.callers.sweep(node, missed):
                await asyncio.sleep(0.1)

        await asyncio.wait_for(asyncio.gather(*map(through, self.alive())), patience)


async def wait_until(condition: Callable[[], Awaitable[object]], what: str, timeout: float = TIMEOUT) -> None:
    """Poll a condition until it is true. Raises ``TimeoutError``."""
    end = time.monotonic() + timeout
    while not await condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        await asyncio.sleep(0.1)


def memory(nodes: Sequence[Node]) -> list[int]:
    """Return the resident memory of each node, in bytes."""
    return [node.memory() for node in nodes]
