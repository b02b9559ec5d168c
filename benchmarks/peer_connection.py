"""Measure the CPU of a forwarded call in the requesting node, in one process and without sockets.

    python -m benchmarks.peer_connection                      µs of CPU for each step, medians of several runs
    python -m benchmarks.peer_connection --runs 31            more runs
    python -m benchmarks.peer_connection --in-flight 1000     number of calls at once

Calls are sent in one reactor iteration, and their responses arrive in one read. The same messages also pass through
Autobahn's client protocol, which does nothing with them. Only the transport is replaced, by a list. Each run measures
everything once, so that a disturbance of the machine affects everything; a ratio is the median of the ratios of the
runs.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
from twisted.internet import reactor
from twisted.internet.testing import StringTransport

from gateway.cluster.auth import PeerAuth
from gateway.cluster.messages import decode_response, encode_call, encode_message_params
from gateway.cluster.peer_client import PeerClient
from gateway.cluster.peer_connection import PeerConnection, make_connection, peer_target
from gateway.metrics import Metrics
from gateway.protocol.frames import decode, decode_unmasked, encode, encode_masked
from gateway.registry.interface import Location
from gateway.rpc.pending import Call, Reply
from gateway.util.cork import Cork
from gateway.websocket.client import ClientConnectionFactory

#: size of the params of a call, and of its result, in bytes
SIZE = 100
#: number of messages of each kind in a run
MESSAGES = 4096
LIMIT = 100000

Row = dict[str, float]


class CountedCall(Call):
    """A call that records its outcome."""

    __slots__ = ("outcomes",)

    def __init__(self, outcomes: list[object]) -> None:
        self.outcomes = outcomes

    def complete(self, result: object) -> None:
        self.outcomes.append(result)


class AutobahnClient(WebSocketClientProtocol):
    """Autobahn's client protocol, which records messages."""

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.factory.messages.append(payload)


def handshake_response(request: bytes) -> bytes:
    """Encode the response that accepts an opening handshake."""
    match = re.search(rb"\r\nSec-WebSocket-Key: (.*)\r\n", request)
    assert match is not None
    accept = base64.b64encode(hashlib.sha1(match[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    return head + b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept


def connected(factory: Any) -> tuple[Any, StringTransport]:
    """Make an open connection of a factory, and its transport."""
    protocol, transport = factory.buildProtocol(None), StringTransport()
    protocol.makeConnection(transport)
    protocol.dataReceived(handshake_response(transport.value()))
    transport.clear()
    return protocol, transport


class RequestingNode:
    """A node with one open peer connection, and a connection of Autobahn's client."""

    def __init__(self) -> None:
        self.cork = Cork(reactor.seconds)
        self.peers = PeerClient(
            node_id="a",
            peer_auth=PeerAuth("a", lambda: b"benchmark"),
            reactor=reactor,
            cork=self.cork,
            metrics=Metrics(),
            heartbeat=5.0,
            lease=15.0,
            max_message_size=2**20,
            max_calls=LIMIT,
        )
        self.location = Location("agent-7", "b", "b", "ws://b:8081", 1763000000000007, 0.0, "192.0.2.1:4711")
        self.peers._pool._connection_opened("b", self._open_peer_connection())
        self.autobahn, self.autobahn_transport = connected(self._autobahn_factory())

    def _open_peer_connection(self) -> PeerConnection:
        connection = make_connection(
            peer_target("ws://b:8081"),
            "Wsgateway-Peer",
            clock=reactor,
            cork=self.cork,
            max_message_size=2**20,
            message_received=self.peers._pool._message_received,
        )
        self.protocol, self.transport = connected(ClientConnectionFactory(connection, reactor))
        return connection

    def _autobahn_factory(self) -> WebSocketClientFactory:
        factory = WebSocketClientFactory("ws://b:8081/v1/backend", reactor=reactor)
        factory.protocol = AutobahnClient
        factory.messages = []
        return factory


def timed(do: Callable[[], Any], times: int) -> float:
    """Return the CPU of each of ``times`` operations done by one call of ``do``, in µs."""
    start = time.thread_time()
    do()
    return (time.thread_time() - start) / times * 1e6


class Run:
    """One run, which measures every row once."""

    def __init__(self, node: RequestingNode, in_flight: int) -> None:
        self.node = node
        self.in_flight = in_flight
        self.params = b'{"data":"%b"}' % (b"x" * SIZE)
        self.row: Row = {}

    def measure(self) -> Row:
        rounds = max(1, MESSAGES // self.in_flight)
        rows = [self._round() for _ in range(rounds)]
        self.row = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
        self._measure_steps()
        return self.row

    def _round(self) -> Row:
        node, row, outcomes = self.node, {}, []
        calls = [CountedCall(outcomes) for _ in range(self.in_flight)]

        def send_calls() -> None:
            node.cork.cork()
            for call in calls:
                node.peers.try_send(call, node.location, "echo", self.params, 30.0)
            node.cork.uncork()

        row["request"] = timed(send_calls, self.in_flight)
        requests, at, data = [], 0, node.transport.value()
        while at < len(data):
            _, payload, at = decode(data, at)  # type: ignore[misc]
            requests.append(payload)
        node.transport.clear()
        responses = [b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (request[22:60], self.params) for request in requests]
        read = b"".join(map(encode, responses))
        row["response"] = timed(lambda: node.protocol.dataReceived(read), self.in_flight)
        assert len(outcomes) == len(requests) == self.in_flight
        assert isinstance(outcomes[0], Reply)

        def send() -> None:
            for request in requests:
                node.autobahn.sendMessage(request)

        row["autobahn request"] = timed(send, self.in_flight)
        node.autobahn_transport.clear()
        row["autobahn response"] = timed(lambda: node.autobahn.dataReceived(read), self.in_flight)
        assert len(node.autobahn.factory.messages) == self.in_flight
        node.autobahn.factory.messages.clear()
        row["call"] = row["request"] + row["response"]
        row["autobahn call"] = row["autobahn request"] + row["autobahn response"]
        return row

    def _measure_steps(self) -> None:
        """Measure each step separately."""
        row, location = self.row, self.node.location
        id = b'"%b"' % (b"0" * 36)
        message = encode_message_params("agent-7", location.generation, "echo", self.params, False)
        request = encode_call(id, message, 30.0)
        response = b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (id, self.params)
        frame = encode(response)

        def repeat(do: Callable[[], Any]) -> float:
            def all() -> None:
                for _ in range(MESSAGES):
                    do()

            return timed(all, MESSAGES)

        row["write"] = repeat(
            lambda: encode_call(
                id, encode_message_params("agent-7", location.generation, "echo", self.params, False), 30.0
            )
        )
        row["mask"] = repeat(lambda: encode_masked(request, 0x12345678))
        row["frame"] = repeat(lambda: decode_unmasked(frame, 0))
        row["read"] = repeat(lambda: decode_response(response))


def table(rows: Sequence[Row]) -> Iterable[str]:
    """Yield the lines of the table."""
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}

    def ratio(this: str, that: str) -> float:
        return statistics.median(row[this] / row[that] for row in rows)

    yield f"one call {medians['call']:8.2f} µs   request {medians['request']:.2f}, response {medians['response']:.2f}"
    for name, step in (
        ("write", "request   the message"),
        ("mask", "request   its frame, masked"),
        ("frame", "response  its frame"),
        ("read", "response  the message"),
    ):
        yield f"  {step:28} {medians[name]:6.2f} µs {medians[name] / medians['call']:6.1%}"
    yield "Autobahn's client protocol, only the frames:"
    for name in ("call", "request", "response"):
        autobahn = f"autobahn {name}"
        yield f"  {name:10} {medians[autobahn]:6.2f} µs, {ratio(autobahn, name):.1f} times the node's"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--in-flight", type=int, default=64)
    options = parser.parse_args()
    node = RequestingNode()
    Run(node, options.in_flight).measure()
    for line in table([Run(node, options.in_flight).measure() for _ in range(options.runs)]):
        print(line)


if __name__ == "__main__":
    main()
