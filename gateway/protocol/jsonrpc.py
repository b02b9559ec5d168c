"""JSON-RPC 2.0 messages to and from bytes. No I/O, no state.

    {"jsonrpc":"2.0","id":7,"method":"disk.usage","params":{"path":"/"}}     Request
    {"jsonrpc":"2.0","method":"policy.changed","params":[3]}                 Notification
    {"jsonrpc":"2.0","id":7,"result":{"free":12}}                            Response
    {"jsonrpc":"2.0","id":7,"error":{"code":-32601,"message":"no such"}}     Response
    {"jsonrpc":"2.0","id":7,"error":{"code":-32001,…},"gateway":true}        Response: an error of the gateway itself
    [{...}, {...}]                                                           a batch: a list of these

``id``, ``params``, ``result`` and ``error`` are kept as the bytes received, without surrounding white space, and copied
into the messages sent: numbers keep their digits and strings their escapes. Refused, although a JSON parser might
accept it: bytes that are not UTF-8, an escaped lone surrogate (it has no UTF-8 form), more than ``MAX_DEPTH`` levels of
nesting.

No other member is copied. ``gateway`` beside ``error`` thus distinguishes the gateway's own errors from the errors of
clients and backends, which may be equal to them byte for byte.
"""

from __future__ import annotations

import itertools
import operator
import re
import sys
from array import array
from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gateway.protocol.errors import ErrorKind

T = TypeVar("T")

#: the WebSocket subprotocol of clients, backends and peers
SUBPROTOCOL = "wsgateway.jsonrpc.v1"
#: invalid messages in a row after which a connection is closed
MAX_BAD_MESSAGES = 8
#: levels of nested arrays and objects that a message may have, the message itself and its batch included
MAX_DEPTH = 512
#: messages that a batch may have
MAX_BATCH = 1000
#: invalid messages that a batch may have: each is answered, which takes ten times as long as decoding it
MAX_INVALID_IN_BATCH = 64
#: members named ``id`` that unreadable_response_id() checks, from the end
MAX_ID_CANDIDATES = 64


class Request(msgspec.Struct, frozen=True, gc=False):
    """A request (JSON-RPC 2.0, section 4). ``id`` and ``params`` are raw JSON; ``params`` is an array or an object."""

    id: bytes
    method: str
    params: bytes | None = None


class Notification(msgspec.Struct, frozen=True, gc=False):
    """A request without an id (section 4.1)."""

    method: str
    params: bytes | None = None


class Response(msgspec.Struct, frozen=True, gc=False):
    """A response (section 5). ``result`` or ``error`` is raw JSON, the other one ``None``."""

    id: bytes
    result: bytes | None
    error: bytes | None


class Invalid(msgspec.Struct, frozen=True, gc=False):
    """An invalid message. ``id`` is its raw id if it could be decoded, else ``null``; ``kind`` is ``PARSE_ERROR`` or
    ``INVALID_REQUEST``; ``detail`` says what is wrong, without any text of the sender."""

    id: bytes
    kind: ErrorKind
    detail: str


Message: TypeAlias = Request | Notification | Response | Invalid


class _Fields(msgspec.Struct, gc=False):
    """The members of a message of valid types. Unknown members are ignored; of duplicates the last counts."""

    jsonrpc: Literal["2.0"]
    id: Raw | UnsetType = UNSET
    method: str | UnsetType = UNSET
    params: Raw | UnsetType = UNSET
    result: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET


class _RawFields(msgspec.Struct, gc=False):
    """The members of any object, to report what is wrong with it."""

    jsonrpc: Raw | UnsetType = UNSET
    id: Raw | UnsetType = UNSET


class _Error(msgspec.Struct, gc=False):
    """An error object (section 5.1)."""

    code: int
    message: str


class _Mark(msgspec.Struct, gc=False):
    """What :func:`decode_gateway_marks` reads. Not among ``_Fields``: messages of clients and backends are decoded
    faster without it."""

    gateway: Raw | UnsetType = UNSET


_decode_fields = msgspec.json.Decoder(_Fields).decode
_decode_raw_fields = msgspec.json.Decoder(_RawFields).decode
_decode_error = msgspec.json.Decoder(_Error).decode
_decode_mark = msgspec.json.Decoder(_Mark).decode
_decode_any = msgspec.json.Decoder(Raw).decode
#: an array of at most MAX_BATCH elements: decoding an array_like type stops at the first element beyond, where a list
#: would be decoded whole, even with a million elements
_Batch = msgspec.defstruct(
    "_Batch",
    [(f"element_{number}", Raw | UnsetType, UNSET) for number in range(MAX_BATCH)],
    array_like=True,
    forbid_unknown_fields=True,
    gc=False,
)
_decode_array = msgspec.json.Decoder(_Batch).decode
_encode = msgspec.json.Encoder().encode

#: possible first bytes of an id
ID_FIRST_BYTES = b'"-0123456789n'
#: possible first bytes of params
PARAMS_FIRST_BYTES = b"[{"
BACKSLASH = 0x5C

_NULL = b"null"
_FIRST_BYTE = re.compile(rb"[ \t\r\n]*(.)", re.DOTALL)
#: the first half of a pair without its second, or the second without its first
_LONE_SURROGATE = re.compile(
    # The common prefix comes first, which makes the search fast.
    rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|[c-fC-F](?<!\\u[dD][89abAB]..\\u[dD].))",
    re.DOTALL,
)
#: bytes at the start whose depth is computed first
_HEAD_SIZE = 2**14
#: times that the innermost brackets are removed
_FLATTEN_PASSES = 4
_NOT_STRUCTURAL = bytes(set(range(256)) - set(b'[{]}"'))
_BRACKET_BITS = bytes.maketrans(b"[{]}", b"1100")
#: for each byte, taken as eight brackets of which 1 is an opening one: the depth after each of them
_BYTE_DEPTHS = [
    list(itertools.accumulate(1 if brackets & bit else -1 for bit in (128, 64, 32, 16, 8, 4, 2, 1)))
    for brackets in range(256)
]
_BYTE_NET_DEPTH = array("b", [depths[-1] for depths in _BYTE_DEPTHS]).tobytes()
_BYTE_MAX_DEPTH = bytes(max(0, *depths) for depths in _BYTE_DEPTHS)

_UUID = rb'"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"'
_LEADING_ID = re.compile(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"id"\s*:\s*' + _UUID)
_ID_MEMBER = re.compile(rb'"id"\s{0,8}:\s{0,8}' + _UUID)


def decode(payload: bytes) -> Message | list[Message]:
    """Decode a message or a batch. Never raises: a message that is wrong is an :class:`Invalid`.

    A batch that is empty, longer than ``MAX_BATCH``, or has more than ``MAX_INVALID_IN_BATCH`` invalid messages, is one
    ``Invalid`` (JSON-RPC 2.0, section 6).
    """
    # Nearly all payloads skip this: validate_payload() would find nothing in them.
    if not payload.isascii() or len(payload) > MAX_DEPTH or BACKSLASH in payload:
        invalid = validate_payload(payload)
        if invalid is not None:
            return invalid
    try:
        fields = _decode_fields(payload)
        # Most messages are results: check for these first.
        if fields.method is UNSET and fields.error is UNSET and fields.id is not UNSET and fields.result is not UNSET:
            id = bytes(fields.id)
            if id[0] in ID_FIRST_BYTES:
                return Response(id, bytes(fields.result), None)
        return _classify(fields)
    except (msgspec.DecodeError, RecursionError):
        # Invalid, or decoded deep in the stack: decode it again, with the slower checks.
        return decode_nested(_decode, payload)


def validate_payload(payload: bytes) -> Invalid | None:
    """Check what a JSON parser might accept; return ``None`` if the payload passes."""
    if not payload.isascii() and not _is_utf8(payload):
        return Invalid(_NULL, ErrorKind.PARSE_ERROR, "not UTF-8")
    # The exact depth is computed only if there are enough brackets, in strings or not, closed again or not.
    may_be_deep = len(payload) > MAX_DEPTH and payload.count(b"[") + payload.count(b"{") > MAX_DEPTH
    if may_be_deep and _is_too_deep(payload):
        return Invalid(_NULL, ErrorKind.PARSE_ERROR, f"nested more than {MAX_DEPTH} levels deep")
    # Searching for an integer takes a tenth of the time of searching for bytes, and mostly finds none.
    if BACKSLASH in payload and b"\\u" in payload and _has_lone_surrogate(payload):
        return Invalid(_NULL, ErrorKind.PARSE_ERROR, "a string has an escaped lone surrogate")
    return None


def decode_nested(decode: Callable[[bytes], T], payload: bytes) -> T:
    """Decode a payload nested up to ``MAX_DEPTH`` levels, at any depth of the stack."""
    try:
        return decode(payload)
    except RecursionError:
        # Up to Python 3.11 each level of nesting counts as a call, in addition to those on the stack.
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + 2 * MAX_DEPTH)
        try:
            return decode(payload)
        finally:
            sys.setrecursionlimit(limit)


def _is_utf8(payload: bytes) -> bool:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True


def _has_lone_surrogate(payload: bytes) -> bool:
    # A double backslash starts no escape. It is replaced, not removed: else what precedes and follows might look like
    # a surrogate pair.
    return _LONE_SURROGATE.search(payload.replace(b"\\\\", b"__")) is not None


def _is_too_deep(payload: bytes) -> bool:
    """Return whether brackets outside of strings are nested more than ``MAX_DEPTH`` levels deep. Takes linear time.

    Exact, with two cheaper checks first, which decide for nearly all input: what is too deep is so from the start, and
    what has many brackets is mostly flat.
    """
    if len(payload) > _HEAD_SIZE and _depth(_brackets(payload[:_HEAD_SIZE])) > MAX_DEPTH:
        return True
    brackets = flatter = _brackets(payload)
    for _ in range(_FLATTEN_PASSES):
        # Removes up to two levels, the innermost ones.
        flatter = flatter.replace(b"[]", b"").replace(b"{}", b"")
        if len(flatter) + 2 * _FLATTEN_PASSES <= MAX_DEPTH:
            return False
    return _depth(brackets) > MAX_DEPTH


def _brackets(payload: bytes) -> bytes:
    """Return the brackets outside of strings."""
    without_escapes = payload.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(without_escapes.translate(None, _NOT_STRUCTURAL).split(b'"')[::2])


def _depth(brackets: bytes) -> int:
    """Return how deep brackets are nested."""
    # Eight at a time; the last group is padded with closing brackets.
    bits = brackets.translate(_BRACKET_BITS) + b"0" * (8 - len(brackets) % 8)
    groups = int(bits, 2).to_bytes(len(bits) // 8, "big")
    depths_before = itertools.accumulate(array("b", groups.translate(_BYTE_NET_DEPTH)), initial=0)
    max_depth: int = max(map(operator.add, depths_before, groups.translate(_BYTE_MAX_DEPTH)))
    return max_depth


def _decode(payload: bytes) -> Message | list[Message]:
    try:
        return _classify(_decode_fields(payload))
    except msgspec.ValidationError:
        # Decoding stops at the first member of a wrong type: what follows may not be JSON.
        match = _FIRST_BYTE.match(payload)
        try:
            if match and match[1] == b"[":
                return _decode_batch(payload)
            _decode_any(payload)
        except msgspec.DecodeError as e:
            return Invalid(_NULL, ErrorKind.PARSE_ERROR, str(e))
    except msgspec.DecodeError as e:
        return Invalid(_NULL, ErrorKind.PARSE_ERROR, str(e))
    return _diagnose(payload)


def _decode_batch(payload: bytes) -> Message | list[Message]:
    try:
        elements = _split_batch(payload)
    except msgspec.ValidationError:
        return Invalid(_NULL, ErrorKind.INVALID_REQUEST, f"a batch of more than {MAX_BATCH} messages")
    if not elements:
        return Invalid(_NULL, ErrorKind.INVALID_REQUEST, "an empty batch")
    messages: list[Message] = []
    invalid = 0
    for element in elements:
        try:
            message = _classify(_decode_fields(element))
        except msgspec.ValidationError:
            message = _diagnose(element)
        messages.append(message)
        if isinstance(message, Invalid):
            invalid += 1
            if invalid > MAX_INVALID_IN_BATCH:
                return Invalid(
                    _NULL,
                    ErrorKind.INVALID_REQUEST,
                    f"a batch with more than {MAX_INVALID_IN_BATCH} invalid messages",
                )
    return messages


def _split_batch(payload: bytes) -> list[Raw]:
    return [element for element in msgspec.structs.astuple(_decode_array(payload)) if element is not UNSET]


def _classify(fields: _Fields) -> Message:
    """Determine the kind of a message by its members (sections 4 and 5)."""
    id = _NULL
    if fields.id is not UNSET:
        id = bytes(fields.id)
        if id[0] not in ID_FIRST_BYTES:
            return Invalid(_NULL, ErrorKind.INVALID_REQUEST, "the id is neither a string, a number nor null")
    if fields.method is UNSET:
        return _classify_response(fields, id)
    if fields.result is not UNSET or fields.error is not UNSET:
        return Invalid(id, ErrorKind.INVALID_REQUEST, "a method beside a result or an error")
    params = None
    if fields.params is not UNSET:
        params = bytes(fields.params)
        if params[0] not in PARAMS_FIRST_BYTES:
            return Invalid(id, ErrorKind.INVALID_REQUEST, "params are neither an array nor an object")
    if fields.id is UNSET:
        return Notification(fields.method, params)
    return Request(id, fields.method, params)


def _classify_response(fields: _Fields, id: bytes) -> Message:
    if fields.error is UNSET:
        if fields.result is UNSET:
            return Invalid(id, ErrorKind.INVALID_REQUEST, "neither a method, a result nor an error")
        if fields.id is UNSET:
            return Invalid(id, ErrorKind.INVALID_REQUEST, "a response without an id")
        return Response(id, bytes(fields.result), None)
    if fields.result is not UNSET:
        return Invalid(id, ErrorKind.INVALID_REQUEST, "both a result and an error")
    if fields.id is UNSET:
        return Invalid(id, ErrorKind.INVALID_REQUEST, "a response without an id")
    error = bytes(fields.error)
    try:
        _decode_error(error)
    except msgspec.ValidationError:
        return Invalid(id, ErrorKind.INVALID_REQUEST, "the error is not an object with an integer code and a message")
    return Response(id, None, error)


def _diagnose(payload: bytes | Raw) -> Invalid:
    """Report why valid JSON is not a message."""
    try:
        fields = _decode_raw_fields(payload)
    except msgspec.ValidationError:
        return Invalid(_NULL, ErrorKind.INVALID_REQUEST, "a message must be an object")
    id = _NULL if fields.id is UNSET else bytes(fields.id)
    if id[0] not in ID_FIRST_BYTES:
        id = _NULL
    if fields.jsonrpc is UNSET or _decode_scalar(fields.jsonrpc) != "2.0":
        return Invalid(id, ErrorKind.INVALID_REQUEST, 'jsonrpc is not "2.0"')
    return Invalid(id, ErrorKind.INVALID_REQUEST, "the method is not a string")


def _decode_scalar(raw: Raw) -> str | None:
    try:
        return msgspec.json.decode(raw, type=str)
    except msgspec.ValidationError:
        return None


def encode_request(id: bytes, method: str, params: bytes | None) -> bytes:
    """Encode a request; ``id`` and ``params`` are raw JSON."""
    if params is None:
        return b'{"jsonrpc":"2.0","id":%b,"method":%b}' % (id, _encode(method))
    return b'{"jsonrpc":"2.0","id":%b,"method":%b,"params":%b}' % (id, _encode(method), params)


def encode_notification(method: str, params: bytes | None) -> bytes:
    """Encode a notification; ``params`` are raw JSON."""
    if params is None:
        return b'{"jsonrpc":"2.0","method":%b}' % _encode(method)
    return b'{"jsonrpc":"2.0","method":%b,"params":%b}' % (_encode(method), params)


def encode_result(id: bytes, result: bytes) -> bytes:
    """Encode a response that carries a result; both are raw JSON."""
    return b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (id, result)


def encode_error(id: bytes, error: bytes) -> bytes:
    """Encode a response that carries an error object of a client or a backend; both are raw JSON."""
    return b'{"jsonrpc":"2.0","id":%b,"error":%b}' % (id, error)


def encode_gateway_error(id: bytes, error: bytes) -> bytes:
    """Encode a response that carries an error object of the gateway itself; both are raw JSON."""
    return b'{"jsonrpc":"2.0","id":%b,"error":%b,"gateway":true}' % (id, error)


def encode_batch(messages: list[bytes]) -> bytes:
    """Encode a batch of encoded messages, or of encoded responses to one."""
    return b"[%b]" % b",".join(messages)


def decode_gateway_marks(payload: bytes) -> list[bool]:
    """Return whether a message, or each message of a batch, is marked as an error of the gateway itself.

    ``payload`` is one that :func:`decode` does not return an ``Invalid`` for. The mark means something only in what a
    gateway has sent.
    """
    match = _FIRST_BYTE.match(payload)
    if match and match[1] == b"[":
        return [decode_nested(_has_mark, bytes(element)) for element in decode_nested(_split_batch, payload)]
    return [decode_nested(_has_mark, payload)]


def _has_mark(message: bytes) -> bool:
    try:
        mark = _decode_mark(message).gateway
    except msgspec.ValidationError:
        # In a batch, a message may not even be an object.
        return False
    return mark is not UNSET and bytes(mark) == b"true"


def unreadable_response_id(payload: bytes) -> str | None:
    """Guess the UUID that is the id of a response that cannot be parsed; ``None`` without one. Takes linear time.

    Returns the id among the first two members, else the last UUID among the last ``MAX_ID_CANDIDATES`` members named
    ``id``, since the result may have such members, too. The caller must check that it awaits a response of that id from
    that sender.
    """
    match = _LEADING_ID.match(payload)
    if match:
        return match[1].decode("ascii")
    offset = len(payload)
    for _ in range(MAX_ID_CANDIDATES):
        offset = payload.rfind(b'"id"', 0, offset)
        if offset < 0:
            return None
        match = _ID_MEMBER.match(payload, offset)
        if match:
            return match[1].decode("ascii")
    return None
