"""The picture of paired differences: a dot and its interval for each method and kind of budget."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
from matplotlib.figure import Figure

from rolora.report.figures import INK, MARKERS, PALETTE, STYLE, WIDTH, elided
from rolora.results.paired import Difference


def forest(
    groups: Mapping[str, Mapping[str, Difference]],
    styles: Mapping[str, int],
    metric: str,
    reference: str,
) -> Figure:
    """``groups``: title -> method -> difference; ``styles``: method -> its look on the page."""
    rows = sum(len(own) for own in groups.values())
    with matplotlib.rc_context(STYLE):
        height = 0.6 + 0.46 * (len(groups) + rows)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        across = axes.get_yaxis_transform()
        y = 0.0
        for title, own in groups.items():
            axes.text(0, y + 0.25, title, va="bottom", weight="bold", transform=across)
            y += 1
            for method, found in own.items():
                colour = PALETTE[styles[method] % len(PALETTE)]
                if found.interval is not None:
                    axes.plot(found.interval, [y, y], linewidth=2.4, color=colour)
                marker = MARKERS[styles[method] % len(MARKERS)]
                axes.plot([found.mean], [y], marker=marker, markersize=7, ls="none", color=colour)
                words = elided(method, 40)
                axes.text(0, y - 0.17, words, va="bottom", transform=across)
                y += 1
        axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_ylim(y - 0.5, -0.35)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{metric}, minus that of {elided(reference, 24)}")
        return figure
