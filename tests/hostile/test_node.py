"""Tests of the report on a node: each kind of problem is reported."""

from __future__ import annotations

from typing import Any

import attrs
from twisted.trial.unittest import SynchronousTestCase

from tests.hostile.attack import Attack, Seen
from tests.hostile.node import MIB, Report
from tests.hostile.report import QUANTILES, AttackResult, fragment, line

FINE = Report(
    latencies=[0.001] * 100,
    failed=[],
    memory=MIB,
    files=40,
    files_left=0,
    log="a line\n",
    healthy=True,
    cpu=0.1,
    held_up=0.0,
)
ATTACK = Attack("a", "something", "something else", lambda target, size: Seen(), frozenset(["101"]))


class ReportTests(SynchronousTestCase):
    """The verdict on a node."""

    def problems(self, **changed: Any) -> list[str]:
        return attrs.evolve(FINE, **changed).problems(memory=2)

    def test_healthy_node_has_no_problems(self) -> None:
        self.assertEqual(self.problems(), [])

    def test_each_problem_is_found(self) -> None:
        for changed, expected in (
            ({"failed": ["wrong"]}, "1 calls failed, such as wrong"),
            ({"latencies": []}, "no call was answered"),
            ({"memory": 2 * MIB + 1}, "memory grew by 2 MiB; 2 may be"),
            ({"files_left": 1}, "1 files are left open"),
            ({"log": "Traceback (most recent call last):\n"}, "a traceback in the log"),
            ({"log": "a line\n" * 7}, "7 lines in the log"),
            ({"log": "a \x1b[2Jline\n"}, "control characters in the log"),
            ({"log": "a \rline\n"}, "control characters in the log"),
            ({"log": "a \x85line\n"}, "control characters in the log"),
            ({"healthy": False}, "/healthz does not answer 200"),
        ):
            problems = self.problems(**changed)
            self.assertEqual(len(problems), 1, changed)
            self.assertIn(expected, problems[0])

    def test_log_with_text_that_is_not_ascii(self) -> None:
        self.assertEqual(self.problems(log="…\n"), [])


class RowTests(SynchronousTestCase):
    """The table."""

    def row(self, latency: float) -> AttackResult:
        attacked = attrs.evolve(FINE, latencies=[latency] * 100)
        return AttackResult(ATTACK, dict.fromkeys(QUANTILES, 0.001), attacked, 3 * MIB, 7, Seen({"101": 5}), [])

    def test_latency_more_than_doubled_is_slow(self) -> None:
        self.assertFalse(self.row(0.0019).slow)
        self.assertTrue(self.row(0.0021).slow)

    def test_line(self) -> None:
        text = line(self.row(0.0015))
        for part in ("p50  1.50 (1.50 ms)", "p99  1.50", "memory +3.0 MiB", "files +7", "5 101: right"):
            self.assertIn(part, text)

    def test_fragment(self) -> None:
        lines = fragment([self.row(0.0015)]).splitlines()
        self.assertEqual(lines[0], ".. list-table::")
        self.assertEqual(
            lines[-6:],
            ["   * - something", "     - something else", "     - 1.5", "     - 1.5", "     - 3 of 16 MiB", "     - 7"],
        )
