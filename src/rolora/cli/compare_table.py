"""A comparison as people read it in a terminal: one block for each kind of equal budget."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rolora.report import narrative
from rolora.report.narrative import TITLES, apart, budget, megabytes, score, tenths
from rolora.results.paired import CONFIDENCE, differences
from rolora.results.published import Published, beside
from rolora.results.ranking import Ranking, standings
from rolora.results.runs import Run, by_method, primary_metric, sound
from rolora.results.tuned import Tuning


def comparison_text(
    every: Sequence[Run], tuning: Tuning | None = None, published: Published | None = None
) -> Group:
    """What was tuned, who is ahead at equal rounds, bytes and compute, and what a paper says."""
    runs = sound(every)
    metric, reference = primary_metric(runs), next(iter(by_method(runs)))
    parts: list[RenderableType] = [] if tuning is None else [*_tuning(tuning), ""]
    for at, said in zip(standings(runs, metric), narrative.verdicts(runs), strict=False):
        parts += [Text(f"{TITLES[at.axis]}, {budget(at)}: {said.headline}", style="bold")]
        parts += [
            _block(at, metric, reference, max(map(len, by_method(runs)))),
            Text(said.text),
            "",
        ]
    if published is not None:
        parts += [*_published(published, runs), ""]
    parts += [
        Text(f"note: {note}") for note in narrative.cautions(every, tuning.keys if tuning else ())
    ]
    return Group(*parts)


def _block(at: Ranking, metric: str, reference: str, width: int) -> Table:
    """Everybody's place at one budget, and how far from the reference."""
    table = _table()
    table.add_column("method", min_width=width)
    table.add_column(metric, justify="right", min_width=13)
    paired = differences(at, reference)
    interval = any(one.interval for one in paired.values())
    named = f"minus {reference}" + (f" [{CONFIDENCE:.0%}]" if interval else "")
    table.add_column(Text(named), min_width=23)
    for name in ("round", "MB up", "MB down"):
        table.add_column(name, justify="right", min_width=7)
    for place in (*at.places, *at.references):
        found, spent = paired.get(place.method), place.spent
        table.add_row(
            Text(place.method),
            score(place.mean, place.sd),
            Text(apart(found) if found else ""),
            tenths(spent.round),
            megabytes(spent.up),
            megabytes(spent.down),
        )
    return table


def _tuning(tuning: Tuning) -> list[RenderableType]:
    seeds = ", ".join(map(str, tuning.seeds))
    table = _table()
    table.add_column("method")
    table.add_column("best")
    table.add_column(f"{tuning.metric} with each value")
    for one in tuning.methods:
        scores = "   ".join(f"{' '.join(t.values.values())}: {t.said}" for t in one.trials)
        table.add_row(Text(one.method), Text(one.said), Text(scores))
    title = f"tuned on seeds {seeds}, {tuning.rounds} rounds each, on {tuning.rows}"
    notes = [Text(f"note: {note}") for one in tuning.methods for note in one.cautions]
    return [Text(title, style="bold"), table, *notes]


def _published(published: Published, runs: Sequence[Run]) -> list[RenderableType]:
    table = _table()
    for name in ("method", f"ours, {published.unit}", "published"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in beside(published, runs):
        table.add_row(Text(row.method), *row.said(published.digits))
    title = f"{published.metric} beside {published.source}: {published.setting}"
    return [Text(title, style="bold"), table]


def _table() -> Table:
    return Table(box=None, header_style="bold", pad_edge=False)
