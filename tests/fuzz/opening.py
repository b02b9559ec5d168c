"""Data before a connection is open (RFC 6455, section 4.2). An input is the first bytes of a client.

* The outcome is no response yet, a 101, the response to a health check, or one refusal: well-formed, with
  ``Content-Length`` and ``Connection: close``;
  data of the client is never in its status line or headers, and only escaped in its body.
* Tokens are never disclosed.
* The splitting into reads makes no difference, and data after a refusal gets no response.
* If a client is accepted, Autobahn's parser finds the same headers in its request.
* Nothing is logged, and no state of the connection is left.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
from typing import Any
from urllib.parse import unquote_to_bytes

import attrs
from autobahn.websocket.protocol import parseHttpHeader

from gateway.auth.bearer import BASE64_PREFIX, PREFIX, decode_bearer64
from gateway.auth.errors import IdentityMismatchError, TokenRefusedError
from gateway.auth.interface import Credentials, Identity
from gateway.clients.endpoint import extract_token
from gateway.clients.health_check import health_response
from gateway.protocol.client_id import is_client_id
from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import MAX_HEAD, HandshakeRequest, encode_refusal, find_request_head, parse_request
from gateway.protocol.jsonrpc import SUBPROTOCOL
from tests.fakes.clients import FakeNode
from tests.fuzz.common import in_bytes, in_two, nothing_is_logged

PATH = "/v1/connect"
#: the accepted token, and its client
TOKEN, OWNER = "letmein-0123456789", "robot-7"
#: bytes; maximum size of a refusal
MAX_INPUT_SIZE = 1024

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_HEADERS = {
    "Content-Type": r"application/json",
    "Content-Length": r"[1-9][0-9]*",
    "Cache-Control": r"no-store",
    "Connection": r"close",
    "Retry-After": r"[1-9][0-9]*",
    "WWW-Authenticate": r"Bearer",
    "Sec-WebSocket-Version": r"13",
}
_WORDS = {
    400: {"request", "header", "method", "upgrade", "client_id"},
    401: {"token"},
    403: {"origin", "identity"},
    404: {"path"},
}


def target(data: bytes) -> None:
    """Assert the invariants of the module's docstring."""
    with nothing_is_logged():
        head = heads(data)
        for auth in ("none", "tokens"):
            node = node_of(auth)
            outcome = exchange(node, [data])
            for pieces in (in_two(data), *([in_bytes(data)] if auth == "none" else [])):
                assert exchange(node, pieces) == outcome, pieces
            check(data, auth, outcome, head)


# The head.


def heads(data: bytes) -> HandshakeRequest | RequestRefusedError | None:
    """Parse the head; return ``None`` if it is incomplete."""
    whole = _read([data])
    assert str(whole) == str(_read(in_two(data))) == str(_read(in_bytes(data)))
    if isinstance(whole, HandshakeRequest):
        _compare_with_autobahn_parser(data, whole)
    return whole


def _read(pieces: list[bytes]) -> HandshakeRequest | RequestRefusedError | None:
    data, end = b"", 0
    try:
        for piece in pieces:
            searched = len(data)
            data += piece
            end = find_request_head(data, searched)
            if end:
                assert data[end - 4 : end] == b"\r\n\r\n"
                return parse_request(data[:end], PATH)
            assert len(data) < MAX_HEAD
    except RequestRefusedError as refusal:
        return refusal
    return None


def _compare_with_autobahn_parser(data: bytes, request: HandshakeRequest) -> None:
    """Assert that Autobahn parses the same bytes in the same way."""
    head = data[: data.index(b"\r\n\r\n") + 4]
    line, headers, counts = parseHttpHeader(head)
    method, uri, version = line.split(" ")
    assert (method, version) == ("GET", "HTTP/1.1")
    assert uri.endswith(f"{PATH}?{request.query}" if request.query else (PATH, PATH + "?"))
    assert {name: value.strip() for name, value in headers.items()} == {
        name: value.strip() for name, value in request.headers.items()
    }
    for name in ("host", "sec-websocket-key", "authorization"):
        assert counts.get(name, 0) <= 1
    assert request.headers["sec-websocket-key"] == request.key
    assert len(base64.b64decode(request.key)) == 16


# Whole connections.


@attrs.frozen
class Outcome:
    """What a client, the registry and the rest of the node observed."""

    sent: bytes
    #: claimed clients
    claimed: list[str]
    refused: dict[str, int]
    seen: list[Any]
    #: whether the node closed the connection
    over: bool


class SingleTokenAuthenticator:
    """Accepts one token."""

    def authenticate(self, credentials: Credentials) -> Identity:
        if credentials.token is None:
            raise TokenRefusedError("a token is needed")
        if credentials.token != TOKEN:
            raise TokenRefusedError("the token is unknown")
        if credentials.client_id not in (None, OWNER):
            raise IdentityMismatchError("the token is another client's")
        return Identity(OWNER)


def node_of(auth: str) -> FakeNode:
    """Make a node without authentication, or one that accepts the token."""
    node = FakeNode(messages_per_client="0", openings_per_address="0", origin=("https://app.example.com",))
    if auth == "tokens":
        node.factory._authenticator = SingleTokenAuthenticator()
    return node


def exchange(node: FakeNode, pieces: list[bytes]) -> Outcome:
    """Send the bytes to a node, then disconnect."""
    client = node.dial()
    for piece in pieces:
        client.send(piece)
    transport = client.transport
    over = transport.disconnecting or transport.half_closed or transport.aborted
    refused = dict(node.metrics.refused)
    sent = transport.pop_written()
    if refused:
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        assert not transport.pop_written()
    client.lose()
    assert (node.factory.handshake_limiter.in_progress, node.factory.countConnections, node.sessions.count()) == (
        0,
        0,
        0,
    )
    assert len(node.registry.released) == len(node.registry.claims)
    node.advance(6)
    assert not transport.pop_written()
    assert not node.clock.getDelayedCalls(), node.clock.getDelayedCalls()
    seen = [(what, client_id, *rest) for what, client_id, _, *rest in node.handler.events]
    outcome = Outcome(sent, [claim[0] for claim in node.registry.claims], refused, seen, over)
    for one in (node.registry.claims, node.registry.released, node.handler.events, node.metrics.refused):
        one.clear()
    return outcome


def check(data: bytes, auth: str, outcome: Outcome, head: HandshakeRequest | RequestRefusedError | None) -> None:
    """Check the response."""
    if head is None:
        assert (outcome.sent, outcome.refused, outcome.over) == (b"", {}, False)
    elif outcome.sent.startswith(b"HTTP/1.1 101 "):
        assert isinstance(head, HandshakeRequest)
        _check_opening(auth, outcome, head)
    elif isinstance(head, RequestRefusedError) and not outcome.refused:
        # A health check: the node is ready.
        assert outcome.sent == health_response(data, lambda: True)
        assert (outcome.over, outcome.claimed, outcome.seen) == (True, [], [])
    else:
        _check_refusal(data, outcome, head)


def _check_opening(auth: str, outcome: Outcome, request: HandshakeRequest) -> None:
    lines = outcome.sent.partition(b"\r\n\r\n")[0].decode("ascii").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    assert len(headers) == len(lines) - 1
    accept = base64.b64encode(hashlib.sha1(request.key.encode() + _GUID).digest()).decode()
    assert headers.pop("sec-websocket-accept") == accept
    assert headers.pop("upgrade").lower() == "websocket"
    assert headers.pop("connection").lower() == "upgrade"
    chosen = headers.pop("sec-websocket-protocol", None)
    assert chosen == (SUBPROTOCOL if SUBPROTOCOL in request.subprotocols else None)
    # The Server header of Autobahn is optional.
    assert set(headers) <= {"server", "x-powered-by"}
    assert len(outcome.claimed) == 1
    assert not outcome.refused
    values = [value for name, _, value in (one.partition("=") for one in request.query.split("&")) if _is(name)]
    assert len(values) <= 1
    wanted = unquote_to_bytes(values[0]).decode("latin-1") if values else None
    (client_id,) = outcome.claimed
    assert is_client_id(client_id)
    assert wanted in ((client_id,) if auth == "none" else (client_id, None))
    if auth == "tokens":
        assert client_id == OWNER
        assert extract_token(request) == TOKEN


def _is(name: str) -> bool:
    return unquote_to_bytes(name) == b"client_id"


def _check_refusal(data: bytes, outcome: Outcome, head: HandshakeRequest | RequestRefusedError) -> None:
    assert len(outcome.sent) <= MAX_INPUT_SIZE
    assert outcome.over
    assert not outcome.claimed
    assert not outcome.seen
    top, _, body = outcome.sent.partition(b"\r\n\r\n")
    status, *lines = top.decode("ascii").split("\r\n")
    match = re.fullmatch(r"HTTP/1\.1 ([0-9]{3}) (Bad Request|Unauthorized|Forbidden|Not Found)", status)
    assert match, status
    names = []
    for line in lines:
        name, value = line.split(": ", 1)
        names.append(name)
        assert re.fullmatch(_HEADERS[name], value), line
    assert len(set(names)) == len(names)
    assert names[:4] == ["Content-Type", "Content-Length", "Cache-Control", "Connection"]
    assert f"Content-Length: {len(body)}" in lines
    word, message = _said(body)
    assert word in _WORDS[int(match[1])]
    assert outcome.refused == {word: 1}
    assert ("WWW-Authenticate" in names) == (word == "token")
    if isinstance(head, RequestRefusedError):
        assert encode_refusal(head) == outcome.sent
    else:
        _check_no_token(data, head, message)


def _said(body: bytes) -> tuple[str, str]:
    match = re.fullmatch(rb'\{"error":"([a-z_]+)","message":"((?:[ !#-\[\]-~]|\\["\\])+)"\}', body)
    assert match, body
    return match[1].decode(), match[2].decode()


def _check_no_token(data: bytes, request: HandshakeRequest, message: str) -> None:
    tokens = {name[len(PREFIX) :] for name in request.subprotocols if name.startswith(PREFIX)}
    for name in request.subprotocols:
        if name.startswith(BASE64_PREFIX):
            encoded = name[len(BASE64_PREFIX) :]
            tokens.add(encoded)
            with contextlib.suppress(ValueError):
                token = decode_bearer64(encoded)
                assert len(token) < 8 or token.encode() in data or token not in message
    tokens.add(request.headers.get("authorization", "").partition(" ")[2].strip())
    for token in tokens:
        # A token that is elsewhere in the request as well is not a secret.
        if len(token) >= 8 and data.count(token.encode("latin-1")) == 1:
            assert token not in message
