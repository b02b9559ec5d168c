"""Data on an open connection (RFC 6455, section 5). An input is the bytes of a client after its opening handshake.

* The fast path parses frames as Autobahn does.
* Payloads are passed on unchanged; encoding a parsed frame gives the original bytes.
* Neither the splitting into reads nor parking the connection in between makes a difference.
* As long as stock Autobahn keeps the connection open, so does the node, with the same messages and pongs; it closes
  with the same code.
* No more data is buffered than the size of a message.
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

#: bytes; the maximum message size
MAX_MESSAGE_SIZE = 1000
#: bytes that are buffered of a control frame, and of its head
MAX_BUFFERED_OVERHEAD = 14 + 125


def target(data: bytes) -> None:
    """Assert the invariants of the module's docstring."""
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


# Single frames.


def read_masked(data: bytes) -> None:
    """Check consecutive frames of a client, as far as the fast path reads them."""
    at = 0
    while (frame := frames.decode(data, at)) is not None:
        opcode, payload, after = frame
        check(data, at, frame, frames.decode, frames.is_partial)
        start = after - len(payload)
        (key,) = struct.unpack("<I", data[start - 4 : start])
        if opcode == TEXT:
            assert frames.encode_masked(payload, key) == data[at:after]
        again = frames.encode(payload, opcode)
        assert frames.decode_unmasked(again, 0) == (opcode, payload, len(again))
        at = after
    assert at == len(data) or frames.decode(data[at:], 0) is None


def read_unmasked(data: bytes) -> None:
    """Check consecutive frames of a server."""
    at = 0
    while (frame := frames.decode_unmasked(data, at)) is not None:
        opcode, payload, after = frame
        check(data, at, frame, frames.decode_unmasked, frames.is_partial_unmasked)
        assert frames.encode(payload, opcode) == data[at:after]
        at = after


def check(data: bytes, at: int, frame: tuple[int, bytes, int], decode: Any, is_beginning: Any) -> None:
    """Check the invariants of a parsed frame."""
    opcode, payload, after = frame
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


# Whole connections.


@attrs.frozen
class Outcome:
    """What a client and the rest of the node observed of a connection."""

    #: calls of the handler, with their messages
    seen: list[Any]
    #: data that the client received
    sent: bytes
    #: close code -> number of connections
    closed: dict[str, int]


class ReactingHandler(FakeHandler):
    """Depending on the first byte: answers a message, reports it as invalid, or closes the connection."""

    sessions: Any

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int:
        self.events.append(("message", client_id, generation, payload))
        if payload[:2] == b"!e":
            self.sessions.send(client_id, payload)
        elif payload[:2] == b"!c":
            self.sessions.close(client_id, 4003, "closed by the handler")
        return {b"!0": 0, b"!5": 5, b"!-": -3}.get(payload[:2], 1)


def node_of(kind: Any, module: Any) -> Any:
    """Make a node of one of the kinds of the tests of ``gateway.clients``, with this handler."""
    with mock.patch.object(module, "FakeHandler", ReactingHandler):
        node = kind(max_message_size=str(MAX_MESSAGE_SIZE), messages_per_client="0")
    node.handler.sessions = node.sessions
    return node


class Driver:
    """A node that receives one input after the other."""

    node: Any

    def outcome(self, sent: bytes) -> Outcome:
        """Return the outcome of the closed connection."""
        node = self.node
        assert (node.sessions.count(), node.factory.countConnections) == (0, 0)
        assert len(node.registry.released) == 1
        seen = [(what, *rest) for what, _, _, *rest in node.handler.events]
        outcome = Outcome(seen, sent, dict(node.metrics.closed))
        for one in (node.handler.events, node.metrics.closed, node.registry.released, node.registry.claims):
            one.clear()
        return outcome


class AwakeDriver(Driver):
    """The connection is never parked. ``fast``: whole frames take the fast path; else Autobahn parses everything."""

    def __init__(self, fast: bool) -> None:
        self.node = node_of(clients.FakeNode, clients)
        if not fast:
            self.node.factory.protocol.process_fast = lambda self, data: data

    def play(self, pieces: list[bytes]) -> Outcome:
        """Send all pieces and disconnect; return the outcome."""
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
    """The connection is parked before each piece, if possible."""

    def __init__(self) -> None:
        self.node = node_of(parking.ParkingNode, parking)

    def play(self, pieces: list[bytes]) -> Outcome:
        """Send all pieces and disconnect; return the outcome."""
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
    # The server may have closed the connection.
    with contextlib.suppress(BrokenPipeError):
        there.send(piece)


def compare_with_stock(data: bytes, outcome: Outcome) -> None:
    """Assert the same behavior as stock Autobahn, up to a close frame of the server."""
    sent = complete_frames(outcome.sent)
    assert b"".join(frame_of(*one) for one in sent) == outcome.sent
    codes = [opcode for opcode, _ in sent]
    assert codes.count(CLOSE) <= 1
    assert CLOSE not in codes[:-1]
    messages = [message for what, *arguments in outcome.seen for message in arguments if what == "message"]
    assert all(len(message) <= MAX_MESSAGE_SIZE for message in messages)
    if any(message[:1] == b"!" for message in messages):
        return
    expected = run_autobahn(data, MAX_MESSAGE_SIZE)
    assert messages == expected.messages, (messages, expected)
    assert [payload for opcode, payload in sent if opcode == PONG] == expected.pongs
    assert [payload[:2] for opcode, payload in sent if opcode == CLOSE] == expected.closes
    assert all(opcode in (PONG, CLOSE) for opcode in codes)


def frame_of(opcode: int, payload: bytes) -> bytes:
    """Encode a server's frame without the gateway's code."""
    return build_frame(opcode, payload, masked=False)
