"""Make a failing run smaller, until only what its violation needs is left.

    faults      by delta debugging (Zeller, Hildebrandt: Simplifying and Isolating Failure-Inducing Input, 2002): halves,
                quarters, ... of the plan are left out as long as the run still fails
    the rest    fewer clients, fewer messages, fewer nodes, less time

A run counts as failing only with the letter of the first violation: another fault is another story.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import attrs

from tests.simulation.fleet import WARM_UP, Options, Result, run

T = TypeVar("T")

#: the fewest clients and messages per second that are tried
MIN_CLIENTS, MIN_RATE = 2, 5.0
#: runs that one shrinking may take
MAX_RUNS = 400


class RunsExhaustedError(Exception):
    """The shrinking has taken too many runs; what was found so far is the result."""


def reduce(items: Sequence[T], fails: Callable[[list[T]], bool]) -> list[T]:
    """Return a part of the items that still fails, of which no single one can be left out."""
    kept = list(items)
    parts = 2
    while kept:
        size = -(-len(kept) // parts)
        for start in range(0, len(kept), size):
            rest = kept[:start] + kept[start + size :]
            if fails(rest):
                kept, parts = rest, max(2, parts - 1)
                break
        else:
            if size == 1:
                return kept
            parts = min(len(kept), 2 * parts)
    return kept


class Shrinker:
    """Shrinks one failing run."""

    def __init__(
        self,
        result: Result,
        *,
        run: Callable[[Options], Result] = run,
        report: Callable[[str], object] = lambda line: None,
    ) -> None:
        """``result`` is that of the failing run; ``report`` is called with each step."""
        assert result.violations, "only a run that failed can be made smaller"
        self.letter = result.violations[0].letter
        self._run = run
        self._report = report
        self._runs = 0
        #: the smallest run so far
        self.result = result
        self.options = attrs.evolve(result.options, plan=tuple(result.plan), stop_at_violation=True)

    def shrink(self) -> Options:
        """Return the options of the smallest run that still fails in the same way."""
        try:
            self._shorten()
            self._reduce_plan()
            self._reduce_numbers()
            self._reduce_plan()
        except RunsExhaustedError:
            self._report(f"stopped after {MAX_RUNS} runs")
        return self.options

    def _fails(self, options: Options) -> bool:
        if self._runs == MAX_RUNS:
            raise RunsExhaustedError
        self._runs += 1
        result = self._run(options)
        if not any(violation.letter == self.letter for violation in result.violations):
            return False
        self.options, self.result = options, result
        self._report(
            f"{self._runs} runs: {len(options.plan or ())} faults, {options.clients} clients, {options.nodes} nodes, "
            f"{options.rate:g} messages/s, {options.minutes:.2f} minutes"
        )
        return True

    def _shorten(self) -> None:
        """End the run soon after the violation."""
        minutes = max(0.01, (self.result.simulated_seconds - WARM_UP + 0.5) / 60)
        if minutes < self.options.minutes:
            self._fails(attrs.evolve(self.options, minutes=minutes))

    def _reduce_plan(self) -> None:
        reduce(self.options.plan or (), lambda plan: self._fails(attrs.evolve(self.options, plan=tuple(plan))))

    def _reduce_numbers(self) -> None:
        while self.options.clients > MIN_CLIENTS and self._fails(
            attrs.evolve(self.options, clients=max(MIN_CLIENTS, self.options.clients // 2))
        ):
            pass
        while self.options.rate > MIN_RATE and self._fails(
            attrs.evolve(self.options, rate=max(MIN_RATE, self.options.rate / 2))
        ):
            pass
        while self.options.nodes > 2 and self._fails(attrs.evolve(self.options, nodes=self.options.nodes - 1)):
            pass
