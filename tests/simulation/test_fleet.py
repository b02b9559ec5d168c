"""A fixed part of the simulation, and that a run can be repeated."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

from tests.simulation.fleet import Options, run

#: Small fleets of all sizes, calm and stormy. `make simulate` runs larger ones, and as many seeds as it can.
RUNS = (
    *(Options(seed, nodes=2, clients=10, minutes=0.5, rate=60.0) for seed in (1, 2)),
    *(Options(seed, nodes=3, clients=20, minutes=0.5, fault_interval=1.5) for seed in (3, 4, 5)),
    Options(6, nodes=3, clients=8, minutes=0.5, rate=200.0, is_calm=True, fault_interval=1.0),
    Options(7, nodes=5, clients=30, minutes=0.4),
)


class FleetTests(SynchronousTestCase):
    def check(self, options: Options) -> None:
        result = run(options)
        self.assertEqual([str(violation) for violation in result.violations], [])
        self.assertGreater(result.counts["calls"], 100)


def _add_tests() -> None:
    for options in RUNS:

        def test(self: FleetTests, options: Options = options) -> None:
            self.check(options)

        setattr(FleetTests, f"test_seed_{options.seed}", test)


_add_tests()


class RepetitionTests(SynchronousTestCase):
    """The same seed gives the same run."""

    def hash_of(self, seed: int) -> str:
        """Return the hash of the trace of a run in a process of its own."""
        command = [sys.executable, "-m", "tests.simulation", "--seed", str(seed), "--clients", "10", "--minutes", "0.2"]
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "0"}
        ).stdout
        match = re.search(r"trace ([0-9a-f]{32})", output)
        assert match is not None, output
        return match[1]

    def test_two_processes(self) -> None:
        first, second, other = self.hash_of(11), self.hash_of(11), self.hash_of(12)
        self.assertEqual(first, second)
        self.assertNotEqual(first, other)

    def test_twice_in_one_process(self) -> None:
        options = Options(13, clients=10, minutes=0.2, is_calm=False)
        hashes = []
        for _ in range(2):
            hashes.append(run(options).trace_hash)
            # What another run leaves in memory must not matter.
            run(Options(14, clients=10, minutes=0.1, is_calm=False))
        self.assertEqual(len(set(hashes)), 1)
