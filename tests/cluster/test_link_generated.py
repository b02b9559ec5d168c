"""Tests of gateway.cluster.peer_connection with generated input: what another node may say on a link that is open."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.protocol.frames import PING, PONG, encode
from tests.cluster.test_link import PeerConnectionCase
from tests.edge.fakes import build_frame

payloads = st.text(max_size=20).map(str.encode)
whole = payloads.map(encode) | st.sampled_from([encode(b"p", PING), encode(b"", PONG), encode(b"x" * 300)])
fragments = payloads.map(
    lambda payload: build_frame(1, payload, fin=False, masked=False) + build_frame(0, b"", masked=False)
)
others = st.sampled_from(
    [
        build_frame(2, b"b", masked=False),
        build_frame(1, b"\xff", masked=False),
        build_frame(1, b"m"),
        build_frame(9, b"p" * 126, masked=False),
    ]
    + [
        build_frame(8, b"\x03\xe8", masked=False),
        build_frame(3, b"", masked=False),
        build_frame(0, b"", masked=False),
        b"\x81\x7f\xff",
    ]
)
said = st.lists(whole | whole | fragments | others | st.binary(max_size=9), max_size=6).map(b"".join)


class GeneratedInputTests(PeerConnectionCase):
    def receive(self, pieces: list[bytes]) -> tuple[list[bytes], bool]:
        """What it handed on of these, and whether it is open afterwards."""
        self.setUp()
        link = self.connected()
        for piece in pieces:
            self.peer.protocol.dataReceived(piece)
        return self.received, link.state == link.STATE_OPEN

    @settings(deadline=None, max_examples=100)
    @given(said, st.integers(1, 20))
    @example(
        encode(b"one")
        + build_frame(1, b"a", fin=False, masked=False)
        + build_frame(0, b"b", masked=False)
        + encode(b"c"),
        1,
    )
    def test_however_it_is_cut(self, data: bytes, size: int) -> None:
        """The same is handed on, each of it UTF-8, and nothing is logged, which would fail this."""
        expected = self.receive([data])
        self.assertEqual(self.receive([data[at : at + size] for at in range(0, len(data), size)]), expected)
        for payload in expected[0]:
            payload.decode()

    @settings(deadline=None, max_examples=50)
    @given(st.lists(payloads, max_size=5))
    def test_all_of_it(self, sent: list[bytes]) -> None:
        self.assertEqual(self.receive([b"".join(map(encode, sent))]), (sent, True))
