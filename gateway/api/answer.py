"""What the backend endpoint answers: a status, a body, and the few headers that differ."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec

from gateway.edge.head import Refusal
from gateway.rpc import jsonrpc
from gateway.rpc.errors import RpcError

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
