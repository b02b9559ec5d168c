"""Tests for :mod:`gateway.protocol.jsonrpc` and :mod:`gateway.rpc.inbound`: messages that are made to be dear."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.errors import ErrorKind
from gateway.protocol.jsonrpc import (
    MAX_BATCH,
    MAX_DEPTH,
    MAX_ID_CANDIDATES,
    Invalid,
    Notification,
    decode,
    unreadable_response_id,
)
from gateway.rpc.inbound import CPU_TIME_PER_MESSAGE, MESSAGE_UNIT_SIZE
from tests.rpc.fakes import DispatcherTestCase

UUID = "5f0c1d2e-0000-4000-8000-0123456789ab"


def notification_with(params: str) -> bytes:
    return b'{"jsonrpc":"2.0","method":"m","params":%b}' % params.encode()


def filled(depth: int, flat: str, size: int) -> str:
    """An array so deep, with something flat beside each of its levels, of about so many bytes."""
    beside = flat * (size // len(flat) // depth)
    return f"[{beside}" * depth + "1" + "]" * depth


class DepthTests(SynchronousTestCase):
    """What is too deep is found, wherever that is, and what is only broad is not taken for it."""

    def test_behind_much_that_is_flat(self) -> None:
        flat = "[[],{}]," * 8000
        # The object of the message is a level, too.
        for depth, kind in ((MAX_DEPTH - 2, Notification), (MAX_DEPTH - 1, Invalid)):
            self.assertIsInstance(decode(notification_with(f"[{flat}{'[' * depth}{']' * depth}]")), kind)

    def test_beside_much_that_is_flat(self) -> None:
        for flat in ("[],", "{},", "[[[[[[[[[[]]]]]]]]]],", '{"a":[{}]},', '"[[[",', '"\\"[",'):
            for depth, kind in ((MAX_DEPTH - 21, Notification), (MAX_DEPTH, Invalid)):
                self.assertIsInstance(decode(notification_with(filled(depth, flat, 100_000))), kind, (flat, depth))

    @given(
        st.recursive(st.just([]) | st.just({}) | st.just('"[{'), lambda it: st.lists(it, max_size=4), max_leaves=30),
        st.integers(1, 600),
        st.sampled_from(("[],", "{},", "[[]],", "")),
    )
    def test_any(self, value: object, depth: int, flat: str) -> None:
        text = json.dumps(value)

        def levels(value: object) -> int:
            return 1 + max(map(levels, value), default=0) if isinstance(value, list) else isinstance(value, dict)

        params = f"[{flat * 500}" * depth + text + "]" * depth if depth < 40 else "[" * depth + text + "]" * depth
        deep = 1 + depth + max(levels(value), flat.count("[") if depth < 40 else 0)
        self.assertEqual(isinstance(decode(notification_with(params)), Invalid), deep > MAX_DEPTH)


class BatchLimitTests(SynchronousTestCase):
    def test_far_too_many(self) -> None:
        """It is known after the first that is one too many: what follows is not looked at, be it JSON or not."""
        one = notification_with("[]")
        for rest in (b"]", b",[]" * 200_000 + b"]", b",nonsense", b""):
            message = decode(b"[" + b",".join([one] * (MAX_BATCH + 1)) + rest)
            assert isinstance(message, Invalid)
            self.assertEqual(message.kind, ErrorKind.INVALID_REQUEST)

    def test_no_json_behind_the_last(self) -> None:
        for text in (b"[1,", b"[,]", b"[1]]", b"[1 2]", b"[{]"):
            message = decode(text)
            assert isinstance(message, Invalid)
            self.assertEqual(message.kind, ErrorKind.PARSE_ERROR, text)


class IdTests(SynchronousTestCase):
    def test_among_many(self) -> None:
        """Of members that may be ids only the last are looked at."""
        for many, found in ((MAX_ID_CANDIDATES - 1, UUID), (MAX_ID_CANDIDATES, None)):
            payload = b'{"result":NaN,"id":"%b",%b}' % (UUID.encode(), b",".join([b'"id":1'] * many))
            self.assertEqual(unreadable_response_id(payload), found)


class CostTests(DispatcherTestCase):
    """A large message counts for what it took."""

    def make(self) -> None:
        super().make()
        self.connect("x")
        self.now = 0.0
        self.took = 0.0

        def cpu() -> float:
            self.now += self.took
            return self.now

        self.dispatcher._inbound._cpu_clock = cpu

    def test_cheap(self) -> None:
        """For its size it counts where it comes in."""
        large = notification_with(json.dumps(["x" * 10 * MESSAGE_UNIT_SIZE]))
        for self.took in (0.0, 5 * CPU_TIME_PER_MESSAGE, 10.5 * CPU_TIME_PER_MESSAGE):
            self.assertEqual(self.receive("x", large), 1)

    def test_dear(self) -> None:
        large = notification_with(json.dumps(["x" * 10 * MESSAGE_UNIT_SIZE]))
        self.took = 30.5 * CPU_TIME_PER_MESSAGE
        self.assertEqual(self.receive("x", large), 1 + 20)
        self.assertEqual(self.receive("x", b"[%b,%b]" % (large, large)), 2 + 10)

    def test_dear_and_bad(self) -> None:
        self.took = 30.5 * CPU_TIME_PER_MESSAGE
        self.assertEqual(self.receive("x", b"]" * 10 * MESSAGE_UNIT_SIZE), -1 - 20)
        self.assertEqual(self.receive("x", b"[1,2,%b]" % (b'"x"'.rjust(10 * MESSAGE_UNIT_SIZE))), -3 - 20)

    def test_small(self) -> None:
        """Nobody looks at the clock for those."""
        self.took = 1.0
        self.assertEqual(self.receive("x", notification_with("[]")), 1)
        self.assertEqual(self.now, 0.0)
