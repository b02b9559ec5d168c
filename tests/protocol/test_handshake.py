"""Tests of gateway.protocol.handshake: requests and refusals."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import (
    MAX_HEAD,
    HandshakeRequest,
    encode_refusal,
    find_request_head,
    parse_request,
    safe_repr,
)
from tests.builders.frames import WEBSOCKET_KEY, build_request

PATH = "/v1/connect"


def read(data: bytes, step: int | None = None) -> HandshakeRequest | tuple[int, str] | None:
    """Parse bytes in segments of ``step``: a request, a refusal's status and reason, or ``None`` if incomplete."""
    scanned = 0
    step = step or len(data) or 1
    try:
        for at in range(step, len(data) + step, step):
            received = data[:at]
            end = find_request_head(received, scanned)
            scanned = len(received)
            if end:
                return parse_request(received[:end], PATH)
    except RequestRefusedError as refusal:
        return refusal.status, refusal.reason
    return None


class FindHeadTest(SynchronousTestCase):
    """find_request_head()"""

    def test_ends_after_the_empty_line(self) -> None:
        head = build_request()
        self.assertEqual(find_request_head(head + b"\x81\x00\xff", 0), len(head))

    def test_waits_for_the_empty_line(self) -> None:
        self.assertEqual(find_request_head(build_request()[:-1], 0), 0)

    def test_forbidden_bytes(self) -> None:
        """Control characters, DEL and C1 are refused at once, before the path is known."""
        for byte in [*range(0x20), 0x7F, *range(0x80, 0xA0)]:
            data = b"GET /x HTTP/1.1\r\nX: a" + bytes([byte]) + b"b"
            self.assertEqual(read(data), (400, "header"), hex(byte))
            self.assertEqual(read(data, 1), (400, "header"), hex(byte))

    def test_permitted_bytes(self) -> None:
        for byte in (0x20, 0x7E, 0xA0, 0xFF):
            self.assertIsNone(read(b"GET /x HTTP/1.1\r\nX: a" + bytes([byte]) + b"b"), hex(byte))

    def test_bytes_after_the_head_are_not_checked(self) -> None:
        self.assertIsInstance(read(build_request() + b"\x00\n\r\x9f" * 10000), HandshakeRequest)

    def test_size(self) -> None:
        """16 KiB are allowed; one byte more is refused at once."""
        fill = MAX_HEAD - len(build_request(extra=(("X", ""),)))
        self.assertIsInstance(read(build_request(extra=(("X", "a" * fill),))), HandshakeRequest)
        self.assertEqual(read(build_request(extra=(("X", "a" * (fill + 1)),))), (400, "header"))
        self.assertEqual(read(b"a" * MAX_HEAD), (400, "header"))
        self.assertIsNone(read(b"a" * (MAX_HEAD - 1)))

    def test_lone_cr_at_the_end_of_a_segment(self) -> None:
        self.assertIsNone(read(b"GET / HTTP/1.1\r"))


class ParseTest(SynchronousTestCase):
    """parse_request()"""

    def assert_refused(self, data: bytes, status: int, reason: str) -> None:
        self.assertEqual(read(data), (status, reason), data)

    def test_request(self) -> None:
        request = read(
            build_request(
                "/v1/connect?client_id=a&x=?y",
                extra=(
                    ("Sec-WebSocket-Protocol", "one,  two"),
                    ("sec-websocket-protocol", "three"),
                    ("Empty", ""),
                    ("X-Name", "  a: b  "),
                ),
            )
        )
        assert isinstance(request, HandshakeRequest)
        self.assertEqual(request.path, "/v1/connect")
        self.assertEqual(request.query, "client_id=a&x=?y")
        self.assertEqual(request.key, WEBSOCKET_KEY)
        self.assertEqual(request.subprotocols, ("one", "two", "three"))
        self.assertEqual(request.headers["empty"], "")
        self.assertEqual(request.headers["x-name"], "a: b")

    def test_request_line(self) -> None:
        for line in (
            "",
            "GET",
            "GET /v1/connect",
            "GET /v1/connect HTTP/1.1 ",
            "GET  /v1/connect HTTP/1.1",
            " GET /v1/connect HTTP/1.1",
            "GET /v1/connect http/1.1",
            "GET /v1/connect HTTP/11",
            "GET /v1/connect?client_id=\xe9 HTTP/1.1",
            "GET /v1/connect?a=\xa0HTTP/1.1",
            "GET v1/connect HTTP/1.1",
            "GET * HTTP/1.1",
            "GET ftp://gw/v1/connect HTTP/1.1",
            "GET http:///v1/connect HTTP/1.1",
            "GET /v1/connect?client_id=a#b HTTP/1.1",
            "G(T /v1/connect HTTP/1.1",
        ):
            self.assert_refused(line.encode("latin-1") + b"\r\nHost: x\r\n\r\n", 400, "request")

    def test_absolute_target(self) -> None:
        """RFC 9112, section 3.2.2: a server must accept the absolute form."""
        for origin in ("http://gw.example.com", "HTTPS://[::1]:8443", "ws://x", "wss://x"):
            request = read(build_request(f"{origin}/v1/connect?client_id=b"))
            assert isinstance(request, HandshakeRequest)
            self.assertEqual((request.path, request.query), ("/v1/connect", "client_id=b"))
        self.assert_refused(build_request("http://gw.example.com?client_id=b"), 404, "path")

    def test_order(self) -> None:
        """The path is checked before the method, the method before the rest."""
        self.assert_refused(build_request("/x", method="POST", version="HTTP/1.0", without=("Host",)), 404, "path")
        self.assert_refused(build_request(method="POST", version="HTTP/1.0", without=("Host",)), 400, "method")
        self.assert_refused(build_request(version="HTTP/1.0", without=("Host",)), 400, "request")

    def test_other_paths(self) -> None:
        for path in ("/", "/v1/connect/", "//v1/connect", "/V1/connect", "/v1/%63onnect", "/v1/connect;a", "/v1"):
            self.assert_refused(build_request(path), 404, "path")

    def test_methods(self) -> None:
        for method in ("POST", "HEAD", "get", "CONNECT"):
            self.assert_refused(build_request(method=method), 400, "method")

    def test_versions(self) -> None:
        for version in ("HTTP/1.0", "HTTP/0.9", "HTTP/1.2", "HTTP/2.0"):
            self.assert_refused(build_request(version=version), 400, "request")

    def test_header_lines(self) -> None:
        for line in ("nothing", ": x", "Na me: x", "Authorization : x", " folded", "N\xe4me: x", "(a): x"):
            data = build_request()[:-2] + line.encode("latin-1") + b"\r\n\r\n"
            self.assert_refused(data, 400, "header")

    def test_single_headers(self) -> None:
        for name in (
            "Host",
            "HOST",
            "Authorization",
            "Origin",
            "Sec-WebSocket-Key",
            "sec-websocket-version",
            "Wsgateway-Redirect",
            "wsgateway-anything",
        ):
            self.assert_refused(build_request(extra=((name, "x"), (name, "x"))), 400, "header")

    def test_repeated_headers_are_joined(self) -> None:
        request = read(build_request(connection="keep-alive", extra=(("Connection", "upgrade"),)))
        self.assertIsInstance(request, HandshakeRequest)

    def test_host(self) -> None:
        self.assert_refused(build_request(without=("Host",)), 400, "header")

    def test_body(self) -> None:
        """The bytes of a body would be parsed as frames."""
        self.assert_refused(build_request(extra=(("Content-Length", "5"),)), 400, "header")
        self.assert_refused(build_request(extra=(("Transfer-Encoding", "chunked"),)), 400, "header")
        self.assertIsInstance(read(build_request(extra=(("Content-Length", "0"),))), HandshakeRequest)

    def test_upgrade(self) -> None:
        """RFC 6455, section 4.2.1."""
        for data in (
            build_request(without=("Upgrade",)),
            build_request(upgrade="h2c"),
            build_request(upgrade="websockets"),
            build_request(without=("Connection",)),
            build_request(connection="close"),
            build_request(without=("Sec-WebSocket-Key",)),
            build_request(sec_websocket_key=""),
            build_request(sec_websocket_key=WEBSOCKET_KEY[:-1]),
            build_request(sec_websocket_key="*" * 22 + "=="),
            build_request(sec_websocket_key=WEBSOCKET_KEY + "="),
        ):
            self.assert_refused(data, 400, "upgrade")
        self.assertIsInstance(read(build_request(upgrade="h2c, WebSocket", connection="UPGRADE")), HandshakeRequest)

    def test_version(self) -> None:
        for version in ("8", "12", "14", "013", "13.0", "+13", "1_3", "13, 8", ""):
            self.assert_refused(build_request(sec_websocket_version=version), 400, "upgrade")
        self.assert_refused(build_request(without=("Sec-WebSocket-Version",)), 400, "upgrade")

    def test_version_is_named(self) -> None:
        """RFC 6455, section 4.4."""
        refusal = self.assertRaises(RequestRefusedError, parse_request, build_request(sec_websocket_version="8"), PATH)
        self.assertEqual(refusal.headers, (("Sec-WebSocket-Version", "13"),))

    def test_subprotocols(self) -> None:
        for offered in ("a, b, a", "a b", "a, \xe9"):
            self.assert_refused(build_request(extra=(("Sec-WebSocket-Protocol", offered),)), 400, "upgrade")
        request = read(build_request(extra=(("Sec-WebSocket-Protocol", ", a,,"),)))
        assert isinstance(request, HandshakeRequest)
        self.assertEqual(request.subprotocols, ("a",))

    def test_subprotocols_are_not_quoted(self) -> None:
        offered = ("Sec-WebSocket-Protocol", "wsgateway.bearer.s3cret, wsgateway.bearer.s3cret")
        refusal = self.assertRaises(RequestRefusedError, parse_request, build_request(extra=(offered,)), PATH)
        self.assertNotIn("s3cret", refusal.message)


class RequestRefusedErrorTest(SynchronousTestCase):
    """encode_refusal()"""

    def test_response(self) -> None:
        refusal = RequestRefusedError(503, "full", "no room", [("Retry-After", "1")])
        self.assertEqual(
            encode_refusal(refusal),
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 36\r\n"
            b'Cache-Control: no-store\r\nConnection: close\r\nRetry-After: 1\r\n\r\n{"error":"full","message":"no room"}',
        )

    def test_statuses_have_their_standard_phrase(self) -> None:
        for status, phrase in (
            (307, b"Temporary Redirect"),
            (400, b"Bad Request"),
            (401, b"Unauthorized"),
            (403, b"Forbidden"),
            (404, b"Not Found"),
            (429, b"Too Many Requests"),
            (500, b"Internal Server Error"),
        ):
            self.assertTrue(
                encode_refusal(RequestRefusedError(status, "w", "m")).startswith(
                    b"HTTP/1.1 %d %s\r\n" % (status, phrase)
                )
            )

    def test_message_is_escaped(self) -> None:
        response = encode_refusal(RequestRefusedError(400, "w", '"\r\n\r\nHTTP/1.1 200 OK\x85\u2028\ud800'))
        self.assertEqual(response.count(b"\r\n\r\n"), 1)
        self.assertTrue(response.isascii())

    def test_headers_are_checked(self) -> None:
        for header in (("Location", "a\r\nX: b"), ("X\n", "b"), ("X", "\xe9"), ("X", "\x7f")):
            self.assertRaises(ValueError, RequestRefusedError, 400, "w", "m", [header])

    def test_safe_repr(self) -> None:
        self.assertEqual(safe_repr("a\r\n\x1b'\u2028"), '"a\\r\\n\\x1b\'\\u2028"')
        self.assertLess(len(safe_repr("\U0001f600" * 1000)), 700)


_LINES = st.lists(
    st.sampled_from(
        [
            b"Host: x",
            b"host: y",
            b"Upgrade: websocket",
            b"Connection: Upgrade",
            b"Sec-WebSocket-Version: 13",
            b"Sec-WebSocket-Key: " + WEBSOCKET_KEY.encode(),
            b"Sec-WebSocket-Protocol: a",
            b"Origin: null",
            b"Bad : x",
            b" folded",
            b"\x00",
            b"",
        ]
    ),
    max_size=8,
)


class GeneratedTest(SynchronousTestCase):
    """Any input is a request, a refusal or incomplete, and its segmentation does not matter."""

    def check(self, data: bytes) -> None:
        whole = read(data)
        if isinstance(whole, tuple):
            self.assertIn(whole[0], (400, 404))
        for step in (1, 2, 7):
            self.assertEqual(read(data, step), whole)

    @settings(deadline=None, max_examples=150)
    @given(st.binary(max_size=300))
    @example(b"\r\n\r\n")
    def test_bytes(self, data: bytes) -> None:
        self.check(data)

    @settings(deadline=None, max_examples=150)
    @given(st.sampled_from([b"GET /v1/connect", b"GET /", b"POST /v1/connect", b""]), _LINES, st.binary(max_size=9))
    def test_lines(self, first: bytes, lines: list[bytes], rest: bytes) -> None:
        self.check(b"\r\n".join([first + b" HTTP/1.1", *lines, b"", rest]))

    @settings(deadline=None, max_examples=150)
    @given(st.integers(0, len(build_request()) - 1), st.binary(max_size=3), st.integers(0, 3))
    def test_mutations(self, at: int, inserted: bytes, removed: int) -> None:
        good = build_request()
        self.check(good[:at] + inserted + good[at + removed :])
