"""The pictures: curves over methods, the spread over clients, the split.

Figures are drawn in fixed colours, to be saved on white; ``rolora.report.svg`` makes them follow a
page's theme. A page is read on phones of 360 px too, so figures are 360 pt wide with 11 pt text.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from rolora.errors import ConfigError
from rolora.files import write_file

# Okabe & Ito 2008, "Color Universal Design"; markers and dashes tell methods apart in grey too.
# Their black is #010101 here, because matplotlib leaves a black fill out of an SVG.
PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7"),
    *("#56b4e9", "#e69f00", "#010101", "#f0e442"),
)
MARKERS = "os^DvPX*"
DASHES: tuple[Any, ...] = (
    *("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))),
    *((0, (10, 3)), (0, (3, 1, 1, 1, 1, 1)), (0, (4, 4)), (0, (12, 2, 2, 2))),
)
INK, GRID, BAND = "#222222", "#cccccc", "#eeeeee"
WIDTH, HEIGHT, TEXT = 5.0, 3.1, 11  # inches, inches, points
ROUNDING = 1e-6  # an aggregation error up to here is float32 arithmetic
MOST_LABELS = 24
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

STYLE = {
    "font.family": "sans-serif",
    "font.size": TEXT,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.titlesize": TEXT,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "rolora",
}


@dataclass(frozen=True)
class Series:
    """One method's line: mean and, where there are several seeds, sd at each x.

    ``style`` numbers the method, so that it looks the same in every figure of a page.
    """

    style: int
    x: Sequence[float]
    mean: Sequence[float]
    sd: Sequence[float | None]


def _figure(height: float = HEIGHT) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def look(style: int) -> dict[str, Any]:
    """A method's colour, marker and dashes, by its number."""
    turn = style // len(PALETTE)
    return {
        "color": PALETTE[style % len(PALETTE)],
        "marker": MARKERS[(style + turn) % len(MARKERS)],
        "linestyle": DASHES[(style + 2 * turn) % len(DASHES)],
        "linewidth": 1.6,
        "markersize": 5,
    }


def _draw(axes: Any, series: Series, shift: float = 0.0) -> None:
    """A line with at most some eight markers, and its sd band; ``shift`` moves the markers on."""
    every = max(1, math.ceil(len(series.x) / 8))
    start = int(shift * every) % every
    axes.plot(series.x, series.mean, markevery=(start, every), **look(series.style))
    band = [(x, m, s) for x, m, s in zip(series.x, series.mean, series.sd, strict=True) if s]
    if band:
        low, high = [m - s for _, m, s in band], [m + s for _, m, s in band]
        colour = PALETTE[series.style % len(PALETTE)]
        axes.fill_between([x for x, _, _ in band], low, high, color=colour, alpha=0.15, lw=0)


def curves(
    series: Sequence[Series], title: str, xlabel: str, *, budget: float | None = None
) -> Figure:
    """Mean lines with sd bands; ``budget`` marks the x at which methods are compared.

    The y axis is logarithmic where the values span more than a factor of 50 (perplexities do).
    """
    with matplotlib.rc_context(STYLE):
        figure = _figure()
        axes = figure.subplots()
        for number, one in enumerate(series):
            _draw(axes, one, number / len(series))
        values = [v for one in series for v in one.mean if math.isfinite(v)]
        if values and min(values) > 0 and max(values) > 50 * min(values):
            _logarithmic(axes)
            title += " (log)"
        if budget is not None:
            axes.axvline(budget, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        if xlabel == "round":
            axes.xaxis.set_major_locator(_whole(6))
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        return figure


def _logarithmic(axes: Any) -> None:
    """A log axis with plain numbers: matplotlib's own labels are mathtext, which is off here."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def aggregation_errors(series: Sequence[Series]) -> Figure:
    """Log axis; everything up to ``ROUNDING``, zero too, lies in a band marked as exact."""
    values = [value for one in series for value in one.mean]
    floor, top = ROUNDING / 100, 3 * max([1.0, *filter(math.isfinite, values)])
    with matplotlib.rc_context(STYLE):
        figure = _figure()
        axes = figure.subplots()
        _logarithmic(axes)
        axes.set_ylim(floor, top)
        axes.axhspan(floor, ROUNDING, color=BAND, zorder=0)
        for number, one in enumerate(series):
            inside = floor * 100 ** ((number + 1) / (len(series) + 1))  # side by side in the band
            shown = [inside if value <= ROUNDING else value for value in one.mean]
            _draw(axes, Series(one.style, one.x, shown, [None] * len(shown)), number / len(series))
        powers = [n for n in range(-5, 7) if 10**n < top]
        names = ["exact", *("10" + str(n).translate(SUPERSCRIPTS) for n in powers)]
        axes.set_yticks([floor * 10, *(10.0**n for n in powers)], names)
        axes.yaxis.set_minor_locator(FixedLocator([]))
        axes.xaxis.set_major_locator(_whole(6))
        axes.set_title("aggregation error (log)")
        axes.set_xlabel("round")
        return figure


def client_spread(
    clients: Mapping[str, Sequence[float]], styles: Mapping[str, int], metric: str, worst: Any
) -> Figure:
    """A strip a method: one dot for each value, its area the number of clients that have it.

    A tall line marks the mean, an open triangle the worst client (``worst`` is ``min`` or ``max``).
    """
    most = max(max(Counter(round(v, 3) for v in own).values()) for own in clients.values())
    with matplotlib.rc_context(STYLE):
        figure = _figure(0.7 + 0.52 * len(clients))
        axes = figure.subplots()
        for row, (method, values) in enumerate(clients.items()):
            colour = PALETTE[styles[method] % len(PALETTE)]
            counts = Counter(round(value, 3) for value in values if math.isfinite(value))
            sizes = [max(4.0, 130 * count / most) for count in counts.values()]
            axes.scatter(list(counts), [row] * len(counts), s=sizes, color=colour, alpha=0.45, lw=0)
            mean, low = sum(values) / len(values), worst(values)
            axes.plot([mean, mean], [row - 0.24, row + 0.24], color=INK, linewidth=2.2)
            axes.plot([low], [row], marker="^", mfc="none", mec=INK, markersize=9, ls="none")
            words = f"{elided(method, 22)}: mean {mean:.3f}, worst {low:.3f}"
            axes.text(0, row - 0.3, words, va="bottom", transform=axes.get_yaxis_transform())
        axes.set_ylim(len(clients) - 0.6, -0.85)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{metric} of each client")
        return figure


def split_figure(partition: Mapping[str, Any]) -> Figure:
    """Rows a client as bars and, where rows have labels, each client's mix of them below."""
    clients = partition["clients"]
    totals: Counter[str] = Counter()
    for client in clients:
        totals.update(client["labels"])
    names = [name for name, _ in sorted(totals.items(), key=lambda item: (-item[1], item[0]))]
    rows = names if len(names) <= MOST_LABELS else [*names[: MOST_LABELS - 1], ...]
    with matplotlib.rc_context(STYLE):
        figure = _figure(2.2 + 0.22 * max(len(rows), 3) if rows else 2.2)
        heights = [1.3, 0.22 * max(len(rows), 3)] if rows else [1]
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        bars = panels[0][0]
        xs = range(len(clients))
        bars.bar(xs, [client["num_examples"] for client in clients], 0.85, color=PALETTE[0])
        bars.set_title("training rows of each client")
        bars.yaxis.set_major_locator(_whole(4))
        bars.grid(visible=False, axis="x")
        bars.xaxis.set_major_locator(_whole(8))
        if rows:
            _label_mix(panels[1][0], clients, rows, names)
        panels[-1][0].set_xlabel(f"client (0 to {len(clients) - 1}, in order of id)")
        return figure


def _label_mix(axes: Any, clients: Any, rows: Sequence[Any], names: Sequence[str]) -> None:
    """Opacity is the label's share of the client's rows; the last row may gather the rest (...)."""
    rest = set(names) - set(rows)
    shares = [
        [
            sum(client["labels"].get(name, 0) for name in (rest if row is ... else [row]))
            / max(client["num_examples"], 1)
            for client in clients
        ]
        for row in rows
    ]
    most = max(max(own) for own, row in zip(shares, rows, strict=True) if row is not ...)
    hue = to_rgb(PALETTE[0])
    pixels = [[(*hue, min(1.0, share / most)) for share in own] for own in shares]
    axes.imshow(pixels, aspect="auto", interpolation="none")
    shown = [f"{len(rest)} others" if row is ... else elided(row, 16) for row in rows]
    axes.set_yticks(range(len(rows)), shown)
    axes.grid(visible=False)
    axes.set_title(f"share of client's rows (full colour: {most:.0%})")


def _whole(most: int) -> MaxNLocator:
    """At most ``most`` steps of 1, 2, 5, 10, ..."""
    return MaxNLocator(most, integer=True, steps=[1, 2, 5, 10])


def elided(text: str, width: int) -> str:
    """``text``, cut in the middle to at most ``width`` characters: names differ at their ends."""
    if len(text) <= width:
        return text
    return text[: width // 2] + "…" + text[len(text) - (width - width // 2 - 1) :]


def key(style: int) -> Figure:
    """A method's line and marker alone, for a legend."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.5, 0.17))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], clip_on=False, **look(style))
        axes.set_xlim(0, 2)
        return figure


def save_split_picture(partition: Mapping[str, Any], path: Path) -> None:
    """Save ``split_figure`` on white: PNG or SVG by the suffix of ``path``, else ConfigError."""
    save_picture(split_figure(partition), path)


def save_picture(figure: Figure, path: Path) -> None:
    """Save the figure on white: PNG or SVG by the suffix of ``path``, else ConfigError."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ConfigError(f"a picture is saved as .png or .svg, not as {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, rendered(figure, kind, facecolor="white"))


def rendered(figure: Figure, kind: str, **options: Any) -> bytes:
    """The file's bytes: the same for the same figure, without a date."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a label in a script without a font
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=200, **options)
    return buffer.getvalue()
