from __future__ import annotations

from collections import Counter

from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.cloud.errors import MAX_LOGGED_KINDS, AwsError, FailureLog


class FailureLogTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.failures: Counter[str] = Counter()
        self.failure_log = FailureLog("it does not work", "DoIt", self.failures)

    def test_each_kind_is_logged_once_until_success(self) -> None:
        with capturedLogs() as logs:
            for kind in "aabab":
                self.failure_log.record_failure(AwsError(f"of kind {kind}", kind=kind))
            self.failure_log.record_success()
            self.failure_log.record_success()
            self.failure_log.record_failure(AwsError("again", kind="a"))
        self.assertEqual([event.get("problem") for event in logs], ["of kind a", "of kind b", None, "again"])
        self.assertEqual([event["log_level"] for event in logs][2], LogLevel.info)
        self.assertEqual(self.failures, {"DoIt": 6})

    def test_logged_kinds_are_limited(self) -> None:
        with capturedLogs() as logs:
            for kind in range(10 * MAX_LOGGED_KINDS):
                self.failure_log.record_failure(AwsError("x", kind=str(kind)))
        self.assertEqual(len(logs), MAX_LOGGED_KINDS)
        self.assertEqual(self.failures["DoIt"], 10 * MAX_LOGGED_KINDS)
