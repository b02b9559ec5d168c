"""Measure opening handshakes per second, and their CPU in the server.

    holder -> 5,000 opening handshakes, 100 or 400 in progress at a time; then reset all, and repeat

A handshake with the node includes the claim of the client in its registry (SQLite, in the same process) and the parking
after it. One with Autobahn is the bare handshake and an entry in a dict. If the holder was always busy, the rate is
that of the holder; the CPU is that of the server in any case.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.holders import HolderError, client_holder

#: time for the server to complete handshakes (parking) and disconnections, in seconds
PAUSE_BETWEEN_ROUNDS = 0.3


def measure_one(
    name: str, clients: int, in_progress: int, rounds: int, checkout: Path = measure.CHECKOUT
) -> list[dict[str, float]]:
    """Measure some rounds with one server, after one round that warms it up."""
    values = []
    with measure.start(name, checkout=checkout) as server, client_holder(server, in_progress=in_progress) as holder:
        for _ in range(rounds + 1):
            before, holder_before = server.cpu(), holder.run_command("stat")["cpu"]
            report = holder.open(clients)
            time.sleep(PAUSE_BETWEEN_ROUNDS)
            values.append(
                {
                    "rate": clients / report["seconds"],
                    "cpu": (server.cpu() - before) / clients,
                    "busy": (report["cpu"] - holder_before) / report["seconds"],
                }
            )
            holder.close(clients)
            # Wait until a node has written its releases, which would otherwise count in the next round.
            time.sleep(PAUSE_BETWEEN_ROUNDS)
            while _busy(server):
                pass
    return values[1:]


def _busy(server: measure.Server) -> bool:
    before = server.cpu()
    time.sleep(0.1)
    return server.cpu() - before > 0.02


def run(
    results: measure.Results,
    peers: Sequence[str],
    runs: int = 3,
    clients: int = 5000,
    in_progress: Sequence[int] = (100, 400),
) -> list[dict[str, Any]]:
    """Measure the node and the peers in turn, once for each number of handshakes in progress."""
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for at_a_time in in_progress:
        for _ in range(runs):
            for name in (measure.NODE, *peers):
                try:
                    found.setdefault((at_a_time, name), []).extend(measure_one(name, clients, at_a_time, 1))
                except (measure.UnavailableError, HolderError) as e:
                    print(f"{name} is left out of this run: {e}", flush=True)
    for at_a_time in in_progress:
        values = {
            name: {key: measure.median(one[key] for one in each) for key in each[0]}
            for (progress, name), each in found.items()
            if progress == at_a_time and each
        }
        rows = []
        for name, value in values.items():
            results.add(name, in_progress=at_a_time, clients=clients, **value)
            ratio = value["rate"] / values["autobahn"]["rate"] if "autobahn" in values else 0
            rows.append(
                (
                    measure.label_of(name),
                    f"{value['rate']:,.0f}",
                    f"{ratio:.2f}" if ratio else "",
                    f"{value['cpu'] * 1e6:,.0f}",
                    f"{value['busy']:.0%}",
                )
            )
        results.show(
            f"Opening handshakes, {at_a_time} in progress",
            ("server", "a second", "times Autobahn's", "µs of CPU", "holder busy"),
            rows,
            f"{clients:,} clients; median of {runs}. The node claims each in SQLite; Autobahn only does the handshake.",
            "Without limits: --openings-per-address 0 --messages-per-client 0.",
        )
    return results.lines


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.openings``"""
    parser = measure.parser(__doc__)
    parser.add_argument("--clients", type=int, default=5000, help="clients per measurement (default: %(default)s)")
    parser.add_argument(
        "--in-progress", default="100,400", help="handshakes in progress, separated by commas (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    run(
        measure.Results("openings", options.json),
        measure.peers_of(options),
        options.runs,
        options.clients,
        [int(number) for number in options.in_progress.split(",")],
    )


if __name__ == "__main__":
    measure.main(main)
