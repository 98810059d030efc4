"""The forest plot: each method's difference from the reference and its confidence interval."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from rolora.report.figures import DOTTED, INK, MARKERS, PALETTE, elided, new_figure, styled
from rolora.results.paired import Difference


@styled
def forest_plot(
    groups: Mapping[str, Mapping[str, Difference]],
    styles: Mapping[str, int],
    metric: str,
    reference: str,
) -> Figure:
    """``groups``: title -> method -> difference; ``styles``: method -> its number on the page."""
    rows = sum(len(own) for own in groups.values())
    figure, axes = new_figure(0.6 + 0.46 * (len(groups) + rows))
    across = axes.get_yaxis_transform()
    y = 0.0
    for title, own in groups.items():
        axes.text(0, y + 0.25, title, va="bottom", weight="bold", transform=across)
        y += 1
        for method, difference in own.items():
            colour = PALETTE[styles[method] % len(PALETTE)]
            if difference.interval is not None:
                axes.plot(difference.interval, [y, y], linewidth=2.4, color=colour)
            marker = MARKERS[styles[method] % len(MARKERS)]
            axes.plot([difference.mean], [y], marker=marker, markersize=7, ls="none", color=colour)
            axes.text(0, y - 0.17, elided(method, 40), va="bottom", transform=across)
            y += 1
    axes.axvline(0, color=INK, linewidth=1, linestyle=DOTTED)
    axes.set_ylim(y - 0.5, -0.35)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{metric}, minus that of {elided(reference, 24)}")
    return figure
