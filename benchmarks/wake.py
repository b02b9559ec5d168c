"""What it costs to wake a parked client and to park it again.

    backend -> a call to one client after the other, none oftener than every 1.4 s
    client  <- the call
    client  -> its response, in one of three ways:
                 whole       one frame, in one segment: what the node handles without waking anybody
                 fragments   two fragments (RFC 6455, section 5.4), in one segment: wakes it
                 segments    one frame, in two segments 2 ms apart: wakes it
    backend <- the response

The way is the same but for the last step, so that what fragments and segments cost more than a whole frame is the
waking and the parking again, in CPU and in the time between the client's last byte and the backend's first. Autobahn,
where nobody is parked, does the same beside it. That clients were woken is read from the node's metrics.
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
#: seconds between the two segments: longer than a server needs to have read the first
SEGMENT_INTERVAL = 0.002
#: A client that was heard of within a second stays awake when it is woken.
CALL_INTERVAL = 1.4
#: the first bytes of a text's first fragment and of its last
FIRST, LAST = 0x01, 0x80
PARAMS = b'{"path":"/var/lib/agent/jobs","limit":20,"after":"2024-05-06T07:08:09Z"}'


class WakeBenchmark:
    """Clients, and the backend that calls them one after the other."""

    def __init__(self, server: measure.Server, clients: int) -> None:
        self._node = server.name == measure.NODE
        path = server.client_path("ID").replace("ID", "{id}")
        self._clients = Clients(port=server.port, path=path, source=SOURCE, sources=SOURCES)
        self._backend = Clients(port=server.backend_port, path=server.backend_path)
        self._clients.received, self._backend.received = self._called, self._answered
        self._way = "whole"
        self._later: deque[tuple[float, int, bytes]] = deque()
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
        """End all connections."""
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
        # The client's params say which call it is, to the client.
        params = b'{"call":%d,%b' % (number, PARAMS[1:])
        self._backend.send(self._backend.fds[0], masked(form % (number, client, params)))

    def _called(self, fd: int, first: int, payload: bytes) -> None:
        if first != TEXT:
            return
        response, half = answer(payload), 64
        number = int(payload.partition(b'"call":')[2].partition(b",")[0])
        if self._way == "segments":
            frame = masked(response)
            self._clients.send(fd, frame[:half])
            self._later.append((time.perf_counter() + SEGMENT_INTERVAL, fd, frame[half:]))
            self._sent_at[fd] = number
            return
        if self._way == "whole":
            frame = masked(response)
        else:
            frame = masked(response[:half], FIRST) + masked(response[half:], LAST)
        self._sent_at[number] = time.perf_counter()
        self._clients.send(fd, frame)

    def _answered(self, fd: int, first: int, payload: bytes) -> None:
        if first != TEXT:
            return
        if b'"result"' not in payload:
            raise HolderError(f"a call failed: {payload.decode()}")
        number = int(payload.partition(b'"call":')[2].partition(b",")[0])
        self._latencies.append(time.perf_counter() - self._sent_at.pop(number))

    def _wait(self, until: float) -> None:
        """Wait for something to read, or for the next thing to send. (An epoll would wait for whole milliseconds.)"""
        if self._later:
            until = min(until, self._later[0][0])
        select.select([self._clients, self._backend], [], [], max(0.0, until - time.perf_counter()))

    def run(self, delivery: str, calls: int) -> list[float]:
        """Make so many calls, each client in turn; the seconds from the last byte of each response to the backend."""
        self._way, self._latencies = delivery, []
        interval = CALL_INTERVAL / self._count
        began = time.perf_counter()
        made = 0
        while len(self._latencies) < calls:
            now = time.perf_counter()
            while made < calls and began + made * interval <= now:
                self._call()
                made += 1
            while self._later and self._later[0][0] <= now:
                _, sender, rest = self._later.popleft()
                self._sent_at[int(self._sent_at.pop(sender))] = time.perf_counter()
                self._clients.send(sender, rest)
            self._wait(began + made * interval if made < calls else now + 0.1)
            self._clients.poll_once()
            self._backend.poll_once()
            if now - began > calls * interval + 10:
                raise HolderError(f"{calls - len(self._latencies)} of {calls} calls were not answered")
        return self._latencies


def measure_one(name: str, clients: int, turns: int) -> dict[str, dict[str, float]]:
    """One server: each way of answering, in turn."""
    found = {}
    with measure.start(name) as server, contextlib.closing(WakeBenchmark(server, clients)) as waker:
        for way in DELIVERIES:
            time.sleep(CALL_INTERVAL)
            woken = _woken(server)
            before = server.cpu()
            latencies = waker.run(way, turns * clients)
            time.sleep(0.2)
            found[way] = {
                "cpu": (server.cpu() - before) / len(latencies),
                "p50": measure.percentile(latencies, 0.5),
                "p99": measure.percentile(latencies, 0.99),
                "woken": (_woken(server) - woken) / len(latencies),
            }
    return found


def _woken(server: measure.Server) -> int:
    if server.name != measure.NODE:
        return 0
    return measured(server.http("GET", "/metrics")[1].decode(), "wsgateway_woken_total")


def _tell(results: measure.Results, name: str, way: str, each: list[dict[str, dict[str, float]]]) -> tuple[str, ...]:
    value = {key: measure.median(one[way][key] for one in each) for key in each[0][way]}
    more = measure.median(one[way]["cpu"] - one["whole"]["cpu"] for one in each)
    # Where the machine was busy, both segments may have been read at once, and nobody woken.
    per_wake = more / value["woken"] if value["woken"] > 0.1 else None
    results.add(name, way=way, more=more, per_wake=per_wake, **value)
    return (
        measure.label_of(name) if way == "whole" else "",
        way,
        f"{value['cpu'] * 1e6:,.0f}",
        f"{more * 1e6:+,.0f}" if way != "whole" else "",
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
    rows = [_tell(results, name, way, each) for name, each in found.items() for way in (DELIVERIES if each else ())]
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
        f"{clients:,} clients, each called every {CALL_INTERVAL:g} s, {turns} times; median of {runs}. p50 and p99: from the "
        "last byte of the response to the backend.",
        "Without limits: --openings-per-address 0 --messages-per-client 0.",
    )
    return results.lines


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.wake``"""
    parser = measure.parser(__doc__, peers=("autobahn",))
    parser.add_argument("--clients", type=int, default=3000, help="to be called in turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=4, help="calls to each, each way (default: %(default)s)")
    options = parser.parse_args(arguments)
    measure.pin()
    peers = measure.peers_of(options)
    run(measure.Results("wake", options.json), peers, options.runs, options.clients, options.turns)


if __name__ == "__main__":
    measure.main(main)
