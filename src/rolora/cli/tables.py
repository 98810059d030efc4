"""Results as tables and text for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rolora.cli.printing import out_console, print_cells, print_json, table

if TYPE_CHECKING:
    from rolora.demo.sources import Source
    from rolora.plan.method_table import MethodRow
    from rolora.plan.needs import MethodPlan, Plan
    from rolora.results.published import Published
    from rolora.results.ranking import Ranking
    from rolora.results.runs import RunRecord, Summary
    from rolora.results.tuned import Tuning
    from rolora.run.harness import Score

METHODS_LEGEND = """\
A, B   lora_A and lora_B ("B, A": alternating); the task head goes with them
Δ      a change of the base weights, kept beside them
keeps  what a client trains and never sends
exact  the server's product is the mean of the clients' products
ranks  clients may have different ranks
sums   the server needs only the sum of the updates

For everything, including the options' defaults: rolora methods --json"""


def print_runs(paths: Sequence[Path], as_json: bool) -> None:
    """The summary of one or more run folders."""
    from rolora.results.runs import load_run, summarise

    rows = summarise([load_run(path) for path in paths])
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        out_console.print(results_table(rows))


def print_results(path: Path, as_json: bool) -> None:
    """The summary of a finished run, and where its report and adapter are."""
    print_runs([path], as_json)
    if not as_json:
        out_console.print(f"\nreport    {path / 'report.html'}")
        out_console.print(f"adapter   {path / 'adapter'}")


def results_table(rows: Sequence[Summary]) -> Table:
    """A row for each method."""
    metric = f"{rows[0].metric if rows else 'metric'} (mean ± sd)"
    return table(
        ["method", metric, "seeds", "best", "MB up", "MB down", "agg. error", "s"],
        [
            [
                row.method,
                _mean_sd(row.final_mean, row.final_sd),
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


def _mean_sd(mean: float, sd: float | None) -> str:
    return f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.3f}")


def comparison_text(
    every: Sequence[RunRecord], tuning: Tuning | None = None, published: Published | None = None
) -> Group:
    """How settings were tuned, the ranking at each kind of equal budget, and published numbers."""
    from rolora.report.narrative import TITLES, cautions, conclusions, format_budget
    from rolora.results.ranking import rankings
    from rolora.results.runs import by_method, not_diverged, primary_metric

    runs = not_diverged(every)
    metric, methods = primary_metric(runs), list(by_method(runs))
    parts: list[RenderableType] = [] if tuning is None else [*_tuning(tuning), ""]
    for ranking, found in zip(rankings(runs, metric), conclusions(runs), strict=False):
        title = f"{TITLES[ranking.axis]}, {format_budget(ranking)}: {found.headline}"
        width = max(map(len, methods))
        parts += [_bold(title), _ranking(ranking, metric, methods[0], width), found.text, ""]
    if published is not None:
        parts += [*_published(published, runs), ""]
    notes = cautions(every, tuning.keys if tuning else ())
    return Group(*parts, *(f"note: {note}" for note in notes))


def _bold(text: str) -> Text:
    return Text(text, style="bold")


def _ranking(ranking: Ranking, metric: str, reference: str, width: int) -> Table:
    """Every method's place at one budget, and its difference from the reference."""
    from rolora.report import narrative
    from rolora.results.paired import CONFIDENCE, differences

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
                narrative.format_metric(place.mean, place.sd),
                narrative.format_difference(difference) if difference else "",
                narrative.format_rounds(spent.round),
                narrative.format_megabytes(spent.up),
                narrative.format_megabytes(spent.down),
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
    from rolora.results.published import beside_published

    rows = [[r.method, *r.cells(published.digits)] for r in beside_published(published, runs)]
    title = f"{published.metric} beside {published.source}: {published.setting}"
    return [_bold(title), table(["method", f"ours, {published.unit}", "published"], rows)]


def split_table(split: Mapping[str, Any], test_rows: int) -> Group:
    """The rows of each client, and of each label if there are at most 12 labels."""
    clients = split["clients"]
    labels = sorted({label for client in clients for label in client["labels"]})
    shown = labels if len(labels) <= 12 else []
    rows = [
        [c["id"], str(c["num_examples"]), *(str(c["labels"].get(label, "")) for label in shown)]
        for c in clients
    ]
    total = sum(client["num_examples"] for client in clients)
    note = f"\nnote: {split['note']}" if split["note"] else ""
    summary = f"\n{total} training rows, {test_rows} test rows{note}"
    return Group(table(["client", "rows", *shown], rows), summary)


def masked_text(rows: Iterable[Sequence[tuple[str, bool]]]) -> Text:
    """Each row in pieces; those that are trained on stand between ⟦ and ⟧."""
    text = Text()
    for row, pieces in enumerate(rows, start=1):
        text.append(f"\nrow {row}; the text between ⟦ and ⟧ is trained on:\n")
        for piece, trained in pieces:
            text.append(*((f"⟦{piece}⟧", "bold green") if trained else (piece, "dim")))
        text.append("\n")
    return text


def print_methods(rows: Sequence[MethodRow]) -> None:
    """What each method trains and sends, what it supports, and its paper."""
    cells = []
    for row in rows:
        sends = row.up != ("nothing", "nothing")
        cells.append(
            [
                row.name,
                roles_cell(row.trains),
                roles_cell(row.up),
                roles_cell(row.down),
                roles_cell((row.keeps, row.keeps)),
                yes_or_no(row.exact),
                yes_or_no(row.ranks if sends else None),
                yes_or_no(row.secure if sends else None),
                ", ".join(option.partition("=")[0] for option in row.options),
                row.paper.removeprefix("arXiv:"),
            ]
        )
    head = ["method", "trains", "up", "down", "keeps", "exact", "ranks", "sums", "options", "arXiv"]
    made = table(head, cells, align="l")
    made.collapse_padding = True
    out_console.print(made)
    out_console.print(f"\n{METHODS_LEGEND}")


def roles_cell(rounds: tuple[str, str]) -> str:
    """Parts of the adapter, or two that alternate; Δ is the delta."""
    return ", ".join(dict.fromkeys(rounds)).replace("delta", "Δ").replace("nothing", "–")


def yes_or_no(value: bool | None) -> str:
    """A fact; a dash if it does not apply."""
    return "–" if value is None else "yes" if value else "no"


def print_sets(found: Mapping[str, Mapping[str, float]]) -> None:
    """The metrics of several sets of rows, and their plain mean."""
    names = list(next(iter(found.values())))
    lines = [[name, *(f"{metrics[key]:.4f}" for key in names)] for name, metrics in found.items()]
    means = [sum(metrics[key] for metrics in found.values()) / len(found) for key in names]
    print_cells([["rows", *names], *lines, ["mean", *(f"{mean:.4f}" for mean in means)]])


def print_scores(scores: Sequence[Score]) -> None:
    """What the harness measured, a line for each task and metric."""
    cells = [["task", "metric", "value", "± stderr", "rows"]]
    for score in scores:
        spread = "" if score.stderr is None else f"{score.stderr:.4f}"
        cells.append([score.task, score.metric, f"{score.value:.4f}", spread, str(score.rows)])
    print_cells(cells)


def print_sources(sources: Mapping[str, Source], as_json: bool) -> None:
    """What can be fetched, and how many megabytes are downloaded for it."""
    if as_json:
        found = {n: {"what": s.what, "megabytes": s.package.megabytes} for n, s in sources.items()}
        print_json(found)
        return
    rows = [
        [
            name,
            str(s.package.megabytes),
            s.what,
            f"{s.package.client}: {s.package.name} {s.package.version}",
        ]
        for name, s in sources.items()
    ]
    out_console.print(table(["name", "MB", "what it is", "from"], rows, align="lrl"))


def print_plan(plan: Plan) -> None:
    """A plan: the model and the clients, then each kind of round, then the whole run."""
    part = "all" if plan.cohort == plan.clients else f"{plan.cohort}"
    steps = "an unknown number of steps" if plan.steps is None else f"{plan.steps:,.4g} steps"
    rows = "" if plan.rows is None else f" with {plan.rows:,} rows"
    out_console.print(
        f"model      {plan.model}, {_short(plan.parameters)} parameters in {plan.dtype}: "
        f"{_bytes(plan.weights)} in memory, {_bytes(plan.stored)} on disk "
        f"(configuration from {plan.source})\n"
        f"clients    {plan.clients}{rows}, {part} in each of {plan.rounds} rounds, "
        f"{steps} of about {plan.tokens:,} tokens\n"
        f"cache      {_bytes(plan.cache)} for layers below the adapters\n"
    )
    rounds = [each for method in plan.methods for each in method.rounds]
    head = [f"{method.name}: {each.factors}" for method in plan.methods for each in method.rounds]
    lines = {
        "parameters trained": [f"{each.trained:,}" for each in rounds],
        "one client sends": [_bytes(each.up) for each in rounds],
        "one client receives": [_bytes(each.down) for each in rounds],
        "one client's step, FLOPs": [_short(each.flops) for each in rounds],
        "activations kept": [_bytes(each.activations) for each in rounds],
        "optimiser state": [_bytes(each.optimizer) for each in rounds],
        "memory at the peak": [_bytes(each.peak) for each in rounds],
    }
    out_console.print(_plan_table(head, lines))
    out_console.print()
    out_console.print(_whole_runs(plan.methods))
    for note in plan.notes:
        out_console.print(f"note: {note}")


def _whole_runs(methods: Sequence[MethodPlan]) -> Table:
    def mean(method: MethodPlan, way: str) -> str:
        return _bytes(sum(getattr(each, way) for each in method.rounds) / len(method.rounds))

    def total(method: MethodPlan, count: float | None) -> str:
        return ("" if method.counted else "about ") + _bytes(count)

    roles = sorted({role for method in methods for role in method.parameters})
    lines = {
        **{f"parameters of {r}": [f"{m.parameters.get(r, 0):,}" for m in methods] for r in roles},
        "clients trained at once": [str(method.bank) for method in methods],
        "their adapters": [_bytes(method.adapters) for method in methods],
        "one client sends, mean": [mean(method, "up") for method in methods],
        "one client receives, mean": [mean(method, "down") for method in methods],
        "receives in its first round": [_bytes(method.first_down) for method in methods],
        "all clients send": [total(method, method.up) for method in methods],
        "all clients receive": [total(method, method.down) for method in methods],
        "training, FLOPs": [_short(method.flops) for method in methods],
        "checkpoints and adapter": [_bytes(method.checkpoints) for method in methods],
        "what clients keep, on disk": [_bytes(method.personal) for method in methods],
    }
    return _plan_table([method.name for method in methods], lines)


def _plan_table(columns: Sequence[str], lines: Mapping[str, Sequence[str]]) -> Table:
    rows = [[what, *values] for what, values in lines.items()]
    return table(["", *columns], rows, widths=(max(map(len, lines)),))


def _bytes(count: float | None) -> str:
    """'1.57 MB', in powers of 1000."""
    return "unknown" if count is None else f"{_short(count)}B"


def _short(count: float | None) -> str:
    """'1.57 M': three digits and a power of 1000."""
    if count is None:
        return "unknown"
    power = 0
    while abs(count) >= 1000 and power < 6:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {' kMGTPE'[power].strip()}".strip() + ("" if power else " ")
