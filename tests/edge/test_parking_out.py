"""Tests of gateway.clients.parked: bytes out."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from unittest import mock

from gateway.clients.parked import MAX_CORKED_FRAME
from gateway.protocol.frames import encode
from tests.edge.fakes import build_frame, text_frame
from tests.edge.parked import (
    ParkedSessionsTestCase,
    fill_send_buffer,
    read_available,
    read_frames,
    seqpacket_pair,
    small_buffer_pair,
)

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
