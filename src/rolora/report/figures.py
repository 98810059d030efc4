"""The figures: curves per method, the spread over clients, the split of the rows.

Figures are drawn in fixed colours, to be saved on white; ``rolora.report.svg`` replaces them by the
colours of a page's theme. Pages are read on phones 360 px wide, so figures are 360 pt wide with
11 pt text.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from rolora.errors import ConfigError, printable
from rolora.files import write_file
from rolora.results.paired import Difference

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
DOTTED, DASHED = (0, (1, 2)), (0, (3, 3))
INK, GRID, BAND = "#222222", "#cccccc", "#eeeeee"
WIDTH, HEIGHT, TEXT = 5.0, 3.1, 11  # inches, inches, points
ROUNDING = 1e-6  # aggregation errors up to here are float32 rounding
MAX_LABELS = 24
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
P = ParamSpec("P")


@dataclass(frozen=True)
class Series:
    """One method's line: the mean and, where there is one, a band (low, high) at each x.

    ``style`` is the method's number, so that it looks the same in every figure of a page.
    ``readouts`` are what a page says of each point while it is pointed at; "" for nothing.
    """

    style: int
    x: Sequence[float]
    mean: Sequence[float]
    band: Sequence[tuple[float, float] | None]
    finished: bool = True
    readouts: Sequence[str] = ()


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """The same function, drawing in ``STYLE``."""
    decorated: Callable[P, Figure] = matplotlib.rc_context(STYLE)(draw)
    return decorated


def new_figure(height: float = HEIGHT) -> tuple[Figure, Any]:
    """A figure of the page's width, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def mark(style: int) -> dict[str, Any]:
    """A method's colour and marker, by its number."""
    turn = style // len(PALETTE)
    return {
        "color": PALETTE[style % len(PALETTE)],
        "marker": MARKERS[(style + turn) % len(MARKERS)],
    }


def look(style: int, points: int = 0, shift: float = 0.0, finished: bool = True) -> dict[str, Any]:
    """``mark`` and dashes of a method; one that is unfinished is dashed.

    Of a line with so many ``points`` about eight have a marker, the first of them ``shift`` of
    their distance from the start.
    """
    every = max(1, math.ceil(points / 8))
    turn = style // len(PALETTE)
    unfinished = {} if finished else {"linestyle": DASHED, "markerfacecolor": "none"}
    return {
        **mark(style),
        "linestyle": DASHES[(style + 2 * turn) % len(DASHES)],
        "linewidth": 1.6,
        "markersize": 5,
        "markevery": (int(shift * every), every),
        **unfinished,
    }


def _draw(axes: Any, series: Series, shift: float) -> None:
    """A line and its band; ``shift`` as in ``look``."""
    axes.plot(series.x, series.mean, **look(series.style, len(series.x), shift, series.finished))
    band = [(x, *ends) for x, ends in zip(series.x, series.band, strict=True) if ends]
    if band:
        colour = mark(series.style)["color"]
        axes.fill_between(*zip(*band, strict=True), color=colour, alpha=0.15, lw=0)
    points = [
        (x, y, words)
        for x, y, words in zip(series.x, series.mean, series.readouts, strict=False)
        if words and math.isfinite(y)
    ]
    if points:
        # Unseen, and wide enough for a finger; ``rolora.report.svg`` turns URLs into readouts.
        x, y, urls = zip(*points, strict=True)
        axes.scatter(x, y, s=150, color=INK, alpha=0, lw=0, urls=urls, zorder=3, clip_on=False)


@styled
def curves(
    series: Sequence[Series], title: str, xlabel: str, *, budget: float | None = None
) -> Figure:
    """Mean lines with bands; ``budget`` marks the x at which methods are compared.

    The y axis is logarithmic if the values span more than a factor of 50, as perplexities do.
    """
    figure, axes = new_figure(HEIGHT + 0.12 * max(0, len(series) - 8))
    for number, one in enumerate(series):
        _draw(axes, one, number / len(series))
    values = [v for one in series for v in one.mean if math.isfinite(v)]
    if values and min(values) > 0 and max(values) > 50 * min(values):
        _logarithmic(axes)
        title += " (log)"
    if budget is not None:
        axes.axvline(budget, color=INK, linewidth=1, linestyle=DOTTED)
    axes.xaxis.set_major_locator(_whole(6) if xlabel == "round" else MaxNLocator(5))
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    return figure


def _logarithmic(axes: Any) -> None:
    """A log axis with plain numbers: matplotlib's own labels need mathtext, which is off here."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


@styled
def aggregation_errors(series: Sequence[Series]) -> Figure:
    """Errors on a log axis; those up to ``ROUNDING``, zero included, lie in a band marked exact."""
    values = [value for one in series for value in one.mean]
    floor, top = ROUNDING / 100, 3 * max([1.0, *filter(math.isfinite, values)])
    figure, axes = new_figure()
    _logarithmic(axes)
    axes.set_ylim(floor, top)
    axes.axhspan(floor, ROUNDING, color=BAND, zorder=0)
    for number, one in enumerate(series):
        inside = floor * 100 ** ((number + 1) / (len(series) + 1))  # side by side in the band
        shown = [inside if value <= ROUNDING else value for value in one.mean]
        _draw(axes, replace(one, mean=shown, band=[None] * len(shown)), number / len(series))
    powers = [n for n in range(-5, 7) if 10**n < top]
    names = ["exact", *("10" + str(n).translate(SUPERSCRIPTS) for n in powers)]
    axes.set_yticks([floor * 10, *(10.0**n for n in powers)], names)
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_locator(_whole(6))
    axes.set_title("aggregation error (log)")
    axes.set_xlabel("round")
    return figure


@styled
def client_spread(
    clients: Mapping[str, Sequence[float]],
    worst: Mapping[str, float],
    styles: Mapping[str, int],
    metric: str,
) -> Figure:
    """A strip for each method: a dot for each value, its area the number of clients with it.

    A vertical bar marks the mean, a triangle the mean of the worst tenth, which is ``worst``.
    """
    most = max(max(Counter(round(v, 3) for v in own).values()) for own in clients.values())
    figure, axes = new_figure(0.7 + 0.52 * len(clients))
    for row, (method, values) in enumerate(clients.items()):
        colour = mark(styles[method])["color"]
        counts = Counter(round(value, 3) for value in values if math.isfinite(value))
        sizes = [max(4.0, 130 * count / most) for count in counts.values()]
        axes.scatter(list(counts), [row] * len(counts), s=sizes, color=colour, alpha=0.45, lw=0)
        mean, low = sum(values) / len(values), worst[method]
        axes.plot([mean, mean], [row - 0.24, row + 0.24], color=INK, linewidth=2.2)
        axes.plot([low], [row], marker="^", mfc="none", mec=INK, markersize=9, ls="none")
        words = f"{elided(method, 18)}: mean {mean:.3f}, worst tenth {low:.3f}"
        axes.text(0, row - 0.3, words, va="bottom", transform=axes.get_yaxis_transform())
    _rows(axes, len(clients) - 0.6, -0.85, f"{metric} of each client")
    return figure


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
            shown = mark(styles[method])
            if difference.interval is not None:
                axes.plot(difference.interval, [y, y], linewidth=2.4, color=shown["color"])
            axes.plot([difference.mean], [y], markersize=7, ls="none", **shown)
            axes.text(0, y - 0.23, elided(method, 40), va="bottom", transform=across)
            y += 1
    axes.axvline(0, color=INK, linewidth=1, linestyle=DOTTED)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _rows(axes, y - 0.5, -0.35, f"{metric}, minus that of {elided(reference, 24)}")
    return figure


@styled
def dots(rows: Mapping[str, Mapping[str, float]], styles: Mapping[str, int], metric: str) -> Figure:
    """``rows``: title -> method -> value, a line of markers each; ``styles`` as in a forest plot.

    A row's methods stand a little below each other, so that equal values are all seen.
    """
    figure, axes = new_figure(0.7 + 0.42 * len(rows))
    across = axes.get_yaxis_transform()
    for y, (title, own) in enumerate(rows.items()):
        axes.text(0, y - 0.22, elided(title, 40), va="bottom", transform=across)
        for method, value in own.items():
            shift = 0.3 * (styles[method] + 0.5) / len(styles) - 0.1
            axes.plot([value], [y + shift], markersize=6, ls="none", **mark(styles[method]))
    _rows(axes, len(rows) - 0.4, -0.7, metric)
    return figure


def _rows(axes: Any, bottom: float, top: float, xlabel: str) -> None:
    """Axes of rows that have their names inside, from the top."""
    axes.set_ylim(bottom, top)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(xlabel)


@styled
def split_figure(partition: Mapping[str, Any]) -> Figure:
    """The rows of each client as bars and, if rows have labels, each client's mix of them below."""
    clients = partition["clients"]
    totals: Counter[str] = Counter()
    for client in clients:
        totals.update(client["labels"])
    names = [name for name, _ in sorted(totals.items(), key=lambda item: (-item[1], item[0]))]
    rows = [[name] for name in names]
    if len(names) > MAX_LABELS:
        rows = [*rows[: MAX_LABELS - 1], names[MAX_LABELS - 1 :]]
    heights = [1.3, 0.22 * max(len(rows), 3)] if rows else [1]
    figure = Figure(figsize=(WIDTH, 2.2 + sum(heights[1:])), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    bars = panels[0][0]
    bars.bar(range(len(clients)), [c["num_examples"] for c in clients], 0.85, color=PALETTE[0])
    bars.set_title("training rows of each client")
    bars.yaxis.set_major_locator(_whole(4))
    bars.grid(visible=False, axis="x")
    bars.xaxis.set_major_locator(_whole(8))
    if rows:
        _label_mix(panels[1][0], clients, rows)
    panels[-1][0].set_xlabel(f"client (0 to {len(clients) - 1}, in order of id)")
    return figure


def _label_mix(axes: Any, clients: Sequence[Any], rows: Sequence[Sequence[str]]) -> None:
    """A row for each label, the last for several; opacity is its share of the client's rows."""
    shares = [
        [sum(c["labels"].get(n, 0) for n in names) / max(c["num_examples"], 1) for c in clients]
        for names in rows
    ]
    most = max(max(own) for own, names in zip(shares, rows, strict=True) if len(names) == 1)
    hue = to_rgb(PALETTE[0])
    pixels = [[(*hue, min(1.0, share / most)) for share in own] for own in shares]
    axes.imshow(pixels, aspect="auto", interpolation="none")
    shown = [elided(n[0], 16) if len(n) == 1 else f"{len(n)} others" for n in rows]
    axes.set_yticks(range(len(rows)), shown)
    axes.grid(visible=False)
    axes.set_title(f"share of client's rows (full colour: {most:.0%})")


def _whole(most: int) -> MaxNLocator:
    """At most ``most`` steps of 1, 2, 5, 10, ..."""
    return MaxNLocator(most, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def elided(text: str, width: int) -> str:
    """``text``, cut in the middle to at most ``width`` characters: names differ at their ends."""
    text = printable(text)
    if len(text) <= width:
        return text
    return text[: width // 2] + "…" + text[len(text) - (width - width // 2 - 1) :]


@styled
def key(style: int, finished: bool = True) -> Figure:
    """A method's line and marker alone, for a legend."""
    figure = Figure(figsize=(0.5, 0.17))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    line = {**look(style, finished=finished), "markevery": [1]}
    axes.plot([0, 1, 2], [0, 0, 0], clip_on=False, **line)
    axes.set_xlim(0, 2)
    return figure


def save_picture(figure: Figure, path: Path) -> None:
    """Save the figure on white: PNG or SVG by the suffix of ``path``, else ConfigError."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ConfigError(f"a picture is saved as .png or .svg, not as {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, rendered(figure, kind, facecolor="white"))


def rendered(figure: Figure, kind: str, **options: Any) -> bytes:
    """The bytes of the file: without a date, so that they are the same for the same figure."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a label in a script without a font
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=200, **options)
    return buffer.getvalue()
