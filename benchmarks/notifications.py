"""Measure notifications to clients and from clients, for a node and other servers.

    python -m benchmarks.notifications --peers nats,picows --seconds 3

The columns are those of ``benchmarks.calls``; latency is one way.
"""

from __future__ import annotations

from benchmarks import compare, measure


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--clients", type=int, default=1000, help="(default: %(default)s)")
    options.add_argument("--in-flight", type=int, default=64, help="notifications in flight (default: %(default)s)")
    options.add_argument("--seconds", type=float, default=3, help="duration of each measurement (default: %(default)s)")
    given = options.parse_args()
    peers, number = measure.peers_of(given), min(given.in_flight, given.clients)
    cases = [
        ("to clients", lambda load: load.notifications(number, given.seconds)),
        ("from clients", lambda load: load.events(number, given.seconds)),
    ]
    comparison = compare.run(peers, given.runs, given.clients, cases)
    results = measure.Results("notifications", given.json)
    for case, _ in cases:
        title = f"Notifications {case}, {number:,} in flight, {given.clients:,} clients, 100 bytes"
        compare.show_comparison(results, comparison, peers, case, title, "messages")


if __name__ == "__main__":
    measure.main(main)
