"""Tests of tests.hostile.attack: failures must be detected."""

from __future__ import annotations

from collections import Counter

from twisted.trial.unittest import SynchronousTestCase

from tests.hostile import attacks
from tests.hostile.attack import ATTACKS, Attack, Seen, Size, Target, cases

TARGET = Target(1, 2)


class AttackTests(SynchronousTestCase):
    """The evaluation of outcomes."""

    def attack(self, *expected: str, perhaps: str = "x") -> Attack:
        return Attack("a", "", "", lambda target, size: Seen(), frozenset(expected), tolerated=frozenset([perhaps]))

    def test_expected_outcome_is_accepted(self) -> None:
        self.assertEqual(self.attack("400", "101").unexpected(Counter({"400": 3, "101": 1, "x": 2})), [])

    def test_unexpected_outcome_is_reported(self) -> None:
        self.assertEqual(self.attack("400").unexpected(Counter({"400": 3, "101": 1})), ["101 (1 times)"])

    def test_missing_outcome_is_reported(self) -> None:
        self.assertEqual(self.attack("400", "101").unexpected(Counter({"400": 3})), ["never 101"])

    def test_failed_case_is_named(self) -> None:
        made = cases("of-this-test", "", "", {"good": (b"a", "A"), "bad": (b"b", "C")}, lambda target, data: "A")
        del ATTACKS["of-this-test"]
        self.assertEqual(made.run(TARGET, Size()), {"A": 1, "bad: A instead of C": 1})
        self.assertEqual(len(made.unexpected(made.run(TARGET, Size()))), 2)

    def test_size_zero_has_one_round(self) -> None:
        self.assertEqual(list(Size().rounds()), [0])
        self.assertGreater(len(list(Size(seconds=0.01).rounds())), 1)

    def test_every_attack_is_described_and_listed_once(self) -> None:
        attacks.load()
        self.assertGreater(len(ATTACKS), 60)
        for name, one in ATTACKS.items():
            self.assertEqual(name, one.name)
            self.assertTrue(one.what and one.does and one.expected | one.tolerated, name)
            self.assertNotIn(" " * 2, one.what)
        self.assertEqual(len({one.what for one in ATTACKS.values()}), len(ATTACKS))
