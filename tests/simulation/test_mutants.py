"""The simulation finds every mutant (tests/simulation/mutants), in runs that are clean without it."""

from __future__ import annotations

import attrs
from twisted.trial.unittest import SynchronousTestCase

from tests.simulation.fleet import Options, run
from tests.simulation.mutants.catalogue import MUTANTS

#: what is checked in every run
LETTERS = "abcdefghi"


class MutantTests(SynchronousTestCase):
    #: options of runs that were clean without a mutant
    clean_runs: set[Options] = set()

    def check(self, name: str) -> None:
        (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
        seeds, result = mutant.find()
        self.flushLoggedErrors()
        found = [violation for violation in result.violations if violation.letter == mutant.letter]
        self.assertTrue(found, f"{name} is not found within {mutant.max_seeds} seeds: {mutant.description}")
        options = attrs.evolve(mutant.options, seed=mutant.options.seed + seeds - 1, stop_at_violation=True)
        if options not in self.clean_runs:
            self.assertEqual(run(options).violations, [])
            self.clean_runs.add(options)

    def test_each_check_has_a_mutant(self) -> None:
        self.assertEqual({mutant.letter for mutant in MUTANTS}, set(LETTERS))

    def test_names_are_unique(self) -> None:
        self.assertEqual(len({mutant.name for mutant in MUTANTS}), len(MUTANTS))


def _add_tests() -> None:
    for mutant in MUTANTS:

        def test(self: MutantTests, name: str = mutant.name) -> None:
            self.check(name)

        setattr(MutantTests, f"test_{mutant.name.replace('-', '_')}", test)


_add_tests()
