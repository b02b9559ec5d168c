"""Measure calls from a backend through a server to a client and back, for a node and other servers.

    python -m benchmarks.calls --peers nats,socketify --in-flight 64 --seconds 3

µs of CPU: server CPU for each call. Latency: from sending a call to reading the response, at the backend; with many
calls in flight it is mostly queueing time. Node faster: calls per second of the node divided by those of the other
server. Node cheaper: CPU per call of the other server divided by that of the node. Busy: the share of time in which the
process of the server, or of the load, worked; if neither is near 100 %, something else used the processor.
"""

from __future__ import annotations

from benchmarks import compare, measure

#: with fewer calls in flight the server is not saturated
MIN_SATURATING_CALLS = 16


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--clients", type=int, default=1000, help="(default: %(default)s)")
    options.add_argument("--in-flight", default="1,64,1000", help="calls in flight (default: %(default)s)")
    options.add_argument("--seconds", type=float, default=3, help="duration of each measurement (default: %(default)s)")
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
