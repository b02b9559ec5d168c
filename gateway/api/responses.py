"""HTTP responses, and JSON-RPC responses over HTTP and WebSocket, to what a backend sends."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec
from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web import http

from gateway.auth.backend_tokens import Grant
from gateway.auth.errors import ForbiddenError
from gateway.protocol import jsonrpc
from gateway.protocol.errors import ErrorKind, RequestRefusedError, RpcError
from gateway.rpc.pending import Reply

JSON_CONTENT_TYPE = "application/json"
SERVER_NAME = "wsgateway"
#: JSON-RPC 2.0, section 5.1: internal error
INTERNAL_ERROR = -32603
#: bytes that a backend's request may exceed the largest message by: the message is wrapped in it
MAX_ENVELOPE_SIZE = 2**12

_log = Logger()


@attrs.frozen
class Response:
    """HTTP response. ``content_type`` is sent only with a body."""

    status: int
    body: bytes = b""
    content_type: str = JSON_CONTENT_TYPE
    headers: tuple[tuple[str, str], ...] = ()


def json_response(status: int, value: Any) -> Response:
    """Return a response with a JSON body."""
    return Response(status, msgspec.json.encode(value))


def error_response(status: int, word: str, message: str, *headers: tuple[str, str]) -> Response:
    """Return an error response: a word for programs, a message for people."""
    return Response(status, msgspec.json.encode({"error": word, "message": message}), headers=headers)


def refusal_response(refusal: RequestRefusedError) -> Response:
    """Return the error response for a request that the access policy refused."""
    return error_response(refusal.status, refusal.reason, refusal.message, *refusal.headers)


def rpc_error_response(error: RpcError, id: bytes = b"null") -> Response:
    """Return the gateway's JSON-RPC error response to a raw id, with the HTTP status of its code."""
    return Response(error.http_status, jsonrpc.encode_gateway_error(id, error.to_json()))


def encode_reply(reply: Reply, id: bytes) -> bytes:
    """Encode a client's result or error, byte for byte, as the response to a raw id."""
    if reply.result is not None:
        return jsonrpc.encode_result(id, reply.result)
    assert reply.error is not None
    return jsonrpc.encode_error(id, reply.error)


def invalid_message_error(message: jsonrpc.Invalid | jsonrpc.Response, client_id: str | None = None) -> RpcError:
    """Return the error for a message that is not a valid request."""
    if isinstance(message, jsonrpc.Response):
        return RpcError(ErrorKind.INVALID_REQUEST, client_id, detail="a response to a call that was not made here")
    return RpcError(message.kind, client_id, detail=message.detail)


def require(grant: Grant, verb: str, client_id: str | None = None) -> None:
    """Raise ``RpcError`` unless the grant allows ``verb`` on the client. Call it before any lookup of the client."""
    try:
        grant.check(verb, client_id)
    except ForbiddenError as e:
        raise RpcError(ErrorKind.FORBIDDEN, client_id, detail=str(e)) from None


def error_object(failure: Failure, client_id: str | None) -> bytes:
    """Return the JSON-RPC error object for a failure.

    A failure other than ``RpcError`` is an internal error, and logged. ``CancelledError`` is raised again: then the
    caller is gone.
    """
    error = failure.value
    if isinstance(error, RpcError):
        return error.to_json()
    if isinstance(error, CancelledError):
        raise error
    _log.failure("a message for {client} failed", failure=failure, client=client_id)
    return msgspec.json.encode(
        {
            "code": INTERNAL_ERROR,
            "message": "internal error of the gateway; see its log",
            # Unknown, so "not sent" cannot be promised.
            "data": {"client": client_id, "sent": True},
        }
    )


def nodes_response(results: dict[str, int], failed: dict[str, str]) -> Response:
    """Return the response to a request to every node: a number, or why it failed, by node_id."""
    return json_response(202, {"nodes": results, "failed": failed} if failed else {"nodes": results})


def standard_headers(response: Response, wall_time: float) -> list[tuple[str, str]]:
    """Return the headers that every response has, beside its own: server, date, caching and length.

    ``wall_time`` is in seconds since 1970.
    """
    headers = [
        ("Server", SERVER_NAME),
        ("Date", http.datetimeToString(wall_time).decode("ascii")),
        # A cache between would serve the state of a node that has changed (RFC 9111, section 5.2.2.5).
        ("Cache-Control", "no-store"),
    ]
    if response.status not in http.NO_BODY_CODES:
        headers.append(("Content-Length", str(len(response.body))))
    if response.body:
        headers.append(("Content-Type", response.content_type))
    return headers
