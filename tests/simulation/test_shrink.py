"""Tests for :mod:`tests.simulation.shrink`."""

from __future__ import annotations

from collections import Counter

import attrs
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.simulation.command import read_plan, repeat_command
from tests.simulation.faults import KINDS, Fault
from tests.simulation.fleet import Options, Result
from tests.simulation.ledger import Violation
from tests.simulation.shrink import Shrinker, reduce


def fault(number: int) -> Fault:
    return Fault(10.0 + number, "kill", number, 1.0, 0.5)


class ReduceTests(SynchronousTestCase):
    @given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.sets(st.integers(0, size - 1)))))
    def test_only_what_is_needed_is_left(self, case: tuple[int, set[int]]) -> None:
        size, needed = case
        self.assertEqual(reduce(range(size), lambda items: needed <= set(items)), sorted(needed))


class ShrinkerTests(SynchronousTestCase):
    def run_faults(self, options: Options) -> Result:
        """Fail if two of the faults are there, and at least five clients."""
        plan = list(options.plan or ())
        fails = {3, 17} <= {each.target for each in plan} and options.clients >= 5
        violations = [Violation("e", "x")] if fails else [Violation("f", "another story")]
        return Result(options, "", violations, plan, Counter(), None, 0, 40.0)

    def test_shrink(self) -> None:
        options = Options(1, clients=80, nodes=5, rate=100.0, minutes=10.0, plan=tuple(map(fault, range(40))))
        shrunk = Shrinker(self.run_faults(options), run=self.run_faults).shrink()
        self.assertEqual([each.target for each in shrunk.plan or ()], [3, 17])
        self.assertEqual((shrunk.clients, shrunk.nodes, shrunk.rate), (5, 2, 5.0))
        self.assertLess(shrunk.minutes, 1.0)
        self.assertIn("--clients 5", repeat_command(shrunk, "x.json"))

    def test_plan_of_a_file(self) -> None:
        path = self.mktemp()
        with open(path, "w") as file:
            file.write('[{"time": 1.0, "kind": "drain", "target": 5, "duration": 0.5, "strength": 0.1}]')
        self.assertEqual(read_plan(path), (Fault(1.0, "drain", 5, 0.5, 0.1),))
        self.assertIn("drain", KINDS)
        self.assertEqual(attrs.asdict(read_plan(path)[0])["duration"], 0.5)
