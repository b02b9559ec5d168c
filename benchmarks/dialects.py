"""What a load says to each kind of server: the same calls and notifications, in that server's words.

Every message of one kind has one length, so that a load knows where the next begins without reading it: client ids and
call ids have a fixed number of digits. Everything is masked beforehand, but for the id in a client's response.
"""

from __future__ import annotations

from benchmarks import measure

#: bytes of the params of a call or notification, and of a result
PAYLOAD = b'{"data":"%s"}' % (b"x" * 89)
FIRST_ID = 100_000_000
TEXT, PING, PONG = 1, 9, 10
MASK = b"\x37\xfa\x21\x3d"


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """A whole frame from a client."""
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    masked = int.from_bytes(payload, "little") ^ masks(0, size)
    return bytes((0x80 | opcode,)) + length + MASK + masked.to_bytes(size, "little")


def masks(at: int, size: int) -> int:
    """What so many bytes of a payload, from ``at`` on, are XORed with, as a number with the lowest byte first."""
    return int.from_bytes((MASK * (at + size))[at : at + size], "little")


def framed(payload: bytes, part: bytes) -> tuple[bytes, int, bytes]:
    """A frame in three pieces: what stands before a part of the payload, the masks of that part, what stands after."""
    whole, at = frame(payload), payload.index(part)
    begin = len(whole) - len(payload) + at
    return whole[:begin], masks(at, len(part)), whole[begin + len(part) :]


def client_id(number: int) -> str:
    return f"agent-{number:05}"


class Dialect:
    """The hand-written gateways of ``benchmarks/peers``: see ``gateway.py`` there."""

    #: what stands before the id of a call at the client, and after it
    at_client = (b'"id":"', b'"')
    #: the same for a response at the backend, and for the client's id in a notification from it
    at_backend = (b'"id":', b",")
    sender = (b'"client":"', b'"')
    #: what the backend speaks WebSocket for
    backend_is_websocket = True

    def hello_client(self, number: int) -> bytes:
        """What a client says first, if anything, after the opening handshake; it waits for an answer then."""
        return b""

    def hello_backend(self) -> bytes:
        return b""

    def call(self, number: int) -> bytes:
        """A call to that client, as the backend sends it; its id is ``FIRST_ID + number``."""
        return frame(
            b'{"id":%d,"client":"%s","method":"echo","params":%s}'
            % (FIRST_ID + number, client_id(number).encode(), PAYLOAD)
        )

    def answer(self, call_id: bytes) -> bytes:
        """A client's response, to be framed."""
        return b'{"id":"%s","result":%s}' % (call_id, PAYLOAD)

    def notification(self, number: int) -> bytes:
        """A notification to that client, as the backend sends it."""
        return frame(b'{"client":"%s","method":"news","params":%s}' % (client_id(number).encode(), PAYLOAD))

    def event(self, number: int) -> bytes:
        """A notification from that client, as it sends it."""
        return frame(b'{"method":"done","params":%s}' % PAYLOAD)


class Node(Dialect):
    """The node's JSON-RPC 2.0."""

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
    """NATS: a subject for each agent, request-reply for calls. The backend speaks it over TCP."""

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
