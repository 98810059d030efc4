"""Writes the tables of docs/demo.md, and docs/demo.png, from the runs of the demo.

python docs/make_demo.py questions demo/runs/questions-1/*-seed*
python docs/make_demo.py prompts demo/runs/prompts-1/*-seed*
python docs/make_demo.py preferences demo/runs/preferences-1/*-seed*
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from rolora.files import write_file
from rolora.report.figures import DASHES, MARKERS, PALETTE, rendered
from rolora.report.narrative import format_metric
from rolora.results.ranking import rank_methods
from rolora.results.runs import RunRecord, by_method, load_run, mean_sd, primary_metric, summarise

PAGE, PICTURE = (Path(__file__).with_name(name) for name in ("demo.md", "demo.png"))


def draw(runs: list[RunRecord]) -> Figure:
    """Accuracy against rounds and megabytes sent: means over seeds, bands of one sd."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for style, (method, seeds) in enumerate(by_method(runs).items()):
        curves = [run.curve("accuracy") for run in seeds]
        spread = [mean_sd([p.value for p in points]) for points in zip(*curves, strict=True)]
        mean = [value for value, _ in spread]
        low, high = ([value + sign * (sd or 0) for value, sd in spread] for sign in (-1, 1))
        for axes, column in ((left, "round"), (right, "up")):
            x = [getattr(point, column) for point in curves[0]]
            look = {"color": PALETTE[style], "marker": MARKERS[style], "linestyle": DASHES[style]}
            axes.plot(x, mean, label=method, **look)
            axes.fill_between(x, low, high, color=PALETTE[style], alpha=0.15, linewidth=0)
    left.set_xlabel("round")
    right.set_xlabel("MB sent up, all clients")
    left.set_ylabel("accuracy on the test rows")
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.grid(color="#cccccc", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def table(runs: list[RunRecord]) -> str:
    """The result of each method at equal rounds and at equal megabytes, in Markdown."""
    metric = primary_metric(runs)
    equal = rank_methods(runs, metric, "megabytes")
    assert equal is not None
    at_equal = {place.method: format_metric(place.mean, place.sd) for place in equal.places}
    rows = summarise(runs)
    lines = [
        f"| method | {metric}, {rows[0].rounds} rounds | {metric}, {equal.budget:.1f} MB up "
        "| MB up | MB down | aggregation error | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row.method}` | {format_metric(row.final_mean, row.final_sd)} "
            f"| {at_equal[row.method]} "
            f"| {row.megabytes_up:.1f} | {row.megabytes_down:.1f} | {row.aggregation_error:.1e} "
            f"| {row.seconds:.0f} |"
        )
    made = runs[0].provenance
    seeds = ", ".join(str(seed) for seed in rows[0].seeds)
    lines.append("")
    lines.append(
        f"Mean ± standard deviation over seeds {seeds}; {made['cpu']}, threads: {made['threads']}, "
        f"torch {made['versions']['torch']}."
    )
    return "\n".join(lines)


def main(demo: str, *paths: str) -> None:
    """Replace the table between the demo's marks; for the questions, draw the curves too."""
    runs = [load_run(path) for path in paths]
    text = PAGE.read_text(encoding="utf-8")
    before, mark, rest = text.partition(f"<!-- demo:{demo} -->\n")
    after = rest[rest.index("<!-- end -->") :]
    write_file(PAGE, f"{before}{mark}\n{table(runs)}\n\n{after}")
    if demo == "questions":
        write_file(PICTURE, rendered(draw(runs), "png", facecolor="white"))


if __name__ == "__main__":
    main(*sys.argv[1:])
