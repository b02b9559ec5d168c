"""Measure the resident memory of a server for each idle TLS client: its growth between 500 and 2,500 clients.

    clients in this process -> 500 opening handshakes, one after another, then 2,000 more; then nothing

The other servers are in ``benchmarks/peers/tls.py``: Autobahn on Twisted, and TLS alone. Memory is that of the server:
the client ends of TLS are in this process. The certificate is one of trustme, with an elliptic curve key, and the chain
has no other certificate.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import socket
import ssl
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import trustme
from OpenSSL import SSL

from benchmarks import measure
from benchmarks.idle import stable_memory

#: RFC 6455, section 1.3
REQUEST = (
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def labels() -> dict[str, str]:
    """Return the kinds of servers and their labels."""
    versions = ssl.OPENSSL_VERSION, SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode()
    python, other = (" ".join(version.split()[:2]) for version in versions)
    return {
        measure.NODE: f"wsgateway, ssl: ({python})",
        "autobahn": f"Autobahn {importlib.metadata.version('autobahn')}, Twisted's ssl: ({other})",
        "pyopenssl": f"pyOpenSSL alone ({other})",
        "sslsocket": f"ssl.SSLSocket alone ({python})",
    }


@contextlib.contextmanager
def start(kind: str, pem: str) -> Iterator[tuple[measure.Server, int]]:
    """Run a server until the end of the ``with`` block; yield it with its TLS port."""
    port = measure.free_port()
    if kind == measure.NODE:
        endpoint = f"ssl:{port}:interface=127.0.0.1:backlog=4096:privateKey={pem}"
        with measure.start(kind, "--auth", "none", "--listen", endpoint) as server:
            yield server, port
        return
    command = [sys.executable, "-m", "benchmarks.peers.tls", kind, str(port), pem]
    folder = Path(tempfile.mkdtemp(prefix="wsgateway-bench-"))
    with open(folder / "output.log", "wb") as output:
        process = measure.spawn(command, stdout=output, stderr=output)
    server = measure.Server(kind, kind, process, port, port, folder)
    try:
        server.await_ready()
        yield server, port
    finally:
        server.stop()


def connect(server: measure.Server, port: int, context: ssl.SSLContext, number: int) -> ssl.SSLSocket:
    """Open one client connection."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    secure = context.wrap_socket(connection, server_hostname="localhost")
    secure.sendall(REQUEST.format(path=server.client_path(f"agent-{number:06d}")).encode())
    response = secure.recv(4096)
    if not response.startswith(b"HTTP/1.1 101"):
        raise SystemExit(f"{server.label}: {response[:200]!r}")
    return secure


def measure_one(kind: str, pem: str, context: ssl.SSLContext, first: int, clients: int) -> float:
    """Measure one server once: bytes for each client after the first ones."""
    with start(kind, pem) as (server, port), contextlib.ExitStack() as connections:
        for number in range(first):
            connections.enter_context(connect(server, port, context, number))
        before = stable_memory(server)
        for number in range(first, clients):
            connections.enter_context(connect(server, port, context, number))
        return (stable_memory(server).resident - before.resident) / (clients - first)


def run(results: measure.Results, runs: int = 1, first: int = 500, clients: int = 2500) -> dict[str, float]:
    """Measure all servers in turn; return the medians."""
    authority = trustme.CA()
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    labels_by_kind = labels()
    found: dict[str, list[float]] = {kind: [] for kind in labels_by_kind}
    with tempfile.TemporaryDirectory() as folder:
        pem = str(Path(folder, "node.pem"))
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
        for _ in range(runs):
            for kind in labels_by_kind:
                found[kind].append(measure_one(kind, pem, context, first, clients))
    medians = {kind: measure.median(values) for kind, values in found.items()}
    node = medians[measure.NODE]
    results.add(measure.NODE, clients=clients, **{f"resident_{kind}": value for kind, value in medians.items()})
    results.show(
        f"TLS: resident bytes for each idle client, between {first:,} and {clients:,}",
        ("server", "resident", "times the node's"),
        [(labels_by_kind[kind], f"{value:,.0f}", f"{value / node:.2f}") for kind, value in medians.items()],
        f"Median of {runs}. Without limits: --openings-per-address 0 --messages-per-client 0.",
    )
    return medians


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.tls``"""
    parser = measure.parser(__doc__, peers=())
    # Opening takes long, and the results of several runs hardly differ.
    parser.set_defaults(runs=1)
    parser.add_argument("--first", type=int, default=500, help="clients that are not counted (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=2500, help="clients in all (default: %(default)s)")
    options: Any = parser.parse_args(arguments)
    measure.pin()
    run(measure.Results("tls", options.json), options.runs, options.first, options.clients)


if __name__ == "__main__":
    measure.main(main)
