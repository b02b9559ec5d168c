"""What one call through another node costs at the node that asks, without sockets: in this process, nothing beside it.

    python -m benchmarks.link                      µs of CPU for each step, medians of several runs
    python -m benchmarks.link --runs 31            more of them
    python -m benchmarks.link --in-flight 1000     as many calls at once

Calls are asked in one turn, and their answers come in one read. Beside it the same messages go through Autobahn's own
client protocol, which does nothing with them. The transport is a list; the rest is the node's own. In each run all is
measured once, so that what disturbs the machine disturbs everything; a ratio is the median of those in the runs.
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

#: bytes of a call's params, and of its result
SIZE = 100
#: messages of each kind in a run
MESSAGES = 4096
LIMIT = 100000

Row = dict[str, float]


class CountedCall(Call):
    """A call whose outcome is counted."""

    __slots__ = ("outcomes",)

    def __init__(self, settled: list[object]) -> None:
        self.outcomes = settled

    def complete(self, result: object) -> None:
        self.outcomes.append(result)


class AutobahnClient(WebSocketClientProtocol):
    """Autobahn's own."""

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.factory.messages.append(payload)


def answer_to(request: bytes) -> bytes:
    """What opens a connection."""
    found = re.search(rb"\r\nSec-WebSocket-Key: (.*)\r\n", request)
    assert found is not None
    accept = base64.b64encode(hashlib.sha1(found[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    return head + b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept


def connected(factory: Any) -> tuple[Any, StringTransport]:
    """An open connection of a factory."""
    protocol, transport = factory.buildProtocol(None), StringTransport()
    protocol.makeConnection(transport)
    protocol.dataReceived(answer_to(transport.value()))
    transport.clear()
    return protocol, transport


class AskingNode:
    """A node that asks, with one open link, and a connection of Autobahn's own."""

    def __init__(self) -> None:
        self.turn = Cork(reactor.seconds)
        self.peers = PeerClient(
            node_id="a",
            peer_auth=PeerAuth("a", lambda: b"benchmark"),
            reactor=reactor,
            cork=self.turn,
            metrics=Metrics(),
            heartbeat=5.0,
            lease=15.0,
            max_message_size=1048576,
            max_calls=LIMIT,
        )
        self.location = Location("agent-7", "b", "b", "ws://b:8081", 1763000000000007, 0.0, "192.0.2.1:4711")
        self.peers._pool._connection_opened("b", self._link())
        self.stock, self.stock_transport = connected(self._stock_factory())

    def _link(self) -> PeerConnection:
        link = make_connection(
            peer_target("ws://b:8081"),
            "Wsgateway-Peer",
            clock=reactor,
            cork=self.turn,
            max_message_size=1048576,
            message_received=self.peers._pool._message_received,
        )
        self.link, self.transport = connected(ClientConnectionFactory(link, reactor))
        return link

    def _stock_factory(self) -> WebSocketClientFactory:
        factory = WebSocketClientFactory("ws://b:8081/v1/backend", reactor=reactor)
        factory.protocol = AutobahnClient
        factory.messages = []
        return factory


def timed(do: Callable[[], Any], times: int) -> float:
    """µs of CPU for each of so many things that are done at once."""
    start = time.thread_time()
    do()
    return (time.thread_time() - start) / times * 1e6


class Run:
    """One run: every row once."""

    def __init__(self, node: AskingNode, in_flight: int) -> None:
        self.node = node
        self.in_flight = in_flight
        self.params = b'{"data":"%b"}' % (b"x" * SIZE)
        self.row: Row = {}

    def measure(self) -> Row:
        rounds = max(1, MESSAGES // self.in_flight)
        rows = [self._round() for _ in range(rounds)]
        self.row = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
        self._pieces()
        return self.row

    def _round(self) -> Row:
        node, row, settled = self.node, {}, []
        calls = [CountedCall(settled) for _ in range(self.in_flight)]

        def ask() -> None:
            node.turn.cork()
            for call in calls:
                node.peers.try_call(call, node.location, "echo", self.params, 30.0)
            node.turn.uncork()

        row["ask"] = timed(ask, self.in_flight)
        requests, at, data = [], 0, node.transport.value()
        while at < len(data):
            _, payload, at = decode(data, at)  # type: ignore[misc]
            requests.append(payload)
        node.transport.clear()
        answers = [b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (request[22:60], self.params) for request in requests]
        read = b"".join(map(encode, answers))
        row["answer"] = timed(lambda: node.link.dataReceived(read), self.in_flight)
        assert len(settled) == len(requests) == self.in_flight
        assert isinstance(settled[0], Reply)

        def send() -> None:
            for request in requests:
                node.stock.sendMessage(request)

        row["stock ask"] = timed(send, self.in_flight)
        node.stock_transport.clear()
        row["stock answer"] = timed(lambda: node.stock.dataReceived(read), self.in_flight)
        assert len(node.stock.factory.messages) == self.in_flight
        node.stock.factory.messages.clear()
        row["call"] = row["ask"] + row["answer"]
        row["stock call"] = row["stock ask"] + row["stock answer"]
        return row

    def _pieces(self) -> None:
        """The parts of it, each alone."""
        row, location = self.row, self.node.location
        id = b'"%b"' % (b"0" * 36)
        message = encode_message_params("agent-7", location.generation, "echo", self.params, False)
        request = encode_call(id, message, 30.0)
        answer = b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (id, self.params)
        frame = encode(answer)

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
        row["read"] = repeat(lambda: decode_response(answer))


def table(rows: Sequence[Row]) -> Iterable[str]:
    """The text."""
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}

    def ratio(this: str, that: str) -> float:
        return statistics.median(row[this] / row[that] for row in rows)

    yield f"one call {middle['call']:8.2f} µs   ask {middle['ask']:.2f}, answer {middle['answer']:.2f}"
    for name, what in (
        ("write", "ask     the message"),
        ("mask", "ask     its frame, masked"),
        ("frame", "answer  its frame"),
        ("read", "answer  the message"),
    ):
        yield f"  {what:28} {middle[name]:6.2f} µs {middle[name] / middle['call']:6.1%}"
    yield "Autobahn's own client protocol, the frames alone:"
    for name in ("call", "ask", "answer"):
        stock = f"stock {name}"
        yield f"  {name:10} {middle[stock]:6.2f} µs, {ratio(stock, name):.1f} times that"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--in-flight", type=int, default=64)
    options = parser.parse_args()
    node = AskingNode()
    Run(node, options.in_flight).measure()
    for line in table([Run(node, options.in_flight).measure() for _ in range(options.runs)]):
        print(line)


if __name__ == "__main__":
    main()
