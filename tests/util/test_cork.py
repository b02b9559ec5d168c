"""Tests of gateway.util.cork: what is written at the end of a turn."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.util.cork import Cork


class CorkTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.turn = Cork(self.clock.seconds)
        self.seen: list[str] = []

    def note(self, what: str) -> None:
        self.assertTrue(self.turn.is_corked)
        self.seen.append(what)

    def test_order(self) -> None:
        self.assertFalse(self.turn.is_corked)
        self.assertTrue(self.turn.cork())
        self.assertTrue(self.turn.is_corked)
        for what in ("one", "two", "three"):
            self.turn.on_flush(lambda what=what: self.note(what))
        self.assertEqual(self.seen, [])
        self.turn.uncork()
        self.assertEqual(self.seen, ["one", "two", "three"])
        self.assertFalse(self.turn.is_corked)

    def test_within_another(self) -> None:
        """Who did not begin it does not end it."""
        self.assertTrue(self.turn.cork())
        self.assertFalse(self.turn.cork())
        self.assertTrue(self.turn.is_corked)

    def test_nothing_twice(self) -> None:
        self.turn.cork()
        self.turn.on_flush(lambda: self.note("one"))
        self.turn.uncork()
        self.assertTrue(self.turn.cork())
        self.turn.uncork()
        self.assertEqual(self.seen, ["one"])

    def test_what_the_end_sets_off(self) -> None:
        """It is still this turn's."""

        def more() -> None:
            self.note("one")
            if len(self.seen) < 5:
                self.turn.on_flush(more)

        self.turn.cork()
        self.turn.on_flush(more)
        self.turn.on_flush(lambda: self.note("two"))
        self.turn.uncork()
        self.assertEqual(self.seen, ["one", "two", "one", "one", "one"])

    def test_error(self) -> None:
        """The others do not suffer, and the log does not overflow."""
        self.turn.cork()
        for number in range(3):
            self.turn.on_flush(lambda: 1 / 0)
            self.turn.on_flush(lambda number=number: self.note(str(number)))
        self.turn.uncork()
        self.assertEqual(self.seen, ["0", "1", "2"])
        self.assertFalse(self.turn.is_corked)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertTrue(self.turn.cork())

    def test_no_further_memory(self) -> None:
        self.assertFalse(hasattr(self.turn, "__dict__"))
