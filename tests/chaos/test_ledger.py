"""The accounts of a run: nothing is lost or doubled without being counted."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.chaos.ledger import CallLedger


class LedgerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.ledger = CallLedger()

    def make(self, now: float = 0.0, client: str = "a") -> int:
        return self.ledger.made(client, "node", now)

    def assert_wrong(self, *texts: str) -> None:
        wrong = self.ledger.totals(0.0).wrong
        self.assertEqual(len(wrong), len(texts), wrong)
        for text, problem in zip(texts, wrong, strict=True):
            self.assertIn(text, problem)

    def test_every_outcome_is_counted_once(self) -> None:
        answered, failed, again, cut, _ = (self.make() for _ in range(5))
        self.ledger.received(answered, "a")
        self.ledger.answered(answered, "a", 1.0)
        self.ledger.failed(failed, -32001, sent=False)
        self.ledger.failed(again, -32002, sent=True)
        self.ledger.cut_off(cut)
        self.assertEqual(self.ledger.in_flight, 1)
        self.ledger.expire(0.1)
        self.assertEqual(self.ledger.in_flight, 0)
        totals = self.ledger.totals(2.0)
        self.assertEqual((totals.made, totals.answered, totals.lost, totals.wrong), (5, 1, 1, []))
        self.assertEqual(totals.failed, {"-32001": 1, "-32002": 1, "cut off": 1})
        self.assertEqual(totals.made, totals.answered + totals.failed.total() + totals.lost)

    def test_call_without_outcome_is_lost(self) -> None:
        self.make(5.0)
        self.ledger.expire(5.0)
        self.assertEqual(self.ledger.in_flight, 1)
        self.assertEqual(self.ledger.totals(9.0).lost, 1)

    def test_outcome_after_the_end_stays_lost(self) -> None:
        number = self.make()
        self.ledger.expire(1.0)
        self.ledger.received(number, "a")
        self.ledger.answered(number, "a", 9.0)
        totals = self.ledger.totals(9.0)
        self.assertEqual((totals.answered, totals.lost, totals.wrong), (0, 1, []))

    def test_answer_of_another_client(self) -> None:
        number = self.make()
        self.ledger.received(number, "a")
        self.ledger.answered(number, "b", 1.0)
        self.assert_wrong("was answered by b")

    def test_answer_to_call_that_was_not_received(self) -> None:
        self.ledger.answered(self.make(), "a", 1.0)
        self.assert_wrong("no client received it")

    def test_second_outcome(self) -> None:
        for first in (True, False):
            number = self.make()
            self.ledger.received(number, "a")
            if first:
                self.ledger.answered(number, "a", 1.0)
            else:
                self.ledger.failed(number, -32002, sent=True)
            self.ledger.answered(number, "a", 1.0)
        self.assert_wrong("call 1 had a second outcome", "call 2 had a second outcome")

    def test_call_received_twice(self) -> None:
        number = self.make()
        self.ledger.received(number, "a")
        self.ledger.received(number, "a")
        self.ledger.answered(number, "a", 1.0)
        self.assert_wrong("was received 2 times, by a, a")

    def test_call_received_by_another_client(self) -> None:
        number = self.make()
        self.ledger.received(number, "b")
        self.ledger.failed(number, -32002, sent=True)
        self.assert_wrong("was received by b")

    def test_received_call_that_was_not_made(self) -> None:
        self.ledger.received(7, "a")
        self.assert_wrong("call 7 was received, but never made")

    def test_broken_sent_promise(self) -> None:
        for sent in (True, False):
            number = self.make()
            self.ledger.received(number, "a")
            self.ledger.failed(number, -32004, sent=sent)
        self.assert_wrong("call 2 to a failed with -32004 and sent:false, but was received")

    def test_unreachable_duration(self) -> None:
        first = self.make(10.0)
        self.ledger.failed(first, -32001, sent=False)
        self.ledger.failed(self.make(11.0), -32001, sent=False)
        self.assertEqual(self.ledger.unreachable(), ["a"])
        self.ledger.answered(self.make(12.0), "a", 12.5)
        self.assertEqual(self.ledger.unreachable(), [])
        self.assertEqual(self.ledger.totals(99.0).longest, 2.5)

    def test_late_failure_of_earlier_call_is_not_new(self) -> None:
        early = self.make(10.0)
        self.ledger.answered(self.make(11.0), "a", 11.1)
        self.ledger.failed(early, -32002, sent=True)
        self.assertEqual(self.ledger.unreachable(), [])

    def test_interrupted_call_does_not_count_as_unreachable(self) -> None:
        self.ledger.cut_off(self.make(1.0))
        self.assertEqual(self.ledger.unreachable(), [])

    def test_client_still_unreachable_at_the_end(self) -> None:
        self.ledger.failed(self.make(1.0), -32001, sent=False)
        self.ledger.expire(0.0)
        self.make(2.0, "b")
        self.ledger.expire(3.0)
        self.assertEqual(self.ledger.unreachable(), ["a", "b"])
        self.assertEqual(self.ledger.totals(31.0).longest, 30.0)

    def test_calls_are_listed(self) -> None:
        self.make(1.0, "a")
        self.make(2.0, "b")
        self.assertEqual([call.client for call in self.ledger.calls(lambda call: call.made_at > 1)], ["b"])
