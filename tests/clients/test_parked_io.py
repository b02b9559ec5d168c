"""Tests of gateway.clients.parked: bytes in.

Tests of gateway.clients.parked: bytes out.
"""

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


LARGE = b"L" * (MAX_CORKED_FRAME + 1)


def records(there: socket.socket) -> list[bytes]:
    """What came, write by write."""
    found = []
    while True:
        try:
            found.append(there.recv(1 << 20))
        except BlockingIOError:
            return found


class SendTest(ParkedSessionsTestCase):
    """send()"""

    def test_outside_of_a_turn(self) -> None:
        """At once."""
        there = self.fixture.park("a", seqpacket_pair(), generation=9)
        for payload in (b"one", b"", b"x" * 126, b"x" * 65536):
            self.assertEqual(self.parked.send("a", payload), 9)
            self.assertEqual(records(there), [encode(payload)])

    def test_generation(self) -> None:
        there = self.fixture.park("a", generation=9)
        self.assertEqual(self.parked.send("a", b"no", 8), 0)
        self.assertEqual(self.parked.send("a", b"no", 10), 0)
        self.assertEqual(read_available(there), b"")
        self.assertEqual(self.parked.send("a", b"yes", 9), 9)
        self.assertEqual(self.parked.send("a", b"yes", 0), 9)
        self.assertEqual(read_frames(there), [(1, b"yes")] * 2)

    def test_to_somebody_who_is_gone(self) -> None:
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

    def test_nothing_of_who_had_the_number_before(self) -> None:
        """What was gathered for one goes with it."""
        self.fixture.park("a", seqpacket_pair(), fd=300)
        self.fixture.cork.cork()
        self.parked.send("a", b"for a")
        self.parked.wake("a")
        os.close(self.owner.unparked[-1].fd)
        there = self.fixture.park("b", seqpacket_pair(), fd=300)
        self.parked.send("b", b"for b")
        self.fixture.cork.uncork()
        self.assertEqual(records(there), [encode(b"for b")])
        self.assertEqual(self.owner.unparked.pop().unsent, encode(b"for a"))


class CorkedSendTest(ParkedSessionsTestCase):
    """Within a turn"""

    def setUp(self) -> None:
        super().setUp()
        self.there = self.fixture.park("a", seqpacket_pair(), generation=9)

    def turn(self, *calls: Callable[[], object]) -> list[bytes]:
        """What arrived, write by write."""
        self.assertTrue(self.fixture.cork.cork())
        for call in calls:
            call()
        self.fixture.cork.uncork()
        return records(self.there)

    def send(self, payload: bytes) -> Callable[[], object]:
        return lambda: self.assertEqual(self.parked.send("a", payload), 9)

    def test_one_write(self) -> None:
        sent = [b"%d" % number for number in range(20)]
        self.assertEqual(self.turn(*map(self.send, sent)), [b"".join(map(encode, sent))])

    def test_nothing_before_its_end(self) -> None:
        self.turn(self.send(b"one"), lambda: self.assertEqual(records(self.there), []))

    def test_one_after_the_other(self) -> None:
        self.assertEqual(self.turn(self.send(b"one")), [encode(b"one")])
        self.assertEqual(self.turn(self.send(b"two")), [encode(b"two")])
        self.assertEqual(self.turn(), [])

    def test_one_write_for_each(self) -> None:
        others = [self.fixture.park(f"c{number}", seqpacket_pair()) for number in range(5)]

        def send_to_all() -> None:
            for number in range(5):
                self.parked.send(f"c{number}", b"%d" % number)

        self.turn(send_to_all, self.send(b"one"), send_to_all)
        self.assertEqual([records(there) for there in others], [[encode(b"%d" % number) * 2] for number in range(5)])

    def test_order_of_small_and_large(self) -> None:
        """What is large is not gathered, and takes what was gathered along."""
        written = self.turn(*map(self.send, (b"one", b"two", LARGE, b"three", LARGE, LARGE, b"four")))
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
        """All that one read sets off is one write."""
        self.owner.on_message = lambda client_id, payload: self.parked.send("a", payload * 2) and None
        self.there.send(text_frame(b"one") + build_frame(9, b"p") + text_frame(b"two"))
        self.fixture.step()
        self.assertEqual(records(self.there), [encode(b"oneone") + b"\x8a\x01p" + encode(b"twotwo")])

    def test_answers_to_many_are_one_write(self) -> None:
        """Calls of one client that others answer, all in one turn."""
        for number in range(5):
            self.fixture.park(f"c{number}").send(text_frame(b"%d" % number))
        self.owner.on_message = lambda client_id, payload: self.parked.send("a", payload) and None
        self.fixture.step()
        (written,) = records(self.there)
        self.assertEqual(sorted(written[2::3]), sorted(b"01234"))

    def test_sent_at_its_very_end(self) -> None:
        """Whoever else writes at the end of a turn may have more to say."""
        self.fixture.cork.cork()
        self.fixture.cork.on_flush(self.send(b"one"))
        self.parked.send("a", b"zero")
        self.fixture.cork.on_flush(self.send(b"two"))
        self.fixture.cork.uncork()
        self.assertEqual(b"".join(records(self.there)), encode(b"zero") + encode(b"one") + encode(b"two"))

    def test_somebody_who_is_gone(self) -> None:
        """It is found out at the end; the others get theirs."""
        self.fixture.park("gone").close()
        other = self.fixture.park("b", seqpacket_pair())
        self.turn(
            lambda: self.parked.send("b", b"one"),
            lambda: self.assertEqual(self.parked.send("gone", b"one"), 7),
            self.send(b"one"),
        )
        self.assertEqual([client.client_id for client in self.owner.lost_sessions], ["gone"])
        self.assertEqual(records(other), [encode(b"one")])

    def test_sent_because_somebody_is_gone(self) -> None:
        self.fixture.park("gone").close()
        self.patch(self.owner, "connection_lost", lambda client: self.parked.send("a", client.client_id.encode()))
        self.assertEqual(self.turn(lambda: self.parked.send("gone", b"one")), [encode(b"gone")])

    def test_an_error_with_one(self) -> None:
        """The others get theirs."""
        for client_id in "bcd":
            self.fixture.park(client_id).close()
        self.patch(self.owner, "connection_lost", lambda client: 1 / 0)
        calls = [lambda client_id=client_id: self.parked.send(client_id, b"one") for client_id in "bcd"]
        self.assertEqual(self.turn(*calls[:2], self.send(b"one"), calls[2]), [encode(b"one")])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertFalse(self.fixture.cork.is_corked)


class UnsentBytesTest(ParkedSessionsTestCase):
    """What the kernel takes in part, or not at all"""

    def setUp(self) -> None:
        super().setUp()
        self.there = self.fixture.park("a", small_buffer_pair(), generation=9)
        self.fd = self.fixture.fd()

    def test_nothing(self) -> None:
        size = fill_send_buffer(self.fd)
        self.assertEqual(self.parked.send("a", b"one", 9), 9)
        self.assert_woken(unsent=encode(b"one"))
        self.assertEqual(self.fixture.metrics.woken, 1)
        self.assertEqual(len(read_available(self.there)), size)

    def test_a_part(self) -> None:
        message = os.urandom(200000)
        self.assertEqual(self.parked.send("a", message), 9)
        unsent = self.owner.unparked[-1].unsent
        self.assertTrue(0 < len(unsent) < len(message))
        self.assertEqual(read_available(self.there) + unsent, encode(message))

    def test_a_part_of_what_was_gathered(self) -> None:
        messages = [os.urandom(1000) for _ in range(200)]
        self.fixture.cork.cork()
        for message in messages:
            self.assertEqual(self.parked.send("a", message), 9)
        self.fixture.cork.uncork()
        unsent = self.owner.unparked[-1].unsent
        self.assertTrue(0 < len(unsent) < 200000)
        self.assertEqual(read_available(self.there) + unsent, b"".join(map(encode, messages)))

    def test_behind_what_was_gathered(self) -> None:
        """Order is kept when it is woken in the midst of a turn."""
        fill_send_buffer(self.fd)
        self.fixture.cork.cork()
        self.parked.send("a", b"one")
        self.parked.send("a", b"two")
        self.assertEqual(self.parked.send("a", LARGE), 9)
        self.assert_woken(unsent=encode(b"one") + encode(b"two") + encode(LARGE))
        self.assertEqual(self.parked.send("a", b"three"), 0)
        self.fixture.cork.uncork()
        self.assertEqual(len(self.owner.unparked), 1)

    def test_woken_before_the_end_of_the_turn(self) -> None:
        self.fixture.cork.cork()
        self.parked.send("a", b"one")
        self.parked.send("a", b"two")
        self.parked.wake("a")
        self.fixture.cork.uncork()
        self.assert_woken(unsent=encode(b"one") + encode(b"two"))
        self.assertEqual(read_available(self.there), b"")

    def test_pong(self) -> None:
        size = fill_send_buffer(self.fd)
        self.there.send(build_frame(9, b"p"))
        self.fixture.step()
        self.assert_woken(unsent=b"\x8a\x01p")
        self.assertEqual(len(read_available(self.there)), size)

    def test_within_its_own_message(self) -> None:
        """What was read behind that goes with it."""
        fill_send_buffer(self.fd)
        self.owner.on_message = lambda client_id, payload: self.parked.send("a", LARGE) and None
        self.there.send(text_frame(b"one") + text_frame(b"two"))
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])
        self.assert_woken(text_frame(b"two"), unsent=encode(LARGE))

    def test_others_of_the_turn(self) -> None:
        fill_send_buffer(self.fd)
        other = self.fixture.park("b")
        self.fixture.cork.cork()
        for client_id in "ba":
            self.parked.send(client_id, b"one")
        self.fixture.cork.uncork()
        self.assert_woken(unsent=encode(b"one"))
        self.assertEqual(read_frames(other), [(1, b"one")])
