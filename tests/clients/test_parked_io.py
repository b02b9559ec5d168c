"""Tests of gateway.clients.parked: reading and writing."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from unittest import mock

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.clients.parked import MAX_CORKED_FRAME, READ_SIZE
from gateway.protocol.frames import encode
from tests.builders.frames import build_frame, close_frame, parse_frames, text_frame
from tests.builders.sockets import (
    fill_send_buffer,
    read_available,
    read_frames,
    seqpacket_pair,
    small_buffer_pair,
    tcp_pair,
    wait_readable,
)
from tests.fakes.parked import ParkedSessionsFixture, ParkedSessionsTestCase

PARTIAL = text_frame(b"split")[:-2]


class ReceiveTest(ParkedSessionsTestCase):
    """Messages, pings, pongs"""

    def send(self, client_end: socket.socket, *pieces: bytes) -> None:
        client_end.send(b"".join(pieces))
        self.fixture.step()

    def test_messages(self) -> None:
        client_end = self.fixture.park("a", generation=9)
        self.send(
            client_end, text_frame(b"one"), text_frame("zw\u00f6lf".encode()), text_frame(b""), text_frame(b"x" * 20000)
        )
        expected = [b"one", "zw\u00f6lf".encode(), b"", b"x" * 20000]
        self.assertEqual(self.owner.messages, [("a", 9, payload) for payload in expected])
        self.assertIs(type(self.owner.payloads[0]), bytes)
        self.assertEqual(self.owner.unparked, [])

    def test_many_sessions(self) -> None:
        """More than are read in one iteration."""
        for number in range(600):
            self.fixture.park(f"c{number}").send(text_frame(b"%d" % number))
        self.fixture.step()
        self.assertEqual(len(self.owner.messages), 512)
        self.fixture.step()
        self.assertEqual(sorted(map(int, self.owner.payloads)), list(range(600)))

    def test_last_received_at(self) -> None:
        client_end = self.fixture.park("a")
        self.fixture.reactor.advance(3)
        self.send(client_end, text_frame(b"one"))
        self.fixture.reactor.advance(4)
        self.send(client_end, PARTIAL)
        unparked = self.assert_woken(PARTIAL)
        # The time of the bytes before tells how busy it is.
        self.assertEqual(
            (unparked.previously_received_at, unparked.last_received_at), (self.fixture.now - 4, self.fixture.now)
        )

    def test_ping(self) -> None:
        client_end = self.fixture.park("a")
        self.send(
            client_end, build_frame(9, b""), build_frame(9, b"\xff" * 125), text_frame(b"one"), build_frame(9, b"p")
        )
        self.assertEqual(read_frames(client_end), [(10, b""), (10, b"\xff" * 125), (10, b"p")])
        self.assertEqual(self.owner.payloads, [b"one"])
        self.assertEqual(self.owner.unparked, [])

    def test_pong(self) -> None:
        client_end = self.fixture.park("a")
        self.send(client_end, build_frame(10, b""), build_frame(10, b"unasked"), text_frame(b"one"))
        self.assertEqual(read_available(client_end), b"")
        self.assertEqual(self.owner.payloads, [b"one"])
        self.assertEqual(self.owner.unparked, [])

    def test_more_than_is_read_at_once(self) -> None:
        client_end = self.fixture.park("a")
        message = text_frame(b"x" * 1000)
        # The read size is a multiple of the frame size: the cut is between two frames.
        size = (READ_SIZE // len(message)) * len(message)
        client_end.send(message * (size // len(message)))
        self.fixture.step()
        self.assertEqual(len(self.owner.messages), size // len(message))
        self.assertEqual(self.owner.unparked, [])

    def test_too_large(self) -> None:
        """The protocol that closes it with 1009 gets it from its beginning."""
        self.use_fixture(max_message_size=1000)
        client_end = self.fixture.park("a")
        data = text_frame(b"x" * 1000) + text_frame(b"y" * 1001) + text_frame(b"z")
        self.send(client_end, data)
        self.assertEqual(self.owner.payloads, [b"x" * 1000])
        self.assert_woken(data[1008:])

    def test_what_wakes(self) -> None:
        """A part of a frame or of a message, a close frame, a protocol violation; together with all that follows."""
        for data in (
            text_frame(b"{}")[:1],
            PARTIAL,
            build_frame(1, b"a", fin=False),
            build_frame(0, b"a"),
            build_frame(2, b"a"),
            build_frame(1, b"a", rsv=4),
            build_frame(1, b"a", masked=False),
            build_frame(3, b"a"),
            build_frame(11, b"a"),
            build_frame(9, b"a" * 126),
            build_frame(9, b"a", fin=False),
            text_frame(b"\xff"),
            text_frame(b"x" * 65536),
            close_frame(1000),
            close_frame(),
        ):
            for before, behind in (
                (b"", b""),
                (text_frame(b"one"), text_frame(b"two")),
                (build_frame(9, b""), close_frame(1000)),
            ):
                fixture = self.use_fixture()
                client_end = fixture.park("a")
                self.send(client_end, before, data, behind)
                unread = data + behind
                size = READ_SIZE - len(before)
                unparked = self.assert_woken(unread[:size], b"\x8a\x00" if before[:1] == b"\x89" else b"")
                self.assertEqual(unread[size:], self.read_on(unparked.fd))
                self.assertEqual(self.owner.payloads, [b"one"] * (before == text_frame(b"one")))

    def read_on(self, fd: int) -> bytes:
        try:
            return os.read(fd, READ_SIZE)
        except BlockingIOError:
            return b""

    def test_split_at_every_byte(self) -> None:
        pieces = [
            text_frame(b"one"),
            build_frame(9, b"p"),
            text_frame(b"x" * 130),
            build_frame(10, b""),
            text_frame(b"\xe2\x82\xac"),
        ]
        data = b"".join(pieces)
        ends = {sum(map(len, pieces[:count])) for count in range(len(pieces) + 1)}
        for cut in range(1, len(data)):
            self.use_fixture()
            client_end = self.fixture.park("a")
            self.send(client_end, data[:cut])
            if cut in ends:
                self.assertEqual(self.owner.unparked, [])
                self.send(client_end, data[cut:])
                self.assertEqual(self.owner.payloads, [b"one", b"x" * 130, b"\xe2\x82\xac"])
            else:
                client_end.send(data[cut:])
                begun = max(end for end in ends if end < cut)
                # Its pong goes with it, unless it was written in an earlier iteration.
                unparked = self.assert_woken(
                    data[begun:cut], b"\x8a\x01p" if begun >= len(pieces[0] + pieces[1]) else b""
                )
                self.assertEqual(os.read(unparked.fd, 1000), data[cut:])

    good = st.sampled_from(
        [text_frame(b"{}"), text_frame(b"x" * 200), build_frame(9, b"p"), build_frame(10, b""), text_frame(b"bad")]
    )

    @settings(deadline=None, max_examples=100)
    @given(st.lists(good), st.sampled_from([b"", PARTIAL, close_frame(1000), build_frame(0, b"")]), st.integers(0, 500))
    @example([text_frame(b"{}")], b"", 3)
    def test_generated(self, pieces: list[bytes], other: bytes, cut: int) -> None:
        """The messages handled and the bytes passed on are all that was sent, in order and once."""
        fixture = ParkedSessionsFixture()
        try:
            client_end = fixture.park("a")
            data = b"".join(pieces) + other
            for part in (data[:cut], data[cut:]):
                if part:
                    client_end.send(part)
                fixture.step()
            handled, at = [], 0
            for piece in pieces:
                at += len(piece)
                handled.append((at, piece))
            unread, answers = b"", read_available(client_end)
            if fixture.owner.unparked:
                (unparked,), (protocol,) = fixture.owner.unparked, fixture.owner.protocols
                assert protocol is not None
                unread = protocol.unread + self.read_on(unparked.fd)
                answers += unparked.unsent
            self.assertTrue(data.endswith(unread))
            before = [piece for end, piece in handled if end <= len(data) - len(unread)]
            self.assertEqual(len(b"".join(before)), len(data) - len(unread))
            self.assertEqual(fixture.owner.payloads, [self.content(piece) for piece in before if piece[0] == 0x81])
            self.assertEqual(parse_frames(answers), [(10, b"p")] * before.count(build_frame(9, b"p")))
        finally:
            fixture.close()

    @staticmethod
    def content(piece: bytes) -> bytes:
        return {text_frame(b"{}"): b"{}", text_frame(b"bad"): b"bad"}.get(piece, b"x" * 200)


class ConnectionLostTest(ParkedSessionsTestCase):
    """The client's end is closed or reset"""

    def assert_lost(self) -> None:
        self.assertEqual([client.client_id for client in self.owner.lost_sessions], ["a"])
        self.assertEqual((self.owner.unparked, len(self.parked)), ([], 0))

    def test_eof(self) -> None:
        client_end = self.fixture.park("a", generation=9, consecutive_bad=3)
        fd = self.fixture.fd()
        client_end.close()
        self.fixture.step()
        self.assert_lost()
        (client,) = self.owner.lost_sessions
        self.assertEqual((client.generation, client.consecutive_bad, client.claimed), (9, 3, True))
        with self.assertRaises(OSError) as raised:
            os.fstat(fd)
        self.assertEqual(raised.exception.errno, errno.EBADF)

    def test_eof_after_data(self) -> None:
        client_end = self.fixture.park("a")
        client_end.send(text_frame(b"one") + build_frame(9, b"p"))
        client_end.shutdown(socket.SHUT_WR)
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])
        # A client that has only closed its sending side still reads.
        self.assertEqual(read_frames(client_end), [(10, b"p")])
        self.assertIn("a", self.parked.fds)
        self.fixture.step()
        self.assert_lost()

    def test_close_frame_after_data(self) -> None:
        client_end = self.fixture.park("a")
        client_end.send(text_frame(b"one") + close_frame(1000))
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])
        self.assert_woken(close_frame(1000))

    def test_reset(self) -> None:
        server_end, client_end = tcp_pair()
        client_end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.fixture.park("a", (server_end, client_end))
        client_end.close()
        wait_readable(self.fixture.fd())
        self.fixture.step()
        self.assert_lost()

    def test_spurious_event(self) -> None:
        """EAGAIN: an event is only a hint."""
        client_end = self.fixture.park("a")
        client_end.send(text_frame(b"one"))
        with mock.patch("gateway.clients.parked.os.read", side_effect=BlockingIOError(errno.EAGAIN, "again")):
            self.fixture.step()
        self.assertEqual(self.owner.lost_sessions, [])
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])

    def test_errors_of_the_kernel(self) -> None:
        for number in (errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EPIPE, errno.EIO):
            self.use_fixture()
            self.fixture.park("a").send(text_frame(b"one"))
            with mock.patch("gateway.clients.parked.os.read", side_effect=OSError(number, os.strerror(number))):
                self.fixture.step()
            self.assert_lost()


LARGE = b"L" * (MAX_CORKED_FRAME + 1)


def records(client_end: socket.socket) -> list[bytes]:
    """Return what was received, write by write."""
    received = []
    while True:
        try:
            received.append(client_end.recv(1 << 20))
        except BlockingIOError:
            return received


class SendTest(ParkedSessionsTestCase):
    """send()"""

    def test_not_corked(self) -> None:
        """Written at once."""
        client_end = self.fixture.park("a", seqpacket_pair(), generation=9)
        for payload in (b"one", b"", b"x" * 126, b"x" * 65536):
            self.assertEqual(self.parked.send("a", payload), 9)
            self.assertEqual(records(client_end), [encode(payload)])

    def test_generation(self) -> None:
        client_end = self.fixture.park("a", generation=9)
        self.assertEqual(self.parked.send("a", b"no", 8), 0)
        self.assertEqual(self.parked.send("a", b"no", 10), 0)
        self.assertEqual(read_available(client_end), b"")
        self.assertEqual(self.parked.send("a", b"yes", 9), 9)
        self.assertEqual(self.parked.send("a", b"yes", 0), 9)
        self.assertEqual(read_frames(client_end), [(1, b"yes")] * 2)

    def test_to_a_lost_client(self) -> None:
        self.fixture.park("a", generation=9).close()
        self.assertEqual(self.parked.send("a", b"{}"), 0)
        self.assertEqual([client.client_id for client in self.owner.lost_sessions], ["a"])
        self.assertEqual(self.parked.send("a", b"{}"), 0)
        self.assertEqual(len(self.owner.lost_sessions), 1)

    def test_errors_of_the_kernel(self) -> None:
        for number in (errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH):
            self.use_fixture()
            self.fixture.park("a")
            with mock.patch("gateway.clients.parked.os.write", side_effect=OSError(number, os.strerror(number))):
                self.assertEqual(self.parked.send("a", b"{}"), 0)
            self.assertEqual(len(self.owner.lost_sessions), 1)

    def test_no_bytes_of_the_previous_session_with_that_fd(self) -> None:
        """Corked frames are dropped with their session."""
        self.fixture.park("a", seqpacket_pair(), fd=300)
        self.fixture.cork.cork()
        self.parked.send("a", b"for a")
        self.parked.wake("a")
        os.close(self.owner.unparked[-1].fd)
        client_end = self.fixture.park("b", seqpacket_pair(), fd=300)
        self.parked.send("b", b"for b")
        self.fixture.cork.uncork()
        self.assertEqual(records(client_end), [encode(b"for b")])
        self.assertEqual(self.owner.unparked.pop().unsent, encode(b"for a"))


class CorkedSendTest(ParkedSessionsTestCase):
    """While corked"""

    def setUp(self) -> None:
        super().setUp()
        self.client_end = self.fixture.park("a", seqpacket_pair(), generation=9)

    def call_corked(self, *calls: Callable[[], object]) -> list[bytes]:
        """Run the calls while corked; returns what was received, write by write."""
        self.assertTrue(self.fixture.cork.cork())
        for call in calls:
            call()
        self.fixture.cork.uncork()
        return records(self.client_end)

    def send(self, payload: bytes) -> Callable[[], object]:
        return lambda: self.assertEqual(self.parked.send("a", payload), 9)

    def test_one_write(self) -> None:
        sent = [b"%d" % number for number in range(20)]
        self.assertEqual(self.call_corked(*map(self.send, sent)), [b"".join(map(encode, sent))])

    def test_nothing_before_it_is_released(self) -> None:
        self.call_corked(self.send(b"one"), lambda: self.assertEqual(records(self.client_end), []))

    def test_one_cork_after_the_other(self) -> None:
        self.assertEqual(self.call_corked(self.send(b"one")), [encode(b"one")])
        self.assertEqual(self.call_corked(self.send(b"two")), [encode(b"two")])
        self.assertEqual(self.call_corked(), [])

    def test_one_write_per_client(self) -> None:
        others = [self.fixture.park(f"c{number}", seqpacket_pair()) for number in range(5)]

        def send_to_all() -> None:
            for number in range(5):
                self.parked.send(f"c{number}", b"%d" % number)

        self.call_corked(send_to_all, self.send(b"one"), send_to_all)
        self.assertEqual(
            [records(client_end) for client_end in others], [[encode(b"%d" % number) * 2] for number in range(5)]
        )

    def test_order_of_small_and_large(self) -> None:
        """Large frames are not corked, and flush what was corked before."""
        written = self.call_corked(*map(self.send, (b"one", b"two", LARGE, b"three", LARGE, LARGE, b"four")))
        self.assertEqual(
            written,
            [
                encode(b"one") + encode(b"two") + encode(LARGE),
                encode(b"three") + encode(LARGE),
                encode(LARGE),
                encode(b"four"),
            ],
        )

    def test_messages_and_pongs(self) -> None:
        """All responses to one read are one write."""
        self.owner.on_message = lambda client_id, payload: self.parked.send("a", payload * 2) and None
        self.client_end.send(text_frame(b"one") + build_frame(9, b"p") + text_frame(b"two"))
        self.fixture.step()
        self.assertEqual(records(self.client_end), [encode(b"oneone") + b"\x8a\x01p" + encode(b"twotwo")])

    def test_responses_of_many_clients_are_one_write(self) -> None:
        """Calls of one client that others answer, all in one iteration."""
        for number in range(5):
            self.fixture.park(f"c{number}").send(text_frame(b"%d" % number))
        self.owner.on_message = lambda client_id, payload: self.parked.send("a", payload) and None
        self.fixture.step()
        (written,) = records(self.client_end)
        self.assertEqual(sorted(written[2::3]), sorted(b"01234"))

    def test_sent_while_it_is_released(self) -> None:
        """Other callbacks of the cork may send more."""
        self.fixture.cork.cork()
        self.fixture.cork.on_flush(self.send(b"one"))
        self.parked.send("a", b"zero")
        self.fixture.cork.on_flush(self.send(b"two"))
        self.fixture.cork.uncork()
        self.assertEqual(b"".join(records(self.client_end)), encode(b"zero") + encode(b"one") + encode(b"two"))

    def test_lost_client(self) -> None:
        """It is detected when the cork is released; the others get their messages."""
        self.fixture.park("gone").close()
        other = self.fixture.park("b", seqpacket_pair())
        self.call_corked(
            lambda: self.parked.send("b", b"one"),
            lambda: self.assertEqual(self.parked.send("gone", b"one"), 7),
            self.send(b"one"),
        )
        self.assertEqual([client.client_id for client in self.owner.lost_sessions], ["gone"])
        self.assertEqual(records(other), [encode(b"one")])

    def test_sent_because_a_client_is_lost(self) -> None:
        self.fixture.park("gone").close()
        self.patch(self.owner, "connection_lost", lambda client: self.parked.send("a", client.client_id.encode()))
        self.assertEqual(self.call_corked(lambda: self.parked.send("gone", b"one")), [encode(b"gone")])

    def test_error_of_one_client(self) -> None:
        """The others get their messages."""
        for client_id in "bcd":
            self.fixture.park(client_id).close()
        self.patch(self.owner, "connection_lost", lambda client: 1 / 0)
        calls = [lambda client_id=client_id: self.parked.send(client_id, b"one") for client_id in "bcd"]
        self.assertEqual(self.call_corked(*calls[:2], self.send(b"one"), calls[2]), [encode(b"one")])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertFalse(self.fixture.cork.is_corked)


class UnsentBytesTest(ParkedSessionsTestCase):
    """Writes that the kernel accepts in part, or not at all"""

    def setUp(self) -> None:
        super().setUp()
        self.client_end = self.fixture.park("a", small_buffer_pair(), generation=9)
        self.fd = self.fixture.fd()

    def test_nothing(self) -> None:
        size = fill_send_buffer(self.fd)
        self.assertEqual(self.parked.send("a", b"one", 9), 9)
        self.assert_woken(unsent=encode(b"one"))
        self.assertEqual(self.fixture.metrics.woken, 1)
        self.assertEqual(len(read_available(self.client_end)), size)

    def test_partial_write(self) -> None:
        message = os.urandom(200000)
        self.assertEqual(self.parked.send("a", message), 9)
        unsent = self.owner.unparked[-1].unsent
        self.assertTrue(0 < len(unsent) < len(message))
        self.assertEqual(read_available(self.client_end) + unsent, encode(message))

    def test_partial_write_of_corked_frames(self) -> None:
        messages = [os.urandom(1000) for _ in range(200)]
        self.fixture.cork.cork()
        for message in messages:
            self.assertEqual(self.parked.send("a", message), 9)
        self.fixture.cork.uncork()
        unsent = self.owner.unparked[-1].unsent
        self.assertTrue(0 < len(unsent) < 200000)
        self.assertEqual(read_available(self.client_end) + unsent, b"".join(map(encode, messages)))

    def test_after_corked_frames(self) -> None:
        """Order is kept when it is woken while corked."""
        fill_send_buffer(self.fd)
        self.fixture.cork.cork()
        self.parked.send("a", b"one")
        self.parked.send("a", b"two")
        self.assertEqual(self.parked.send("a", LARGE), 9)
        self.assert_woken(unsent=encode(b"one") + encode(b"two") + encode(LARGE))
        self.assertEqual(self.parked.send("a", b"three"), 0)
        self.fixture.cork.uncork()
        self.assertEqual(len(self.owner.unparked), 1)

    def test_woken_while_corked(self) -> None:
        self.fixture.cork.cork()
        self.parked.send("a", b"one")
        self.parked.send("a", b"two")
        self.parked.wake("a")
        self.fixture.cork.uncork()
        self.assert_woken(unsent=encode(b"one") + encode(b"two"))
        self.assertEqual(read_available(self.client_end), b"")

    def test_pong(self) -> None:
        size = fill_send_buffer(self.fd)
        self.client_end.send(build_frame(9, b"p"))
        self.fixture.step()
        self.assert_woken(unsent=b"\x8a\x01p")
        self.assertEqual(len(read_available(self.client_end)), size)

    def test_while_its_own_message_is_handled(self) -> None:
        """The bytes read after that message go with it."""
        fill_send_buffer(self.fd)
        self.owner.on_message = lambda client_id, payload: self.parked.send("a", LARGE) and None
        self.client_end.send(text_frame(b"one") + text_frame(b"two"))
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])
        self.assert_woken(text_frame(b"two"), unsent=encode(LARGE))

    def test_other_clients_of_the_cork(self) -> None:
        fill_send_buffer(self.fd)
        other = self.fixture.park("b")
        self.fixture.cork.cork()
        for client_id in "ba":
            self.parked.send(client_id, b"one")
        self.fixture.cork.uncork()
        self.assert_woken(unsent=encode(b"one"))
        self.assertEqual(read_frames(other), [(1, b"one")])
