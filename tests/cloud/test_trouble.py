from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.cloud.errors import MOST_KINDS, AwsError, Trouble
from gateway.util.log import one_line


class TroubleTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.failures: Counter[str] = Counter()
        self.trouble = Trouble("it does not work", "DoIt", self.failures)

    def test_each_kind_is_told_once_until_it_works(self) -> None:
        with capturedLogs() as logs:
            for kind in "aabab":
                self.trouble.failed(AwsError(f"of kind {kind}", kind=kind))
            self.trouble.worked()
            self.trouble.worked()
            self.trouble.failed(AwsError("again", kind="a"))
        self.assertEqual([event.get("problem") for event in logs], ["of kind a", "of kind b", None, "again"])
        self.assertEqual([event["log_level"] for event in logs][2], LogLevel.info)
        self.assertEqual(self.failures, {"DoIt": 6})

    def test_kinds_without_end(self) -> None:
        with capturedLogs() as logs:
            for kind in range(10 * MOST_KINDS):
                self.trouble.failed(AwsError("x", kind=str(kind)))
        self.assertEqual(len(logs), MOST_KINDS)
        self.assertEqual(self.failures["DoIt"], 10 * MOST_KINDS)

    @given(st.text())
    def test_what_stands_in_a_log_line(self, text: str) -> None:
        shown = one_line(text)
        self.assertTrue(len(shown) <= 301)
        self.assertTrue(shown.replace("…", "").isprintable())
        self.assertTrue(shown.replace("…", "").isascii())
