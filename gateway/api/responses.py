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

from gateway.auth.backend_tokens import Forbidden, Grant
from gateway.protocol import jsonrpc
from gateway.protocol.errors import Kind, RpcError
from gateway.protocol.handshake import Refusal
from gateway.rpc.pending import Reply

JSON = "application/json"
SERVER = "wsgateway"
#: so many bytes more than the largest message may be what a backend sends: the message is in an envelope
ENVELOPE = 4096


@attrs.frozen
class Answer:
    """One HTTP response; ``content_type`` goes with a body alone."""

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


def json_answer(status: int, value: Any) -> Answer:
    """An answer whose body is JSON."""
    return Answer(status, msgspec.json.encode(value))


def refusal(status: int, word: str, message: str, *headers: tuple[str, str]) -> Answer:
    """An answer that says in one word, and in one sentence, why not."""
    return Answer(status, msgspec.json.encode({"error": word, "message": message}), headers=headers)


def refused(by: Refusal) -> Answer:
    """The answer that a refusal of the guard comes to."""
    return refusal(by.status, by.word, by.message, *by.headers)


def rpc_refusal(error: RpcError, id: bytes = b"null") -> Answer:
    """A JSON-RPC error response, with the HTTP status that goes with its code."""
    return Answer(error.http_status, jsonrpc.encode_error(id, error.to_json()))


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
