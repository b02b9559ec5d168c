"""Start a node and three clients on this machine, and call one: ``python -m gateway.demo``, or ``make demo``.

Runs until Ctrl-C; with ``DEMO_ONCE=1`` in the environment, until the call is done. The registry and the log of the node
are in a temporary directory, which is removed at the end.
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
#: without a proxy: all requests are local
_urlopen = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
#: seconds for the node to become ready, and for the call
START_TIMEOUT = 30


def free_port(preferred: int) -> int:
    """Return ``preferred`` if it is free, else another free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def choose_port(preferred: int) -> int:
    """Return a free port like :func:`free_port`, and report if it is not the preferred one."""
    port = free_port(preferred)
    if port != preferred:
        print(f"port {preferred} is in use: using port {port} instead", flush=True)
    return port


def start_node(folder: Path, client_port: int, backend_port: int) -> subprocess.Popen[bytes]:
    """Start a node with a SQLite registry in ``folder``, and without authentication."""
    arguments = [
        *("--nodaemon", "--pidfile=", f"--logfile={folder / 'node.log'}", "wsgateway", "--auth", "none"),
        *("--listen", f"tcp:{client_port}:interface=127.0.0.1:backlog=4096"),
        *("--backend", f"tcp:{backend_port}:interface=127.0.0.1:backlog=4096"),
        *("--registry", f"sqlite:{folder / 'registry.sqlite'}"),
    ]
    return subprocess.Popen([sys.executable, "-c", TWISTD, *arguments])


def await_ready(node: subprocess.Popen[bytes], url: str) -> None:
    """Wait until the node is ready. Exits the program if the node exits or is not ready in time."""
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        if node.poll() is not None:
            sys.exit(f"the node exited with status {node.returncode}")
        try:
            with _urlopen(f"{url}/readyz", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"the node was not ready within {START_TIMEOUT} s")


def start_client(url: str, client_id: str) -> subprocess.Popen[str]:
    """Start a client and wait until it is connected. Exits the program if it does not connect."""
    command = [sys.executable, "-m", "gateway.agent", "--url", url, "--client-id", client_id]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    line = client.stdout.readline()
    if not line.startswith("connected "):
        sys.exit(f"the client {client_id} did not connect: {line.strip() or 'it exited'}")
    return client


def call(url: str, client_id: str) -> str:
    """Call ``echo`` of a client as a backend does; return the response. Exits the program on an HTTP error."""
    request = urllib.request.Request(
        f"{url}/v1/clients/{client_id}/rpc", CALL_BODY.encode(), {"Content-Type": "application/json"}
    )
    try:
        with _urlopen(request, timeout=START_TIMEOUT) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as e:
        sys.exit(f"call {client_id} echo failed: HTTP {e.code} {e.read().decode()}")


def stop_all(processes: list[subprocess.Popen[bytes] | subprocess.Popen[str]]) -> None:
    """Stop the processes, which are ordered with the node last; kill those still running after 10 s."""
    for process in processes:
        if process.poll() is None:
            # SIGINT instead of SIGTERM: no need to drain, the clients are disconnected.
            process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def on_sigterm(signum: int, frame: FrameType | None) -> None:
    """Raise ``KeyboardInterrupt``, so that ``finally`` runs on SIGTERM as well."""
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, on_sigterm)
    processes: list[subprocess.Popen[bytes] | subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="wsgateway-demo-") as name:
        client_port, backend_port = choose_port(8080), choose_port(8081)
        backend = f"http://127.0.0.1:{backend_port}"
        try:
            node = start_node(Path(name), client_port, backend_port)
            processes.append(node)
            await_ready(node, backend)
            for client_id in CLIENT_IDS:
                processes.insert(0, start_client(f"ws://127.0.0.1:{client_port}", client_id))
            print(f"a node with {len(CLIENT_IDS)} clients: {', '.join(CLIENT_IDS)}")
            print(f"call {CLIENT_IDS[0]} echo -> {call(backend, CLIENT_IDS[0])}", flush=True)
            if os.environ.get("DEMO_ONCE"):
                return
            print(f"Try it:\n  curl -H 'Content-Type: application/json' -d '{CALL_BODY}' \\")
            print(f"       {backend}/v1/clients/{CLIENT_IDS[1]}/rpc", flush=True)
            print("Press Ctrl-C to stop.", flush=True)
            sys.exit(f"the node exited with status {node.wait()}")
        except KeyboardInterrupt:
            pass
        finally:
            stop_all(processes)


if __name__ == "__main__":
    main()
