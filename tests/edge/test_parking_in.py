"""Tests of gateway.clients.parked: bytes in."""

from __future__ import annotations

import errno
import os
import socket
from unittest import mock

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.clients.parked import READ_SIZE
from tests.edge.fakes import close, frame, parse_frames, text
from tests.edge.parked import Lot, LotTest, arrived, frames, take, tcp_pair

PARTIAL = text(b"split")[:-2]


class MessageTest(LotTest):
    """Messages, pings, pongs"""

    def send(self, there: socket.socket, *pieces: bytes) -> None:
        there.send(b"".join(pieces))
        self.lot.step()

    def test_messages(self) -> None:
        there = self.lot.park("a", generation=9)
        self.send(there, text(b"one"), text("zw\u00f6lf".encode()), text(b""), text(b"x" * 20000))
        expected = [b"one", "zw\u00f6lf".encode(), b"", b"x" * 20000]
        self.assertEqual(self.keeper.messages, [("a", 9, payload) for payload in expected])
        self.assertIs(type(self.keeper.payloads[0]), bytes)
        self.assertEqual(self.keeper.leavers, [])

    def test_of_many(self) -> None:
        """More than are read in one turn."""
        for number in range(600):
            self.lot.park(f"c{number}").send(text(b"%d" % number))
        self.lot.step()
        self.assertEqual(len(self.keeper.messages), 512)
        self.lot.step()
        self.assertEqual(sorted(map(int, self.keeper.payloads)), list(range(600)))

    def test_heard(self) -> None:
        there = self.lot.park("a")
        self.lot.reactor.advance(3)
        self.send(there, text(b"one"))
        self.lot.reactor.advance(4)
        self.send(there, PARTIAL)
        leaver = self.assert_woken(PARTIAL)
        # When it was last heard of before tells how busy it is.
        self.assertEqual((leaver.heard_before, leaver.heard_at), (self.lot.now - 4, self.lot.now))

    def test_ping(self) -> None:
        there = self.lot.park("a")
        self.send(there, frame(9, b""), frame(9, b"\xff" * 125), text(b"one"), frame(9, b"p"))
        self.assertEqual(frames(there), [(10, b""), (10, b"\xff" * 125), (10, b"p")])
        self.assertEqual(self.keeper.payloads, [b"one"])
        self.assertEqual(self.keeper.leavers, [])

    def test_pong(self) -> None:
        there = self.lot.park("a")
        self.send(there, frame(10, b""), frame(10, b"unasked"), text(b"one"))
        self.assertEqual(take(there), b"")
        self.assertEqual(self.keeper.payloads, [b"one"])
        self.assertEqual(self.keeper.leavers, [])

    def test_more_than_is_read_at_once(self) -> None:
        there = self.lot.park("a")
        message = text(b"x" * 1000)
        # A whole number of them, so that the cut is between two.
        size = (READ_SIZE // len(message)) * len(message)
        there.send(message * (size // len(message)))
        self.lot.step()
        self.assertEqual(len(self.keeper.messages), size // len(message))
        self.assertEqual(self.keeper.leavers, [])

    def test_too_large_for_here(self) -> None:
        """Whoever is to close it with 1009 sees it from its beginning."""
        self.use(max_message_size=1000)
        there = self.lot.park("a")
        data = text(b"x" * 1000) + text(b"y" * 1001) + text(b"z")
        self.send(there, data)
        self.assertEqual(self.keeper.payloads, [b"x" * 1000])
        self.assert_woken(data[1008:])

    def test_what_wakes(self) -> None:
        """A piece of a frame or of a message, a close frame, whatever breaks the protocol; with all that is behind."""
        for data in (
            text(b"{}")[:1],
            PARTIAL,
            frame(1, b"a", fin=False),
            frame(0, b"a"),
            frame(2, b"a"),
            frame(1, b"a", rsv=4),
            frame(1, b"a", masked=False),
            frame(3, b"a"),
            frame(11, b"a"),
            frame(9, b"a" * 126),
            frame(9, b"a", fin=False),
            text(b"\xff"),
            text(b"x" * 65536),
            close(1000),
            close(),
        ):
            for before, behind in ((b"", b""), (text(b"one"), text(b"two")), (frame(9, b""), close(1000))):
                lot = self.use()
                there = lot.park("a")
                self.send(there, before, data, behind)
                unread = data + behind
                size = READ_SIZE - len(before)
                leaver = self.assert_woken(unread[:size], b"\x8a\x00" if before[:1] == b"\x89" else b"")
                self.assertEqual(unread[size:], self.read_on(leaver.fd))
                self.assertEqual(self.keeper.payloads, [b"one"] * (before == text(b"one")))

    def read_on(self, fd: int) -> bytes:
        try:
            return os.read(fd, READ_SIZE)
        except BlockingIOError:
            return b""

    def test_split_at_every_byte(self) -> None:
        pieces = [text(b"one"), frame(9, b"p"), text(b"x" * 130), frame(10, b""), text(b"\xe2\x82\xac")]
        data = b"".join(pieces)
        ends = {sum(map(len, pieces[:count])) for count in range(len(pieces) + 1)}
        for cut in range(1, len(data)):
            self.use()
            there = self.lot.park("a")
            self.send(there, data[:cut])
            if cut in ends:
                self.assertEqual(self.keeper.leavers, [])
                self.send(there, data[cut:])
                self.assertEqual(self.keeper.payloads, [b"one", b"x" * 130, b"\xe2\x82\xac"])
            else:
                there.send(data[cut:])
                begun = max(end for end in ends if end < cut)
                # Its pong goes with it, unless that was in an earlier turn.
                leaver = self.assert_woken(
                    data[begun:cut], b"\x8a\x01p" if begun >= len(pieces[0] + pieces[1]) else b""
                )
                self.assertEqual(os.read(leaver.fd, 1000), data[cut:])

    good = st.sampled_from([text(b"{}"), text(b"x" * 200), frame(9, b"p"), frame(10, b""), text(b"bad")])

    @settings(deadline=None, max_examples=100)
    @given(st.lists(good), st.sampled_from([b"", PARTIAL, close(1000), frame(0, b"")]), st.integers(0, 500))
    @example([text(b"{}")], b"", 3)
    def test_generated(self, pieces: list[bytes], other: bytes, cut: int) -> None:
        """What was handled, and what its next owner gets, are all that came, in order and once."""
        lot = Lot()
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
            unread, answers = b"", take(there)
            if lot.keeper.leavers:
                (leaver,), (woken,) = lot.keeper.leavers, lot.keeper.woken
                assert woken is not None
                unread = woken.unread + self.read_on(leaver.fd)
                answers += leaver.unsent
            self.assertTrue(data.endswith(unread))
            before = [piece for end, piece in handled if end <= len(data) - len(unread)]
            self.assertEqual(len(b"".join(before)), len(data) - len(unread))
            self.assertEqual(lot.keeper.payloads, [self.content(piece) for piece in before if piece[0] == 0x81])
            self.assertEqual(parse_frames(answers), [(10, b"p")] * before.count(frame(9, b"p")))
        finally:
            lot.close()

    @staticmethod
    def content(piece: bytes) -> bytes:
        return {text(b"{}"): b"{}", text(b"bad"): b"bad"}.get(piece, b"x" * 200)


class EndTest(LotTest):
    """The other side is gone"""

    def assert_lost(self) -> None:
        self.assertEqual([client.client_id for client in self.keeper.gone], ["a"])
        self.assertEqual((self.keeper.leavers, len(self.parking)), ([], 0))

    def test_end(self) -> None:
        there = self.lot.park("a", generation=9, bad=3)
        fd = self.lot.fd()
        there.close()
        self.lot.step()
        self.assert_lost()
        (client,) = self.keeper.gone
        self.assertEqual((client.generation, client.bad, client.claimed), (9, 3, True))
        with self.assertRaises(OSError) as raised:
            os.fstat(fd)
        self.assertEqual(raised.exception.errno, errno.EBADF)

    def test_end_behind_data(self) -> None:
        there = self.lot.park("a")
        there.send(text(b"one") + frame(9, b"p"))
        there.shutdown(socket.SHUT_WR)
        self.lot.step()
        self.assertEqual(self.keeper.payloads, [b"one"])
        # Who has only stopped to send still reads.
        self.assertEqual(frames(there), [(10, b"p")])
        self.assertIn("a", self.parking.fds)
        self.lot.step()
        self.assert_lost()

    def test_close_frame_behind_data(self) -> None:
        there = self.lot.park("a")
        there.send(text(b"one") + close(1000))
        self.lot.step()
        self.assertEqual(self.keeper.payloads, [b"one"])
        self.assert_woken(close(1000))

    def test_reset(self) -> None:
        here, there = tcp_pair()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.lot.park("a", (here, there))
        there.close()
        arrived(self.lot.fd())
        self.lot.step()
        self.assert_lost()

    def test_nothing_there_after_all(self) -> None:
        """EAGAIN: an event is a hint, no promise."""
        there = self.lot.park("a")
        there.send(text(b"one"))
        with mock.patch("gateway.clients.parked.os.read", side_effect=BlockingIOError(errno.EAGAIN, "again")):
            self.lot.step()
        self.assertEqual(self.keeper.gone, [])
        self.lot.step()
        self.assertEqual(self.keeper.payloads, [b"one"])

    def test_errors_of_the_kernel(self) -> None:
        for number in (errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EPIPE, errno.EIO):
            self.use()
            self.lot.park("a").send(text(b"one"))
            with mock.patch("gateway.clients.parked.os.read", side_effect=OSError(number, os.strerror(number))):
                self.lot.step()
            self.assert_lost()
