"""The remote end of a peer connection, in memory, and a reactor that connects to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone, ConnectionRefusedError
from twisted.internet.interfaces import IReactorPluggableNameResolver
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.cluster.peer_connection import ATTEMPT_DELAY
from gateway.protocol.frames import TEXT, decode, encode
from gateway.registry.interface import Location, NodeStatus
from gateway.testing import MemoryTransport

A, B, C = (f"{digit * 8}-0000-4000-8000-000000000000" for digit in "abc")
URL = "ws://b.example:8081"
LOCAL_ADDRESS, PEER_ADDRESS = IPv4Address("TCP", "192.0.2.1", 1), IPv4Address("TCP", "192.0.2.2", 8081)


def location(client_id: str = "x", generation: int = 7, node_id: str = B, url: str = URL) -> Location:
    return Location(client_id, node_id, "b", url, generation, 0.0, "192.0.2.9:4711")


def node_status(node_id: str = B, url: str = URL) -> NodeStatus:
    return NodeStatus(node_id, "b", url, url, 0, 9, "up", 0.0)


class FakeTransport(MemoryTransport):
    """A transport whose unsent bytes can be counted, like those of a real one."""

    offset = 0
    _tempDataLen = 0

    @property
    def dataBuffer(self) -> bytes:
        return b"".join(self._unsent)


class FakeResolver:
    """Resolves every name to the same host."""

    def resolveHostName(self, receiver: Any, host: str, portNumber: int = 0, *args: object, **kwargs: object) -> None:
        receiver.resolutionBegan(self)
        receiver.addressResolved(IPv4Address("TCP", "192.0.2.2", portNumber))
        receiver.resolutionComplete()


@implementer(IReactorPluggableNameResolver)
class FakeNetwork(MemoryReactorClock):
    """A reactor whose outgoing connections the test accepts or refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.nameResolver = FakeResolver()
        self.peers: list[RemotePeer] = []

    def attempts(self) -> int:
        """Return the number of connection attempts."""
        return len(self.tcpClients)

    def refuse(self) -> None:
        """Refuse the latest attempt."""
        factory, connector = self.tcpClients[-1][2], self.connectors[-1]
        factory.clientConnectionFailed(connector, Failure(ConnectionRefusedError()))
        # After this the endpoint gives up: there is no other address.
        self.advance(ATTEMPT_DELAY)

    def accept(self) -> RemotePeer:
        """Accept the latest attempt."""
        self.peers.append(RemotePeer(self.tcpClients[-1][2]))
        return self.peers[-1]

    def open(self) -> RemotePeer:
        """Accept the latest attempt, and do the opening handshake."""
        return self.accept().open()


class RemotePeer:
    """The remote end of one connection."""

    def __init__(self, factory: Any) -> None:
        self.transport = FakeTransport(LOCAL_ADDRESS, PEER_ADDRESS)
        self.protocol = factory.buildProtocol(PEER_ADDRESS)
        self.protocol.makeConnection(self.transport)
        self.http_request = self.transport.take_unsent()
        self.disconnected = False

    @property
    def authorization(self) -> str:
        return re.search(rb"\r\nAuthorization: (.*)\r\n", self.http_request)[1].decode()

    def open(self, headers: bytes = b"") -> RemotePeer:
        """Do the opening handshake, with these lines of more headers."""
        key = re.search(rb"\r\nSec-WebSocket-Key: (.*)\r\n", self.http_request)[1]
        accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self.send(
            head
            + b"Sec-WebSocket-Accept: %b\r\nSec-WebSocket-Protocol: wsgateway.jsonrpc.v1\r\n" % accept
            + headers
            + b"\r\n"
        )
        return self

    def refuse(self, status: int, word: str, message: str) -> None:
        body = json.dumps({"error": word, "message": message}).encode()
        self.send(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body))
        self.disconnect()

    def send(self, data: bytes) -> None:
        self.protocol.dataReceived(data)

    def frames(self) -> list[tuple[int, bytes]]:
        """Take the frames received since the last call: opcode and payload."""
        data, offset, frames = self.transport.take_unsent(), 0, []
        while offset < len(data):
            if data[offset] == 0x88:
                size, key = data[offset + 1] & 127, data[offset + 2 : offset + 6]
                payload = bytes(byte ^ key[i % 4] for i, byte in enumerate(data[offset + 6 : offset + 6 + size]))
                frame: Any = (8, payload, offset + 6 + size)
            else:
                frame = decode(data, offset)
            assert frame is not None, data[offset : offset + 20]
            frames.append(frame[:2])
            offset = frame[2]
        return frames

    def payloads(self) -> list[bytes]:
        """Take the text messages received since the last call."""
        return [payload for opcode, payload in self.frames() if opcode == TEXT]

    def requests(self) -> list[dict[str, Any]]:
        """Take the text messages received since the last call, decoded."""
        return [json.loads(payload) for payload in self.payloads()]

    def send_messages(self, *payloads: bytes) -> None:
        """Send messages, which arrive in one read."""
        self.send(b"".join(map(encode, payloads)))

    def respond(self, request: dict[str, Any], result: bytes = b"null") -> None:
        self.send_messages(b'{"jsonrpc":"2.0","id":"%b","result":%b}' % (request["id"].encode(), result))

    def respond_error(self, request: dict[str, Any], code: int, more: bytes = b"", data: Any = None) -> None:
        error = json.dumps({"code": code, "message": "m", **({} if data is None else {"data": data})}).encode()
        self.send_messages(b'{"jsonrpc":"2.0","id":"%b","error":%b%b}' % (request["id"].encode(), error, more))

    def disconnect(self, reason: Exception | None = None) -> None:
        if not self.disconnected:
            self.disconnected = True
            self.protocol.connectionLost(Failure(reason or ConnectionDone()))
