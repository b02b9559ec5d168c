"""Tests of gateway.api.responses."""

from __future__ import annotations

import msgspec
from twisted.internet.defer import CancelledError
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from gateway.api.responses import (
    Response,
    encode_reply,
    error_object,
    error_response,
    invalid_message_error,
    json_response,
    refusal_response,
    rpc_error_response,
)
from gateway.protocol import jsonrpc
from gateway.protocol.errors import ErrorKind, RequestRefusedError, RpcError
from gateway.protocol.handshake import encode_refusal
from gateway.rpc.pending import Reply
from tests.builders.endpoint import rpc_error


class ResponseTests(SynchronousTestCase):
    def test_json(self):
        self.assertEqual(json_response(200, {"ready": True}), Response(200, b'{"ready":true}', "application/json", ()))

    def test_refusal(self):
        response = error_response(503, "registry", "it is away", ("Retry-After", "1"), ("X", "y"))
        self.assertEqual((response.status, response.headers), (503, (("Retry-After", "1"), ("X", "y"))))
        self.assertEqual(response.body, b'{"error":"registry","message":"it is away"}')

    def test_refused_by_the_access_policy(self):
        """The body is the same as on the client endpoint."""
        refusal = RequestRefusedError(401, "token", "it is unknown", [("WWW-Authenticate", "Bearer")])
        response = refusal_response(refusal)
        self.assertEqual((response.status, response.headers), (401, (("WWW-Authenticate", "Bearer"),)))
        self.assertEqual(response.body, encode_refusal(refusal).partition(b"\r\n\r\n")[2])

    def test_each_error_has_the_status_of_its_code(self):
        for kind in ErrorKind:
            error = RpcError(kind, "x", sent=False)
            response = rpc_error_response(error, b"1.50")
            self.assertEqual(response.status, kind.value.http_status)
            self.assertEqual(response.body, b'{"jsonrpc":"2.0","id":1.50,"error":%b,"gateway":true}' % error.to_json())

    def test_an_error_without_a_request(self):
        response = rpc_error_response(RpcError(ErrorKind.TOO_LARGE))
        self.assertIsNone(msgspec.json.decode(response.body)["id"])


class EncodeReplyTests(SynchronousTestCase):
    def test_byte_for_byte(self):
        self.assertEqual(
            encode_reply(Reply(b"[ 1.0e2 ]", None), b'"a"'), b'{"jsonrpc":"2.0","id":"a","result":[ 1.0e2 ]}'
        )
        error = b'{"code": 1, "message":"no"}'
        self.assertEqual(encode_reply(Reply(None, error), b"1"), b'{"jsonrpc":"2.0","id":1,"error":%b}' % error)

    def test_a_result_may_be_null(self):
        self.assertEqual(encode_reply(Reply(b"null", None), b"1"), b'{"jsonrpc":"2.0","id":1,"result":null}')


class InvalidTests(SynchronousTestCase):
    def test_invalid_message(self):
        for payload, kind in ((b"{", ErrorKind.PARSE_ERROR), (b"1", ErrorKind.INVALID_REQUEST)):
            message = jsonrpc.decode(payload)
            error = invalid_message_error(message, "x")
            self.assertEqual((error.kind, error.client_id, error.sent), (kind, "x", False))
            self.assertEqual(error.detail, message.detail)

    def test_a_response(self):
        error = invalid_message_error(jsonrpc.decode(b'{"jsonrpc":"2.0","id":1,"result":1}'))
        self.assertEqual((error.kind, error.client_id), (ErrorKind.INVALID_REQUEST, None))
        self.assertIn("response", error.detail)


class ErrorObjectTests(SynchronousTestCase):
    def test_rpc_error(self):
        error = rpc_error(ErrorKind.TIMEOUT, "x")
        self.assertEqual(error_object(Failure(error), "y"), error.to_json())

    def test_internal_error_is_logged_and_not_revealed(self):
        error = msgspec.json.decode(error_object(Failure(ZeroDivisionError("secret")), "x"))
        self.assertEqual((error["code"], error["data"]), (-32603, {"client": "x", "sent": True}))
        self.assertNotIn("secret", error["message"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_cancelled_error_is_raised(self):
        self.assertRaises(CancelledError, error_object, Failure(CancelledError()), "x")
        self.assertEqual(self.flushLoggedErrors(), [])
