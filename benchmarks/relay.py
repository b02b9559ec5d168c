"""Measure the memory of an idle relay and the CPU of a relayed message in the relaying node.

    client -> relay -> echo       100 bytes, on some connections at once; the others are idle
    client <- relay <- echo

The relay table of gateway/cluster/relay.py and twisted.protocols.portforward relay the same bytes, in turn. Memory is
the growth of the process between 1,000 relays and all of them; a relay has two sockets.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import measure

KINDS = ("table", "portforward")
MESSAGE = b"x" * 100
#: number of connections that send messages
BUSY_CONNECTIONS = 100


@contextlib.contextmanager
def program(*arguments: str, core: int) -> Iterator[tuple[int, int]]:
    """Run a program of benchmarks/peers/relays.py; yield its pid and port."""
    port = measure.free_port()
    command = [sys.executable, "-m", "benchmarks.peers.relays", arguments[0], str(port), *arguments[1:]]
    process = measure.spawn(command, core=core)
    try:
        end = time.monotonic() + measure.START_TIMEOUT
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise measure.UnavailableError(f"{arguments[0]} does not start") from None
                time.sleep(0.05)
        yield process.pid, port
    finally:
        process.kill()
        process.wait()


def connect(port: int, count: int) -> list[socket.socket]:
    """Open relays, and pass one message through each."""
    sockets = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(MESSAGE)
        sockets.append(connection)
        if len(sockets) % 100 == 0:
            for each in sockets[-100:]:
                each.recv(len(MESSAGE), socket.MSG_WAITALL)
    for each in sockets[len(sockets) - len(sockets) % 100 :]:
        each.recv(len(MESSAGE), socket.MSG_WAITALL)
    return sockets


def talk(sockets: Sequence[socket.socket], seconds: float) -> int:
    """Send a message on each socket whenever the previous one has returned; return the number of messages."""
    poll = select.epoll()
    by_fd = {each.fileno(): each for each in sockets}
    for each in sockets:
        poll.register(each.fileno(), select.EPOLLIN)
        each.sendall(MESSAGE)
    echoes = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for fd, _ in poll.poll(1):
            each = by_fd[fd]
            each.recv(len(MESSAGE), socket.MSG_WAITALL)
            echoes += 1
            each.sendall(MESSAGE)
    for each in sockets:
        each.recv(len(MESSAGE), socket.MSG_WAITALL)
    return echoes + len(sockets)


def measure_one(kind: str, first: int, relays: int, seconds: float) -> dict[str, float]:
    """Measure one kind of relay once."""
    with (
        program("echo", core=measure.LOAD_CORE) as (_, target),
        program(kind, str(target), core=measure.SERVER_CORE) as (pid, port),
    ):
        sockets = connect(port, first)
        time.sleep(1.0)
        before = measure.memory_of(pid).resident
        sockets += connect(port, relays - first)
        time.sleep(1.0)
        idle = (measure.memory_of(pid).resident - before) / (relays - first)
        used = measure.cpu_of(pid)
        echoes = talk(sockets[:BUSY_CONNECTIONS], seconds)
        used = measure.cpu_of(pid) - used
        for each in sockets:
            each.close()
    # Each message passes the relay twice.
    return {"idle": idle, "cpu": used / echoes / 2, "messages": 2 * echoes / seconds}


def run(
    results: measure.Results, runs: int = 3, first: int = 1000, relays: int = 9000, seconds: float = 3.0
) -> list[dict[str, Any]]:
    """Measure both kinds in turn."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(runs):
        for kind in KINDS:
            found[kind].append(measure_one(kind, first, relays, seconds))
    values = {kind: {key: measure.median(one[key] for one in each) for key in each[0]} for kind, each in found.items()}
    own = values[KINDS[0]]
    rows = []
    for kind, value in values.items():
        results.lines.append({"benchmark": results.benchmark, "server": kind, **value})
        rows.append(
            (
                kind,
                f"{value['idle']:,.0f}",
                f"{value['idle'] / own['idle']:.1f}",
                f"{value['cpu'] * 1e6:.1f}",
                f"{value['cpu'] / own['cpu']:.2f}",
                f"{value['messages']:,.0f}",
            )
        )
    results.show(
        "Relays",
        ("relays by", "bytes while idle", "times", "µs of CPU for a message", "times", "messages/s"),
        rows,
        f"Between {first:,} and {relays:,} relays; {len(MESSAGE)} bytes each way on {BUSY_CONNECTIONS} of them; "
        f"median of {runs}.",
    )
    return results.lines


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.relay``"""
    parser = measure.parser(__doc__, peers=())
    parser.add_argument("--first", type=int, default=1000, help="relays that are not counted (default: %(default)s)")
    parser.add_argument("--relays", type=int, default=9000, help="relays in all (default: %(default)s)")
    options = parser.parse_args(arguments)
    measure.pin()
    run(measure.Results("relay", options.json), options.runs, options.first, options.relays)


if __name__ == "__main__":
    measure.main(main)
