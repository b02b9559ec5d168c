"""Measure the resident memory of a server for each idle client: its growth between 1,000 and 18,000 clients.

    holder -> 1,000 opening handshakes, then 17,000 more; then nothing

The first 1,000 clients warm the server up and are not counted. Memory is read when it has not changed for a second.
That of the node includes everything: the row in its registry (SQLite, in the same process), the index by client id and
keep-alive. Kernel memory is that of both ends, since both are on this machine. It is read from figures of the whole
machine, and is "disturbed" if these are implausible.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.holders import LONG_CLIENT_ID, SHORT_CLIENT_ID, HolderError, client_holder
from benchmarks.limits import each_or_disturbed

#: maximum time to wait for stable memory, in seconds
STABLE_TIMEOUT = 20.0
#: maximum change within a second that counts as stable, in bytes
STABLE_DELTA = 2**16


def stable_memory(server: measure.Server, timeout: float = STABLE_TIMEOUT) -> measure.Memory:
    """Return the memory of a server when it is stable, or after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    figures = [server.memory()]
    while time.monotonic() < end:
        time.sleep(0.25)
        figures.append(server.memory())
        last = [figure.resident for figure in figures[-5:]]
        if len(last) == 5 and max(last) - min(last) < STABLE_DELTA:
            break
    return figures[-1]


def anonymous(pid: int) -> int:
    """Return the resident bytes of a process that are not backed by files.

    How much of the mapped files is private and how much shared depends on other processes.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure_one(
    name: str, first: int, clients: int, ids: str, stay: float, checkout: Path = measure.CHECKOUT
) -> dict[str, Any]:
    """Measure one server once: bytes for each client after the first ones."""
    with measure.start(name, checkout=checkout) as server, client_holder(server, name=ids) as holder:
        holder.open(first)
        before, own_before, kernel_before = stable_memory(server), anonymous(server.pid), measure.kernel_memory()
        holder.open(clients - first)
        if stay:
            time.sleep(stay)
        after, own_after, kernel_after = stable_memory(server), anonymous(server.pid), measure.kernel_memory()
        stat = holder.run_command("stat")
        if stat["open"] != clients:
            raise HolderError(f"{clients - stat['open']} clients were lost: {stat['problem']}")
        metrics = server.http("GET", "/metrics")[1].decode() if name == measure.NODE else ""
    more = clients - first
    return {
        "resident": (after.resident - before.resident) / more,
        "anonymous": (own_after - own_before) / more,
        "kernel": (kernel_after.objects + kernel_after.buffers - kernel_before.objects - kernel_before.buffers) / more,
        "base": before.resident,
        "parked": measured(metrics, "wsgateway_parked"),
    }


def measured(metrics: str, name: str) -> int:
    """Return the value of a metric without labels from the Prometheus text format; 0 if it is missing."""
    values = [line.split()[1] for line in metrics.splitlines() if line.startswith(f"{name} ")]
    return int(float(values[0])) if values else 0


def run(
    results: measure.Results,
    peers: Sequence[str],
    runs: int = 3,
    first: int = 1000,
    clients: int = 18000,
    stay: float = 0.0,
) -> list[dict[str, Any]]:
    """Measure the node, with short and long client ids, and the peers, in turn."""
    kinds = [
        (measure.NODE, SHORT_CLIENT_ID),
        (measure.NODE, LONG_CLIENT_ID),
        *((peer, SHORT_CLIENT_ID) for peer in peers),
    ]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(runs):
        for kind in kinds:
            try:
                found.setdefault(kind, []).append(measure_one(kind[0], first, clients, kind[1], stay))
            except (measure.UnavailableError, HolderError) as e:
                print(f"{kind[0]} is left out of this run: {e}", flush=True)
    rows = []
    known = measure.kernel_memory().objects > 0
    node = [one["resident"] for one in found.get((measure.NODE, SHORT_CLIENT_ID), [])]
    for (name, ids), each in found.items():
        if not each:
            continue
        values = {key: measure.median(one[key] for one in each) for key in each[0]}
        characters = len(ids.format(0))
        results.add(name, characters=characters, clients=clients, **values)
        rows.append(
            (
                measure.label_of(name) + (f", {characters}-character ids" if name == measure.NODE else ""),
                f"{values['resident']:,.0f}",
                f"{values['anonymous']:,.0f}",
                f"{values['resident'] / measure.median(node):.1f}" if node else "",
                each_or_disturbed(values["kernel"]) if known else "-",
                f"{values['base'] / 2**20:.0f}",
            )
        )
    parked = [one["parked"] for kind in found for one in found[kind] if kind[0] == measure.NODE]
    results.show(
        f"Memory: bytes for each idle client, between {first:,} and {clients:,}",
        ("server", "resident", "anonymous", "times the node's", "kernel, both ends", f"MiB with {first:,}"),
        rows,
        f"Median of {runs}. Peers' client_ids have {len(SHORT_CLIENT_ID.format(0))} characters. "
        f"Of the node's clients {min(parked, default=0):,} or more were parked.",
        "Without limits: --openings-per-address 0 --messages-per-client 0.",
    )
    return results.lines


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.idle``"""
    parser = measure.parser(__doc__)
    parser.add_argument("--first", type=int, default=1000, help="clients that are not counted (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=18000, help="clients in all (default: %(default)s)")
    parser.add_argument("--stay", type=float, default=0.0, help="seconds to wait, for pings (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.clients <= options.first:
        parser.error(f"--clients {options.clients}: more than --first {options.first} is required to measure growth")
    peers = measure.peers_of(options)
    run(measure.Results("idle", options.json), peers, options.runs, options.first, options.clients, options.stay)


if __name__ == "__main__":
    measure.main(main)
