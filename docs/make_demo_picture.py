"""Draw docs/demo.png from the runs of ``rolora demo``.

python docs/make_demo_picture.py demo/runs/questions-1/*-seed*
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from rolora.durable import write_file
from rolora.report import Run, load_run
from rolora.report.figures import DASHES, MARKERS, PALETTE, rendered
from rolora.report.summary import by_method, mean_sd

PICTURE = Path(__file__).with_name("demo.png")


def draw(runs: list[Run]) -> Figure:
    """Accuracy against rounds and against megabytes sent: means over seeds, bands of one sd."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for style, (method, seeds) in enumerate(by_method(runs).items()):
        curves = [run.curve("accuracy") for run in seeds]
        spread = [mean_sd([point[2] for point in points]) for points in zip(*curves, strict=True)]
        mean = [value for value, _ in spread]
        low, high = ([value + sign * (sd or 0) for value, sd in spread] for sign in (-1, 1))
        for axes, column in ((left, 0), (right, 1)):
            x = [point[column] for point in curves[0]]
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


if __name__ == "__main__":
    picture = rendered(draw([load_run(path) for path in sys.argv[1:]]), "png", facecolor="white")
    write_file(PICTURE, picture)
    print(PICTURE)
