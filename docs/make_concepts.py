"""Draw the two pictures of docs/concepts.md: python docs/make_concepts.py

A product B·A of two numbers is an area: A wide and B high.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rolora.files import write_file
from rolora.report.figures import INK, PALETTE, WIDTH, rendered, styled

APART, ALTERNATING = (
    Path(__file__).with_name(f"concepts-{name}.svg") for name in ("apart", "alternating")
)
Pair = tuple[float, float]  # A, B
CLIENT, EXACT, WRONG = PALETTE[4], PALETTE[2], PALETTE[1]
EDGE = 3.6  # of a panel; the longest side is 3


def area(axes: Any, pair: Pair, colour: str, title: str, below: str) -> None:
    """One product as a rectangle, with its sides and its area."""
    a, b = pair
    left = (EDGE - a) / 2
    axes.add_patch(Rectangle((left, 0), a, b, facecolor=colour, edgecolor=INK, alpha=0.8))
    axes.text(EDGE / 2, b / 2, f"{a * b:g}", ha="center", va="center", fontsize=16)
    axes.text(EDGE / 2, -0.12, f"A = {a:g}", ha="center", va="top")
    axes.text(left - 0.15, b / 2, f"B = {b:g}", ha="right", va="center", rotation=90)
    axes.text(EDGE / 2, EDGE - 0.4, title, ha="center", weight="bold")
    axes.text(EDGE / 2, -0.75, below, ha="center", va="top")
    axes.set(xlim=(-0.6, EDGE + 0.6), ylim=(-1.3, EDGE), aspect="equal")
    axes.axis("off")


def mean(pairs: tuple[Pair, Pair]) -> Pair:
    """A and B averaged, each by itself."""
    (a, b), (c, d) = pairs
    return (a + c) / 2, (b + d) / 2


def row(figures: Any, pairs: tuple[Pair, Pair], title: str, below: str) -> None:
    """Two clients, and what averaging their factors gives beside the mean of their products."""
    for number, (axes, pair) in enumerate(zip(figures, pairs, strict=False), 1):
        area(axes, pair, CLIENT, f"client {number}{title}", below)
    averaged = mean(pairs)
    wanted = sum(a * b for a, b in pairs) / 2
    right = averaged[0] * averaged[1] == wanted
    told = f"{'=' if right else '≠'} mean of the areas, {wanted:g}"
    area(figures[2], averaged, EXACT if right else WRONG, f"server{title}", told)


@styled
def apart() -> Figure:
    """Both factors averaged separately."""
    figure = Figure(figsize=(1.6 * WIDTH, 3.0), layout="constrained")
    row(figure.subplots(1, 3), ((1, 3), (3, 1)), "", "A and B trained")
    return figure


@styled
def alternating() -> Figure:
    """One round of B, then one of A: the same factor at all clients, and an exact mean."""
    figure = Figure(figsize=(1.6 * WIDTH, 6.0), layout="constrained")
    above, below = figure.subplots(2, 3)
    row(above, ((2, 1), (2, 3)), ", round 1", "A frozen, B trained")
    row(below, ((1, 2), (3, 2)), ", round 2", "B frozen, A trained")
    return figure


PICTURES = {apart: APART, alternating: ALTERNATING}


def picture(draw: Callable[[], Figure]) -> bytes:
    """The file's bytes: an SVG on white."""
    return rendered(draw(), "svg", facecolor="white")


if __name__ == "__main__":
    for draw, file in PICTURES.items():
        write_file(file, picture(draw))
