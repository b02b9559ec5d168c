"""Pairs of a node and a holder of its clients, with a backend connection; and calls to random clients of many pairs.

backend -> {"jsonrpc":"2.0","id":7,"method":"client.call","params":{"client":"agent-003-01234","method":"echo",...}}
backend <- {"jsonrpc":"2.0","id":7,"result":...}
"""

from __future__ import annotations

import array
import random
import time

from benchmarks import measure
from benchmarks.holder import TEXT, Clients, later, masked
from benchmarks.holders import SOURCES, ClientHolder, HolderError

PARAMS = b'{"path":"/var/lib/agent/jobs","limit":20,"after":"2024-05-06T07:08:09Z"}'
#: time after which a call counts as failed, in seconds
CALL_TIMEOUT = 30.0


class NodePair:
    """One node, its holder, and a backend connection to it."""

    def __init__(self, number: int, server: measure.Server) -> None:
        self.server = server
        # Each holder has its own source addresses, so that no address runs out of ports.
        self.holder = ClientHolder(
            server.port,
            "/v1/connect?client_id={id}",
            name=f"agent-{number:03d}-{{:05d}}",
            source=later("127.1.0.1", number * SOURCES),
            in_progress=100,
            core=None,
        )
        self.prefix = f"agent-{number:03d}-"
        self.backend = Clients(port=server.backend_port, path="/v1/backend")
        self.opened = self.requested = 0
        self.first = measure.Memory(0, 0)
        self.backend.open(1)
        while self.backend.busy:
            self.backend.poll_once(1)
        if self.backend.failed:
            raise HolderError(f"no backend connection: {self.backend.problem}")

    def call(self, number: int, call_id: int) -> None:
        """Call a client of this node, by its number."""
        self.backend.send(
            self.backend.fds[0],
            masked(
                b'{"jsonrpc":"2.0","id":%d,"method":"client.call","params":{"client":"%b%05d","method":"echo","params":%b}}'
                % (call_id, self.prefix.encode(), number, PARAMS)
            ),
        )


class RandomCalls:
    """Calls to random clients, and their latencies."""

    def __init__(self, pairs: list[NodePair]) -> None:
        self._pairs = pairs
        self._random = random.Random(1)
        self._sent: dict[int, float] = {}
        self._number = 0
        #: latency of each answered call, in seconds
        self.latencies = array.array("d")
        self.errors = 0
        self.problem = ""
        for pair in pairs:
            pair.backend.received = self._received

    @property
    def in_flight(self) -> int:
        return len(self._sent)

    def call(self) -> bool:
        """Call a random client. Returns whether there was one."""
        # All nodes have about the same number of clients.
        pair = self._random.choice(self._pairs)
        if not pair.opened:
            return False
        self._number += 1
        self._sent[self._number] = time.perf_counter()
        pair.call(self._random.randrange(pair.opened), self._number)
        return True

    def _received(self, fd: int, first: int, payload: bytes) -> None:
        if first != TEXT or b'"id":' not in payload:
            return
        sent_at = self._sent.pop(int(payload.partition(b'"id":')[2].partition(b",")[0]), None)
        if b'"result":' not in payload:
            self._fail(payload.decode())
        elif sent_at is not None:
            self.latencies.append(time.perf_counter() - sent_at)

    def _fail(self, problem: str) -> None:
        self.errors += 1
        self.problem = self.problem or problem

    def give_up(self) -> None:
        """Count calls that exceed the timeout as errors."""
        now = time.perf_counter()
        while self._sent and now - next(iter(self._sent.values())) > CALL_TIMEOUT:
            del self._sent[next(iter(self._sent))]
            self._fail(f"no response in {CALL_TIMEOUT:g} s")

    def take_latencies(self) -> dict[str, float]:
        """Return the statistics of the calls since the last call of this method."""
        latencies, self.latencies = self.latencies, array.array("d")
        errors, self.errors = self.errors, 0
        return {
            "calls": len(latencies),
            "errors": errors,
            "p50": measure.percentile(latencies, 0.5),
            "p99": measure.percentile(latencies, 0.99),
        }
