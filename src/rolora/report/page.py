"""Runs as one HTML page that opens offline: the reading in words, tables, figures, settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tomli_w

from rolora.durable import write_file
from rolora.errors import ConfigError
from rolora.report import figures, reading
from rolora.report.figures import Series
from rolora.report.summary import (
    Run,
    Standing,
    by_method,
    differing,
    load_run,
    mean_sd,
    primary_metric,
    standing,
    summarise,
)
from rolora.report.svg import inline_svg
from rolora.tasks import HIGHER_IS_BETTER

Groups = Mapping[str, Sequence[Run]]
Points = dict[int, tuple[float, float]]


@dataclass(frozen=True)
class Picture:
    """A figure of the page; ``methods`` are what its legend names."""

    title: str
    svg: str
    caption: str
    methods: tuple[str, ...] = ()


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained HTML page about ``runs`` to ``out``, and return ``out``.

    The same run folders give the same bytes. Raises ConfigError or DataError (see ``load_run`` and
    ``primary_metric``).
    """
    if not runs:
        raise ConfigError("a report needs at least one run folder")
    folders = dict.fromkeys(Path(run).resolve() for run in runs)
    page = render([load_run(folder) for folder in folders])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page)
    return out


def render(runs: Sequence[Run]) -> str:
    """The page's HTML."""
    metric = primary_metric(runs)
    groups = by_method(runs)
    rows = summarise(runs)
    names = {run.name for run in runs}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"score": reading.score, "megabytes": reading.megabytes}
    return environment.get_template("page.html.j2").render(
        title=names.pop() if len(names) == 1 else f"{len(groups)} methods compared",
        about=reading.about(runs),
        verdicts=reading.verdicts(runs),
        cautions=reading.cautions(runs),
        metric=metric,
        direction=reading.direction(metric),
        rows=rows,
        rounding=figures.ROUNDING,
        palette=list(enumerate(figures.PALETTE)),
        keys={m: (n, inline_svg(figures.key(n), f"key-{n}")) for n, m in enumerate(groups)},
        pictures=_pictures(runs, groups, metric, standing(runs, metric, "megabytes")),
        rejected=_rejected(runs),
        configs=[(run.label, tomli_w.dumps(run.config)) for run in runs],
        **_origins(runs),
    )


def _pictures(
    runs: Sequence[Run], groups: Groups, metric: str, equal_upload: Standing | None
) -> list[Picture]:
    makers = (
        _metric_by_round(groups, metric),
        _metric_by_megabyte(groups, metric, equal_upload),
        _aggregation_error(groups),
        _client_spread(groups, metric),
        _training_loss(groups),
        *_splits(runs),
    )
    return [picture for picture in makers if picture is not None]


def _series(groups: Groups, points: Callable[[Run], Points]) -> dict[str, Series]:
    """Method -> its mean line, over the rounds that all of its seeds have."""
    found = {}
    for style, (method, runs) in enumerate(groups.items()):
        each = [points(run) for run in runs]
        rounds = sorted(set.intersection(*(set(own) for own in each)))
        spread = [mean_sd([own[round][1] for own in each]) for round in rounds]
        if rounds:
            xs = [mean_sd([own[round][0] for own in each])[0] for round in rounds]
            found[method] = Series(style, xs, [mean for mean, _ in spread], [s for _, s in spread])
    return found


def _missing(groups: Groups, found: Mapping[str, Any], why: str) -> str:
    absent = [method for method in groups if method not in found]
    return f" Not drawn, because {why}: {', '.join(absent)}." if absent else ""


def _band(groups: Groups) -> str:
    many = any(len(runs) > 1 for runs in groups.values())
    return " Lines are means over seeds, bands one standard deviation." if many else ""


def _metric_by_round(groups: Groups, metric: str) -> Picture:
    found = _series(groups, lambda run: {r: (r, value) for r, _, value in run.curve(metric)})
    svg = inline_svg(
        figures.curves(list(found.values()), metric, "round"),
        "rounds",
        f"{metric} against rounds for {', '.join(found)}",
    )
    caption = f"{reading.direction(metric).capitalize()}.{_band(groups)}"
    caption += _missing(groups, found, "its seeds share no evaluated round")
    return Picture(f"{metric} against rounds", svg, caption, tuple(found))


def _metric_by_megabyte(groups: Groups, metric: str, equal: Standing | None) -> Picture | None:
    def points(run: Run) -> Points:
        curve = run.curve(metric)
        return {r: (sent, value) for r, sent, value in curve} if curve[-1][1] else {}

    found = _series(groups, points)
    if not found:
        return None
    mark = equal.budget if equal is not None and len(equal.places) > 1 else None
    svg = inline_svg(
        figures.curves(list(found.values()), metric, "MB sent up, all clients", budget=mark),
        "megabytes",
        f"{metric} against megabytes sent up for {', '.join(found)}",
    )
    caption = "The fair axis where sending is what costs: all that clients have uploaded so far."
    if mark is not None:
        caption += f" Dotted: {reading.megabytes(mark)} MB, the most that every run has sent."
    caption += _missing(groups, found, "it sends nothing")
    return Picture(f"{metric} against megabytes sent", svg, caption, tuple(found))


def _aggregation_error(groups: Groups) -> Picture | None:
    def points(run: Run) -> Points:
        errors = ((line["round"], line["aggregation_error"]) for line in run.rounds)
        return {round: (round, error) for round, error in errors if error is not None}

    found = _series(groups, points)
    if not found:
        return None
    svg = inline_svg(
        figures.aggregation_errors(list(found.values())),
        "errors",
        f"aggregation error of each round for {', '.join(found)}",
    )
    caption = (
        "How far the server's B·A is from the mean of the clients' B·A, relative to that mean. In "
        "the grey band the average is exact; lines there are set apart only to be "
        "seen." + _missing(groups, found, "the server cannot know it")
    )
    return Picture("Aggregation error", svg, caption, tuple(found))


def _client_spread(groups: Groups, metric: str) -> Picture | None:
    clients = {}
    for method, runs in groups.items():
        last = [[line for line in run.rounds if line["metrics"]][-1] for run in runs]
        held = [own for line in last for own in line["client_metrics"].values()]
        if values := [own[metric] for own in held if metric in own]:
            clients[method] = values
    if not clients:
        return None
    styles = {method: style for style, method in enumerate(groups)}
    worst = min if HIGHER_IS_BETTER[metric] else max
    svg = inline_svg(
        figures.client_spread(clients, styles, metric, worst),
        "clients",
        f"{metric} of each client for {', '.join(clients)}",
    )
    caption = (
        "On each client's own held-out rows, at the last evaluation, clients of all seeds together."
        " A dot's area is the number of clients; bar: mean; triangle: worst client."
        + _missing(groups, clients, "its clients were not measured")
    )
    return Picture(f"{metric} of each client", svg, caption)


def _training_loss(groups: Groups) -> Picture | None:
    def points(run: Run) -> Points:
        losses = ((line["round"], line["loss"]) for line in run.rounds)
        return {round: (round, loss) for round, loss in losses if loss is not None}

    found = _series(groups, points)
    if not found:
        return None
    figure = figures.curves(list(found.values()), "training loss", "round")
    svg = inline_svg(figure, "loss", f"training loss of each round for {', '.join(found)}")
    caption = f"Mean over the round's clients, weighted by their rows.{_band(groups)}"
    return Picture("Training loss", svg, caption, tuple(found))


def _splits(runs: Sequence[Run]) -> list[Picture]:
    """One picture for each split there is: seeds differ in it, methods do not."""
    found: list[list[Run]] = []
    for run in runs:
        same = next((own for own in found if own[0].partition == run.partition), None)
        found.append([run]) if same is None else same.append(run)
    return [_split(own, number, len(found)) for number, own in enumerate(found)]


def _split(runs: Sequence[Run], number: int, of: int) -> Picture:
    partition = runs[0].partition
    sizes = [client["num_examples"] for client in partition["clients"]]
    svg = inline_svg(
        figures.split_figure(partition),
        f"split-{number}",
        f"training rows of {len(sizes)} clients, {min(sizes)} to {max(sizes)} rows each",
    )
    caption = f"{len(sizes)} clients hold {min(sizes):,} to {max(sizes):,} rows each."
    for said in (partition.get("note"), _dropped(partition.get("dropped", 0))):
        caption += f" {said[0].upper()}{said[1:]}." if said else ""
    if of > 1:
        caption += f" The split of {', '.join(run.label for run in runs)}."
    return Picture(
        "Who holds which rows" + (f" ({number + 1} of {of})" if of > 1 else ""), svg, caption
    )


def _dropped(rows: int) -> str:
    return f"{rows:,} rows are held by no client" if rows else ""


def _rejected(runs: Sequence[Run]) -> list[tuple[str, str, str, str]]:
    """(run, client, reason, rounds) of every kind of refusal."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for run in runs:
        for line in run.rounds:
            for client, reason in line["rejected"].items():
                found.setdefault((run.label, client, reason), []).append(line["round"])
    return [(*what, ", ".join(map(str, rounds))) for what, rounds in found.items()]


def _origins(runs: Sequence[Run]) -> dict[str, Any]:
    """What each run was made with: ``shared`` by all, and a table of the rest, one row a run.

    The folder it ran in is left out: a page is made to be shown to others.
    """
    tables = []
    for run in runs:
        made = {key: value for key, value in run.provenance.items() if key != "root"}
        tables.append({**made.pop("versions", {}), **made})
    names = list(dict.fromkeys(name for table in tables for name in table))
    apart = differing(tables)
    rows = zip(runs, tables, strict=True)
    return {
        "shared": [f"{name} {tables[0][name]}" for name in names if name not in apart],
        "origin_names": apart,
        "origins": [(run.label, [table.get(n, "") for n in apart]) for run, table in rows],
    }
