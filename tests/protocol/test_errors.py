"""Tests for :mod:`gateway.protocol.errors`."""

from __future__ import annotations

import json

from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.errors import ErrorKind, RpcError


class RpcErrorTests(SynchronousTestCase):
    def test_table(self) -> None:
        """Clients depend on these numbers."""
        self.assertEqual(
            {kind.name: (kind.value.http_status, kind.value.code, kind.value.sent) for kind in ErrorKind},
            {
                "NOT_CONNECTED": (404, -32001, False),
                "TIMEOUT": (504, -32002, True),
                "CONNECTION_LOST": (502, -32003, True),
                "NODE_UNREACHABLE": (503, -32004, None),
                "TOO_MANY_CALLS": (429, -32005, False),
                "TOO_LARGE": (413, -32006, False),
                "REGISTRY_UNAVAILABLE": (503, -32007, False),
                "FORBIDDEN": (403, -32008, False),
                "PARSE_ERROR": (400, -32700, False),
                "INVALID_REQUEST": (400, -32600, False),
                "METHOD_NOT_FOUND": (404, -32601, False),
                "INVALID_PARAMS": (400, -32602, False),
            },
        )

    def test_json(self) -> None:
        self.assertEqual(
            json.loads(RpcError(ErrorKind.TIMEOUT, "x").to_json()),
            {"code": -32002, "message": "no response in time", "data": {"client": "x", "sent": True}},
        )

    def test_detail(self) -> None:
        error = RpcError(ErrorKind.INVALID_REQUEST, None, detail='a "method"')
        self.assertEqual(
            json.loads(error.to_json()),
            {
                "code": -32600,
                "message": "not JSON-RPC 2.0",
                "data": {"client": None, "sent": False, "detail": 'a "method"'},
            },
        )

    def test_sent_is_required_where_the_table_has_none(self) -> None:
        with self.assertRaises(ValueError):
            RpcError(ErrorKind.NODE_UNREACHABLE, "x")
        self.assertTrue(RpcError(ErrorKind.NODE_UNREACHABLE, "x", sent=True).sent)
