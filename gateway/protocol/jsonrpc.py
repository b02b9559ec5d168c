"""JSON-RPC 2.0 messages to and from bytes. No I/O, no state.

    {"jsonrpc":"2.0","id":7,"method":"disk.usage","params":{"path":"/"}}     Request
    {"jsonrpc":"2.0","method":"policy.changed","params":[3]}                 Notification
    {"jsonrpc":"2.0","id":7,"result":{"free":12}}                            Response
    {"jsonrpc":"2.0","id":7,"error":{"code":-32601,"message":"no such"}}     Response
    [{...}, {...}]                                                           a batch: a list of those

``id``, ``params``, ``result`` and ``error`` are kept as the bytes that came, without the white space around them, and
spliced into what is sent: numbers keep their digits and strings their escapes. What is refused although a JSON
parser might take it: bytes that are not UTF-8, an escaped lone surrogate (it has no UTF-8 form), more than
``MAX_DEPTH`` levels of nesting.
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

#: levels of nested arrays and objects that a message may have, the message itself and its batch included
MAX_DEPTH = 512
#: messages that a batch may have
MAX_BATCH = 1000
#: what in it may be no messages: each of these is answered, which takes ten times as long as to read it
MAX_INVALID_IN_BATCH = 64


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
    """A response (section 5): raw JSON of ``result`` or of ``error``; the other one is ``None``."""

    id: bytes
    result: bytes | None
    error: bytes | None


class Invalid(msgspec.Struct, frozen=True, gc=False):
    """What is no message. ``id`` is its raw id if that could be read, else ``null``; ``kind`` is ``PARSE_ERROR`` or
    ``INVALID_REQUEST``; ``detail`` says what is wrong, without any text of the sender."""

    id: bytes
    kind: ErrorKind
    detail: str


Message: TypeAlias = Request | Notification | Response | Invalid


class _Fields(msgspec.Struct, gc=False):
    """The members of a message whose types are right; others are skipped, of several with one name the last counts."""

    jsonrpc: Literal["2.0"]
    id: Raw | UnsetType = UNSET
    method: str | UnsetType = UNSET
    params: Raw | UnsetType = UNSET
    result: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET


class _RawFields(msgspec.Struct, gc=False):
    """The same for any object, to say what is wrong with it."""

    jsonrpc: Raw | UnsetType = UNSET
    id: Raw | UnsetType = UNSET


class _Error(msgspec.Struct, gc=False):
    """An error object (section 5.1)."""

    code: int
    message: str


_decode_fields = msgspec.json.Decoder(_Fields).decode
_decode_raw_fields = msgspec.json.Decoder(_RawFields).decode
_decode_error = msgspec.json.Decoder(_Error).decode
_decode_any = msgspec.json.Decoder(Raw).decode
#: An array of so many elements at most: an array_like type ends at the first one too many, where a list is read whole,
#: be it a million elements.
_Batch = msgspec.defstruct(
    "_Batch",
    [(f"element_{number}", Raw | UnsetType, UNSET) for number in range(MAX_BATCH)],
    array_like=True,
    forbid_unknown_fields=True,
    gc=False,
)
_decode_array = msgspec.json.Decoder(_Batch).decode
_encode = msgspec.json.Encoder().encode

#: the first bytes of what may be an id, and params
ID_FIRST_BYTES = b'"-0123456789n'
PARAMS_FIRST_BYTES = b"[{"

_NULL = b"null"
BACKSLASH = 0x5C
_FIRST_BYTE = re.compile(rb"[ \t\r\n]*(.)", re.DOTALL)
#: the first half of a pair without its second, or the second without its first
_LONE_SURROGATE = re.compile(
    # What both have in common comes first: that is what makes the search fast.
    rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|[c-fC-F](?<!\\u[dD][89abAB]..\\u[dD].))",
    re.DOTALL,
)
#: so many bytes are looked at alone at first; so often the innermost brackets are taken away
_HEAD_SIZE, _FLATTEN_PASSES = 16384, 4
_NOT_STRUCTURAL = bytes(set(range(256)) - set(b'[{]}"'))
_BRACKET_BITS = bytes.maketrans(b"[{]}", b"1100")
#: for each byte, as eight brackets of which the opening ones are 1: the levels after each of them
_BYTE_DEPTHS = [
    list(itertools.accumulate(1 if eight & bit else -1 for bit in (128, 64, 32, 16, 8, 4, 2, 1)))
    for eight in range(256)
]
_BYTE_NET_DEPTH = array("b", [levels[-1] for levels in _BYTE_DEPTHS]).tobytes()
_BYTE_MAX_DEPTH = bytes(max(0, *levels) for levels in _BYTE_DEPTHS)

_UUID = rb'"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"'
_LEADING_ID = re.compile(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"id"\s*:\s*' + _UUID)
_ID_MEMBER = re.compile(rb'"id"\s{0,8}:\s{0,8}' + _UUID)
#: of so many members that may be ids, the last ones, it is looked which is one
MAX_ID_CANDIDATES = 64


def decode(payload: bytes) -> Message | list[Message]:
    """Read a message or a batch. Never raises: what is wrong with it is an :class:`Invalid`.

    A batch that is empty, longer than ``MAX_BATCH``, or in which more than ``MAX_INVALID`` are no messages, is one
    ``Invalid`` (JSON-RPC 2.0, section 6).
    """
    # Nearly all pass at a glance: flaw() would find nothing.
    if not payload.isascii() or len(payload) > MAX_DEPTH or BACKSLASH in payload:
        found = validate_payload(payload)
        if found is not None:
            return found
    try:
        fields = _decode_fields(payload)
        # Most messages are results: these are told first.
        if fields.method is UNSET and fields.error is UNSET and fields.id is not UNSET and fields.result is not UNSET:
            id = bytes(fields.id)
            if id[0] in ID_FIRST_BYTES:
                return Response(id, bytes(fields.result), None)
        return _classify(fields)
    except (msgspec.DecodeError, RecursionError):
        # No message, or one in a deep stack: it is read once more, with more care.
        return decode_nested(_decode, payload)


def validate_payload(payload: bytes) -> Invalid | None:
    """What is wrong with a payload that a JSON parser might not see, or ``None``."""
    if not payload.isascii() and not _is_utf8(payload):
        return Invalid(_NULL, ErrorKind.PARSE_ERROR, "not UTF-8")
    # The exact depth is looked at only where there are brackets enough, in strings or not, closed again or not.
    enough = len(payload) > MAX_DEPTH and payload.count(b"[") + payload.count(b"{") > MAX_DEPTH
    if enough and _is_too_deep(payload):
        return Invalid(_NULL, ErrorKind.PARSE_ERROR, f"nested more than {MAX_DEPTH} levels deep")
    # The search for an integer takes a tenth of the time of that for bytes, and mostly there is none.
    if BACKSLASH in payload and b"\\u" in payload and _has_lone_surrogate(payload):
        return Invalid(_NULL, ErrorKind.PARSE_ERROR, "a lone surrogate is escaped in a string")
    return None


def decode_nested(decode: Callable[[bytes], T], payload: bytes) -> T:
    """Decode what may be nested up to ``MAX_DEPTH`` levels, however deep the stack is already."""
    try:
        return decode(payload)
    except RecursionError:
        # Up to Python 3.11 every level of nesting counts like a call, on top of the calls that led here.
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
    # Two backslashes stand for one and begin no escape; something must stay in their place, or what is on both
    # sides of them would look like a pair.
    return _LONE_SURROGATE.search(payload.replace(b"\\\\", b"__")) is not None


def _is_too_deep(payload: bytes) -> bool:
    """Whether the brackets outside of strings are nested more than ``MAX_DEPTH`` levels deep; in linear time.

    Exact, but first it is looked for what is cheaper to find, since much is made to be neither: what is too deep is so
    from the beginning, and what is broad is mostly flat.
    """
    if len(payload) > _HEAD_SIZE and _depth(_brackets(payload[:_HEAD_SIZE])) > MAX_DEPTH:
        return True
    brackets = flatter = _brackets(payload)
    for _ in range(_FLATTEN_PASSES):
        # It takes up to two levels away, the innermost ones.
        flatter = flatter.replace(b"[]", b"").replace(b"{}", b"")
        if len(flatter) + 2 * _FLATTEN_PASSES <= MAX_DEPTH:
            return False
    return _depth(brackets) > MAX_DEPTH


def _brackets(payload: bytes) -> bytes:
    """The brackets outside of strings."""
    without_escapes = payload.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(without_escapes.translate(None, _NOT_STRUCTURAL).split(b'"')[::2])


def _depth(brackets: bytes) -> int:
    """How deep brackets are nested."""
    # Eight at a time; the last are filled up with closing brackets.
    bits = brackets.translate(_BRACKET_BITS) + b"0" * (8 - len(brackets) % 8)
    eights = int(bits, 2).to_bytes(len(bits) // 8, "big")
    before = itertools.accumulate(array("b", eights.translate(_BYTE_NET_DEPTH)), initial=0)
    deepest: int = max(map(operator.add, before, eights.translate(_BYTE_MAX_DEPTH)))
    return deepest


def _decode(payload: bytes) -> Message | list[Message]:
    try:
        return _classify(_decode_fields(payload))
    except msgspec.ValidationError:
        # It stops at the first member of a wrong type: what comes behind need not even be JSON.
        found = _FIRST_BYTE.match(payload)
        try:
            if found and found[1] == b"[":
                return _decode_batch(payload)
            _decode_any(payload)
        except msgspec.DecodeError as e:
            return Invalid(_NULL, ErrorKind.PARSE_ERROR, str(e))
    except msgspec.DecodeError as e:
        return Invalid(_NULL, ErrorKind.PARSE_ERROR, str(e))
    return _diagnose(payload)


def _decode_batch(payload: bytes) -> Message | list[Message]:
    try:
        elements = [element for element in msgspec.structs.astuple(_decode_array(payload)) if element is not UNSET]
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
                    f"a batch in which more than {MAX_INVALID_IN_BATCH} are no messages",
                )
    return messages


def _classify(fields: _Fields) -> Message:
    """Tell the kinds of messages from each other by their members (sections 4 and 5)."""
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
        return Invalid(id, ErrorKind.INVALID_REQUEST, "the error is no object with an integer code and a message")
    return Response(id, None, error)


def _diagnose(payload: bytes | Raw) -> Invalid:
    """Say why a piece of valid JSON is no message."""
    try:
        fields = _decode_raw_fields(payload)
    except msgspec.ValidationError:
        return Invalid(_NULL, ErrorKind.INVALID_REQUEST, "a message is an object")
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
    """Write a request; ``id`` and ``params`` are raw JSON."""
    if params is None:
        return b'{"jsonrpc":"2.0","id":%b,"method":%b}' % (id, _encode(method))
    return b'{"jsonrpc":"2.0","id":%b,"method":%b,"params":%b}' % (id, _encode(method), params)


def encode_notification(method: str, params: bytes | None) -> bytes:
    """Write a notification; ``params`` are raw JSON."""
    if params is None:
        return b'{"jsonrpc":"2.0","method":%b}' % _encode(method)
    return b'{"jsonrpc":"2.0","method":%b,"params":%b}' % (_encode(method), params)


def encode_result(id: bytes, result: bytes) -> bytes:
    """Write a response that carries a result; both are raw JSON."""
    return b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (id, result)


def encode_error(id: bytes, error: bytes) -> bytes:
    """Write a response that carries an error object; both are raw JSON."""
    return b'{"jsonrpc":"2.0","id":%b,"error":%b}' % (id, error)


def encode_batch(messages: list[bytes]) -> bytes:
    """Write a batch of encoded messages, or of encoded responses to one."""
    return b"[%b]" % b",".join(messages)


def unreadable_response_id(payload: bytes) -> str | None:
    """The UUID that a message has as its id although it cannot be parsed, or ``None``; in linear time.

    A guess: the id among the first two members, else the last text that looks like one among the last members of that
    name, since members of the result may be ids too. Whoever asks has to know whether it awaits a response of that id
    from that sender.
    """
    found = _LEADING_ID.match(payload)
    if found:
        return found[1].decode("ascii")
    at = len(payload)
    for _ in range(MAX_ID_CANDIDATES):
        at = payload.rfind(b'"id"', 0, at)
        if at < 0:
            return None
        found = _ID_MEMBER.match(payload, at)
        if found:
            return found[1].decode("ascii")
    return None
