"""Tests of :mod:`gateway.protocol.jsonrpc` with generated input, and of the valid JSON that it refuses."""

from __future__ import annotations

import json
import sys
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.errors import ErrorKind
from gateway.protocol.jsonrpc import (
    MAX_DEPTH,
    Invalid,
    Notification,
    Request,
    Response,
    decode,
    encode_batch,
    encode_error,
    encode_notification,
    encode_request,
    encode_result,
    unreadable_response_id,
)

bounded = settings(deadline=None, max_examples=150)

# Text without surrogates, which UTF-8 cannot encode.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
structures = st.lists(values, max_size=4) | st.dictionaries(texts, values, max_size=4)
ids = st.none() | texts | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def raw(draw: st.DrawFn, source: st.SearchStrategy[Any]) -> bytes:
    """Encode a value as JSON, with or without white space and escapes."""
    return json.dumps(
        draw(source),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 1])),
        separators=draw(st.sampled_from([(",", ":"), (" , ", " : ")])),
    ).encode()


def is_json(payload: bytes) -> bool:
    """Return whether Python's parser accepts it, without the constants that JSON does not have."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(payload.decode(), parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def is_refused_json(payload: bytes) -> bool:
    """Return whether this JSON is refused, for a lone surrogate; only for small payloads."""
    text = json.dumps(json.loads(payload), ensure_ascii=False)
    return any("\ud800" <= character <= "\udfff" for character in text)


def nested(depth: int, inside: bytes = b"") -> bytes:
    """Return a notification whose deepest bracket is at ``depth``."""
    levels = depth - 1
    return b'{"jsonrpc":"2.0","method":"a","params":' + b"[" * levels + inside + b"]" * levels + b"}"


class SurrogateTests(SynchronousTestCase):
    """An escaped lone surrogate has no UTF-8 form (RFC 8259, section 8.2)."""

    templates = (
        b'{"jsonrpc":"2.0","id":1,"method":"%b"}',
        b'{"jsonrpc":"2.0","id":"%b","method":"m"}',
        b'{"jsonrpc":"2.0","method":"m","params":["%b"]}',
        b'{"jsonrpc":"2.0","method":"m","params":{"%b":1}}',
        b'{"jsonrpc":"2.0","id":1,"result":"%b"}',
        b'{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"%b"}}',
        b'{"jsonrpc":"2.0","method":"m","%b":1}',
        b'[{"jsonrpc":"2.0","method":"m","params":["%b"]}]',
    )

    def test_lone(self) -> None:
        for text in (
            b"\\ud800",
            b"\\uDBFF",
            b"\\udc00",
            b"\\uDfFf",
            b"a\\ud800b",
            b"\\ud83d\\ud83d\\ude00",
            b"\\ud83d\\ude00\\ude00",
            b"\\ude00\\ud83d",
            b"\\ud83d\\n\\ude00",
            b"\\ud83d\\\\\\ude00",
            b"\\\\\\ud800",
            b"\\\\\\\\\\udc00",
            b'\\"\\ud800\\"',
            b"\\ud83dude00",
        ):
            for template in self.templates:
                message = decode(template % text)
                assert isinstance(message, Invalid), (template, text)
                self.assertEqual(message.kind, ErrorKind.PARSE_ERROR)
                self.assertIn("surrogate", message.detail)

    def test_surrogate_pairs_and_lookalikes(self) -> None:
        for text in (
            b"\\ud83d\\ude00",
            b"\\uD83D\\uDE00\\ud83d\\ude00",
            b"\\\\ud800",
            b"\\\\\\\\udc00",
            b"\\\\\\ud83d\\ude00",
            b"\\ud7ff\\ue000",
            b"ud800",
            b"\\\\\\\\ud83d\\\\\\\\ude00",
        ):
            for template in self.templates:
                self.assertFalse(isinstance(decode(template % text), Invalid), (template, text))

    @bounded
    @given(
        st.lists(
            st.sampled_from(["\\ud83d", "\\ude00", "\\\\", '\\"', "\\n", "u", "d800", "\\u0041", "é", "\\uDBFF"]),
            max_size=8,
        )
    )
    def test_agrees_with_a_parser(self, pieces: list[str]) -> None:
        text = "".join(pieces)
        whole = json.loads(f'"{text}"')
        lone = any("\ud800" <= character <= "\udfff" for character in whole)
        message = decode(b'{"jsonrpc":"2.0","method":"m","params":["%b"]}' % text.encode())
        self.assertEqual(isinstance(message, Invalid), lone)


class DepthTests(SynchronousTestCase):
    def assert_too_deep(self, payload: bytes) -> None:
        message = decode(payload)
        assert isinstance(message, Invalid)
        self.assertEqual(message.kind, ErrorKind.PARSE_ERROR)
        self.assertIn("nested", message.detail)

    def test_limit(self) -> None:
        self.assertIsInstance(decode(nested(MAX_DEPTH)), Notification)
        self.assert_too_deep(nested(MAX_DEPTH + 1))

    def test_objects(self) -> None:
        def objects(depth: int) -> bytes:
            return b'{"a":' * depth + b"1" + b"}" * depth

        self.assertIsInstance(decode(nested(2, objects(MAX_DEPTH - 2))), Notification)
        self.assert_too_deep(nested(2, objects(MAX_DEPTH - 1)))

    def test_batch_counts(self) -> None:
        self.assertEqual(len(decode(b"[" + nested(MAX_DEPTH - 1) + b"]")), 1)
        self.assert_too_deep(b"[" + nested(MAX_DEPTH) + b"]")

    def test_brackets_in_strings(self) -> None:
        for text in (b"[" * 1000, b'\\"' + b"{" * 1000, b"\\\\", b'\\\\\\"' + b"[" * 600, b"]" * 1000):
            self.assertIsInstance(decode(nested(MAX_DEPTH, b'"' + text + b'"')), Notification, text[:9])
            self.assert_too_deep(nested(MAX_DEPTH + 1, b'"' + text + b'"'))

    def test_sibling_brackets(self) -> None:
        self.assertIsInstance(decode(nested(3, b",".join([b"[{}]"] * 2000))), Notification)
        self.assertIsInstance(decode(nested(MAX_DEPTH - 1, b",".join([b"[]"] * 2000))), Notification)

    @bounded
    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=60), st.integers(0, 7))
    def test_varying_depth(self, slopes: list[tuple[int, int]], beside: int) -> None:
        """The depth rises and falls near the limit."""
        start = level = top = MAX_DEPTH - 20
        text = b'{"jsonrpc":"2.0","method":"a","params":' + b"[" * (start - 1) + b"[]," * (300 + beside)
        for up, down in slopes:
            top = max(top, level + up)
            back = min(down, level + up - start)
            text += b"[" * up + b'"]]["' + b"]" * back + b","
            level += up - back
        text += b"1" + b"]" * (level - 1) + b"}"
        if top > MAX_DEPTH:
            self.assert_too_deep(text)
        else:
            self.assertIsInstance(decode(text), Notification)

    def test_far_too_deep(self) -> None:
        self.assert_too_deep(b"[" * 1_000_000)
        self.assert_too_deep(b'{"jsonrpc":' * 100_000)
        self.assert_too_deep(nested(500_000))

    def test_many_closing_brackets_first(self) -> None:
        message = decode(b"]" * 2000 + b"[" * 2000)
        assert isinstance(message, Invalid)
        self.assertEqual(message.kind, ErrorKind.PARSE_ERROR)

    def test_called_deep_in_the_stack(self) -> None:
        """The calls on the stack do not reduce the depth that a message may have."""
        limit = sys.getrecursionlimit()
        messages = []

        def descend(more: int) -> None:
            if more:
                descend(more - 1)
            else:
                messages.append(decode(nested(MAX_DEPTH)))

        frame = sys._getframe()
        here = 0
        while frame is not None:
            here += 1
            frame = frame.f_back
        descend(limit - here - 60)
        self.assertIsInstance(messages[0], Notification)
        self.assertEqual(sys.getrecursionlimit(), limit)

    @bounded
    @given(st.lists(st.sampled_from([b"[", b"{", b"]", b"}", b'"', b'\\"', b"\\\\", b"\\", b"x" * 90]), max_size=40))
    def test_never_underestimated(self, pieces: list[bytes]) -> None:
        """Whatever the strings in it: a parser finds an accepted message no deeper than the limit."""
        payload = nested(MAX_DEPTH - 8, b'"' + b"[" * 600 + b'",' + b"".join(pieces))
        if not isinstance(decode(payload), Invalid):
            self.assertTrue(is_json(payload))


class RoundTripTests(SynchronousTestCase):
    """``id``, ``params``, ``result`` and ``error`` keep their bytes."""

    @bounded
    @given(raw(ids), texts, st.none() | raw(structures))
    def test_requests(self, id: bytes, method: str, params: bytes | None) -> None:
        self.assertEqual(decode(encode_request(id, method, params)), Request(id, method, params))
        self.assertEqual(decode(encode_notification(method, params)), Notification(method, params))

    @bounded
    @given(raw(ids), raw(values), st.integers(-(10**12), 10**12), raw(texts), raw(values))
    def test_responses(self, id: bytes, result: bytes, code: int, message: bytes, data: bytes) -> None:
        error = b'{"code":%d, "message":%b,"data":%b}' % (code, message, data)
        self.assertEqual(decode(encode_result(id, result)), Response(id, result, None))
        self.assertEqual(decode(encode_error(id, error)), Response(id, None, error))
        self.assertEqual(
            decode(encode_batch([encode_result(id, result), encode_error(id, error)])),
            [Response(id, result, None), Response(id, None, error)],
        )


VALID = [
    b'{"jsonrpc":"2.0","id":"%b","method":"disk.usage","params":{"path":"/","n":[1,-2.5e3,true,null]}}'
    % b"5f0c1d2e-0000-4000-8000-0123456789ab",
    b'{"jsonrpc":"2.0","id":7,"result":{"a":"\\ud83d\\ude00\\\\ \\u00e9","b":[[],{}]}}',
    b'{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"caf\xc3\xa9"}}',
    b'[{"jsonrpc":"2.0","method":"a"},{"jsonrpc":"2.0","id":1,"method":"b","params":[]}]',
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a valid message with a few bytes replaced, removed or inserted."""
    payload = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(payload)))
        upto = draw(st.integers(at, min(len(payload), at + 8)))
        payload[at:upto] = draw(
            st.sampled_from([b"", b'"', b"\\", b"{", b"]", b",", b":", b"0", b" ", b"null", b"NaN", b"\\ud800"])
            | st.binary(max_size=3)
        )
    return bytes(payload)


class ArbitraryInputTests(SynchronousTestCase):
    """Any input decodes to a message or to Invalid, and to a parse error only if it is not JSON or refused."""

    def check(self, payload: bytes) -> None:
        message = decode(payload)
        if isinstance(message, Invalid) and message.kind is ErrorKind.PARSE_ERROR:
            self.assertTrue(not is_json(payload) or is_refused_json(payload), payload)
        else:
            self.assertTrue(is_json(payload), payload)
            self.assertFalse(is_refused_json(payload), payload)
        messages = message if isinstance(message, list) else [message]
        for item in messages:
            if not isinstance(item, Notification):
                self.assertTrue(is_json(item.id))
        found = unreadable_response_id(payload)
        self.assertTrue(found is None or found.encode() in payload)

    @bounded
    @given(st.binary(max_size=60) | texts.map(str.encode))
    @example(b"\xef\xbb\xbf{}")
    @example(b'"\\ud800"')
    def test_bytes(self, payload: bytes) -> None:
        self.check(payload)

    @bounded
    @given(raw(values))
    def test_json(self, payload: bytes) -> None:
        self.check(payload)

    @settings(deadline=None, max_examples=500)
    @given(mutated())
    def test_mutated_messages(self, payload: bytes) -> None:
        self.check(payload)
