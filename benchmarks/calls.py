"""Calls, backend -> server -> client and back, through a node and through its peers.

    python -m benchmarks.calls --peers nats,socketify --in-flight 64 --seconds 3

µs of CPU: the server's, in microseconds, for a call. Latency: from when the backend sends a call to when it has read
the response; with many always in flight it is mostly waiting in line. Node faster: the node's calls a second over
the peer's; node cheaper: the peer's CPU for a call over the node's. Busy: the share of the time in which the server's
process was working, and the load's; when neither is near 100 %, something else had the processor.
"""

from __future__ import annotations

from benchmarks import compare, measure

#: with fewer calls in flight a server waits for them
MIN_SATURATING_CALLS = 16


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--clients", type=int, default=1000, help="(default: %(default)s)")
    options.add_argument("--in-flight", default="1,64,1000", help="how many calls at a time (default: %(default)s)")
    options.add_argument("--seconds", type=float, default=3, help="of each measurement (default: %(default)s)")
    given = options.parse_args()
    peers = measure.peers_of(given)
    numbers = [min(int(number), given.clients) for number in given.in_flight.split(",")]
    cases = [
        (f"in flight {number}", lambda load, number=number: load.calls(number, given.seconds)) for number in numbers
    ]
    comparison = compare.run(peers, given.runs, given.clients, cases)
    results = measure.Results("calls", given.json)
    for number, (case, _) in zip(numbers, cases, strict=True):
        title = f"Calls, {number:,} in flight to {given.clients:,} clients, 100 bytes each way"
        compare.show_comparison(results, comparison, peers, case, title, "calls", filled=number >= MIN_SATURATING_CALLS)


if __name__ == "__main__":
    measure.main(main)
