"""Messages of the load generator in the protocol of each server: the same calls and notifications for all.

All messages of one kind have the same length, so that the load finds the next message without parsing: client ids and
call ids have a fixed number of digits. Messages are masked in advance, except for the id in the response of a client.
"""

from __future__ import annotations

from benchmarks import measure

#: params of a call or notification, and result: 100 bytes
PAYLOAD = b'{"data":"%s"}' % (b"x" * 89)
FIRST_ID = 100_000_000
TEXT, PING, PONG = 1, 9, 10
MASK = b"\x37\xfa\x21\x3d"


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """Encode a frame of a client."""
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    masked = int.from_bytes(payload, "little") ^ masks(0, size)
    return bytes((0x80 | opcode,)) + length + MASK + masked.to_bytes(size, "little")


def masks(at: int, size: int) -> int:
    """Return the mask of ``size`` bytes of a payload from position ``at``, as a little-endian integer."""
    return int.from_bytes((MASK * (at + size))[at : at + size], "little")


def framed(payload: bytes, part: bytes) -> tuple[bytes, int, bytes]:
    """Encode a frame with a variable part: return the bytes before it, its mask, and the bytes after it."""
    encoded, at = frame(payload), payload.index(part)
    begin = len(encoded) - len(payload) + at
    return encoded[:begin], masks(at, len(part)), encoded[begin + len(part) :]


def client_id(number: int) -> str:
    return f"agent-{number:05}"


class Dialect:
    """Protocol of the minimal gateways in ``benchmarks/peers``; see ``gateway.py`` there."""

    #: bytes before and after the id of a call that the client receives
    at_client = (b'"id":"', b'"')
    #: the same for the id of a response that the backend receives
    at_backend = (b'"id":', b",")
    #: the same for the client id in a notification that the backend receives
    sender = (b'"client":"', b'"')
    #: whether the backend connects by WebSocket
    backend_is_websocket = True

    def hello_client(self, number: int) -> bytes:
        """Return what a client sends first after the opening handshake, if anything; it then waits for a reply."""
        return b""

    def hello_backend(self) -> bytes:
        return b""

    def call(self, number: int) -> bytes:
        """Encode a call of the backend to a client, with the id ``FIRST_ID + number``."""
        return frame(
            b'{"id":%d,"client":"%s","method":"echo","params":%s}'
            % (FIRST_ID + number, client_id(number).encode(), PAYLOAD)
        )

    def answer(self, call_id: bytes) -> bytes:
        """Encode the payload of a client's response."""
        return b'{"id":"%s","result":%s}' % (call_id, PAYLOAD)

    def notification(self, number: int) -> bytes:
        """Encode a notification of the backend to a client."""
        return frame(b'{"client":"%s","method":"news","params":%s}' % (client_id(number).encode(), PAYLOAD))

    def event(self, number: int) -> bytes:
        """Encode a notification of a client."""
        return frame(b'{"method":"done","params":%s}' % PAYLOAD)


class Node(Dialect):
    """JSON-RPC 2.0 of a node."""

    def hello_backend(self) -> bytes:
        return frame(b'{"jsonrpc":"2.0","id":1,"method":"events.subscribe","params":{"kinds":["message"]}}')

    def call(self, number: int) -> bytes:
        return frame(
            b'{"jsonrpc":"2.0","id":%d,"method":"client.call","params":{"client":"%s","method":"echo","params":%s}}'
            % (FIRST_ID + number, client_id(number).encode(), PAYLOAD)
        )

    def answer(self, call_id: bytes) -> bytes:
        return b'{"jsonrpc":"2.0","id":"%s","result":%s}' % (call_id, PAYLOAD)

    def notification(self, number: int) -> bytes:
        return frame(
            b'{"jsonrpc":"2.0","method":"client.notify","params":{"client":"%s","method":"news","params":%s}}'
            % (client_id(number).encode(), PAYLOAD)
        )

    def event(self, number: int) -> bytes:
        return frame(b'{"jsonrpc":"2.0","method":"done","params":%s}' % PAYLOAD)


class Nats(Dialect):
    """NATS: a subject for each agent, and request-reply for calls. The backend uses TCP."""

    at_client = (b" _INBOX.b.", b" ")
    at_backend = (b" _INBOX.b.", b" ")
    sender = (b" events.", b" ")
    backend_is_websocket = False
    _CONNECT = b'CONNECT {"verbose":false,"pedantic":false,"lang":"load","version":"1","protocol":1}\r\n'

    def hello_client(self, number: int) -> bytes:
        return frame(b"%sSUB agent.%s 1\r\nPING\r\n" % (self._CONNECT, client_id(number).encode()))

    def hello_backend(self) -> bytes:
        return b"%sSUB _INBOX.b.* 1\r\nSUB events.* 2\r\nPING\r\n" % self._CONNECT

    def _publish(self, subject: str, reply: str, body: bytes) -> bytes:
        return b"PUB %s %s%d\r\n%s\r\n" % (subject.encode(), reply.encode(), len(body), body)

    def call(self, number: int) -> bytes:
        body = b'{"method":"echo","params":%s}' % PAYLOAD
        return self._publish(f"agent.{client_id(number)}", f"_INBOX.b.{FIRST_ID + number} ", body)

    def answer(self, call_id: bytes) -> bytes:
        return self._publish(f"_INBOX.b.{call_id.decode()}", "", b'{"result":%s}' % PAYLOAD)

    def notification(self, number: int) -> bytes:
        return self._publish(f"agent.{client_id(number)}", "", b'{"method":"news","params":%s}' % PAYLOAD)

    def event(self, number: int) -> bytes:
        return frame(self._publish(f"events.{client_id(number)}", "", b'{"method":"done","params":%s}' % PAYLOAD))


def dialect_of(name: str) -> Dialect:
    return Node() if name == measure.NODE else Nats() if name == "nats" else Dialect()
