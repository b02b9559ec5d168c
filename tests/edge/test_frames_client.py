"""Tests of what a client needs of gateway.protocol.frames: it masks what it sends, and a server does not."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.frames import MAX_PAYLOAD, PING, PONG, TEXT, decode_unmasked, encode_masked, is_partial_unmasked
from tests.edge.test_frames import BOUNDARIES, KEY, NOT_UTF_8, build, reference


class MaskedTest(SynchronousTestCase):
    """encode_masked()"""

    def check(self, payload: bytes, key: bytes) -> None:
        frame = encode_masked(payload, int.from_bytes(key, "little"))
        self.assertIs(type(frame), bytes)
        self.assertEqual(frame, build(payload, key=key))

    def test_example_of_the_rfc(self) -> None:
        """RFC 6455, section 5.7"""
        frame = encode_masked(b"Hello", int.from_bytes(KEY, "little"))
        self.assertEqual(frame, b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58")

    def test_sizes(self) -> None:
        for size in (*BOUNDARIES, 1019, 1020, 1021, 1022, 1023, 1024, 1025):
            self.check(b"x" * size, KEY)

    def test_all_small_sizes_and_keys(self) -> None:
        for size in range(130):
            for key in (KEY, bytes(4), b"\0\0\0\1", b"\x80\0\0\0", b"\xff\xff\xff\xff"):
                self.check(bytes(range(128))[:size] + bytes(max(0, size - 128)), key)

    @settings(deadline=None, max_examples=150)
    @given(st.binary(max_size=400), st.binary(min_size=4, max_size=4))
    def test_generated(self, payload: bytes, key: bytes) -> None:
        self.check(payload, key)


class UnmaskedTest(SynchronousTestCase):
    """decode_unmasked() and is_unmasked_beginning()"""

    def check(self, data: bytes, at: int = 0, most: int = MAX_PAYLOAD) -> tuple[int, bytes, int] | None:
        decoded = decode_unmasked(data, at, most)
        expected = reference(data, at, most, masked=False)
        if decoded != expected:
            self.fail(f"{data[at : at + 20]!r}, most {most}: {decoded!r:.60}, {expected!r:.60}")
        return decoded

    def test_example_of_the_rfc(self) -> None:
        """RFC 6455, section 5.7"""
        self.assertEqual(decode_unmasked(b"\x81\x05Hello", 0), (TEXT, b"Hello", 7))
        self.assertEqual(decode_unmasked(b"\x89\x05Hello", 0), (PING, b"Hello", 7))
        self.assertIsNone(decode_unmasked(b"\x01\x03Hel\x80\x02lo", 0))

    def test_sizes(self) -> None:
        for size, opcode in itertools.product(BOUNDARIES, (TEXT, PING, PONG)):
            decoded = self.check(build(b"x" * size, opcode, masked=False))
            self.assertEqual(decoded is not None, size <= (65535 if opcode == TEXT else 125), size)

    def test_every_first_two_bytes(self) -> None:
        for first, second in itertools.product(range(256), range(256)):
            decoded = self.check(bytes((first, second)) + b"\0\x7e" + b"x" * 126)
            self.assertEqual(
                decoded is not None, (first == 0x81 and second < 127) or (first in (0x89, 0x8A) and second < 126)
            )

    def test_most(self) -> None:
        for most in (1, 125, 126, 1000, 65535):
            for size in {0, most - 1, most, most + 1}:
                whole = build(b"x" * size, masked=False)
                self.assertEqual(self.check(whole, most=most) is not None, size <= min(most, 65535))
                if size:
                    self.assertEqual(is_partial_unmasked(whole[:-1], most), size <= min(most, 65535))

    def test_truncated_at_every_byte(self) -> None:
        for payload in (b"", b"{}", b"x" * 130):
            whole = build(payload, masked=False)
            for end in range(len(whole)):
                self.assertIsNone(self.check(whole[:end]))
                self.assertTrue(is_partial_unmasked(whole[:end]), (payload, end))
            self.assertEqual(self.check(whole)[2], len(whole))  # type: ignore[index]
            self.assertFalse(is_partial_unmasked(whole))

    def test_invalid_utf_8(self) -> None:
        for wrong in NOT_UTF_8:
            self.assertIsNone(self.check(build(b"a" + wrong, masked=False)), wrong)
            self.assertEqual(self.check(build(wrong, PING, masked=False))[1], wrong)  # type: ignore[index]

    def test_of_what_is_not_read_here(self) -> None:
        """Autobahn is to see it at once, and answer what is wrong."""
        for data in (
            build(b"p", PING, masked=False),
            build(b"", 8, masked=False),
            build(b"a", 0, masked=False),
            build(b"a", fin=False, masked=False),
            build(b"a", rsv=4, masked=False),
            build(b"a"),
            build(b"x" * 65536, masked=False)[:20],
        ):
            for end in range(2, len(data)):
                self.assertFalse(is_partial_unmasked(data[:end]), data[:end])

    frames = st.builds(
        build,
        st.one_of(st.binary(max_size=140), st.text(max_size=50).map(str.encode)),
        st.one_of(st.sampled_from([TEXT, PING, PONG]), st.integers(0, 15)),
        fin=st.sampled_from([True, True, True, False]),
        rsv=st.sampled_from([0, 0, 0, 1, 2, 4, 7]),
        masked=st.sampled_from([False, False, False, True]),
        width=st.sampled_from([None, None, None, 2, 8]),
    )

    @settings(deadline=None, max_examples=150)
    @given(st.binary(max_size=9), frames, st.binary(max_size=9), st.integers(-30, 0), st.sampled_from([5, 125, 65535]))
    def test_generated(self, before: bytes, frame: bytes, after: bytes, cut: int, most: int) -> None:
        data = before + frame + after
        self.check(data[: len(data) + cut] if cut else data, len(before), most)

    @settings(deadline=None, max_examples=150)
    @given(st.one_of(st.binary(max_size=12), st.binary(max_size=10).map(b"\x81".__add__), frames))
    def test_generated_beginnings(self, data: bytes) -> None:
        """Something can follow so that it becomes a message, and only then."""
        whole = data + b"\x81\0"[len(data) :]
        if whole[1] == 126:
            whole += b"\0\0\x7e\x7e"[len(whole) :]
        whole += bytes(70000)
        decoded = reference(data, 0, MAX_PAYLOAD, False, masked=False)
        expected = decoded is None and reference(whole, 0, MAX_PAYLOAD, False, masked=False)
        self.assertEqual(is_partial_unmasked(data), bool(expected) and expected[0] == TEXT)
