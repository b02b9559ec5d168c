"""Encode and decode the JSON-RPC 2.0 messages between nodes. No I/O, no state.

    -> {"jsonrpc":"2.0","id":U,"method":"client.call","params":{"client":x,"generation":7,"method":…,"params":…,
        "timeout":4.5,"stale":true}}                       "params" and "stale" are optional
    <- {"jsonrpc":"2.0","id":U,"result":…}                 the client's result, byte for byte
    <- {"jsonrpc":"2.0","id":U,"error":{…},"from":"client"}      the client's own error, byte for byte
    <- {"jsonrpc":"2.0","id":U,"error":{…},"gateway":true}       the gateway's error; -32001 and -32007: not delivered
    -> client.notify {"client","generation","method","params"?,"stale"?}     <- null
    -> {"jsonrpc":"2.0","method":"peer.cancel","params":{"id":U}}            the caller has given up that call
    -> peer.fence {"client"}      <- null, once all earlier messages for that client are written to it, or have failed
    -> peer.floor {"generation"}                                             <- {"generation":8}
    -> peer.has {"client","generation"}                                      <- true or false
    -> peer.close {"client","generation","code","reason"}                    <- true or false
    -> peer.moved {"client","generation","node"}                             <- null
    -> peer.taken_back {"client","generation","node"}                        <- null
    -> peer.notify_prefix {"prefix","method","params"?}                      <- {"reached":12}
    -> peer.drain {}                                                         <- null
    -> peer.has_room {}                                                      <- true or false
    -> peer.rebalance {}                                                     <- {"moving":250}

U is a UUID. Every response has the id of its request. An error without ``from`` is the gateway's; nodes without
``Feature.MARK`` neither send ``gateway`` nor are sent it.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gateway.protocol import jsonrpc
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.jsonrpc import BACKSLASH, MAX_DEPTH, decode_nested, validate_payload
from gateway.rpc.errors import NotDelivered
from gateway.rpc.pending import Reply

#: the shortest timeout that is sent, in seconds
MIN_TIMEOUT = 0.001

_encode = msgspec.json.Encoder().encode
_decode_value = msgspec.json.Decoder(Raw).decode

#: how the responses of a node begin, up to the id
_RESPONSE_START = b'{"jsonrpc":"2.0","id":'
#: what follows the id, quotes included, in a response with a result
_RESULT_KEY = b',"result":'
_ID_START = len(_RESPONSE_START)
_ID_END = _ID_START + 38
_RESULT_START = _ID_END + len(_RESULT_KEY)

_KINDS_BY_CODE = {kind.value.code: kind for kind in ErrorKind}
_NOT_DELIVERED_BY_CODE = {
    ErrorKind.NOT_CONNECTED.value.code: NotDelivered.NOT_HERE,
    ErrorKind.REGISTRY_UNAVAILABLE.value.code: NotDelivered.LEASE_LOST,
}

#: an error of the gateway without its client_id: kind, sent, detail
GatewayFailure: TypeAlias = tuple[ErrorKind, bool, "str | None"]


class _Response(msgspec.Struct, gc=False):
    jsonrpc: Literal["2.0"]
    id: Raw
    result: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET
    sender: str | UnsetType = msgspec.field(name="from", default=UNSET)


class _ErrorData(msgspec.Struct, gc=False):
    sent: bool | UnsetType = UNSET
    detail: str | None = None


class _Error(msgspec.Struct, gc=False):
    code: int
    message: str
    data: _ErrorData | UnsetType = UNSET


_parse_response = msgspec.json.Decoder(_Response).decode
_parse_error = msgspec.json.Decoder(_Error).decode


def encode_message_params(client_id: str, generation: int, method: str, params: bytes | None, stale: bool) -> bytes:
    """Encode the params of ``client.call`` and ``client.notify``, without the closing brace; ``params`` is raw JSON."""
    return b'{"client":%b,"generation":%d,"method":%b%b%b%b' % (
        _encode(client_id),
        generation,
        _encode(method),
        b"" if params is None else b',"params":',
        b"" if params is None else params,
        b',"stale":true' if stale else b"",
    )


def encode_call(id: bytes, message: bytes, timeout: float) -> bytes:
    """Encode a ``client.call`` request; ``timeout`` is in seconds."""
    return b'{"jsonrpc":"2.0","id":%b,"method":"client.call","params":%b,"timeout":%g}}' % (
        id,
        message,
        timeout if timeout > MIN_TIMEOUT else MIN_TIMEOUT,
    )


def encode_notify(id: bytes, message: bytes) -> bytes:
    """Encode a ``client.notify`` request."""
    return b'{"jsonrpc":"2.0","id":%b,"method":"client.notify","params":%b}}' % (id, message)


def encode_request(id: bytes, method: str, params: bytes) -> bytes:
    """Encode any other request."""
    return jsonrpc.encode_request(id, method, params)


def encode_cancel(id: bytes) -> bytes:
    """Encode a ``peer.cancel`` notification."""
    return jsonrpc.encode_notification("peer.cancel", b'{"id":%b}' % id)


def message_id(payload: bytes) -> bytes:
    """Return the raw id of a request encoded by this module."""
    return payload[_ID_START:_ID_END]


def decode_response(payload: bytes) -> tuple[bytes, Reply | NotDelivered | GatewayFailure | None]:
    """Return the raw id of a response, and its content: ``None`` if that cannot be read. The id is empty for a message
    that is not a response."""
    # Nearly all payloads pass these cheap checks: validate_payload() would find nothing.
    if (not payload.isascii() or len(payload) > MAX_DEPTH or BACKSLASH in payload) and validate_payload(
        payload
    ) is not None:
        return _unreadable(payload)
    try:
        # Nearly all responses are results with this layout. The peer has validated the client's message, so only the
        # result is checked to be one value, in half the time of decoding the whole message.
        if (
            payload[_ID_END:_RESULT_START] == _RESULT_KEY
            and payload[:_ID_START] == _RESPONSE_START
            and payload[-1:] == b"}"
        ):
            result = payload[_RESULT_START:-1]
            try:
                _decode_value(result)
            except (msgspec.DecodeError, RecursionError):
                pass
            else:
                return payload[_ID_START:_ID_END], Reply(result, None)
        return _decode_general(decode_nested(_parse_response, payload))
    except msgspec.DecodeError:
        return _unreadable(payload)


def _decode_general(response: _Response) -> tuple[bytes, Reply | NotDelivered | GatewayFailure | None]:
    id = bytes(response.id)
    if response.error is UNSET:
        return id, None if response.result is UNSET else Reply(bytes(response.result), None)
    if response.result is not UNSET:
        return id, None
    if response.sender == "client":
        return id, Reply(None, bytes(response.error))
    try:
        error = decode_nested(_parse_error, bytes(response.error))
    except msgspec.DecodeError:
        return id, None
    data = _ErrorData() if error.data is UNSET else error.data
    if error.code in _NOT_DELIVERED_BY_CODE and data.sent is not True:
        return id, _NOT_DELIVERED_BY_CODE[error.code]
    kind = _KINDS_BY_CODE.get(error.code)
    if kind is None:
        return id, (ErrorKind.NODE_UNREACHABLE, True, f"the client's node answered {error.code}: {error.message}")
    sent = kind.value.sent if data.sent is UNSET else data.sent
    return id, (kind, True if sent is None else sent, data.detail)


def _unreadable(payload: bytes) -> tuple[bytes, None]:
    uuid = jsonrpc.unreadable_response_id(payload)
    return b"" if uuid is None else b'"%b"' % uuid.encode("ascii"), None


def to_rpc_error(failure: GatewayFailure, client_id: str) -> RpcError:
    """Return the error for the caller."""
    kind, sent, detail = failure
    return RpcError(kind, client_id, sent=sent, detail=detail)


def encode_params(**params: Any) -> bytes:
    """Encode the params of a request."""
    return _encode(params)
