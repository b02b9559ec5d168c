"""Tests of :mod:`gateway.protocol.jsonrpc`, and of :mod:`gateway.rpc.inbound` with messages that are costly to decode."""

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
    MAX_INVALID_IN_BATCH,
    Invalid,
    Notification,
    Request,
    Response,
    decode,
    decode_gateway_marks,
    encode_batch,
    encode_error,
    encode_gateway_error,
    encode_notification,
    encode_request,
    encode_result,
    unreadable_response_id,
)
from gateway.rpc.inbound import CPU_TIME_PER_MESSAGE, MESSAGE_UNIT_SIZE
from tests.builders.dispatcher import DispatcherTestCase

UUID = "5f0c1d2e-0000-4000-8000-0123456789ab"
OTHER_UUID = "aaaaaaaa-0000-4000-8000-0123456789ab"


class MessageTests(SynchronousTestCase):
    """The members of a message determine its kind (JSON-RPC 2.0, sections 4 and 5)."""

    def test_request(self) -> None:
        payload = b'{"jsonrpc":"2.0","id":7,"method":"disk.usage","params":{"path":"/"}}'
        self.assertEqual(decode(payload), Request(b"7", "disk.usage", b'{"path":"/"}'))

    def test_request_without_params(self) -> None:
        self.assertEqual(decode(b'{"jsonrpc":"2.0","id":"x","method":"m"}'), Request(b'"x"', "m", None))

    def test_id_of_each_type(self) -> None:
        for id in (b'"x"', b'""', b"0", b"-1", b"1.5", b"1e9", b"null", b"123456789012345678901234567890"):
            payload = b'{"jsonrpc":"2.0","id":' + id + b',"method":"m"}'
            self.assertEqual(decode(payload), Request(id, "m", None), id)

    def test_notification(self) -> None:
        payload = b'{"jsonrpc":"2.0","method":"policy.changed","params":[3]}'
        self.assertEqual(decode(payload), Notification("policy.changed", b"[3]"))
        self.assertEqual(decode(b'{"jsonrpc":"2.0","method":""}'), Notification("", None))

    def test_result(self) -> None:
        for result in (b"null", b"0", b'{"free":12}', b"[]", b"false"):
            payload = b'{"jsonrpc":"2.0","id":"x","result":' + result + b"}"
            self.assertEqual(decode(payload), Response(b'"x"', result, None))

    def test_error(self) -> None:
        error = b'{"code":-32601,"message":"no such method","data":[1]}'
        payload = b'{"jsonrpc":"2.0","id":7,"error":' + error + b"}"
        self.assertEqual(decode(payload), Response(b"7", None, error))

    def test_error_with_id_null(self) -> None:
        error = b'{"code":-32700,"message":"?"}'
        self.assertEqual(decode(b'{"jsonrpc":"2.0","id":null,"error":' + error + b"}"), Response(b"null", None, error))

    def test_values_keep_their_bytes(self) -> None:
        params = b'{ "a" : 1.00e+2 , "\\u0041\\/" : [ ] , "a" : 12345678901234567890.5 }'
        payload = b' {\n"params" : ' + params + b'\t, "method":"m" , "jsonrpc" : "2.0", "id" : 1.0 } \r\n'
        self.assertEqual(decode(payload), Request(b"1.0", "m", params))

    def test_escaped_names_and_version(self) -> None:
        self.assertEqual(
            decode(b'{"json\\u0072pc":"2\\u002e0","\\u006dethod":"\\u0061\\u00e9"}'), Notification("aé", None)
        )

    def test_last_of_duplicates_counts(self) -> None:
        payload = b'{"jsonrpc":"1.0","jsonrpc":"2.0","id":1,"id":2,"method":"a","method":"b"}'
        self.assertIsInstance(decode(payload), Invalid)
        payload = b'{"jsonrpc":"2.0","id":1,"id":2,"method":"a","params":[1],"method":"b","params":[2]}'
        self.assertEqual(decode(payload), Request(b"2", "b", b"[2]"))

    def test_unknown_members_are_ignored(self) -> None:
        payload = b'{"x":{"id":1},"jsonrpc":"2.0","method":"m","trace":[[]]}'
        self.assertEqual(decode(payload), Notification("m", None))


class InvalidTests(SynchronousTestCase):
    def assert_invalid(self, payload: bytes, kind: ErrorKind, id: bytes = b"null") -> None:
        message = decode(payload)
        self.assertIsInstance(message, Invalid, payload)
        assert isinstance(message, Invalid)
        self.assertEqual((message.kind, message.id), (kind, id), payload)
        self.assertTrue(message.detail, payload)

    def test_not_json(self) -> None:
        for payload in (
            b"",
            b" ",
            b"{",
            b"nul",
            b"[1,]",
            b"{} {}",
            b'{"jsonrpc":"2.0","method":"m"}\x00',
            b'{"jsonrpc":"2.0","method":"m",}',
            b"{'jsonrpc':'2.0','method':'m'}",
            b'{"jsonrpc":"2.0","method":"m","params":[NaN]}',
            b'{"jsonrpc":"2.0","method":"m","params":[-Infinity]}',
            b'{"jsonrpc":"2.0","method":"m","params":[01]}',
            b'{"jsonrpc":"2.0","method":"m","params":[+1]}',
            b'{"jsonrpc":"2.0","method":"m","params":[1.]}',
            b'{"jsonrpc":"2.0","method":"m","params":["\\x41"]}',
            b'{"jsonrpc":"2.0","method":"m","params":["\t"]}',
            b'{"jsonrpc":"2.0","method":"m","unknown":["\\u12"]}',
            b'{"jsonrpc":"2.0","method":"m","params":[1]',
            b'\x0b{"jsonrpc":"2.0","method":"m"}',
            b'/**/{"jsonrpc":"2.0","method":"m"}',
        ):
            self.assert_invalid(payload, ErrorKind.PARSE_ERROR)

    def test_byte_order_mark(self) -> None:
        self.assert_invalid(b'\xef\xbb\xbf{"jsonrpc":"2.0","method":"m"}', ErrorKind.PARSE_ERROR)

    def test_not_json_after_a_wrong_type(self) -> None:
        """A member of a wrong type does not hide that the rest is not JSON."""
        self.assert_invalid(b'{"jsonrpc":"2.0","id":1,"method":5,"params":[nope]}', ErrorKind.PARSE_ERROR)
        self.assert_invalid(b'[{"jsonrpc":"2.0","method":"m"},5,nope]', ErrorKind.PARSE_ERROR)

    def test_not_an_object(self) -> None:
        for payload in (b"5", b'"x"', b"null", b"true", b" 1.5 "):
            self.assert_invalid(payload, ErrorKind.INVALID_REQUEST)

    def test_wrong_version(self) -> None:
        for version in (b'"1.0"', b"2.0", b"null", b'"2.00"', b'["2.0"]', b'""'):
            self.assert_invalid(b'{"jsonrpc":' + version + b',"id":7,"method":"m"}', ErrorKind.INVALID_REQUEST, b"7")
        self.assert_invalid(b'{"id":7,"method":"m"}', ErrorKind.INVALID_REQUEST, b"7")
        self.assert_invalid(b"{}", ErrorKind.INVALID_REQUEST)

    def test_wrong_method(self) -> None:
        for method in (b"5", b"null", b'["m"]', b"true"):
            self.assert_invalid(b'{"jsonrpc":"2.0","id":7,"method":' + method + b"}", ErrorKind.INVALID_REQUEST, b"7")

    def test_wrong_id(self) -> None:
        for id in (b"true", b"false", b"[1]", b'{"a":1}'):
            self.assert_invalid(b'{"jsonrpc":"2.0","id":' + id + b',"method":"m"}', ErrorKind.INVALID_REQUEST)
            self.assert_invalid(b'{"jsonrpc":"2.0","id":' + id + b',"method":1}', ErrorKind.INVALID_REQUEST)
            self.assert_invalid(b'{"jsonrpc":"2.0","id":' + id + b',"result":1}', ErrorKind.INVALID_REQUEST)

    def test_wrong_params(self) -> None:
        for params in (b"null", b"1", b'"x"', b"true", b"-1"):
            self.assert_invalid(
                b'{"jsonrpc":"2.0","id":7,"method":"m","params":' + params + b"}", ErrorKind.INVALID_REQUEST, b"7"
            )

    def test_missing_and_conflicting_members(self) -> None:
        error = b'"error":{"code":1,"message":"m"}'
        for members in (
            b'"x":1',
            b'"result":1,' + error,
            b'"method":"m","result":1',
            b'"method":"m",' + error,
        ):
            self.assert_invalid(b'{"jsonrpc":"2.0","id":7,' + members + b"}", ErrorKind.INVALID_REQUEST, b"7")

    def test_response_without_id(self) -> None:
        self.assert_invalid(b'{"jsonrpc":"2.0","result":1}', ErrorKind.INVALID_REQUEST)
        self.assert_invalid(b'{"jsonrpc":"2.0","error":{"code":1,"message":"m"}}', ErrorKind.INVALID_REQUEST)

    def test_wrong_error(self) -> None:
        for error in (
            b"null",
            b'"no"',
            b"[]",
            b"{}",
            b'{"code":1}',
            b'{"message":"m"}',
            b'{"code":"1","message":"m"}',
            b'{"code":1.5,"message":"m"}',
            b'{"code":true,"message":"m"}',
            b'{"code":1,"message":null}',
        ):
            self.assert_invalid(b'{"jsonrpc":"2.0","id":7,"error":' + error + b"}", ErrorKind.INVALID_REQUEST, b"7")

    def test_detail_has_no_text_of_the_sender(self) -> None:
        for payload in (b'{"jsonrpc":"evil","method":"evil"}', b'{"evil":1', b'{"jsonrpc":"2.0","method":["evil"]}'):
            message = decode(payload)
            assert isinstance(message, Invalid)
            self.assertNotIn("evil", message.detail)

    def test_not_utf8(self) -> None:
        for bad in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"):
            for payload in (
                b'{"jsonrpc":"2.0","method":"' + bad + b'"}',
                b'{"jsonrpc":"2.0","method":"m","params":["' + bad + b'"]}',
                b'{"jsonrpc":"2.0","method":"m","' + bad + b'":1}',
                bad,
            ):
                self.assert_invalid(payload, ErrorKind.PARSE_ERROR)


class BatchTests(SynchronousTestCase):
    """JSON-RPC 2.0, section 6."""

    def test_batch(self) -> None:
        messages = decode(
            b' [ {"jsonrpc":"2.0","id":1,"method":"a"} , {"jsonrpc":"2.0","method":"b"},'
            b'{"jsonrpc":"2.0","id":"x","result":[ 1 ]},1,[],{"jsonrpc":"2.0","id":3,"method":4}]\n'
        )
        assert isinstance(messages, list)
        self.assertEqual(
            messages[:3], [Request(b"1", "a", None), Notification("b", None), Response(b'"x"', b"[ 1 ]", None)]
        )
        invalid = [message for message in messages[3:] if isinstance(message, Invalid)]
        self.assertEqual([message.id for message in invalid], [b"null", b"null", b"3"])
        self.assertEqual({message.kind for message in invalid}, {ErrorKind.INVALID_REQUEST})

    def test_empty(self) -> None:
        for payload in (b"[]", b" [ ] "):
            message = decode(payload)
            assert isinstance(message, Invalid)
            self.assertEqual((message.kind, message.id), (ErrorKind.INVALID_REQUEST, b"null"))

    def test_length(self) -> None:
        notification = b'{"jsonrpc":"2.0","method":"a"}'
        messages = decode(encode_batch([notification] * MAX_BATCH))
        self.assertEqual(messages, [Notification("a", None)] * MAX_BATCH)
        message = decode(encode_batch([notification] * (MAX_BATCH + 1)))
        assert isinstance(message, Invalid)
        self.assertEqual(message.kind, ErrorKind.INVALID_REQUEST)

    def test_too_many_invalid_messages(self) -> None:
        notification = b'{"jsonrpc":"2.0","method":"a"}'
        messages = decode(encode_batch([notification, *[b"1"] * MAX_INVALID_IN_BATCH]))
        assert isinstance(messages, list)
        self.assertEqual(sum(isinstance(message, Invalid) for message in messages), MAX_INVALID_IN_BATCH)
        message = decode(encode_batch([notification, *[b"1"] * (MAX_INVALID_IN_BATCH + 1)]))
        assert isinstance(message, Invalid)
        self.assertEqual((message.kind, message.id), (ErrorKind.INVALID_REQUEST, b"null"))

    def test_broken(self) -> None:
        """Section 6: a batch that is not JSON is one error."""
        message = decode(b'[{"jsonrpc":"2.0","method":"a"},{"jsonrpc":"2.0","method"]')
        assert isinstance(message, Invalid)
        self.assertEqual(message.kind, ErrorKind.PARSE_ERROR)


class EncodeTests(SynchronousTestCase):
    def test_compact(self) -> None:
        self.assertEqual(
            encode_request(b"7", "disk.usage", b'{"path":"/"}'),
            b'{"jsonrpc":"2.0","id":7,"method":"disk.usage","params":{"path":"/"}}',
        )
        self.assertEqual(encode_request(b'"x"', "m", None), b'{"jsonrpc":"2.0","id":"x","method":"m"}')
        self.assertEqual(encode_notification("m", None), b'{"jsonrpc":"2.0","method":"m"}')
        self.assertEqual(encode_notification("m", b"[1]"), b'{"jsonrpc":"2.0","method":"m","params":[1]}')
        self.assertEqual(encode_result(b"1", b"null"), b'{"jsonrpc":"2.0","id":1,"result":null}')
        self.assertEqual(encode_error(b"1", b"{}"), b'{"jsonrpc":"2.0","id":1,"error":{}}')
        self.assertEqual(encode_gateway_error(b"1", b"{}"), b'{"jsonrpc":"2.0","id":1,"error":{},"gateway":true}')
        self.assertEqual(encode_batch([b"{}", b"[]"]), b"[{},[]]")

    def test_method_is_escaped(self) -> None:
        self.assertEqual(encode_notification('a"\n', None), b'{"jsonrpc":"2.0","method":"a\\"\\n"}')


class GatewayMarkTests(SynchronousTestCase):
    ERROR = b'{"code":1,"message":"m","data":{"gateway":true}}'

    def test_marked(self) -> None:
        for rest in (
            b',"gateway":true',
            b', "gateway" : true ',
            b',"gatewa\\u0079":true',
            b',"gateway":0,"gateway":true',
        ):
            message = b'{"jsonrpc":"2.0","id":1,"error":%b%b}' % (self.ERROR, rest)
            self.assertEqual(decode(message), Response(b"1", None, self.ERROR))
            self.assertEqual(decode_gateway_marks(message), [True], message)

    def test_not_marked(self) -> None:
        for rest in (
            b"",
            b',"gateway":false',
            b',"gateway":1',
            b',"gateway":"true"',
            b',"gateway":[true]',
            b',"gateway":null',
            b',"gateway":true,"gateway":false',
            b',"Gateway":true',
            b',"x":{"gateway":true}',
        ):
            message = b'{"jsonrpc":"2.0","id":1,"error":%b%b}' % (self.ERROR, rest)
            self.assertEqual(decode(message), Response(b"1", None, self.ERROR))
            self.assertEqual(decode_gateway_marks(message), [False], message)

    def test_batch(self) -> None:
        marked, other = encode_gateway_error(b"1", self.ERROR), encode_error(b"1", self.ERROR)
        batch = b" [%b]" % b",".join([marked, b"7", other, b"[true]", marked])
        self.assertEqual(decode_gateway_marks(batch), [True, False, False, False, True])
        self.assertEqual(decode_gateway_marks(b"[%b]" % b",".join([marked] * MAX_BATCH)), [True] * MAX_BATCH)

    def test_depth(self) -> None:
        deep = b"[" * (MAX_DEPTH - 2) + b"]" * (MAX_DEPTH - 2)
        message = b'{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"m"},"x":%b,"gateway":true}' % deep
        self.assertIsInstance(decode(message), Response)
        self.assertEqual(decode_gateway_marks(message), [True])
        self.assertEqual(decode_gateway_marks(b"[%b]" % message), [True])


class UnreadableResponseIdTests(SynchronousTestCase):
    uuid = UUID.encode()

    def test_found(self) -> None:
        for payload in (
            b'{"jsonrpc":"2.0","id":"%b","result":NaN}',
            b'{"id":"%b","jsonrpc":"2.0","result":"\xff"}',
            b' {\n "jsonrpc" : "2.0" , "id" : "%b" , "result" : [1,]}',
            b'{"jsonrpc":"2.0","result":{"bad":\\},"id":"%b"}',
            b'{"error":{"code":1,"message":"unescaped " quote"},"id":"%b","jsonrpc":"2.0"}',
            b'{"jsonrpc":"2.0","id":"%b","result":{"cut of',
        ):
            self.assertEqual(unreadable_response_id(payload % self.uuid), UUID, payload)

    def test_ids_in_the_result(self) -> None:
        other = b'{"id":"%b","x":NaN}' % OTHER_UUID.encode()
        for payload in (
            b'{"jsonrpc":"2.0","id":"%b","result":%b}' % (self.uuid, other),
            b'{"id":"%b","jsonrpc":"2.0","result":%b}' % (self.uuid, other),
            b'{"jsonrpc":"2.0","result":%b,"id":"%b"}' % (other, self.uuid),
        ):
            self.assertEqual(unreadable_response_id(payload), UUID, payload)

    def test_not_found(self) -> None:
        for payload in (
            b"",
            b'{"jsonrpc":"2.0","id":7,"result":NaN}',
            b'{"jsonrpc":"2.0","id":"5f0c","result":NaN}',
            b'{"jsonrpc":"2.0","xid":"%b","result":NaN}' % self.uuid,
            b'{"jsonrpc":"2.0","id":"%b","result":NaN}' % self.uuid.upper(),
            b'{"jsonrpc":"2.0","id":"%b0","result":NaN}' % self.uuid,
            self.uuid,
        ):
            self.assertIsNone(unreadable_response_id(payload), payload)

    def test_linear_time(self) -> None:
        """A megabyte of partial matches is scanned once; the test would hang at more than linear time."""
        for piece in (b'{"id":', b"{ ", b'{"jsonrpc"', b'"', b" ", b'{"id":"5f0c1d2e-'):
            self.assertIsNone(unreadable_response_id(piece * (1_000_000 // len(piece))))


def notification_with(params: str) -> bytes:
    return b'{"jsonrpc":"2.0","method":"m","params":%b}' % params.encode()


def filled(depth: int, flat: str, size: int) -> str:
    """Return arrays nested ``depth`` deep, with copies of ``flat`` at each level, ``size`` bytes in all."""
    siblings = flat * (size // len(flat) // depth)
    return f"[{siblings}" * depth + "1" + "]" * depth


class DepthTests(SynchronousTestCase):
    """Deep nesting is found anywhere, and many flat brackets are not mistaken for it."""

    def test_after_many_flat_brackets(self) -> None:
        flat = "[[],{}]," * 8000
        # The message itself is a level, too.
        for depth, kind in ((MAX_DEPTH - 2, Notification), (MAX_DEPTH - 1, Invalid)):
            self.assertIsInstance(decode(notification_with(f"[{flat}{'[' * depth}{']' * depth}]")), kind)

    def test_between_many_flat_brackets(self) -> None:
        for flat in ("[],", "{},", "[[[[[[[[[[]]]]]]]]]],", '{"a":[{}]},', '"[[[",', '"\\"[",'):
            for depth, kind in ((MAX_DEPTH - 21, Notification), (MAX_DEPTH, Invalid)):
                self.assertIsInstance(decode(notification_with(filled(depth, flat, 100_000))), kind, (flat, depth))

    @given(
        st.recursive(st.just([]) | st.just({}) | st.just('"[{'), lambda it: st.lists(it, max_size=4), max_leaves=30),
        st.integers(1, 600),
        st.sampled_from(("[],", "{},", "[[]],", "")),
    )
    def test_generated(self, value: object, depth: int, flat: str) -> None:
        text = json.dumps(value)

        def levels(value: object) -> int:
            return 1 + max(map(levels, value), default=0) if isinstance(value, list) else isinstance(value, dict)

        params = f"[{flat * 500}" * depth + text + "]" * depth if depth < 40 else "[" * depth + text + "]" * depth
        deep = 1 + depth + max(levels(value), flat.count("[") if depth < 40 else 0)
        self.assertEqual(isinstance(decode(notification_with(params)), Invalid), deep > MAX_DEPTH)


class BatchLimitTests(SynchronousTestCase):
    def test_stops_after_the_first_message_too_many(self) -> None:
        """What follows is not decoded, and need not be JSON."""
        notification = notification_with("[]")
        for rest in (b"]", b",[]" * 200_000 + b"]", b",nonsense", b""):
            message = decode(b"[" + b",".join([notification] * (MAX_BATCH + 1)) + rest)
            assert isinstance(message, Invalid)
            self.assertEqual(message.kind, ErrorKind.INVALID_REQUEST)

    def test_not_json_after_the_last_message(self) -> None:
        for text in (b"[1,", b"[,]", b"[1]]", b"[1 2]", b"[{]"):
            message = decode(text)
            assert isinstance(message, Invalid)
            self.assertEqual(message.kind, ErrorKind.PARSE_ERROR, text)


class IdCandidatesTests(SynchronousTestCase):
    def test_only_the_last_are_checked(self) -> None:
        for count, expected in ((MAX_ID_CANDIDATES - 1, UUID), (MAX_ID_CANDIDATES, None)):
            payload = b'{"result":NaN,"id":"%b",%b}' % (UUID.encode(), b",".join([b'"id":1'] * count))
            self.assertEqual(unreadable_response_id(payload), expected)


class CostTests(DispatcherTestCase):
    """A large message counts by the CPU time that it took."""

    def make(self) -> None:
        super().make()
        self.connect("x")
        self.now = 0.0
        self.cost = 0.0

        def cpu() -> float:
            self.now += self.cost
            return self.now

        self.dispatcher._inbound._cpu_clock = cpu

    def test_cheap(self) -> None:
        """Its size is counted by the session, not here."""
        large = notification_with(json.dumps(["x" * 10 * MESSAGE_UNIT_SIZE]))
        for self.cost in (0.0, 5 * CPU_TIME_PER_MESSAGE, 10.5 * CPU_TIME_PER_MESSAGE):
            self.assertEqual(self.receive("x", large), 1)

    def test_costly(self) -> None:
        large = notification_with(json.dumps(["x" * 10 * MESSAGE_UNIT_SIZE]))
        self.cost = 30.5 * CPU_TIME_PER_MESSAGE
        self.assertEqual(self.receive("x", large), 1 + 20)
        self.assertEqual(self.receive("x", b"[%b,%b]" % (large, large)), 2 + 10)

    def test_costly_and_invalid(self) -> None:
        self.cost = 30.5 * CPU_TIME_PER_MESSAGE
        self.assertEqual(self.receive("x", b"]" * 10 * MESSAGE_UNIT_SIZE), -1 - 20)
        self.assertEqual(self.receive("x", b"[1,2,%b]" % (b'"x"'.rjust(10 * MESSAGE_UNIT_SIZE))), -3 - 20)

    def test_small(self) -> None:
        """The clock is not read for small messages."""
        self.cost = 1.0
        self.assertEqual(self.receive("x", notification_with("[]")), 1)
        self.assertEqual(self.now, 0.0)
