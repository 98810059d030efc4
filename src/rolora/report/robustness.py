"""Methods under attacks as one HTML page that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rolora.attacks import NO_ATTACK
from rolora.files import write_file
from rolora.report import figures, narrative
from rolora.report.page import templates
from rolora.report.svg import inline_svg
from rolora.results.robustness import Cell, Standing, standings


def write_robustness(cells: Sequence[Cell], metric: str, bad: int, name: str, out: Path) -> Path:
    """Write a self-contained page about these cells to ``out``, and return ``out``.

    ``bad`` clients attacked the others; ``name`` is the configuration's.
    """
    rules = list(dict.fromkeys(cell.rule for cell in cells))
    attacks = list(dict.fromkeys(cell.attack for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    styles = {method: number for number, method in enumerate(methods)}
    parts = []
    for number, rule in enumerate(rules):
        own = {(c.attack, c.method): c for c in cells if c.rule == rule}
        shown = {
            attack: {m: mean for m in methods if (mean := own[attack, m].mean) is not None}
            for attack in attacks
        }
        drawn = figures.dots(shown, styles, metric)
        about = f"{metric} under each attack, rule {rule}"
        parts.append((rule, own, inline_svg(drawn, f"rule-{number}", about)))
    page = (
        templates()
        .get_template("robustness.html.j2")
        .render(
            title=f"{name}: methods under attack",
            about=describe(cells, bad),
            metric=metric,
            direction=narrative.direction(metric),
            attacks=attacks,
            methods=methods,
            parts=parts,
            standings=standings(cells, metric),
            beside=beside,
            cell=format_cell,
            reference=methods[0],
            successful=list(dict.fromkeys(c.attack for c in cells if c.success is not None)),
            keys={m: (n, inline_svg(figures.key(n), f"key-{n}")) for m, n in styles.items()},
            no_attack=NO_ATTACK,
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page)
    return out


def describe(cells: Sequence[Cell], bad: int) -> str:
    """What was run, in a sentence."""
    seeds = sorted({seed for cell in cells for seed in cell.seeds})
    attacks = len({cell.attack for cell in cells} - {NO_ATTACK})
    who = "1 client attacks" if bad == 1 else f"{bad} clients attack"
    return (
        f"{who} the others, by {attacks} attack{'' if attacks == 1 else 's'}, each by itself. "
        f"Seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}; the bad clients of a "
        "seed are the same in all its runs."
    )


def format_cell(cell: Cell) -> str:
    """'0.812 ± 0.004', or how many runs diverged."""
    if cell.mean is None:
        return (
            "diverged" if len(cell.seeds) == 1 else f"{cell.diverged} of {len(cell.seeds)} diverged"
        )
    return narrative.format_metric(cell.mean, cell.sd)


def beside(standing: Standing) -> str:
    """'+0.018 [+0.006, +0.030]': better than the reference by so much; '' where unknown."""
    if standing.beside is None:
        return ""
    return narrative.format_mean(standing.beside, standing.interval)
