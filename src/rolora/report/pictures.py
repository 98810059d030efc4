"""The figures of the page, each with its title, legend and caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rolora.report import figures, narrative
from rolora.report.figures import Series
from rolora.report.forest_plot import forest
from rolora.report.narrative import Verdict
from rolora.report.svg import inline_svg
from rolora.results.paired import CONFIDENCE
from rolora.results.ranking import Ranking
from rolora.results.runs import Run, mean_sd
from rolora.tasks.registry import higher_is_better

Groups = Mapping[str, Sequence[Run]]
Points = dict[int, tuple[float, float]]


@dataclass(frozen=True)
class Picture:
    """A figure of the page; ``methods`` are what its legend names."""

    title: str
    svg: str
    caption: str
    methods: tuple[str, ...] = ()


def pictures(
    runs: Sequence[Run],
    groups: Groups,
    metric: str,
    equal_upload: Ranking | None,
    verdicts: Sequence[Verdict],
) -> list[Picture]:
    """All figures that these runs have numbers for."""
    makers = (
        _metric_by_round(groups, metric),
        _metric_by_megabyte(groups, metric, equal_upload),
        _differences(groups, metric, verdicts),
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
    def points(run: Run) -> Points:
        return {int(point.round): (point.round, point.value) for point in run.curve(metric)}

    found = _series(groups, points)
    svg = inline_svg(
        figures.curves(list(found.values()), metric, "round"),
        "rounds",
        f"{metric} against rounds for {', '.join(found)}",
    )
    caption = f"{narrative.direction(metric).capitalize()}.{_band(groups)}"
    caption += _missing(groups, found, "its seeds share no evaluated round")
    return Picture(f"{metric} against rounds", svg, caption, tuple(found))


def _metric_by_megabyte(groups: Groups, metric: str, equal: Ranking | None) -> Picture | None:
    def points(run: Run) -> Points:
        curve = run.curve(metric)
        return {int(p.round): (p.up, p.value) for p in curve} if curve[-1].up else {}

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
        caption += f" Dotted: {narrative.megabytes(mark)} MB, the most that all methods have sent."
    caption += _missing(groups, found, "it sends nothing")
    return Picture(f"{metric} against megabytes sent", svg, caption, tuple(found))


def _differences(groups: Groups, metric: str, verdicts: Sequence[Verdict]) -> Picture | None:
    found = {one.title: one.differences for one in verdicts if one.differences}
    if not found:
        return None
    reference = next(own.reference for each in found.values() for own in each.values())
    styles = {method: style for style, method in enumerate(groups)}
    svg = inline_svg(
        forest(found, styles, metric, reference),
        "differences",
        f"difference in {metric} from {reference} at each kind of equal budget",
    )
    several = [one.interval for each in found.values() for one in each.values()]
    caption = f"Each method minus {reference}, seed by seed, at an equal budget of each kind. "
    if any(several):
        caption += f"Bars: {CONFIDENCE:.0%} confidence intervals of the mean difference; one that "
        caption += "leaves out zero is a difference that these seeds show."
    else:
        caption += f"{narrative.NO_INTERVAL.capitalize()}."
    return Picture(f"Difference from {reference}", svg, caption)


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
    worst = min if higher_is_better(metric) else max
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
