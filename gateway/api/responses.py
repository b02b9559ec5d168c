"""What the backend endpoint answers: a status, a body, and the few headers that differ.

What a backend is told became of a message of its, over HTTP or over a WebSocket.
"""

from __future__ import annotations

from typing import Any

import attrs
import msgspec
from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.auth.backend_tokens import Grant
from gateway.auth.errors import ForbiddenError
from gateway.protocol import jsonrpc
from gateway.protocol.errors import ErrorKind, RequestRefusedError, RpcError
from gateway.rpc.pending import Reply

JSON_CONTENT_TYPE = "application/json"
SERVER_NAME = "wsgateway"
#: so many bytes more than the largest message may be what a backend sends: the message is in an envelope
MAX_ENVELOPE_SIZE = 4096


@attrs.frozen
class Response:
    """One HTTP response; ``content_type`` goes with a body alone."""

    status: int
    body: bytes = b""
    content_type: str = JSON_CONTENT_TYPE
    headers: tuple[tuple[str, str], ...] = ()


def json_response(status: int, value: Any) -> Response:
    """An answer whose body is JSON."""
    return Response(status, msgspec.json.encode(value))


def error_response(status: int, word: str, message: str, *headers: tuple[str, str]) -> Response:
    """An answer that says in one word, and in one sentence, why not."""
    return Response(status, msgspec.json.encode({"error": word, "message": message}), headers=headers)


def refusal_response(refusal: RequestRefusedError) -> Response:
    """The answer that a refusal of the guard comes to."""
    return error_response(refusal.status, refusal.reason, refusal.message, *refusal.headers)


def rpc_error_response(error: RpcError, id: bytes = b"null") -> Response:
    """A JSON-RPC error response, with the HTTP status that goes with its code."""
    return Response(error.http_status, jsonrpc.encode_error(id, error.to_json()))


_log = Logger()

#: JSON-RPC 2.0, section 5.1: a fault of the gateway itself
INTERNAL_ERROR = -32603


def encode_reply(reply: Reply, id: bytes) -> bytes:
    """The response to a call of that raw id: what the client answered, its own error too, byte for byte."""
    if reply.result is not None:
        return jsonrpc.encode_result(id, reply.result)
    assert reply.error is not None
    return jsonrpc.encode_error(id, reply.error)


def invalid_message_error(message: jsonrpc.Invalid | jsonrpc.Response, client_id: str | None = None) -> RpcError:
    """The error for a message that cannot be carried out."""
    if isinstance(message, jsonrpc.Response):
        return RpcError(ErrorKind.INVALID_REQUEST, client_id, detail="a response to nothing that was asked here")
    return RpcError(message.kind, client_id, detail=message.detail)


def require(grant: Grant, verb: str, client_id: str | None = None) -> None:
    """Raise ``RpcError`` unless a grant is for that; before anything is looked up that is about the client."""
    try:
        grant.check(verb, client_id)
    except ForbiddenError as e:
        raise RpcError(ErrorKind.FORBIDDEN, client_id, detail=str(e)) from None


def error_object(failure: Failure, client_id: str | None) -> bytes:
    """The JSON-RPC error object for a failure. One that is no ``RpcError`` is a fault of the gateway, and logged;
    ``CancelledError`` is raised again: nobody is there to be told."""
    failed = failure.value
    if isinstance(failed, RpcError):
        return failed.to_json()
    if isinstance(failed, CancelledError):
        raise failed
    _log.failure("a message for {client} failed", failure=failure, client=client_id)
    return msgspec.json.encode(
        {
            "code": INTERNAL_ERROR,
            "message": "the gateway failed; its log says why",
            # It cannot be told, so that the promise is not given.
            "data": {"client": client_id, "sent": True},
        }
    )
