"""Tests of gateway.clients.parked: errors, rows removed while their own bytes are handled, and rates."""

from __future__ import annotations

from gateway.clients.parked import MAX_CORKED_MESSAGES, MAX_ITERATION_TIME
from gateway.protocol.frames import CloseCode
from tests.builders.frames import build_frame, text_frame
from tests.builders.sockets import fill_send_buffer, read_available, read_frames, seqpacket_pair
from tests.fakes.parked import ParkedSessionsTestCase

PARTIAL = text_frame(b"split")[:-2]


class ErrorTest(ParkedSessionsTestCase):
    """Errors of one session do not affect others"""

    def test_bad_messages(self) -> None:
        client_end = self.fixture.park("a", generation=9)
        client_end.send(text_frame(b"bad") * 7 + text_frame(b"{}") + text_frame(b"bad") * 7)
        self.fixture.step()
        self.assertEqual(self.owner.closed, [])
        client_end.send(text_frame(b"bad") + text_frame(b"after"))
        self.fixture.step()
        self.assertEqual(
            self.owner.closed, [("a", 9, CloseCode.POLICY_VIOLATION, "8 messages in a row were no JSON-RPC 2.0")]
        )
        self.assert_woken(text_frame(b"after"))

    def test_bad_messages_across_parking(self) -> None:
        """They are counted while parked and awake."""
        client_end = self.fixture.park("a", consecutive_bad=6)
        client_end.send(text_frame(b"bad"))
        self.fixture.step()
        self.parked.wake("a")
        unparked = self.owner.unparked.pop()
        self.assertEqual(unparked.session.consecutive_bad, 7)
        self.parked.park(unparked.session, unparked.fd, unparked.family, unparked.last_received_at)
        client_end.send(text_frame(b"bad"))
        self.fixture.step()
        self.assertEqual(len(self.owner.closed), 1)

    def test_bad_message_that_wakes(self) -> None:
        """Its session is woken while it is handled, and keeps the count."""
        client_end = self.fixture.park("a", consecutive_bad=6)
        self.owner.on_message = lambda client_id, payload: self.parked.wake("a")
        client_end.send(text_frame(b"bad"))
        self.fixture.step()
        self.assertEqual(self.assert_woken().session.consecutive_bad, 7)
        self.assertEqual(self.owner.closed, [])

    def test_last_bad_message_that_wakes(self) -> None:
        client_end = self.fixture.park("a", consecutive_bad=7)
        self.owner.on_message = lambda client_id, payload: self.parked.wake("a")
        client_end.send(text_frame(b"bad"))
        self.fixture.step()
        self.assertEqual([end[0] for end in self.owner.closed], ["a"])

    def test_good_message_that_wakes(self) -> None:
        client_end = self.fixture.park("a", consecutive_bad=7)
        self.owner.on_message = lambda client_id, payload: self.parked.wake("a")
        client_end.send(text_frame(b"{}"))
        self.fixture.step()
        self.assertEqual(self.assert_woken().session.consecutive_bad, 0)

    def test_invalid_message_in_a_batch(self) -> None:
        client_end = self.fixture.park("a")
        self.owner.on_message = lambda client_id, payload: -3
        client_end.send(text_frame(b"[]") * 7)
        self.fixture.step()
        self.assertEqual(self.owner.closed, [])
        client_end.send(text_frame(b"[]"))
        self.fixture.step()
        self.assertEqual(len(self.owner.closed), 1)

    def test_handler_that_fails(self) -> None:
        client_end, other = self.fixture.park("a", generation=9), self.fixture.park("b")
        client_end.send(text_frame(b"boom") + text_frame(b"after"))
        other.send(text_frame(b"other"))
        self.fixture.step()
        self.assertEqual(self.owner.closed, [("a", 9, CloseCode.INTERNAL_ERROR, "internal error")])
        self.assert_woken(text_frame(b"after"))
        self.assertIn(b"other", self.owner.payloads)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_error_that_escapes(self) -> None:
        """It would make the reactor disconnect the whole table."""
        peers = [self.fixture.park(client_id) for client_id in "abc"]
        for client_end in peers:
            client_end.send(PARTIAL)
        self.patch(self.owner, "wake", lambda unparked: (self.owner.unparked.append(unparked), 1 / 0))
        self.assertIsNone(self.parked.doRead())
        self.assertEqual(len(self.owner.unparked), 3)
        self.assertIn(self.parked, self.fixture.reactor.readers)
        self.assertFalse(self.fixture.cork.is_corked)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        client_end = self.fixture.park("d")
        client_end.send(text_frame(b"one"))
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])

    def test_while_corked_by_another_caller(self) -> None:
        """It does not release a cork that it did not take."""
        client_end = self.fixture.park("a")
        client_end.send(build_frame(9, b"p"))
        self.fixture.cork.cork()
        self.parked.doRead()
        self.assertEqual(read_available(client_end), b"")
        self.fixture.cork.uncork()
        self.assertEqual(read_frames(client_end), [(10, b"p")])


class ReentrantTest(ParkedSessionsTestCase):
    """A row removed while its own bytes are handled"""

    def test_woken(self) -> None:
        client_end = self.fixture.park("a")
        rest = text_frame(b"two") + PARTIAL
        self.owner.on_message = lambda client_id, payload: self.parked.wake("a")
        client_end.send(text_frame(b"one") + rest)
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])
        self.assert_woken(rest)

    def test_woken_by_the_last_message(self) -> None:
        client_end = self.fixture.park("a")
        self.owner.on_message = lambda client_id, payload: payload == b"two" and self.parked.wake("a")
        client_end.send(text_frame(b"one") + text_frame(b"two"))
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one", b"two"])
        self.assert_woken()

    def test_woken_with_unsent_bytes(self) -> None:
        client_end = self.fixture.park("a", seqpacket_pair())

        def answer(client_id: str, payload: bytes) -> None:
            self.parked.send("a", payload)
            if payload == b"two":
                self.parked.wake("a")

        self.owner.on_message = answer
        client_end.send(build_frame(9, b"p") + text_frame(b"one") + text_frame(b"two") + text_frame(b"three"))
        self.fixture.step()
        self.assert_woken(text_frame(b"three"), unsent=b"\x8a\x01p\x81\x03one\x81\x03two")
        self.assertEqual(read_available(client_end), b"")

    def test_lost(self) -> None:
        """The write that detects it comes from the handler of its own message."""
        client_end = self.fixture.park("a")
        client_end.send(text_frame(b"one") + text_frame(b"two"))
        client_end.close()
        results: list[int] = []
        self.owner.on_message = lambda client_id, payload: results.append(self.parked.send("a", b"x" * 100000))
        self.fixture.step()
        self.assertEqual((self.owner.payloads, results), ([b"one"], [0]))
        self.assertEqual([client.client_id for client in self.owner.lost_sessions], ["a"])
        self.assertEqual(self.owner.unparked, [])

    def test_lost_while_it_is_woken(self) -> None:
        client_end = self.fixture.park("a")
        self.owner.fails_to_wake = True
        self.owner.on_message = lambda client_id, payload: self.parked.wake("a")
        client_end.send(text_frame(b"one") + text_frame(b"two"))
        self.fixture.step()
        self.assertEqual(self.owner.payloads, [b"one"])

    def test_fails_after_it_was_woken(self) -> None:
        client_end = self.fixture.park("a")
        self.owner.on_message = lambda client_id, payload: (self.parked.wake("a"), 1 / 0)
        client_end.send(text_frame(b"one") + text_frame(b"two"))
        self.fixture.step()
        self.assertEqual([end[:3] for end in self.owner.closed], [("a", 7, CloseCode.INTERNAL_ERROR)])
        self.assert_woken(text_frame(b"two"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_next_session_is_not_affected(self) -> None:
        """The state of the read in progress is reset."""
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
        client_end = self.fixture.park("a", generation=9)
        sent = [text_frame(b"%d" % number) for number in range(15)]
        client_end.send(b"".join(sent) + PARTIAL)
        self.fixture.step()
        # The excess message is handled, and the rest kept.
        self.assertEqual(self.owner.payloads, [b"%d" % number for number in range(11)])
        self.assertEqual(self.owner.paused, [("a", 9)])
        unparked = self.assert_woken(b"".join(sent[11:]) + PARTIAL)
        self.assertAlmostEqual(unparked.session.tat, self.fixture.now + 1.1)

    def test_within_the_rate(self) -> None:
        client_end = self.fixture.park("a")
        for _ in range(30):
            client_end.send(text_frame(b"{}"))
            self.fixture.step()
            self.fixture.reactor.advance(0.1)
        self.assertEqual((len(self.owner.messages), self.owner.paused), (30, []))

    def test_pings_and_pongs_count(self) -> None:
        for data in (build_frame(9, b""), build_frame(10, b"")):
            self.use_fixture(per_second=10)
            client_end = self.fixture.park("a")
            client_end.send(data * 12)
            self.fixture.step()
            self.assertEqual(self.owner.paused, [("a", 7)])
            unparked = self.assert_woken(data, unsent=b"\x8a\x00" * 11 if data[0] == 0x89 else b"")
            self.assertEqual(read_available(client_end), b"")
            del unparked

    def test_large_messages_count_for_more(self) -> None:
        client_end = self.fixture.park("a")
        client_end.send(text_frame(b"x" * 60000) + text_frame(b"{}") * 9)
        self.fixture.step()
        self.fixture.step()
        # Four, six, and the excess message.
        self.assertEqual(len(self.owner.messages), 1 + 6 + 1)
        self.assertEqual(len(self.owner.paused), 1)

    def test_batch_counts_each_message(self) -> None:
        for handled in (10, -10):
            self.use_fixture(per_second=10)
            client_end = self.fixture.park("a")
            self.owner.on_message = lambda client_id, payload, handled=handled: handled
            client_end.send(text_frame(b"[]"))
            self.fixture.step()
            self.assertEqual(self.owner.paused, [])
            self.owner.on_message = lambda client_id, payload: None
            client_end.send(text_frame(b"{}") * 2)
            self.fixture.step()
            self.assertEqual((len(self.owner.messages), self.owner.paused), (2, [("a", 7)]))

    def test_responses_to_calls_in_flight_are_not_charged(self) -> None:
        client_end = self.fixture.park("a")
        for _ in range(30):
            client_end.send(text_frame(b"answer") + text_frame(b"answer" + b"x" * 30000))
            self.fixture.step()
        self.assertEqual((len(self.owner.messages), self.owner.paused), (60, []))
        client_end.send(text_frame(b"{}") * 9)
        self.fixture.step()
        self.assertEqual(self.owner.paused, [])

    def test_batch_that_wakes_is_charged(self) -> None:
        client_end = self.fixture.park("a")
        self.owner.on_message = lambda client_id, payload: (self.parked.wake("a"), 5)[1]
        client_end.send(text_frame(b"[]"))
        self.fixture.step()
        self.assertAlmostEqual(self.assert_woken().session.tat, self.fixture.now + 0.5)

    def test_woken_by_the_excess_message(self) -> None:
        """After that message is handled, which may close or wake the session."""
        client_end = self.fixture.park("a", tat=self.fixture.now + 1)
        self.owner.on_message = lambda client_id, payload: self.owner.paused.append("handled")
        client_end.send(text_frame(b"{}"))
        self.fixture.step()
        self.assertEqual(self.owner.paused, ["handled", ("a", 7)])
        self.assertAlmostEqual(self.assert_woken().session.tat, self.fixture.now + 1.1)

    def test_messages_before_parking_count(self) -> None:
        client_end = self.fixture.park("a", tat=self.fixture.now + 0.9)
        client_end.send(text_frame(b"{}") * 2)
        self.fixture.step()
        self.assertEqual(self.owner.paused, [("a", 7)])

    def test_no_limit(self) -> None:
        self.use_fixture()
        client_end = self.fixture.park("a")
        client_end.send(text_frame(b"{}") * 1000)
        self.fixture.step()
        self.assertEqual((len(self.owner.messages), self.owner.paused), (1000, []))

    def test_ping_whose_pong_wakes_it(self) -> None:
        """It is paused nevertheless, and the following bytes are not lost."""
        self.use_fixture(per_second=MAX_CORKED_MESSAGES)
        client_end = self.fixture.park("a")
        fill_send_buffer(self.fixture.fd())
        client_end.send(build_frame(9, b"") * (MAX_CORKED_MESSAGES + 1) + text_frame(b"after"))
        self.fixture.step()
        self.assertEqual(self.owner.paused, [("a", 7)])
        self.assert_woken(text_frame(b"after"), b"\x8a\x00" * (MAX_CORKED_MESSAGES + 1))


class CorkTest(ParkedSessionsTestCase):
    """Limits per reactor iteration"""

    def test_other_sockets_get_their_turn(self) -> None:
        for name in "abcd":
            self.fixture.park(name).send(text_frame(b"1"))
        self.owner.on_message = lambda client_id, payload: self.fixture.reactor.advance(MAX_ITERATION_TIME * 0.6)
        self.parked.doRead()
        self.assertEqual(len(self.owner.messages), 2)
        self.parked.doRead()
        self.assertEqual(sorted(client_id for client_id, _, _ in self.owner.messages), ["a", "b", "c", "d"])

    def test_unparked_before_its_event_is_handled(self) -> None:
        client_ends = {name: self.fixture.park(name) for name in "abc"}
        for client_end in client_ends.values():
            client_end.send(text_frame(b"1"))
        self.owner.on_message = lambda client_id, payload: self.fixture.reactor.advance(MAX_ITERATION_TIME)
        self.parked.doRead()
        (first,) = (client_id for client_id, _, _ in self.owner.messages)
        for name in set("abc") - {first}:
            self.parked.wake(name)
        self.parked.doRead()
        self.assertEqual(len(self.owner.messages), 1)
