"""What the backend endpoint answers."""

from __future__ import annotations

import msgspec
from twisted.trial.unittest import SynchronousTestCase

from gateway.api.responses import Response, error_response, json_response, refusal_response, rpc_error_response
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.handshake import RequestRefusedError


class ResponseTests(SynchronousTestCase):
    def test_json(self):
        self.assertEqual(json_response(200, {"ready": True}), Response(200, b'{"ready":true}', "application/json", ()))

    def test_refusal(self):
        answer = error_response(503, "registry", "it is away", ("Retry-After", "1"), ("X", "y"))
        self.assertEqual((answer.status, answer.headers), (503, (("Retry-After", "1"), ("X", "y"))))
        self.assertEqual(answer.body, b'{"error":"registry","message":"it is away"}')

    def test_refused_by_the_guard(self):
        """The same answer as on the port of the clients."""
        by = RequestRefusedError(401, "token", "it is unknown", [("WWW-Authenticate", "Bearer")])
        answer = refusal_response(by)
        self.assertEqual((answer.status, answer.headers), (401, (("WWW-Authenticate", "Bearer"),)))
        self.assertEqual(answer.body, by.response().partition(b"\r\n\r\n")[2])

    def test_each_error_has_the_status_of_its_code(self):
        for kind in ErrorKind:
            error = RpcError(kind, "x", sent=False)
            answer = rpc_error_response(error, b"1.50")
            self.assertEqual(answer.status, kind.value.http_status)
            self.assertEqual(answer.body, b'{"jsonrpc":"2.0","id":1.50,"error":%b}' % error.to_json())

    def test_an_error_without_a_request(self):
        answer = rpc_error_response(RpcError(ErrorKind.TOO_LARGE))
        self.assertIsNone(msgspec.json.decode(answer.body)["id"])
