"""Reference implementation: classify a JSON-RPC 2.0 payload with Python's JSON parser."""

from __future__ import annotations

import json
from typing import Any

from gateway.protocol.jsonrpc import MAX_BATCH, MAX_DEPTH, MAX_INVALID_IN_BATCH

PARSE_ERROR, INVALID, REQUEST, NOTIFICATION, RESPONSE = "parse error", "invalid", "request", "notification", "response"
#: either is right: an error object whose code is an integer in another notation, or is out of range
EITHER = "response or invalid"


class Number(str):
    """A number, as written."""


class Object(list[tuple[str, Any]]):
    """The members of an object; names may be duplicate."""


def kinds(payload: bytes) -> str | list[str]:
    """Return the kind of a message, or the kinds of a batch."""
    try:
        value = json.loads(
            payload.decode(),
            parse_constant=_refuse,
            parse_int=Number,
            parse_float=Number,
            object_pairs_hook=Object,
        )
        if _depth(value) > MAX_DEPTH or _has_surrogate(value):
            return PARSE_ERROR
    except (ValueError, RecursionError):
        return PARSE_ERROR
    if isinstance(value, Object) or not isinstance(value, list):
        return _kind(value)
    kinds = [_kind(one) for one in value]
    if not 0 < len(kinds) <= MAX_BATCH or kinds.count(INVALID) > MAX_INVALID_IN_BATCH:
        return INVALID
    return kinds


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Object):
        return [inner for _, inner in value]
    return value if isinstance(value, list) else []


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, list)]:
        depth += 1
        level = [inner for one in level for inner in _inside(one)]
    return depth


def _has_surrogate(value: Any) -> bool:
    level = [value]
    while level:
        names = [name for one in level if isinstance(one, Object) for name, _ in one]
        texts = names + [one for one in level if isinstance(one, str)]
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            return True
        level = [inner for one in level for inner in _inside(one)]
    return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Number)


def _kind(value: Any) -> str:
    if not isinstance(value, Object):
        return INVALID
    members = dict(value)
    # The last one of duplicate members counts, but all must have the right type.
    versions = [inner for name, inner in value if name == "jsonrpc"]
    methods = [inner for name, inner in value if name == "method"]
    if not versions or any(not _is_text(one) or one != "2.0" for one in versions):
        return INVALID
    if not all(map(_is_text, methods)):
        return INVALID
    if "id" in members and not (members["id"] is None or isinstance(members["id"], str)):
        return INVALID
    if methods:
        if "result" in members or "error" in members or not isinstance(members.get("params", []), list):
            return INVALID
        return REQUEST if "id" in members else NOTIFICATION
    if "id" not in members or ("result" in members) == ("error" in members):
        return INVALID
    return RESPONSE if "result" in members else _kind_of_error(members["error"])


def _kind_of_error(error: Any) -> str:
    if not isinstance(error, Object):
        return INVALID
    codes = [inner for name, inner in error if name == "code"]
    messages = [inner for name, inner in error if name == "message"]
    if not codes or not messages or not all(map(_is_text, messages)):
        return INVALID
    if not all(isinstance(code, Number) for code in codes):
        return INVALID
    plain = all(code.lstrip("-").isdigit() and len(code) < 18 for code in codes)
    return RESPONSE if plain else EITHER
