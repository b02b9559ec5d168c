"""Tests of gateway.cluster.messages."""

from __future__ import annotations

import ast
import inspect
import json
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster import messages
from gateway.cluster.messages import (
    decode_response,
    encode_call,
    encode_cancel,
    encode_message_params,
    encode_request,
    message_id,
)
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.rpc.errors import NotDelivered
from gateway.rpc.pending import Reply

ID = b'"5f0c1d2e-0000-4000-8000-000000000001"'


def response(rest: bytes, id: bytes = ID) -> bytes:
    return b'{"jsonrpc":"2.0","id":%b,%b}' % (id, rest)


class EncodeTests(SynchronousTestCase):
    def test_call(self) -> None:
        message = encode_message_params("a/b", 7, 'm"\u00e9', b'{"a": 1.0}', False)
        self.assertEqual(
            encode_call(ID, message, 4.5),
            b'{"jsonrpc":"2.0","id":%b,"method":"client.call","params":{"client":"a/b","generation":7,'
            b'"method":"m\\"\xc3\xa9","params":{"a": 1.0},"timeout":4.5}}' % ID,
        )

    def test_call_without_params_and_stale(self) -> None:
        request = json.loads(encode_call(ID, encode_message_params("x", 7, "m", None, True), 300.0))
        params = {"client": "x", "generation": 7, "method": "m", "stale": True, "timeout": 300}
        self.assertEqual(request["params"], params)

    def test_timeout_is_a_positive_number(self) -> None:
        message = encode_message_params("x", 7, "m", None, False)
        for timeout, expected in ((-1.0, 0.001), (0.0, 0.001), (1e-9, 0.001), (0.25, 0.25), (1e7, 1e7)):
            self.assertEqual(json.loads(encode_call(ID, message, timeout))["params"]["timeout"], expected)

    def test_cancel_and_request(self) -> None:
        self.assertEqual(encode_cancel(ID), b'{"jsonrpc":"2.0","method":"peer.cancel","params":{"id":%b}}' % ID)
        request = b'{"jsonrpc":"2.0","id":%b,"method":"peer.has","params":{}}' % ID
        self.assertEqual(encode_request(ID, "peer.has", b"{}"), request)

    def test_message_id(self) -> None:
        call = encode_call(ID, encode_message_params("x", 7, "m", None, True), 1.0)
        for payload in (call, encode_request(ID, "peer.has", b"{}"), response(b'"result":1')):
            self.assertEqual(message_id(payload), ID)
        self.assertNotEqual(message_id(encode_cancel(ID)), ID)


class DecodeTests(SynchronousTestCase):
    def test_result_byte_for_byte(self) -> None:
        for result in (b"null", b"1.0", b'{"a":"\xc3\xa9\\u00e9"}', b"[" * 500 + b"]" * 500, b'"%b"' % (b"x" * 2000)):
            self.assertEqual(decode_response(response(b'"result":' + result)), (ID, Reply(result, None)))

    def test_result_in_another_layout(self) -> None:
        for payload in (
            b' {"jsonrpc":"2.0","id":%b,"result":1}' % ID,
            b'{"jsonrpc":"2.0","id":%b,"result":1} ' % ID,
            b'{"result":1,"id":%b,"jsonrpc":"2.0"}' % ID,
            b'{"jsonrpc":"2.0","id":%b,"result":2,"result":1}' % ID,
            b'{"jsonrpc":"2.0","id":%b,"result":1,"more":{"result":2}}' % ID,
        ):
            self.assertEqual(decode_response(payload), (ID, Reply(b"1", None)), payload)
        self.assertEqual(decode_response(response(b'"result":1', b"7")), (b"7", Reply(b"1", None)))

    def test_error_of_the_client_byte_for_byte(self) -> None:
        error = b'{"code": -32001, "message":"\xc3\xa9","data":{"sent":false}}'
        self.assertEqual(decode_response(response(b'"error":%b,"from":"client"' % error)), (ID, Reply(None, error)))

    def test_not_delivered(self) -> None:
        for code, reason in ((-32001, NotDelivered.NOT_HERE), (-32007, NotDelivered.LEASE_LOST)):
            for data in (b"", b',"data":{"client":"x","sent":false}'):
                error = b'"error":{"code":%d,"message":"m"%b}' % (code, data)
                self.assertEqual(decode_response(response(error)), (ID, reason))
                for more in (b',"from":"gateway"', b',"gateway":true'):
                    self.assertEqual(decode_response(response(error + more)), (ID, reason))

    def test_delivered_if_sent(self) -> None:
        error = b'"error":{"code":-32007,"message":"m","data":{"sent":true,"detail":"d"}}'
        self.assertEqual(decode_response(response(error)), (ID, (ErrorKind.REGISTRY_UNAVAILABLE, True, "d")))

    def test_errors_of_the_table(self) -> None:
        for kind in set(ErrorKind) - {ErrorKind.NOT_CONNECTED, ErrorKind.REGISTRY_UNAVAILABLE}:
            for sent, detail in ((True, "d"), (False, None)):
                error = RpcError(kind, "x", sent=sent, detail=detail).to_json()
                self.assertEqual(decode_response(response(b'"error":' + error)), (ID, (kind, sent, detail)))
            bare = b'"error":{"code":%d,"message":"m"}' % kind.value.code
            self.assertEqual(decode_response(response(bare)), (ID, (kind, kind.value.sent is not False, None)))

    def test_other_errors(self) -> None:
        failed = (ErrorKind.NODE_UNREACHABLE, True, "the client's node answered -32603: m")
        error = b'"error":{"code":-32603,"message":"m","data":{"sent":false}}'
        self.assertEqual(decode_response(response(error)), (ID, failed))

    def test_unreadable(self) -> None:
        for rest in (
            b'"result":',
            b'"result":x',
            b'"result":1,"error":{}',
            b'"result":"\\ud800"',
            b'"result":' + b"[" * 600 + b"]" * 600,
            b'"error":{}',
            b'"error":{"code":"a","message":"m"}',
            b'"error":{"code":1,"message":"m","data":[]}',
            b'"error":null',
            b'"method":"m"',
            b'"from":7,"result":1,"x":0',
        ):
            self.assertEqual(decode_response(response(rest)), (ID, None), rest)

    def test_not_a_response(self) -> None:
        for payload in (b"", b"x", b"[]", b"7", b'{"jsonrpc":"2.0","method":"m"}', b'{"jsonrpc":"1.0","result":1}'):
            self.assertEqual(decode_response(payload), (b"", None), payload)

    @settings(deadline=None, max_examples=300)
    @given(st.binary(max_size=120), st.integers(0, 100), st.integers(0, 100))
    def test_generated(self, noise: bytes, start: int, end: int) -> None:
        """decode_response() never raises, and a result is always one JSON value."""
        whole = response(b'"result":{"a":[1,2,"b"]}')
        for payload in (noise, whole[:start] + noise + whole[end:], response(b'"result":' + noise)):
            _, decoded = decode_response(payload)
            if isinstance(decoded, Reply) and decoded.result is not None:
                json.loads(decoded.result)

    @settings(deadline=None, max_examples=100)
    @given(
        st.recursive(
            st.none() | st.text(max_size=5) | st.integers(),
            lambda x: st.lists(x) | st.dictionaries(st.text(max_size=3), x),
        )
    )
    def test_fast_path_equals_general_path(self, value: object) -> None:
        """Both layouts are decoded to the same result."""
        payload = response(b'"result":' + json.dumps(value, ensure_ascii=False).encode())
        with mock.patch.object(messages, "_RESULT_KEY", b""):
            expected = decode_response(payload)
        self.assertEqual(decode_response(payload), expected)


class ImportTest(SynchronousTestCase):
    def test_no_io(self) -> None:
        tree = ast.parse(inspect.getsource(messages))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        self.assertFalse([module for module in imported if "twisted" in module or "gateway.clients" in module])
