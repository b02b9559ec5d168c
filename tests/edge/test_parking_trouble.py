"""Tests of gateway.clients.parked: errors, rows that go in the midst of their own bytes, and who sends too much."""

from __future__ import annotations

from gateway.clients.parked import LONGEST_TURN, MOST_GATHERED
from gateway.protocol.frames import CLOSE_INTERNAL_ERROR, CLOSE_POLICY
from tests.edge.fakes import frame, text
from tests.edge.parked import LotTest, frames, record_pair, stuff, take

PARTIAL = text(b"split")[:-2]


class TroubleTest(LotTest):
    """What goes wrong with one stays there"""

    def test_bad_messages(self) -> None:
        there = self.lot.park("a", generation=9)
        there.send(text(b"bad") * 7 + text(b"{}") + text(b"bad") * 7)
        self.lot.step()
        self.assertEqual(self.keeper.ends, [])
        there.send(text(b"bad") + text(b"after"))
        self.lot.step()
        self.assertEqual(self.keeper.ends, [("a", 9, CLOSE_POLICY, "8 messages in a row were no JSON-RPC 2.0")])
        self.assert_woken(text(b"after"))

    def test_bad_messages_before_and_after(self) -> None:
        """They are counted wherever they come."""
        there = self.lot.park("a", bad=6)
        there.send(text(b"bad"))
        self.lot.step()
        self.parking.wake("a")
        leaver = self.keeper.leavers.pop()
        self.assertEqual(leaver.client.bad, 7)
        self.parking.park(leaver.client, leaver.fd, leaver.family, leaver.heard_at)
        there.send(text(b"bad"))
        self.lot.step()
        self.assertEqual(len(self.keeper.ends), 1)

    def test_bad_message_that_wakes(self) -> None:
        """Its connection leaves while it is handled, and takes the count with it."""
        there = self.lot.park("a", bad=6)
        self.keeper.on_message = lambda client_id, payload: self.parking.wake("a")
        there.send(text(b"bad"))
        self.lot.step()
        self.assertEqual(self.assert_woken().client.bad, 7)
        self.assertEqual(self.keeper.ends, [])

    def test_last_bad_message_that_wakes(self) -> None:
        there = self.lot.park("a", bad=7)
        self.keeper.on_message = lambda client_id, payload: self.parking.wake("a")
        there.send(text(b"bad"))
        self.lot.step()
        self.assertEqual([end[0] for end in self.keeper.ends], ["a"])

    def test_good_message_that_wakes(self) -> None:
        there = self.lot.park("a", bad=7)
        self.keeper.on_message = lambda client_id, payload: self.parking.wake("a")
        there.send(text(b"{}"))
        self.lot.step()
        self.assertEqual(self.assert_woken().client.bad, 0)

    def test_something_bad_in_a_batch(self) -> None:
        there = self.lot.park("a")
        self.keeper.on_message = lambda client_id, payload: -3
        there.send(text(b"[]") * 7)
        self.lot.step()
        self.assertEqual(self.keeper.ends, [])
        there.send(text(b"[]"))
        self.lot.step()
        self.assertEqual(len(self.keeper.ends), 1)

    def test_handler_that_fails(self) -> None:
        there, other = self.lot.park("a", generation=9), self.lot.park("b")
        there.send(text(b"boom") + text(b"after"))
        other.send(text(b"other"))
        self.lot.step()
        self.assertEqual(self.keeper.ends, [("a", 9, CLOSE_INTERNAL_ERROR, "internal error")])
        self.assert_woken(text(b"after"))
        self.assertIn(b"other", self.keeper.payloads)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_error_that_escapes(self) -> None:
        """It would make the reactor drop the table, and everybody in it."""
        peers = [self.lot.park(client_id) for client_id in "abc"]
        for there in peers:
            there.send(PARTIAL)
        self.patch(self.keeper, "wake", lambda leaver: (self.keeper.leavers.append(leaver), 1 / 0))
        self.assertIsNone(self.parking.doRead())
        self.assertEqual(len(self.keeper.leavers), 3)
        self.assertIn(self.parking, self.lot.reactor.readers)
        self.assertFalse(self.lot.turn.on)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        there = self.lot.park("d")
        there.send(text(b"one"))
        self.lot.step()
        self.assertEqual(self.keeper.payloads, [b"one"])

    def test_within_a_turn_of_somebody_else(self) -> None:
        """It ends no turn that it did not begin."""
        there = self.lot.park("a")
        there.send(frame(9, b"p"))
        self.lot.turn.begin()
        self.parking.doRead()
        self.assertEqual(take(there), b"")
        self.lot.turn.end()
        self.assertEqual(frames(there), [(10, b"p")])


class InTheMidstTest(LotTest):
    """A row that goes in the midst of its own bytes"""

    def test_woken(self) -> None:
        there = self.lot.park("a")
        rest = text(b"two") + PARTIAL
        self.keeper.on_message = lambda client_id, payload: self.parking.wake("a")
        there.send(text(b"one") + rest)
        self.lot.step()
        self.assertEqual(self.keeper.payloads, [b"one"])
        self.assert_woken(rest)

    def test_woken_by_the_last_of_them(self) -> None:
        there = self.lot.park("a")
        self.keeper.on_message = lambda client_id, payload: payload == b"two" and self.parking.wake("a")
        there.send(text(b"one") + text(b"two"))
        self.lot.step()
        self.assertEqual(self.keeper.payloads, [b"one", b"two"])
        self.assert_woken()

    def test_woken_with_what_it_was_to_be_sent(self) -> None:
        there = self.lot.park("a", record_pair())

        def answer(client_id: str, payload: bytes) -> None:
            self.parking.send("a", payload)
            if payload == b"two":
                self.parking.wake("a")

        self.keeper.on_message = answer
        there.send(frame(9, b"p") + text(b"one") + text(b"two") + text(b"three"))
        self.lot.step()
        self.assert_woken(text(b"three"), unsent=b"\x8a\x01p\x81\x03one\x81\x03two")
        self.assertEqual(take(there), b"")

    def test_lost(self) -> None:
        """The write that shows it comes from the handler of its own message."""
        there = self.lot.park("a")
        there.send(text(b"one") + text(b"two"))
        there.close()
        results: list[int] = []
        self.keeper.on_message = lambda client_id, payload: results.append(self.parking.send("a", b"x" * 100000))
        self.lot.step()
        self.assertEqual((self.keeper.payloads, results), ([b"one"], [0]))
        self.assertEqual([client.client_id for client in self.keeper.gone], ["a"])
        self.assertEqual(self.keeper.leavers, [])

    def test_lost_while_it_is_woken(self) -> None:
        there = self.lot.park("a")
        self.keeper.unable = True
        self.keeper.on_message = lambda client_id, payload: self.parking.wake("a")
        there.send(text(b"one") + text(b"two"))
        self.lot.step()
        self.assertEqual(self.keeper.payloads, [b"one"])

    def test_fails_after_it_was_woken(self) -> None:
        there = self.lot.park("a")
        self.keeper.on_message = lambda client_id, payload: (self.parking.wake("a"), 1 / 0)
        there.send(text(b"one") + text(b"two"))
        self.lot.step()
        self.assertEqual([end[:3] for end in self.keeper.ends], [("a", 7, CLOSE_INTERNAL_ERROR)])
        self.assert_woken(text(b"two"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_the_next_one_is_no_part_of_it(self) -> None:
        """What was remembered of the one that left is forgotten."""
        for client_id in "ab":
            self.lot.park(client_id).send(text(b"one") + text(b"two"))
        self.keeper.on_message = lambda client_id, payload: client_id == "a" and self.parking.wake("a")
        self.lot.step()
        self.assertEqual(sorted(self.keeper.messages), [("a", 7, b"one"), ("b", 7, b"one"), ("b", 7, b"two")])
        self.assertIn("b", self.parking.fds)


class RateTest(LotTest):
    """Messages per second and client"""

    def setUp(self) -> None:
        self.use(per_second=10)

    def test_over_the_rate(self) -> None:
        there = self.lot.park("a", generation=9)
        sent = [text(b"%d" % number) for number in range(15)]
        there.send(b"".join(sent) + PARTIAL)
        self.lot.step()
        # The one that is too many is handled, and the rest kept.
        self.assertEqual(self.keeper.payloads, [b"%d" % number for number in range(11)])
        self.assertEqual(self.keeper.pauses, [("a", 9)])
        leaver = self.assert_woken(b"".join(sent[11:]) + PARTIAL)
        self.assertAlmostEqual(leaver.client.full_at, self.lot.now + 1.1)

    def test_within_the_rate(self) -> None:
        there = self.lot.park("a")
        for _ in range(30):
            there.send(text(b"{}"))
            self.lot.step()
            self.lot.reactor.advance(0.1)
        self.assertEqual((len(self.keeper.messages), self.keeper.pauses), (30, []))

    def test_pings_and_pongs_count(self) -> None:
        for data in (frame(9, b""), frame(10, b"")):
            self.use(per_second=10)
            there = self.lot.park("a")
            there.send(data * 12)
            self.lot.step()
            self.assertEqual(self.keeper.pauses, [("a", 7)])
            leaver = self.assert_woken(data, unsent=b"\x8a\x00" * 11 if data[0] == 0x89 else b"")
            self.assertEqual(take(there), b"")
            del leaver

    def test_large_messages_count_for_more(self) -> None:
        there = self.lot.park("a")
        there.send(text(b"x" * 60000) + text(b"{}") * 9)
        self.lot.step()
        self.lot.step()
        # Four, six, and the one that is too many.
        self.assertEqual(len(self.keeper.messages), 1 + 6 + 1)
        self.assertEqual(len(self.keeper.pauses), 1)

    def test_a_batch_counts_for_what_is_in_it(self) -> None:
        for handled in (10, -10):
            self.use(per_second=10)
            there = self.lot.park("a")
            self.keeper.on_message = lambda client_id, payload, handled=handled: handled
            there.send(text(b"[]"))
            self.lot.step()
            self.assertEqual(self.keeper.pauses, [])
            self.keeper.on_message = lambda client_id, payload: None
            there.send(text(b"{}") * 2)
            self.lot.step()
            self.assertEqual((len(self.keeper.messages), self.keeper.pauses), (2, [("a", 7)]))

    def test_a_batch_that_wakes_is_charged_too(self) -> None:
        there = self.lot.park("a")
        self.keeper.on_message = lambda client_id, payload: (self.parking.wake("a"), 5)[1]
        there.send(text(b"[]"))
        self.lot.step()
        self.assertAlmostEqual(self.assert_woken().client.full_at, self.lot.now + 0.5)

    def test_woken_by_the_one_that_is_too_many(self) -> None:
        """Before that one is handled, which may do anything to the connection."""
        there = self.lot.park("a", full_at=self.lot.now + 1)
        self.keeper.on_message = lambda client_id, payload: self.keeper.pauses.append("handled")
        there.send(text(b"{}"))
        self.lot.step()
        self.assertEqual(self.keeper.pauses, [("a", 7), "handled"])
        self.assertAlmostEqual(self.assert_woken().client.full_at, self.lot.now + 1.1)

    def test_what_was_sent_before_it_was_parked(self) -> None:
        there = self.lot.park("a", full_at=self.lot.now + 0.9)
        there.send(text(b"{}") * 2)
        self.lot.step()
        self.assertEqual(self.keeper.pauses, [("a", 7)])

    def test_no_limit(self) -> None:
        self.use()
        there = self.lot.park("a")
        there.send(text(b"{}") * 1000)
        self.lot.step()
        self.assertEqual((len(self.keeper.messages), self.keeper.pauses), (1000, []))

    def test_ping_whose_answer_wakes_it(self) -> None:
        """It is paused all the same, and what follows is not lost."""
        self.use(per_second=MOST_GATHERED)
        there = self.lot.park("a")
        stuff(self.lot.fd())
        there.send(frame(9, b"") * (MOST_GATHERED + 1) + text(b"after"))
        self.lot.step()
        self.assertEqual(self.keeper.pauses, [("a", 7)])
        self.assert_woken(text(b"after"), b"\x8a\x00" * (MOST_GATHERED + 1))


class TurnTest(LotTest):
    """A turn of the reactor is not for those alone who send"""

    def test_others_get_their_turn(self) -> None:
        for name in "abcd":
            self.lot.park(name).send(text(b"1"))
        self.keeper.on_message = lambda client_id, payload: self.lot.reactor.advance(LONGEST_TURN * 0.6)
        self.parking.doRead()
        self.assertEqual(len(self.keeper.messages), 2)
        self.parking.doRead()
        self.assertEqual(sorted(client_id for client_id, _, _ in self.keeper.messages), ["a", "b", "c", "d"])

    def test_who_left_before_it_is_his_turn(self) -> None:
        theirs = {name: self.lot.park(name) for name in "abc"}
        for there in theirs.values():
            there.send(text(b"1"))
        self.keeper.on_message = lambda client_id, payload: self.lot.reactor.advance(LONGEST_TURN)
        self.parking.doRead()
        (first,) = (client_id for client_id, _, _ in self.keeper.messages)
        for name in set("abc") - {first}:
            self.parking.wake(name)
        self.parking.doRead()
        self.assertEqual(len(self.keeper.messages), 1)
