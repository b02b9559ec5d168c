"""Tests of gateway.util.log."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.util.log import LogLimiter, RateLimitedLogger, one_line


class LogLimiterTests(SynchronousTestCase):
    def test_one_line_per_interval(self) -> None:
        clock = Clock()
        limiter = LogLimiter(clock.seconds, 10.0)
        self.assertEqual([limiter.allow() for _ in range(4)], [0, None, None, None])
        clock.advance(9.9)
        self.assertIsNone(limiter.allow())
        clock.advance(0.1)
        self.assertEqual([limiter.allow(), limiter.allow()], [4, None])

    def test_a_clock_that_is_set_back(self) -> None:
        times = iter([1000.0, 500.0, 501.0])
        limiter = LogLimiter(lambda: next(times), 60.0)
        self.assertEqual([limiter.allow() for _ in range(3)], [0, 0, None])


class RateLimitedLoggerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.logger = RateLimitedLogger(self.clock.seconds, interval=10.0)

    def log(self, message: str) -> None:
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            self.logger.failure(message)

    def logged(self) -> int:
        return len(self.flushLoggedErrors(ZeroDivisionError))

    def test_each_message_has_its_own_limit(self) -> None:
        for message in ("one", "one", "one", "two", "two"):
            self.log(message)
        self.assertEqual(self.logged(), 2)

    def test_again_after_the_interval(self) -> None:
        self.log("one")
        self.clock.advance(10)
        self.log("one")
        self.assertEqual(self.logged(), 2)


class OneLineTests(SynchronousTestCase):
    def test_white_space_is_folded(self) -> None:
        self.assertEqual(one_line("a\r\n b\t\tc "), "a b c")

    def test_escaped_and_cut(self) -> None:
        self.assertEqual(one_line("caf\xe9 'x'\x1b[0m"), "caf\\xe9 'x'\\x1b[0m")
        self.assertEqual(len(one_line("x" * 1000)), 301)

    @given(st.text())
    def test_any_text_is_one_printable_line(self, text: str) -> None:
        shown = one_line(text)
        self.assertTrue(shown.removesuffix("…").isascii())
        self.assertTrue(shown.isprintable())
        self.assertLessEqual(len(shown), 301)
