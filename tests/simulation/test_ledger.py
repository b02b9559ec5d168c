"""Tests for :mod:`tests.simulation.ledger`: each check reports a wrong history, and none a right one."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.simulation.ledger import Ledger, Message, Stream
from tests.simulation.scheduler import Scheduler


class LedgerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.scheduler = Scheduler(1)
        self.disturbed = 0.0
        self.ledger = Ledger(self.scheduler, lambda way, since: self.disturbed if self.disturbed > since else 0.0)
        self.stream = Stream("backend-1 to x")

    def start(self, **options: Any) -> Message:
        return self.ledger.start(
            "x", self.stream, is_call=True, timeout=1.0, way=None, **{"expects_outcome": True, **options}
        )

    def deliver(self, message: Message, connection: int = 1) -> None:
        self.ledger.delivered(message.number, "x", "x", connection)

    def sweep_at(self, seconds: float) -> None:
        self.scheduler.run(seconds)
        self.ledger.sweep()

    def letters(self) -> str:
        return "".join(violation.letter for violation in self.ledger.violations)

    def test_right_history(self) -> None:
        first, second, third = self.start(), self.start(), self.start(expects_outcome=False)
        for message in (first, second, third):
            self.deliver(message)
        self.ledger.result(second.number, second.number, 1)
        self.ledger.failed(first.number, -32002, True)
        fourth = self.start()
        self.ledger.failed(fourth.number, -32001, False)
        self.sweep_at(100.0)
        self.assertEqual((self.letters(), self.ledger.outstanding()), ("", 0))

    def test_no_outcome(self) -> None:
        self.start()
        self.sweep_at(1.5)
        self.assertEqual(self.letters(), "")
        self.sweep_at(2.0)
        self.assertEqual(self.letters(), "a")

    def test_no_outcome_after_a_disturbance(self) -> None:
        self.start()
        self.disturbed = 0.9
        self.sweep_at(2.0)
        self.assertEqual(self.letters(), "")
        self.sweep_at(3.0)
        self.assertEqual(self.letters(), "a")

    def test_two_outcomes(self) -> None:
        message = self.start()
        self.ledger.failed(message.number, -32001, False)
        self.ledger.failed(message.number, -32001, False)
        self.assertEqual(self.letters(), "a")

    def test_abandoned(self) -> None:
        self.ledger.abandon(self.start().number)
        self.sweep_at(100.0)
        self.assertEqual(self.letters(), "")

    def test_result_of_another_connection(self) -> None:
        message = self.start()
        self.deliver(message, 1)
        self.ledger.result(message.number, message.number, 2)
        self.assertEqual(self.letters(), "b")

    def test_result_of_another_call(self) -> None:
        first, second = self.start(), self.start()
        self.deliver(first)
        self.deliver(second)
        self.ledger.result(first.number, second.number, 1)
        self.assertEqual(self.letters(), "b")

    def test_not_sent_and_delivered(self) -> None:
        for deliver_first in (True, False):
            message = self.start()
            if deliver_first:
                self.deliver(message)
            self.ledger.failed(message.number, -32004, False)
            if not deliver_first:
                self.deliver(message)
        self.assertEqual(self.letters(), "cc")

    def test_delivered_twice(self) -> None:
        message = self.start()
        self.deliver(message)
        self.deliver(message)
        self.assertEqual(self.letters(), "d")

    def test_delivered_to_another_client(self) -> None:
        self.ledger.delivered(self.start().number, "y", "y", 1)
        self.assertEqual(self.letters(), "d")

    def test_out_of_order(self) -> None:
        first, second = self.start(), self.start()
        self.deliver(second)
        self.deliver(first)
        self.assertEqual(self.letters(), "e")
