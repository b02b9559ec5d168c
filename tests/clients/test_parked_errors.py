"""Tests of gateway.clients.parked: errors, rows that go in the midst of their own bytes, and who sends too much."""

from __future__ import annotations

from gateway.clients.parked import MAX_CORKED_MESSAGES, MAX_ITERATION_TIME
from gateway.protocol.frames import CloseCode
from tests.builders.frames import build_frame, text_frame
from tests.builders.sockets import fill_send_buffer, read_available, read_frames, seqpacket_pair
from tests.fakes.parked import ParkedSessionsTestCase

PARTIAL = text_frame(b"split")[:-2]


class ErrorTest(ParkedSessionsTestCase):
    """What goes wrong with one stays there"""

    def test_bad_messages(self) -> None:
        there = self.fixture.park("a", generation=9)
        there.send(text_frame(b"bad") * 7 + text_frame(b"{}") + text_frame(b"bad") * 7)
        self.fixture.step()
        self.assertEqual(self.owner.closed, [])
        there.send(text_frame(b"bad") + text_frame(b"after"))
        self.fixture.step()
        self.assertEqual(
            self.owner.closed, [("a", 9, CloseCode.POLICY_VIOLATION, "8 messages in a row were no JSON-RPC 2.0")]
        )
        self.assert_woken(text_frame(b"after"))

    def test_bad_messages_before_and_after(self) -> None:
        """They are counted wherever they come."""
        there = self.fixture.park("a", consecutive_bad=6)
        there.send(text_frame(b"bad"))
        self.fixture.step()
        self.parked.wake("a")
        leaver = self.owner.unparked.pop()
        self.assertEqual(leaver.session.consecutive_bad, 7)
        self.parked.park(leaver.session, leaver.fd, leaver.family, leaver.last_received_at)
        there.send(text_frame(b"bad"))
        self.fixture.step()
        self.assertEqual(len(self.owner.closed), 1)

    def test_bad_message_that_wakes(self) -> None:
        """Its connection leaves while it is handled, and takes the count with it."""
        there = self.fixture.park("a", consecutive_bad=6)
        self.owner.on_message = lambda client_id, payload: self.parked.wake("a")
        there.send(text_frame(b"bad"))
        self.fixture.step()
        self.assertEqual(self.assert_woken().session.consecutive_bad, 7)
        self.assertEqual(self.owner.closed, [])

    def test_last_bad_message_that_wakes(self) -> None:
        there = self.fixture.park("a", consecutive_bad=7)
        self.owner.on_message = lambda client_id, payload: self.parked.wake("a")
        there.send(text_frame(b"bad"))
        self.fixture.step()
        self.assertEqual([end[0] for end in self.owner.closed], ["a"])

    def test_good_message_that_wakes(self) -> None:
        there = self.fixture.park("a", consecutive_bad=7)
        self.owner.on_message = lambda client_id, payload: self.parked.wake("a")
        there.send(text_frame(b"{}"))
        self.fixture.step()
        self.assertEqual(self.assert_woken().session.consecutive_bad, 0)

    def test_something_bad_in_a_batch(self) -> None:
        there = self.fixture.park("a")
        self.owner.on_message = lambda client_id, payload: -3
        there.send(text_frame(b"[]") * 7)
        self.fixture.step()
        self.assertEqual(self.owner.closed, [])
        there.send(text_frame(b"[]"))
        self.fixture.step()
        self.assertEqual(len(self.owner.closed), 1)

    def test_handler_that_fails(self) -> None:
        there, other = self.fixture.park("a", generation=9), self.fixture.park("b")
        there.send(text_frame(b"boom") + text_frame(b"after"))
        other.send(text_frame(b"other"))
        self.fixture.step()
        self.assertEqual(self.owner.closed, [("a", 9, CloseCode.INTERNAL_ERROR, "internal error")])
        self.assert_woken(text_frame(b"after"))
        self.assertIn(b"other", self.owner.payloads)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_error_that_escapes(self) -> None:
        """It would make the reactor drop the table, and everybody in it."""
        peers = [self.fixture.park(client_id) for client_id in "abc"]
        for there in peers:
            there.send(PARTIAL)
        self.patch(self.owner, "wake", lambda leaver: (self.owner.unparked.append(leaver), 1 / 0))
        self.assertIsNone(self.parked.doRead())
        self.assertEqual(len(self.owner.unparked), 3)
        self.assertIn(self.parked, self.fixture.reactor.readers)
        self.assertFalse(self.fixture.cork.is_corked)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        there = self.fixture.park("d")
        there.send(text_frame(b"one"))
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])

    def test_within_a_turn_of_somebody_else(self) -> None:
        """It ends no turn that it did not begin."""
        there = self.fixture.park("a")
        there.send(build_frame(9, b"p"))
        self.fixture.cork.cork()
        self.parked.doRead()
        self.assertEqual(read_available(there), b"")
        self.fixture.cork.uncork()
        self.assertEqual(read_frames(there), [(10, b"p")])


class ReentrantTest(ParkedSessionsTestCase):
    """A row that goes in the midst of its own bytes"""

    def test_woken(self) -> None:
        there = self.fixture.park("a")
        rest = text_frame(b"two") + PARTIAL
        self.owner.on_message = lambda client_id, payload: self.parked.wake("a")
        there.send(text_frame(b"one") + rest)
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])
        self.assert_woken(rest)

    def test_woken_by_the_last_of_them(self) -> None:
        there = self.fixture.park("a")
        self.owner.on_message = lambda client_id, payload: payload == b"two" and self.parked.wake("a")
        there.send(text_frame(b"one") + text_frame(b"two"))
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one", b"two"])
        self.assert_woken()

    def test_woken_with_what_it_was_to_be_sent(self) -> None:
        there = self.fixture.park("a", seqpacket_pair())

        def answer(client_id: str, payload: bytes) -> None:
            self.parked.send("a", payload)
            if payload == b"two":
                self.parked.wake("a")

        self.owner.on_message = answer
        there.send(build_frame(9, b"p") + text_frame(b"one") + text_frame(b"two") + text_frame(b"three"))
        self.fixture.step()
        self.assert_woken(text_frame(b"three"), unsent=b"\x8a\x01p\x81\x03one\x81\x03two")
        self.assertEqual(read_available(there), b"")

    def test_lost(self) -> None:
        """The write that shows it comes from the handler of its own message."""
        there = self.fixture.park("a")
        there.send(text_frame(b"one") + text_frame(b"two"))
        there.close()
        results: list[int] = []
        self.owner.on_message = lambda client_id, payload: results.append(self.parked.send("a", b"x" * 100000))
        self.fixture.step()
        self.assertEqual((self.owner.payloads, results), ([b"one"], [0]))
        self.assertEqual([client.client_id for client in self.owner.lost_sessions], ["a"])
        self.assertEqual(self.owner.unparked, [])

    def test_lost_while_it_is_woken(self) -> None:
        there = self.fixture.park("a")
        self.owner.fails_to_wake = True
        self.owner.on_message = lambda client_id, payload: self.parked.wake("a")
        there.send(text_frame(b"one") + text_frame(b"two"))
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])

    def test_fails_after_it_was_woken(self) -> None:
        there = self.fixture.park("a")
        self.owner.on_message = lambda client_id, payload: (self.parked.wake("a"), 1 / 0)
        there.send(text_frame(b"one") + text_frame(b"two"))
        self.fixture.step()
        self.assertEqual([end[:3] for end in self.owner.closed], [("a", 7, CloseCode.INTERNAL_ERROR)])
        self.assert_woken(text_frame(b"two"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_the_next_one_is_no_part_of_it(self) -> None:
        """What was remembered of the one that left is forgotten."""
        for client_id in "ab":
            self.fixture.park(client_id).send(text_frame(b"one") + text_frame(b"two"))
        self.owner.on_message = lambda client_id, payload: client_id == "a" and self.parked.wake("a")
        self.fixture.step()
        self.assertEqual(sorted(self.owner.messages), [("a", 7, b"one"), ("b", 7, b"one"), ("b", 7, b"two")])
        self.assertIn("b", self.parked.fds)


class RateLimitTest(ParkedSessionsTestCase):
    """Messages per second and client"""

    def setUp(self) -> None:
        self.use_fixture(per_second=10)

    def test_over_the_rate(self) -> None:
        there = self.fixture.park("a", generation=9)
        sent = [text_frame(b"%d" % number) for number in range(15)]
        there.send(b"".join(sent) + PARTIAL)
        self.fixture.step()
        # The one that is too many is handled, and the rest kept.
        self.assertEqual(self.owner.payloads, [b"%d" % number for number in range(11)])
        self.assertEqual(self.owner.paused, [("a", 9)])
        leaver = self.assert_woken(b"".join(sent[11:]) + PARTIAL)
        self.assertAlmostEqual(leaver.session.tat, self.fixture.now + 1.1)

    def test_within_the_rate(self) -> None:
        there = self.fixture.park("a")
        for _ in range(30):
            there.send(text_frame(b"{}"))
            self.fixture.step()
            self.fixture.reactor.advance(0.1)
        self.assertEqual((len(self.owner.messages), self.owner.paused), (30, []))

    def test_pings_and_pongs_count(self) -> None:
        for data in (build_frame(9, b""), build_frame(10, b"")):
            self.use_fixture(per_second=10)
            there = self.fixture.park("a")
            there.send(data * 12)
            self.fixture.step()
            self.assertEqual(self.owner.paused, [("a", 7)])
            leaver = self.assert_woken(data, unsent=b"\x8a\x00" * 11 if data[0] == 0x89 else b"")
            self.assertEqual(read_available(there), b"")
            del leaver

    def test_large_messages_count_for_more(self) -> None:
        there = self.fixture.park("a")
        there.send(text_frame(b"x" * 60000) + text_frame(b"{}") * 9)
        self.fixture.step()
        self.fixture.step()
        # Four, six, and the one that is too many.
        self.assertEqual(len(self.owner.messages), 1 + 6 + 1)
        self.assertEqual(len(self.owner.paused), 1)

    def test_a_batch_counts_for_what_is_in_it(self) -> None:
        for handled in (10, -10):
            self.use_fixture(per_second=10)
            there = self.fixture.park("a")
            self.owner.on_message = lambda client_id, payload, handled=handled: handled
            there.send(text_frame(b"[]"))
            self.fixture.step()
            self.assertEqual(self.owner.paused, [])
            self.owner.on_message = lambda client_id, payload: None
            there.send(text_frame(b"{}") * 2)
            self.fixture.step()
            self.assertEqual((len(self.owner.messages), self.owner.paused), (2, [("a", 7)]))

    def test_a_batch_that_wakes_is_charged_too(self) -> None:
        there = self.fixture.park("a")
        self.owner.on_message = lambda client_id, payload: (self.parked.wake("a"), 5)[1]
        there.send(text_frame(b"[]"))
        self.fixture.step()
        self.assertAlmostEqual(self.assert_woken().session.tat, self.fixture.now + 0.5)

    def test_woken_by_the_one_that_is_too_many(self) -> None:
        """Before that one is handled, which may do anything to the connection."""
        there = self.fixture.park("a", tat=self.fixture.now + 1)
        self.owner.on_message = lambda client_id, payload: self.owner.paused.append("handled")
        there.send(text_frame(b"{}"))
        self.fixture.step()
        self.assertEqual(self.owner.paused, [("a", 7), "handled"])
        self.assertAlmostEqual(self.assert_woken().session.tat, self.fixture.now + 1.1)

    def test_what_was_sent_before_it_was_parked(self) -> None:
        there = self.fixture.park("a", tat=self.fixture.now + 0.9)
        there.send(text_frame(b"{}") * 2)
        self.fixture.step()
        self.assertEqual(self.owner.paused, [("a", 7)])

    def test_no_limit(self) -> None:
        self.use_fixture()
        there = self.fixture.park("a")
        there.send(text_frame(b"{}") * 1000)
        self.fixture.step()
        self.assertEqual((len(self.owner.messages), self.owner.paused), (1000, []))

    def test_ping_whose_answer_wakes_it(self) -> None:
        """It is paused all the same, and what follows is not lost."""
        self.use_fixture(per_second=MAX_CORKED_MESSAGES)
        there = self.fixture.park("a")
        fill_send_buffer(self.fixture.fd())
        there.send(build_frame(9, b"") * (MAX_CORKED_MESSAGES + 1) + text_frame(b"after"))
        self.fixture.step()
        self.assertEqual(self.owner.paused, [("a", 7)])
        self.assert_woken(text_frame(b"after"), b"\x8a\x00" * (MAX_CORKED_MESSAGES + 1))


class CorkTest(ParkedSessionsTestCase):
    """A turn of the reactor is not for those alone who send"""

    def test_others_get_their_turn(self) -> None:
        for name in "abcd":
            self.fixture.park(name).send(text_frame(b"1"))
        self.owner.on_message = lambda client_id, payload: self.fixture.reactor.advance(MAX_ITERATION_TIME * 0.6)
        self.parked.doRead()
        self.assertEqual(len(self.owner.messages), 2)
        self.parked.doRead()
        self.assertEqual(sorted(client_id for client_id, _, _ in self.owner.messages), ["a", "b", "c", "d"])

    def test_who_left_before_it_is_his_turn(self) -> None:
        theirs = {name: self.fixture.park(name) for name in "abc"}
        for there in theirs.values():
            there.send(text_frame(b"1"))
        self.owner.on_message = lambda client_id, payload: self.fixture.reactor.advance(MAX_ITERATION_TIME)
        self.parked.doRead()
        (first,) = (client_id for client_id, _, _ in self.owner.messages)
        for name in set("abc") - {first}:
            self.parked.wake(name)
        self.parked.doRead()
        self.assertEqual(len(self.owner.messages), 1)
