"""The results of runs and comparisons as tables for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rolora.cli.printing import show, table
from rolora.report.narrative import (
    TITLES,
    cautions,
    conclusions,
    format_budget,
    format_difference,
    format_megabytes,
    format_metric,
    format_rounds,
)
from rolora.report.robustness import beside, format_cell
from rolora.results.export import unfinished
from rolora.results.paired import CONFIDENCE, differences
from rolora.results.published import Published, beside_published
from rolora.results.ranking import Ranking, rankings
from rolora.results.robustness import Cell, standings
from rolora.results.runs import (
    RunRecord,
    Runs,
    Summary,
    by_method,
    load_run,
    sorted_out,
    summarise,
)
from rolora.results.tuned import Tuning

if TYPE_CHECKING:
    from rolora.training.engine import Evaluation


def show_results(paths: Sequence[Path], as_json: bool, *more: str) -> None:
    """Print the summary of one or more run folders, and for people ``more``."""
    runs = sorted_out([load_run(path) for path in paths])
    rows = summarise(runs.finished)
    found = {
        "methods": [dataclasses.asdict(row) for row in rows],
        "unfinished": [unfinished(run, runs.metric) for run in runs.unfinished],
    }
    tables = [results_table(rows)] if rows else []
    show(as_json, found, *tables, *_unfinished(runs), *more)


def _unfinished(runs: Runs) -> list[RenderableType]:
    """A line for each run that has not ended; such runs are not part of any mean."""
    lines: list[RenderableType] = []
    for run in runs.unfinished:
        value = run.last(runs.metric)
        so_far = "" if value is None else f", {runs.metric} {format_metric(value)} so far"
        far = f"round {run.done} of {run.planned}{so_far}"
        lines.append(f"unfinished: {run.label} ({run.method}, seed {run.seed}), {far}")
    return lines


def show_result(path: Path, as_json: bool) -> None:
    """Print the summary of a finished run, and where its report and adapter are."""
    report, adapter = path / "report.html", path / "adapter"
    show_results([path], as_json, f"\nreport    {report}\nadapter   {adapter}")


def results_table(rows: Sequence[Summary]) -> Table:
    """A row for each method."""
    several = any(len(row.seeds) > 1 for row in rows)
    metric = (rows[0].metric if rows else "metric") + (" (mean ± sd)" if several else "")
    second = _second(rows)
    return table(
        [
            "method",
            metric,
            *second,
            "seeds" if several else "seed",
            "best",
            "MB up",
            "MB down",
            "agg. error",
            "s",
        ],
        [
            [
                row.method,
                format_metric(row.final_mean, row.final_sd),
                *_on_second(row, second),
                ",".join(map(str, row.seeds)),
                f"{row.best_mean:.3f}",
                f"{row.megabytes_up:.2f}",
                f"{row.megabytes_down:.2f}",
                "unknown" if row.aggregation_error is None else f"{row.aggregation_error:.1e}",
                f"{row.seconds:.0f}",
            ]
            for row in rows
        ],
    )


def _second(rows: Sequence[Summary]) -> list[str]:
    """The names of the metric on second test rows."""
    return list(dict.fromkeys(name for row in rows for name in row.second))


def _on_second(row: Summary, names: Sequence[str]) -> list[str]:
    return [format_metric(*row.second[name]) if name in row.second else "" for name in names]


def comparison_text(
    every: Sequence[RunRecord], tuning: Tuning | None = None, published: Published | None = None
) -> Group:
    """How settings were tuned, the ranking at each kind of equal budget, and published numbers."""
    sorted_runs = sorted_out(every)
    runs, metric = sorted_runs.finished, sorted_runs.metric
    methods = list(by_method(runs))
    parts: list[RenderableType] = [] if tuning is None else [*_tuning(tuning), ""]
    found = {one.axis: one for one in conclusions(runs)} if runs else {}
    width = max(map(len, methods), default=0)
    for ranking in rankings(runs, metric):
        if one := found.get(ranking.axis):
            title = f"{TITLES[ranking.axis]}, {format_budget(ranking)}: {one.headline}"
            parts += [_bold(title), _ranking(ranking, metric, methods[0], width), one.text, ""]
    rows = summarise(runs)
    if second := _second(rows):
        scores = [[row.method, *_on_second(row, second)] for row in rows]
        parts += [_bold("second test rows, at the end"), table(["method", *second], scores), ""]
    parts += _unfinished(sorted_runs)
    if published is not None and runs:
        parts += [*_published(published, runs), ""]
    notes = cautions(every, tuning.keys if tuning else ())
    return Group(*parts, *(f"note: {note}" for note in notes))


def robustness_text(cells: Sequence[Cell], metric: str) -> Group:
    """A table for each rule, with a row for each attack, and one over all attacks."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    parts: list[RenderableType] = []
    for rule in dict.fromkeys(cell.rule for cell in cells):
        own = [cell for cell in cells if cell.rule == rule]
        rows = [
            [attack, *(format_cell(cell) for cell in own if cell.attack == attack)]
            for attack in dict.fromkeys(cell.attack for cell in own)
        ]
        rows += [
            [f"{cell.attack} succeeded", *(_success(c) for c in own if c.attack == cell.attack)]
            for cell in own
            if cell.success is not None and cell.method == methods[0]
        ]
        parts += [_bold(f"{rule}: {metric}"), table(["attack", *methods], rows), ""]
    rows = [
        [
            one.rule,
            one.method,
            "" if one.lost is None else format_metric(one.lost),
            "reference" if one.method == methods[0] else beside(one),
            one.worst,
        ]
        for one in standings(cells, metric)
    ]
    head = ["rule", "method", "lost", f"better than {methods[0]}", "worst attack"]
    return Group(*parts, _bold("mean over all attacks"), table(head, rows, align="llrrl"))


def _success(cell: Cell) -> str:
    return "" if cell.success is None else f"{cell.success:.1%}"


def _bold(text: str) -> Text:
    return Text(text, style="bold")


def _ranking(ranking: Ranking, metric: str, reference: str, width: int) -> Table:
    """Every method's place at one budget, and its difference from the reference."""
    paired = differences(ranking, reference)
    minus = f"minus {reference}"
    if any(difference.interval for difference in paired.values()):
        minus += f" [{CONFIDENCE:.0%}]"
    rows = []
    for place in ranking.everyone:
        difference, spent = paired.get(place.method), place.spent
        rows.append(
            [
                place.method,
                format_metric(place.mean, place.sd),
                format_difference(difference) if difference else "",
                format_rounds(spent.round),
                format_megabytes(spent.up),
                format_megabytes(spent.down),
            ]
        )
    head = ["method", metric, minus, "round", "MB up", "MB down"]
    return table(head, rows, align="lrlr", widths=(width, 13, 23, 7, 7, 7))


def _tuning(tuning: Tuning) -> list[RenderableType]:
    seeds = ", ".join(map(str, tuning.seeds))
    title = f"tuned on seeds {seeds}, {tuning.rounds} rounds each, on {tuning.rows}"
    rows = [
        [
            tuned.method,
            ", ".join(f"{key} = {value}" for key, value in tuned.best.items()),
            "   ".join(f"{' '.join(t.values.values())}: {t.result}" for t in tuned.trials),
        ]
        for tuned in tuning.methods
    ]
    notes = [f"note: {note}" for tuned in tuning.methods for note in tuned.cautions]
    head = ["method", "best", f"{tuning.metric} with each value"]
    return [_bold(title), table(head, rows, align="l"), *notes]


def _published(published: Published, runs: Sequence[RunRecord]) -> list[RenderableType]:
    rows = [[r.method, *r.cells(published.digits)] for r in beside_published(published, runs)]
    title = f"{published.metric} beside {published.source}: {published.setting}"
    return [_bold(title), table(["method", f"ours, {published.unit}", "published"], rows)]


def scores(found: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON: its metrics and, where there are labels, the recall of each."""
    return {**found.metrics, **({"recall": found.recall} if found.recall else {})}


def sets_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    """The metrics of several sets of rows, and their plain mean."""
    names = list(next(iter(found.values())))
    lines = [[name, *(f"{metrics[key]:.4f}" for key in names)] for name, metrics in found.items()]
    means = [sum(metrics[key] for metrics in found.values()) / len(found) for key in names]
    rows = [*lines, ["mean", *(f"{mean:.4f}" for mean in means)]]
    return table(["rows", *names], rows, align="r")
