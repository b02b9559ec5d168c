"""Run many seeds on all cores, one process for each run, until time or calls are over, or something was violated."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

import attrs

from tests.simulation.fleet import Options, run

#: what a soak goes through, beside the seeds: nodes, clients, messages per second, minutes
SHAPES = ((3, 60, 100.0, 2.0), (2, 20, 60.0, 2.0), (5, 100, 150.0, 1.0), (3, 200, 600.0, 1.0), (7, 60, 100.0, 1.0))
#: interval of the lines that tell how far it is, in seconds
REPORT_INTERVAL = 60.0

_Outcome = tuple[Options, Counter[str], list[str]]


def runs(options: Options) -> Iterator[Options]:
    """Generate the runs of a soak, without end, from a seed on."""
    for seed in count(options.seed):
        nodes, clients, rate, minutes = SHAPES[seed % len(SHAPES)]
        yield attrs.evolve(options, seed=seed, nodes=nodes, clients=clients, rate=rate, minutes=minutes)


def run_one(options: Options) -> _Outcome:
    """Run one seed, in a process of the soak."""
    try:
        result = run(options)
    except Exception:  # noqa: BLE001 - it is reported with the seed
        return options, Counter(), [traceback.format_exc()]
    outcome = options, Counter(result.counts), [str(violation) for violation in result.violations]
    del result
    gc.collect()
    return outcome


def soak(options: Options, *, minutes: float, max_calls: int, report: Callable[[str], object]) -> int:
    """Run seeds for some minutes of the wall clock, or until there were ``max_calls`` calls (0: no limit). Returns the
    exit status."""
    end = time.monotonic() + 60 * minutes
    report_at = time.monotonic() + REPORT_INTERVAL
    totals: Counter[str] = Counter()
    with multiprocessing.get_context("forkserver").Pool(os.cpu_count(), maxtasksperchild=8) as pool:
        pending = runs(options)
        active = [pool.apply_async(run_one, (next(pending),)) for _ in range(2 * (os.cpu_count() or 1))]
        while active:
            done, counts, violations = active.pop(0).get()
            totals += counts
            totals["runs"] += 1
            if violations:
                report(f"{totals['runs']} runs, {totals['calls']} calls; seed {done.seed} failed:")
                for violation in violations[:5]:
                    report(f"  {violation}")
                report(
                    f"repeat it with:\n  python -m tests.simulation --seed {done.seed} --nodes {done.nodes}"
                    f" --clients {done.clients} --minutes {done.minutes} --rate {done.rate} --shrink"
                )
                return 1
            if time.monotonic() < end and not 0 < max_calls <= totals["calls"]:
                active.append(pool.apply_async(run_one, (next(pending),)))
            if time.monotonic() > report_at:
                report_at += REPORT_INTERVAL
                report(f"{totals['runs']} runs, {totals['calls']} calls, {totals['notifications']} notifications")
    report(
        f"nothing was violated in {totals['runs']} runs with {totals['calls']} calls and {totals['notifications']} "
        f"notifications, seeds {options.seed} to {done.seed}"
    )
    return 0
