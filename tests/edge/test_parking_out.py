"""Tests of gateway.clients.parked: bytes out."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from unittest import mock

from gateway.clients.parked import GATHERED
from gateway.protocol.frames import encode
from tests.edge.fakes import frame, text
from tests.edge.parked import LotTest, frames, narrow_pair, record_pair, stuff, take

LARGE = b"L" * (GATHERED + 1)


def records(there: socket.socket) -> list[bytes]:
    """What came, write by write."""
    found = []
    while True:
        try:
            found.append(there.recv(1 << 20))
        except BlockingIOError:
            return found


class SendTest(LotTest):
    """send()"""

    def test_outside_of_a_turn(self) -> None:
        """At once."""
        there = self.lot.park("a", record_pair(), generation=9)
        for payload in (b"one", b"", b"x" * 126, b"x" * 65536):
            self.assertEqual(self.parking.send("a", payload), 9)
            self.assertEqual(records(there), [encode(payload)])

    def test_generation(self) -> None:
        there = self.lot.park("a", generation=9)
        self.assertEqual(self.parking.send("a", b"no", 8), 0)
        self.assertEqual(self.parking.send("a", b"no", 10), 0)
        self.assertEqual(take(there), b"")
        self.assertEqual(self.parking.send("a", b"yes", 9), 9)
        self.assertEqual(self.parking.send("a", b"yes", 0), 9)
        self.assertEqual(frames(there), [(1, b"yes")] * 2)

    def test_to_somebody_who_is_gone(self) -> None:
        self.lot.park("a", generation=9).close()
        self.assertEqual(self.parking.send("a", b"{}"), 0)
        self.assertEqual([client.client_id for client in self.keeper.gone], ["a"])
        self.assertEqual(self.parking.send("a", b"{}"), 0)
        self.assertEqual(len(self.keeper.gone), 1)

    def test_errors_of_the_kernel(self) -> None:
        for number in (errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH):
            self.use()
            self.lot.park("a")
            with mock.patch("gateway.clients.parked.os.write", side_effect=OSError(number, os.strerror(number))):
                self.assertEqual(self.parking.send("a", b"{}"), 0)
            self.assertEqual(len(self.keeper.gone), 1)

    def test_nothing_of_who_had_the_number_before(self) -> None:
        """What was gathered for one goes with it."""
        self.lot.park("a", record_pair(), fd=300)
        self.lot.turn.begin()
        self.parking.send("a", b"for a")
        self.parking.wake("a")
        os.close(self.keeper.leavers[-1].fd)
        there = self.lot.park("b", record_pair(), fd=300)
        self.parking.send("b", b"for b")
        self.lot.turn.end()
        self.assertEqual(records(there), [encode(b"for b")])
        self.assertEqual(self.keeper.leavers.pop().unsent, encode(b"for a"))


class TurnTest(LotTest):
    """Within a turn"""

    def setUp(self) -> None:
        super().setUp()
        self.there = self.lot.park("a", record_pair(), generation=9)

    def turn(self, *calls: Callable[[], object]) -> list[bytes]:
        """What arrived, write by write."""
        self.assertTrue(self.lot.turn.begin())
        for call in calls:
            call()
        self.lot.turn.end()
        return records(self.there)

    def send(self, payload: bytes) -> Callable[[], object]:
        return lambda: self.assertEqual(self.parking.send("a", payload), 9)

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
        others = [self.lot.park(f"c{number}", record_pair()) for number in range(5)]

        def send_to_all() -> None:
            for number in range(5):
                self.parking.send(f"c{number}", b"%d" % number)

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
        self.keeper.on_message = lambda client_id, payload: self.parking.send("a", payload * 2) and None
        self.there.send(text(b"one") + frame(9, b"p") + text(b"two"))
        self.lot.step()
        self.assertEqual(records(self.there), [encode(b"oneone") + b"\x8a\x01p" + encode(b"twotwo")])

    def test_answers_to_many_are_one_write(self) -> None:
        """Calls of one client that others answer, all in one turn."""
        for number in range(5):
            self.lot.park(f"c{number}").send(text(b"%d" % number))
        self.keeper.on_message = lambda client_id, payload: self.parking.send("a", payload) and None
        self.lot.step()
        (written,) = records(self.there)
        self.assertEqual(sorted(written[2::3]), sorted(b"01234"))

    def test_sent_at_its_very_end(self) -> None:
        """Whoever else writes at the end of a turn may have more to say."""
        self.lot.turn.begin()
        self.lot.turn.at_end(self.send(b"one"))
        self.parking.send("a", b"zero")
        self.lot.turn.at_end(self.send(b"two"))
        self.lot.turn.end()
        self.assertEqual(b"".join(records(self.there)), encode(b"zero") + encode(b"one") + encode(b"two"))

    def test_somebody_who_is_gone(self) -> None:
        """It is found out at the end; the others get theirs."""
        self.lot.park("gone").close()
        other = self.lot.park("b", record_pair())
        self.turn(
            lambda: self.parking.send("b", b"one"),
            lambda: self.assertEqual(self.parking.send("gone", b"one"), 7),
            self.send(b"one"),
        )
        self.assertEqual([client.client_id for client in self.keeper.gone], ["gone"])
        self.assertEqual(records(other), [encode(b"one")])

    def test_sent_because_somebody_is_gone(self) -> None:
        self.lot.park("gone").close()
        self.patch(self.keeper, "lost", lambda client: self.parking.send("a", client.client_id.encode()))
        self.assertEqual(self.turn(lambda: self.parking.send("gone", b"one")), [encode(b"gone")])

    def test_an_error_with_one(self) -> None:
        """The others get theirs."""
        for client_id in "bcd":
            self.lot.park(client_id).close()
        self.patch(self.keeper, "lost", lambda client: 1 / 0)
        calls = [lambda client_id=client_id: self.parking.send(client_id, b"one") for client_id in "bcd"]
        self.assertEqual(self.turn(*calls[:2], self.send(b"one"), calls[2]), [encode(b"one")])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertFalse(self.lot.turn.on)


class UnsentTest(LotTest):
    """What the kernel takes in part, or not at all"""

    def setUp(self) -> None:
        super().setUp()
        self.there = self.lot.park("a", narrow_pair(), generation=9)
        self.fd = self.lot.fd()

    def test_nothing(self) -> None:
        size = stuff(self.fd)
        self.assertEqual(self.parking.send("a", b"one", 9), 9)
        self.assert_woken(unsent=encode(b"one"))
        self.assertEqual(self.lot.metrics.woken, 1)
        self.assertEqual(len(take(self.there)), size)

    def test_a_part(self) -> None:
        message = os.urandom(200000)
        self.assertEqual(self.parking.send("a", message), 9)
        unsent = self.keeper.leavers[-1].unsent
        self.assertTrue(0 < len(unsent) < len(message))
        self.assertEqual(take(self.there) + unsent, encode(message))

    def test_a_part_of_what_was_gathered(self) -> None:
        messages = [os.urandom(1000) for _ in range(200)]
        self.lot.turn.begin()
        for message in messages:
            self.assertEqual(self.parking.send("a", message), 9)
        self.lot.turn.end()
        unsent = self.keeper.leavers[-1].unsent
        self.assertTrue(0 < len(unsent) < 200000)
        self.assertEqual(take(self.there) + unsent, b"".join(map(encode, messages)))

    def test_behind_what_was_gathered(self) -> None:
        """Order is kept when it is woken in the midst of a turn."""
        stuff(self.fd)
        self.lot.turn.begin()
        self.parking.send("a", b"one")
        self.parking.send("a", b"two")
        self.assertEqual(self.parking.send("a", LARGE), 9)
        self.assert_woken(unsent=encode(b"one") + encode(b"two") + encode(LARGE))
        self.assertEqual(self.parking.send("a", b"three"), 0)
        self.lot.turn.end()
        self.assertEqual(len(self.keeper.leavers), 1)

    def test_woken_before_the_end_of_the_turn(self) -> None:
        self.lot.turn.begin()
        self.parking.send("a", b"one")
        self.parking.send("a", b"two")
        self.parking.wake("a")
        self.lot.turn.end()
        self.assert_woken(unsent=encode(b"one") + encode(b"two"))
        self.assertEqual(take(self.there), b"")

    def test_pong(self) -> None:
        size = stuff(self.fd)
        self.there.send(frame(9, b"p"))
        self.lot.step()
        self.assert_woken(unsent=b"\x8a\x01p")
        self.assertEqual(len(take(self.there)), size)

    def test_within_its_own_message(self) -> None:
        """What was read behind that goes with it."""
        stuff(self.fd)
        self.keeper.on_message = lambda client_id, payload: self.parking.send("a", LARGE) and None
        self.there.send(text(b"one") + text(b"two"))
        self.lot.step()
        self.assertEqual(self.keeper.payloads, [b"one"])
        self.assert_woken(text(b"two"), unsent=encode(LARGE))

    def test_others_of_the_turn(self) -> None:
        stuff(self.fd)
        other = self.lot.park("b")
        self.lot.turn.begin()
        for client_id in "ba":
            self.parking.send(client_id, b"one")
        self.lot.turn.end()
        self.assert_woken(unsent=encode(b"one"))
        self.assertEqual(frames(other), [(1, b"one")])
