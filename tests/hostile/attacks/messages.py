"""Messages that violate JSON-RPC 2.0, too many messages, and large ones."""

from __future__ import annotations

import json
from collections import Counter

from tests.hostile.attack import Cases, Seen, Size, Target, attack, cases
from tests.hostile.attacks.frames import BUFFERS, LIMIT, PAUSED
from tests.hostile.raw_connection import frame, name

#: error codes: not JSON, not JSON-RPC, no such method, too many calls
BROKEN, INVALID, UNKNOWN = "error -32700", "error -32600", "error -32601"


def responses(target: Target, data: bytes) -> str:
    """Send a message or a batch as a client; return the outcome."""
    with target.client(name()) as connection:
        connection.send(frame(data))
        return " and ".join(_describe(text) for text in connection.texts()) or "nothing"


def _describe(text: str) -> str:
    if text.startswith("closed"):
        return text
    # Python's int() refuses a million digits.
    answers = json.loads(text, parse_int=str)
    if isinstance(answers, list):
        return f"a batch of {len(answers)}: {_describe(json.dumps(answers[0]))}"
    return f"error {answers['error']['code']}" if "error" in answers else "a result"


def _of(id: str, rest: str = '"method":"m"') -> bytes:
    return f'{{"jsonrpc":"2.0","id":{id},{rest}}}'.encode()


DEEP: Cases = {
    "arrays 100,000 deep": (b"[" * 100_000, BROKEN),
    "arrays 100,000 deep, closed": (b"[" * 100_000 + b"]" * 100_000, BROKEN),
    "objects 100,000 deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, BROKEN),
    "params 513 deep": (b'{"jsonrpc":"2.0","id":1,"method":"m","params":' + b"[" * 513 + b"]" * 513 + b"}", BROKEN),
    "params 511 deep": (b'{"jsonrpc":"2.0","id":1,"method":"m","params":' + b"[" * 511 + b"]" * 511 + b"}", UNKNOWN),
    "a result 100,000 deep": (_of('"x"', '"result":' + "[" * 100_000 + "]" * 100_000), BROKEN),
    "brackets in a string": (_of("1", '"method":"m","params":["' + "[" * 100_000 + '"]'), UNKNOWN),
    "a million closing brackets": (b"]" * 1_000_000, BROKEN),
    "a million quotes": (b'"' * 1_000_000, BROKEN),
    "a million backslashes": (b'"' + b"\\" * 1_000_001 + b'"', BROKEN),
    "a million commas": (b"[" + b"," * 1_000_000 + b"]", BROKEN),
    "nested batches": (b"[" * 300 + _of("1") + b"]" * 300, "a batch of 1: error -32600"),
}
deep_json = cases(
    "deep-json", "JSON nested 100,000 levels deep, and a million of one character", "-32700", DEEP, responses
)

_DIGITS = "1" * 1_000_000
NUMBERS: Cases = {
    "an id of a million digits": (_of(_DIGITS), UNKNOWN),
    "params of a million digits": (_of("1", f'"method":"m","params":[{_DIGITS}]'), UNKNOWN),
    "an exponent of a million digits": (_of("1", f'"method":"m","params":[1e{_DIGITS}]'), UNKNOWN),
    "a result of a million digits": (_of('"x"', f'"result":{_DIGITS}'), "nothing"),
    "1e999999": (_of("1e999999"), UNKNOWN),
    "-1e999999": (_of("-1e999999"), UNKNOWN),
    "an error code of a million digits": (_of('"x"', f'"error":{{"code":{_DIGITS},"message":"m"}}'), INVALID),
    "an error code of 1e999": (_of('"x"', '"error":{"code":1e999,"message":"m"}'), INVALID),
    "NaN": (_of("NaN"), BROKEN),
    "Infinity": (_of("Infinity"), BROKEN),
    "0x10": (_of("0x10"), BROKEN),
    "007": (_of("007"), BROKEN),
    "a version of a million digits": (f'{{"jsonrpc":{_DIGITS},"id":1,"method":"m"}}'.encode(), INVALID),
}
huge_numbers = cases(
    "huge-numbers",
    "numbers of a million digits, 1e999999, NaN",
    "passes them on byte for byte, or refuses them",
    NUMBERS,
    responses,
)

_LONG = "x" * (LIMIT - 60)
IDS: Cases = {
    "null": (_of("null"), UNKNOWN),
    "true": (_of("true"), INVALID),
    "a float": (_of("1.5"), UNKNOWN),
    "an array": (_of("[1]"), INVALID),
    "an object": (_of('{"a":1}'), INVALID),
    "a string of a megabyte": (_of(f'"{_LONG}"'), UNKNOWN),
    "twice": (b'{"jsonrpc":"2.0","id":1,"id":2,"method":"m"}', UNKNOWN),
    "twice, once of a wrong type": (b'{"jsonrpc":"2.0","id":[],"id":2,"method":"m"}', UNKNOWN),
    "escaped": (_of(r'"\u0031\u0000\n"'), UNKNOWN),
    "with a lone surrogate": (_of(r'"\ud800"'), BROKEN),
    "with surrogates in the wrong order": (_of(r'"\udc00\ud800"'), BROKEN),
    "with a pair": (_of(r'"\ud83d\ude00"'), UNKNOWN),
    "with a control character": (_of('"\x01"'), BROKEN),
    "empty": (_of('""'), UNKNOWN),
    "nothing": (b"", BROKEN),
    "white space": (b" \r\n\t" * 1000, BROKEN),
    "a byte order mark": (b"\xef\xbb\xbf" + _of("1"), BROKEN),
    "text behind it": (_of("1") + b"{}", BROKEN),
    "a scalar": (b"7", INVALID),
    "no version": (b'{"id":1,"method":"m"}', INVALID),
    "version 1.0": (b'{"jsonrpc":"1.0","id":1,"method":"m"}', INVALID),
    "a method that is a number": (b'{"jsonrpc":"2.0","id":1,"method":7}', INVALID),
    "params that are a string": (b'{"jsonrpc":"2.0","id":1,"method":"m","params":"x"}', INVALID),
    "a method beside a result": (_of("1", '"method":"m","result":1'), INVALID),
    "a result beside an error": (_of("1", '"result":1,"error":{"code":1,"message":"m"}'), INVALID),
    "an error that is a string": (_of("1", '"error":"no"'), INVALID),
    "one of the gateway's own methods": (_of("1", '"method":"gateway.goaway"'), UNKNOWN),
    "one that it tells": (
        b'{"jsonrpc":"2.0","method":"gateway.goaway","params":{"url":"ws://evil.example"}}',
        "nothing",
    ),
    "a backend's method": (_of("1", '"method":"client.call","params":{"client":"well-behaved","method":"m"}'), UNKNOWN),
}
odd_ids = cases(
    "odd-messages",
    "ids of every JSON type, duplicate, escaped, a megabyte long; contradictory members; reserved "
    "methods of the gateway",
    "-32600 or -32700 if the message is not JSON-RPC; otherwise handles it like any message",
    IDS,
    responses,
)

_ONE = _of("1")
BATCHES: Cases = {
    "100,000 requests": (b"[" + b",".join([b'{"a":1}'] * 100_000) + b"]", INVALID),
    "1,001": (b"[" + b",".join([_ONE] * 1001) + b"]", INVALID),
    "1,000 bad ones": (b"[" + b",".join([b"1"] * 1000) + b"]", INVALID),
    "1,000 requests": (b"[" + b",".join([_ONE] * 1000) + b"]", "a batch of 1000: error -32601"),
    "1,000 responses": (b"[" + b",".join([_of('"x"', '"result":1')] * 1000) + b"]", "nothing"),
    "an empty one": (b"[]", INVALID),
    "one in another": (b"[[" + _ONE + b"]]", "a batch of 1: error -32600"),
    "500,000 empty arrays": (b"[" + b",".join([b"[]"] * 340_000) + b"]", INVALID),
}
batches = cases(
    "batches",
    "batches of 100,000, of 1,000 and of 1,000 invalid messages, empty and nested batches",
    "-32600 once if the batch is too long or mostly invalid; otherwise one batch of responses",
    BATCHES,
    responses,
    memory=32,
)


@attack("consecutive messages that are not JSON-RPC", "closes with 1008 after the 8th", "closed 1008")
def bad_messages(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        for text in (
            b"{",
            b"{}",
            b"[]",
            b"[1,2,3]",
            _of("[]"),
            b"\x00",
            b'{"jsonrpc":"2.0","id":1,"result":1,"error":1}',
        ):
            with target.client(name()) as connection:
                connection.send(frame(text) * 20)
                seen[connection.read_outcome()] += 1
    return seen


def pour(target: Target, size: Size, message: bytes, many: int, *, framed: bool = False) -> Seen:
    """Let clients send a message, or data that is ``framed`` already, as fast as possible, and read all responses."""
    seen: Seen = Counter()
    data = message if framed else frame(message)
    data *= max(1, (1 << 20) // len(data))
    before = target.pauses()
    connections = [target.client(name()) for _ in range(many)]
    paused = [not connection.send_repeatedly(data, BUFFERS) for connection in connections]
    for _ in size.rounds():
        for number, connection in enumerate(connections):
            connection.read_all()
            if connection.alive:
                paused[number] |= not connection.send_repeatedly(data, BUFFERS, 0.01)
            else:
                seen["closed"] += 1
                connections[number] = target.client(name())
    meant = target.pauses() - before >= many
    for connection, was_paused in zip(connections, paused, strict=True):
        seen[PAUSED if was_paused and meant else "never paused"] += 1
        connection.drop()
    return seen


@attack(
    "notifications at a hundred times --messages-per-client, from eight clients",
    "throttles reading to the rate; the buffers of the senders fill",
    PAUSED,
)
def too_many_messages(target: Target, size: Size) -> Seen:
    return pour(target, size, b'{"jsonrpc":"2.0","method":"m","params":[1]}', 8 if size.large else 2)


@attack("thousands of calls that no backend serves", "-32601 to each, at the rate limit", PAUSED)
def unserved_requests(target: Target, size: Size) -> Seen:
    return pour(target, size, _of("1"), 8 if size.large else 2)


@attack("messages of a mebibyte, from eight clients at full speed", "reads three a second from each", PAUSED, memory=64)
def large_messages(target: Target, size: Size) -> Seen:
    text = b'{"jsonrpc":"2.0","method":"m","params":["' + b"a" * (LIMIT - 60) + b'"]}'
    return pour(target, size, text, 8 if size.large else 2)


@attack("the same, with the content that is most expensive to parse", "the same", PAUSED, memory=64)
def costly_messages(target: Target, size: Size) -> Seen:
    text = b'{"jsonrpc":"2.0","method":"m","params":[' + rb'"\u00e4\\[",[[]],' * ((LIMIT - 80) // 17) + b"1]}"
    return pour(target, size, text, 8 if size.large else 2)


@attack(
    "batches of a thousand calls, from eight clients at full speed",
    "reads one in five seconds from each",
    PAUSED,
    memory=64,
)
def many_batches(target: Target, size: Size) -> Seen:
    return pour(target, size, b"[" + b",".join([_ONE] * 1000) + b"]", 8 if size.large else 2)


@attack(
    "messages of a mebibyte that are most expensive to refuse, mixed with valid ones, from eight clients",
    "reads three a second from each",
    PAUSED,
    memory=128,
)
def costly_nonsense(target: Target, size: Size) -> Seen:
    fine = frame(b'{"jsonrpc":"2.0","method":"m"}')
    nonsense = (
        b"[" + b"[]," * 340_000 + b"[]]",
        b"[" + b"," * 1_000_000 + b"]",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    )
    return pour(target, size, fine.join(frame(text) for text in nonsense), 8 if size.large else 2, framed=True)
