"""Faults that are put into the program on purpose: the simulation must find each of them.

A mutant replaces one method of the program by a copy with a fault, as a slip in that method could make it. It names the
check that finds it, and the runs in which it is looked for: the same runs are clean without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import attrs

from tests.simulation.fleet import Options, Result, run


@attrs.frozen
class Mutant:
    """One mutant."""

    name: str
    #: what is broken
    description: str
    #: the check that finds it
    letter: str
    #: the class or module, and the name of what is replaced
    target: Any
    attribute: str
    #: makes the replacement from the original
    mutate: Callable[[Any], Any]
    #: what the runs are like; the seed is the first one
    options: Options
    #: it is found within so many seeds
    max_seeds: int = 4

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the mutant while the context lasts."""
        original = getattr(self.target, self.attribute)
        with mock.patch.object(self.target, self.attribute, self.mutate(original)):
            yield

    def find(self) -> tuple[int, Result]:
        """Run seeds until it is found. Returns how many that took, and the last result: without a violation of that
        letter, if it was not found."""
        for seeds in range(1, self.max_seeds + 1):
            with self.applied():
                result = run(attrs.evolve(self.options, seed=self.options.seed + seeds - 1))
            if any(violation.letter == self.letter for violation in result.violations):
                break
        return seeds, result
