"""A node, three clients and a first call, on this machine: ``python -m gateway.demo``, or ``make demo``.

Stays until Ctrl-C; with ``DEMO_ONCE=1`` in the environment it ends after the call. The node's registry and log are in a
temporary folder that goes with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

CLIENT_IDS = ("demo-1", "demo-2", "demo-3")
CALL_BODY = '{"jsonrpc":"2.0","id":1,"method":"echo","params":{"hello":"world"}}'
TWISTD = "from twisted.scripts.twistd import run; run()"
#: past any proxy: everything here is on this machine
_urlopen = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
#: how long anything may take to start, in seconds
START_TIMEOUT = 30


def free_port(preferred: int) -> int:
    """``wanted`` if nobody listens there, else a port that is free now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_node(folder: Path, client_port: int, backend_port: int) -> subprocess.Popen[bytes]:
    """Start a node on SQLite in ``folder``, which takes any client."""
    arguments = [
        *("--nodaemon", "--pidfile=", f"--logfile={folder / 'node.log'}", "wsgateway", "--auth", "none"),
        *("--listen", f"tcp:{client_port}:interface=127.0.0.1:backlog=4096"),
        *("--backend", f"tcp:{backend_port}:interface=127.0.0.1:backlog=4096"),
        *("--registry", f"sqlite:{folder / 'registry.sqlite'}"),
    ]
    return subprocess.Popen([sys.executable, "-c", TWISTD, *arguments])


def await_ready(node: subprocess.Popen[bytes], url: str) -> None:
    """Return when the node is ready; end the program when it will not be."""
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        if node.poll() is not None:
            sys.exit(f"the node ended with {node.returncode}")
        try:
            with _urlopen(f"{url}/readyz", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"the node was not ready within {START_TIMEOUT} s")


def start_client(url: str, client_id: str) -> subprocess.Popen[str]:
    """Start a client, and return when it is connected."""
    command = [sys.executable, "-m", "gateway.agent", "--url", url, "--client-id", client_id]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    line = client.stdout.readline()
    if not line.startswith("connected "):
        sys.exit(f"the client {client_id} did not connect: {line.strip() or 'it ended'}")
    return client


def call(url: str, client_id: str) -> str:
    """Call a client's ``echo`` as a backend would; return the whole response."""
    request = urllib.request.Request(
        f"{url}/v1/clients/{client_id}/rpc", CALL_BODY.encode(), {"Content-Type": "application/json"}
    )
    try:
        with _urlopen(request, timeout=START_TIMEOUT) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as e:
        sys.exit(f"call {client_id} echo failed: HTTP {e.code} {e.read().decode()}")


def stop_all(processes: list[subprocess.Popen[bytes] | subprocess.Popen[str]]) -> None:
    """End them, the node last."""
    for process in processes:
        if process.poll() is None:
            # The node is not asked to drain: its clients are gone.
            process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def on_sigterm(signum: int, frame: FrameType | None) -> None:
    """Let ``finally`` run on SIGTERM as well."""
    raise KeyboardInterrupt


def main() -> None:
    """The demo."""
    signal.signal(signal.SIGTERM, on_sigterm)
    processes: list[subprocess.Popen[bytes] | subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="wsgateway-demo-") as name:
        client_port, backend_port = free_port(8080), free_port(8081)
        backend = f"http://127.0.0.1:{backend_port}"
        try:
            node = start_node(Path(name), client_port, backend_port)
            processes.append(node)
            await_ready(node, backend)
            for client_id in CLIENT_IDS:
                processes.insert(0, start_client(f"ws://127.0.0.1:{client_port}", client_id))
            print(f"a node with {len(CLIENT_IDS)} clients: {', '.join(CLIENT_IDS)}")
            print(f"call {CLIENT_IDS[0]} echo -> {call(backend, CLIENT_IDS[0])}", flush=True)
            print(f"Try it:\n  curl -H 'Content-Type: application/json' -d '{CALL_BODY}' \\")
            print(f"       {backend}/v1/clients/{CLIENT_IDS[1]}/rpc", flush=True)
            if not os.environ.get("DEMO_ONCE"):
                print("Ctrl-C ends it.", flush=True)
                sys.exit(f"the node ended with {node.wait()}")
        except KeyboardInterrupt:
            pass
        finally:
            stop_all(processes)


if __name__ == "__main__":
    main()
