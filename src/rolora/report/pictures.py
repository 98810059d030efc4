"""The figures of the page, each with its title, legend and caption."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from rolora.report import figures, narrative
from rolora.report.figures import Series
from rolora.report.narrative import Conclusion
from rolora.report.svg import inline_svg
from rolora.results.paired import CONFIDENCE
from rolora.results.ranking import rank_methods
from rolora.results.runs import RunRecord, mean_sd
from rolora.tasks.registry import higher_is_better

Groups = Mapping[str, Sequence[RunRecord]]
Points = dict[int, tuple[float, float]]  # round -> (x, y)


@dataclass(frozen=True)
class Picture:
    """A figure of the page; ``methods`` are the entries of its legend.

    ``name`` is the id of its SVG element, ``description`` what a screen reader announces.
    """

    name: str
    title: str
    description: str
    figure: Figure
    caption: str
    methods: tuple[str, ...] = ()

    @property
    def svg(self) -> str:
        """The figure as an SVG element."""
        return inline_svg(self.figure, self.name, self.description)


def are_finished(runs: Sequence[RunRecord]) -> bool:
    """Whether a method's runs are finished; those of an unfinished method are drawn dashed."""
    return all(run.finished for run in runs)


def pictures(
    runs: Sequence[RunRecord], groups: Groups, metric: str, conclusions: Sequence[Conclusion]
) -> list[Picture]:
    """All figures for which these runs have numbers."""
    found = (
        _metric_by_round(groups, metric),
        _metric_by_megabyte(runs, groups, metric),
        _differences(groups, metric, conclusions),
        _aggregation_error(groups),
        _client_spread(groups, metric),
        _training_loss(groups),
        *_splits(runs),
    )
    return [picture for picture in found if picture is not None]


def _series(groups: Groups, points: Callable[[RunRecord], Points]) -> dict[str, Series]:
    """The mean line of each method, over the rounds that all of its seeds have."""
    found = {}
    for style, (method, runs) in enumerate(groups.items()):
        each = [points(run) for run in runs]
        rounds = sorted(set.intersection(*(set(own) for own in each)))
        if rounds:
            xs = [mean_sd([own[round][0] for own in each])[0] for round in rounds]
            ys = [mean_sd([own[round][1] for own in each]) for round in rounds]
            means, sds = [mean for mean, _ in ys], [sd for _, sd in ys]
            found[method] = Series(style, xs, means, sds, are_finished(runs))
    return found


def _by_round(run: RunRecord, key: str) -> Points:
    """A field of the lines of ``rounds.jsonl``, where it is known."""
    values = ((line["round"], line[key]) for line in run.rounds)
    return {round: (round, value) for round, value in values if value is not None}


def _missing(groups: Groups, drawn: Iterable[str], why: str) -> str:
    absent = [m for m, runs in groups.items() if m not in drawn and are_finished(runs)]
    return f" Not drawn, because {why}: {', '.join(absent)}." if absent else ""


def _band(groups: Groups) -> str:
    several = any(len(runs) > 1 for runs in groups.values())
    text = " Lines are means over seeds, bands one standard deviation." if several else ""
    if not all(map(are_finished, groups.values())):
        text += " Dashed, with open markers: unfinished."
    return text


def _metric_by_round(groups: Groups, metric: str) -> Picture:
    lines = _series(
        groups, lambda run: {int(p.round): (p.round, p.value) for p in run.curve(metric)}
    )
    return Picture(
        "rounds",
        f"{metric} against rounds",
        f"{metric} against rounds for {', '.join(lines)}",
        figures.curves(list(lines.values()), metric, "round"),
        f"{narrative.direction(metric).capitalize()}.{_band(groups)}"
        + _missing(groups, lines, "its seeds share no evaluated round"),
        tuple(lines),
    )


def _metric_by_megabyte(runs: Sequence[RunRecord], groups: Groups, metric: str) -> Picture | None:
    def points(run: RunRecord) -> Points:
        curve = run.curve(metric)
        return {int(p.round): (p.up, p.value) for p in curve} if curve[-1].up else {}

    lines = _series(groups, points)
    if not lines:
        return None
    finished = [run for run in runs if run.finished]
    ranking = rank_methods(finished, metric, "megabytes") if finished else None
    budget = ranking.budget if ranking is not None and len(ranking.places) > 1 else None
    caption = "The fair axis where communication is the cost: all that clients have uploaded."
    if budget is not None:
        sent = narrative.format_megabytes(budget)
        caption += f" Dotted: {sent} MB, the most that all methods have sent."
    return Picture(
        "megabytes",
        f"{metric} against megabytes sent",
        f"{metric} against megabytes sent up for {', '.join(lines)}",
        figures.curves(list(lines.values()), metric, "MB sent up, all clients", budget=budget),
        caption + _missing(groups, lines, "it sends nothing"),
        tuple(lines),
    )


def _differences(groups: Groups, metric: str, conclusions: Sequence[Conclusion]) -> Picture | None:
    paired = {one.title: one.differences for one in conclusions if one.differences}
    if not paired:
        return None
    every = [difference for own in paired.values() for difference in own.values()]
    reference = every[0].reference
    caption = f"Each method minus {reference}, seed by seed, at an equal budget of each kind. "
    if any(difference.interval for difference in every):
        caption += f"Bars: {CONFIDENCE:.0%} confidence intervals of the mean difference; one that "
        caption += "excludes zero is a difference that these seeds show."
    else:
        caption += f"{narrative.NO_INTERVAL.capitalize()}."
    return Picture(
        "differences",
        f"Difference from {reference}",
        f"difference in {metric} from {reference} at each kind of equal budget",
        figures.forest_plot(paired, _styles(groups), metric, reference),
        caption,
    )


def _aggregation_error(groups: Groups) -> Picture | None:
    lines = _series(groups, lambda run: _by_round(run, "aggregation_error"))
    if not lines:
        return None
    return Picture(
        "errors",
        "Aggregation error",
        f"aggregation error of each round for {', '.join(lines)}",
        figures.aggregation_errors(list(lines.values())),
        "How far the server's B·A is from the mean of the clients' B·A, relative to that mean. In "
        "the grey band the average is exact; lines there are spread only to be seen."
        + _missing(groups, lines, "the server cannot know it"),
        tuple(lines),
    )


def _client_spread(groups: Groups, metric: str) -> Picture | None:
    clients = {}
    for method, runs in groups.items():
        if not are_finished(runs):
            continue
        last = [[line for line in run.rounds if line["metrics"]][-1] for run in runs]
        held = [own for line in last for own in line["client_metrics"].values()]
        if values := [own[metric] for own in held if metric in own]:
            clients[method] = values
    if not clients:
        return None
    worst = min if higher_is_better(metric) else max
    return Picture(
        "clients",
        f"{metric} of each client",
        f"{metric} of each client for {', '.join(clients)}",
        figures.client_spread(clients, _styles(groups), metric, worst),
        "On each client's own held-out rows, at the last evaluation, clients of all seeds together."
        " A dot's area is the number of clients; bar: mean; triangle: worst client."
        + _missing(groups, clients, "its clients were not measured"),
    )


def _training_loss(groups: Groups) -> Picture | None:
    lines = _series(groups, lambda run: _by_round(run, "loss"))
    if not lines:
        return None
    return Picture(
        "loss",
        "Training loss",
        f"training loss of each round for {', '.join(lines)}",
        figures.curves(list(lines.values()), "training loss", "round"),
        f"Mean over the round's clients that tell it, weighted by their rows.{_band(groups)}",
        tuple(lines),
    )


def _splits(runs: Sequence[RunRecord]) -> list[Picture]:
    """One picture for each split: seeds differ in it, methods do not."""
    splits: list[list[RunRecord]] = []
    for run in runs:
        same = next((own for own in splits if own[0].partition == run.partition), None)
        splits.append([run]) if same is None else same.append(run)
    return [_split(own, number, len(splits)) for number, own in enumerate(splits)]


def _split(runs: Sequence[RunRecord], number: int, of: int) -> Picture:
    partition = runs[0].partition
    sizes = [client["num_examples"] for client in partition["clients"]]
    dropped = partition.get("dropped", 0)
    caption = f"{len(sizes)} clients hold {min(sizes):,} to {max(sizes):,} rows each."
    for note in (partition.get("note"), dropped and f"{dropped:,} rows are held by no client"):
        caption += f" {note[0].upper()}{note[1:]}." if note else ""
    if of > 1:
        caption += f" The split of {', '.join(run.label for run in runs)}."
    return Picture(
        f"split-{number}",
        "Who holds which rows" + (f" ({number + 1} of {of})" if of > 1 else ""),
        f"training rows of {len(sizes)} clients, {min(sizes)} to {max(sizes)} rows each",
        figures.split_figure(partition),
        caption,
    )


def _styles(groups: Groups) -> dict[str, int]:
    return {method: style for style, method in enumerate(groups)}
