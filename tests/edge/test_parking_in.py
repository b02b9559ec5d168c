"""Tests of gateway.clients.parked: bytes in."""

from __future__ import annotations

import errno
import os
import socket
from unittest import mock

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.clients.parked import READ_SIZE
from tests.edge.fakes import build_frame, close_frame, parse_frames, text_frame
from tests.edge.parked import (
    ParkedSessionsFixture,
    ParkedSessionsTestCase,
    read_available,
    read_frames,
    tcp_pair,
    wait_readable,
)

PARTIAL = text_frame(b"split")[:-2]


class ReceiveTest(ParkedSessionsTestCase):
    """Messages, pings, pongs"""

    def send(self, there: socket.socket, *pieces: bytes) -> None:
        there.send(b"".join(pieces))
        self.fixture.step()

    def test_messages(self) -> None:
        there = self.fixture.park("a", generation=9)
        self.send(
            there, text_frame(b"one"), text_frame("zw\u00f6lf".encode()), text_frame(b""), text_frame(b"x" * 20000)
        )
        expected = [b"one", "zw\u00f6lf".encode(), b"", b"x" * 20000]
        self.assertEqual(self.owner.messages, [("a", 9, payload) for payload in expected])
        self.assertIs(type(self.owner.payloads[0]), bytes)
        self.assertEqual(self.owner.unparked, [])

    def test_of_many(self) -> None:
        """More than are read in one turn."""
        for number in range(600):
            self.fixture.park(f"c{number}").send(text_frame(b"%d" % number))
        self.fixture.step()
        self.assertEqual(len(self.owner.messages), 512)
        self.fixture.step()
        self.assertEqual(sorted(map(int, self.owner.payloads)), list(range(600)))

    def test_heard(self) -> None:
        there = self.fixture.park("a")
        self.fixture.reactor.advance(3)
        self.send(there, text_frame(b"one"))
        self.fixture.reactor.advance(4)
        self.send(there, PARTIAL)
        leaver = self.assert_woken(PARTIAL)
        # When it was last heard of before tells how busy it is.
        self.assertEqual(
            (leaver.previously_received_at, leaver.last_received_at), (self.fixture.now - 4, self.fixture.now)
        )

    def test_ping(self) -> None:
        there = self.fixture.park("a")
        self.send(there, build_frame(9, b""), build_frame(9, b"\xff" * 125), text_frame(b"one"), build_frame(9, b"p"))
        self.assertEqual(read_frames(there), [(10, b""), (10, b"\xff" * 125), (10, b"p")])
        self.assertEqual(self.owner.payloads, [b"one"])
        self.assertEqual(self.owner.unparked, [])

    def test_pong(self) -> None:
        there = self.fixture.park("a")
        self.send(there, build_frame(10, b""), build_frame(10, b"unasked"), text_frame(b"one"))
        self.assertEqual(read_available(there), b"")
        self.assertEqual(self.owner.payloads, [b"one"])
        self.assertEqual(self.owner.unparked, [])

    def test_more_than_is_read_at_once(self) -> None:
        there = self.fixture.park("a")
        message = text_frame(b"x" * 1000)
        # A whole number of them, so that the cut is between two.
        size = (READ_SIZE // len(message)) * len(message)
        there.send(message * (size // len(message)))
        self.fixture.step()
        self.assertEqual(len(self.owner.messages), size // len(message))
        self.assertEqual(self.owner.unparked, [])

    def test_too_large_for_here(self) -> None:
        """Whoever is to close it with 1009 sees it from its beginning."""
        self.use_fixture(max_message_size=1000)
        there = self.fixture.park("a")
        data = text_frame(b"x" * 1000) + text_frame(b"y" * 1001) + text_frame(b"z")
        self.send(there, data)
        self.assertEqual(self.owner.payloads, [b"x" * 1000])
        self.assert_woken(data[1008:])

    def test_what_wakes(self) -> None:
        """A piece of a frame or of a message, a close frame, whatever breaks the protocol; with all that is behind."""
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
                lot = self.use_fixture()
                there = lot.park("a")
                self.send(there, before, data, behind)
                unread = data + behind
                size = READ_SIZE - len(before)
                leaver = self.assert_woken(unread[:size], b"\x8a\x00" if before[:1] == b"\x89" else b"")
                self.assertEqual(unread[size:], self.read_on(leaver.fd))
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
            there = self.fixture.park("a")
            self.send(there, data[:cut])
            if cut in ends:
                self.assertEqual(self.owner.unparked, [])
                self.send(there, data[cut:])
                self.assertEqual(self.owner.payloads, [b"one", b"x" * 130, b"\xe2\x82\xac"])
            else:
                there.send(data[cut:])
                begun = max(end for end in ends if end < cut)
                # Its pong goes with it, unless that was in an earlier turn.
                leaver = self.assert_woken(
                    data[begun:cut], b"\x8a\x01p" if begun >= len(pieces[0] + pieces[1]) else b""
                )
                self.assertEqual(os.read(leaver.fd, 1000), data[cut:])

    good = st.sampled_from(
        [text_frame(b"{}"), text_frame(b"x" * 200), build_frame(9, b"p"), build_frame(10, b""), text_frame(b"bad")]
    )

    @settings(deadline=None, max_examples=100)
    @given(st.lists(good), st.sampled_from([b"", PARTIAL, close_frame(1000), build_frame(0, b"")]), st.integers(0, 500))
    @example([text_frame(b"{}")], b"", 3)
    def test_generated(self, pieces: list[bytes], other: bytes, cut: int) -> None:
        """What was handled, and what its next owner gets, are all that came, in order and once."""
        lot = ParkedSessionsFixture()
        try:
            there = lot.park("a")
            data = b"".join(pieces) + other
            for part in (data[:cut], data[cut:]):
                if part:
                    there.send(part)
                lot.step()
            handled, at = [], 0
            for piece in pieces:
                at += len(piece)
                handled.append((at, piece))
            unread, answers = b"", read_available(there)
            if lot.owner.unparked:
                (leaver,), (woken,) = lot.owner.unparked, lot.owner.protocols
                assert woken is not None
                unread = woken.unread + self.read_on(leaver.fd)
                answers += leaver.unsent
            self.assertTrue(data.endswith(unread))
            before = [piece for end, piece in handled if end <= len(data) - len(unread)]
            self.assertEqual(len(b"".join(before)), len(data) - len(unread))
            self.assertEqual(lot.owner.payloads, [self.content(piece) for piece in before if piece[0] == 0x81])
            self.assertEqual(parse_frames(answers), [(10, b"p")] * before.count(build_frame(9, b"p")))
        finally:
            lot.close()

    @staticmethod
    def content(piece: bytes) -> bytes:
        return {text_frame(b"{}"): b"{}", text_frame(b"bad"): b"bad"}.get(piece, b"x" * 200)


class ConnectionLostTest(ParkedSessionsTestCase):
    """The other side is gone"""

    def assert_lost(self) -> None:
        self.assertEqual([client.client_id for client in self.owner.lost_sessions], ["a"])
        self.assertEqual((self.owner.unparked, len(self.parked)), ([], 0))

    def test_end(self) -> None:
        there = self.fixture.park("a", generation=9, consecutive_bad=3)
        fd = self.fixture.fd()
        there.close()
        self.fixture.step()
        self.assert_lost()
        (client,) = self.owner.lost_sessions
        self.assertEqual((client.generation, client.consecutive_bad, client.claimed), (9, 3, True))
        with self.assertRaises(OSError) as raised:
            os.fstat(fd)
        self.assertEqual(raised.exception.errno, errno.EBADF)

    def test_end_behind_data(self) -> None:
        there = self.fixture.park("a")
        there.send(text_frame(b"one") + build_frame(9, b"p"))
        there.shutdown(socket.SHUT_WR)
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])
        # Who has only stopped to send still reads.
        self.assertEqual(read_frames(there), [(10, b"p")])
        self.assertIn("a", self.parked.fds)
        self.fixture.step()
        self.assert_lost()

    def test_close_frame_behind_data(self) -> None:
        there = self.fixture.park("a")
        there.send(text_frame(b"one") + close_frame(1000))
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])
        self.assert_woken(close_frame(1000))

    def test_reset(self) -> None:
        here, there = tcp_pair()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.fixture.park("a", (here, there))
        there.close()
        wait_readable(self.fixture.fd())
        self.fixture.step()
        self.assert_lost()

    def test_nothing_there_after_all(self) -> None:
        """EAGAIN: an event is a hint, no promise."""
        there = self.fixture.park("a")
        there.send(text_frame(b"one"))
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
