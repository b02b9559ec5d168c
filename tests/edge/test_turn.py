"""Tests of gateway.util.cork: what is written at the end of a turn."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.util.cork import Turn


class TurnTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.turn = Turn(self.clock.seconds)
        self.seen: list[str] = []

    def note(self, what: str) -> None:
        self.assertTrue(self.turn.on)
        self.seen.append(what)

    def test_order(self) -> None:
        self.assertFalse(self.turn.on)
        self.assertTrue(self.turn.begin())
        self.assertTrue(self.turn.on)
        for what in ("one", "two", "three"):
            self.turn.at_end(lambda what=what: self.note(what))
        self.assertEqual(self.seen, [])
        self.turn.end()
        self.assertEqual(self.seen, ["one", "two", "three"])
        self.assertFalse(self.turn.on)

    def test_within_another(self) -> None:
        """Who did not begin it does not end it."""
        self.assertTrue(self.turn.begin())
        self.assertFalse(self.turn.begin())
        self.assertTrue(self.turn.on)

    def test_nothing_twice(self) -> None:
        self.turn.begin()
        self.turn.at_end(lambda: self.note("one"))
        self.turn.end()
        self.assertTrue(self.turn.begin())
        self.turn.end()
        self.assertEqual(self.seen, ["one"])

    def test_what_the_end_sets_off(self) -> None:
        """It is still this turn's."""

        def more() -> None:
            self.note("one")
            if len(self.seen) < 5:
                self.turn.at_end(more)

        self.turn.begin()
        self.turn.at_end(more)
        self.turn.at_end(lambda: self.note("two"))
        self.turn.end()
        self.assertEqual(self.seen, ["one", "two", "one", "one", "one"])

    def test_error(self) -> None:
        """The others do not suffer, and the log does not overflow."""
        self.turn.begin()
        for number in range(3):
            self.turn.at_end(lambda: 1 / 0)
            self.turn.at_end(lambda number=number: self.note(str(number)))
        self.turn.end()
        self.assertEqual(self.seen, ["0", "1", "2"])
        self.assertFalse(self.turn.on)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertTrue(self.turn.begin())

    def test_no_further_memory(self) -> None:
        self.assertFalse(hasattr(self.turn, "__dict__"))
