"""A figure of the linear model: angle and losses by round, and a panel for each sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rolora.report.figures import GRID, INK, STYLE, SUPERSCRIPTS, look
from rolora.report.theory_text import ROUNDING
from rolora.theory.curves import Outcome
from rolora.theory.sweeps import Spread, SweepRow

Sweeps = Mapping[str, Sequence[SweepRow]]

STYLES = {"RoLoRA": 2, "FFA-LoRA": 1, "FedAvg of LoRA": 0}  # as in the demonstration's picture
TITLES = {
    "clients": "clients, {rows:,} rows in all",
    "dimension": "dimension of a",
    "samples": "rows per client",
    "noise": "noise: sd on each element of Y",
    "heterogeneity": "heterogeneity: sine of b_i* to b*",
}
IDEAL = "RoLoRA with infinitely many rows"
TOP, LINE, SMALL = 3.6, 2.7, 9  # inches, inches, points


def theory_figure(outcome: Outcome, sweeps: Sweeps) -> Figure:
    """Angle and losses by round, with a panel for each sweep below."""
    columns = min(3, len(sweeps))
    lines = math.ceil(len(sweeps) / columns) if columns else 0
    heights = [TOP, LINE * lines] if lines else [TOP]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
        angle, losses = parts[0][0].subplots(1, 2)
        _draw_angle(angle, outcome)
        _draw_losses(losses, outcome)
        if sweeps:
            panels = list(parts[1][0].subplots(lines, columns, squeeze=False, sharey=True).flat)
            for axes, (name, rows) in zip(panels, sweeps.items(), strict=False):
                _draw_sweep(axes, name, rows, outcome)
            _powers(panels[0])
            _explain(panels[len(sweeps) :], panels[0], sweeps)
        return figure


def _draw_angle(axes: Any, outcome: Outcome) -> None:
    rounds = range(len(outcome.rounds) + 1)
    start = outcome.setting.delta0
    axes.plot(rounds, [start] * len(rounds), label="FFA-LoRA", **_line("FFA-LoRA", rounds))
    fedit = [start, *outcome.fedit_sin]
    axes.plot(rounds, fedit, label="FedAvg of LoRA", **_line("FedAvg of LoRA", rounds))
    found = [start, *(one.sin for one in outcome.rounds)]
    axes.plot(rounds, found, label="RoLoRA", **_line("RoLoRA", rounds, 0.5))
    bound = [start, *(one.bound for one in outcome.rounds)]
    axes.plot(rounds, bound, color=INK, linewidth=1.6, label="RoLoRA: the paper's bound")
    ideal = [sin for sin in outcome.population() if sin > ROUNDING]
    axes.plot(range(len(ideal)), ideal, color=GRID, linewidth=3, zorder=1, label=IDEAL)
    _powers(axes)
    axes.set_title("sin θ: distance of a from a* (log)")
    axes.set_xlabel("round")
    axes.legend(frameon=False, loc="lower left", fontsize=SMALL)


def _draw_losses(axes: Any, outcome: Outcome) -> None:
    rounds = [one.round for one in outcome.rounds]
    values = {
        "FFA-LoRA": [one.loss_ffa for one in outcome.rounds],
        "FedAvg of LoRA": [one.loss_fedit for one in outcome.rounds],
        "RoLoRA": [one.loss_rolora for one in outcome.rounds],
    }
    for name, losses in values.items():
        axes.plot(rounds, losses, **_line(name, rounds, 0.5 if name == "RoLoRA" else 0.0))
    floor = outcome.expected.loss_ffa
    words = f"{floor:.3g}, FFA-LoRA's expected loss"
    axes.axhline(floor, color=INK, linewidth=1, linestyle=(0, (1, 2)), label=words)
    low, high = min(map(min, values.values())), max(map(max, values.values()))
    if high > 50 * low:
        _powers(axes)
    axes.set_title("loss, mean over clients" + (" (log)" if high > 50 * low else ""))
    axes.set_xlabel("round")
    axes.legend(frameon=False, loc="best", fontsize=SMALL)


def _draw_sweep(axes: Any, name: str, rows: Sequence[SweepRow], outcome: Outcome) -> None:
    places = range(len(rows))
    axes.plot(places, [outcome.setting.delta0] * len(rows), **_line("FFA-LoRA", places))
    for method, key in (("FedAvg of LoRA", "sin_fedit"), ("RoLoRA", "sin")):
        spreads: list[Spread] = [getattr(row, key) for row in rows]
        shown = look(STYLES[method])
        axes.plot(places, [one.mean for one in spreads], **shown)
        low, high = [one.low for one in spreads], [one.high for one in spreads]
        axes.fill_between(places, low, high, color=shown["color"], alpha=0.15, lw=0)
    axes.set_xticks(places, [f"{row.value:g}" for row in rows])
    setting = outcome.setting
    axes.set_title(TITLES[name].format(rows=setting.clients * setting.samples), fontsize=10)


def _explain(spare: Sequence[Any], first: Any, sweeps: Sweeps) -> None:
    """Label the first panel's axis, and explain lines and bands in the first spare panel."""
    (row, *_), *_ = sweeps.values()
    first.set_ylabel("sin θ after the last round")
    for axes in spare:
        axes.axis("off")
    for axes in spare[:1]:
        for name in STYLES:
            axes.plot([], [], label=name, **look(STYLES[name]))
        title = f"mean over {len(row.seeds)} seeds;\nband: range"
        axes.legend(frameon=False, loc="center", title=title, alignment="left")


def _line(name: str, rounds: Sequence[int], shift: float = 0.0) -> dict[str, Any]:
    return look(STYLES[name], len(rounds), shift)


def _powers(axes: Any) -> None:
    """A log axis labelled in powers of ten; matplotlib's own labels need mathtext, which is off."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "10" + f"{math.log10(value):.0f}".translate(SUPERSCRIPTS))
    )
    axes.yaxis.set_minor_formatter(NullFormatter())
