"""Run one scenario from start to end, and check the invariants of all scenarios."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos import network
from tests.chaos.fleet import TIMEOUT, Fleet, Size, memory, wait_until
from tests.chaos.ledger import Totals
from tests.chaos.network import Network
from tests.chaos.scenarios import Scenario

#: bytes; allowed growth of a node's memory, most of which is the allocator's
MAX_MEMORY_GROWTH = 16_000_000
#: seconds without the CPU that are reported
MIN_REPORTED_STARVATION = 0.5
#: violations that are reported one by one
MAX_REPORTED_VIOLATIONS = 5


@dataclass
class Result:
    """The result of a scenario. ``before``, ``after``: memory of each surviving node, in bytes."""

    name: str
    totals: Totals = field(default_factory=Totals)
    bound: float = 0.0
    rows_left: int = 0
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    #: descriptions of problems; empty on success
    problems: list[str] = field(default_factory=list)


async def run(scenario: Scenario, size: Size, say: Callable[[str], None]) -> Result:
    """Run a scenario. Exceptions become problems of the result."""
    result = Result(scenario.name)
    spaces = Network(3) if scenario.network and network.available() else None
    fleet = Fleet(
        size,
        scenario.timing,
        say,
        network=spaces,
        far_database=scenario.far_database,
        far_peers=scenario.network and spaces is None,
    )
    try:
        async with fleet:
            say(f"{len(fleet.clients)} clients are connected to {len(fleet.nodes)} nodes")
            await _run(scenario, fleet, result)
    except Exception as e:  # noqa: BLE001 - run the other scenarios and print the table
        result.problems.append(f"{type(e).__name__}: {e}")
    finally:
        if spaces is not None:
            spaces.close()
    if result.problems:
        say(f"the logs of the nodes are in {fleet.folder}")
    else:
        shutil.rmtree(fleet.folder)
    return result


async def _run(scenario: Scenario, fleet: Fleet, result: Result) -> None:
    result.bound = scenario.bound(fleet)
    await fleet.all_answer(TIMEOUT)
    fleet.callers.slow = scenario.slow
    fleet.callers.start()
    await asyncio.sleep(fleet.size.before)
    before, ended = dict(zip(fleet.nodes, memory(fleet.nodes), strict=True)), (await fleet.stat())["ended"]
    result.problems += await scenario.fault(fleet)
    await _recover(fleet, result)
    await fleet.callers.stop()
    clients = await fleet.stat()
    result.totals = fleet.ledger.totals(time.monotonic())
    live = [node for node in fleet.alive() if node in before]
    result.before, result.after = [before[node] for node in live], memory(live)
    result.rows_left = await fleet.rows_left()
    rows = await fleet.rows()
    if rows != len(fleet.clients):
        result.problems.append(f"there are {rows} rows of {len(fleet.clients)} clients")
    if clients["stopped"]:
        result.problems.append(f"{clients['stopped']} clients have stopped for good")
    if fleet.callers.held_up > MIN_REPORTED_STARVATION:
        fleet.say(f"the callers had no CPU for {fleet.callers.held_up:.1f} s: the machine is busy, times are too long")
    if scenario.stay and clients["ended"] != ended:
        result.problems.append(f"{clients['ended'] - ended} connections ended, although none should")
    _check_result(result)


async def _recover(fleet: Fleet, result: Result) -> None:
    """Wait until every client answers through every node, and the rows of dead nodes are removed."""
    began = time.monotonic()

    async def no_rows() -> bool:
        return not await fleet.rows_left()

    what = "all answer through every node"
    try:
        # The calls take time as well.
        await fleet.all_answer(result.bound + TIMEOUT)
        fleet.say(f"{what}, {time.monotonic() - began:.1f} s later")
        what = "no row is left of dead nodes"
        await wait_until(no_rows, what, result.bound)
        fleet.say(f"{what}, {time.monotonic() - began:.1f} s later")
    except asyncio.TimeoutError:
        result.problems.append(f"not in time: {what}")


def _check_result(result: Result) -> None:
    totals, problems = result.totals, result.problems
    if totals.lost:
        problems.append(f"{totals.lost} calls have neither a result nor an error")
    problems += totals.wrong[:MAX_REPORTED_VIOLATIONS]
    if len(totals.wrong) > MAX_REPORTED_VIOLATIONS:
        problems.append(f"and {len(totals.wrong) - MAX_REPORTED_VIOLATIONS} more violations")
    if totals.longest > result.bound:
        problems.append(f"a client was unreachable for {totals.longest:.1f} s, more than {result.bound:g} s")
    if result.rows_left:
        problems.append(f"{result.rows_left} rows are left of dead nodes")
    more = max((after - before for before, after in zip(result.before, result.after, strict=True)), default=0)
    if more > MAX_MEMORY_GROWTH:
        problems.append(f"a node has {more / 1e6:.0f} MB more than before")
