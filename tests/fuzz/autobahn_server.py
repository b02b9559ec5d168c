"""Reference server: unmodified Autobahn with the settings of a node."""

from __future__ import annotations

import functools
from typing import Any

import attrs
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.internet.task import Clock

from gateway.websocket.slim_protocol import NullLogger
from tests.builders.frames import parse_frames
from tests.fakes.clients import FakeTransport

CLOSE, PONG = 8, 10


@attrs.define
class Expected:
    """What Autobahn did until it sent a close frame."""

    messages: list[bytes] = attrs.Factory(list)
    pongs: list[bytes] = attrs.Factory(list)
    #: the code of its close frame, as bytes; for binary messages, the code that a node sends
    closes: list[bytes] = attrs.Factory(list)


class _Binary(Exception):
    """A binary message has begun, for which a node closes the connection."""


class _Protocol(WebSocketServerProtocol):  # type: ignore[misc]
    log = NullLogger()
    expected: Expected

    def onMessageBegin(self, isBinary: bool) -> None:
        if isBinary:
            raise _Binary
        super().onMessageBegin(isBinary)

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.expected.messages.append(payload)


class _Factory(WebSocketServerFactory):  # type: ignore[misc]
    log = NullLogger()
    noisy = False


@functools.cache
def _factory(max_message_size: int) -> Any:
    factory = _Factory(reactor=Clock())
    factory.setProtocolOptions(
        maxMessagePayloadSize=max_message_size,
        failByDrop=False,
        echoCloseCodeReason=False,
        # Autobahn sets these timers on the global reactor.
        openHandshakeTimeout=0,
        closeHandshakeTimeout=0,
    )
    return factory


def run_autobahn(data: bytes, max_message_size: int) -> Expected:
    """Receive ``data`` on an open connection, with messages of at most ``max_message_size`` bytes."""
    expected = Expected()
    protocol: Any = _Protocol()
    protocol.factory = _factory(max_message_size)
    transport = FakeTransport()
    protocol.makeConnection(transport)
    transport.registerProducer(protocol, True)
    protocol.state = protocol.STATE_OPEN
    protocol.websocket_version = 13
    protocol.inside_message = False
    protocol.current_frame = None
    protocol.expected = expected
    binary = False
    try:
        protocol.dataReceived(data)
    except _Binary:
        binary = True
    sent = parse_frames(transport.pop_written())
    expected.pongs = [payload for opcode, payload in sent if opcode == PONG]
    expected.closes = [payload[:2] for opcode, payload in sent if opcode == CLOSE][:1]
    if binary and not expected.closes:
        expected.closes = [b"\x03\xeb"]
    return expected
