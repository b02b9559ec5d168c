"""Draw the chart of all ratios: how many times better the node is, for each figure and each server."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import compare, measure


class Figure(NamedTuple):
    """One group of bars."""

    title: str
    benchmark: str
    #: further values that a result line must have
    where: dict[str, Any]
    value: str
    #: "more" or "less" is better, or "ratio" if the value is already the ratio
    better: str


FIGURES = (
    Figure("calls/s,\n64 in flight", "calls", {"case": "in flight 64"}, "speed_ratio", "ratio"),
    Figure("calls/s,\n1,000 in flight", "calls", {"case": "in flight 1000"}, "speed_ratio", "ratio"),
    Figure("CPU of a call,\n64 in flight", "calls", {"case": "in flight 64"}, "cpu_ratio", "ratio"),
    Figure("CPU of a call,\n1,000 in flight", "calls", {"case": "in flight 1000"}, "cpu_ratio", "ratio"),
    Figure("notifications/s\nto clients", "notifications", {"case": "to clients"}, "speed_ratio", "ratio"),
    Figure("notifications/s\nfrom clients", "notifications", {"case": "from clients"}, "speed_ratio", "ratio"),
    Figure("opening\nhandshakes/s", "openings", {"in_progress": 400}, "rate", "more"),
    Figure("memory of an\nidle client", "idle", {}, "resident", "less"),
)
#: the palette of Okabe and Ito, suitable for color blindness
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


def line_of(lines: Sequence[dict[str, Any]], server: str, figure: Figure) -> dict[str, Any] | None:
    """Return the first result line of a server for a figure."""
    for line in lines:
        values = {
            "benchmark": line["benchmark"],
            "server": line.get("server"),
            **{k: line.get(k) for k in figure.where},
        }
        if values == {"benchmark": figure.benchmark, "server": server, **figure.where}:
            return line
    return None


class Ratio(NamedTuple):
    """How many times better the node is than another server, and whether one of both measurements was disturbed."""

    value: float
    disturbed: bool


def ratios(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Ratio]]:
    """Return the measured ratios: title of the figure -> server -> ratio."""
    by_figure: dict[str, dict[str, Ratio]] = {}
    for figure in FIGURES:
        node = line_of(lines, measure.NODE, figure)
        for peer in measure.PEERS:
            other = line_of(lines, peer, figure)
            if node and other and node[figure.value] and other[figure.value]:
                ours, theirs = node[figure.value], other[figure.value]
                ratio = {"ratio": theirs, "more": ours / theirs, "less": theirs / ours}[figure.better]
                is_disturbed = compare.disturbed(node) or compare.disturbed(other)
                by_figure.setdefault(figure.title, {})[peer] = Ratio(ratio, is_disturbed)
    return by_figure


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the chart as PNG. Raises ``ImportError`` if matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    groups = ratios(lines)
    peers = [peer for peer in measure.PEERS if any(peer in group for group in groups.values())]
    figure, axes = pyplot.subplots(figsize=(20, 8), dpi=100, layout="constrained")
    _bars(axes, list(groups.values()), peers)
    axes.set_yscale("log")
    axes.margins(x=0.01, y=0.1)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("times better than each server (logarithmic)")
    today = datetime.datetime.now(datetime.timezone.utc).date()
    title = [f"wsgateway beside its peers, one core for the server, {today}", *textwrap.wrap(measure.machine(), 150)]
    if any(ratio.disturbed for group in groups.values() for ratio in group.values()):
        title.append("* disturbed: something else used the processor during this measurement")
    axes.set_title("\n".join(title), loc="left", fontsize=11)
    if peers:
        figure.legend(ncols=(len(peers) + 1) // 2, frameon=False, loc="outside lower center", fontsize=9)
    figure.savefig(path)
    pyplot.close(figure)


def _bars(axes: Any, groups: Sequence[dict[str, Ratio]], peers: Sequence[str]) -> None:
    """Draw a centered group of bars for each figure, from 1 up or down."""
    width = 0.86 / max(len(peers), 1)
    for at, peer in enumerate(peers):
        positions, bars = [], []
        for x, group in enumerate(groups):
            if peer in group:
                present = [name for name in peers if name in group]
                positions.append(x + width * (present.index(peer) - (len(present) - 1) / 2))
                bars.append(group[peer])
        color, label = COLORS[at % len(COLORS)], measure.label_of(peer)
        axes.bar(positions, [ratio.value - 1 for ratio in bars], width * 0.92, bottom=1, color=color, label=label)
        for position, (height, disturbed) in zip(positions, bars, strict=True):
            up = height >= 1
            axes.annotate(
                (f"{height:.2g}" if height < 100 else f"{height:.0f}") + ("*" if disturbed else ""),
                (position, height),
                xytext=(0, 3 if up else -3),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                fontsize=7,
            )
