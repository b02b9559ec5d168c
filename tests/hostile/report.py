"""Run attacks one after the other, and report the results as a table."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import attrs

from tests.hostile.attack import Attack, Seen, Target
from tests.hostile.attacker import lower_priority
from tests.hostile.node import MIB, MonitoredNode, Report, quantile
from tests.integration.fleet import CHECKOUT, environment

#: duration of the baseline measurement before each attack
BASELINE_SECONDS = 1.0
ATTACK_SECONDS = 3.5
#: the median and the 99th percentile
QUANTILES = (0.5, 0.99)
#: connections of large attacks
LARGE_CONNECTIONS = 2000
#: allowed latency as a multiple of the baseline; a slower run may be due to other work on the machine and is repeated,
#: up to MAX_RUNS times: the median counts
MAX_LATENCY_RATIO = 2.0
MAX_RUNS = 3
#: seconds after which no run is repeated
RETRY_TIME_LIMIT = 240.0
#: baseline measurements that are used
MAX_BASELINE_SAMPLES = 5


@attrs.frozen
class AttackResult:
    """The result of one attack.

    ``baseline`` has the quantiles of latency without an attack, in seconds; ``attacked`` is the median of the runs, by
    their 99th percentile.
    """

    attack: Attack
    baseline: dict[float, float]
    attacked: Report
    memory: int
    files: int
    seen: Seen
    problems: list[str]

    def ratio(self, part: float) -> float:
        """Return a quantile of latency as a multiple of the baseline."""
        return self.attacked.quantile(part) / self.baseline[part]

    @property
    def slow(self) -> bool:
        """Whether the latency exceeds ``MAX_LATENCY_RATIO``."""
        return max(map(self.ratio, QUANTILES)) > MAX_LATENCY_RATIO


class AttackRunner:
    """Run attacks against one node.

    The baseline is measured in the last few pauses between attacks, while a busy process takes the attacker's CPU time.
    """

    def __init__(self, watched: MonitoredNode, ends: float) -> None:
        """``ends`` is the monotonic time after which no run is repeated."""
        self._watched = watched
        self._ends = ends
        self._usual: list[Report] = []
        for _ in range(MAX_BASELINE_SAMPLES):
            self._measure_baseline()

    def run(self, attack: Attack) -> AttackResult:
        """Run one attack; repeat it if calls were too slow."""
        reports: list[Report] = []
        seen: Seen = Seen()
        problems: list[str] = []
        for _ in range(MAX_RUNS):
            self._measure_baseline()
            with self._watched.monitor() as during:
                more, wrong = attacker(attack, self._watched.target, ATTACK_SECONDS)
            reports += during
            seen += more
            problems += [*wrong, *during[0].problems(attack.memory)]
            row = self._row(attack, reports, seen, problems)
            if not row.slow or time.monotonic() > self._ends:
                break
        return row

    def _measure_baseline(self) -> None:
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=lower_priority)
        try:
            with self._watched.monitor() as usual:
                time.sleep(BASELINE_SECONDS)
        finally:
            busy.kill()
            busy.wait()
        self._usual += usual

    def _row(self, attack: Attack, reports: list[Report], seen: Seen, problems: list[str]) -> AttackResult:
        latencies = [latency for report in self._usual[-MAX_BASELINE_SAMPLES:] for latency in report.latencies]
        usual = {part: quantile(latencies, part) for part in QUANTILES}
        middle = sorted(reports, key=lambda report: report.quantile(QUANTILES[-1]))[(len(reports) - 1) // 2]
        strange = [what for what in seen if what not in attack.expected | attack.tolerated]
        return AttackResult(
            attack,
            usual,
            middle,
            max(report.memory for report in reports),
            max(report.files for report in reports),
            seen,
            [*problems, *(f"{what} ({seen[what]} times)" for what in strange)],
        )


def attacker(attack: Attack, target: Target, seconds: float) -> tuple[Seen, list[str]]:
    """Run an attack in a separate process; return its outcomes and problems."""
    given = {**attrs.asdict(target), "secret": target.secret.decode()}
    process = subprocess.run(
        [sys.executable, "-m", "tests.hostile.attacker", attack.name, str(seconds), str(LARGE_CONNECTIONS)],
        input=json.dumps(given).encode(),
        cwd=CHECKOUT,
        env={**environment(), "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        timeout=seconds + 60,
        check=False,
    )
    if process.returncode:
        return Seen(), [f"the attacker failed: {process.stderr.decode()[-500:]}"]
    return Seen(json.loads(process.stdout)), []


def all_of(attacks: Iterable[Attack], report: Callable[[AttackResult], None]) -> list[AttackResult]:
    """Run attacks, grouped by kind of node."""
    rows: list[AttackResult] = []
    ends = time.monotonic() + RETRY_TIME_LIMIT
    kinds: dict[str, list[Attack]] = {}
    for attack in attacks:
        kinds.setdefault(attack.node, []).append(attack)
    for kind, of_kind in kinds.items():
        with tempfile.TemporaryDirectory(prefix="wsgateway-hostile-") as folder:
            watched = MonitoredNode(Path(folder), kind)
            try:
                runner = AttackRunner(watched, ends)
                for attack in of_kind:
                    rows.append(runner.run(attack))
                    report(rows[-1])
            finally:
                watched.stop()
    return rows


def line(row: AttackResult) -> str:
    """Format a result as one line for a terminal."""
    attacked = row.attacked
    seen = ", ".join(f"{count} {what}" for what, count in row.seen.most_common())
    latencies = "  ".join(
        f"p{100 * part:.0f} {row.ratio(part):5.2f} ({1000 * attacked.quantile(part):.2f} ms)" for part in QUANTILES
    )
    return (
        f"{row.attack.name:30} {latencies}  max {max(attacked.latencies, default=0) * 1000:.0f} ms  "
        f"cpu {attacked.cpu:.2f}, held up {attacked.held_up:.2f}  memory {row.memory / MIB:+.1f} MiB  "
        f"files {row.files:+}  {seen}: {'; '.join(row.problems) or ('slow' if row.slow else 'right')}"
    )


def fragment(rows: Iterable[AttackResult]) -> str:
    """Format the table as reStructuredText."""
    cells: list[tuple[str, ...]] = [("Attack", "What the node does", "p50", "p99", "Memory", "Files")]
    cells += [
        (
            row.attack.what,
            row.attack.does,
            *(f"{row.ratio(part):.1f}" for part in QUANTILES),
            f"{max(0, row.memory) / MIB:.0f} of {row.attack.memory} MiB",
            str(row.files),
        )
        for row in rows
    ]
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 36 34 7 7 11 5", ""]
    for row_of_cells in cells:
        lines += [f"   {'* -' if n == 0 else '  -'} {cell}" for n, cell in enumerate(row_of_cells)]
    return "\n".join([*lines, ""])
