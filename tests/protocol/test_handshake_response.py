"""Tests of gateway.protocol.handshake: responses of another node."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.errors import InvalidResponseError
from gateway.protocol.handshake import (
    MAX_HEAD,
    MAX_RESPONSE_BODY,
    HandshakeResponse,
    accept_key,
    check_upgrade_response,
    encode_refusal,
    find_response_head,
    parse_refusal,
    parse_response,
)
from tests.builders.frames import WEBSOCKET_ACCEPT, WEBSOCKET_KEY


def response_head(*lines: str) -> bytes:
    return "\r\n".join((*lines, "", "")).encode("latin-1")


UPGRADE_HEADERS = {"upgrade": "websocket", "connection": "Upgrade", "sec-websocket-accept": WEBSOCKET_ACCEPT}


class ResponseHeadTest(SynchronousTestCase):
    """find_response_head(), parse_response()"""

    def test_head(self) -> None:
        whole = response_head("HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "X:\t y \t", "x: z")
        for size in range(len(whole)):
            self.assertEqual(find_response_head(whole[:size]), 0)
        self.assertEqual(find_response_head(whole + b"\x81\x00\r\n\r\n\x00"), len(whole))
        response = parse_response(whole)
        self.assertEqual(response, HandshakeResponse(101, {"upgrade": "websocket", "x": "y, z"}))

    def test_status_lines(self) -> None:
        for line, status in (("HTTP/1.1 429 Too Many", 429), ("HTTP/1.0 503", 503), ("HTTP/1.1 200 ", 200)):
            self.assertEqual(parse_response(response_head(line)).status, status)
        for line in (
            "HTTP/2 200 OK",
            "HTTP/1.1 20",
            "HTTP/1.1 2000",
            "HTTP/1.1 099",
            "http/1.1 200",
            "",
            "X",
            "HTTP/1.1 101X",
        ):
            self.assertRaises(InvalidResponseError, parse_response, response_head(line))

    def test_bad_heads(self) -> None:
        for data in (
            b"HTTP/1.1 101 X\n\n",
            b"HTTP/1.1 101 X\r\nX: a\nb\r\n\r\n",
            b"HTTP/1.1 101 X\r\rX\r\n",
            b"\x16\x03\x01\x00",
            b"HTTP/1.1 101 \x00",
            b"HTTP/1.1 101 X" + b"x" * MAX_HEAD,
        ):
            self.assertRaises(InvalidResponseError, find_response_head, data)
        for line in ("X", " folded: x", "X : y", ": y", "Upgr\xe4de: x"):
            self.assertRaises(InvalidResponseError, parse_response, response_head("HTTP/1.1 101 X", line))
        self.assertRaises(
            InvalidResponseError, parse_response, response_head("HTTP/1.1 101 X", "Upgrade: a", "upgrade: a")
        )

    def test_largest_head(self) -> None:
        whole = response_head("HTTP/1.1 101 X", "X: ")
        whole = whole[:-4] + b"x" * (MAX_HEAD - len(whole)) + whole[-4:]
        self.assertEqual(find_response_head(whole), MAX_HEAD)
        self.assertRaises(InvalidResponseError, find_response_head, b"x" + whole)

    @given(st.binary() | st.binary().map(lambda data: b"HTTP/1.1 101 X\r\n" + data + b"\r\n\r\n"))
    @example(b"HTTP/1.1 101 X\r\nX: y\r\n\r\n")
    def test_anything(self, data: bytes) -> None:
        """Any input is a response, incomplete, or an InvalidResponseError."""
        try:
            end = find_response_head(data)
            response = parse_response(data[:end]) if end else None
        except InvalidResponseError as e:
            self.assertTrue(str(e).isprintable())
            return
        if response is None:
            return
        self.assertEqual(data[end - 4 : end], b"\r\n\r\n")
        self.assertTrue(100 <= response.status <= 999)
        self.assertTrue(0 <= response.body_size() <= MAX_RESPONSE_BODY)
        self.assertTrue(all(name == name.lower() for name in response.headers))

    def test_body_size(self) -> None:
        for value, size in (
            ("0", 0),
            ("17", 17),
            (str(MAX_RESPONSE_BODY), MAX_RESPONSE_BODY),
            (str(MAX_RESPONSE_BODY + 1), 0),
            ("-1", 0),
            ("²", 0),
            ("9" * 99, 0),
        ):
            self.assertEqual(HandshakeResponse(429, {"content-length": value}).body_size(), size)
        self.assertEqual(HandshakeResponse(429, {}).body_size(), 0)


class CheckUpgradeResponseTest(SynchronousTestCase):
    """check_upgrade_response()"""

    def test_accept(self) -> None:
        """RFC 6455, section 1.3."""
        self.assertEqual(accept_key(WEBSOCKET_KEY), WEBSOCKET_ACCEPT)

    def test_good(self) -> None:
        for changed, offered in (
            ({}, ()),
            ({"upgrade": "WebSocket", "connection": "keep-alive,\tUPGRADE"}, ("a",)),
            ({"sec-websocket-protocol": "b"}, ("a", "b")),
        ):
            check_upgrade_response(HandshakeResponse(101, {**UPGRADE_HEADERS, **changed}), WEBSOCKET_KEY, offered)

    def test_bad(self) -> None:
        changes: tuple[dict[str, Any], ...] = (
            {"upgrade": None},
            {"upgrade": "h2c"},
            {"connection": None},
            {"connection": "close"},
            {"sec-websocket-accept": None},
            {"sec-websocket-accept": WEBSOCKET_ACCEPT.lower()},
            {"sec-websocket-extensions": "permessage-deflate"},
            {"sec-websocket-protocol": "c"},
            {"sec-websocket-protocol": ""},
        )
        for offered in ((), ("a", "b")):
            for changed in changes:
                headers = {name: value for name, value in {**UPGRADE_HEADERS, **changed}.items() if value is not None}
                self.assertRaises(
                    InvalidResponseError,
                    check_upgrade_response,
                    HandshakeResponse(101, headers),
                    WEBSOCKET_KEY,
                    offered,
                )


class ParseRefusalTest(SynchronousTestCase):
    """parse_refusal()"""

    def test_other_statuses(self) -> None:
        for status in (101, 200, 307, 400, 401, 403, 404, 500, 503):
            self.assertIsNone(parse_refusal(HandshakeResponse(status, {}), b'{"error":"replaced"}'))

    def parse(self, body: bytes, **headers: str) -> tuple[str, str, str]:
        refusal = parse_refusal(
            HandshakeResponse(429, {name.replace("_", "-"): value for name, value in headers.items()}), body
        )
        assert refusal is not None
        self.assertEqual(refusal.status, 429)
        ((name, seconds),) = refusal.headers
        self.assertEqual(name, "Retry-After")
        self.assertIn(b" 429 ", encode_refusal(refusal))
        return refusal.reason, refusal.message, seconds

    def test_forwarded(self) -> None:
        body = b'{"error":"rate","message":"wait"}'
        self.assertEqual(self.parse(body, retry_after="7"), ("rate", "wait", "7"))

    def test_sanitized(self) -> None:
        default = ("replaced", "the node that has this client refused it", "1")
        for body in (b"", b"{", b"[]", b'"x"', b'{"error":1}', b'{"error":"\xff"}', b"[" * 5000, b'{"error":"admin"}'):
            self.assertEqual(self.parse(body), default)
        for value in ("", "-1", "x", "1.5", "Wed, 21 Oct 2015 07:28:00 GMT", "0"):
            self.assertEqual(self.parse(b"", retry_after=value), default)
        self.assertEqual(self.parse(b"", retry_after="99999999")[2], "3600")
        body = json.dumps({"message": "a\r\nb\u202e\u00e9" + "x" * 999}).encode()
        self.assertEqual(self.parse(body)[1], "a??b??" + "x" * 250)

    @given(st.binary(), st.text())
    def test_anything(self, body: bytes, retry_after: str) -> None:
        reason, message, seconds = self.parse(body, retry_after=retry_after)
        self.assertIn(reason, ("replaced", "rate"))
        self.assertTrue(message.isascii() and message.isprintable())
        self.assertTrue(1 <= int(seconds) <= 3600)
