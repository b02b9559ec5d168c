"""Start many nodes on one machine, each with its own SQLite registry."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks import measure
from benchmarks.limits import sysctl


def quiet_ports() -> Iterator[int]:
    """Yield free ports outside of net.ipv4.ip_local_port_range, which outgoing connections do not use."""
    low = (sysctl("net.ipv4.ip_local_port_range") or [32768])[0]
    for port in range(max(1024, low - 16384), low):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            yield port
    raise measure.UnavailableError(f"no port below {low} is free")


def launch(folder: Path, port: int, backend_port: int, *options: str) -> measure.Server:
    """Start a node on any core, without waiting until it is ready."""
    folder.mkdir()
    command = [
        *(sys.executable, "-c", "from twisted.scripts.twistd import run; run()"),
        *("--nodaemon", "--pidfile=", f"--logfile={folder}/node.log", measure.NODE),
        *("--listen", f"tcp:{port}:interface=127.0.0.1:backlog=4096"),
        *("--backend", f"tcp:{backend_port}:interface=127.0.0.1:backlog=4096"),
        *("--registry", f"sqlite:{folder}/registry.sqlite", *measure.NODE_OPTIONS, *options),
    ]
    with open(folder / "output.log", "wb") as output:
        process = measure.spawn(command, stdout=output, stderr=output, start_new_session=True)
    os.sched_setaffinity(process.pid, measure.CORES)
    return measure.Server(measure.NODE, measure.NODE, process, port, backend_port, folder)


@contextmanager
def running(count: int, *options: str, at_a_time: int = 4) -> Iterator[list[measure.Server]]:
    """Run nodes until the end of the ``with`` block; ``at_a_time`` of them start at the same time.

    Raises :class:`UnavailableError` if a node cannot be started.
    """
    parent = Path(tempfile.mkdtemp(prefix="wsgateway-bench-"))
    ports = quiet_ports()
    servers: list[measure.Server] = []
    try:
        for number in range(count):
            servers.append(launch(parent / str(number), next(ports), next(ports), *options))
            if number >= at_a_time:
                servers[number - at_a_time].await_ready()
        for server in servers[-at_a_time:]:
            server.await_ready()
        yield servers
    finally:
        for server in servers:
            server.process.kill()
        for server in servers:
            server.stop()
        shutil.rmtree(parent, ignore_errors=True)
