"""What a backend is told became of a message of its, over HTTP or over a WebSocket."""

from __future__ import annotations

import msgspec
from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.auth.grants import Forbidden, Grant
from gateway.rpc import jsonrpc
from gateway.rpc.errors import Kind, RpcError
from gateway.rpc.interface import Reply

_log = Logger()

#: JSON-RPC 2.0, section 5.1: a fault of the gateway itself
INTERNAL_ERROR = -32603


def response(reply: Reply, id: bytes) -> bytes:
    """The response to a call of that raw id: what the client answered, its own error too, byte for byte."""
    if reply.result is not None:
        return jsonrpc.encode_result(id, reply.result)
    assert reply.error is not None
    return jsonrpc.encode_error(id, reply.error)


def invalid(message: jsonrpc.Invalid | jsonrpc.Response, client_id: str | None = None) -> RpcError:
    """The error for a message that cannot be carried out."""
    if isinstance(message, jsonrpc.Response):
        return RpcError(Kind.INVALID_REQUEST, client_id, detail="a response to nothing that was asked here")
    return RpcError(message.kind, client_id, detail=message.detail)


def permit(grant: Grant, verb: str, client_id: str | None = None) -> None:
    """Raise ``RpcError`` unless a grant is for that; before anything is looked up that is about the client."""
    try:
        grant.check(verb, client_id)
    except Forbidden as e:
        raise RpcError(Kind.FORBIDDEN, client_id, detail=str(e)) from None


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
