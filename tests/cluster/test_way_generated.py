"""Tests of gateway.cluster.relay_client with generated input: what may come in answer to a request for a relay."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.relay_client import MAX_EARLY_DATA, RelayHandshake, RelayRefusedError
from gateway.protocol.handshake import InvalidResponseError, RequestRefusedError, accept_key
from tests.edge.fakes import WEBSOCKET_KEY

UPGRADE_RESPONSE = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    f"Sec-WebSocket-Accept: {accept_key(WEBSOCKET_KEY)}\r\n\r\n"
).encode()
REFUSAL_RESPONSE = b'HTTP/1.1 429 No\r\nContent-Length: 31\r\n\r\n{"error":"rate","message":"no"}\n'
responses = st.sampled_from(
    [
        UPGRADE_RESPONSE,
        UPGRADE_RESPONSE + b"\x81\x00",
        REFUSAL_RESPONSE,
        REFUSAL_RESPONSE[:-5],
        b"HTTP/1.1 503 No\r\n\r\n",
    ]
)


class FakeSocketRelays:
    """Nobody is relayed here."""


@st.composite
def mutated_response(draw: st.DrawFn) -> bytes:
    """An answer with some bytes changed, cut out or put in."""
    data = bytearray(draw(responses))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 6))] = draw(
            st.sampled_from([b"", b"\r\n", b"9" * 30, b":"]) | st.binary(max_size=4)
        )
    return bytes(data)


class GeneratedResponseTests(SynchronousTestCase):
    def handshake(self, pieces: list[bytes]) -> tuple[str, bytes]:
        """What comes of these: ``open``, or the error, and then what is held for the client."""
        way = RelayHandshake(FakeSocketRelays(), "x", "node", WEBSOCKET_KEY, ())  # type: ignore[arg-type]
        transport = StringTransport()
        transport.abortConnection = lambda: None  # type: ignore[method-assign]
        way.makeConnection(transport)
        came: list[object] = []
        way.send_request(b"GET").addBoth(came.append)
        for piece in pieces:
            way.dataReceived(piece)
        self.assertLessEqual(len(came), 1)
        if came == [None]:
            self.assertEqual(transport.producerState, "paused")
            return "open", way._buffer
        way.connectionLost(Failure(ConnectionDone()))
        (failure,) = came
        assert isinstance(failure, Failure)
        self.assertTrue(
            failure.check(RequestRefusedError, RelayRefusedError, InvalidResponseError, ConnectionDone), failure
        )
        return f"{failure.type.__name__} {failure.value}", b""

    @settings(deadline=None, max_examples=200)
    @given(mutated_response() | st.binary(max_size=40), st.integers(1, 30))
    @example(UPGRADE_RESPONSE + b"x" * (MAX_EARLY_DATA - 1), 65536)
    @example(REFUSAL_RESPONSE.replace(b"31", b"9" * 5000), 1000)
    def test_however_it_is_cut(self, data: bytes, size: int) -> None:
        whole = self.handshake([data])
        self.assertEqual(self.handshake([data[at : at + size] for at in range(0, len(data), size)]), whole)

    def test_both_kinds(self) -> None:
        self.assertEqual(self.handshake([UPGRADE_RESPONSE + b"\x81\x00"]), ("open", b"\x81\x00"))
        self.assertEqual(self.handshake([REFUSAL_RESPONSE])[0], "RequestRefusedError 429 rate: no")
