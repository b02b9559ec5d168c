"""Measure the CPU of a call in rpc/ and in the backend WebSocket, in one process and without sockets.

    python -m benchmarks.rpc                      µs of CPU for each message and each layer, medians of several runs
    python -m benchmarks.rpc --runs 31            more runs
    python -m benchmarks.rpc --in-flight 1000     number of calls at once

Client sessions are replaced by a dict, and the connection of the backend by a list. Each run measures everything once,
so that a disturbance of the machine affects everything; a ratio is the median of the ratios of the runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from gateway.api import methods
from gateway.api.backend import BackendProtocol
from gateway.api.methods import BackendMethods, decode_fast
from gateway.api.upstream import BackendDispatcher
from gateway.metrics import Metrics
from gateway.protocol import jsonrpc
from gateway.rpc.dispatcher import Dispatcher
from gateway.rpc.pending import Call, PendingCalls, Reply, random_uuids
from gateway.settings import Settings

CLIENTS = 1000
#: size of the params of a call, and of its result, in bytes
SIZE = 100
#: number of messages of each kind in a run
MESSAGES = 2048
LIMIT = 100000
#: what the node uses, and the alternative
PAIRS = (
    ("a Reply", "one of attrs"),
    ("an integer in bytes", "bytes in bytes"),
    ("a Call", "a Deferred"),
    ("read in one", "read in two"),
    ("a UUID", "uuid.uuid4()"),
)


class FakeClientSessions:
    """Client sessions that record what is sent."""

    def __init__(self) -> None:
        self.generations = {f"agent-{n}": 1763000000000000 + n for n in range(CLIENTS)}
        self.sent: list[tuple[str, int, bytes]] = []

    def generation(self, client_id: str) -> int:
        return self.generations.get(client_id, 0)

    def send(self, client_id: str, payload: bytes, generation: int = 0) -> int:
        self.sent.append((client_id, generation, payload))
        return generation or 1


class FakeMembership:
    """A node that holds its lease."""

    def has_lease(self) -> bool:
        return True

    def is_stable(self) -> bool:
        return True

    def ownership_uncertain(self) -> bool:
        return False


class Backend(BackendProtocol):
    """A backend connection that records what is sent."""

    def send_text(self, payload: bytes) -> bool:
        self.sent.append(payload)
        return True


class DiscardedCall(Call):
    """A call whose outcome is discarded."""

    __slots__ = ()

    def complete(self, result: object) -> None:
        pass


@attrs.frozen
class AttrsReply:
    result: bytes | None
    error: bytes | None


class Node:
    """The parts of a node between client sessions and a backend."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        settings = Settings(capacity=CLIENTS, max_calls=LIMIT)
        self.sessions = FakeClientSessions()
        self.upstream = BackendDispatcher(clock=reactor, metrics=self.metrics, settings=settings, node_id="n")
        self.dispatcher = Dispatcher(
            sessions=self.sessions,
            upstream=self.upstream,
            registry=None,
            membership=FakeMembership(),
            clock=reactor,
            metrics=self.metrics,
            call_timeout=30.0,
            max_call_timeout=300.0,
            max_message_size=2**20,
            max_calls=LIMIT,
            max_calls_per_client=LIMIT,
            node_id="n",
        )
        self.methods = BackendMethods(dispatcher=self.dispatcher, directory=None, upstream=self.upstream)
        self.max_in_progress = LIMIT
        self.backend = Backend()
        self.backend.factory = self
        self.backend.sent = []
        self.backend.opened()

    def add(self, backend: Backend) -> None:
        """Do nothing: the factory of a backend connection records open connections here."""


Row = dict[str, float]


def timed(do: Callable[..., Any], arguments: Iterable[Sequence[Any]]) -> float:
    """Return the CPU of one call of ``do`` in µs, with that of the loop."""
    arguments = list(arguments)
    start = time.thread_time()
    for each in arguments:
        do(*each)
    return (time.thread_time() - start) / len(arguments) * 1e6


def response_of(request: bytes, result: bytes) -> bytes:
    """Encode the response of a client to a request."""
    at = request.index(b'"id":') + 5
    return b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (request[at : at + 38], result)


class Run:
    """One run, which measures every row once."""

    def __init__(self, node: Node, in_flight: int) -> None:
        self.node = node
        self.in_flight = in_flight
        self.params = b'{"data":"%b"}' % (b"x" * SIZE)
        form = b'{"jsonrpc":"2.0","id":%d,"method":"client.call","params":{"client":"agent-%d","method":"echo",'
        form += b'"params":%b}}'
        self.requests = [form % (n, n * 7 % CLIENTS, self.params) for n in range(in_flight)]
        self.response = response_of(jsonrpc.encode_request(b'"%b"' % (b"0" * 36), "echo", None), self.params)
        self.row: Row = {}

    def measure(self) -> Row:
        self.calls("call", self.node.backend.text_received, self.node.dispatcher.message_received)
        self.calls("deferred", self.handle_generally, self.node.dispatcher.message_received)
        self.layers()
        self.others()
        self.pairs()
        return self.row

    def handle_generally(self, payload: bytes) -> None:
        """Handle a request without the fast path."""
        self.node.backend._handle_message(jsonrpc.decode(payload), self.node.backend.send_text)

    def calls(
        self, name: str, send_request: Callable[[bytes], None], send_response: Callable[[str, int, bytes], Any]
    ) -> None:
        """Measure calls, many at a time, and then their responses."""
        sessions, sent = self.node.sessions, self.node.backend.sent
        request_cost = response_cost = 0.0
        rounds = max(1, MESSAGES // self.in_flight)
        for _ in range(rounds):
            request_cost += timed(send_request, [(request,) for request in self.requests])
            responses = [
                (client, generation, response_of(request, self.params)) for client, generation, request in sessions.sent
            ]
            response_cost += timed(send_response, responses)
            assert len(sent) == len(responses) == self.in_flight
            sessions.sent.clear()
            sent.clear()
        self.row[f"{name} request"] = request_cost / rounds
        self.row[f"{name} response"] = response_cost / rounds
        self.row[name] = (request_cost + response_cost) / rounds

    def layers(self) -> None:
        """Measure each layer separately."""
        row, node = self.row, self.node
        payloads = [(request,) for request in self.requests]
        row["read request"] = timed(decode_fast, payloads)
        pending = PendingCalls(reactor, max_calls=LIMIT, max_per_owner=LIMIT)
        reply = Reply(self.params, None)
        owners = list(node.sessions.generations.items())[: self.in_flight]
        total = Counter[str]()
        rounds = max(1, MESSAGES // len(owners))
        for _ in range(rounds):
            calls = [DiscardedCall() for _ in owners]
            total["try_call"] += timed(
                node.dispatcher.try_call,
                [(call, owner[0], "echo", self.params) for call, owner in zip(calls, owners, strict=True)],
            )
            node.sessions.sent.clear()
            for call in calls:
                node.dispatcher.cancel(call)
            total["start"] += timed(
                pending.start, [(call, owner, owner[0], 30.0) for call, owner in zip(calls, owners, strict=True)]
            )
            for call in calls:
                pending.mark_sent(call)
            total["resolve"] += timed(pending.resolve, [(call.owner, call.id, reply) for call in calls])
        row.update({name: cost / rounds for name, cost in total.items()})
        row["encode"] = timed(jsonrpc.encode_request, [(b'"%b"' % (b"0" * 36), "echo", self.params)] * MESSAGES)
        row["read response"] = timed(jsonrpc.decode, [(self.response,)] * MESSAGES)
        row["sessions"] = timed(node.sessions.generation, [("agent-7",)] * MESSAGES)
        row["sessions"] += timed(node.sessions.send, [("agent-7", self.params, 1)] * MESSAGES)
        node.sessions.sent.clear()

    def others(self) -> None:
        """Measure the messages other than calls of backends."""
        row, node = self.row, self.node
        form = b'{"jsonrpc":"2.0",%b"method":"client.notify","params":{"client":"agent-7","method":"m","params":%b}}'
        for name, id in (("notify", b""), ("notify with an id", b'"id":7,')):
            row[name] = timed(node.backend.text_received, [(form % (id, self.params),)] * MESSAGES)
        node.sessions.sent.clear()
        node.backend.sent.clear()
        node.upstream.subscribe(node.backend, ["message"])
        event = b'{"jsonrpc":"2.0","method":"job.done","params":%b}' % self.params
        row["event"] = timed(node.dispatcher.message_received, [("agent-7", 1763000000000007, event)] * MESSAGES)
        assert len(node.backend.sent) == MESSAGES
        node.backend.sent.clear()
        node.upstream.serve(node.backend)
        call = b'{"jsonrpc":"2.0","id":1,"method":"policy.get","params":%b}' % self.params
        owners = list(node.sessions.generations.items())[: self.in_flight]
        row["upstream call"] = timed(node.dispatcher.message_received, [(*each, call) for each in owners])
        responses = [(response_of(request, self.params),) for request in node.backend.sent]
        row["upstream call"] += timed(node.backend.text_received, responses)
        assert len(node.sessions.sent) == len(owners)
        node.sessions.sent.clear()
        node.backend.sent.clear()
        node.upstream.remove(node.backend)

    def pairs(self) -> None:
        """Measure the alternatives of :data:`PAIRS`."""
        row = self.row
        no_arguments = [()] * MESSAGES
        payload = self.requests[0]
        row["read in two"] = timed(lambda: methods._decode_call(jsonrpc.decode(payload).params), no_arguments)
        row["a Reply"] = timed(lambda: Reply(payload, None), no_arguments)
        row["one of attrs"] = timed(lambda: AttrsReply(payload, None), no_arguments)
        row["an integer in bytes"] = timed(lambda: 0x5C in payload, no_arguments)
        row["bytes in bytes"] = timed(lambda: b"\\" in payload, no_arguments)
        pending = PendingCalls(reactor, max_calls=LIMIT, max_per_owner=LIMIT)
        row["a Call"] = timed(lambda: pending._complete(DiscardedCall(), Reply(payload, None)), no_arguments)

        def deferred() -> None:
            call: Deferred[Reply] = Deferred(pending.discard)
            call.addBoth(lambda reply, more: None, 1)
            call.callback(Reply(payload, None))

        row["a Deferred"] = timed(deferred, no_arguments)
        ids = random_uuids()
        row["a UUID"] = timed(lambda: next(ids), no_arguments)
        row["uuid.uuid4()"] = timed(lambda: str(uuid.uuid4()), no_arguments)
        row["read in one"] = timed(lambda: decode_fast(payload), no_arguments)
        overhead = timed(lambda: None, no_arguments)
        for this, that in PAIRS:
            row[this] -= overhead
            row[that] -= overhead


def table(rows: Sequence[Row]) -> Iterable[str]:
    """Yield the lines of the table."""
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}

    def ratio(this: str, that: str) -> float:
        return statistics.median(row[this] / row[that] for row in rows)

    total = medians["call"]
    dispatcher = medians["try_call"] - medians["start"] - medians["encode"] - medians["sessions"]
    layers = {
        "request   backend WebSocket, decoding": medians["read request"],
        "request   backend WebSocket, other": medians["call request"] - medians["read request"] - medians["try_call"],
        "request   dispatcher": dispatcher,
        "request   pending calls": medians["start"],
        "request   encoding": medians["encode"],
        "request   fake sessions": medians["sessions"],
        "response  decoding": medians["read response"],
        "response  pending calls": medians["resolve"],
        "response  dispatcher and backend WebSocket": medians["call response"]
        - medians["read response"]
        - medians["resolve"],
    }
    yield f"one call {total:8.2f} µs   request {medians['call request']:.2f}, response {medians['call response']:.2f}"
    for name, cost in layers.items():
        yield f"  {name:44} {cost:6.2f} µs {cost / total:6.1%}"
    slowdown = ratio("deferred", "call")
    yield f"with a Deferred, without the fast path {medians['deferred']:.2f} µs: {slowdown:.2f} times that"
    for name in ("notify", "notify with an id", "event", "upstream call"):
        yield f"{name:20} {medians[name]:6.2f} µs, {ratio(name, 'call'):.2f} of a call"
    for this, that in PAIRS:
        yield f"{this:20} {ratio(this, that):6.2f} of {that}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--in-flight", type=int, default=64)
    options = parser.parse_args()
    node = Node()
    Run(node, options.in_flight).measure()
    for line in table([Run(node, options.in_flight).measure() for _ in range(options.runs)]):
        print(line)


if __name__ == "__main__":
    main()
