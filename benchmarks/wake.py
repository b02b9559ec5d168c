"""Measure the CPU and latency of waking a parked client and parking it again.

    backend -> calls to one client after another, to each at most every 1.4 s
    client  <- the call
    client  -> its response, delivered in one of three ways:
                 whole       one frame in one segment: handled without waking the client
                 fragments   two fragments (RFC 6455, section 5.4) in one segment: wakes the client
                 segments    one frame in two segments 2 ms apart: wakes the client
    backend <- the response

Only the delivery differs. The additional cost of fragments and segments compared with a whole frame is the waking and
the parking, in CPU and in the time between the last byte of the client and the first byte at the backend. Autobahn,
which parks no clients, runs the same calls for comparison. The number of woken clients is read from the metrics of the
node.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from benchmarks import measure
from benchmarks.holder import TEXT, Clients, answer, masked
from benchmarks.holders import SHORT_CLIENT_ID, SOURCE, SOURCES, HolderError
from benchmarks.idle import measured

DELIVERIES = ("whole", "fragments", "segments")
#: time between the two segments, in seconds: long enough for the server to read the first
SEGMENT_INTERVAL = 0.002
#: minimum time between two calls to a client, in seconds; a client with a message within the last second stays awake
CALL_INTERVAL = 1.4
#: first byte of the first fragment of a text message
FIRST_FRAGMENT = 0x01
#: first byte of its last fragment
LAST_FRAGMENT = 0x80
PARAMS = b'{"path":"/var/lib/agent/jobs","limit":20,"after":"2024-05-06T07:08:09Z"}'


class WakeBenchmark:
    """Clients, and the backend that calls them one after another."""

    def __init__(self, server: measure.Server, clients: int) -> None:
        self._node = server.name == measure.NODE
        path = server.client_path("ID").replace("ID", "{id}")
        self._clients = Clients(port=server.port, path=path, source=SOURCE, sources=SOURCES)
        self._backend = Clients(port=server.backend_port, path=server.backend_path)
        self._clients.received, self._backend.received = self._call_received, self._response_received
        self._delivery = "whole"
        self._delayed: deque[tuple[float, int, bytes]] = deque()
        self._count = clients
        self._sent_at: dict[int, float] = {}
        self._latencies: list[float] = []
        self._next = 0
        for side, count in ((self._backend, 1), (self._clients, clients)):
            side.open(count)
            while side.busy:
                side.poll_once(1)
            if side.failed:
                raise HolderError(f"{side.failed} could not connect: {side.problem}")

    def close(self) -> None:
        """Close all connections."""
        self._clients.close_all()
        self._backend.close_all()

    def _call(self) -> None:
        number = self._next
        self._next += 1
        client = SHORT_CLIENT_ID.format(number % self._count).encode()
        if self._node:
            form = (
                b'{"jsonrpc":"2.0","id":%d,"method":"client.call","params":{"client":"%b","method":"echo","params":%b}}'
            )
        else:
            form = b'{"id":%d,"client":"%b","method":"echo","params":%b}'
        # The params tell the client which call it is.
        params = b'{"call":%d,%b' % (number, PARAMS[1:])
        self._backend.send(self._backend.fds[0], masked(form % (number, client, params)))

    def _call_received(self, fd: int, first: int, payload: bytes) -> None:
        if first != TEXT:
            return
        response, half = answer(payload), 64
        number = int(payload.partition(b'"call":')[2].partition(b",")[0])
        if self._delivery == "segments":
            frame = masked(response)
            self._clients.send(fd, frame[:half])
            self._delayed.append((time.perf_counter() + SEGMENT_INTERVAL, fd, frame[half:]))
            self._sent_at[fd] = number
            return
        if self._delivery == "whole":
            frame = masked(response)
        else:
            frame = masked(response[:half], FIRST_FRAGMENT) + masked(response[half:], LAST_FRAGMENT)
        self._sent_at[number] = time.perf_counter()
        self._clients.send(fd, frame)

    def _response_received(self, fd: int, first: int, payload: bytes) -> None:
        if first != TEXT:
            return
        if b'"result"' not in payload:
            raise HolderError(f"a call failed: {payload.decode()}")
        number = int(payload.partition(b'"call":')[2].partition(b",")[0])
        self._latencies.append(time.perf_counter() - self._sent_at.pop(number))

    def _wait(self, until: float) -> None:
        """Wait until a socket is readable or the next send is due. (An epoll waits for whole milliseconds.)"""
        if self._delayed:
            until = min(until, self._delayed[0][0])
        select.select([self._clients, self._backend], [], [], max(0.0, until - time.perf_counter()))

    def run(self, delivery: str, calls: int) -> list[float]:
        """Make calls to each client in turn; return the time from the last byte of each response to the backend."""
        self._delivery, self._latencies = delivery, []
        interval = CALL_INTERVAL / self._count
        started_at = time.perf_counter()
        sent = 0
        while len(self._latencies) < calls:
            now = time.perf_counter()
            while sent < calls and started_at + sent * interval <= now:
                self._call()
                sent += 1
            while self._delayed and self._delayed[0][0] <= now:
                _, sender, rest = self._delayed.popleft()
                self._sent_at[int(self._sent_at.pop(sender))] = time.perf_counter()
                self._clients.send(sender, rest)
            self._wait(started_at + sent * interval if sent < calls else now + 0.1)
            self._clients.poll_once()
            self._backend.poll_once()
            if now - started_at > calls * interval + 10:
                raise HolderError(f"{calls - len(self._latencies)} of {calls} calls were not answered")
        return self._latencies


def measure_one(name: str, clients: int, turns: int) -> dict[str, dict[str, float]]:
    """Measure one server once, with each delivery in turn."""
    values = {}
    with measure.start(name) as server, contextlib.closing(WakeBenchmark(server, clients)) as benchmark:
        for delivery in DELIVERIES:
            time.sleep(CALL_INTERVAL)
            woken = _woken(server)
            before = server.cpu()
            latencies = benchmark.run(delivery, turns * clients)
            time.sleep(0.2)
            values[delivery] = {
                "cpu": (server.cpu() - before) / len(latencies),
                "p50": measure.percentile(latencies, 0.5),
                "p99": measure.percentile(latencies, 0.99),
                "woken": (_woken(server) - woken) / len(latencies),
            }
    return values


def _woken(server: measure.Server) -> int:
    if server.name != measure.NODE:
        return 0
    return measured(server.http("GET", "/metrics")[1].decode(), "wsgateway_woken_total")


def _make_row(
    results: measure.Results, name: str, delivery: str, each: list[dict[str, dict[str, float]]]
) -> tuple[str, ...]:
    value = {key: measure.median(one[delivery][key] for one in each) for key in each[0][delivery]}
    more = measure.median(one[delivery]["cpu"] - one["whole"]["cpu"] for one in each)
    # On a busy machine both segments may have been read at once, without waking the client.
    per_wake = more / value["woken"] if value["woken"] > 0.1 else None
    results.add(name, way=delivery, more=more, per_wake=per_wake, **value)
    return (
        measure.label_of(name) if delivery == "whole" else "",
        delivery,
        f"{value['cpu'] * 1e6:,.0f}",
        f"{more * 1e6:+,.0f}" if delivery != "whole" else "",
        f"{value['p50'] * 1e6:,.0f}",
        f"{value['p99'] * 1e6:,.0f}",
        f"{value['woken']:.2f}" if name == measure.NODE else "",
        f"{per_wake * 1e6:,.0f}" if per_wake is not None else "",
    )


def run(
    results: measure.Results,
    peers: Sequence[str] = ("autobahn",),
    runs: int = 3,
    clients: int = 3000,
    turns: int = 4,
) -> list[dict[str, Any]]:
    """Measure the node and the peers in turn."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    for _ in range(runs):
        for name in (measure.NODE, *peers):
            try:
                found.setdefault(name, []).append(measure_one(name, clients, turns))
            except (measure.UnavailableError, HolderError) as e:
                print(f"{name} is left out of this run: {e}", flush=True)
    rows = [
        _make_row(results, name, delivery, each)
        for name, each in found.items()
        for delivery in (DELIVERIES if each else ())
    ]
    results.show(
        "Waking a parked client, and parking it again",
        (
            "server",
            "response",
            "µs of CPU for a call",
            "to whole",
            "p50 µs",
            "p99 µs",
            "wakes for a call",
            "µs for a wake",
        ),
        rows,
        f"{clients:,} clients, each called every {CALL_INTERVAL:g} s, {turns} times; median of {runs}. p50 and p99: "
        "from the last byte of the response to the backend.",
        "Without limits: --openings-per-address 0 --messages-per-client 0.",
    )
    return results.lines


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.wake``"""
    parser = measure.parser(__doc__, peers=("autobahn",))
    parser.add_argument("--clients", type=int, default=3000, help="number of clients (default: %(default)s)")
    parser.add_argument(
        "--turns", type=int, default=4, help="calls to each client for each delivery (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    measure.pin()
    peers = measure.peers_of(options)
    run(measure.Results("wake", options.json), peers, options.runs, options.clients, options.turns)


if __name__ == "__main__":
    measure.main(main)
