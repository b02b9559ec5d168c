"""Tests of the bytes that the attackers send and of how they read responses."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis.strategies import sampled_from, text
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol import frames
from gateway.protocol.handshake import find_request_head, parse_request
from tests.hostile.raw_connection import (
    BINARY,
    CLOSE,
    PING,
    TEXT,
    RawConnection,
    close,
    frame,
    name,
    opening,
    request,
    source,
)


class BytesTests(SynchronousTestCase):
    """Frames and requests."""

    @settings(max_examples=50, deadline=None)
    @given(text(max_size=200), sampled_from((1, 60)))
    def test_frames_round_trip(self, text: str, times: int) -> None:
        payload = text.encode() * times
        written = frame(payload, TEXT)
        self.assertEqual(frames.decode(written, 0, 1 << 24), (TEXT, payload, len(written)))

    def test_altered_opening_handshake(self) -> None:
        self.assertEqual(frame(b"abc", mask=False), b"\x81\x03abc")
        self.assertEqual(frame(b"", BINARY, fin=False, rsv=4, mask=False), b"\x42\x00")
        self.assertEqual(frame(b"", PING, mask=False, length=5, form=16), b"\x89\x7e\x00\x05")
        self.assertEqual(frame(b"", mask=False, length=1 << 63), b"\x81\x7f\x80" + bytes(7))
        self.assertEqual(close(1000)[:2], bytes([0x80 | CLOSE, 0x82]))

    def test_valid_opening_handshake(self) -> None:
        head = opening("robot-7")
        self.assertEqual(find_request_head(head, 0), len(head))
        self.assertEqual(parse_request(head, "/v1/connect").query, "client_id=robot-7")

    def test_request_with_body(self) -> None:
        wanted = b"POST /x HTTP/1.1\r\nHost: a\r\nX: 1\r\nContent-Length: 2\r\n\r\nab"
        self.assertEqual(request("POST", "/x", "X: 1", body=b"ab", host="a"), wanted)

    def test_names_and_addresses_are_unique(self) -> None:
        self.assertEqual(len({name() for _ in range(1000)} | {source() for _ in range(1000)}), 2000)
        self.assertTrue(source().startswith("127."))


class WireTests(SynchronousTestCase):
    """Responses and outcomes."""

    def connection(self, serve: Callable[[socket.socket], None]) -> RawConnection:
        """A connection to a server that does that and then ends it."""
        server = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(server.close)

        def once() -> None:
            accepted, _ = server.accept()
            with accepted:
                serve(accepted)

        thread = threading.Thread(target=once)
        thread.start()
        self.addCleanup(thread.join)
        connection = RawConnection(server.getsockname(), source_address=source())
        self.addCleanup(connection.drop)
        return connection

    def receiving(self, data: bytes) -> RawConnection:
        return self.connection(lambda accepted: accepted.sendall(data))

    def test_response_is_status_and_error_word(self) -> None:
        for body, expected in ((b'{"error":"full"}', "503 full"), (b'{"error":{"code":-1}}', "503 -1"), (b"[]", "503")):
            head = b"HTTP/1.1 503 No\r\nContent-Length: %d\r\n\r\n" % len(body)
            self.assertEqual(self.receiving(head + body).response(), expected)

    def test_invalid_responses(self) -> None:
        self.assertEqual(self.receiving(b"").response(), "dropped")
        self.assertEqual(self.receiving(b"SSH-2.0\r\n\r\n").response(), "no HTTP")
        self.assertEqual(self.receiving(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab").response(), "cut off")

    def test_close_is_reported_by_its_code(self) -> None:
        frames_before = b"\x81\x01a\x8a\x00"
        self.assertEqual(self.receiving(frames_before + b"\x88\x02\x03\xf1").read_outcome(), "closed 1009")
        self.assertEqual(self.receiving(frames_before + b"\x88\x00").read_outcome(), "closed 1005")
        self.assertEqual(self.receiving(frames_before).read_outcome(), "dropped")

    def test_no_response(self) -> None:
        over = threading.Event()

        def hold(accepted: socket.socket) -> None:
            over.wait(10)

        connection = self.connection(hold)
        self.assertEqual(connection.read_outcome(0.01), "nothing")
        self.assertFalse(connection.is_reset())
        over.set()
        self.assertTrue(connection.wait_closed())

    def test_texts_until_pong(self) -> None:
        connection = self.receiving(b"\x81\x01a\x81\x01b\x8a\x06so far\x81\x01c")
        self.assertEqual(list(connection.texts()), ["a", "b"])
        self.assertEqual(connection.text(), "c")
        self.assertEqual(connection.text(), "")

    def test_send_repeatedly_resumes(self) -> None:
        read: list[bytes] = []

        def serve(accepted: socket.socket) -> None:
            while data := accepted.recv(100):
                read.append(data)

        connection = self.connection(serve)
        for _ in range(3):
            self.assertTrue(connection.send_repeatedly(b"abcde", 4))
        connection.socket.shutdown(socket.SHUT_WR)
        self.assertTrue(connection.wait_closed())
        self.assertEqual(b"".join(read)[:15], b"abcde" * 3)
