"""Errors on the wire: of opening handshakes, and the error table of calls.

    RequestRefusedError        an opening handshake or HTTP request answered with an HTTP error
    InvalidResponseError       a peer's response to an opening handshake that breaks the protocol
    RpcError                   a call or notification that failed, by a row of the error table (ErrorKind)

Each row of the table has a JSON-RPC code, the HTTP status that goes with it, a message, and ``sent``: ``False``
guarantees that the other side did not get the call, ``True`` means that it may have, so that a retry may run it twice.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import attrs
import msgspec


class RequestRefusedError(Exception):
    """An opening handshake or HTTP request to answer with an HTTP error.

    ``reason`` is the error word: for programs, and the label of the metric. ``message`` is for people; it may have any
    characters. ``headers`` are added to the response. Raises ``ValueError`` if a header is not printable ASCII.
    """

    def __init__(self, status: int, reason: str, message: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        self.status = status
        self.reason = reason
        self.message = message
        self.headers = tuple(headers)
        for name, value in self.headers:
            if not (name + value).isascii() or not (name + value).isprintable():
                raise ValueError(f"the header {name!r}: {value!r} cannot be sent")
        super().__init__(f"{status} {reason}: {message}")


class InvalidResponseError(Exception):
    """A response to an opening handshake breaks the protocol. The text has no bytes of the response."""


@attrs.frozen
class ErrorDefinition:
    """One row of the error table. ``sent`` is ``None`` where it depends on the case."""

    code: int
    http_status: int
    message: str
    sent: bool | None


class ErrorKind(enum.Enum):
    """The error table. The first eight rows are the gateway's own, the others of JSON-RPC 2.0 (section 5.1)."""

    NOT_CONNECTED = ErrorDefinition(-32001, 404, "client not connected", False)
    TIMEOUT = ErrorDefinition(-32002, 504, "no response in time", True)
    CONNECTION_LOST = ErrorDefinition(-32003, 502, "connection lost before the response", True)
    NODE_UNREACHABLE = ErrorDefinition(
        -32004, 503, "the client's node cannot be reached, or was silent until the deadline", None
    )
    TOO_MANY_CALLS = ErrorDefinition(-32005, 429, "too many calls in flight", False)
    TOO_LARGE = ErrorDefinition(-32006, 413, "message too large", False)
    REGISTRY_UNAVAILABLE = ErrorDefinition(-32007, 503, "registry unavailable and the client is not local", False)
    FORBIDDEN = ErrorDefinition(-32008, 403, "not allowed with this token", False)
    PARSE_ERROR = ErrorDefinition(-32700, 400, "not JSON", False)
    INVALID_REQUEST = ErrorDefinition(-32600, 400, "not JSON-RPC 2.0", False)
    METHOD_NOT_FOUND = ErrorDefinition(-32601, 404, "method not found", False)
    INVALID_PARAMS = ErrorDefinition(-32602, 400, "invalid params", False)


class RpcError(Exception):
    """A call or notification that failed by a row of the error table.

    ``detail`` adds to the message of the table. ``sent`` must be given where the table has ``None``.
    """

    def __init__(
        self, kind: ErrorKind, client_id: str | None = None, *, sent: bool | None = None, detail: str | None = None
    ) -> None:
        if sent is None:
            sent = kind.value.sent
        if sent is None:
            raise ValueError(f"{kind.name} needs the argument sent")
        self.kind = kind
        self.client_id = client_id
        self.sent = sent
        self.detail = detail
        super().__init__(f"{kind.value.code} {detail or kind.value.message} (client {client_id!r}, sent {sent})")

    @property
    def code(self) -> int:
        """The JSON-RPC error code."""
        return self.kind.value.code

    @property
    def http_status(self) -> int:
        """The HTTP status that goes with the code."""
        return self.kind.value.http_status

    def to_json(self) -> bytes:
        """Encode the JSON-RPC error object (section 5.1); ``data`` has the client, ``sent``, and any detail."""
        data: dict[str, object] = {"client": self.client_id, "sent": self.sent}
        if self.detail is not None:
            data["detail"] = self.detail
        return msgspec.json.encode({"code": self.code, "message": self.kind.value.message, "data": data})
