"""Tests of gateway.protocol.frames, against a byte-by-byte encoder and decoder (RFC 6455, section 5.2)."""

from __future__ import annotations

import ast
import inspect
import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

import gateway.protocol.frames
from gateway.protocol.frames import (
    EMPTY_PING,
    MAX_PAYLOAD,
    PING,
    PONG,
    TEXT,
    decode,
    decode_unmasked,
    encode,
    encode_masked,
    is_partial,
    is_partial_unmasked,
)

KEY = b"\x37\xfa\x21\x3d"
BOUNDARIES = (0, 1, 2, 3, 4, 5, 7, 8, 124, 125, 126, 127, 128, 255, 256, 1000, 65533, 65534, 65535, 65536, 65537)
NOT_UTF_8 = (
    b"\x80",
    b"\xbf",
    b"\xff",
    b"\xfe",
    b"\xc3",
    b"\xe2\x82",
    b"\xf0\x9f\x98",
    b"\xc0\x80",
    b"\xc1\xbf",
    b"\xe0\x80\x80",
    b"\xf0\x80\x80\x80",
    b"\xed\xa0\x80",
    b"\xed\xbf\xbf",
    b"\xf4\x90\x80\x80",
    b"\xf5\x80\x80\x80",
)


def build(
    payload: bytes,
    opcode: int = TEXT,
    *,
    fin: bool = True,
    rsv: int = 0,
    masked: bool = True,
    key: bytes = KEY,
    width: int | None = None,
) -> bytes:
    """Encode a frame, valid or not. ``width`` is the size of the extended length: 0, 2 or 8 bytes."""
    size = len(payload)
    if width is None:
        width = 0 if size < 126 else 2 if size < 65536 else 8
    length = {0: bytes((size & 127,)), 2: b"\x7e", 8: b"\x7f"}[width]
    head = bytes((fin << 7 | rsv << 4 | opcode, masked << 7 | length[0]))
    if width:
        head += size.to_bytes(width, "big")
    if not masked:
        return head + payload
    return head + key + bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))


def reference(
    data: bytes, at: int, max_size: int, check_text: bool = True, masked: bool = True
) -> tuple[int, bytes, int] | None:
    """Return the expected result of :func:`decode`, or of :func:`decode_unmasked`."""
    rest = iter(data[at:])

    def number(size: int) -> int:
        value = 0
        for _ in range(size):
            value = value * 256 + next(rest)
        return value

    try:
        first, second = next(rest), next(rest)
        length, width = second % 128, 0
        if length > 125:
            width = 2 if length == 126 else 8
            length = number(width)
        key = [next(rest) for _ in range(4)] if masked else [0, 0, 0, 0]
        if first not in (0x81, 0x89, 0x8A) or (second > 127) != masked:
            return None
        if length > max_size or (first != 0x81 and length > 125) or length <= {0: -1, 2: 125, 8: 65535}[width]:
            return None
        payload = bytes(next(rest) ^ key[index % 4] for index in range(length))
    except (StopIteration, RuntimeError):
        return None
    if check_text and first == 0x81 and not is_utf_8(payload):
        return None
    return first % 16, payload, at + 2 + width + (4 if masked else 0) + length


def is_utf_8(data: bytes) -> bool:
    """Check UTF-8 by the table of RFC 3629, section 4."""
    tails = [
        ((0x00, 0x7F),),
        ((0xC2, 0xDF), (0x80, 0xBF)),
        ((0xE0, 0xE0), (0xA0, 0xBF), (0x80, 0xBF)),
        ((0xE1, 0xEC), (0x80, 0xBF), (0x80, 0xBF)),
        ((0xED, 0xED), (0x80, 0x9F), (0x80, 0xBF)),
        ((0xEE, 0xEF), (0x80, 0xBF), (0x80, 0xBF)),
        ((0xF0, 0xF0), (0x90, 0xBF), (0x80, 0xBF), (0x80, 0xBF)),
        ((0xF1, 0xF3), (0x80, 0xBF), (0x80, 0xBF), (0x80, 0xBF)),
        ((0xF4, 0xF4), (0x80, 0x8F), (0x80, 0xBF), (0x80, 0xBF)),
    ]
    at = 0
    while at < len(data):
        for ranges in tails:
            chunk = data[at : at + len(ranges)]
            if len(chunk) == len(ranges) and all(
                low <= byte <= high for byte, (low, high) in zip(chunk, ranges, strict=True)
            ):
                at += len(ranges)
                break
        else:
            return False
    return True


class DecodeTest(SynchronousTestCase):
    """decode()"""

    def check(self, data: bytes, at: int = 0, max_size: int = MAX_PAYLOAD) -> tuple[int, bytes, int] | None:
        decoded = decode(data, at, max_size)
        if decoded is not None:
            self.assertIs(type(decoded[1]), bytes)
        expected = reference(data, at, max_size)
        if decoded != expected:
            self.fail(
                f"{data[at : at + 20]!r}… of {len(data) - at} bytes, max_size {max_size}: {decoded!r:.60}, {expected!r:.60}"
            )
        return decoded

    def test_example_of_the_rfc(self) -> None:
        """RFC 6455, section 5.7"""
        self.assertEqual(decode(b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58", 0), (TEXT, b"Hello", 11))
        self.assertEqual(decode(b"\x8a\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58", 0), (PONG, b"Hello", 11))

    def test_sizes(self) -> None:
        for size, opcode in itertools.product(BOUNDARIES, (TEXT, PING, PONG)):
            decoded = self.check(build(b"x" * size, opcode))
            self.assertEqual(decoded is not None, size <= (65535 if opcode == TEXT else 125), size)

    def test_all_small_sizes_and_keys(self) -> None:
        """The payload is unmasked as one large integer."""
        for size in range(130):
            payload = bytes(range(size % 128)) + bytes(size - size % 128)
            for key in (KEY, bytes(4), b"\0\0\0\1", b"\x80\0\0\0", b"\xff\xff\xff\xff"):
                self.assertEqual(self.check(build(payload, key=key))[1], payload)  # type: ignore[index]

    def test_max_size(self) -> None:
        for max_size in (1, 125, 126, 1000, 65535):
            for size in {0, max_size - 1, max_size, max_size + 1}:
                decoded = self.check(build(b"x" * size), max_size=max_size)
                self.assertEqual(decoded is not None, size <= min(max_size, 65535))

    def test_every_first_byte(self) -> None:
        """FIN, the extension bits, and the opcode."""
        for first in range(256):
            for rest in (build(b"")[1:], build(b"{}")[1:], build(b"x" * 126)[1:]):
                decoded = self.check(bytes((first,)) + rest)
                self.assertEqual(decoded is not None, first == 0x81 or (first in (0x89, 0x8A) and len(rest) < 100))

    def test_every_second_byte(self) -> None:
        """The mask bit and the length."""
        for second, first in itertools.product(range(256), (0x81, 0x89, 0x8A)):
            self.check(bytes((first, second)) + b"\0\0\0\1" + b"x" * 150)

    def test_length_in_more_bytes_than_needed(self) -> None:
        for size, width in itertools.product((0, 1, 125, 126, 127, 65535), (2, 8)):
            decoded = self.check(build(b"x" * size, width=width))
            self.assertEqual(decoded is not None, width == 2 and size > 125)

    def test_huge_length(self) -> None:
        for length in (65536, 1 << 31, 1 << 32, 126 << 48, 200 << 48, 1 << 62, 1 << 63, (1 << 64) - 1):
            self.assertIsNone(self.check(b"\x81\xff" + length.to_bytes(8, "big") + KEY + b"x" * 300))

    def test_truncated_at_every_byte(self) -> None:
        for data in (build(b""), build(b"{}"), build(b"", PING), build(b"abc", PONG), build(b"x" * 130)):
            for end in range(len(data)):
                self.assertIsNone(self.check(data[:end]))
            self.assertEqual(self.check(data)[2], len(data))  # type: ignore[index]
        large = build(b"x" * 65535)
        for end in (0, 1, 2, 3, 4, 5, 7, 8, 9, 1000, 65535, len(large) - 1):
            self.assertIsNone(self.check(large[:end]))

    def test_invalid_utf_8_at_each_position(self) -> None:
        good = "ab\u00e9\u20ac\U0001f600c".encode() * 3
        self.assertIsNotNone(self.check(build(good)))
        for wrong, at in itertools.product(NOT_UTF_8, range(len(good) + 1)):
            self.assertIsNone(self.check(build(good[:at] + wrong + good[at:])), (wrong, at))

    def test_utf_8_cut_at_each_position(self) -> None:
        good = "ab\u00e9\u20ac\U0001f600\ud7ff\ue000\U0010ffff\0".encode()
        for end in range(len(good) + 1):
            self.check(build(good[:end]))

    def test_control_frames_carry_any_bytes(self) -> None:
        for wrong, opcode in itertools.product(NOT_UTF_8, (PING, PONG)):
            self.assertEqual(self.check(build(wrong, opcode))[:2], (opcode, wrong))  # type: ignore[index]

    def test_several_in_one_buffer(self) -> None:
        pieces = [build(b"one"), build(b"", PING), build(b"x" * 300), build(b"p", PONG), build(b""), build(b"last")]
        data, at, seen = b"".join(pieces), 0, []
        while at < len(data):
            opcode, payload, at = self.check(data, at)  # type: ignore[misc]
            seen.append((opcode, payload))
        self.assertEqual(seen, [(1, b"one"), (9, b""), (1, b"x" * 300), (10, b"p"), (1, b""), (1, b"last")])
        self.assertIsNone(self.check(data, at))

    frames = st.builds(
        build,
        st.one_of(st.binary(max_size=140), st.text(max_size=50).map(str.encode), st.just(b"\xe2\x82\xac" * 300)),
        st.one_of(st.sampled_from([TEXT, PING, PONG]), st.integers(0, 15)),
        fin=st.sampled_from([True, True, True, False]),
        rsv=st.sampled_from([0, 0, 0, 1, 2, 4, 7]),
        masked=st.sampled_from([True, True, True, False]),
        key=st.binary(min_size=4, max_size=4),
        width=st.sampled_from([None, None, None, 2, 8]),
    )

    @settings(deadline=None, max_examples=150)
    @given(st.binary(max_size=9), frames, st.binary(max_size=9), st.integers(-30, 0), st.sampled_from([5, 125, 65535]))
    def test_generated(self, before: bytes, frame: bytes, after: bytes, cut: int, max_size: int) -> None:
        data = before + frame + after
        self.check(data[: len(data) + cut] if cut else data, len(before), max_size)

    @settings(deadline=None, max_examples=150)
    @given(st.binary(max_size=300), st.integers(0, 300))
    @example(b"\x81\x80\0\0\0\0", 0)
    @example(b"", 0)
    def test_generated_bytes(self, data: bytes, at: int) -> None:
        self.check(data, min(at, len(data)))


class PartialFrameTest(SynchronousTestCase):
    """is_partial()"""

    def test_every_partial_frame(self) -> None:
        for size in (0, 1, 125, 126, 127, 1000):
            whole = build(b"x" * size)
            for end in range(len(whole)):
                self.assertTrue(is_partial(whole[:end]), (size, end))
            # A whole frame is not partial, whatever follows it.
            self.assertFalse(is_partial(whole))
            self.assertFalse(is_partial(whole + b"\x81"))

    def test_max_size(self) -> None:
        for size, max_size in itertools.product((1, 125, 126, 1000, 65535, 65536), (1, 125, 126, 1000, 65535)):
            self.assertEqual(is_partial(build(b"x" * size)[:-1], max_size), size <= max_size, (size, max_size))

    def test_frames_for_autobahn(self) -> None:
        """They go to Autobahn at once, which answers errors."""
        for data in (
            build(b"p", PING),
            build(b"p", PONG),
            build(b"", 8),
            build(b"a", 2),
            build(b"a", 0),
            build(b"a", fin=False),
            build(b"a", rsv=4),
            build(b"a", masked=False),
            build(b"a", width=2),
            build(b"a", width=8),
            build(b"x" * 65536),
        ):
            for end in range(1, 20):
                possible = 1 if data[:1] == b"\x81" else 0
                # A shorter prefix may still be that of a valid message.
                possible += data[:2] == b"\x81\xfe" and 2
                self.assertEqual(is_partial(data[:end]), end <= possible, data[:end])

    @settings(deadline=None, max_examples=150)
    @given(st.one_of(st.binary(max_size=12), st.binary(max_size=10).map(b"\x81".__add__), DecodeTest.frames))
    def test_generated(self, data: bytes) -> None:
        """Partial if, and only if, some continuation makes it a message."""
        decoded = reference(data, 0, MAX_PAYLOAD, check_text=False)
        expected = decoded is None and reference(self.completed(data), 0, MAX_PAYLOAD, check_text=False)
        self.assertEqual(is_partial(data), bool(expected) and expected[0] == TEXT)

    @staticmethod
    def completed(data: bytes) -> bytes:
        """Append the rest of a message."""
        data += b"\x81\x80"[len(data) :]
        if data[1] == 0xFE:
            data += b"\0\0\x7e\x7e"[len(data) :]
        return data + bytes(70000)


class EncodeTest(SynchronousTestCase):
    """encode()"""

    def test_example_of_the_rfc(self) -> None:
        """RFC 6455, section 5.7"""
        self.assertEqual(encode(b"Hello"), b"\x81\x05Hello")
        self.assertEqual(encode(b"Hello", PONG), b"\x8a\x05Hello")
        self.assertEqual(encode(b"Hello", PING), b"\x89\x05Hello")

    def test_sizes(self) -> None:
        for size in BOUNDARIES:
            payload = b"x" * size
            self.assertEqual(encode(payload), build(payload, masked=False), size)

    def test_control_frames(self) -> None:
        for size, opcode in itertools.product((0, 1, 124, 125), (PING, PONG)):
            self.assertEqual(encode(b"\xff" * size, opcode), build(b"\xff" * size, opcode, masked=False))

    def test_empty_ping(self) -> None:
        self.assertEqual(EMPTY_PING, encode(b"", PING))

    @settings(deadline=None, max_examples=100)
    @given(st.binary(max_size=400))
    def test_generated(self, payload: bytes) -> None:
        self.assertEqual(encode(payload), build(payload, masked=False))


class ImportsTest(SynchronousTestCase):
    """The module imports no I/O and no Twisted"""

    def test_imports(self) -> None:
        tree = ast.parse(inspect.getsource(gateway.protocol.frames))
        imported = {
            name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in [getattr(node, "module", None) or node.names[0].name]
        }
        self.assertEqual(imported, {"__future__", "enum", "struct"})


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
    """decode_unmasked() and is_partial_unmasked()"""

    def check(self, data: bytes, at: int = 0, max_size: int = MAX_PAYLOAD) -> tuple[int, bytes, int] | None:
        decoded = decode_unmasked(data, at, max_size)
        expected = reference(data, at, max_size, masked=False)
        if decoded != expected:
            self.fail(f"{data[at : at + 20]!r}, max_size {max_size}: {decoded!r:.60}, {expected!r:.60}")
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

    def test_max_size(self) -> None:
        for max_size in (1, 125, 126, 1000, 65535):
            for size in {0, max_size - 1, max_size, max_size + 1}:
                whole = build(b"x" * size, masked=False)
                self.assertEqual(self.check(whole, max_size=max_size) is not None, size <= min(max_size, 65535))
                if size:
                    self.assertEqual(is_partial_unmasked(whole[:-1], max_size), size <= min(max_size, 65535))

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

    def test_frames_for_autobahn(self) -> None:
        """They go to Autobahn at once, which answers errors."""
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
    def test_generated(self, before: bytes, frame: bytes, after: bytes, cut: int, max_size: int) -> None:
        data = before + frame + after
        self.check(data[: len(data) + cut] if cut else data, len(before), max_size)

    @settings(deadline=None, max_examples=150)
    @given(st.one_of(st.binary(max_size=12), st.binary(max_size=10).map(b"\x81".__add__), frames))
    def test_generated_partial_frames(self, data: bytes) -> None:
        """Partial if, and only if, some continuation makes it a message."""
        whole = data + b"\x81\0"[len(data) :]
        if whole[1] == 126:
            whole += b"\0\0\x7e\x7e"[len(whole) :]
        whole += bytes(70000)
        decoded = reference(data, 0, MAX_PAYLOAD, False, masked=False)
        expected = decoded is None and reference(whole, 0, MAX_PAYLOAD, False, masked=False)
        self.assertEqual(is_partial_unmasked(data), bool(expected) and expected[0] == TEXT)
