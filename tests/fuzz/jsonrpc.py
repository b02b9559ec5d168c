"""Text messages (JSON-RPC 2.0). An input is the payload of a message.

* It is parsed as by Python's JSON parser and the specification.
* Raw values are slices of the payload; encoding them again gives an equal message.
* From a client, it completes only calls to that client, and only with its own content; the response is JSON of limited
  size, and is sent only to that client.
* From a backend or another node, the fast path and the general path have the same outcome.
* Nothing is logged, and no state is left.
"""

from __future__ import annotations

import json
import re
from typing import Any

from gateway.api.methods import decode_fast
from gateway.api.peer_server import decode_fast as read_plain_of_node
from gateway.protocol.errors import ErrorKind
from gateway.protocol.jsonrpc import (
    MAX_DEPTH,
    Invalid,
    Notification,
    Request,
    Response,
    decode,
    encode_batch,
    encode_error,
    encode_notification,
    encode_request,
    encode_result,
    unreadable_response_id,
)
from gateway.registry.interface import SessionKey
from gateway.rpc.pending import Reply
from tests.api import test_backend_fast, test_peer_server_fast
from tests.fuzz import reference
from tests.fuzz.common import nothing_is_logged

#: ids of calls in flight: to the sending client, and to another one
OWN, ANOTHERS = ("5f0c1d2e-0000-4000-8000-%012d" % number for number in (0, 1))
#: bytes; maximum size of a response to a client
MAX_INPUT_SIZE = 4096
_CALL = b'{"jsonrpc":"2.0","id":"%b","method":"client.call","params":{"client":"%b","method":"m"}}'
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_KINDS = {Request: reference.REQUEST, Notification: reference.NOTIFICATION, Response: reference.RESPONSE}


def target(data: bytes) -> None:
    """Assert the invariants of the module's docstring."""
    with nothing_is_logged():
        message = decode(data)
        compare(message, reference.kinds(data))
        for one in message if isinstance(message, list) else [message]:
            check_raw(one, data)
        found = unreadable_response_id(data)
        assert found is None or (_UUID.fullmatch(found) and found.encode() in data)
        from_client(data, message)
        from_backend(data)
        from_node(data)


def compare(message: Any, expected: Any) -> None:
    """Assert the same result as the reference."""
    if isinstance(message, list):
        assert isinstance(expected, list)
        assert len(message) == len(expected)
        for one, kind in zip(message, expected, strict=True):
            compare(one, kind)
        return
    if isinstance(message, Invalid):
        kind = reference.PARSE_ERROR if message.kind is ErrorKind.PARSE_ERROR else reference.INVALID
    else:
        kind = _KINDS[type(message)]
    if expected == reference.EITHER:
        assert kind in (reference.INVALID, reference.RESPONSE)
    else:
        assert kind == expected, message


def check_raw(message: Any, data: bytes) -> None:
    """Check that raw values are slices of the payload, and that encoding preserves them."""
    if isinstance(message, Invalid):
        assert message.id == b"null" or message.id in data
        json.loads(message.id, parse_int=str)
        # The error text is the gateway's own.
        assert message.detail.isprintable()
        return
    if isinstance(message, Notification):
        again = encode_notification(message.method, message.params)
    elif isinstance(message, Request):
        again = encode_request(message.id, message.method, message.params)
    elif message.error is None:
        again = encode_result(message.id, message.result)
    else:
        again = encode_error(message.id, message.error)
    assert decode(again) == message
    if data.count(b"[") + data.count(b"{") < MAX_DEPTH:
        # A batch adds a level.
        assert decode(encode_batch([again, again])) == [message, message]
    for name in ("id", "params", "result", "error"):
        raw = getattr(message, name, None)
        assert raw is None or (raw and raw in data and raw.strip(b" \t\r\n") == raw)


# Handling.


def from_client(data: bytes, message: Any) -> None:
    """Receive it from client x, while there are calls in flight to x and y."""
    node = test_backend_fast.BackendHarness()
    node.send(_CALL % (b"own", b"x"))
    node.send(_CALL % (b"another's", b"y"))
    assert [json.loads(payload)["id"] for _, _, payload in node.sessions.sent] == [OWN, ANOTHERS]
    node.sessions.sent.clear()
    # On the previous connection of x.
    many = node.dispatcher.message_received("x", 6, data)
    assert (node.backend.sent, node.sessions.sent) == ([], [])
    node.dispatcher.client_disconnected(SessionKey("x", 6))
    assert node.dispatcher.calls_in_flight() == 2

    messages = message if isinstance(message, list) else [message]
    whole = not any(isinstance(one, Invalid) for one in messages)
    assert many == (len(messages) if whole else -len(messages) if len(messages) > 1 else 0)
    handled = node.dispatcher.message_received("x", 7, data)
    # Responses to calls in flight are not charged; there is one such call.
    if handled != many:
        assert whole
        assert many is not None
        assert (handled or 0) == many - 1
    check_answer(node.backend.sent, messages, whole)
    upstream = node.dispatcher._inbound._upstream
    assert all(client_id == "x" for client_id, *_ in upstream.calls)
    for *_, call in upstream.calls[-2:]:
        if not call.called:
            call.callback(Reply(b'{"a": [1.0]}', None))
    check_sent(node.sessions.sent, messages)
    node.dispatcher.client_disconnected(SessionKey("x", 7))
    node.dispatcher.client_disconnected(SessionKey("y", 7))
    node.backend.closed(1001)
    assert node.dispatcher.calls_in_flight() == 0


def check_answer(answers: list[bytes], messages: list[Any], whole: bool) -> None:
    """Check that the call to x has the result of the message, or is still in flight."""
    responses = [one for one in messages if isinstance(one, Response) and _value(one.id) == OWN]
    assert len(answers) <= 1
    if whole:
        assert len(answers) == min(1, len(responses))
    for answer in answers:
        answered, error = (
            json.loads(answer, parse_int=str),
            encode_error(b'"own"', responses[0].error or b"0") if responses else b"",
        )
        assert answered["id"] == "own"
        if responses and (answer == error or answer == encode_result(b'"own"', responses[0].result or b"")):
            continue
        # The response, or a message before it, was invalid.
        assert not whole
        assert answered["error"]["code"] == "-32003"
        assert answered["gateway"] is True
        assert answered["error"]["data"]["client"] == "x"


def check_sent(sent: list[tuple[str, int, bytes]], messages: list[Any]) -> None:
    """Check the response to x: one message, if any part of the input requires a response."""
    request_ids = [one.id for one in messages if isinstance(one, (Request, Invalid))]
    assert len(sent) == min(1, len(request_ids))
    for client_id, generation, payload in sent:
        assert (client_id, generation) == ("x", 7)
        assert len(payload) <= MAX_INPUT_SIZE
        answers = json.loads(payload, parse_int=str, parse_float=str)
        answers = answers if isinstance(answers, list) else [answers]
        ids = [json.loads(id, parse_int=str, parse_float=str) for id in request_ids]
        for answer in answers:
            assert answer["jsonrpc"] == "2.0"
            assert ("result" in answer) != ("error" in answer)
            assert answer.get("gateway", False) is ("error" in answer)
            assert answer["id"] is None or answer["id"] in ids
        assert len(answers) == len(request_ids) or answers[0]["error"]["code"] == "-32006"


def _value(id: bytes) -> Any:
    return json.loads(id, parse_int=reference.Number, parse_float=reference.Number)


def from_backend(data: bytes) -> None:
    """Receive it from a backend, by the fast path if possible, and by the general path."""
    nodes = [
        test_backend_fast.BackendHarness(plainly) for plainly in ((True, False) if decode_fast(data) else (False,))
    ]
    for step in (lambda node: node.send(data), lambda node: node.respond()):
        for node in nodes:
            step(node)
        assert nodes[0].state() == nodes[-1].state()
    for node in nodes:
        node.backend.closed(1001)
        assert (node.dispatcher.calls_in_flight(), node.backend._in_progress) == (0, {})


def from_node(data: bytes) -> None:
    """Receive it from another node."""
    if b'"client.' not in data and b'"peer.' not in data:
        # The outcome is the same as for a backend.
        return
    nodes = [
        test_peer_server_fast.PeerHarness(plainly)
        for plainly in ((True, False) if read_plain_of_node(data) else (False,))
    ]
    for step in (data, "answer"):
        for node in nodes:
            node.step(step)
        assert nodes[0].state() == nodes[-1].state()
    for node in nodes:
        node.link.disconnect()
        assert (node.protocol._in_progress, node.protocol._requests_by_id) == ({}, {})
