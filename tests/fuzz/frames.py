"""What comes on a connection that is open (RFC 6455, section 5). An input is the bytes of a client after its opening.

* What the fast lane reads, Autobahn reads too, and the same.
* What is passed on is byte for byte what was sent; writing what was read gives the bytes that came.
* How it is cut, and whether the connection is parked in between, makes no difference.
* As long as stock Autobahn goes on, so does the node, with the same messages and the same pongs; it ends a connection
  with the same code.
* No more is held than a message may have.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any
from unittest import mock

import attrs

from gateway.protocol import frames
from gateway.protocol.frames import PING, PONG, TEXT
from tests.builders.frames import build_frame
from tests.fakes import clients
from tests.fakes import parked as parking
from tests.fakes.clients import FakeHandler
from tests.fakes.reactor import complete_frames
from tests.fuzz.autobahn_server import CLOSE, run_autobahn
from tests.fuzz.common import in_bytes, in_two, nothing_is_logged

#: the largest message, in bytes
MAX_MESSAGE_SIZE = 1000
#: what is held of a control frame, and of the head of one, in bytes
MAX_BUFFERED_OVERHEAD = 14 + 125


def target(data: bytes) -> None:
    """See the module."""
    read_masked(data)
    read_unmasked(data)
    with nothing_is_logged():
        expected = AwakeDriver(fast=False).play([data])
        awake, parked = AwakeDriver(fast=True), ParkedDriver()
        try:
            for pieces in ([data], in_two(data), in_bytes(data)):
                assert awake.play(pieces) == expected, pieces
            for pieces in ([data], in_two(data)):
                assert parked.play(pieces) == expected, pieces
        finally:
            parked.node.close()
    compare_with_stock(data, expected)


# The frames themselves.


def read_masked(data: bytes) -> None:
    """Those of a client, one behind the other, as far as they are read here."""
    at = 0
    while (found := frames.decode(data, at)) is not None:
        opcode, payload, after = found
        check(data, at, found, frames.decode, frames.is_partial)
        start = after - len(payload)
        (key,) = struct.unpack("<I", data[start - 4 : start])
        if opcode == TEXT:
            assert frames.encode_masked(payload, key) == data[at:after]
        again = frames.encode(payload, opcode)
        assert frames.decode_unmasked(again, 0) == (opcode, payload, len(again))
        at = after
    assert at == len(data) or frames.decode(data[at:], 0) is None


def read_unmasked(data: bytes) -> None:
    """Those of a server."""
    at = 0
    while (found := frames.decode_unmasked(data, at)) is not None:
        opcode, payload, after = found
        check(data, at, found, frames.decode_unmasked, frames.is_partial_unmasked)
        assert frames.encode(payload, opcode) == data[at:after]
        at = after


def check(data: bytes, at: int, found: tuple[int, bytes, int], decode: Any, is_beginning: Any) -> None:
    """What is true of every frame that is read."""
    opcode, payload, after = found
    size = len(payload)
    whole = data[at:after]
    assert at < after <= len(data)
    assert decode(whole, 0, size) == (opcode, payload, len(whole))
    assert size == 0 or decode(whole, 0, size - 1) is None
    assert not is_beginning(whole)
    if opcode == TEXT:
        payload.decode()
    else:
        assert opcode in (PING, PONG)
        assert size <= 125
    for end in {*range(min(len(whole), 12)), len(whole) // 2, len(whole) - 1}:
        assert decode(whole[:end], 0) is None
        assert is_beginning(whole[:end]) or end > 0 < opcode != TEXT
        assert size == 0 or end < 4 or not is_beginning(whole[:end], size - 1)


# A whole connection.


@attrs.frozen
class Outcome:
    """What a client and the rest of the node saw of a connection."""

    #: what the handler was told, each with its message if it was one
    seen: list[Any]
    #: what the client received
    sent: bytes
    #: how many connections ended, by code
    closed: dict[str, int]


class ReactingHandler(FakeHandler):
    """Answers some messages, finds some to be no JSON-RPC, and closes the connection, by their first bytes."""

    edge: Any

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int:
        """A message came."""
        self.events.append(("message", client_id, generation, payload))
        if payload[:2] == b"!e":
            self.sessions.send(client_id, payload)
        elif payload[:2] == b"!c":
            self.sessions.close(client_id, 4003, "as it was told")
        return {b"!0": 0, b"!5": 5, b"!-": -3}.get(payload[:2], 1)


def node_of(kind: Any, module: Any) -> Any:
    """A node of one of the kinds that the tests of the edge have, with this handler."""
    with mock.patch.object(module, "FakeHandler", ReactingHandler):
        node = kind(max_message_size=str(MAX_MESSAGE_SIZE), messages_per_client="0")
    node.handler.sessions = node.sessions
    return node


class Driver:
    """A node on which inputs are played, one after the other."""

    node: Any

    def outcome(self, sent: bytes) -> Outcome:
        """What came of the connection that is over."""
        node = self.node
        assert (node.sessions.count(), node.factory.countConnections) == (0, 0)
        assert len(node.registry.released) == 1
        seen = [(what, *rest) for what, _, _, *rest in node.handler.events]
        found = Outcome(seen, sent, dict(node.metrics.closed))
        for one in (node.handler.events, node.metrics.closed, node.registry.released, node.registry.claims):
            one.clear()
        return found


class AwakeDriver(Driver):
    """The connection is never parked. ``fast``: whole frames take the fast lane; else Autobahn reads every byte."""

    def __init__(self, fast: bool) -> None:
        self.node = node_of(clients.FakeNode, clients)
        if not fast:
            self.node.factory.protocol.process_fast = lambda self, data: data

    def play(self, pieces: list[bytes]) -> Outcome:
        """Say all of it, and go."""
        client = self.node.connect()
        client.transport.clear()
        protocol = client.protocol
        for piece in pieces:
            client.send(piece)
            control = sum(map(len, getattr(protocol, "control_frame_data", None) or ()))
            held = len(protocol.data) + len(protocol._message or b"") + control
            assert held <= MAX_MESSAGE_SIZE + MAX_BUFFERED_OVERHEAD, held
        sent = client.transport.pop_written()
        client.lose()
        assert not protocol.data
        return self.outcome(sent)


class ParkedDriver(Driver):
    """The connection is parked before each piece, if it can be."""

    def __init__(self) -> None:
        self.node = node_of(parking.ParkingNode, parking)

    def play(self, pieces: list[bytes]) -> Outcome:
        """Say all of it, and go."""
        node = self.node
        there = node.connect()
        sent = b""
        for piece in pieces:
            _send(there, piece)
            node.step(2)
            for client in node.table.awake.values():
                client.idle_before_park = 0.0
                node.table._idle_detector.watch(client)
            node.step()
            sent += node.receive(there)
        there.shutdown(socket.SHUT_WR)
        node.step(2)
        sent += node.receive(there)
        there.close()
        return self.outcome(sent)


def _send(there: socket.socket, piece: bytes) -> None:
    # The server may have closed.
    with contextlib.suppress(BrokenPipeError):
        there.send(piece)


def compare_with_stock(data: bytes, outcome: Outcome) -> None:
    """The connection goes as it does with Autobahn as it is, up to a close frame of the server's."""
    sent = complete_frames(outcome.sent)
    assert b"".join(frame_of(*one) for one in sent) == outcome.sent
    codes = [opcode for opcode, _ in sent]
    assert codes.count(CLOSE) <= 1
    assert CLOSE not in codes[:-1]
    messages = [message for what, *told in outcome.seen for message in told if what == "message"]
    assert all(len(message) <= MAX_MESSAGE_SIZE for message in messages)
    if any(message[:1] == b"!" for message in messages):
        return
    expected = run_autobahn(data, MAX_MESSAGE_SIZE)
    assert messages == expected.messages, (messages, expected)
    assert [payload for opcode, payload in sent if opcode == PONG] == expected.pongs
    assert [payload[:2] for opcode, payload in sent if opcode == CLOSE] == expected.closes
    assert all(opcode in (PONG, CLOSE) for opcode in codes)


def frame_of(opcode: int, payload: bytes) -> bytes:
    """A server's frame, not by the gateway's own code."""
    return build_frame(opcode, payload, masked=False)
