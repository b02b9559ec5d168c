"""Tests of gateway.util.cork."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.util.cork import Cork


class CorkTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.cork = Cork(self.clock.seconds)
        self.events: list[str] = []

    def record(self, event: str) -> None:
        self.assertTrue(self.cork.is_corked)
        self.events.append(event)

    def test_order(self) -> None:
        self.assertFalse(self.cork.is_corked)
        self.assertTrue(self.cork.cork())
        self.assertTrue(self.cork.is_corked)
        for event in ("one", "two", "three"):
            self.cork.on_flush(lambda event=event: self.record(event))
        self.assertEqual(self.events, [])
        self.cork.uncork()
        self.assertEqual(self.events, ["one", "two", "three"])
        self.assertFalse(self.cork.is_corked)

    def test_nested(self) -> None:
        """Only the outermost caller may uncork."""
        self.assertTrue(self.cork.cork())
        self.assertFalse(self.cork.cork())
        self.assertTrue(self.cork.is_corked)

    def test_callbacks_are_called_once(self) -> None:
        self.cork.cork()
        self.cork.on_flush(lambda: self.record("one"))
        self.cork.uncork()
        self.assertTrue(self.cork.cork())
        self.cork.uncork()
        self.assertEqual(self.events, ["one"])

    def test_callbacks_added_while_flushing(self) -> None:
        """They are called by the same uncork()."""

        def more() -> None:
            self.record("one")
            if len(self.events) < 5:
                self.cork.on_flush(more)

        self.cork.cork()
        self.cork.on_flush(more)
        self.cork.on_flush(lambda: self.record("two"))
        self.cork.uncork()
        self.assertEqual(self.events, ["one", "two", "one", "one", "one"])

    def test_error(self) -> None:
        """The other callbacks are called, and errors are logged at a limited rate."""
        self.cork.cork()
        for number in range(3):
            self.cork.on_flush(lambda: 1 / 0)
            self.cork.on_flush(lambda number=number: self.record(str(number)))
        self.cork.uncork()
        self.assertEqual(self.events, ["0", "1", "2"])
        self.assertFalse(self.cork.is_corked)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertTrue(self.cork.cork())

    def test_no_dict(self) -> None:
        self.assertFalse(hasattr(self.cork, "__dict__"))
