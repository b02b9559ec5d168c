"""A fake server of gateway.websocket.client, as bytes."""

from __future__ import annotations

import base64
import hashlib
import re
import struct

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from gateway.protocol.uri import parse_uri
from gateway.testing import MemoryTransport
from gateway.websocket.client import ClientConnection, ClientConnectionFactory, ConnectionOptions

TARGET = parse_uri("ws://gw:8080/v1/connect?client_id=x")
CLIENT_ADDRESS, SERVER_ADDRESS = IPv4Address("TCP", "192.0.2.1", 1), IPv4Address("TCP", "192.0.2.2", 2)


def frame(opcode: int, payload: bytes = b"", *, first: int = 0x80) -> bytes:
    """Encode a server's frame (RFC 6455, section 5.2). ``first`` has the FIN and extension bits."""
    if len(payload) < 126:
        length = bytes([len(payload)])
    elif len(payload) < 65536:
        length = struct.pack("!BH", 126, len(payload))
    else:
        length = struct.pack("!BQ", 127, len(payload))
    return bytes([first | opcode]) + length + payload


def close_frame(code: int, reason: bytes = b"") -> bytes:
    return frame(8, struct.pack("!H", code) + reason)


class FakeServer:
    """A client connection whose server the test plays."""

    def __init__(self, clock: Clock, target: str = TARGET.url) -> None:
        self.messages: list[bytes] = []
        options = ConnectionOptions(
            target=parse_uri(target),
            headers={"Authorization": "Bearer T"},
            clock=clock,
            max_message_size=100000,
            idle_timeout=120.0,
        )
        self.connection = ClientConnection(options)
        self.connection.on_message = self.messages.append
        factory = ClientConnectionFactory(self.connection, clock)
        self.transport = MemoryTransport(CLIENT_ADDRESS, SERVER_ADDRESS)
        protocol = factory.buildProtocol(SERVER_ADDRESS)
        protocol.makeConnection(self.transport)
        self.request = self.transport.take_unsent()

    def send(self, data: bytes) -> None:
        self.connection.dataReceived(data)

    def handshake_response(self) -> bytes:
        """Return the response that opens the connection."""
        match = re.search(rb"\r\nSec-WebSocket-Key: (.*)\r\n", self.request)
        assert match is not None
        accept = hashlib.sha1(match[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        return (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\nSec-WebSocket-Protocol: wsgateway.jsonrpc.v1\r\n\r\n"
            % base64.b64encode(accept)
        )

    def complete_handshake(self) -> FakeServer:
        self.send(self.handshake_response())
        return self

    def received_frames(self) -> list[tuple[int, bytes]]:
        """Return the frames that the client has sent: opcode and payload, unmasked."""
        data = self.transport.take_unsent()
        frames = []
        while data:
            opcode, length = data[0] & 15, data[1] & 127
            assert data[1] & 128, "a client masks every frame"
            offset = 2
            if length == 126:
                (length,), offset = struct.unpack("!H", data[2:4]), 4
            elif length == 127:
                (length,), offset = struct.unpack("!Q", data[2:10]), 10
            mask = data[offset : offset + 4]
            payload = data[offset + 4 : offset + 4 + length]
            frames.append((opcode, bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))))
            data = data[offset + 4 + length :]
        return frames

    def lose_connection(self) -> None:
        self.connection.connectionLost(Failure(ConnectionDone()))
